"""Teachers of diffusers: each family is its library's own model, and its student equals it to the last bit at first."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.export.diffusers import export_diffusers
from fewstep.flow.flow_map import FlowMap
from fewstep.networks.condition import Condition
from fewstep.objectives import CTM, EMD, Batch, Companions, Objective, TeacherSteps
from fewstep.sampling.pipeline import Pipeline, PipelineConfig, load_pipeline
from fewstep.sampling.samplers import map_sampler
from fewstep.teachers.diffusers import load_diffusers
from fewstep.training.probe import fault, needs_probe
from fewstep.utils.errors import CheckpointError, ConfigError, FewstepWarning
from fewstep.utils.random import Draws
from tests.export.test_export import assert_drawn_alike, own_words
from tests.export.test_export import load_pipeline as load_exported
from tests.support.foreign import TINY, TRAINED, Tiny, save_foreign


def own_prediction(model: Any, kind: str, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """What diffusers' pipelines call, written out for each family."""
    text, pooled = cond.text, cond.pooled
    if kind in ("UNet2DModel", "DiTTransformer2DModel"):
        found = model(x, t, class_labels=cond.labels).sample
    elif kind == "UNet2DConditionModel":
        found = model(x, t, encoder_hidden_states=text).sample
    elif kind == "SDXL":
        ids = torch.tensor([64.0, 64, 0, 0, 64, 64]).expand(len(x), 6)
        found = model(
            x, t, encoder_hidden_states=text, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}
        ).sample
    elif kind == "SD3Transformer2DModel":
        found = model(x, timestep=t, encoder_hidden_states=text, pooled_projections=pooled).sample
    elif kind == "FluxTransformer2DModel":
        found = flux_prediction(model, x, t, cond)
    elif kind == "PixArtTransformer2DModel":
        more = {"resolution": None, "aspect_ratio": None}
        found = model(x, timestep=t, encoder_hidden_states=text, added_cond_kwargs=more).sample
    else:
        found = model(x, timestep=t, encoder_hidden_states=text).sample
    return found.chunk(2, 1)[0] if found.shape[1] == 2 * x.shape[1] else found


def flux_prediction(model: Any, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """Token 4 i + j holds the block of 2 x 2 at row i and column j, channel by channel."""
    assert cond.text is not None
    blocks = [(i, j) for i in range(4) for j in range(4)]
    tokens = torch.stack([x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1) for i, j in blocks], 1)
    found = model(
        tokens,
        timestep=t / 1000,
        encoder_hidden_states=cond.text,
        pooled_projections=cond.pooled,
        img_ids=torch.tensor([[0.0, i, j] for i, j in blocks]),
        txt_ids=torch.zeros(cond.text.shape[1], 3),
        guidance=torch.full((len(x),), 3.5),
    ).sample
    image = torch.empty_like(x)
    for token, (i, j) in enumerate(blocks):
        image[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = found[:, token].unflatten(1, (-1, 2, 2))
    return image


def own_denoiser(tiny: Tiny, prediction: Tensor, x: Tensor, step: int) -> Tensor:
    """What diffusers' scheduler makes of a prediction at a whole step: x0, by its own tables."""
    import diffusers

    if "Flow" in tiny.scheduler["_class_name"] or tiny.scheduler.get("use_flow_sigmas"):
        return x - step / 1000 * prediction
    taken = ("beta_schedule", "beta_start", "beta_end", "prediction_type")
    settings = {key: value for key, value in tiny.scheduler.items() if key in taken}
    scheduler = diffusers.DDPMScheduler(**settings, clip_sample=False)
    return scheduler.step(prediction, step, x).pred_original_sample


NAMES = (*TINY, *(f"{kind}, trained" for kind in TRAINED))


def kind_of(name: str) -> str:
    return name.removesuffix(", trained")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, FlowMap]]:
    pytest.importorskip("diffusers")
    found = {}
    for name in NAMES:
        folder: Path = tmp_path_factory.mktemp(name)
        kind, trained = kind_of(name), name != kind_of(name)
        found[name] = save_foreign(folder, kind, trained=trained), load_diffusers(folder, TINY[kind].shape)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_its_denoiser_is_the_librarys_own(name: str, teachers: dict[str, tuple[Any, FlowMap]]) -> None:
    """x0 of the prediction, by the scheduler's own tables, at several steps, to 1e-5 of the largest."""
    model, teacher = teachers[name]
    kind = kind_of(name)
    tiny = TINY[kind]
    cond = tiny.condition(2)
    for step in (20, 400, 980):
        x = torch.randn(2, *tiny.shape, generator=torch.Generator().manual_seed(step))
        with torch.no_grad():
            own = own_denoiser(tiny, own_prediction(model, kind, x, torch.tensor([step, step]), cond), x, step)
            t = torch.full((2,), step / 1000 * teacher.path.t_max if teacher.path.t_max == 1 else float(step))
            size = 1e-5 * max(1.0, float(own.abs().max()))
            torch.testing.assert_close(teacher.denoise(x, t.double(), cond), own, rtol=1e-5, atol=size)


