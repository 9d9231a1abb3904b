"""Teachers: found and checked, where students start from, the slow average beside them, and their exact resume."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fewstep
from fewstep.data.base import Dataset
from fewstep.data.sources import DataConfig, load_dataset
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.preconditioning.estimation import StatisticsEstimator
from fewstep.networks.condition import Condition
from fewstep.networks.mlp import MLPConfig
from fewstep.recipes.config import RunConfig
from fewstep.training import Callbacks, RunFolder, build, train_run
from fewstep.training.loop import Trainer
from fewstep.training.parallel import ProcessGroup
from fewstep.training.statistics import estimate_together
from fewstep.training.teacher import SlowAverage, load_teacher, teacher_of
from fewstep.utils.errors import CheckpointError, ConfigError, FewstepWarning
from tests.support.tiny import (
    RUNTIME,
    STUDENTS,
    TEACHER,
    TEACHERLESS,
    TINY,
    assert_same_run,
    killed_after,
    noise_and_times,
    snapshot,
    student,
)

PERTURBATION = 0.1


def perturbed(flow_map: FlowMap, seed: int) -> FlowMap:
    """The flow map with noise on every weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in flow_map.parameters():
            parameter.add_(PERTURBATION * torch.randn(parameter.shape, generator=generator))
    return flow_map


@pytest.mark.parametrize(
    "config", [STUDENTS["ctm"], STUDENTS["cd"], replace(TINY, initial="teacher")], ids=["ctm", "cd", "initial"]
)
def test_a_teacher_that_is_not_named_is_asked_for(config: RunConfig, digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="distils a teacher: name its run with --teacher RUN"):
        train_run(config, digits, RunFolder(tmp_path / "run"), RUNTIME)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("role", ["teacher", "initial"])
