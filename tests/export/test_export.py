"""What leaves fewstep gives the same samples where it arrives."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep import AnalyticPreconditioning, FlowMapConfig, LinearPreconditioning, MLPConfig, Pipeline
from fewstep.export.diffusers import export_diffusers
from fewstep.export.steps import step_table
from fewstep.export.traced import SUFFIX, SamplerModule, conditions, export_traced, writer_of
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import Linear
from fewstep.flow.preconditioning.network_scaling import IdentityScaling
from fewstep.networks.condition import Condition, Prompts
from fewstep.sampling.generate import STREAM_PRIOR
from fewstep.sampling.samplers import map_sampler
from fewstep.sampling.step_times import StepTimes
from fewstep.teachers.diffusers import DiffusersConfig, load_diffusers
from fewstep.teachers.lora import LoRA
from fewstep.utils.errors import ConfigError
from fewstep.utils.random import Draws
from tests.support.foreign import TINY, save_foreign
from tests.support.statistics import copy_with_mean, wavy


def noise(shape: tuple[int, ...], count: int) -> torch.Tensor:
    return Draws(0, 0, torch.arange(count)).normal(STREAM_PRIOR, shape)


def trained(pipeline: Pipeline) -> Pipeline:
    """The same with every weight moved a little, those of the second time too."""
    draw = torch.Generator().manual_seed(1)
    for parameter in pipeline.flow_map.network.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=draw)
    return pipeline


def own_words(kind: str, cond: Condition) -> dict[str, Any]:
    """Conditions as the network of diffusers takes them."""
    if cond.text is None:
        return {"class_labels": cond.labels}
    words: dict[str, Any] = {"encoder_hidden_states": cond.text}
    if kind == "SDXL":
        ids = torch.tensor([64.0, 64, 0, 0, 64, 64]).expand(len(cond.text), 6)
        words["added_cond_kwargs"] = {"text_embeds": cond.pooled, "time_ids": ids}
    elif cond.pooled is not None:
        words["pooled_projections"] = cond.pooled
    if kind == "FluxTransformer2DModel":
        words["guidance"] = torch.full((len(cond.text),), 3.5)
    if kind == "PixArtTransformer2DModel":
        words["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return words


FLOWS = [kind for kind, tiny in TINY.items() if "flow" in str(tiny.scheduler).lower()]


@pytest.mark.parametrize("kind", TINY)
def test_diffusers_draws_the_same_samples(kind: str, tmp_path: Path) -> None:
    """In 1 and 2 calls from the same noise, to 1e-5 of the largest, by a pipeline that imports nothing of fewstep."""
    pytest.importorskip("diffusers")
    tiny = TINY[kind]
    save_foreign(tmp_path / "teacher", kind)
    student = trained(Pipeline(load_diffusers(tmp_path / "teacher", tiny.shape)))
    export_diffusers(student, tmp_path / "out", (1, 2))
    assert "fewstep." not in (tmp_path / "out" / "pipeline.py").read_text().replace("fewstep/", "")
    found = load_pipeline(tmp_path / "out", trust_remote_code=True)
    cond = tiny.condition(2)
    for calls in (1, 2):
        assert_drawn_alike(student, found, calls, cond, own_words(kind, cond))
    if kind not in FLOWS:
        with pytest.raises(ValueError, match="num_inference_steps is 3; this folder has 1, 2"):
            found(num_inference_steps=3)


@pytest.mark.parametrize("kind", FLOWS)
def test_a_student_of_velocities_is_stepped_by_diffusers_scheduler(kind: str, tmp_path: Path) -> None:
    """With linear preconditioning, in any number of calls, at tuned times where there are any."""
    pytest.importorskip("diffusers")
    tiny = TINY[kind]
    save_foreign(tmp_path / "teacher", kind)
    student = trained(linear(load_diffusers(tmp_path / "teacher", tiny.shape)))
    student = student.with_step_times((StepTimes("map", 0.0, 1.0, (1.0, 0.8, 0.0), "a test"),))
    export_diffusers(student, tmp_path / "out", (1, 2))
    found = load_pipeline(tmp_path / "out", trust_remote_code=True)
    assert type(found.scheduler).__name__ == "FlowMapEulerDiscreteScheduler"
    cond = tiny.condition(2)
    for calls, times in ((1, (1.0, 0.0)), (2, (1.0, 0.8, 0.0)), (3, (1.0, 2 / 3, 1 / 3, 0.0))):
        assert_drawn_alike(student, found, calls, cond, own_words(kind, cond), times)


def linear(flow_map: FlowMap) -> Pipeline:
    """The same network under linear jumps."""
    assert flow_map.config is not None
    config, jumps = flow_map.config, LinearPreconditioning()
    scaling = config.scaling.on(config.path, jumps.denoises)
    made = replace(config, preconditioning=jumps, scaling=scaling).build()
    made.network.load_state_dict(flow_map.network.state_dict())
    return Pipeline(made.eval())


def load_pipeline(folder: Path, **options: Any) -> Any:
    from diffusers import DiffusionPipeline

    found = DiffusionPipeline.from_pretrained(folder, **options)
    found.set_progress_bar_config(disable=True)
    return found


def assert_drawn_alike(
    student: Pipeline, found: Any, calls: int, cond: Condition, words: dict[str, Any], times: tuple[float, ...] = ()
) -> None:
    """The same samples from the same noise, at these times or evenly spaced ones."""
    path, shape = student.flow_map.path, student.flow_map.sample_shape
    grid = torch.tensor(times, dtype=torch.float64)
    if not times:
        grid = torch.linspace(path.t_max, path.t_min, calls + 1, dtype=torch.float64)
    with torch.no_grad():
        own = map_sampler(student.flow_map, path.prior(noise(shape, 2)), grid, cond, Draws(0, 0, torch.arange(2)))
    theirs = found(num_inference_steps=calls, latents=noise(shape, 2), output_type="latent", **words).images
    torch.testing.assert_close(theirs, own, rtol=1e-5, atol=1e-5 * float(own.abs().max()))


@pytest.fixture(scope="module")
def small() -> Pipeline:
    """A map of the house's own, with tuned times for two steps."""
    config = FlowMapConfig(
        Linear(), LinearPreconditioning(), IdentityScaling(), MLPConfig(width=16, depth=1), (1, 4, 4), num_classes=3
    )
    tuned = StepTimes("map", 0.0, 1.0, (1.0, 0.7, 0.0), "a test")
    return trained(Pipeline(config.build())).with_step_times((tuned,))


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_traced_programs_give_the_same_jumps_and_samples(small: Pipeline, kind: Any, tmp_path: Path) -> None:
    """Of any batch size, at the tuned times, to 1e-5."""
    if kind == "onnx":
        pytest.importorskip("onnxscript")
    export_traced(small, tmp_path / "out", kind, (2,))
    for count in (1, 5):
        labels = torch.arange(count) % 3
        own = small.generate(count, steps=2, labels=labels, clip=False).samples
        assert_same(run(tmp_path / "out", "sampler-2", kind, noise=noise((1, 4, 4), count), labels=labels), own)
        x, t, s = noise((1, 4, 4), count), torch.rand(count) * 0.5 + 0.5, torch.rand(count) * 0.5
        jump = small.flow_map.jump(x, t, s, Condition(labels)).detach()
        assert_same(run(tmp_path / "out", "jump", kind, x=x, t=t, s=s, labels=labels), jump)


