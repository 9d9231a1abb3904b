"""Whatever a user gets wrong ends in exit code 2 and one line on standard error, and nothing on disk is lost."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from fewstep.cli.main import main
from fewstep.training import RunFolder
from fewstep.utils.serialization import FORMAT
from tests.support.commands import ENVIRONMENT, SMALL, STEPS, Command, Finished, contents


def assert_refused(shown: Finished, message: str) -> None:
    """Exit code 2 and exactly one line, which says what is wrong."""
    assert shown.code == 2
    lines = shown.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("fewstep: ")
    assert "Traceback" not in shown.err
    assert re.search(message, lines[0]), lines[0]


@pytest.fixture
def run(small_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    shutil.copytree(small_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian digits", r"unknown command 'trian'; did you mean train\?"),
        ("xyz digits", r"unknown command 'xyz'; commands: quickstart, advise, recipes, objectives"),
        ("train", r"train needs a recipe first.*digits-unet"),
        ("train --out x", r"train needs a recipe first"),
        ("train digit", r"no recipe 'digit'; recipes: digits, "),
        ("train digits --training.batchsize 4", r"option --training\.batchsize; did you mean --training\.batch-size\?"),
        ("train digits --lr 4", r"unknown option --lr"),
        ("train digits extra", r"unknown option extra"),
        ("train digits --training.batch-size many", r"--training\.batch-size.*'many'"),
        ("train digits --training.batch-size", r"[Mm]issing value.*--training\.batch-size"),
        ("train digits --model.path cubic", r"--model.path must be one of .*linear.*; got cubic"),
        ("train digits --training.batch-size 0", r"batch_size is 0; it must be finite and at least 1"),
        ("train digits --training.seed -1", r"seed is -1"),
        ("train digits --training.ema-power 0.5", r"relative width 0\.5 must lie in"),
        ("train digits --training.ema-power", r"needs at least one EMA"),
        ("train digits --optimizer.lr -1", r"lr is -1\.0; it must be positive"),
        ("train digits --optimizer.beta1 1", r"beta1 is 1\.0 .* must lie in \[0, 1\)"),
        ("train digits --optimizer.decay-images 0", r"decay_images is 0; .* at least 1"),
        ("train digits --training.seconds nan", r"seconds is nan; it must be finite"),
        ("quickstart --seconds nan", r"nan seconds .*finite number"),
        ("train digits --evaluation.gamma 2", r"gamma is 2.*\[0, 1\]"),
        ("train digits --evaluation.guidance-scale -1", r"guidance_scale is -1.*positive"),
        ("train digits --data.no-labels --evaluation.guidance-scale 2", r"no classes or prompts to guide samples to"),
        ("train digits --data.root nowhere", r"'digits' is built in and reads nothing from 'nowhere'.*--data\.source"),
        ("train digits --model.sigma-data -1", r"sigma_data is -1\.0"),
        ("train digits --evaluation.steps 0", r"steps is \(0,\); it needs at least one step count"),
        ("train digits --evaluation.steps", r"steps is \(\); it needs at least one step count"),
        ("train digits --objective.label-dropout 2", r"label dropout is 2\.0"),
        ("train digits --network.width 0", r"an MLP needs width"),
        ("train digits --model.path edm --model.preconditioning trig", r"trig preconditioning needs a clock"),
        ("train digits --runtime.micro-batch -2", r"micro_batch is -2"),
        ("train ctm-digits", r"the teacher cannot be read: runs/edm-digits: no such folder; .* --teacher$"),
        ("train cd-digits --teacher nowhere", r"the teacher cannot be read: nowhere: no such folder"),
        ("train ctm-digits --teacher=", r"recipe ctm-digits distils a teacher: name its run with --teacher RUN"),
        ("train digits --initial nowhere", r"the model to start from cannot be read: nowhere: no such .* --initial$"),
        ("train digits --initial teacher", r"recipe digits distils a teacher: name its run with --teacher RUN"),
        ("train digits --model.preconditioning analytic", r"computed from statistics: name a teacher with --teacher"),
        ("statistics mine.py:Mine", r"is no run .*fewstep\.estimate_statistics.*train ctm-digits --teacher"),
        ("train ctm-digits --statistics.points 3", r"points is 3; .* at least 4"),
        ("train ctm-digits --gan.lr 0", r"the discriminator's lr is 0\.0; it must be positive"),
        ("train ctm-digits --gan.discriminator.width 0", r"a discriminator of width 0"),
        ("train ctm-digits --objective.target-decay 1", r"decay of the target is 1\.0"),
        ("train ctm-digits --objective.steps.points 1", r"a teacher's grid needs at least 2 points"),
        ("train ctm-digits --objective.gan -1", r"gan is -1\.0"),
        ("recipes all", r"fewstep recipes: unknown option all"),
        ("sample", r"[Mm]issing.*PATH"),
        ("sample nowhere", r"nowhere: no such folder"),
        ("evaluate nowhere", r"nowhere is not a run"),
        ("report nowhere", r"nowhere is not a run"),
        ("compare", r"[Mm]issing.*PATH|at least two runs, got 0"),
        ("compare nowhere", r"at least two runs, got 1"),
        ("compare nowhere here", r"nowhere is not a run"),
        ("train digits --evaluation.curve-samples 1", r"curve_samples is 1; .* at least 4"),
        ("sample nowhere --sampler best", r"'best'.*--sampler"),
    ],
)  # fmt: skip
def test_wrong_words(words: str, message: str, command: Command, tmp_path: Path) -> None:
    assert_refused(command(*words.split()), message)
    assert list(tmp_path.iterdir()) == []


def test_runs_that_cannot_be_compared_are_left_as_they_are(run: Path, small_run: Path, command: Command) -> None:
    before = contents(small_run)
    assert_refused(command("compare", run, small_run), r"have the same settings and seed")
    config = run / "config.json"
    config.write_text(config.read_text().replace('"seed": 0', '"seed": 7'))
    (run / "curve.jsonl").write_text("nonsense\n")
    assert_refused(command("compare", run, small_run), r"curve\.jsonl, line 1 is damaged")
    (run / "curve.jsonl").unlink()
    shutil.rmtree(run / "checkpoints")
    assert_refused(command("compare", run, small_run), r"kept no checkpoint.*--evaluation\.curve-images N")
    assert contents(small_run) == before


def pictures(folder: Path, count: int, size: int) -> Path:
    """A folder of random grey PNG images."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(generator.integers(0, 256, (size, size), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def test_a_missing_data_folder(command: Command, tmp_path: Path) -> None:
    shown = command("train", "digits", "--data.source", "images", "--data.root", "nowhere", *SMALL)
    assert_refused(shown, r"'nowhere' is no folder")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_data_folder(command: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    shown = command("train", "digits", "--data.source", "images", "--data.root", "empty", *SMALL)
    assert_refused(shown, r"no PNG, JPEG or WebP images in '.*empty'")


def test_a_corrupt_image_is_named(command: Command, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "images", 12, 8)
    whole = (folder / "7.png").read_bytes()
    (folder / "7.png").write_bytes(whole[: len(whole) // 2])
    shown = command("train", "digits", "--data.source", "images", "--data.root", folder, *SMALL)
    assert_refused(shown, r"7\.png")
    assert not (tmp_path / "runs").exists()


def test_images_of_a_shape_that_the_network_cannot_take(command: Command, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "images", 12, 7)
    shown = command("train", "digits-unet", "--data.source", "images", "--data.root", folder, "--runtime.cpu")
    assert_refused(shown, r"images of 7x7 cannot be halved 1 times")
    assert not (tmp_path / "runs").exists()


def test_a_resume_with_a_changed_recipe_shows_the_difference(run: Path, archive: Path, command: Command) -> None:
    before = contents(run)
    words = ("train", "digits", "--data.source", "npz", "--data.root", archive, "--out", run, *SMALL, *STEPS)
    shown = command(*words, "--training.batch-size", 16, "--optimizer.lr", 0.5)
    assert_refused(shown, r"training\.batch_size: 32 -> 16")
    assert re.search(r"optimizer\.lr: 0\.003 -> 0\.5", shown.err)
    assert contents(run) == before


def test_a_resume_on_changed_data_is_refused(run: Path, archive: Path, command: Command, tmp_path: Path) -> None:
    with np.load(archive) as stored:
        images, labels = stored["images"].copy(), stored["labels"]
    images[3, 4, 4] += 1
    own = tmp_path / archive.name
    np.savez(own, images=images, labels=labels)
    record = json.loads((run / "config.json").read_text())
    record["run"]["data"]["root"] = str(own)  # the same path, as if its file had been changed
    (run / "config.json").write_text(json.dumps(record))
    before = contents(run)
    shown = command("train", "digits", "--data.source", "npz", "--data.root", own, "--out", run, *SMALL, *STEPS)
    assert_refused(shown, r"data\.fingerprint: '\w+' -> '\w+'")
    assert contents(run) == before


@pytest.fixture(scope="session")
def small_teacher(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished teacher on the archive; tests that change it take a copy."""
    root = tmp_path_factory.mktemp("small") / "teacher"
    words = ["train", "edm-digits", "--data.source", "npz", "--data.root", str(archive), "--data.labels"]
    assert main([*words, "--out", str(root), *SMALL, *STEPS, "--training.sample-images", "0"]) == 0
    return root


@pytest.fixture
def distil(small_teacher: Path, archive: Path, tmp_path: Path) -> tuple[Path, tuple[object, ...]]:
    """A copy of the teacher, and the words that distil it."""
    shutil.copytree(small_teacher, tmp_path / "teacher")
    words = ("train", "ctm-digits", "--data.source", "npz", "--data.root", archive, "--data.labels", *SMALL, *STEPS)
    quick = ("--statistics.points", 8, "--statistics.samples", 16, "--evaluation.curve-images", 0)
    return tmp_path / "teacher", (*words, *quick, "--training.sample-images", 0, "--teacher", tmp_path / "teacher")


def test_a_teacher_that_does_not_fit(distil: tuple[Path, tuple[object, ...]], command: Command) -> None:
    teacher, words = distil
    before = contents(teacher)
    assert_refused(command(*words, "--data.no-labels"), r"in 2 classes, but the data halves.* and 0 classes")
    shown = command(*words, "--network.width", 24)
    assert_refused(shown, r"is of another architecture: .*\[24.* give the run the network of the model")
    assert contents(teacher) == before
    assert not Path("runs").exists()


def test_a_teacher_that_is_damaged(distil: tuple[Path, tuple[object, ...]], command: Command) -> None:
    teacher, words = distil
    weights = RunFolder(teacher).last_checkpoint() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    assert_refused(command(*words), r"the teacher cannot be read: .*model\.safetensors is truncated")


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (("--model.preconditioning", "analytic"), "estimate anew"),
        (("--model.preconditioning.levels", 6), "make it anew"),
    ],
)
def test_statistics_that_are_damaged(
    options: tuple[object, ...], advice: str, distil: tuple[Path, tuple[object, ...]], command: Command
) -> None:
    """Those of the computed preconditioning, and what the skip regressed."""
    teacher, words = distil[0], (*distil[1], *options)
    assert command(*words, "--out", "first").code == 0
    (file,) = (teacher / "statistics").iterdir()
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    assert_refused(command(*words, "--out", "second"), rf"\w{{16}}\.json is damaged .*: delete it to {advice}$")
    assert not Path("second").exists()
    file.unlink()
    assert command(*words, "--out", "second").code == 0
    assert json.loads(file.read_text()) | {"seconds": 0} == json.loads(whole) | {"seconds": 0}


def test_another_teacher_for_a_run_begun(distil: tuple[Path, tuple[object, ...]], command: Command) -> None:
    _, words = distil
    assert command(*words, "--out", "student").code == 0
    other = command(
        "train", "edm-digits", *words[2:-4], "--training.seed", 1, "--training.images", 64, "--out", "other"
    )
    assert other.code == 0
    before = contents(Path("student"))
    shown = command(*words, "--out", "student", "--teacher", "other")
    assert_refused(shown, r"student holds a run with other settings \(teacher: '\w{16}' -> '\w{16}'\)")
    assert contents(Path("student")) == before


@pytest.mark.parametrize("name", ["sample", "evaluate", "tune-steps"])
def test_a_run_without_a_checkpoint(name: str, run: Path, command: Command) -> None:
    shutil.rmtree(run / "checkpoints")
    before = contents(run)
    assert_refused(command(name, run), r"has no checkpoint yet: train it first")
    assert contents(run) == before


@pytest.mark.parametrize("name", ["sample", "evaluate", "report"])
@pytest.mark.parametrize("what", ["a folder of other things", "a damaged configuration", "a foreign configuration"])
def test_a_folder_that_is_no_run(name: str, what: str, command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    text = {"a folder of other things": None, "a damaged configuration": "{", "a foreign configuration": "[1]"}[what]
    (folder / ("letter.txt" if text is None else "config.json")).write_text(text or "dear")
    assert_refused(command(name, folder), r"is not a run|is damaged|is not a run's configuration")


@pytest.mark.parametrize("name", ["sample", "report", "evaluate"])
def test_a_truncated_checkpoint(name: str, run: Path, command: Command) -> None:
    weights = RunFolder(run).last_checkpoint() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    before = contents(run)
    assert_refused(command(name, run), r"model\.safetensors is truncated")
    assert contents(run) == before


@pytest.mark.parametrize("part", [".", "checkpoints"])
def test_a_file_of_a_later_format(part: str, run: Path, command: Command) -> None:
    file = (RunFolder(run).last_checkpoint() if part == "checkpoints" else run) / "config.json"
    record = json.loads(file.read_text())
    assert record["format"] == FORMAT
    later = {f"{key}_renamed": value for key, value in record.items() if key != "format"}
    file.write_text(json.dumps(later | {"format": FORMAT + 1}))
    before = contents(run)
    assert_refused(
        command("sample", run),
        rf"config\.json has format {FORMAT + 1}, .* formats up to {FORMAT}: install a newer fewstep",
    )
    assert contents(run) == before
    for damaged in (True, "1", None, 0, 1.0):
        file.write_text(json.dumps(record | {"format": damaged}))
        assert_refused(command("sample", run), r"config\.json is damaged: its format is ")


def test_weights_of_another_architecture(run: Path, command: Command) -> None:
    file = RunFolder(run).last_checkpoint() / "config.json"
    record = json.loads(file.read_text())
    record["flow_map"]["network"]["width"] = 24
    file.write_text(json.dumps(record))
    assert_refused(command("sample", run), r"model\.safetensors is of another architecture: .*\[24")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--steps 0", r"0 steps|at least (1|one)"),
        ("--steps -3", r"-3"),
        ("--count 0", r"0 samples"),
        ("--batch-size 0", r"batches of 0"),
        ("--label 2", r"class 2 is out of range: this model knows classes 0 to 1"),
        ("--label -7", r"class -7 is out of range"),
        ("--sampler gamma --gamma 2", r"gamma is 2\.0"),
        ("--interval 0 0.5", r"--interval bounds where guidance acts, and there is none: add --guidance-scale"),
        ("--times 0.2 0.9", r"fall"),
        ("--columns 0", r"columns"),
        ("--out picture.jpg", r"picture\.jpg: give FILE\.png, FILE\.gif, FILE\.npz or a folder"),
        ("--interval 0.5", r"--interval"),
    ],
)
def test_samples_that_cannot_be_drawn(words: str, message: str, run: Path, command: Command) -> None:
    before = contents(run)
    assert_refused(command("sample", run, *words.split()), message)
    assert contents(run) == before


def test_too_few_samples_to_measure(run: Path, command: Command) -> None:
    assert_refused(command("evaluate", run, "--samples", -1), r"samples is -1; .* at least 4")


@pytest.mark.parametrize("name", ["train", "sample"])
def test_a_folder_below_a_file(name: str, run: Path, command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("dear")
    words = ("digits", *SMALL, *STEPS) if name == "train" else (run,)
    for out in ("file/below", "file/below.png"):
        assert_refused(command(name, *words, "--out", out), r"cannot write file/below.*(Not a directory|File exists)")
    assert (tmp_path / "file").read_text() == "dear"


def test_a_full_disk(run: Path, archive: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be renamed into place: the command ends with the reason, the run as it was."""
    shutil.rmtree(RunFolder(run).last_checkpoint())
    log = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(log[:4]))
    before = contents(run)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    words = ("train", "digits", "--data.source", "npz", "--data.root", archive, "--out", run, *SMALL, *STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert_refused(command(*words), r"cannot write .*step-00000010: No space left on device; free some space")
        assert {key: value for key, value in contents(run).items() if key != "log.jsonl"} == {
            key: value for key, value in before.items() if key != "log.jsonl"
        }
        assert_refused(command("sample", run), r"cannot write .*samples-0\.png: No space left on device")
    assert command(*words).code == 0


def test_a_batch_smaller_than_the_number_of_processes(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Accelerator, "num_processes", 4)
    shown = command("train", "digits", *SMALL, "--training.batch-size", 3)
    assert_refused(shown, r"a batch of 3 is smaller than the 4 processes: raise --training\.batch-size")
    assert not (tmp_path / "runs").exists()


def test_divergence_names_the_last_good_checkpoint(command: Command, tmp_path: Path) -> None:
    """A learning rate without bounds: the weights overflow within a few steps."""
    words = ("--optimizer.lr", "1e30", "--optimizer.warmup-images", 0, "--optimizer.clip", 0, "--out", "run")
    shown = command("train", "digits", *SMALL, *STEPS, *words, "--training.checkpoint-images", 32)
    assert_refused(
        shown, r"step \d+: loss \S+, gradient norm \S+ batch times t in .*(step-0000000\d|no checkpoint yet)"
    )
    assert list((tmp_path / "run").rglob("samples/*")) == []


def test_an_interrupt_says_how_to_go_on(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fewstep.evaluation.running.train_on", interrupt)
    shown = command("train", "digits", *SMALL)
    assert shown.code == 130
    assert shown.err.startswith("fewstep: interrupted")


def test_the_process_itself_exits_with_2() -> None:
    words = [sys.executable, "-m", "fewstep", "train", "digit"]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("fewstep: there is no recipe 'digit'")
