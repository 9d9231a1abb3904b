"""From a folder of drawings to decoded samples, with an autoencoder trained on the spot (no package brings one).

    apt-get download openclipart-png && dpkg -x openclipart-png_*.deb clipart
    python -m benchmarks.latents run clipart/usr/share/openclipart/png --classes animals food people plants

Four classes of Debian's public-domain drawings, 256x256. Then latents are encoded, a small DiT trained on them, samples
drawn and measured.
"""

import contextlib
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.nn import functional
from tyro.conf import Positional

import fewstep as fs
from benchmarks.harness import FIGURES, RESULTS, Row, Study, markdown, read, show, write
from fewstep.data.folder import list_images
from fewstep.data.latents.autoencoders import load_decoder
from fewstep.data.latents.encode import EncodingWork, encode_folder, read_image
from fewstep.data.latents.shards import EncodingSettings
from fewstep.evaluation.evaluate import build_evaluator, measure_real, measure_run
from fewstep.flow.derivatives import Derivative
from fewstep.flow.times import BetaTimes
from fewstep.objectives import Pairs
from fewstep.recipes import recipe
from fewstep.recipes.config import EvaluationConfig, OptimizerConfig
from fewstep.sampling.images import save_grid
from fewstep.training import train_run

STORED = RESULTS / "latents.json"
SIDE, CROP, COLUMNS, SHOWN = 256, 64, 8, 128
LARGEST = 16_000_000


def tables() -> dict[str, str]:
    """What is stored."""
    found = dict(read(STORED))
    shown = {
        "images": "{count:,} of {side}x{side}",
        "autoencoder": "{steps} steps in {seconds:.0f} s: {psnr_db} dB",
        "encoding": "{images_per_second} images a second, {megabytes} MB",
        "training": "{images:,} images in {seconds:.0f} s, {parameters:,} weights",
    }
    road = [(part, form.format(**found[part])) for part, form in shown.items()]
    rows = [(row["method"], row["nfe"] or "–", f"{row['frechet']:.2f}", row["samples"]) for row in found["rows"]]
    return {
        "The road": markdown(("part", ""), road),
        "Quality": markdown(("method", "network calls", "Fréchet distance", "samples"), rows),
    }


STUDY = Study("latents", tables)


