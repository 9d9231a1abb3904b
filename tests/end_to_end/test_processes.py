"""Real processes: killed ones go on exactly, two of them equal one, and none waits for ever."""

import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.data.demonstrations.episodes import Demonstrations, save_demonstrations
from fewstep.evaluation.actions import read_actions
from fewstep.evaluation.figures import read_figures
from fewstep.flow.preconditioning.statistics import TrajectoryStatistics
from fewstep.policies.figures import read_rollouts
from fewstep.training import RunFolder
from fewstep.training.checkpoint import is_sound
from tests.support.commands import SMALL, Command, Finished
from tests.support.processes import Forked, Forking


def stored(run: Path) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint: raw weights, averages, optimiser state."""
    files = sorted(RunFolder(run).last_checkpoint().glob("*.safetensors"))
    return {f"{file.stem}/{key}": value for file in files for key, value in load_file(file).items()}


def stop_when(reached: Callable[[], bool], forked: Forking, words: list[str], number: int = signal.SIGKILL) -> Finished:
    """Start `fewstep` as its own process and send a signal once `reached`; what it left."""
    process = forked.start("-m", "fewstep", *words)
    deadline = time.monotonic() + 120
    try:
        while not reached():
            assert time.monotonic() < deadline
            time.sleep(0.01)  # a look takes a millisecond, and a checkpoint is written for several times as long
        os.kill(process.number, number)
    except BaseException:
        process.kill()
        raise
    finally:
        ended = process.wait()
    return ended


def test_a_run_stopped_six_times_ends_as_an_unbroken_one(command: Command, forked: Forking, tmp_path: Path) -> None:
    """Killed three times at random moments and twice while a checkpoint is written; asked to end once."""
    words = [
        "train", "digits", *SMALL, "--training.batch-size", "32", "--training.images", "6400",
        "--training.checkpoint-images", "160", "--training.log-images", "320", "--training.sample-images", "1600",
        "--training.ema-power", "0.1", "0.05", "--training.ema-decay", "0.9",
        "--objective.derivative.kind", "finite-difference",
    ]  # fmt: skip
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    here, on = [*words, "--out", str(run)], ["train", "--resume", str(run), *SMALL[6:]]

    def logged(step: int) -> bool:
        return any(record["step"] >= step for record in RunFolder(run).read_log())

    def writing(step: int) -> bool:
        return any(run.glob("checkpoints/.step-*")) and logged(step)

    moments = [partial(logged, step) for step in sorted(random.Random(0).sample(range(10, 70), 3))]
    for reached in (*moments, partial(writing, 80), partial(writing, 100)):
        ended = stop_when(reached, forked, here)
        assert ended.code == -signal.SIGKILL, "the run ended before it could be killed"
    ended = stop_when(partial(logged, RunFolder(run).read_log()[-1]["step"] + 10), forked, on, signal.SIGTERM)
    assert ended.code == 128 + signal.SIGTERM
    step = int(RunFolder(run).last_checkpoint().name[5:])
    assert f"step {step} is saved: fewstep train --resume {run} goes on" in ended.err
    assert command(*on).code == 0
    assert command(*words, "--out", unbroken).code == 0
    broken, whole = stored(run), stored(unbroken)
    assert broken.keys() == whole.keys()
    assert {key.split("/")[0] for key in whole} == {
        "model", "ema-power-0.05", "ema-constant-0.9", "weights", "optimizer",
    }  # fmt: skip
    assert [key for key in whole if not torch.equal(whole[key], broken[key])] == []
    assert [record["step"] for record in RunFolder(run).read_log()] == list(range(10, 201, 10))
    grids = [{file.name: file.read_bytes() for file in RunFolder(each).samples.iterdir()} for each in (run, unbroken)]
    assert grids[0] == grids[1]
    assert len(grids[0]) == 4
    assert [path.name for path in run.rglob(".*")] == [".lock"]


def children(number: int) -> list[Path]:
    """Processes of a process, by their folders in /proc."""
    found = [(file.parent, file.read_text()) for file in Path("/proc").glob("[0-9]*/stat") if file.is_file()]
    return [folder for folder, stat in found if int(stat.rpartition(")")[2].split()[1]) == number]


def test_a_run_with_workers_killed_twice_ends_as_one_without(command: Command, forked: Forking, tmp_path: Path) -> None:
    """And no process that read its data is left behind."""
    words = [
        "train", "digits", *SMALL, "--training.batch-size", "32", "--training.images", "1920",
        "--training.checkpoint-images", "160", "--training.log-images", "160", "--training.sample-images", "0",
    ]  # fmt: skip
    run, plain, left = tmp_path / "run", tmp_path / "plain", []

    def logged(step: int) -> bool:
        if not any(record["step"] >= step for record in RunFolder(run).read_log()):
            return False
        (training,) = [each for each in children(forked.server.pid) if len(children(int(each.name))) == 2]
        left.extend(children(int(training.name)))
        return True

    for step in (10, 25):
        ended = stop_when(partial(logged, step), forked, [*words, "--out", str(run), "--runtime.workers", "2"])
        assert ended.code == -signal.SIGKILL, "the run ended before it could be killed"
    deadline = time.monotonic() + 30
    while (alive := [each for each in left if each.exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(left) == 4
    assert alive == []
    assert command(*words, "--out", run, "--runtime.workers", "1").code == 0
    assert command(*words, "--out", plain).code == 0
    broken, whole = stored(run), stored(plain)
    assert broken.keys() == whole.keys()
    assert [key for key in whole if not torch.equal(whole[key], broken[key])] == []


def test_what_five_processes_measure_at_once_is_all_kept(forked: Forking, tmp_path: Path) -> None:
    """Each reads, changes and writes the files of one run's figures, again and again."""
    script, run, times = Path(__file__).with_name("one_of_five.py"), tmp_path / "run", 4
    ended = [each.wait() for each in [forked.start(script, run, number, times) for number in range(5)]]
    assert [each.code for each in ended] == [0] * 5, "".join(each.err for each in ended)
    expected = {(f"process {number}", count) for number in range(5) for count in range(1, times + 1)}
    rows = {"figures": read_figures(run), "actions": read_actions(run), "rollouts": read_rollouts(run)}
    counts = {"figures": "nfe", "actions": "steps", "rollouts": "steps"}
    for name, found in rows.items():
        assert {(row["method"], row[counts[name]]) for row in found} == expected, name
        assert len(found) == len(expected)


