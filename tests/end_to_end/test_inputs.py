"""Inputs that went wrong for new users, on the command line: each is done right, or refused in one line."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.training import load
from tests.support.commands import SMALL, STEPS, Command, Finished
from tests.support.inputs import demonstrations, grey, labelled_archive, numbered_folders, other_formats, save_image
from tests.support.sources import bytes_of

QUICK = (*SMALL, *STEPS, "--training.sample-images", "0", "--objective.guidance.omega", "1")


def train(command: Command, source: str, root: Path, *more: object) -> Finished:
    words = ("--data.source", source, "--data.root", root, "--out", "run")
    return command("train", "digits", *words, *more, *QUICK)


def refused(shown: Finished, *parts: str) -> None:
    """Exit code 2 and one line with every part."""
    assert (shown.code, shown.err.count("\n")) == (2, 1), shown
    for part in parts:
        assert part in shown.err
    assert not Path("run").exists()


def test_numbered_classes_are_in_order_and_drawn_by_name(tmp_path: Path, command: Command) -> None:
    shown = train(command, "images", numbered_folders(tmp_path / "numbered"))
    assert (shown.code, shown.err) == (0, "")
    assert "numbered: 60 images of 1x8x8 in 12 classes (0 = 1, 1 = 2, " in shown.out
    assert "20 of them held out" in shown.out
    assert load("run").config.class_names == tuple(str(k) for k in range(1, 13))
    shown = command("sample", "run", "--count", 3, "--label", "10", "2", "--out", "a.npz", "--cpu")
    assert shown.code == 0, shown
    assert np.load("a.npz")["labels"].tolist() == [9, 1, 9]
    shown = command("sample", "run", "--count", 3, "--out", "a.npz", "--cpu")
    assert "Classes in turn: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12; --label NAME draws one" in shown.out
    shown = command("sample", "run", "--label", "0", "--cpu")
    assert shown.code == 2
    assert "no class '0': its classes are 1, 2, 3," in shown.err
    assert command("report", "run").code == 0
    assert "Classes: 0 1, 1 2, 2 3," in Path("run/report.html").read_text()


def test_named_classes_are_drawn_by_name_or_number(tmp_path: Path, command: Command) -> None:
    for index in range(20):
        save_image(tmp_path / "animals" / "cat" / f"{index}.png", 40)
        save_image(tmp_path / "animals" / "dog" / f"{index}.png", 200)
    shown = train(command, "images", tmp_path / "animals")
    assert "in 2 classes (cat, dog), 13 of them held out" in shown.out
    for word in ("dog", "1"):
        assert command("sample", "run", "--count", 2, "--label", word, "--out", "a.npz", "--cpu").code == 0
        assert np.load("a.npz")["labels"].tolist() == [1, 1]
    assert "no class 'cow': its classes are cat, dog" in command("sample", "run", "--label", "cow", "--cpu").err


@pytest.mark.parametrize("labels", [(1, 2, 3), (0, 7, 151)])
def test_labels_with_gaps_make_no_class_that_no_sample_has(
    tmp_path: Path, command: Command, labels: tuple[int, ...]
) -> None:
    with pytest.warns(UserWarning, match=rf"its 3 classes are {labels[0]} \(number 0\)"):
        shown = train(command, "npz", labelled_archive(tmp_path / "a.npz", *labels))
    assert shown.code == 0
    assert f"3 classes (0 = {labels[0]}, 1 = {labels[1]}, 2 = {labels[2]})" in shown.out
    assert load("run").flow_map.num_classes == 3
    assert command("sample", "run", "--count", 1, "--label", labels[2], "--out", "a.npz", "--cpu").code == 0
    assert np.load("a.npz")["labels"].tolist() == [2]


def test_every_format_is_read_and_what_is_left_out_is_counted(tmp_path: Path, command: Command) -> None:
    shown = train(command, "images", other_formats(tmp_path / "formats"))
    assert (shown.code, shown.err) == (0, "")
    assert "formats: 150 images of 1x16x16, 50 of them held out; left out: 2 .txt, 1 hidden" in shown.out


def test_two_class_folders_that_are_one(tmp_path: Path, command: Command) -> None:
    numbered_folders(tmp_path / "images", 2)
    shutil.rmtree(tmp_path / "images" / "2")
    (tmp_path / "images" / "2").symlink_to("1")
    refused(train(command, "images", tmp_path / "images"), "are one folder")


def test_a_class_folder_that_cannot_be_read_shifts_no_other(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, scan = numbered_folders(tmp_path / "images", 3), os.scandir

    def refusing(path: str) -> object:
        if Path(path).name == "2":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    refused(train(command, "images", folder), "images/2", "Permission denied")


def test_layouts_that_can_be_misread_are_asked_for(tmp_path: Path, command: Command) -> None:
    for channels, layouts in ((4, ("rgba", "hwc")), (2, ("hwc",))):
        file = tmp_path / f"{channels}.npz"
        np.savez(file, images=bytes_of((40, 16, 16, channels)))
        refused(train(command, "npz", file), f"{channels}.npz", f"may be {channels} channels", "--data.npz-layout")
        for layout in layouts:
            assert train(command, "npz", file, "--data.npz-layout", layout).code == 0
            assert load("run").flow_map.sample_shape == (3 if layout == "rgba" else channels, 16, 16)
            shutil.rmtree("run")


@pytest.mark.parametrize("white", [255, 1, 16])
def test_ranges_that_can_be_misread_are_asked_for_and_pictures_keep_their_grey(
    tmp_path: Path, command: Command, white: int
) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, images=grey(230, count=60).astype(np.float32) / 255 * white)
    refused(train(command, "npz", file), "a.npz", "say which stand for black and white", "--data.value-range 0 ")
    assert train(command, "npz", file, "--data.value-range", 0, white).code == 0
    pipeline = load("run")
    assert pipeline.config.data_range == (-1.0, 1.0)
    shown = pipeline.viewer().images(torch.full((1, 1, 8, 8), 230 / 127.5 - 1))
    pipeline.viewer().write(shown, None, tmp_path / "shown", 1)
    pixels = np.asarray(Image.open(next((tmp_path / "shown").glob("*.png"))))
    assert set(pixels.ravel().tolist()) <= {229, 230}


def test_a_constant_action_is_answered_as_it_is(tmp_path: Path, command: Command) -> None:
    from fewstep import load_policy

    file = demonstrations(tmp_path / "a.npz", 0.3, action_low=[-1, -1, 0.3], action_high=1.0 * np.array([1, 1, 0.3]))
    words = ("--data.root", file, "--out", "run", "--training.images", 640, "--training.batch-size", 32)
    small = ("--network.width", 16, "--network.depth", 1, "--runtime.cpu", "--runtime.quiet", "--runtime.threads", 1)
    shown = command("train", "policy-mlp", *words, *small)
    assert (shown.code, shown.err) == (0, "")
    assert re.search(r"800 chunks of actions of \d+x3, \d+ of them held out; action 2 never varies", shown.out)
    answered = load_policy("run").predict_chunk(torch.randn(5, 2, 4))
    torch.testing.assert_close(answered[..., 2], torch.full(answered.shape[:2], 0.3))


def test_a_run_made_with_other_class_numbers_is_not_resumed(tmp_path: Path, command: Command) -> None:
    folder = numbered_folders(tmp_path / "images", 11)
    with pytest.MonkeyPatch.context() as patch:  # as it was before classes were in natural order
        patch.setattr("fewstep.data.folder.natural_order", lambda name: name)
        assert train(command, "images", folder).code == 0
    config = json.loads(Path("run/config.json").read_text())
    assert config["data"].pop("class_names")[:3] == ["1", "10", "11"]
    Path("run/config.json").write_text(json.dumps(config))
    for shown in (train(command, "images", folder), command("evaluate", "run")):
        assert (shown.code, shown.err.count("\n")) == (2, 1), shown
        assert "its classes 0, 1, ... were 1, 10, 11, 2," in shown.err
        assert "and are now 1, 2, 3, 4" in shown.err


def test_an_older_run_whose_classes_are_in_the_same_order_goes_on(tmp_path: Path, command: Command) -> None:
    folder = numbered_folders(tmp_path / "images", 3)
    assert train(command, "images", folder).code == 0
    config = json.loads(Path("run/config.json").read_text())
    del config["data"]["class_names"], config["run"]["data"]["value_range"]
    Path("run/config.json").write_text(json.dumps(config))
    assert train(command, "images", folder).code == 0
    shown = train(command, "images", folder, "--training.seed", 5)
    assert shown.code == 2
    assert "its classes" not in shown.err


def test_a_run_that_began_before_ranges_were_asked_for_goes_on(tmp_path: Path, command: Command) -> None:
    np.savez(tmp_path / "a.npz", images=grey(230, count=60).astype(np.float32) / 255)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewstep.data.npz.in_range", lambda where, given, images, heldout: (images, heldout, ""))
        assert train(command, "npz", tmp_path / "a.npz").code == 0
    assert train(command, "npz", tmp_path / "a.npz", "--training.images", 640).code == 0
    assert command("sample", "run", "--count", 1, "--out", "a.png", "--cpu").code == 0


def test_rgba_pictures_in_an_archive_are_those_of_a_folder(tmp_path: Path, command: Command) -> None:
    np.savez(tmp_path / "a.npz", images=bytes_of((20, 8, 8, 4)))
    shown = train(command, "npz", tmp_path / "a.npz", "--data.npz-layout", "rgba")
    assert "a: 20 images of 3x8x8" in shown.out
