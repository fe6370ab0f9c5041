"""Adapters of samplers and of group DRO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from counterpoise.memory import effective_number_weights
from counterpoise.recipes.data.long_tail import long_tail_counts
from counterpoise.samplers import GroupDRO, class_sampling_probabilities, progressive_probabilities
from tests.golden.runner import Case

Outputs = dict[str, Any]


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
    "group_dro": group_dro,
    "long_tail_sampling": long_tail_sampling,
    "longtail_counts": longtail_counts,
}
