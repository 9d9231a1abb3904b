"""What a run is: which of its settings decide its weights. The one place that says so.

Of two starts in one folder these may differ:
- what is only logged, kept or measured (WATCHED);
- the recipe's name, and where data and a teacher lie (PLACES): what is in them counts, by its fingerprint, which knows
  the names of classes, and of the data their name does not;
- how long the run is (LENGTH), where no step depends on it.
The model that a run starts from counts by its place: it is read for the first step alone.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.recipes.config import RunConfig
from fewstep.utils.serialization import FORMAT, JSON, to_json

WATCHED = frozenset(
    f"training.{name}" for name in ("log_images", "sample_images", "checkpoint_images", "checkpoint_seconds", "keep")
) | {"evaluation"}  # fmt: skip
PLACES = frozenset({"recipe", "teacher", "data.root"})
LENGTH = frozenset({"training.images", "training.seconds"})


def run_record(config: RunConfig, data: dict[str, JSON], teacher: str | None) -> dict[str, JSON]:
    """What a run's config.json says; paths of what is there are stored in full, so that any folder serves to go on."""
    return {"format": FORMAT, "run": to_json(placed(config)), "data": data, "teacher": teacher}


def placed(config: RunConfig) -> RunConfig:
    """With the full paths of the data, the teacher and the model to start from, where they are there."""
    data = replace(config.data, root=_full(config.data.root))
    initial = config.initial if config.initial == "teacher" else _full(config.initial)
    return replace(config, data=data, teacher=_full(config.teacher), initial=initial)


def _full(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if name and path.exists() else name


def identity(record: dict[str, Any], config: RunConfig) -> JSON:
    """A record without what may differ. config: of that record."""
    free = WATCHED | PLACES | (frozenset() if knows_its_end(config) else LENGTH)
    data = {key: value for key, value in record["data"].items() if key not in ("name", "class_names")}
    return {"run": _without(to_json(placed(config)), free), "data": data, "teacher": record.get("teacher")}


def knows_its_end(config: RunConfig) -> bool:
    """Whether steps depend on how long the run is: a learning rate that falls to its end or rises over a share of it,
    statistics kept at it."""
    statistics = config.model.preconditioning.needs_statistics and config.statistics.refresh_images > 0
    return config.optimizer.decay == "cosine" or config.optimizer.warmup_share > 0 or statistics


def _without(value: JSON, names: frozenset[str], where: str = "") -> JSON:
    """Settings without those of these dotted names."""
    if not isinstance(value, dict):
        return value
    return {key: _without(item, names, f"{where}{key}.") for key, item in value.items() if where + key not in names}
