"""All objectives in one table: what each compares, which velocity it trusts, where its gradient flows, its cost."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.objectives.base import Objective
from fewstep.objectives.consistency import CT, ECT
from fewstep.objectives.ctm import CTM
from fewstep.objectives.distillation import CD
from fewstep.objectives.flow_matching import DiagonalMatching
from fewstep.objectives.isd import ISD
from fewstep.objectives.mean_flow import MeanFlow
from fewstep.objectives.regression import Regression
from fewstep.objectives.scm import SCD, SCT
from fewstep.objectives.self_distillation import ESD, LSD, PSD
from fewstep.objectives.shortcut import Shortcut


@dataclass(frozen=True)
class Entry:
    """One objective; formulas in the notation of math.md, X = X(x_t, t, s) and N = N(x_t, t, s).

    Evaluations are those of one sample with s < t and an exact derivative. forward: with a graph; frozen: without one,
    by the model or its slow average; tangents: of those, how many carry a tangent along; backward: evaluations and
    tangents that the gradient passes back through; teacher: the teacher's, for CD and CTM by Heun a cell of the grid.
    A finite difference has no tangents and two evaluations more (under bf16 three, its middle too, in float32), frozen
    or, where the tangent is passed back through, forward. Guidance adds a frozen evaluation, as in iSD-T's row, where a
    sample meets the data: in LSD, PSD and shortcut those with s = t; in sCD it is the teacher's.
    """

    name: str
    objective: type[Objective]
    formula: str
    velocity: str
    gradient: str
    forward: int
    frozen: int
    tangents: int
    backward: int
    teacher: int
    paper: str

    @property
    def needs_teacher(self) -> bool:
        """Whether it distils a teacher."""
        return self.teacher > 0


_ANCHOR = "|v(x_t, t) - v*|^2"
_CONDITIONAL = "conditional, alpha' x0 + sigma' eps"

TABLE = (
    Entry(
        name="flow matching, denoising",
        objective=DiagonalMatching,
        formula=f"{_ANCHOR}, or |D(x_t, t) - x0|^2 weighted",
        velocity=_CONDITIONAL,
        gradient="v",
        forward=1,
        frozen=0,
        tangents=0,
        backward=1,
        teacher=0,
        paper="2210.02747, 2206.00364",
    ),
    Entry(
        name="regression",
        objective=Regression,
        formula="|X(0, t_max, t_min) - x0|^2",
        velocity="none",
        gradient="the jump",
        forward=1,
        frozen=0,
        tangents=0,
        backward=1,
        teacher=0,
        paper="none: least squares",
    ),
    Entry(
        name="CD",
        objective=CD,
        formula="d(X(x_t, t, t_min), sg X_ema(x_u, u, t_min)), x_u the teacher's",
        velocity="the teacher's, by a solver",
        gradient="the first jump",
        forward=1,
        frozen=1,
        tangents=0,
        backward=1,
        teacher=2,
        paper="2303.01469",
    ),
    Entry(
        name="CTM",
        objective=CTM,
        formula="d(X_ema(X, s, t_min), sg X_ema(X_ema(x_u, u, s), s, t_min)) + denoising, x_u the teacher's",
        velocity="the teacher's, by a solver",
        gradient="the first jump, through the average's second; the denoiser",
        forward=3,
        frozen=2,
        tangents=0,
        backward=3,
        teacher=2,
        paper="2310.02279",
    ),
    Entry(
        name="CT",
        objective=CT,
        formula="d(X(x_t, t, t_min), sg X(x_u, u, t_min)) / (t - u), t and u neighbours on a grid, one noise",
        velocity=_CONDITIONAL,
        gradient="the jump from t",
        forward=1,
        frozen=1,
        tangents=0,
        backward=1,
        teacher=0,
        paper="2303.01469, 2310.14189",
    ),
    Entry(
        name="ECT",
        objective=ECT,
        formula="d(X(x_t, t, t_min), sg X(x_u, u, t_min)) / (t - u), u = t (1 - n(t)/q^a), one noise",
        velocity=_CONDITIONAL,
        gradient="the jump from t",
        forward=1,
        frozen=1,
        tangents=0,
        backward=1,
        teacher=0,
        paper="2406.14548",
    ),
    Entry(
        name="sCT",
        objective=SCT,
        formula="|N - sg(N + h)|^2, h = c R / (rms(c R) + 0.1), s = t_min",
        velocity=_CONDITIONAL,
        gradient="N",
        forward=1,
        frozen=0,
        tangents=1,
        backward=1,
        teacher=0,
        paper="2410.11081",
    ),
    Entry(
        name="sCD",
        objective=SCD,
        formula="|N - sg(N + h)|^2, h = c R / (rms(c R) + 0.1), s = t_min",
        velocity="the teacher's",
        gradient="N",
        forward=1,
        frozen=0,
        tangents=1,
        backward=1,
        teacher=1,
        paper="2410.11081",
    ),
    Entry(
        name="MeanFlow",
        objective=MeanFlow,
        formula="w |N - sg(N + R)|^2",
        velocity=_CONDITIONAL,
        gradient="N",
        forward=1,
        frozen=0,
        tangents=1,
        backward=1,
        teacher=0,
        paper="2505.13447",
    ),
    Entry(
        name="iSD",
        objective=ISD,
        formula=f"w (|N - sg(N + R)|^2 + {_ANCHOR})",
        velocity="the model's own, detached",
        gradient="N; v in the anchor",
        forward=2,
        frozen=0,
        tangents=1,
        backward=2,
        teacher=0,
        paper="2601.22679",
    ),
    Entry(
        name="iSD-T",
        objective=ISD,
        formula=f"w (|N - sg(N + R)|^2 + {_ANCHOR}), v* = v_null + omega (alpha' x0 + sigma' eps - v_null)",
        velocity="the model's own, detached",
        gradient="N; v in the anchor",
        forward=2,
        frozen=1,
        tangents=1,
        backward=2,
        teacher=0,
        paper="2601.22679",
    ),
    Entry(
        name="ESD",
        objective=ESD,
        formula=f"|R|^2 + {_ANCHOR}",
        velocity="the model's own",
        gradient="N, v and dN/dt",
        forward=2,
        frozen=0,
        tangents=1,
        backward=3,
        teacher=0,
        paper="2505.18825",
    ),
    Entry(
        name="LSD",
        objective=LSD,
        formula=f"|d_s X - sg v(X, s)|^2; {_ANCHOR} where s = t",
        velocity="the model's own at the jump's end, detached",
        gradient="N and dN/ds",
        forward=1,
        frozen=1,
        tangents=1,
        backward=2,
        teacher=0,
        paper="2505.18825",
    ),
    Entry(
        name="PSD",
        objective=PSD,
        formula=f"|X - sg X(X(x_t, t, u), u, s)|^2 / (t - s)^2; {_ANCHOR} where s = t",
        velocity="none",
        gradient="the long jump",
        forward=1,
        frozen=2,
        tangents=0,
        backward=1,
        teacher=0,
        paper="2505.18825",
    ),
    Entry(
        name="shortcut",
        objective=Shortcut,
        formula=f"|X - sg X_ema(X_ema(x_t, t, u), u, s)|^2 / (t - s)^2, t - u = u - s = 1/2^k; {_ANCHOR} on the rest",
        velocity="none",
        gradient="the long jump",
        forward=1,
        frozen=2,
        tangents=0,
        backward=1,
        teacher=0,
        paper="2410.12557",
    ),
)
"""Every objective of the library, from teachers to none."""
