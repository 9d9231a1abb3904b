"""A second time for networks that were made for one: s enters where t is embedded, by a branch that is zero at first.

Every embedding e(t) of the network becomes e(t) + P h(s), P zero. So the network equals the one it was made from, to
the last bit, until the first step of training.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fewstep.flow.flow_map import FlowMap
from fewstep.networks.base import LoRA, Network, NetworkConfig, fit_stored, stored_state
from fewstep.networks.layers import LinearLayer, carries_tangent, silu, zeroed
from fewstep.teachers.lora import adapters_of, merged
from fewstep.teachers.sight import SkipSight
from fewstep.utils.errors import CheckpointError, ConfigError
from fewstep.utils.recompute import first_and_anew
from fewstep.utils.serialization import differences, later
from fewstep.utils.tensors import constant
from fewstep.utils.weights import digest, fit_weights, save_weights

_FEATURES = 256
_LONGEST_PERIOD = 10_000.0
_LATER = ("two_times.guidance.", "two_times.sight.")
"""Of tensors that a student may have and its teacher not: zero at first."""


class _ContiguousGroupNorm(nn.GroupNorm):
    """torch's, whose tangents need contiguous input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous())


def differentiable_norms(network: nn.Module) -> None:
    """Put norms that forward-mode differentiation passes through in place of torch's group norms, weights and all."""
    for owner in list(network.modules()):
        for name, norm in list(owner.named_children()):
            if type(norm) is nn.GroupNorm:
                own = _ContiguousGroupNorm(norm.num_groups, norm.num_channels, norm.eps, norm.affine)
                own.load_state_dict(norm.state_dict())
                setattr(owner, name, own)


@contextmanager
def differentiable_attention(*values: Tensor) -> Iterator[None]:
    """Attention written out within, where forward-mode differentiation passes through any of the values."""
    with sdpa_kernel(SDPBackend.MATH) if carries_tangent(*values) else nullcontext():
        yield


def clock_features(t: Tensor, time_factor: float) -> Tensor:
    """Cosines and sines of time_factor t, periods from 2 pi to 10,000 * 2 pi: (B,) -> (B, 256)."""
    half = _FEATURES // 2
    rates = torch.exp(-math.log(_LONGEST_PERIOD) / half * torch.arange(half, device=t.device, dtype=t.dtype))
    angles = time_factor * t[:, None] * rates
    return torch.cat([torch.cos(angles), torch.sin(angles)], 1)


class SecondTime(nn.Module):
    """h(s), (B,) -> (B, width): a layer over the features of s."""

    def __init__(self, width: int, time_factor: float) -> None:
        super().__init__()
        self.time_factor = time_factor
        self.hidden = LinearLayer(_FEATURES, width)

    def forward(self, s: Tensor) -> Tensor:
        found: Tensor = silu(self.hidden(clock_features(s, self.time_factor)))
        return found


class _Shared:
    """h(s) of the pass that is under way."""

    value: Tensor | None = None


class TwoTimeEmbedding(nn.Module):
    """embedding(t) + P h(s), in place of an embedding of t alone."""

    def __init__(self, embedding: nn.Module, width: int, outputs: int, shared: _Shared) -> None:
        super().__init__()
        self.embedding = embedding
        self.project = zeroed(LinearLayer(width, outputs))
        self.shared = shared

    def forward(self, *args: Any, **options: Any) -> Tensor:
        embedded: Tensor = self.embedding(*args, **options)
        if self.shared.value is None:
            return embedded
        added: Tensor = self.project(self.shared.value)
        return embedded + added.to(embedded.dtype)


