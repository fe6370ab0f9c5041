"""Adapters of the objectives on InfoNCE and pairwise tables: SupCon, CLIP and its kin, SigLIP, and several ranks."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from counterpoise._core import world_size
from counterpoise.contrastive import (
    clip_loss,
    convirt_loss,
    image_tabular_clip_loss,
    ntxent_loss,
    siglip_loss,
    supcon_loss,
    vicreg_terms,
)
from counterpoise.distributed import all_reduce_sum
from tests.golden.runner import Case, NotMapped
from tests.pool import Pool

Outputs = dict[str, Any]
NO_GRADIENT = (
    "keys gathered without gradient: averaged over ranks, the gradient is not that of one process on the whole batch"
)


@cache
def two_ranks() -> Pool:
    """Two gloo processes, started by the first vector that needs them."""
    pool = Pool(2)
    atexit.register(pool.close)
    return pool


def supcon(case: Case) -> Outputs:
    features, labels, mask = case.input("features_raw"), case.input("labels"), case.input("mask")
    scale = case.param("scale")
    z = features if scale is None else scale * features
    positives = None if mask is None else torch.as_tensor(mask).detach()
    loss = supcon_loss(
        z.transpose(0, 1),
        labels=labels if positives is None else None,
        positives=positives,
        temperature=case.param("temperature"),
        base_temperature=case.param("base_temperature"),
        contrast_mode=case.param("contrast_mode"),
        normalize=case.param("normalize"),
        reduction_over="all",
    )
    return {"loss": loss}


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def clip_at(img: Tensor, txt: Tensor, scale: Tensor) -> Tensor:
    return clip_loss(img, txt, temperature=1 / scale)


def clip(case: Case) -> Outputs:
    case.param("logit_bias")  # a constant in every logit: no softmax sees it
    scale = scalar(case.param("logit_scale"))
    loss = clip_at(case.input("img_raw"), case.input("txt_raw"), scale)
    return {"loss": loss, "grad_logit_scale": torch.autograd.grad(loss, scale, retain_graph=True)[0]}


def siglip_at(img: Tensor, txt: Tensor, scale: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return siglip_loss(img, txt, scale=scale, bias=bias, **options)


def siglip(case: Case) -> Outputs:
    scale, bias = scalar(case.param("logit_scale")), scalar(case.param("logit_bias"))
    negative_only = bool(case.param("negative_only", False))
    loss = siglip_at(case.input("img_raw"), case.input("txt_raw"), scale, bias, negative_only=negative_only)
    of_scale, of_bias = torch.autograd.grad(loss, [scale, bias], retain_graph=True)
    return {"loss": loss, "grad_logit_scale": of_scale, "grad_logit_bias": of_bias}


def on_a_rank(
    rank: int, function: Callable[..., Tensor], inputs: list[Tensor], scalars: list[float], repeated: bool
) -> tuple[Tensor, list[Tensor]]:
    """One rank's loss and the gradients of its inputs and of the scalars, before any averaging.

    ``repeated``: as where every rank computes the loss of all rows: what is reported is the mean over ranks.
    """
    own = [x[rank].clone().requires_grad_() for x in inputs]
    learned = [scalar(x) for x in scalars]
    loss = function(*own, *learned)
    grads = list(torch.autograd.grad(loss, [*own, *learned]))
    values = torch.stack([loss.detach(), *grads[len(own) :]])
    return all_reduce_sum(values) / world_size() if repeated else values, grads[: len(own)]


def over_ranks(
    case: Case, function: Callable[..., Tensor], inputs: list[str], scalars: list[str], *, repeated: bool = False
) -> Outputs:
    """Per-rank losses and gradients of two processes, by the names of the vectors."""
    given = [case.input(f"{name}_per_rank").detach() for name in inputs]
    found = two_ranks().run(on_a_rank, function, given, [case.param(name) for name in scalars], repeated)
    outputs: Outputs = {"loss_per_rank": torch.stack([values[0] for values, _ in found])}
    for i, name in enumerate(scalars):
        outputs[f"grad_{name}_per_rank"] = torch.stack([values[i + 1] for values, _ in found])
    for i, name in enumerate(inputs):
        outputs[f"grad_{name}_per_rank"] = torch.stack([grads[i] for _, grads in found])
    return outputs


def clip_ddp(case: Case) -> Outputs:
    if case.param("world_size") == 1:
        return clip(case)
    local, with_grad = case.param("local_loss", False), case.param("gather_with_grad", False)
    if not with_grad:
        raise NotMapped(NO_GRADIENT)
    return over_ranks(case, clip_at, ["img_raw", "txt_raw"], ["logit_scale"], repeated=not local)


def siglip_ddp(case: Case) -> Outputs:
    case.param("dist_impl")  # in which order blocks travel: the values are those of any
    if case.param("world_size") == 1:
        return siglip(case)
    return over_ranks(case, siglip_at, ["img_raw", "txt_raw"], ["logit_scale", "logit_bias"])


def ntxent_at(z1: Tensor, z2: Tensor, temperature: Tensor) -> Tensor:
    return ntxent_loss(z1, z2, temperature=temperature)


def vicreg_at(z1: Tensor, z2: Tensor, sim: Tensor, std: Tensor, cov: Tensor) -> Tensor:
    """As released: a rank's loss has the invariance of its own rows, whose mean over ranks is that of all rows."""
    own, whole = vicreg_terms(z1, z2, sync=False), vicreg_terms(z1, z2)
    return sim * own.invariance + std * whole.variance + cov * whole.covariance


def ssl_ddp(case: Case) -> Outputs:
    case.param("world_size")
    if case.param("lambd") is not None:
        raise NotMapped("the statistics of a rank alone: another loss, not that of one process on the whole batch")
    if case.param("sim") is not None:
        return over_ranks(case, vicreg_at, ["z1", "z2"], ["sim", "std", "cov"])
    if "dcl" in case.name:
        raise NotMapped("decoupled contrastive learning is not part of this library")
    return over_ranks(case, ntxent_at, ["z1", "z2"], ["temperature"])


def convirt(case: Case) -> Outputs:
    loss = convirt_loss(
        case.input("v"), case.input("u"), direction_weight=case.param("lambda"), temperature=case.param("tau")
    )
    return {"loss": loss}


def mmcl_tabular(case: Case) -> Outputs:
    labels = case.input("labels")
    loss = image_tabular_clip_loss(
        case.input("img"),
        case.input("tab"),
        labels=labels if case.param("kind") == "supcon" else None,
        temperature=case.param("temperature"),
        direction_weight=case.param("lambda_0"),
        legacy=case.param("bug_compat"),
    )
    return {"loss": loss}


ADAPTERS: dict[str, Callable[[Case], Outputs]] = {
    "clip": clip,
    "clip_ddp": clip_ddp,
    "convirt": convirt,
    "mmcl_tabular": mmcl_tabular,
    "siglip": siglip,
    "siglip_ddp": siglip_ddp,
    "ssl_ddp": ssl_ddp,
    "supcon": supcon,
}
