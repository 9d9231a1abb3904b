"""The first lines of a page against the figures they are made of; what stands beside samples; how to load a model."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.data.base import Dataset, Samples
from fewstep.evaluation.report.episodes import actions_figure, success_figure
from fewstep.evaluation.report.neighbours import nearest, nearest_grid, real_grid
from fewstep.evaluation.report.page import Film, Grid, RunReport, render
from fewstep.evaluation.report.usage import usage
from fewstep.evaluation.report.verdict import policy_verdict, verdict
from fewstep.sampling.decode import Viewer
from fewstep.utils.errors import DataError
from tests.evaluation.test_report import Page, row

REAL = row("real data (training part)", 0, 1.5)


def test_the_verdict_is_the_issues_own_sentence() -> None:
    rows = [row("iSD-T", 2, 3.15), *(row("flow matching", nfe, 60 / nfe) for nfe in (1, 2, 16, 32)), REAL]
    rows = [{**each, "samples": 2000} for each in rows]
    assert verdict(rows, "iSD-T") == ("2 calls: 2.1 times the real data's own distance; flow matching needs 32",)
    rows[3]["frechet"] = 3.1
    assert verdict(rows, "iSD-T")[0].endswith("flow matching needs 16")
    assert verdict(rows[:3], "iSD-T") == (
        "2 calls: Fréchet distance 3.15; flow matching does not come so near in 2 calls",
    )
    assert verdict(rows, "another") == ()


@given(values=st.lists(st.floats(0.5, 100), min_size=4, max_size=4), own=st.floats(0.5, 100))
def test_a_rival_needs_the_fewest_calls_that_come_as_near(values: list[float], own: float) -> None:
    counts = (1, 2, 4, 8)
    rows = [row("mine", 1, own), *(row("other", n, value) for n, value in zip(counts, values, strict=True)), REAL]
    (line,) = verdict(rows, "mine")
    near = [n for n, value in zip(counts, values, strict=True) if value <= own]
    ending = (
        "does not come so near in 8 calls" if not near else f"is as near in {1}" if near[0] == 1 else f"needs {near[0]}"
    )
    assert line.endswith(f"other {ending}")


@pytest.mark.parametrize("change", [{"samples": 500}, {"extractor": "another"}, {"reference": "elsewhere"}])
def test_figures_that_do_not_compare_are_not_compared(change: dict[str, object]) -> None:
    rows = [row("mine", 1, 4.0), row("other", 2, 1.0) | change, REAL | change]
    assert verdict(rows, "mine") == ("1 call: Fréchet distance 4.00",)


def episodes(method: str, steps: int, successes: int, **other: object) -> dict[str, object]:
    whole = {"method": method, "steps": steps, "successes": successes, "episodes": 50, "success": successes / 50}
    whole |= {"low": 0.6, "high": 0.9, "task": "arm", "first_seed": 100_000, "routes": {"left": 20, "right": 30}}
    return whole | {"mean_steps": 12.0, "score": successes / 50, "errors": [], "latency_ms": 1.0} | other


def test_a_policys_verdict() -> None:
    rows = [episodes("iSD", 1, 39), episodes("flow matching", 1, 20), episodes("flow matching", 16, 44)]
    rows += [episodes("expert", 0, 50), episodes("iSD", 1, 3, task="another")]
    assert policy_verdict([rows[-1], *rows[:-1]], "iSD") == (
        "1 call a decision: 39 of 50 episodes at the goal (0.60 to 0.90); "
        "flow matching needs 16 for as many; expert 50",
    )


def test_nearest_are_those_of_a_search_over_all() -> None:
    values = torch.randn(40, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    data = Dataset("points", Samples(values), Samples(values[:8] + 1))
    samples, numbers = values[[7, 3, 21]] + 0.01, torch.arange(0, 40)
    assert nearest(samples, data.train, numbers).tolist() == [7, 3, 21]
    even = torch.arange(0, 40, 2)
    distances = torch.cdist(samples.flatten(1), values[even].flatten(1))
    assert nearest(samples, data.train, even).tolist() == even[distances.argmin(1)].tolist()
    shown = nearest_grid(samples, data, Viewer(None, (-1.0, 1.0)), 2).images
    torch.testing.assert_close(shown[[0, 1, 4]], samples)
    torch.testing.assert_close(shown[[2, 3, 5]], values[[7, 3, 21]])
    assert len(real_grid(data, Viewer(None, None), 5, 2).images) == 5


def test_a_model_is_used_by_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    python, command = usage(tmp_path / "my run", 2, False, [tmp_path / "net.py"])
    assert python.splitlines()[1:] == [
        "fewstep.import_file('net.py')", "model = fewstep.load('my run')",
        "images = model.generate(16, steps=2).samples",
    ]  # fmt: skip
    assert command == "fewstep sample 'my run' --steps 2 --count 16 --out samples.png --import net.py"
    assert "load_policy('my run', steps=1)" in usage(tmp_path / "my run", 1, True, (), 6)[0]


@pytest.mark.usefixtures("coarse_figures")
def test_the_page_shows_what_a_policy_did() -> None:
    strip = Grid("iSD, one episode", "", torch.zeros(8, 3, 4, 4, dtype=torch.uint8), 8)
    trace = {"done": [[0.0, 1.0]] * 5, "answered": [[0.1, 0.9]] * 5}
    made = RunReport(
        "arm", "", verdict=("1 call a decision: all",), episodes=(episodes("iSD", 1, 39), episodes("expert", 0, 50)),
        traces=(("iSD, 1 network call", trace),), films=(Film(strip, b"GIF89a"),), usage=("import fewstep", "fewstep"),
        actions=(("iSD", "1", "0.5", "0.1 0.2", "16"),),
    )  # fmt: skip
    page = Page(render(made))
    text = " ".join("".join(page.text).split())
    assert "arm 1 call a decision: all" in text
    assert "Use it import fewstep" in text
    alts = [image["alt"] for image in page.all("img")]
    assert any("as a film" in alt for alt in alts)
    assert any(alt.startswith("Success in arm: iSD, 1 call, expert") for alt in alts)
    assert any(alt.startswith("Actions of a held-out episode") for alt in alts)
    with pytest.raises(DataError, match="no actions"):
        actions_figure({"done": [], "answered": []})
    with pytest.raises(DataError, match="no episodes"):
        success_figure([])
