"""What a run says of itself between checkpoints: its bar, the lines of its log, a divergence."""

import math
import sys
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fewstep.training.checkpoint import is_sound
from fewstep.training.clock import Clock
from fewstep.training.gradient_stats import Recent
from fewstep.training.run_folder import RunFolder
from fewstep.utils.errors import TrainingDivergedError
from fewstep.utils.text import printable, quoted


def progress_bar(clock: Clock, name: str, hidden: bool) -> "tqdm[Any]":
    """Counts images, or seconds where they end the run; shows speed, loss and the time left.

    It is drawn anew by time, not by steps, so that slow ones are seen too.
    """
    settings = clock.settings
    unit, total = ("s", settings.seconds) if settings.seconds else ("img", settings.images)
    return tqdm(
        total=total, unit=unit, unit_scale=True, disable=hidden, desc=printable(name), file=sys.stderr, mininterval=0.5,
        miniters=0, initial=min(clock.progress, 1.0) * total,
        bar_format="{desc}: {percentage:5.1f}% |{bar}| {elapsed}<{remaining}{postfix}",
    )  # fmt: skip


def show_progress(bar: "tqdm[Any]", clock: Clock, loss: float) -> None:
    """loss: of the last line of the log; NaN before there is one."""
    bar.n = min(clock.progress, 1.0) * (bar.total or 0)
    speed = f"{clock.images:,} images, {clock.rate:,.0f} images/s"
    bar.set_postfix_str(speed + ("" if math.isnan(loss) else f", loss {loss:.4f}"), refresh=False)
    bar.update(0)


class Window:
    """Means since the last line of the log, and what the gradient was made of.

    clip: the norm above which a step is clipped; infinite where none is. steps: loss, gradient norm and learning rate.
    """

    def __init__(self, clip: float) -> None:
        self.clip = clip
        self.last_loss = math.nan
        self.recent = Recent()
        self.parts: list[dict[str, float]] = []
        self.terms: dict[str, list[float]] = {}
        self.term_norms: dict[str, float] = {}
        self.steps: list[tuple[float, float, float]] = []
        self.since = time.perf_counter()

    def add_terms(self, logs: dict[str, Tensor]) -> None:
        """Values of those samples of a part of a batch that have them."""
        found = {name: value.detach().float().mean() for name, value in logs.items() if len(value)}
        if found:
            self.parts.append(dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True)))

    def observe(self, step: int, loss: float, norm: float) -> None:
        """The loss and gradient norm of a step, finite or not, after its parts."""
        names = dict.fromkeys(name for part in self.parts for name in part)
        found = {name: [part[name] for part in self.parts if name in part] for name in names}
        means = {name: sum(values) / len(values) for name, values in found.items()}
        for name, mean in means.items():
            if math.isfinite(mean):
                self.terms.setdefault(name, []).append(mean)
        self.recent.add(step, means | {"loss": loss, "grad_norm": norm})
        self.parts = []

    def flush(self, batch_size: int, clock: Clock) -> dict[str, float]:
        """The line of the log that ends here; the next begins empty."""
        losses, norms, lrs = zip(*self.steps, strict=True)
        now = time.perf_counter()
        self.last_loss = sum(losses) / len(losses)
        record = {
            **clock.seen,
            "seconds": round(clock.seconds, 3),
            "loss": self.last_loss,
            **{key: sum(values) / len(values) for key, values in self.terms.items()},
            "grad_norm": sum(norms) / len(norms),
            "grad_norm_max": max(norms),
            **{f"grad_norm_q{100 * level:.0f}": value for level, value in self.recent.quantiles("grad_norm").items()},
            **{f"grad_norm_{name}": value for name, value in self.term_norms.items()},
            "clipped": sum(norm > self.clip for norm in norms) / len(norms),
            "lr": lrs[-1],
            "images_per_second": round(len(losses) * batch_size / max(now - self.since, 1e-9), 1),
        }
        self.terms, self.term_norms, self.steps, self.since = {}, {}, [], now
        return record


def diverged(
    run: RunFolder, step: int, loss: float, norm: float, discriminator_norm: float, times: Tensor, recent: Recent
) -> TrainingDivergedError:
    """What stops a run at a value that is not finite: where it happened, what went first and what is left.

    times (2, B). recent: the steps before, this one included.
    """
    discriminator = "" if math.isfinite(discriminator_norm) else f", of the discriminator {discriminator_norm}"
    t, s = times.double().cpu()
    first = recent.first_to_leave()
    cause = "" if first is None else f"{first}; "
    return TrainingDivergedError(
        f"step {step}: loss {loss}, gradient norm {norm}{discriminator}; "
        f"batch times t in [{t.min():.4g}, {t.max():.4g}], s in [{s.min():.4g}, {s.max():.4g}]; {cause}{last_good(run)}"
    )


def last_good(run: RunFolder) -> str:
    """The newest checkpoint that can be used in words, and what to do after a divergence."""
    good = next((path for path in reversed(run.checkpoints()) if is_sound(path)), None)
    advice = "Lower the learning rate or the gradient clip and train anew"
    if good is None:
        return f"there is no checkpoint yet. {advice}"
    return f"the last good checkpoint is {good}. {advice}, from its weights with --initial {quoted(good)}"
