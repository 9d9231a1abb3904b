"""What is kept of a run: read by several at once, damaged, in folders that cannot be written to, by strangers."""

import json
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fewstep.evaluation import evaluate
from fewstep.evaluation.actions import read_actions, write_actions
from fewstep.evaluation.align import read_alignment
from fewstep.evaluation.figures import read_figures, write_figures
from fewstep.evaluation.report.html import is_harmless
from fewstep.evaluation.report.page import RunReport, render
from fewstep.evaluation.report.run import thinned_log
from fewstep.policies.figures import read_rollouts, read_strip
from fewstep.training import RunFolder
from fewstep.utils.errors import CheckpointError, FewstepWarning
from tests.support.commands import Command

FIGURE: dict[str, Any] = {"method": "iSD", "nfe": 1, "frechet": 1.5, "extractor": "e", "reference": "r", "samples": 8}
JUMPS = {"method": "m", "times": [1.0, 0.5, 0.0], "rmse": [[None, 0.1, 0.2], [None, None, 0.3], [None] * 3]}
WALK = {"method": "m", "steps": 2, "times": [1.0, 0.5, 0.0], "rmse": 0.2, "stderr": 0.1}
WALK |= {"stops": [0.1, 0.2], "stops_stderr": [0.1, 0.1]}
ALIGNMENT: dict[str, Any] = {"teacher": "t", "jumps": JUMPS | {"samples": 8}, "trajectories": [WALK]}
ROLLOUT: dict[str, Any] = {
    "method": "m", "task": "t", "sampler": "map", "steps": 1, "seed": 0, "first_seed": 0, "episodes": 2,
    "successes": 1, "success": 0.5, "low": 0.1, "high": 0.9, "mean_steps": 3.0, "score": 0.5, "routes": {},
    "errors": [], "latency_ms": 1.0,
}  # fmt: skip
ABSURD = (1e308, -1e308, math.inf, math.nan, 10**300, "1", [1], {"a": 1}, None)


