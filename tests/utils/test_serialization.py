"""Configurations to JSON and back: nothing is lost, and nothing that does not fit is let through."""

import base64
import copy
import json
import math
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.flow.flow_map import FlowMapConfig
from fewstep.flow.guidance import DrawnGuidance, FixedGuidance, NoGuidance
from fewstep.flow.paths import EDM, VP, EDMPathConfig, Linear, Path, PathConfig, Trig
from fewstep.flow.preconditioning.analytic import AnalyticPreconditioning
from fewstep.flow.preconditioning.jumps import (
    BCMPreconditioning,
    CMPreconditioning,
    EulerPreconditioning,
    LinearPreconditioning,
    TrigPreconditioning,
)
from fewstep.flow.preconditioning.network_scaling import EDMInputScaling, EDMScaling, IdentityScaling, UnitScaling
from fewstep.flow.preconditioning.statistics import TrajectoryStatistics
from fewstep.flow.times import BetaTimes, LogitNormalTimes, LogNormalTimes, UniformTimes
from fewstep.networks.base import NetworkConfig
from fewstep.networks.dit import DiTConfig
from fewstep.networks.mlp import MLPConfig
from fewstep.networks.unet import UNetConfig
from fewstep.objectives import CTM, ISD, DiagonalMatching
from fewstep.recipes.config import ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from fewstep.sampling.pipeline import PipelineConfig
from fewstep.utils.errors import ConfigError
from fewstep.utils.parts import kind
from fewstep.utils.serialization import differences, from_json, to_json
from tests.support.objectives import made

PATHS = [EDM(0.01, 50.0), Linear(), Trig(0.4), VP(0.2, 15.0, 1e-4)]
NETWORKS = [MLPConfig(width=8), UNetConfig(multipliers=(1, 3), patch=2), DiTConfig(heads=2, checkpoint=True)]
LAM = torch.linspace(-4, 6, 5, dtype=torch.float64)
STATISTICS = TrajectoryStatistics.closed_form(LAM, torch.sigmoid(LAM), 1 / (3 + LAM**2), torch.rand(1, 2, 2), 0.3)
RUN = RunConfig("mine")
MAP = FlowMapConfig(Linear(), LinearPreconditioning(), IdentityScaling(), MLPConfig(), (3,))


def through_text(value: Any) -> Any:
    return from_json(type(value), json.loads(json.dumps(to_json(value))))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("network", NETWORKS)
def test_flow_maps_survive(path: Path, network: NetworkConfig) -> None:
    for preconditioning in (
        LinearPreconditioning(),
        TrigPreconditioning(),
        EulerPreconditioning(path),
        BCMPreconditioning(0.3, path),
        CMPreconditioning(0.3, 0.01),
        AnalyticPreconditioning(STATISTICS, "forward", path),
    ):
        for scaling in (IdentityScaling(), UnitScaling(0.3), EDMScaling(0.3, path), EDMInputScaling(0.3, path)):
            flags: Any = ((1, 8, 8), 4, True, 0.3)
            config = FlowMapConfig(path, preconditioning, scaling, network, *flags)
            assert through_text(config) == config


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "objective",
    [
        made(ISD, guidance=FixedGuidance(2.0), kind="finite-difference", times=UniformTimes()),
        made(ISD, guidance=DrawnGuidance(), norm="pseudo-huber", times=BetaTimes(1.0, 2.0)),
        DiagonalMatching(times=LogNormalTimes(-0.5, 1.0), measure="denoiser"),
        DiagonalMatching(times=LogitNormalTimes(0.1, 0.5)),
    ],
)
def test_runs_survive(network: Any, objective: Any) -> None:
    config = replace(RUN, network=network, objective=objective, optimizer=OptimizerConfig("muon", clip=0.0))
    assert through_text(config) == config
    assert differences(to_json(RUN), to_json(config))


@given(
    lr=st.floats(1e-9, 1, exclude_min=True),
    widths=st.lists(st.floats(0.01, 0.28), min_size=1, max_size=3),
    sigma=st.none() | st.floats(1e-3, 1e3),
    recipe=st.text(max_size=8),
)
def test_every_number_and_text_survives(lr: float, widths: list[float], sigma: float | None, recipe: str) -> None:
    config = RunConfig(
        recipe,
        model=ModelConfig(sigma_data=sigma),
        optimizer=OptimizerConfig(lr=lr),
        training=TrainingConfig(ema_power=tuple(widths)),
    )
    assert through_text(config) == config


