"""The critic beside a flow map: its hinge losses, its own gradients, when it begins, its state in checkpoints."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.data import Dataset
from fewstep.networks import CriticConfig
from fewstep.networks.condition import NULL_LABEL
from fewstep.objectives.gan import critic_loss, generator_loss
from fewstep.recipes.config import AdversaryConfig
from fewstep.training import Callbacks, RunFolder, train
from fewstep.training.gan import Adversary
from fewstep.training.loop import Trainer
from fewstep.utils.errors import CheckpointError, ConfigError, TrainingDivergedError
from tests.support.objectives import changed
from tests.support.tiny import CRITIC, RUNTIME, snapshot, student

BATCH = 12


def make_adversary(average: Callable[[Tensor], Tensor] = lambda value: value) -> Adversary:
    config = AdversaryConfig(critic=CriticConfig(width=4), lr=1e-2)
    return Adversary(config, (1, 8, 8), 3, 0, torch.device("cpu"), average)


def samples(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, 1, 8, 8, generator=generator), torch.arange(BATCH) % 3


def weights(adversary: Adversary) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in adversary.critic.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def test_hinge_losses_have_their_values() -> None:
    real, generated = torch.tensor([2.0, 1.0, 0.5, -1.0]), torch.tensor([-3.0, -1.0, 0.25, 2.0])
    assert critic_loss(lambda x, labels: x, real, generated, None).tolist() == [0, 0, 0.5 + 1.25, 2 + 3]
    assert generator_loss(lambda x, labels: x, generated, None).tolist() == [3, 1, -0.25, -2]


def test_labels_reach_the_critic_and_generated_samples_get_no_gradient_from_its_loss() -> None:
    seen: list[Tensor | None] = []

    def critic(x: Tensor, labels: Tensor | None) -> Tensor:
        seen.append(labels)
        return x

    labels, generated = torch.arange(2), torch.zeros(2, requires_grad=True)
    assert not critic_loss(critic, torch.zeros(2), generated, labels).requires_grad
    generator_loss(critic, generated, labels).sum().backward()
    assert generated.grad is not None
    assert generated.grad.tolist() == [-1, -1]
    assert all(each is labels for each in seen)


def test_the_critics_gradients_are_kept_apart_from_the_flow_maps() -> None:
    """What the flow map's backward pass leaves on the critic changes neither its gradients nor its step."""
    adversary, untouched = make_adversary(), make_adversary()
    (real, labels), (generated, _) = samples(0), samples(1)
    generator_loss(adversary.score, generated.requires_grad_(), labels).mean().backward()
    left = [parameter.grad for parameter in adversary.critic.parameters()]
    assert all(gradient is not None and bool(gradient.any()) for gradient in left[:-1])
    kept = copy.deepcopy(left)
    for each in (adversary, untouched):
        for _ in range(2):
            gradients: list[Tensor] = []
            each.learn(gradients, real, generated, labels)
            if each is adversary and kept:
                assert all(torch.equal(a, p.grad) for a, p in zip(kept, each.critic.parameters(), strict=True))
                kept = []
            each.step(each.averaged(gradients, 1))
    assert same(weights(adversary), weights(untouched))
    assert all(parameter.grad is None for parameter in adversary.critic.parameters())


def test_parts_and_processes_add_up_to_the_batch() -> None:
    calls: list[Tensor] = []

    def doubled(value: Tensor) -> Tensor:
        calls.append(value)
        return 2 * value

    adversary = make_adversary(doubled)
    (real, labels), (generated, _) = samples(0), samples(1)
    whole: list[Tensor] = []
    loss = adversary.learn(whole, real, generated, labels)
    assert loss.shape == (BATCH,)
    assert not loss.requires_grad
    parts: list[Tensor] = []
    for rows in torch.arange(BATCH).split(4):
        adversary.learn(parts, real[rows], generated[rows], labels[rows])
    averaged = adversary.averaged(parts, 3)
    assert all(torch.allclose(a, 2 * b, atol=1e-6) for a, b in zip(averaged, whole, strict=True))
    assert len(calls) == len(whole)


