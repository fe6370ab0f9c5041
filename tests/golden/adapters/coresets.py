"""Adapters of coresets and scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from counterpoise.samplers import (
    ForgettingEvents,
    coverage_centric,
    el2n_scores,
    facility_location,
    grand_scores,
    grand_scores_full,
    herding,
    k_center_greedy,
    moderate_coreset,
    nearest_in_coreset,
    propagate_weights,
    uncertainty_scores,
)
from counterpoise.samplers.ccs import stratum_budgets, stratum_of
from counterpoise.samplers.power_of_few import distances_to_class_mean
from tests.golden.runner import Case, NotMapped

Outputs = dict[str, Any]


def precise(value: float | None) -> Tensor:
    """A float64 tensor."""
    return torch.tensor(value, dtype=torch.float64)


def kcenter_greedy(case: Case) -> Outputs:
    if case.param("metric") != "euclidean":
        raise NotMapped(f"the metric is Euclidean here, the case has {case.param('metric')}")
    initial = case.param("initial")
    found = k_center_greedy(
        case.input("features"), case.param("budget_total"), already_selected=torch.tensor(initial, dtype=torch.int64)
    )
    return {
        "sequence": found.indices,
        "selected_sorted": found.indices.sort().values,
        "gap_at_pick": found.gains[len(initial) :],
        "covering_radius": precise(found.value),
    }


def facility_location_craig(case: Case) -> Outputs:
    budget, similarity = case.param("budget"), case.input("S")
    if not case.param("similarity").startswith("max(D)-D"):
        raise NotMapped(f"an unknown similarity: {case.param('similarity')}")
    found = facility_location(similarity=similarity, budget=budget)
    of_features = facility_location(case.input("features"), budget)
    assert found.indices.tolist() == of_features.indices.tolist()
    # distances of the case are clipped to 1e-6 from below, those of ours are 0 from a point to itself
    torch.testing.assert_close(found.gains, of_features.gains, rtol=0, atol=1.01e-6)
    # the released code takes index 0 for its second pick, whatever its gain
    start = [int(found.indices[0]), 0] if found.indices[0] != 0 and budget > 1 else [int(found.indices[0])]
    released = facility_location(similarity=similarity, budget=budget, already_selected=torch.tensor(start))
    return {
        "sequence": found.indices,
        "gains": found.gains,
        "value": precise(found.value),
        "assignment": found.assignment,
        "weights": found.weights,
        "weights_sum": found.weights.sum(),
        "craig_repo_order_as_published": released.indices,
    }


def herding_(case: Case) -> Outputs:
    features, budget = case.input("features"), case.param("budget")
    if case.param("replacement"):
        raise NotMapped("picks are without replacement: a subset with repetitions has no use as a coreset")
    nearest = herding(features, budget)
    return {
        "sequence_nearest": nearest.indices,
        "mean_gap_nearest": precise(nearest.value),
        "sequence_inner_product": herding(features, budget, rule="inner_product").indices,
    }


def el2n_grand_scores(case: Case) -> Outputs:
    logits, labels, features = case.input("logits"), case.input("labels"), case.input("features")
    el2n = el2n_scores(logits, labels)
    max_margin = el2n_scores(logits, labels, variant="max_margin")
    return {
        "el2n": el2n,
        "el1n": el2n_scores(logits, labels, variant="l1"),
        "max_margin": max_margin,
        "sum_margin": el2n_scores(logits, labels, variant="sum_margin"),
        "ccs_margin": -max_margin,
        "grand_last_layer": grand_scores(logits, labels, features),
        "order_keep_hardest_el2n": el2n.argsort(descending=True, stable=True),
        "least_confidence": uncertainty_scores(logits, kind="least_confidence"),
        "entropy": uncertainty_scores(logits, kind="entropy"),
        "margin_top2": -uncertainty_scores(logits, kind="margin"),
    }


def grand_full(case: Case) -> Outputs:
    x, labels = case.input("x"), case.input("labels")
    hidden = case.param("architecture").startswith("x -> tanh")
    if not hidden and case.param("architecture") != "x W2 + b2":
        raise NotMapped(f"an unknown architecture: {case.param('architecture')}")
    layers = [linear(case.input("W1"), case.input("b1")), nn.Tanh()] if hidden else []
    return {
        "grand_full": grand_scores_full(nn.Sequential(*layers, linear(case.input("W2"), case.input("b2"))), x, labels)
    }


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """x W + b."""
    layer = nn.Linear(*weight.shape, dtype=weight.dtype)
    layer.weight.data, layer.bias.data = weight.detach().T, bias.detach()
    return layer


def forgetting_events(case: Case) -> Outputs:
    correct = case.input("correct").bool()
    if len(correct) != case.param("presentations"):
        raise NotMapped("fewer presentations than rows of correctness")
    events = ForgettingEvents(correct.shape[1])
    learned = torch.zeros(correct.shape[1], dtype=torch.int64)
    for t, row in enumerate(correct):
        events.record(row, torch.arange(len(row)))
        learned[~row] = t + 1  # presentations up to and including the last wrong one
    never = events.first_learned < 0
    return {
        "forget_counts": events.events,
        "forget_score_never_learned_inf": events.scores(),
        "toneva_counts_never_learned_T": events.scores("presentations"),
        "presentations_to_learn": learned,
        "first_learned": torch.where(never, torch.nan, events.first_learned.double()),
    }


def cw_erm_moderate_coreset(case: Case) -> Outputs:
    features, labels, weights = case.input("features"), case.input("labels"), case.input("coreset_weights")
    assert int(labels.max()) < case.param("num_classes")
    coreset = moderate_coreset(features, labels, case.param("fraction")).indices
    own = features[coreset]
    same = {"coreset_targets": labels[coreset], "targets": labels}
    return {
        "distance_to_class_mean": distances_to_class_mean(features, labels),
        "coreset": coreset,
        "nearest_coreset_position": nearest_in_coreset(own, features, metric="euclidean")[:, 0],
        "propagated_weights_nearest": propagate_weights(weights, own, features, metric="euclidean"),
        "propagated_weights_nearest_same_class": propagate_weights(weights, own, features, metric="euclidean", **same),
    }


def ccs_stratified(case: Case) -> Outputs:
    scores, budget, strata = case.input("scores").detach(), case.param("budget"), case.param("strata")
    sizes = torch.bincount(stratum_of(scores, strata), minlength=strata)
    shares = stratum_budgets(sizes, budget)
    return {
        "strata_counts": sizes,
        "strata_budgets": shares,
        "budget_sum": shares.sum(),
        "selected_count": len(coverage_centric(scores, budget, strata=strata)),
    }


ADAPTERS: dict[str, Callable[[Case], Outputs]] = {
    "ccs_stratified": ccs_stratified,
    "cw_erm_moderate_coreset": cw_erm_moderate_coreset,
    "el2n_grand_scores": el2n_grand_scores,
    "facility_location_craig": facility_location_craig,
    "forgetting_events": forgetting_events,
    "grand_full": grand_full,
    "herding": herding_,
    "kcenter_greedy": kcenter_greedy,
}
