"""What the training engine's parts cost: rows {measure, setting, value, unit, beside}, each beside what it replaces."""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import Positional

import benchmarks.harness as h
from benchmarks import crashes as crashing
from benchmarks.engine import attention as attention_memory
from benchmarks.engine import checkpointing as recomputed
from benchmarks.engine import compiling as compiled
from benchmarks.engine import gpu as one_gpu
from benchmarks.engine import listing as many_files
from benchmarks.engine import loader as batches
from benchmarks.engine import lost as ended
from benchmarks.engine import optimizer as one_program
from benchmarks.engine import overhead as added
from benchmarks.engine import precision as rounded
from benchmarks.engine import questions as step_questions
from benchmarks.engine import sharding as shared

FILE, GPU = h.RESULTS / "engine.json", h.RESULTS / "gpu.json"


def tables() -> dict[str, str]:
    """One for each measure."""
    found = {}
    for measure, rows in h.grouped(h.read(FILE), lambda row: str(row["measure"])).items():
        lines = [(row["setting"], f"{row['value']:,.4g} {row['unit']}", row["beside"]) for row in rows]
        found[measure] = h.markdown(("setting", "value", "beside"), lines)
    return found


STUDY = h.Study("engine", tables)


def attention(lengths: Annotated[tuple[int, ...], Positional] = (256, 1024, 2048, 4096)) -> None:
    """Peak memory of attention by length, with a tangent and without, each in a process of its own."""
    for length in lengths:
        for row in attention_memory.rows(length):
            h.put(FILE, [row], "measure", "setting")
            h.show([row])


def checkpointing(rounds: int = 5) -> None:
    """Peak memory and time of a step whose blocks keep no activations, over one that keeps them."""
    for row in recomputed.rows(rounds):
        h.put(FILE, [row], "measure", "setting")
        h.show([row])


def compile(cases: h.Words = ("MLP, flow matching",), rounds: int = 20) -> None:
    """A trainer's step compiled over the same as it is written; each case compiles for minutes."""
    for row in compiled.rows(cases, rounds):
        h.put(FILE, [row], "measure", "setting")
        h.show([row])


def crashes(kills: int = 20, workers: int = 2) -> None:
    """What differs between a run killed so often, whose data processes read, and one without either."""
    found = crashing.outcome(kills, 0, "KILL", workers)
    row: h.Row = {
        "measure": "killed runs", "setting": f"digits, {kills} times SIGKILL, {workers} workers",
        "value": len(found["differ"]), "unit": f"of {found['compared']} files and logs differ",
        "beside": f"{found['left']} processes left behind",
    }  # fmt: skip
    h.put(FILE, [row], "measure", "setting")
    h.show([row])


def listing(count: int = 200_000, rounds: int = 3) -> None:
    """The second start over a folder of many images that stay on disk, over the first."""
    for row in many_files.rows(count, rounds):
        h.put(FILE, [row], "measure", "setting")
        h.show([row])


def gpu(dry: bool = False, out: Path | None = None) -> None:
    """Ten minutes on one GPU of 80 GiB or more: its tests, steps, attention, samplers.

    DRY runs the same on the CPU, small, into OUT, or else a temporary file: its figures say nothing.
    """
    scale = one_gpu.DRY if dry else one_gpu.FULL
    if not dry and not torch.cuda.is_available():
        print("there is no GPU here: benchmarks/gpu.sh --dry runs the same, small, on the CPU", file=sys.stderr)
        sys.exit(2)
    file = out or (Path(tempfile.mkdtemp()) / "gpu.json" if dry else GPU)
    found: list[h.Row] = []
    for row in one_gpu.rows(scale):
        found.append(row)
        h.write(file, found)
        h.show([row])
    print(f"{len(found)} rows in {file}")


def loader(rounds: int = 3) -> None:
    """Images a second of batches decoded from files over the bare decoder's, and the wait of a run for them."""
    for row in batches.rows(rounds):
        h.put(FILE, [row], "measure", "setting")
        h.show([row])


def lost() -> None:
    """Seconds from the loss of one of two processes to the end of the other."""
    for row in ended.rows():
        h.put(FILE, [row], "measure", "setting")
        h.show([row])


def optimizer(rounds: int = 30) -> None:
    """An optimizer's step compiled over the fused one, and the fused one's share of a whole step."""
    for row in one_program.rows(rounds):
        h.put(FILE, [row], "measure", "setting")
        h.show([row])


def precision(steps: int = 200, rounds: int = 20) -> None:
    """Loss and weights after steps in bf16, a step's time and memory, beside float32; on a CPU."""
    for row in rounded.rows(steps, rounds):
        h.put(FILE, [row], "measure", "setting")
        h.show([row])


def questions() -> None:
    """How often a step makes the host wait for its device, by operations that ask for values."""
    found = list(step_questions.rows())
    h.put(FILE, found, "measure", "setting")
    h.show(found)


def overhead(rounds: int = 60) -> None:
    """A step of the trainer over its objective, backward pass and optimizer; sampling over the network's calls."""
    for row in added.rows(rounds):
        h.put(FILE, [row], "measure", "setting")
        h.show([row])


def steps() -> None:
    """Steps of iSD in steps of flow matching, as `python -m benchmarks.cost step` kept them, compiled and not."""
    found: list[h.Row] = [
        {
            "measure": "a step of iSD, exact", "value": row["ratio"], "unit": "steps of flow matching",
            "setting": f"{row['network']}, {'compiled' if row['compiled'] else 'as written'}",
            "beside": f"{row['low']} to {row['high']}; {row['floor']} by operation count",
        }
        for row in h.chosen(h.read(h.RESULTS / "step.json"), objective="iSD", derivative="exact")
    ]  # fmt: skip
    h.put(FILE, found, "measure", "setting")
    h.show(found)


def sharding() -> None:
    """What each of two processes keeps of a run, shared out or not, and the ratio of a step's time."""
    for row in shared.rows():
        h.put(FILE, [row], "measure", "setting")
        h.show([row])


if __name__ == "__main__":
    commands = (
        attention, checkpointing, compile, crashes, gpu, listing, loader, lost, optimizer, overhead, precision,
        questions, sharding, steps,
    )  # fmt: skip
    STUDY.main(**{each.__name__: each for each in commands})
