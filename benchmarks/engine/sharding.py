"""What each of two processes keeps between steps, with a copy of all in each and shared out, and what a step costs."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import torch

import fewstep as fs
from benchmarks.harness import ROOT, Row, take_turns, time_ratio, trainer_of
from fewstep.networks.mlp import MLPConfig
from fewstep.recipes import recipe
from fewstep.training.loop import Trainer
from fewstep.utils.weights import own_part

WIDTH, DEPTH, ROUNDS, MIB = 512, 4, 12, 2**20
KINDS = ("shared out", "a copy in each")


def rows() -> Iterator[Row]:
    """Launch two processes of this module (gloo, one thread each), and read what the first prints."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"--master-port={free.getsockname()[1]}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", place]
    said = subprocess.run(
        [*launcher, "-m", "benchmarks.engine.sharding"], check=True, capture_output=True, text=True, cwd=ROOT
    )
    yield from json.loads(said.stdout)


def kept(trainer: Trainer) -> float:
    """MiB of the weights, averages and optimizer state that this process holds."""
    files = trainer.learner.files()
    tensors = chain(trainer.learner.emas[0].weights.values(), *(each.values() for each in files.values()))
    return sum(own_part(value).numel() * value.element_size() for value in tensors) / MIB


def measure() -> list[Row]:
    """In each of the processes: what it keeps after some steps, and the ratio of a step's time."""
    config = replace(recipe("digits"), network=MLPConfig(width=WIDTH, depth=DEPTH, embedding_width=256))
    runtimes = (fs.Runtime(cpu=True, quiet=True, shard=shard) for shard in (True, False))
    with contextlib.ExitStack() as stack:
        trainers = [stack.enter_context(trainer_of(config, runtime=runtime)) for runtime in runtimes]
        jobs = dict(zip(KINDS, (trainer.take_step for trainer in trainers), strict=True))
        spent = take_turns(jobs, ROUNDS)
        mib = dict(zip(KINDS, map(kept, trainers), strict=True))
    own, usual = KINDS
    setting = f"MLP of {WIDTH} by {DEPTH}, two processes"
    ratio = time_ratio(spent[own], spent[usual])
    memory = {"value": round(mib[own], 1), "unit": "MiB", "beside": f"{mib[usual]:,.1f} MiB, {usual}"}
    time = {"value": ratio["ratio"], "unit": f"times a step of {usual}", "beside": f"{ratio['low']} to {ratio['high']}"}
    kept_row = {"measure": "sharding, kept between steps", "setting": setting} | memory
    return [kept_row, {"measure": "sharding, a step", "setting": setting} | time]


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = measure()
    if os.environ["RANK"] == "0":
        print(json.dumps(found))
