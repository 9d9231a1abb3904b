"""Runs with adapters on the command line: small checkpoints, the teacher beneath them, merged models, older runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import fewstep
from fewstep.cli.main import main
from fewstep.training import RunFolder
from fewstep.training.run_folder import load
from fewstep.utils.weights import read_weights, save_weights
from tests.end_to_end.test_bad_input import assert_refused
from tests.support.commands import DISTILLED, FEW, Command, contents
from tests.support.edm_files import network as network_of
from tests.support.edm_files import save_edm, write
from tests.support.foreign import save_foreign

pytest.importorskip("diffusers")
SHORT = (*DISTILLED, *FEW, "--training.ema-decay", "0.9")
"""Two averages."""


def train(teacher: Path, run: Path, *options: str) -> None:
    words = ("train", "distil-diffusers", "--teacher", str(teacher), "--lora", "2", *SHORT)
    assert main([*words, "--out", str(run), *options]) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher in EDM's format, and a run of four steps with adapters on it."""
    folder: Path = tmp_path_factory.mktemp("adapters")
    save_edm(folder / "network.pkl", "ddpmpp", channels=1, classes=10)
    train(folder / "network.pkl", folder / "run")
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """A copy of both, whose run looks for the teacher where the copy of it lies."""
    shutil.copytree(trained, tmp_path / "copy")
    for file in (tmp_path / "copy").rglob("config.json"):
        file.write_text(file.read_text().replace(str(trained), str(tmp_path / "copy")))
    for state in (tmp_path / "copy").rglob("state.json"):
        record = json.loads(state.read_text())
        del record["digests"]["config.json"], record["digest"]
        state.write_text(json.dumps(record))
    return tmp_path / "copy"


def test_checkpoints_hold_what_is_learned(trained: Path) -> None:
    """Adapters and the second time, in the weights and every average; the optimizer's state is of these alone."""
    checkpoint = RunFolder(trained / "run").last_checkpoint()
    network = load(trained / "run").flow_map.network
    learned = {key for key, value in network.named_parameters() if value.requires_grad}
    for name in ("model", "weights", "ema-constant-0.9"):
        assert set(read_weights(checkpoint / f"{name}.safetensors")) == learned
    assert len(read_weights(checkpoint / "optimizer.safetensors")) == 3 * len(learned)


def test_the_teacher_is_shared_while_it_trains_and_read_again_when_it_resumes(place: Path, command: Command) -> None:
    """Going back half the way gives the same weights again; a moved teacher is named anew."""
    checkpoint = RunFolder(place / "run").last_checkpoint()
    before = contents(checkpoint)
    (place / "network.pkl").rename(place / "moved.pkl")
    shutil.rmtree(checkpoint)
    done = command("train", "--resume", str(place / "run"), "--teacher", str(place / "moved.pkl"), *DISTILLED[-3:])
    assert done.code == 0, done.err
    after = contents(checkpoint)
    same = [name for name in before if name.endswith(".safetensors")]
    assert [name for name in same if before[name] != after[name]] == []
    assert load(place / "run").generate(2, steps=1).samples.isfinite().all()


def test_a_teacher_that_is_missing_or_another_is_one_line(place: Path, command: Command) -> None:
    """Said with where it was; nothing is written."""
    save_edm(place / "other.pkl", "adm", channels=1, classes=10)
    teacher = place / "network.pkl"
    teacher.rename(place / "kept.pkl")
    assert_refused(command("sample", str(place / "run")), r"network\.pkl: no such model; bring it back there, or")
    shutil.copyfile(place / "other.pkl", teacher)
    assert_refused(command("sample", str(place / "run")), "do not fit")
    stored, weights = network_of("ddpmpp", channels=1, classes=10)
    next(value for name, value in weights.items() if name.endswith("weight")).add_(1.0)
    write(teacher, {"ema": stored})
    assert_refused(command("sample", str(place / "run")), "has other weights than these adapters were trained on")


