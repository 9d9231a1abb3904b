"""Which recipe for which data: the rules, each with its reason, and the figures that studies measured nearest to it.

The figures are in measured.json, each with the file of the study that it is read from.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

from fewstep.evaluation.advice.look import Look
from fewstep.flow.flow_map import FlowMap
from fewstep.networks.unet import UNetConfig
from fewstep.recipes import RECIPES, recipe
from fewstep.recipes.config import RunConfig
from fewstep.teachers import TeacherModel
from fewstep.teachers.second_time import TwoTimesConfig
from fewstep.utils.errors import ConfigError
from fewstep.utils.parts import kind_name

Entry = dict[str, Any]
_SMALL, _MIDDLE = 12, 32  # sides of images, in pixels
_ENOUGH_SECONDS = 600  # for images of 64 pixels


@dataclass(frozen=True)
class Choice:
    """A recipe with the options that it needs, why, and the situation whose measurements are nearest to it."""

    recipe: str
    words: tuple[str, ...]
    why: tuple[str, ...]
    situation: str
    cautions: tuple[str, ...] = ()

    @property
    def config(self) -> RunConfig:
        """The recipe's own configuration."""
        return recipe(self.recipe)


@cache
def measured() -> tuple[Entry, ...]:
    """What studies measured: situation, recipe, objective, network, data, machine, figures by calls, seconds, file."""
    text = files("fewstep.evaluation.advice").joinpath("measured.json").read_text()
    return tuple(json.loads(text))


def nearest_measured(choice: Choice, seconds: float) -> tuple[Entry | None, bool]:
    """The longest run of the situation within so many seconds, and whether there is one so short; with no limit the
    longest.

    Of the recipe itself where it was measured, else the first of the situation; None where nothing was.
    """
    found = [each for each in measured() if each["situation"] == choice.situation]
    found = [each for each in found if each["recipe"] == choice.recipe] or found[:1]
    found = [each for each in found if each["objective"] == found[0]["objective"]]
    short = [each for each in found if not seconds or (each["seconds"] or 0) <= seconds]
    best = max(short or found, key=lambda each: each["seconds"] or 0, default=None)
    return best, bool(short)


def others_measured(choice: Choice, entry: Entry) -> list[Entry]:
    """What else was measured on the same data, for comparison."""
    same = [each for each in measured() if each["situation"] == choice.situation and each["seconds"] != 0]
    return [
        each for each in same if each["objective"] != entry["objective"] and each["data"][:12] == entry["data"][:12]
    ]


def choose(data: Look, seconds: float = 0.0) -> Choice:
    """What to train from scratch on the data; seconds: 0 for as many as the recipe takes."""
    if data.source == "demonstrations":
        return _policy(data)
    if data.source == "latents":
        return _latents(data)
    if data.source == "mixture":
        raise ConfigError("mixture is a toy for teachers and students: fewstep train edm-mixture, then ctm-mixture")
    side = data.shape[-1]
    if data.of_files:
        return _pictures(data, seconds)
    if side <= _SMALL:
        return _digits(data)
    if side <= _MIDDLE:
        own = () if data.source == "idx" and not data.words else data.words
        why = ("on small images the U-Net comes nearer in few calls than a transformer of its size",)
        return _unguided(data, Choice("fashion-mnist-unet", own, why, "images-32"))
    return _pictures(data, seconds)


def _policy(data: Look) -> Choice:
    why = (
        "on tasks with several ways iSD in one call is ahead of flow matching's one, and in two near its 16",
        "where a task has but one way, policy-regression and flow matching in one call do as well",
    )
    few = (f"{data.episodes} episodes are few: the studies have 100 to 300",) if data.episodes < 50 else ()
    return Choice("policy-mlp", data.words, why, "policy", few)


def _digits(data: Look) -> Choice:
    if data.classes:
        why = ("with classes guided iSD-T with three quarters of the samples at s = t and guided MeanFlow lead",)
        return Choice("digits", data.words, why, "images-8")
    why = ("without classes there is nothing to guide to, and MeanFlow leads",)
    return Choice("digits-meanflow", data.words, why, "images-8-plain")


