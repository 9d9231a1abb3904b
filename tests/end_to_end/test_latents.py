"""From a folder of pictures to decoded samples: encode, train, sample, evaluate, report; and what goes wrong."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fewstep
from fewstep.cli.main import main
from fewstep.data.latents.autoencoders import load_autoencoder
from fewstep.data.sources import DataConfig, load_dataset
from fewstep.evaluation.evaluate import build_evaluator
from fewstep.evaluation.metrics.features import RandomConvExtractor
from fewstep.evaluation.report.page import RunReport
from fewstep.utils.errors import FewstepWarning
from tests.support.commands import Command, Finished, contents
from tests.support.photographs import SIDE, save_autoencoder, save_pictures

COUNT = 40
ENCODE = ("--image-size", SIDE, "--shard-size", 16, "--heldout", 0.25, "--batch-size", 8, "--cpu", "--quiet")
TRAIN = (
    "--data.source", "latents", "--network.width", 32, "--network.depth", 1, "--network.heads", 2,
    "--training.precision", "no", "--training.batch-size", 8, "--training.images", 16, "--training.log-images", 8,
    "--training.checkpoint-images", 8, "--training.sample-images", 16, "--evaluation.samples", 12,
    "--evaluation.steps", 1, 2, "--evaluation.reference-steps", 2,
    "--runtime.cpu", "--runtime.quiet", "--runtime.threads", 1,
)  # fmt: skip
"""Two steps of DiT-B/4 made small."""


def words(*parts: object) -> list[str]:
    return [str(part) for part in parts]


@pytest.fixture(scope="session")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, an autoencoder, latents in three shards and a trained run; tests that change them take copies."""
    root = tmp_path_factory.mktemp("studio")
    save_autoencoder(root / "vae")
    save_pictures(root / "pictures", {"cold": 25, "warm": 15})
    encode = words("encode", root / "pictures", "--autoencoder", root / "vae", "--out", root / "latents", *ENCODE)
    assert main(encode) == 0
    train = words("train", "imagenet256-dit-b4", *TRAIN, "--data.root", root / "latents", "--out", root / "run")
    assert main(train) == 0
    return root


@pytest.fixture
def moved(studio: Path) -> Iterator[Path]:
    """Where the autoencoder lies while it is away from where it lay when the latents were encoded."""
    place = studio / "vae-elsewhere"
    (studio / "vae").rename(place)
    yield place
    place.rename(studio / "vae")


def assert_refused(shown: Finished, *parts: str) -> None:
    assert shown.code == 2
    assert len(shown.err.splitlines()) == 1
    for part in parts:
        assert part in shown.err, shown.err


def test_a_channel_that_never_varies_takes_no_part(studio: Path, command: Command, tmp_path: Path) -> None:
    """It is encoded, trained beside and decoded as it was; sigma_data and the loss are of the others."""
    model = save_autoencoder(tmp_path / "vae")
    with torch.no_grad():
        assert model.quant_conv is not None
        model.quant_conv.weight[[1, 5]] = 0
        model.quant_conv.bias[[1, 5]] = torch.tensor([0.3, -30.0])
    model.save_pretrained(tmp_path / "vae")
    shown = command("encode", studio / "pictures", "--autoencoder", "vae", "--out", "latents", *ENCODE)
    assert (shown.code, shown.err) == (0, "")
    assert "; channel 1 never varies" in shown.out
    shown = command("train", "imagenet256-dit-b4", *TRAIN, "--data.root", "latents", "--out", "run")
    assert shown.code == 0, shown
    assert "channel 1 never varies" in shown.out
    dataset = load_dataset(DataConfig(source="latents", root="latents"))  # type: ignore[arg-type]
    x0, _ = dataset.train.fetch(torch.arange(len(dataset.train)))
    assert torch.equal(x0[:, 1], torch.zeros_like(x0[:, 1]))
    assert x0[:, [0, 2, 3]].std() == pytest.approx(dataset.sigma_data, rel=0.05)
    mask = dataset.train.context(torch.arange(2)).loss_mask
    assert mask is not None
    assert mask.expand_as(x0[:2]).flatten(2).all(-1).tolist() == [[True, False, True, True]] * 2
    pipeline = fewstep.load("run")
    assert pipeline.config.latents is not None
    decoded = pipeline.config.latents.latents(torch.randn(3, 4, 8, 8))
    torch.testing.assert_close(decoded[:, 1], torch.full((3, 8, 8), 0.3), atol=1e-3, rtol=0)
    assert command("sample", "run", "--count", 2, "--out", "a.png", "--cpu").code == 0


