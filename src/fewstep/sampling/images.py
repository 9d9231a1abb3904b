"""Samples as pictures: bytes, grids, PNG files and NumPy archives."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.utils.errors import ShapeError
from fewstep.utils.files import replacing, write_atomically

Range = tuple[float, float]
_VISIBLE = 64  # pixels: smaller images are enlarged to at least this
_LARGEST_SCALE = 8
_FRAME_MS = 125


def to_uint8(images: Tensor, data_range: Range | None) -> Tensor:
    """Values (n, C, H, W) or (n, C, T, H, W) to bytes: data_range = (low, high) goes to (0, 255), rounded and clipped.

    None takes the set's own finite minimum and maximum (a constant set is black). uint8 images pass unchanged; NaN
    is black. Raises ShapeError on another number of dimensions or an empty range.
    """
    if images.ndim not in (4, 5):
        raise ShapeError(f"images have shape (n, C, H, W), got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images
    values = images.detach().to(torch.promote_types(images.dtype, torch.float32))
    low, high = _own_range(values) if data_range is None else data_range
    if not low < high:
        raise ShapeError(f"the range of the data must have low < high, got ({low}, {high})")
    scaled = ((values - low) * (255 / (high - low))).nan_to_num(nan=0.0)
    return scaled.clamp(0, 255).round().to(torch.uint8)


def _own_range(values: Tensor) -> Range:
    finite = values[values.isfinite()]
    if finite.numel() == 0:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    return low, high if high > low else low + 1.0


def visible_scale(images: Tensor) -> int:
    """The integer factor, at most 8, that brings the longer side of (n, C, H, W) images to 64 pixels or more."""
    longer: int = max(*images.shape[-2:], 1)
    return min(max(-(-_VISIBLE // longer), 1), _LARGEST_SCALE)


def image_grid(images: Tensor, columns: int, padding: int = 2, scale: int = 1, background: int = 255) -> Tensor:
    """uint8 images (n, C, H, W), row by row, as one picture (H', W', 3), uint8.

    Each image is enlarged `scale` times by nearest neighbour. `padding` pixels of grey level `background` lie between
    images, none around them; the cells that a short last row leaves are `background` too. With fewer images than
    columns the grid is as wide as the images. One or two channels show the first as grey, more than three the first
    three as colours (a preview of latents).
    Raises ShapeError on other dtypes or dimensions, on no images, and on columns or scale below 1, or padding below 0.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.numel() == 0:
        raise ShapeError(f"a grid takes uint8 images (n, C, H, W), n >= 1, got {images.dtype} {tuple(images.shape)}")
    if columns < 1 or scale < 1 or padding < 0:
        raise ShapeError(f"a grid needs columns >= 1, scale >= 1, padding >= 0, got {columns}, {scale}, {padding}")
    count, channels = images.shape[:2]
    colours = images[:, :3] if channels >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    large = colours.cpu().repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    height, width = large.shape[-2:]
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = torch.full((rows * (height + padding), columns * (width + padding), 3), background, dtype=torch.uint8)
    for i, image in enumerate(large.permute(0, 2, 3, 1)):
        top, left = (i // columns) * (height + padding), (i % columns) * (width + padding)
        canvas[top : top + height, left : left + width] = image
    return canvas[: rows * (height + padding) - padding, : columns * (width + padding) - padding]


def film_strips(videos: Tensor) -> Tensor:
    """Videos (n, C, T, H, W) as images (n, C, H, T W), frame beside frame; images (n, C, H, W) as they are."""
    return videos.movedim(2, 3).flatten(3) if videos.ndim == 5 else videos


def fitting_columns(samples: Tensor, columns: int) -> int:
    """How many to place in a row where images would be `columns`: fewer of videos, by their frames."""
    return max(1, columns // samples.shape[2]) if samples.ndim == 5 else columns


def picture(pixels: Tensor) -> Image.Image:
    """uint8 pixels (H, W), (H, W, 3), or (H, W, 4) with opacity, for Pillow."""
    return Image.fromarray(pixels.contiguous().cpu().numpy())


def png_bytes(image: Image.Image) -> bytes:
    """A Pillow image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")  # the best compression is 2 % smaller and takes nine times as long
    return buffer.getvalue()


def save_grid(images: Tensor, file: Path, *, columns: int = 8, data_range: Range | None = None) -> Path:
    """Write images (n, C, H, W) as one PNG grid, small ones enlarged. Raises CheckpointError when it cannot write."""
    pixels = to_uint8(images, data_range)
    write_atomically(file, png_bytes(picture(image_grid(pixels, columns, scale=visible_scale(pixels)))))
    return file


def save_animation(
    videos: Tensor, file: Path, *, columns: int = 8, data_range: Range | None = None, scale: int = 0
) -> Path:
    """Write videos (n, C, T, H, W) as one animated grid, a GIF or PNG by the file's suffix, at 8 frames a second.

    scale: of each frame; 0 enlarges small ones. Raises CheckpointError when it cannot write.
    """
    frames = to_uint8(videos, data_range).unbind(2)
    scale = scale or visible_scale(frames[0])
    grids = [picture(image_grid(frame, columns, scale=scale)) for frame in frames]
    buffer = io.BytesIO()
    kind = file.suffix.removeprefix(".").upper()
    grids[0].save(buffer, format=kind, save_all=True, append_images=grids[1:], duration=_FRAME_MS, loop=0)
    write_atomically(file, buffer.getvalue())
    return file


def save_each(
    images: Tensor, folder: Path, data_range: Range | None, first: int = 0, endings: Sequence[str] = ()
) -> list[Path]:
    """Write each image at its own size as folder/000000.png, ..., counting from `first`; endings: of each name.

    Videos (n, C, T, H, W) become animated PNGs. Raises ShapeError unless C is 1 or 3, CheckpointError when it cannot
    write.
    """
    pixels = to_uint8(images, data_range).cpu()
    if pixels.shape[1] not in (1, 3):
        raise ShapeError(f"a PNG holds 1 or 3 channels, got {pixels.shape[1]}: save these samples as .npz")
    names = zip(range(first, first + len(pixels)), endings or [""] * len(pixels), strict=True)
    files = [folder / f"{number:06d}{ending}.png" for number, ending in names]
    for file, image in zip(files, pixels, strict=True):
        if image.ndim == 4:
            save_animation(image[None], file, scale=1)
            continue
        write_atomically(file, png_bytes(picture(image[0] if len(image) == 1 else image.permute(1, 2, 0))))
    return files


def save_npz(images: Tensor, labels: Tensor | None, file: Path, name: str = "images") -> Path:
    """Write images, as given, as the array `name`, and `labels`, if any, to an .npz file.

    Raises CheckpointError as above.
    """
    arrays: dict[str, Any] = {name: images.detach().cpu().numpy()}
    if labels is not None:
        arrays["labels"] = labels.detach().cpu().numpy()
    with replacing(file) as aside, aside.open("wb") as handle:
        np.savez(handle, **arrays)
    return file
