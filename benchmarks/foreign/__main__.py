"""Teachers in formats of elsewhere and their students in few calls (docs/studies/distil-foreign.md).

Teachers are trained on digits with classes: a `UNet2DModel` by diffusers, and a DDPM++ stored in the layout of EDM's
network pickles. Students are CTM's, trained on the command line. Samples of the first kind are drawn by diffusers
itself, the students' from their exported folders.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from tyro.conf import Positional

import benchmarks.harness as h
from benchmarks.foreign import memory, text
from benchmarks.foreign.teachers import EDM_NETWORK, NETWORK, NOISE_MEAN, NOISE_STD, diffusers_teacher, edm_teacher
from benchmarks.foreign.tiny import write_tiny
from fewstep.data.sources import DataConfig, DigitsSource, load_dataset
from fewstep.evaluation.evaluate import build_evaluator
from fewstep.evaluation.metrics.measure import Evaluator
from fewstep.sampling.generate import SamplingSettings
from fewstep.sampling.pipeline import Pipeline
from fewstep.training import load
from fewstep.training.teacher import load_teacher

SAMPLES, NOISE_SEED, STEPS, SEEDS = 1204, 1000, 2000, (0, 1, 2)
TEACHER = "teacher"
TEACHERS = {
    "diffusers": "A diffusers teacher and its students",
    "EDM": "A teacher in EDM's layout and its students",
    text.NAME: "A text teacher and its students",
}
ADAPTERS = ["--network.lora", "8", "--optimizer.lr", "1e-3"]
WITHOUT_DATA = ["--data.source", "teacher-samples", "--data.source.draw.count", "2000"]
STUDENTS: dict[str, dict[str, list[str]]] = {
    "diffusers": {
        "euler": ["--model.preconditioning", "euler"],
        "analytic": ["--model.preconditioning", "analytic"],
        "euler, LoRA": ["--model.preconditioning", "euler", *ADAPTERS],
        "euler, LoRA on all": ["--model.preconditioning", "euler", *ADAPTERS, "--network.lora-layers", "all"],
        "euler, without data": ["--model.preconditioning", "euler", *WITHOUT_DATA],
    },
    "EDM": {
        "euler": ["--model.preconditioning", "euler"],
        "analytic": ["--model.preconditioning", "analytic"],
    },
    text.NAME: text.STUDENTS,
}
LENGTH = ["--training.images", "12800", "--training.batch-size", "64", "--optimizer.warmup-images", "3200"]
STATISTICS = ["--statistics.points", "60", "--statistics.samples", "128"]
Samples = Callable[[int], Tensor]


@dataclass(frozen=True)
class Cell:
    """A teacher's own samplers, or one of its students."""

    teacher: str
    student: str
    seed: int


def plan() -> Iterator[Cell]:
    """All cells, a teacher's own first."""
    for teacher, students in STUDENTS.items():
        yield Cell(teacher, TEACHER, 0)
        seeds = text.SEEDS if teacher == text.NAME else dict.fromkeys(students, SEEDS)
        yield from (Cell(teacher, student, seed) for student in students for seed in seeds[student])


def words(cell: Cell) -> list[str]:
    """What a student is trained with, besides its teacher and folder."""
    own = STUDENTS[cell.teacher][cell.student]
    return ["--optimizer.lr", "3e-4", *LENGTH, *STATISTICS, *own, "--training.seed", str(cell.seed)]


def settings(cell: Cell) -> str:
    """The digest of what a cell trains and how it is measured."""
    network = {"diffusers": [NETWORK], "EDM": [EDM_NETWORK, NOISE_MEAN, NOISE_STD], text.NAME: text.SETTINGS}[
        cell.teacher
    ]
    trained = [] if cell.student == TEACHER else words(cell)
    return h.digest(json.dumps([network, STEPS, trained, SAMPLES, NOISE_SEED], sort_keys=True))


GRID = h.Grid(h.RESULTS / "foreign" / "cells.jsonl", ("teacher", "student", "seed"), plan, settings)


def tables() -> dict[str, str]:
    """One for each teacher: every sampler and student in so many calls, over its seeds."""
    places = {name: place for place, name in enumerate(GRID.cells())}
    rows = sorted(GRID.rows(), key=lambda row: places[GRID.name(row)])
    shown = {title: section(h.chosen(rows, teacher=name)) for name, title in TEACHERS.items()}
    return shown | {"Peak memory": memory.table()}


def section(rows: list[h.Row]) -> str:
    """A teacher's table."""
    lines = []
    for (method, calls), own in h.grouped(rows, lambda row: (str(row["method"]), int(row["calls"]))).items():
        distance = h.interval([row["frechet"] for row in own])
        accuracy = h.interval([row["accuracy"] for row in own], 3)
        lines.append((method, calls, distance, accuracy, own[0].get("trained", "")))
    return h.markdown(("method", "calls", "Fréchet distance", "class accuracy", "trained"), lines)


STUDY = h.Study("foreign", tables, grid=GRID)


def teacher_place(name: str, work: Path) -> Path:
    """Where a teacher lies, trained now if it is not there."""
    make, place = {"diffusers": (diffusers_teacher, "diffusers"), "EDM": (edm_teacher, "edm.pkl")}[name]
    if not (work / place).exists():
        make(work / place, STEPS)
    return work / place