def test_an_integer_is_a_number() -> None:
    stored: Any = to_json(RUN)
    stored["optimizer"]["lr"] = 1
    lr = from_json(RunConfig, stored).optimizer.lr
    assert (lr, type(lr)) == (1.0, float)


def edited(base: Any, *keys: str, to: Any) -> Any:
    stored: Any = copy.deepcopy(to_json(base))
    inner = stored
    for key in keys[:-1]:
        inner = inner[key]
    if to is KeyError:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = to
    return stored


BAD = [
    (RUN, ("model", "colour"), "red", "colour"),
    (RUN, ("sead",), 3, "sead"),
    (RUN, ("training", "seed"), KeyError, "seed"),
    (RUN, ("objective", "pairs", "times"), KeyError, "times"),
    (RUN, ("training", "seed"), 1.5, "training.seed"),
    (RUN, ("training", "seed"), True, "training.seed"),
    (RUN, ("training", "seed"), "0", "training.seed"),
    (RUN, ("training", "seed"), None, "training.seed"),
    (RUN, ("optimizer", "lr"), "1e-4", "optimizer.lr"),
    (RUN, ("optimizer", "lr"), False, "optimizer.lr"),
    (RUN, ("optimizer", "name"), "sgd", "optimizer.name"),
    (RUN, ("optimizer", "name"), ["muon"], "optimizer.name"),
    (RUN, ("training", "flip"), 1, "training.flip"),
    (RUN, ("training", "ema_power"), 0.1, "training.ema_power"),
    (RUN, ("training", "ema_power"), [0.1, "x"], r"training.ema_power\[1\]"),
    (RUN, ("recipe",), 3, "recipe"),
    (RUN, ("training",), [], "training"),
    (RUN, ("network", "type"), "Transformer", "network"),
    (RUN, ("network", "type"), "ISD", "network"),
    (RUN, ("network", "type"), KeyError, "network"),
    (RUN, ("network", "type"), ["MLPConfig"], "network"),
    (RUN, ("network", "type"), {}, "network"),
    (RUN, ("objective", "guidance", "type"), "UniformTimes", "objective.guidance"),
    (MAP, ("path", "type"), "Path", "path"),
    (MAP, ("path",), None, "path"),
    (MAP, ("shape",), [3.0], r"shape\[0\]"),
    (PipelineConfig(), ("data_range",), [0, 1, 2], "data_range"),
    (PipelineConfig(), ("class_names",), "ab", "class_names"),
    (MAP, ("scaling", "type"), "Linear", "scaling"),
]

TENSOR = {"dtype": "float64", "shape": [5], "values": [0.1] * 5}
ENCODED = base64.b64encode(struct.pack("<5d", *[0.1] * 5)).decode()
PACKED = {"dtype": "float64", "shape": [5], "base64": ENCODED}
BAD_TENSORS = [
    [0.1] * 5,
    None,
    TENSOR | {"dtype": "int64"},
    TENSOR | {"dtype": 3},
    TENSOR | {"shape": [6]},
    TENSOR | {"shape": [-5]},
    TENSOR | {"shape": 5},
    TENSOR | {"shape": [2.5, 2]},
    TENSOR | {"values": [0.1] * 4 + ["0.1"]},
    TENSOR | {"values": [0.1] * 4 + [None]},
    TENSOR | {"values": [0.1] * 4 + [math.inf]},
    TENSOR | {"values": "0.1"},
    TENSOR | {"device": "cpu"},
    {"dtype": "float32", "shape": [5], "values": [1e300] * 5},
    TENSOR | {"base64": ENCODED},
    PACKED | {"base64": ENCODED[4:]},
    PACKED | {"base64": "*" + ENCODED[1:]},
    PACKED | {"base64": [1]},
    PACKED | {"base64": base64.b64encode(struct.pack("<5d", *[math.nan] * 5)).decode()},
]


@pytest.mark.parametrize("stored", BAD_TENSORS)
def test_what_is_no_tensor_is_refused_by_name(stored: Any) -> None:
    with pytest.raises(ConfigError, match=r"TrajectoryStatistics\.mean|number of TrajectoryStatistics\.mean") as caught:
        from_json(TrajectoryStatistics, edited(STATISTICS, "mean", to=stored))
    assert len(str(caught.value)) < 300


