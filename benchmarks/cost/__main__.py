"""What time and memory go into: a step by objective and derivative, a recipe's over another's, a policy's decision."""

import contextlib
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import Positional

import benchmarks.harness as h
import fewstep as fs
from benchmarks.cost.step import CASES, OBJECTIVES, compiled_table, measured, step_table
from fewstep.policies.rollout import latencies
from fewstep.recipes import recipe

STEP, LATENCY = h.RESULTS / "step.json", h.RESULTS / "latency.json"
ROUNDS = 10
TIMES = ("least_ms", "median_ms", "q90_ms")


def tables() -> dict[str, str]:
    rows = [(row["recipe"], row["steps"], *(f"{row[key]:.2f}" for key in TIMES)) for row in h.read(LATENCY)]
    return {
        "A step in steps of flow matching": step_table(h.read(STEP)),
        "A step compiled": compiled_table(h.read(STEP)),
        "A decision's time in milliseconds": h.markdown(("recipe", "calls", "least", "median", "90 %"), rows),
    }


STUDY = h.Study("cost", tables)


def step(
    repeats: int = 30,
    networks: h.Words = tuple(CASES),
    objectives: h.Words = (),
    compile: bool = False,
    device: str = "cpu",
    out: Path = STEP,
) -> None:
    """Time a step of iSD, by exact and finite-difference derivative, against one of flow matching.

    A network's rows are shown when all its objectives, or those named, have taken REPEATS turns. With --compile flow
    matching and iSD take turns compiled too.
    """
    torch.set_num_threads(1)
    for name in networks:
        print(f"{name}: {repeats} turns of {', '.join(objectives) or f'{len(OBJECTIVES)} objectives'}", flush=True)
        for row in measured(name, repeats, device, compile, objectives):
            h.put(out, [row], "objective", "derivative", "network", "compiled", "device")
            h.show([row])
    print(step_table(h.read(out)), compiled_table(h.read(out)), sep="\n\n")


def recipes(first: Annotated[str, Positional], second: Annotated[str, Positional], count: int = 20) -> None:
    """Processor time of COUNT steps of one recipe over those of another, in turns, for a comparison at equal cost."""
    torch.set_num_threads(1)
    with contextlib.ExitStack() as held:
        trainers = {name: held.enter_context(h.trainer_of(recipe(name))) for name in (first, second)}
        spent = h.take_turns({name: trainer.take_step for name, trainer in trainers.items()}, count, time.process_time)
    medians = {name: statistics.median(times) for name, times in spent.items()}
    print(*(f"{name}: {1000 * median:.0f} ms a step" for name, median in medians.items()), sep="\n")
    print(f"ratio {medians[first] / medians[second]:.2f}")


def latency(
    runs: Annotated[tuple[Path, ...], Positional], calls: tuple[int, ...] = (1, 2, 4, 16), repeats: int = 500
) -> None:
    """Time a decision of trained policies: a batch of one, one thread, by network calls.

    The least says what the code needs; the rest what else the machine did.
    """
    torch.set_num_threads(1)
    rows: list[h.Row] = []
    for folder in runs:
        policies, spent = {count: fs.load_policy(folder, count) for count in calls}, {count: [0.0] for count in calls}
        for _ in range(ROUNDS):  # in turns
            for count, policy in policies.items():
                spent[count] += latencies(policy, max(1, repeats // ROUNDS))
        for count, (_, *values) in spent.items():
            figures = min(values), statistics.median(values), statistics.quantiles(values, n=10)[-1]
            row = {"recipe": fs.RunFolder(folder).config().recipe, "steps": count, "repeats": len(values)}
            rows.append(row | {name: round(value, 3) for name, value in zip(TIMES, figures, strict=True)})
    h.show(rows)
    h.write(LATENCY, rows)


if __name__ == "__main__":
    STUDY.main(step=step, recipes=recipes, latency=latency)
