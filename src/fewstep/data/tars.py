"""Tar files of images, as WebDataset writes them: an index of where each member lies, made once and kept.

A sample is the run of members with one key, their name up to the first dot of its last part: KEY.jpg or another image,
perhaps KEY.cls or KEY.json with its class and KEY.txt with its caption. Layout: POSIX.1-1988 (ustar), pax and GNU, by
Python's tarfile. Nothing is unpacked, and pickles are refused by name.
"""

import os
import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from tqdm import tqdm

from fewstep.data.base import source_path
from fewstep.data.folder import image_suffixes
from fewstep.data.kept import Kept, keep, now, place, read_kept, settled, times_of
from fewstep.data.labels import natural_order
from fewstep.data.names import Names
from fewstep.utils.errors import DataError, FewstepWarning
from fewstep.utils.files import parse_json
from fewstep.utils.text import listed

_PICKLES = {"pyd", "pickle", "pkl", "p", "pck", "pth", "pt", "dill", "joblib"}
_CLASS_KEYS = ("cls", "label", "class")
_MOST_CLASSES = 1 << 20
_MOST_BYTES = 1 << 20  # of a class or a caption
_BLOCK = 512
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_NAMED = 5


@dataclass(frozen=True, eq=False)
class Shards:
    """Samples of tar files.

    place: for messages; files: the tars, of these sizes and times (S,). numbers: (N,) int64, in which of them a sample
    is; keys: theirs. images, texts: (N, 2) int64, where image and caption begin and their bytes, -1 for no caption.
    """

    place: str
    files: tuple[Path, ...]
    sizes: Tensor
    times: Tensor
    numbers: Tensor
    keys: Names
    images: Tensor
    texts: Tensor
    labels: tuple[int, ...] | None
    class_names: tuple[str, ...]
    left_out: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, number: int) -> str:
        """Its tar and its key."""
        return f"{self.files[int(self.numbers[number])].name}:{self.keys[number]}"

    def image(self, number: int) -> bytes:
        """The image's file; raises DataError where its tar has been changed since it was indexed."""
        return self._content(number, self.images[number])

    def captions(self) -> tuple[str, ...]:
        """Of every sample, in order; raises DataError, naming some, for samples without, or without a word."""
        without = (self.texts[:, 1] < 0).nonzero()[:, 0].tolist()
        found = [] if without else [self._content(k, self.texts[k]).decode(errors="replace") for k in range(len(self))]
        wordless = [number for number, text in enumerate(found) if not text.strip()]
        if numbers := without or wordless:
            more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
            what = f"{listed([self.name(number) for number in numbers[:_NAMED]])}{more}"
            raise DataError(f"'{self.place}' has no caption, KEY.txt with words, of {what}: give every image one")
        return tuple(text.strip() for text in found)

    def _content(self, number: int, span: Tensor) -> bytes:
        shard = int(self.numbers[number])
        (start, size), file = span.tolist(), self.files[shard]
        try:
            with file.open("rb") as tar:
                state = os.fstat(tar.fileno())
                if (state.st_size, state.st_mtime_ns) != (int(self.sizes[shard]), int(self.times[shard])):
                    raise DataError(f"'{file}' has changed since it was indexed: start again")
                tar.seek(start)
                return tar.read(size)
        except OSError as error:
            raise DataError(f"'{file}' cannot be read ({error.strerror or error}): bring it back") from error


def holds_tars(source: Path) -> bool:
    """Whether a place is a tar, a pattern of tars, or a folder with tars directly in it."""
    return source.suffix == ".tar" or (source.is_dir() and any(source.glob("*.tar")))


