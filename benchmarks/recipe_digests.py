"""Digests of what every recipe trains in 20 steps: to the last bit the same as before, or not.

Before a change: `python benchmarks/recipe_digests.py OLD.json`; after it, with the same Python packages on the same
machine: `python benchmarks/recipe_digests.py NEW.json --against OLD.json`, which lists what differs and exits
with 1.

Each recipe is trained by the command line, on one thread, so that nothing of the package's inside is assumed; its
weights, averages, losses and 8 samples in two calls are hashed. Recipes made for GPUs keep their objective, path and
optimizer and take a small transformer on latents of random pictures. Teachers are the 20 steps of their own recipes.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

STEPS = 20
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SMALL_DIT = ("--network.width", "64", "--network.depth", "2", "--network.heads", "4")
FEW_STATISTICS = ("--statistics.points", "12", "--statistics.samples", "32")
TEACHERS = {
    "ctm-digits": "edm-digits",
    "ctm-fashion-mnist": "edm-fashion-mnist",
    "ctm-mixture": "edm-mixture",
    "cd-digits": "edm-digits",
    "digits-scd": "edm-digits",
}
FIRST = ("edm-digits", "edm-fashion-mnist", "edm-mixture")
LATENTS = {"imagenet256-dit-b4": "latents-4", "celebahq256-dit-b4": "latents-4", "imagenet256-dit-xl1": "latents-32"}


def fewstep(*words: object) -> str:
    """Run a command; what it printed."""
    command = [sys.executable, "-m", "fewstep", *(str(word) for word in words)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def recipe_names() -> list[str]:
    """All recipes, teachers first."""
    names = [line for line in fewstep("recipes").splitlines() if line and not line.startswith(" ")]
    return [*FIRST, *(name for name in names if name not in FIRST)]


def make_latents(root: Path, channels: int) -> Path:
    """Latents of 24 random pictures in three classes, by a random autoencoder that halves the side."""
    generator = np.random.default_rng(0)
    pictures, encoder = root / "pictures", root / f"autoencoder-{channels}"
    for index in range(24):
        file = pictures / f"class-{index % 3}" / f"{index:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    torch.manual_seed(channels)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=32,
        mid_block_add_attention=False,
    ).save_pretrained(encoder)
    out = root / f"latents-{channels}"
    fewstep("encode", pictures, "--autoencoder", encoder, "--out", out, "--image-size", 32, "--flip", "--quiet")
    return out


def train(name: str, root: Path) -> Path:
    """The run's folder after 20 steps."""
    batch = {"digits-unet": 64}.get(name, 8 if name in LATENTS else 64)
    words: list[object] = ["train", name, "--out", root / name, "--training.batch-size", batch]
    words += ["--training.images", STEPS * batch, "--training.log-images", batch, "--training.sample-images", 0]
    words += ["--training.checkpoint-images", STEPS * batch, "--evaluation.curve-images", 0]
    words += ["--optimizer.warmup-images", 5 * batch]
    if name in LATENTS:
        words += ["--data.root", root / LATENTS[name], *SMALL_DIT]
    if name.startswith("policy-"):
        words += ["--data.root", root / "ring.safetensors"]
    if name in TEACHERS:
        words += ["--teacher", root / TEACHERS[name]]
    if name.startswith("ctm-"):
        words += FEW_STATISTICS
    if name == "digits-ect":
        words += ["--initial", root / "edm-digits"]
    fewstep(*words)
    return root / name


def digest(*parts: bytes) -> str:
    """Sixteen hex digits."""
    return hashlib.blake2b(b"".join(parts), digest_size=8).hexdigest()


def digests(name: str, run: Path) -> dict[str, str]:
    """Of a run's weights, its averages, its losses and its samples."""
    checkpoint = max((run / "checkpoints").iterdir())
    found = {}
    for file in ("weights.safetensors", "model.safetensors"):
        tensors = sorted(load_file(checkpoint / file).items())
        found[file] = digest(*(value.numpy().tobytes() for _, value in tensors))
    losses = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    found["losses"] = digest(json.dumps(losses).encode())
    if not name.startswith("policy-"):
        out = run / "samples.npz"
        fewstep("sample", run, "--count", 8, "--steps", 2, "--out", out, *(["--latents"] if name in LATENTS else []))
        with np.load(out) as arrays:
            found["samples"] = digest(arrays["latents" if name in LATENTS else "images"].tobytes())
    return found


def main() -> None:
    """Train, hash, store, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--recipes", nargs="*")
    options = parser.parse_args()
    known = json.loads(options.against.read_text()) if options.against else {}
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for channels in (4, 32):
            make_latents(root, channels)
        fewstep("demos", "pointmaze-ring", "-n", 8, "--out", root / "ring.safetensors", "--quiet")
        for name in options.recipes or recipe_names():
            found[name] = digests(name, train(name, root))
            differ = [key for key, value in known.get(name, {}).items() if found[name].get(key) != value]
            verdict = f"  DIFFER: {', '.join(differ)}" if differ else ""
            print(f"{name:34} {'  '.join(found[name].values())}{verdict}", flush=True)
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    if any(known.get(name, values) != values for name, values in found.items()):
        sys.exit(1)


if __name__ == "__main__":
    main()
