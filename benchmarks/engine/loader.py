"""Images a second of batches that are decoded from files, by processes of their own or not, over the bare decoder's."""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import benchmarks.harness as h
import fewstep as fs
from fewstep.data.folder import decode
from fewstep.data.sources import DataConfig, ImagesSource, load_dataset
from fewstep.networks.unet import UNetConfig
from fewstep.recipes import recipe
from fewstep.training import Callbacks
from fewstep.training.loader import Loader, Shares
from fewstep.training.loop import Trainer

COUNT, SIDE, CUT, BATCH, BATCHES = 256, 256, 64, 32, 32
WORKERS = (0, 1, 2)


def make_images(root: Path) -> None:
    """Smooth random pictures as JPEG, two classes of them."""
    generator = np.random.default_rng(0)
    for index in range(COUNT):
        file = root / f"class-{index % 2}" / f"{index:04d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, quality=90)


def bare(files: list[Path]) -> None:
    """The decoder alone, in one thread."""
    for file in itertools.islice(itertools.cycle(files), BATCH * BATCHES):
        decode(file, CUT)


class Reading:
    """A loader that goes on where it was, as in a run."""

    def __init__(self, data: fs.Dataset, workers: int) -> None:
        settings = replace(recipe("photos-64").training, batch_size=BATCH)
        self.loader, self.step = Loader(Shares(data.train, settings, 0, BATCH, 1), torch.device("cpu"), workers), 0

    def __call__(self) -> None:
        for _ in range(BATCHES):
            self.loader.batch(self.step, 0)
            self.step += 1


def wait_share(data: fs.Dataset, config: DataConfig, workers: int, folder: Path) -> float:
    """The share of a small U-Net's training that is spent in wait for data, after three steps that warm up."""
    own = recipe("photos-64")
    network, training = UNetConfig(width=16, multipliers=(1, 2), blocks=1), replace(own.training, batch_size=BATCH)
    own = replace(own, data=config, network=network, training=training)
    runtime = fs.Runtime(cpu=True, quiet=True, threads=1, workers=workers)
    with Trainer(own, data, fs.RunFolder(folder), runtime, Callbacks()) as trainer:
        for _ in range(3):
            trainer.take_step()
        trainer.loader.wait_of(1.0)
        start = time.perf_counter()
        for _ in range(8):
            trainer.take_step()
        return trainer.loader.wait_of(time.perf_counter() - start)


def rows(rounds: int) -> Iterator[h.Row]:
    """A row for each number of processes: speed over the bare decoder's, and the wait of a run."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_images(root / "images")
        config = DataConfig(ImagesSource(on_disk=True), root=str(root / "images"), image_size=CUT, heldout=0.1)
        data, files = load_dataset(config), sorted((root / "images").rglob("*.jpg"))
        reading = {workers: Reading(data, workers) for workers in WORKERS}
        jobs: dict[str, Callable[[], None]] = {"bare": partial(bare, files)}
        jobs |= {str(workers): each for workers, each in reading.items()}
        spent = h.take_turns(jobs, rounds)
        for each in reading.values():
            each.loader.close()
        pictures = f"JPEG of {SIDE} x {SIDE} cut to {CUT}"
        for workers in WORKERS:
            found = h.time_ratio(spent["bare"], spent[str(workers)])
            rate = BATCH * BATCHES / (sum(spent["bare"]) / rounds)
            yield {
                "measure": "loader, images a second", "setting": f"{pictures}, {workers} workers",
                "value": found["ratio"], "unit": "times the bare decoder's", "beside": f"{rate:,.0f} in one thread",
            }  # fmt: skip
            share = wait_share(data, config, workers, root / f"run-{workers}")
            yield {
                "measure": "loader, share of a run in wait for data", "setting": f"small U-Net, {workers} workers",
                "value": round(share, 3), "unit": "of a step", "beside": pictures,
            }  # fmt: skip
