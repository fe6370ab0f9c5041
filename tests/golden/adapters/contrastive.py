"""Adapters of the contrastive objectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from counterpoise.contrastive import barlow_twins_loss, ntxent_loss
from counterpoise.memory import MemoryBank
from tests.golden.runner import Case

Outputs = dict[str, Any]


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


ADAPTERS: dict[str, Callable[[Case], Outputs]] = {
    "barlow_twins": barlow_twins,
    "moco_queue": moco_queue,
    "ntxent": ntxent,
}
