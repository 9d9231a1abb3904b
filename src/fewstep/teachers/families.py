"""The families of diffusers' networks: where each embeds time, how it is called, what it is conditioned on.

Every call is (model, x, t, cond) -> the prediction with x's channels; a learned variance, in further channels, is left
out. Networks of text that are given none see one token of zeros.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.networks.condition import Condition
from fewstep.utils.errors import ConfigError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
Settings = dict[str, Any]
Call = Callable[[Any, Tensor, Tensor, Condition], Tensor]
_FLUX_GUIDANCE, _SANA_GUIDANCE = 3.5, 4.5
"""Strengths that networks made to take one are given: those their pipelines give by themselves."""


@dataclass(frozen=True)
class Family:
    """How networks of one class of diffusers are used.

    times: the names of their embeddings of t, as fnmatch reads them. first, output: the names of the first and the last
    layer. noise_time: the time that the class takes where there is noise alone. packed: whether it takes blocks of
    2 x 2 as tokens.
    text, pooled: the names of the settings that say the widths of the embeddings of prompts that it takes.
    guidance: the strength that those made to take one are given. masked: whether it looks at a mask of tokens.
    attention: last parts of the names of attention's layers.
    """

    call: Call
    times: str
    output: str
    noise_time: float = 1000.0
    first: str = "pos_embed.proj"
    packed: bool = False
    text: str = ""
    pooled: str = ""
    guidance: float = 0.0
    masked: bool = False
    attention: tuple[str, ...] = ATTENTION

    def num_classes(self, settings: Settings) -> int:
        """Classes that the network was made for; 0 for none."""
        return int(settings.get("num_class_embeds") or 0)

    def prompt_widths(self, settings: Settings) -> tuple[int, int]:
        """Widths of the embeddings of a prompt's tokens, and of the whole prompt; 0 where it takes none."""
        return int(settings.get(self.text) or 0), int(settings.get(self.pooled) or 0)

    def null_label(self, settings: Settings) -> int | None:
        """The row of "no class" among its embeddings of classes; None where there is no such row."""
        return None

    def guidance_input(self, settings: Settings) -> float | None:
        """The strength of guidance that it is given as an input; None for a network that takes none."""
        return self.guidance * settings.get("guidance_embeds_scale", 1.0) if settings.get("guidance_embeds") else None


@dataclass(frozen=True)
class _DiT(Family):
    def num_classes(self, settings: Settings) -> int:
        return int(settings.get("num_embeds_ada_norm") or 0)

    def null_label(self, settings: Settings) -> int | None:
        return self.num_classes(settings)


@dataclass(frozen=True)
class _UNetWithText(Family):
    def prompt_widths(self, settings: Settings) -> tuple[int, int]:
        text, pooled = settings.get(self.text) or 1280, 0  # 1280 is diffusers' own where nothing is said
        if settings.get("addition_embed_type") == "text_time":
            pooled = settings["projection_class_embeddings_input_dim"] - 6 * settings["addition_time_embed_dim"]
        return int(text), int(pooled)


class NullableEmbedding(nn.Module):
    """An embedding of classes in which NULL_LABEL is zero: for networks that have no row for "no class"."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, labels: Tensor) -> Tensor:
        found: Tensor = self.embedding(labels.clamp(min=0))
        return found * (labels >= 0)[:, None].to(found.dtype)


def _labels(x: Tensor, cond: Condition, null: int) -> Tensor:
    if cond.labels is None:
        return torch.full(x.shape[:1], null, device=x.device)
    return torch.where(cond.labels < 0, null, cond.labels)


def _text(x: Tensor, cond: Condition, width: int) -> Tensor:
    return x.new_zeros(x.shape[0], 1, width) if cond.text is None else cond.text.to(x.dtype)


def _pooled(x: Tensor, cond: Condition, width: int) -> Tensor:
    return x.new_zeros(x.shape[0], width) if cond.pooled is None else cond.pooled.to(x.dtype)


def _strength(x: Tensor, cond: Condition, usual: float) -> Tensor:
    """omega (B,) for networks with an input for it; the pipeline's usual one where none is given."""
    return x.new_full(x.shape[:1], usual) if cond.guidance is None else cond.guidance[:, 0].exp().to(x.dtype)