def _pictures(data: Look, seconds: float) -> Choice:
    """Pictures in colour, or of other sizes: at 64 pixels where time and pictures allow it, else at 32."""
    small = data.shape[-2] < 64 or 0 < seconds < _ENOUGH_SECONDS
    size = 32 if small else 64
    cautions = (f"{data.count:,} images are few: expect copies of them",) if data.count < 500 else ()
    resized = ("--data.image-size", str(size)) if data.of_files else ()
    if (name := f"photos-{size}") in RECIPES:
        words = data.words if data.of_files else (*data.words, "--data.image-size", "0")
        words = words[2:] if data.source == "images" else words  # the recipe's own source
        why = ("a U-Net on blocks of pixels is cheap: minutes of a CPU give colours and textures, things need longer",)
        return _unguided(data, Choice(name, words, why, name, cautions))
    why = ("a U-Net learns pictures better than a transformer of its size in short runs",)
    return _unguided(data, Choice("digits-unet", (*data.words, *resized), why, "images-32", cautions))


def _latents(data: Look) -> Choice:
    name = "imagenet256-dit-b4" if data.classes else "celebahq256-dit-b4"
    why = ("a transformer on latents; its cost on one GPU is in fewstep recipes",)
    cautions: tuple[str, ...] = ("no recipe for latents has been run to its end; start with a few minutes",)
    if data.prompts:
        cautions = (*cautions, "with prompts a teacher of text pays: add --teacher PIPELINE")
    return Choice(name, data.words[2:], why, "latents", cautions)


def _unguided(data: Look, choice: Choice) -> Choice:
    """Without classes the guidance of a recipe's objective is switched off."""
    guidance = getattr(choice.config.objective, "guidance", None)
    if data.classes or getattr(guidance, "omega", 1.0) == 1.0:
        return choice
    return replace(choice, words=(*choice.words, "--objective.guidance.omega", "1"))


def choose_student(data: Look, teacher: FlowMap, name: str, format: str) -> Choice:
    """What to distil a teacher by; format: diffusers, edm or fewstep.

    Raises ConfigError for a teacher of samples of another shape, or of other classes, than the data.
    """
    shape = tuple(teacher.sample_shape)
    resized = data.of_files and len(shape) == 3 and shape[0] in (1, 3) and shape[1] == shape[2]
    acts = data.source == "demonstrations" and len(shape) == 2 and shape[1] == data.shape[1]
    classed = not teacher.num_classes or data.classes == teacher.num_classes
    if not classed or not (resized or acts or data.shape == shape):
        raise ConfigError(
            f"the teacher {name} makes samples of shape {shape} in {teacher.num_classes} classes, but {data}: name the "
            "data that it was trained on"
        )
    words = [*data.words, "--teacher", name]
    if resized:
        words += ["--data.image-size", str(shape[-1]), "--data.channels", str(shape[0])]
    if data.classes and not teacher.num_classes:
        words += ["--data.no-labels"]
    if data.prompts and format == "diffusers":
        why = ("adapters on a teacher of text: one frozen base serves teacher and student",)
        return Choice("distil-sd-lora", tuple(words), why, "teacher-text")
    return _student(format, teacher, tuple(words))


def _student(format: str, teacher: FlowMap, words: Sequence[str]) -> Choice:
    if format == "diffusers":
        why = ("CTM in the teacher's own network: in two calls a quarter of the distance of the teacher's DDIM",)
        return Choice("distil-diffusers", (*words,), why, "teacher-diffusers")
    if format == "edm":
        why = ("CTM with the computed preconditioning: the teacher's format is known, its data are needed",)
        return Choice("distil-edm", (*words,), why, "teacher-edm")
    path = kind_name(type(teacher.path))
    bare = isinstance(teacher.network, TeacherModel)
    small = teacher.sample_shape[-1] <= _SMALL
    own: tuple[str, ...] = ("--network", "teacher")
    if bare:  # a denoiser of the user's: no weights to start from, and no settings to take
        own = ("--initial=",) if small else ("--initial=", "--network", "unet")
    if path == "linear":
        why = ("CTM leads EMD and LMD in one call, and costs nearly twice EMD's time",)
        return Choice("ctm-flow-matching", (*words, *own), why, "teacher-linear")
    own = (*own, *(("--data.labels",) if teacher.num_classes else ()))
    own = own if bare else (*own, "--model.path", "teacher", "--model.scaling", "teacher")
    network = None if teacher.config is None else teacher.config.network
    if "unet" in own or isinstance(network, UNetConfig | TwoTimesConfig):
        own = (*own, "--network.sees-skip")
    why = ("CTM's jumps go anywhere; consistency distillation (cd-digits) where one call is all that is wanted",)
    return Choice("ctm-digits", (*words, *own), why, "teacher-run")
