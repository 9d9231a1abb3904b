"""Objectives at the Gaussian case: with the exact skip and the perfect network nothing is left to learn."""

import pytest
import torch

from fewstep.objectives import Batch, Companions
from fewstep.utils.random import Draws
from tests.identities.test_objective_table import EXAMPLES
from tests.identities.test_skip import COVARIANCES, SHAPE, gaussian_network, skipped
from tests.support.cases import PAIRS, covering, noise

AGAINST_FLOW = ("sCD", "EMD", "LMD", "iSD", "iSD-T", "ESD", "LSD", "PSD", "shortcut")
"""Held to a derivative, or to jumps of the map itself."""
AGAINST_STEPS = ("CD", "CTM")
"""Held to a step of the teacher's solver, whose own error is left."""


def consistency(name: str, path_name: str, preconditioning: str, kind: str, wrong: bool = False) -> float:
    """The largest loss of a sample besides that of the diagonal; wrong: the network gives a tenth too much."""
    covariance = COVARIANCES[kind]
    flow_map = skipped(path_name, preconditioning, covariance, gaussian_network(covariance, path_name, preconditioning))
    student = flow_map
    if wrong:
        student = skipped(
            path_name, preconditioning, covariance, gaussian_network(covariance, path_name, preconditioning)
        )
        student.network.register_forward_hook(lambda network, given, output: 1.1 * output)
    x0 = covariance.mean + covariance.scaled(noise(24, *SHAPE, seed=3), torch.sqrt)
    batch = Batch(x0, torch.full((24,), -1), Draws(0, 3, torch.arange(24)))
    losses = EXAMPLES[name](student, batch, Companions(teacher=flow_map, ema_target=student))
    return float(max(losses.logs[term].max() for term in ("consistency", "distill") if term in losses.logs))


MEETINGS = covering(
    (name, *each, kind) for name in AGAINST_FLOW + AGAINST_STEPS for each in PAIRS for kind in COVARIANCES
)


@pytest.mark.parametrize(("name", "path_name", "preconditioning", "kind"), MEETINGS)
def test_nothing_is_left_to_learn(name: str, path_name: str, preconditioning: str, kind: str) -> None:
    left = consistency(name, path_name, preconditioning, kind)
    assert left < (1e-3 if name in AGAINST_STEPS else 1e-16)
    assert consistency(name, path_name, preconditioning, kind, wrong=True) > max(1e-6, 2 * left)
