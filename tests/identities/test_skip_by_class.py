"""A mean and a covariance for each class: each sample jumps as in its own class, one without a label as in all data."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from fewstep.data.base import Dataset, Samples
from fewstep.flow.derivatives import Derivative
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import EDM, Linear
from fewstep.flow.preconditioning.covariance import ByClass, Covariance, CovarianceSettings, PrincipalComponents
from fewstep.flow.preconditioning.jumps import EulerPreconditioning, LinearPreconditioning
from fewstep.flow.preconditioning.skip import SkipPreconditioning
from fewstep.networks.condition import Condition
from fewstep.objectives import eulerian_residual
from fewstep.training.covariance import means_by_class, measure
from fewstep.utils.errors import ConfigError
from fewstep.utils.serialization import from_json, to_json
from fewstep.utils.tensors import is_wrapped
from tests.identities.test_skip import SHAPE, components, cosine
from tests.support.cases import F64, close, noise, random_network

LABELS = torch.tensor([2, -1, 0, 1, 2])


def by_class(each: bool) -> ByClass:
    pooled, own = components(0), tuple(components(seed) for seed in (1, 2, 3))
    return ByClass(pooled.mean, noise(3, *SHAPE, seed=9), pooled, own if each else own[:1])


def alone(found: ByClass, label: int) -> Covariance:
    """The covariance of one class, as data of that class alone would have it."""
    if label < 0:
        return found.pooled
    part = found.within[label if len(found.within) > 1 else 0]
    return type(part)(found.means[label], *(getattr(part, name) for name in ("vectors", "variances", "rest")))


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("base", [EulerPreconditioning(Linear()), LinearPreconditioning()], ids=["euler", "linear"])
def test_each_sample_jumps_as_in_its_own_class(each: bool, base: EulerPreconditioning) -> None:
    """Jumps, what is shown, and the Eulerian residual along any velocity."""
    covariance, network = by_class(each), random_network(SHAPE, 3)
    flow_map = FlowMap(Linear(), SkipPreconditioning(base, covariance, Linear()), network)
    x, v, cond = noise(5, *SHAPE), noise(5, *SHAPE, seed=1), Condition(LABELS)
    t, s = torch.linspace(0.5, 0.9, 5, dtype=F64), torch.linspace(0.4, 0.1, 5, dtype=F64)
    terms = Derivative().along(flow_map, x, v, t, s, cond)
    found = [flow_map.jump(x, t, s, cond), flow_map.jumping(cond).shown(Linear(), x, t, s)]
    found.append(eulerian_residual(flow_map, x, v, *terms, t, s, cond))
    for row, label in enumerate(LABELS.tolist()):
        one = slice(row, row + 1)
        own = FlowMap(Linear(), SkipPreconditioning(base, alone(covariance, label), Linear()), network)
        wanted = [
            own.jump(x[one], t[one], s[one], cond[one]),
            own.preconditioning.shown(Linear(), x[one], t[one], s[one]),
        ]
        wanted.append(eulerian_residual(own, x[one], v[one], *(part[one] for part in terms), t[one], s[one]))
        wanted[1] = wanted[1] * own.preconditioning.covariance.deviation / covariance.deviation  # type: ignore[attr-defined, operator]
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine is not None
            assert theirs is not None
            close(mine[one].detach(), theirs.detach())
    close(flow_map.jump(x, t, t, cond).detach(), x)
    close(flow_map.jump(x, t, s).detach(), flow_map.jump(x, t, s, Condition(torch.full((5,), -1))).detach())


def dataset(labels: bool = True) -> Dataset:
    values = torch.cat([noise(40, 1, 2, 2, seed=c).float() * (1 + c) + 3 * c for c in range(3)])
    samples = Samples(values, torch.arange(3).repeat_interleave(40) if labels else None)
    names = ("a", "b", "c", "d") if labels else ()
    return Dataset("three", samples, samples, len(names), names)


def rows(data: Dataset, label: int) -> Tensor:
    values, labels = data.train.fetch(torch.arange(len(data.train)))
    assert labels is not None
    return values[labels == label].double().flatten(1)


@pytest.mark.parametrize("basis", ["components", "cosine", "isotropic"])
def test_they_are_measured_of_the_data(basis: str) -> None:
    """A class without samples has the mean of all data."""
    data = dataset()
    origin, each = (measure(data, CovarianceSettings(basis, 0, mode)) for mode in ("origin", "covariance"))  # type: ignore[arg-type]
    assert isinstance(origin, ByClass)
    assert isinstance(each, ByClass)
    own = [rows(data, label) for label in range(3)]
    close(origin.means[:3].flatten(1), torch.stack([part.mean(0) for part in own]))
    close(origin.means[3], origin.mean)
    spread = [(part - part.mean(0)).square().sum(1).mean() for part in own]
    assert origin.within[0].total == pytest.approx(float(torch.stack(spread).mean()))
    assert [each.part_of(label).total for label in range(3)] == pytest.approx([float(value) for value in spread])
    if basis == "components":
        c = each.part_of(1).scaled(torch.eye(4, dtype=F64).reshape(4, 1, 2, 2), lambda lam: lam).flatten(1)
        close(c, (own[1] - own[1].mean(0)).T @ (own[1] - own[1].mean(0)) / 40)
    assert from_json(Covariance, to_json(each)) == each  # type: ignore[type-abstract]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="no classes"):
        means_by_class(dataset(labels=False))
    with pytest.raises(ConfigError, match="do not fit"):
        ByClass(noise(*SHAPE), noise(3, *SHAPE), components(), (cosine(),))
    with pytest.raises(ConfigError, match="do not fit"):
        ByClass(noise(*SHAPE), noise(3, *SHAPE), components(), (components(), components()))
    for index in ((0, 1), (0, 1, 2), (0, -1, 1)):
        with pytest.raises(ConfigError, match="do not fit"):
            ByClass(noise(*SHAPE), noise(3, *SHAPE), components(), (components(), components()), index)
    assert SkipPreconditioning(EulerPreconditioning(), components(), EDM()).of(LABELS).covariance == components()


def test_when_compiled_all_parts_are_applied_to_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same end, and with shapes that no label changes."""
    own, x = by_class(each=True).of(LABELS), noise(5, *SHAPE)
    found = own.scaled(x, torch.sqrt), own.coordinates(x)
    calls: list[int] = []
    scaled = PrincipalComponents.scaled
    monkeypatch.setattr(PrincipalComponents, "scaled", lambda *given: calls.append(len(given[1])) or scaled(*given))
    own.scaled(x, torch.sqrt)
    assert calls == [1, 1, 1, 2]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    close(own.scaled(x, torch.sqrt), found[0])
    close(own.coordinates(x), found[1])
    assert calls[4:] == [5] * 4


