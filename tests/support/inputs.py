"""Small inputs that go wrong easily: classes out of order, unequal or sorted, few images, other formats, arrays to
misread, actions at rest.
"""

from pathlib import Path

import numpy as np
from PIL import Image


def grey(value: float, side: int = 8, count: int = 1, noise: float = 6) -> np.ndarray:
    """Noisy pictures (count, side, side) of about one brightness."""
    drawn = np.random.default_rng(int(value)).normal(0, noise, (count, side, side))
    return np.clip(value + drawn, 0, 255).astype(np.uint8)


def save_image(path: Path, value: float, side: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grey(value, side)[0]).save(path)


def numbered_folders(folder: Path, classes: int = 12, count: int = 5) -> Path:
    """Classes 1, 2, ..., brighter and brighter: in the order of their letters 10 comes before 2."""
    for name in range(1, classes + 1):
        for index in range(count):
            save_image(folder / str(name) / f"{index}.png", 20 * name)
    return folder


def labelled_archive(file: Path, *labels: int, count: int = 60) -> Path:
    """So many pictures of each of these labels, each class brighter than the one before."""
    images = np.concatenate([grey(70 * (k + 1), count=count) for k in range(len(labels))])
    np.savez(file, images=images, labels=np.repeat(labels, count))
    return file


def unequal_classes(file: Path, dark: int = 950, bright: int = 50) -> Path:
    """Two classes, one of them rare."""
    images = np.concatenate([grey(60, count=dark, noise=25), grey(200, count=bright, noise=25)])
    np.savez(file, images=images, labels=np.repeat([0, 1], [dark, bright]))
    return file


def sorted_classes(folder: Path, classes: int, count: int) -> Path:
    """A folder for every class, of one brightness each: in the order of its files a set is sorted by class."""
    for name in range(classes):
        for index, image in enumerate(grey(20 + 22 * name, count=count)):
            path = folder / f"c{name}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return folder


def few_images(file: Path, count: int) -> Path:
    """As many images as that, without classes."""
    np.savez(file, images=np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8))
    return file


def other_formats(folder: Path) -> Path:
    """Ten PNGs, 90 BMPs and 50 TIFFs, and three files that are no images."""
    for count, suffix in ((10, "png"), (90, "bmp"), (50, "tif")):
        for index in range(count):
            save_image(folder / f"{suffix}{index}.{suffix}", 60 + index, side=16)
    for name in ("a.txt", "b.txt", ".hidden.png"):
        (folder / name).write_text("no image")
    return folder


def demonstrations(file: Path, constant: float = 0.3, **changes: object) -> Path:
    """Twenty straight ways to a goal, 40 steps each: two actions that move, and one that never does."""
    steps, goals = 40, np.random.default_rng(0).uniform(-1, 1, (20, 2))
    shares = np.linspace(0, 1, steps + 1)[:-1, None]
    states = [np.concatenate([shares * goal, np.repeat(goal[None], steps, 0)], 1) for goal in goals]
    moves = np.repeat(goals / steps, steps, 0)
    arrays = {
        "observations": np.concatenate(states).astype(np.float32),
        "actions": np.concatenate([moves, np.full((len(moves), 1), constant)], 1).astype(np.float32),
        "episode_ends": (np.arange(20) + 1) * steps,
    }
    np.savez(file, **(arrays | changes))
    return file
