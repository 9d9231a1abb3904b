"""A folder of PNG, JPEG or WebP images; its first-level subfolders, if it has any, are the classes."""

import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from fewstep.data.base import Loaded, Samples, source_path
from fewstep.utils.errors import DataError, FewstepWarning

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
_FORMATS = ("PNG", "JPEG", "WEBP")
_SPLITS = {"train", "test", "val", "valid", "validation"}
_GREY_MODES = {"1", "L", "LA"}
_BATCH = 256
_THREADS = 8
_FILES_WORTH_A_BAR = 2000
_FAILURES_NAMED = 10
# What Pillow raises on broken files differs by format and by where the damage lies.
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Listing:
    """The images under `root` by their paths, the class of each (or None), and how many other files were ignored."""

    root: Path
    files: tuple[Path, ...]
    labels: tuple[int, ...] | None
    class_names: tuple[str, ...]
    ignored: int


def load_folder(root: str, image_size: int = 0, skip_unreadable: bool = False) -> Loaded:
    """All images as uint8 (N, C, H, W): C = 1 when every image is grey, otherwise 3.

    With image_size the shorter side is resized to it (Lanczos, antialiased) and the centre square kept; without, all
    images must have one size. Transparency is laid over white, EXIF orientation applied, 16 bits reduced to 8.
    Raises DataError for a missing or empty folder, sizes that differ, and unreadable files, which it names;
    with skip_unreadable those are a FewstepWarning instead.
    """
    listing = list_images(root)
    pixels, kept, failures = _decode_all(listing.files, image_size)
    if failures:
        report_unreadable(failures, listing, skip_unreadable)
    labels = None if listing.labels is None else torch.tensor(listing.labels)[kept]
    return Loaded(listing.root.name, Samples(torch.from_numpy(pixels), labels), None, listing.class_names)


