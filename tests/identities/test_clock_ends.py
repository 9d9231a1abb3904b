"""Losses and their gradients are finite at both ends of every clock, and where both times are one end."""

from dataclasses import dataclass, replace
from typing import Any, final

import pytest
import torch
from torch import Tensor

from fewstep.flow.flow_map import FlowMap, at
from fewstep.flow.guidance import FixedGuidance
from fewstep.flow.paths import Path
from fewstep.flow.preconditioning.base import Preconditioning
from fewstep.flow.times import BetaTimes, LogitNormalTimes, LogNormalTimes, UniformTimes
from fewstep.objectives import CD, CTM, TABLE, Batch, Companions, DiagonalMatching, Objective
from fewstep.objectives.base import STREAM_S, STREAM_T, STREAM_U
from fewstep.objectives.ctm import STREAM_DIAGONAL
from fewstep.utils.random import Draws
from tests.support.cases import PAIRS, SD, gaussian, noise, pair, random_network, scalings
from tests.support.objectives import changed

SCALINGS = {"linear": "identity", "trig": "unit", "euler": "edm", "bcm": "edm-input"}
BITS = {STREAM_T: 0, STREAM_DIAGONAL: 0, STREAM_S: 1, STREAM_U: 2}


@final
@dataclass(frozen=True)
class EndDraws(Draws):
    """Draws of times that are 0 or 1, in all combinations over eight samples: what no draw reaches but by rounding."""

    def uniform(self, stream: int, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float64) -> Tensor:
        if stream in BITS and shape == ():
            return ((self.indices >> BITS[stream]) % 2).to(dtype)
        return super().uniform(stream, shape, dtype)


def objectives() -> dict[str, Objective]:
    """Every one of the table, with its settings that meet an end of the clock in another way."""
    found: dict[str, Objective] = {}
    for entry in TABLE:
        plain: Any = entry.objective()
        if isinstance(plain, CD | CTM):  # a short walk of the teacher meets the ends as a long one does
            plain = changed(plain, points=4)
        names = set(plain.__dataclass_fields__)
        found[entry.name] = plain
        if "pairs" in names:
            found[f"{entry.name}, off the diagonal"] = changed(plain, flow_matching_ratio=0.0)
        if "derivative" in names:
            found[f"{entry.name}, by differences"] = changed(plain, kind="finite-difference")
        if "guidance" in names:
            found[f"{entry.name}, guided"] = replace(plain, guidance=FixedGuidance(2.0), label_dropout=0.0)
    for times in (UniformTimes(), BetaTimes(), LogitNormalTimes(), LogNormalTimes()):
        found[type(times).__name__] = DiagonalMatching(times=times)
    found["denoising"] = DiagonalMatching(measure="denoiser", sigma_data=SD)
    return found


OBJECTIVES = objectives()


def flow_map(path: Path, preconditioning: Preconditioning, scaling: str) -> FlowMap:
    network = random_network((3,), 2).float()
    return FlowMap(path, preconditioning, network, scalings(path)[scaling])


@pytest.mark.parametrize(("path_name", "own"), PAIRS)
def test_losses_are_finite(path_name: str, own: str) -> None:
    """And their gradients, of every objective."""
    path, preconditioning = pair(path_name, own)
    model, slow, teacher = (flow_map(path, preconditioning, SCALINGS[own]) for _ in range(3))
    weights = list(model.network.parameters())
    batch = Batch(noise(8, 3).float(), torch.arange(8) % 2, EndDraws(0, 0, torch.arange(8)), images=1000)
    wild = []
    for name, objective in OBJECTIVES.items():
        chosen = replace(objective, sigma_data=SD) if isinstance(objective, CTM) else objective
        losses = chosen(model, batch, Companions(teacher=teacher, ema_target=slow))
        gradients = torch.autograd.grad(losses.mean(), weights, allow_unused=True)
        found = [losses.loss, *(gradient for gradient in gradients if gradient is not None)]
        if not all(bool(each.isfinite().all()) for each in found):
            wild.append(name)
    assert wild == []


@pytest.mark.parametrize(("path_name", "own"), PAIRS)
def test_the_velocity_at_the_data_end_is_its_limit(path_name: str, own: str) -> None:
    """Of the exact denoiser, for x0 that the data hold."""
    path, preconditioning = pair(path_name, own)
    model, x = gaussian().flow_map(path, preconditioning), noise(4, 3)
    at_end, beside = (model.velocity(x, at(time, x)) for time in (path.t_min, path.t_min + 1e-7))
    torch.testing.assert_close(at_end, beside, rtol=1e-4, atol=1e-4)