def test_encode_says_what_it_wrote(studio: Path, command: Command, tmp_path: Path) -> None:
    shown = command(
        "encode", studio / "pictures", "--autoencoder", studio / "vae", "--out", "out", *ENCODE, "--no-flip",
        "--posterior", "mean", "--dtype", "float32", "--std", 0.5,
    )  # fmt: skip
    assert (shown.code, shown.err) == (0, "")
    assert "out: 40 images (10 held out) in 3 shards of 4x8x8 latents" in shown.out
    assert "fewstep train RECIPE --data.source latents --data.root out" in shown.out
    manifest = json.loads((tmp_path / "out" / "latents.json").read_text())
    assert (manifest["scale"], manifest["settings"]["posterior"], manifest["settings"]["flip"]) == (0.5, "mean", False)


def test_encode_shows_progress(studio: Path, command: Command) -> None:
    shown = command("encode", studio / "pictures", "--autoencoder", studio / "vae", "--out", "out", *ENCODE[:-1])
    assert shown.code == 0
    assert "encoding: 100%" in shown.err
    assert "40/40" in shown.err
    assert "images/s" in shown.err


def test_a_run_remembers_how_to_decode(studio: Path, tmp_path: Path) -> None:
    manifest = json.loads((studio / "latents" / "latents.json").read_text())
    pipeline = fewstep.load(studio / "run")
    latents = pipeline.config.latents
    assert latents is not None
    assert latents.mean == tuple(manifest["mean"])
    assert latents.image_shape == (3, SIDE, SIDE)
    assert pipeline.images(pipeline.generate(2).samples).shape == (2, 3, SIDE, SIDE)
    pipeline.save_pretrained(tmp_path / "model")
    assert fewstep.Pipeline.from_pretrained(str(tmp_path / "model")).config.latents == latents


def test_samples_are_decoded_into_every_kind_of_file(studio: Path, command: Command, tmp_path: Path) -> None:
    for out in ("grid.png", "arrays.npz", "single"):  # a file each, or a folder
        shown = command("sample", studio / "run", "--count", 5, "--out", out)
        assert (shown.code, shown.err) == (0, "")
    shown = command("sample", studio / "run", "--count", 5, "--latents", "--out", "latents.npz")
    assert (shown.code, shown.err) == (0, "")
    with np.load("arrays.npz") as arrays, np.load("latents.npz") as raw:
        images, latents = arrays["images"], raw["latents"]
        assert arrays["labels"].tolist() == raw["labels"].tolist() == [0, 1, 0, 1, 0]
    assert images.shape == (5, 3, SIDE, SIDE)
    decoded = load_autoencoder(studio / "vae", torch.device("cpu")).decode(torch.from_numpy(latents))
    expected = (decoded.clamp(-1, 1) * 127.5 + 127.5).round().numpy()
    assert np.abs(images - expected).max() <= 1
    files = sorted((tmp_path / "single").glob("*.png"))
    assert [file.name[:6] for file in files] == [f"{i:06d}" for i in range(5)]
    with Image.open(files[3]) as image:
        assert np.array_equal(np.asarray(image).transpose(2, 0, 1), images[3])
    with Image.open("grid.png") as grid:
        assert grid.mode == "RGB"