def short_episodes() -> Demonstrations:
    """Twelve episodes of 3 to 14 steps: most chunks of 16 run beyond their episode's end."""
    ends = torch.arange(3, 15).cumsum(0)
    generator = torch.Generator().manual_seed(0)
    observations = torch.rand(int(ends[-1]), 3, generator=generator)
    return Demonstrations(observations, torch.rand(int(ends[-1]), 2, generator=generator), ends)


def statistics_of_200(run: Path) -> TrajectoryStatistics:
    """Those of 200 samples that are kept beside a run."""
    kept = [TrajectoryStatistics.load(file) for file in (run / "statistics").glob("[!s]*.json")]
    (found,) = (each for each in kept if each.samples == 200)
    return found


def assert_same_statistics(one: Path, two: Path) -> None:
    """As far as float32 goes."""
    first, second = statistics_of_200(one), statistics_of_200(two)
    for field in ("l", "s", "l_stderr", "s_stderr"):
        assert torch.allclose(getattr(first, field), getattr(second, field), rtol=1e-4, atol=1e-6)


def largest_difference(one: Path, two: Path) -> float:
    """Between the newest checkpoints' weights: raw, averaged, the discriminator's; not the optimisers' state."""
    first, second = stored(one), stored(two)
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first if "optimizer" not in key)


BATCH = ["--training.batch-size", "32", "--training.sample-images", "0", "--optimizer.warmup-images", "0"]
SCRATCH = [
    "train", "digits", *SMALL, *BATCH, "--training.images", "640", "--training.ema-decay", "0.9",
    "--objective.pairs.flow-matching-ratio", "0.5", "--objective.derivative.kind", "exact",
]  # fmt: skip
TEACHER = ["train", "edm-digits", *SMALL, *BATCH, "--training.images", "320", "--data.labels"]
STUDENT = [
    "train", "ctm-digits", *SMALL, *BATCH, "--training.images", "256", "--data.labels",
    "--objective.steps.points", "5", "--objective.gan", "0.5", "--gan.discriminator.width", "4",
    "--gan.start-images", "128", "--model.preconditioning.base", "analytic", "--model.preconditioning.levels", "8",
    "--statistics.points", "8", "--statistics.samples", "160",
    "--evaluation.curve-images", "0",
]  # fmt: skip
SHARED = ["--runtime.shard", "--training.checkpoint-images", "320", "--training.sample-images", "640"]
ESTIMATE = ["--points", "8", "--samples", "200"]