def test_a_model_can_be_copied_after_any_derivative() -> None:
    """What a transform, or inference mode, made is not kept: copies, files and gradients know nothing of it."""
    skip = SkipPreconditioning(EulerPreconditioning(Linear()), by_class(each=True), Linear())
    flow_map = FlowMap(Linear(), skip, random_network(SHAPE, 3))
    x, v, cond = noise(5, *SHAPE), noise(5, *SHAPE, seed=1), Condition(LABELS)
    t, s = torch.full((5,), 0.7, dtype=F64), torch.full((5,), 0.3, dtype=F64)
    with torch.inference_mode():
        flow_map.jump(x, t, s, cond)
    for given in (cond, None):
        terms = Derivative().along(flow_map, x, v, t, s, given)
        eulerian_residual(flow_map, x, v, *terms, t, s, given)
        flow_map.jumping(given).residual(Linear(), *(each.float() for each in (x, v, x, v)), t, s)
    for part in (skip.covariance.pooled, *skip.covariance.within):  # type: ignore[attr-defined]
        assert not any(is_wrapped(value) or value.is_inference() for value in part._copies._found.values())
    for copied in (copy.deepcopy(flow_map), pickle.loads(pickle.dumps(flow_map))):
        close(copied.jump(x, t, s, cond).detach(), flow_map.jump(x, t, s, cond).detach())
    for label in (cond, None):
        time = t.clone().requires_grad_()
        flow_map.jump(x, time, s, label).sum().backward()
        assert time.grad is not None
    single = flow_map.jumping(cond).jump(Linear(), x.float(), x.float(), t, s)
    assert single.dtype == torch.float32
    close(flow_map.jumping(cond).jump(Linear(), x, x, t, s).float(), single, rtol=1e-4, atol=1e-4)
    assert skip.covariance.of(LABELS[:0]).scaled(x[:0], torch.sqrt).shape == (0, *SHAPE)


def test_a_device_is_asked_nothing() -> None:
    """Tensors without values cannot tell which classes occur."""
    skip = SkipPreconditioning(EulerPreconditioning(Linear()), by_class(each=True), Linear())
    x, t = torch.empty(5, *SHAPE, device="meta"), torch.empty(5, dtype=F64, device="meta")
    own = skip.of(LABELS.to("meta"))
    assert own.jump(Linear(), x, x, t, t / 2).shape == x.shape
    assert own.covariance.coordinates(x).shape[0] == 5
