"""A folder of images in any format that Pillow reads; its first-level subfolders, if it has any, are the classes."""

import io
import os
import re
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from fewstep.data.base import Loaded, Samples, source_path
from fewstep.data.labels import natural_order, present_classes
from fewstep.utils.errors import DataError, FewstepWarning
from fewstep.utils.text import listed

# Of those that Pillow opens: EPS is a program that it hands to Ghostscript, the others need programs of their own.
_NO_IMAGES = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
_SPLITS = {"train", "test", "val", "valid", "validation"}
_GREY_MODES = {"1", "L", "LA"}
_BATCH = 256
_THREADS = 8
_FILES_WORTH_A_BAR = 2000
_FAILURES_NAMED = 10
_NO_FILE = re.compile(r"<_io\.BytesIO[^>]*>")

Pixels = npt.NDArray[np.uint8]
K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True)
class Listing:
    """The images under `root` by their paths, the class of each (or None), and in words what was left out of it.

    folders: all that were looked into.
    """

    root: Path
    files: Sequence[Path]
    labels: tuple[int, ...] | None
    class_names: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()


@cache
def _formats() -> tuple[tuple[str, ...], frozenset[str]]:
    """Pillow's names of the formats that are read, and their suffixes."""
    Image.init()
    formats = tuple(sorted(set(Image.OPEN) - _NO_IMAGES))
    return formats, frozenset(end for end, name in Image.registered_extensions().items() if name in formats)


def image_suffixes() -> frozenset[str]:
    """Of the files that are read as images, such as .png."""
    return _formats()[1]


def load_folder(root: str, image_size: int = 0, skip_unreadable: bool = False) -> Loaded:
    """All images as uint8 (N, C, H, W): C = 1 when every image is grey, otherwise 3.

    With image_size the shorter side is resized to it (Lanczos, antialiased) and the centre square kept; without, all
    images must have one size. Transparency is laid over white, EXIF orientation applied, 16 bits reduced to 8.
    Raises DataError for a missing or empty folder, sizes that differ, and unreadable files, which it names;
    with skip_unreadable those are a FewstepWarning instead.
    """
    listing = list_images(root)
    stacks: list[Path] = []
    with quiet_bombs():
        read = partial(decode_or_reason, image_size=image_size, stacks=stacks)
        pixels, kept, failures = decode_all(listing.files, read, str)
    left_out = [*listing.left_out, *[f"all frames but the first of {len(stacks)} images"] * bool(stacks)]
    if failures:
        named = [(str(path.relative_to(listing.root)), why) for path, why in failures]
        report_unreadable(named, str(listing.root), len(listing.files), skip_unreadable)
        left_out.append(f"{len(failures)} unreadable")
    labels = None if listing.labels is None else torch.tensor(listing.labels)[kept]
    names, (labels,) = present_classes(root, listing.class_names, [labels])
    return Loaded(listing.root.name, Samples(torch.from_numpy(pixels), labels), None, names, tuple(left_out))


def list_images(root: str) -> Listing:
    """Find the images under `root`, nested at any depth; hidden files and other files are counted and ignored.

    Raises DataError when the folder is missing, unreadable or without images, has images both beside and inside its
    subfolders, has two of these that are one, or holds splits (train, test) instead of classes.
    """
    folder = source_path(root)
    if not root or not folder.is_dir():
        raise DataError(f"source 'images' needs root, a folder of PNG, JPEG or other images: '{root}' is no folder")
    folder, (_, suffixes) = folder.resolve(), _formats()
    again: list[str] = []
    walked: list[Path] = []
    found = sorted((path.relative_to(folder) for path in _walk(folder, again, walked)), key=lambda path: path.parts)
    images = [path for path in found if path.suffix.lower() in suffixes and not path.name.startswith(".")]
    if not images:
        raise DataError(
            f"no PNG, JPEG or WebP images in '{folder}', nor any others that Pillow reads ({len(found)} other or "
            "hidden files ignored): give another root"
        )
    files = tuple(folder / path for path in images)
    labels, names = _classes(folder, images)
    left_out = _left_out(folder, set(found) - set(images), names, again)
    return Listing(folder, files, labels, names, left_out, tuple(walked))


