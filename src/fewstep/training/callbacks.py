"""What a caller adds to a run: an interface of events, each of which does nothing unless it is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.recipes.config import RunConfig
from fewstep.sampling.pipeline import Pipeline
from fewstep.training.memory import device_name


@dataclass(frozen=True)
class Start:
    """What a run is, before its first step.

    parameters: of the network, all of them and those that are trained. step: where it goes on from, 0 for a new run.
    images, seconds: how long it is; no limit of seconds is 0. unit: what a sample is called. compiled: whether its
    steps are.
    """

    recipe: str
    network: str
    parameters: int
    trained: int
    device: str
    threads: int
    processes: int
    step: int
    images: int
    seconds: float
    batch_size: int
    unit: str = "image"
    compiled: bool = False


def start_of(
    config: RunConfig, network: nn.Module, device: torch.device, processes: int, step: int, compiled: bool = False
) -> Start:
    """A run's, which goes on from a step."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
    settings = config.training
    return Start(
        recipe=config.recipe,
        network=type(network).__name__,
        parameters=sum(size for size, _ in sizes),
        trained=sum(size for size, trained in sizes if trained),
        device=device_name(device),
        threads=torch.get_num_threads(),
        processes=processes,
        step=step,
        images=settings.images,
        seconds=settings.seconds,
        batch_size=settings.batch_size,
        unit=config.data.source.unit,
        compiled=compiled,
    )


@dataclass(frozen=True)
class Moment:
    """Where a run is after a step.

    seconds: of training, over all starts. progress: the share of the run that is done, in [0, 1] until the last step.
    left: seconds to the end at the pace since this start. rate: images a second. measured: the loss, as the step left
    it.
    """

    step: int
    images: int
    seconds: float
    progress: float
    measured: Tensor | float
    rate: float
    left: float

    @property
    def loss(self) -> float:
        """Of this step, the mean over its batch; who reads it on a GPU waits for the step to end there."""
        return float(self.measured)


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run has done."""

    step: int
    images: int
    seconds: float
    main_process: bool = True
    """False in all processes but the first."""
    peak_memory: str = ""
    """The most memory that this process has taken, in words; empty where the system does not say it."""


class Callback:
    """What happens beside a run: override the events that you want. None of them decides the weights.

    All are called on the main process alone, in the order in which the callbacks were given. What one raises ends the
    run; the newest checkpoint is then what is left of it.

    ```python
    class Losses(fewstep.Callback):
        def step(self, moment):
            print(moment.step, moment.loss)

    fewstep.train("digits", callbacks=[Losses()])
    ```
    """

    @property
    def samples(self) -> bool:
        """Whether it is handed the averaged model when samples are due."""
        return type(self).sample is not Callback.sample

    def start(self, start: Start) -> None:
        """Before the first step."""

    def step(self, moment: Moment) -> None:
        """After every step."""

    def log(self, record: Mapping[str, float]) -> None:
        """After a line of the log, which this is."""

    def checkpoint(self, folder: Path, step: int) -> None:
        """After a checkpoint is whole."""

    def sample(self, pipeline: Pipeline, step: int) -> None:
        """When samples are due (--training.sample-images), with the averaged model; do not keep it."""

    def end(self, result: TrainingResult) -> None:
        """After the last step of a run that came to its end."""
