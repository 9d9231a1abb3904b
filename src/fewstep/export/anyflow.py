"""Students of Wan as what diffusers has a pipeline for: AnyFlowTransformer3DModel, which takes both times itself.

AnyFlow embeds them as (1 - g) E(t) + g E'(s). With g = 1/2, E is twice the teacher's embedding and E' twice that of the
second time; both are exact in floating point. It steps with FlowMapEulerDiscreteScheduler: x + (s - t) F(x, t, s).
"""

from typing import Any

from torch import Tensor

from fewstep.export.parts import Found, teachers_latents
from fewstep.teachers.families import Settings

MODEL, PIPELINE = "AnyFlowTransformer3DModel", "AnyFlowPipeline"
_FEATURES = 256  # sines and cosines of the second time (teachers/second_time.py)
_SETTINGS = (
    "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim", "freq_dim", "ffn_dim",
    "num_layers", "cross_attn_norm", "eps", "rope_max_seq_len",
)  # fmt: skip
_EMBEDDER, _SECOND = "condition_embedder.time_embedder", "condition_embedder.delta_embedder"


def is_anyflow(model: str, settings: Settings, found: Found) -> bool:
    """Whether a network, whose steps are the scheduler's, and its parts are AnyFlow's, number for number."""
    whole = {"vae", "text_encoder", "tokenizer"} <= found.components.keys()
    return (
        model == "WanTransformer3DModel"
        and whole
        and settings.get("freq_dim", _FEATURES) == _FEATURES
        and settings.get("image_dim") is None
        and settings.get("qk_norm", "rms_norm_across_heads") == "rms_norm_across_heads"
        and next(iter(settings.get("patch_size", (1, 2, 2)))) == 1
        and found.latents == teachers_latents(found.components["vae"][1], found.folders["vae"])
    )


def anyflow_settings(settings: Settings) -> dict[str, Any]:
    """config.json of the network."""
    own = {name: settings[name] for name in _SETTINGS if name in settings}
    patch = list(settings.get("patch_size", (1, 2, 2)))
    return {"_class_name": MODEL, **own, "patch_size": patch, "gate_value": 0.5, "deltatime_type": "r"}


def anyflow_weights(foreign: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by AnyFlow's names; foreign: of the teacher's network, second: of the second time."""
    found = dict(foreign)
    for part in ("weight", "bias"):
        found[f"{_EMBEDDER}.linear_2.{part}"] = 2 * foreign[f"{_EMBEDDER}.linear_2.{part}"]
        found[f"{_SECOND}.linear_1.{part}"] = second[f"second_time.hidden.{part}"]
        found[f"{_SECOND}.linear_2.{part}"] = 2 * second[f"network.{_EMBEDDER}.project.{part}"]
    return found
