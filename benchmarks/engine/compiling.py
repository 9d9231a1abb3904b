"""A trainer's step compiled over the same as it is written."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace

import benchmarks.harness as h
from benchmarks.engine.overhead import CASES


def rows(cases: h.Words, rounds: int) -> Iterator[h.Row]:
    """A row for each of the cases: the ratio of the processor's time, in turns."""
    for name in cases:
        config, runtime = CASES[name], replace(h.QUIET, compile=True)
        with contextlib.ExitStack() as held:
            written = held.enter_context(h.trainer_of(config))
            compiled = held.enter_context(h.trainer_of(config, runtime=runtime))
            jobs = {"compiled": compiled.take_step, "written": written.take_step}
            spent = h.take_turns(jobs, rounds, time.process_time)
        ratio = h.time_ratio(spent["compiled"], spent["written"])
        yield {
            "measure": "compile, a step", "setting": name, "value": ratio["ratio"],
            "unit": "times a step as it is written",
            "beside": f"{ratio['low']} to {ratio['high']}",
        }  # fmt: skip