def test_a_model_that_is_not_there_is_named(role: str, digits: Dataset, tmp_path: Path) -> None:
    config = replace(TINY, teacher="nowhere") if role == "teacher" else replace(TINY, initial="nowhere")
    with pytest.raises(
        CheckpointError, match=f"nowhere: no such folder; train it first, or name another with --{role}"
    ):
        train_run(config, digits, RunFolder(tmp_path / "run"), RUNTIME)
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_a_name_in_it_is_asked_for_one(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("")
    with pytest.raises(ConfigError, match=r"mine\.py is a file: name its class or function too, .*mine\.py:NAME$"):
        load_teacher(file)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataConfig(labels=False), r"in 10 classes, but the data digits has shape \(1, 8, 8\) and 0 classes"),
        (
            DataConfig(source="random", random_shape=(1, 4, 4), random_classes=10, random_count=8),
            r"samples of shape \(1, 8, 8\) .* random has shape \(1, 4, 4\)",
        ),
    ],
    ids=["classes", "shape"],
)
def test_a_teacher_made_for_other_data_is_refused(data: DataConfig, message: str, teacher: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        teacher_of(student("ctm", teacher), load_dataset(data))


def test_a_teacher_is_loaded_without_gradients_and_no_one_else_is(teacher: Path, digits: Dataset) -> None:
    loaded = teacher_of(student("ctm", teacher), digits)
    assert loaded is not None
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert teacher_of(TINY, digits) is None


def test_a_saved_map_is_a_teacher(
    teacher: Path, digits: Dataset, unbroken_student: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its student is the run's student, and it keeps the statistics as a run does."""
    fewstep.load(teacher).save_pretrained(tmp_path / "model")
    train_run(student("ctm-analytic", tmp_path / "model"), digits, RunFolder(tmp_path / "run"), RUNTIME)
    assert_same_run(tmp_path / "run", unbroken_student("ctm-analytic"))
    kept = [[file.name for file in (root / "statistics").iterdir()] for root in (teacher, tmp_path / "model")]
    assert len(kept[1]) == 1
    assert kept[0] == kept[1]


def test_the_diagonal_leaves_the_branch_of_s_as_it_began(teacher: Path, digits: Dataset) -> None:
    """Its output layer is still zero, and all other parameters have moved."""
    first = dict(build(TEACHER, digits).flow_map.network.named_parameters())
    folder = RunFolder(teacher).last_checkpoint()
    for file in ("weights", "model"):
        trained = load_file(folder / f"{file}.safetensors")
        same = {key for key, value in first.items() if torch.equal(value, trained[key])}
        assert same == {key for key in first if key.startswith("embedding.s_branch.")}
        assert not bool(trained["embedding.s_branch.last.weight"].any())
        assert not bool(trained["embedding.s_branch.last.bias"].any())


@pytest.mark.parametrize("kind", ["ctm", "ctm-analytic", "ctm-refreshed", "cd"])
def test_students_start_as_their_teacher(kind: str, teacher: Path, digits: Dataset, tmp_path: Path) -> None:
    """N(x, t, s) = D_teacher(x, t) for every s, of the student and of its slow average."""
    trainer = Trainer(student(kind, teacher), digits, RunFolder(tmp_path / "run"), RUNTIME, Callbacks())
    master = fewstep.load(teacher).flow_map
    weights = trainer.learner.flow_map.network.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in master.network.state_dict().items())
    x, t, s = noise_and_times(master)
    cond = Condition(torch.arange(len(x)))
    assert trainer.learner.target is not None
    with torch.no_grad():
        denoised = master.denoise(x, t, cond)
        assert float(denoised.std()) > 0.01
        for flow_map in (trainer.learner.flow_map, trainer.learner.target.flow_map):
            for later in (t, s, torch.full_like(t, master.path.t_min)):
                found = flow_map.output(x, t, later, cond)
                assert torch.allclose(found, denoised, rtol=1e-4, atol=1e-4)
    assert next(iter(trainer.learner.flow_map.parameters())).requires_grad


def test_the_branch_of_s_is_trained_in_the_student(unbroken_student: Callable[[str], Path]) -> None:
    trained = load_file(RunFolder(unbroken_student("ctm")).last_checkpoint() / "weights.safetensors")
    assert bool(trained["embedding.s_branch.last.weight"].any())


def test_a_run_starts_from_another_run(teacher: Path, digits: Dataset) -> None:
    config = replace(TINY, initial=str(teacher))
    weights = build(config, digits).flow_map.network.state_dict()
    assert all(
        torch.equal(value, weights[key]) for key, value in fewstep.load(teacher).flow_map.network.state_dict().items()
    )
    fresh = build(TINY, digits).flow_map.network.state_dict()
    assert any(not torch.equal(value, weights[key]) for key, value in fresh.items())


@pytest.mark.parametrize("initial", ["teacher", "path"])
def test_a_model_of_another_architecture_is_refused(
    initial: str, teacher: Path, digits: Dataset, tmp_path: Path
) -> None:
    config = replace(student("ctm", teacher), network=MLPConfig(width=24, depth=1, embedding_width=16))
    config = config if initial == "teacher" else replace(config, initial=str(teacher))
    with pytest.raises(CheckpointError, match=r"is of another architecture: .*\[24.*network of the model") as caught:
        train_run(config, digits, RunFolder(tmp_path / "run"), RUNTIME)
    assert "\n" not in str(caught.value)
    assert str(teacher) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_student_of_another_size_starts_afresh(teacher: Path, digits: Dataset) -> None:
    config = replace(student("ctm", teacher), network=MLPConfig(width=24, depth=1, embedding_width=16), initial="")
    assert build(config, digits, fewstep.load(teacher).flow_map).flow_map.network.last_layer.shape == (64, 24)


def test_the_slow_average_decays_from_the_first_step(digits: Dataset) -> None:
    """By the same share at every step, in the module itself."""
    flow_map = perturbed(build(TEACHER, digits).flow_map.requires_grad_(True), 0)
    slow = SlowAverage(flow_map, 0.75)
    expected = {key: value.double() for key, value in flow_map.network.state_dict().items()}
    for step in range(1, 5):
        perturbed(flow_map, step)
        slow.ema.update(flow_map.network, step)
        for key, value in flow_map.network.state_dict().items():
            expected[key] = 0.75 * expected[key] + 0.25 * value.double()
    found = slow.flow_map.network.state_dict()
    assert all(torch.allclose(found[key].double(), value, atol=1e-6) for key, value in expected.items())
    assert any(not torch.equal(found[key], value) for key, value in flow_map.network.state_dict().items())
    by_hand = copy.deepcopy(flow_map)
    by_hand.network.load_state_dict({key: value.float() for key, value in expected.items()})
    with torch.no_grad():
        point = noise_and_times(flow_map)
        assert torch.allclose(slow.flow_map.jump(*point), by_hand.jump(*point), atol=1e-4)


def test_the_slow_average_takes_no_gradient_and_passes_it_on(digits: Dataset) -> None:
    slow = SlowAverage(perturbed(build(TEACHER, digits).flow_map, 0), 0.9)
    x, t, s = noise_and_times(slow.flow_map)
    slow.flow_map.jump(x.requires_grad_(), t, s).square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.any())
    assert all(not p.requires_grad and p.grad is None for p in slow.flow_map.parameters())
    assert not slow.flow_map.training


