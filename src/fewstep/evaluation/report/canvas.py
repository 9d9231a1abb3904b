"""What all figures share: colours, type, panels, legends, scales, and the way to PNG bytes.

Each figure is drawn on a canvas of its own: pyplot and its global state are never touched.
"""

import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image

from fewstep.evaluation.report.numbers import tick
from fewstep.sampling.images import png_bytes
from fewstep.utils.text import printable

Record = Mapping[str, object]

_DPI = 200


@dataclass(frozen=True)
class Palette:
    """Colours of one figure; series take `series` in order."""

    ground: str
    text: str
    muted: str
    line: str
    series: tuple[str, ...]

    def colour(self, index: int) -> str:
        """Of a series, in turn."""
        return self.series[index % len(self.series)]


LIGHT = Palette(
    "#ffffff", "#1f2733", "#66707f", "#e4e8ee", ("#2f62c9", "#d9742b", "#2a8f73", "#9a4fb0", "#c0394b", "#6b7686")
)
DARK = Palette(
    "#1b2028", "#e3e8ef", "#98a3b3", "#323a46", ("#7aa5ff", "#f2a35e", "#5cc7a6", "#cf92e0", "#f0808c", "#aab4c3")
)


def figure_style(palette: Palette) -> dict[Any, Any]:
    """Settings of matplotlib for one figure; applied through rc_context alone."""
    return {
        "font.family": "DejaVu Sans",
        "axes.titlesize": 10.0,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        **dict.fromkeys(("font.size", "axes.titlepad", "axes.labelsize"), 9.0),
        **dict.fromkeys(("axes.facecolor", "figure.facecolor"), palette.ground),
        **dict.fromkeys(("axes.titlecolor", "legend.labelcolor", "text.color"), palette.text),
        **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), palette.muted),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), palette.line),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
        **dict.fromkeys(("axes.grid", "axes.axisbelow", "axes.unicode_minus"), True),
        **dict.fromkeys((f"{axis}tick.{kind}.size" for axis in "xy" for kind in ("major", "minor")), 0.0),
        "grid.linewidth": 0.8,
        "legend.fontsize": 8.5,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "lines.markersize": 5.5,
        "lines.solid_capstyle": "round",
        "text.usetex": False,
        "savefig.bbox": "standard",
        "savefig.facecolor": "auto",
    }


@contextmanager
def styled(dark: bool = False) -> Iterator[Palette]:
    """Inside, matplotlib draws one figure in the style of the palette that it gives."""
    palette = DARK if dark else LIGHT
    with rc_context(figure_style(palette)):
        yield palette


def make_panels(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, at most `columns` in a row, and its axes in reading order."""
    columns = max(1, min(columns, count))
    rows = -(-count // columns)
    width = {1: 5.0, 2: 5.2, 3: 3.7}.get(columns, 3.2)
    layout = ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.09, hspace=0.04, wspace=0.04)
    figure = Figure(figsize=(columns * width, rows * height), dpi=_DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def scale_values(axis: Axes, values: Sequence[float], logarithmic: bool) -> None:
    """Log axis of the positive values, wide enough for two labels, or a linear one around all of them."""
    low, high = min(values, default=1.0), max(values, default=1.0)
    positive = [value for value in values if value > 0]
    if logarithmic and positive:
        low = min(positive)
        room = max(1.3, math.sqrt(6 * low / high))
        axis.set_yscale("log")
        axis.set_ylim(low / room, high * room)
        subs = (1.0, 2.0, 5.0) if high * room**2 < 100 * low else (1.0,)
        axis.yaxis.set_major_locator(LogLocator(subs=subs, numticks=7))
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        room = 0.15 * max(high - low, 0.02 * abs(high)) or 1.0
        axis.set_ylim(low - room, high + room)
        axis.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_formatter(tick)


def scale_images(axis: Axes) -> None:
    """The foot of a course: images seen."""
    axis.set_xlabel("images seen")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(tick)


def spreads(values: Sequence[float]) -> bool:
    """Whether positive values cover so wide a range that they want a log axis."""
    return min(values) > 0 and max(values) > 3 * min(values)


def legend_above(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """A legend over all panels: at most four names to a line, one on narrow figures."""
    columns = 1 if figure.get_figwidth() < 6 else 4
    figure.legend(handles, labels, loc="outside upper left", ncols=min(columns, len(labels)))


def legend_beside_title(axis: Axes, handles: Sequence[Line2D], labels: Sequence[str]) -> None:
    """A legend at the right end of the title's line, or inside the panel when it is long."""
    if sum(len(label) + 4 for label in labels) > 36:
        axis.legend(handles, labels, loc="best")
    else:
        spacing = {"borderaxespad": 0.1, "columnspacing": 1.2, "handlelength": 1.6}
        axis.legend(handles, labels, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(labels), **spacing)


def shorten(text: str, length: int) -> str:
    """At most `length` characters, all of them visible, the middle left out; dollar signs are not mathematics."""
    half, text = (length - 1) // 2, printable(text)
    short = text if len(text) <= length else f"{text[:half]}…{text[-half:]}"
    return short.replace("$", r"\$")


def to_png(figure: Figure, shades: bool = False) -> bytes:
    """The figure as PNG; 128 colours are plenty for lines and text, and a third of the bytes. `shades`: 256, chosen
    with more care, for figures that measure by colour.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # of letters that no font has, and of legends that take all room
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(buffer, format="png", dpi=_DPI, pil_kwargs={"compress_level": 1})
    colours, method = (256, Image.Quantize.MEDIANCUT) if shades else (128, Image.Quantize.FASTOCTREE)
    return png_bytes(Image.open(buffer).convert("RGB").quantize(colours, method=method))
