"""States of optimizers: what is stored comes back, and what does not fit is refused."""

import pytest
import torch
from torch import nn

from fewstep.recipes.config import OptimizerConfig
from fewstep.training.optimizers import Optimizers
from fewstep.utils.errors import CheckpointError


def stepped(parts: int) -> Optimizers:
    """Of as many parameters, only the first of which a gradient reaches, after a step."""
    module = nn.ParameterList(torch.ones(3) for _ in range(parts))
    own = Optimizers(module, OptimizerConfig())
    module[0].square().sum().backward()
    own.step(1, 0.5)
    return own


def test_a_parameter_without_a_gradient_comes_back_with_a_state_of_zeros() -> None:
    stored, fresh = stepped(2).tensors(), stepped(2)
    assert not any(value.any() for name, value in stored.items() if name.startswith("0.1."))
    fresh.load(stored, "file")
    for name, value in fresh.tensors().items():
        assert torch.equal(value, stored[name])


def test_a_state_of_other_parameters_is_refused() -> None:
    stored = stepped(1).tensors()
    first, second = (stored | {name: torch.ones(4)} for name in sorted(stored)[:2])
    for wrong in (first, second, {name.replace("0.0.", "0.7."): value for name, value in stored.items()}):
        with pytest.raises(CheckpointError, match="another architecture or optimizer"):
            stepped(1).load(wrong, "file")
