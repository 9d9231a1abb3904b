"""Stored files whose content is not what it should be, and options beyond reason: exit code 2 and one line."""

import json
import re
import shutil
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep import __main__ as fewstep_main
from fewstep.training import RunFolder
from tests.support.commands import SMALL, STEPS, Command, Finished, contents

BINARY = b"\x80\xff\x00\n" * 9
DEEP = b"[" * 100_000
CLOCK: dict[str, Any] = {
    "type": "DiscreteVP", "schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "steps": 10**9, "betas": [],
    "zero_snr": False,
}  # fmt: skip
FIGURE: dict[str, Any] = {"method": "iSD", "nfe": 1, "frechet": 1.5, "extractor": "e", "reference": "r", "samples": 8}


def assert_refused(shown: Finished, message: str) -> None:
    """Exit code 2 and exactly one line, which says what is wrong."""
    assert shown.code == 2, shown.out
    (line,) = shown.err.splitlines()
    assert line.startswith("fewstep: ")
    assert re.search(message, line), line


@pytest.fixture
def run(small_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    shutil.copytree(small_run, tmp_path / "run")
    return tmp_path / "run"


def change(file: Path, *keys: str, value: object) -> None:
    """Set one value of a JSON file."""
    record = place = json.loads(file.read_text())
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    file.write_text(json.dumps(record))


@pytest.mark.parametrize("content", [BINARY, DEEP, b"null", b"5", b"[1]", b"{}"], ids=str)
@pytest.mark.parametrize("name", ["config.json", "checkpoint", "state.json", "figures.json", "log.jsonl", "study.json"])
def test_a_report_names_the_damaged_file(name: str, content: bytes, run: Path, command: Command) -> None:
    folder = RunFolder(run).last_checkpoint()
    places = {"checkpoint": folder / "config.json", "state.json": folder / "state.json"}
    file = places.get(name, run / name)
    file.write_bytes(content + b"\n")
    before = contents(run)
    shown = command("report", run)
    assert_refused(shown, rf"{file.name}(, line 1)? is (damaged|not a run's|not a fewstep)")
    assert contents(run) == before


@pytest.mark.parametrize(
    "rows",
    [[1], [{}], [FIGURE, {}], [FIGURE | {"frechet": None}], [FIGURE | {"nfe": "1"}], [FIGURE | {"method": [1]}]],
)
def test_figures_that_are_none_are_named(rows: list[object], run: Path, command: Command) -> None:
    (run / "figures.json").write_text(json.dumps(rows))
    assert_refused(command("report", run), r"figures\.json is damaged .*: delete it, and run fewstep evaluate")


def test_a_report_of_any_number_of_names_ends_soon_and_without_a_word(run: Path, command: Command) -> None:
    """Hundreds of quantities in a log, many extractors, names that a terminal would obey and no font has."""
    record = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    (run / "log.jsonl").write_text(json.dumps(record | {f"k{i}\x1b": 1.0 for i in range(300)}) + "\n")
    rows = [FIGURE | {"method": f"m{i}\x1b[31m", "extractor": f"e{i // 2}\x1b"} for i in range(40)]
    (run / "figures.json").write_text(json.dumps(rows))
    shown = command("report", run)
    assert (shown.code, shown.err) == (0, "")
    page = (run / "report.html").read_text()
    assert page.count("<picture>") == 9  # eight extractors and the training
    assert "\x1b" not in shown.out


@pytest.mark.parametrize("data", [{"classes": 10}, [], None, {"classes": "two"}])
def test_a_run_that_does_not_say_what_its_data_are(data: object, run: Path, command: Command) -> None:
    change(run / "config.json", "data", value=data)
    assert_refused(command("report", run), r"config\.json is damaged: it does not say what .* data are \(.*train\)")


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("flow_map", "shape"), [1, -8, 8], r"config\.json: samples of shape \(1, -8, 8\).* at least 1"),
        (("flow_map", "num_classes"), -1, r"config\.json: .* -1 classes"),
        (("flow_map", "sigma_data"), 10**400, r"config\.json is damaged \(the number 1000.* is too large\)"),
        (("flow_map", "network", "width"), -5, r"config\.json is damaged \(an MLP needs width"),
        (("flow_map", "network", "expansion"), float("nan"), r"config\.json is damaged \(an MLP needs"),
        (("flow_map",), [1], r"config\.json must be an object"),
        (("flow_map", "sigma_data"), float("nan"), r"config\.json: sigma_data is nan; it must be positive"),
        (("flow_map", "path"), CLOCK, r"config\.json\.path: a variance-preserving path of 1000000000 steps"),
        (("pipeline", "class_names"), ["cat"], r"config\.json is damaged \(1 names of 2 classes\)"),
        (("pipeline", "data_range"), [1.0, 1.0], r"config\.json: pipeline: data_range is .*black must be below white"),
        (("flow_map", "shape"), [1, 10**9, 10**9], r"config\.json is damaged \(no network can be made"),
    ],
)
def test_a_model_that_cannot_be_built_is_named(
    keys: tuple[str, ...], value: object, message: str, run: Path, command: Command
) -> None:
    change(RunFolder(run).last_checkpoint() / "config.json", *keys, value=value)
    assert_refused(command("sample", run), message)


