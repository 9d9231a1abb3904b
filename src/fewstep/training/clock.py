"""How far a run is, in steps, images and seconds, and what is due."""

from typing import Any

from torch import Tensor

from fewstep.recipes.config import TrainingConfig
from fewstep.training.callbacks import Moment


class Clock:
    """step: steps taken. seconds: of training, over all starts. The rate is that of this start."""

    def __init__(self, settings: TrainingConfig) -> None:
        self.settings = settings
        self.take_up(0, 0.0)

    def take_up(self, step: int, seconds: float) -> None:
        """Go on from there."""
        self.step, self.seconds = step, seconds
        self.begun = self.images, seconds, self.progress

    @property
    def images(self) -> int:
        """Images seen."""
        return self.step * self.settings.batch_size

    @property
    def seen(self) -> dict[str, Any]:
        """Steps, images and seconds, as lines of the log and checkpoints have them."""
        return {"step": self.step, "images": self.images, "seconds": self.seconds}

    @property
    def progress(self) -> float:
        """Share of the run that is done, by images or by seconds."""
        by_seconds = self.seconds / self.settings.seconds if self.settings.seconds else 0.0
        return max(self.images / self.settings.images, by_seconds)

    @property
    def finished(self) -> bool:
        """Whether the recipe's images, or its seconds, are used up."""
        return self.progress >= 1

    @property
    def rate(self) -> float:
        """Images a second since this start; 0 before its first step."""
        images, seconds, _ = self.begun
        return (self.images - images) / max(self.seconds - seconds, 1e-9)

    @property
    def left(self) -> float:
        """Seconds to the end, at the pace since this start; infinite before its first step."""
        _, seconds, progress = self.begun
        done = self.progress - progress
        return max(1 - self.progress, 0.0) * (self.seconds - seconds) / done if done > 0 else float("inf")

    def moment(self, loss: Tensor | float) -> Moment:
        """What callbacks are told after a step with that loss."""
        return Moment(self.step, self.images, self.seconds, self.progress, loss, self.rate, self.left)

    def due(self, every: int) -> bool:
        """Whether the last step crossed a multiple of `every` images, or was the run's last; never where it is 0."""
        before = self.images - self.settings.batch_size
        return every > 0 and (self.finished or self.images // every > before // every)

    @property
    def ends_line(self) -> bool:
        """Whether the log is due after the step that comes next: that step looks at the gradient term by term."""
        every = self.settings.log_images
        return (self.images + self.settings.batch_size) // every > self.images // every
