"""Tiny pipelines of text to image: each family's network, text encoders and tokenizers, made by their own classes."""

import string
from pathlib import Path
from typing import Any

import torch

from tests.support.foreign import TINY, make_model
from tests.support.photographs import make_autoencoder

PIPELINES = {
    "StableDiffusionPipeline": "UNet2DConditionModel",
    "StableDiffusionXLPipeline": "SDXL",
    "StableDiffusion3Pipeline": "SD3Transformer2DModel",
    "FluxPipeline": "FluxTransformer2DModel",
    "PixArtSigmaPipeline": "PixArtTransformer2DModel",
    "SanaPipeline": "SanaTransformer2DModel",
    "WanPipeline": "WanTransformer3DModel",
}
"""Class of the pipeline -> name of its tiny network (tests.support.foreign)."""
CAPTIONS = ("a three", "An eight,  in  white", "")
_LETTERS = tuple(string.ascii_lowercase + string.digits + ",.!")


def _clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    pieces = ["<|startoftext|>", "<|endoftext|>", *_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
    return CLIPTokenizer(
        {piece: number for number, piece in enumerate(pieces)}, [], model_max_length=16, pad_token="<|endoftext|>"
    )


def _t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in _LETTERS)]
    return T5Tokenizer(pieces, extra_ids=0, model_max_length=512)


def _gemma_tokenizer() -> Any:
    from transformers import GemmaTokenizer

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *_LETTERS]
    return GemmaTokenizer({piece: number for number, piece in enumerate(pieces)}, [])


def _clip(width: int, heads: int, projection: int = 0) -> tuple[Any, Any]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = _clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=heads, max_position_embeddings=16, projection_dim=projection or 2,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)), tokenizer


def caption_embeddings(captions: list[str]) -> torch.Tensor:
    """(n, 16, 6), embeddings of captions by a tiny CLIP whose weights are always the same."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model, tokenizer = _clip(6, 2)
        words = tokenizer(captions, padding="max_length", return_tensors="pt")
        found: torch.Tensor = model.eval()(words.input_ids).last_hidden_state
    return found


def _t5(umt5: bool = False) -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    tokenizer = _t5_tokenizer()
    config, model = (UMT5Config, UMT5EncoderModel) if umt5 else (T5Config, T5EncoderModel)
    return model(config(vocab_size=len(tokenizer), d_model=6, d_kv=3, d_ff=8, num_layers=1, num_heads=2)), tokenizer


def _gemma() -> tuple[Any, Any]:
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = _gemma_tokenizer()
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=6, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=6, max_position_embeddings=512,
    )  # fmt: skip
    return Gemma2Model(config), tokenizer


_ENCODERS = {
    "StableDiffusionPipeline": lambda: (_clip(6, 2),),
    "StableDiffusionXLPipeline": lambda: (_clip(2, 1), _clip(4, 2, 5)),
    "StableDiffusion3Pipeline": lambda: (_clip(2, 1, 2), _clip(4, 2, 3), _t5()),
    "FluxPipeline": lambda: (_clip(5, 1), _t5()),
    "PixArtSigmaPipeline": lambda: (_t5(),),
    "SanaPipeline": lambda: (_gemma(),),
    "WanPipeline": lambda: (_t5(umt5=True),),
}


def autoencoder(seed: int = 0) -> Any:
    """An AutoencoderKL from grey images to latents of 4 channels and half the side."""
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return diffusers.AutoencoderKL(
            in_channels=1, out_channels=1, latent_channels=4, block_out_channels=(4, 8), norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            scaling_factor=0.5, shift_factor=0.25,
        )  # fmt: skip


def make_pipeline(name: str, seed: int = 0, **changes: Any) -> Any:
    """The pipeline by its own class with an autoencoder, weights drawn from a seed.

    changes: to the settings of its network.
    """
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pairs = _ENCODERS[name]()
    parts: dict[str, Any] = {}
    for number, (model, tokenizer) in enumerate(pairs):
        end = f"_{number + 1}" * bool(number)
        parts |= {f"text_encoder{end}": model.eval(), f"tokenizer{end}": tokenizer}
    kind = PIPELINES[name]
    settings = dict(TINY[kind].scheduler)
    if name == "StableDiffusionPipeline":  # so that an untrained network's samples stay small
        settings |= {"prediction_type": "v_prediction", "steps_offset": 1}
    scheduler = getattr(diffusers, settings.pop("_class_name")).from_config(settings)
    own = "unet" if kind in ("UNet2DConditionModel", "SDXL") else "transformer"
    parts |= {own: make_model(kind, scale=0.05, **changes), "scheduler": scheduler}
    others = {"SanaPipeline": "AutoencoderDC", "WanPipeline": "AutoencoderKLWan"}
    parts["vae"] = make_autoencoder(others[name]) if name in others else autoencoder()
    if name == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return getattr(diffusers, name)(**parts)


def save_pipeline(folder: Path, name: str = "StableDiffusionPipeline", seed: int = 0, **changes: Any) -> Any:
    """Save it as diffusers does; returns it."""
    pipeline = make_pipeline(name, seed, **changes)
    pipeline.save_pretrained(folder)
    return pipeline


def save_captioned_digits(folder: Path, count: int = 24) -> Path:
    """Digits as grey PNGs of 16 x 16, each with a caption beside it."""
    from PIL import Image
    from sklearn.datasets import load_digits

    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    digits = load_digits()
    folder.mkdir(parents=True)
    for number in range(count):
        image = Image.fromarray((digits.images[number] * 15).astype("uint8")).resize((16, 16))
        image.save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"a {names[digits.target[number]]}\n")
    return folder
