"""Network pickles of EDM and EDM2 (2206.00364, 2312.02696), read without running anything that they hold.

Such a file is a pickle in which every module carries its class's name, its class's source text, the arguments that it
was made with and its tensors. Here a small machine walks the pickle's opcodes: it imports nothing and calls nothing. A
name stays a `Name`, and a call becomes a `Call` that nobody makes; names that these files do not use end the reading.
The network is then read off that tree. Source texts are skipped.
"""

import mmap
import pickletools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.storage import TypedStorage

from fewstep.utils.errors import CheckpointError

_PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
_STORAGE = "torch.storage._load_from_bytes"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_MODULES = "torch.nn.modules.container.ModuleDict"
_DTYPE = "numpy.dtype"
_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_ARRAYS = ("numpy.ndarray", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_DICTS = ("collections.OrderedDict", "dnnlib.util.EasyDict")
_SETS = ("builtins.set", "__builtin__.set")
_KNOWN = {_PERSISTENT, _STORAGE, _TENSOR, _PARAMETER, _MODULES, _DTYPE, *_SCALARS, *_ARRAYS, *_DICTS, *_SETS}
_NUMBERS = {
    "f8": "d",
    "f4": "f",
    "f2": "e",
    "i8": "q",
    "i4": "i",
    "u8": "Q",
    "u4": "I",
    "i1": "b",
    "u1": "B",
    "b1": "?",
}
_VERSION = 6
_DEPTH = 16
_MOST = 2**40

EDM_CLASSES = {"EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond", "SongUNet", "DhariwalUNet", "UNetBlock"}
EDM_CLASSES |= {"Linear", "Conv2d", "GroupNorm", "PositionalEmbedding", "FourierEmbedding"}
EDM2_CLASSES = {"Precond", "UNet", "Block", "MPConv", "MPFourier"}


@dataclass(frozen=True)
class EDMRecord:
    """A network: the class of its preconditioner, the arguments that made it, and its tensors by their dotted names.

    arguments: by name; those that were given without one have their place's number as name, "0", "1", ...
    Their values are numbers, strings, None, and tuples of them.
    """

    class_name: str
    arguments: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Name:
    """What a pickle names in a module; never looked up."""

    text: str


@dataclass
class Call:
    """What a pickle would have called, with which arguments; never made. state: what it would have been given then."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


def read_edm(file: Path) -> EDMRecord:
    """The network `ema` of a network pickle; raises CheckpointError, in one line, for any other file."""
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            tree = _Machine().run(content)
        if not isinstance(tree, dict) or "ema" not in tree:
            _refuse("it holds no network under the name 'ema'")
        return _Reader().record(tree["ema"])
    except CheckpointError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file} is no network pickle of EDM or EDM2: {reason}; nothing in it was run") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError, MemoryError, struct.error) as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{file} is truncated or no network pickle of EDM or EDM2 ({reason})") from error


def _refuse(reason: str) -> NoReturn:
    raise CheckpointError(reason)


class _Machine:
    """The stack and the memo of a pickle; what stands on them is a constant, a container, a `Name` or a `Call`.

    marks: where on the stack the items of open containers begin.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: Any) -> Any:
        """What the pickle holds, as a tree."""
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                return self.stack.pop()
            act = _OPCODES.get(opcode.name)
            if act is None:
                _refuse(f"its opcode {opcode.name} is none that they use")
            act(self, argument)
        _refuse("it has no end")

    def since_mark(self) -> list[Any]:
        """The items down to the last mark, taken off."""
        place = self.marks.pop()
        items = self.stack[place:]
        del self.stack[place:]
        return items

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_tuple(self, count: int) -> None:
        items = tuple(self.stack.pop() for _ in range(count))
        self.stack.append(items[::-1])

    def push_name(self, text: str) -> None:
        if text not in _KNOWN:
            _refuse(f"it names {' '.join(text.split())[:80]}")
        self.stack.append(Name(text))

    def push_global(self) -> None:
        name, module = (_of_type(str, self.stack.pop()) for _ in range(2))
        self.push_name(f"{module}.{name}")

    def append(self, items: list[Any]) -> None:
        _of_type(list, self.stack[-1]).extend(items)

    def set_items(self, items: list[Any]) -> None:
        owner = _of_type(dict, self.stack[-1])
        for key, value in zip(items[::2], items[1::2], strict=True):
            owner[_of_type((str, int, float, bytes, type(None)), key)] = value

    def call(self) -> None:
        """Names of containers become empty ones; any other stays a call."""
        arguments, name = _of_type(tuple, self.stack.pop()), _of_type(Name, self.stack.pop()).text
        if name == _DTYPE and _of_type(str, arguments[0])[-2:] not in _NUMBERS:
            _refuse(f"it holds numpy values of type {arguments[0][:40]!r}")
        if name in _DICTS and not arguments:
            self.stack.append({})
        elif name in _SETS:
            self.stack.append(list(*arguments))
        else:
            self.stack.append(Call(name, arguments))

    def build(self) -> None:
        """A container's own attributes count for nothing."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Call):
            self.stack[-1].state = state
        else:
            _of_type(dict, self.stack[-1])


def _of_type(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        _refuse(f"a {type(value).__name__} stands where it cannot be")
    return value


_Act = Callable[[_Machine, Any], object]
_CONSTANTS = ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
_TEXTS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_OPCODES: dict[str, _Act] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, argument: None),
    **dict.fromkeys((*_CONSTANTS, *_TEXTS), _Machine.push),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_SET": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.push_tuple(1),
    "TUPLE2": lambda machine, _: machine.push_tuple(2),
    "TUPLE3": lambda machine, _: machine.push_tuple(3),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda machine, _: machine.append(machine.since_mark())),
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(), machine.stack.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "MEMOIZE": lambda machine, _: machine.memo.update({len(machine.memo): machine.stack[-1]}),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda machine, at: machine.memo.update({at: machine.stack[-1]})),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, at: machine.push(machine.memo[at])),
    "GLOBAL": lambda machine, text: machine.push_name(text.replace(" ", ".")),
    "STACK_GLOBAL": lambda machine, _: machine.push_global(),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda machine, _: machine.call()),
    "BUILD": lambda machine, _: machine.build(),
}


class _Module(NamedTuple):
    """A module of the tree: its class, and its attributes."""

    class_name: str
    attributes: dict[str, Any]

    def part(self, name: str) -> dict[str, Any]:
        """Its parameters, buffers or modules."""
        found: dict[str, Any] = _of_type(dict, self.attributes.get(name, {}))
        return found


class _Reader:
    """Reads modules and tensors off a tree, each module at most once, each storage once."""

    def __init__(self) -> None:
        self.modules: set[int] = set()
        self.storages: dict[int, Tensor] = {}

    def record(self, tree: Any) -> EDMRecord:
        root = self.module(tree)
        known = EDM2_CLASSES if root.class_name == "Precond" else EDM_CLASSES
        if not root.class_name.endswith("Precond"):
            _refuse(f"its class is {root.class_name[:80]!r}, no preconditioner of theirs")
        positional = _of_type((tuple, list), root.attributes.get("_init_args", ()))
        named = _of_type(dict, root.attributes.get("_init_kwargs"))
        given = {**{str(place): value for place, value in enumerate(positional)}, **named}
        arguments = {str(name): _plain(value, str(name)) for name, value in given.items()}
        return EDMRecord(root.class_name, arguments, dict(self.tensors(root, "", known)))

    def module(self, value: Any) -> _Module:
        call = _of_type(Call, value)
        if id(call) in self.modules:
            _refuse("a module stands in two places")
        self.modules.add(id(call))
        if call.name == _MODULES:
            return _Module("", _of_type(dict, call.state))
        if call.name != _PERSISTENT or len(call.arguments) != 1:
            _refuse(f"{call.name} stands where a module should")
        meta = _of_type(dict, call.arguments[0])
        if meta.get("type") != "class" or meta.get("version") != _VERSION:
            _refuse(f"a module in it is not of version {_VERSION}")
        return _Module(_of_type(str, meta.get("class_name")), _of_type(dict, meta.get("state")))

    def tensors(self, module: _Module, prefix: str, known: set[str]) -> Iterator[tuple[str, Tensor]]:
        """(dotted name, tensor) of a module and those within it."""
        if module.class_name and module.class_name not in known:
            _refuse(f"a module of class {module.class_name[:80]!r} is none of theirs")
        if prefix.count(".") > _DEPTH:
            _refuse("its modules stand too deep in one another")
        for name, value in {**module.part("_parameters"), **module.part("_buffers")}.items():
            if value is not None:
                yield f"{prefix}{name}", self.tensor(value)
        for name, value in module.part("_modules").items():
            if value is not None:
                yield from self.tensors(self.module(value), f"{prefix}{name}.", known)

    def tensor(self, value: Any) -> Tensor:
        """A view of its storage."""
        call = _of_type(Call, value)
        if call.name == _PARAMETER:
            call = _of_type(Call, call.arguments[0])
        if call.name != _TENSOR or len(call.arguments) < 4:
            _refuse(f"{call.name} stands where a tensor should")
        storage, (offset, size, stride) = self.storage(call.arguments[0]), call.arguments[1:4]
        numbers = (offset, *_of_type(tuple, size), *_of_type(tuple, stride))
        if len(size) != len(stride) or not all(type(number) is int and 0 <= number < _MOST for number in numbers):
            _refuse("a tensor's shape is no shape")
        last = offset + sum(steps * (count - 1) for count, steps in zip(size, stride, strict=True))
        if prod(size) > len(storage) or (prod(size) and last >= len(storage)):
            _refuse(f"a tensor of shape {list(size)} lies in a storage of {len(storage)} numbers")
        return storage.as_strided(size, stride, offset)

    def storage(self, value: Any) -> Tensor:
        """All its numbers, (n,), read by torch.load with nothing but tensors allowed."""
        call = _of_type(Call, value)
        if call.name != _STORAGE or len(call.arguments) != 1:
            _refuse(f"{call.name} stands where a storage should")
        if id(call) not in self.storages:
            content = BytesIO(_of_type(bytes, call.arguments[0]))
            try:
                found: Any = torch.load(content, map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises what it likes
                raise CheckpointError("a storage in it is damaged, or holds more than numbers") from error
            dtype = _of_type(TypedStorage, found).dtype
            if not dtype.is_floating_point:
                _refuse(f"a tensor holds {dtype}")
            self.storages[id(call)] = torch.empty(0, dtype=dtype).set_(found)
        return self.storages[id(call)]


def _plain(value: Any, name: str) -> Any:
    """An argument as a number, a string, None, or a tuple of them."""
    if isinstance(value, (list, tuple)):
        return tuple(_scalar(item, name) for item in value)
    return _scalar(value, name)


def _scalar(value: Any, name: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Call) and value.name in _SCALARS and len(value.arguments) == 2:
        dtype, content = _of_type(Call, value.arguments[0]), _of_type(bytes, value.arguments[1])
        if dtype.name == _DTYPE and dtype.state is not None and dtype.state[1] in ("<", "|"):
            return struct.unpack("<" + _NUMBERS[str(dtype.arguments[0])[-2:]], content)[0]
    _refuse(f"the argument {name[:40]} is no number, string or list of them")
