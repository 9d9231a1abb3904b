"""A discriminator beside a flow map: its hinge losses, its own gradients, when it begins, its state in checkpoints."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.data.base import Dataset
from fewstep.networks.condition import NULL_LABEL
from fewstep.networks.discriminator import DiscriminatorConfig
from fewstep.objectives.losses import discriminator_loss, generator_loss
from fewstep.recipes.config import GANConfig
from fewstep.training import Callbacks, RunFolder, train_run
from fewstep.training.checkpoint import stored_discriminator
from fewstep.training.gan import GAN
from fewstep.training.loop import Trainer
from fewstep.utils.errors import CheckpointError, ConfigError, TrainingDivergedError
from tests.support.objectives import changed
from tests.support.tiny import DISCRIMINATOR, RUNTIME, snapshot, student

BATCH = 12


def make_gan(average: Callable[[Tensor], Tensor] = lambda value: value) -> GAN:
    config = GANConfig(discriminator=DiscriminatorConfig(width=4), lr=1e-2)
    return GAN(config, (1, 8, 8), 3, 0, torch.device("cpu"), average)


def samples(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, 1, 8, 8, generator=generator), torch.arange(BATCH) % 3


def weights(gan: GAN) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in gan.discriminator.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def test_hinge_losses_have_their_values() -> None:
    real, generated = torch.tensor([2.0, 1.0, 0.5, -1.0]), torch.tensor([-3.0, -1.0, 0.25, 2.0])
    assert discriminator_loss(lambda x, labels: x, real, generated, None).tolist() == [0, 0, 0.5 + 1.25, 2 + 3]
    assert generator_loss(lambda x, labels: x, generated, None).tolist() == [3, 1, -0.25, -2]


def test_labels_reach_the_discriminator_and_generated_samples_get_no_gradient_from_its_loss() -> None:
    seen: list[Tensor | None] = []

    def discriminator(x: Tensor, labels: Tensor | None) -> Tensor:
        seen.append(labels)
        return x

    labels, generated = torch.arange(2), torch.zeros(2, requires_grad=True)
    assert not discriminator_loss(discriminator, torch.zeros(2), generated, labels).requires_grad
    generator_loss(discriminator, generated, labels).sum().backward()
    assert generated.grad is not None
    assert generated.grad.tolist() == [-1, -1]
    assert all(each is labels for each in seen)


def test_the_discriminators_gradients_are_kept_apart_from_the_flow_maps() -> None:
    """What the flow map's backward pass leaves on the discriminator changes neither its gradients nor its step."""
    gan, untouched = make_gan(), make_gan()
    (real, labels), (generated, _) = samples(0), samples(1)
    generator_loss(gan.score, generated.requires_grad_(), labels).mean().backward()
    left = [parameter.grad for parameter in gan.discriminator.parameters()]
    assert all(gradient is not None and bool(gradient.any()) for gradient in left[:-1])
    kept = copy.deepcopy(left)
    for each in (gan, untouched):
        for _ in range(2):
            gradients: list[Tensor] = []
            each.learn(gradients, real, generated, labels)
            if each is gan and kept:
                assert all(torch.equal(a, p.grad) for a, p in zip(kept, each.discriminator.parameters(), strict=True))
                kept = []
            each.step(each.averaged(gradients, 1))
    assert same(weights(gan), weights(untouched))
    assert all(parameter.grad is None for parameter in gan.discriminator.parameters())


def test_parts_and_processes_add_up_to_the_batch() -> None:
    calls: list[Tensor] = []

    def doubled(value: Tensor) -> Tensor:
        calls.append(value)
        return 2 * value

    gan = make_gan(doubled)
    (real, labels), (generated, _) = samples(0), samples(1)
    whole: list[Tensor] = []
    loss = gan.learn(whole, real, generated, labels)
    assert loss.shape == (BATCH,)
    assert not loss.requires_grad
    parts: list[Tensor] = []
    for rows in torch.arange(BATCH).split(4):
        gan.learn(parts, real[rows], generated[rows], labels[rows])
    averaged = gan.averaged(parts, 3)
    assert all(torch.allclose(a, 2 * b, atol=1e-6) for a, b in zip(averaged, whole, strict=True))
    assert len(calls) == len(whole)