def test_the_critic_learns_to_tell_two_kinds_apart() -> None:
    adversary = make_adversary()
    first = math.nan
    for step in range(30):
        (real, labels), (generated, _) = samples(2 * step), samples(2 * step + 1)
        gradients: list[Tensor] = []
        loss = float(adversary.learn(gradients, real, 2 * generated, labels).mean())
        first = loss if step == 0 else first
        adversary.step(adversary.averaged(gradients, 1))
    assert 1.5 < first < 2.5
    assert loss < 0.5 * first


def test_its_state_comes_back_exactly_and_its_seed_is_the_runs() -> None:
    adversary, other = make_adversary(), make_adversary()
    assert same(weights(adversary), weights(other))
    (real, labels), (generated, _) = samples(0), samples(1)

    def learn(each: Adversary) -> None:
        gradients: list[Tensor] = []
        each.learn(gradients, real, generated, labels)
        each.step(each.averaged(gradients, 1))

    learn(adversary)
    other.load({key: value.clone() for key, value in adversary.tensors().items()}, "here")
    for each in (adversary, other):
        learn(each)
    assert same(adversary.tensors(), other.tensors())
    lost = {key: value for key, value in adversary.tensors().items() if not key.startswith("optimizer.0.")}
    with pytest.raises(CheckpointError, match=r"here: optimizer state for .* does not fit"):
        other.load(lost, "here")
    whole, one = adversary.tensors(), torch.ones(())
    for foreign in ({"foo": one}, {"optimizer.foo": one}, {"optimizer.x.step": one}):
        with pytest.raises(CheckpointError, match=r"here is no critic's state: it holds '"):
            other.load(whole | foreign, "here")
    with pytest.raises(CheckpointError, match=r"here: the state of parameter \d+ has exp_avg, exp_avg_sq, not"):
        other.load({key: value for key, value in whole.items() if not key.endswith(".step")}, "here")
    wider = Adversary(replace(CRITIC, critic=CriticConfig(width=8)), (1, 8, 8), 3, 0, torch.device("cpu"), lambda x: x)
    with pytest.raises(CheckpointError, match="here is of another architecture"):
        wider.load(adversary.tensors(), "here")


def test_the_critic_begins_when_it_is_due(teacher: Path, digits: Dataset, tmp_path: Path) -> None:
    """start_images = 128: after four steps. Until then the flow map's loss does not see it, and it does not learn."""
    config = student("ctm-adversarial", teacher)
    never = replace(config, adversary=replace(CRITIC, start_images=10**9))
    trainers = [
        Trainer(each, digits, RunFolder(tmp_path / str(i)), RUNTIME, Callbacks())
        for i, each in enumerate((config, never))
    ]
    assert all(trainer.adversary is not None for trainer in trainers)
    first = weights(trainers[0].adversary)  # type: ignore[arg-type]
    alike, learned, heard = [], [], []
    for _ in range(6):
        for trainer in trainers:
            trainer.take_step()
        states = [trainer.flow_map.network.state_dict() for trainer in trainers]
        alike.append(same(*states))
        learned.append(not same(first, weights(trainers[0].adversary)))  # type: ignore[arg-type]
        heard.append({"adversarial", "critic"} & trainers[0].window.terms.keys())
    assert alike == [True] * 4 + [False] * 2
    assert learned == [False] * 4 + [True] * 2
    assert heard == [set()] * 4 + [{"adversarial", "critic"}] * 2
    assert same(first, weights(trainers[1].adversary))  # type: ignore[arg-type]


def test_both_sides_see_the_labels_that_the_flow_map_saw(teacher: Path, digits: Dataset, tmp_path: Path) -> None:
    """Where a label was dropped, real and generated samples alike are judged without one."""
    config = student("ctm-adversarial", teacher)
    config = replace(
        config, objective=changed(config.objective, label_dropout=0.5), adversary=replace(CRITIC, start_images=0)
    )
    trainer = Trainer(config, digits, RunFolder(tmp_path), RUNTIME, Callbacks())
    assert trainer.adversary is not None
    score, seen = trainer.adversary.score, []

    def listening(x: Tensor, labels: Tensor | None) -> Tensor:
        seen.append(labels)
        return score(x, labels)

    trainer.adversary.score = listening  # type: ignore[method-assign]
    trainer.take_step()
    of_generator, of_real, of_generated = seen
    dropped = of_generator == NULL_LABEL
    assert 0 < int(dropped.sum()) < len(dropped)
    assert torch.equal(of_real, of_generator)
    assert torch.equal(of_generated, of_generator)


