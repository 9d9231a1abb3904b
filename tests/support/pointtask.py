"""A task without a simulator: a point in the square is steered to a goal."""

from dataclasses import dataclass

import numpy as np
import torch

from fewstep.data.demonstrations.normaliser import ChunkConfig
from fewstep.data.sources import DataConfig
from fewstep.networks.mlp import MLPConfig
from fewstep.objectives import ISD
from fewstep.policies.simulation import Expert, Outcome, Picture, Simulation, Task, Vector
from fewstep.recipes.config import EvaluationConfig, OptimizerConfig, RunConfig, TrainingConfig
from tests.support.objectives import made

STEP = 0.1


class PointSimulation(Simulation):
    """x <- x + 0.1 a in [-1, 1]^2; the goal is reached within 0.1 of it. Raises or turns blind at a step if told to."""

    def __init__(self, raises_at: dict[int, int] | None = None, blind_at: dict[int, int] | None = None) -> None:
        self.raises_at, self.blind_at = raises_at or {}, blind_at or {}
        self.closed = False

    def reset(self, seed: int) -> Vector:
        generator = np.random.default_rng(seed)
        self.seed, self.steps = seed, 0
        self.x, self.goal = generator.uniform(-1, 1, (2, 2)).astype(np.float32)
        return self.observed()

    def observed(self) -> Vector:
        return np.concatenate([self.x, self.goal]).astype(np.float32)

    def step(self, action: Vector) -> Outcome:
        self.steps += 1
        if self.raises_at.get(self.seed) == self.steps:
            raise RuntimeError("the arm fell off")
        self.x = np.clip(self.x + STEP * action, -1, 1)
        reached = bool(np.linalg.norm(self.x - self.goal) < STEP)
        seen = self.observed()
        if self.blind_at.get(self.seed) == self.steps:
            seen[1] = np.nan
        return Outcome(seen, reached, float(reached))

    def route(self) -> str:
        return "left" if self.goal[0] < 0 else "right"

    def render(self) -> Picture:
        picture = np.zeros((16, 16, 3), dtype=np.uint8)
        row, column = ((self.x + 1) * 7.5).round().astype(int)
        picture[row, column] = 255
        return picture

    def close(self) -> None:
        self.closed = True


class PointExpert(Expert):
    """Straight to the goal; lazy ones stand still for every third seed."""

    def __init__(self, lazy: bool = False) -> None:
        self.lazy = lazy

    def begin(self, seed: int) -> None:
        self.still = self.lazy and seed % 3 == 0

    def act(self, observation: Vector) -> Vector:
        return np.zeros(2, np.float32) if self.still else 20 * (observation[2:] - observation[:2])


@dataclass(frozen=True)
class Made:
    """A task and every simulation that it made."""

    task: Task
    simulations: list[PointSimulation]


def point_task(
    raises_at: dict[int, int] | None = None, blind_at: dict[int, int] | None = None, lazy: bool = False
) -> Made:
    made: list[PointSimulation] = []

    def make(render: bool) -> Simulation:
        made.append(PointSimulation(raises_at, blind_at))
        return made[-1]

    task = Task("point", "A point.", 4, (-1.0, -1.0), (1.0, 1.0), 40, make, lambda: PointExpert(lazy))
    return Made(task, made)


def run_config(root: str, objective: object = None, images: int = 25_600) -> RunConfig:
    """A policy for the point, small enough for seconds."""
    return RunConfig(
        recipe="policy-mlp",
        data=DataConfig(source="demonstrations", root=root, chunks=ChunkConfig(2, 8, 4), heldout=0.1),
        network=MLPConfig(width=64, depth=2, embedding_width=32, max_frequency=8.0),
        objective=objective
        or made(ISD, flow_matching_ratio=0.75, weight_eps=1.0, label_dropout=0.0, kind="finite-difference"),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(lr=2e-3, warmup_images=2_000, decay="cosine"),
        training=TrainingConfig(images=images, batch_size=128, sample_images=0, checkpoint_images=images),
        evaluation=EvaluationConfig(steps=(1, 2)),
    )


def seeing(*values: float) -> torch.Tensor:
    return torch.tensor(values)
