"""MNIST's IDX files: a big-endian header (magic number, one size per axis), then bytes; often gzipped."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.data.base import Loaded, Samples, source_path
from fewstep.data.labels import numbered_classes
from fewstep.utils.errors import DataError

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_UNSIGNED_BYTES = 0x08


def load_idx(root: str) -> Loaded:
    """The images and labels of a folder in MNIST's layout, one channel of uint8; t10k files become the held-out part.

    An empty root means Fashion-MNIST where Debian's package dataset-fashion-mnist puts it. Labels are optional.
    Raises DataError, naming the file, for anything missing, truncated, or not what its name says.
    """
    folder = _folder(root)
    train = _part(folder, "train")
    if train is None:
        raise DataError(
            f"no train-images-idx3-ubyte or train-images-idx3-ubyte.gz in '{folder}': "
            "give root, a folder in MNIST's IDX format"
        )
    heldout = _part(folder, "t10k")
    names = numbered_classes(str(folder), train.labels, None if heldout is None else heldout.labels)
    return Loaded(folder.name, train, heldout, names)


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The uint8 tensor of `dimensions` axes in an IDX file, gzipped or not; raises DataError, naming the file."""
    content = _read(path)
    header = 4 + 4 * dimensions
    expected = _UNSIGNED_BYTES << 8 | dimensions
    magic = int.from_bytes(content[:4], "big")
    if len(content) < header or magic != expected:
        raise DataError(
            f"'{path}' begins with 0x{magic:08x} and has {len(content)} bytes: an IDX file of {dimensions} axes of "
            f"unsigned bytes begins with 0x{expected:08x}; fetch it again"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise DataError(
            f"'{path}' announces {math.prod(shape)} values, shape {shape}, but holds {len(content) - header}: "
            "fetch it again"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())


def _folder(root: str) -> Path:
    if root:
        folder = source_path(root)
    elif FASHION_MNIST.is_dir():
        folder = FASHION_MNIST
    else:
        raise DataError(
            "source 'idx' needs root, a folder in MNIST's IDX format; "
            f"Debian's package dataset-fashion-mnist brings one at {FASHION_MNIST}"
        )
    if not folder.is_dir():
        raise DataError(f"'{folder}' is not a folder: give root, a folder in MNIST's IDX format")
    return folder.resolve()


def _part(folder: Path, part: str) -> Samples | None:
    """One split, or None when it has no images."""
    images_path = _find(folder, f"{part}-images", "idx3-ubyte")
    labels_path = _find(folder, f"{part}-labels", "idx1-ubyte")
    if images_path is None:
        return None
    images = read_idx(images_path, 3)[:, None]
    if labels_path is None:
        return Samples(images)
    labels = read_idx(labels_path, 1).long()
    if len(labels) != len(images):
        raise DataError(
            f"'{labels_path}' has {len(labels)} labels but '{images_path}' has {len(images)} images: "
            "take both from one data set"
        )
    return Samples(images, labels)


def _find(folder: Path, stem: str, kind: str) -> Path | None:
    """Mirrors join stem and kind by '-' or '.', and gzip the file or not."""
    names = (f"{stem}{joint}{kind}{suffix}" for joint in "-." for suffix in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read(path: Path) -> bytes:
    """The content; gzip is told by its first bytes, since downloads often keep a wrong suffix."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read '{path}': {error}; fetch it again") from error