def read_shards(root: str) -> Shards:
    """The samples of one tar, of a folder of tars, or of a pattern such as train-{000..099}.tar or train-*.tar.

    The index of an earlier start is taken where no tar has been changed since; a FewstepWarning says where one has.
    Raises DataError for what is no tar, is compressed or truncated, holds pickles, or has no images; for keys with two
    images or two captions, and where some samples have a class and others none.
    """
    files, start = _tars(root), now()
    states, times = [file.stat() for file in files], times_of(files)
    sizes = torch.tensor([state.st_size for state in states], dtype=torch.int64)
    kept_in = place("shards", *map(str, files))
    if kept := read_kept(kept_in):
        stored = kept.tensors
        if torch.equal(stored["sizes"], sizes) and torch.equal(stored["times"], times):
            return _shards(root, files, kept)
        warnings.warn(f"'{root}' has changed since it was indexed: it is indexed anew", FewstepWarning, stacklevel=3)
    found = _Index()
    for number, file in enumerate(tqdm(files, "indexing shards", disable=len(files) < 2)):
        found.add(number, file)
    kept = found.result(root, files, sizes, times)
    if settled(times, start):
        keep(kept_in, kept)
    return _shards(root, files, kept)


def _shards(root: str, files: tuple[Path, ...], kept: Kept) -> Shards:
    tensors, note = kept.tensors, kept.note
    labels = tuple(tensors["labels"].tolist()) if note["class_names"] else None
    keys = Names(tensors["letters"], tensors["ends"])
    spans = tensors["images"], tensors["texts"]
    names, left_out = tuple(note["class_names"]), tuple(note["left_out"])
    return Shards(
        root, files, tensors["sizes"], tensors["times"], tensors["numbers"], keys, *spans, labels, names, left_out
    )


def _tars(root: str) -> tuple[Path, ...]:
    """The files that a root means, in natural order; raises DataError for none and for compressed ones."""
    path = source_path(root)
    if path.is_dir():
        found = [file for file in path.glob("*.tar*") if not file.name.startswith(".")]
    elif path.is_file():
        found = [path]
    else:
        found = [file for pattern in _expanded(path.name) for file in path.parent.glob(pattern)]
    if packed := [file for file in found if file.suffix != ".tar"]:
        raise DataError(f"'{packed[0]}' is no plain tar, in which samples are found by their places: unpack it to .tar")
    if not root or not found:
        raise DataError(
            f"source 'webdataset' needs root, a .tar, a folder of those, or a pattern such as train-*.tar: '{root}' is "
            "none"
        )
    return tuple(sorted({file.resolve() for file in found}, key=lambda file: natural_order(file.name)))


def _expanded(pattern: str) -> Iterator[str]:
    """Each name of a pattern with {000..099}."""
    braces = _BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    first, last = braces.groups()
    for number in range(int(first), int(last) + 1):
        yield from _expanded(f"{pattern[: braces.start()]}{number:0{len(first)}d}{pattern[braces.end() :]}")