def pair_of(forked: Forking, *words: object) -> list[Forked]:
    """Two processes, which find in their environment what torchrun tells each of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": free.getsockname()[1]}
    places = [{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2} for rank in (0, 1)]
    return [forked.start(*words, **place, **each) for each in places]


def printed_by_two(forked: Forking, folder: Path, commands: list[list[str]]) -> str:
    """What two processes print that run commands together, and then what two_processes.py adds."""
    pair = pair_of(forked, Path(__file__).with_name("two_processes.py"), folder, json.dumps(commands))
    ended = [process.wait() for process in pair]
    assert [each.code for each in ended] == [0, 0], "".join(each.err for each in ended)
    return "".join(each.out for each in ended)


@pytest.mark.parametrize("killed", [0, 1])
def test_where_one_of_two_is_killed_the_other_ends_with_a_line(forked: Forking, tmp_path: Path, killed: int) -> None:
    """Within a minute, and what was saved is whole: one process goes on from it."""
    run = tmp_path / "run"
    endless = ["--training.images", "32000000", "--training.checkpoint-images", "320", "--training.log-images", "320"]
    pair = pair_of(forked, "-m", "fewstep", *SCRATCH, *endless, "--out", run)
    deadline = time.monotonic() + 120
    while len(RunFolder(run).checkpoints()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    pair[killed].kill()
    start = time.monotonic()
    left = pair[1 - killed].wait()
    assert time.monotonic() - start < 60
    assert pair[killed].wait().code == -signal.SIGKILL
    newest = RunFolder(run).last_checkpoint()
    assert left.code == 2
    assert left.err.splitlines()[-1] == (
        f"fewstep: process {killed} of 2 is lost; {newest} is saved: fewstep train --resume {run} goes on"
    )
    assert "Traceback" not in left.err
    assert is_sound(newest)
    step, on = RunFolder(run).state()["step"], ["train", "--resume", str(run), *SMALL[6:]]
    ended = stop_when(lambda: RunFolder(run).last_checkpoint() != newest, forked, on, signal.SIGTERM)
    assert ended.code == 128 + signal.SIGTERM
    assert RunFolder(run).state()["step"] > step


def test_what_the_first_of_two_refuses_is_no_lost_process(forked: Forking, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("of another kind")
    first, second = (each.wait() for each in pair_of(forked, "-m", "fewstep", *SCRATCH, "--out", tmp_path))
    assert (first.code, second.code) == (2, 2)
    assert first.err.splitlines()[-1] == (
        f"fewstep: {tmp_path} is not empty and holds no run: give another folder with --out"
    )
    assert second.err.splitlines()[-1] == "fewstep: process 0 of 2 has ended: its own message says why"


def test_two_processes_equal_one(command: Command, forked: Forking, tmp_path: Path) -> None:
    """Twenty steps of iSD with its exact derivative, and eight of CTM from a teacher, with all that it can have: its
    statistics, what its trajectories say, balanced losses, a discriminator; ten of a policy, whose padded steps are
    masked; a teacher's statistics, by their command. The first two also with all tensors shared out. Then, in the same
    pair, a NaN in one process and a time limit.
    """
    teacher, demonstrations = tmp_path / "teacher", tmp_path / "demos.safetensors"
    assert command(*TEACHER, "--out", teacher).code == 0
    for name in ("its-copy", "its-second-copy"):  # so that the pair does not read the statistics that one has kept
        shutil.copytree(teacher, tmp_path / name)
    save_demonstrations(short_episodes(), demonstrations)
    policy = ["train", "policy-mlp", "--data.root", str(demonstrations), *SMALL, *BATCH, "--training.images", "320"]
    copied = ["--teacher", str(tmp_path / "its-copy")]
    commands = [
        [*SCRATCH, "--out", str(tmp_path / "two")],
        [*policy, "--out", str(tmp_path / "policy-two")],
        [*STUDENT, *copied, "--out", str(tmp_path / "student-two")],
        ["statistics", str(tmp_path / "its-second-copy"), *ESTIMATE],
        [*SCRATCH, *SHARED, "--out", str(tmp_path / "shared")],
        [*STUDENT, *copied, "--runtime.shard", "--out", str(tmp_path / "student-shared")],
    ]
    printed = printed_by_two(forked, tmp_path, commands)
    assert printed.count("two: 640 images in 20 steps") == 1
    assert command(*SCRATCH, "--out", tmp_path / "one").code == 0
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-5
    assert len(RunFolder(tmp_path / "two").read_log()) == 1
    assert largest_difference(tmp_path / "one", tmp_path / "shared") < 1e-5
    assert len([*RunFolder(tmp_path / "shared").samples.iterdir()]) == 1
    assert command("train", "--resume", tmp_path / "shared", "--from", "10", *SMALL[6:]).code == 0
    assert largest_difference(tmp_path / "one", tmp_path / "shared") < 1e-5

    assert command(*STUDENT, "--teacher", teacher, "--out", tmp_path / "student-one").code == 0
    assert {"discriminator/discriminator.score.weight", "ema-target-0.99/output.weight"} <= stored(
        tmp_path / "student-one"
    ).keys()
    assert largest_difference(tmp_path / "student-one", tmp_path / "student-two") < 1e-5
    assert largest_difference(tmp_path / "student-one", tmp_path / "student-shared") < 1e-5
    kept = [
        sorted(file.name for file in (tmp_path / name / "statistics").iterdir()) for name in ("teacher", "its-copy")
    ]
    assert len(kept[0]) == 2
    assert kept[0] == kept[1]

    alone = command("statistics", teacher, *ESTIMATE)
    assert alone.code == 0
    assert_same_statistics(teacher, tmp_path / "its-second-copy")
    assert printed.count("8 noise levels, 200 samples each") == 1
    assert "% of training" in alone.out

    assert command(*policy, "--out", tmp_path / "policy-one").code == 0
    assert largest_difference(tmp_path / "policy-one", tmp_path / "policy-two") < 1e-5

    for rank in (0, 1):
        diverged = (tmp_path / f"diverged-{rank}.txt").read_text()
        assert "step 2: loss nan" in diverged
        assert (tmp_path / f"steps-{rank}.txt").read_text() == (tmp_path / "steps-0.txt").read_text()