def _unet(model: Any, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    labels = None if model.config.num_class_embeds is None else _labels(x, cond, -1)
    found: Tensor = model(x, t, class_labels=labels).sample
    return found


def _dit(model: Any, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    found: Tensor = model(x, timestep=t, class_labels=_labels(x, cond, model.config.num_embeds_ada_norm)).sample
    return found


def _unet_with_text(model: Any, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    config, more = model.config, {}
    if config.addition_embed_type == "text_time":  # SDXL: the size, the crop and the size again
        height, width = (side * 8 for side in x.shape[-2:])
        sizes = x.new_tensor([height, width, 0, 0, height, width]).expand(x.shape[0], 6)
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        more = {"text_embeds": _pooled(x, cond, pooled), "time_ids": sizes}
    text = _text(x, cond, config.cross_attention_dim)
    found: Tensor = model(
        x, t, encoder_hidden_states=text, encoder_attention_mask=cond.text_mask, added_cond_kwargs=more
    ).sample
    return found


def _sd3(model: Any, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    text = _text(x, cond, model.config.joint_attention_dim)
    pooled = _pooled(x, cond, model.config.pooled_projection_dim)
    found: Tensor = model(x, timestep=t, encoder_hidden_states=text, pooled_projections=pooled).sample
    return found


def packed(x: Tensor) -> Tensor:
    """(B, C, H, W) as tokens of blocks of 2 x 2, (B, H W/4, 4 C)."""
    batch, channels, height, width = x.shape
    blocks = x.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)


def _flux(model: Any, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """Latents are packed, each token with its row and column."""
    (batch, channels, height, width), config = x.shape, model.config
    rows, columns = height // 2, width // 2
    places = torch.zeros(rows, columns, 3, device=x.device, dtype=x.dtype)
    places[..., 1] = torch.arange(rows, device=x.device)[:, None]
    places[..., 2] = torch.arange(columns, device=x.device)
    text, pooled = _text(x, cond, config.joint_attention_dim), _pooled(x, cond, config.pooled_projection_dim)
    guidance = _strength(x, cond, _FLUX_GUIDANCE) if config.guidance_embeds else None
    found: Tensor = model(
        packed(x), timestep=t, encoder_hidden_states=text, pooled_projections=pooled,
        img_ids=places.reshape(-1, 3), txt_ids=x.new_zeros(text.shape[1], 3), guidance=guidance,
    ).sample  # fmt: skip
    return found.reshape(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def _pixart(model: Any, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    more: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        height, width = (side * 8 for side in x.shape[-2:])
        more = {"resolution": x.new_tensor([[height, width]]).expand(x.shape[0], 2)}
        more["aspect_ratio"] = x.new_full((x.shape[0], 1), height / width)
    found: Tensor = model(
        x, timestep=t, encoder_hidden_states=_text(x, cond, model.config.caption_channels),
        encoder_attention_mask=cond.text_mask, added_cond_kwargs=more,
    ).sample  # fmt: skip
    return found


def _sana(model: Any, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    config = model.config
    guidance = _strength(x, cond, _SANA_GUIDANCE) * config.guidance_embeds_scale if config.guidance_embeds else None
    found: Tensor = model(
        x, timestep=t * config.timestep_scale, encoder_hidden_states=_text(x, cond, config.caption_channels),
        encoder_attention_mask=cond.text_mask, guidance=guidance,
    ).sample  # fmt: skip
    return found


def _wan(model: Any, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    found: Tensor = model(x, timestep=t, encoder_hidden_states=_text(x, cond, model.config.text_dim)).sample
    return found


FAMILIES: dict[str, Family] = {
    "UNet2DModel": Family(_unet, "time_embedding", "conv_out", first="conv_in"),
    "UNet2DConditionModel": _UNetWithText(
        _unet_with_text, "time_embedding", "conv_out", first="conv_in", text="cross_attention_dim"
    ),
    "DiTTransformer2DModel": _DiT(_dit, "transformer_blocks.*.norm1.emb.timestep_embedder", "proj_out_2"),
    "SD3Transformer2DModel": Family(
        _sd3, "time_text_embed.timestep_embedder", "proj_out", text="joint_attention_dim",
        pooled="pooled_projection_dim",
    ),
    "FluxTransformer2DModel": Family(
        _flux, "time_text_embed.timestep_embedder", "proj_out", 1.0, "x_embedder", packed=True,
        text="joint_attention_dim", pooled="pooled_projection_dim", guidance=_FLUX_GUIDANCE,
    ),
    "PixArtTransformer2DModel": Family(
        _pixart, "adaln_single.emb.timestep_embedder", "proj_out", text="caption_channels", masked=True
    ),
    "SanaTransformer2DModel": Family(
        _sana, "time_embed*timestep_embedder", "proj_out", first="patch_embed.proj", text="caption_channels",
        guidance=_SANA_GUIDANCE, masked=True,
    ),
    "WanTransformer3DModel": Family(
        _wan, "condition_embedder.time_embedder", "proj_out", first="patch_embedding", text="text_dim"
    ),
}  # fmt: skip


def family(name: str) -> Family:
    """The family of a class of diffusers; raises ConfigError for one that is not there."""
    if name not in FAMILIES:
        raise ConfigError(f"networks of class {name!r} are not known; known are {', '.join(FAMILIES)}")
    return FAMILIES[name]
