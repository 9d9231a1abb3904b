"""What a policy did, drawn: success with its interval, the ways that episodes took, actions beside the data's."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fewstep.evaluation.report.canvas import Palette, legend_above, make_panels, shorten, styled, to_png
from fewstep.utils.errors import DataError

Row = Mapping[str, Any]
_MOST_ROWS, _MOST_ROUTES = 16, 6


def success_figure(rows: Sequence[Row], *, columns: int = 2, dark: bool = False) -> bytes:
    """Shares of episodes at the goal with Wilson's intervals, and beside them the ways that episodes took, as PNG.

    rows: of rollouts.json, of one task and its starts; the first 16 are drawn. Raises DataError for no rows.
    """
    rows = list(rows)[:_MOST_ROWS]
    if not rows:
        raise DataError("there are no episodes to draw")
    routes = sorted({name for row in rows for name in row["routes"]})[:_MOST_ROUTES]
    with styled(dark) as palette:
        figure, axes = make_panels(2 if routes else 1, columns, height=0.9 + 0.32 * len(rows))
        _draw_success(axes[0], rows, palette)
        if routes:
            _draw_routes(axes[1], rows, routes, palette)
            handles = [Patch(color=palette.colour(k)) for k in range(len(routes))]
            legend_above(figure, handles, [shorten(name, 30) for name in routes])
        return to_png(figure)


def row_name(row: Row) -> str:
    """iSD, 2 calls; an expert makes none."""
    return str(row["method"]) + (f", {row['steps']} call{'s' if row['steps'] > 1 else ''}" if row["steps"] else "")


def _label_rows(axis: Axes, rows: Sequence[Row]) -> None:
    axis.set_yticks(range(len(rows)), [shorten(row_name(row), 32) for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)


def _draw_success(axis: Axes, rows: Sequence[Row], palette: Palette) -> None:
    for place, row in enumerate(rows):
        colour = palette.series[0] if row["steps"] else palette.muted
        axis.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=4, alpha=0.35)
        axis.plot([row["success"]], [place], color=colour, marker="o")
    axis.set_xlim(-0.02, 1.02)
    axis.set_title("Share of episodes at the goal")
    _label_rows(axis, rows)


def _draw_routes(axis: Axes, rows: Sequence[Row], routes: Sequence[str], palette: Palette) -> None:
    for place, row in enumerate(rows):
        start = 0.0
        for number, name in enumerate(routes):
            share = row["routes"].get(name, 0) / row["episodes"]
            axis.barh(place, share, left=start, height=0.55, color=palette.colour(number))
            start += share
    axis.set_xlim(0, 1)
    axis.set_title("Ways that episodes took")
    _label_rows(axis, rows)
    axis.set_yticklabels([])


def actions_figure(trace: Mapping[str, Any], *, columns: int = 2, dark: bool = False) -> bytes:
    """Every action of an episode against its steps, as PNG: what was done, and what the policy answers there.

    trace: of `episode_trace`. Raises DataError for an empty one.
    """
    done, answered = (list(zip(*trace.get(key, ()), strict=True)) for key in ("done", "answered"))
    if not done or len(done) != len(answered):
        raise DataError("there are no actions to draw")
    with styled(dark) as palette:
        figure, axes = make_panels(len(done), columns, height=1.9)
        for number, axis in enumerate(axes):
            axis.step(range(len(done[number])), done[number], color=palette.muted, linewidth=1.4, where="post")
            axis.step(range(len(answered[number])), answered[number], color=palette.series[0], where="post")
            axis.set_title(f"Action {number}")
        axes[-1].set_xlabel("step of the episode")
        handles = [Line2D([], [], color=colour) for colour in (palette.muted, palette.series[0])]
        legend_above(figure, handles, ["done in the held-out episode", "the policy's answer"])
        return to_png(figure)