def test_the_slow_average_is_kept_up_stored_and_restored(teacher: Path, digits: Dataset, tmp_path: Path) -> None:
    config = student("ctm", teacher)
    trainer = Trainer(config, digits, RunFolder(tmp_path), RUNTIME, Callbacks())
    average = {key: value.double() for key, value in trainer.learner.flow_map.network.state_dict().items()}
    for _ in range(4):
        trainer.take_step()
        for key, value in trainer.learner.flow_map.network.state_dict().items():
            average[key] = 0.9 * average[key] + 0.1 * value.double()
    trainer.save()
    trainer.release()
    stored = load_file(RunFolder(tmp_path).last_checkpoint() / "ema-target-0.9.safetensors")
    assert all(torch.allclose(stored[key].double(), value, atol=1e-6) for key, value in average.items())
    again = Trainer(config, digits, RunFolder(tmp_path), RUNTIME, Callbacks())
    assert again.learner.target is not None
    restored = again.learner.target.flow_map.network.state_dict()
    assert all(torch.equal(restored[key], value) for key, value in stored.items())
    assert again.companions().ema_target is again.learner.target.flow_map


def test_training_leaves_the_teacher_alone(
    teacher: Path, digits: Dataset, unbroken_student: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(teacher, tmp_path / "teacher", ignore=shutil.ignore_patterns("statistics"))
    before = snapshot(tmp_path / "teacher")
    trainer = Trainer(student("ctm", tmp_path / "teacher"), digits, RunFolder(tmp_path / "run"), RUNTIME, Callbacks())
    trainer.run_to_end()
    assert snapshot(tmp_path / "teacher") == before
    assert trainer.teacher is not None
    weights = fewstep.load(teacher).flow_map.network.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in trainer.teacher.network.state_dict().items())


