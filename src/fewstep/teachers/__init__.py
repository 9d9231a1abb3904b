"""Teachers: models of the denoiser that others learn from, each on a path of its own."""

from fewstep.teachers.base import Teacher, denoiser_on
from fewstep.teachers.diffusers import is_diffusers, load_diffusers
from fewstep.teachers.edm import is_edm, load_edm
from fewstep.teachers.model import TeacherModel, own_teacher

__all__ = [
    "Teacher",
    "TeacherModel",
    "denoiser_on",
    "is_diffusers",
    "is_edm",
    "load_diffusers",
    "load_edm",
    "own_teacher",
]
