"""Parts of a run by their base class: which kinds there are, what each is called, and those of the user's own files.

A part is a frozen dataclass under an abstract base: an objective, a network's settings, a path's. Whatever subclass is
defined, here or in anyone's file, is a kind of its base. `import_file`, and a name such as my_file.py:MyObjective that
the user gives for a kind, are all that ever imports code; what a stored file says is looked up among what there is.
"""

import dataclasses
import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar, Union

from fewstep.utils.errors import ConfigError, FewstepError, NotImportedError

T = TypeVar("T")
_IMPORTED: set[str] = set()  # modules of the user's files


def concrete_classes(annotation: Any) -> list[type]:
    """The dataclasses that an annotation stands for: itself and all its subclasses but the abstract ones, or those of
    a union's parts.

    Empty where it stands for other values too.
    """
    if typing.get_origin(annotation) in (Union, types.UnionType):
        parts = [concrete_classes(part) for part in typing.get_args(annotation)]
        return [leaf for part in parts for leaf in part] if all(parts) else []
    if not isinstance(annotation, type) or annotation.__module__ == "builtins":
        return []
    subclasses: list[type] = annotation.__subclasses__()
    decorated = "__dataclass_fields__" in vars(annotation)  # its own, not its base's
    own = [annotation] if decorated and not inspect.isabstract(annotation) else []
    return own + [leaf for each in subclasses for leaf in concrete_classes(each)]


def subclasses(base: type) -> list[type]:
    """All subclasses of a class, at any depth."""
    found: list[type] = base.__subclasses__()
    return found + [each for cls in found for each in subclasses(cls)]


def kind_name(cls: type | str) -> str:
    """LogitNormalTimes -> logit-normal, DiTConfig -> dit, EDMInputScalingConfig -> edm-input: of a class."""
    name = cls if isinstance(cls, str) else cls.__name__
    ending = r"(?<=.)((Path|Preconditioning|Scaling|Network)?Config|Times|Guidance|Source)$"
    stem = re.sub(ending, "", name.rpartition(":")[2])
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])|(?<=[A-Z]{2})(?=[A-Z][a-z])", "-", stem).lower()


def kinds(annotation: Any) -> dict[str, type]:
    """The kinds that an annotation admits, by name; a name of fewstep's own is never another's.

    Those of fewstep's that are said to be `of_files`, or have fields without a default, are nobody's choice.
    """
    found: dict[str, type] = {}
    for cls in concrete_classes(annotation):
        if not (is_own(cls) and (_without_default(cls) or getattr(cls, "of_files", False))):
            found.setdefault(kind_name(cls), cls)
    return found


def kind(annotation: Any, name: str) -> Any:
    """The kind of that name with its own defaults; raises as `kind_class` does."""
    return with_defaults(kind_class(annotation, name))


def take_kinds(settings: Any) -> None:
    """Put the kind of that name, with its defaults, where a dataclass was given a name for one of its parts.

    For `__post_init__`, so that ModelConfig(path="trig") is ModelConfig(path=TrigPathConfig()). Raises as `kind` does.
    """
    for name, annotation in typing.get_type_hints(type(settings)).items():
        given = getattr(settings, name)
        if isinstance(given, str) and concrete_classes(annotation):
            object.__setattr__(settings, name, kind(annotation, given))


def _without_default(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.init and f.default is f.default_factory is dataclasses.MISSING]


def with_defaults(cls: type) -> Any:
    """A part as it is when nothing is set; raises ConfigError where some field has no default."""
    missing = _without_default(cls)
    if missing:
        raise ConfigError(f"{stored_name(cls)} has fields without a default, {', '.join(missing)}: give each one")
    return cls()


def kind_class(annotation: Any, name: str) -> type:
    """The kind of that name, or of FILE.py:CLASS, whose file is imported.

    Raises ConfigError for a name that is not there, listing those that are, that two of the user's classes have, or of
    a class of another kind; and as `import_file` does.
    """
    if ":" in name:
        return _outside(annotation, name)
    wanted = name.replace("_", "-").lower()
    found = [cls for cls in concrete_classes(annotation) if kind_name(cls) == wanted]
    if not found:
        raise ConfigError(f"must be one of {', '.join(kinds(annotation))}; got {name or 'nothing'}")
    if len(found) > 1 and not is_own(found[0]):
        raise ConfigError(f"{name} may be {' or '.join(map(stored_name, found))}: give FILE.py:CLASS")
    return found[0]


def is_own(cls: type) -> bool:
    """Whether a class is fewstep's."""
    return cls.__module__.partition(".")[0] == "fewstep"


def stored_name(cls: type) -> str:
    """What files call a class: MeanFlow where it is fewstep's own, my_file.py:MyObjective where it is another's."""
    return cls.__name__ if is_own(cls) else f"{_file_of(cls).name}:{cls.__qualname__}"


def stored_class(candidates: list[type], name: object) -> type:
    """The one of these classes that a file calls so; nothing is imported.

    Raises ConfigError where there is none, or two of the user's own.
    """
    found = {cls: None for cls in candidates if stored_name(cls) == name}
    current = [cls for cls in found if getattr(sys.modules.get(cls.__module__), cls.__qualname__, cls) is cls]
    if len(current) == 1:
        return current[0]
    if current:
        raise ConfigError(f"{name} may be of {' or '.join(str(_file_of(cls)) for cls in current)}: rename one")
    if isinstance(name, str) and re.fullmatch(r"[\w-]+\.py:[\w.<>]+", name):
        file = name.partition(":")[0]
        raise NotImportedError(
            f"type {name} is no part of fewstep: name the file that has it, with --import {file}, or "
            f'fewstep.import_file("{file}") in Python'
        )
    own = sorted(stored_name(cls) for cls in candidates if is_own(cls))
    raise ConfigError(f"type must be one of {', '.join(own)}, got {name!r}")


