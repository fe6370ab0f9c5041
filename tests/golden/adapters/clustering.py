"""Adapters of the pseudo-label solvers, and of the evaluation of clusters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from counterpoise.ot import P2OTResult, knn_affinity, mass_schedule, p2ot_labels, sp2ot_labels, two_view_label_loss
from counterpoise.recipes.clustering_evaluation import clustering_metrics
from tests.golden.runner import Case

Outputs = dict[str, Any]
TIGHT = {"tolerance": 1e-13, "max_iterations": 200_000}


def precise(x: Any) -> Tensor:
    """Numbers as the vectors hold them."""
    return torch.as_tensor(x, dtype=torch.float64)


def _leave_out(case: Case, *names: str) -> None:
    """What counts iterations of another algorithm."""
    for name in names:
        case.raw["expected"].pop(name, None)


def _solve(case: Case, logits: Tensor, **options: Any) -> P2OTResult:
    """At the setting of the case. A prior is given there by its masses."""
    beta = case.input("beta")
    penalty = case.param("lam")
    return p2ot_labels(
        logits.detach(),
        mass=case.param("rho"),
        epsilon=case.param("epsilon"),
        penalty=penalty if case.param("relaxed_columns", True) else math.inf,
        prior=None if beta is None else beta.detach(),
        **{**TIGHT, **options},
    )


def ppot(case: Case) -> Outputs:
    for name in ("tol", "stoperr", "max_iter", "warm_start"):  # how the reference stops; plans are the converged ones
        case.param(name)
    logits, calls = case.input("logits"), (case.input("logits_call1"), case.input("logits_call2"))
    _leave_out(case, "iters_call1", "iters_call2")
    outputs: Outputs = {}
    if logits is not None:
        found = _solve(case, logits)
        outputs = {
            "pseudo_label": found.labels,
            "row_sums": found.row_mass,
            "col_sums": found.column_mass * len(logits),
            "total_mass": found.column_mass.sum(),
        }
    scaling = None
    for number, call in enumerate(calls, 1):
        if call is not None:
            warm = _solve(case, call, scaling=scaling)
            scaling = warm.scaling
            outputs[f"pseudo_label_call{number}"] = warm.labels
    return outputs


def ppot_rho_schedule(case: Case) -> Outputs:
    total, start, end = case.param("total"), case.param("rho_base"), case.param("rho_upper")
    steps = case.input("step").tolist()
    kinds = ("sigmoid", "linear")
    return {kind: precise([mass_schedule(t, total, start, end, kind) for t in steps]) for kind in kinds}


def ppot_translation_corrected(case: Case) -> Outputs:
    case.param("tol")
    logits = case.input("logits")
    expected = case.raw["expected"]
    corrected, plain = expected["iterations_translation_corrected"], expected["iterations_plain"]
    iterations = _solve(case, logits, tolerance=1e-10).iterations
    assert iterations <= 3 * corrected < plain
    _leave_out(case, "iterations_plain", "iterations_translation_corrected")
    return {"pseudo_label": _solve(case, logits).labels}


def ppot_two_view_loss(case: Case) -> Outputs:
    case.param("tol")
    z1, z2 = case.input("logits_view1"), case.input("logits_view2")
    q1, q2 = _solve(case, z1).labels, _solve(case, z2).labels
    return {"loss": two_view_label_loss(z1, z2, q1, q2), "pseudo_label1": q1, "pseudo_label2": q2}


def sppot(case: Case) -> Outputs:
    """One outer step a call, stopped as the release does: by an objective without the KL of the columns."""
    logits, features, given = (case.input(name).detach() for name in ("logits", "features", "S"))
    assert case.param("kernel") == "gauss"
    affinity = knn_affinity(features, case.param("knn"), case.param("kernel_param"))
    torch.testing.assert_close(affinity.to_dense(), given)
    for name in ("inner_tol", "inner_max_iter"):  # inner problems are solved to the end here
        case.param(name)
    n, clusters = logits.shape
    mass, weight = case.param("rho"), case.param("lam_semantic_init")
    effective, epsilon = case.param("lam_semantic_effective"), case.param("epsilon")

    def released_objective(labels: Tensor) -> float:
        q = labels / n
        semantic = effective * (given * (q @ q.T)).sum()
        return float(-(q * logits.log_softmax(1)).sum() - semantic + epsilon * (q * (q + 1.2e-38).log()).sum())

    labels, scaling = torch.full_like(logits, mass / clusters), None
    objective, inner = [released_objective(labels)], 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of outer steps that end after one
        for _ in range(case.param("mm_max_iter")):
            found = sp2ot_labels(
                logits,
                affinity,
                mass=mass,
                semantic_weight=(weight if weight != effective else effective) / n,
                decay=weight != effective,
                safeguard=False,
                psd_shift=False,
                momentum=case.param("ema"),
                epsilon=epsilon,
                penalty=case.param("lam"),
                start=labels,
                scaling=scaling,
                mm_max_iterations=1,
                **TIGHT,
            )
            labels, scaling, inner = found.labels, found.scaling, inner + found.inner_iterations
            objective.append(released_objective(labels))
            if abs(objective[-1] - objective[-2]) < case.param("mm_tol"):
                break
    assert inner < case.raw["expected"]["inner_iterations_total"]
    _leave_out(case, "inner_iterations_total")
    return {
        "pseudo_label": labels,
        "row_sums": labels.sum(1),
        "col_sums": labels.sum(0),
        "mm_iterations": len(objective) - 1,
        "objective_per_mm_iteration": precise(objective),
    }


def sppot_knn_similarity(case: Case) -> Outputs:
    assert case.param("kernel") == "gauss"
    assert case.param("remove_diagonal")
    features = case.input("features").detach()
    return {"S": knn_affinity(features, case.param("k"), case.param("kernel_param")).to_dense()}


def clustering_eval(case: Case) -> Outputs:
    """Percentages are rounded there, and bands are slices by class index, cut by int()."""
    classes = case.param("num_classes")
    found = clustering_metrics(
        case.input("predictions"), case.input("targets"), num_clusters=classes, num_classes=classes
    )
    scalars = found.scalars
    recall = torch.tensor([r for r in found.per_class["recall"] if r is not None], dtype=torch.float64)
    head, medium, tail = (int(case.param(f"{band}_frac") * classes) for band in ("head", "medium", "tail"))
    slices = (recall[:head], recall[head : head + medium], recall[-tail:])
    exact = {
        "acc_class_mean": scalars["balanced_accuracy"],
        "ari": scalars["adjusted_rand_index"],
        "f1_macro": scalars["macro_f1"],
        "nmi": scalars["mutual_information"],
    }
    return {
        **{name: precise(value) for name, value in exact.items()},
        **{f"{name}_pct": precise(round(100 * value, 2)) for name, value in exact.items()},
        "class_acc_mean": precise(scalars["balanced_accuracy"]),
        "acc_overall": precise(scalars["accuracy"]),
        "head_medium_tail_pct": precise([round(100 * float(s.mean()), 2) for s in slices]),
        "total_matched": found.matched,
    }


ADAPTERS: dict[str, Callable[[Case], Outputs]] = {
    "clustering_eval": clustering_eval,
    "ppot": ppot,
    "ppot_rho_schedule": ppot_rho_schedule,
    "ppot_translation_corrected": ppot_translation_corrected,
    "ppot_two_view_loss": ppot_two_view_loss,
    "sppot": sppot,
    "sppot_knn_similarity": sppot_knn_similarity,
}
