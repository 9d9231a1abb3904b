"""Pictures keep values and places; the page is one safe, complete file whatever a run has to show."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import escape
from PIL import Image
from torch import Tensor

from fewstep.evaluation.report.figures import legible_ticks, loss_curves, quality_curves
from fewstep.evaluation.report.numbers import number, tick, with_error
from fewstep.evaluation.report.page import Grid, RunReport, render, write_report
from fewstep.evaluation.report.statistics import statistics_figure
from fewstep.sampling.images import image_grid, save_each, save_grid, save_npz, to_uint8
from fewstep.utils.errors import CheckpointError, DataError, ShapeError
from tests.support.statistics import wavy

HOSTILE = "<script>alert('&\"')</script>$x_1$"
VOID = {"meta", "img", "source", "br", "hr", "link", "input"}
LINK = "https://example.org/?a=1&b=2"


class Page(HTMLParser):
    """Elements, text and attributes of a page; fails on tags that do not close where they should."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def row(method: str, nfe: int, frechet: float, **other: Any) -> dict[str, Any]:
    whole = {
        "method": method,
        "nfe": nfe,
        "frechet": frechet,
        "kernel": 0.01234,
        "kernel_error": 0.00056,
        "precision": 0.875,
        "recall": 0.75,
        "accuracy": 0.962,
        "extractor": "digits-classifier-v1",
        "samples": 2000,
        "reference": "digits held out (593)",
        "seed": 0,
        "seconds": 1.0,
        "latency_ms": 3.25,
    }
    return whole | other


def record(step: int, **other: Any) -> dict[str, Any]:
    return {"step": step, "images": 256 * step, "loss": 1 / step, "lr": 1e-4, "grad_norm": 0.5} | other