def outside_files(value: Any) -> list[Path]:
    """The files of the user's own parts among a dataclass's values, which whoever reads it again must import."""
    if not dataclasses.is_dataclass(value):
        return []
    own = [] if is_own(type(value)) else [_file_of(type(value))]
    inner = (file for field in dataclasses.fields(value) for file in outside_files(getattr(value, field.name)))
    return list(dict.fromkeys([*own, *inner]))


def import_file(file: str | Path) -> types.ModuleType:
    """Import a Python file of the user's, so that its parts can be chosen, and runs that have them be loaded.

    A file is imported once, its folder on the search path meanwhile. Raises ConfigError, in one line, when it is
    missing, fails, or has a part of the name of one of fewstep's own.
    """
    path = Path(file).expanduser()
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(f"{file}: no such file" if path.suffix == ".py" else f"{file} is no Python file, FILE.py")
    path = path.resolve()
    known = (module for module in list(sys.modules.values()) if isinstance(module, types.ModuleType))
    there = next((module for module in known if vars(module).get("__file__") == str(path)), None)
    if there is not None:
        return there
    name = f"{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    _IMPORTED.add(name)
    sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
        _refuse_shadows(module, file)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if isinstance(error, ConfigError):
            raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        place = f", line {lines[-1]}" if lines else ""
        raise ConfigError(f"{file} cannot be imported{place}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def from_file(name: str) -> Any:
    """What FILE.py:NAME stands for, importing the file; raises ConfigError where it has no such name."""
    file, _, inner = name.rpartition(":")
    module = import_file(file)
    try:
        return reduce(getattr, inner.split("."), module)
    except AttributeError:
        homes = module.__name__, "fewstep"
        public = [
            key
            for key, value in vars(module).items()
            if getattr(value, "__module__", "") == homes[0] or type(value).__module__.partition(".")[0] in homes
        ]
        raise ConfigError(f"{file} has no {inner!r}: it has {', '.join(public) or 'nothing of its own'}") from None


def made(name: str, make: Callable[[], T], what: str) -> T:
    """What a function or a class FILE.py:NAME of the user's gives without arguments.

    Raises ConfigError, in one line, where it raises.
    """
    try:
        return make()
    except FewstepError:
        raise
    except Exception as error:
        own = {str(vars(module).get("__file__")) for key, module in list(sys.modules.items()) if key in _IMPORTED}
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in own]
        place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
        raise ConfigError(f"{name} gives no {what}: {type(error).__name__}: {error}{place}") from error


def imported_file(name: str) -> Path | None:
    """The imported file that a run's FILE.py:NAME is of; None for other names, and where none was imported."""
    file, inner, _ = name.partition(":")
    modules = [module for key, module in list(sys.modules.items()) if key in _IMPORTED] if inner else []
    return next((path for module in modules if (path := Path(str(module.__file__))).name == file), None)


def outside_values(kind: type[T]) -> list[T]:
    """The values of a class that the user's imported files have under a name, in the order of import."""
    modules = [module for name, module in list(sys.modules.items()) if name in _IMPORTED]
    values = [value for module in modules for key, value in vars(module).items() if key[0] != "_"]
    return [value for value in values if isinstance(value, kind)]


def outside_function(name: str) -> Callable[..., Any] | None:
    """The function that a run stores as FILE.py:NAME, of a file that was imported; None where none has it."""
    file, _, inner = name.partition(":")
    modules = [module for key, module in list(sys.modules.items()) if key in _IMPORTED]
    found = [vars(module).get(inner) for module in modules if Path(str(module.__file__)).name == file]
    return next((each for each in found if callable(each) and not isinstance(each, type)), None)


def file_of_value(value: object) -> tuple[Path, str] | None:
    """(file, name) of a value that an imported file of the user's has; None where none has it."""
    for module in [module for name, module in list(sys.modules.items()) if name in _IMPORTED]:
        for key, found in vars(module).items():
            if found is value and key[0] != "_":
                return Path(str(module.__file__)), key
    return None


def _outside(annotation: Any, name: str) -> type:
    found = from_file(name)
    known = concrete_classes(annotation)
    if isinstance(found, type) and found in known:
        return found
    base = getattr(annotation, "__name__", str(annotation))
    if not (isinstance(found, type) and isinstance(annotation, type) and issubclass(found, annotation)):
        raise ConfigError(f"{name} is no {base}")
    lacking = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
    raise ConfigError(
        f"{name} lacks {lacking}" if lacking else f"{name} is no dataclass: put @dataclass(frozen=True) on it"
    )


def _file_of(cls: type) -> Path:
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return Path(file or cls.__module__)


def _refuse_shadows(module: types.ModuleType, file: str | Path) -> None:
    """Raise ConfigError where a part defined in a module has the name of one of fewstep's of the same base."""
    own = [cls for cls in vars(module).values() if isinstance(cls, type) and cls.__module__ == module.__name__]
    for cls in own:
        rivals = {
            kind_name(other)
            for base in cls.__mro__
            if is_own(base)
            for other in concrete_classes(base)
            if is_own(other)
        }
        if kind_name(cls) in rivals:
            raise ConfigError(f"{file}: {cls.__name__} has the name of a part of fewstep, {kind_name(cls)}: rename it")
