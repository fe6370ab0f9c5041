"""Adapters of the losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from counterpoise.losses import (
    balanced_softmax_loss,
    class_balanced_loss,
    effective_number_weights,
    ldam_loss,
    ldam_margins,
    logit_adjusted_loss,
    post_hoc_logit_adjustment,
    sigmoid_focal_loss,
    softmax_focal_loss,
)
from counterpoise.losses.logit_adjusted import prior_adjustment
from counterpoise.recipes.callbacks import deferred_beta
from tests.golden.runner import Case, NotMapped

Outputs = dict[str, Any]


def sigmoid_focal(case: Case) -> Outputs:
    alpha = case.param("alpha")
    loss = sigmoid_focal_loss(
        case.input("logits"),
        case.input("targets"),
        alpha=None if alpha < 0 else alpha,
        gamma=case.param("gamma"),
        inner="none",
        reduction=case.param("reduction"),
    )
    return {"loss": loss}


def softmax_focal(case: Case) -> Outputs:
    class_weight, p_t_from = case.input("class_weight"), case.param("p_t_from")
    if p_t_from is not None and class_weight is not None:
        raise NotMapped("p_t taken from the weighted cross-entropy is a defect of one release")
    mode, alpha = case.param("alpha_mode"), case.param("alpha")
    if alpha is not None and mode != "background_class0":
        raise ValueError(f"alpha {alpha} with mode {mode}")
    ignore = case.param("ignore_index", case.param("ignore_label", -100))
    logits, targets, normalizer = case.input("logits"), case.input("targets"), case.param("normalizer")

    def loss(reduction: str, divisor: Any = "count") -> torch.Tensor:
        return softmax_focal_loss(
            logits,
            targets,
            gamma=case.param("gamma"),
            alpha=alpha,
            class_weight=None if class_weight is None else class_weight.detach(),
            ignore_index=ignore,
            inner="none",
            reduction=reduction,
            normalizer=divisor,
        )

    rows = float(targets.numel())  # the reference keeps ignored rows in its mean
    scalar = loss("mean") if normalizer is None else loss("mean", max(1.0, normalizer))
    outputs = {"loss_none": loss("none"), "loss_sum": loss("sum"), "loss_mean_over_samples": loss("mean", rows)}
    return {**outputs, "loss": scalar if "loss" in case.expected else outputs["loss_none"]}


def logit_adjustment(case: Case) -> Outputs:
    logits, counts, tau = case.input("logits"), case.input("class_counts"), case.param("tau")
    corrected = post_hoc_logit_adjustment(logits.detach(), class_counts=counts, tau=tau)
    return {
        "adjustment": prior_adjustment(counts, tau, 1e-12),
        "loss": logit_adjusted_loss(logits, case.input("targets"), class_counts=counts, tau=tau),
        "posthoc_logits": corrected,
        "posthoc_pred": corrected.argmax(1),
    }


def balanced_softmax(case: Case) -> Outputs:
    loss = balanced_softmax_loss(
        case.input("logits"),
        case.input("targets"),
        class_counts=case.input("class_counts"),
        reduction=case.param("reduction"),
    )
    return {"loss": loss}


def ldam(case: Case) -> Outputs:
    counts, margin, class_weight = case.input("class_counts"), case.param("max_m"), case.input("class_weight")
    loss = ldam_loss(
        case.input("logits"),
        case.input("targets"),
        class_counts=counts,
        max_margin=margin,
        scale=case.param("s"),
        class_weight=None if class_weight is None else class_weight.detach(),
        normalizer="weight",
    )
    return {"loss": loss, "margins": ldam_margins(counts, margin)}


def effective_number(case: Case) -> Outputs:
    betas, epoch, switch = case.param("betas"), case.param("epoch"), case.param("switch_epoch")
    beta = case.param("beta")
    if betas is not None:
        beta = deferred_beta(epoch, switch_epoch=switch, before=betas[0], after=betas[1])
    return {"weights": effective_number_weights(case.input("class_counts"), beta)}


def class_balanced(case: Case) -> Outputs:
    logits, targets, counts = case.input("logits"), case.input("targets"), case.input("class_counts")
    beta, gamma = case.param("beta"), case.param("gamma")
    outputs: Outputs = {"weights": effective_number_weights(counts, beta)}
    for base in ("softmax", "sigmoid", "focal"):
        loss = class_balanced_loss(logits, targets, class_counts=counts, beta=beta, base=base, gamma=gamma)
        outputs[f"official_{base}"] = loss
        outputs[f"official_{base}_grad_logits"] = torch.autograd.grad(loss, logits)[0]
    return outputs


ADAPTERS: dict[str, Callable[[Case], Outputs]] = {
    "balanced_softmax": balanced_softmax,
    "class_balanced_loss": class_balanced,
    "effective_number_weights": effective_number,
    "ldam": ldam,
    "logit_adjustment": logit_adjustment,
    "sigmoid_focal": sigmoid_focal,
    "softmax_focal": softmax_focal,
}
