"""The road from a folder of drawings to decoded samples: autoencoder, latents, iSD-T on a small DiT, figures."""

import json
import math
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from benchmarks.harness import Row
from fewstep.data.base import Dataset
from fewstep.data.folder import decode_or_reason, list_images
from fewstep.data.latents.autoencoders import Decoder, load_decoder
from fewstep.data.latents.encode import EncodingWork, encode_folder, summary
from fewstep.data.latents.shards import EncodingSettings, Manifest
from fewstep.data.sources import DataConfig, load_dataset
from fewstep.evaluation.evaluate import build_evaluator, measure_real, measure_run, write_figures
from fewstep.flow.derivatives import Derivative
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.guidance import FixedGuidance
from fewstep.flow.times import BetaTimes
from fewstep.networks.dit import DiTConfig
from fewstep.objectives import ISD, Pairs
from fewstep.recipes import recipe
from fewstep.recipes.config import EvaluationConfig, OptimizerConfig, RunConfig
from fewstep.sampling.generate import SamplingSettings
from fewstep.sampling.images import image_grid, to_uint8
from fewstep.training import RunFolder, Runtime, load, train

SIDE, CROP = 256, 64
COLUMNS, SHOWN = 8, 128
KEPT = ("method", "nfe", "frechet", "samples", "extractor", "reference")
LARGEST = 16_000_000
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def gather(source: Path, classes: list[str], folder: Path, limit: int) -> Path:
    """Links to the readable images of each class, or of all; those beyond 16 million pixels take too long to read."""
    for name in classes or sorted(path.name for path in source.iterdir() if path.is_dir()):
        files = sorted(file for file in (source / name).rglob("*") if file.suffix.lower() in SUFFIXES)
        for number, file in enumerate([file for file in files if small_enough(file)][: limit or None]):
            link = folder / name / f"{number:04d}{file.suffix.lower()}"
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(file)
    return folder


