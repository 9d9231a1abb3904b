"""Expected updates on Gaussian data: zeros and eigenvalues at three flow maps, and how much anchor is enough."""

import torch

from benchmarks.harness import Row
from tests.support import gaussian_updates as G

ZERO = 1e-9
"""Eigenvalues are null up to here: those that are not are 1e5 times larger."""
WEIGHTS: list[float] = torch.logspace(1, -3, 81, dtype=G.F64).tolist()


def fixed_points() -> list[Row]:
    """Updates and eigenvalues of every objective at three flow maps, without an anchor and with one of weight 1."""
    rows = []
    for path in ("linear", "trig"):
        case = G.case(path=path)
        for flow in (G.exact(case), G.contraction(-1.0, 0.0), G.contraction(-1.0, 9.0)):
            family = G.Tangent(case, flow, velocity=(1, 2), departures=(2, 3))
            origin = torch.zeros(family.size, dtype=G.F64)
            anchor, anchored = G.update(family, G.anchor_error, case, origin), G.jacobian(family, G.anchor_error, case)
            for name, error in G.ERRORS.items():
                alone, moved = G.jacobian(family, error, case), G.update(family, error, case, origin)
                values = G.spectrum(alone)
                held = float(G.spectrum(alone + anchored)[-1])
                rows.append(
                    {
                        "kind": "fixed point", "path": path, "map": flow.name, "objective": name,
                        "update": float(moved.norm()), "null": int((values.abs() < ZERO).sum()),
                        "largest": float(values[values.abs() >= ZERO].max()), "largest_anchored": held,
                        "update_anchored": float((moved + anchor).norm()),
                    }
                )  # fmt: skip
    return rows


def thresholds() -> list[Row]:
    """How much anchor the data's flow map needs to be stable in families whose parameters all times share."""
    rows = []
    for sd in (0.5, 1.0, 2.0):
        case = G.case(sd, 0.0)
        quadrature, apart = G.points(case), G.weight_apart(case)
        for degree in (1, 2, 3):
            family = G.Shared(case, G.exact(case), degree)
            metric = G.gram(G.features(family, quadrature), quadrature.weight)
            anchor = G.jacobian(family, G.anchor_error, case)
            for name, error in G.ERRORS.items():
                alone, label = G.jacobian(family, error, case), {"sd": sd, "degree": degree, "objective": name}
                curve = [float(G.spectrum(alone + weight * anchor, metric)[-1]) for weight in WEIGHTS]
                enough = G.critical_weight(alone, anchor, metric), G.sufficient_weight(case), apart
                weights = dict(zip(("critical", "sufficient", "apart"), enough, strict=True))
                rows.append({"kind": "threshold", **label, **weights, "curve": curve})
    return rows


def slopes() -> list[Row]:
    """Where N = a x settles on N(0, sd^2) by iSD with an anchor of some weight."""
    rows = []
    for sd in (0.5, 1.0):
        one = G.OneSlope.of(G.case(sd, 0.0))
        settled, apart = {f"weight {weight:g}": one.settled(weight) for weight in (1.0, 0.1, 0.01)}, one.settled_apart()
        ends = {"anchor alone": one.pull / one.size, **settled, "apart": apart}
        rows.append({"kind": "slope", "sd": sd, **ends, "apart's weight": one.weight_apart(apart)})
    return rows


def matrices() -> str:
    """iSD without an anchor and with one of weight 1, in the smallest family; order theta, c, mu, d."""
    case = G.case()
    family = G.Tangent(case, G.exact(case))
    alone, anchor = (G.jacobian(family, error, case) for error in (G.ERRORS["iSD"], G.anchor_error))
    named = {"no anchor": alone, "anchor of weight 1": alone + anchor}
    shown = {
        title: (matrix.numpy().round(5) + 0.0, G.spectrum(matrix).numpy().round(5)) for title, matrix in named.items()
    }
    blocks = (f"{title}\n{matrix}\neigenvalues {values + 0.0}" for title, (matrix, values) in shown.items())
    return "\n".join(["```", *blocks, "```"])
