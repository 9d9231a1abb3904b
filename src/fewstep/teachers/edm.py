"""Teachers from network pickles of EDM and EDM2: a file becomes a flow map on the EDM path (2206.00364, 2312.02696)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.flow.discrete_vp import DiscreteVP
from fewstep.flow.flow_map import FlowMap, FlowMapConfig
from fewstep.flow.paths import EDM, VP
from fewstep.flow.preconditioning.jumps import EulerPreconditioning
from fewstep.flow.preconditioning.network_scaling import EDMScaling, Scaling
from fewstep.flow.preconditioning.prediction import PredictionScaling
from fewstep.networks.base import Shape, at_most
from fewstep.teachers.edm2_networks import EDM2UNetConfig
from fewstep.teachers.edm_networks import DhariwalUNetConfig, EDMNetwork, EDMNetworkConfig, SongUNetConfig
from fewstep.teachers.edm_pickle import EDMRecord, read_edm
from fewstep.utils.errors import CheckpointError, ConfigError
from fewstep.utils.random import seeded
from fewstep.utils.serialization import from_json, to_json

Arguments = dict[str, Any]
_NETWORKS: dict[str, Callable[[], EDMNetworkConfig]] = {"SongUNet": SongUNetConfig, "DhariwalUNet": DhariwalUNetConfig}
_TRAINING = {"use_fp16", "augment_dim", "dropout", "label_dropout", "logvar_channels"}
"""Arguments that say nothing about samples."""
_LOG_FACTOR = 100.0
"""Brings a logarithm of the noise, over four or not, to a range of some hundreds."""
_OWN = {"log_half", "time_factor", "learned_variance", "adapters", "sees_skip"}
"""Fields of our configurations that no file names."""
_DDPM_SIGMA_MAX = 81.0
_MOST = 2**20


@dataclass(frozen=True)
class _Meaning:
    """What a network is on its path. fields: of its configuration, besides those that the file gives."""

    path: EDM
    scaling: Scaling
    fields: Arguments
    sigma_data: float = 0.5


def _edm(take: "_Taker") -> _Meaning:
    """D by c_skip, c_out, c_in, and c_noise = log(sigma)/4; EDM2 the same."""
    low, high = take.number("sigma_min", 0.0), take.number("sigma_max", math.inf)
    sigma_data = take.number("sigma_data", 0.5)
    path = EDM(low if low > 0 else 0.002, high if math.isfinite(high) else 80.0)
    return _Meaning(path, EDMScaling(sigma_data, path), {"time_factor": _LOG_FACTOR}, sigma_data)


def _vp(take: "_Taker") -> _Meaning:
    """D = x - sigma F, F reading x/sqrt(1 + sigma^2) at (M - 1) t, t the time of the VP path at this sigma."""
    beta_min, beta_d = take.number("beta_min", 0.1), take.number("beta_d", 19.9)
    own = VP(beta_min, beta_min + beta_d, take.number("epsilon_t", 1e-5))
    low, high = own.tau(torch.tensor([own.t_min, own.t_max], dtype=torch.float64)).tolist()
    path = EDM(low, high)
    return _Meaning(path, PredictionScaling("epsilon", own, path, time_factor=take.number("M", 1000) - 1), {})


def _ve(take: "_Taker") -> _Meaning:
    """D = x + sigma F, F reading x at log(sigma/2)."""
    path = EDM(take.number("sigma_min", 0.02), take.number("sigma_max", 100.0))
    return _Meaning(path, PredictionScaling("score", path, path), {"log_half": True, "time_factor": _LOG_FACTOR})


def _iddpm(take: "_Taker") -> _Meaning:
    """D = x - sigma F, F reading x/sqrt(1 + sigma^2) at DDPM's step, with learned variances beside the noise.

    alpha_bar(k) = prod_(i <= k) max(sin^2(w (M - i - 1))/sin^2(w (M - i)), C_1), w = pi/(2 M (1 + C_2)), is what the
    steps k = 0, ..., M - 1 have left. Between them the step is interpolated, where the original rounds; the path ends
    where the original starts to sample.
    """
    first, second, steps = take.number("C_1", 0.001), take.number("C_2", 0.008), int(take.number("M", 1000))
    if not 2 <= steps <= 100_000:
        raise ConfigError(f"M is {steps}; it must lie between 2 and 100,000")
    level = torch.sin(torch.arange(steps, -1, -1, dtype=torch.float64) / steps / (1 + second) * math.pi / 2) ** 2
    betas = tuple((1 - (level[1:] / level[:-1]).clamp(min=first)).tolist())
    own = DiscreteVP("cosine", steps=steps) if (first, second) == (0.001, 0.008) else DiscreteVP("given", betas=betas)
    low, high = own.tau(torch.tensor([own.t_min, own.t_max], dtype=torch.float64)).tolist()
    path = EDM(low, min(high, _DDPM_SIGMA_MAX))
    return _Meaning(path, PredictionScaling("epsilon", own, path), {"learned_variance": True})


@dataclass(frozen=True)
class _Preconditioner:
    """places: its first arguments, which may be given without a name. prefix: of its network's tensors."""

    meaning: Callable[["_Taker"], _Meaning]
    model_type: str = ""
    prefix: str = "model."
    places: tuple[str, ...] = ("img_resolution", "img_channels", "label_dim", "use_fp16")


