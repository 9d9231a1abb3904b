"""Paths, preconditionings, scalings, networks and strategies that the identities are tested on. All in float64."""

import itertools
import math
from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fewstep.flow.closed_form import GaussianData, MixtureData
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import EDM, VP, Linear, Path, Trig
from fewstep.flow.preconditioning.base import Preconditioning
from fewstep.flow.preconditioning.jumps import (
    BCMPreconditioning,
    EulerPreconditioning,
    LinearPreconditioning,
    TrigPreconditioning,
)
from fewstep.flow.preconditioning.network_scaling import (
    EDMInputScaling,
    EDMScaling,
    IdentityScaling,
    Scaling,
    UnitScaling,
)
from fewstep.networks.base import Network
from fewstep.networks.mlp import MLPConfig

F64 = torch.float64
SD = 0.7

PATHS: dict[str, Path] = {"edm": EDM(), "linear": Linear(), "trig": Trig(SD), "vp": VP()}


def preconditionings(path: Path) -> dict[str, Preconditioning]:
    """Those a path admits; trig needs a clock of at most pi/2."""
    found: dict[str, Preconditioning] = {
        "linear": LinearPreconditioning(),
        "euler": EulerPreconditioning(path),
        "bcm": BCMPreconditioning(SD, path),
    }
    return found if path.t_max > 2 else found | {"trig": TrigPreconditioning()}


def scalings(path: Path) -> dict[str, Scaling]:
    return {
        "identity": IdentityScaling(),
        "unit": UnitScaling(SD),
        "edm": EDMScaling(SD, path),
        "edm-input": EDMInputScaling(SD, path),
    }


PAIRS = [(p, c) for p, path in PATHS.items() for c in preconditionings(path)]

every_pair = pytest.mark.parametrize(("path_name", "name"), PAIRS)


def covering(rows: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Some of the rows: any two values that meet in one of all rows meet in one of these."""
    found, rows = [], list(rows)
    left = set().union(*map(_meetings, rows))
    while left:
        found.append(max(rows, key=lambda row: len(left & _meetings(row))))
        left -= _meetings(found[-1])
    return found


def _meetings(row: tuple[str, ...]) -> set[tuple[tuple[int, str], ...]]:
    return set(itertools.combinations(enumerate(row), 2))


def pair(path_name: str, name: str) -> tuple[Path, Preconditioning]:
    path = PATHS[path_name]
    return path, preconditionings(path)[name]


units = st.floats(0.02, 0.98)
means = st.floats(-1.5, 1.5)
sds = st.floats(0.2, 1.5)
unit_triples = st.lists(units, min_size=3, max_size=3, unique=True).map(sorted)
sample_shapes = st.sampled_from([(1,), (3,), (2, 2), (1, 2, 3)])


def clock(path: Path, *unit_times: float) -> list[Tensor]:
    """Fractions of the unit clock as times of the path, each of shape (1,)."""
    return [path.time_from_unit(torch.tensor([u], dtype=F64)) for u in unit_times]


def gaussian(mean: float = 0.4, sd: float = SD) -> GaussianData:
    return GaussianData(torch.tensor(mean, dtype=F64), sd)


def mixture() -> MixtureData:
    return MixtureData(
        torch.tensor([0.3, 0.5, 0.2], dtype=F64),
        torch.tensor([[-1.0, 0.5], [0.8, 0.3], [0.1, -1.2]], dtype=F64),
        torch.tensor([0.4, 0.3, 0.6], dtype=F64),
    )


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def random_network(
    shape: tuple[int, ...] = (3,), num_classes: int = 0, guided: bool = False, max_frequency: float = 4.0
) -> Network:
    """A small MLP with noise on every weight: smooth, nonlinear, and nothing in it is zero."""
    config = MLPConfig(width=16, depth=1, embedding_width=8, max_frequency=max_frequency)
    network = config.build(shape, num_classes, guided).double()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        for parameter in network.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return network


def random_map(path_name: str = "linear", name: str = "linear", width: int = 3) -> FlowMap:
    """A random network's map, without labels."""
    path, preconditioning = pair(path_name, name)
    return FlowMap(path, preconditioning, random_network((width,)), scalings(path)["edm"])


def labelled_map(guided: bool = False) -> FlowMap:
    """A random network's map of two dimensions and three classes."""
    network = random_network((2,), 3, guided)
    return FlowMap(Linear(), LinearPreconditioning(), network, scalings(Linear())["unit"])


class Callback(nn.Module):
    """A network given as a function of (x, t, s, cond)."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: object = None) -> Tensor:
        return self.function(x, t, s, cond)


def slope(sizes: list[float], errors: list[float]) -> float:
    """The measured order: the slope of log error against log size, by least squares."""
    x = torch.tensor([math.log(size) for size in sizes], dtype=F64)
    y = torch.tensor([math.log(error) for error in errors], dtype=F64)
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
