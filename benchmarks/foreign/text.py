"""A text teacher on digits: a small Stable Diffusion with its own CLIP and autoencoder, trained as diffusers does.

Digits are grey pictures of 16x16 in a folder, each with a caption beside it; latents are 4x8x8. The teacher's own
pipeline and the students' exported ones draw the same prompts, and pictures go back to 8x8 to be measured as the
study's others are.
"""

import shutil
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from benchmarks.foreign.teachers import digits, trained

NAME = "text"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FORMS = ("the digit {}", "a drawing of a {}", "a {}")
UNET: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (16, 32),
    "norm_num_groups": 8, "cross_attention_dim": 32, "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
VAE: dict[str, Any] = {
    "in_channels": 1, "out_channels": 1, "latent_channels": 4, "block_out_channels": (8, 16), "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
CLIP: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
SCHEDULER: dict[str, Any] = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "v_prediction",
    "clip_sample": False, "steps_offset": 1,
}  # fmt: skip
STEPS, BATCH, VAE_STEPS, KL, DROPPED = 1000, 64, 400, 1e-4, 0.1
GUIDANCE = 2.0
SETTINGS = [STEPS, BATCH, UNET, VAE, CLIP, SCHEDULER, FORMS, VAE_STEPS, KL, DROPPED, GUIDANCE]
_STEPS = ["--objective.steps.points", "8", "--objective.steps.solver", "euler"]
_FIXED = [*_STEPS, "--objective.guidance", "fixed", "--objective.guidance.omega", str(GUIDANCE)]
_DRAWN = [*_STEPS, "--objective.guidance", "drawn", "--objective.guidance.omega-max", "4"]
_LORA = ["--network.lora", "8", "--optimizer.lr", "1e-3"]
STUDENTS: dict[str, list[str]] = {
    "euler": _FIXED,
    "analytic": ["--model.preconditioning", "analytic", *_FIXED],
    "euler, drawn guidance": _DRAWN,
    "euler, LoRA": [*_FIXED, *_LORA],
    "euler, LoRA on all layers": [*_FIXED, *_LORA, "--network.lora-layers", "all"],
}
SEEDS: dict[str, tuple[int, ...]] = {name: (0, 1, 2) if name == "euler" else (0,) for name in STUDENTS}
Drawn = tuple[str, int, Callable[[], Tensor]]


def caption(number: int, label: int) -> str:
    """Of picture `number`, of digit `label`."""
    return FORMS[number % len(FORMS)].format(NAMES[label])


def tokenizer() -> Any:
    """A CLIP tokenizer whose tokens are the captions' words; other words are spelled in letters."""
    from transformers import CLIPTokenizer

    words = sorted({word for form in FORMS for word in form.split() if word != "{}"} | {*NAMES})
    pieces = ["<|startoftext|>", "<|endoftext|>"]
    pieces += [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")]
    merges: list[tuple[str, str]] = []
    for word in words:
        letters = [*word[:-1], word[-1] + "</w>"]
        for length in range(1, len(letters)):
            pair = "".join(letters[:length]), letters[length]
            if pair not in merges:
                merges.append(pair)
                pieces.append("".join(pair))
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocabulary, merges, model_max_length=16, pad_token="<|endoftext|>")


def pictures() -> tuple[Tensor, Tensor]:
    """Digits of the training part (n, 1, 16, 16) in [-1, 1], and their classes (n,)."""
    x0, labels, _ = digits()
    return interpolate(x0, size=16, mode="nearest"), labels


