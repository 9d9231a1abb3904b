"""What time and memory go into: a step by objective and derivative, one recipe's step over another's, a decision of a
policy, the gradient statistics of the log. All on this machine, taking turns in one process.
"""

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal
from unittest.mock import patch

import torch
from tyro.conf import Positional

from benchmarks.cost import step as steps
from benchmarks.harness import RESULTS, Row, Study, markdown, read, show, take_turns, trainer_of, write
from fewstep import RunFolder, load_policy
from fewstep.objectives.losses import Comparison
from fewstep.policies.rollout import latencies
from fewstep.recipes import recipe
from fewstep.training.log import Window
from fewstep.training.loop import Trainer

STEP, LATENCY = RESULTS / "step.json", RESULTS / "latency.json"
ROUNDS = 10
TIMES = ("least_ms", "median_ms", "q90_ms")


def tables() -> dict[str, str]:
    rows = [(row["recipe"], row["steps"], *(f"{row[key]:.2f}" for key in TIMES)) for row in read(LATENCY)]
    return {
        "A step in steps of flow matching": steps.step_table(read(STEP)),
        "A step's time and memory by derivative": steps.derivative_table(read(STEP)),
        "A decision's time in milliseconds": markdown(("recipe", "calls", "least", "median", "90 %"), rows),
    }


STUDY = Study("cost", tables)


def step(
    repeats: int = 30,
    networks: tuple[str, ...] = tuple(steps.CASES),
    threads: int = 1,
    device: Literal["cpu", "cuda"] = "cpu",
    out: Path = STEP,
) -> None:
    """Time a step of iSD, by exact and finite-difference derivative, against one of flow matching.

    A network's rows are shown when all its objectives have taken REPEATS turns.
    """
    torch.set_num_threads(threads)
    rows: list[Row] = []
    for name in networks:
        print(f"{name}: {repeats} turns of {len(steps.OBJECTIVES)} objectives", flush=True)
        for row in steps.measured(name, repeats, threads, device):
            rows.append(row)
            show([row])
    write(out, rows)
    print(steps.step_table(rows))


def recipes(first: Annotated[str, Positional], second: Annotated[str, Positional], count: int = 20) -> None:
    """Processor time of COUNT steps of one recipe over those of another, in turns, for a comparison at equal cost."""
    torch.set_num_threads(1)
    with contextlib.ExitStack() as held:
        trainers = {name: held.enter_context(trainer_of(recipe(name))) for name in (first, second)}
        spent = take_turns({name: trainer.take_step for name, trainer in trainers.items()}, count, time.process_time)
    medians = {name: statistics.median(times) for name, times in spent.items()}
    print(*(f"{name}: {1000 * median:.0f} ms a step" for name, median in medians.items()), sep="\n")
    print(f"ratio {medians[first] / medians[second]:.2f}")


@contextlib.contextmanager
def without_statistics() -> Iterator[None]:
    """Inside, a step looks at its loss and gradient norm alone."""
    with (
        patch.object(Trainer, "ends_line", False),
        patch.object(Window, "add_terms", lambda self, logs: None),
        patch.object(Comparison, "sizes", lambda self: {}),
    ):
        yield


def gradient_stats(
    names: Annotated[tuple[str, ...], Positional] = ("digits", "digits-unet"), rounds: int = 6, batch_size: int = 0
) -> None:
    """Time steps of recipes with the gradient statistics of the log and without: neither the backward pass of each
    term, nor the sizes of prediction, target and derivative, nor any per-sample value of the log.

    A round is the steps between two lines of the log, so that what a line takes counts as often as in training.
    batch_size 0: the recipe's.
    """
    torch.set_num_threads(1)
    for name in names:
        config = recipe(name)
        training = replace(config.training, batch_size=batch_size or config.training.batch_size)
        count = max(1, training.log_images // training.batch_size)
        with trainer_of(replace(config, training=training)) as trainer:

            def line(trainer: Trainer = trainer, count: int = count) -> None:
                for _ in range(count):
                    trainer.take_step()

            bare = without_statistics()(line)
            spent = take_turns({"with": line, "without": bare}, rounds, time.process_time)
        ratios = [100 * (own / base - 1) for own, base in zip(spent["with"], spent["without"], strict=True)]
        shown = f"{statistics.median(ratios):+.1f} % ({min(ratios):+.1f} to {max(ratios):+.1f})"
        print(f"{name}: {shown}, a line of the log every {count} steps", flush=True)


def latency(
    runs: Annotated[tuple[Path, ...], Positional], calls: tuple[int, ...] = (1, 2, 4, 16), repeats: int = 500
) -> None:
    """Time a decision of trained policies: a batch of one, one thread, by network calls.

    The least says what the code needs; the rest what else the machine did.
    """
    torch.set_num_threads(1)
    rows = [row for folder in runs for row in decisions(folder, calls, repeats)]
    show(rows)
    write(LATENCY, rows)


def decisions(folder: Path, calls: tuple[int, ...], repeats: int) -> list[Row]:
    """One row for each number of calls, in turns."""
    policies = {count: load_policy(folder, count) for count in calls}
    spent: dict[int, list[float]] = {count: [] for count in calls}
    for _ in range(ROUNDS):
        for count, policy in policies.items():
            spent[count] += latencies(policy, max(1, repeats // ROUNDS))
    rows = []
    for count, values in spent.items():
        least, median, *_, last = min(values), statistics.median(values), *statistics.quantiles(values, n=10)
        times = zip(TIMES, (least, median, last), strict=True)
        row = {"recipe": RunFolder(folder).config().recipe, "steps": count, "repeats": len(values)}
        rows.append(row | {name: round(value, 3) for name, value in times})
    return rows


def peak(
    name: Annotated[str, Positional],
    objective: Annotated[str, Positional],
    derivative: Annotated[str, Positional],
    device: Annotated[str, Positional],
) -> None:
    """Print the memory of one step in MiB: the process that `step` starts for every row."""
    torch.set_num_threads(1)
    steps.print_peak(name, (objective, derivative), device)


if __name__ == "__main__":
    STUDY.main(step=step, recipes=recipes, gradient_stats=gradient_stats, latency=latency, peak=peak)
