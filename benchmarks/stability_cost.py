"""What a step of every objective costs in the stability study's own networks, over one of flow matching."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import Linear
from fewstep.flow.preconditioning import LinearPreconditioning
from fewstep.objectives import Batch, Companions, DiagonalMatching, Objective
from fewstep.utils.random import Draws

REPEATS = 8
SHAPES = {"digits": (1, 8, 8), "fashion": (1, 28, 28)}


def step_costs(
    studies: Mapping[tuple[str, str], Any], objectives: Callable[[Any, str], dict[str, Objective]]
) -> list[dict[str, Any]]:
    """Rows {dataset, network, objective, derivative, ratio, low, high, seconds}, all objectives taking turns.

    ratio: the median over turns of a step's time over that turn's flow matching; low and high are its quartiles.

    Loss and gradient alone, on weights away from their zeros, with the network itself as slow average and teacher.
    """
    rows = []
    for (dataset, network), study in studies.items():
        flow_map, batch = setting(study, SHAPES[dataset])
        named = {(name, "exact"): each for name, each in objectives(study, "exact").items()}
        named |= {(name, "finite-difference"): each for name, each in objectives(study, "finite-difference").items()}
        distinct = {key: each for key, each in named.items() if key[1] == "exact" or each != named[key[0], "exact"]}
        seconds = turns(distinct, flow_map, batch)
        base = seconds["flow matching", "exact"]
        for (name, derivative), spent in seconds.items():
            found = [own / other for own, other in zip(spent, base, strict=True)]
            low, ratio, high = (round(each, 3) for each in statistics.quantiles(found, n=4))
            rows.append(
                {"dataset": dataset, "network": network, "objective": name, "derivative": derivative, "ratio": ratio}
                | {"low": low, "high": high, "batch": study.batch, "seconds": round(statistics.median(spent), 5)}
            )
            print(f"{dataset:8} {network:10} {name:34} {derivative:18} {ratio:6.2f} ({low:.2f}-{high:.2f})", flush=True)
    return rows


def setting(study: Any, shape: tuple[int, ...]) -> tuple[FlowMap, Batch]:
    """A flow map with weights away from their zero initialisation, and a batch."""
    torch.manual_seed(0)
    network = study.network.build(shape, 10, False)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    draws = Draws(0, 0, torch.arange(study.batch))
    batch = Batch(draws.normal(1, shape), torch.arange(study.batch) % 10, draws)
    return FlowMap(Linear(), LinearPreconditioning(), network), batch


def turns(
    objectives: Mapping[tuple[str, str], Objective], flow_map: FlowMap, batch: Batch
) -> dict[tuple[str, str], list[float]]:
    """Seconds of a step of each, taking turns; the first two rounds do not count."""
    companions = Companions(teacher=flow_map, target=flow_map)
    found: dict[tuple[str, str], list[float]] = {key: [] for key in objectives}
    for repeat in range(REPEATS + 2):
        for key, objective in objectives.items():
            start = time.perf_counter()
            flow_map.zero_grad(set_to_none=True)
            objective(flow_map, batch, companions).mean().backward()
            if repeat >= 2:
                found[key].append(time.perf_counter() - start)
    assert any(isinstance(objective, DiagonalMatching) for objective in objectives.values())
    return found
