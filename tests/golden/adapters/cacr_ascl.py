"""Adapters of CACR and ASCL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from counterpoise.contrastive import ascl_byol_loss, ascl_loss, ascl_targets, cacr_loss
from counterpoise.contrastive._cacr import Costs, conditional_weights
from counterpoise.contrastive.ascl import soft_neighbors
from counterpoise.memory import MemoryBank
from tests.golden.runner import Case, NotMapped
from tests.pool import Pool

Outputs = dict[str, Any]
KINDS = {"ascl": "adaptive", "ahcl": "adaptive_hard", "hard": "hard", "normal": "normal"}


def full_bank(columns: Tensor, pointer: int) -> MemoryBank:
    """A bank that holds ``columns`` (d, K) and writes to ``pointer`` next."""
    keys = columns.detach().T.contiguous()
    bank = MemoryBank(*keys.shape, dtype=keys.dtype)
    bank.keys.copy_(keys)
    bank.filled.fill_(len(keys))
    bank.pointer.fill_(pointer)
    return bank


def cacr_simclr(case: Case) -> Outputs:
    views, choice, cost = case.input("views_raw"), case.param("choice"), case.param("cost")
    alpha, beta, tau_plus = case.param("alpha"), case.param("beta"), case.param("tau_plus")
    tau = tau_plus if case.param("with_debiased") else 0.0
    if tau and cost == "rbf":
        raise NotMapped("the release debiases the Euclidean cost alone")
    t_plus, t_minus = case.param("tau_pos"), case.param("tau_neg")
    t_plus = 0.0 if choice in ("none", "without_w1") else t_plus
    t_minus = 0.0 if choice in ("none", "without_w2") else t_minus

    def loss(alpha: float) -> Tensor:
        return cacr_loss(
            views,
            cost=cost,
            attraction_weight=alpha,
            repulsion_weight=beta,
            attraction_sharpness=t_plus,
            repulsion_sharpness=t_minus,
            positive_prior=tau,
        )

    repelled = loss(0.0)
    z, (v, n) = normalize(views.detach(), dim=-1), views.shape[:2]
    costs, other = Costs(cosine=False, unit=True), ~torch.eye(n, dtype=torch.bool)
    pulls = conditional_weights(costs.pairs(z, z)[-1], t_plus, torch.arange(v)[:, None] < v - 1, 0)[0]
    pushes = conditional_weights(costs.between(z[-2], z[-1]), -t_minus, other)[0]
    return {
        "loss": loss(alpha),
        "loss1": loss(alpha) - repelled,
        "loss2": repelled,
        "weights_pos_last": pulls[:-1].T,
        "weights_neg_last": pushes[other].view(n, n - 1),
    }


def cacr_moco(case: Case) -> Outputs:
    q, k, columns = case.input("q_raw"), case.input("k_raw"), case.input("queue")
    alpha, beta, intra = case.param("alpha"), case.param("beta"), case.param("intra_batch")
    t_plus, t_minus = case.param("tau_pos"), case.param("tau_neg")
    bank = full_bank(columns, case.param("queue_ptr"))
    if case.param("bug_compat"):
        raise NotMapped("every view would repel the queue by the distances of the first view")

    def loss(alpha: float) -> Tensor:
        return cacr_loss(
            q,
            k,
            bank=bank,
            mode="queue",
            attraction_weight=alpha,
            repulsion_weight=beta,
            attraction_sharpness=t_plus,
            repulsion_sharpness=t_minus,
            intra_batch=intra,
            weight_gradient="intra_batch",
        )

    both, repelled = loss(alpha), loss(0.0)
    bank.enqueue(k[-1].detach())
    after = {"queue_after": bank.keys.T, "queue_ptr_after": bank.pointer}
    return {"loss": both, "loss1": both - repelled, "loss2": repelled, **after}


def cross_view(q: Tensor, k: Tensor, cost: str, t: float) -> Tensor:
    """The release sums its "euclidean", half the squared distance, over examples."""
    rbf = cost == "rbf"
    loss = cacr_loss(
        q,
        k,
        mode="cross_view",
        cost="rbf" if rbf else "cosine",
        attraction_sharpness=1 / t if rbf else 2 / t,
        repulsion_sharpness=0.5 / t if rbf else 1 / t,
    )
    return loss if rbf else loss * len(k)


def on_rank(rank: int, own: int, q: Tensor, everywhere: Tensor, cost: str, t: float) -> tuple[Tensor, Tensor] | None:
    """Loss and gradient of the rank ``own``; the others hold its queries and keys of their own."""
    k = everywhere[rank * q.shape[1] : (rank + 1) * q.shape[1]]
    q = q.clone().requires_grad_()
    loss = cross_view(q, k, cost, t)
    (grad,) = torch.autograd.grad(loss, q)
    return (loss.detach(), grad) if rank == own else None


def cacr_mocov3(case: Case) -> Outputs:
    q, k, everywhere = case.input("q_raw"), case.input("k_raw"), case.input("k_all_raw")
    cost, t, ranks, rank = case.param("cost"), case.param("T"), case.param("world_size"), case.param("rank")
    torch.testing.assert_close(everywhere[rank * len(k) : (rank + 1) * len(k)], k)
    if ranks == 1:
        return {"loss": cross_view(q, k, cost, t)}
    pool = Pool(ranks)
    try:
        answers = pool.run(on_rank, rank, q.detach(), everywhere.detach(), cost, t)
    finally:
        pool.close()
    loss, grad = answers[rank]
    return {"loss": loss, "grad_q_raw": grad}


def ascl(case: Case) -> Outputs:
    q, k, bank = case.input("q_raw"), case.input("k_raw"), full_bank(case.input("bank"), case.param("ptr"))
    settings = {
        "kind": KINDS[case.param("type")],
        "num_neighbors": case.param("nn_num"),
        "target_temperature": case.param("T2"),
    }
    loss = ascl_loss(q, k, bank=bank, temperature=case.param("T1"), **settings)
    labels, confidence = ascl_targets(k, bank, **settings)
    bank.enqueue(k.detach())
    after = {"bank_after": bank.keys.T, "ptr_after": bank.pointer}
    return {"loss": loss, "soft_labels": labels, "confidence": confidence[:, None], **after}


def ascl_byol(case: Case) -> Outputs:
    p, k, kind = case.input("p_raw"), case.input("k_raw"), KINDS[case.param("type")]
    kappa, tau = case.param("nn_num"), case.param("T2")
    rows = ascl_byol_loss(p, k, kind=kind, num_neighbors=kappa, target_temperature=tau, reduction="none")
    keys, own = normalize(k.detach(), dim=1), torch.eye(len(k), dtype=torch.bool)
    y = soft_neighbors(keys, keys, ~own, kind, kappa, tau)[0] + own
    return {"loss": rows.mean(), "loss_vector": rows, "soft_labels": y / y.sum(1, keepdim=True)}


ADAPTERS: dict[str, Callable[[Case], Outputs]] = {
    "ascl": ascl,
    "ascl_byol": ascl_byol,
    "cacr_moco": cacr_moco,
    "cacr_mocov3": cacr_mocov3,
    "cacr_simclr": cacr_simclr,
}