def gather(source: Path, classes: tuple[str, ...], folder: Path) -> Path:
    """Links to the readable images of each class, or of all; those beyond 16 million pixels take too long to read."""
    for name in classes or sorted(path.name for path in source.iterdir() if path.is_dir()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, file in enumerate(sorted((source / name).rglob("*"))):
            link = folder / name / f"{number:05d}{file.suffix.lower()}"
            with contextlib.suppress(OSError, Image.DecompressionBombError), Image.open(file) as image:
                if math.prod(image.size) <= LARGEST and not link.is_symlink():
                    link.symlink_to(file)
    return folder


def train_autoencoder(images: Path, folder: Path, seconds: float, batch: int) -> Row:
    """An AutoencoderKL of 0.9 M weights, trained on crops of 64x64 by L1 with a little KL; saved to `folder`.

    From drawings at two scales, their squares of side 128 and 256.
    """
    if (file := folder / "training.json").is_file():
        return dict(read(file))
    found = [read_image(file, SIDE if i % 2 else SIDE // 2, 3) for i, file in enumerate(list_images(str(images)).files)]
    pixels = [image for image in found if not isinstance(image, str)]
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": (16, 32, 64, 64), "norm_num_groups": 8, "latent_channels": 4, "sample_size": SIDE}
    model = AutoencoderKL(**blocks, **sizes, mid_block_add_attention=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    begin, steps = time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, steps / 50 + 0.02) * math.cos(0.5 * math.pi * spent / seconds)
        x = crops(pixels, batch, CROP)
        posterior = model.encode(x).latent_dist
        error = (model.decode(posterior.sample()).sample - x).abs().mean()
        optimizer.zero_grad()
        (error + 1e-5 * posterior.kl().mean() / posterior.mean[0].numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        if steps % 50 == 0:
            show([{"autoencoder": f"{spent:.0f} s", "step": steps, "error": float(error.detach())}])
    model.eval().save_pretrained(folder)
    parameters = sum(p.numel() for p in model.parameters())
    write(file, {"parameters": parameters, "steps": steps, "batch": batch, "crop": CROP, "seconds": round(spent, 1)})
    return dict(read(file))


def crops(pixels: list[Tensor], batch: int, side: int) -> Tensor:
    """Random squares of random images in [-1, 1], half of them mirrored."""
    parts = []
    for row in torch.randint(len(pixels), (batch,)).tolist():
        top, left = (int(torch.randint(size - side + 1, ())) for size in pixels[row].shape[1:])
        part = pixels[row][:, top : top + side, left : left + side]
        parts.append(part.flip(-1) if torch.rand(()) < 0.5 else part)
    return torch.stack(parts).float() / 127.5 - 1


def encode(images: Path, autoencoder: Path, out: Path) -> Row:
    """Encode the latents; what it took, at an earlier start where they were there. Mirror images count too."""
    if not (file := out / "encoding.json").is_file():
        settings, begin = EncodingSettings(image_size=SIDE, shard_size=512, heldout=0.1), time.perf_counter()
        manifest = encode_folder(images, autoencoder, out / "latents", settings, work=EncodingWork(4, cpu=True))
        seconds, size = time.perf_counter() - begin, sum(shard.size for shard in manifest.shards)
        figures = {"images_per_second": round(2 * manifest.count / seconds, 2), "megabytes": round(size / 1e6, 1)}
        write(file, {"seconds": round(seconds, 1)} | figures)
    return dict(read(file))


def configuration(latents: Path, seconds: float) -> fs.RunConfig:
    """iSD-T on a small DiT: the method of `imagenet256-dit-b4` with what a core can do in minutes."""
    base, pairs = recipe("imagenet256-dit-b4"), Pairs(BetaTimes(), flow_matching_ratio=0.75)
    length = {"images": 10_000_000, "seconds": seconds, "batch_size": 32, "precision": "no"}
    written = {"log_images": 640, "sample_images": 0, "checkpoint_images": 6_400}
    return replace(
        base,
        data=fs.DataConfig(source="latents", root=str(latents)),
        network=fs.DiTConfig(width=128, depth=4, heads=4, patch=4),
        objective=fs.ISD(pairs=pairs, guidance=fs.FixedGuidance(1.5), derivative=Derivative("finite-difference")),
        optimizer=OptimizerConfig(lr=1e-3, warmup_images=640, decay="cosine"),
        training=replace(base.training, ema_power=(0.1,), ema_decay=(), **length, **written),
        evaluation=EvaluationConfig(samples=64, steps=(2,), reference_steps=16),
    )


def draw(dataset: fs.Dataset, images: Path, pipeline: fs.Pipeline) -> float:
    """A row of held-out drawings, one of what they decode to, and samples in two steps; the PSNR of decoding in dB."""
    assert dataset.latents is not None
    rows = torch.arange(len(dataset.heldout))[:: max(1, len(dataset.heldout) // (2 * COLUMNS))][: 2 * COLUMNS]
    files = list_images(str(images)).files
    originals = [read_image(files[i], SIDE, 3) for i in dataset.heldout.rows[rows].tolist()]  # type: ignore[attr-defined]
    truth = torch.stack(originals).float() / 127.5 - 1  # type: ignore[arg-type]
    found = load_decoder(dataset.latents, None, torch.device("cpu")).images(dataset.heldout.fetch(rows)[0])
    samples = pipeline.images(pipeline.generate(4 * COLUMNS, fs.SamplingSettings(steps=2)).samples)
    shown = functional.interpolate(torch.cat([truth[:COLUMNS], found[:COLUMNS], samples]), (SHOWN, SHOWN), mode="area")
    save_grid(shown, FIGURES / "latents.png", columns=COLUMNS, data_range=(-1.0, 1.0))
    return 10 * math.log10(4.0 / float((found - truth).square().mean()))


def run(
    images: Annotated[Path, Positional],
    classes: tuple[str, ...] = (),
    out: Path = Path("runs/latents"),
    autoencoder_seconds: float = 200.0,
    train_seconds: float = 150.0,
) -> None:
    """Walk the road; started again on the same OUT it goes on where it stopped. One core is meant.

    IMAGES has a subfolder for every class; all are taken where no CLASSES are given. Both limits of seconds make the
    figures depend on the machine.
    """
    torch.set_num_threads(1)
    images, autoencoder = gather(images.resolve(), classes, out / "images"), out / "autoencoder"
    trained = train_autoencoder(images, autoencoder, autoencoder_seconds, batch=8)
    encoding, config = encode(images, autoencoder, out), configuration(out / "latents", train_seconds)
    folder, dataset = fs.RunFolder(out / "run"), fs.load_dataset(config.data)
    result = train_run(config, dataset, folder, fs.Runtime(cpu=True, threads=1))
    evaluator, pipeline = build_evaluator(dataset, None), fs.load(folder.root)
    rows = [*measure_run(folder, evaluator), measure_real(dataset, config.evaluation.samples, evaluator)]
    psnr, parameters = draw(dataset, images, pipeline), sum(p.numel() for p in pipeline.flow_map.parameters())
    found = {
        "images": {"count": len(dataset.train) + len(dataset.heldout), "side": SIDE},
        "autoencoder": trained | {"psnr_db": round(psnr, 2)},
        "encoding": encoding,
        "training": {"images": result.images, "seconds": round(result.seconds, 1), "parameters": parameters},
        "rows": rows,
    }
    write(STORED, found)
    print(STUDY.text())


if __name__ == "__main__":
    STUDY.main(run=run)
