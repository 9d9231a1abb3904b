"""The contract between a network and the rest: raw outputs F(x, t, s, cond), and nothing about paths."""

import dataclasses
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from fewstep.networks.condition import Condition
from fewstep.networks.layers import ConditionEmbedding, LinearLayer, zeroed
from fewstep.networks.recompute import recomputed
from fewstep.utils.errors import ConfigError, MissingExtraError
from fewstep.utils.parts import is_own
from fewstep.utils.serialization import later
from fewstep.utils.tensors import check_choice, check_least, expand
from fewstep.utils.weights import fit_weights

Shape = tuple[int, ...]
AdaptedLayers = Literal["attention", "all"]
_LARGEST = 2**24
MOST_TENSORS = 2**11
"""Of a network, far beyond the largest that are known."""


@contextmanager
def at_most(tensors: int) -> Iterator[None]:
    """Inside, a network that takes more tensors is refused by a ConfigError before it is half built.

    A parameter may be put in several places while it is made: each of the tensors counts up to four times.
    """
    made, thread = 0, threading.get_ident()

    def count(*_: object) -> None:
        nonlocal made
        made += threading.get_ident() == thread
        if made > 4 * tensors + 64:
            raise ConfigError(f"a network of more than {tensors} tensors: take a smaller network")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on a frozen network (2106.09685): W + (alpha/rank) B A, A (rank, in), B (out, rank).

    alpha: 0 for the rank itself. layers: attention alone, or all layers within blocks. base: where the network's own
    weights lie, which files with the adapters then do not hold; digest: of those weights.
    """

    rank: int
    alpha: float = 0.0
    layers: AdaptedLayers = "attention"
    base: str = ""
    digest: str = ""

    def __post_init__(self) -> None:
        check_least(1, **{"the rank of lora": self.rank})
        check_least(0, lora_alpha=self.alpha)
        check_choice("lora_layers", self.layers, ("attention", "all"))

    @property
    def scale(self) -> float:
        """alpha/rank, 1 where alpha is not given."""
        return self.alpha / self.rank if self.alpha else 1.0


class Network(nn.Module, ABC):
    """A raw network F of two times.

    shape: a sample's shape without the batch. num_classes: 0 when there are no labels. guided: whether the
    guidance (log omega, t_lo, t_hi) is an input. observation: shape (To, Do) of the observations that are, () for none.
    Times arrive as the inner scaling's c_noise gives them.
    """

    def __init__(self, shape: Shape, num_classes: int, guided: bool, observation: Shape = ()) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.num_classes = num_classes
        self.guided = guided
        self.observation = tuple(observation)

    @property
    def prompt_widths(self) -> tuple[int, int]:
        """Widths of the embeddings of a prompt's tokens, and of the whole prompt, that it takes; 0 for none."""
        return 0, 0

    compiles: bool = False
    """Whether torch.compile makes one program of it, with a tangent too (--runtime.compile)."""
    sees_skip: bool = False
    """Whether it is shown what a skip lets through (`Condition.seen`)."""

    @property
    def masks_prompts(self) -> bool:
        """Whether it looks at which of a prompt's tokens count."""
        return False

    @property
    def own_guidance(self) -> bool:
        """Whether it was made with a strength of guidance as an input, which is a constant where none is given."""
        return False

    @property
    def last_layer(self) -> Tensor:
        """The weight of the output layer; raises ConfigError for a network that does not say."""
        raise ConfigError(f"{type(self).__name__} does not name its output layer: balance no losses on it")

    def take(self, other: "Network", name: str) -> None:
        """Take the weights of a network of the same settings; raises CheckpointError, with its name, for others."""
        fit_weights(self, other.state_dict(), name)

    def checkpoint_blocks(self) -> None:
        """Keep no activations within blocks for the backward pass, which computes them anew.

        Raises ConfigError for a network that cannot.
        """
        kinds = "networks of fewstep, diffusers, EDM and EDM2"
        raise ConfigError(f"{type(self).__name__} keeps its activations: gradient checkpointing is for {kinds}")

    recomputes_tangents: bool = False
    """Whether what `checkpoint_blocks` does holds for passes with forward-mode tangents too."""

    def elsewhere(self) -> Collection[str]:
        """Names of tensors that files leave out, because the base of adapters holds them."""
        return ()

    def freeze_second_time(self) -> None:
        """Keep the branch of s, which starts at zero, out of training on the diagonal, where s says nothing new.

        Whoever takes the weights over then starts independent of s. Networks without such a branch ignore it.
        """

    def freeze_sight(self) -> None:
        """Keep what takes a skip out of training, where there is no skip to see. Others ignore it."""

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        """x (B, *shape), t (B,), s (B,) -> (B, *shape)."""


