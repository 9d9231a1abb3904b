"""What is kept of a policy's episodes: rows of figures in its run's folder, a film of one of them, a table to read."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.policies.policy import Policy
from fewstep.policies.rollout import Rollout, wilson
from fewstep.policies.simulation import Picture, Task
from fewstep.utils.errors import CheckpointError
from fewstep.utils.files import read_rows, reading, replacing, updating, write_atomically
from fewstep.utils.text import aligned, quoted

Row = dict[str, Any]
ROLLOUTS_FILE = "rollouts.json"
FILM_FILE, STRIP_FILE = "film.gif", "filmstrip.png"
_NUMBER = int | float
_IDENTITY = {"method": str, "task": str, "sampler": str, "steps": int, "seed": int, "first_seed": int, "episodes": int}
_KINDS = _IDENTITY | {"successes": int, "routes": dict, "errors": list, "latency_ms": _NUMBER | None}
_KINDS |= dict.fromkeys(("success", "low", "high", "mean_steps", "score"), _NUMBER)
_LARGEST_STRIP = 1 << 26  # pixels


def rollout_row(found: Rollout, task: Task, method: str, first_seed: int, policy: Policy | None = None) -> Row:
    """Figures of some episodes; `policy` is None for an expert's, which makes no network calls (steps 0).

    success is a share of the episodes, low and high the ends of its Wilson interval at 95 %; mean_steps is the mean
    length of all episodes; score the mean over episodes of the task's own measure at its best.
    """
    count = len(found.episodes)
    low, high = wilson(found.successes, count)
    return {
        "method": method,
        "task": task.name,
        "sampler": "" if policy is None else policy.spec.sampler,
        "steps": 0 if policy is None else policy.steps,
        "seed": 0 if policy is None else policy.seed,
        "first_seed": first_seed,
        "episodes": count,
        "successes": found.successes,
        "success": found.successes / count,
        "low": low,
        "high": high,
        "mean_steps": float(np.mean([episode.steps for episode in found.episodes])),
        "score": float(np.mean([episode.score for episode in found.episodes])),
        "routes": found.routes,
        "errors": [f"start {episode.seed}: {episode.error}" for episode in found.errors],
        "latency_ms": None if policy is None else found.single_ms,
        "batch_latency_ms": found.latency_ms if math.isfinite(found.latency_ms) else None,
    }


def write_rollouts(rows: list[Row], folder: Path) -> Path:
    """Store rows in rollouts.json beside those stored earlier; a row measured anew replaces its older self."""
    fresh = {tuple(row[key] for key in _IDENTITY) for row in rows}
    file = folder / ROLLOUTS_FILE
    with updating(folder):
        kept = [row for row in read_rollouts(folder) if tuple(row[key] for key in _IDENTITY) not in fresh]
        write_atomically(file, json.dumps([*kept, *rows], indent=2) + "\n")
    return file


def read_rollouts(folder: Path) -> list[Row]:
    """Rows stored earlier, or none; raises CheckpointError when the file is damaged."""
    file = folder / ROLLOUTS_FILE
    return read_rows(file, _KINDS, f"delete it, and run fewstep rollout {quoted(folder)} anew")


def rollout_table(rows: list[Row]) -> str:
    """Rows as aligned text, routes and errors by name below."""
    cells, notes = [("method", "steps", "success", "95 %", "length", "score", "ms/decision")], []
    for row in rows:
        steps, latency = str(row["steps"] or ""), "" if row["latency_ms"] is None else f"{row['latency_ms']:.2f}"
        share, interval = f"{row['successes']}/{row['episodes']}", f"{row['low']:.2f} - {row['high']:.2f}"
        measured = (f"{row['mean_steps']:.1f}", f"{row['score']:.2f}", latency)
        cells.append((row["method"], steps, share, interval, *measured))
        name = f"  {row['method']}, {steps} steps" if steps else f"  {row['method']}"
        if row["routes"]:
            notes.append(f"{name}: {', '.join(f'{route} {count}' for route, count in row['routes'].items())}")
        notes += [f"{name}: error, {error}" for error in row["errors"]]
    return "\n".join([aligned(cells), *notes])


def save_film(pictures: list[Picture], folder: Path, frames_per_second: int = 25, longest: int = 300) -> Path:
    """An episode as film.gif, and eight of its pictures side by side as filmstrip.png.

    Long episodes are thinned out to `longest` pictures. Raises CheckpointError when it cannot write.
    """
    every = max(1, -(-len(pictures) // longest))
    first, *others = (Image.fromarray(picture) for picture in pictures[::every])
    others += [others[-1] if others else first] * frames_per_second
    file = folder / FILM_FILE
    with replacing(file) as aside:
        first.save(aside, "GIF", save_all=True, append_images=others, duration=1000 // frames_per_second, loop=0)
    with replacing(folder / STRIP_FILE) as aside:
        Image.fromarray(np.concatenate(strip(pictures), axis=1)).save(aside, format="PNG")
    return file


def strip(pictures: list[Picture], count: int = 8) -> list[Picture]:
    """`count` pictures spread evenly over an episode, the first and the last among them."""
    places = np.linspace(0, len(pictures) - 1, count).round().astype(int)
    return [pictures[int(place)] for place in places]


def read_film(folder: Path, largest: int) -> bytes | None:
    """The bytes of film.gif; None where there is none, or it is larger than so many bytes."""
    file = folder / FILM_FILE
    if not file.is_file() or file.stat().st_size > largest:
        return None
    with reading(file, "delete it"):
        found = file.read_bytes()
        if not found.startswith(b"GIF8"):
            raise ValueError("it is no GIF")
    return found


def read_strip(folder: Path, count: int = 8) -> Tensor | None:
    """The pictures of filmstrip.png, (count, 3, H, W) uint8; None where there is none.

    Raises CheckpointError for a file that is damaged, or no such strip.
    """
    file = folder / STRIP_FILE
    if not file.is_file():
        return None
    try:
        with reading(file, "delete it"), Image.open(file, formats=("PNG",)) as opened:
            if opened.width * opened.height > _LARGEST_STRIP:
                raise ValueError(f"{opened.width}x{opened.height} pixels are no film strip")
            whole = np.asarray(opened.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise CheckpointError(f"{file} is no film strip ({error}): delete it") from error
    height, width, _ = whole.shape
    if width % count:
        raise CheckpointError(f"{file} is no strip of {count} pictures: delete it")
    pictures = torch.from_numpy(whole.copy()).reshape(height, count, width // count, 3)
    return pictures.permute(1, 3, 0, 2)
