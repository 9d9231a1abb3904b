"""NumPy archives of images, videos or latents."""

import tokenize
import zipfile
import zlib
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fewstep.data.base import Loaded, source_path
from fewstep.data.labels import numbered
from fewstep.utils.errors import DataError
from fewstep.utils.tensors import check_memory

Layout = Literal["auto", "chw", "hwc", "rgba"]
Range = tuple[float, float] | None
_ARRAYS = ("images", "labels", "heldout_images", "heldout_labels")
_FEW_LEVELS = 16  # bytes that go no higher are hardly meant as 0..255
_RARE = 1000  # of so many values one on either side may be far from the others
_STRAY = 3  # widths of those others
_LOOKED_AT = 1 << 20
_EDGE = 1e-3
_LARGEST = 1e9  # beyond it, squares of float32 soon overflow
_CONTENT = (OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)  # encrypted, packed otherwise
_HEADER = (ValueError, TypeError, SyntaxError, tokenize.TokenError, MemoryError)  # an array's, or what it announces
_UNREADABLE = (*_CONTENT, *_HEADER)


def load_npz(root: str, layout: Layout = "auto", value_range: Range = None) -> Loaded:
    """The arrays of an .npz file: `images` (or the only one), perhaps `labels`, `heldout_images` and `heldout_labels`.

    Images are (N, H, W), (N, H, W, C) or (N, C, H, W), videos (N, T, H, W, C) or (N, C, T, H, W), see
    `channels_first`; for their values see `in_range`. Raises
    DataError, naming the file and the array, for pickles and for what cannot be such data.
    """
    path = source_path(root)
    if not root or not path.is_file():
        raise DataError(f"source 'npz' needs root, an .npz file with an array 'images': '{root}' is no file")
    arrays = read_arrays(path, _ARRAYS)
    key = "images" if "images" in arrays or len(arrays) != 1 else next(iter(arrays))
    if key not in arrays:
        found = ", ".join(sorted(arrays)) or "nothing"
        raise DataError(f"'{path}' has no array 'images' among its arrays ({found}): name it so")
    images, doubt = _images(path, key, arrays[key], layout)
    labels, heldout, held_labels = _labels(path, "labels", arrays, len(images)), None, None
    if "heldout_images" in arrays:
        heldout, _ = _images(path, "heldout_images", arrays["heldout_images"], layout)
        held_labels = _labels(path, "heldout_labels", arrays, len(heldout))
    images, heldout, values = in_range(f"array '{key}' of '{path}'", value_range, images, heldout)
    left_out = tuple(f"array {name}" for name in arrays if name != key and name not in _ARRAYS)
    loaded = numbered(path.stem, str(path), (images, labels), (heldout, held_labels))
    return replace(loaded, left_out=left_out, doubt=doubt or values)


def channels_first(images: Tensor, layout: Layout, where: str) -> tuple[Tensor, str]:
    """Images as (N, C, H, W), videos as (N, C, T, H, W), and what is doubtful about it.

    A last axis of 1 or 3 means channels last, otherwise an axis 1 of at most 16 means first: doubtful where a last axis
    of 2 or 4 may be grey or colours with their opacity. Raises DataError, naming `where`, when neither holds, or when
    both do and the other reading looks as likely (square images, or 1 or 3 channels); `layout` "chw" or "hwc" then says
    which, or "rgba": colours (N, H, W, 4) to be laid over white.
    """
    if images.ndim == 3:
        return images[:, None], ""
    if images.ndim not in (4, 5):
        raise DataError(
            f"{where} has shape {tuple(images.shape)}: give (N, H, W), (N, H, W, C) or (N, C, H, W), of videos "
            "(N, T, H, W, C) or (N, C, T, H, W)"
        )
    if layout == "rgba":
        return _over_white(images, where), ""
    _, first, *_, middle, last = images.shape
    may_be_last, may_be_first, doubt = last in (1, 3), 1 <= first <= 16, ""
    if layout == "auto":
        asked = "set --data.npz-layout (npz_layout) to chw or hwc" + ", or to rgba to lay it over white" * (last == 4)
        shown = f"{where} has shape {tuple(images.shape)}"
        if may_be_last and may_be_first and (middle == last or first in (1, 3)):
            raise DataError(f"{shown}, which is ambiguous: {asked}")
        if last in (2, 4) and not middle == last != first:
            doubt = f"{shown}, which may be {last} channels: {asked}"
        if not (may_be_last or may_be_first):
            raise DataError(doubt or f"{shown}, where no axis looks like channels: {asked}")
    last_is_channels = may_be_last if layout == "auto" else layout == "hwc"
    return images.movedim(-1, 1).contiguous() if last_is_channels else images, doubt


