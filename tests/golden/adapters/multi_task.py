"""Adapters of task weighting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from counterpoise.losses import (
    softmax_likelihood,
    uncertainty_regularizers,
    uncertainty_weighted_loss,
    uncertainty_weights,
)
from counterpoise.losses.uncertainty_weighting import CONSTANTS
from tests.golden.runner import Case

Outputs = dict[str, Any]


def uncertainty_weighting(case: Case) -> Outputs:
    if case.param("kind") is not None:
        return likelihood(case, case.param("kind"))
    if case.param("variant") == "yaringal":
        return {"loss": yaringal(case)}
    losses, kinds, s, factor = case.input("losses"), case.param("kinds"), scales(case), 1.0
    case.param("init"), case.param("init_c")  # where training starts, not what a step gives
    if kinds is None:
        kinds = ["liebel_korner" if case.param("variant") == "liebel_korner" else "gaussian"] * len(s)
    kinds = ["classification" if kind == "softmax" else kind for kind in kinds]
    if case.param("variant") == "ranandalon":  # L / (2 sigma^2) + log sigma^2: the noise term counts twice
        factor, losses = 2.0, losses / 2
    loss = factor * uncertainty_weighted_loss(losses[None], log_variance=s, kinds=kinds)
    return {"loss": loss, "weights": uncertainty_weights(s, kinds)}


def scales(case: Case) -> Tensor:
    """s of every task, from whichever spelling the variant has."""
    if (c := case.input("c")) is not None:
        return c.square().log()
    if (sigma_sq := case.input("sigma_sq")) is not None:
        return sigma_sq.log()
    found = [x for name in ("s", "log_var", "log_scale") if (x := case.input(name)) is not None]
    assert len(found) == 1
    return found[0]


def yaringal(case: Case) -> Tensor:
    """exp(-s) (y - f)^2 + s, summed over the outputs: every output is a task, and all of it counts twice."""
    total: Any = 0
    task = 0
    while (pred := case.input(f"pred_{task}")) is not None:
        s = case.input(f"log_var_{task}").expand(pred.shape[1])
        squares = (case.input(f"target_{task}").detach() - pred).square()
        total = total + 2 * uncertainty_weighted_loss(squares, log_variance=s, kinds=["gaussian"] * len(s))
        task += 1
    assert task
    return total


def likelihood(case: Case, kind: str) -> Outputs:
    """Of every element; the constant of the density is part of it unless the case's name subtracts it."""
    s = scales(case)
    constants = kind in CONSTANTS and "minus" not in case.name
    if kind == "softmax":
        logits, targets = case.input("logits"), case.input("targets")
        exact = softmax_likelihood(logits, targets, s.squeeze())
        plain = softmax_likelihood(logits, targets, torch.zeros_like(s).squeeze())
        kind, of_elements = "classification", plain
    else:
        error = case.input("pred") - case.input("target")
        of_elements = error.square() if kind == "gaussian" else error.abs()
    s = s.squeeze() if s.numel() == 1 else s
    s = s.expand(of_elements.shape)[..., None]
    terms = uncertainty_weights(s, [kind])[..., 0] * of_elements
    terms = terms + uncertainty_regularizers(s, [kind], constants)[..., 0]
    if kind != "classification":
        return {"loss": terms.mean(), "per_element": terms, "mean": terms.mean()}
    outputs = {"exact_nll_scaled_softmax": exact, "per_element": exact, "paper_approximation": terms}
    shaped = {k: x if isinstance(case.expected.get(k), list) else x.mean() for k, x in outputs.items()}
    return {**shaped, "loss": exact.mean(), "mean": exact.mean()}


ADAPTERS: dict[str, Callable[[Case], Outputs]] = {"uncertainty_weighting": uncertainty_weighting}
