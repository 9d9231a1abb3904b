"""What a run says of itself between checkpoints: its bar, the lines of its log, a divergence."""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fewstep.training.checkpoint import is_sound
from fewstep.training.clock import Clock
from fewstep.training.flops import StepCost, flops_words
from fewstep.training.gradient_stats import Recent
from fewstep.training.memory import peak_memory
from fewstep.training.run_folder import RunFolder
from fewstep.utils.errors import TrainingDivergedError
from fewstep.utils.text import printable, quoted


def progress_bar(clock: Clock, name: str, hidden: bool, unit: str) -> "tqdm[Any]":
    """Counts samples, or seconds where they end the run; shows speed, loss and the time left. unit: a sample's name.

    It is drawn anew by time, not by steps, so that slow ones are seen too.
    """
    settings = clock.settings
    total = settings.seconds or settings.images
    return tqdm(
        total=total, unit=unit, unit_scale=True, disable=hidden, desc=printable(name), file=sys.stderr, mininterval=0.5,
        miniters=0, initial=min(clock.progress, 1.0) * total,
        bar_format="{desc}: {percentage:5.1f}% |{bar}| {elapsed}<{remaining}{postfix}",
    )  # fmt: skip


def show_progress(bar: "tqdm[Any]", clock: Clock, loss: float, waiting: float, cost: StepCost) -> None:
    """loss: of the last line of the log; NaN before there is one. waiting: the share of time in wait for data."""
    if bar.disable:
        return
    bar.n = min(clock.progress, 1.0) * (bar.total or 0)
    memory = peak_memory(cost.device)
    parts = (
        f"{clock.images:,} {bar.unit}s, {clock.rate:,.0f} {bar.unit}s/s",
        f"{waiting:.0%} in wait for data" if waiting >= NOTICED else "",
        "" if math.isnan(loss) else f"loss {loss:.4f}",
        flops_words(cost.at(clock.rate / clock.settings.batch_size)),
        f"{memory / 1024:.1f} GiB" if memory else "",
    )
    bar.set_postfix_str(", ".join(part for part in parts if part), refresh=False)
    bar.update(0)


NOTICED = 0.05
"""Share of time in wait for data that the bar shows."""


@dataclass(frozen=True)
class StepValues:
    """What a step leaves where it was taken, to be read later: loss, and norms of gradients, () each.

    lr: the learning rate. times: (2, B) of each part of its batch. terms: what each part says of those that have it.
    layers: the norm of each tensor's gradient, (P,), where it is at hand.
    """

    step: int
    loss: Tensor
    norm: Tensor
    lr: float = 0.0
    discriminator_norm: Tensor | None = None
    times: list[Tensor] = field(default_factory=list)
    terms: list[dict[str, Tensor]] = field(default_factory=list)
    layers: Tensor | None = None

    @property
    def tensors(self) -> Iterator[Tensor]:
        """All that is read, () each: the loss, the norm, that of the discriminator (0 for none), and the terms."""
        yield from (self.loss, self.norm)
        yield torch.zeros_like(self.norm) if self.discriminator_norm is None else self.discriminator_norm
        for part in self.terms:
            yield from part.values()


@dataclass(frozen=True)
class Diverged:
    """A step that was not finite, as it was read.

    times: (2, B). terms: what of its loss was not finite. layers: norms of its tensors' gradients, (P,).
    """

    step: int
    loss: float
    norm: float
    discriminator_norm: float
    times: Tensor
    terms: tuple[str, ...] = ()
    layers: Tensor | None = None


