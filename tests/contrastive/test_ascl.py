"""ASCL and its form beside BYOL: loops as the reference, limits of the targets, banks that are not full."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from counterpoise._core import second_pass
from counterpoise.contrastive import (
    ASCLBYOLLoss,
    ASCLLoss,
    MemoryBank,
    ascl_byol_loss,
    ascl_loss,
    ascl_targets,
    byol_loss,
    ntxent_loss,
)
from tests.pool import Pool

kinds = pytest.mark.parametrize("kind", ["adaptive", "adaptive_hard", "hard", "normal"])


def views(count: int = 2, n: int = 5, width: int = 4, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(10 * seed + count)
    return torch.randn(count, n, width, dtype=torch.float64, generator=g)


def bank_of(keys: Tensor, *, size: int | None = None) -> MemoryBank:
    bank = MemoryBank(size or len(keys), keys.shape[1], dtype=keys.dtype)
    bank.enqueue(keys)
    return bank


def some_bank() -> MemoryBank:
    return bank_of(views(1, n=7, seed=3)[0])


def target(key: Tensor, bank: Tensor, kind: str, kappa: int, temperature: float) -> tuple[list[float], float]:
    """Soft labels, the own key first, and confidence, of one key."""
    d = [float(key @ z) for z in bank]
    weights = [math.exp(x / temperature) for x in d]
    r = [w / sum(weights) for w in weights]
    c = 1 + sum(p * math.log(p) for p in r) / math.log(len(r))
    nearest = sorted(range(len(d)), key=lambda j: -d[j])[:kappa]
    y = {
        "adaptive": [min(1.0, kappa * c * p) for p in r],
        "adaptive_hard": [c if j in nearest else 0.0 for j in range(len(d))],
        "hard": [float(j in nearest) for j in range(len(d))],
        "normal": [0.0] * len(d),
    }[kind]
    total = 1 + sum(y)
    return [1 / total, *[p / total for p in y]], c


@kinds
@pytest.mark.parametrize("kappa", [1, 3])
def test_it_is_the_loop_over_the_bank(kind: str, kappa: int) -> None:
    (q, k), bank = normalize(views(), dim=-1), some_bank()
    losses, labels, confidence = [], [], []
    for i in range(5):
        y, c = target(k[i], bank.keys, kind, kappa, 0.3)
        s = [float(q[i] @ z) / 0.2 for z in (k[i], *bank.keys)]
        log_sum = math.log(sum(math.exp(x) for x in s))
        losses.append(-sum(p * (x - log_sum) for p, x in zip(y, s, strict=True)))
        labels.append(y)
        confidence.append(c)
    settings = {"kind": kind, "num_neighbors": kappa, "target_temperature": 0.3}
    ours = ascl_loss(q, k, bank=bank, temperature=0.2, **settings, reduction="none")
    assert_close(ours.tolist(), losses)
    found = ascl_targets(k, bank, **settings)
    assert_close(found.labels.tolist(), labels)
    assert_close(found.confidence.tolist(), confidence)


def test_the_mean_is_over_queries() -> None:
    q, k = views()
    rows = ascl_loss(q, k, bank=some_bank(), reduction="none")
    assert rows.shape == (5,)
    assert_close(ascl_loss(q, k, bank=some_bank()), rows.mean())


def test_of_several_views_each_meets_the_keys_of_the_others() -> None:
    q, k, bank = views(3), views(3, seed=1), some_bank()
    rows = ascl_loss(q, k, bank=bank, reduction="none").view(3, 5)
    for v in range(3):
        met = [ascl_loss(q[v], k[u], bank=bank, reduction="none") for u in range(3) if u != v]
        assert_close(rows[v], torch.stack(met).mean(0))


def test_one_key_meets_all_views() -> None:
    q, k, bank = views(3), views(1)[0], some_bank()
    apart = torch.cat([ascl_loss(view, k, bank=bank, reduction="none") for view in q])
    assert_close(ascl_loss(q, k, bank=bank, reduction="none"), apart)


# The targets


def test_normal_is_ntxent_with_a_bank() -> None:
    (q, k), bank = views().requires_grad_(), bank_of(views(1, n=7)[0], size=9)
    ours, ntxent = ascl_loss(q, k, bank=bank, kind="normal"), ntxent_loss(q, k.detach(), bank=bank, temperature=0.1)
    assert_close(ours, ntxent, rtol=1e-12, atol=1e-12)
    assert_close(torch.autograd.grad(ours, q), torch.autograd.grad(ntxent, q), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["adaptive", "adaptive_hard"])
def test_a_constant_bank_tells_no_neighbours_apart(kind: str) -> None:
    (q, k), bank = views(), bank_of(views(1, n=1)[0].expand(6, 4))
    settings = {"kind": kind, "num_neighbors": 3}
    labels, confidence = ascl_targets(k, bank, **settings)
    assert_close(confidence, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(labels, torch.eye(7, dtype=torch.float64)[0].expand(5, 7), rtol=0, atol=1e-12)
    assert_close(ascl_loss(q, k, bank=bank, **settings), ascl_loss(q, k, bank=bank, kind="normal"))


@pytest.mark.parametrize("kind", ["adaptive", "adaptive_hard"])
def test_sharp_targets_are_the_nearest_neighbour(kind: str) -> None:
    (q, k), bank = views(), some_bank()
    sharp = {"kind": kind, "target_temperature": 1e-4}
    assert_close(ascl_targets(k, bank, **sharp).confidence, torch.ones(5, dtype=torch.float64))
    assert_close(ascl_loss(q, k, bank=bank, **sharp), ascl_loss(q, k, bank=bank, kind="hard"))


@pytest.mark.parametrize("kappa", [1, 2, 5])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_the_own_key_keeps_its_share(kappa: int, temperature: float) -> None:
    """The neighbours hold at most kappa times the confidence, before all is normalised."""
    labels, c = ascl_targets(views()[0], some_bank(), num_neighbors=kappa, target_temperature=temperature)
    assert (labels[:, 1:].sum(1) / labels[:, 0] <= kappa * c + 1e-12).all()
    assert (labels[:, 0] >= 1 / (1 + kappa * c) - 1e-12).all()
    assert_close(labels.sum(1), torch.ones(5, dtype=torch.float64))
    assert ((c >= 0) & (c <= 1)).all()


@kinds
def test_it_costs_at_least_the_entropy_of_its_targets(kind: str) -> None:
    (q, k), bank = views(), some_bank()
    entropy = torch.special.entr(ascl_targets(k, bank, kind=kind, num_neighbors=3).labels).sum(1)
    assert (ascl_loss(q, k, bank=bank, kind=kind, num_neighbors=3, reduction="none") >= entropy - 1e-12).all()


def test_more_neighbours_than_slots_are_all_slots() -> None:
    labels = ascl_targets(views()[0], bank_of(views(1, n=3)[0], size=8), kind="hard", num_neighbors=100).labels
    assert_close(labels[0], torch.tensor([0.25] * 4 + [0.0] * 5, dtype=torch.float64))


def test_targets_carry_no_gradient() -> None:
    q, k = views().requires_grad_(), views(seed=1).requires_grad_()
    loss = ascl_loss(q, k, bank=some_bank(), num_neighbors=3)
    loss.backward()
    assert q.grad.norm() > 0
    assert k.grad is None
    assert not ascl_targets(k[0], some_bank()).labels.requires_grad


# Banks


@kinds
def test_slots_never_filled_do_not_count(kind: str) -> None:
    """Not for the number of neighbours that confidence compares with either."""
    (q, k), keys = views(), views(1, n=7)[0]
    full, larger = bank_of(keys), bank_of(keys, size=20)
    settings = {"kind": kind, "num_neighbors": 9}
    assert_close(ascl_loss(q, k, bank=larger, **settings), ascl_loss(q, k, bank=full, **settings))
    of_full, of_larger = (ascl_targets(k, bank, **settings) for bank in (full, larger))
    assert_close(of_larger.confidence, of_full.confidence)
    assert_close(of_larger.labels[:, :8], of_full.labels)
    assert (of_larger.labels[:, 8:] == 0).all()


@kinds
@pytest.mark.parametrize("size", [1, 6])
def test_one_neighbour_gives_no_confidence(kind: str, size: int) -> None:
    """log 1 = 0: with one candidate there is nothing to stand out from."""
    (q, k), bank = views().requires_grad_(), bank_of(views(1, n=1)[0], size=size)
    assert (ascl_targets(k, bank, kind=kind).confidence == 0).all()
    loss = ascl_loss(q, k, bank=bank, kind=kind)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, q)[0].isfinite().all()
    if kind != "hard":
        assert_close(loss, ascl_loss(q, k, bank=bank, kind="normal"))


@kinds
def test_an_empty_bank_gives_a_zero_connected_to_the_graph(kind: str) -> None:
    q, k = views().requires_grad_()
    loss = ascl_loss(q, k, bank=MemoryBank(6, 4), kind=kind)
    assert_close(loss.item(), 0.0, rtol=0, atol=1e-12)
    assert torch.autograd.grad(loss, q)[0].abs().max() < 1e-12
    labels, confidence = ascl_targets(k, MemoryBank(6, 4), kind=kind)
    assert (confidence == 0).all()
    assert (labels[:, 0] == 1).all()


def test_the_bank_is_only_read_in_training_in_eval_and_in_a_second_pass() -> None:
    (q, k), bank = views(), bank_of(views(1, n=7)[0], size=9)
    before = {name: buffer.clone() for name, buffer in bank.state_dict().items()}
    loss = ASCLLoss(num_neighbors=2)
    trained = loss(q, k, bank=bank)
    with second_pass():
        assert torch.equal(loss(q, k, bank=bank), trained)
    assert torch.equal(loss.eval()(q, k, bank=bank.eval()), trained)
    assert all(torch.equal(buffer, before[name]) for name, buffer in bank.state_dict().items())


def test_keys_may_be_enqueued_between_the_loss_and_its_gradient() -> None:
    (q, k), bank = views().requires_grad_(), some_bank()
    (expected,) = torch.autograd.grad(ascl_loss(q, k, bank=bank), q)
    loss = ascl_loss(q, k, bank=bank)
    bank.enqueue(k.detach())
    assert_close(torch.autograd.grad(loss, q)[0], expected)


def test_a_temperature_may_be_learned() -> None:
    (q, k), tau = views(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    loss = ascl_loss(q, k, bank=some_bank(), temperature=tau)
    assert_close(loss, ascl_loss(q, k, bank=some_bank()))
    assert torch.autograd.gradcheck(lambda t: ascl_loss(q, k, bank=some_bank(), temperature=t), tau)


@kinds
def test_nan_in_a_key_is_never_repaired(kind: str) -> None:
    q, k = views()
    k[2] = torch.nan
    rows = ascl_loss(q, k, bank=some_bank(), kind=kind, reduction="none")
    assert rows.isnan().tolist() == [False, False, True, False, False]


# Beside BYOL


@kinds
def test_beside_byol_it_is_the_loop_over_the_batch(kind: str) -> None:
    h, k = normalize(views(), dim=-1)
    losses = []
    for i in range(5):
        others = [j for j in range(5) if j != i]
        y, _ = target(k[i], k[others], kind, 2, 0.3)
        losses.append(2 - 2 * sum(p * float(h[i] @ k[j]) for p, j in zip(y, [i, *others], strict=True)))
    ours = ascl_byol_loss(h, k, kind=kind, num_neighbors=2, target_temperature=0.3, reduction="none")
    assert_close(ours.tolist(), losses)
    assert_close(ascl_byol_loss(h, k, kind=kind, num_neighbors=2, target_temperature=0.3), ours.mean())


def test_beside_byol_normal_is_one_direction_of_byol() -> None:
    h, k = views()
    assert_close(ascl_byol_loss(h, k, kind="normal"), byol_loss(h, k))


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("kind", ["adaptive", "adaptive_hard"])
def test_beside_byol_fewer_than_two_neighbours_give_no_confidence(n: int, kind: str) -> None:
    h, k = views(n=n)
    assert_close(ascl_byol_loss(h, k, kind=kind), ascl_byol_loss(h, k, kind="normal"))


def test_beside_byol_equal_keys_are_byol() -> None:
    h, k = views(1)[0], views(1, n=1)[0].expand(5, 4)
    assert_close(ascl_byol_loss(h, k, num_neighbors=4), ascl_byol_loss(h, k, kind="normal"))


def test_beside_byol_each_view_meets_the_keys_of_the_others() -> None:
    h, k = views(3), views(3, seed=1)
    rows = ascl_byol_loss(h, k, reduction="none").view(3, 5)
    for v in range(3):
        met = [ascl_byol_loss(h[v], k[u], reduction="none") for u in range(3) if u != v]
        assert_close(rows[v], torch.stack(met).mean(0))


@kinds
def test_beside_byol_a_row_costs_between_zero_and_four(kind: str) -> None:
    h, k = views(n=20)
    rows = ascl_byol_loss(h, k, kind=kind, num_neighbors=3, reduction="none")
    assert ((rows >= 0) & (rows <= 4)).all()


def test_beside_byol_a_masked_example_is_no_neighbour() -> None:
    (h, k), mask = views(n=6), torch.tensor([True, False, True, True, False, True])
    kept = h[mask], k[mask]
    k[~mask] = torch.nan
    assert_close(ascl_byol_loss(h, k, mask=mask, num_neighbors=2), ascl_byol_loss(*kept, num_neighbors=2))


def mask_on_one_rank(rank: int, split: tuple[int, ...]) -> float:
    h, k = views(n=9)
    rows, mask = slice(sum(split[:rank]), sum(split[: rank + 1])), torch.arange(9) != 1
    mask = mask[rows] if rank == 0 else None
    return ascl_byol_loss(h[rows], k[rows], num_neighbors=3, mask=mask).item()


def test_beside_byol_neighbours_lie_on_all_ranks(ranks: Pool) -> None:
    values = ranks.run(mask_on_one_rank, (4, 0, 5))
    assert sum(values) / 3 == pytest.approx(mask_on_one_rank(0, (9,)), rel=1e-9)


# What is refused

CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "no bank": (lambda: ascl_loss(*views()), "bank is None, expected a MemoryBank"),
    "width": (lambda: ascl_loss(*views(), bank=MemoryBank(3, 5)), "bank has width 5, expected 4"),
    "width of targets": (lambda: ascl_targets(views()[0], MemoryBank(3, 5)), "bank has width 5, expected 4"),
    "no keys": (lambda: ascl_loss(views()[0], bank=MemoryBank(3, 4)), "other is None, expected the embeddings"),
    "one view of keys": (
        lambda: ascl_loss(views(), views(1), bank=MemoryBank(3, 4)),
        "other holds 1 view, expected two or more",
    ),
    "kind": (lambda: ASCLLoss("adaptiv"), r"kind is 'adaptiv', .* did you mean 'adaptive'\?"),
    "kappa": (lambda: ASCLLoss(num_neighbors=0), r"num_neighbors is 0, expected a number in \[1"),
    "temperature": (lambda: ASCLLoss(temperature=0.0), r"temperature is 0.0, expected a number in \(0"),
    "target": (lambda: ASCLLoss(target_temperature=0.0), r"target_temperature is 0.0, expected a number in \(0"),
    "labels": (lambda: ASCLLoss()(*views(), labels=torch.arange(5)), "labels are given, expected none"),
    "bank beside byol": (lambda: ASCLBYOLLoss()(*views(), bank=MemoryBank(3, 4)), "bank given, expected views"),
    "keys beside byol": (lambda: ascl_byol_loss(views()[0]), "other is None, expected the embeddings"),
    "kind beside byol": (lambda: ASCLBYOLLoss("soft"), "kind is 'soft', expected one of"),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_does_not_fit_is_refused(call: str) -> None:
    attempt, message = CALLS[call]
    with pytest.raises(ValueError, match=message):
        attempt()


def test_part_of_a_neighbour_is_refused() -> None:
    with pytest.raises(TypeError, match=r"num_neighbors is 1\.5, expected a whole number"):
        ASCLLoss(num_neighbors=1.5)
