"""MNIST's IDX files: a big-endian header (magic number, one size per axis), then bytes; often gzipped."""

import gzip
import math
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.data.base import Loaded, source_path
from fewstep.data.labels import numbered
from fewstep.data.npz import Range, in_range
from fewstep.utils.errors import DataError
from fewstep.utils.tensors import check_memory

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_UNSIGNED_BYTES = 0x08
_GZIP = b"\x1f\x8b"


def load_idx(root: str, value_range: Range = None) -> Loaded:
    """The images and labels of a folder in MNIST's layout, one channel of uint8; t10k files become the held-out part.

    An empty root means Fashion-MNIST where Debian's package dataset-fashion-mnist puts it. Labels are optional.
    Raises DataError, naming the file, for anything missing, truncated, or not what its name says.
    """
    folder = source_path(root) if root else FASHION_MNIST
    if not root and not folder.is_dir():
        raise DataError(
            "source 'idx' needs root, a folder in MNIST's IDX format; "
            f"Debian's package dataset-fashion-mnist brings one at {FASHION_MNIST}"
        )
    if not folder.is_dir():
        raise DataError(f"'{folder}' is not a folder: give root, a folder in MNIST's IDX format")
    folder = folder.resolve()
    images, labels = _part(folder, "train")
    if images is None:
        raise DataError(
            f"no train-images-idx3-ubyte or train-images-idx3-ubyte.gz in '{folder}': "
            "give root, a folder in MNIST's IDX format"
        )
    heldout, held_labels = _part(folder, "t10k")
    images, heldout, doubt = in_range(f"'{folder}'", value_range, images, heldout)
    return replace(numbered(folder.name, str(folder), (images, labels), (heldout, held_labels)), doubt=doubt)


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The uint8 tensor of `dimensions` axes in an IDX file, gzipped or not; raises DataError, naming the file.

    No more is read than the header announces.
    """
    header = 4 + 4 * dimensions
    expected = _UNSIGNED_BYTES << 8 | dimensions
    try:
        with path.open("rb") as plain:
            packed = plain.read(2) == _GZIP  # which the suffix of a download often does not tell
        with gzip.open(path) if packed else path.open("rb") as file:
            head = file.read(header)
            magic = int.from_bytes(head[:4], "big")
            if len(head) < header or magic != expected:
                raise DataError(
                    f"'{path}' begins with 0x{magic:08x} ({len(head)} bytes of a header of {header}): an IDX file "
                    f"of {dimensions} axes of unsigned bytes begins with 0x{expected:08x}; fetch it again"
                )
            shape = struct.unpack(f">{dimensions}I", head[4:])
            check_memory(math.prod(shape), f"'{path}', of announced shape {shape},", "take a part of it")
            content = file.read(math.prod(shape) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read '{path}': {error}; fetch it again") from error
    if len(content) != math.prod(shape):
        held = len(content) if packed else path.stat().st_size - header
        raise DataError(
            f"'{path}' announces {math.prod(shape)} values, shape {shape}, but holds {held}: fetch it again"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8).reshape(shape).copy())


def _part(folder: Path, part: str) -> tuple[Tensor | None, Tensor | None]:
    """Images (N, 1, H, W) and labels (N,) of one split, None where there are none."""

    def find(kind: str) -> Path | None:
        """Mirrors join stem and kind by '-' or '.', and gzip the file or not."""
        files = (folder / f"{part}-{kind.replace('-', joint)}-ubyte{gz}" for joint in "-." for gz in ("", ".gz"))
        return next((file for file in files if file.is_file()), None)

    images_path, labels_path = find("images-idx3"), find("labels-idx1")
    if images_path is None:
        return None, None
    images = read_idx(images_path, 3)[:, None]
    labels = None if labels_path is None else read_idx(labels_path, 1).long()
    if labels is not None and len(labels) != len(images):
        raise DataError(
            f"'{labels_path}' has {len(labels)} labels but '{images_path}' has {len(images)} images: "
            "take both from one data set"
        )
    return images, labels
