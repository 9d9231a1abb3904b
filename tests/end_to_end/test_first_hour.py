"""What a new user meets: a start that says what will happen, names, and words that fit their numbers."""

import re
import sys
from pathlib import Path

import pytest

from fewstep.cli.announcing import Announcer, duration
from fewstep.evaluation.progress import measuring
from fewstep.sampling.generate import SamplingSettings, generate
from fewstep.training.callbacks import Moment
from tests.sampling.test_pipeline import pipeline
from tests.support.commands import SMALL, STEPS, Command
from tests.support.photographs import save_pictures


def test_photographs_in_folders_are_trained_announced_and_drawn_by_name(command: Command, tmp_path: Path) -> None:
    """One recipe for a folder of pictures, with nothing but the folder said; the rest here is for speed."""
    pictures = save_pictures(tmp_path / "pictures", {"flower": 20, "tree": 20})
    words = ("--network.width", "8", "--network.head-width", "8", "--network.embedding-width", "16")
    short = ("--training.images", "64", "--training.sample-images", "0", *SMALL[-4:], "--evaluation.samples", "8")
    done = command("train", "photos-32", "--data.root", pictures, *words, *short, "--out", "run")
    assert done.code == 0, done.err
    first, second, third, fourth, *_ = [line for line in done.out.splitlines() if not line.startswith("Not to be")]
    assert first == "pictures: 40 images of 3x32x32 in 2 classes (flower, tree), 2 of them held out"
    assert re.fullmatch(r"UNet with [\d,]+ parameters; CPU, 1 thread", second)
    assert third == "64 images in 2 steps of 32"
    assert fourth.startswith("run: 64 images in 2 steps, ")
    drawn = command("sample", "run", "--count", "1", "--steps", "1", "--label", "flower", "--out", "drawn", "--cpu")
    assert "drawn: 1 sample, 1 network call each" in drawn.out
    assert [file.name for file in Path("drawn").glob("*.png")] == ["000000-flower.png"]


def test_a_shortened_run_rises_within_a_twentieth(command: Command, archive: Path) -> None:
    """The log of a run of ten steps, whose recipe warms up over a hundred: the rate is whole at once."""
    words = ("--data.source", "npz", "--data.root", archive, "--optimizer.decay", "constant", *SMALL, *STEPS)
    assert command("train", "digits", *words, "--training.sample-images", "0", "--out", "run").code == 0
    rates = [float(rate) for rate in re.findall(r'"lr": ([\d.e-]+)', Path("run/log.jsonl").read_text())]
    assert rates == pytest.approx([0.003] * 5)


def moment(step: int, seconds: float, progress: float) -> Moment:
    return Moment(step, 32 * step, seconds, progress, 1.0, 0.0, 0.0)


def test_the_measured_speed_is_said_once_and_foretells_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    """At a second a step after a first of ten: 32 images/s, and 900 steps to go after the 100th."""
    announcer = Announcer()
    for step in range(1, 101):
        announcer.step(moment(step, 10.0 + step - 1, step / 1000))
    assert capsys.readouterr().out == "Measured: 32 images/s, about 17 min to the end\n"
    assert [duration(seconds) for seconds in (45, 600, 9000, 200_000)] == ["45 s", "10 min", "2.5 h", "2.3 days"]


def test_measuring_has_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all network calls; elsewhere nothing is written."""
    own, plans = pipeline(), [("map", SamplingSettings(steps=2)), ("Heun", SamplingSettings("heun", steps=2))]
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        with measuring(own.flow_map.network, plans, 8) as bar:
            for name, settings in plans:
                bar.set_description_str(name)
                generate(own, 8, settings)
            done = bar.n
        shown = capsys.readouterr().err
        assert bool(shown) == terminal
        assert not terminal or done == bar.total == 8 * 5
    assert "Heun:" in shown
