"""`fewstep export RUN`: a model for programs without fewstep."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Options:
    """Write a model in another format: a folder that diffusers loads, ONNX files, or programs of torch.export."""

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


def run(options: Options) -> None:
    """Write the folder and say how it is loaded; raises what the formats raise."""
    from fewstep.export.diffusers import export_diffusers
    from fewstep.export.traced import export_traced
    from fewstep.training import load

    pipeline = load(options.run, options.weights)
    out = options.out or options.run / f"export-{options.to}"
    if options.to == "diffusers":
        export_diffusers(pipeline, out, options.steps)
        print(f"{out}: DiffusionPipeline.from_pretrained({str(out)!r}, trust_remote_code=True)")
        return
    files = export_traced(pipeline, out, options.to, options.steps)
    print(f"{out}: {', '.join(file.name for file in files)}, and fewstep.json with what they take")
