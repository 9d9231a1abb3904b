"""Digests of what every recipe trains in 20 steps: to the last bit the same as before, or not.

Before a change: `python benchmarks/recipe_digests.py OLD.json`; after it, with the same packages on the same machine:
`python benchmarks/recipe_digests.py NEW.json --against OLD.json`, which lists what differs and exits with 1.

Each recipe is trained by the command line, on one thread, so that nothing of the package's inside is assumed; weights,
averages, losses and 8 samples in two calls are hashed. Recipes made for GPUs keep their objective, path and optimizer
and take a small transformer on latents of random pictures. Teachers are the 20 steps of their own recipes.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from tyro.conf import Positional

STEPS = 20
TEACHERS = {
    "ctm-digits": "edm-digits", "ctm-fashion-mnist": "edm-fashion-mnist", "ctm-mixture": "edm-mixture",
    "cd-digits": "edm-digits", "digits-scd": "edm-digits", "ctm-flow-matching": "digits-flow-matching",
    "emd-flow-matching": "digits-flow-matching", "lmd-flow-matching": "digits-flow-matching",
}  # fmt: skip
LATENTS = {
    "imagenet256-dit-b4": 4, "celebahq256-dit-b4": 4, "imagenet256-dit-xl1": 32, "photos-32-latents": 4,
    "photos-64-latents": 4,
}  # fmt: skip
"""Recipes on latents, and the channels of those."""
SMALL_DIT = ("--network.width", "64", "--network.depth", "2", "--network.heads", "4")


def fewstep(*words: object) -> str:
    """Run a command; what it printed."""
    command = [sys.executable, "-m", "fewstep", *(str(word) for word in words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def make_latents(root: Path, channels: int) -> None:
    """Latents of 24 random pictures in three classes, by a random autoencoder that halves the side."""
    generator = np.random.default_rng(0)
    pictures, encoder = root / "pictures", root / f"autoencoder-{channels}"
    for index in range(24):
        file = pictures / f"class-{index % 3}" / f"{index:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    torch.manual_seed(channels)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": channels, "sample_size": 32}
    AutoencoderKL(**blocks, **sizes, mid_block_add_attention=False).save_pretrained(encoder)
    options = ("--autoencoder", encoder, "--out", root / f"latents-{channels}", "--image-size", 32, "--flip", "--quiet")
    fewstep("encode", pictures, *options)


def train(name: str, root: Path) -> Path:
    """The run's folder after 20 steps."""
    batch = 8 if name in LATENTS else 64
    sizes = {"batch-size": batch, "log-images": batch, "sample-images": 0, "checkpoint-images": STEPS * batch}
    words = [word for key, size in sizes.items() for word in (f"--training.{key}", size)]
    words += ["--training.images", STEPS * batch, "--optimizer.warmup-images", 5 * batch]
    small = ("--network.width", "32") if name.startswith("photos-") else SMALL_DIT
    words += ["--data.root", root / f"latents-{LATENTS[name]}", *small] if name in LATENTS else []
    words += ["--data.root", root / "pictures"] if name.startswith("photos-") and name not in LATENTS else []
    words += ["--data.root", root / "ring.safetensors"] if name.startswith("policy-") else []
    words += ["--teacher", root / TEACHERS[name]] if name in TEACHERS else []
    words += ["--statistics.points", "12", "--statistics.samples", "32"] if name.startswith("ctm-") else []
    words += ["--initial", root / "edm-digits"] if name == "digits-ect" else []
    fewstep("train", name, "--out", root / name, "--evaluation.curve-images", 0, *words)
    return root / name


def digest(*parts: bytes) -> str:
    """Sixteen hex digits."""
    return hashlib.blake2b(b"".join(parts), digest_size=8).hexdigest()


def digests(name: str, run: Path) -> dict[str, str]:
    """Of a run's weights, its averages, its losses and its samples."""
    checkpoint, found = max((run / "checkpoints").iterdir()), {}
    for file in ("weights.safetensors", "model.safetensors"):
        found[file] = digest(*(value.numpy().tobytes() for _, value in sorted(load_file(checkpoint / file).items())))
    losses = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    found["losses"] = digest(json.dumps(losses).encode())
    if not name.startswith("policy-"):
        coded = ["--latents"] if name in LATENTS else []
        fewstep("sample", run, "--count", 8, "--steps", 2, "--out", run / "samples.npz", *coded)
        with np.load(run / "samples.npz") as arrays:
            found["samples"] = digest(arrays["latents" if coded else "images"].tobytes())
    return found


def main(out: Positional[Path], against: Path | None = None, recipes: tuple[str, ...] = ()) -> None:
    """Train, hash, store in OUT, and compare with what is stored in AGAINST; all recipes unless some are named."""
    known = json.loads(against.read_text()) if against else {}
    listed = [line for line in fewstep("recipes").splitlines() if line and not line.startswith(" ")]
    names = recipes or sorted(listed, key=lambda name: name not in TEACHERS.values())
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for channels in {*LATENTS.values()}:
            make_latents(root, channels)
        fewstep("demos", "pointmaze-ring", "-n", 8, "--out", root / "ring.safetensors", "--quiet")
        for name in names:
            found[name] = digests(name, train(name, root))
            differ = [key for key, value in known.get(name, {}).items() if found[name].get(key) != value]
            print(
                f"{name:34} {'  '.join(found[name].values())}{'  DIFFER: ' * bool(differ)}{', '.join(differ)}",
                flush=True,
            )
            out.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(any(known.get(name, values) != values for name, values in found.items()))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
