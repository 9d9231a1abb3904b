"""What is found out about images once: listings, headers and measures hold until the data change, and not beyond."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fewstep.data import folder, on_disk
from fewstep.data.folder import list_images
from fewstep.data.kept import Kept, keep, place, read_kept
from fewstep.data.listing import kept_listing
from fewstep.data.names import Files, Names
from fewstep.data.sources import DataConfig, ImagesSource, load_dataset
from fewstep.utils.errors import FewstepWarning
from tests.support.sources import bytes_of


def aged(root: Path) -> None:
    """As if nothing below had been changed for an hour."""
    then = time.time() - 3600
    for path in (root, *root.rglob("*")):
        os.utime(path, (then, then))


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nine of them in two classes, beside a note, an hour old; nothing is kept yet."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "pictures"
    for i in range(9):
        file = root / f"class-{i % 2}" / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(bytes_of((8, 8, 3), i)).save(file)
    (root / "class-0" / "note.txt").write_text("all mine")
    aged(root)
    return root


def on_disk_config(root: Path) -> DataConfig:
    return DataConfig(ImagesSource(on_disk=True), root=str(root), image_size=4)


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("it was found out again")


def test_names_are_strings() -> None:
    words = ["a", "", "b/\u00fc.png", "c\udcff"]
    names = Names.of(words)
    assert [names[k] for k in range(4)] == names.all() == words
    assert Names.of([]).all() == []
    files = Files(Path("/x"), names)
    assert list(files[1:3]) == [files[1], files[2]] == [Path("/x"), Path("/x/b/\u00fc.png")]
    with pytest.raises(IndexError):
        names[4]


def test_a_second_start_neither_lists_nor_decodes(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(pictures.rglob("*"))
    first = load_dataset(on_disk_config(pictures))
    with monkeypatch.context() as patch:
        patch.setattr("fewstep.data.listing.list_images", refuse)
        patch.setattr(folder, "decode", refuse)
        patch.setattr("fewstep.data.pictures.grey_or_reason", refuse)
        second = load_dataset(on_disk_config(pictures))
    memory = load_dataset(replace(on_disk_config(pictures), source=ImagesSource()))
    for each in (second, memory):
        assert (each.fingerprint, each.mean, each.sigma_data) == (first.fingerprint, first.mean, first.sigma_data)
        assert (each.summary, each.class_names) == (first.summary, first.class_names)
        assert torch.equal(each.train.fetch(torch.arange(3))[0], first.train.fetch(torch.arange(3))[0])
    assert sorted(pictures.rglob("*")) == before


@pytest.mark.parametrize("change", ["more", "less", "renamed", "class"])
def test_a_listing_holds_until_a_folder_is_changed(pictures: Path, change: str) -> None:
    first = kept_listing(str(pictures))
    assert [*kept_listing(str(pictures)).files] == [*first.files] == [*list_images(str(pictures)).files]
    if change == "more":
        Image.fromarray(bytes_of((8, 8, 3))).save(pictures / "class-1" / "new.png")
    elif change == "less":
        (pictures / "class-0" / "02.png").unlink()
    elif change == "renamed":
        (pictures / "class-0" / "02.png").rename(pictures / "class-0" / "99.png")
    else:
        (pictures / "class-0").rename(pictures / "class-9")
    with pytest.warns(FewstepWarning, match=r"^'.*pictures' has changed since it was listed: it is listed anew$"):
        second = kept_listing(str(pictures))
    expected = list_images(str(pictures))
    assert [*second.files] == [*expected.files] != [*first.files]
    assert (second.labels, second.class_names, second.left_out) == (
        expected.labels, expected.class_names, expected.left_out,
    )  # fmt: skip


def test_a_folder_that_may_still_be_changing_is_not_kept(pictures: Path) -> None:
    """A second change within the clock's resolution would not show."""
    os.utime(pictures / "class-1")
    kept_listing(str(pictures))
    assert not place("listing", str(pictures.resolve())).exists()


@pytest.mark.parametrize("size", ["same", "other"])
def test_a_picture_that_is_written_anew_is_measured_anew(pictures: Path, size: str) -> None:
    """Its folder's time does not tell; its own time or size does."""
    first, file = load_dataset(on_disk_config(pictures)), pictures / "class-0" / "02.png"
    state = file.stat()
    if size == "same":
        file.write_bytes((pictures / "class-1" / "03.png").read_bytes()[: state.st_size].ljust(state.st_size, b"\0"))
    else:
        Image.fromarray(bytes_of((8, 8, 3), 77)).resize((20, 20)).save(file)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    second = load_dataset(on_disk_config(pictures))
    assert second.fingerprint != first.fingerprint
    assert second.fingerprint == load_dataset(replace(on_disk_config(pictures), source=ImagesSource())).fingerprint


def test_other_settings_have_measures_of_their_own(pictures: Path) -> None:
    config = on_disk_config(pictures)
    kinds = {"channels": 1, "image_size": 6, "heldout": 0.5, "seed": 3, "labels": False}
    for name, value in kinds.items():
        load_dataset(config)
        other = replace(config, **{name: value})  # type: ignore[arg-type]
        memory = load_dataset(replace(other, source=ImagesSource()))
        for found in (load_dataset(other), load_dataset(other)):
            assert (found.fingerprint, found.mean, found.sigma_data) == (
                memory.fingerprint, memory.mean, memory.sigma_data,
            )  # fmt: skip


def test_what_was_measured_is_of_the_whole_data_alone(pictures: Path) -> None:
    """Not of the training part beside another held-out part."""
    load_dataset(on_disk_config(pictures))
    found, other = load_dataset(on_disk_config(pictures)), load_dataset(replace(on_disk_config(pictures), seed=1))
    assert replace(found, heldout=other.heldout).fingerprint not in (found.fingerprint, other.fingerprint)
    without = on_disk.PictureSamples(found.train.pictures, found.train.rows, 4, 3, found.train.labels)  # type: ignore[attr-defined]
    assert without.moments() == (found.mean, found.sigma_data)


def test_damaged_and_unwritable_caches_cost_time_alone(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_dataset(on_disk_config(pictures))
    kept = sorted((Path(os.environ["FEWSTEP_CACHE"]) / "data").iterdir())
    assert [file.name.partition("-")[0] for file in kept] == ["heads", "listing", "measures"]
    for file in kept:
        file.write_bytes(file.read_bytes()[:20])
    assert load_dataset(on_disk_config(pictures)).fingerprint == first.fingerprint
    monkeypatch.setenv("FEWSTEP_CACHE", str(pictures / "class-0" / "note.txt"))
    with pytest.warns(
        FewstepWarning, match=r"^the cache '.*' cannot be written \(Not a directory\): .* FEWSTEP_CACHE$"
    ) as said:
        assert load_dataset(on_disk_config(pictures)).fingerprint == first.fingerprint
    assert len(said) == 1


def test_what_is_kept_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    file = place("kind", "key", 1)
    assert read_kept(file) is None
    keep(file, Kept({}, {"a": 0.1}))
    assert read_kept(file) == Kept({}, {"a": 0.1})
    assert place("kind", "key", 2) != file
