"""What a run says of itself between checkpoints."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.errors import MissingExtraError, TrainingDivergedError
from fewstep.training.checkpoint import RunFolder


class Window:
    """Means since the last line of the log."""

    def __init__(self) -> None:
        self.last_loss = math.nan
        self.terms: dict[str, list[float]] = {}
        self.steps: list[tuple[float, float, float]] = []
        self.since = time.perf_counter()

    def add_terms(self, logs: dict[str, Tensor]) -> None:
        for key, value in logs.items():
            mean = float(value.nanmean())
            if math.isfinite(mean):
                self.terms.setdefault(key, []).append(mean)

    def add_step(self, loss: float, norm: float, lr: float) -> None:
        self.steps.append((loss, norm, lr))

    def flush(self, batch_size: int, step: int, images: int, seconds: float) -> dict[str, float]:
        losses, norms, lrs = zip(*self.steps, strict=True)
        now = time.perf_counter()
        self.last_loss = sum(losses) / len(losses)
        record = {
            "step": step,
            "images": images,
            "seconds": round(seconds, 3),
            "loss": self.last_loss,
            **{key: sum(values) / len(values) for key, values in self.terms.items()},
            "grad_norm": sum(norms) / len(norms),
            "grad_norm_max": max(norms),
            "lr": lrs[-1],
            "images_per_second": round(len(losses) * batch_size / max(now - self.since, 1e-9), 1),
        }
        self.terms, self.steps, self.since = {}, [], now
        return record


def tensorboard(folder: Path) -> Any:
    """A writer of TensorBoard events; raises MissingExtraError without the extra [track]."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("TensorBoard is not installed: pip install 'fewstep[track]'") from error
    return SummaryWriter(str(folder / "tensorboard"))


def diverged(
    run: RunFolder, step: int, loss: float, norm: float, critic_norm: float, times: Tensor
) -> TrainingDivergedError:
    """What stops a run at a value that is not finite: where it happened and what is left; times (2, B)."""
    found = run.checkpoints()
    good = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
    critic = "" if math.isfinite(critic_norm) else f", of the critic {critic_norm}"
    t, s = times.double().cpu()
    return TrainingDivergedError(
        f"step {step}: loss {loss}, gradient norm {norm}{critic}; "
        f"batch times t in [{t.min():.4g}, {t.max():.4g}], s in [{s.min():.4g}, {s.max():.4g}]; {good}. "
        "Lower the learning rate or the gradient clip and train anew"
    )