def student_place(cell: Cell, work: Path) -> Path:
    """Where a student lies, trained on the command line, or further if it is there; and exported, if it can be."""
    place = work / f"{cell.teacher}-{cell.student.replace(', ', '-')}-{cell.seed}"
    command = [sys.executable, "-m", "fewstep"]
    train = ["train", "distil-diffusers", "--teacher", str(teacher_place(cell.teacher, work)), *words(cell)]
    train += ["--evaluation.curve-images", "0", "--training.sample-images", "0", "--runtime.threads", "1"]
    subprocess.run([*command, *train, "--runtime.quiet", "--out", str(place)], check=True)
    if cell.teacher == "diffusers":
        shutil.rmtree(place / "export-diffusers", ignore_errors=True)
        subprocess.run([*command, "export", str(place), "--to", "diffusers"], check=True)
    return place


def measure(cell: Cell, work: Path) -> list[h.Row]:
    """Train, and a row {method, calls, frechet, accuracy, trained} for each sampler and number of calls."""
    evaluator = build_evaluator(load_dataset(DataConfig(DigitsSource())), work / "features")
    labels = torch.arange(SAMPLES) % 10
    if cell.teacher == text.NAME:
        return measure_text(cell, work, evaluator, labels)
    if cell.student == TEACHER:
        found = [(f"teacher, {name}", calls, draw) for name, calls, draw in teacher_samples(cell.teacher, work, labels)]
        return [row(evaluator, method, calls, draw(), labels) for method, calls, draw in found]
    place = student_place(cell, work)
    pipeline = load(place)
    draw = exported_samples(place, labels) if cell.teacher == "diffusers" else own_samples(pipeline, labels)
    return student_rows(cell, evaluator, draw, pipeline, labels)


def student_rows(cell: Cell, evaluator: Evaluator, draw: Samples, pipeline: Pipeline, labels: Tensor) -> list[h.Row]:
    """In 1, 2 and 4 calls, with the share of the weights that is trained."""
    parameters = list(pipeline.flow_map.network.parameters())
    share = sum(p.numel() for p in parameters if p.requires_grad) / sum(p.numel() for p in parameters)
    rows = [row(evaluator, cell.student, calls, draw(calls), labels) for calls in (1, 2, 4)]
    return [each | {"trained": f"{share:.1%}"} for each in rows]


def measure_text(cell: Cell, work: Path, evaluator: Evaluator, labels: Tensor) -> list[h.Row]:
    """The same of the text teacher and its students, whose noise is of latents."""
    if cell.student == TEACHER:
        found = text.teacher_samples(work, labels, NOISE_SEED)
        return [row(evaluator, f"teacher, {name}", calls, draw(), labels) for name, calls, draw in found]
    place = text.student(work, f"text-{cell.student.replace(', ', '-').replace(' ', '-')}-{cell.seed}", words(cell))
    draw = text.student_samples(place, cell.student, labels, NOISE_SEED)
    return student_rows(cell, evaluator, draw, load(place), labels)


def row(evaluator: Evaluator, method: str, calls: int, samples: Tensor, labels: Tensor) -> h.Row:
    found = evaluator.measure(samples.clamp(-1, 1), labels)
    return {"method": method, "calls": calls, "frechet": found["frechet"], "accuracy": found["accuracy"]}


def teacher_samples(name: str, work: Path, labels: Tensor) -> Iterator[tuple[str, int, Callable[[], Tensor]]]:
    """(sampler, calls, its samples) of a teacher by itself."""
    place = teacher_place(name, work)
    if name == "diffusers":
        yield from (("DDIM", calls, lambda calls=calls: ddim(place, calls, labels)) for calls in (1, 2, 4, 50))
        return
    draw = own_samples(Pipeline(load_teacher(place)), labels)
    yield from (("DDIM", calls, lambda calls=calls: draw(calls)) for calls in (1, 2, 4, 35))
    heun = own_samples(Pipeline(load_teacher(place)), labels, "heun")
    yield from (("Heun", 2 * steps - 1, lambda steps=steps: heun(steps)) for steps in (2, 3, 4, 18))


def ddim(place: Path, calls: int, labels: Tensor) -> Tensor:
    """Samples of diffusers' own network and scheduler."""
    from diffusers import DDIMScheduler, UNet2DModel

    model = UNet2DModel.from_pretrained(place / "unet").eval()
    scheduler, x = DDIMScheduler.from_pretrained(place / "scheduler", timestep_spacing="trailing"), noise()
    scheduler.set_timesteps(calls)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t, class_labels=labels).sample, t, x).prev_sample
    return x


def exported_samples(place: Path, labels: Tensor) -> Samples:
    """What diffusers draws from an exported student in so many calls."""
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(place / "export-diffusers", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"latents": noise(), "class_labels": labels, "output_type": "latent"}
    return lambda calls: pipeline(num_inference_steps=calls, **given).images  # type: ignore[no-any-return]


def own_samples(pipeline: Pipeline, labels: Tensor, sampler: Any = "map") -> Samples:
    """What fewstep draws in so many steps of a sampler; DDIM's, where the map is a teacher's."""
    drawn = SamplingSettings(sampler=sampler, seed=NOISE_SEED, spacing="edm")
    return lambda steps: pipeline.generate(len(labels), drawn, labels, steps=steps).samples


def noise() -> Tensor:
    return torch.randn(SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(NOISE_SEED))


def run(work: Path, /, worker: h.Worker = "0/1", teachers: tuple[str, ...] = tuple(TEACHERS)) -> None:
    """Train what has no result yet below WORK, where models are kept, and measure it: about an hour of one core."""
    torch.set_num_threads(1)
    GRID.run([cell for cell in plan() if cell.teacher in teachers], lambda cell: measure(cell, work), worker)


def tiny(folder: Annotated[Path, Positional] = h.ROOT / "tests" / "fixtures" / "foreign", seconds: float = 60) -> None:
    """Train the tests' tiny networks of diffusers for so many seconds each, into FOLDER."""
    write_tiny(folder, seconds)


if __name__ == "__main__":
    STUDY.main(run=run, memory=memory.run, tiny=tiny)
