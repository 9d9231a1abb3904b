"""Starts Python processes that need not import anew: run by tests/support/processes.py, never imported.

A request is a line of JSON on standard input. {"words", "environment", "files"}: what follows `python`, what the
process finds in its environment, where its output and errors go; answered by its number. A number: the process to wait
for; answered by its exit code. A process ends as any interpreter does, with what it has registered for its exit.
"""

import gc
import json
import os
import runpy
import sys

import sklearn.datasets as _digits  # noqa: F401
import torch._decomp.decompositions_for_jvp as _forward_mode  # noqa: F401
import torch._dynamo as _compilation  # noqa: F401

import fewstep.cli.sample as _sample  # noqa: F401
import fewstep.cli.train as _train  # noqa: F401
import fewstep.evaluation.report.run as _report  # noqa: F401


def be(words: list[str], environment: dict[str, str], files: list[str]) -> None:
    """Run as `python *words` would."""
    os.environ.update(environment)
    for stream, name in enumerate([os.devnull, *files]):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), stream)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def serve() -> None:
    """Answer requests until there are no more; in a process that is asked for, be it.

    What is imported by now stays as it is until a process ends, which then takes a fraction of a second.
    """
    gc.freeze()
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if isinstance(request, int):
            answer = os.waitstatus_to_exitcode(os.waitpid(request, 0)[1])
        elif (answer := os.fork()) == 0:
            be(**request)
            return
        print(answer, flush=True)


if __name__ == "__main__":
    serve()
