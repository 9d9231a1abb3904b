"""A skip regressed on trajectories: boundary, diagonal, derivatives for any table; the Gaussian's own on Gaussians."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import EDM
from fewstep.flow.preconditioning.covariance import Covariance, PrincipalComponents
from fewstep.flow.preconditioning.estimation import noise_grid
from fewstep.flow.preconditioning.interpolation import Surface
from fewstep.flow.preconditioning.jumps import EulerPreconditioning, LinearPreconditioningConfig
from fewstep.flow.preconditioning.regression import Family, Measured, Regression, RegressionSettings
from fewstep.flow.preconditioning.skip import SkipPreconditioning, SkipPreconditioningConfig
from fewstep.flow.preconditioning.trajectory_moments import TrajectoryMoments, pooled
from fewstep.utils.errors import ConfigError
from fewstep.utils.serialization import from_json, to_json
from tests.identities.test_skip import SHAPE, SIZE, assert_residual_is_the_slope, cases, components, cosine
from tests.support.cases import (
    F64,
    PAIRS,
    PATHS,
    clock,
    close,
    covering,
    every_pair,
    noise,
    pair,
    random_network,
    unit_triples,
)

LEVELS = 20
LAM = noise_grid(EDM(), LEVELS)
FAMILIES: tuple[Family, ...] = ("regressed", "regressed-components", "regressed-length")
every_family = pytest.mark.parametrize("family", FAMILIES)
seeds = st.integers(0, 99)


def isotropic() -> PrincipalComponents:
    return PrincipalComponents(noise(*SHAPE, seed=1), torch.zeros(SIZE, 0, dtype=F64), torch.zeros(0, dtype=F64), 0.8)


COVARIANCES: dict[str, Covariance] = {
    "components": components(), "few components": components(kept=3), "cosine": cosine(), "isotropic": isotropic(),
}  # fmt: skip


def any_regression(covariance: Covariance, weight: bool = False) -> Regression:
    """A smooth table that no data have."""
    groups = pooled(covariance.lam)
    count = int(groups.max()) + 1
    waves = torch.sin(LAM[:, None] + 0.5 * LAM[None, :] + torch.arange(count)[:, None, None])
    return Regression(LAM, 0.05 * waves, groups.double(), 0.1 * waves[0] - 0.1 if weight else waves[0][:0, :0], 10, 0)


def gaussian_trajectories(covariance: Covariance, count: int = 40) -> tuple[Tensor, Tensor]:
    """Exact states and denoised (LEVELS, count, *SHAPE) of N(m, C) on the EDM path."""
    mean, tau2 = covariance.mean, torch.exp(-2 * LAM)
    start = 80 * noise(count, *SHAPE, seed=5)
    states = torch.stack([covariance.scaled(start, lambda v, s=s: torch.sqrt((v + s) / (v + tau2[0]))) for s in tau2])
    denoised = [covariance.scaled(x, lambda v, s=s: v / (v + s)) for x, s in zip(states, tau2, strict=True)]
    return mean + states, mean + torch.stack(denoised)


def bent_trajectories(count: int = 60) -> tuple[Tensor, Tensor]:
    """States and denoised of no Gaussian: those of one, squared in part."""
    states, denoised = gaussian_trajectories(components(), count)
    return states + 0.1 * torch.tanh(states).square(), denoised + 0.1 * torch.tanh(states).square()


def regress(covariance: Covariance, data: tuple[Tensor, Tensor], family: Family, g: bool = False) -> Regression:
    moments = TrajectoryMoments(LAM, covariance)
    moments.update(*(each[:, :15] for each in data))
    moments.update(*(each[:, 15:] for each in data))
    return moments.regression(RegressionSettings(family, g, data[0].shape[1], LEVELS))


@settings(max_examples=10)
@given(seed=seeds)
def test_a_surface_passes_through_its_knots_and_is_exact_for_parabolas(seed: int) -> None:
    values, u = noise(2, 6, 6, seed=seed), torch.arange(6, dtype=F64)
    surface = Surface.through(values, 1.0, 0.5)
    rows, columns = torch.cartesian_prod(u, u).T
    close(surface.at(1 + 0.5 * rows, 1 + 0.5 * columns), values.flatten(1))
    parabola = Surface.through((u[:, None].square() - u[:, None] * u[None])[None], 0.0, 1.0)
    a, b = 5 * torch.rand(2, 9, dtype=F64, generator=torch.Generator().manual_seed(seed))
    close(parabola.at(a, b)[0], a.square() - a * b)


def test_directions_are_pooled_by_falling_variance() -> None:
    lam = torch.tensor([0.1, 3.0, 2.0, 0.2, 1.0, 0.5])
    assert pooled(lam).tolist() == [5, 0, 1, 4, 2, 3]
    many = pooled(torch.arange(1000.0), most=8)
    sizes = torch.bincount(many)
    assert bool((sizes > 0).all() and (sizes.diff() >= 0).all() and sizes[0] == 1)


@pytest.mark.parametrize(
    ("path_name", "name", "kind"), covering((*each, kind) for each in PAIRS for kind in COVARIANCES)
)
@settings(max_examples=3)
@given(times=unit_triples, seed=seeds)
def test_any_table_keeps_the_boundary_and_the_diagonal(
    path_name: str, name: str, kind: str, times: list[float], seed: int
) -> None:
    (path, base), covariance = pair(path_name, name), COVARIANCES[kind]
    network = random_network(SHAPE)
    skip = SkipPreconditioning(base, covariance, path, any_regression(covariance, weight=name == "euler"))
    flow_map, plain = FlowMap(path, skip, network), FlowMap(path, base, network)
    x, (t, *_) = cases(path_name, times, seed)
    close(flow_map.jump(x, t, t), x)
    _, rate = torch.func.jvp(lambda s: flow_map.jump(x, t, s), (t,), (torch.ones_like(t),))
    close(rate, plain.velocity(x, t), atol=1e-7 * float(1 + plain.velocity(x, t).detach().abs().max()))


@every_pair
@settings(max_examples=3)
@given(times=unit_triples, seed=seeds)
def test_the_residual_is_the_derivative_of_the_jump_along_the_flow(
    path_name: str, name: str, times: list[float], seed: int
) -> None:
    path, base = pair(path_name, name)
    covariance = COVARIANCES["few components"]
    skip = SkipPreconditioning(base, covariance, path, any_regression(covariance, weight=name == "euler"))
    flow_map = FlowMap(path, skip, random_network(SHAPE))
    x, (s, _, t) = cases(path_name, times, seed)
    v = noise(3, *SHAPE, seed=seed + 2)
    assert_residual_is_the_slope(flow_map, x, v, t, s)


@pytest.mark.parametrize("family", FAMILIES[1:])
@pytest.mark.parametrize("name", ["components", "few components", "cosine"])
def test_on_gaussians_it_is_the_covariance_form(name: str, family: Family) -> None:
    """At any times, not at the levels alone: along each direction, and with the length made up for."""
    covariance = COVARIANCES[name]
    found = regress(covariance, gaussian_trajectories(covariance), family)
    close(found.table, torch.zeros_like(found.table), atol=1e-9)
    x, (s, t) = noise(3, *SHAPE), [time.repeat(3) for time in clock(EDM(), 0.003, 0.3)]
    plain = SkipPreconditioning(EulerPreconditioning(), covariance)
    close(replace(plain, regression=found).linear(x, t, s), plain.linear(x, t, s), atol=1e-8)


def test_where_all_directions_have_one_variance_a_single_number_is_exact() -> None:
    found = regress(isotropic(), gaussian_trajectories(isotropic()), "regressed")
    close(found.table, torch.zeros_like(found.table), atol=1e-9)


@pytest.mark.parametrize("g", [False, True])
def test_at_the_levels_it_is_least_squares(g: bool) -> None:
    """One number: X - g D = f x about the mean, by the normal equations of the samples themselves."""
    covariance, data = isotropic(), bent_trajectories()
    found = regress(covariance, data, "regressed", g)
    skip = SkipPreconditioning(EulerPreconditioning(), covariance, EDM(), found)
    states, denoised = (each - covariance.mean for each in data)
    for a, b in ((2, 17), (6, 12), (0, 19)):
        t, s = (torch.exp(-LAM[i]).reshape(1) for i in (a, b))
        x, d, end = (each.flatten()[:, None] for each in (states[a], denoised[a], states[b]))
        both = torch.linalg.lstsq(torch.cat([x, d], 1), end).solution
        weight = (both[1].clamp(max=float(1 - s / t)) if g else 1 - s / t).clamp(min=0.02 * float(1 - s / t))
        close(skip.coefficients(t, s)[1], weight, atol=1e-8)
        f = (x * (end - weight * d)).sum() / x.square().sum()
        one = noise(1, *SHAPE)
        close(skip.passed(EDM(), one, t, s), f * one, atol=1e-8)


def test_the_regressed_direction_has_the_gaussians_length() -> None:
    covariance, data = components(), bent_trajectories()
    own = regress(covariance, data, "regressed-length")
    least = regress(covariance, data, "regressed-components")
    y = covariance.coordinates(data[0][3] - covariance.mean)
    gauss = torch.sqrt((covariance.lam[:-1] + torch.exp(-2 * LAM[15])) / (covariance.lam[:-1] + torch.exp(-2 * LAM[3])))
    groups, step = own.groups.long()[:-1], LAM[15] - LAM[3]
    passed = [(1 + step * each.table[groups, 3, 15]) * gauss * y for each in (own, least)]
    close(passed[0].square().sum(), (gauss * y).square().sum())
    close(passed[0] * passed[1].norm() / passed[0].norm(), passed[1])
    close(torch.diagonal(own.table, 0, 1, 2), torch.diagonal(least.table, 0, 1, 2))


@every_family
def test_it_is_stored_exactly_and_goes_on_beyond_its_levels(family: Family) -> None:
    covariance = isotropic() if family == "regressed" else components()
    found = regress(covariance, bent_trajectories(), family, g=family == "regressed")
    skip = SkipPreconditioning(EulerPreconditioning(PATHS["linear"]), covariance, PATHS["linear"], found)
    assert from_json(SkipPreconditioning, to_json(skip)) == skip
    x = noise(2, *SHAPE)
    t, s = torch.tensor([1.0, 0.999], dtype=F64), torch.tensor([0.0, 1e-4], dtype=F64)
    for start, end in ((t, s), (t, t), (s, s)):
        assert bool(skip.linear(x, start, end).isfinite().all())


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="over euler"):
        SkipPreconditioningConfig(LinearPreconditioningConfig(), family="regressed", regress_g=True)
    with pytest.raises(ConfigError, match="over euler"):
        SkipPreconditioningConfig(regress_g=True)
    for wrong, reason in (
        ({"family": "regressed", "basis": "cosine"}, "knows no directions"),
        ({"family": "regressed", "components": 8}, "knows no directions"),
        ({"basis": "cosine", "components": 8}, "leave --components 8 out"),
        ({"levels": 9}, "needs no trajectories"),
    ):
        with pytest.raises(ConfigError, match=reason):
            SkipPreconditioningConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="none was measured"):
        SkipPreconditioningConfig(family="regressed").let_through(
            EulerPreconditioning(), EDM(), Measured(isotropic(), None)
        )
    with pytest.raises(ConfigError, match="do not fit"):
        replace(any_regression(isotropic()), groups=torch.tensor([9.0], dtype=F64))
    with pytest.raises(ConfigError, match="even steps"):
        replace(any_regression(isotropic()), lam=LAM.square())
    broken = TrajectoryMoments(LAM, isotropic())
    broken.update(*(each * torch.nan for each in bent_trajectories()))
    with pytest.raises(ConfigError, match="not finite"):
        broken.regression(RegressionSettings("regressed", False, 60, LEVELS))
