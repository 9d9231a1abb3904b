"""What a run learns: weights, their averages and a discriminator, with all that a checkpoint holds of them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.preconditioning.statistics import TrajectoryStatistics
from fewstep.networks.base import fit_stored, stored_state
from fewstep.recipes.config import RunConfig
from fewstep.sampling.pipeline import WEIGHTS_FILE, Pipeline
from fewstep.training.checkpoint import (
    DISCRIMINATOR_FILE,
    LAST_FILE,
    OPTIMIZER_FILE,
    check_digests,
    read_state,
    save_checkpoint,
    stored,
    stored_discriminator,
)
from fewstep.training.ema import EMA, make_emas
from fewstep.training.gan import GAN
from fewstep.training.optimizers import Optimizers
from fewstep.training.teacher import SlowAverage
from fewstep.utils.serialization import JSON
from fewstep.utils.weights import check_finite


class Learner:
    """The flow map of a pipeline with its optimisers and averages, and the discriminator beside it, if there is one.

    emas: averages to sample from, the first being the run's. target: the slow average that the objective consults.
    """

    def __init__(
        self, config: RunConfig, pipeline: Pipeline, statistics: TrajectoryStatistics | None, gan: GAN | None
    ) -> None:
        self.pipeline, self.statistics, self.gan = pipeline, statistics, gan
        self.optimizers = Optimizers(self.flow_map.network, config.optimizer)
        settings = config.training
        self.emas = make_emas(self.flow_map.network, settings.ema_power, settings.ema_decay, settings.ema_ramp)
        decay = config.objective.target_decay
        self.target = None if decay is None else SlowAverage(self.flow_map, decay)

    @property
    def flow_map(self) -> FlowMap:
        """The map that is trained."""
        return self.pipeline.flow_map

    @property
    def averages(self) -> list[EMA]:
        """All averages that a checkpoint holds, the sampled one first."""
        return self.emas if self.target is None else [*self.emas, self.target.ema]

    def update(self, step: int, images: int, progress: float, discriminator: list[Tensor]) -> float:
        """One update from the parameters' gradients and the discriminator's; returns the learning rate's factor."""
        factor = self.optimizers.step(images, progress)
        for ema in self.averages:
            ema.update(self.flow_map.network, step)
        if self.gan is not None and discriminator:
            self.gan.step(discriminator)
        return factor

    def use_statistics(self, statistics: TrajectoryStatistics) -> None:
        """Precondition by these from now on; raises ConfigError where they give no finite f or positive g."""
        for flow_map in [self.flow_map] + ([] if self.target is None else [self.target.flow_map]):
            flow_map.set_preconditioning(flow_map.preconditioning.with_statistics(statistics))
        self.statistics = statistics

    @contextmanager
    def averaged(self) -> Iterator[Pipeline]:
        """The pipeline with the weights of the first average, for evaluation; its own come back at the end."""
        network = self.flow_map.network
        own = {key: value.clone() for key, value in stored_state(network).items()}
        network.load_state_dict(self.emas[0].weights, strict=False)
        self.flow_map.eval()
        try:
            yield self.pipeline
        finally:
            network.load_state_dict(own, strict=False)
            self.flow_map.train()

    def files(self) -> dict[str, Mapping[str, Tensor]]:
        """What a checkpoint holds beside the model with the first average's weights, by the file's name."""
        files: dict[str, Mapping[str, Tensor]] = {
            LAST_FILE: stored_state(self.flow_map.network),
            OPTIMIZER_FILE: self.optimizers.tensors(),
        }
        files |= {f"ema-{ema.name}.safetensors": ema.weights for ema in self.averages[1:]}
        return files if self.gan is None else files | {DISCRIMINATOR_FILE: self.gan.tensors()}

    def save(self, folder: Path, state: dict[str, JSON]) -> None:
        """Write a checkpoint; raises CheckpointError when the disk refuses."""
        save_checkpoint(folder, self.pipeline, self.emas[0].weights, self.files(), state)

    def check_finite(self) -> None:
        """Raise CheckpointError naming a tensor of what `save` writes that is not finite; buffers may be."""
        buffers = {name for name, _ in self.flow_map.network.named_buffers()}
        for file, tensors in (self.files() | {WEIGHTS_FILE: self.emas[0].weights}).items():
            check_finite({key: value for key, value in tensors.items() if key not in buffers}, file)

    def load(self, folder: Path) -> dict[str, Any]:
        """Go back to a checkpoint; returns its state.

        Raises CheckpointError when a file does not fit, is not finite or is not what was written.
        """
        fit_stored(self.flow_map.network, *stored(folder / LAST_FILE))
        self.optimizers.load(*stored(folder / OPTIMIZER_FILE))
        for i, ema in enumerate(self.averages):
            ema.load(*stored(folder / (f"ema-{ema.name}.safetensors" if i else WEIGHTS_FILE)))
        if self.gan is not None:
            self.gan.load(*stored_discriminator(folder))
        check_digests(folder)
        return read_state(folder)
