"""Expected updates on Gaussian data: zeros and eigenvalues at three flow maps, and how much anchor is enough."""

import torch

from benchmarks.degeneracy.gaussian import (
    ERRORS,
    F64,
    Case,
    OneSlope,
    Shared,
    Tangent,
    anchor_error,
    contraction,
    critical_weight,
    exact,
    features,
    gram,
    jacobian,
    points,
    spectrum,
    sufficient_weight,
    update,
    weight_apart,
)  # fmt: skip
from benchmarks.harness import Row
from fewstep.flow.closed_form import GaussianData
from fewstep.flow.paths import Linear, Trig
from fewstep.flow.preconditioning.jumps import LinearPreconditioning, TrigPreconditioning

ZERO = 1e-9
"""Eigenvalues are null up to here: those that are not are 1e5 times larger."""
DEGREES = (1, 2, 3)
WEIGHTS: list[float] = torch.logspace(1, -3, 81, dtype=F64).tolist()


def gaussian(sd: float = 0.5, mean: float = 1.0, trig: bool = False) -> Case:
    """Data N(mean, sd^2) on the linear or the trigonometric path."""
    data = GaussianData(torch.tensor(mean, dtype=F64), sd)
    return Case(Trig(), TrigPreconditioning(), data) if trig else Case(Linear(), LinearPreconditioning(), data)


def fixed_points() -> list[Row]:
    """Updates and eigenvalues of every objective at three flow maps, without an anchor and with one of weight 1."""
    rows = []
    for trig in (False, True):
        case = gaussian(trig=trig)
        for flow in (exact(case), contraction(-1.0, 0.0), contraction(-1.0, 9.0)):
            family = Tangent(case, flow, velocity=(1, 2), departures=(2, 3))
            origin = torch.zeros(family.size, dtype=F64)
            anchor, anchored = update(family, anchor_error, case, origin), jacobian(family, anchor_error, case)
            for name, error in ERRORS.items():
                alone, moved = jacobian(family, error, case), update(family, error, case, origin)
                values = spectrum(alone)
                rows.append(
                    {
                        "kind": "fixed point", "path": "trig" if trig else "linear", "map": flow.name,
                        "objective": name, "parameters": family.size, "update": float(moved.norm()),
                        "null": int((values.abs() < ZERO).sum()), "largest": float(values[values.abs() >= ZERO].max()),
                        "update_anchored": float((moved + anchor).norm()),
                        "largest_anchored": float(spectrum(alone + anchored)[-1]),
                    }
                )  # fmt: skip
    return rows


def thresholds() -> list[Row]:
    """How much anchor the data's flow map needs to be stable in families whose parameters all times share."""
    rows = []
    for sd in (0.5, 1.0, 2.0):
        case = gaussian(sd, 0.0)
        quadrature, apart = points(case), weight_apart(case)
        for degree in DEGREES:
            family = Shared(case, exact(case), degree)
            metric = gram(features(family, quadrature), quadrature.weight)
            anchor = jacobian(family, anchor_error, case)
            for name, error in ERRORS.items():
                alone = jacobian(family, error, case)
                rows.append(
                    {
                        "kind": "threshold", "sd": sd, "degree": degree, "objective": name,
                        "critical": critical_weight(alone, anchor, metric), "sufficient": sufficient_weight(case),
                        "apart": apart, "largest_apart": float(spectrum(alone + apart * anchor, metric)[-1]),
                        "curve": [float(spectrum(alone + weight * anchor, metric)[-1]) for weight in WEIGHTS],
                    }
                )  # fmt: skip
    return rows


def slopes() -> list[Row]:
    """Where N = a x settles on N(0, sd^2) by iSD with an anchor of some weight."""
    rows = []
    for sd in (0.5, 1.0):
        one = OneSlope.of(gaussian(sd, 0.0))
        settled = {f"weight {weight:g}": one.settled(weight) for weight in (1.0, 0.1, 0.01)}
        apart = one.settled_apart()
        ends = {"anchor alone": one.pull / one.size, **settled, "apart": apart}
        rows.append({"kind": "slope", "sd": sd, **ends, "apart's weight": one.weight_apart(apart)})
    return rows
