"""Network pickles in EDM's and EDM2's layout, with random weights; and pickles of their kind that mean harm."""

import pickle
import struct
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.networks.base import NetworkConfig
from fewstep.teachers.edm2_networks import EDM2UNetConfig
from fewstep.teachers.edm_networks import DhariwalUNetConfig, EDMNetwork, SongUNetConfig

SOURCE = "raise SystemExit('the stored source was run')"
_SMALL = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
_LAYERS = {"enc": "", "dec": "", "model": "SongUNet", "unet": "UNet"}


class Tiny(NamedTuple):
    """preconditioner: its class. arguments: that it is made with, besides the samples' size. config: our network's."""

    preconditioner: str
    arguments: dict[str, Any]
    config: NetworkConfig
    prefix: str = "model."

    def weights(self, channels: int, classes: int) -> dict[str, Tensor]:
        """By the file's names."""
        network = self.config.build((channels, 8, 8), classes, guided=False)
        assert isinstance(network, EDMNetwork)
        draw = torch.Generator().manual_seed(0)
        found = {}
        for key, value in network.state_dict().items():
            name = network.foreign_name(key)
            if name is not None and name.endswith("resample_filter"):
                found[self.prefix + name] = value
            elif name is not None:
                size = value[0].numel() ** 0.5 if value.ndim > 1 else 1.0
                found[self.prefix + name] = torch.randn(value.shape, generator=draw) / size + float(value.ndim == 0)
        return found


def _song(preconditioner: str, more: dict[str, Any], **fields: Any) -> Tiny:
    arguments = {"model_type": "SongUNet", **_SMALL, "dropout": 0.1, "use_fp16": True, **fields, **more}
    settings: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in {**_SMALL, **fields}.items()
    }
    return Tiny(
        preconditioner, arguments, SongUNetConfig(**settings, learned_variance=preconditioner == "iDDPMPrecond")
    )


DDPMPP = {"embedding_type": "positional", "encoder_type": "standard", "decoder_type": "standard"}
NCSNPP = {"embedding_type": "fourier", "encoder_type": "residual", "decoder_type": "standard"}
SKIPS = {"embedding_type": "fourier", "encoder_type": "skip", "decoder_type": "skip"}
_WIDE = {"channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]}
TINY = {
    "ddpmpp": _song("EDMPrecond", {"augment_dim": 9, "sigma_data": np.float64(0.6)}, **DDPMPP),
    "ncsnpp": _song("VEPrecond", {}, **NCSNPP, **_WIDE),
    "skips": _song("EDMPrecond", {}, **SKIPS, **_WIDE),
    "vp": _song("VPPrecond", {}, **DDPMPP),
    "iddpm": _song("iDDPMPrecond", {"M": 100}, **DDPMPP),
    "adm": Tiny(
        "EDMPrecond",
        {**_SMALL, "model_channels": 32, "channel_mult": [1, 2]},
        DhariwalUNetConfig(32, (1, 2), 1, (4,)),
    ),
    "edm2": Tiny(
        "Precond",
        {**_SMALL, "channels_per_head": 8, "logvar_channels": 16},
        EDM2UNetConfig(8, (1, 2), 1, (4,), channels_per_head=8),
        "unet.",
    ),
}


def _reconstruct_persistent_obj(meta: object) -> None:
    raise AssertionError("a persistent object was made")


def _load_module(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    for key, member in members.items():
        member.__module__ = name
        setattr(module, key, member)
    return module


class EasyDict(dict[str, Any]):
    """What stands for EDM's dictionary with attributes."""


@contextmanager
def _their_modules() -> Iterator[None]:
    """Modules of their names, for as long as a pickle is written."""
    made = {
        "torch_utils": _load_module("torch_utils"),
        "torch_utils.persistence": _load_module(
            "torch_utils.persistence", _reconstruct_persistent_obj=_reconstruct_persistent_obj
        ),
        "dnnlib": _load_module("dnnlib"),
        "dnnlib.util": _load_module("dnnlib.util", EasyDict=EasyDict),
    }
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


class Persistent:
    """An object as their persistence stores it."""

    def __init__(self, class_name: str, **state: Any) -> None:
        self.meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": class_name, "state": state}

    def __reduce__(self) -> tuple[Any, ...]:
        return _reconstruct_persistent_obj, (self.meta,)


def module(tensors: dict[str, Tensor], class_name: str, layer: str, **state: Any) -> Any:
    """A module that holds tensors by their dotted names; layer: the class of those within that have no other."""
    own = {name: value for name, value in tensors.items() if "." not in name}
    buffers = {name: value for name, value in own.items() if name in ("resample_filter", "freqs", "phases", "u")}
    parts: dict[str, Any] = {"unused": None}
    for name in dict.fromkeys(name.partition(".")[0] for name in tensors if "." in name):
        inner = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        parts[name] = module(inner, _LAYERS.get(name, layer), layer)
    if not class_name:
        container = nn.ModuleDict()
        container.__dict__["_modules"] = parts
        return container
    return Persistent(
        class_name,
        training=False,
        skip_scale=np.sqrt(0.5),
        _parameters=OrderedDict((k, nn.Parameter(v)) for k, v in own.items() if k not in buffers),
        _buffers=OrderedDict(buffers),
        _modules=OrderedDict(parts),
        _non_persistent_buffers_set=set(),
        **{"_init_args": (), "_init_kwargs": {}, **state},
    )


def network(kind: str, channels: int = 2, classes: int = 3, **changes: Any) -> tuple[Any, dict[str, Tensor]]:
    """A tiny network as an object to pickle, and its tensors; changes: to the arguments alone."""
    tiny = TINY[kind]
    weights = tiny.weights(channels, classes)
    more = {"logvar_linear.weight": torch.ones(1, 16)} if kind == "edm2" else {"u": torch.ones(3)}
    if "augment_dim" in tiny.arguments:
        more["model.map_augment.weight"] = torch.randn(8, 9)
    arguments = {**tiny.arguments, "img_channels": channels, "label_dim": classes, **changes}
    layer = "MPConv" if kind == "edm2" else "Conv2d"
    stored = module({**weights, **more}, tiny.preconditioner, layer, _init_args=(8,), _init_kwargs=EasyDict(arguments))
    return stored, weights


def write(file: Path, content: Any) -> Path:
    """Pickle an object as these files are."""
    with _their_modules():
        file.write_bytes(pickle.dumps(content))
    return file


def save_edm(file: Path, kind: str, **options: Any) -> dict[str, Tensor]:
    """Write a network pickle, options as of `network`; returns its tensors without their prefix, in float64."""
    stored, weights = network(kind, **options)
    extra = {"loss_fn": Persistent("EDMLoss", P_mean=-1.2), "encoder": Persistent("VAE", scale=np.ones(4, np.float32))}
    write(file, EasyDict(ema=stored, **extra, dataset_kwargs=EasyDict(path="data.zip", resolution=8)))
    return {name.removeprefix(TINY[kind].prefix): value.double() for name, value in weights.items()}


class Runs:
    """Pickled as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def storage_of(count: int, held: int) -> bytes:
    """What torch.save makes of a storage that says it has `count` numbers, and holds `held`."""

    class _Pickler(pickle._Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", count, None) if value is _Pickler else None

    class _File(list[bytes]):
        write = list.append

    written: Any = _File()
    _Pickler(written, 2).dump(_Pickler)
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    parts = [pickle.dumps(value, 2) for value in head]
    return b"".join([*parts, *written, pickle.dumps(["0"], 2), struct.pack("<q", count), bytes(4 * held)])
