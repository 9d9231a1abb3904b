"""A bar over the network calls of a measurement."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from tqdm import tqdm

from fewstep.sampling.generate import SamplingSettings


@contextmanager
def measuring(network: nn.Module, plans: list[tuple[str, SamplingSettings]], samples: int) -> Iterator["tqdm[Any]"]:
    """Counts samples times steps over all plans as the network is called; on a terminal alone.

    plans: what is measured, by name, each with `samples` samples.
    """
    total = samples * sum(calls(settings) for _, settings in plans)
    bar: tqdm[Any] = tqdm(
        total=total, unit="call", unit_scale=True, disable=None, file=sys.stderr, mininterval=0.5, miniters=0,
        leave=False, bar_format="{desc}: {percentage:5.1f}% |{bar}| {elapsed}<{remaining}",
    )  # fmt: skip
    handle = network.register_forward_pre_hook(lambda module, inputs: bar.update(min(len(inputs[0]), total - bar.n)))
    try:
        yield bar
    finally:
        handle.remove()
        bar.close()


def calls(settings: SamplingSettings) -> int:
    """Network calls of a sample: Heun's method makes two a step, but for the last."""
    return 2 * settings.steps - 1 if settings.sampler == "heun" else settings.steps