def test_evaluate_and_report_see_decoded_images(
    moved: Path, studio: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the autoencoder at another place than the latents were encoded from; the page is not drawn."""
    pages: list[RunReport] = []
    monkeypatch.setattr("fewstep.evaluation.report.run.write_report", lambda page, file: pages.append(page))
    shutil.copytree(studio / "run", tmp_path / "run")
    shown = command("evaluate", "run", "--autoencoder", moved)
    assert (shown.code, shown.err) == (0, "")
    rows = json.loads((tmp_path / "run" / "figures.json").read_text())
    assert [row["nfe"] for row in rows] == [1, 2, 1, 0]
    assert {row["extractor"] for row in rows} == {f"random-conv-3x{SIDE}x{SIDE}-v1-seed0"}
    assert {row["reference"] for row in rows} == {"latents held out, decoded (10)"}
    assert all(row["frechet"] > 0 for row in rows)
    shown = command("report", "run", "--autoencoder", moved)
    assert (shown.code, shown.err) == (0, "")
    assert pages[0].data_range == (-1.0, 1.0)
    counts = (48, 48, 48, 10, 48)  # the ten held out among them
    assert [grid.images.shape for grid in pages[0].grids] == [(count, 3, SIDE, SIDE) for count in counts]


def test_the_reference_is_the_features_of_decoded_latents(studio: Path) -> None:
    """In batches of any size the same as of the whole."""
    dataset = load_dataset(DataConfig(source="latents", root=str(studio / "latents")))
    evaluator = build_evaluator(dataset, None)
    latents, _ = dataset.heldout.fetch(torch.arange(len(dataset.heldout)))
    assert dataset.latents is not None
    autoencoder = load_autoencoder(studio / "vae", torch.device("cpu"))
    images = autoencoder.decode(dataset.latents.latents(latents)).clamp(-1, 1)
    expected = RandomConvExtractor((3, SIDE, SIDE)).features(images)
    torch.testing.assert_close(evaluator.features, expected, atol=1e-4, rtol=1e-4)


def test_training_draws_decoded_grids_and_goes_on(studio: Path, command: Command, tmp_path: Path) -> None:
    assert [path.name for path in (studio / "run" / "samples").iterdir()] == ["step-00000002.png"]
    with Image.open(studio / "run" / "samples" / "step-00000002.png") as grid:
        assert grid.width == 20 * 4 * SIDE + 19 * 2  # images of 16 pixels, enlarged fourfold
    shutil.copytree(studio / "run", tmp_path / "run")
    before = contents(tmp_path / "run")
    again = words("train", "imagenet256-dit-b4", *TRAIN, "--data.root", studio / "latents", "--out", "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    assert command(*again).code == 0
    for name in ("model.safetensors", "optimizer.safetensors", "config.json"):
        key = f"checkpoints/step-00000002/{name}"
        assert contents(tmp_path / "run")[key] == before[key]


def test_a_learning_curve_is_of_decoded_images(studio: Path, command: Command, tmp_path: Path) -> None:
    shown = command(
        "train", "celebahq256-dit-b4", *TRAIN, "--data.root", studio / "latents", "--out", "run",
        "--training.sample-images", 0, "--evaluation.curve-images", 16, "--evaluation.curve-samples", 8,
    )  # fmt: skip
    assert (shown.code, shown.err) == (0, "")
    points = [json.loads(line) for line in (tmp_path / "run" / "curve.jsonl").read_text().splitlines()]
    assert [point["nfe"] for point in points] == [1, 2]
    assert all(point["value"] > 0 for point in points)


@pytest.mark.parametrize("name", ["sample", "evaluate", "report"])
def test_a_missing_autoencoder_is_asked_for(
    name: str, moved: Path, studio: Path, command: Command, tmp_path: Path
) -> None:
    shutil.copytree(studio / "run", tmp_path / "run")
    before = contents(tmp_path / "run")
    shown = command(name, "run")
    assert_refused(shown, "the autoencoder that makes images of these latents cannot be read", "with --autoencoder")
    assert contents(tmp_path / "run") == before


def test_samples_of_a_moved_autoencoder(moved: Path, studio: Path, command: Command) -> None:
    assert command("sample", studio / "run", "--autoencoder", moved, "--out", "x.png", "--count", 2).code == 0
    assert command("sample", studio / "run", "--latents", "--out", "x.npz", "--count", 2).code == 0


def test_training_needs_no_autoencoder(moved: Path, studio: Path, command: Command, tmp_path: Path) -> None:
    train = words("train", "imagenet256-dit-b4", *TRAIN, "--data.root", studio / "latents", "--out", "run")
    with pytest.warns(FewstepWarning, match="samples are shown as latents: the autoencoder .* cannot be read"):
        assert command(*train).code == 0
    assert (tmp_path / "run" / "samples" / "step-00000002.png").is_file()
    curve = ("--evaluation.curve-images", 8, "--evaluation.curve-samples", 8, "--out", "other")
    assert_refused(command(*train[:-2], *curve), "cannot be read")
    assert not (tmp_path / "other").exists()


def test_another_autoencoder_is_refused(studio: Path, command: Command, tmp_path: Path) -> None:
    save_autoencoder(tmp_path / "other", seed=1)
    shown = command("sample", studio / "run", "--autoencoder", "other")
    assert_refused(shown, "other holds another autoencoder", "--autoencoder")


def test_sampling_without_diffusers_names_the_extra(
    studio: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert_refused(command("sample", studio / "run"), "pip install diffusers transformers")
    assert command("sample", studio / "run", "--latents", "--out", "x.npz", "--count", 2).code == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("encode", "[Mm]issing"),
        ("encode nowhere --autoencoder vae --out out", "'nowhere' is no folder"),
        ("encode pictures --autoencoder nowhere --out out", "nowhere has no config.json"),
        ("encode pictures --autoencoder pictures --out out", "pictures has no config.json"),
        ("encode pictures --autoencoder vae --out out --image-size 15", "side 15 do not divide by 2"),
        ("encode pictures --autoencoder vae --out out --image-size 0", "images of side 0"),
        ("encode pictures --autoencoder vae --out out --heldout 1", "1.0 held out"),
        ("encode pictures --autoencoder vae --out out --std 0", "standard deviation is 0.0"),
        ("encode pictures --autoencoder vae --out out --batch-size 0", "batches of 0 images"),
        ("encode pictures --autoencoder vae --out out --imagesize 16", "did you mean --image-size?"),
        ("encode pictures --autoencoder vae --out out --posterior best", "'best'"),
        (
            "train imagenet256-dit-b4",
            "source 'latents' needs root, a folder that fewstep encode wrote: '' is no folder",
        ),
        ("train imagenet256-dit-b4 --data.root pictures", "has no latents.json: make it by fewstep encode"),
        ("train imagenet256-dit-b4 --data.root latents --data.image-size 16", "leave image_size and channels at 0"),
        ("sample run --latents --out x.png", "x.png: latents are written to FILE.npz"),
    ],
)
def test_bad_lines(line: str, message: str, studio: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(studio)
    before = {path.name for path in studio.iterdir()}
    shown = command(*line.split())
    assert shown.code == 2
    assert len(shown.err.splitlines()) == 1
    if message == "[Mm]issing":
        assert "issing" in shown.err
    else:
        assert message in shown.err, shown.err
    assert {path.name for path in studio.iterdir()} == before


def test_a_second_command_on_the_same_folder_shows_the_difference(studio: Path, command: Command) -> None:
    before = contents(studio / "latents")
    line = ("encode", studio / "pictures", "--autoencoder", studio / "vae", "--out", studio / "latents", *ENCODE)
    assert_refused(command(*line, "--seed", 1), "settings.seed: 0 -> 1", "give another folder with --out")
    assert contents(studio / "latents") == before


def test_flips_that_were_not_encoded_are_refused_before_the_run_is_made(
    studio: Path, command: Command, tmp_path: Path
) -> None:
    encode = ("encode", studio / "pictures", "--autoencoder", studio / "vae", "--out", "plain", *ENCODE, "--no-flip")
    assert command(*encode).code == 0
    train = ("train", "imagenet256-dit-b4", *TRAIN, "--data.root", "plain", "--out", "run")
    assert_refused(command(*train), "encoded without mirrored images", "--training.no-flip")
    assert not (tmp_path / "run").exists()
    assert command(*train, "--training.no-flip").code == 0


@pytest.mark.parametrize("option", ["--latents", "--autoencoder"])
def test_options_of_latents_on_a_model_of_images(option: str, small_run: Path, command: Command) -> None:
    value = () if option == "--latents" else ("vae",)
    shown = command("sample", small_run, option, *value, "--out", "x.npz")
    assert_refused(shown, f"this model's samples are no latents: leave out {option}")