def stored_state(module: nn.Module) -> dict[str, Tensor]:
    """What files hold of a module: its state, without what lies elsewhere."""
    left_out = module.elsewhere() if isinstance(module, Network) else ()
    return {key: value for key, value in module.state_dict().items() if key not in left_out}


def fit_stored(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load what a file holds of a module; a base that it holds besides, as older files do, is left aside.

    Raises CheckpointError as `fit_weights` does.
    """
    left_out = module.elsewhere() if isinstance(module, Network) else ()
    given = {key: value for key, value in weights.items() if key not in left_out}
    fit_weights(module, given, source, stored_state(module))


class EmbeddingNetwork(Network):
    """A network that embeds times and conditions together and ends in a layer `output`."""

    embedding: ConditionEmbedding
    output: nn.Linear | nn.Conv1d | nn.Conv2d
    seen: nn.Module
    gate: LinearLayer
    recomputes_tangents = True
    recomputes: bool = False
    """Whether its blocks keep no activations."""

    def checkpoint_blocks(self) -> None:
        self.recomputes, self.compiles = True, False

    def apply_block(self, block: nn.Module, *args: Any, draws: bool = False) -> Tensor:
        """block(*args), a tensor, without activations that are kept where that is asked for; draws: at random."""
        if self.recomputes and torch.is_grad_enabled():
            return recomputed(block, *args, draws=draws)
        found: Tensor = block(*args)
        return found

    def see_skip(self, layer: nn.Module, width: int) -> None:
        """Build what takes `Condition.seen`: a layer beside the first, and a gate on the output, both zero at first.

        The weights of a network that sees none still fit. width: of the embedding.
        """
        self.sees_skip = True
        self.seen, self.gate = zeroed(layer), zeroed(LinearLayer(width, 1))

    def with_seen(self, h: Tensor, cond: Condition | None, prepare: Callable[[Tensor], Tensor]) -> Tensor:
        """First features with those of what the skip lets through; prepare: as the first layer's input is prepared."""
        if cond is None or cond.seen is None or not self.sees_skip:
            return h
        found: Tensor = h + self.seen(prepare(cond.seen))
        return found

    def gated(self, out: Tensor, embedding: Tensor, cond: Condition | None) -> Tensor:
        """The output, with the gate's share of what the skip lets through; embedding (B, width)."""
        if cond is None or cond.seen is None or not self.sees_skip:
            return out
        return out + expand(self.gate(embedding)[:, 0], out) * cond.seen

    def take(self, other: Network, name: str) -> None:
        own = {key: value for key, value in self.state_dict().items() if key.startswith(("seen.", "gate."))}
        fit_weights(self, own | other.state_dict(), name)

    @property
    def last_layer(self) -> Tensor:
        return self.output.weight

    def freeze_second_time(self) -> None:
        self.embedding.s_branch.requires_grad_(False)

    def freeze_sight(self) -> None:
        if self.sees_skip:
            self.seen.requires_grad_(False)
            self.gate.requires_grad_(False)


class NetworkConfig(ABC):
    """Settings of a network; the data's shape and conditions are given when it is built.

    of_files: whether only files of a foreign format hold such settings, so that no recipe chooses them.
    """

    of_files: ClassVar[bool] = False

    @abstractmethod
    def build(self, shape: Shape, num_classes: int, guided: bool, observation: Shape = ()) -> Network:
        """Make the network; raises ConfigError when it cannot take this shape."""

    def without_memory(
        self, shape: Shape, num_classes: int, guided: bool, observation: Shape = (), tensors: int = MOST_TENSORS
    ) -> Network | None:
        """The network on the meta device, None for one of outside code that cannot be built so.

        Raises ConfigError as `build` does, for a network of more `tensors`, whatever it is made of, and for settings of
        which none can be made, as where their product is no number of 64 bits.
        """
        try:
            with torch.device("meta"), at_most(tensors):
                return self.build(shape, num_classes, guided, observation)
        except (ConfigError, MissingExtraError):
            raise
        except Exception as error:  # whatever a network does with its numbers while it is built
            for field in dataclasses.fields(self):  # type: ignore[arg-type]  # networks' settings are dataclasses
                value = getattr(self, field.name)
                if isinstance(value, int) and value > _LARGEST:
                    raise ConfigError(
                        f"out of memory (a network of {field.name} {value}): take a smaller network"
                    ) from error
            if is_own(type(self)):
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise ConfigError(f"no network can be made of its settings ({reason}): take a smaller one") from error
            return None

    def beside(self, teacher: "NetworkConfig | None") -> "NetworkConfig":
        """The network of a run that has a teacher of that network: these settings, but where it is the teacher's."""
        return self

    def with_lora(self, lora: LoRA) -> "NetworkConfig":
        """The same, frozen, with adapters; raises ConfigError where there are none."""
        raise ConfigError("adapters (lora) are for teachers of diffusers, EDM and EDM2: train the whole network")

    def without_lora(self) -> "NetworkConfig":
        """The same without adapters."""
        return self

    def seeing_skip(self) -> "NetworkConfig":
        """The same, shown what a skip lets through; raises ConfigError for a network that has no place for it."""
        if all(field.name != "sees_skip" for field in dataclasses.fields(self)):  # type: ignore[arg-type]
            raise ConfigError(f"{type(self).__name__} has no sees_skip: leave --network.sees-skip out")
        return dataclasses.replace(self, sees_skip=True)  # type: ignore[type-var]

    @property
    def stochastic(self) -> bool:
        """Whether its layers draw random numbers in training, so that two evaluations are of different networks."""
        return False


@final
@dataclass(frozen=True)
class TeacherNetworkConfig(NetworkConfig):
    """The network of the teacher that is distilled, with a second time."""

    lora: int = 0
    """Rank of adapters that are trained on the teacher's frozen weights, for short --lora; 0 trains the whole."""
    lora_alpha: float = later(float)
    """Adapters count alpha/rank times; 0 takes the rank."""
    lora_layers: AdaptedLayers = later(lambda: "attention")
    """Which layers have adapters: those of attention, or all within blocks."""
    sees_skip: bool = later(bool)
    """Show it what a skip lets through: the preconditioning skip needs it on networks of convolutions."""

    def __post_init__(self) -> None:
        if self.lora:
            self._adapters()

    def _adapters(self) -> LoRA:
        return LoRA(self.lora, self.lora_alpha, self.lora_layers)

    def build(self, shape: Shape, num_classes: int, guided: bool, observation: Shape = ()) -> Network:
        raise ConfigError("the network is the teacher's, and there is none: name one with --teacher")

    def without_memory(
        self, shape: Shape, num_classes: int, guided: bool, observation: Shape = (), tensors: int = MOST_TENSORS
    ) -> Network | None:
        return None

    def beside(self, teacher: NetworkConfig | None) -> NetworkConfig:
        if teacher is None:
            raise ConfigError(
                "the network is the teacher's, which does not say its settings: name another, such as --network mlp"
            )
        own = teacher.with_lora(self._adapters()) if self.lora else teacher.without_lora()
        return own.seeing_skip() if self.sees_skip else own
