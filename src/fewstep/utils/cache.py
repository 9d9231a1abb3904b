"""Where what several runs share is kept."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where feature extractors, and what is known of data, are kept: $FEWSTEP_CACHE, else the user's cache, fewstep."""
    if "FEWSTEP_CACHE" in os.environ:
        return Path(os.environ["FEWSTEP_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fewstep"
