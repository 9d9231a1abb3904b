"""Models with a skip as ONNX files and programs of torch.export: the same jumps and samples."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.export.diffusers import export_diffusers
from fewstep.export.steps import sampling_times
from fewstep.export.traced import SkipSamplerModule, export_traced
from fewstep.flow.flow_map import FlowMapConfig
from fewstep.flow.paths import EDM
from fewstep.flow.preconditioning.covariance import ByClass, CosineVariances, Covariance, PrincipalComponents
from fewstep.flow.preconditioning.estimation import noise_grid
from fewstep.flow.preconditioning.jumps import EulerPreconditioning
from fewstep.flow.preconditioning.network_scaling import EDMScaling
from fewstep.flow.preconditioning.regression import Regression
from fewstep.flow.preconditioning.skip import SkipPreconditioning
from fewstep.networks.condition import Condition
from fewstep.networks.mlp import MLPConfig
from fewstep.sampling.pipeline import Pipeline
from fewstep.sampling.samplers import map_sampler
from fewstep.utils.errors import ConfigError
from fewstep.utils.random import Draws
from tests.support.cases import F64, noise

SHAPE = (1, 3, 3)
LABELS = torch.tensor([2, -1, 0])


def components(seed: int) -> PrincipalComponents:
    vectors = torch.linalg.qr(noise(9, 9, seed=seed))[0]
    return PrincipalComponents(noise(*SHAPE, seed=seed), vectors[:, :4], torch.logspace(0, -1, 4, dtype=F64), 0.05)


def by_class() -> ByClass:
    return ByClass(components(0).mean, noise(3, *SHAPE, seed=5), components(0), (components(1),))


def regression() -> Regression:
    lam = noise_grid(EDM(), 6)
    return Regression(lam, 0.05 * noise(2, 6, 6), torch.tensor([0, 0, 0, 1, 1], dtype=F64), torch.zeros(0, 0), 10, 0)


CASES: dict[str, tuple[Covariance, Regression | None]] = {
    "by class": (by_class(), None),
    "regressed": (components(0), regression()),
    "cosine": (CosineVariances(noise(*SHAPE), torch.eye(1, dtype=F64), noise(*SHAPE, seed=1).square()), None),
}


def pipeline(name: str) -> Pipeline:
    """A small model that sees its skip, with noise on every weight."""
    covariance, regressed = CASES[name]
    skip = SkipPreconditioning(EulerPreconditioning(), covariance, EDM(), regressed)
    network = MLPConfig(width=16, depth=1, embedding_width=8, sees_skip=True)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        flow_map = FlowMapConfig(EDM(), skip, EDMScaling(0.7), network, SHAPE, 3, sigma_data=0.7).build()
        for parameter in flow_map.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return Pipeline(flow_map.eval())


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_of_steps_give_the_same_samples(name: str) -> None:
    """Without times, paths and tables: what a traced sampler holds."""
    model = pipeline(name)
    times, x = sampling_times(model, (3,))[3], noise(3, *SHAPE).float()
    with torch.no_grad():
        own = map_sampler(model.flow_map, 80 * x, times, condition(), Draws(0, 0, torch.arange(3)))
        found = SkipSamplerModule(model.flow_map, ("labels",), 80.0, times)(x, LABELS)
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "kind"), [("regressed", "torch")])
def test_traced_programs_give_the_same_jumps_and_samples(name: str, kind: Any, tmp_path: Path) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxscript")
        onnxruntime = pytest.importorskip("onnxruntime")
    model = pipeline(name)
    export_traced(model, tmp_path / "out", kind, (1,))
    record = json.loads((tmp_path / "out" / "fewstep.json").read_text())
    x, times = noise(3, *SHAPE).float(), record["times"]["1"]
    with torch.no_grad():
        first, last = (torch.full((3,), time) for time in times)
        middle = torch.full((3,), 2.0)
        wanted = {
            "jump": model.flow_map.jump(80 * x, first, middle, condition()),
            "sampler-1": model.flow_map.jump(80 * x, first, last, condition()),
        }
    inputs = {"jump": (80 * x, first, middle, LABELS), "sampler-1": (x, LABELS)}
    for file, given in inputs.items():
        if kind == "onnx":
            session = onnxruntime.InferenceSession(str(tmp_path / "out" / f"{file}.onnx"))
            names = [entry.name for entry in session.get_inputs()]
            found = torch.from_numpy(session.run(None, {n: v.numpy() for n, v in zip(names, given, strict=True)})[0])
        else:
            found = torch.export.load(tmp_path / "out" / f"{file}.pt2").module()(*given)
        torch.testing.assert_close(found, wanted[file], rtol=1e-5, atol=1e-5)


def condition() -> Condition:
    return Condition(LABELS)


def test_another_format_says_where_it_can_go(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        export_diffusers(pipeline("cosine"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
