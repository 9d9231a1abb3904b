"""Checkpoints and logs whose content is not what it should be: one error that names the file, nothing overwritten."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.data.base import Dataset
from fewstep.training import RunFolder, train_run
from fewstep.training.checkpoint import read_state
from fewstep.utils.errors import CheckpointError
from tests.support.tiny import KINDS, RUNTIME, TINY, snapshot

BINARY = bytes(range(256)) * 2


@pytest.fixture(params=["adamw", "muon"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def unfinished(root: Path, finished: Path) -> RunFolder:
    """A copy of a run without its last checkpoint, so that there is something left to train."""
    shutil.copytree(finished, root)
    shutil.rmtree(RunFolder(root).last_checkpoint())
    return RunFolder(root)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("other file", r"0\.0\.\w+: \[.*\] -> absent"),
        ("foreign name", r"foo: absent -> \[\]"),
        ("no steps", r"\.step: \[\] -> absent"),
        ("another key", r"0\.0\.other: absent -> \[\]"),
        ("scalar", r"0\.0\.exp_avg: \[.*\] -> \[\]"),
        ("another optimizer", r"7\.0\.step: absent -> \[\]"),
        ("a parameter more", r"0\.999\.exp_avg: absent -> \[\]"),
    ],
)
def test_an_optimizer_state_that_is_none_is_named(
    damage: str,
    message: str,
    kind: str,
    digits: Dataset,
    unbroken: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    run = unfinished(tmp_path / "run", unbroken(kind))
    file = run.last_checkpoint() / "optimizer.safetensors"
    state, one = load_file(file), torch.ones(())
    broken = {
        "other file": load_file(file.with_name("weights.safetensors")),
        "foreign name": state | {"foo": one},
        "no steps": {key: value for key, value in state.items() if not key.endswith(".step")},
        "another key": state | {"0.0.other": one},
        "scalar": {key: one if value.ndim else value for key, value in state.items()},
        "another optimizer": state | {"7.0.step": one},
        "a parameter more": state | {f"0.999.{key}": one for key in ("step", "exp_avg", "exp_avg_sq")},
    }
    save_file({key: value.clone() for key, value in broken[damage].items()}, file)
    before = snapshot(run.root)
    with pytest.raises(
        CheckpointError,
        match=rf"optimizer\.safetensors is of another architecture or optimizer: .*{message}.*; train it anew$",
    ):
        train_run(KINDS[kind], digits, run, RUNTIME)
    assert {key: value for key, value in snapshot(run.root).items() if key != ".lock"} == {
        key: value for key, value in before.items() if key != ".lock"
    }


@pytest.mark.parametrize("line", ["null", "{}", '{"step": "a"}', '{"step": 0}', "5", "nonsense", "[" * 100_000])
def test_a_damaged_log_line_is_named_and_nothing_dropped(
    line: str, digits: Dataset, unbroken: Callable[[str], Path], tmp_path: Path
) -> None:
    run = unfinished(tmp_path / "run", unbroken("adamw"))
    log = run.log_file.read_text().splitlines(keepends=True)
    damaged = "".join([*log[:2], line + "\n", *log[2:]])
    run.log_file.write_text(damaged)
    with pytest.raises(CheckpointError, match=r"log\.jsonl, line 3 is damaged .*: delete that line"):
        train_run(TINY, digits, run, RUNTIME)
    assert run.log_file.read_text() == damaged
    run.log_file.write_text("".join(log) + line)  # without its end it is torn, as a kill leaves it
    assert len(run.read_log()) == len(log)


def test_a_log_that_is_no_text_is_named(digits: Dataset, unbroken: Callable[[str], Path], tmp_path: Path) -> None:
    run = unfinished(tmp_path / "run", unbroken("adamw"))
    run.log_file.write_bytes(BINARY)
    with pytest.raises(CheckpointError, match=r"log\.jsonl, line 1 is damaged"):
        train_run(TINY, digits, run, RUNTIME)
    assert run.log_file.read_bytes() == BINARY


@pytest.mark.parametrize(
    "content",
    [
        b'{"step": Infinity, "images": 1, "seconds": 1}',
        b'{"step": NaN, "images": 1, "seconds": 1}',
        b'{"step": 1, "images": 1, "seconds": 1' + b"0" * 400 + b"}",
        b"[1]",
        b"{}",
        b"[" * 100_000,
        BINARY,
    ],
)
def test_a_damaged_state_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state\.json is damaged \(.+\): its checkpoint cannot be used"):
        read_state(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps({"step": 3, "images": 96, "seconds": 0.5}))
    older = {"pending": False, "derivative": "", "digests": {}}  # which an older fewstep did not write
    assert read_state(tmp_path) == {"step": 3, "images": 96, "seconds": 0.5} | older