def test_only_an_adversarial_loss_has_a_critic(teacher: Path, digits: Dataset, tmp_path: Path) -> None:
    config = replace(student("ctm", teacher), adversary=CRITIC)
    assert Trainer(config, digits, RunFolder(tmp_path), RUNTIME, Callbacks()).adversary is None


def test_the_critic_is_stored_and_damage_is_named(
    teacher: Path, digits: Dataset, unbroken_student: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = RunFolder(unbroken_student("ctm-adversarial")).last_checkpoint()
    stored = load_file(folder / "critic.safetensors")
    assert float(stored["optimizer.0.step"]) == 6
    assert not (RunFolder(unbroken_student("ctm")).last_checkpoint() / "critic.safetensors").exists()
    config = replace(student("ctm-adversarial", teacher))
    run = RunFolder(tmp_path / "run")
    trainer = Trainer(config, digits, run, RUNTIME, Callbacks())
    trainer.take_step()
    trainer.save()
    trainer.release()
    file = run.last_checkpoint() / "critic.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "hidden" not in key}, file)
    with pytest.raises(CheckpointError, match=r"critic\.safetensors is of another architecture: hidden"):
        train(config, digits, run, RUNTIME)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"critic\.safetensors: no such file"):
        train(config, digits, run, RUNTIME)


@pytest.mark.parametrize("where", ["scores", "gradient"])
def test_a_critic_that_is_not_finite_stops_the_run(
    where: str, teacher: Path, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any weight changes, the critic's included: a checkpoint with a spoilt critic could not be resumed."""
    config = student("ctm-adversarial", teacher)
    run = RunFolder(tmp_path / "run")
    trainer = Trainer(config, digits, run, RUNTIME, Callbacks())
    for _ in range(5):
        trainer.take_step()
    trainer.save()
    assert trainer.adversary is not None
    learn, score = trainer.adversary.learn, trainer.adversary.score

    def poisoned(gradients: list[Tensor], *rest: Tensor) -> Tensor:
        loss = learn(gradients, *rest)
        gradients[1] = gradients[1] * math.nan
        return loss

    if where == "gradient":
        monkeypatch.setattr(trainer.adversary, "learn", poisoned)
    else:
        monkeypatch.setattr(trainer.adversary, "score", lambda *args: score(*args) * math.nan)
    before = snapshot(run.root), weights(trainer.adversary), copy.deepcopy(trainer.flow_map.network.state_dict())
    what = "of the critic nan" if where == "gradient" else "loss nan"
    with pytest.raises(TrainingDivergedError, match=rf"step 6: .*{what}.*step-00000005"):
        trainer.run_to_end()
    after = snapshot(run.root)
    assert after == before[0] | {"log.jsonl": after["log.jsonl"]}
    assert same(weights(trainer.adversary), before[1])
    assert same(trainer.flow_map.network.state_dict(), before[2])


def test_accumulation_gives_the_critic_of_the_whole_batch(teacher: Path, digits: Dataset, tmp_path: Path) -> None:
    """Without balance, whose norms are those of a part."""
    config = student("ctm-adversarial", teacher)
    config = replace(config, objective=replace(config.objective, balance=False))
    stored = []
    for micro_batch in (0, 8):
        run = RunFolder(tmp_path / str(micro_batch))
        train(config, digits, run, replace(RUNTIME, micro_batch=micro_batch))
        stored.append([load_file(run.last_checkpoint() / f"{name}.safetensors") for name in ("weights", "critic")])
    for whole, parts in zip(*stored, strict=True):
        close = [key for key in whole if not key.startswith("optimizer")]
        assert max(float((whole[key] - parts[key]).abs().max()) for key in close) < 1e-5


def test_the_critics_settings_refuse_nonsense() -> None:
    for wrong in ({"lr": 0.0}, {"start_images": -1}):
        with pytest.raises(ConfigError):
            AdversaryConfig(**wrong)  # type: ignore[arg-type]