def test_a_curve_that_is_no_text_is_named(run: Path, small_run: Path, command: Command) -> None:
    (run / "curve.jsonl").write_bytes(BINARY)
    assert_refused(command("compare", run, small_run), r"curve\.jsonl, line 1 is damaged .*: delete that line")


def test_a_model_of_values_that_are_not_finite_draws_nothing(run: Path, command: Command) -> None:
    file = RunFolder(run).last_checkpoint() / "model.safetensors"
    save_file({key: torch.full_like(value, torch.nan) for key, value in load_file(file).items()}, file)
    before = contents(run)
    expected = r"model\.safetensors is of no use: its tensor \S+ holds values that are not finite; .* --from 9$"
    assert_refused(command("sample", run), expected)
    assert contents(run) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--label 99999999999999999999", r"labels are no whole numbers of 64 bits"),
        ("--guidance-scale inf", r"needs a finite omega"),
        ("--count 1000000000000", r"out of memory \(drawing 1000000000000 samples takes .+\): draw fewer"),
        ("--guidance-scale 1e300", r"needs a finite omega"),
    ],
)
def test_samples_beyond_reason(words: str, message: str, run: Path, command: Command) -> None:
    before = contents(run)
    assert_refused(command("sample", run, *words.split()), message)
    assert contents(run) == before


LONG = "x" * 300


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train digits --network.expansion nan", r"an MLP needs"),
        ("train digits --network.expansion inf", r"an MLP needs"),
        ("train digits --network.width 1000000000000", r"out of memory .*: take a smaller network"),
        ("train digits --network.width 1000000000000000000000000000000", r"out of memory .*: take a smaller network"),
        (
            "train digits --network.width 1000000",
            r"out of memory \(a network of .+ parameters takes .+\): take a smaller",
        ),
        ("train digits --training.batch-size 1000000000000", r"out of memory \(a batch of .+\): take smaller batches"),
        (f"train digits --out made/deep/{LONG}", r"cannot write made/deep/x+.*: File name too long"),
        (f"train digits --out {LONG}", r"x+\.\.\.: File name too long"),
        (f"sample {LONG}", r"x+\.\.\.: File name too long"),
    ],
)
def test_options_beyond_reason(words: str, message: str, command: Command, tmp_path: Path) -> None:
    assert_refused(command(*words.split(), *(SMALL[2:] if words.startswith("train") else ())), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", ["idx", "images", "npz", "latents", "demonstrations"])
@pytest.mark.parametrize(
    ("root", "reason"), [("~nosuchuser/x", "home"), (LONG, "File name too long"), (f"{LONG}/x", "File name too long")]
)
def test_data_in_no_place(source: str, root: str, reason: str, command: Command, tmp_path: Path) -> None:
    words = ("train", "digits", "--data.source", source, "--data.root", root)
    assert_refused(command(*words, *SMALL, *STEPS), rf"is no place to read data from \(.*{reason}.*\): give another")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore"),
    ],
)
def test_memory_that_runs_out(error: Exception, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(*_: object) -> None:
        raise error

    monkeypatch.setattr("fewstep.evaluation.running.train_on", exhaust)
    assert_refused(command("train", "digits", *SMALL), r"out of memory \(.+\): take a smaller network")


def test_an_interrupt_while_the_command_line_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupting(MetaPathFinder):
        def find_spec(self, name: str, *_: object) -> None:
            if name == "fewstep.cli.main":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "fewstep.cli.main")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    assert fewstep_main.main() == 130
    assert capsys.readouterr().err == "fewstep: interrupted\n"


def test_other_errors_are_not_taken_for_a_lack_of_memory(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("fewstep.evaluation.running.train_on", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        command("train", "digits", *SMALL)