def in_range(
    where: str, value_range: Range, images: Tensor, heldout: Tensor | None
) -> tuple[Tensor, Tensor | None, str]:
    """Both parts with `value_range`, the values that stand for black and white, brought to [-1, 1]; what is doubtful.

    Without one they stay as they are: bytes stand for 0..255, floats for themselves. That is doubtful of floats of
    which none is negative, that may be bytes about 128, or go from -0.5 to 0.5; of bytes of a few low levels; and where
    a few values are far from all others. Raises DataError, naming `where`, for values beyond the range, with the first
    sample that has one, and for values that are too large to compute with.
    """
    parts = [(name, part) for name, part in (("", images), ("held-out ", heldout)) if part is not None and part.numel()]
    given = [part for _, part in parts]
    if not given:
        return images, heldout, ""
    low, high = min(float(part.min()) for part in given), max(float(part.max()) for part in given)
    floats = images.is_floating_point()
    what = f"{where} has {'floats' if floats else 'bytes'} from {low:g} to {high:g}"
    if value_range is not None:
        black, white = value_range
        slack = 1e-4 * (white - black)
        if low < black - slack or high > white + slack:
            name, part = next((name, part) for name, part in parts if _beyond(part, black - slack, white + slack).any())
            beyond = _beyond(part, black - slack, white + slack)
            raise DataError(
                f"{what}, beyond --data.value-range {black:g} {white:g} in {int(beyond.sum())} of {len(part)} {name}"
                f"samples, first in sample {int(beyond.nonzero()[0])}"
            )
        return _stretched(images, black, white), heldout if heldout is None else _stretched(heldout, black, white), ""
    if max(abs(low), abs(high)) > _LARGEST:
        raise DataError(f"{what}: bring them nearer to 1")
    bulk = _bulk(given)
    in_doubt = _floats_in_doubt(given, low, high) if floats else low < high <= _FEW_LEVELS
    stray = _has_strays((low, high), bulk, floats)
    if not (in_doubt or stray):
        return images, heldout, ""
    black, white = _likely(*(bulk if stray else (low, high)))
    kept = "" if floats and max(-low, high) > 1 else f" (or {'-1 1' if floats else '0 255'} to leave them as they are)"
    mostly = f", nearly all of them from {bulk[0]:g} to {bulk[1]:g}" if stray else ""
    asked = f"say which stand for black and white, as --data.value-range {black:g} {white:g}{kept}"
    return images, heldout, f"{what}{mostly}: {asked}{', and mend those beyond' if stray else ''}"


def _floats_in_doubt(given: list[Tensor], low: float, high: float) -> bool:
    """Whether floats may be meant otherwise than as themselves."""
    reach = max(-low, high)
    like_bytes = 120 < reach <= 130 or 250 < reach <= 256
    shifted = reach > _FEW_LEVELS and (like_bytes or all(bool((2 * part % 1 == 0).all()) for part in given))
    return low < high and (low >= 0 or shifted or _reaches(0.5, low, high))


def _has_strays(ends: tuple[float, float], bulk: tuple[float, float], floats: bool) -> bool:
    """Whether a few values are far from all others; of bytes only above a few low levels, for bright spots are none."""
    (low, high), (bulk_low, bulk_high) = ends, bulk
    if not bulk_low < bulk_high:
        return False
    if not floats:
        return bulk_high <= _FEW_LEVELS < high
    beyond = max(bulk_low - low, high - bulk_high)
    return beyond > _STRAY * (bulk_high - bulk_low) or (_reaches(1.0, *bulk) and beyond > _EDGE)


def _reaches(limit: float, low: float, high: float) -> bool:
    """Whether data go from -limit to limit, and neither less far nor farther."""
    return abs(low + limit) < _EDGE and abs(high - limit) < _EDGE


