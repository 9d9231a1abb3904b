"""The commands of policies, on a task made for the test: demonstrations, training, rollout, film, report, bad input."""

from dataclasses import replace
from pathlib import Path

import pytest

from fewstep.data.demonstrations.episodes import load_demonstrations, save_demonstrations
from fewstep.policies.tasks.registry import TASKS
from tests.support.commands import SMALL, Command
from tests.support.pointtask import point_task

TRAIN = (
    *SMALL, "--training.batch-size", "64", "--training.images", "640", "--training.checkpoint-images", "640",
    "--optimizer.warmup-images", "64",
)  # fmt: skip
"""Ten steps: what a policy learns in them is not looked at."""


@pytest.fixture(autouse=True)
def _known_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "point", point_task().task)


@pytest.fixture
def demos(command: Command) -> str:
    assert command("demos", "point", "-n", 12, "--quiet").code == 0
    return "demos/point.safetensors"


def test_from_demonstrations_to_the_page(command: Command, demos: str, tmp_path: Path) -> None:
    trained = command("train", "policy-mlp", "--data.root", demos, *TRAIN)
    assert trained.code == 0, trained.err
    assert "fewstep rollout runs/policy-mlp" in trained.out
    rolled = command("rollout", "runs/policy-mlp", "--episodes", 6, "--expert", "--film", "--quiet")
    assert rolled.code == 0, rolled.err
    lines = rolled.out.splitlines()
    assert lines[0].split()[:2] == ["method", "steps"]
    assert [line.split()[:2] for line in lines if line.startswith("iSD")] == [["iSD", "1"], ["iSD", "2"]]
    assert any(line.startswith("expert") and "6/6" in line for line in lines)
    assert (tmp_path / "runs/policy-mlp/film.gif").is_file()
    assert command("report", "runs/policy-mlp").code == 0
    page = (tmp_path / "runs/policy-mlp/report.html").read_text()
    assert "Success in the task" in page
    assert "one episode" in page
    assert "Wilson" in page


@pytest.mark.parametrize("name", ["policy-regression", "policy-flow-matching"])
def test_the_baselines_run_too(command: Command, demos: str, name: str) -> None:
    assert command("train", name, "--data.root", demos, *TRAIN).code == 0
    rolled = command("rollout", f"runs/{name}", "--episodes", 2, "--steps", 1, "--quiet")
    assert rolled.code == 0, rolled.err
    refused = command("rollout", f"runs/{name}", "--episodes", 2, "--steps", 0, "--quiet")
    assert (refused.code, refused.err.count("\n")) == (2, 1)


def test_nothing_recorded_is_overwritten(command: Command, demos: str, tmp_path: Path) -> None:
    before = (tmp_path / demos).read_bytes()
    refused = command("demos", "point", "-n", 2)
    assert refused.code == 2
    assert "demos/point.safetensors exists" in refused.err
    assert (tmp_path / demos).read_bytes() == before


def test_the_same_command_records_the_same(command: Command, demos: str, tmp_path: Path) -> None:
    assert command("demos", "point", "-n", 12, "--quiet", "--out", "again.safetensors").code == 0
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / demos).read_bytes()


def test_a_policy_is_no_source_of_images(command: Command, demos: str) -> None:
    assert command("train", "policy-mlp", "--data.root", demos, *TRAIN).code == 0
    for words in (("sample", "runs/policy-mlp"), ("tune-steps", "runs/policy-mlp")):
        refused = command(*words)
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert "fewstep evaluate" in refused.err
    refused = command("compare", "runs/policy-mlp", "runs/policy-mlp")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "fewstep rollout runs/policy-mlp" in refused.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("demos",), "needs a task"),
        (("demos", "pont"), "did you mean point?"),
        (("demos", "point", "-n", 0), "0 demonstrations"),
        (("demos", "point", "--out", "file.csv"), "FILE.safetensors or FILE.npz"),
        (("demos", "point", "--first-seed", 100_000), "kept for rollouts"),
        (("demos", "own", "--from-robomimic", "none.hdf5"), "none.hdf5"),
        (("demos", "own", "--from-robomimic", "a", "--from-minari", "b"), "one at a time"),
        (("demos", "own", "--from-robomimic", "a", "--count", 100), "--count and --first-seed are for recording"),
        (("demos", "own", "--from-minari", "a", "--first-seed", 0), "--count and --first-seed are for recording"),
        (("demos", "point", "--split", "train"), "choose from an imported file"),
        (("demos", "own", "--from-minari", "a", "--split", "train"), "a Minari data set has none"),
        (("rollout", "runs/none", "--threads", 0), "0 threads"),
        (("train", "policy-mlp", "--data.root", "none.safetensors"), "none.safetensors: no such file"),
        (("train", "policy-mlp"), "fewstep demos TASK"),
        (("rollout", "runs/none"), "runs/none: no such folder"),
    ],
)
def test_bad_input_gets_one_line(command: Command, words: tuple[object, ...], said: str) -> None:
    refused = command(*words)
    assert refused.code == 2
    assert said in refused.err
    assert refused.err.count("\n") == 1


def test_a_split_of_an_imported_file(command: Command, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "own.hdf5", "w") as file:
        for number, steps in enumerate((4, 6, 5)):
            for name in ("obs/object", "actions"):
                file[f"data/demo_{number}/{name}"] = [[float(step)] * 2 for step in range(steps)]
        file["mask/train"] = [b"demo_0", b"demo_2"]
    words = ("demos", "own", "--from-robomimic", "own.hdf5", "--keys", "object")
    assert "2 episodes, 9 steps" in command(*words, "--split", "train").out
    assert "3 episodes, 15 steps" in command(*words, "--out", "all.safetensors").out
    refused = command(*words, "--split", "valid", "--out", "more.safetensors")
    assert refused.code == 2
    assert "has no 'valid'; there are: train" in refused.err
    assert not (tmp_path / "more.safetensors").exists()


def test_settings_that_do_not_fit_are_refused(command: Command, demos: str) -> None:
    for words, said in (
        (("--data.chunks.horizon", 4), "no more actions than the horizon"),
        (("--training.flip",), "chunks of actions have no mirror images"),
        (("--data.image-size", 32), "image_size"),
        (("--network.embedding-width", 0), "embedding width 0"),
        (("--evaluation.curve-images", 640), "no features measure"),
    ):
        refused = command("train", "policy-mlp", "--data.root", demos, *TRAIN, *words)
        assert refused.code == 2
        assert said in refused.err


def test_a_policy_of_an_unknown_task_asks_for_its_file(command: Command, demos: str) -> None:
    save_demonstrations(replace(load_demonstrations(demos), task="mine"), Path("demos/mine.safetensors"))
    assert command("train", "policy-mlp", "--data.root", "demos/mine.safetensors", *TRAIN).code == 0
    refused = command("rollout", "runs/policy-mlp", "--episodes", 1, "--quiet")
    assert refused.code == 2
    assert "the task 'mine', which is none of fewstep's: add --task FILE.py:NAME" in refused.err


def test_a_task_of_other_sizes_is_refused(command: Command, demos: str) -> None:
    assert command("train", "policy-mlp", "--data.root", demos, *TRAIN).code == 0
    refused = command("rollout", "runs/policy-mlp", "--task", "pointmaze-ring", "--quiet")
    assert refused.code == 2
    assert "it was trained for point" in refused.err