def test_the_discriminator_learns_to_tell_two_kinds_apart() -> None:
    gan = make_gan()
    first = math.nan
    for step in range(30):
        (real, labels), (generated, _) = samples(2 * step), samples(2 * step + 1)
        gradients: list[Tensor] = []
        loss = float(gan.learn(gradients, real, 2 * generated, labels).mean())
        first = loss if step == 0 else first
        gan.step(gan.averaged(gradients, 1))
    assert 1.5 < first < 2.5
    assert loss < 0.5 * first


def test_its_state_comes_back_exactly_and_its_seed_is_the_runs() -> None:
    gan, other = make_gan(), make_gan()
    assert same(weights(gan), weights(other))
    (real, labels), (generated, _) = samples(0), samples(1)

    def learn(each: GAN) -> None:
        gradients: list[Tensor] = []
        each.learn(gradients, real, generated, labels)
        each.step(each.averaged(gradients, 1))

    learn(gan)
    other.load({key: value.clone() for key, value in gan.tensors().items()}, "here")
    for each in (gan, other):
        learn(each)
    assert same(gan.tensors(), other.tensors())
    lost = {key: value for key, value in gan.tensors().items() if not key.startswith("optimizer.0.")}
    whole, one = gan.tensors(), torch.ones(())
    with pytest.raises(CheckpointError, match=r"here is of another architecture: optimizer\.0\.\w+: \[.*\] -> absent"):
        other.load(lost, "here")
    for foreign in ("foo", "optimizer.foo", "optimizer.x.step"):
        with pytest.raises(CheckpointError, match=rf"here is of another architecture: {foreign}: absent -> \[\]"):
            other.load(whole | {foreign: one}, "here")
    with pytest.raises(CheckpointError, match=r"optimizer\.\d+\.step: \[\] -> absent.* more"):
        other.load({key: value for key, value in whole.items() if not key.endswith(".step")}, "here")
    wider = GAN(
        replace(DISCRIMINATOR, discriminator=DiscriminatorConfig(width=8)),
        (1, 8, 8),
        3,
        0,
        torch.device("cpu"),
        lambda x: x,
    )
    with pytest.raises(CheckpointError, match="here is of another architecture"):
        wider.load(gan.tensors(), "here")


def test_the_discriminator_begins_when_it_is_due(teacher: Path, digits: Dataset, tmp_path: Path) -> None:
    """start_images = 128: after four steps. Until then the flow map's loss does not see it, and it does not learn."""
    config = student("ctm-adversarial", teacher)
    never = replace(config, gan=replace(DISCRIMINATOR, start_images=10**9))
    trainers = [
        Trainer(each, digits, RunFolder(tmp_path / str(i)), RUNTIME, Callbacks())
        for i, each in enumerate((config, never))
    ]
    assert all(trainer.learner.gan is not None for trainer in trainers)
    first = weights(trainers[0].learner.gan)  # type: ignore[arg-type]
    alike, learned, heard = [], [], []
    for _ in range(6):
        for trainer in trainers:
            trainer.take_step()
        states = [trainer.learner.flow_map.network.state_dict() for trainer in trainers]
        alike.append(same(*states))
        learned.append(not same(first, weights(trainers[0].learner.gan)))  # type: ignore[arg-type]
        heard.append({"gan", "discriminator"} & trainers[0].window.waiting[-1].terms[-1].keys())
    assert alike == [True] * 4 + [False] * 2
    assert learned == [False] * 4 + [True] * 2
    assert heard == [set()] * 4 + [{"gan", "discriminator"}] * 2
    assert same(first, weights(trainers[1].learner.gan))  # type: ignore[arg-type]


def test_both_sides_see_the_labels_that_the_flow_map_saw(teacher: Path, digits: Dataset, tmp_path: Path) -> None:
    """Where a label was dropped, real and generated samples alike are judged without one."""
    config = student("ctm-adversarial", teacher)
    config = replace(
        config, objective=changed(config.objective, label_dropout=0.5), gan=replace(DISCRIMINATOR, start_images=0)
    )
    trainer = Trainer(config, digits, RunFolder(tmp_path), RUNTIME, Callbacks())
    assert trainer.learner.gan is not None
    score, seen = trainer.learner.gan.score, []

    def listening(x: Tensor, labels: Tensor | None) -> Tensor:
        seen.append(labels)
        return score(x, labels)

    trainer.learner.gan.score = listening  # type: ignore[method-assign]
    trainer.take_step()
    of_generator, of_real, of_generated = seen
    dropped = of_generator == NULL_LABEL
    assert 0 < int(dropped.sum()) < len(dropped)
    assert torch.equal(of_real, of_generator)
    assert torch.equal(of_generated, of_generator)


