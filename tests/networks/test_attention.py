"""Attention against the one written out: its values, tangents and gradients, in tiles and whole."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.networks import attention as module
from fewstep.networks.attention import attention
from fewstep.utils.forward_ad import jvp
from tests.support.memory import largest_tensor


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)).softmax(-1) @ v


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three queries of seventeen tokens in a tile."""
    monkeypatch.setattr(module, "TILE", 60)


def projected(form: object, w: Tensor, x: Tensor) -> Tensor:
    """Attention whose queries, keys and values all depend on the weight and on x."""
    return form(x @ w, (x @ w.T).sin(), torch.tanh(x @ w))  # type: ignore[operator,no-any-return]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 40), heads=st.integers(1, 3), width=st.integers(1, 6))
def test_values_tangents_and_gradients_are_the_written_out_ones(seed: int, tokens: int, heads: int, width: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    x, dx = torch.randn(2, 2, heads, tokens, width, generator=gen, dtype=torch.float64)
    w = torch.randn(width, width, generator=gen, dtype=torch.float64, requires_grad=True)
    found, wanted = [], []
    for form, into in ((attention, found), (written_out, wanted)):
        plain = projected(form, w, x)
        primal, tangent = jvp(lambda x, form=form: projected(form, w, x), (x,), (dx,))
        gradient = torch.autograd.grad(primal.square().sum() + tangent.pow(3).sum(), w)[0]
        detached, moved = jvp(lambda x, form=form: projected(form, w, x), (x,), (dx,), attached=False)
        of_primal = torch.autograd.grad(detached.square().sum(), w)[0]
        into += [plain, primal, tangent, gradient, detached, moved, of_primal]
    for own, usual in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, usual, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("of", ["q", "k", "v"])
def test_a_tangent_of_one_alone(of: str) -> None:
    inputs = dict(zip("qkv", torch.randn(3, 2, 2, 17, 4, dtype=torch.float64), strict=True))
    direction = torch.randn(2, 2, 17, 4, dtype=torch.float64)
    found, wanted = (
        torch.func.jvp(lambda x, form=form: form(**(inputs | {of: x})), (inputs[of],), (direction,))
        for form in (attention, written_out)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_single_precision_is_as_near_as_it_can_be() -> None:
    q, k, v, dq, dk, dv = torch.randn(6, 2, 2, 64, 16, dtype=torch.float64)
    exact = torch.func.jvp(written_out, (q, k, v), (dq, dk, dv))
    single = torch.func.jvp(attention, (q.float(), k.float(), v.float()), (dq.float(), dk.float(), dv.float()))
    for own, usual in zip(single, exact, strict=True):
        torch.testing.assert_close(own.double(), usual, rtol=0, atol=1e-5)


def test_gradients_of_a_recorded_tangent_under_bfloat16() -> None:
    """Queries and keys in float32 beside values in bfloat16, as in a transformer; the backward pass lies outside."""
    gen = torch.Generator().manual_seed(0)
    x, dx = torch.randn(2, 1, 2, 17, 8, generator=gen)
    w = (torch.randn(8, 8, generator=gen) / 3).requires_grad_()
    gradients = []
    for form, rounded in ((attention, True), (written_out, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            primal, tangent = jvp(
                lambda x, form=form: form((x @ w).float(), (x @ w.T).float().sin(), x @ w), (x,), (dx,)
            )
        gradients.append(torch.autograd.grad(primal.float().sum() + tangent.float().square().sum(), w)[0])
    torch.testing.assert_close(*gradients, rtol=0.05, atol=0.05 * float(gradients[1].abs().max()))


def test_more_keys_than_queries() -> None:
    (q, dq), (k, v, dk, dv) = torch.randn(2, 1, 2, 9, 4).double(), torch.randn(4, 1, 2, 23, 4).double()
    found, wanted = (torch.func.jvp(form, (q, k, v), (dq, dk, dv)) for form in (attention, written_out))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_under_vmap_it_is_written_out() -> None:
    q, k, v = torch.randn(3, 5, 2, 2, 17, 4, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(attention)(q, k, v), written_out(q, k, v))


@pytest.mark.parametrize("attached", [True, False])
def test_no_tensor_is_as_large_as_all_scores(attached: bool) -> None:
    tokens = 128
    w = torch.randn(4, 4, requires_grad=True)
    x, dx = torch.randn(2, 1, 1, tokens, 4)
    with largest_tensor() as seen:
        primal, tangent = jvp(lambda x: projected(attention, w, x), (x,), (dx,), attached)
        (primal.sum() + tangent.square().sum()).backward()
    assert seen.elements < tokens * tokens / 4
