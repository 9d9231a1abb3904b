"""A policy: a flow map over chunks of actions, given what was seen last."""

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.networks.condition import Condition
from fewstep.sampling.generate import SamplingSettings, prior_noise
from fewstep.sampling.pipeline import Pipeline
from fewstep.sampling.step_times import SamplerName
from fewstep.training import load
from fewstep.utils.errors import CheckpointError, ConfigError, ShapeError
from fewstep.utils.random import Draws

DEFAULT_STEPS = 1
_SAMPLERS: dict[str, SamplerName] = {"map": "map", "mean": "map", "gamma": "gamma", "euler": "euler"}

Observed = Tensor | NDArray[Any]


class Policy:
    """Observations in, chunks of actions out, both in the robot's own units.

    pipeline: of chunks (horizon, Da), with a PolicySpec. steps: of its sampler, one network call each.
    seed: of the noise, a function of (seed, decision, episode), whatever else is in the batch; `reset` begins the next
    episode.
    Raises CheckpointError for a pipeline that is no policy, ConfigError for fewer steps than one, or more than a
    regression takes.
    """

    def __init__(self, pipeline: Pipeline, steps: int = DEFAULT_STEPS, seed: int = 0) -> None:
        if pipeline.config.policy is None:
            raise CheckpointError("this model holds no policy: train one with `fewstep train policy-mlp`")
        self.spec = pipeline.config.policy
        if steps < 1 or (self.spec.from_zero and steps > 1):
            least = "a regression takes 1" if self.spec.from_zero else "take at least 1"
            raise ConfigError(f"a policy of {steps} steps: {least}")
        self.flow_map, self.steps, self.seed = pipeline.flow_map.eval(), steps, seed
        settings = SamplingSettings(sampler=_SAMPLERS[self.spec.sampler], steps=steps, gamma=1.0)
        self.times, self.sampler = settings.grid(self.flow_map.path, pipeline.step_times), settings.function()
        self._episode = -1
        self.reset()

    @property
    def observation_shape(self) -> tuple[int, int]:
        """(To, Do)."""
        return self.spec.chunks.n_obs_steps, len(self.spec.observations.low)

    @property
    def action_shape(self) -> tuple[int, int]:
        """(Ta, Da)."""
        return self.spec.chunks.n_action_steps, len(self.spec.actions.low)

    @torch.no_grad()
    def predict_chunk(self, obs: Observed, decision: int = 0, episodes: Tensor | None = None) -> Tensor:
        """The next actions (B, Ta, Da), within the bounds, after the last observations (B, To, Do), oldest first.

        obs: a tensor or an array of any number type, taken as float32. decision, episodes (B,): which noise is drawn; 0
        and 0 .. B - 1 when not given. Raises ShapeError for observations of another shape or that are not finite, or so
        far off that the actions are not, and for episodes that are no B whole numbers.
        """
        normalised = self._normalised(_numbers(obs))
        count = len(normalised)
        index = torch.arange(count) if episodes is None else episodes
        if not isinstance(index, Tensor) or index.shape != (count,) or index.is_floating_point():
            shown = tuple(index.shape) if isinstance(index, Tensor) else type(index).__name__
            raise ShapeError(f"episodes {shown}: give a tensor of {count} whole numbers, one for each observation")
        draws = Draws(self.seed, decision, index.to(normalised.device))
        noise = prior_noise(self.flow_map, draws)
        x = torch.zeros_like(noise) if self.spec.from_zero else noise
        chunk = self.sampler(self.flow_map, x, self.times, Condition(observation=normalised), draws)
        taken = chunk[:, : self.spec.chunks.n_action_steps].cpu()
        if not bool(taken.isfinite().all()):
            row = int(torch.nonzero(~taken.isfinite())[0, 0])
            raise ShapeError(f"the actions after observation {row} are not finite: it is far from all demonstrations")
        return self.spec.bounded(self.spec.actions.decode(taken))

    def _normalised(self, obs: Tensor) -> Tensor:
        if obs.ndim != 3 or tuple(obs.shape[1:]) != self.observation_shape or not len(obs):
            wanted = ", ".join(map(str, self.observation_shape))
            raise ShapeError(f"observations of shape {tuple(obs.shape)}: this policy sees (B, {wanted})")
        if not bool(obs.isfinite().all()):
            row, _, number = torch.nonzero(~obs.isfinite())[0].tolist()
            raise ShapeError(f"observation {row} is not finite (its number {number}): check the sensor that gives it")
        device = next(self.flow_map.parameters()).device
        return self.spec.observations.encode(obs).float().to(device)

    def reset(self) -> None:
        """Forget what was seen and planned: an episode begins."""
        self._seen: deque[Tensor] = deque(maxlen=self.spec.chunks.n_obs_steps)
        self._planned: deque[Tensor] = deque()
        self._decision = 0
        self._episode += 1

    def select_action(self, obs: Observed) -> Tensor:
        """The next action (Da,) after an observation (Do,); asks the network once every Ta actions.

        Raises ShapeError as `predict_chunk` does.
        """
        obs = _numbers(obs)
        if tuple(obs.shape) != self.observation_shape[1:]:
            raise ShapeError(
                f"an observation of shape {tuple(obs.shape)}: this policy sees {self.observation_shape[1:]}"
            )
        if not bool(obs.isfinite().all()):
            number = int(torch.nonzero(~obs.isfinite())[0, 0])
            raise ShapeError(f"the observation is not finite (its number {number}): check the sensor that gives it")
        self._seen.append(obs)
        if not self._planned:
            history = stacked(list(self._seen), self.spec.chunks.n_obs_steps)
            self._planned.extend(self.predict_chunk(history[None], self._decision, torch.tensor([self._episode]))[0])
            self._decision += 1
        return self._planned.popleft()


def _numbers(obs: Observed) -> Tensor:
    """As a float32 tensor; raises ShapeError for what holds no numbers."""
    if isinstance(obs, Tensor):
        return obs.float()
    try:
        return torch.from_numpy(np.array(obs, dtype=np.float32))
    except (TypeError, ValueError) as error:
        raise ShapeError(f"an observation holds no numbers: {error}") from error


def stacked(seen: list[Tensor], count: int) -> Tensor:
    """The last `count` of some observations, oldest first, (count, Do); the first repeated where there are fewer."""
    return torch.stack([seen[0]] * (count - len(seen)) + seen[-count:])


def load_policy(folder: Path | str, steps: int = DEFAULT_STEPS, seed: int = 0) -> Policy:
    """The policy of a run or a saved model; raises CheckpointError when it is missing or is none."""
    pipeline = load(folder)
    if pipeline.config.policy is None:
        raise CheckpointError(f"{folder} holds no policy: train one with `fewstep train policy-mlp`")
    return Policy(pipeline, steps, seed)
