"""The bar that a run shows while it trains."""

import math
import sys
from typing import Any

from tqdm import tqdm

from fewstep.recipes.config import TrainingConfig


def progress_bar(settings: TrainingConfig, name: str, hidden: bool) -> "tqdm[Any]":
    """Counts images, or seconds where they end the run; shows speed, loss and the time left."""
    unit, total = ("s", settings.seconds) if settings.seconds else ("img", settings.images)
    return tqdm(
        total=total, unit=unit, unit_scale=True, disable=hidden, desc=name, file=sys.stderr, mininterval=0.5,
        bar_format="{desc}: {percentage:3.0f}% |{bar}| {elapsed}<{remaining}{postfix}",
    )  # fmt: skip


def show_progress(bar: "tqdm[Any]", progress: float, images: int, seconds: float, loss: float) -> None:
    """progress: share of the run that is done. loss: of the last line of the log; NaN before there is one."""
    bar.n = min(progress, 1.0) * (bar.total or 0)
    speed = f"{images:,} images, {images / max(seconds, 1e-9):,.0f} images/s"
    bar.set_postfix_str(speed + ("" if math.isnan(loss) else f", loss {loss:.4f}"), refresh=False)
    bar.update(0)