@pytest.mark.parametrize("name", NAMES)
def test_its_student_equals_it_at_first_wherever_jumps_end(name: str, teachers: dict[str, tuple[Any, FlowMap]]) -> None:
    """N(x, t, s) is the denoiser to the last bit, whatever s; and s counts once its branch has moved."""
    _, teacher = teachers[name]
    kind = kind_of(name)
    cond = TINY[kind].condition(2)
    x = torch.randn(2, *TINY[kind].shape, generator=torch.Generator().manual_seed(0))
    t, s = torch.full((2,), 0.6 * teacher.path.t_max), torch.full((2,), 0.2 * teacher.path.t_max)
    with torch.no_grad():
        assert torch.equal(teacher.output(x, t, s, cond), teacher.denoise(x, t, cond))
        network: Any = teacher.network
        moved = list(network.two_times.new_parameters())
        for parameter in moved:
            parameter.add_(0.1)
        assert not torch.equal(teacher.output(x, t, s, cond), teacher.output(x, t, t, cond))
        for parameter in moved:
            parameter.sub_(0.1)


STUDIED: dict[str, Objective] = {"ctm": CTM(steps=TeacherSteps(points=4)), "emd": EMD(label_dropout=0.1)}
STEPS = 3


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TRAINED])
def test_its_students_train_are_saved_loaded_exported_and_sampled(
    name: str, teachers: dict[str, tuple[Any, FlowMap]], tmp_path: Path
) -> None:
    """CTM and a continuous objective move its weights, with its own conditions; forward mode passes all its layers."""
    _, teacher = teachers[name]
    kind = kind_of(name)
    assert teacher.config is not None
    for word, objective in STUDIED.items():
        student, average = (teacher.config.build() for _ in range(2))
        for each in (student, average):
            each.network.load_state_dict(teacher.network.state_dict())
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        companions = Companions(teacher=teacher, ema_target=average.requires_grad_(False))
        assert not needs_probe(objective) or fault(objective, student, batch(kind, 0)) == ""
        for step in range(STEPS):
            loss = objective(student, batch(kind, step), companions).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert bool(loss.isfinite())
        network: Any = student.network
        assert all(bool(parameter.abs().max() > 0) for parameter in network.two_times.new_parameters())
        Pipeline(student, PipelineConfig()).save(tmp_path / word)
        loaded = load_pipeline(tmp_path / word).flow_map
        x, cond = teacher.path.prior(batch(kind, 0).noise()), TINY[kind].condition(2)
        times = torch.linspace(teacher.path.t_max, teacher.path.t_min, 3, dtype=torch.float64)
        with torch.no_grad():
            first, second = (
                map_sampler(each, x, times, cond, batch(kind, 0).draws) for each in (student.eval(), loaded)
            )
        assert torch.equal(first, second)
        assert bool(first.isfinite().all())
    export_diffusers(load_pipeline(tmp_path / word), tmp_path / "out", (2,))
    exported = load_exported(tmp_path / "out", trust_remote_code=True)
    assert_drawn_alike(load_pipeline(tmp_path / word), exported, 2, cond, own_words(kind, cond))