@pytest.mark.parametrize("kind", [*STUDENTS, *TEACHERLESS])
def test_a_stopped_student_goes_on_exactly(
    kind: str,
    digits: Dataset,
    teacher: Path,
    unbroken_student: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed a step after checkpoint 3 and two after checkpoint 6: statistics are newer, a discriminator has begun."""
    config = student(kind, teacher)
    for steps in (4, 5):
        killed_after(steps, config, digits, tmp_path / "run", monkeypatch)
        torch.manual_seed(99)  # what else the process draws must not matter
    train_run(config, digits, RunFolder(tmp_path / "run"), RUNTIME)
    assert_same_run(tmp_path / "run", unbroken_student(kind))
    first, second = (fewstep.load(root).flow_map.config for root in (tmp_path / "run", unbroken_student(kind)))
    assert first == second


@pytest.mark.parametrize("kind", ["ctm-refreshed", "isd-linear"])
def test_statistics_are_refreshed_from_the_averaged_model(
    kind: str, teacher: Path, digits: Dataset, tmp_path: Path
) -> None:
    """When due and at no other step; the student, its slow average and its checkpoint take them over."""
    config = student(kind, teacher)
    trainer = Trainer(config, digits, RunFolder(tmp_path), RUNTIME, Callbacks())
    changed = []
    for _ in range(8):
        before = trainer.learner.statistics
        trainer.take_step()
        changed.append(trainer.learner.statistics != before)
    assert changed == [False, False, False, True] * 2
    maps = (
        [trainer.learner.flow_map]
        if trainer.learner.target is None
        else [trainer.learner.flow_map, trainer.learner.target.flow_map]
    )
    assert all(flow_map.preconditioning.statistics is trainer.learner.statistics for flow_map in maps)  # type: ignore[attr-defined]
    raw = {key: value.clone() for key, value in trainer.learner.flow_map.network.state_dict().items()}
    trainer.save()
    loaded = fewstep.load(tmp_path).flow_map
    assert loaded.preconditioning.statistics == trainer.learner.statistics  # type: ignore[attr-defined]
    assert estimate_together(loaded, digits, config.statistics, ProcessGroup()) == trainer.learner.statistics
    weights = loaded.network.state_dict()
    assert any(not torch.equal(value, weights[key]) for key, value in raw.items())


def test_statistics_that_no_jump_can_be_made_of_are_not_taken_over(
    teacher: Path, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(student("ctm-refreshed", teacher), digits, RunFolder(tmp_path), RUNTIME, Callbacks())
    before, kept = trainer.learner.statistics, trainer.learner.flow_map.preconditioning
    assert before is not None
    wild = replace(before, s=torch.full_like(before.s, -800.0))
    monkeypatch.setattr("fewstep.training.learner.prepared", lambda *_: wild)
    for _ in range(3):
        trainer.take_step()
    with pytest.warns(FewstepWarning, match="statistics not refreshed after 4 steps: the statistics give the jump"):
        trainer.take_step()
    assert trainer.learner.statistics is before
    assert trainer.learner.flow_map.preconditioning is kept
    trainer.take_step()


def moved_run(
    kind: str, teacher: Path, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[RunFolder, Path]:
    """A run stopped after six steps, and a copy of its teacher elsewhere."""
    run = RunFolder(tmp_path / "run")
    killed_after(6, student(kind, teacher), digits, run.root, monkeypatch)
    shutil.copytree(teacher, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("statistics"))
    return run, tmp_path / "elsewhere"


def test_a_teacher_may_move(
    teacher: Path,
    digits: Dataset,
    unbroken_student: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, elsewhere = moved_run("ctm-analytic", teacher, digits, tmp_path, monkeypatch)
    train_run(student("ctm-analytic", elsewhere), digits, run, RUNTIME)
    assert_same_run(run.root, unbroken_student("ctm-analytic"))


def test_a_teacher_may_be_read_alone(
    teacher: Path,
    digits: Dataset,
    unbroken_student: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its statistics are estimated then, and not kept."""
    run, elsewhere = moved_run("ctm-analytic", teacher, digits, tmp_path, monkeypatch)
    monkeypatch.setattr("os.access", lambda *args: False)
    train_run(student("ctm-analytic", elsewhere), digits, run, RUNTIME)
    assert_same_run(run.root, unbroken_student("ctm-analytic"))
    assert not (elsewhere / "statistics").exists()


def test_another_teacher_is_refused(
    teacher: Path, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight differs: it is refused before any statistics are estimated."""
    run, elsewhere = moved_run("ctm-analytic", teacher, digits, tmp_path, monkeypatch)
    file = RunFolder(elsewhere).last_checkpoint() / "model.safetensors"
    weights: dict[str, Tensor] = load_file(file)
    weights["output.bias"][0] += 1e-3
    save_file(weights, file)
    state = {"step": 10, "images": 320, "seconds": 1.0}  # without digests, as of an older fewstep
    file.with_name("state.json").write_text(json.dumps(state))
    before = snapshot(run.root)
    monkeypatch.setattr(StatisticsEstimator, "update", lambda *args: pytest.fail("statistics of a run to be refused"))
    with pytest.raises(CheckpointError, match=r"other settings \(teacher: '\w{16}' -> '\w{16}'\)"):
        train_run(student("ctm-analytic", elsewhere), digits, run, RUNTIME)
    assert snapshot(run.root) == before


def test_a_run_without_statistics_is_not_taken_for_one_with(digits: Dataset, unbroken: Callable[[str], Path]) -> None:
    """The difference is named, not what its checkpoint lacks."""
    with pytest.raises(
        CheckpointError,
        match=r"model\.preconditioning\.type: 'LinearPreconditioningConfig' -> 'AnalyticPreconditioningConfig'",
    ):
        train_run(TEACHERLESS["isd-linear"], digits, RunFolder(unbroken("adamw")), RUNTIME)