@dataclass
class _Index:
    """What is found of samples, in order, tar by tar."""

    numbers: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    images: list[tuple[int, int]] = field(default_factory=list)
    texts: list[tuple[int, int]] = field(default_factory=list)
    classes: list[int | str | None] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    imageless: int = 0

    def add(self, number: int, file: Path) -> None:
        """The samples of a tar; a sample whose image is missing is counted."""
        members: dict[str, tuple[int, int]] = {}
        key = ""
        try:
            with file.open("rb") as content:
                for name, span in _members(file, content):
                    own, _, kind = name.rpartition("/")[2].partition(".")
                    own = name[: len(name) - len(kind) - 1] if kind else name
                    if own != key:
                        self._close(number, file, key, members, content)
                        key, members = own, {}
                    if kind.lower() in members:
                        raise DataError(f"'{file}' has two members '{name}': give each sample a key of its own")
                    members[kind.lower()] = span
                self._close(number, file, key, members, content)
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"'{file}' is truncated or no tar ({reason}): write or fetch it again") from error

    def _close(
        self, number: int, file: Path, key: str, members: dict[str, tuple[int, int]], content: IO[bytes]
    ) -> None:
        """Take the members of one key."""
        images = [kind for kind in members if f".{kind}" in image_suffixes()]
        if len(images) > 1:
            raise DataError(f"'{file}' has {len(images)} images of key '{key}' ({listed(images)}): leave one in each")
        self.others.update(
            f".{kind}" if kind else "without suffix" for kind in members if kind not in (*images, "cls", "json")
        )
        if not images:
            self.imageless += bool(members)
            return
        self.numbers.append(number)
        self.keys.append(key)
        self.images.append(members[images[0]])
        self.texts.append(members.get("txt", (-1, -1)))
        self.classes.append(_class(file, key, members, content))

    def result(self, root: str, files: tuple[Path, ...], sizes: Tensor, times: Tensor) -> Kept:
        """What is kept of it; raises DataError as `read_shards`."""
        if not self.keys:
            raise DataError(f"'{root}' has no images in {len(files)} tars: give another root")
        names, labels = self._numbered(root, files)
        keys = Names.of(self.keys)
        tensors = {
            "sizes": sizes, "times": times, "letters": keys.letters, "ends": keys.ends,
            "numbers": torch.tensor(self.numbers), "labels": torch.tensor(labels, dtype=torch.int64),
            "images": torch.tensor(self.images), "texts": torch.tensor(self.texts),
        }  # fmt: skip
        left_out = [f"{count} {kind}" for kind, count in sorted(self.others.items())]
        left_out += [f"{self.imageless} keys without an image"] * bool(self.imageless)
        return Kept(tensors, {"class_names": names, "left_out": left_out})

    def _numbered(self, root: str, files: tuple[Path, ...]) -> tuple[list[str], list[int]]:
        """The classes' names and each sample's number among them."""
        without = [number for number, each in enumerate(self.classes) if each is None]
        if len(without) == len(self.classes):
            return [], []
        if without:
            key = f"{files[self.numbers[without[0]]].name}:{self.keys[without[0]]}"
            raise DataError(
                f"'{root}' has no class for {len(without)} of {len(self.classes)} samples, first for {key}: give all "
                "one, or leave all without"
            )
        if all(isinstance(each, int) for each in self.classes):
            greatest, least = max(self.classes), min(self.classes)  # type: ignore[type-var]
            if not 0 <= least <= greatest < _MOST_CLASSES:  # type: ignore[operator]
                raise DataError(f"'{root}' has classes from {least} to {greatest}: number them 0, 1, 2 and so on")
            return [str(number) for number in range(greatest + 1)], self.classes  # type: ignore[operator, return-value]
        names = sorted({str(each) for each in self.classes}, key=natural_order)
        place_of = {name: number for number, name in enumerate(names)}
        return names, [place_of[str(each)] for each in self.classes]


def _members(file: Path, content: IO[bytes]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and place of each plain file in a tar, hidden ones left out; raises DataError for pickles and bad ends."""
    with file.open("rb") as headers, tarfile.open(fileobj=headers, mode="r:", errorlevel=2) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined] # which it would keep, of millions
            kind = member.name.rpartition("/")[2].rpartition(".")[2].lower()
            if kind in _PICKLES:
                raise DataError(
                    f"'{file}' has '{member.name}', a pickle, which may run code when it is read: write the tar anew "
                    "without it"
                )
            if member.isreg() and not member.issparse() and not member.name.rpartition("/")[2].startswith("."):
                yield member.name, (member.offset_data, member.size)
        end = tar.offset
    content.seek(end)
    if (mark := content.read(_BLOCK)) != bytes(_BLOCK):
        what = "without the empty block that ends a tar" if len(mark) < _BLOCK else "with a damaged header"
        raise tarfile.ReadError(f"it goes on to byte {end} and stops {what}")


def _class(file: Path, key: str, members: dict[str, tuple[int, int]], content: IO[bytes]) -> int | str | None:
    """The class in KEY.cls, or in KEY.json under cls, label or class; None where there is none."""
    kind = next((kind for kind in ("cls", "json") if kind in members), None)
    if kind is None:
        return None
    start, size = members[kind]
    if size > _MOST_BYTES:
        raise DataError(f"'{file}' has '{key}.{kind}' of {size} bytes, too many for a class: write it anew")
    content.seek(start)
    text = content.read(size)
    try:
        found: Any = parse_json(text) if kind == "json" else int(text)
    except ValueError as error:
        raise DataError(f"'{file}' has '{key}.{kind}' that cannot be read ({error}): mend it") from error
    if isinstance(found, dict):
        found = next((found[name] for name in _CLASS_KEYS if name in found), None)
    return found if isinstance(found, int | str) and not isinstance(found, bool) else None
