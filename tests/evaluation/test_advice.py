"""Advice: its figures are the studies', its commands are taken, bad input gets one line."""

import shlex
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.advice.__main__ import entries
from fewstep.cli.train import read
from fewstep.data.demonstrations.episodes import save_demonstrations
from fewstep.data.sources import load_dataset
from fewstep.evaluation.advice.advise import advise
from fewstep.evaluation.advice.look import look
from fewstep.evaluation.advice.rules import measured
from fewstep.policies.rollout import record
from fewstep.recipes import RECIPES
from fewstep.recipes.config import RunConfig
from fewstep.training import build
from fewstep.training.teacher import teacher_of
from fewstep.utils.errors import ConfigError, DataError
from tests.support.pointtask import point_task


def test_what_is_cited_is_what_the_studies_measured() -> None:
    assert list(measured()) == entries(), "python -m benchmarks.advice page writes them anew"
    assert {entry["recipe"] for entry in measured()} <= RECIPES.keys()


def test_reasons_are_what_the_studies_say() -> None:
    found = {(each["recipe"], each["objective"], each["network"]): each["figures"] for each in measured()}
    student = found["distil-diffusers", "CTM", "the teacher's"]
    assert student["2"] < found["distil-diffusers", "its teacher by DDIM", "UNet2DModel"]["2"] / 4
    unet, dit = (found[f"fashion-mnist-{name}", "iSD-T", label] for name, label in (("unet", "U-Net"), ("dit", "DiT")))
    assert all(unet[calls] < dit[calls] for calls in unet)
    policy, flow = found["policy-mlp", "iSD", "MLP"], found["policy-flow-matching", "flow matching", "MLP"]
    assert policy["1"] > flow["1"]
    assert flow["16"] - policy["2"] < 0.06


def configured(advice: str) -> RunConfig:
    """What the command in some advice trains."""
    (command,) = [line for line in advice.splitlines() if line.startswith("  fewstep train")]
    return read(shlex.split(command)[2:]).run


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures in two classes and in none, an archive, demonstrations."""
    monkeypatch.chdir(tmp_path)
    for name in ("with classes/a", "with classes/b", "loose"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (70 + number, 90), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    values = np.random.default_rng(0).integers(0, 256, (20, 16, 16), dtype=np.uint8)
    with tarfile.open("shard-0.tar", "w") as tar:
        for name in ("with classes/a/0.png", "with classes/a/1.png", "with classes/b/0.png", "with classes/b/1.png"):
            tar.add(name, name.replace("/", "-"))
    np.savez("grey.npz", images=values)
    np.savez("small.npz", images=values[:, :8, :8], labels=np.arange(20) % 2)
    save_demonstrations(record(point_task().task, 4).demonstrations, Path("point.npz"))
    return tmp_path


@pytest.mark.parametrize(
    "data", ["with classes", "loose", "shard-0.tar", "grey.npz", "small.npz", "point.npz", "digits"]
)
@pytest.mark.parametrize("seconds", [0.0, 60.0])
@pytest.mark.usefixtures("places")
def test_the_command_builds_a_model_of_the_data(data: str, seconds: float) -> None:
    advice = advise(data, seconds=seconds)
    config = configured(advice)
    assert config.training.seconds == seconds
    dataset = load_dataset(config.data)
    assert build(config, dataset).flow_map.sample_shape == tuple(dataset.shape)
    assert ("nearest measured" in advice) == (data != "digits") or "no figure was measured" in advice
    guidance = getattr(config.objective, "guidance", None)
    assert dataset.num_classes or getattr(guidance, "omega", 1.0) == 1.0


@pytest.mark.usefixtures("places")
def test_data_are_seen_as_they_are() -> None:
    found = look("with classes")
    assert (found.count, found.classes, found.shape, found.source) == (8, 2, (3, 70, 90), "images")
    assert "4 episodes" in str(look("point.npz"))
    assert look("grey.npz").shape == (1, 16, 16)


@pytest.mark.usefixtures("places")
def test_images_in_tars_and_rows_are_seen_as_those_of_a_folder() -> None:
    pa, write = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet").write_table
    pytest.importorskip("datasets")
    Path("rows").mkdir()
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in sorted(Path("with classes").glob("*/*.png"))]
    write(pa.table({"image": images}), "rows/train.parquet")
    seen, wanted = {place: look(place) for place in ("shard-{0..0}.tar", "rows", "rows/train.parquet")}, look("loose")
    assert [each.source for each in seen.values()] == ["webdataset", "hugging-face", "hugging-face"]
    assert [each.count for each in seen.values()] == [4, 8, 8]
    assert all(each.shape[0] == wanted.shape[0] and each.shape[2] == wanted.shape[2] for each in seen.values())
    config = configured(advise("rows"))
    assert len(load_dataset(config.data).train) + len(load_dataset(config.data).heldout) == 8
    write(pa.table({"words": ["one"]}), "none.parquet")
    with pytest.raises(DataError, match="no column of images"):
        look("none.parquet")


@pytest.mark.usefixtures("places")
def test_what_is_no_data_gets_one_line() -> None:
    with pytest.raises(DataError, match="nothing is no data: give digits"):
        advise("nothing")
    with pytest.raises(ConfigError, match="-1 seconds"):
        advise("digits", seconds=-1)
    with pytest.raises(ConfigError, match="fewstep train edm-mixture"):
        advise("mixture")


@pytest.mark.parametrize("path", ["Linear", "EDM"])
def test_a_teacher_of_a_file_is_distilled_by_a_network_of_fewsteps(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has neither weights to start from nor settings of a network to take."""
    monkeypatch.chdir(tmp_path)
    body = f"super().__init__(fewstep.{path}(), (1, 8, 8), 10)"
    code = f"import fewstep\n\n\nclass Mine(fewstep.TeacherModel):\n    def __init__(self):\n        {body}\n"
    Path(f"advised_{path}.py").write_text(code + "\n    def denoise(self, x, t, cond):\n        return x\n")
    said = advise("digits", f"advised_{path}.py:Mine")
    found = configured(said)
    assert (found.initial, found.data.labels) == ("", True)
    assert "network    mlp" in said
    found = replace(found, teacher=f"advised_{path}.py:Mine")
    assert teacher_of(found, load_dataset(found.data)) is not None