def teacher(folder: Path, steps: int = STEPS) -> None:
    """The pipeline: its autoencoder first, then the U-Net and CLIP together, with DROPPED of the prompts left empty."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    images, labels = pictures()
    vae = diffusers.AutoencoderKL(**VAE)
    train_autoencoder(vae, images)
    z = vae.encode(images).latent_dist.mean.detach()
    vae.register_to_config(scaling_factor=1 / float(z.std()))
    x0 = z * vae.config.scaling_factor
    words = tokenizer()
    clip = CLIPTextModel(CLIPTextConfig(vocab_size=len(words), **CLIP))
    unet, scheduler = diffusers.UNet2DConditionModel(**UNET), diffusers.DDPMScheduler.from_config(SCHEDULER)
    parts = trained(
        nn.ModuleDict({"unet": unet, "clip": clip}), text_loss(unet, clip, words, scheduler, x0, labels), steps
    )
    assert isinstance(parts, nn.ModuleDict)
    diffusers.StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=parts["clip"].eval(), tokenizer=words, unet=parts["unet"].eval(),
        scheduler=diffusers.DDIMScheduler(**SCHEDULER), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def train_autoencoder(vae: Any, images: Tensor, batch: int = 32) -> None:
    """|decoded - image|^2 + KL times the divergence from a standard normal, each a mean over its numbers."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, VAE_STEPS)
    for _ in range(VAE_STEPS):
        chosen = images[torch.randint(len(images), (batch,))]
        posterior = vae.encode(chosen).latent_dist
        error = (vae.decode(posterior.sample()).sample - chosen).square().mean()
        (error + KL * posterior.kl().mean() / posterior.mean[0].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def text_loss(
    unet: Any, clip: Any, words: Any, scheduler: Any, x0: Tensor, labels: Tensor, batch: int = BATCH
) -> Callable[[], Tensor]:
    """|F(x_t, t, caption) - v|^2 of the scheduler's x_t and v."""
    told = [caption(number, label) for number, label in enumerate(labels.tolist())]
    ids = words([*told, ""], padding="max_length", return_tensors="pt").input_ids

    def loss() -> Tensor:
        rows, t = torch.randint(len(x0), (batch,)), torch.randint(1000, (batch,))
        shown = torch.where(torch.rand(batch) < DROPPED, len(told), rows)
        eps = torch.randn(batch, *x0.shape[1:])
        hidden = clip(ids[shown]).last_hidden_state
        predicted = unet(scheduler.add_noise(x0[rows], eps, t), t, encoder_hidden_states=hidden).sample
        return (predicted - scheduler.get_velocity(x0[rows], eps, t)).square().mean()

    return loss


def place(work: Path) -> Path:
    """Where the teacher lies, trained now if it is not there."""
    if not (work / "text").exists():
        teacher(work / "text")
    return work / "text"


def latents(work: Path) -> Path:
    """The training pictures as a folder with captions, encoded on the command line."""
    from PIL import Image

    folder, out = work / "text-pictures", work / "text-latents"
    if not folder.exists():
        folder.mkdir()
        for number, (image, label) in enumerate(zip(*pictures(), strict=True)):
            Image.fromarray(((image[0] + 1) * 127.5).round().byte().numpy()).save(folder / f"{number:04d}.png")
            (folder / f"{number:04d}.txt").write_text(caption(number, int(label)) + "\n")
    encode = ["encode", str(folder), "--teacher", str(place(work)), "--image-size", "16", "--heldout", "0.1"]
    command(*encode, "--quiet", "--out", str(out))
    return out


def command(*words: str) -> None:
    """Run `fewstep WORDS`."""
    subprocess.run([sys.executable, "-m", "fewstep", *words], check=True)


def student(work: Path, name: str, words: list[str]) -> Path:
    """Where a student of this name lies, trained on the command line, or further if it is there; and exported."""
    out = work / name
    train = ["train", "distil-diffusers", "--teacher", str(place(work)), "--data.source", "latents"]
    train += ["--data.root", str(latents(work)), *words, "--evaluation.curve-images", "0"]
    command(*train, "--training.sample-images", "0", "--runtime.threads", "1", "--runtime.quiet", "--out", str(out))
    shutil.rmtree(out / "export-diffusers", ignore_errors=True)
    command("export", str(out), "--to", "diffusers")
    return out


def small(images: Tensor) -> Tensor:
    """Pictures (n, 1, 16, 16) in [0, 1] as digits (n, 1, 8, 8) in [-1, 1]."""
    return 2 * avg_pool2d(images.float(), 2) - 1


def teacher_samples(work: Path, labels: Tensor, seed: int) -> Iterator[Drawn]:
    """(sampler, calls, its pictures) of the teacher's own pipeline; a guided call evaluates the network twice."""
    import diffusers

    pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(place(work))
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    for name, scale, counts in (("DDIM", GUIDANCE, (1, 2, 4, 50)), ("DDIM, not guided", 1.0, (4,))):
        draw = drawn(pipeline, labels, seed, guidance_scale=scale)
        yield from ((name, calls, lambda draw=draw, calls=calls: draw(calls)) for calls in counts)


def student_samples(folder: Path, name: str, labels: Tensor, seed: int) -> Callable[[int], Tensor]:
    """What diffusers draws from an exported student in so many calls."""
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(folder / "export-diffusers", trust_remote_code=True)
    scale = {"guidance_scale": GUIDANCE} if STUDENTS[name] == _DRAWN else {}
    return drawn(pipeline, labels, seed, **scale)


def drawn(pipeline: Any, labels: Tensor, seed: int, **given: Any) -> Callable[[int], Tensor]:
    """Digits of captions of these classes, from noise of this seed, in so many steps of a pipeline of diffusers."""
    pipeline.set_progress_bar_config(disable=True)
    told = [caption(number, label) for number, label in enumerate(labels.tolist())]
    noise = torch.randn(len(told), 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    given |= {"latents": noise, "output_type": "pt"}
    return lambda calls: small(pipeline(told, num_inference_steps=calls, **given).images)