@given(
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=6),
    single=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=6, max_size=6),
)
def test_tensors_survive_to_the_last_bit(values: list[float], single: list[float]) -> None:
    for mean in (torch.tensor(values, dtype=torch.float64), torch.tensor(single).reshape(2, 1, 3), torch.tensor(0.1)):
        stored = through_text(replace(STATISTICS, mean=mean)).mean
        assert (stored.dtype, stored.shape) == (mean.dtype, mean.shape)
        assert torch.equal(stored, mean)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_large_tensors_are_stored_as_bytes(dtype: torch.dtype) -> None:
    assert torch.equal(
        from_json(TrajectoryStatistics, edited(STATISTICS, "mean", to=PACKED)).mean,
        torch.full((5,), 0.1, dtype=torch.float64),
    )
    large = torch.randn(64, 65, generator=torch.Generator().manual_seed(0), dtype=dtype).T
    assert set(to_json(large)) == {"dtype", "shape", "base64"}  # type: ignore[arg-type]
    stored = through_text(replace(STATISTICS, mean=large)).mean
    assert stored.dtype == dtype
    assert torch.equal(stored, large)
    assert stored.add_(1).isfinite().all()  # memory of its own


@pytest.mark.parametrize("tensor", [torch.tensor([1]), torch.tensor([math.nan]), torch.tensor(1 + 1j)])
def test_tensors_that_cannot_be_stored_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="tensor"):
        to_json(tensor)


@pytest.mark.parametrize(("base", "keys", "to", "named"), BAD)
def test_what_does_not_fit_is_refused_by_name(base: Any, keys: tuple[str, ...], to: Any, named: str) -> None:
    stored = edited(base, *keys, to=to)
    with pytest.raises(ConfigError, match=named):
        from_json(type(base), stored)
    if to is not KeyError:
        assert from_json(type(base), to_json(base)) == base


@pytest.mark.parametrize("stored", [None, [], "RunConfig", 3])
def test_what_is_no_object_is_refused(stored: Any) -> None:
    with pytest.raises(ConfigError, match="RunConfig"):
        from_json(RunConfig, stored)


def test_stored_values_pass_the_classes_own_checks() -> None:
    with pytest.raises(ConfigError, match="sigma_data"):
        from_json(FlowMapConfig, to_json(MAP) | {"path": {"type": "Trig", "sigma_data": -1.0}})


@pytest.mark.parametrize("value", [{1, 2}, object(), {"a": 1}, Linear])
def test_what_json_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError):
        to_json(value)


def test_terse_leaves_out_what_came_later_and_says_nothing() -> None:
    """A setting that is added tomorrow must not change what today's settings are known by."""
    set_later: Any = to_json(made(ISD, endpoint_share=0.5))
    terse: Any = to_json((ISD(), made(ISD, endpoint_share=0.5)), terse=True)
    for record, said in zip(terse, (False, True), strict=True):
        assert {"anchor", "distill"}.isdisjoint(record)
        assert {"eps_of_sum", "time_weight"}.isdisjoint(record["weighting"])
        assert ("endpoint_share" in record["pairs"]) is said
    assert terse[1]["pairs"] == set_later["pairs"]
    assert from_json(ISD, terse[0]) == ISD()
    plain, guided = (to_json(made(CTM, guidance=each), terse=True) for each in (NoGuidance(), FixedGuidance()))
    assert isinstance(plain, dict)
    assert isinstance(guided, dict)
    assert "guidance" in guided.keys() - plain.keys()


def test_differences_name_each_value_that_changed() -> None:
    other = replace(
        RUN, training=replace(RUN.training, seed=5), model=ModelConfig(EDMPathConfig()), network=DiTConfig()
    )
    lines = differences(to_json(RUN), to_json(other))
    assert "training.seed: 0 -> 5" in lines
    assert "model.path.type: 'LinearPathConfig' -> 'EDMPathConfig'" in lines
    assert "network.type: 'MLPConfig' -> 'DiTConfig'" in lines
    assert not any(line.startswith(("data", "optimizer", "objective")) for line in lines)
    assert differences(to_json(RUN), to_json(RunConfig("mine"))) == []
    assert differences([1, 2], [1, 3], "shape") == ["shape: [1, 2] -> [1, 3]"]
    assert all(len(line) < 300 for line in differences([0.1] * 999, [0.2] * 999, "table"))


@pytest.mark.parametrize("make", [lambda: BetaTimes(2.0, 2.0), lambda: DrawnGuidance(1.0), lambda: FixedGuidance(0.0)])
def test_settings_without_meaning_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError):
        make()


def test_named_paths_carry_the_datas_deviation() -> None:
    assert kind(PathConfig, "trig").build(0.25) == Trig(0.25)
    assert [type(kind(PathConfig, name).build(0.25)) for name in ("linear", "edm", "vp")] == [Linear, EDM, VP]
