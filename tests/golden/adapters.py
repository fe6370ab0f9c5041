"""One adapter a vector file: translates its spelling into ours and returns what is compared.

An adapter reads every parameter and input of its file's schema; an unread one fails the case. What is left out by
choice raises NotMapped with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from counterpoise.contrastive import barlow_twins_loss, ntxent_loss
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
from counterpoise.memory import MemoryBank
from counterpoise.recipes.callbacks import deferred_beta
from counterpoise.recipes.data.long_tail import long_tail_counts
from counterpoise.samplers import GroupDRO, class_sampling_probabilities, progressive_probabilities
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


def longtail_counts(case: Case) -> Outputs:
    classes = case.param("num_classes")
    counts = long_tail_counts(
        classes,
        case.param("dataset_size") // classes,
        1 / case.param("imb_factor"),
        {"exp": "exponential", "step": "step"}[case.param("imb_type")],
    )
    return {"counts": counts}


def long_tail_sampling(case: Case) -> Outputs:
    counts, epochs = case.input("class_counts"), case.param("num_epochs")
    p = {q: class_sampling_probabilities(counts, q) for q in (1.0, 0.0, 0.5, 0.25)}
    n = counts.double()
    return {
        "p_instance": p[1.0],
        "p_class_balanced": p[0.0],
        "p_square_root": p[0.5],
        "p_q0_25": p[0.25],
        "progressive": torch.stack([progressive_probabilities(counts, t, epochs) for t in range(epochs)]),
        "effective_number_weights_sum_C": effective_number_weights(counts, case.param("beta")),
        # weights up to a factor: the released samplers leave them unnormalised
        "inverse_freq_sample_weight": p[0.0] / n * (n > 0).sum(),
        "sqrt_sample_weight": p[0.5] / n * n.sqrt().sum(),
    }


def ntxent(case: Case) -> Outputs:
    return {"loss": ntxent_loss(case.input("z1"), case.input("z2"), temperature=case.param("temperature"))}


def moco_queue(case: Case) -> Outputs:
    q, k, keys = case.input("q"), case.input("k"), case.input("bank").detach()
    bank = MemoryBank(*keys.shape, overflow="drop", dtype=keys.dtype)
    bank.keys.copy_(keys)
    bank.filled.fill_(len(keys))
    bank.pointer.fill_(case.param("ptr"))
    loss = ntxent_loss(q, k, bank=bank, temperature=case.param("temperature"))
    (grad_k,) = torch.autograd.grad(loss, k, retain_graph=True)
    bank.enqueue(k.detach())
    return {"loss": loss, "grad_k_if_not_detached": grad_k, "bank_after": bank.keys, "ptr_after": bank.pointer}


def barlow_twins(case: Case) -> Outputs:
    loss = barlow_twins_loss(
        case.input("z1"), case.input("z2"), off_diagonal_weight=case.param("lambd"), eps=case.param("bn_eps")
    )
    return {"loss": loss}


def group_dro(case: Case) -> Outputs:
    adjustment, btl, alpha = case.param("adj") or [0.0], case.param("btl"), case.param("alpha")
    if min(adjustment) <= 0 and not btl:
        adjustment = [0.0]  # the released code drops the whole adjustment as soon as one entry is zero
    counts = case.param("group_counts")
    dro = GroupDRO(
        counts,
        step_size=case.param("step_size"),
        adjustment=adjustment if len(adjustment) > 1 else adjustment[0],
        normalize_loss=case.param("normalize_loss"),
        absent="renormalize",
        ema=case.param("gamma"),
        greedy_alpha=alpha if btl else None,
        min_variance_weight=case.param("min_var_weight"),
    )
    steps = zip(case.input("per_sample_losses").detach(), case.input("group_idx"), strict=True)
    columns: dict[str, list[torch.Tensor]] = {name: [] for name in case.expected}
    for losses, group in steps:
        weights = dro(losses, group=group)
        # the released code adds the adjustment in place, so its reported loss contains it
        reported = (weights * losses).sum() + (0 if btl else (dro.log_q.exp() * dro.bonus).sum())
        columns["adv_probs_after"].append(dro.log_q.exp())
        columns["robust_loss"].append(reported)
        columns["exp_avg_group_loss"].append(dro.ema_loss.clone())
        columns["grad_per_sample_losses"].append(weights)
    return {name: torch.stack(values) for name, values in columns.items()}


ADAPTERS: dict[str, Callable[[Case], Outputs]] = {
    "balanced_softmax": balanced_softmax,
    "barlow_twins": barlow_twins,
    "class_balanced_loss": class_balanced,
    "effective_number_weights": effective_number,
    "group_dro": group_dro,
    "ldam": ldam,
    "logit_adjustment": logit_adjustment,
    "long_tail_sampling": long_tail_sampling,
    "longtail_counts": longtail_counts,
    "moco_queue": moco_queue,
    "ntxent": ntxent,
    "sigmoid_focal": sigmoid_focal,
    "softmax_focal": softmax_focal,
}
