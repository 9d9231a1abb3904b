"""The advice in words (`fewstep advise`): what the data are, the command, what to expect of it, and why."""

import math
from collections.abc import Iterator
from pathlib import Path

from fewstep.evaluation.advice.look import Look, look
from fewstep.evaluation.advice.rules import Choice, Entry, choose, choose_student, nearest_measured, others_measured
from fewstep.teachers import is_diffusers, is_edm
from fewstep.training.teacher import load_teacher
from fewstep.utils.errors import ConfigError
from fewstep.utils.hub import local_copy
from fewstep.utils.parts import kind_name
from fewstep.utils.text import aligned, quoted

_MOST_OTHERS = 3


def advise(data: str, teacher: str = "", seconds: float = 0.0) -> str:
    """What to train on some data (`look`), perhaps from a teacher (`load_teacher`), in so many seconds, in words.

    Raises ConfigError for seconds that are none, or a teacher of other data, and what `look` and `load_teacher` raise.
    """
    if not 0 <= seconds < math.inf:
        raise ConfigError(f"{seconds} seconds: give a time, or 0 for as long as the recipe takes")
    found = look(data)
    choice = _of_teacher(found, teacher) if teacher else choose(found, seconds)
    entry, short = nearest_measured(choice, seconds)
    config = choice.config
    rows = [
        ("recipe", choice.recipe),
        ("objective", kind_name(type(config.objective)) if entry is None else str(entry["objective"])),
        ("network", _network(choice)),
        *(_expected(entry, short, seconds, found) if entry else [("expected", "no figure was measured for such data")]),
        *[("why", line) for line in choice.why],
        *[("mind", line) for line in choice.cautions],
        *[("beside it", _measurement(each)) for each in _others(choice, entry)],
    ]
    table = "\n".join(f"  {aligned([(name, text)])}" for name, text in _padded(rows))
    return f"{found}\n\n  {command(choice, seconds)}\n\n{table}"


def command(choice: Choice, seconds: float) -> str:
    """The command that trains it."""
    limit = ["--training.seconds", f"{seconds:g}"] if seconds else []
    return " ".join(quoted(word) for word in ("fewstep", "train", choice.recipe, *choice.words, *limit))


def _network(choice: Choice) -> str:
    words = choice.words
    named = words[words.index("--network") + 1] if "--network" in words else kind_name(type(choice.config.network))
    return "the teacher's" if named == "teacher" else named


def _of_teacher(found: Look, name: str) -> Choice:
    place = Path() if ".py:" in name else local_copy(name)
    own = ".py:" in name
    format = "fewstep" if own else "diffusers" if is_diffusers(place) else "edm" if is_edm(place) else "fewstep"
    shape = () if found.of_files or found.source == "demonstrations" else found.shape
    return choose_student(found, load_teacher(name, shape), name, format)


def _padded(rows: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Names padded to one width; a name that repeats stands once."""
    width, last = max(len(name) for name, _ in rows), ""
    for name, text in rows:
        yield ("" if name == last else name).ljust(width), text
        last = name


def _expected(entry: Entry, short: bool, seconds: float, found: Look) -> Iterator[tuple[str, str]]:
    own = not found.words  # of data that have a name here the figure itself, else that of the nearest to them
    name = "expected" if own else "nearest measured"
    yield name, _measurement(entry)
    if entry["real"]:
        ratios = " / ".join(f"{value / entry['real']:.1f}" for value in entry["figures"].values())
        yield name, f"that is {ratios} times the real data's own distance"
    if not own:
        yield name, "your data will have other figures; fewstep evaluate RUN measures them beside the real data's own"
    if seconds and not short:
        yield "time", f"no run of so few seconds was measured: after {seconds:g} s expect less"
    elif entry["seconds"]:
        yield "time", f"{entry['seconds']:,.0f} s on {entry['machine']} for these figures; --seconds S gives another"


def _measurement(entry: Entry) -> str:
    """Objective: Frechet distance 3.07 / 2.79 at 1 / 2 calls on digits after 85 s on two cores (file)."""
    calls = " / ".join(entry["figures"])
    if entry["situation"] == "policy":
        what = "at the goal in " + " / ".join(f"{100 * value:.0f} %" for value in entry["figures"].values())
    else:
        what = "Frechet distance " + " / ".join(f"{value:.3g}" for value in entry["figures"].values())
    time = f" after {entry['seconds']:,.0f} s on {entry['machine']}" if entry["seconds"] else ""
    return f"{entry['objective']}: {what} at {calls} calls, on {entry['data']}{time} ({entry['file']})"


def _others(choice: Choice, entry: Entry | None) -> list[Entry]:
    return [] if entry is None else others_measured(choice, entry)[:_MOST_OTHERS]
