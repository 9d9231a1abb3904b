"""Damaged files of every kind that fewstep reads: one line and exit code 2, or success; never a traceback.

FEWSTEP_FUZZ=1000 damages a thousand of each kind in place of a few; FEWSTEP_FUZZ_SEED draws others.
"""

import gzip
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data.demonstrations.episodes import Demonstrations, save_demonstrations
from tests.data.test_idx import idx_bytes
from tests.support.commands import SMALL, Command
from tests.support.sources import bytes_of

COUNT = int(os.environ.get("FEWSTEP_FUZZ", "12"))
SEED = int(os.environ.get("FEWSTEP_FUZZ_SEED", "0"))
ODD = (None, True, -1, 0, 1, 3, 2.5, 1e30, 1e308, 2**70, -(2**63), "", "x", "../x", [], [0], {}, {"type": "MLPConfig"})
SUFFIXES = ("png", "jpg", "gif", "bmp", "tif", "webp", "tga", "ppm", "pcx", "sgi", "ico", "dds", "jp2")
BRIEF = (*SMALL, "--training.images", 8, "--training.batch-size", 8, "--training.sample-images", 0)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, dropped, repeated, or put in; or the end cut off."""
    for _ in range(draw.choice((1, 1, 2, 8))):
        place, size = draw.randrange(len(content) + 1), draw.choice((1, 2, 4, 30))
        head, tail = content[:place], content[place:]
        content = draw.choice((
            head + draw.randbytes(size) + tail[size:],
            head + tail[size:],
            head + tail[:size] + tail,
            head + draw.choice((b"\x00", b"\xff", b"9", b"-", b"}", b"\xed\xa0\x80")) * size + tail,
            head + bytes(byte ^ 1 << draw.randrange(8) for byte in tail[:1]) + tail[1:],
            head if draw.random() < 0.3 else content,
        )) or b"x"  # fmt: skip
    return content


def misstated(content: bytes, draw: random.Random) -> bytes:
    """JSON with one of its values, at any depth, dropped or replaced."""
    whole = json.loads(content)
    holder: Any = whole
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = draw.choice(keys)
        inner = holder[key]
        if not isinstance(inner, (dict, list)) or not inner or draw.random() < 0.2:
            break
        holder = inner
    if draw.random() < 0.2:
        del holder[key]
    else:
        holder[key] = draw.choice(ODD)
    return json.dumps(whole).encode()


def survives(command: Command, *words: object) -> None:
    shutil.rmtree("run", ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shown = command(*words)
    assert shown.code in (0, 2), shown
    assert "Traceback" not in shown.err + shown.out
    assert shown.code == 0 or shown.err.startswith("fewstep: ")


def archives(folder: Path) -> dict[str, bytes]:
    plain, packed = folder / "a.npz", folder / "b.npz"
    np.savez(plain, images=bytes_of((12, 4, 4)), labels=np.arange(12) % 3, heldout_images=bytes_of((4, 4, 4)),
             heldout_labels=np.arange(4) % 3)  # fmt: skip
    np.savez_compressed(packed, images=np.random.default_rng(0).normal(size=(12, 4, 4, 1)))
    return {file.name: file.read_bytes() for file in (plain, packed)}


def idx_files(folder: Path) -> dict[str, bytes]:
    images, labels = idx_bytes(bytes_of((12, 4, 4))), idx_bytes(np.arange(12, dtype=np.uint8) % 3)
    return {
        "train-images-idx3-ubyte": images,
        "train-labels-idx1-ubyte": labels,
        "t10k-images-idx3-ubyte.gz": gzip.compress(images),
        "t10k-labels-idx1-ubyte.gz": gzip.compress(labels),
    }


def pictures(folder: Path) -> dict[str, bytes]:
    images = {f"{name}.{name}": Image.fromarray(bytes_of((4, 4, 3), seed)) for seed, name in enumerate(SUFFIXES)}
    for name, image in images.items():
        image.save(folder / name)
    return {name: (folder / name).read_bytes() for name in images}


def demonstration_files(folder: Path) -> dict[str, bytes]:
    generator = torch.Generator().manual_seed(0)
    observations, actions = torch.rand(24, 3, generator=generator), torch.rand(24, 2, generator=generator)
    ends = torch.tensor([6, 12, 18, 24])
    found = Demonstrations(observations, actions, ends, "reach", (0.0, 0.0), (1.0, 1.0))
    return {name: save_demonstrations(found, folder / name).read_bytes() for name in ("a.npz", "b.safetensors")}


@pytest.mark.parametrize(
    ("source", "make"),
    [("npz", archives), ("idx", idx_files), ("images", pictures), ("demonstrations", demonstration_files)],
    ids=["npz", "idx", "images", "demonstrations"],
)
def test_damaged_data(source: str, make: Callable[[Path], dict[str, bytes]], command: Command) -> None:
    recipe = "policy-mlp" if source == "demonstrations" else "digits"
    Path("whole").mkdir()
    files = make(Path("whole"))
    for number in range(COUNT):
        draw = random.Random(f"{source} {SEED} {number}")
        name = draw.choice(list(files))
        shutil.rmtree("data", ignore_errors=True)
        Path("data").mkdir()
        for each, content in files.items():
            (Path("data") / each).write_bytes(damaged(content, draw) if each == name else content)
        root = Path("data") if source in ("idx", "images") else Path("data") / name
        survives(command, "train", recipe, "--data.source", source, "--data.root", root, "--out", "run", *BRIEF)


@pytest.mark.parametrize("name", ["config.json", "checkpoints/*/config.json"])
@pytest.mark.parametrize("damage", [damaged, misstated])
def test_damaged_configurations(
    name: str, damage: Callable[[bytes, random.Random], bytes], small_run: Path, command: Command
) -> None:
    run = Path(shutil.copytree(small_run, "copy"))
    file = sorted(run.glob(name))[-1]
    whole = file.read_bytes()
    for number in range(COUNT):
        file.write_bytes(damage(whole, random.Random(f"{name} {damage.__name__} {SEED} {number}")))
        survives(command, "sample", run, "--count", 1, "--steps", 1, "--out", "a.png", "--cpu")
