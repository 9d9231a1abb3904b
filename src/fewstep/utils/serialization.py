"""Frozen dataclasses to JSON and back, strictly: unknown keys, missing keys and wrong types are errors.

A field added after files were written is declared with `later(...)`: a file that lacks it means its default.

A value whose annotation admits several dataclasses (a union, or an abstract base) is stored with a `type` key that
names its class (fewstep.utils.parts.stored_name); on loading, only classes that the annotation admits, and that are
there already, are candidates. Nothing is imported by name.
A tensor is stored as {dtype, shape, values}, its finite values exactly and in one flat list; one of more than 4,096
numbers as {dtype, shape, base64}, their bytes.
"""

import base64
import dataclasses
import math
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, TypeVar, Union

import numpy as np
import torch
from torch import Tensor

from fewstep.utils.errors import CheckpointError, ConfigError, FewstepError, LaterFormatError
from fewstep.utils.files import reading
from fewstep.utils.old_names import translated_file
from fewstep.utils.parts import concrete_classes, stored_class, stored_name

T = TypeVar("T")
JSON = Union[None, bool, int, float, str, list["JSON"], dict[str, "JSON"]]  # noqa: UP007  (evaluated at run time)

_DTYPES = {"float64": torch.float64, "float32": torch.float32}
_SHOWN = 120
_AS_NUMBERS = 4096
"""Numbers of a tensor up to which they are written as such; more as base64 of their bytes, lowest first."""


_LATER = "later"
FORMAT = 2
"""Of the files config.json: raised when an older fewstep would misread a newer file."""


def later(make: Callable[[], T]) -> T:
    """A dataclass field that older files lack, which then meant what `make` returns; that must never change."""
    return dataclasses.field(default_factory=make, metadata={_LATER: True})


def later_value(value: T) -> T:
    """The same with an immutable value, for a field in the place of a property of the base class."""
    return dataclasses.field(default=value, metadata={_LATER: True})


def in_this_format(record: dict[str, Any], source: str) -> dict[str, Any]:
    """A file's record in today's names (fewstep.utils.old_names); a file without a format number is of the first.

    Raises CheckpointError for a file of a later format than this one, or one of an earlier that is damaged.
    """
    found = record.get("format", 1)
    if type(found) is not int or found < 1:
        raise CheckpointError(f"{source} is damaged: its format is {found!r}, which should be a number from 1 on")
    if found > FORMAT:
        raise LaterFormatError(
            f"{source} has format {found}, and this fewstep reads formats up to {FORMAT}: install a newer fewstep"
        )
    with reading(source, "bring back a copy of it"):
        return {**(translated_file(record) if found == 1 else record), "format": FORMAT}


