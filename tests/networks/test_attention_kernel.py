"""Which tangents of attention jvp-flash-attention's kernel takes, and what it is given; on a CPU by a stand-in."""

import math
import sys
import types
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fewstep.networks import attention as tiles
from fewstep.networks import attention_kernel as module
from fewstep.networks.attention import attention
from fewstep.networks.attention_kernel import tangent_kernel
from fewstep.training.flops import StepCost
from fewstep.utils.forward_ad import jvp

SHAPE = (2, 3, 64, 32)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)).softmax(-1) @ v


class JVPAttn:
    """As the package's: tensors without a level of functorch, (o, (do, ...)). given: what it has been called with."""

    given: list[tuple[Tensor, ...]]

    @staticmethod
    def forward(*inputs: Tensor) -> tuple[Tensor, tuple[Tensor, None]]:
        assert not any(torch._C._functorch.is_functorch_wrapped_tensor(x) or x.requires_grad for x in inputs)
        JVPAttn.given.append(inputs)
        wide = [x.double() for x in inputs]
        o, do = tiles._rows(wide[0], wide[3], wide[1], wide[2], wide[4], wide[5])
        return o.to(inputs[0].dtype), (do.to(inputs[0].dtype), None)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[JVPAttn]]:
    package = types.ModuleType("jvp_flash_attention.jvp_attention")
    package.JVPAttn = JVPAttn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jvp_flash_attention", types.ModuleType("jvp_flash_attention"))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setattr(module, "DEVICES", ("cpu",))
    monkeypatch.setattr(tiles, "TILE", 16 * 64)
    JVPAttn.given = []
    module._kernel.cache_clear()
    yield JVPAttn
    module._kernel.cache_clear()


def inputs(
    shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.bfloat16
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Queries, keys and values as a projection leaves them, heads behind tokens, and their directions."""
    batch, heads, tokens, width = shape
    drawn = torch.randn(6, batch, tokens, heads, width, generator=torch.Generator().manual_seed(0))
    each = [x.to(dtype).transpose(1, 2).requires_grad_(place < 3) for place, x in enumerate(drawn)]
    return tuple(each[:3]), tuple(each[3:])


def test_it_is_given_contiguous_tensors_and_its_tangent_is_taken(kernel: type[JVPAttn]) -> None:
    at, along = inputs()
    out, moved = jvp(attention, at, along, attached=False)
    (given,) = kernel.given
    for own, wanted in zip(given, (*at, *along), strict=True):
        assert own.is_contiguous()
        assert torch.equal(own, wanted)
    wide = [tuple(x.detach().double() for x in each) for each in (at, along)]
    exact = torch.func.jvp(written_out, *wide)
    for own, wanted in zip((out, moved), exact, strict=True):
        assert float((own.detach() - wanted).norm()) < 0.01 * float(wanted.norm())
    found = torch.autograd.grad(out.sum(), at)
    wanted = torch.autograd.grad(written_out(*at).sum(), at)
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=0.05, atol=0.02)


def test_a_direction_of_one_alone_comes_with_zeros(kernel: type[JVPAttn]) -> None:
    (q, k, v), (dq, *_) = inputs()
    jvp(lambda q: attention(q, k, v), (q,), (dq,), attached=False)
    assert [bool(x.any()) for x in kernel.given[0][3:]] == [True, False, False]


def test_under_autocast_it_is_given_what_a_product_is(kernel: type[JVPAttn]) -> None:
    at, along = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        moved = jvp(attention, at, along, attached=False)[1]
    assert {x.dtype for x in (*kernel.given[0], moved)} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (SHAPE, torch.float32),
        ((2, 3, 48, 32), torch.bfloat16),
        ((2, 3, 64, 16), torch.bfloat16),
        ((2, 3, 64, 72), torch.bfloat16),
        ((2, 3, 32, 32), torch.bfloat16),
    ],
)
def test_others_are_taken_in_tiles_or_whole(kernel: type[JVPAttn], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    jvp(attention, *inputs(shape, dtype), attached=False)
    assert not kernel.given


def test_no_tangent_that_keeps_its_graph_is_its(kernel: type[JVPAttn]) -> None:
    at, along = inputs()
    jvp(attention, at, along, attached=True)
    attention(*at)
    assert not kernel.given


def test_more_keys_than_queries_are_not_for_it(kernel: type[JVPAttn]) -> None:
    (q, _, _), (dq, _, _) = inputs()
    (_, k, v), (_, dk, dv) = inputs((2, 3, 96, 32))
    jvp(attention, (q, k, v), (dq, dk, dv), attached=False)
    assert not kernel.given


def test_switched_off_or_without_its_package_nothing_changes(
    kernel: type[JVPAttn], monkeypatch: pytest.MonkeyPatch
) -> None:
    at, along = inputs()
    with tangent_kernel(False):
        found = jvp(attention, at, along, attached=False)
    monkeypatch.setitem(sys.modules, "jvp_flash_attention.jvp_attention", None)
    for own, other in zip(found, jvp(attention, at, along, attached=False), strict=True):
        assert torch.equal(own, other)
    assert not kernel.given


def test_its_products_are_counted_as_those_of_tiles(kernel: type[JVPAttn]) -> None:
    at, along = inputs()
    found = []
    for wanted in (False, True):
        cost = StepCost(torch.device("cpu"), 0.0, False)
        with tangent_kernel(wanted), cost.counting():
            jvp(attention, at, along, attached=False)
        cost.counted()
        found.append(cost.step.total)
    assert len(kernel.given) == 1
    assert found[0] == found[1] > 0
