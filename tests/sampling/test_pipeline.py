"""Pipelines: what is saved comes back, folders of format 1 are read, and what is none is named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fewstep
from fewstep.data.demonstrations.normaliser import ChunkConfig, Normaliser, PolicySpec
from fewstep.data.latents.autoencoders import AutoencoderIdentity, LatentSpec
from fewstep.flow.flow_map import FlowMap, FlowMapConfig
from fewstep.flow.paths import EDM, Linear
from fewstep.flow.preconditioning.jumps import BCMPreconditioning, EulerPreconditioning, LinearPreconditioning
from fewstep.flow.preconditioning.network_scaling import IdentityScaling
from fewstep.networks.mlp import MLPConfig
from fewstep.sampling.generate import SamplingSettings, generate
from fewstep.sampling.pipeline import Pipeline, PipelineConfig, load_pipeline, read_flow_map_config
from fewstep.sampling.step_times import StepTimes
from fewstep.utils.errors import CheckpointError, ConfigError, ShapeError
from fewstep.utils.serialization import FORMAT, to_json

MAP = FlowMapConfig(
    Linear(), LinearPreconditioning(), IdentityScaling(), MLPConfig(width=8, depth=1, embedding_width=8), (1, 2, 2), 2
)
TIMES = StepTimes("map", 0.0, 1.0, (1.0, 0.3, 0.0), "tests")
LATENTS = LatentSpec(AutoencoderIdentity("AutoencoderKL", "c", "w", "vae"), (0.5,), (2.0,), 0.7, (1, 8, 8))
POLICY = PolicySpec("reach", ChunkConfig(), Normaliser((-1.0,), (1.0,)), Normaliser((0.0,), (2.0,)), sampler="gamma")
IMAGES = PipelineConfig(("cat", "dog"), (-1.0, 1.0), (TIMES,))


def pipeline(config: PipelineConfig = IMAGES) -> Pipeline:
    torch.manual_seed(0)
    flow_map = MAP.build().eval()
    for parameter in flow_map.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Pipeline(flow_map, config)


@pytest.mark.parametrize(
    "config", [PipelineConfig(), IMAGES, replace(IMAGES, latents=LATENTS), replace(IMAGES, policy=POLICY)]
)
def test_what_is_saved_comes_back(config: PipelineConfig, tmp_path: Path) -> None:
    saved = pipeline(config)
    saved.save(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    assert (record.keys(), record["format"]) == ({"format", "flow_map", "pipeline"}, FORMAT)
    for loaded in (load_pipeline(tmp_path), fewstep.load(tmp_path), Pipeline.from_pretrained(str(tmp_path))):
        assert (loaded.config, loaded.flow_map.config) == (config, MAP)
        assert torch.equal(loaded.generate(5, seed=3).samples, saved.generate(5, seed=3).samples)
        assert not loaded.flow_map.training
    assert read_flow_map_config(tmp_path) == MAP


def test_other_weights_can_be_saved(tmp_path: Path) -> None:
    """An average's, in place of the network's own."""
    saved = pipeline()
    average = {key: value + 1 for key, value in saved.flow_map.network.state_dict().items()}
    saved.save(tmp_path, average)
    loaded = load_pipeline(tmp_path).flow_map.network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in average.items())


def test_a_hub_folder_has_a_card(tmp_path: Path) -> None:
    pipeline().save_pretrained(tmp_path)
    assert "few-step-generation" in (tmp_path / "README.md").read_text()
    assert load_pipeline(tmp_path).config == IMAGES


def test_generate_takes_settings_or_changes_of_them() -> None:
    own, settings = pipeline(), SamplingSettings("euler", 3, seed=7, clip=False)
    drawn = own.generate(4, settings, labels=[0, 1, 1, 0]).samples
    changed = own.generate(4, sampler="euler", steps=3, seed=7, labels=[0, 1, 1, 0], clip=False)
    assert torch.equal(drawn, changed.samples)
    assert torch.equal(drawn, generate(own.flow_map, 4, settings, [0, 1, 1, 0]).samples)
    torch.testing.assert_close(own.generate(2, settings, first=2, labels=[1, 0]).samples, drawn[2:])


def test_a_pipeline_walks_its_own_times_and_a_bare_map_does_not() -> None:
    own = pipeline()
    placed = generate(own.flow_map, 3, SamplingSettings(times=TIMES.times)).samples
    assert torch.equal(own.generate(3, steps=2, clip=False).samples, placed)
    assert torch.equal(generate(own, 3, SamplingSettings(steps=2, clip=False)).samples, placed)
    assert not torch.equal(generate(own.flow_map, 3, SamplingSettings(steps=2)).samples, placed)
    free = own.with_step_times(()).generate(3, steps=2, clip=False).samples
    assert torch.equal(free, generate(own.flow_map, 3).samples)


def test_samples_are_cut_to_the_range_of_the_data_and_seen_as_bytes() -> None:
    """Black and white are the range's ends; what lies outside is cut unless it is asked for."""
    own = pipeline()
    low, high = own.data_range or (0.0, 0.0)
    free, cut = own.generate(6, steps=1, clip=False), own.generate(6, steps=1)
    assert torch.equal(cut.samples, free.samples.clamp(low, high))
    assert not torch.equal(cut.samples, free.samples)
    assert repr(cut).startswith("Generated(6 samples of 1x2x2, 1 network call each, ")
    images = cut.images()
    assert (images.shape, images.dtype) == ((6, 2, 2, 1), np.uint8)
    expected = ((cut.samples - low) / (high - low) * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(images, expected.astype(np.uint8))
    assert np.array_equal(images, free.images())
    assert [image.size for image in cut.pil()] == [(2, 2)] * 6
    assert np.array_equal(np.asarray(cut.pil()[3]), images[3, ..., 0])


def test_classes_are_asked_for_by_name_in_turn() -> None:
    own = pipeline()
    names = own.class_names
    assert repr(own) == "Pipeline(MLP, samples of 1x2x2, 2 classes)"
    assert generate(own, 5, labels=[names[1], names[0]], steps=1).labels.tolist() == [1, 0, 1, 0, 1]  # type: ignore[union-attr]
    assert torch.equal(own.generate(3, labels=names[1]).samples, own.generate(3, labels=[1, 1, 1]).samples)
    with pytest.raises(ShapeError, match=rf"no class 'horse': its classes are {names[0]}, {names[1]}"):
        own.generate(2, labels=["horse"])


def test_a_new_preconditioning_is_saved(tmp_path: Path) -> None:
    config = replace(MAP, path=EDM(), preconditioning=EulerPreconditioning(EDM()))
    flow_map, other = config.build(), BCMPreconditioning(0.5, EDM())
    flow_map.set_preconditioning(other)
    Pipeline(flow_map).save(tmp_path)
    assert load_pipeline(tmp_path).flow_map.preconditioning == flow_map.preconditioning == other


def old_folder(folder: Path, **beside: Any) -> None:
    """A model as format 1 stored it: class names and range within the flow map, the rest beside it."""
    pipeline().save(folder)
    flow_map: Any = to_json(MAP)
    flow_map |= {"class_names": ["cat", "dog"], "data_range": [-1.0, 1.0]}
    (folder / "config.json").write_text(json.dumps({"flow_map": flow_map} | beside))


def test_format_1_is_read(tmp_path: Path) -> None:
    latents, policy, times = to_json(LATENTS), to_json(POLICY), to_json((TIMES,))
    assert isinstance(latents, dict)
    assert isinstance(policy, dict)
    old_folder(tmp_path)
    assert load_pipeline(tmp_path).config == replace(IMAGES, step_times=())
    old_folder(tmp_path, step_times=times, decoding=latents | {"type": "Decoding"}, format=1)
    assert load_pipeline(tmp_path).config == replace(IMAGES, latents=LATENTS)
    old_folder(tmp_path, control=policy | {"type": "Control"})
    loaded = load_pipeline(tmp_path)
    assert (loaded.config, loaded.flow_map.config) == (replace(IMAGES, step_times=(), policy=POLICY), MAP)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("pipeline",), [1], r"config\.json: pipeline must be an object"),
        (("pipeline", "data_range"), [1], r"pipeline\.data_range must be a list of 2"),
        (("pipeline", "more"), 1, r"pipeline: unknown key more"),
        (("flow_map", "class_names"), [], r"config\.json: unknown key class_names"),
        (("flow_map", "path", "type"), "Helix", r"path: type must be one of DiscreteVP, EDM, Linear"),
        (("format",), FORMAT + 1, rf"has format {FORMAT + 1}"),
    ],
)
def test_a_configuration_that_is_none_is_named(
    keys: tuple[str, ...], value: object, message: str, tmp_path: Path
) -> None:
    pipeline().save(tmp_path)
    file = tmp_path / "config.json"
    record = place = json.loads(file.read_text())
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    file.write_text(json.dumps(record))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        load_pipeline(tmp_path)


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no such file; is .*nowhere a saved model\?"):
        load_pipeline(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        fewstep.load(tmp_path / "nowhere")
    pipeline().save(tmp_path)
    with pytest.raises(CheckpointError, match="one set of weights: leave 'last' out"):
        fewstep.load(tmp_path, "last")
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    save_file({key: value for key, value in tensors.items() if "output" not in key}, weights)
    with pytest.raises(CheckpointError, match=r"another architecture: .*output.* -> absent"):
        load_pipeline(tmp_path)
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        load_pipeline(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        load_pipeline(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="lacks 'flow_map'"):
        load_pipeline(tmp_path)


def test_a_map_made_by_hand_is_not_saved(tmp_path: Path) -> None:
    flow_map = FlowMap(Linear(), LinearPreconditioning(), MAP.build().network)
    with pytest.raises(CheckpointError, match=r"made by hand; build it with FlowMapConfig"):
        Pipeline(flow_map).save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_the_hub_is_asked_by_its_own_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hf://OWNER/NAME is fetched; what fails is one line; anything else is a folder."""
    pipeline().save(tmp_path)
    asked = []

    def fetch(repository: str, name: str, **options: Any) -> str:
        asked.append((repository, name))
        if repository == "a/gone":
            raise FileNotFoundError("not there,\nsaid at length")
        return str(tmp_path / name)

    monkeypatch.setattr("fewstep.sampling.pipeline.hf_hub_download", fetch)
    assert fewstep.load("hf://a/b").config == IMAGES
    assert asked == [("a/b", "config.json"), ("a/b", "model.safetensors")]
    with pytest.raises(CheckpointError, match=r"^a/gone cannot be fetched .*: not there, said at length$"):
        fewstep.load("hf://a/gone")
    with pytest.raises(CheckpointError, match="a/b: no such folder"):
        fewstep.load("a/b")
    assert len(asked) == 3