class TwoTimes(nn.Module):
    """A foreign network whose embeddings of time take a second one: `with at(s): network(...)`.

    pattern: the names of its embeddings of time, as fnmatch reads them: layers, or modules with a last one `linear_2`.
    time_factor: brings its clock to a range of about 1000. guided: whether guidance (B, 3) enters beside s, as
    e(t) + P (h(s) + k(guidance)). Raises ConfigError where the network has no such embedding.
    """

    def __init__(self, network: nn.Module, pattern: str, time_factor: float = 1.0, guided: bool = False) -> None:
        super().__init__()
        places = [name for name, _ in network.named_modules() if fnmatch(name, pattern)]
        if not places:
            raise ConfigError(f"{type(network).__name__} has no embedding of time named {pattern}")
        self.network, self.shared = network, _Shared()
        width = _outputs(network.get_submodule(places[0]))
        self.second_time = SecondTime(width, time_factor)
        self.guidance = LinearLayer(3, width) if guided else None
        self.sight: SkipSight | None = None
        for place in places:
            owner, _, name = place.rpartition(".")
            embedding = network.get_submodule(place)
            two_times = TwoTimeEmbedding(embedding, width, _outputs(embedding), self.shared)
            setattr(network.get_submodule(owner), name, two_times)

    def see_skip(self, first: str, channels: int) -> None:
        """Show the network what a skip lets through, beside its layer of that name; channels: as that is given it."""
        self.sight = SkipSight(self.network.get_submodule(first), channels, 2 * _FEATURES)

    @contextmanager
    def seeing(self, shown: Tensor | None) -> Iterator[None]:
        """What a skip lets through, as the first layer is given it, for the passes within."""
        if self.sight is None:
            yield
            return
        before, self.sight.shown = self.sight.shown, shown
        try:
            yield
        finally:
            self.sight.shown = before

    def gated(self, output: Tensor, seen: Tensor | None, t: Tensor, s: Tensor) -> Tensor:
        """The output (B, *shape) with the gate's share of what a skip lets through; t, s (B,) are the network's."""
        if self.sight is None or seen is None:
            return output
        times = [clock_features(time.to(seen.dtype), self.second_time.time_factor) for time in (t, s)]
        return self.sight.gated(output, seen, torch.cat(times, 1))

    @contextmanager
    def at(self, s: Tensor, guidance: Tensor | None = None) -> Iterator[None]:
        """The time where jumps end, (B,), and the guidance, (B, 3), for the passes within."""
        value: Tensor = self.second_time(s)
        if self.guidance is not None:
            given = constant([0.0, 0.0, 1.0], s).expand(len(s), 3) if guidance is None else guidance.to(s.dtype)
            value = value + silu(self.guidance(given))
        self.shared.value = value
        try:
            yield
        finally:
            self.shared.value = None

    def checkpoint_blocks(self) -> None:
        """Keep no activations within blocks for the backward pass."""
        enable: Any = getattr(self.network, "enable_gradient_checkpointing", None)
        if enable is None:
            raise ConfigError(f"{type(self.network).__name__} has no blocks whose activations can be computed anew")
        enable(self._checkpointed)

    def _checkpointed(self, block: nn.Module, *args: Any) -> Any:
        """block(*args), computed anew for the backward pass, with the second time that it has now.

        A method, so that copies of this module have their own. Tangents pass without it.
        """
        if carries_tangent(*(value for value in args if isinstance(value, Tensor))):
            return block(*args)
        value = self.shared.value

        def run(*args: Any) -> Any:
            before, self.shared.value = self.shared.value, value
            try:
                return block(*args)
            finally:
                self.shared.value = before

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, context_fn=first_and_anew)

    def new_parameters(self) -> Iterator[nn.Parameter]:
        """Those of the second time, of guidance and of what a skip lets through."""
        for own in (self.second_time, self.guidance, self.sight):
            if own is not None:
                yield from own.parameters()
        for module in self.network.modules():
            if isinstance(module, TwoTimeEmbedding):
                yield from module.project.parameters()


def _outputs(embedding: nn.Module) -> int:
    return int(getattr(embedding, "linear_2", embedding).out_features)  # type: ignore[arg-type]


def without_second_time(name: str) -> str | None:
    """A parameter's name in the network of one time; None for one that it has not."""
    if name.startswith(("second_time.", "guidance.", "sight.")) or ".project." in name:
        return None
    return name.removeprefix("network.").replace(".embedding.linear_", ".linear_")


@dataclass(frozen=True, kw_only=True)
class TwoTimesConfig(NetworkConfig):
    """Settings of a foreign network with a second time.

    adapters: on its frozen weights, None trains the whole. sees_skip: whether it is shown what a skip lets through.
    """

    adapters: LoRA | None = later(lambda: None)
    sees_skip: bool = later(bool)

    def with_lora(self, lora: LoRA) -> Self:
        if self.adapters is not None:
            raise ConfigError(
                "the teacher has adapters itself: make it a whole model first, with fewstep merge, or train the whole "
                "network"
            )
        return replace(self, adapters=lora)

    def without_lora(self) -> Self:
        return self if self.adapters is None else replace(self, adapters=None)


