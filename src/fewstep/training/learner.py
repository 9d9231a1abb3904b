"""What a run learns: weights, their averages and a discriminator, with all that a checkpoint holds of them."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.data.base import Dataset
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.preconditioning.statistics import TrajectoryStatistics
from fewstep.networks.base import fit_stored, stored_state
from fewstep.recipes.config import RunConfig, StatisticsConfig
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
from fewstep.training.parallel import ProcessGroup, Replicated
from fewstep.training.statistics import estimate_together, prepared
from fewstep.training.teacher import SlowAverage
from fewstep.utils.errors import CheckpointError, ConfigError, FewstepWarning
from fewstep.utils.serialization import JSON
from fewstep.utils.weights import check_finite


class Learner:
    """The flow map of a pipeline with its optimisers and averages, and the discriminator beside it, if there is one.

    held: how processes hold all that; what is trained has been wrapped by it.
    emas: averages to sample from, the first being the run's. target: the slow average that the objective consults.
    """

    def __init__(
        self,
        config: RunConfig,
        pipeline: Pipeline,
        statistics: TrajectoryStatistics | None,
        gan: GAN | None,
        target: SlowAverage | None,
        held: Replicated,
        averages_on_cpu: bool = False,
    ) -> None:
        self.pipeline, self.statistics, self.gan, self.target, self.held = pipeline, statistics, gan, target, held
        self.optimizers = Optimizers(self.flow_map.network, config.optimizer)
        settings = config.training
        averages = settings.ema_power, settings.ema_decay, settings.ema_ramp, averages_on_cpu
        self.emas = make_emas(self.flow_map.network, *averages)

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
        for ema in self.averages:
            ema.before_step()
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

    def refresh_statistics(self, dataset: Dataset, settings: StatisticsConfig, group: ProcessGroup, step: int) -> None:
        """Estimate the statistics anew from the averaged model's own diagonal (math.md §3.7).

        Where they cannot be used (a jump without finite f or positive g), a FewstepWarning, and those there are stay.
        """
        with self.averaged() as model:
            fresh = prepared(estimate_together(model.flow_map, dataset, settings, group), settings, dataset)
        try:
            self.use_statistics(fresh)
        except ConfigError as error:
            warnings.warn(f"statistics not refreshed after {step} steps: {error}", FewstepWarning, stacklevel=2)

    @contextmanager
    def averaged(self) -> Iterator[Pipeline]:
        """The pipeline with the weights of the first average, for evaluation; its own come back at the end."""
        if (copied := self.held.averaged(self.flow_map, self.emas[0].weights)) is not None:
            yield self.pipeline.of(copied)
            return
        for ema in self.averages:
            ema.before_step()  # what is still copied from the weights is copied before they change
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

    def save(self, folder: Path, state: dict[str, JSON], main: bool) -> None:
        """Write a checkpoint, on the main process; all take part. Raises CheckpointError when the disk refuses."""
        average = self.held.whole(self.emas[0].weights, main)
        files = {name: self.held.whole(tensors, main) for name, tensors in self.files().items()}
        if main:
            save_checkpoint(folder, self.pipeline, average, files, state)

    def check_finite(self) -> None:
        """Raise CheckpointError naming a tensor of what `save` writes that is not finite; buffers may be."""
        buffers = {name for name, _ in self.flow_map.network.named_buffers()}
        fault = None
        try:
            for file, tensors in (self.files() | {WEIGHTS_FILE: self.emas[0].weights}).items():
                check_finite({key: value for key, value in tensors.items() if key not in buffers}, file)
        except CheckpointError as error:
            fault = error
        if (found := self.held.agreed(fault)) is not None:
            raise found

    def load(self, folder: Path) -> dict[str, Any]:
        """Go back to a checkpoint; returns its state.

        Raises CheckpointError when a file does not fit, is not finite or is not what was written.
        """
        network = self.flow_map.network
        fit_stored(network, *self.stored(folder / LAST_FILE, stored_state(network)))
        self.optimizers.load(*self.stored(folder / OPTIMIZER_FILE, self.optimizers.parameters()))
        for i, ema in enumerate(self.averages):
            ema.load(*self.stored(folder / (f"ema-{ema.name}.safetensors" if i else WEIGHTS_FILE), ema.weights))
        if self.gan is not None:
            self.gan.load(*stored_discriminator(folder))
        check_digests(folder)
        return read_state(folder)

    def stored(self, file: Path, like: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
        """A file's tensors, as this process holds them, and its name for messages.

        Raises CheckpointError for what is not finite, in all processes alike; buffers may be.
        """
        tensors, name = stored(file)
        buffers = {name for name, _ in self.flow_map.network.named_buffers()}
        check_finite({key: value for key, value in tensors.items() if key not in buffers}, name)
        return self.held.parts(tensors, like), name
