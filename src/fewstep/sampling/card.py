"""Model cards: what a model is, how it is loaded, its figures, where it comes from, and its teacher's licence."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load

from fewstep.utils.files import guarded
from fewstep.utils.hub import HUB, is_repository

CARD_FILE, LICENCE_FILE = "README.md", "LICENSE"
_LICENCE_KEYS = ("license", "license_name", "license_link")
_TAGS = "tags: [flow-map, few-step-generation]"


@dataclass(frozen=True)
class Provenance:
    """Where weights come from: the run's recipe, a digest of its settings, the data's name, its teacher, figures.

    teacher: as the run names it, "" for none. figures: rows of figures.json.
    """

    recipe: str
    settings: str
    data: str
    teacher: str = ""
    figures: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Licence:
    """keys: for the head of a card, none where no licence is named. words: for its readers. file: its text, if any."""

    keys: dict[str, str]
    words: str
    file: Path | None = None


@dataclass(frozen=True)
class Card:
    """what: the model, in a paragraph. code: Python that loads it where the card lies. library, task: as the Hub names
    them, "" for no task. notes: what else must be known.
    """

    what: str
    code: str
    library: str
    task: str = ""
    notes: tuple[str, ...] = ()

    def text(self, provenance: Provenance | None, teacher: Path | None) -> str:
        """The card's Markdown; teacher: its folder, if it is here, whose licence is read."""
        taught = teacher is not None or (provenance is not None and provenance.teacher != "")
        licence = read_licence(teacher) if taught else None
        head: dict[str, Any] = {"library_name": self.library}
        head |= {"pipeline_tag": self.task} if self.task else {}
        head |= {} if licence is None else licence.keys
        if provenance is not None and is_repository(provenance.teacher):
            head["base_model"] = provenance.teacher.removeprefix(HUB)
        name = "A few-step model" if provenance is None else provenance.recipe
        parts = [
            "\n".join(["---", *(f"{key}: {value}" for key, value in head.items()), _TAGS, "---"]),
            f"# {name}",
            self.what,
            "## Load it",
            f"```python\n{self.code}\n```",
            *self.notes,
        ]
        rows = [] if provenance is None else _origin(provenance)
        rows += [] if licence is None else [("licence", licence.words)]
        parts += [] if provenance is None else _figures(provenance.figures)
        if rows:
            parts += ["## Where it comes from", _table(("", ""), rows)]
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path, provenance: Provenance | None, teacher: Path | None) -> None:
        """Write README.md, and beside it the text of the teacher's licence where it has a file of it."""
        file = folder / CARD_FILE
        with guarded(file):
            file.write_text(self.text(provenance, teacher))
            licence = None if teacher is None else read_licence(teacher).file
            if licence is not None:
                shutil.copyfile(licence, folder / LICENCE_FILE)


def read_licence(teacher: Path | None) -> Licence:
    """What a teacher's folder says of its licence: the head of its README, or a file LICENSE."""
    if teacher is None or not teacher.is_dir():
        return Licence({"license": "unknown"}, "unknown: the teacher's files are not here; ask its makers")
    if (teacher / "checkpoints").is_dir():
        return Licence({}, "yours to choose, as far as the data allow: the teacher is a run of fewstep")
    file = next((path for path in sorted(teacher.glob("LICENSE*")) if path.is_file()), None)
    head = _head(teacher / CARD_FILE)
    keys = {key: " ".join(str(head[key]).split()) for key in _LICENCE_KEYS if isinstance(head.get(key), str)}
    if "license" in keys:
        return Licence(keys, f"{keys.get('license_name', keys['license'])}, the teacher's", file)
    if file is not None:
        link = {"license": "other", "license_name": "teachers-licence", "license_link": LICENCE_FILE}
        return Licence(link, f"other: the text of the teacher's is in [{LICENCE_FILE}]({LICENCE_FILE})", file)
    return Licence({"license": "unknown"}, "unknown: the teacher's files name none; ask its makers before sharing")


def _head(readme: Path) -> dict[str, Any]:
    """The front matter of a card; nothing where there is none that can be read."""
    try:
        found = metadata_load(readme) if readme.is_file() else None
    except Exception:  # whatever YAML's reader raises on a card of others
        found = None
    return found if isinstance(found, dict) else {}


def _figures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    cells = [(row["method"], row["nfe"], f"{row['frechet']:.2f}", row["samples"]) for row in rows]
    basis = f"In the features of {rows[0]['extractor']}, to {rows[0]['reference']}; not FID."
    return ["## Figures", _table(("method", "network calls", "Fréchet distance", "samples"), cells), basis]


def _origin(provenance: Provenance) -> list[tuple[str, str]]:
    rows = [("recipe", provenance.recipe), ("digest of its settings", provenance.settings), ("data", provenance.data)]
    if not provenance.teacher:
        return rows
    return [
        *rows,
        ("teacher", provenance.teacher if is_repository(provenance.teacher) else Path(provenance.teacher).name),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
