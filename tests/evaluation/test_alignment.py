"""Alignment is zero for exact students, the size of the perturbation for others; records and figures keep it."""

import io
import json
import math
from pathlib import Path as Folder
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.evaluation import align
from fewstep.evaluation.metrics.alignment import Alignment, AlignmentSettings, alignment, trajectory_alignment
from fewstep.evaluation.report.heatmap import alignment_heatmap
from fewstep.evaluation.report.page import RunReport, render
from fewstep.flow.closed_form import GaussianData
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import EDM, VP, Linear, Path, Trig
from fewstep.flow.preconditioning.jumps import EulerPreconditioning, LinearPreconditioning
from fewstep.flow.times import edm_grid, uniform_grid
from fewstep.networks.condition import Condition
from fewstep.networks.unet import UNetConfig
from fewstep.teachers import own_teacher
from fewstep.training import RunFolder
from fewstep.utils.errors import DataError, ShapeError
from fewstep.utils.random import Draws

F64 = torch.float64
SD = 0.6
DATA = GaussianData(torch.tensor(0.3, dtype=F64), SD)
PATHS: dict[str, Path] = {"edm": EDM(), "linear": Linear(), "trig": Trig(SD), "vp": VP()}


def normal(count: int, *shape: int, stream: int = 0) -> Tensor:
    return Draws(5, 0, torch.arange(count)).normal(stream, shape, F64)


def images(count: int) -> Tensor:
    return DATA.mean + SD * normal(count, 1, 2, 2)


