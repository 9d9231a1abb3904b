"""Consistency trajectory models (2310.02279; math.md section 4)."""

from dataclasses import dataclass
from typing import ClassVar, Literal, final, get_args

import torch
from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.preconditioning.covariance import columns, flow_gain
from fewstep.flow.times import LogNormalTimes, TimeDistribution
from fewstep.networks.base import Network
from fewstep.networks.condition import Condition
from fewstep.objectives.base import ALONE, Batch, Companions, FakeSamples, Losses
from fewstep.objectives.distillation import GuidedDistillation, TeacherSteps, jump_where_apart, teacher_denoiser
from fewstep.objectives.flow_matching import denoising_loss, deviation_of
from fewstep.objectives.losses import generator_loss, gradient_balance
from fewstep.utils.errors import ConfigError
from fewstep.utils.serialization import later
from fewstep.utils.tensors import check_choice, check_least

STREAM_DIAGONAL, STREAM_DIAGONAL_NOISE = 14, 15
Place = Literal["data-end", "jump-end"]


@final
@dataclass(frozen=True, kw_only=True)
class CTM(GuidedDistillation):
    """Consistency trajectory model: jumps between any two levels, compared at the data end,

    d( X_sg(X(x_t, t, s), s, t_min), X_sg(X_sg(x_u, u, s), s, t_min) ) + lambda * denoising loss on the diagonal,
    t > u >= s grid points, X_sg the slow average, through which the gradient passes to X(x_t, t, s).

    `compare` "jump-end" holds them against each other where the jump ends instead, one pass with gradient and one
    without in place of two and two: w(s) d( X(x_t, t, s), sg X_sg(x_u, u, s) ), w = sd^2/(alpha_s^2 sd^2 + sigma_s^2).

    w is what the way from s to the data end makes of a squared error at s, by the flow map of N(0, sd^2), whose factor
    there is sqrt w. So both forms count what arrives. `intermediate` p counts more of jumps that stop in between: the
    loss is multiplied by w^-p, and with p = 1 an error counts as it is at s. `carried` covariance takes errors to the
    data end by the flow map of N(m, C) in place of sqrt w: along each direction of variance lam by its own
    sqrt((alpha_0^2 lam + sigma_0^2)/(alpha_s^2 lam + sigma_s^2)); small variances, whose errors vanish, count little.

    lambda = `denoising`, with `balance` times |grad of the first loss| / |grad of the second|; `gan` likewise.

    Source: 2310.02279; math.md section 4.
    Deviations: t, u and s are drawn uniformly; `steps.draws` published is the published code's law, and learns faster.
    """

    steps: TeacherSteps = TeacherSteps()
    target_decay: float = 0.999
    """Decay per step, in [0, 1), of the slow average X_sg; 0.999 in the paper at 32 x 32."""
    denoising: float = 1.0
    """Weight of the denoising loss at noise levels `times`; 0 leaves it out."""
    balance: bool = True
    """Multiply both weights by the ratio of the losses' gradient norms on the network's last layer."""
    gan: float = 0.0
    """Weight of -discriminator on what is compared, while there is a discriminator; 0 trains none."""
    times: TimeDistribution = LogNormalTimes()
    sigma_data: float | None = None
    """The data's standard deviation in the denoising loss; None takes what the flow map's configuration says."""
    endpoint_only: bool = False
    """Make every jump one to the data end, s = t_min."""
    compare: Place = later(lambda: "data-end")
    """Where two jumps are compared: data-end, whence the slow average takes them, or jump-end, where they end."""
    intermediate: float = later(float)
    """How much more jumps count that stop in between: 0, by what arrives at the data end; 1, as they end."""
    carried: Literal["deviation", "covariance"] = later(lambda: "deviation")
    """How errors at a jump's end are taken to the data end, where jumps are compared there: by the data's deviation,
    or by its covariance, which a skip knows."""

    def forward_passes(self, bf16: bool = False) -> tuple[float, float]:
        """The teacher's walk at its longest, guided ones twice; jumps; the slow average, through which gradients pass
        once to the jump and once more for `balance`; the denoising loss, against the teacher where it is guided.
        """
        guided = 2 if self.guidance.active else 1
        through = self.compare == "data-end" or self.gan > 0
        jumps = 3 + 1 + (3 + self.balance * (self.denoising > 0) if through else 0)
        denoising = 3 + (guided if guided > 1 else 0) if self.denoising else 0
        return float(guided * self.steps.evaluations + jumps + denoising), 0.0

    def method(self, preconditioning: str, labelled: bool) -> str:
        return f"CTM, {preconditioning}"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(0, denoising=self.denoising, gan=self.gan)
        check_least(0, intermediate=self.intermediate)
        check_choice("compare", self.compare, get_args(Place))
        check_choice("carried", self.carried, ("deviation", "covariance"))
        if self.carried == "covariance" and self.compare == "data-end":
            raise ConfigError("errors are carried from where jumps end: set --objective.compare jump-end with it")

    needs_teacher: ClassVar[bool] = True

    @property
    def needs_discriminator(self) -> bool:
        return self.gan > 0

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        target = companions.ema_target
        n, k, j, t, u, s = self.steps.times(flow_map.path, batch, self.endpoint_only)
        end, apart = torch.full_like(s, flow_map.path.t_min), j < self.steps.points - 1
        cond = self.condition(flow_map, batch, t)
        x = flow_map.path.interpolate(batch.x0, batch.noise(), t)
        x_u = self.steps.walk(flow_map, x, n, k, self.teacher_condition(batch, cond), companions.teacher)
        with torch.no_grad():
            goal = jump_where_apart(target, x_u, (u, s), cond, k < j)
        reached = flow_map.jump(x, t, s, cond)
        compared = reached
        if self.compare == "data-end" or self.gan:
            reached = jump_where_apart(target, reached, (s, end), cond, apart)
        if self.compare == "data-end":
            compared = reached
            with torch.no_grad():
                goal = jump_where_apart(target, goal, (s, end), cond, apart)
        elif self.carried == "covariance":
            compared, goal = (carried(flow_map, x, s, end, cond) for x in (compared, goal))
        consistency = self.distance(batch, compared, goal, companions) * self.weight_at(flow_map, s).to(x.dtype)
        terms, logs = {"consistency": consistency}, {"consistency": consistency.detach()}
        if self.denoising:
            denoising = self.denoising_loss(flow_map, batch, cond, companions)
            scale = self.denoising * self.weight(consistency, denoising, flow_map, companions)
            terms["denoising"] = scale * denoising
            logs |= {"denoising": denoising.detach(), "balance": scale.expand(len(t))}
        if self.gan and companions.discriminator is not None:
            adversarial = generator_loss(companions.discriminator, reached, cond.labels)
            scale = self.gan * self.weight(consistency, adversarial, flow_map, companions)
            terms["gan"] = scale * adversarial
            logs |= {"gan": adversarial.detach()}
        total = torch.stack(list(terms.values())).sum(0)
        judged = FakeSamples(reached.detach(), cond.labels) if self.gan else None
        return Losses(total, t, s, logs, terms, judged)

    def weight_at(self, flow_map: FlowMap, s: Tensor) -> Tensor:
        """w (B,) of jumps compared at s, to the power that says how much is counted already: 1 at the data end."""
        arrived = self.compare == "data-end" or self.carried == "covariance"
        power = (0 if arrived else 1) - self.intermediate
        if power == 0:
            return torch.ones_like(s)
        at, variance = flow_map.path.values(s), deviation_of(flow_map, self.sigma_data) ** 2
        return (variance / (at.alpha**2 * variance + at.sigma**2)) ** power

    def weight(self, first: Tensor, second: Tensor, flow_map: FlowMap, companions: Companions) -> Tensor:
        """What makes the second loss weigh as much as the first on the last layer; 1 when not balanced."""
        if not self.balance:
            return first.new_ones(())
        return gradient_balance(first, second, last_layer(flow_map), companions.average)

    def denoising_loss(
        self, flow_map: FlowMap, batch: Batch, cond: Condition, companions: Companions = ALONE
    ) -> Tensor:
        """EDM's denoising loss of the same images at noise levels and noise of its own.

        Against the guided teacher's denoiser where it is guided: the images are no draws of that.
        """
        t = self.times.quantile(flow_map.path, batch.draws.uniform(STREAM_DIAGONAL))
        eps = batch.draws.normal(STREAM_DIAGONAL_NOISE, tuple(batch.x0.shape[1:]), batch.x0.dtype)
        if self.guidance.active and cond.kept is not None:
            x, teacher = flow_map.path.interpolate(batch.x0, eps, t), companions.teacher
            with torch.no_grad():
                target = teacher_denoiser(flow_map.path, teacher)(x, t, self.teacher_condition(batch, cond))
            return denoising_loss(flow_map, batch, eps, t, cond, deviation_of(flow_map, self.sigma_data), target)
        return denoising_loss(flow_map, batch, eps, t, cond, deviation_of(flow_map, self.sigma_data))


def carried(flow_map: FlowMap, x: Tensor, s: Tensor, end: Tensor, cond: Condition) -> Tensor:
    """x (B, ...) at s by the flow map of N(m, C) to `end`; raises ConfigError where the jump knows no covariance."""
    measured, path = flow_map.jumping(cond).known_measures(), flow_map.path
    if measured is None:
        raise ConfigError(
            "errors are carried by the data's covariance, which a skip alone knows: set --model.preconditioning skip, "
            "or leave --objective.carried out"
        )
    covariance = measured.covariance
    mean, at_s, at_end = covariance.mean.to(x), path.values(s).over(x), path.values(end).over(x)
    factors = columns(path, s), columns(path, end)
    return at_end.alpha * mean + covariance.scaled(x - at_s.alpha * mean, lambda lam: flow_gain(*factors, lam))


def last_layer(flow_map: FlowMap) -> Tensor:
    """The weight of the network's output layer; raises ConfigError for a foreign network."""
    if not isinstance(flow_map.network, Network):
        raise ConfigError("balancing losses by gradient norm needs a fewstep network: set balance to false")
    return flow_map.network.last_layer