class Window:
    """Means since the last line of the log, and what the gradient was made of.

    What steps leave is read once for many of them, by `read`: until then nobody waits for the device.
    clip: the norm above which a step is clipped; infinite where none is. steps: loss, gradient norm and learning rate
    of those that were read. latest: the loss of the last step, read or not.
    """

    MOST = 256
    """Steps that may wait to be read."""

    def __init__(self, clip: float) -> None:
        self.clip = clip
        self.waiting: list[StepValues] = []
        self.latest: Tensor | float = math.nan
        self.last_loss = math.nan
        self.recent = Recent()
        self.parts: list[dict[str, Tensor]] = []
        self.terms: dict[str, list[float]] = {}
        self.term_norms: dict[str, Tensor] = {}
        self.steps: list[tuple[float, float, float]] = []
        self.since = time.perf_counter()

    def add_terms(self, logs: dict[str, Tensor]) -> None:
        """Values of those samples of a part of a batch that have them."""
        self.parts.append({name: value.detach().float().mean() for name, value in logs.items() if len(value)})

    def observe(self, values: StepValues) -> None:
        """What a step has left, finite or not, after its parts."""
        self.waiting.append(replace(values, terms=self.parts))
        self.latest, self.parts = values.loss, []

    @property
    def seconds(self) -> float:
        """Since the last line of the log."""
        return max(time.perf_counter() - self.since, 1e-9)

    @property
    def full(self) -> bool:
        """Whether as many steps wait to be read as may."""
        return len(self.waiting) >= self.MOST

    def read(self) -> Diverged | None:
        """Read the steps that wait; the first that is not finite, where there is one, with which the window ends."""
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return None
        numbers = iter(torch.stack([each.double() for values in waiting for each in values.tensors]).tolist())
        for values in waiting:
            loss, norm, discriminator_norm = (next(numbers) for _ in range(3))
            parts = [{name: next(numbers) for name in part} for part in values.terms]
            self._take(values.step, loss, norm, parts)
            if not all(map(math.isfinite, (loss, norm, discriminator_norm))):
                self.term_norms = {}
                of_terms = {name: None for part in parts for name, value in part.items() if not math.isfinite(value)}
                times = torch.cat(values.times, dim=1)
                return Diverged(values.step, loss, norm, discriminator_norm, times, tuple(of_terms), values.layers)
            self.steps.append((loss, norm, values.lr))
        return None

    def _take(self, step: int, loss: float, norm: float, parts: list[dict[str, float]]) -> None:
        names = dict.fromkeys(name for part in parts for name in part)
        found = {name: [part[name] for part in parts if name in part] for name in names}
        means = {name: sum(values) / len(values) for name, values in found.items()}
        for name, mean in means.items():
            if math.isfinite(mean):
                self.terms.setdefault(name, []).append(mean)
        self.recent.add(step, means | {"loss": loss, "grad_norm": norm})

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
            **{f"grad_norm_{name}": float(value) for name, value in self.term_norms.items()},
            "clipped": sum(norm > self.clip for norm in norms) / len(norms),
            "lr": lrs[-1],
            "images_per_second": round(len(losses) * batch_size / max(now - self.since, 1e-9), 1),
        }
        self.terms, self.term_norms, self.steps, self.since = {}, {}, [], now
        return record


def diverged(run: RunFolder, at: Diverged, recent: Recent, network: nn.Module) -> TrainingDivergedError:
    """What stops a run at a value that is not finite: where it happened, in which part, what went first, what is left.

    recent: the steps before, this one included. network: what is trained.
    """
    norm = at.discriminator_norm
    discriminator = "" if math.isfinite(norm) else f", of the discriminator {norm}"
    t, s = at.times.double().cpu()
    first = recent.first_to_leave()
    cause = overflow(at, network) + ("" if first is None else f"{first}; ")
    return TrainingDivergedError(
        f"step {at.step}: loss {at.loss}, gradient norm {at.norm}{discriminator}; "
        f"batch times t in [{t.min():.4g}, {t.max():.4g}], s in [{s.min():.4g}, {s.max():.4g}]; {cause}{last_good(run)}"
    )


_WORDS = {
    "derivative_rms": "the derivative dN/dt", "prediction_rms": "the network's output", "target_rms": "the target",
    "anchor": "the anchor", "distill": "the term distill",
}  # fmt: skip


def overflow(at: Diverged, network: nn.Module) -> str:
    """Which parts were not finite: of the loss, or else the gradients of the tensors nearest to the network's end."""
    if not math.isfinite(at.loss):
        named = [_WORDS.get(name, name) for name in (*(n for n in _WORDS if n in at.terms), *at.terms)]
        return f"not finite: {', '.join(dict.fromkeys(named))}; " if named else ""
    if at.layers is None or math.isfinite(at.norm):
        return ""
    names = [name for name, parameter in network.named_parameters() if parameter.grad is not None]
    finite = at.layers.isfinite().tolist()
    bad = [name for name, good in zip(names, finite, strict=False) if not good]
    return f"the gradient of {bad[-1]} is not finite, of {len(bad)} tensors in {len(finite)}; " if bad else ""


def last_good(run: RunFolder) -> str:
    """The newest checkpoint that can be used in words, and what to do after a divergence."""
    good = next((path for path in reversed(run.checkpoints()) if is_sound(path)), None)
    advice = "Lower the learning rate or the gradient clip and train anew"
    if good is None:
        return f"there is no checkpoint yet. {advice}"
    return f"the last good checkpoint is {good}. {advice}, from its weights with --initial {quoted(good)}"