def _left_out(folder: Path, others: set[Path], class_names: tuple[str, ...], again: list[str]) -> tuple[str, ...]:
    """Other files by their kinds, subfolders that are no class, links to folders that are read already."""
    kinds = Counter(
        "hidden" if path.name.startswith(".") else path.suffix.lower() or "without suffix" for path in others
    )
    found = [f"{count} {kind}" for kind, count in sorted(kinds.items())]
    folders = [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    if empty := sorted(set(folders) - set(class_names), key=natural_order):
        found.append(f"{len(empty)} folders without images ({listed(empty)})")
    return tuple(found + [f"{len(again)} links to folders that are read already"] * bool(again))


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
    names = tuple(sorted({path.parts[0] for path in images}, key=natural_order))
    if set(map(str.lower, names)) <= _SPLITS:
        raise DataError(
            f"the subfolders of '{folder}' are splits, not classes ({', '.join(sorted(names))}): give one of them as "
            "root"
        )
    number = {name: index for index, name in enumerate(names)}
    return tuple(number[path.parts[0]] for path in images), names


def grey_or_reason(path: Path | io.BytesIO) -> bool | str:
    """Whether an image is grey, by its header alone; or why it is none."""
    try:
        with Image.open(path, formats=_formats()[0]) as file:
            return file.mode in _GREY_MODES or file.mode.startswith("I")
    except Exception as error:  # as in decode_or_reason
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def decode(path: Path | io.BytesIO, image_size: int = 0, stacks: list[Path] | None = None) -> Pixels:
    """One image, of a file or its content, as uint8 (H, W) when grey or (H, W, 3), upright and opaque; image_size
    square unless that is 0.

    Of several frames it is the first one, and the path is added to `stacks`. Raises what Pillow raises for a file that
    it cannot read, or that has more pixels than it takes for sound.
    """
    with Image.open(path, formats=_formats()[0]) as file:
        if Image.MAX_IMAGE_PIXELS and file.width * file.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"it has {file.width}x{file.height} pixels")
        if stacks is not None and getattr(file, "is_animated", False) and file.format != "MPO":  # MPO: a photograph
            stacks.append(Path(str(path)))
        image = _opaque(_eight_bits(ImageOps.exif_transpose(file)))
    if image_size:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)
    return np.array(image, dtype=np.uint8)


