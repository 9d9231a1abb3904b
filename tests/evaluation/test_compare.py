"""Runs compared: images to a quality against closed forms, methods told apart, curves read and written, links."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fewstep.evaluation.compare import compare
from fewstep.evaluation.methods import differing_settings, find_runs, gather, method_labels, read_curves
from fewstep.evaluation.metrics.curves import common_target, mean_curve, reached_by, speedup, targets_of, time_to
from fewstep.evaluation.report.comparison import Course, Panel, comparison_curves
from fewstep.evaluation.report.run import study_links
from fewstep.flow.paths import EDMPathConfig
from fewstep.flow.preconditioning.base import PreconditioningConfig
from fewstep.flow.preconditioning.network_scaling import EDMInputScalingConfig
from fewstep.recipes import recipe
from fewstep.training import RunFolder
from fewstep.utils.errors import CheckpointError, ConfigError, DataError, ShapeError
from fewstep.utils.parts import kind
from fewstep.utils.serialization import FORMAT, to_json

rates = st.floats(0.2, 5.0)


def decay(rate: float = 1.0, points: int = 16, level: float = 8.0) -> list[tuple[float, float]]:
    """level exp(-rate x), which log-linear interpolation follows exactly."""
    return [(1000.0 * i, level * math.exp(-rate * i / 8)) for i in range(1, points + 1)]


# Curves


@given(rate=rates, images=st.floats(1000.0, 16000.0))
def test_time_to_inverts_an_exponential_curve(rate: float, images: float) -> None:
    target = 8.0 * math.exp(-rate * images / 8000)
    found = time_to(decay(rate), target)
    assert found is not None
    assert found == pytest.approx(images, rel=1e-6)


def test_time_to_is_when_the_curve_stays_there() -> None:
    """A dip that is lost again counts for nothing."""
    curve = [(1.0, 4.0), (2.0, 2.0), (3.0, 3.0), (4.0, 1.0)]
    assert [time_to(curve, target) for target in (9.0, 4.0, 3.0, 1.0, 0.9)] == [1.0, 1.0, 2.0, 4.0, None]
    between = time_to(curve, 2.0)
    assert between is not None
    assert 3.0 < between < 4.0


def test_the_common_target_makes_the_ratio_symmetric() -> None:
    """Whichever method is called the baseline, and however it dips on its way."""
    slow = {seed: [(1.0, 1.0 + seed), (2.0, 5.0), (4.0, 3.0), (8.0, 2.0)] for seed in (0, 1)}
    fast = {seed: [(1.0, 6.0), (2.0, 4.0), (4.0, 1.5), (8.0, 1.0 + 0.1 * seed)] for seed in (0, 1)}
    target = common_target([*slow.values(), *fast.values()])
    assert target == 2.0
    one, other = speedup(slow, fast, [target]), speedup(fast, slow, [target])
    assert one.ratio * other.ratio == pytest.approx(1.0)
    assert one.ratio > 2
    assert (one.bound, one.at_start) == ("", 0)
    assert speedup(slow, fast, [9.0]).at_start == 4


def test_time_to_takes_nan_for_worst_and_takes_zero() -> None:
    nan = math.nan
    assert time_to([(1, nan), (2, 3.0), (3, 2.0)], 3.0) == 2
    assert time_to([(1, 1.0), (2, nan)], 3.0) is None
    assert time_to([(1, 4.0), (3, 0.0)], 1.0) == 2.5  # linear in the value where its logarithm ends
    assert time_to([(1, nan), (2, nan)], 3.0) is None


@pytest.mark.parametrize("images", [[], [0.0, 1.0], [2.0, 1.0], [1.0, 1.0]])
def test_curves_whose_images_do_not_rise_are_refused(images: list[float]) -> None:
    with pytest.raises(ShapeError, match="rising, positive"):
        time_to([(x, 1.0) for x in images], 0.5)


def test_targets_are_what_every_curve_has_reached() -> None:
    good, bad = [(1.0, 4.0), (2.0, 3.0), (4.0, 1.0)], [(1.0, 5.0), (2.0, 6.0), (4.0, 2.0)]
    assert [reached_by([good, bad], share) for share in (0.1, 0.5, 0.75, 1.0)] == [6.0, 6.0, 6.0, 2.0]
    assert targets_of([good, bad]) == {0.5: 6.0, 1.0: 2.0}
    assert targets_of([[(1.0, math.nan)]]) == {}


@given(rate=rates, factor=st.floats(0.3, 3.0))
def test_speedup_of_a_curve_stretched_in_time_is_the_stretch(rate: float, factor: float) -> None:
    """y(x) and y(factor x): the ratio is `factor` at every target; below 1 the slower one misses some."""
    slow = decay(rate)
    fast = [(x / factor, y) for x, y in slow]
    found = speedup({0: slow}, {0: fast}, targets=[slow[7][1], slow[11][1]])
    assert found.ratio == pytest.approx(factor, rel=1e-6)
    assert found.at_targets == pytest.approx([factor] * 2, rel=1e-6)
    assert (found.low, found.high, found.seeds, found.bound) == (None, None, (0,), "")


def test_speedup_pairs_seeds_and_its_interval_holds_their_ratios() -> None:
    baseline = {seed: decay(1.0, level=8.0 + seed) for seed in (0, 1, 2, 5)}
    other = {seed: [(x / (1.5 + 0.2 * seed), y) for x, y in baseline[seed]] for seed in (0, 1, 2)} | {9: decay()}
    found = speedup(baseline, other, targets=[6.0, 4.0])
    assert found.seeds == (0, 1, 2)
    assert found.ratio == pytest.approx((1.5 * 1.7 * 1.9) ** (1 / 3))
    assert found.low is not None
    assert found.high is not None
    assert 1.5 <= found.low < found.ratio < found.high <= 1.9
    assert found == speedup(baseline, other, targets=[6.0, 4.0])
    with pytest.raises(ShapeError, match="no seed in common"):
        speedup({0: decay()}, {1: decay()})
    with pytest.raises(ShapeError, match="no target"):
        speedup({0: [(1.0, math.nan)]}, {0: decay()})


def test_random_resamples_agree_with_the_normal_interval() -> None:
    """Forty seeds with log ratios of standard deviation 0.2: about 0.2 / sqrt(40) times 1.96 to either side."""
    logs = 0.2 * torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    baseline = {seed: decay() for seed in range(40)}
    other = {seed: [(x / math.exp(log), y) for x, y in decay()] for seed, log in enumerate(logs.tolist())}
    found = speedup(baseline, other, targets=[3.0])
    assert found.low is not None
    assert found.high is not None
    width = 2 * 1.96 * float(logs.std(correction=0)) / 40**0.5
    assert math.log(found.high / found.low) == pytest.approx(width, rel=0.1)


def test_what_is_never_reached_makes_a_bound() -> None:
    good, longer = decay(), [(x, 2 * y + 0.1) for x, y in decay(points=40)]
    bad = longer[:16]
    found = speedup({0: good}, {0: bad})
    assert (found.censored, found.censored_baseline, found.bound) == (2, 0, "<")
    true = speedup({0: good}, {0: longer})
    assert (true.bound, str(true)) == ("", f"{true.ratio:.2f}")
    assert true.ratio < found.ratio < 1
    assert str(found).startswith("< 0.")
    reverse = speedup({0: bad}, {0: good}, targets=list(found.targets))
    assert (reverse.censored_baseline, reverse.bound) == (2, ">")
    assert reverse.ratio == pytest.approx(1 / found.ratio)
    assert speedup({0: bad}, {0: bad}, targets=[0.1]).bound == "?"


def test_a_mean_curve_spans_what_all_curves_cover() -> None:
    found = mean_curve([[(1.0, 1.0), (3.0, 4.0), (5.0, 1.0)], [(2.0, 8.0), (3.0, 1.0), (4.0, math.nan), (9.0, 1.0)]])
    assert found.images == (2.0, 3.0, 5.0)
    assert found.mean == pytest.approx((4.0, 2.0, 1.0))
    assert found.low == pytest.approx((2.0, 1.0, 1.0))
    assert found.high == pytest.approx((8.0, 4.0, 1.0))
    assert mean_curve([[(1.0, -1.0), (2.0, 3.0)]]).mean == (-1.0, 3.0)
    assert mean_curve([[(1.0, 1.0)], [(2.0, 1.0)]]).images == ()
    assert mean_curve([[(1.0, math.nan)]]).images == ()


# Methods


def flat(**changes: Any) -> dict[str, Any]:
    base = {"recipe": "digits", "training.seed": 0, "model.preconditioning": "euler", "objective.type": "ISD"}
    return base | {"objective.pairs.times.type": "A", "training.batch_size": 64, "optimizer.lr": 0.1} | changes


def labels(*settings: dict[str, Any]) -> list[str]:
    folders = [Path(f"runs/{chr(97 + i)}") for i in range(len(settings))]
    return method_labels(folders, settings, differing_settings(settings))


def test_methods_are_named_by_the_settings_that_differ() -> None:
    euler, seeded = flat(), flat(**{"training.seed": 1})
    bcm = flat(**{"model.preconditioning": "bcm", "training.seed": 1})
    assert labels(euler, seeded, bcm) == ["preconditioning euler", "preconditioning euler", "preconditioning bcm"]
    assert labels(euler, seeded) == ["digits", "digits"]
    wide = flat(**{"training.batch_size": 128})
    assert labels(euler, wide) == ["batch_size 64", "batch_size 128"]
    assert labels(flat(), flat(**{"a.lr": 1, "optimizer.lr": 0.2})) == [
        "a.lr null, optimizer.lr 0.1", "a.lr 1, optimizer.lr 0.2"
    ]  # fmt: skip


def test_a_part_of_another_type_is_named_by_its_type_alone() -> None:
    other = flat(**{"objective.type": "CTM", "objective.pairs.times.type": "B", "objective.decay": 0.9})
    assert differing_settings([flat(), other]) == ("objective.type",)
    assert labels(flat(), other) == ["objective ISD", "objective CTM"]


def test_many_differences_fall_back_on_recipe_folder_and_path() -> None:
    many = {"model.preconditioning": "bcm", "training.batch_size": 1, "optimizer.lr": 1.0}
    assert labels(flat(), flat(**many), flat(**many)) == ["a", "b", "b"]
    assert labels(flat(), flat(recipe="other", **many)) == ["digits", "other"]
    settings = [flat(), flat(**many)]
    twins = [Path("x/run"), Path("y/run")]
    assert method_labels(twins, settings, differing_settings(settings)) == ["x/run", "y/run"]


# Runs


def line(images: int, value: float, measure: str = "frechet", nfe: int | None = 1) -> dict[str, Any]:
    return {"images": images, "step": images, "seconds": 0.1, "measure": measure, "nfe": nfe, "value": value}


def make_run(
    root: Path, speed: float, seed: int = 0, preconditioning: str = "euler", lines: list[dict[str, Any]] | None = None
) -> Path:
    """A run folder without weights: settings, and a curve 8 exp(-speed x)."""
    base = recipe("digits-flow-matching")
    own = kind(PreconditioningConfig, preconditioning)
    model = replace(base.model, path=EDMPathConfig(), preconditioning=own, scaling=EDMInputScalingConfig())
    config = replace(base, model=model, training=replace(base.training, seed=seed))
    root.mkdir(parents=True)
    data = {"name": "digits", "fingerprint": "0123", "train": 1204, "heldout": 593}
    (root / "config.json").write_text(json.dumps({"format": FORMAT, "run": to_json(config), "data": data}))
    found = lines or [line(1000 * i, 8 * math.exp(-speed * (i + seed) / 8)) for i in range(1, 17)]
    (root / "curve.jsonl").write_text("".join(json.dumps(each) + "\n" for each in found))
    return root


@pytest.fixture
def study(tmp_path: Path) -> list[Path]:
    """Two methods of two seeds, the second method twice as fast."""
    plans = [("euler", 1.0), ("bcm", 2.0)]
    return [make_run(tmp_path / f"{name} {seed}", speed, seed, name) for name, speed in plans for seed in (0, 1)]


def test_a_study_is_written_as_table_record_figure_and_page(study: list[Path], tmp_path: Path) -> None:
    (study[0] / "report.html").write_text("the first report")
    table = compare(study, tmp_path / "out")
    assert "preconditioning bcm" in table
    assert "2.0" in table.splitlines()[2]
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert record["baseline"] == "preconditioning euler"
    assert record["differing"] == ["model.preconditioning.type"]
    (measure,) = record["measures"]
    assert [target["share"] for target in measure["targets"]] == [0.5, 0.75, 1.0]
    gain = measure["methods"][1]["speedup"]
    assert 2.0 < gain["low"] < gain["ratio"] < gain["high"] < 2.3  # seed 1 starts a step ahead at either speed
    assert gain["seeds"] == [0, 1]
    with Image.open(tmp_path / "out" / "comparison.png") as figure:
        assert figure.width >= 500
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert 'href="../euler%200/report.html"' in page
    assert page.count("href=") == 1
    assert page.count("data:image/png;base64,") == 4


def test_reports_of_a_study_link_to_it_and_to_each_other(study: list[Path], tmp_path: Path) -> None:
    compare(study, tmp_path / "out")
    assert study_links(RunFolder(study[0]), study[0]) == (("Comparison", "../out/comparison.html"),)
    assert study_links(RunFolder(study[0]), tmp_path) == (("Comparison", "out/comparison.html"),)
    (study[2] / "report.html").write_text("a report")
    assert study_links(RunFolder(study[0]), study[0])[1:] == (("bcm 0", "../bcm%200/report.html"),)
    assert study_links(RunFolder(tmp_path), tmp_path) == ()
    (study[0] / "study.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"study\.json is damaged"):
        study_links(RunFolder(study[0]), study[0])


def test_methods_without_a_common_seed_or_measure_have_no_figure(tmp_path: Path) -> None:
    nothing_common = [make_run(tmp_path / "a", 1.0), make_run(tmp_path / "b", 1.0, 1, "bcm")]
    other = make_run(
        tmp_path / "c", 1.0, 0, "linear", [line(5, 0.5, "alignment", None), line(9, 0.2, "alignment", None)]
    )
    compare([*nothing_common, other], tmp_path / "out")
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [(m["measure"], m["nfe"]) for m in record["measures"]] == [("frechet", 1), ("alignment", None)]
    assert [each["speedup"] for m in record["measures"] for each in m["methods"]] == [None] * 3
    assert record["measures"][1]["targets"] == []


def test_replicates_alone_are_averaged(study: list[Path], tmp_path: Path) -> None:
    assert "digits-flow-matching" in compare(study[:2], tmp_path / "out")


def test_a_run_from_before_a_setting_is_a_replicate(study: list[Path], tmp_path: Path) -> None:
    file = study[1] / "config.json"
    record = json.loads(file.read_text())
    assert record["run"]["data"].pop("chunks")  # as files were before demonstrations
    file.write_text(json.dumps(record))
    assert gather(find_runs(study[:2]))[1] == ()


def test_runs_that_do_not_compare_are_refused(study: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least two runs, got 1"):
        compare(study[:1], tmp_path / "out")
    with pytest.raises(ConfigError, match="same settings and seed 0"):
        compare([study[0], study[0]], tmp_path / "out")
    with pytest.raises(CheckpointError, match="is not a run"):
        compare([study[0], tmp_path], tmp_path / "out")
    record = json.loads((study[1] / "config.json").read_text())
    changed = record | {"data": record["data"] | {"name": "mixture", "fingerprint": "4567"}}
    (study[1] / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match=r"euler 0 is a run on digits \(0123\), .*euler 1 on mixture \(4567\)"):
        compare(study[:2], tmp_path / "out")
    record["run"]["evaluation"]["curve_samples"] = 5
    (study[1] / "config.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"measured its curve with 1000 samples, .* with 5"):
        compare(study[:2], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        "[]",
        "1",
        '{"images": 5}',
        '{"images": -1, "measure": "m", "nfe": 1, "value": 1}',
        '{"images": 1, "measure": "m", "nfe": "x", "value": 1}',
        '{"images": 1, "measure": "m", "nfe": 1, "value": "y"}',
    ],
)
def test_a_damaged_line_is_named_and_a_torn_end_left_out(bad: str, study: list[Path]) -> None:
    run, file = RunFolder(study[0]), study[0] / "curve.jsonl"
    whole = read_curves(run)
    text = file.read_text()
    file.write_text(text + bad)
    assert read_curves(run) == whole
    file.write_text(f"{text}{bad}\n{text}")
    with pytest.raises(CheckpointError, match=r"curve\.jsonl, line 17 is damaged"):
        read_curves(run)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no learning curve.*--evaluation\.curve-images"):
        read_curves(run)


def test_curves_that_broke_down_are_compared(study: list[Path], tmp_path: Path) -> None:
    """Points that no scale holds reach nothing, and are not drawn."""
    points = [line(1000 * i, value) for i, value in enumerate((1e308, math.inf, 1e-320, -1e308, 3.0), start=1)]
    (study[2] / "curve.jsonl").write_text("".join(json.dumps(each) + "\n" for each in points))
    assert "preconditioning bcm" in compare(study, tmp_path / "out")
    (study[2] / "curve.jsonl").write_text(json.dumps(line(1, 1.0) | {"images": 1e308}) + "\n")
    with pytest.raises(CheckpointError, match=r"curve\.jsonl, line 1 is damaged"):
        compare(study, tmp_path / "out")


def test_figures_need_a_point() -> None:
    course = Course("a", (1.0, 2.0), (2.0, 1.0), (2.0, 1.0), (2.0, 1.0))
    panels = [Panel("one", (course,), (1.5,)), Panel("$two$", (replace(course, method="b" * 60),))]
    for dark in (False, True):
        assert Image.open(io.BytesIO(comparison_curves(panels, dark=dark))).format == "PNG"
    with pytest.raises(DataError, match="no learning curve to draw"):
        comparison_curves([Panel("none", (Course("a", (), (), (), ()),))])


# Writing