def images(count: int = 6, channels: int = 1, size: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


ROWS = [
    row("one network", 1, 2.345),
    row("one network", 2, 1.234),
    row(HOSTILE, 2, 9.871, samples=1000),
    row("real data", 0, 0.512, latency_ms=None),
]
FULL = RunReport(
    title=f"digits {HOSTILE}",
    summary=f"First paragraph.\n\nSecond {HOSTILE}.",
    facts=(("Fréchet distance, 1 call", "2.35"), (HOSTILE, HOSTILE)),
    grids=(Grid("1 call", "same noise", images(), 3), Grid(HOSTILE, HOSTILE, images(seed=1), 3)),
    logs={HOSTILE: [record(1, anchor=0.3), record(2, anchor=float("nan"))]},
    rows=ROWS,
    cost=(("Device", "CPU"),),
    settings={"run": {"type": "RunConfig", "objective": {"type": "ISD", HOSTILE: [1, 2]}, "name": HOSTILE}},
    links=(("paper", LINK), ("trap", "javascript:alert(1)")),
    data_range=(-1.0, 1.0),
)


@pytest.fixture(scope="module")
def html() -> str:
    return render(FULL)


def test_page_is_well_formed_and_stands_alone(html: str) -> None:
    page = Page(html)
    assert not page.all("script")
    assert not page.all("link")
    for tag, attributes in page.elements:
        for name in ("src", "srcset"):
            assert attributes.get(name, "data:").startswith("data:"), tag
    assert [attributes["href"] for attributes in page.all("a")] == [LINK]
    assert "//" not in re.sub(r"data:image/png;base64,[\w+/=]*", "", html).replace(str(escape(LINK)), "")


def test_hostile_names_stay_text(html: str) -> None:
    assert "<script" not in html
    assert "javascript:" not in html
    assert html.count(str(escape(HOSTILE))) >= 8
    assert HOSTILE in "".join(Page(html).text)


def test_everything_given_is_shown(html: str) -> None:
    page = Page(html)
    text = "".join(page.text)
    for shown in ("2.35", "1.23", "9.87", "0.512", "0.01234 ± 0.00056", "96.2%", "3.25", "2,000", "1,000"):
        assert shown in text
    for shown in ("real data", "digits held out (593)", "digits-classifier-v1", "This is not FID", "run.objective"):
        assert shown in text
    assert page.elements.count(("td", {"class": "best"})) == 1  # the one number of calls that two methods share
    sources = [attributes["src"] for attributes in page.all("img")]
    assert len(sources) == len(FULL.grids) + 2
    assert all(attributes["alt"] for attributes in page.all("img"))
    for attributes in [*page.all("img"), *page.all("source")]:
        data = (attributes.get("src") or attributes["srcset"]).removeprefix("data:image/png;base64,")
        Image.open(io.BytesIO(base64.b64decode(data, validate=True))).verify()


def test_page_without_anything_measured_or_logged() -> None:
    page = Page(render(RunReport("bare", "", logs={"run": [], "other": [{"step": 1, "images": 1, "loss": None}]})))
    assert [tag for tag, _ in page.elements if tag in ("section", "img", "table", "dl")] == []
    assert "bare" in page.text


def test_rows_without_accuracy_or_finite_values() -> None:
    bare = dict.fromkeys(("kernel", "kernel_error", "precision", "recall"), float("nan"))
    page = Page(render(RunReport("t", "", rows=[row("m", 1, float("inf"), accuracy=None, latency_ms=None, **bare)])))
    assert not page.all("img")
    headings = "".join(page.text)
    assert "Accuracy" not in headings
    assert "Latency" not in headings


def test_inception_features_may_be_called_fid() -> None:
    only = dict.fromkeys(("accuracy", "precision", "recall"))
    text = render(RunReport("t", "", rows=[row("m", 1, 3.0, extractor="inception-v3-6726825d", **only)]))
    assert "is an FID" in text
    assert "not FID" not in text


def test_few_samples_are_said() -> None:
    for features, said in ((64, True), (2, False)):
        text = render(RunReport("t", "", rows=[row("m", 1, 3.0, samples=20, features=features)]))
        assert ("biased upwards" in text) is said


def test_figures_leave_matplotlib_alone_and_refuse_what_does_not_compare() -> None:
    before = dict(matplotlib.rcParams)
    runs = {"a": [record(1), record(2)], "b": [record(1, loss=-1.0)]}
    assert Image.open(io.BytesIO(loss_curves(runs, columns=4))).format == "PNG"
    assert Image.open(io.BytesIO(quality_curves([row("$m$", 2**i, 1.0) for i in range(9)], columns=1))).format == "PNG"
    assert dict(matplotlib.rcParams) == before
    still = dict.fromkeys(("prediction_rms", "target_rms", "derivative_rms"), 0.0)  # as a network begins
    assert Image.open(io.BytesIO(loss_curves({"a": [record(1, **still)]}))).format == "PNG"
    with pytest.raises(ShapeError, match="do not compare"):
        quality_curves([row("m", 1, 1.0), row("m", 1, 1.0, extractor="other")])
    with pytest.raises(DataError):
        quality_curves([])
    with pytest.raises(DataError):
        loss_curves({"run": []})


HUGE, LARGE = {"loss": 1e308, "grad_norm": 1e308, "lr": 1e300}, {"loss": 1e29, "grad_norm": 1e30}
TINY = {"loss": 5e-324, "grad_norm": 1e-310}


@pytest.mark.parametrize(
    "changes",
    [
        (dict.fromkeys(record(1), 0.0),),
        ({}, HUGE),
        (TINY,),
        (HUGE, TINY),
        ({"loss": -1e308}, HUGE),
        ({"loss": 1e29}, TINY),
    ],
)
def test_figures_of_runs_that_began_or_broke_down(
    changes: tuple[dict[str, float], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.evaluation.report.canvas._DPI", 30)
    log = [record(1) | change | {"images": 9 + k} for k, change in enumerate(changes)]
    assert Image.open(io.BytesIO(loss_curves({"a": log, "b": log}))).format == "PNG"


@given(
    count=st.integers(1, 9),
    channels=st.integers(1, 5),
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    columns=st.integers(1, 12),
    padding=st.integers(0, 3),
    scale=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_grid_holds_every_image_at_its_place(
    count: int, channels: int, height: int, width: int, columns: int, padding: int, scale: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    given_images = torch.randint(0, 255, (count, channels, height, width), generator=generator, dtype=torch.uint8)
    grid = image_grid(given_images, columns, padding, scale)
    across = min(columns, count)
    down = -(-count // across)
    tall, wide = height * scale, width * scale
    assert grid.shape == (down * (tall + padding) - padding, across * (wide + padding) - padding, 3)
    background = torch.ones(grid.shape[:2], dtype=torch.bool)
    for i, image in enumerate(given_images):
        top, left = (i // across) * (tall + padding), (i % across) * (wide + padding)
        shown = grid[top : top + tall : scale, left : left + wide : scale].permute(2, 0, 1)
        assert torch.equal(shown, image[:3] if channels >= 3 else image[:1].expand(3, -1, -1))
        background[top : top + tall, left : left + wide] = False
    assert (grid[background] == 255).all()


@pytest.mark.parametrize(
    ("values", "columns"), [(torch.zeros(0, 1, 2, 2, dtype=torch.uint8), 2), (torch.zeros(1, 1, 2, 2), 2)]
)
def test_grid_refuses_what_it_cannot_show(values: Tensor, columns: int) -> None:
    with pytest.raises(ShapeError):
        image_grid(values, columns)
    with pytest.raises(ShapeError):
        image_grid(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), 0)


def test_bytes_of_a_range() -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(every.double() / 127.5 - 1, (-1.0, 1.0)), every)
    assert torch.equal(to_uint8(every, (-1.0, 1.0)), every)
    assert torch.equal(to_uint8(every.half() * 3 + 5, None), every)
    odd = torch.tensor([-9.0, 9.0, float("nan"), float("inf")]).reshape(1, 1, 2, 2)
    assert to_uint8(odd, (0.0, 1.0)).flatten().tolist() == [0, 255, 0, 255]
    assert to_uint8(torch.full((2, 1, 2, 2), 0.3), None).max() == 0
    with pytest.raises(ShapeError, match="low < high"):
        to_uint8(odd, (1.0, 1.0))
    with pytest.raises(ShapeError, match="shape"):
        to_uint8(odd[0], None)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_files_keep_the_values(tmp_path: Path, channels: int) -> None:
    samples = images(3, channels)
    files = save_each(samples, tmp_path / "new", (-1.0, 1.0), first=5)
    assert [file.name for file in files] == ["000005.png", "000006.png", "000007.png"]
    for file, expected in zip(files, to_uint8(samples, (-1.0, 1.0)), strict=True):
        stored = np.asarray(Image.open(file)).reshape(8, 8, channels)
        assert np.array_equal(stored, expected.permute(1, 2, 0).numpy())
    assert sorted(tmp_path.glob("new/*")) == files
    with pytest.raises(ShapeError, match="npz"):
        save_each(images(1, 4), tmp_path, None)


def test_grid_file_is_large_enough_to_see(tmp_path: Path) -> None:
    file = save_grid(images(), tmp_path / "grid.png", columns=3, data_range=(-1.0, 1.0))
    assert Image.open(file).size == (3 * 64 + 2 * 2, 2 * 64 + 2)


def test_npz_contents(tmp_path: Path) -> None:
    samples, labels = images(4, 3), torch.arange(4)
    with np.load(save_npz(samples, labels, tmp_path / "a" / "s.npz")) as stored:
        assert sorted(stored) == ["images", "labels"]
        assert np.array_equal(stored["images"], samples.numpy())
        assert np.array_equal(stored["labels"], labels.numpy())
    with np.load(save_npz(samples, None, tmp_path / "bare")) as stored:
        assert list(stored) == ["images"]


def test_unwritable_targets_are_one_clear_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    for write in (
        lambda: write_report(RunReport("t", ""), blocked / "report.html"),
        lambda: save_npz(images(), None, blocked / "s.npz"),
        lambda: save_grid(images(), blocked / "grid.png"),
        lambda: save_each(images(), blocked, None),
    ):
        with pytest.raises(CheckpointError, match=f"cannot write {re.escape(str(blocked))}"):
            write()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_report_replaces_the_old_one_whole(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "report.html"
    for title in ("old", "näu"):
        assert write_report(RunReport(title, "summary"), file) == file
    assert "<h1>näu</h1>" in file.read_text(encoding="utf-8")
    assert list(file.parent.iterdir()) == [file]


def test_numbers_for_readers() -> None:
    shown = [number(v) for v in (None, 0.0, 1234.5, 12.34, 0.01234, 9.999, -0.5, 1.2e-5, 3e7)]
    assert shown == ["–", "0", "1,230", "12.3", "0.0123", "10.0", "−0.500", "1.20×10⁻⁵", "3.00×10⁷"]
    assert with_error(0.01234, 0.00056) == "0.01234 ± 0.00056"
    assert with_error(None, 0.1) == "–"
    assert [tick(v) for v in (0.0, 0.5, 2500.0, 1.2e6, 1e-4, 5e-5)] == ["0", "0.5", "2.5k", "1.2M", "10⁻⁴", "5×10⁻⁵"]


@pytest.mark.parametrize(
    ("calls", "shown"),
    [
        ([1, 2, 4, 31, 32], [1, 2, 4, 32]),
        ([1, 2, 16, 32], [1, 2, 16, 32]),
        ([7], [7]),
        ([30, 31, 32], [32]),
        ([4, 5], [4, 5]),
    ],
)
def test_labels_on_a_log_axis_keep_apart(calls: list[int], shown: list[int]) -> None:
    assert legible_ticks(calls) == shown


def test_statistics_are_drawn_with_and_without_what_shrinking_moved() -> None:
    used = wavy()
    estimated = replace(used, s=used.s - 0.5, l_stderr=torch.full_like(used.l, 0.02))
    plain, whole = statistics_figure(used, used), statistics_figure(estimated, used)
    assert plain != whole
    assert Image.open(io.BytesIO(plain)).format == "PNG"
    dark = statistics_figure(estimated, used, columns=1, dark=True)
    assert Image.open(io.BytesIO(dark)).convert("L").getpixel((2, 2)) < 64  # type: ignore[operator]


def test_errors_of_samples_stand_under_their_steps() -> None:
    jumps = {"method": "m", "times": [1.0, 0.0], "rmse": [[None, 0.5], [None, None]], "samples": 9}
    walks = ({"method": HOSTILE, "steps": k, "rmse": 0.5 / k, "stderr": 0.01} for k in (1, 2))
    text = render(RunReport("t", "", alignments=(jumps,), trajectories=tuple(walks)))
    assert HOSTILE not in text
    shown = "".join(Page(text).text)
    assert "1 step2 steps" in shown
    assert f"{HOSTILE}0.500 ± 0.0100.250 ± 0.010" in shown
    assert "On the way" not in shown  # as rows were stored before errors were measured there


def test_errors_of_samples_are_shown_where_they_stop() -> None:
    jumps = {"method": "m", "times": [1.0, 0.0], "rmse": [[None, 0.5], [None, None]], "samples": 9}
    walk = {"method": HOSTILE, "steps": 2, "times": [80.0, 1.9, 0.002], "rmse": 0.25, "stderr": 0.01}
    walk |= {"stops": [0.5, 0.25], "stops_stderr": [0.02, 0.01]}
    text = render(RunReport("t", "", alignments=(jumps,), trajectories=(walk,)))
    assert HOSTILE not in text
    assert f"{HOSTILE}, 2 steps0.500 ± 0.020 at 1.9; 0.250 ± 0.010 at 0.002" in "".join(Page(text).text)
