"""`fewstep export RUN`: a model for programs without fewstep."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Options:
    """Write a model in another format: a folder that diffusers loads, ONNX files, or programs of torch.export.

    Every format has a model card, README.md, with code that loads it, the run's figures and the teacher's licence.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run or of a saved model."""
    to: Literal["diffusers", "onnx", "torch"]
    """diffusers: for students of its networks; onnx and torch: one jump, and the sampler in each number of calls."""
    out: Path | None = None
    """Folder to write, empty or not there; RUN/export-FORMAT when not given."""
    steps: tuple[int, ...] = (1, 2, 4)
    """Numbers of network calls to write the sampler for, at the times that `fewstep tune-steps` found if it did."""
    weights: str = ""
    """Which of the run's weights: the name of an average, such as power-0.1, or last; the first average otherwise."""
    teacher: str = ""
    """Where the teacher lies: its folder, or OWNER/NAME on the Hub; as the run names it when not given."""
    autoencoder: Path | None = None
    """Where the autoencoder of a model of latents lies, if it was moved."""
    parts: Literal["all", "vae", "none"] = "all"
    """What goes along into a folder of diffusers: the teacher's autoencoder and text encoders, the autoencoder alone,
    or nothing."""


def run(options: Options) -> None:
    """Write the folder and say how it is loaded; raises what the formats raise."""
    from fewstep.export.diffusers import export_diffusers, loads_plainly
    from fewstep.export.parts import Parts, teachers_folder
    from fewstep.export.traced import export_traced
    from fewstep.training import load

    pipeline = load(options.run, options.weights, options.teacher)
    out = options.out or options.run / f"export-{options.to}"
    needed = options.to == "diffusers" and options.parts != "none"
    teacher = teachers_folder(options.teacher, pipeline, needed)
    if options.to == "diffusers":
        parts = Parts(teacher, options.autoencoder, options.parts)
        names = export_diffusers(pipeline, out, options.steps, parts)
        trust = "" if loads_plainly(out) else ", trust_remote_code=True"
        print(f"{out}: {', '.join(names)}; DiffusionPipeline.from_pretrained({str(out)!r}{trust})")
        return
    files = export_traced(pipeline, out, options.to, options.steps, teacher)
    print(f"{out}: {', '.join(file.name for file in files)}, and fewstep.json with what they take")
