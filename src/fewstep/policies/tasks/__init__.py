"""The tasks that policies are trained and measured in."""
