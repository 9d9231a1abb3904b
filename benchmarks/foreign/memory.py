"""Peak memory of a student of a larger network, each way of training in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import benchmarks.harness as h
from benchmarks.foreign.teachers import NETWORK

FILE = h.RESULTS / "foreign" / "memory.json"
WIDE = {**NETWORK, "block_out_channels": (256, 512)}
LORA, ANEW, EIGHT = ["--lora", "8"], ["--runtime.gradient-checkpointing"], ["--optimizer.name", "adamw8bit"]
WAYS: dict[str, list[str]] = {
    "whole": [], "whole, activations computed anew": ANEW, "LoRA": LORA, "LoRA, activations computed anew": LORA + ANEW,
    "whole, AdamW in 8 bits": EIGHT,
}  # fmt: skip
SHORT = [
    "--training.images",
    "32",
    "--training.batch-size",
    "16",
    "--training.log-images",
    "16",
    "--objective.steps.points",
    "4",
]
NO_PICTURES = ["--training.sample-images", "0", "--evaluation.curve-images", "0", "--runtime.quiet"]


def table() -> str:
    """The peak of each way, and the share of weights that it trains."""
    rows = [(row["way"], f"{row['trained']:.1%}", f"{row['mib']:,.0f}") for row in h.read(FILE)]
    return h.markdown(("trained", "share of weights", "peak MiB"), rows)


def teacher(folder: Path) -> None:
    """A `UNet2DModel` of random weights, saved as a pipeline."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    DDPMPipeline(UNet2DModel(**WIDE), scheduler).save_pretrained(folder)


def measure(work: Path, way: str) -> dict[str, Any]:
    """Two steps of CTM; {way, trained, mib}."""
    from fewstep.training import load

    out = work / f"memory-{way.replace(', ', '-').replace(' ', '-')}"
    command = [sys.executable, "-m", "fewstep", "train", "distil-diffusers", "--teacher", str(work / "wide")]
    subprocess.run([*command, *SHORT, *NO_PICTURES, *WAYS[way], "--out", str(out)], check=True)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    parameters = list(load(out).flow_map.network.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad) / sum(p.numel() for p in parameters)
    return {"way": way, "trained": trained, "mib": max(line["peak_memory_mib"] for line in lines)}


def run(work: Path, /, ways: tuple[str, ...] = tuple(WAYS)) -> None:
    """Train a few steps in each way below WORK, and store the peaks."""
    if not (work / "wide").exists():
        teacher(work / "wide")
    for way in ways:
        h.put(FILE, [h.rounded(measure(work, way))], "way")