def batch(kind: str, step: int) -> Batch:
    """Two samples of noise with the family's own conditions."""
    draws, cond = Draws(0, step, torch.arange(2)), TINY[kind].condition(2)
    x0 = 0.5 * draws.normal(0, TINY[kind].shape)
    return Batch(x0, cond.labels, draws, images=2 * step, prompts=cond.prompts)


@pytest.mark.parametrize(
    ("changes", "t"),
    [
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5, "sigma_min": 0.01, "sigma_max": 50.0}, 3.0),
        ({"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, 900.0),
        ({"_class_name": "DDPMScheduler", "trained_betas": [0.002 * k for k in range(1, 101)]}, 60.0),
        ({"_class_name": "DDPMScheduler", "prediction_type": "sample"}, 500.0),
    ],
    ids=["edm", "zero-snr", "trained-betas", "sample"],
)
def test_its_denoiser_is_what_its_scheduler_makes_of_it(changes: dict[str, Any], t: float, tmp_path: Path) -> None:
    """Kinds of schedules and predictions that no family above has."""
    import diffusers

    settings = {"num_train_timesteps": len(changes.get("trained_betas", range(1000))), "clip_sample": False, **changes}
    model = save_foreign(tmp_path, "UNet2DModel", bare=True)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(settings))
    teacher = load_diffusers(tmp_path)
    scheduler = getattr(diffusers, changes["_class_name"]).from_config(settings)
    x, labels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 7])
    with torch.no_grad():
        if "sigma_data" in changes:
            sigma = torch.tensor(t)
            raw = model(scheduler.precondition_inputs(x, sigma), sigma.log() / 4, class_labels=labels).sample
            own = scheduler.precondition_outputs(x, raw, sigma)
        else:
            scheduler.set_timesteps(settings["num_train_timesteps"])
            own = scheduler.step(model(x, int(t), class_labels=labels).sample, int(t), x).pred_original_sample
        found = teacher.denoise(x, torch.full((2,), t, dtype=torch.float64), Condition(labels))
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5 * max(1.0, float(own.abs().max())))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"_class_name": "SCMScheduler"}, "the noise of SCMScheduler is not known"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, "the noise of CMStochasticIterativeScheduler is not known"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "'epsilon' with use_flow_sigmas"),
    ],
)
def test_a_scheduler_of_unknown_noise_is_not_taken_for_another(
    settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    save_foreign(tmp_path, "UNet2DModel", bare=True)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=reason):
        load_diffusers(tmp_path)


def test_samples_of_another_size_than_it_was_made_for_are_warned_of(tmp_path: Path) -> None:
    save_foreign(tmp_path / "unet", "UNet2DModel", bare=True)
    with pytest.warns(FewstepWarning, match=r"samples of 8x8, and the data have 16x16: .* --data.image-size 8"):
        load_diffusers(tmp_path / "unet", (1, 16, 16))


def test_load_teacher_reads_what_a_run_takes(tmp_path: Path) -> None:
    """A folder of diffusers, a saved model and a class in a file are flow maps with a denoiser, without gradients."""
    save_foreign(tmp_path / "unet", "UNet2DModel", bare=True)
    (tmp_path / "own.py").write_text(
        "from fewstep import EDM, TeacherModel\n\n\nclass Own(TeacherModel):\n"
        "    def __init__(self):\n        super().__init__(EDM(), shape=(1, 8, 8))\n\n"
        "    def denoise(self, x, t, cond):\n        return 0 * x\n"
    )
    for name in (tmp_path / "unet", f"{tmp_path / 'own.py'}:Own"):
        teacher = fewstep.load_teacher(name)
        x, t = torch.randn(2, 1, 8, 8), torch.full((2,), teacher.path.t_max)
        assert teacher.denoise(x, t, Condition()).shape == x.shape
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
    with pytest.raises(CheckpointError):
        fewstep.load_teacher(tmp_path / "nowhere")