_PRECONDITIONERS = {
    "EDMPrecond": _Preconditioner(_edm, "DhariwalUNet"),
    "VPPrecond": _Preconditioner(_vp, "SongUNet"),
    "VEPrecond": _Preconditioner(_ve, "SongUNet"),
    "iDDPMPrecond": _Preconditioner(_iddpm, "DhariwalUNet"),
    "Precond": _Preconditioner(_edm, prefix="unet."),
}


class _Taker:
    """Takes arguments, one after another, until none is left."""

    def __init__(self, left: Arguments) -> None:
        self.left = {name: value for name, value in left.items() if name not in _TRAINING}

    def number(self, name: str, default: float | None = None) -> float:
        """A number, or what it is where the file does not give it; raises ConfigError for anything else."""
        value = self.left.pop(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            raise ConfigError(f"the argument {name} must be a number, not {str(value)[:40]}")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number from 0 to 2^20."""
        value = self.number(name, default)
        if value not in range(_MOST + 1):
            raise ConfigError(f"the argument {name} must be a whole number up to {_MOST}, not {value}")
        return int(value)

    def rest(self) -> Arguments:
        """Those that are left, for the network; raises ConfigError for sizes that none has, and for names of ours."""
        for name, value in self.left.items():
            sizes = value if isinstance(value, tuple) else (value,)
            if any(type(size) is int and abs(size) > _MOST for size in sizes):
                raise ConfigError(f"the argument {name[:40]} has numbers beyond {_MOST}")
            if name in _OWN:
                raise ConfigError(f"arguments: unknown key {name}")
        return self.left


def is_edm(file: Path) -> bool:
    """Whether a path is a pickle's, as network pickles are; `load_edm` says whether it holds a network."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        start = opened.read(2)
    return len(start) == 2 and start[0] == 0x80 and 2 <= start[1] <= 5


def load_edm(file: Path) -> FlowMap:
    """The network `ema` of a network pickle, as a denoiser on the EDM path over the noise levels that it says.

    Raises CheckpointError, in one line, where the file is none, is damaged, or says what these networks do not know.
    """
    record = read_edm(file)
    weights = _weights(record)
    try:
        config = _configuration(record)
        # A file that announces more than it holds is refused before there is room for it.
        with torch.device("meta"), at_most(len(record.tensors)):
            sketch = config.network.build(config.shape, config.num_classes, guided=False)
        assert isinstance(sketch, EDMNetwork)
        sketch.check_foreign(weights, str(file))
    except (ConfigError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{file}: a {record.class_name} that cannot be built: {reason}") from error
    with seeded(0):  # what no file holds, the second time, is the same whenever the teacher is read
        flow_map = config.build()
    assert isinstance(flow_map.network, EDMNetwork)
    flow_map.network.load_foreign(weights, str(file))
    return flow_map.eval()


def read_edm_weights(file: Path) -> dict[str, Tensor]:
    """Of the network in a network pickle, by its own names; raises CheckpointError as `load_edm` does."""
    return _weights(read_edm(file))


def _weights(record: EDMRecord) -> dict[str, Tensor]:
    prefix = _PRECONDITIONERS[record.class_name].prefix
    return {
        name.removeprefix(prefix): value
        for name, value in record.tensors.items()
        if name.startswith(prefix) and name != f"{prefix}map_augment.weight"
    }


def _configuration(record: EDMRecord) -> FlowMapConfig:
    """The flow map that a record's arguments describe; raises ConfigError for those that it does not know."""
    kind = _PRECONDITIONERS[record.class_name]
    names = {str(place): name for place, name in enumerate(kind.places)}
    take = _Taker({names.get(name, name): value for name, value in record.arguments.items()})
    side, channels = take.count("img_resolution"), take.count("img_channels")
    shape: Shape = (channels, side, side)
    num_classes = take.count("label_dim", 0)
    meaning = kind.meaning(take)
    model_type = take.left.pop("model_type", kind.model_type)
    if kind.model_type and model_type not in _NETWORKS:
        raise ConfigError(f"networks of class {str(model_type)[:40]!r} are not known; known are {', '.join(_NETWORKS)}")
    usual = _NETWORKS[model_type]() if kind.model_type else EDM2UNetConfig()
    values = to_json(usual)
    assert isinstance(values, dict)
    config = from_json(type(usual), {**values, **take.rest(), **meaning.fields}, "arguments")
    if config.num_blocks * len(config.channel_mult) > len(record.tensors):
        raise ConfigError(f"{config.num_blocks} blocks at each level, but {len(record.tensors)} tensors in all")
    return FlowMapConfig(
        meaning.path, EulerPreconditioning(meaning.path), meaning.scaling, config, shape, num_classes,
        sigma_data=meaning.sigma_data,
    )  # fmt: skip
