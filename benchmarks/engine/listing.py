"""How long the first and the second start take over a folder of many small images that stay on disk."""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

import benchmarks.harness as h
from fewstep.data.listing import kept_listing
from fewstep.data.sources import DataConfig, ImagesSource, load_dataset

SIDE, CLASSES = 8, 200


def make_images(root: Path, count: int) -> None:
    """Tiny PNG files of a few contents in folders of classes, as old as an hour."""
    generator, contents = np.random.default_rng(0), []
    for number in range(16):
        Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(root / f"{number}.png")
        contents.append((root / f"{number}.png").read_bytes())
        (root / f"{number}.png").unlink()
    for number in range(count):
        folder = root / f"class-{number % CLASSES:03d}"
        if number < CLASSES:
            folder.mkdir()
        (folder / f"{number:08d}.png").write_bytes(contents[number % 16])
    then = time.time() - 3600
    for folder in (root, *root.iterdir()):
        os.utime(folder, (then, then))


def rows(count: int, rounds: int) -> Iterator[h.Row]:
    """The listing alone, in turns with the kept one, and a whole start: listing, headers, mean, deviation, digest."""
    with tempfile.TemporaryDirectory() as folder:
        root, cache = Path(folder, "images"), Path(folder, "cache")
        root.mkdir()
        make_images(root, count)
        before = os.environ.get("FEWSTEP_CACHE")
        os.environ["FEWSTEP_CACHE"] = str(cache)
        config = DataConfig(ImagesSource(on_disk=True), root=str(root), image_size=SIDE)
        jobs = {"the listing": lambda: kept_listing(str(root)), "a start": lambda: load_dataset(config)}
        try:
            for what, job in jobs.items():
                spent: list[list[float]] = [[], []]
                for _ in range(rounds if what == "the listing" else 1):
                    shutil.rmtree(cache, ignore_errors=True)
                    for each in spent:
                        start = time.perf_counter()
                        job()
                        each.append(time.perf_counter() - start)
                first, second = map(statistics.median, spent)
                ratio = statistics.median(b / a for a, b in zip(*spent, strict=True))
                yield {
                    "measure": "many files", "setting": f"{what} of {count:,} images, kept from the first time",
                    "value": round(ratio, 4), "unit": "times the first",
                    "beside": f"{first:,.1f} s, then {second:,.2f} s",
                }  # fmt: skip
        finally:
            os.environ.pop("FEWSTEP_CACHE")
            if before is not None:
                os.environ["FEWSTEP_CACHE"] = before
