"""The commands in the order of use: train, sample, evaluate, report; and what each leaves on disk."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fewstep
from fewstep.cli.policy_quickstart import policy_quickstart
from fewstep.cli.quickstart import quickstart
from fewstep.evaluation.figures import read_figures, write_figures
from fewstep.evaluation.report.run import report
from fewstep.networks.mlp import MLPConfig
from fewstep.recipes import recipe
from fewstep.recipes.config import RunConfig
from fewstep.training import RunFolder, Runtime
from fewstep.utils.errors import FewstepWarning
from tests.support.commands import SMALL, STEPS, Command, contents


def test_train_leaves_a_whole_run(small_run: Path) -> None:
    record = json.loads((small_run / "config.json").read_text())
    assert record["run"]["network"]["width"] == 16
    assert record["run"]["training"]["images"] == 320
    assert record["run"]["evaluation"]["steps"] == [1, 2]
    assert record["data"]["train"] + record["data"]["heldout"] == 200
    assert [line["step"] for line in RunFolder(small_run).read_log()] == [2, 4, 6, 8, 10]
    assert sorted(path.name for path in (small_run / "samples").iterdir()) == ["step-00000005.png", "step-00000010.png"]
    names = {path.name for path in RunFolder(small_run).last_checkpoint().iterdir()}
    assert names == {"config.json", "model.safetensors", "weights.safetensors", "optimizer.safetensors", "state.json"}


def test_train_again_changes_nothing(small_run: Path, archive: Path, command: Command) -> None:
    before = contents(small_run)
    words = ("train", "digits", "--data.source", "npz", "--data.root", archive, "--out", small_run)
    again = command(*words, *SMALL, *STEPS)
    assert again.code == 0
    assert "320 images in 10 steps" in again.out
    assert contents(small_run) == before


def test_train_names_its_folder_after_the_recipe(command: Command, tmp_path: Path) -> None:
    done = command("train", "digits-flow-matching", *SMALL, *STEPS, "--training.images", "32")
    assert done.code == 0
    assert "runs/digits-flow-matching: 32 images in 1 step," in done.out
    assert RunFolder(tmp_path / "runs" / "digits-flow-matching").config().recipe == "digits-flow-matching"


def test_sample_writes_a_grid_into_the_run(small_run: Path, tmp_path: Path, command: Command) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    shown = command("sample", run, "--seed", 3, "--count", 16, "--steps", 4)
    assert (shown.code, shown.err) == (0, "")
    assert "16 samples, 4 network calls each" in shown.out
    with Image.open(run / "samples-3.png") as grid:  # two rows of eight images, 2 pixels between them
        width, height = grid.width - 7 * 2, grid.height - 2
    assert width == 4 * height
    assert width % 64 == 0


def test_sample_k_is_the_same_whatever_the_count(small_run: Path, command: Command, tmp_path: Path) -> None:
    arrays = {}
    for count, batch, seed in ((5, 512, 0), (9, 4, 0), (9, 512, 1)):
        file = tmp_path / f"{count}-{seed}.npz"
        shown = command("sample", small_run, "--out", file, "--count", count, "--batch-size", batch, "--seed", seed)
        assert shown.code == 0
        with np.load(file) as stored:
            arrays[count, seed] = (stored["images"], stored["labels"])
    assert arrays[5, 0][0].shape == (5, 1, 8, 8)
    assert arrays[9, 0][1].tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    np.testing.assert_allclose(arrays[9, 0][0][:5], arrays[5, 0][0], atol=1e-5)
    assert np.abs(arrays[9, 0][0] - arrays[9, 1][0]).max() > 0.1


def test_sample_into_a_folder_with_classes_chosen(small_run: Path, command: Command, tmp_path: Path) -> None:
    words = ("--count", 3, "--label", 1, 0, "--sampler", "heun", "--steps", 2)
    assert command("sample", small_run, "--out", tmp_path / "single", *words).code == 0
    files = sorted((tmp_path / "single").glob("*.png"))
    assert [file.name for file in files] == ["000000-1.png", "000001-0.png", "000002-1.png"]
    with Image.open(files[0]) as image:
        assert (image.size, image.mode) == ((8, 8), "L")
    assert command("sample", small_run, "--out", tmp_path / "same.npz", *words).code == 0
    with np.load(tmp_path / "same.npz") as stored:
        assert stored["labels"].tolist() == [1, 0, 1]
        expected = np.clip(np.round((stored["images"][0, 0] + 1) * 127.5), 0, 255)
        with Image.open(files[0]) as image:
            assert np.abs(np.asarray(image) - expected).max() <= 1


def test_any_of_a_runs_averages_is_sampled_and_measured(archive: Path, command: Command, tmp_path: Path) -> None:
    data = ("--data.source", "npz", "--data.root", archive)
    several = ("--training.ema-power", "0.1", "0.2", "--training.ema-decay", "0.5")
    run = tmp_path / "run"
    assert command("train", "digits", *data, "--out", run, *SMALL, *STEPS, *several).code == 0
    drawn, names = {}, ("", "power-0.1", "power-0.2", "constant-0.5", "last")
    for name in names:
        chosen = ("--weights", name) if name else ()
        assert command("sample", run, "--out", tmp_path / "x.npz", "--count", 4, *chosen).code == 0
        with np.load(tmp_path / "x.npz") as stored:
            drawn[name] = stored["images"]
    assert np.array_equal(drawn[""], drawn["power-0.1"])
    assert all(not np.array_equal(drawn[a], drawn[b]) for a, b in itertools.combinations(names[1:], 2))
    shown = command("sample", run, "--weights", "power-0.3")
    assert shown.code == 2
    assert "has no weights 'power-0.3': it has power-0.1, power-0.2, constant-0.5, last" in shown.err

    fewstep.load(run, "last").save_pretrained(tmp_path / "model")
    assert command("sample", tmp_path / "model", "--out", tmp_path / "x.npz", "--count", 4).code == 0
    with np.load(tmp_path / "x.npz") as stored:
        assert np.array_equal(stored["images"], drawn["last"])
    shown = command("sample", tmp_path / "model", "--weights", "last")
    assert shown.code == 2
    assert "one set of weights" in shown.err

    for weights in ((), ("--weights", "last"), ("--weights", "power-0.1")):
        assert command("evaluate", run, "--steps", 1, *weights).code == 0
    rows = json.loads((run / "figures.json").read_text())
    found = sorted((row["method"], row["frechet"]) for row in rows if row["nfe"] == 1)
    assert [method for method, _ in found] == ["iSD-T", "iSD-T, last"]
    assert found[0][1] != found[1][1]


def test_evaluate_and_report(small_run: Path, tmp_path: Path, command: Command, cache: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    shown = command("evaluate", run)
    assert (shown.code, shown.err) == (0, "")
    rows = json.loads((run / "figures.json").read_text())
    assert [(row["method"], row["nfe"]) for row in rows] == [
        ("iSD-T", 1), ("iSD-T", 2), ("iSD-T, its ODE by Heun", 3), ("real data (training part)", 0),
    ]  # fmt: skip
    for row in rows:
        assert row.keys() >= {"method", "nfe", "frechet", "accuracy", "extractor", "samples", "seconds"}
        assert row["samples"] == 64
        assert 0 <= row["accuracy"] <= 1
        assert row["method"] in shown.out
    assert rows[-1]["frechet"] < min(row["frechet"] for row in rows[:-1])
    assert rows[-1]["accuracy"] > 0.9
    assert (cache / f"{rows[0]['extractor']}.safetensors").is_file()

    shown = command("report", run)
    assert (shown.code, shown.err) == (0, "")
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") + page.count("<svg") >= 3
    assert "iSD-T" in page
    assert rows[0]["extractor"] in page


def test_a_report_has_the_figures_of_a_run_kept_inside(small_run: Path, tmp_path: Path, command: Command) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    shutil.copytree(small_run, run / "other")
    common = {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "extractor": "some", "reference": "held out"}
    common |= {"samples": 64, "seed": 0, "seconds": 1.0, "latency_ms": 1.0}
    write_figures([{"method": "iSD-T", "nfe": 1, "frechet": 12.25} | common], run)
    theirs = [{"method": "iSD-T", "nfe": 1, "frechet": 77.75}, {"method": "another", "nfe": 32, "frechet": 33.75}]
    write_figures([row | common for row in theirs], run / "other")
    assert command("report", run).code == 0
    page = (run / "report.html").read_text()
    assert all(shown in page for shown in ("12.2", "33.8", "another"))
    assert "77.8" not in page


def test_report_without_figures(small_run: Path, tmp_path: Path, command: Command) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    assert command("report", run).code == 0
    assert (run / "report.html").stat().st_size > 1000


def test_compare_runs_with_learning_curves(archive: Path, tmp_path: Path, command: Command) -> None:
    """Two methods; one of them stopped in the middle has the same curve, and the reports link to each other."""
    words = ("train", "digits", "--data.source", "npz", "--data.root", archive, *SMALL, *STEPS)
    curve = ("--evaluation.curve-images", 96, "--evaluation.curve-steps", 1, "--evaluation.curve-samples", 64)
    for name, path in (("first", "linear"), ("second", "trig")):
        assert command(*words, *curve, "--model.path", path, "--out", name).code == 0
    lines = (tmp_path / "first" / "curve.jsonl").read_text()
    assert [json.loads(each)["step"] for each in lines.splitlines()] == [3, 6, 9, 10]
    shutil.rmtree(tmp_path / "first" / "checkpoints" / "step-00000010")
    assert command(*words, *curve, "--model.path", "linear", "--out", "first").code == 0
    values = [[json.loads(each)["value"] for each in text.splitlines()] for text in (
        lines, (tmp_path / "first" / "curve.jsonl").read_text())]  # fmt: skip
    assert values[0] == values[1]

    shown = command("compare", "first", "second")
    assert (shown.code, shown.err) == (0, "")
    assert "path linear" in shown.out
    assert "path trig" in shown.out
    assert "Fréchet distance, 1 network call" in shown.out
    assert {path.name for path in (tmp_path / "comparison").iterdir()} == {
        "comparison.html", "comparison.json", "comparison.png",
    }  # fmt: skip
    assert command("report", "first").code == 0
    assert 'href="../comparison/comparison.html"' in (tmp_path / "first" / "report.html").read_text()


def test_compare_measures_kept_checkpoints_where_no_curve_was_asked_for(
    small_run: Path, tmp_path: Path, command: Command
) -> None:
    """What it measures is what the run itself would have, and a second comparison finds it."""
    for name, seed in (("first", 0), ("second", 7)):
        shutil.copytree(small_run, tmp_path / name)
        config = tmp_path / name / "config.json"
        text = config.read_text().replace('"curve_samples": 1000', '"curve_samples": 64')
        config.write_text(text.replace('"seed": 0', f'"seed": {seed}'))
    shutil.rmtree(tmp_path / "second" / "checkpoints" / "step-00000009")
    shown = command("compare", "first", "second")
    assert shown.code == 0, shown.err
    assert "first: no learning curve was asked for; measured now at the 2 checkpoints that it kept, of steps 9, 10" in (
        shown.out
    )
    assert "second: no learning curve was asked for; measured now at step 10, the one checkpoint" in shown.out
    assert "Measured afterwards, at so many kept checkpoints: first (2), second (1)" in " ".join(shown.out.split())
    lines = [json.loads(line) for line in (tmp_path / "first" / "curve.jsonl").read_text().splitlines()]
    assert [(line["step"], line["nfe"]) for line in lines] == [(9, 1), (9, 2), (10, 1), (10, 2)]
    assert "measured now" not in command("compare", "first", "second").out


def test_a_saved_model_is_sampled_like_its_run(small_run: Path, tmp_path: Path, command: Command) -> None:
    fewstep.load(small_run).save_pretrained(tmp_path / "model")
    for source, name in ((small_run, "a.npz"), (tmp_path / "model", "b.npz")):
        assert command("sample", source, "--out", tmp_path / name, "--count", 4).code == 0
    with np.load(tmp_path / "a.npz") as first, np.load(tmp_path / "b.npz") as second:
        assert np.array_equal(first["images"], second["images"])
    for name in ("evaluate", "report", "tune-steps"):
        refused = command(name, tmp_path / "model")
        assert (refused.code, refused.out) == (2, "")
        assert "is a saved model, which keeps no data, log or figures: fewstep sample draws from it" in refused.err


class Measuring(Exception):
    """Stands where a quickstart has trained and begins to measure."""


def test_quickstart_trains_two_methods_distils_one_and_writes_a_page(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real digits, each method for a fifth of a second, a classifier; a small network with little to measure."""

    def cheaper(name: str) -> RunConfig:
        config = recipe(name)
        network = MLPConfig(width=16, depth=1, embedding_width=16)
        return replace(config, network=network, evaluation=replace(config.evaluation, samples=128, reference_steps=8))

    monkeypatch.setattr("fewstep.cli.quickstart.recipe", cheaper)
    runtime = Runtime(cpu=True, threads=1, quiet=True)
    page = quickstart(tmp_path / "run", cache, runtime, seconds=0.2)
    rows = json.loads((tmp_path / "run" / "figures.json").read_text())
    shown = {(row["method"], row["nfe"]) for row in rows}
    assert shown >= {("iSD-T", nfe) for nfe in (1, 2, 4, 16)} | {("flow matching", nfe) for nfe in (1, 2, 16, 32)}
    assert shown >= {("CTM, linear", nfe) for nfe in (1, 2, 4)}
    assert ("real data (training part)", 0) in shown
    keys = {"method", "nfe", "frechet", "accuracy", "extractor", "samples", "seconds"}
    assert all(keys <= row.keys() for row in rows)
    text = page.read_text()
    assert all(method in text for method in ("iSD-T", "flow matching", "CTM, linear"))
    assert "Frechet" in capsys.readouterr().out
    # Measured and reported again, the run keeps its baseline; started again, it goes on from what is there.
    write_figures(rows[:1], tmp_path / "run")
    assert len(read_figures(tmp_path / "run")) == len(rows)
    assert "flow matching" in report(RunFolder(tmp_path / "run")).read_text()
    logs = [(tmp_path / "run" / name / "log.jsonl").read_bytes() for name in (".", "flow-matching", "student")]

    def stop(*_: object) -> None:
        raise Measuring

    monkeypatch.setattr("fewstep.cli.quickstart.measure_run", stop)
    with pytest.raises(Measuring):
        quickstart(tmp_path / "run", cache, runtime, seconds=0.2)
    assert logs == [(tmp_path / "run" / name / "log.jsonl").read_bytes() for name in (".", "flow-matching", "student")]


