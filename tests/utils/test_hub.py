"""Names of the Hugging Face Hub: which are, and one line for each refusal; nothing here reaches for the network."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

import fewstep
from fewstep.utils.errors import HubError
from fewstep.utils.hub import is_repository, local_copy
from tests.support.foreign import save_foreign


def test_a_folder_that_is_here_is_never_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    names = {
        "models/mine": False,
        "models/gone": False,
        "runs/edm-digits": False,
        "google/ddpm-cifar10-32": True,
        "hf://google/ddpm-cifar10-32": True,
        "./google/ddpm": False,
        "/google/ddpm": False,
        "a/b/c": False,
        "alone": False,
        "file.py:Class": False,
    }
    assert {name: is_repository(name) for name in names} == names
    assert local_copy("models/mine") == Path("models/mine")


def refusing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(repository: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr("fewstep.utils.hub.snapshot_download", refuse)


def answer(kind: type[Exception]) -> Exception:
    """An error of the Hub's as it is raised, whatever library carried the request."""
    made = kind.__new__(kind)
    made.args = ("at length",)
    return made


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (answer(errors.GatedRepoError), "^owner/name is gated: accept its terms .*: hf auth login$"),
        (answer(errors.RepositoryNotFoundError), "^owner/name is no folder here and no model on the Hub"),
        (errors.LocalEntryNotFoundError("x"), "the Hub is out of reach: .*: hf download owner/name$"),
        (errors.OfflineModeIsEnabled("x"), "the Hub is out of reach: .*: hf download owner/name$"),
        (answer(errors.HfHubHTTPError), "^owner/name cannot be fetched from the Hub: HfHubHTTPError: at length$"),
    ],
    ids=["gated", "unknown", "not cached", "offline", "broken"],
)
def test_what_the_hub_refuses_is_one_line(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, error)
    with pytest.raises(HubError, match=message) as found:
        fewstep.load_teacher("owner/name")
    assert "\n" not in str(found.value)


def test_a_teacher_of_the_hub_is_read_from_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No code and no pickle is fetched."""
    pytest.importorskip("diffusers")
    save_foreign(tmp_path, "UNet2DModel")
    asked: dict[str, Any] = {}

    def fetch(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr("fewstep.utils.hub.snapshot_download", fetch)
    assert fewstep.load_teacher("hf://owner/name").sample_shape == (1, 8, 8)
    assert asked["repository"] == "owner/name"
    files = ["unet/config.json", "unet/model.safetensors", "unet/evil.py", "pytorch_model.bin", "big.ckpt", "x/y.pkl"]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(files, **patterns)) == files[:2]
