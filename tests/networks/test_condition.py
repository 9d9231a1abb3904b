"""What conditions become where they are dropped, indexed and guided."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.guidance import ClassifierFreeGuidance, FixedGuidance, dropped
from fewstep.flow.paths import Linear
from fewstep.flow.preconditioning.jumps import LinearPreconditioning
from fewstep.networks.base import Network
from fewstep.networks.condition import NULL_LABEL, Condition, Prompts
from fewstep.objectives import MeanFlow
from fewstep.objectives.base import Batch
from tests.support.batches import draws
from tests.support.cases import noise

NULL = Prompts(noise(1, 4, 3, seed=8), torch.tensor([[True, False, False, False]]), noise(1, 2, seed=9))


def prompts(count: int) -> Prompts:
    mask = torch.arange(4) < torch.arange(1, count + 1)[:, None]
    return Prompts(noise(count, 4, 3, seed=1), mask, noise(count, 2, seed=2), NULL)


class Prompted(Network):
    """F = (mean of the counted tokens, pooled embedding) and nothing of x: what a prompt says."""

    def __init__(self) -> None:
        super().__init__((5,), 0, guided=False)

    @property
    def prompt_widths(self) -> tuple[int, int]:
        return 3, 2

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        assert cond is not None
        assert cond.text is not None
        assert cond.text_mask is not None
        assert cond.pooled is not None
        counted = cond.text_mask.to(x.dtype)[:, :, None]
        return torch.cat([(cond.text * counted).sum(1) / counted.sum(1), cond.pooled], 1)


MAP = FlowMap(Linear(), LinearPreconditioning(), Prompted())


def test_dropped_rows_are_the_empty_prompt_and_the_others_stay() -> None:
    cond = Condition(torch.tensor([0, 1, 2]), prompts=prompts(3))
    found = cond.drop(torch.tensor([False, True, False]))
    assert found.labels is not None
    assert found.labels.tolist() == [0, NULL_LABEL, 2]
    assert found.kept is not None
    assert found.kept.tolist() == [True, False, True]
    for name in ("text", "text_mask", "pooled"):
        before, after = getattr(cond, name), getattr(found, name)
        own = getattr(NULL, name.removeprefix("text_"))
        assert torch.equal(after[[0, 2]], before[[0, 2]])
        assert torch.equal(after[1], own[0])
    both = cond.unconditional()
    assert both.kept is not None
    assert not both.kept.any()
    assert torch.equal(both[1:].text, NULL.text.expand(2, 4, 3))  # type: ignore[arg-type]


def test_without_an_empty_prompt_zeros_stand_in() -> None:
    found = Condition(prompts=Prompts(noise(2, 4, 3), pooled=noise(2, 2))).unconditional()
    assert found.text is not None
    assert found.pooled is not None
    assert not found.text.any()
    assert not found.pooled.any()


def test_dropout_hides_label_and_prompt_of_the_same_samples() -> None:
    batch = Batch(noise(400, 5), torch.arange(400) % 3, draws(400), prompts=prompts(400))
    cond = MeanFlow(label_dropout=0.3).condition(MAP, batch, torch.ones(400))
    gone = dropped(0.3, batch.draws)
    assert cond.labels is not None
    assert cond.prompts is not None
    assert cond.prompts.kept is not None
    assert torch.equal(cond.labels == NULL_LABEL, gone)
    assert torch.equal(~cond.prompts.kept, gone)
    assert 0.2 < float(gone.double().mean()) < 0.4


@pytest.mark.parametrize("omega", [1.0, 2.5])
def test_velocities_are_guided_from_the_empty_prompt(omega: float) -> None:
    """v_null + omega (v - v_null); samples whose prompt was dropped, and omega = 1, change nothing."""
    cond = Condition(prompts=prompts(3))
    x, t = noise(3, 5, seed=5), torch.full((3,), 0.5, dtype=torch.float64)
    v, null = MAP.velocity(x, t, cond), MAP.velocity(x, t, cond.unconditional())
    expected = null + omega * (v - null)
    guided = ClassifierFreeGuidance(MAP, omega).velocity(x, t, cond)
    torch.testing.assert_close(guided, expected, rtol=1e-12, atol=1e-12)
    objective = replace(MeanFlow(label_dropout=0.0), guidance=FixedGuidance(omega))
    batch = Batch(x, None, draws(3), prompts=cond.prompts)
    torch.testing.assert_close(objective.guide(MAP, batch, x, t, cond, v), expected, rtol=1e-12, atol=1e-12)
    part = cond.drop(torch.tensor([True, False, False]))
    v = MAP.velocity(x, t, part)
    assert torch.equal(objective.guide(MAP, batch, x, t, part, v)[0], v[0])
    assert math.isclose(float(ClassifierFreeGuidance(MAP, omega).velocity(x, t, part)[0, 0]), float(v[0, 0]))
