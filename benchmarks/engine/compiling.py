"""A trainer's step compiled over the same as it is written, and what is waited for before the first."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace

import benchmarks.harness as h
from benchmarks.engine.overhead import NETWORKS
from fewstep.recipes import recipe


def rows(networks: h.Words, rounds: int) -> Iterator[h.Row]:
    """A row for each network: the ratio of the processor's time, in turns."""
    for name in networks:
        config, runtime = replace(recipe("digits"), network=NETWORKS[name]), replace(h.QUIET, compile=True)
        with contextlib.ExitStack() as held:
            written = held.enter_context(h.trainer_of(config))
            start = time.process_time()
            compiled = held.enter_context(h.trainer_of(config, runtime=runtime))
            seconds = time.process_time() - start
            jobs = {"compiled": compiled.take_step, "written": written.take_step}
            spent = h.take_turns(jobs, rounds, time.process_time)
        ratio = h.time_ratio(spent["compiled"], spent["written"])
        yield {
            "measure": "compile, a step", "setting": f"{name}, recipe digits", "value": ratio["ratio"],
            "unit": "times a step as it is written",
            "beside": f"{ratio['low']} to {ratio['high']}; {seconds:.0f} s of the processor's time before the first",
        }  # fmt: skip
