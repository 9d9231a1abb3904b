"""Where a run's weights come from, for model cards."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.recipes.config import RunConfig
from fewstep.sampling.card import Provenance
from fewstep.utils.files import read_rows
from fewstep.utils.serialization import to_json
from fewstep.utils.weights import digest_of_settings

FIGURES_FILE = "figures.json"
_KINDS = {"method": str, "nfe": int, "frechet": int | float, "samples": int, "extractor": str, "reference": str}


def read_provenance(run: Path, config: RunConfig, data: Mapping[str, Any]) -> Provenance:
    """Of the run in a folder; data: what it stores of them. Raises CheckpointError when its figures are damaged."""
    figures = read_rows(run / FIGURES_FILE, _KINDS, "delete it, and run fewstep evaluate anew")
    digest = digest_of_settings({"run": to_json(config)})
    return Provenance(config.recipe, digest, str(data.get("name")), config.teacher, tuple(figures))
