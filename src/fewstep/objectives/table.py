"""All objectives in one table: what each compares, which velocity it trusts, where its gradient flows, its cost."""

from typing import NamedTuple

from fewstep.objectives.base import Objective
from fewstep.objectives.consistency import CT, ECT
from fewstep.objectives.ctm import CTM
from fewstep.objectives.distillation import CD
from fewstep.objectives.flow_map_distillation import EMD, LMD
from fewstep.objectives.flow_matching import DiagonalMatching
from fewstep.objectives.isd import ISD
from fewstep.objectives.mean_flow import MeanFlow
from fewstep.objectives.regression import Regression
from fewstep.objectives.scm import SCD, SCT
from fewstep.objectives.self_distillation import ESD, LSD, PSD
from fewstep.objectives.shortcut import Shortcut


class Passes(NamedTuple):
    """Evaluations of one sample with s < t and an exact derivative.

    forward: with a graph; frozen: without one, by the model or its slow average; tangents: of those, how many carry a
    tangent along; backward: evaluations and tangents that the gradient passes back through; teacher: the teacher's, for
    CD and CTM by Heun a cell of the grid.
    A finite difference has no tangents and two evaluations more (under bf16 three, its middle too, in float32), frozen
    or, where the tangent is passed back through, forward. Guidance adds a frozen evaluation, as in iSD-T's row, where a
    sample meets the data: in LSD, PSD and shortcut those with s = t; in sCD it is the teacher's.
    """

    forward: int
    frozen: int
    tangents: int
    backward: int
    teacher: int


class Entry(NamedTuple):
    """One objective; formulas in the notation of math.md, X = X(x_t, t, s) and N = N(x_t, t, s)."""

    name: str
    objective: type[Objective]
    formula: str
    velocity: str
    gradient: str
    passes: Passes
    paper: str

    @property
    def needs_teacher(self) -> bool:
        """Whether it distils a teacher."""
        return self.passes.teacher > 0


_ANCHOR = "|v(x_t, t) - v*|^2"
_CONDITIONAL = "conditional, alpha' x0 + sigma' eps"

# fmt: off
TABLE = (
    Entry(
        "flow matching, denoising", DiagonalMatching, f"{_ANCHOR}, or |D(x_t, t) - x0|^2 weighted",
        _CONDITIONAL, "v", Passes(1, 0, 0, 1, 0), "2210.02747, 2206.00364",
    ),
    Entry(
        "regression", Regression, "|X(0, t_max, t_min) - x0|^2",
        "none", "the jump", Passes(1, 0, 0, 1, 0), "none: least squares",
    ),
    Entry(
        "CD", CD, "d(X(x_t, t, t_min), sg X_ema(x_u, u, t_min)), x_u the teacher's",
        "the teacher's, by a solver", "the first jump", Passes(1, 1, 0, 1, 2), "2303.01469",
    ),
    Entry(
        "CTM", CTM, "d(X_ema(X, s, t_min), sg X_ema(X_ema(x_u, u, s), s, t_min)) + denoising, x_u the teacher's",
        "the teacher's, by a solver", "the first jump, through the average's second; the denoiser",
        Passes(3, 2, 0, 3, 2), "2310.02279",
    ),
    Entry(
        "CT", CT, "d(X(x_t, t, t_min), sg X(x_u, u, t_min)) / (t - u), t and u neighbours on a grid, one noise",
        _CONDITIONAL, "the jump from t", Passes(1, 1, 0, 1, 0), "2303.01469, 2310.14189",
    ),
    Entry(
        "ECT", ECT, "d(X(x_t, t, t_min), sg X(x_u, u, t_min)) / (t - u), u = t (1 - n(t)/q^a), one noise",
        _CONDITIONAL, "the jump from t", Passes(1, 1, 0, 1, 0), "2406.14548",
    ),
    Entry(
        "sCT", SCT, "|N - sg(N + h)|^2, h = c R / (rms(c R) + 0.1), s = t_min",
        _CONDITIONAL, "N", Passes(1, 0, 1, 1, 0), "2410.11081",
    ),
    Entry(
        "sCD", SCD, "|N - sg(N + h)|^2, h = c R / (rms(c R) + 0.1), s = t_min",
        "the teacher's", "N", Passes(1, 0, 1, 1, 1), "2410.11081",
    ),
    Entry(
        "EMD", EMD, "|N - sg(N + h)|^2, h = R / (rms(R) + 0.1), any s; |v(x_t, t) - v_teacher|^2 where s = t",
        "the teacher's", "N", Passes(1, 0, 1, 1, 1), "2506.14603",
    ),
    Entry(
        "LMD", LMD, "|d_s X - sg v_teacher(X, s)|^2, any s; |v(x_t, t) - v_teacher|^2 where s = t",
        "the teacher's at the jump's end", "N and dN/ds", Passes(1, 0, 1, 2, 1), "2406.07507",
    ),
    Entry(
        "MeanFlow", MeanFlow, "w |N - sg(N + R)|^2",
        _CONDITIONAL, "N", Passes(1, 0, 1, 1, 0), "2505.13447",
    ),
    Entry(
        "iSD", ISD, f"w (|N - sg(N + R)|^2 + {_ANCHOR})",
        "the model's own, detached", "N; v in the anchor", Passes(2, 0, 1, 2, 0), "2601.22679",
    ),
    Entry(
        "iSD-T", ISD, f"w (|N - sg(N + R)|^2 + {_ANCHOR}), v* = v_null + omega (alpha' x0 + sigma' eps - v_null)",
        "the model's own, detached", "N; v in the anchor", Passes(2, 1, 1, 2, 0), "2601.22679",
    ),
    Entry(
        "ESD", ESD, f"|R|^2 + {_ANCHOR}",
        "the model's own", "N, v and dN/dt", Passes(2, 0, 1, 3, 0), "2505.18825",
    ),
    Entry(
        "LSD", LSD, f"|d_s X - sg v(X, s)|^2; {_ANCHOR} where s = t",
        "the model's own at the jump's end, detached", "N and dN/ds", Passes(1, 1, 1, 2, 0), "2505.18825",
    ),
    Entry(
        "PSD", PSD, f"|X - sg X(X(x_t, t, u), u, s)|^2 / (t - s)^2; {_ANCHOR} where s = t",
        "none", "the long jump", Passes(1, 2, 0, 1, 0), "2505.18825",
    ),
    Entry(
        "shortcut", Shortcut,
        f"|X - sg X_ema(X_ema(x_t, t, u), u, s)|^2 / (t - s)^2, t - u = u - s = 1/2^k; {_ANCHOR} on the rest",
        "none", "the long jump", Passes(1, 2, 0, 1, 0), "2410.12557",
    ),
)
# fmt: on
"""Every objective of the library, from teachers to none."""
