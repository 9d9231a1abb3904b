"""The first lines of a page: how good a run's samples are, beside real data and beside the other methods on the page.

Both are ratios and counts of the figures further down; nothing is measured here.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fewstep.evaluation.report.numbers import finite, number

Row = Mapping[str, Any]
_FEW = 4  # network calls, and lines
_REFERENCE = "its ODE by Heun"  # of a method's own; no method
_COMPARED = ("extractor", "reference", "samples", "guidance_scale")


def verdict(rows: Sequence[Row], method: str) -> tuple[str, ...]:
    """A line for each small number of network calls of a method, from rows of figures.json.

    "2 calls: 1.8 times the real data's own distance; flow matching needs 16" says that the Frechet distance of samples
    in two calls is 1.8 times that of as many training images, both to the held-out ones, and that flow matching comes
    as near in no fewer than 16. Without real data among the rows the distance itself is said. Empty where nothing of
    the method was measured.
    """
    own = sorted(
        (row for row in rows if row["method"] == method and 0 < row["nfe"] <= _FEW and finite(row, "frechet")),
        key=lambda row: int(row["nfe"]),
    )
    return tuple("; ".join((_distance(row, rows), *_others(row, rows, method))) for row in own[:_FEW])


def calls(count: int) -> str:
    """1 call, 2 calls."""
    return f"{count} call" if count == 1 else f"{count} calls"


def _distance(row: Row, rows: Sequence[Row]) -> str:
    real = next((finite(each, "frechet") for each in rows if each["nfe"] == 0 and _alike(each, row, 3)), None)
    if real is None or real <= 0:
        return f"{calls(row['nfe'])}: Fréchet distance {number(row['frechet'])}"
    return f"{calls(row['nfe'])}: {number(row['frechet'] / real, 2)} times the real data's own distance"


def _others(row: Row, rows: Sequence[Row], method: str) -> Iterator[str]:
    """How many calls other methods need to come as near: of each the fewest, or that it does not."""
    rivals = [
        each
        for each in rows
        if each["nfe"] > 0 and _alike(each, row) and finite(each, "frechet") is not None
        and not str(each["method"]).startswith(method) and not str(each["method"]).endswith(_REFERENCE)
    ]  # fmt: skip
    for name in list(dict.fromkeys(str(each["method"]) for each in rivals))[:_FEW]:
        own = [each for each in rivals if each["method"] == name]
        near = [int(each["nfe"]) for each in own if each["frechet"] <= row["frechet"]]
        most = max(int(each["nfe"]) for each in own)
        if not near:
            yield f"{name} does not come so near in {calls(most)}"
        else:
            yield f"{name} {'needs' if min(near) > row['nfe'] else 'is as near in'} {min(near)}"


def _alike(one: Row, other: Row, of: int = len(_COMPARED)) -> bool:
    """Whether two distances compare: by the same features, to the same images, of as many samples, guided alike."""
    return all(one.get(key) == other.get(key) for key in _COMPARED[:of])


def policy_verdict(rows: Sequence[Row], method: str) -> tuple[str, ...]:
    """The same for a policy, from rows of rollouts.json: a line for each small number of calls a decision.

    "1 call a decision: 39 of 50 episodes at the goal (0.65 to 0.88); expert 50" has Wilson's interval; other methods
    stand with the fewest calls in which as many episodes succeed.
    """
    stored = [row for row in rows if row["method"] == method and row["steps"]]
    setting = (stored[-1]["task"], stored[-1]["first_seed"], stored[-1]["episodes"]) if stored else ()
    same = [row for row in rows if (row["task"], row["first_seed"], row["episodes"]) == setting]
    newest = {row["steps"]: row for row in same if row["method"] == method}
    return tuple(
        "; ".join((_success(row), *_rivals(row, same, method)))
        for count, row in sorted(newest.items())[:_FEW]
        if count <= _FEW
    )


def _success(row: Row) -> str:
    share = f"{row['successes']} of {row['episodes']} episodes at the goal"
    return f"{calls(row['steps'])} a decision: {share} ({row['low']:.2f} to {row['high']:.2f})"


def _rivals(row: Row, rows: Sequence[Row], method: str) -> Iterator[str]:
    for name in list(dict.fromkeys(str(each["method"]) for each in rows if each["method"] != method))[:_FEW]:
        own = [each for each in rows if each["method"] == name]
        near = [int(each["steps"]) for each in own if each["successes"] >= row["successes"]]
        if not own[0]["steps"]:
            yield f"{name} {own[0]['successes']}"
        elif near:
            yield f"{name} needs {min(near)} for as many"
        else:
            best = max(own, key=lambda each: int(each["successes"]))
            yield f"{name} {best['successes']} in {calls(best['steps'])}"