def test_guidance_without_classes_is_said_and_not_claimed(archive: Path, command: Command) -> None:
    words = ("train", "digits", "--data.source", "npz", "--data.root", archive, "--data.no-labels", "--out", "plain")
    with pytest.warns(FewstepWarning, match=r"no classes or prompts to guide to: .*--objective\.guidance\.omega 1"):
        assert command(*words, *SMALL, *STEPS).code == 0
    assert command("report", "plain").code == 0
    assert "iSD-T" not in Path("plain/report.html").read_text()
    unguided = ("--objective.guidance.omega", 1, "--training.images", 32, "--out", "off")
    assert command(*words, *SMALL, *STEPS, *unguided).code == 0


def test_the_policies_quickstart_records_trains_rolls_out_and_writes_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.cli.policy_quickstart.POLICY_DEMONSTRATIONS", 12)
    monkeypatch.setattr("fewstep.cli.policy_quickstart.POLICY_EPISODES", 2)
    runtime, root = Runtime(cpu=True, threads=1, quiet=True), tmp_path / "run"
    page = policy_quickstart(root, runtime, seconds=0.2)
    printed = capsys.readouterr().out
    assert "The expert reached the goal in 12 of 12 episodes" in printed
    assert all(name in printed for name in ("iSD", "flow matching", "regression", "expert"))
    rows = [
        row
        for name in (".", "flow-matching", "regression")
        for row in json.loads((root / name / "rollouts.json").read_text())
    ]
    shown = {(row["method"], row["steps"], row["episodes"]) for row in rows}
    assert shown >= {
        ("iSD", 1, 2),
        ("iSD", 2, 2),
        ("flow matching", 16, 2),
        ("flow matching", 1, 2),
        ("regression", 1, 2),
    }
    assert (root / "filmstrip.png").is_file()
    assert "data:image/png;base64" in page.read_text()
    logs = [(root / name / "log.jsonl").read_bytes() for name in (".", "flow-matching", "regression")]
    monkeypatch.setattr("fewstep.cli.policy_quickstart.measure_rollouts", lambda *_: ([], None, None))
    for measuring in ("expert_row", "write_rollouts", "draw_film", "rollout_table", "report"):
        monkeypatch.setattr(f"fewstep.cli.policy_quickstart.{measuring}", lambda *_, **__: None)
    policy_quickstart(root, runtime, seconds=0.2)
    assert logs == [(root / name / "log.jsonl").read_bytes() for name in (".", "flow-matching", "regression")]
