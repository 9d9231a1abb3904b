"""Where commands keep what several runs share."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where trained feature extractors are kept: $FEWSTEP_CACHE, else fewstep in the user's cache folder."""
    if "FEWSTEP_CACHE" in os.environ:
        return Path(os.environ["FEWSTEP_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fewstep"