def test_a_merged_model_needs_no_teacher(place: Path, command: Command) -> None:
    """The samples of the run, from a folder that is whole; also as save_pretrained writes it."""
    expected = load(place / "run").generate(2, steps=2).samples
    (place / "network.pkl").rename(place / "moved.pkl")
    words = ("merge", str(place / "run"), "--teacher", str(place / "moved.pkl"))
    assert command(*words, "--out", str(place / "whole")).code == 0
    fewstep.Pipeline.from_pretrained(place / "whole").save_pretrained(place / "again")
    for name in ("whole", "again"):
        found = fewstep.Pipeline.from_pretrained(place / name).generate(2, steps=2).samples
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert_refused(command("merge", str(place / "whole"), "--out", str(place / "twice")), "has no adapters")
    assert_refused(command(*words, "--out", str(place / "whole")), "has something in it")
    done = command(*words, "--adapters", "--out", str(place / "adapters"))
    assert "pytorch_lora_weights.safetensors and second_time.safetensors" in done.out


def test_a_run_is_a_teacher_for_adapters_and_adapters_for_a_whole_student(
    trained: Path, tmp_path: Path, command: Command
) -> None:
    """Upon a run's own weights, which are then the base; upon adapters a student is whole, or refused."""
    assert command("merge", str(trained / "run"), "--out", str(tmp_path / "whole")).code == 0
    train(tmp_path / "whole", tmp_path / "second")
    assert load(tmp_path / "second").generate(1, steps=1).samples.isfinite().all()
    train(trained / "run", tmp_path / "third", "--network.lora", "0")
    network = load(tmp_path / "third").flow_map.network
    assert all(parameter.requires_grad for parameter in network.parameters())
    words = ("train", "distil-diffusers", "--teacher", str(trained / "run"), "--lora", "2", *SHORT)
    assert_refused(command(*words, "--out", str(tmp_path / "fourth")), "the teacher has adapters itself")


def test_a_run_of_older_files_with_the_whole_network_loads_and_goes_on(tmp_path: Path, command: Command) -> None:
    """Its settings say a rank alone; its weights are all there."""
    save_foreign(tmp_path / "teacher", "UNet2DModel")
    train(tmp_path / "teacher", tmp_path / "run")
    expected = load(tmp_path / "run").generate(2, steps=2).samples
    checkpoints = RunFolder(tmp_path / "run").checkpoints()
    shutil.rmtree(checkpoints[-1])
    base = load(tmp_path / "run").flow_map.network.state_dict()
    record = json.loads((checkpoints[0] / "config.json").read_text())
    del record["flow_map"]["network"]["adapters"]
    record["flow_map"]["network"]["lora"] = 2
    (checkpoints[0] / "config.json").write_text(json.dumps(record))
    state = json.loads((checkpoints[0] / "state.json").read_text())
    for name in ("model", "weights", "ema-constant-0.9"):
        file = checkpoints[0] / f"{name}.safetensors"
        save_weights({**base, **read_weights(file)}, file)
        del state["digests"][file.name]
    del state["digests"]["config.json"], state["digest"]
    (checkpoints[0] / "state.json").write_text(json.dumps(state))
    run = json.loads((tmp_path / "run" / "config.json").read_text())
    del run["run"]["network"]["lora_alpha"], run["run"]["network"]["lora_layers"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(run))

    assert load(tmp_path / "run").generate(2, steps=2).samples.isfinite().all()
    done = command("train", "--resume", str(tmp_path / "run"), *DISTILLED[-3:])
    assert done.code == 0, done.err
    torch.testing.assert_close(load(tmp_path / "run").generate(2, steps=2).samples, expected, rtol=0, atol=0)


def test_activations_computed_anew_give_the_same_run(trained: Path, tmp_path: Path) -> None:
    """CTM passes gradients through its slow average, and balances its losses by gradients of their own."""
    train(trained / "network.pkl", tmp_path / "run", "--runtime.gradient-checkpointing")
    expected, found = (
        read_weights(RunFolder(place / "run").last_checkpoint() / "weights.safetensors")
        for place in (trained, tmp_path)
    )
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6)
