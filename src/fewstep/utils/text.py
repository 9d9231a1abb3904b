"""Text for terminals: rows of cells in columns."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A line for each row of as many cells: the first `left` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        placed = [cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(cells)]
        lines.append("  ".join(placed).rstrip())
    return "\n".join(lines)


def listed(words: Sequence[str], most: int = 12) -> str:
    """Words with commas between; those before the last are left out where there are more than `most`."""
    return ", ".join(words if len(words) <= most else [*words[: most - 2], "...", words[-1]])