def to_json(value: Any, *, terse: bool = False) -> JSON:
    """A dataclass (or a tuple, tensor, number, string, None) as JSON values; a dataclass carries its name as `type`.

    terse: without the fields made by `later` that have the value which their absence means.
    Raises ConfigError for anything else, and for tensors of another dtype or with values that are not finite.
    """
    if isinstance(value, Tensor):
        return _encode_tensor(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields: dict[str, JSON] = {"type": stored_name(type(value))}
        for field in dataclasses.fields(value):
            own = getattr(value, field.name)
            if not (terse and _LATER in field.metadata and own == _default(field)):
                fields[field.name] = to_json(own, terse=terse)
        return fields
    if isinstance(value, (list, tuple)):
        return [to_json(item, terse=terse) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(f"a value of type {type(value).__name__} cannot be stored as JSON: {value!r}")


def _default(field: dataclasses.Field[Any]) -> Any:
    """What a field is where nothing is given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def from_json(cls: type[T], data: Any, where: str = "") -> T:
    """Rebuild what `to_json` stored; raises ConfigError naming the key that does not fit."""
    return typing.cast(T, _decode(cls, data, where or cls.__name__))


def _decode(annotation: Any, data: Any, where: str) -> Any:
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType):
        options = typing.get_args(annotation)
        rest = [option for option in options if option is not type(None)]
        if data is None and len(rest) < len(options):
            return None
        return _decode(rest[0], data, where) if len(rest) == 1 else _decode_one_of(rest, data, where)
    if origin is Literal:
        return _expect(data in typing.get_args(annotation), data, where, f"one of {typing.get_args(annotation)}")
    if origin is tuple:
        return _decode_tuple(typing.get_args(annotation), data, where)
    if annotation is float:
        fits = isinstance(data, (int, float)) and not isinstance(data, bool)
        return float(_expect(fits, data, where, "a number"))
    if annotation in (int, str, bool):
        fits = isinstance(data, annotation) and (annotation is bool or not isinstance(data, bool))
        return _expect(fits, data, where, f"of type {annotation.__name__}")
    if annotation is Tensor:
        return _decode_tensor(data, where)
    if annotation is type(None):
        return _expect(data is None, data, where, "null")
    return _decode_one_of([annotation], data, where)


def _expect(fits: bool, data: Any, where: str, what: str) -> Any:
    if not fits:
        raise ConfigError(f"{where} must be {what}, got {_shown(data)}")
    return data


def _decode_tuple(items: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    _expect(isinstance(data, (list, tuple)), data, where, "a list")
    if len(items) == 2 and items[1] is Ellipsis:
        return tuple(_decode(items[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    _expect(len(items) == len(data), data, where, f"a list of {len(items)}")
    return tuple(_decode(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(items, data, strict=True)))


def _encode_tensor(value: Tensor) -> JSON:
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in _DTYPES or not bool(value.isfinite().all()):
        raise ConfigError(f"a tensor must be {' or '.join(_DTYPES)} and finite to be stored, got {_shown(str(value))}")
    record: dict[str, JSON] = {"dtype": dtype, "shape": list(value.shape)}
    if value.numel() <= _AS_NUMBERS:
        return record | {"values": value.detach().cpu().flatten().tolist()}
    raw = value.detach().cpu().contiguous().numpy().astype(f"<f{value.element_size()}").tobytes()
    return record | {"base64": base64.b64encode(raw).decode("ascii")}


def _decode_tensor(data: Any, where: str) -> Tensor:
    forms = ({"dtype", "shape", "values"}, {"dtype", "shape", "base64"})
    _expect(isinstance(data, dict) and set(data) in forms, data, where, "a stored tensor")
    name = data["dtype"]
    _expect(isinstance(name, str) and name in _DTYPES, name, f"{where}.dtype", f"one of {', '.join(_DTYPES)}")
    shape = _decode_tuple((int, Ellipsis), data["shape"], f"{where}.shape")
    _expect(all(n >= 0 for n in shape), data, where, "a stored tensor")
    form = "values" if "values" in data else "base64"
    numbers = _decode_numbers if form == "values" else _decode_base64
    found = numbers(data[form], _DTYPES[name], math.prod(shape), f"{where}.{form}").reshape(shape)
    _expect(bool(found.isfinite().all()), "others", f"{where}.{form}", "finite numbers")
    return found


def _decode_numbers(values: Any, dtype: torch.dtype, count: int, where: str) -> Tensor:
    _expect(isinstance(values, list), values, where, "a list of numbers")
    _expect(len(values) == count, len(values), f"number of {where}", str(count))
    return torch.tensor([_decode(float, value, f"{where}[{i}]") for i, value in enumerate(values)], dtype=dtype)


def _decode_base64(text: Any, dtype: torch.dtype, count: int, where: str) -> Tensor:
    _expect(isinstance(text, str), text, where, "base64")
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ConfigError(f"{where} must be base64 ({error})") from error
    _expect(len(raw) == count * dtype.itemsize, len(raw), f"bytes of {where}", str(count * dtype.itemsize))
    return torch.from_numpy(np.frombuffer(raw, f"<f{dtype.itemsize}").astype(f"f{dtype.itemsize}"))


def _decode_one_of(candidates: list[type], data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), data, where, "an object")
    classes = [leaf for cls in candidates for leaf in concrete_classes(cls)]
    try:
        cls = classes[0] if len(classes) == 1 and "type" not in data else stored_class(classes, data.get("type"))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(fields) - {"type"})
    if unknown:
        raise ConfigError(f"{where}: unknown key {', '.join(unknown)}; known keys: {', '.join(fields)}")
    missing = sorted(key for key in set(fields) - set(data) if not fields[key].metadata.get(_LATER))
    if missing:
        raise ConfigError(f"{where}: missing key {', '.join(missing)}")
    values = {key: _decode(hints[key], data[key], f"{where}.{key}") for key in fields if key in data}
    try:
        return cls(**values)
    except FewstepError as error:  # the class says what does not fit, but not where it stands
        raise ConfigError(f"{where}: {error}") from error


def leaves(value: JSON, where: str = "") -> list[tuple[str, JSON]]:
    """(dotted key, value) of everything in a stored configuration that is no object itself."""
    if not isinstance(value, dict):
        return [(where, value)]
    return [leaf for key, item in value.items() for leaf in leaves(item, f"{where}.{key}" if where else key)]


def differences(old: JSON, new: JSON, where: str = "") -> list[str]:
    """One line for every value that differs between two stored configurations: 'key: old -> new'."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(set(old) | set(new)):
            name = f"{where}.{key}" if where else key
            if key in old and key in new:
                lines += differences(old[key], new[key], name)
            else:
                lines.append(
                    f"{name}: {_shown(old[key]) if key in old else 'absent'} -> "
                    f"{_shown(new[key]) if key in new else 'absent'}"
                )
        return lines
    return [] if old == new else [f"{where}: {_shown(old)} -> {_shown(new)}"]


def _shown(value: object) -> str:
    """A value in a message, cut where it is long (tables)."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
