"""A run that is killed many times against one that is not: weights, log, learning curve and grids, to the last byte.

`python benchmarks/crashes.py` kills 20 times (SIGKILL), every third time while a checkpoint is being written, and exits
with 1 where something differs; `--signal TERM` asks in place of killing. Ten minutes on one core. `--workers 2`: the
killed run has processes that read its data, the other has none; exits with 1 where a process is left behind as well.
"""

import argparse
import contextlib
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


def start(run: Path, workers: int = 0) -> "subprocess.Popen[bytes]":
    """A process that trains in a folder, or goes on there."""
    words = [*WORDS, "--runtime.workers", str(workers), "--out", str(run)]
    return subprocess.Popen([sys.executable, "-m", "fewstep", *words], stdout=subprocess.DEVNULL)


def children(number: int) -> list[Path]:
    """Processes of a process, by their folders in /proc; none where there is no such place."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ends while it is looked at
            if int(file.read_text().rpartition(")")[2].split()[1]) == number:
                found.append(file.parent)
    return found


def left_behind(processes: list[Path]) -> int:
    """How many of them are there ten seconds later."""
    deadline = time.monotonic() + 10
    while any(each.exists() for each in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    return sum(each.exists() for each in processes)


def rows(file: Path, *left_out: str) -> list[dict[str, Any]]:
    """Whole lines of JSON without some of their keys."""
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    return [{key: value for key, value in json.loads(line).items() if key not in left_out} for line in lines]


def stop(run: Path, step: int, writing: bool, number: int, workers: int = 0) -> int:
    """Train until the log has reached a step and, if asked for, a checkpoint is being written; then send the signal.

    How many of its processes it leaves behind.
    """
    found: list[Path] = []
    with start(run, workers) as process:
        while process.poll() is None:
            log = rows(run / "log.jsonl")
            if log and log[-1]["step"] >= step and (not writing or any((run / "checkpoints").glob(".step-*"))):
                found = children(process.pid)
                process.send_signal(number)
                break
            time.sleep(0.001)
    print(f"stopped with {process.returncode}, {rows(run / 'log.jsonl')[-1]['step']} steps logged", flush=True)
    return left_behind(found)


def stored(run: Path) -> dict[str, object]:
    """What a run leaves: the newest checkpoint's tensors, the log's steps, the curve, the grids."""
    files = [*max((run / "checkpoints").glob("step-*")).glob("*.safetensors"), *(run / "samples").iterdir()]
    steps = [row["step"] for row in rows(run / "log.jsonl")]
    found = {"log": steps, "curve": rows(run / "curve.jsonl", "seconds")}
    return found | {file.name: file.read_bytes() for file in files}


def outcome(kills: int, seed: int, name: str, workers: int) -> dict[str, Any]:
    """What is compared of a run stopped so often and of one that is not, what differs, and how many processes the
    stopped one has left behind."""
    moments, left = sorted(random.Random(seed).choices(range(STEPS * 9 // 10), k=kills)), 0
    with tempfile.TemporaryDirectory() as folder:
        broken, whole = Path(folder, "broken"), Path(folder, "whole")
        for kill, step in enumerate(moments):
            left += stop(broken, step, kill % 3 == 2, signal.Signals[f"SIG{name}"], workers)
        for run, number in ((broken, workers), (whole, 0)):
            start(run, number).wait()
        first, second = stored(broken), stored(whole)
    differ = sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))
    return {"compared": len(second), "differ": differ, "left": left}


def main() -> None:
    """Train twice, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    found = outcome(options.kills, options.seed, options.signal, options.workers)
    differ = found["differ"]
    print(
        f"{found['compared']} compared, {len(differ)} differ {', '.join(differ)}; {found['left']} processes left behind"
    )
    sys.exit(bool(differ or found["left"]))


if __name__ == "__main__":
    main()
