"""Statistics of the gradient: what each term of a loss gives to it, its norm's quantiles, what left its range first."""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

REMEMBERED = 1000
FACTOR = 10.0
QUANTILES = (0.5, 0.9, 0.99)


def term_norms(terms: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """|gradient of each term|, (), for terms () that are parts of one loss; their graphs are kept.

    A term that no parameter reaches has norm 0. Costs a backward pass for each term, so that the training loop asks
    once a line of the log, of the first process's first part of the batch: with accumulation or several processes
    these norms are of fewer samples than the whole gradient's.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    found = {}
    for name, term in terms.items():
        gradients = (
            torch.autograd.grad(term, trained, retain_graph=True, allow_unused=True) if term.requires_grad else ()
        )
        reached = [gradient for gradient in gradients if gradient is not None]
        found[name] = torch.nn.utils.get_total_norm(reached) if reached else torch.zeros_like(term)
    return found


@dataclass(frozen=True)
class Departure:
    """A quantity that left its range at `step` and did not return: above FACTOR times its median, or not finite.

    The median is that of all remembered steps or of the earlier half of them, whichever is less, so that a slow growth
    is not taken for the usual. Falling is no departure: losses do.
    """

    name: str
    step: int
    median: float
    value: float

    def __str__(self) -> str:
        usual = "it was never finite" if math.isnan(self.median) else f"usually {self.median:.3g}"
        return f"{self.name} left its range first, at step {self.step} ({usual}, then {self.value:.3g})"


class Recent:
    """The last REMEMBERED steps: (step, quantity by name), in the order in which a step computes them.

    Forgotten when a run is resumed.
    """

    def __init__(self) -> None:
        self.steps: deque[tuple[int, dict[str, float]]] = deque(maxlen=REMEMBERED)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Remember a step's values by name."""
        self.steps.append((step, dict(values)))

    def quantiles(self, name: str) -> dict[float, float]:
        """Running quantiles of a quantity; empty when it was never finite."""
        values = [record[name] for _, record in self.steps if math.isfinite(record.get(name, math.nan))]
        if not values:
            return {}
        levels = torch.tensor(QUANTILES, dtype=torch.float64)
        found = torch.tensor(values, dtype=torch.float64).quantile(levels)
        return dict(zip(QUANTILES, found.tolist(), strict=True))

    def first_to_leave(self) -> Departure | None:
        """Of the quantities that are out of their range at the last step, the one that has been so for longest.

        Of several that left at one step, the one that a step computes first. None where all are in range.
        """
        names = dict.fromkeys(name for _, record in self.steps for name in record)
        found = [departure for name in names if (departure := self._departure(name)) is not None]
        return min(found, key=lambda departure: departure.step, default=None)

    def _departure(self, name: str) -> Departure | None:
        course = [(step, record[name]) for step, record in self.steps if name in record]
        finite = [value for _, value in course if math.isfinite(value)]
        earlier = finite[: max(1, len(finite) // 2)]
        median = min(statistics.median(finite), statistics.median(earlier)) if finite else math.nan
        since = None
        for step, value in reversed(course):
            if math.isfinite(value) and value <= FACTOR * median:
                break
            since = (step, value)
        return None if since is None else Departure(name, since[0], median, since[1])
