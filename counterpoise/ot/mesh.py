r"""MESH: a cost is changed so that its Sinkhorn plan becomes sharper (minimise entropy of Sinkhorn).

.. math:: C_{t+1} = C_t - \eta\, \frac{g_t}{\|g_t\|_F}, \qquad g_t = \nabla_C\, H(T(C_t)), \qquad
          H(T) = \frac{1}{N K} \sum_{ij} -T_{ij} \log T_{ij}

from C_0, the cost plus a little noise, with T a few Sinkhorn iterations in the log domain at temperature 1:

.. math:: u_i \leftarrow \log a_i - \log \sum_j e^{v_j - C_{ij} / \tau}, \qquad
          v_j \leftarrow \log b_j - \log \sum_i e^{u_i - C_{ij} / \tau}, \qquad T_{ij} = e^{u_i + v_j - C_{ij} / \tau}

The last plan is taken at temperature tau. Columns are exact, rows nearly. As an assignment layer it breaks ties, with
the speed of entropic transport: equal rows or columns are told apart by the noise alone, which therefore comes from
outside or from a generator. The direction g_t is a constant of the outer gradient, so that dC_T / dC_0 = 1; potentials
carried from one step to the next keep a graph through all of them unless they are detached.

Source: Zhang et al., Unlocking Slot Attention by Changing Optimal Transport Costs, 2023, algorithm 1, and its released
code (which normalises g + 1e-20, to no effect but where g = 0).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from counterpoise._core import at_least_float32, check_number, without_autocast
from counterpoise.ot._inputs import as_marginal, with_equal_totals
from counterpoise.ot._sides import Ranks

TINY = 1e-30  # the least mass of a marginal, as released


class MESHResult(NamedTuple):
    """What :func:`mesh` returns.

    Attributes:
        plan: (..., N, K), columns exact.
        cost: (..., N, K), the last one.
        u: (..., N), log scalings of the rows.
        v: (..., K), of the columns.
    """

    plan: Tensor
    cost: Tensor
    u: Tensor
    v: Tensor


def mesh(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    step_size: float | Tensor = 8.0,
    steps: int = 4,
    iterations: int = 5,
    temperature: float = 1.0,
    reuse_potentials: bool = True,
    detach_potentials: bool = False,
    noise: Tensor | None = None,
    noise_scale: float = 1e-3,
    generator: torch.Generator | None = None,
) -> MESHResult:
    """A sharp plan, differentiable; the equations are at the top of this file.

    Args:
        cost: (..., N, K); float64 stays, all else is computed in float32.
        a: (..., N) masses of the rows; None = uniform with total 1. Slot attention takes totals of the number of slots.
        b: (..., K) of the columns, with the total of ``a``.
        step_size: eta, may be a learned 0-d tensor.
        steps: >= 0 changes of the cost; 0 = Sinkhorn.
        iterations: >= 1 of Sinkhorn for each plan.
        temperature: tau > 0 of the last plan.
        reuse_potentials: every Sinkhorn starts from the last one's v.
        detach_potentials: without a graph from one step to the next: the same plan for less memory.
        noise: (..., N, K) standard normal; None = drawn from ``generator``.
        noise_scale: what it is multiplied by; 0 = ties stay.
        generator: for the noise.

    Returns:
        MESHResult, with gradients.

    Raises:
        ValueError, TypeError: shapes or settings that do not fit, negative masses, totals that differ.
    """
    check_number("steps", steps, 0)
    check_number("iterations", iterations, 1)
    check_number("temperature", temperature, 0, open_low=True)
    check_number("noise_scale", noise_scale, 0)
    if not isinstance(cost, Tensor) or cost.ndim < 2:
        kind = tuple(cost.shape) if isinstance(cost, Tensor) else type(cost).__name__
        raise ValueError(f"cost is {kind}, expected a tensor of shape (..., N, K)")
    if noise is not None and noise.shape != cost.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, expected {tuple(cost.shape)}")
    outer = torch.is_grad_enabled()
    with without_autocast(cost), torch.inference_mode(False), torch.set_grad_enabled(outer):
        c = at_least_float32(cost.clone() if cost.is_inference() else cost)
        alone = Ranks(sync=False)
        a, b = as_marginal("a", a, c, 0, alone), as_marginal("b", b, c, 1, alone)
        log_a, log_b = (x.clamp_min(TINY).log() for x in (a, with_equal_totals(a, b, alone)))
        if noise_scale:
            noise = (
                torch.randn(c.shape, dtype=c.dtype, device=c.device, generator=generator) if noise is None else noise
            )
            c = c + noise_scale * noise.to(c.dtype)
        v = torch.zeros_like(log_b)
        for _ in range(steps):
            g, last = entropy_gradient(c, log_a, log_b, v, iterations)
            if reuse_potentials:
                v = last.detach() if detach_potentials else last
            c = c - step_size * g
        plan, u, v = sinkhorn_plan(c / temperature, log_a, log_b, v, iterations)
    return MESHResult(plan, c, u, v)


def sinkhorn_plan(
    cost: Tensor, log_a: Tensor, log_b: Tensor, v: Tensor, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Plan, u and v after some iterations at temperature 1, from v."""
    for _ in range(iterations):
        u = log_a - (v[..., None, :] - cost).logsumexp(-1)
        v = log_b - (u[..., None] - cost).logsumexp(-2)
    return (u[..., None] + v[..., None, :] - cost).exp(), u, v


def entropy_gradient(cost: Tensor, log_a: Tensor, log_b: Tensor, v: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The direction of steepest ascent of the plan's entropy, of norm 1 and without a graph, and v with one."""
    outer = torch.is_grad_enabled()
    with torch.enable_grad():
        c = cost if cost.requires_grad else cost.detach().requires_grad_()
        plan, _, last = sinkhorn_plan(c, log_a, log_b, v, iterations)
        entropy = torch.special.entr(plan.clamp(1e-20, 1)).mean((-2, -1)).sum()
        (g,) = torch.autograd.grad(entropy, c, retain_graph=outer)
    g = g.detach() + 1e-20
    norm = torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True).clamp_min(1e-12)
    return g / norm, last if outer else last.detach()