def _walk(folder: Path, again: list[str], walked: list[Path]) -> Iterator[Path]:
    """Every file below `folder`; follows links to folders, each real folder once; hidden folders are left out.

    again: gets the links to folders that are read already; walked: all folders and these links. Raises DataError for
    folders that cannot be listed, and for two folders directly in `folder` that are one.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot list '{error.filename}': {error.strerror}; make it readable") from error

    seen: dict[str, str] = {}
    for current, subfolders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(current)
        walked.append(Path(current))
        if real in seen:
            if {Path(current).parent, Path(seen[real]).parent} == {folder}:
                raise DataError(f"'{current}' and '{seen[real]}' are one folder: leave one of the two classes out")
            again.append(current)
            subfolders.clear()
            continue
        seen[real] = current
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(current, name) for name in files)


def decode_all(
    images: Sequence[K], read: Callable[[K], Pixels | str], name: Callable[[K], str]
) -> tuple[Pixels, list[int], list[tuple[K, str]]]:
    """Pixels (n, C, H, W) of the readable images, their positions among all, and the others with their reasons.

    images: files or numbers; read: what gives an image's pixels, or why there are none; name: for messages.
    """
    canvas: Pixels | None = None
    kept: list[int] = []
    failures: list[tuple[K, str]] = []
    grey = True
    results = chain.from_iterable(read_ahead(read, batches_of(images)))
    for position, result in enumerate(with_bar(results, "reading images", len(images))):
        if isinstance(result, str):
            failures.append((images[position], result))
            continue
        if canvas is None:
            try:  # room for all as colour images, filled in place so that they never lie in memory twice
                canvas = np.empty((len(images), 3, *result.shape[:2]), np.uint8)
            except MemoryError as error:
                raise DataError(
                    f"{len(images)} images of {_size(result.shape)} pixels do not fit into memory: "
                    "set a smaller image_size"
                ) from error
        if result.shape[:2] != canvas.shape[2:]:
            raise DataError(
                f"'{name(images[position])}' has {_size(result.shape)} pixels but '{name(images[kept[0]])}' has "
                f"{_size(canvas.shape[2:])}: set image_size to bring all images to one size"
            )
        grey = grey and result.ndim == 2
        canvas[len(kept)] = result if result.ndim == 2 else result.transpose(2, 0, 1)
        kept.append(position)
    if canvas is None:
        return np.empty((0, 3, 0, 0), np.uint8), kept, failures
    pixels = canvas[: len(kept)]
    return (np.ascontiguousarray(pixels[:, :1]) if grey else pixels), kept, failures


def batches_of(images: Sequence[K]) -> Iterator[Sequence[K]]:
    """Some hundreds at a time, in order, for `read_ahead`."""
    return (images[start : start + _BATCH] for start in range(0, len(images), _BATCH))


def with_bar(results: Iterable[T], what: str, count: int) -> Iterable[T]:
    """The results, with a progress bar where there are many."""
    return tqdm(results, what, count, disable=count <= _FILES_WORTH_A_BAR)


def read_ahead(read: Callable[[K], T], batches: Iterable[Sequence[K]]) -> Iterator[list[T]]:
    """What `read` makes of each batch of files or numbers, in order; two batches are read ahead."""
    waiting: deque[Iterator[T]] = deque()
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for batch in batches:
            waiting.append(pool.map(read, batch))
            if len(waiting) > 2:
                yield list(waiting.popleft())
        yield from map(list, waiting)


@contextmanager
def quiet_bombs() -> Iterator[None]:
    """Inside, Pillow does not warn of large images: `decode` refuses them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def decode_or_reason(path: Path | io.BytesIO, image_size: int, stacks: list[Path] | None = None) -> Pixels | str:
    """What `decode` gives, or why it gives nothing."""
    try:
        return decode(path, image_size, stacks)
    except Exception as error:  # what Pillow raises differs by format and by where the damage lies
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def without_address(reason: str) -> str:
    """Why an image's content is none, without the address that it had in memory."""
    return _NO_FILE.sub("what lies there", reason)


def report_unreadable(failures: list[tuple[str, str]], place: str, count: int, skip: bool) -> None:
    """Name the unreadable images in a warning; in a DataError unless they may be skipped and others are left.

    failures: names and reasons. count: of all images there.
    """
    named = "; ".join(f"'{name}' ({why})" for name, why in failures[:_FAILURES_NAMED])
    more = f"; and {len(failures) - _FAILURES_NAMED} more" if len(failures) > _FAILURES_NAMED else ""
    message = f"{len(failures)} of {count} images in '{place}' cannot be read: {named}{more}"
    if not skip:
        raise DataError(f"{message}: mend or remove them, or set skip_unreadable")
    if len(failures) == count:
        raise DataError(f"{message}: no image is left")
    warnings.warn(f"{message}: they are skipped", FewstepWarning, stacklevel=3)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Sixteen-bit grey, which Pillow opens as I;16 or I, as eight bits; other modes unchanged, floats refused."""
    if image.mode == "F":
        raise ValueError("its pixels are floats, which tell no range: save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values: npt.NDArray[Any] = np.asarray(image).astype(np.int64)
    if image.mode == "I" and (values.min() < 0 or 0 < values.max() <= 255 or values.max() > 65535):
        raise ValueError("its pixels are of 32 bits, which tell no range: save it with 8 or 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _opaque(image: Image.Image) -> Image.Image:
    """The image over white, as L when it is grey and as RGB otherwise."""
    grey = image.mode in _GREY_MODES
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if grey else "RGB")


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"