@pytest.mark.parametrize("kind", ["onnx", "torch"])
@pytest.mark.parametrize("jumps", ["linear", "analytic"])
def test_a_model_without_classes_is_traced(jumps: str, kind: Any, tmp_path: Path) -> None:
    """It takes noise alone; of any batch size, to 1e-5. A jump computed from a teacher is taken about a mean."""
    if kind == "onnx":
        pytest.importorskip("onnxscript")
    statistics = copy_with_mean(wavy(), torch.full((1, 4, 4), 0.3, dtype=torch.float64))
    own = AnalyticPreconditioning(statistics, path=Linear()) if jumps == "analytic" else LinearPreconditioning()
    network = MLPConfig(width=16, depth=1)
    plain = trained(Pipeline(FlowMapConfig(Linear(), own, IdentityScaling(), network, (1, 4, 4)).build()))
    export_traced(plain, tmp_path / "out", kind, (2,))
    for count in (1, 5):
        drawn = plain.generate(count, steps=2, clip=False).samples
        assert_same(run(tmp_path / "out", "sampler-2", kind, noise=noise((1, 4, 4), count)), drawn)
        x, t, s = noise((1, 4, 4), count), torch.rand(count) * 0.5 + 0.5, torch.rand(count) * 0.5
        assert_same(run(tmp_path / "out", "jump", kind, x=x, t=t, s=s), plain.flow_map.jump(x, t, s).detach())


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def run(folder: Path, name: str, kind: str, **inputs: torch.Tensor) -> torch.Tensor:
    if kind == "torch":
        found: torch.Tensor = torch.export.load(folder / f"{name}.pt2").module()(*inputs.values())
        return found.detach()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"))
    return torch.from_numpy(session.run(None, {key: value.numpy() for key, value in inputs.items()})[0])