class Shifted:
    """The exact student, every jump off by `shift` in each element and by `scatter` times a sign for each sample."""

    def __init__(self, path: Path, shift: float, scatter: float = 0.0) -> None:
        self.path, self.shift, self.scatter = path, shift, scatter

    def jump(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        sign = 1.0 - 2.0 * (torch.arange(len(x)) % 2)
        return DATA.jump(self.path, x, t, s) + self.shift + self.scatter * sign.reshape(-1, 1, 1, 1)


class Labelled:
    """Gaussian data whose mean is the class."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def of(self, cond: Condition, x: Tensor) -> GaussianData:
        assert cond.labels is not None
        return GaussianData(cond.labels.to(x.dtype).reshape(-1, 1, 1, 1), SD)

    def jump(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        return self.of(cond, x).jump(self.path, x, t, s)

    def denoise(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.of(cond, x).denoise(self.path, x, t)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_an_exact_student_is_aligned(path: Path) -> None:
    exact = DATA.flow_map(path, LinearPreconditioning())
    found = alignment(
        exact, exact, images(20), edm_grid(path, 5), method="exact", settings=AlignmentSettings(teacher_steps=8)
    )
    jumps = torch.ones(6, 6).triu(1).bool()
    assert torch.equal(torch.isnan(found.rmse), ~jumps)
    assert torch.equal(torch.isnan(found.stderr), ~jumps)
    assert float(found.rmse[jumps].max()) < 1e-4
    assert (found.samples, found.teacher_steps) == (20, 8)


def test_jumps_to_the_end_alone_are_those_of_the_whole_grid() -> None:
    teacher = DATA.flow_map(EDM(), EulerPreconditioning())
    whole = alignment(Shifted(EDM(), 0.1), teacher, images(8), edm_grid(EDM(), 3), method="x")
    ends = alignment(
        Shifted(EDM(), 0.1),
        teacher,
        images(8),
        edm_grid(EDM(), 3),
        method="x",
        settings=AlignmentSettings(ends_only=True),
    )
    for one, other in ((ends.rmse, whole.rmse), (ends.stderr, whole.stderr)):
        assert torch.equal(one[:-1, -1], other[:-1, -1])
        assert bool(one[:, :-1].isnan().all())


def test_a_teacher_on_another_path_is_the_same_truth() -> None:
    student, teacher = DATA.flow_map(EDM(), EulerPreconditioning()), DATA.flow_map(Linear(), LinearPreconditioning())
    found = alignment(
        student, teacher, images(20), edm_grid(EDM(), 4), method="exact", settings=AlignmentSettings(teacher_steps=8)
    )
    assert float(found.rmse.nan_to_num().max()) < 1e-4


def test_a_perturbation_shows_at_its_size() -> None:
    """Squared errors (a + b)^2 and (a - b)^2 in turn: mean a^2 + b^2, deviation 2ab."""
    path, a, b, count = Linear(), 0.05, 0.01, 400
    teacher = DATA.flow_map(path, LinearPreconditioning())
    times = uniform_grid(path, 3)
    found = alignment(
        Shifted(path, a, b),
        teacher,
        images(count),
        times,
        method="shifted",
        settings=AlignmentSettings(batch_size=count),
    )
    size = math.hypot(a, b)
    for t in times.tolist():
        for s in times.tolist():
            if s < t:
                assert found.at(t, s) == pytest.approx(size, rel=0.02)
    error = 2 * a * b / math.sqrt(count - 1) / (2 * size)
    assert float(found.stderr[0, 1]) == pytest.approx(error, rel=0.05)


def test_batches_change_nothing_and_the_seed_does() -> None:
    path = EDM()
    student = FlowMap(path, EulerPreconditioning(), DATA.flow_map(path, EulerPreconditioning()).network)
    rough = GaussianData(DATA.mean, 1.0).flow_map(path, EulerPreconditioning())
    runs: list[dict[str, Any]] = [{}, {"batch_size": 7}, {"seed": 1}]
    whole, parts, other = (
        alignment(rough, student, images(30), edm_grid(path, 3), method="m", settings=AlignmentSettings(**options)).rmse
        for options in runs
    )
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12, equal_nan=True)
    difference = (other - whole).nan_to_num().abs()
    assert 1e-6 < float(difference.max()) < 0.2 * float(whole.nan_to_num().max())


def test_labels_go_with_their_samples() -> None:
    model, labels = Labelled(Linear()), torch.arange(12) % 4
    x0 = labels.to(F64).reshape(-1, 1, 1, 1) + SD * normal(12, 1, 2, 2)
    cond, times = Condition(labels), uniform_grid(Linear(), 3)
    found = alignment(
        model, model, x0, times, method="labelled", cond=cond, settings=AlignmentSettings(teacher_steps=8, batch_size=5)
    )
    assert float(found.rmse.nan_to_num().max()) < 1e-3
    (walk,) = trajectory_alignment(
        model, model, normal(12, 1, 2, 2), [times], method="labelled", cond=cond, batch_size=5
    )
    assert walk.rmse < 1e-3


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_trajectories_of_an_exact_student_end_where_the_teachers_do(path: Path) -> None:
    exact = DATA.flow_map(path, LinearPreconditioning())
    grids = [edm_grid(path, k) for k in (1, 2, 4)]
    found = trajectory_alignment(exact, exact, normal(20, 1, 2, 2), grids, method="exact")
    assert [each.steps for each in found] == [1, 2, 4]
    assert [each.times for each in found] == [tuple(grid.tolist()) for grid in grids]
    assert max(each.rmse for each in found) < 1e-4
    last, *_ = trajectory_alignment(Shifted(path, 0.05), exact, normal(20, 1, 2, 2), grids[:1], method="shifted")
    assert last.rmse == pytest.approx(0.05, rel=1e-2)
    assert json.loads(json.dumps(last.row())) == last.row()


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_errors_are_measured_at_every_stop_of_a_trajectory(path: Path) -> None:
    """Each jump adds `shift` to what the exact map makes of the error so far, which it scales evenly."""
    exact, shift = DATA.flow_map(path, LinearPreconditioning()), 0.05
    grids = [edm_grid(path, k) for k in (1, 2, 4)]
    found = trajectory_alignment(Shifted(path, shift), exact, normal(20, 1, 2, 2), grids, method="shifted")
    for each, grid in zip(found, grids, strict=True):
        error, expected = torch.zeros(1, 1, dtype=F64), []
        for t, s in zip(grid[:-1, None], grid[1:, None], strict=True):
            start = torch.zeros_like(error)
            error = DATA.jump(path, start + error, t, s) - DATA.jump(path, start, t, s) + shift
            expected.append(abs(float(error)))
        assert each.stops == pytest.approx(expected, rel=1e-2, abs=1e-4)
        assert len(each.stops_stderr) == each.steps
        assert (each.rmse, each.stderr) == (each.stops[-1], each.stops_stderr[-1])


def test_records_are_json_with_nothing_where_no_jump_is() -> None:
    found = measured("m")
    stored = json.loads(json.dumps(found.row(), allow_nan=False))
    assert stored == found.row()
    assert stored["rmse"][0][0] is None
    assert stored["rmse"][0][3] == found.at(1.0, 0.0)
    assert stored["rmse"][3] == [None] * 4
    for t, s in ((0.0, 1.0), (1.0, 1.0), (0.9, 0.0)):
        with pytest.raises(ShapeError, match="no jump"):
            found.at(t, s)


def test_dropout_rests_while_students_and_teachers_are_compared() -> None:
    network = UNetConfig(width=8, multipliers=(1,), blocks=1, attention=(), embedding_width=16, dropout=0.5)
    model = FlowMap(Linear(), LinearPreconditioning(), network.build((1, 4, 4), 0, False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    x0, times = torch.zeros(4, 1, 4, 4), uniform_grid(Linear(), 2)
    first, second = (
        alignment(model, model, x0, times, method="m", settings=AlignmentSettings(teacher_steps=1)).rmse
        for _ in range(2)
    )
    assert torch.equal(first[0, 1], second[0, 1])
    assert model.training


@pytest.mark.parametrize(
    ("count", "times", "options"),
    [
        (1, [1.0, 0.0], {}),
        (4, [0.0, 1.0], {}),
        (4, [1.0], {}),
        (4, [1.0, 0.5, 0.5], {}),
        (4, [1.5, 0.0], {}),
        (4, [1.0, 0.0], {"batch_size": 0}),
        (4, [1.0, 0.0], {"teacher_steps": 0}),
    ],
)
def test_what_cannot_be_compared_is_refused(count: int, times: list[float], options: dict[str, int]) -> None:
    exact, grid = DATA.flow_map(Linear(), LinearPreconditioning()), torch.tensor(times, dtype=F64)
    with pytest.raises(ShapeError):
        alignment(exact, exact, images(count), grid, method="m", settings=AlignmentSettings(**options))
    with pytest.raises(ShapeError):
        trajectory_alignment(exact, exact, images(count), [grid], method="m", **options)


def test_trajectories_must_share_their_ends() -> None:
    exact = DATA.flow_map(Linear(), LinearPreconditioning())
    for grids in ([], [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.1])]):
        with pytest.raises(ShapeError, match="share"):
            trajectory_alignment(exact, exact, images(4), grids, method="m")


def measured(method: str, shift: float = 0.05, times: int = 4) -> Alignment:
    """A made-up alignment whose errors grow with the length of the jump."""
    grid = torch.linspace(1, 0, times, dtype=F64)
    rmse = shift * (grid[:, None] - grid)
    rmse = torch.where(rmse > 0, rmse, torch.nan)
    return Alignment(method, tuple(grid.tolist()), rmse, rmse / 50, 1000, 0, 8)


HOSTILE = "<b>$x_1$</b>"


def opened(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    image.load()
    assert image.format == "PNG"
    return image


def test_heat_maps_of_any_grid_are_pictures() -> None:
    records = [measured("Euler").row(), measured(HOSTILE, 1e-6, 12).row(), measured("two times", 3.0, 2).row()]
    wide, narrow = (
        opened(alignment_heatmap(records, columns=3)),
        opened(alignment_heatmap(records, columns=1, dark=True)),
    )
    assert wide.width > 2 * narrow.width / 1.5
    assert narrow.height > 2 * wide.height
    assert opened(alignment_heatmap(records[:1])).width > narrow.width


def test_stronger_errors_have_stronger_colours() -> None:
    """Cells of one picture, from the weakest to the strongest error: darker on white, lighter on black."""
    record = measured("m", times=3).row() | {"rmse": [[None, 0.001, 0.01], [None, None, 0.1], [None, None, None]]}
    for dark in (False, True):
        picture = opened(alignment_heatmap([record], dark=dark)).convert("L")
        assert colour_order(picture, dark)


def colour_order(picture: Image.Image, dark: bool) -> bool:
    """Whether the cells top left, top right and bottom right come in order of brightness."""
    width, height = picture.size
    cells = [(0.2, 0.2), (0.75, 0.2), (0.75, 0.75)]
    levels = [float(picture.getpixel((int(x * width), int(y * height)))) for x, y in cells]  # type: ignore[arg-type]
    return levels == sorted(levels, reverse=not dark) and len(set(levels)) == 3


@pytest.mark.parametrize("values", [[None, None], [None, 0.0], [None, math.nan], [None, math.inf]])
def test_nothing_to_draw_is_said(values: list[float | None]) -> None:
    record = measured("m", times=2).row() | {"rmse": [values, [None, None]]}
    with pytest.raises(DataError, match="no alignment"):
        alignment_heatmap([record])
    assert "Alignment" not in render(RunReport("t", "", alignments=(record,)))


def test_a_matrix_that_does_not_fit_its_times_is_refused() -> None:
    for matrix in ([[None, 0.1]], [[None, 0.1], [None]]):
        with pytest.raises(ShapeError, match="does not fit"):
            alignment_heatmap([measured("m", times=2).row() | {"rmse": matrix}])
    with pytest.raises(DataError):
        alignment_heatmap([])


def test_a_report_shows_its_alignments() -> None:
    page = render(RunReport("t", "", alignments=(measured("Euler").row(), measured(HOSTILE, 0.01).row())))
    assert page.count("<summary>Alignment with the teacher</summary>") == 1
    assert page.count("data:image/png;base64,") == 4
    assert "1,000 noised samples" in page
    assert HOSTILE not in page
    assert "Alignment" not in render(RunReport("t", ""))


def test_a_teacher_of_a_file_that_nobody_named_is_only_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Folder) -> None:
    def absent(*_: object) -> None:
        own_teacher("my_teacher.py:Mine")

    monkeypatch.setattr(align, "measure_alignment", absent)
    said = align.align(RunFolder(tmp_path), None, "CTM", tmp_path)  # type: ignore[arg-type]
    assert said.startswith("Alignment not measured: ")
    assert "--import my_teacher.py" in said
    assert list(tmp_path.iterdir()) == []
