"""Which recipe for which data, teacher and time, with the figures that studies measured."""
