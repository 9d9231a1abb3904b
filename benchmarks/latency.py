"""How long a policy takes to decide: a batch of one, one thread, by network calls.

    python benchmarks/latency.py runs/policy-quickstart runs/policy-quickstart/flow-matching --steps 1 2 4 16

Each run's policy decides `--repeats` times at each number of calls, in turns. Rows go to
benchmarks/results/latency.json: {recipe, network, parameters, steps, least_ms, median_ms, q90_ms, repeats, threads}.
The least says what the code needs; the rest what else the machine did.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from fewstep.policies.policy import load_policy
from fewstep.policies.rollout import latencies
from fewstep.training import RunFolder

RESULTS = Path(__file__).parent / "results" / "latency.json"
ROUNDS = 10


def rows_of(folder: Path, steps: list[int], repeats: int) -> list[dict[str, Any]]:
    """One row for each number of calls."""
    config = RunFolder(folder).config()
    policies = {count: load_policy(folder, count) for count in steps}
    spent: dict[int, list[float]] = {count: [] for count in steps}
    for _ in range(ROUNDS):
        for count, policy in policies.items():
            spent[count] += latencies(policy, max(1, repeats // ROUNDS))
    rows = []
    for count, values in spent.items():
        found = torch.tensor(values, dtype=torch.float64)
        size = sum(p.numel() for p in policies[count].flow_map.network.parameters())
        network = type(policies[count].flow_map.network).__name__
        rows.append(
            {
                "recipe": config.recipe, "network": network, "parameters": size, "steps": count,
                "least_ms": round(float(found.min()), 3), "median_ms": round(float(found.median()), 3),
                "q90_ms": round(float(found.quantile(0.9)), 3), "repeats": len(values),
                "threads": torch.get_num_threads(),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of trained policies")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 4, 16])
    parser.add_argument("--repeats", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for folder in options.runs for row in rows_of(folder, options.steps, options.repeats)]
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
