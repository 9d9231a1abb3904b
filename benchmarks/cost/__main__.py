"""What time and memory go into: a step by objective and derivative, one recipe's step over another's, a decision of a
policy, the gradient statistics of the log. All on this machine, taking turns in one process.
"""

from pathlib import Path
from typing import Annotated, Literal

import torch
from tyro.conf import Positional

from benchmarks.cost import step as steps
from benchmarks.cost.recipes import compare, gradient_stats_cost
from benchmarks.harness import RESULTS, Row, Study, markdown, read, show, write
from fewstep import RunFolder, load_policy
from fewstep.policies.rollout import latencies

STEP, LATENCY = RESULTS / "step.json", RESULTS / "latency.json"
ROUNDS = 10
TIMES = ("least_ms", "median_ms", "q90_ms")


def tables() -> dict[str, str]:
    rows = [(row["recipe"], str(row["steps"]), *(f"{row[key]:.2f}" for key in TIMES)) for row in read(LATENCY)]
    return {
        "A step in steps of flow matching": steps.step_table(read(STEP)),
        "A step's time and memory by derivative": steps.derivative_table(read(STEP)),
        "A decision's time in milliseconds": markdown(("recipe", "calls", "least", "median", "90 %"), rows),
    }


STUDY = Study("cost", tables)


def step(repeats: int = 30, threads: int = 1, device: Literal["cpu", "cuda"] = "cpu", out: Path = STEP) -> None:
    """Time a step of iSD, by exact and finite-difference derivative, against one of flow matching."""
    torch.set_num_threads(threads)
    rows = [row for name in steps.CASES for row in steps.measured(name, repeats, threads, device)]
    write(out, rows)
    print(steps.step_table(rows))


def recipes(first: Annotated[str, Positional], second: Annotated[str, Positional], count: int = 20) -> None:
    """Time COUNT steps of one recipe over those of another, for a comparison at equal cost."""
    torch.set_num_threads(1)
    compare((first, second), count)


def gradient_stats(
    names: Annotated[tuple[str, ...], Positional] = ("digits", "digits-unet"), rounds: int = 6, batch_size: int = 0
) -> None:
    """Time steps of recipes with the gradient statistics of the log and without; batch_size 0: the recipe's."""
    torch.set_num_threads(1)
    for name in names:
        print(gradient_stats_cost(name, rounds, batch_size), flush=True)


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
        found, network = torch.tensor(values, dtype=torch.float64), policies[count].flow_map.network
        times = (found.min(), found.median(), found.quantile(0.9))
        rows.append(
            {
                "recipe": RunFolder(folder).config().recipe, "network": type(network).__name__,
                "parameters": sum(p.numel() for p in network.parameters()), "steps": count,
                **{name: round(float(value), 3) for name, value in zip(TIMES, times, strict=True)},
                "repeats": len(values), "threads": torch.get_num_threads(),
            }
        )  # fmt: skip
    return rows


def peak(
    name: Annotated[str, Positional],
    objective: Annotated[str, Positional],
    derivative: Annotated[str, Positional],
    device: Annotated[str, Positional],
) -> None:
    """Print the memory of one step in MiB: the process that `step` starts for every row."""
    steps.print_peak(name, (objective, derivative), device)


if __name__ == "__main__":
    STUDY.main(step=step, recipes=recipes, gradient_stats=gradient_stats, latency=latency, peak=peak)
