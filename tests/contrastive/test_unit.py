"""Rows of unit length: torch's values and derivatives, in fewer passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from counterpoise.contrastive._unit import unit


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize(("shape", "dim"), [((5, 3), 1), ((2, 4, 3), -1), ((3, 6), 0), ((0, 3), 1), ((4, 1), 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_what_torch_normalizes_to(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    x = draw(*shape, dtype=dtype)
    upstream = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    found, expected = unit(x, dim), normalize(x, dim=dim)
    assert torch.equal(found, expected)
    one, other = (torch.autograd.grad(z, x, upstream)[0] for z in (found, expected))
    torch.testing.assert_close(one, other)


def test_rows_too_short_to_have_a_direction_are_scaled() -> None:
    x = torch.tensor([[0.0, 0.0], [3e-13, -4e-13], [1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([[1.0, 2.0]] * 3, dtype=torch.float64)
    one, other = (torch.autograd.grad(f(x, dim=1), x, upstream)[0] for f in (unit, normalize))
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(one[:2], upstream[:2] * 1e12)


def test_derivatives_of_both_orders() -> None:
    x = draw(4, 3)
    assert torch.autograd.gradcheck(lambda x: unit(x, 1), x)
    assert torch.autograd.gradgradcheck(lambda x: unit(x, 1), x)


def test_the_gradient_is_orthogonal_to_the_row() -> None:
    x = draw(6, 5)
    (grad,) = torch.autograd.grad(unit(x, 1), x, torch.ones_like(x))
    torch.testing.assert_close((grad * x).sum(1), torch.zeros(6, dtype=x.dtype))


def test_transforms_and_forward_mode_find_a_derivative() -> None:
    x, direction = draw(4, 3).detach(), draw(4, 3).detach() + 1
    f = lambda x: unit(x, 1)  # noqa: E731
    g = lambda x: normalize(x, dim=1)  # noqa: E731
    torch.testing.assert_close(torch.func.jvp(f, (x,), (direction,)), torch.func.jvp(g, (x,), (direction,)))
    torch.testing.assert_close(torch.func.jacrev(f)(x), torch.func.jacrev(g)(x))
    torch.testing.assert_close(torch.func.vmap(f)(x[None]), g(x)[None])
    batched = torch.eye(12, dtype=x.dtype).view(12, 4, 3)
    leaf = x.requires_grad_()
    (rows,) = torch.autograd.grad(f(leaf), leaf, batched, is_grads_batched=True)
    torch.testing.assert_close(rows, torch.stack([torch.autograd.grad(f(leaf), leaf, u)[0] for u in batched]))
