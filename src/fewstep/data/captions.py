"""Captions of a folder of images: NAME.txt beside each, or one JSONL file with a line for each."""

import json
from collections.abc import Iterator
from pathlib import Path

from fewstep.data.folder import Listing
from fewstep.utils.errors import DataError
from fewstep.utils.text import listed

CAPTION_FILES = ("metadata.jsonl", "captions.jsonl")
_NAMED = 5


def read_captions(listing: Listing, file: Path | None = None) -> tuple[str, ...]:
    """The caption of every image of a listing, in its order.

    file: JSONL whose lines have `file_name`, below the images' folder, and `text`. Not given: metadata.jsonl, the form
    of Hugging Face's imagefolder, or captions.jsonl in that folder; else NAME.txt beside each image. Raises DataError,
    naming some, for images without caption, captions without image or without a word, and two of one image.
    """
    found = [listing.root / name for name in CAPTION_FILES if (listing.root / name).is_file()]
    if file is None and len(found) > 1:
        raise DataError(f"'{listing.root}' has both {' and '.join(CAPTION_FILES)}: say which with --captions")
    file = file or (found[0] if found else None)
    captions = dict(_beside(listing) if file is None else _lines(listing.root, file))
    where = f"'{listing.root}'" if file is None else f"'{file}'"
    images = set(listing.files)
    _refuse([path for path in listing.files if path not in captions], listing.root, f"{where} has no caption of")
    _refuse([path for path in captions if path not in images], listing.root, f"{where} has captions without image for")
    empty = [path for path in listing.files if not captions[path].strip()]
    _refuse(empty, listing.root, f"{where} has captions without a word for")
    return tuple(captions[path].strip() for path in listing.files)


def _refuse(paths: list[Path], root: Path, what: str) -> None:
    if paths:
        names = [str(path.relative_to(root)) if path.is_relative_to(root) else str(path) for path in paths]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        raise DataError(f"{what} {listed(names[:_NAMED])}{more}: give every image one caption, and no other")


def _beside(listing: Listing) -> Iterator[tuple[Path, str]]:
    """Texts beside images; one without an image is given the name of its own file."""
    images = {path.with_suffix(""): path for path in listing.files}
    for file in sorted(listing.root.rglob("*.txt")):
        if file.name.startswith("."):
            continue
        try:
            yield images.get(file.with_suffix(""), file), file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"'{file}' cannot be read as a caption in UTF-8 ({error}): mend or remove it") from error


def _lines(root: Path, file: Path) -> Iterator[tuple[Path, str]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"captions '{file}' cannot be read as UTF-8 ({error}): give another file") from error
    seen: set[Path] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            name, text = record["file_name"], record["text"]
            if not (isinstance(name, str) and isinstance(text, str)):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'\'{file}\', line {number}: give an object such as {{"file_name": "1.png", "text": "a one"}}'
            ) from error
        path = root / name
        if path in seen:
            raise DataError(f"'{file}', line {number}: a second caption of {name}; give one")
        seen.add(path)
        yield path, text
