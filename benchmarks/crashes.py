"""A run that is killed many times against one that is not: weights, log, learning curve and grids, to the last byte.

`python benchmarks/crashes.py` kills 20 times (SIGKILL), every third time while a checkpoint is being written, and exits
with 1 where something differs; `--signal TERM` asks in place of killing. Ten minutes on one core.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS = 600
WORDS = (
    f"train digits --training.batch-size 32 --training.images {32 * STEPS} --training.log-images 160 --runtime.cpu "
    "--training.checkpoint-images 480 --training.sample-images 800 --evaluation.curve-images 1120 --runtime.quiet "
    "--evaluation.curve-samples 64 --training.ema-decay 0.9 --network.width 64 --network.depth 2 --runtime.threads 1"
).split()


def start(run: Path) -> "subprocess.Popen[bytes]":
    """A process that trains in a folder, or goes on there."""
    return subprocess.Popen([sys.executable, "-m", "fewstep", *WORDS, "--out", str(run)], stdout=subprocess.DEVNULL)


def rows(file: Path, *left_out: str) -> list[dict[str, Any]]:
    """Whole lines of JSON without some of their keys."""
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    return [{key: value for key, value in json.loads(line).items() if key not in left_out} for line in lines]


def stop(run: Path, step: int, writing: bool, number: int) -> None:
    """Train until the log has reached a step and, if asked for, a checkpoint is being written; then send the signal."""
    with start(run) as process:
        while process.poll() is None:
            log = rows(run / "log.jsonl")
            if log and log[-1]["step"] >= step and (not writing or any((run / "checkpoints").glob(".step-*"))):
                process.send_signal(number)
                break
            time.sleep(0.001)
    print(f"stopped with {process.returncode}, {rows(run / 'log.jsonl')[-1]['step']} steps logged", flush=True)


def stored(run: Path) -> dict[str, object]:
    """What a run leaves: the newest checkpoint's tensors, the log's steps, the curve, the grids."""
    files = [*max((run / "checkpoints").glob("step-*")).glob("*.safetensors"), *(run / "samples").iterdir()]
    steps = [row["step"] for row in rows(run / "log.jsonl")]
    found = {"log": steps, "curve": rows(run / "curve.jsonl", "seconds")}
    return found | {file.name: file.read_bytes() for file in files}


def main() -> None:
    """Train twice, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    options = parser.parse_args()
    moments = sorted(random.Random(options.seed).choices(range(STEPS * 9 // 10), k=options.kills))
    with tempfile.TemporaryDirectory() as folder:
        broken, whole = Path(folder, "broken"), Path(folder, "whole")
        for kill, step in enumerate(moments):
            stop(broken, step, kill % 3 == 2, signal.Signals[f"SIG{options.signal}"])
        for run in (broken, whole):
            start(run).wait()
        first, second = stored(broken), stored(whole)
    differ = sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))
    print(f"{len(second)} compared, {len(differ)} differ {', '.join(differ)}")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
