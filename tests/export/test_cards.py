"""Model cards: their Python runs where they lie, and they say what is known of a model and its teacher's licence."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep import FlowMapConfig, LinearPreconditioning, MLPConfig, Pipeline
from fewstep.export.diffusers import export_diffusers
from fewstep.export.parts import Parts
from fewstep.flow.paths import Linear
from fewstep.flow.preconditioning.network_scaling import IdentityScaling
from fewstep.sampling.card import Card, Provenance, read_licence
from fewstep.teachers.diffusers import load_diffusers
from tests.support.foreign import TINY, save_foreign
from tests.support.text import PIPELINES, save_pipeline

FIGURES = {"method": "map", "nfe": 2, "frechet": 1.234, "samples": 64, "extractor": "digits", "reference": "held out"}


def small() -> Pipeline:
    config = FlowMapConfig(
        Linear(), LinearPreconditioning(), IdentityScaling(), MLPConfig(width=16, depth=1), (1, 4, 4), num_classes=3
    )
    return Pipeline(config.build())


def executed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the Python of a folder's card leaves."""
    monkeypatch.chdir(folder)
    (block,) = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    return names


def test_a_saved_models_card_loads_it_and_speaks_of_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small().save_pretrained(tmp_path)
    assert executed(tmp_path, monkeypatch)["samples"].shape == (4, 1, 4, 4)
    assert "hub" not in (tmp_path / "README.md").read_text().lower()


def test_a_pushed_models_card_names_its_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is uploaded has the weights, the configuration and the card."""
    pushed: dict[str, str] = {}

    class Hub:
        def __init__(self, token: Any = None) -> None: ...

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            return type("Address", (), {"repo_id": repo_id})

        def upload_folder(self, *, folder_path: Path, **options: Any) -> str:
            pushed.update({path.name: path.read_text(errors="ignore") for path in folder_path.iterdir()})
            return "done"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    assert small().push_to_hub("me/digits") == "done"
    assert pushed.keys() == {"config.json", "model.safetensors", "README.md"}
    assert 'fewstep.load("hf://me/digits")' in pushed["README.md"]


def test_a_card_says_where_a_model_comes_from() -> None:
    """Recipe, digest, data, teacher and figures; the base model where it is one of the Hub."""
    provenance = Provenance("distil-diffusers", "0123", "digits", "google/ddpm", (FIGURES,))
    text = Card("A map.", "pass", "fewstep").text(provenance, None)
    assert "\nbase_model: google/ddpm\n" in text
    assert "\nlicense: unknown\n" in text
    for row in ("| map | 2 | 1.23 | 64 |", "| digest of its settings | 0123 |", "| data | digits |"):
        assert row in text


@pytest.mark.parametrize(
    ("files", "keys", "words"),
    [
        ({"README.md": "---\nlicense: mit\n---\n# x"}, {"license": "mit"}, "mit, the teacher's"),
        (
            {"README.md": "---\nlicense: other\nlicense_name: own-1\nlicense_link: LICENSE\n---\n", "LICENSE": "Own."},
            {"license": "other", "license_name": "own-1", "license_link": "LICENSE"},
            "own-1, the teacher's",
        ),
        ({"LICENSE.md": "Own.", "README.md": "---\n: [\n---\n"}, {"license": "other"}, "other: the text"),
        ({}, {"license": "unknown"}, "unknown: the teacher's files name none"),
    ],
    ids=["named", "of its own name", "a text", "none"],
)
def test_the_licence_is_the_teachers(files: dict[str, str], keys: dict[str, str], words: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = read_licence(tmp_path)
    assert keys.items() <= found.keys.items()
    assert found.words.startswith(words)
    assert (found.file is not None) == any(name.startswith("LICENSE") for name in files)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "UNet2DModel", "FluxTransformer2DModel"])
def test_an_exported_folders_card_loads_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a prompt, classes, or embeddings where no text encoder goes along."""
    pytest.importorskip("diffusers")
    teacher, kind = tmp_path / "teacher", PIPELINES.get(name, name)
    if name in PIPELINES:
        pytest.importorskip("transformers")
        save_pipeline(teacher, name)
    else:
        save_foreign(teacher, kind)
    (teacher / "LICENSE").write_text("Own.")
    export_diffusers(Pipeline(load_diffusers(teacher, TINY[kind].shape)), tmp_path / "out", (2,), Parts(teacher))
    images = executed(tmp_path / "out", monkeypatch)["images"]
    assert len(images) == (4 if name == "UNet2DModel" else 1)
    assert isinstance(images, torch.Tensor) == (name == "FluxTransformer2DModel")
    assert (tmp_path / "out" / "LICENSE").read_text() == "Own."
