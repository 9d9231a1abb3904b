"""Text for terminals: what a file holds made harmless, paths as a shell takes them, rows of cells in columns."""

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

# Control characters but for tabs and ends of lines, marks of direction and width, halves of surrogate pairs.
_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Text whose control characters and marks of direction are written out: no terminal obeys or hides them."""
    return _UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def quoted(path: Path | str) -> str:
    """A path as a word of a command that may be pasted into a shell."""
    return shlex.quote(str(path))


def from_here(file: Path) -> Path:
    """A file as a command in this folder names it."""
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file


def import_words(files: Iterable[Path | None]) -> str:
    """What a command says to import files of the user's, each once; empty for none."""
    return "".join(f" --import {quoted(from_here(file))}" for file in dict.fromkeys(files) if file is not None)


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A line for each row of as many cells: the first `left` columns to the left, the others to the right."""
    rows = [[printable(" ".join(cell.split("\n"))) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        placed = [cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(cells)]
        lines.append("  ".join(placed).rstrip())
    return "\n".join(lines)


def counted(number: float, noun: str) -> str:
    """How many there are of something in words: 1 network call, 2 network calls, 1,024 images."""
    shown = f"{number:g}" if number % 1 else f"{int(number):,}"
    return f"{shown} {noun}" if number == 1 else f"{shown} {noun}s"


def by(shape: Sequence[int]) -> str:
    """A shape in words: 3x64x64."""
    return "x".join(map(str, shape))


def listed(words: Sequence[str], most: int = 12) -> str:
    """Words with commas between; those before the last are left out where there are more than `most`."""
    return ", ".join(words if len(words) <= most else [*words[: most - 2], "...", words[-1]])
