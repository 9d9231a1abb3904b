"""Class numbers are those of the classes that were named, in the order that people count in."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.data.labels import held_out, natural_order
from fewstep.data.latents.encode import EncodingWork, encode_folder
from fewstep.data.latents.shards import EncodingSettings
from fewstep.utils.errors import FewstepWarning
from tests.data.test_idx import idx_bytes
from tests.support.inputs import labelled_archive, numbered_folders, save_image
from tests.support.photographs import SIDE, save_autoencoder, save_pictures
from tests.support.sources import bytes_of, load, refused


def test_names_are_in_natural_order(tmp_path: Path) -> None:
    names = ["10", "b2", "2", "1", "b10", "a", "Zoo", "b1"]
    assert sorted(names, key=natural_order) == ["1", "2", "10", "Zoo", "a", "b1", "b2", "b10"]
    dataset = load("images", numbered_folders(tmp_path))
    assert dataset.class_names == tuple(str(k) for k in range(1, 13))
    for samples in (dataset.train, dataset.heldout):
        assert samples.labels is not None
        brightness = samples.values.float().mean((1, 2, 3))
        assert torch.equal((brightness / 20).round().long() - 1, samples.labels)
    assert "12 classes (0 = 1, 1 = 2, 2 = 3, " in dataset.summary


@pytest.mark.parametrize(("labels", "absent"), [((1, 2, 3), "class 0"), ((0, 7, 151), "class 1, 2, 3,")])
def test_labels_with_gaps_keep_their_names(tmp_path: Path, labels: tuple[int, ...], absent: str) -> None:
    with pytest.warns(FewstepWarning, match=rf"no sample of {absent}.*3 classes are {labels[0]} \(number 0\), "):
        dataset = load("npz", labelled_archive(tmp_path / "a.npz", *labels))
    assert (dataset.num_classes, dataset.class_names) == (3, tuple(map(str, labels)))
    assert dataset.train.labels is not None
    brightness = dataset.train.values.float().mean((1, 2, 3))
    assert torch.equal((brightness / 70).round().long() - 1, dataset.train.labels)


def test_idx_labels_with_gaps_keep_their_names(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(bytes_of((30, 4, 4))))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.repeat([4, 9], 15).astype(np.uint8)))
    with pytest.warns(FewstepWarning, match=r"2 classes are 4 \(number 0\), 9 \(number 1\)"):
        assert load("idx", tmp_path).class_names == ("4", "9")


def test_a_class_whose_images_cannot_be_read_is_told_of(tmp_path: Path) -> None:
    numbered_folders(tmp_path, classes=3)
    for file in (tmp_path / "2").iterdir():
        file.write_bytes(b"")
    refused("images", tmp_path, "5 of 15 images", "skip_unreadable")
    with pytest.warns(FewstepWarning) as told:
        dataset = load("images", tmp_path, skip_unreadable=True)
    assert any("no sample of class 2: its 2 classes are 1 (number 0), 3 (number 1)" in str(w.message) for w in told)
    assert dataset.class_names == ("1", "3")
    assert "left out: 5 unreadable" in dataset.summary


def test_a_class_of_latents_that_was_skipped_is_told_of(tmp_path: Path) -> None:
    save_autoencoder(tmp_path / "vae")
    for file in (save_pictures(tmp_path / "images", {"cold": 4, "mild": 2, "warm": 4}) / "mild").iterdir():
        file.write_bytes(b"")
    work = EncodingWork(cpu=True, quiet=True, skip_unreadable=True)
    with pytest.warns(FewstepWarning, match="2 of 10 images"):
        encode_folder(
            tmp_path / "images", tmp_path / "vae", tmp_path / "out", EncodingSettings(image_size=SIDE), work=work
        )
    with pytest.warns(FewstepWarning, match="no sample of class mild"):
        dataset = load("latents", tmp_path / "out")
    assert dataset.class_names == ("cold", "warm")


def test_two_class_folders_that_are_one_are_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "cat" / "a.png", 50)
    (tmp_path / "dog").symlink_to(tmp_path / "cat")
    refused("images", tmp_path, "are one folder", "cat'", "dog'")
    (tmp_path / "dog").unlink()
    shutil.copytree(tmp_path / "cat", tmp_path / "dog")
    assert load("images", tmp_path, heldout=0.5).class_names == ("cat", "dog")


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=9), share=st.floats(0.02, 0.6), seed=st.integers(0, 99))
def test_no_class_is_held_out_whole_where_another_can_give(sizes: list[int], share: float, seed: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    if len(labels) < 2:
        return
    held = held_out(len(labels), labels, share, seed)
    lost = [k for k, size in enumerate(sizes) if int(held[labels == k].sum()) == size]
    owing = [k for k, size in enumerate(sizes) if size - int(held[labels == k].sum()) >= 2]
    owing = [k for k in owing if int(held[labels == k].sum()) < sizes[k] * int(held.sum()) / len(labels)]
    assert not lost or not owing


def test_a_single_image_of_a_class_is_trained_on(tmp_path: Path) -> None:
    archive = tmp_path / "a.npz"
    for seed in range(20):
        np.savez(archive, images=bytes_of((12, 4, 4)), labels=np.array([0] * 5 + [1] * 6 + [2]))
        dataset = load("npz", archive, seed=seed)
        assert dataset.train.labels is not None
        assert set(dataset.train.labels.tolist()) == {0, 1, 2}
