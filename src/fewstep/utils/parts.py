"""Parts of a run by their base class: which kinds there are, and what each is called.

A part is a frozen dataclass under an abstract base: an objective, a network's settings, a path's. Whatever subclass is
defined, here or in anyone's file, is a kind of its base.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from typing import Any, Union

from fewstep.utils.errors import ConfigError


def concrete_classes(annotation: Any) -> list[type]:
    """The dataclasses that an annotation stands for: itself and all its subclasses but the abstract ones, or those of
    a union's parts.

    Empty where it stands for other values too.
    """
    if typing.get_origin(annotation) in (Union, types.UnionType):
        parts = [concrete_classes(part) for part in typing.get_args(annotation)]
        return [leaf for part in parts for leaf in part] if all(parts) else []
    if not isinstance(annotation, type):
        return []
    subclasses: list[type] = annotation.__subclasses__()
    own = [annotation] if dataclasses.is_dataclass(annotation) and not inspect.isabstract(annotation) else []
    return own + [leaf for each in subclasses for leaf in concrete_classes(each)]


def kind_name(cls: type | str) -> str:
    """LogitNormalTimes -> logit-normal, DiTConfig -> dit, EDMInputScalingConfig -> edm-input: of a class."""
    name = cls if isinstance(cls, str) else cls.__name__
    stem = re.sub(r"(?<=.)((Path|Preconditioning|Scaling)?Config|Times|Guidance)$", "", name)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])|(?<=[A-Z]{2})(?=[A-Z][a-z])", "-", stem).lower()


def kinds(annotation: Any) -> dict[str, type]:
    """The kinds that an annotation admits, by name."""
    return {kind_name(cls): cls for cls in concrete_classes(annotation)}


def kind(annotation: Any, name: str) -> Any:
    """The kind of that name with its own defaults; raises ConfigError listing those there are."""
    known = kinds(annotation)
    if (found := name.replace("_", "-").lower()) not in known:
        raise ConfigError(f"must be one of {', '.join(known)}; got {name or 'nothing'}")
    return known[found]()
