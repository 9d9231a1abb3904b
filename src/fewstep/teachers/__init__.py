"""Teachers: models of the denoiser that others learn from, each on a path of its own."""

from fewstep.teachers.base import Teacher, denoiser_on

__all__ = ["Teacher", "denoiser_on"]
