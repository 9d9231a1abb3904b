"""Models named as OWNER/NAME on the Hugging Face Hub: where they lie here, and one line for what the Hub refuses."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from fewstep.utils.errors import HubError

HUB = "hf://"
_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_RUNS = "runs"  # where runs lie unless told otherwise: no repository's owner
_DATA = (
    "*.json", "*.txt", "*.model", "README.md", "LICENSE*",
    "model.safetensors", "diffusion_pytorch_model*.safetensors", "*/*.safetensors",
)  # fmt: skip
"""What a model is read from; no code, no pickles, no single-file copies of a pipeline."""
_LEFT_OUT = ("*.fp16.*", "*.bf16.*", "*non_ema*", "safety_checker/*")


def is_repository(name: str) -> bool:
    """Whether a name is of the Hub: hf://OWNER/NAME, or OWNER/NAME where neither it nor a folder OWNER is here."""
    if name.startswith(HUB):
        return True
    owner = name.partition("/")[0]
    here = Path(name).exists() or Path(owner).exists()
    return owner != _RUNS and not here and re.fullmatch(_NAME, name) is not None


def local_copy(name: str) -> Path:
    """The folder of a model: of a repository, its copy in the Hub's cache, fetched where it is not there yet.

    Only configurations, vocabularies, safetensors and the licence are fetched. Raises HubError as `fetching` does.
    """
    if not is_repository(name):
        return Path(name)
    repository = name.removeprefix(HUB)
    with fetching(repository):
        return Path(snapshot_download(repository, allow_patterns=list(_DATA), ignore_patterns=list(_LEFT_OUT)))


def cached_copy(name: str, kind: str = "model") -> Path | None:
    """The folder of a model or dataset where it is here already, in a folder or in the Hub's cache; asks nobody."""
    if not is_repository(name):
        return Path(name) if name and Path(name).exists() else None
    try:
        return Path(snapshot_download(name.removeprefix(HUB), repo_type=kind, local_files_only=True))
    except (OSError, ValueError):
        return None


@contextmanager
def fetching(repository: str) -> Iterator[None]:
    """What the Hub or its cache does not give becomes a HubError: one line with what to do."""
    try:
        yield
    except GatedRepoError as error:
        raise HubError(
            f"{repository} is gated: accept its terms on its page on the Hub, then log in with: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{repository} is no folder here and no model on the Hub that you may see: check the name, or log in with: "
            "hf auth login"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise HubError(
            f"{repository} is no folder here, is not in the Hub's cache, and the Hub is out of reach: fetch it where "
            f"there is a network with: hf download {repository}"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise HubError(f"{repository} cannot be fetched from the Hub: {type(error).__name__}: {reason}") from error
