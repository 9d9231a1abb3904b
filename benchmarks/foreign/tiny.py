"""The tiny networks of the tests, trained for a minute on digits with classes or captions, as diffusers trains."""

import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.data.sources import DataConfig, DigitsSource, load_dataset
from tests.support.foreign import TINY, TRAINED, Tiny, make_model
from tests.support.text import caption_embeddings

_BATCH, _NAMES = 64, ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def train_tiny(kind: str, seconds: float) -> tuple[dict[str, Tensor], float]:
    """Weights after so many seconds of the scheduler's noise and prediction, and the mean loss of the last tenth."""
    tiny, model = TINY[kind], make_model(kind, scale=0.05).train()
    data = load_dataset(DataConfig(DigitsSource())).train
    captions = caption_embeddings([f"a {name}" for name in _NAMES])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    draw, losses, end = torch.Generator().manual_seed(0), [], time.monotonic() + seconds
    while time.monotonic() < end:
        x0, labels = data.fetch(torch.randint(len(data), (_BATCH,), generator=draw))
        assert labels is not None
        loss = loss_of(model, tiny, kind, x0.expand(-1, tiny.shape[0], -1, -1), labels, captions, draw)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    last = losses[-max(1, len(losses) // 10) :]
    return model.eval().state_dict(), sum(last) / len(last)


def loss_of(
    model: torch.nn.Module, tiny: Tiny, kind: str, x0: Tensor, labels: Tensor, captions: Tensor, draw: torch.Generator
) -> Tensor:
    """The mean square error of what the scheduler asks for; a learned variance is left alone."""
    import diffusers

    taken = ("beta_schedule", "beta_start", "beta_end", "prediction_type")
    scheduler = diffusers.DDPMScheduler(**{key: tiny.scheduler[key] for key in taken if key in tiny.scheduler})
    steps = torch.randint(1000, (len(x0),), generator=draw)
    noise = torch.randn(x0.shape, generator=draw)
    x = scheduler.add_noise(x0, noise, steps)
    wanted = noise if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(x0, noise, steps)
    words = {"encoder_hidden_states": captions[labels]} if tiny.text else {"class_labels": labels}
    return (model(x, steps, **words).sample[:, : x0.shape[1]] - wanted).square().mean()


def write_tiny(folder: Path, seconds: float) -> None:
    """FOLDER/KIND.safetensors of every kind, and a line of its loss; 1 is what predicting nothing costs."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in TRAINED:
        weights, loss = train_tiny(kind, seconds)
        save_file({key: value.contiguous() for key, value in weights.items()}, folder / f"{kind}.safetensors")
        print(f"{kind}: loss {loss:.3f}")
