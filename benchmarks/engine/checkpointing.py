"""Peak memory and time of a step whose blocks compute their activations anew, beside one that keeps them."""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

import benchmarks.harness as h
import fewstep as fs
from benchmarks.cost.step import resident, take_step, warm
from fewstep.networks.base import EmbeddingNetwork

CASE = fs.DiTConfig(width=96, depth=8, heads=3, patch=2), (4, 32, 32), 8
SETTING = "DiT of 96 by 8, 256 tokens, batch of 8"
OBJECTIVES: dict[str, fs.Objective] = {
    "flow matching": fs.DiagonalMatching(),
    "iSD, exact": fs.ISD(guidance=fs.NoGuidance()),
    "iSD, finite differences": fs.ISD(guidance=fs.NoGuidance(), derivative=fs.Derivative("finite-difference")),
}


def case(anew: bool) -> tuple[fs.FlowMap, fs.Batch]:
    """The flow map and its batch."""
    flow_map, batch = warm(*CASE)
    assert isinstance(flow_map.network, EmbeddingNetwork)
    if anew:
        flow_map.network.checkpoint_blocks()
    return flow_map, batch


def peak(objective: str, anew: bool) -> float:
    """MiB that a step adds, in a process of its own."""
    torch.set_num_threads(1)
    flow_map, batch = case(anew)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    take_step(OBJECTIVES[objective], flow_map, batch)
    return resident("VmHWM") - before


def rows(rounds: int) -> Iterator[h.Row]:
    """Two rows for each objective."""
    torch.set_num_threads(1)
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "131072")  # in new processes: what is freed goes back at once
    for name, objective in OBJECTIVES.items():
        peaks = []
        for anew in (True, False):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                peaks.append(alone.submit(peak, name, anew).result())
        setting = f"{SETTING}, {name}"
        yield {
            "measure": "gradient checkpointing, peak memory of a step", "setting": setting,
            "value": round(peaks[0], 1), "unit": "MiB", "beside": f"{peaks[1]:,.0f} MiB with all activations",
        }  # fmt: skip
        spent = h.take_turns({anew: partial(take_step, objective, *case(anew)) for anew in (True, False)}, rounds)
        ratio = h.time_ratio(spent[True], spent[False])
        yield {
            "measure": "gradient checkpointing, a step", "setting": setting, "value": ratio["ratio"],
            "unit": "times a step with all activations", "beside": f"{ratio['low']} to {ratio['high']}",
        }  # fmt: skip
