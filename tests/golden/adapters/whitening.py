"""Adapters of the objectives without explicit negatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from counterpoise.contrastive import (
    Whitening,
    barlow_twins_loss,
    byol_loss,
    cw_rgp_loss,
    swav_loss,
    vicreg_loss,
    vicreg_terms,
    whiten,
    wmse_loss,
)
from counterpoise.memory import momentum_schedule
from counterpoise.ot import balanced_assignment
from tests.golden.runner import Case

Outputs = dict[str, Any]


def wmse(case: Case) -> Outputs:
    h, perms = case.input("h"), case.input("perms")
    views = h.unflatten(0, (case.param("d"), -1))
    eps, size = case.param("eps"), case.param("w_size")
    assert len(perms) == case.param("w_iter")
    loss = wmse_loss(views, block_size=size, permutations=perms, eps=eps, normalize=case.param("norm"))
    z_last = torch.empty_like(views)
    z_last[:, perms[-1]] = whiten(views[:, perms[-1]].unflatten(1, (-1, size)), eps=eps).flatten(1, 2)
    return {"loss": loss, "z_last": z_last.flatten(0, 1)}


def wmse_whitening(case: Case) -> Outputs:
    x, cotangent = case.input("x"), case.input("cotangent")
    tracked = case.param("track_running_stats")
    module = Whitening(
        x.shape[1], eps=case.param("eps"), momentum=case.param("momentum", 0.01), track_running_stats=tracked
    )
    running = {name: case.input(name) for name in ("running_mean", "running_covariance")}
    for name, value in running.items():
        if value is not None:
            setattr(module, name, value.detach().clone())
    z = module.train(case.param("training"))(x)
    (grad_x,) = torch.autograd.grad(z, x, cotangent)
    after = {f"{name}_after": getattr(module, name) for name in running}
    return {"z": z, "grad_x": grad_x, **after}


def cw_rgp(case: Case) -> Outputs:
    views = torch.stack([case.input("x1"), case.input("x2")])
    shuffle = case.param("shuffle")
    channels = None if shuffle is None else torch.tensor(shuffle)
    settings = {
        "kind": case.param("kind"),
        "axis": {0: "channel", 1: "batch"}[case.param("axis")],
        "groups": case.param("group"),
        "eps": case.param("eps"),
        "correction": case.param("minus"),
    }
    z1, z2 = whiten(views, permutation=channels, **settings)
    return {"loss": cw_rgp_loss(views, channel_permutations=channels, **settings), "z1": z1, "z2": z2}


def vicreg(case: Case) -> Outputs:
    views = torch.stack([case.input("z1"), case.input("z2")])
    weights = {
        "invariance_weight": case.param("sim"),
        "variance_weight": case.param("std"),
        "covariance_weight": case.param("cov"),
    }
    eps = case.param("eps")
    return {"loss": vicreg_loss(views, eps=eps, **weights), **vicreg_terms(views, eps=eps)._asdict()}


def byol(case: Case) -> Outputs:
    progress = case.input("progress")
    if progress is not None:
        tau = [momentum_schedule(p, start=case.param("tau0")) for p in progress]
        return {"tau": torch.tensor(tau, dtype=torch.float64)}
    predictions = torch.stack([case.input("p1"), case.input("p2")])
    targets = torch.stack([case.input("t1"), case.input("t2")])
    return {"loss": byol_loss(predictions, targets, normalize=case.param("norm"))}


def swav(case: Case) -> Outputs:
    """The scores are given: embeddings whose prototypes are the axes."""
    high, low = case.input("high"), case.input("low")
    scores = [x.requires_grad_() for x in (*high, *low)]
    assignment = {"epsilon": case.param("epsilon"), "iterations": case.param("sinkhorn_iterations")}
    loss = swav_loss(
        torch.stack(scores),
        prototypes=torch.eye(scores[0].shape[1], dtype=scores[0].dtype),
        temperature=case.param("temperature"),
        code_views=len(high),
        normalize=False,
        **assignment,
    )
    grads = torch.autograd.grad(loss, scores)
    codes = torch.stack([balanced_assignment(x, **assignment) for x in high])
    none = torch.zeros(0, dtype=codes.dtype)
    return {
        "loss": loss,
        "codes": codes,
        "grad_high": torch.stack(grads[: len(high)]),
        "grad_low": torch.stack(grads[len(high) :]) if low else none,
    }


def swav_sinkhorn(case: Case) -> Outputs:
    q = balanced_assignment(case.input("scores"), epsilon=case.param("epsilon"), iterations=case.param("n_iters"))
    return {"Q": q, "row_sums": q.sum(1), "col_sums": q.sum(0)}


def cross_correlation(case: Case) -> Outputs:
    loss = barlow_twins_loss(
        case.input("z1"), case.input("z2"), off_diagonal_weight=case.param("lambda"), eps=0.0, correction=1
    )
    return {"loss": loss}


ADAPTERS: dict[str, Callable[[Case], Outputs]] = {
    "byol": byol,
    "cross_correlation": cross_correlation,
    "cw_rgp": cw_rgp,
    "swav": swav,
    "swav_sinkhorn": swav_sinkhorn,
    "vicreg": vicreg,
    "wmse": wmse,
    "wmse_whitening": wmse_whitening,
}