class TwoTimesNetwork(Network):
    """A foreign network with a second time. Its layers stay in evaluation mode: no dropout, no labels dropped.

    adapters: on its frozen weights, None where there are none.
    """

    two_times: TwoTimes
    adapters: LoRA | None = None

    @abstractmethod
    def foreign_name(self, key: str) -> str | None:
        """What a parameter or buffer is called where the network comes from; None for those of the second time."""

    def train(self, mode: bool = True) -> Self:
        """Trains the second time; the foreign layers keep to evaluation mode."""
        super().train(mode)
        self.two_times.network.eval()
        return self

    def freeze_second_time(self) -> None:
        for parameter in self.two_times.new_parameters():
            parameter.requires_grad_(False)

    def freeze_sight(self) -> None:
        if self.two_times.sight is not None:
            self.two_times.sight.requires_grad_(False)

    def check_foreign(self, weights: Mapping[str, Tensor], source: str) -> dict[str, str]:
        """Own names by foreign ones; raises CheckpointError where names or shapes of the weights differ from these."""
        own = self.state_dict()
        names = {name: key for key in own if (name := self.foreign_name(key)) is not None}
        lines = differences(_shapes({name: own[key] for name, key in names.items()}), _shapes(weights))
        if lines:
            raise CheckpointError(f"{source}: weights do not fit the configuration: {'; '.join(lines[:3])}")
        return names

    def checkpoint_blocks(self) -> None:
        self.two_times.checkpoint_blocks()

    def elsewhere(self) -> set[str]:
        return set(self._foreign()) if self.adapters is not None and self.adapters.base else set()

    def _foreign(self) -> dict[str, str]:
        """Foreign names by own ones."""
        return {key: name for key in self.state_dict() if (name := self.foreign_name(key)) is not None}

    def base_digest(self) -> str:
        """Of the weights of the network of one time, without adapters."""
        state = self.state_dict()
        return digest({name: state[key] for key, name in self._foreign().items()})

    def share_base(self, other: "TwoTimesNetwork") -> None:
        """Have another's foreign weights as one's own, in the same memory."""
        theirs = other.state_dict(keep_vars=True)
        named = {name: theirs[key] for key, name in other._foreign().items()}
        own = self.state_dict(keep_vars=True)
        for key, name in self._foreign().items():
            own[key].data = named[name].data

    def take(self, other: Network, name: str) -> None:
        """Take the weights of a network of the same class, with or without adapters.

        Adapters stay on the base that is theirs, and what takes guidance, or a skip, as it is where the other has none.
        Raises CheckpointError for a network of another base.
        """
        added = {key: value for key, value in self.state_dict().items() if key.startswith(_LATER)}
        theirs = other if isinstance(other, TwoTimesNetwork) else None
        if theirs is None or (self.adapters is None and theirs.adapters is None):
            fit_weights(self, {**added, **other.state_dict()}, name)
        elif self.adapters is None:
            fit_weights(self, {**added, **merged(theirs.state_dict())}, name)
        elif theirs.base_digest() != self.base_digest():
            raise CheckpointError(f"{name} has other weights than the teacher beneath the adapters")
        elif theirs.adapters is not None:
            fit_stored(self, {**added, **stored_state(theirs)}, name)
        else:
            state = theirs.state_dict()
            second = state.keys() - theirs._foreign().keys()
            self.load_state_dict({key: state[key] for key in second}, strict=False)

    def load_foreign(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Take the weights of the network of one time; raises CheckpointError where names or shapes differ."""
        names = self.check_foreign(weights, source)
        self.load_state_dict({**self.state_dict(), **{names[name]: value for name, value in weights.items()}})


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: list(value.shape) for name, value in weights.items()}


def save_adapters(network: TwoTimesNetwork, folder: Path) -> list[str]:
    """Write what a network with adapters has learned in files of its own; returns their names.

    pytorch_lora_weights.safetensors: unet.LAYER.lora_A.weight and .lora_B.weight (transformer., for transformers), by
    the network's foreign names, as PEFT and diffusers read them; alpha/rank is in B. second_time.safetensors: the rest.
    """
    prefix = "transformer" if "Transformer" in getattr(network.config, "model", "") else "unet"
    state = network.state_dict()
    inner = {key.removeprefix("two_times."): value for key, value in state.items()}
    second = {key: value for key, value in inner.items() if without_second_time(key) is None}
    found: dict[str, Tensor] = {}
    for stem, down, up, scale in adapters_of(state):
        name = network.foreign_name(f"{stem}.base.weight")
        assert name is not None
        layer = f"{prefix}.{name.removesuffix('.weight')}"
        found |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": scale * up}
    folder.mkdir(parents=True, exist_ok=True)
    files = {"pytorch_lora_weights.safetensors": found, "second_time.safetensors": second}
    for file, tensors in files.items():
        save_weights(tensors, folder / file)
    return list(files)


def merged_flow_map(flow_map: FlowMap) -> FlowMap:
    """The map with its network's adapters merged into the weights beneath them; itself where there are none."""
    network, config = flow_map.network, flow_map.config
    if config is None or not isinstance(network, TwoTimesNetwork) or network.adapters is None:
        return flow_map
    whole = replace(config, network=config.network.without_lora()).build()
    whole.network.load_state_dict(merged(network.state_dict()))
    return whole.to(next(network.parameters()).device).eval()
