"""A teacher made by diffusers, its student, and the student back in its format (docs/tutorials/distil-your-own.md).

teacher: a UNet2DModel on digits with classes, trained with diffusers' DDPMScheduler. student: CTM from it, one for each
preconditioning and seed. table: Frechet distance of what diffusers itself samples: the teacher by DDIM, the student
from its exported folder.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import RESULTS, Study, markdown, read
from fewstep.data.sources import DataConfig, DigitsSource, load_dataset
from fewstep.evaluation.evaluate import build_evaluator
from fewstep.utils.files import write_atomically

FILE = RESULTS / "foreign.json"
NETWORK: dict[str, Any] = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": (32, 64),
    "norm_num_groups": 8, "num_class_embeds": 10, "attention_head_dim": 32,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
SAMPLES = 1204


def tables() -> dict[str, str]:
    """What is stored."""
    rows = [(row["method"], row["calls"], f"{row['frechet']:.2f}", f"{row['accuracy']:.3f}") for row in read(FILE)]
    table = markdown(("method", "calls", "Fréchet distance", "class accuracy"), rows)
    return {"A diffusers teacher and its students": table or "Nothing is stored yet."}


STUDY = Study("foreign", tables)


def teacher(folder: Path, steps: int = 2000, batch: int = 128) -> None:
    """Train it and save it as a pipeline; an average of its weights, a rate that falls to a hundredth."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    data = load_dataset(DataConfig(DigitsSource())).train
    x0, labels = data.fetch(torch.arange(len(data)))
    assert labels is not None
    model = UNet2DModel(**NETWORK)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.997))
    for _ in range(steps):
        rows, t = torch.randint(len(x0), (batch,)), torch.randint(1000, (batch,))
        eps = torch.randn(batch, 1, 8, 8)
        predicted = model(scheduler.add_noise(x0[rows], eps, t), t, class_labels=labels[rows]).sample
        (predicted - scheduler.get_velocity(x0[rows], eps, t)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.update_parameters(model)
    DDPMPipeline(average.module, scheduler).save_pretrained(folder)


def student(folder: Path, preconditioning: str, seed: int, images: int, out: Path) -> None:
    """Train it by the command line, and export it."""
    command = [sys.executable, "-m", "fewstep"]
    train = ["train", "distil-diffusers", "--teacher", str(folder), "--model.preconditioning", preconditioning]
    train += ["--training.seed", str(seed), "--training.images", str(images), "--optimizer.lr", "3e-4"]
    train += ["--evaluation.curve-images", "0", "--out", str(out), "--runtime.threads", "1"]
    subprocess.run([*command, *train], check=True)
    shutil.rmtree(out / "export-diffusers", ignore_errors=True)
    subprocess.run([*command, "export", str(out), "--to", "diffusers"], check=True)


def figures(folder: Path, students: dict[str, Path]) -> list[dict[str, Any]]:
    """Rows {method, calls, frechet, accuracy}: classes in turn, noise of one seed."""
    from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel

    evaluator = build_evaluator(load_dataset(DataConfig(DigitsSource())), None)
    labels = torch.arange(SAMPLES) % 10
    noise = torch.randn(SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(1000))
    rows = []

    def add(method: str, calls: int, samples: torch.Tensor) -> None:
        found = evaluator.measure(samples.clamp(-1, 1), labels)
        rows.append({"method": method, "calls": calls, "frechet": found["frechet"], "accuracy": found["accuracy"]})
        print(rows[-1], flush=True)

    model = UNet2DModel.from_pretrained(folder / "unet").eval()
    for calls in (1, 2, 4, 50):
        scheduler, x = DDIMScheduler.from_pretrained(folder / "scheduler", timestep_spacing="trailing"), noise
        scheduler.set_timesteps(calls)
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(model(x, t, class_labels=labels).sample, t, x).prev_sample
        add("teacher, DDIM", calls, x)
    for name, place in students.items():
        pipeline = DiffusionPipeline.from_pretrained(place / "export-diffusers", trust_remote_code=True)
        pipeline.set_progress_bar_config(disable=True)
        for calls in (1, 2, 4):
            add(
                name,
                calls,
                pipeline(num_inference_steps=calls, latents=noise, class_labels=labels, output_type="pt").images,
            )
    return rows


def run(
    folder: Path,
    /,
    images: int = 25_600,
    seeds: tuple[int, ...] = (0, 1, 2),
    preconditionings: tuple[str, ...] = ("euler", "analytic"),
) -> None:
    """Train what is not there yet below FOLDER, measure, write benchmarks/results/foreign.json."""
    if not (folder / "teacher").exists():
        teacher(folder / "teacher")
    students = {}
    for preconditioning in preconditionings:
        for seed in seeds:
            place = folder / f"{preconditioning}-{seed}"
            if not (place / "export-diffusers").exists():
                student(folder / "teacher", preconditioning, seed, images, place)
            students[f"{preconditioning}, seed {seed}"] = place
    write_atomically(FILE, json.dumps(figures(folder / "teacher", students), indent=1) + "\n")


if __name__ == "__main__":
    STUDY.main(run=run)
