"""Adapters of ASL, vector scaling, GML and the RetinaNet helpers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from counterpoise.contrastive import gml_loss, gml_terms
from counterpoise.contrastive.gml import class_log_means
from counterpoise.losses import (
    asymmetric_loss,
    asymmetric_single_label_loss,
    class_scaling,
    group_scaling,
    group_vector_scaling_loss,
    retinanet_classification_loss,
    scaled_margin_loss,
    sigmoid_focal_star_loss,
    sigmoid_prior_bias,
    softmax_prior_bias,
    vector_scaling_loss,
)
from counterpoise.memory import ClassQueue
from tests.golden.runner import Case, NotMapped

Outputs = dict[str, Any]


def asl_multilabel(case: Case) -> Outputs:
    loss = asymmetric_loss(
        case.input("logits"),
        case.input("targets"),
        gamma_neg=case.param("gamma_neg"),
        gamma_pos=case.param("gamma_pos"),
        margin=case.param("clip"),
        eps=case.param("eps"),
        detach_weight=case.param("detach_weight"),
        inner="sum",
        reduction=case.param("reduction"),
    )
    return {"loss": loss}


def asl_single_label(case: Case) -> Outputs:
    loss = asymmetric_single_label_loss(
        case.input("logits"),
        case.input("targets"),
        gamma_neg=case.param("gamma_neg"),
        gamma_pos=case.param("gamma_pos"),
        label_smoothing=case.param("label_smoothing"),
        reduction=case.param("reduction"),
    )
    return {"loss": loss}


def vector_scaling(case: Case) -> Outputs:
    counts, gamma, tau = case.input("class_counts"), case.param("gamma"), case.param("tau")
    class_weight = case.input("class_weight")
    loss = vector_scaling_loss(
        case.input("logits"),
        case.input("targets"),
        class_counts=counts,
        gamma=gamma,
        tau=tau,
        class_weight=None if class_weight is None else class_weight.detach(),
        normalizer="weight",
    )
    delta, iota = class_scaling(counts, gamma, tau)
    return {"loss": loss, "Delta": delta, "iota": iota}


def vector_scaling_binary(case: Case) -> Outputs:
    """BCE(scale * (Delta_y u - iota_y), y) is the margin form with group = label and signed iota."""
    u, y, scale = case.input("logits")[:, 0], case.input("targets")[:, 0].long(), case.param("scale")
    iota = [-case.param("iota_neg") * scale, case.param("iota_pos") * scale]
    loss = scaled_margin_loss(
        torch.stack([torch.zeros_like(u), u], dim=1),
        y,
        y,
        multiplicative=scale * torch.tensor([case.param("Delta_neg"), case.param("Delta_pos")], dtype=u.dtype),
        additive=torch.tensor(iota, dtype=u.dtype),
    )
    return {"loss": loss}


def vector_scaling_group(case: Case) -> Outputs:
    if case.param("mode") != "multiplicative":
        raise NotMapped("the released additive part shifts both logits of a row and cancels; here it is a margin")
    counts, alpha = case.param("group_counts"), case.param("alpha")
    case.param("tau")  # of the additive modes
    logits, targets, groups = case.input("logits"), case.input("targets"), case.input("groups")
    losses = group_vector_scaling_loss(
        logits, targets, groups, group_counts=counts, gamma=alpha, tau=0.0, reduction="none"
    )
    delta, iota = group_scaling(counts, alpha, 0.0)
    return {"loss": losses, "loss_none": losses, "Delta": delta, "iota": iota}


def sigmoid_focal_star(case: Case) -> Outputs:
    alpha = case.param("alpha")
    loss = sigmoid_focal_star_loss(
        case.input("logits"),
        case.input("targets"),
        alpha=None if alpha < 0 else alpha,
        gamma=case.param("gamma"),
        inner="none",
        reduction=case.param("reduction"),
    )
    return {"loss": loss}


def retinanet_cls_loss(case: Case) -> Outputs:
    """A matched anchor takes the label of its box; -1 and -2 stay."""
    target = [
        [labels[box] if box >= 0 else box for box in matched]
        for labels, matched in zip(case.input("gt_labels"), case.input("matched_idxs"), strict=True)
    ]
    loss = retinanet_classification_loss(
        case.input("cls_logits"), torch.tensor(target), alpha=case.param("alpha"), gamma=case.param("gamma")
    )
    return {"loss": loss}


def retinanet_prior_bias(case: Case) -> Outputs:
    prior, classes = case.param("prior"), case.param("num_classes_including_background")
    of_sigmoid = torch.tensor(sigmoid_prior_bias(prior), dtype=torch.float64)
    of_softmax = softmax_prior_bias(classes - 1, prior)
    return {
        "sigmoid_bias": of_sigmoid,
        "sigmoid_bias_torchvision_float32": of_sigmoid,
        "softmax_background_bias": of_softmax[0],
        "softmax_other_bias": of_softmax[-1],
    }


def gml_outputs(
    case: Case, counts: list[int], initial: float, query: list[str], key: list[str], weights: tuple[float, ...]
) -> Outputs:
    """Both files of GML; ``query`` and ``key`` name embeddings, labels and dataset indices."""
    z, labels, index = (case.input(name) for name in query)
    keys, key_labels, key_index = (case.input(name) for name in key)
    supervised, contrast, distillation = weights
    log_temperature = torch.tensor([initial]).log().to(z.dtype).requires_grad_()  # the released module: in float32
    supervised_temperature = torch.tensor(case.param("T_s")).log().to(z.dtype).exp().item()
    teacher = case.input("teacher_logits")
    arguments: dict[str, Any] = {
        "class_counts": counts,
        "logits": case.input("sup_logits"),
        "keys": keys,
        "key_labels": key_labels,
        "index": index,
        "key_index": key_index,
        "teacher_logits": None if teacher is None else teacher.detach(),
        "temperature": log_temperature.exp(),
        "supervised_temperature": supervised_temperature,
        "distillation_temperature": case.param("kd_T") or 4.0,
        "normalize": False,
    }
    loss = gml_loss(
        z,
        labels,
        supervised_weight=supervised,
        contrast_weight=contrast,
        distillation_weight=distillation,
        **arguments,
    )
    terms = gml_terms(z, labels, **arguments)
    scaled, every = (
        (z @ keys.T).detach() / log_temperature.detach().exp(),
        torch.ones(len(z), len(keys), dtype=torch.bool),
    )
    (grad,) = torch.autograd.grad(loss, log_temperature, retain_graph=True, allow_unused=True, materialize_grads=True)
    return {
        "loss": loss,
        "loss_sup": terms.supervised.mean(),
        "loss_con": terms.contrast.mean(),
        "loss_con_T": terms.temperature.mean(),
        "loss_div": terms.distillation.mean(),
        "loss_kd": terms.distillation.mean(),
        "log_S": class_log_means(scaled, key_labels, len(counts), every),
        "log_S_masked": class_log_means(scaled, key_labels, len(counts), index[:, None] != key_index),
        "grad_log_T_c": grad,
    }


def gml_long_tailed(case: Case) -> Outputs:
    return gml_outputs(
        case,
        case.input("class_counts"),
        case.param("temperature_init"),
        ["query", "query_labels", "query_index"],
        ["key", "key_labels", "key_index"],
        (case.param("gamma"), case.param("beta"), case.param("alpha")),
    )


def gml(case: Case) -> Outputs:
    counts = case.param("class_counts")
    assert len(counts) == case.param("num_classes")
    return gml_outputs(
        case,
        counts,
        case.param("T_c"),
        ["query", "q_labels", "q_idx"],
        ["key", "k_labels", "k_idx"],
        (case.param("gamma"), case.param("beta"), case.param("alpha")),
    )


def gml_class_queue(case: Case) -> Outputs:
    queue = ClassQueue(case.param("K"), 2, case.input("class_counts"), per_class=case.param("base_k"))
    states = []
    for batch in case.input("batches"):
        labels, index = torch.tensor(batch["labels"]), torch.tensor(batch["index"])
        features = index[:, None].float().expand(-1, 2)
        queue.enqueue(features, labels, index)
        states.append({"queue_index": queue.index.tolist(), "ptr": queue.pointers.tolist()})
        written = queue.index >= 0
        assert torch.equal(queue.features[written, 0], queue.index[written].float())
    return {
        "states": states,
        "slots_per_class": queue.slots_per_class,
        "class_start": queue.starts[:-1],
        "slot_label": queue.labels,
    }


ADAPTERS: dict[str, Callable[[Case], Outputs]] = {
    "asl_multilabel": asl_multilabel,
    "asl_single_label": asl_single_label,
    "gml": gml,
    "gml_class_queue": gml_class_queue,
    "gml_long_tailed": gml_long_tailed,
    "retinanet_cls_loss": retinanet_cls_loss,
    "retinanet_prior_bias": retinanet_prior_bias,
    "sigmoid_focal_star": sigmoid_focal_star,
    "vector_scaling": vector_scaling,
    "vector_scaling_binary": vector_scaling_binary,
    "vector_scaling_group": vector_scaling_group,
}