def _bulk(parts: list[Tensor]) -> tuple[float, float]:
    """Between which values all but a thousandth of them on either side lie, judged by a million of them."""
    values = torch.cat([part.flatten() for part in parts])
    ranked = values[:: 1 + len(values) // _LOOKED_AT].float().sort().values
    edge = max(len(ranked) // _RARE, int(len(ranked) >= 64))
    return float(ranked[edge]), float(ranked[-1 - edge])


def _likely(low: float, high: float) -> tuple[float, float]:
    """Which values most likely stand for black and white, where the data go from low to high."""
    reach = max(-low, high)
    if low >= 0:
        return 0.0, 1.0 if high <= 1 else high if high <= _FEW_LEVELS else max(255.0, high)
    if reach <= 1 + _EDGE:
        return (-0.5, 0.5) if _reaches(0.5, low, high) else (-1.0, 1.0)
    return (-128.0, 127.0) if _FEW_LEVELS < reach <= 128 and high <= 127 else (-reach, reach)


def _beyond(part: Tensor, low: float, high: float) -> Tensor:
    """Which samples have a value outside, (N,) bool."""
    least, greatest = part.flatten(1).amin(1), part.flatten(1).amax(1)
    return (least < low) | (greatest > high)


def _stretched(values: Tensor, black: float, white: float) -> Tensor:
    """2 (x - black)/(white - black) - 1, or the values themselves where that is what they stand for."""
    own = (0.0, 255.0) if values.dtype == torch.uint8 else (-1.0, 1.0)
    return values if (black, white) == own else (values.float() - black) / ((white - black) / 2) - 1.0


def _over_white(images: Tensor, where: str) -> Tensor:
    """Colours and their opacity (N, H, W, 4), bytes, as colours (N, 3, H, W)."""
    if images.ndim != 4 or images.shape[-1] != 4 or images.dtype != torch.uint8:
        raise DataError(f"{where} is {images.dtype} of shape {tuple(images.shape)}: rgba is uint8 of (N, H, W, 4)")
    colours, opacity = images[..., :3].int(), images[..., 3:].int()
    laid = (colours * opacity + 255 * (255 - opacity) + 127) // 255
    return laid.to(torch.uint8).permute(0, 3, 1, 2).contiguous()


def read_arrays(path: Path, wanted: Collection[str]) -> dict[str, npt.NDArray[Any]]:
    """Those arrays of an .npz file that are wanted, or the only one; others are listed as they are, unread.

    No more is read than its headers announce. Raises DataError, naming it and the array, where they are damaged or
    pickled.
    """
    try:
        archive = np.load(path, allow_pickle=False)
    except _UNREADABLE as error:
        raise DataError(
            f"{path} is damaged or no .npz archive (pickles are refused): write it with numpy.savez"
        ) from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise DataError(f"{path} holds one bare array: write it with numpy.savez('{path.stem}.npz', images=...)")
    arrays: dict[str, npt.NDArray[Any]] = {}
    with archive, zipfile.ZipFile(path) as announced:
        sizes = {info.filename.removesuffix(".npy"): info.file_size for info in announced.infolist()}
        for key in archive.files:
            if key not in wanted and len(archive.files) > 1:
                arrays[key] = np.empty(0)
                continue
            try:
                check_memory(sizes[key], f"array '{key}' of {path}", "take a part of it")
                arrays[key] = np.asarray(archive[key])
            except _UNREADABLE as error:
                raise DataError(
                    f"cannot read array '{key}' of {path}: {' '.join(str(error).split())}; "
                    "arrays of Python objects are refused, write plain uint8 or float arrays"
                ) from error
    return arrays


def _images(path: Path, key: str, array: npt.NDArray[Any], layout: Layout) -> tuple[Tensor, str]:
    where = f"array '{key}' of '{path}'"
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise DataError(f"{where} is {array.dtype}: give uint8 (0..255) or floats")
    if array.dtype == np.uint8:
        return channels_first(torch.from_numpy(array), layout, where)
    with np.errstate(over="ignore"):
        images, doubt = channels_first(torch.from_numpy(array.astype(np.float32)), layout, where)
    finite = images.flatten(1).isfinite().all(1)
    if not bool(finite.all()):
        raise DataError(
            f"{where} has NaN or infinite values as float32, first in sample {int((~finite).nonzero()[0])}: "
            "remove or mend them"
        )
    return images, doubt


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