def small_enough(file: Path) -> bool:
    """Whether an image is whole and of a size that reads quickly."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
            return math.prod(image.size) <= LARGEST
    except (OSError, Image.DecompressionBombError):
        return False


def train_autoencoder(images: Path, folder: Path, seconds: float, batch: int) -> Row:
    """An AutoencoderKL of 0.9 M weights, trained on crops of 64x64 by L1 with a little KL; saved to `folder`."""
    file = folder / "training.json"
    if file.is_file():
        return dict(json.loads(file.read_text()))
    pixels = read_all(images)
    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=SIDE,
        mid_block_add_attention=False,
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    begin, steps = time.perf_counter(), 0
    shape = "{desc}: {percentage:3.0f}% |{bar}|{postfix}"
    with tqdm(total=seconds, desc="autoencoder", bar_format=shape) as bar:
        while (spent := time.perf_counter() - begin) < seconds:
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1.0, steps / 50 + 0.02) * math.cos(0.5 * math.pi * spent / seconds)
            x = crops(pixels, batch, CROP)
            posterior = model.encode(x).latent_dist
            decoded = model.decode(posterior.sample()).sample
            loss = (decoded - x).abs().mean() + 1e-5 * posterior.kl().mean() / posterior.mean[0].numel()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            steps += 1
            bar.n = min(spent, seconds)
            bar.set_postfix_str(f"step {steps}, loss {float(loss.detach()):.3f}")
    model.eval().save_pretrained(folder)
    parameters = sum(p.numel() for p in model.parameters())
    found = {"parameters": parameters, "steps": steps, "batch": batch, "crop": CROP, "seconds": round(spent, 1)}
    file.write_text(json.dumps(found) + "\n")
    return found


def read_all(images: Path) -> list[Tensor]:
    """Every image as bytes (3, H, W), its shorter side reduced to 128 or 256: drawings at two scales."""
    found = []
    for number, file in enumerate(list_images(str(images)).files):
        pixels = decode_or_reason(file, SIDE if number % 2 else SIDE // 2)
        if not isinstance(pixels, str):
            array = torch.from_numpy(pixels)
            found.append(array.expand(3, -1, -1) if array.ndim == 2 else array.permute(2, 0, 1).contiguous())
    return found


def crops(pixels: list[Tensor], batch: int, side: int) -> Tensor:
    """Random squares of random images in [-1, 1], half of them mirrored."""
    parts = []
    for row in torch.randint(len(pixels), (batch,)).tolist():
        image = pixels[row]
        top, left = (int(torch.randint(size - side + 1, ())) for size in image.shape[1:])
        part = image[:, top : top + side, left : left + side]
        parts.append(part.flip(-1) if torch.rand(()) < 0.5 else part)
    return torch.stack(parts).float() / 127.5 - 1


def encode(images: Path, autoencoder: Path, out: Path) -> tuple[Manifest, float]:
    """The latents, and the seconds that it took to encode them; those of an earlier start where they were there."""
    timing, begin = out / "encoding.json", time.perf_counter()
    settings = EncodingSettings(image_size=SIDE, shard_size=512, heldout=0.1)
    manifest = encode_folder(images, autoencoder, out / "latents", settings, work=EncodingWork(4, cpu=True))
    if not timing.is_file():
        timing.write_text(json.dumps(time.perf_counter() - begin) + "\n")
    return manifest, float(json.loads(timing.read_text()))


def run_config(latents: Path, seconds: float) -> RunConfig:
    """iSD-T on a small DiT: the method of `imagenet256-dit-b4` with what a core can do in minutes."""
    base = recipe("imagenet256-dit-b4")
    training = replace(
        base.training,
        images=10_000_000,
        seconds=seconds,
        batch_size=32,
        precision="no",
        ema_power=(0.1,),
        ema_decay=(),
        log_images=640,
        sample_images=0,
        checkpoint_images=6_400,
    )
    return replace(
        base,
        data=DataConfig(source="latents", root=str(latents)),
        network=DiTConfig(width=128, depth=4, heads=4, patch=4),
        objective=ISD(
            pairs=Pairs(BetaTimes(), flow_matching_ratio=0.75),
            guidance=FixedGuidance(1.5),
            derivative=Derivative("finite-difference"),
        ),
        optimizer=OptimizerConfig(lr=1e-3, warmup_images=640, decay="cosine"),
        training=training,
        evaluation=EvaluationConfig(samples=64, steps=(2,), reference_steps=16),
    )


def reconstruction(dataset: Dataset, images: Path, side: int, decoder: Decoder) -> tuple[float, Tensor, Tensor]:
    """PSNR of decoded held-out latents in dB, some of the images, and what they become."""
    rows = torch.arange(len(dataset.heldout))[:: max(1, len(dataset.heldout) // (2 * COLUMNS))][: 2 * COLUMNS]
    numbers = dataset.heldout.rows[rows].tolist()  # type: ignore[attr-defined]  # latents know their images
    files = list_images(str(images)).files
    originals = []
    for number in numbers:
        pixels = decode_or_reason(files[number], side)
        assert not isinstance(pixels, str)
        array = torch.from_numpy(pixels)
        originals.append(array.expand(3, -1, -1) if array.ndim == 2 else array.permute(2, 0, 1))
    truth = torch.stack(originals).float() / 127.5 - 1
    found = decoder.images(dataset.heldout.fetch(rows)[0])
    return 10 * math.log10(4.0 / float((found - truth).square().mean())), truth, found


def draw(strips: list[tuple[str, Tensor]], file: Path) -> None:
    """Strips of images in [-1, 1] under their titles."""
    pictures = []
    for title, images in strips:
        small = functional.interpolate(images, size=(SHOWN, SHOWN), mode="area")
        grid = Image.fromarray(image_grid(to_uint8(small, (-1.0, 1.0)), COLUMNS, padding=4).numpy())
        strip = Image.new("RGB", (grid.width, grid.height + 28), "white")
        strip.paste(grid, (0, 24))
        ImageDraw.Draw(strip).text((2, 4), title, fill="black", font_size=15)
        pictures.append(strip)
    page = Image.new("RGB", (max(p.width for p in pictures), sum(p.height + 8 for p in pictures)), "white")
    top = 0
    for strip in pictures:
        page.paste(strip, (0, top))
        top += strip.height + 8
    file.parent.mkdir(parents=True, exist_ok=True)
    page.quantize(128).save(file, optimize=True)


def encoding_record(manifest: Manifest, seconds: float) -> Row:
    """What encoding took and found; both an image and its mirror image count."""
    return {
        "seconds": round(seconds, 1),
        "images_per_second": round(2 * manifest.count / seconds, 2),
        "megabytes": round(sum(shard.size for shard in manifest.shards) / 1e6, 1),
        "mean": manifest.mean,
        "std": manifest.std,
        "posterior_std": manifest.posterior_std,
    }


@dataclass(frozen=True)
class Road:
    """Where the images are and how long each part takes."""

    images: Path
    classes: tuple[str, ...]
    limit: int
    out: Path
    autoencoder_seconds: float
    autoencoder_batch: int
    train_seconds: float

    def walk(self, figure: Path) -> Row:
        """What docs say of it: images, autoencoder, encoding, training, figures of quality; draws samples."""
        images = gather(self.images.resolve(), list(self.classes), self.out / "images", self.limit)
        autoencoder = self.out / "autoencoder"
        trained = train_autoencoder(images, autoencoder, self.autoencoder_seconds, self.autoencoder_batch)
        manifest, encoding_seconds = encode(images, autoencoder, self.out)
        print(summary(manifest))
        config = run_config(self.out / "latents", self.train_seconds)
        run, dataset = RunFolder(self.out / "run"), load_dataset(config.data)
        result = train(config, dataset, run, Runtime(cpu=True, threads=1))
        evaluator = build_evaluator(dataset, None)
        rows = [*measure_run(run, evaluator), measure_real(dataset, config.evaluation.samples, evaluator)]
        write_figures(rows, run.root)
        psnr, model = show_samples(dataset, images, run, figure)
        network = sum(p.numel() for p in model.parameters())
        return {
            "images": {"count": manifest.count, "classes": list(dataset.class_names), "side": SIDE},
            "autoencoder": trained | {"psnr_db": round(psnr, 2), "latents": list(manifest.shape)},
            "encoding": encoding_record(manifest, encoding_seconds),
            "training": {"images": result.images, "seconds": round(result.seconds, 1), "parameters": network},
            "rows": [{key: row[key] for key in KEPT} for row in rows],
        }


def show_samples(dataset: Dataset, images: Path, run: RunFolder, figure: Path) -> tuple[float, FlowMap]:
    """Draw held-out drawings, what they decode to, and samples; the autoencoder's PSNR, and the model."""
    assert dataset.latents is not None
    decoder = load_decoder(dataset.latents, None, torch.device("cpu"))
    psnr, originals, decoded = reconstruction(dataset, images, SIDE, decoder)
    pipeline = load(run.root)
    drawn = pipeline.generate(4 * COLUMNS, SamplingSettings(steps=2))
    title = f"drawn in 2 steps, classes in turn: {', '.join(dataset.class_names)}"
    strips = [
        ("held-out drawings", originals[:COLUMNS]),
        ("encoded and decoded", decoded[:COLUMNS]),
        (title, pipeline.images(drawn.samples)),
    ]
    draw(strips, figure)
    return psnr, pipeline.flow_map