def list_images(root: str) -> Listing:
    """Find the images under `root`, nested at any depth; hidden files and other files are counted and ignored.

    Raises DataError when the folder is missing, unreadable or without images, has images both beside and inside its
    subfolders, or holds splits (train, test) instead of classes.
    """
    folder = source_path(root)
    if not root or not folder.is_dir():
        raise DataError(f"source 'images' needs root, a folder of PNG, JPEG or WebP images: '{root}' is no folder")
    folder = folder.resolve()
    found = sorted((path.relative_to(folder) for path in _walk(folder)), key=lambda path: path.parts)
    images = [path for path in found if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")]
    ignored = len(found) - len(images)
    if not images:
        raise DataError(
            f"no PNG, JPEG or WebP images in '{folder}' ({ignored} other or hidden files ignored): give another root"
        )
    files = tuple(folder / path for path in images)
    labels, names = _classes(folder, images)
    return Listing(folder, files, labels, names, ignored)


def _classes(folder: Path, images: list[Path]) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """The class of each path, by its first part, and the classes' names; None when all images lie in `folder`."""
    loose = [path for path in images if len(path.parts) == 1]
    if len(loose) == len(images):
        return None, ()
    if loose:
        raise DataError(
            f"'{folder}' has {len(loose)} images beside its subfolders, such as '{loose[0]}', and "
            f"{len(images) - len(loose)} inside: put all into one subfolder per class, or all into '{folder}'"
        )
    names = tuple(sorted({path.parts[0] for path in images}))
    if set(map(str.lower, names)) <= _SPLITS:
        raise DataError(
            f"the subfolders of '{folder}' are splits, not classes ({', '.join(names)}): give one of them as root"
        )
    number = {name: index for index, name in enumerate(names)}
    return tuple(number[path.parts[0]] for path in images), names


def decode(path: Path, image_size: int = 0) -> Pixels:
    """One image as uint8 (H, W) when grey or (H, W, 3), upright, opaque, and image_size square unless that is 0.

    Raises what Pillow raises for a file that it cannot read.
    """
    with Image.open(path, formats=_FORMATS) as file:
        image = _opaque(_eight_bits(ImageOps.exif_transpose(file)))
    if image_size:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)
    return np.array(image, dtype=np.uint8)


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below `folder`; follows links to folders, each real folder once; hidden folders are left out."""
    seen: set[str] = set()
    for current, subfolders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(current)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(current, name) for name in files)


def _refuse(error: OSError) -> None:
    raise DataError(f"cannot list '{error.filename}': {error.strerror}; make it readable") from error


def _decode_all(files: tuple[Path, ...], image_size: int) -> tuple[Pixels, list[int], list[tuple[Path, str]]]:
    """Pixels (n, C, H, W) of the readable files, their positions among all files, and the others with their reasons."""
    canvas: Pixels | None = None
    kept: list[int] = []
    failures: list[tuple[Path, str]] = []
    grey = True
    for position, result in enumerate(_decoded(files, image_size)):
        if isinstance(result, str):
            failures.append((files[position], result))
            continue
        if canvas is None:
            canvas = _canvas(len(files), result.shape[:2])
        if result.shape[:2] != canvas.shape[2:]:
            raise DataError(
                f"'{files[position]}' has {_size(result.shape[:2])} pixels but '{files[kept[0]]}' has "
                f"{_size(canvas.shape[2:])}: set image_size to bring all images to one size"
            )
        grey = grey and result.ndim == 2
        canvas[len(kept)] = result if result.ndim == 2 else result.transpose(2, 0, 1)
        kept.append(position)
    if canvas is None:
        return np.empty((0, 3, 0, 0), np.uint8), kept, failures
    pixels = canvas[: len(kept)]
    return (np.ascontiguousarray(pixels[:, :1]) if grey else pixels), kept, failures


def _canvas(count: int, shape: tuple[int, ...]) -> Pixels:
    """Room for `count` colour images, filled in place so that they never lie in memory twice."""
    try:
        return np.empty((count, 3, *shape), np.uint8)
    except MemoryError as error:
        raise DataError(
            f"{count} images of {_size(shape)} pixels do not fit into memory: set a smaller image_size"
        ) from error


def _decoded(files: tuple[Path, ...], image_size: int) -> Iterator[Pixels | str]:
    """Each file's pixels, or why it has none, in order; a bounded number is decoded ahead."""
    threads = min(_THREADS, os.cpu_count() or 1)
    quiet = len(files) <= _FILES_WORTH_A_BAR
    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(files), desc="reading images", disable=quiet) as bar:
        for start in range(0, len(files), _BATCH):
            batch = files[start : start + _BATCH]
            yield from pool.map(partial(decode_or_reason, image_size=image_size), batch)
            bar.update(len(batch))


def decode_or_reason(path: Path, image_size: int) -> Pixels | str:
    """What `decode` gives, or why it gives nothing."""
    try:
        return decode(path, image_size)
    except _UNREADABLE as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def report_unreadable(failures: list[tuple[Path, str]], listing: Listing, skip: bool) -> None:
    """Name the unreadable files in a warning; in a DataError unless they may be skipped and others are left."""
    named = "; ".join(f"'{path.relative_to(listing.root)}' ({why})" for path, why in failures[:_FAILURES_NAMED])
    more = f"; and {len(failures) - _FAILURES_NAMED} more" if len(failures) > _FAILURES_NAMED else ""
    message = f"{len(failures)} of {len(listing.files)} images in '{listing.root}' cannot be read: {named}{more}"
    if not skip:
        raise DataError(f"{message}: mend or remove them, or set skip_unreadable")
    if len(failures) == len(listing.files):
        raise DataError(f"{message}: no image is left")
    warnings.warn(f"{message}: they are skipped", FewstepWarning, stacklevel=3)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Sixteen-bit grey, which Pillow opens as I;16 or I, as eight bits; other modes unchanged."""
    if not image.mode.startswith("I"):
        return image
    values: npt.NDArray[Any] = np.asarray(image).astype(np.int64).clip(0, 65535)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _opaque(image: Image.Image) -> Image.Image:
    """The image over white, as L when it is grey and as RGB otherwise."""
    grey = image.mode in _GREY_MODES
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if grey else "RGB")


def _size(shape: tuple[int, ...]) -> str:
    height, width = shape
    return f"{width}x{height}"