@pytest.fixture
def run(small_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    shutil.copytree(small_run, tmp_path / "run")
    return tmp_path / "run"


def changes(record: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every value in a stored record."""
    inner = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    return [place, *(each for key, value in inner for each in changes(value, (*place, key)))][0 if place else 1 :]


def changed(record: Any, place: tuple[Any, ...], value: object) -> Any:
    copy = json.loads(json.dumps(record))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return copy


# Damaged files


@pytest.mark.parametrize(
    ("name", "record"), [("figures.json", [FIGURE]), ("alignment.json", ALIGNMENT), ("rollouts.json", [ROLLOUT])]
)
def test_absurd_values_give_one_line(name: str, record: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value of each file replaced by each of what it is not: read, or refused with the file's name."""
    read: list[RunReport] = []
    refused: list[str] = []
    for place in changes(record):
        for value in ABSURD:
            (tmp_path / name).write_text(json.dumps(changed(record, place, value)))
            try:
                aligned = read_alignment(tmp_path)
                rows, episodes = read_figures(tmp_path), tuple(read_rollouts(tmp_path))
            except CheckpointError as error:
                refused.append(str(error))
                continue
            jumps = tuple(each["jumps"] for each in aligned)
            walks = tuple(walk for each in aligned for walk in each["trajectories"])
            read.append(RunReport("t", "", rows=rows, alignments=jumps, trajectories=walks, episodes=episodes))
    assert all(f"{name} is damaged" in message for message in refused)
    assert len(refused) > 20
    monkeypatch.setattr("fewstep.evaluation.report.canvas._DPI", 20)
    for each in read[:: max(1, len(read) // 5)]:
        render(each)


def test_a_log_of_any_size_is_drawn(run: Path, command: Command) -> None:
    """One step of zeros and of what a diverging run has, and more lines than a figure has pixels."""
    line = json.loads((run / "log.jsonl").read_text().splitlines()[0])
    zeros = {key: 0.0 for key in line if key not in ("step", "images", "seconds")}
    (run / "log.jsonl").write_text(json.dumps(line | zeros | {"loss": 1e308, "grad_norm": math.inf}) + "\n")
    assert command("report", run).code == 0
    (run / "log.jsonl").write_text(
        "".join(json.dumps(line | {"step": k, "images": k}) + "\n" for k in range(1, 20_001))
    )
    start = time.perf_counter()
    found = thinned_log(RunFolder(run))
    assert time.perf_counter() - start < 5
    assert len(found) == 2000
    assert found[-1]["step"] == 20_000


# Several at once


def test_rows_of_several_at_once_are_all_kept(tmp_path: Path) -> None:
    def write(k: int) -> None:
        write_figures([FIGURE | {"method": f"m{k}", "seed": 0}], tmp_path)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(24)))
    assert {row["method"] for row in read_figures(tmp_path)} == {f"m{k}" for k in range(24)}


def test_a_row_has_its_own_checkpoints_seconds(run: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that is written while samples are drawn is another one's."""
    state = json.loads((RunFolder(run).last_checkpoint() / "state.json").read_text())
    del state["digest"]
    usual = evaluate.generate

    def late(*given: Any, **others: Any) -> Any:
        later = RunFolder(run).checkpoint(state["step"] + 1)
        if not later.exists():
            shutil.copytree(RunFolder(run).last_checkpoint(), later)
            (later / "state.json").write_text(json.dumps(state | {"step": state["step"] + 1, "seconds": 1e6}))
        return usual(*given, **others)

    monkeypatch.setattr(evaluate, "generate", late)
    assert command("evaluate", run, "--steps", 1).code == 0
    rows = [row for row in read_figures(run) if row["nfe"]]
    assert {(row["step"], row["seconds"]) for row in rows} == {(state["step"], state["seconds"])}


# Folders that cannot be written to


def test_figures_of_a_run_that_cannot_be_written_to(run: Path, command: Command, tmp_path: Path) -> None:
    for name in ("figures.json", "report.html", "step_times.json"):  # a folder in its place: root may write anything
        (run / name).mkdir()
        (run / name / "file").touch()
    refused = command("evaluate", run, "--steps", 1)
    assert refused.code == 2
    assert "--out" in refused.err
    elsewhere = tmp_path / "else where"
    assert command("evaluate", run, "--steps", 1, "--out", elsewhere).code == 0
    (run / "figures.json" / "file").unlink()
    (run / "figures.json").rmdir()
    assert command("report", run, "--out", elsewhere).code == 0
    assert read_figures(elsewhere)[0]["extractor"] in (elsewhere / "report.html").read_text()


def test_tuned_times_that_cannot_be_stored_are_shown(
    run: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise CheckpointError("cannot write it")

    monkeypatch.setattr("fewstep.sampling.step_times.write_atomically", refuse)
    shown = command("tune-steps", run, "--steps", 2, 3, "--evaluations", 4, "--samples", 30)
    assert (shown.code, shown.err.count("\n")) == (2, 1)
    assert [line.split()[0] for line in shown.out.splitlines()[1:3]] == ["2", "3"]


# Files of strangers


def test_only_a_png_is_a_film_strip(tmp_path: Path) -> None:
    """Whatever it is called: other formats are read by other programs."""
    file = tmp_path / "filmstrip.png"
    for kind in ("EPS", "GIF", "BMP"):
        Image.new("RGB", (80, 10)).save(file, format=kind)
        with pytest.raises(CheckpointError, match=r"filmstrip\.png is damaged"):
            read_strip(tmp_path)
    Image.new("1", (20_000, 20_000)).save(file, format="PNG")
    with pytest.raises(CheckpointError, match="no film strip"):
        read_strip(tmp_path)
    Image.new("RGB", (80, 10)).save(file, format="PNG")
    found = read_strip(tmp_path)
    assert found is not None
    assert found.shape == (8, 3, 10, 10)


@pytest.mark.parametrize(
    "address",
    [
        "javascript:alert(1)", " javascript:alert(1)", "\x01javascript:alert(1)", "java\nscript:alert(1)", "//host/x",
        "/etc/passwd", "\\\\host\\x", "data:text/html,x", "file:///etc/passwd", "https://a.b/\u202ex", "vbscript:x",
    ],
)  # fmt: skip
def test_addresses_that_a_page_does_not_link(address: str) -> None:
    assert not is_harmless(address)


def test_addresses_that_a_page_links() -> None:
    for address in ("https://a.b/c?d=e", "../other/report.html", "run%20two/report.html", "mailto:a@b.c"):
        assert is_harmless(address)


def test_a_study_links_reports_alone(run: Path, command: Command, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    for name in ("notes.txt", "report.html"):
        (tmp_path / "secret" / name).write_text("x")
    study = {"comparison": str(tmp_path / "secret" / "notes.txt"), "runs": [str(tmp_path / "secret"), "../secret"]}
    (run / "study.json").write_text(json.dumps(study))
    assert command("report", run).code == 0
    page = (run / "report.html").read_text()
    assert page.count("<a href=") == 1
    assert 'href="../secret/report.html"' in page


def test_nothing_printed_is_obeyed_by_a_terminal(small_run: Path, command: Command, tmp_path: Path) -> None:
    """Names of folders and of data, in tables, lines and pages."""
    hostile = "red\x1b[31m\u202eexe"
    run = tmp_path / hostile
    shutil.copytree(small_run, run)
    config = json.loads((run / "config.json").read_text())
    config["data"]["name"] = hostile
    (run / "config.json").write_text(json.dumps(config))
    for words in (("report", run), ("sample", run), ("evaluate", run, "--steps", 1), ("sample", tmp_path / "\x1b")):
        shown = command(*words)
        assert "\x1b" not in shown.out + shown.err
        assert "\u202e" not in shown.out + shown.err
    page = (run / "report.html").read_text()
    assert "red\\x1b[31m\\u202eexe" in page
    assert "\u202e" not in page


# Samples in files


def test_a_folder_holds_one_draw_named_by_class(run: Path, command: Command, tmp_path: Path) -> None:
    out = tmp_path / "drawn"
    assert command("sample", run, "--out", out, "--count", 6).code == 0
    for name in ("mine.png", "000003.png.png", "000123-cat.png"):
        (out / name).write_bytes(b"kept")
    assert command("sample", run, "--out", out, "--count", 3, "--label", 1, -1).code == 0
    assert sorted(file.name for file in out.iterdir()) == [
        ".drawn.json", "000000-1.png", "000001.png", "000002-1.png", "000003.png.png", "000123-cat.png", "mine.png",
    ]  # fmt: skip


def test_arrays_of_samples_lie_in_the_range(run: Path, command: Command, tmp_path: Path) -> None:
    assert command("sample", run, "--out", tmp_path / "s.npz", "--steps", 1).code == 0
    with np.load(tmp_path / "s.npz") as stored:
        assert np.abs(stored["images"]).max() == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e31])
def test_what_could_not_be_read_again_is_not_stored(value: float, tmp_path: Path) -> None:
    """Figures of a run that diverged: the others stay readable, and it is said."""
    acted = {"method": "policy", "steps": 1, "samples": 8, "seed": 0, "error": 1.0, "errors": [1.0]}
    for write, read, row, wrong in (
        (write_figures, read_figures, FIGURE, FIGURE | {"nfe": 2, "frechet": value}),
        (write_actions, read_actions, acted, acted | {"steps": 2, "errors": [value]}),
    ):
        with pytest.warns(FewstepWarning, match=rf"{row['method']} is not stored: .* is no measured number"):
            write([row, wrong], tmp_path)
        assert read(tmp_path) == [row]
