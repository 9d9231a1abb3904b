"""Objectives with a few settings changed, wherever those lie."""

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

T = TypeVar("T")


def made(kind: type[T], /, **settings: Any) -> T:
    """The defaults of a class with these settings, each in the class itself or in one of its parts."""
    return changed(kind(), **settings)


def changed(value: T, /, **settings: Any) -> T:
    """The same with these settings, each in the value itself or in one of its parts."""
    own = {item.name: getattr(value, item.name) for item in fields(value)}  # type: ignore[arg-type]  # a dataclass
    here = {name: setting for name, setting in settings.items() if name in own}
    for name, part in own.items():
        known = {item.name for item in fields(part)} if is_dataclass(part) else set()
        if inner := {key: setting for key, setting in settings.items() if key in known and key not in own}:
            here[name] = replace(part, **inner)  # type: ignore[type-var]
    missing = set(settings) - set(own) - {key for part in own.values() if is_dataclass(part) for key in vars(part)}
    assert not missing, f"{type(value).__name__} has no {missing}"
    return replace(value, **here)  # type: ignore[type-var]
