"""NumPy archives of images or latents."""

import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fewstep.data.base import Loaded, Samples, source_path
from fewstep.data.labels import numbered_classes
from fewstep.utils.errors import DataError

Layout = Literal["auto", "chw", "hwc"]
# What numpy and zipfile raise on broken or foreign archives: RuntimeError is encryption or an unknown compression,
# SyntaxError and TokenError are an array's header, MemoryError is a header that announces too much.
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    MemoryError,
    SyntaxError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def load_npz(root: str, layout: Layout = "auto") -> Loaded:
    """The arrays of an .npz file: `images` (or the only one), perhaps `labels`, `heldout_images` and `heldout_labels`.

    Images are (N, H, W), (N, H, W, C) or (N, C, H, W), see `channels_first`; uint8 stands for [-1, 1], floats are taken
    as they are. Raises DataError, naming the file and the array, for pickles and for what cannot be such data.
    """
    path = source_path(root)
    if not root or not path.is_file():
        raise DataError(f"source 'npz' needs root, an .npz file with an array 'images': '{root}' is no file")
    arrays = _read(path)
    key = "images" if "images" in arrays or len(arrays) != 1 else next(iter(arrays))
    if key not in arrays:
        found = ", ".join(sorted(arrays)) or "nothing"
        raise DataError(f"'{path}' has no array 'images' among its arrays ({found}): name it so")
    images = _images(path, key, arrays[key], layout)
    train = Samples(images, _labels(path, "labels", arrays, len(images)))
    heldout = None
    if "heldout_images" in arrays:
        images = _images(path, "heldout_images", arrays["heldout_images"], layout)
        heldout = Samples(images, _labels(path, "heldout_labels", arrays, len(images)))
    names = numbered_classes(str(path), train.labels, None if heldout is None else heldout.labels)
    return Loaded(path.stem, train, heldout, names)


def channels_first(images: Tensor, layout: Layout, where: str) -> Tensor:
    """Images as (N, C, H, W): a last axis of 1 or 3 means channels last, otherwise an axis 1 of at most 16 means first.

    Raises DataError, naming `where`, when neither holds, or when both do and the other reading looks as likely (square
    images, or 1 or 3 channels); `layout` "chw" or "hwc" then says which.
    """
    if images.ndim == 3:
        return images[:, None]
    if images.ndim != 4:
        raise DataError(f"{where} has shape {tuple(images.shape)}: give (N, H, W), (N, H, W, C) or (N, C, H, W)")
    _, first, middle, last = images.shape
    may_be_last, may_be_first = last in (1, 3), 1 <= first <= 16
    if layout == "auto" and may_be_last and may_be_first and (middle == last or first in (1, 3)):
        raise DataError(f"{where} has shape {tuple(images.shape)}, which is ambiguous: set npz_layout to chw or hwc")
    if layout == "auto" and not (may_be_last or may_be_first):
        raise DataError(
            f"{where} has shape {tuple(images.shape)}, where no axis looks like channels: set npz_layout to chw or hwc"
        )
    last_is_channels = may_be_last if layout == "auto" else layout == "hwc"
    return images.permute(0, 3, 1, 2).contiguous() if last_is_channels else images


def _read(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        archive = np.load(path, allow_pickle=False)
    except _UNREADABLE as error:
        raise DataError(f"'{path}' is no .npz archive (pickles are refused): write it with numpy.savez") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise DataError(f"'{path}' holds one bare array: write it with numpy.savez('{path.stem}.npz', images=...)")
    with archive:
        return {key: _array(path, archive, key) for key in archive.files}


def _array(path: Path, archive: np.lib.npyio.NpzFile, key: str) -> npt.NDArray[Any]:
    try:
        return np.asarray(archive[key])
    except _UNREADABLE as error:
        raise DataError(
            f"cannot read array '{key}' of '{path}': {' '.join(str(error).split())}; "
            "arrays of Python objects are refused, write plain uint8 or float arrays"
        ) from error


def _images(path: Path, key: str, array: npt.NDArray[Any], layout: Layout) -> Tensor:
    where = f"array '{key}' of '{path}'"
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise DataError(f"{where} is {array.dtype}: give uint8 (0..255) or floats")
    if array.dtype == np.uint8:
        return channels_first(torch.from_numpy(array), layout, where)
    with np.errstate(over="ignore"):
        images = channels_first(torch.from_numpy(array.astype(np.float32)), layout, where)
    finite = images.flatten(1).isfinite().all(1)
    if not bool(finite.all()):
        raise DataError(
            f"{where} has NaN or infinite values as float32, first in sample {int((~finite).nonzero()[0])}: "
            "remove or mend them"
        )
    return images


def _labels(path: Path, key: str, arrays: dict[str, npt.NDArray[Any]], count: int) -> Tensor | None:
    if key not in arrays:
        return None
    array = arrays[key]
    if array.dtype.kind not in "iu" or array.shape != (count,):
        raise DataError(
            f"array '{key}' of '{path}' is {array.dtype} of shape {array.shape}: "
            f"give one integer per image, shape ({count},)"
        )
    return torch.from_numpy(array.astype(np.int64))
