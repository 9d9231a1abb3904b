"""How long the other of two processes goes on where one is killed."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import fewstep as fs
from benchmarks.harness import ROOT, Row

WORDS = [
    "train", "digits", "--training.images", "32000000", "--training.checkpoint-images", "2560",
    "--training.log-images", "2560", "--runtime.cpu", "--runtime.quiet", "--runtime.threads", "1",
]  # fmt: skip


def started(run: Path) -> "list[subprocess.Popen[str]]":
    """Two processes of a run, with what torchrun would tell each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    words = [sys.executable, "-m", "fewstep", *WORDS, "--out", str(run)]
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"} for rank in (0, 1)]
    return [
        subprocess.Popen(
            words, env=os.environ | place | each, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for each in own
    ]


def last_line(said: str) -> str:
    """Of what a process said."""
    return (said.splitlines() or ["it said nothing"])[-1]


def seconds(killed: int) -> tuple[float, str]:
    """From the loss of a process, after two checkpoints, to the end of the other; what that says last."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        pair = started(run)
        try:
            while len(fs.RunFolder(run).checkpoints()) < 2:
                for rank, process in enumerate(pair):
                    if process.poll() is not None:
                        said = last_line(process.communicate()[1])
                        raise SystemExit(f"process {rank} of the run ended by itself: {said}")
                time.sleep(0.05)
            pair[killed].kill()
            begun = time.monotonic()
            said = pair[1 - killed].communicate(timeout=120)[1]
            return time.monotonic() - begun, last_line(said).replace(str(run), "RUN")
        finally:
            for process in pair:
                process.kill()
                process.wait()


def rows() -> Iterator[Row]:
    """One for each of the two that is killed."""
    for killed in (0, 1):
        spent, said = seconds(killed)
        yield {
            "measure": "a lost process", "setting": f"process {killed} of 2 killed, gloo", "value": round(spent, 1),
            "unit": "s until the other has ended", "beside": said,
        }  # fmt: skip