def test_what_does_not_fit_a_format_is_said(small: Pipeline, tmp_path: Path) -> None:
    """Another network in diffusers' format, and a folder with something in it; nothing is written."""
    with pytest.raises(ConfigError, match="only students with a network of diffusers"):
        export_diffusers(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(ConfigError, match="has something in it"):
        export_traced(small, tmp_path / "full", "torch")


def adapted(flow_map: FlowMap) -> Pipeline:
    """The same network, frozen, with adapters."""
    assert flow_map.config is not None
    assert isinstance(flow_map.config.network, DiffusersConfig)
    made = replace(flow_map.config, network=flow_map.config.network.with_lora(LoRA(2))).build().eval()
    made.network.share_base(flow_map.network)
    return Pipeline(made)


ONE_STAGE = {
    "block_out_channels": (8,), "down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind", "change", "smaller"),
    [
        ("FluxTransformer2DModel", "torch", Pipeline, {}),
        ("PixArtTransformer2DModel", "onnx", Pipeline, {"num_layers": 1}),
        ("UNet2DModel", "torch", adapted, ONE_STAGE),
    ],
    ids=["packed", "masked prompts", "adapters"],
)
def test_traced_networks_of_diffusers_are_told_everything(
    name: str, kind: Any, change: Any, smaller: dict[str, Any], tmp_path: Path
) -> None:
    """Labels, prompts of any length with their mask and pooled embedding, in batches of any size; to 1e-5."""
    pytest.importorskip("diffusers")
    if kind == "onnx":
        pytest.importorskip("onnxscript")
    tiny = TINY[name]
    save_foreign(tmp_path / "teacher", name, **smaller)
    student = trained(change(load_diffusers(tmp_path / "teacher", tiny.shape)))
    flow_map, path, table = student.flow_map, student.flow_map.path, step_table(student, (1,))
    module = SamplerModule(flow_map, tuple(conditions(flow_map)), table.prior, table.steps[1]).eval()
    with torch.no_grad():
        writer_of(kind)(module, {"noise": noise(tiny.shape, 2)}, conditions(flow_map), tmp_path / f"one{SUFFIX[kind]}")
    cond, x = tiny.condition(3), noise(tiny.shape, 3)
    given = {key: getattr(cond, key) for key in ("labels", "text", "pooled") if getattr(cond, key) is not None}
    if flow_map.network.masks_prompts:
        given["text_mask"] = torch.tensor([[True, True, False, True, False]]).repeat(3, 1)
        cond = replace(cond, prompts=Prompts(cond.text, given["text_mask"]))
    assert given.keys() == conditions(flow_map).keys()
    times = torch.tensor([path.t_max, path.t_min], dtype=torch.float64)
    with torch.no_grad():
        own = map_sampler(flow_map, path.prior(x), times, cond, Draws(0, 0, torch.arange(3)))
    found = run(tmp_path, "one", kind, noise=x, **{key: given[key] for key in conditions(flow_map)})
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5 * float(own.abs().max()))


def test_adapters_are_merged_into_what_diffusers_loads(tmp_path: Path) -> None:
    """The folder holds the network's own layers alone, and draws the student's samples."""
    pytest.importorskip("diffusers")
    save_foreign(tmp_path / "teacher", "UNet2DModel")
    student = trained(adapted(load_diffusers(tmp_path / "teacher", (1, 8, 8))))
    export_diffusers(student, tmp_path / "out", (2,))
    cond = TINY["UNet2DModel"].condition(2)
    found = load_pipeline(tmp_path / "out", trust_remote_code=True)
    assert_drawn_alike(student, found, 2, cond, {"class_labels": cond.labels})


def test_what_cannot_be_traced_is_one_line_and_nothing_is_written(
    small: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a network that asks its input's values."""

    def asking(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return x if bool(x.sum() > 0) else -x

    monkeypatch.setattr(small.flow_map.network, "forward", asking)
    with pytest.raises(ConfigError, match=r"^MLP cannot be traced to torch: [^\n]*$"):
        export_traced(small, tmp_path / "out", "torch")
    assert list(tmp_path.iterdir()) == []