def test_only_an_adversarial_loss_has_a_discriminator(teacher: Path, digits: Dataset, tmp_path: Path) -> None:
    config = replace(student("ctm", teacher), gan=DISCRIMINATOR)
    assert Trainer(config, digits, RunFolder(tmp_path), RUNTIME, Callbacks()).learner.gan is None


def test_the_discriminator_is_stored_and_damage_is_named(
    teacher: Path, digits: Dataset, unbroken_student: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = RunFolder(unbroken_student("ctm-adversarial")).last_checkpoint()
    stored = load_file(folder / "discriminator.safetensors")
    assert float(stored["optimizer.0.step"]) == 6
    assert not (RunFolder(unbroken_student("ctm")).last_checkpoint() / "discriminator.safetensors").exists()
    config = replace(student("ctm-adversarial", teacher))
    run = RunFolder(tmp_path / "run")
    trainer = Trainer(config, digits, run, RUNTIME, Callbacks())
    trainer.take_step()
    trainer.save()
    trainer.release()
    file = run.last_checkpoint() / "discriminator.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "hidden" not in key}, file)
    with pytest.raises(
        CheckpointError, match=r"discriminator\.safetensors is of another architecture: discriminator\.hidden"
    ):
        train_run(config, digits, run, RUNTIME)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"discriminator\.safetensors: no such file"):
        train_run(config, digits, run, RUNTIME)


@pytest.mark.parametrize("where", ["scores", "gradient"])
def test_a_discriminator_that_is_not_finite_stops_the_run(
    where: str, teacher: Path, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is saved: a checkpoint with a spoilt discriminator could not be resumed."""
    config = student("ctm-adversarial", teacher)
    run = RunFolder(tmp_path / "run")
    trainer = Trainer(config, digits, run, RUNTIME, Callbacks())
    for _ in range(5):
        trainer.take_step()
    trainer.save()
    assert trainer.learner.gan is not None
    learn, score = trainer.learner.gan.learn, trainer.learner.gan.score

    def poisoned(gradients: list[Tensor], *rest: Tensor) -> Tensor:
        loss = learn(gradients, *rest)
        gradients[1] = gradients[1] * math.nan
        return loss

    if where == "gradient":
        monkeypatch.setattr(trainer.learner.gan, "learn", poisoned)
    else:
        monkeypatch.setattr(trainer.learner.gan, "score", lambda *args: score(*args) * math.nan)
    before = snapshot(run.root)
    what = "of the discriminator nan" if where == "gradient" else "loss nan"
    with pytest.raises(TrainingDivergedError, match=rf"step 6: .*{what}.*step-00000005"):
        trainer.run_to_end()
    after = snapshot(run.root)
    assert after == before | {"log.jsonl": after["log.jsonl"]}


def test_accumulation_gives_the_discriminator_of_the_whole_batch(
    teacher: Path, digits: Dataset, tmp_path: Path
) -> None:
    """Without balance, whose norms are those of a part."""
    config = student("ctm-adversarial", teacher)
    config = replace(config, objective=replace(config.objective, balance=False))
    stored = []
    for micro_batch in (0, 8):
        run = RunFolder(tmp_path / str(micro_batch))
        train_run(config, digits, run, replace(RUNTIME, micro_batch=micro_batch))
        stored.append(
            [load_file(run.last_checkpoint() / f"{name}.safetensors") for name in ("weights", "discriminator")]
        )
    for whole, parts in zip(*stored, strict=True):
        close = [key for key in whole if not key.startswith("optimizer")]
        assert max(float((whole[key] - parts[key]).abs().max()) for key in close) < 1e-5


def test_the_discriminators_settings_refuse_nonsense() -> None:
    for wrong in ({"lr": 0.0}, {"start_images": -1}):
        with pytest.raises(ConfigError):
            GANConfig(**wrong)  # type: ignore[arg-type]


def test_the_critic_of_a_run_of_format_1_is_taken_over() -> None:
    run = RunFolder(Path(__file__).parents[1] / "fixtures" / "format1" / "ctm")
    config, data = run.config(), run.data("shape", "classes")
    assert (config.gan.discriminator.width, config.objective.gan) == (4, 0.5)
    gan = GAN(config.gan, tuple(data["shape"]), data["classes"], 0, torch.device("cpu"), lambda x: x)
    stored, source = stored_discriminator(run.last_checkpoint())
    gan.load(stored, source)
    assert source.endswith("critic.safetensors")
    assert all(torch.equal(value, gan.tensors()[key]) for key, value in stored.items())
