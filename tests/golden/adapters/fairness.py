"""Adapters of adversarial debiasing and adaptive weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from counterpoise.losses import sigmoid_focal_loss
from counterpoise.samplers import BROAD, AdaWAC, adawac_loss, group_log_ratios, reweighted_loss, road_ratio_objective
from tests.golden.runner import Case

Outputs = dict[str, Any]


def groups_of(case: Case) -> tuple[torch.Tensor, int]:
    group = case.input("sensitive").detach().flatten().long()
    return group, int(group.max()) + 1


def broad(case: Case) -> Outputs:
    group, groups = groups_of(case)
    reweighter = BROAD([1] * groups, temperature=case.param("tau"))
    logits, predictor = case.input("adversary_logits"), case.input("predictor_logits")
    adversary = bce(logits.flatten(), group)
    losses = bce(predictor.flatten(), case.input("labels").detach().flatten())
    fair = reweighted_loss(adversary, reweighter, group=group)
    return {
        "weights": reweighter(adversary.detach(), group=group).reshape(logits.shape),
        "loss": reweighted_loss(losses) - case.param("lambda_fair") * fair,
    }


def bce(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return sigmoid_focal_loss(logits, target, gamma=0, reduction="none")


def road_ratio_loss(case: Case) -> Outputs:
    scores, (group, groups) = case.input("ratio_net_output_before_exp"), groups_of(case)
    log_ratio = group_log_ratios(scores.flatten(), group, groups)
    loss = road_ratio_objective(log_ratio, case.input("adversary_loss").flatten(), temperature=case.param("tau"))
    (grad,) = torch.autograd.grad(loss, scores)
    return {"r": log_ratio.exp().reshape(scores.shape), "loss_ratio_net": loss, "grad_ratio_net_output": grad}


def adawac(case: Case) -> Outputs:
    reweighter = AdaWAC(case.param("num_samples"), step_size=case.param("lr_w"))
    weights_after, batch_loss = [], []
    steps = zip(case.input("index"), case.input("loss_supervised"), case.input("reg_consistency"), strict=True)
    for index, supervised, consistency in steps:
        weights = reweighter(supervised, consistency=consistency, index=index)
        batch_loss.append(adawac_loss(supervised, consistency, weights))
        w = reweighter.logits.sigmoid()
        weights_after.append(torch.stack([w, 1 - w], 1))
    return {"weights_after": torch.stack(weights_after), "batch_loss": torch.stack(batch_loss)}


ADAPTERS: dict[str, Callable[[Case], Outputs]] = {
    "adawac": adawac,
    "broad": broad,
    "road_ratio_loss": road_ratio_loss,
}
