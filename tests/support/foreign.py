"""Tiny networks of diffusers, one of each family, saved as their users have them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from fewstep.flow.flow_map import FlowMap
from fewstep.networks.condition import Condition, Prompts
from fewstep.teachers.diffusers import load_diffusers
from fewstep.teachers.edm import load_edm
from tests.support.edm_files import save_edm

SD_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
FLOW_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}


class Tiny(NamedTuple):
    """settings: of the network. scheduler: its configuration. shape: of a sample. text, pooled: widths, 0 for none."""

    settings: dict[str, Any]
    scheduler: dict[str, Any]
    shape: tuple[int, ...]
    text: int = 0
    pooled: int = 0

    def condition(self, batch: int) -> Condition:
        """Labels or prompts, drawn."""
        draw = torch.Generator().manual_seed(3)
        classes = self.settings.get("num_class_embeds") or self.settings.get("num_embeds_ada_norm")
        labels = torch.arange(batch) % classes if classes and not self.text else None
        if not self.text:
            return Condition(labels)
        text = torch.randn(batch, 5, self.text, generator=draw)
        pooled = torch.randn(batch, self.pooled, generator=draw) if self.pooled else None
        return Condition(labels, prompts=Prompts(text, pooled=pooled))


_UNET = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
TINY: dict[str, Tiny] = {
    "UNet2DModel": Tiny(
        {**_UNET, "in_channels": 1, "out_channels": 1, "num_class_embeds": 10, "attention_head_dim": 4,
         "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        (1, 8, 8),
    ),
    "UNet2DConditionModel": Tiny(
        {**_UNET, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 6, "attention_head_dim": 4,
         "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
        SD_SCHEDULER, (4, 8, 8), 6,
    ),
    "SDXL": Tiny(
        {**_UNET, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 6, "attention_head_dim": 4,
         "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "addition_embed_type": "text_time",
         "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 5},
        {**SD_SCHEDULER, "_class_name": "EulerDiscreteScheduler"}, (4, 8, 8), 6, 5,
    ),
    "DiTTransformer2DModel": Tiny(
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2,
         "sample_size": 8, "num_embeds_ada_norm": 10, "norm_num_groups": 4},
        {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "clip_sample": False}, (4, 8, 8),
    ),
    "SD3Transformer2DModel": Tiny(
        {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
         "num_attention_heads": 2, "joint_attention_dim": 6, "caption_projection_dim": 16,
         "pooled_projection_dim": 5, "pos_embed_max_size": 8},
        FLOW_SCHEDULER, (4, 8, 8), 6, 5,
    ),
    "FluxTransformer2DModel": Tiny(
        {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
         "num_attention_heads": 2, "joint_attention_dim": 6, "pooled_projection_dim": 5,
         "axes_dims_rope": (2, 2, 4), "guidance_embeds": True},
        FLOW_SCHEDULER, (4, 8, 8), 6, 5,
    ),
    "PixArtTransformer2DModel": Tiny(
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2,
         "cross_attention_dim": 16, "caption_channels": 6, "sample_size": 8, "use_additional_conditions": False,
         "norm_num_groups": 4},
        {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "linear"}, (4, 8, 8), 6,
    ),
    "SanaTransformer2DModel": Tiny(
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
         "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16,
         "caption_channels": 6, "sample_size": 8, "patch_size": 1},
        {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction",
         "use_flow_sigmas": True, "flow_shift": 3.0},
        (4, 8, 8), 6,
    ),
    "WanTransformer3DModel": Tiny(
        {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
         "out_channels": 4, "text_dim": 6, "freq_dim": 16, "ffn_dim": 16, "num_layers": 2, "rope_max_seq_len": 16},
        FLOW_SCHEDULER, (4, 2, 8, 8), 6,
    ),
}  # fmt: skip


EDM_KINDS = ("ddpmpp", "ncsnpp", "adm", "edm2")
"""Of network pickles, those that differ in what students have."""
TRAINED = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")
"""Those that a minute on digits has trained: tests/fixtures/foreign, by `python -m benchmarks.foreign tiny`."""
FIXTURES = Path(__file__).parents[1] / "fixtures" / "foreign"


def class_name(kind: str) -> str:
    """The class of diffusers that a name above stands for."""
    return "UNet2DConditionModel" if kind == "SDXL" else kind


def make_model(kind: str, seed: int = 0, scale: float = 0.2, **changes: Any) -> Any:
    """The network with weights of that scale drawn from a seed, none of them zero; changes: to its settings."""
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(diffusers, class_name(kind))(**{**TINY[kind].settings, **changes}).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=scale)
    return model


def save_foreign(folder: Path, kind: str, bare: bool = False, trained: bool = False, **changes: Any) -> Any:
    """Save it as a pipeline, or as a bare network with its scheduler beside it; returns the network.

    trained: with the weights of one of TRAINED. changes: to the network's settings.
    """
    model = make_model(kind, **changes)
    if trained:
        model.load_state_dict(load_file(FIXTURES / f"{kind}.safetensors"))
    name = "unet" if "UNet" in class_name(kind) else "transformer"
    model.save_pretrained(folder if bare else folder / name)
    scheduler = folder if bare else folder / "scheduler"
    scheduler.mkdir(parents=True, exist_ok=True)
    (scheduler / "scheduler_config.json").write_text(json.dumps(TINY[kind].scheduler))
    if not bare:
        index = {"_class_name": "Pipeline", name: ["diffusers", class_name(kind)]}
        (folder / "model_index.json").write_text(json.dumps(index))
    return model


def read_teacher(kind: str, folder: Path) -> tuple[FlowMap, Condition]:
    """A teacher of TINY or EDM_KINDS, saved in the folder and read, and a condition of two samples."""
    if kind in EDM_KINDS:
        save_edm(folder / "n.pkl", kind)
        return load_edm(folder / "n.pkl"), Condition(torch.tensor([0, 2]))
    pytest.importorskip("diffusers")
    save_foreign(folder, kind)
    return load_diffusers(folder, TINY[kind].shape), TINY[kind].condition(2)
