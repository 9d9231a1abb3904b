"""FlowMap = path + preconditioning + inner scaling + network (math.md §2)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fewstep.flow.paths import Path
from fewstep.flow.preconditioning.base import Preconditioning
from fewstep.flow.preconditioning.network_scaling import IdentityScaling, Scaling
from fewstep.networks.base import Network, NetworkConfig
from fewstep.networks.condition import Condition
from fewstep.utils.errors import ConfigError, ShapeError
from fewstep.utils.forward_ad import jvp
from fewstep.utils.serialization import later
from fewstep.utils.tensors import check_batch, check_positive, expand


@dataclass(frozen=True)
class FlowMapConfig:
    """All that is needed to rebuild a flow map but its weights.

    shape: of one sample. guided: whether the network takes guidance's strength and interval. sigma_data: the data's
    standard deviation. observation: shape (To, Do) of what a policy sees; () for anything else.
    Raises ConfigError for sizes below 1, and a sigma_data that is not positive and finite.
    """

    path: Path
    preconditioning: Preconditioning
    scaling: Scaling
    network: NetworkConfig
    shape: tuple[int, ...]
    num_classes: int = 0
    guided: bool = False
    sigma_data: float = 1.0
    observation: tuple[int, ...] = later(tuple)

    def __post_init__(self) -> None:
        if min(self.shape, default=0) < 1 or min(self.observation, default=1) < 1 or self.num_classes < 0:
            raise ConfigError(
                f"samples of shape {self.shape}, observations of shape {self.observation} and {self.num_classes} "
                "classes: sizes must be at least 1, and the number of classes at least 0"
            )
        check_positive(sigma_data=self.sigma_data)

    def build(self) -> "FlowMap":
        """A flow map with freshly initialised weights."""
        network = self.network.build(self.shape, self.num_classes, self.guided, self.observation)
        return FlowMap(self.path, self.preconditioning, network, self.scaling, self)


Directions = tuple[Tensor | None, Tensor | None, Tensor | None]
"""(dx, dt, ds), along which a derivative is taken; None for what stays."""


class Passes:
    """How a flow map evaluates its network: as it is written. Subclasses give the same by other means."""

    def output(self, flow_map: "FlowMap", x: Tensor, t: Tensor, s: Tensor, cond: Condition | None) -> Tensor:
        """N(x, t, s)."""
        return flow_map.evaluate(x, t, s, cond)

    def with_tangent(
        self,
        flow_map: "FlowMap",
        x: Tensor,
        t: Tensor,
        s: Tensor,
        cond: Condition | None,
        along: Directions,
        attached: bool,
    ) -> tuple[Tensor, Tensor]:
        """(N, its derivative along the directions), by forward mode; the derivative has a graph if `attached`."""
        moving = [place for place, direction in enumerate(along) if direction is not None]

        def moved(*values: Tensor) -> Tensor:
            given = [x, t, s]
            for place, value in zip(moving, values, strict=True):
                given[place] = value
            return flow_map.evaluate(given[0], given[1], given[2], cond)

        start = tuple((x, t, s)[place] for place in moving)
        return jvp(moved, start, tuple(direction for direction in along if direction is not None), attached)


AS_WRITTEN = Passes()


class FlowMap(nn.Module):
    """X(x, t, s) = f(t, s) x + g(t, s) N(x, t, s): the solution at time s of the PF-ODE through x at time t.

    A preconditioning with an origin m adds (alpha_s - alpha_t f - g) m, which vanishes on the diagonal (math.md §3.6).

    Times are per sample, (B,), in the path's clock, t_min <= s <= t <= t_max; samples are (B, ...). Coefficients are
    computed in float64, whatever the dtype of the times, and applied in that of the samples.
    config: what it was built from; None for a map put together by hand, which cannot be saved.
    """

    def __init__(
        self,
        path: Path,
        preconditioning: Preconditioning,
        network: nn.Module,
        scaling: Scaling | None = None,
        config: FlowMapConfig | None = None,
    ) -> None:
        super().__init__()
        self.path = path
        self.preconditioning = preconditioning
        self.scaling = IdentityScaling() if scaling is None else scaling
        self.network = network
        self.config = config
        self._passes = AS_WRITTEN

    @contextmanager
    def using(self, passes: Passes) -> Iterator[None]:
        """Inside, the network is evaluated so."""
        before, self._passes = self._passes, passes
        try:
            yield
        finally:
            self._passes = before

    def output(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        """N(x, t, s): the network with its inner scaling."""
        return self._passes.output(self, x, t, s, cond)

    def with_tangent(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        cond: Condition | None,
        along: Directions,
        attached: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(N, its derivative along (dx, dt, ds)) at (x, t, s), by forward mode; no graph of it unless `attached`."""
        return self._passes.with_tangent(self, x, t, s, cond, along, attached)

    def evaluate(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        """N(x, t, s) as it is written, whatever `using` says."""
        t, s = self.path.clock(t), self.path.clock(s)
        c_skip, c_out, c_in = (expand(value, x).to(x.dtype) for value in self.scaling.values(t))
        clock_t, clock_s = (self.scaling.c_noise(time).to(x.dtype) for time in (t, s))
        raw: Tensor = self.network(c_in * x, clock_t, clock_s, self._shown(x, t, s, cond))
        return c_skip * x + c_out * raw

    def _shown(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None) -> Condition | None:
        """The condition with what the skip lets through, for networks that see it; 0 at s = t."""
        if not (isinstance(self.network, Network) and self.network.sees_skip):
            return cond
        seen = self.jumping(cond).shown(self.path, x, t, s)
        return cond if seen is None else replace(cond or Condition(), seen=seen)

    def jumping(self, cond: Condition | None) -> Preconditioning:
        """The preconditioning of samples with these labels."""
        return self.preconditioning.of(None if cond is None else cond.labels)

    def apply_jump(self, x: Tensor, output: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        """X of an output N already computed at (x, t, s)."""
        return self.jumping(cond).jump(self.path, x, output, self.path.clock(t), self.path.clock(s))

    def velocity_from_output(self, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """v = f_s x + g_s N for an output N already computed on the diagonal (x, t, t)."""
        f_s, g_s = (expand(value, x).to(x.dtype) for value in self.preconditioning.diagonal(self.path.clock(t)))
        return f_s * x + g_s * output

    def jump(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        """X(x, t, s); raises ShapeError unless x is (B, ...) and t, s are (B,)."""
        check_batch(x, t, s)
        return self.apply_jump(x, self.output(x, t, s, cond), t, s, cond)

    def velocity(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """PF-ODE velocity v(x, t) read off the diagonal; alpha' D at sigma = 0 where N is the denoiser."""
        check_batch(x, t)
        return self.velocity_from_output(x, self.output(x, t, t, cond), t)

    def denoise(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """Denoiser D(x, t) = E[x0 | x_t]: N itself where the preconditioning says so, else from the velocity."""
        if self.preconditioning.denoises:
            check_batch(x, t)
            return self.output(x, t, t, cond)
        return self.path.denoised_from_velocity(x, self.velocity(x, t, cond), t)

    def forward(self, x: Tensor, t: Tensor, s: Tensor | None = None, cond: Condition | None = None) -> Tensor:
        """The jump; without s the denoiser, so that a flow map serves wherever a callable (x, t) -> D is asked for."""
        return self.denoise(x, t, cond) if s is None else self.jump(x, t, s, cond)

    @property
    def num_classes(self) -> int:
        """Number of class labels the network takes; 0 for none."""
        return self.network.num_classes if isinstance(self.network, Network) else 0

    @property
    def conditional(self) -> bool:
        """Whether samples are drawn of classes, or of what prompts say."""
        return self.num_classes > 0 or (isinstance(self.network, Network) and self.network.prompt_widths != (0, 0))

    @property
    def guided(self) -> bool:
        """Whether the guidance strength and interval are inputs of the network."""
        return isinstance(self.network, Network) and self.network.guided

    @property
    def takes_guidance(self) -> bool:
        """Whether a strength of guidance may be given: to a guided network, or one of elsewhere with its own input."""
        return self.guided or (isinstance(self.network, Network) and self.network.own_guidance)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample; raises ShapeError when the network does not say."""
        if not isinstance(self.network, Network):
            raise ShapeError("this flow map's network does not carry a sample shape; give the noise yourself")
        return self.network.shape

    def set_preconditioning(self, preconditioning: Preconditioning) -> None:
        """Jump by another preconditioning from now on; the configuration, where there is one, says so."""
        self.preconditioning = preconditioning
        if self.config is not None:
            self.config = replace(self.config, preconditioning=preconditioning)


def at(time: float, x: Tensor) -> Tensor:
    """The same time for every sample of x: (B,), float64."""
    return torch.full(x.shape[:1], time, dtype=torch.float64, device=x.device)
