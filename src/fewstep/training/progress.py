"""The bar that a run shows while it trains."""

import math
import sys
from types import TracebackType
from typing import Any

from tqdm import tqdm

from fewstep.recipes.config import RunConfig


class ProgressBar:
    """Counts images, or seconds where they end the run; shows speed, loss and the time left."""

    def __init__(self, config: RunConfig, hidden: bool) -> None:
        settings = config.training
        self.total: float = settings.seconds or settings.images
        unit = "s" if settings.seconds else "img"
        self.bar: tqdm[Any] = tqdm(
            total=self.total, unit=unit, unit_scale=True, disable=hidden, desc=config.recipe, file=sys.stderr,
            mininterval=0.5, bar_format="{desc}: {percentage:3.0f}% |{bar}| {elapsed}<{remaining}{postfix}",
        )  # fmt: skip

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.close()

    def show(self, progress: float, images: int, seconds: float, loss: float) -> None:
        """progress: share of the run that is done. loss: of the last line of the log; NaN before there is one."""
        self.bar.n = min(progress, 1.0) * self.total
        speed = f"{images:,} images, {images / max(seconds, 1e-9):,.0f} images/s"
        self.bar.set_postfix_str(speed + ("" if math.isnan(loss) else f", loss {loss:.4f}"), refresh=False)
        self.bar.update(0)
