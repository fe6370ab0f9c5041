"""Pseudo-labels of a training: the ring of logits, what moves the state, the loss, and ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from counterpoise._core import second_pass
from counterpoise.ot import (
    PseudoLabels,
    knn_affinity,
    mass_schedule,
    p2ot_labels,
    sp2ot_labels,
    sub_affinity,
    two_view_label_loss,
)
from tests.pool import Pool

K, DATA = 4, 30
AFFINITY = knn_affinity(torch.randn(DATA, 5, generator=torch.Generator().manual_seed(9)), 4)
EXACT: dict[str, Any] = {"tolerance": 1e-10, "mm_tolerance": 1e-12}


def views(rows: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(2, rows, K, generator=torch.Generator().manual_seed(seed))


def engine(kind: str = "p2ot", **options: Any) -> PseudoLabels:
    made = PseudoLabels(K, kind, **{"bank_size": 16, "total_steps": 10, **EXACT, **options})
    if kind == "sp2ot":
        made.set_affinity(AFFINITY)
    return made


KINDS = ["p2ot", "sp2ot", "semi_relaxed", "uniform"]


# The labels


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_bank_labels_are_those_of_the_batch(kind: str) -> None:
    z, index = views(8), torch.arange(8)
    labels = engine(kind, bank_size=0)(z, index)
    mass = mass_schedule(0, 10) if kind in ("p2ot", "sp2ot") else 1.0
    for view, found in zip(z, labels, strict=True):
        if kind == "sp2ot":
            expected = sp2ot_labels(view, sub_affinity(AFFINITY, index), mass=mass, **EXACT).labels
        else:
            penalty = float("inf") if kind == "uniform" else 1.0
            expected = p2ot_labels(view, mass=mass, penalty=penalty, tolerance=1e-10).labels
        assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_uniform_labels_make_clusters_of_one_size() -> None:
    assert_close(engine("uniform", bank_size=0)(views(8)).sum(1), torch.full((2, K), 2.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [[4, 4, 4, 4, 4, 4], [5, 7, 3, 6, 1, 5, 9], [3, 16, 5], [20, 4]], ids=str)
def test_a_batch_is_solved_with_the_rows_before_it(sizes: list[int]) -> None:
    """Against a plain list of rows, whatever the sizes: no need for a bank of a multiple of the batch."""
    made, past, step = engine(), torch.zeros(0, K), 0
    for seed, size in enumerate(sizes):
        z = views(size, seed)
        labels = made(z)
        for view, found in zip(z, labels, strict=True):
            kept = past[-max(16 - size, 0) :] if size < 16 else past[:0]
            joint = p2ot_labels(torch.cat([kept, view]), mass=mass_schedule(step, 10), tolerance=1e-10).labels
            assert_close(found, joint[-size:], rtol=1e-4, atol=1e-6)
        past, step = torch.cat([past, z[1]])[-16:], step + 1
    assert int(made.filled) == len(past)
    held = made.bank[: len(past)]
    assert_close(held.sort(0).values, past.sort(0).values)


def test_the_bank_may_start_late() -> None:
    made, z = engine(bank_start=2), [views(4, seed) for seed in range(3)]
    alone = [p2ot_labels(x[0], mass=mass_schedule(t, 10), tolerance=1e-10).labels for t, x in enumerate(z)]
    found = [made(x)[0] for x in z]
    for t in (0, 1):
        assert_close(found[t], alone[t], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found[2], alone[2], atol=1e-3)


def test_the_mass_follows_the_schedule() -> None:
    made = engine(total_steps=3, mass_start=0.2, mass_end=0.8, schedule="linear")
    masses = []
    for step in range(5):
        masses.append(made.mass)
        made(views(4, step))
        assert_close(float(made.last.column_mass.sum()), masses[-1], rtol=1e-6, atol=1e-6)
    assert_close(masses, [0.2, 0.4, 0.6, 0.8, 0.8])


def test_neighbours_are_found_by_their_index() -> None:
    made = engine("sp2ot", semantic_weight=2.0)
    first, second = torch.tensor([3, 9, 4, 20]), torch.tensor([7, 3, 1])
    made(views(4), first)
    labels = made(views(3, 1), second)
    joint = torch.cat([first, second])
    z = torch.cat([views(4)[1], views(3, 1)[1]])
    mass = mass_schedule(1, 10)
    expected = sp2ot_labels(z, sub_affinity(AFFINITY, joint), mass=mass, semantic_weight=2.0, **EXACT).labels
    assert_close(labels[1], expected[4:], rtol=1e-3, atol=1e-5)


# The state


def buffers(made: PseudoLabels) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in made.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_state_moves_in_training_alone() -> None:
    made = engine()
    made(views(5))
    before = buffers(made)
    labels = made.eval()(views(5, 1))
    assert same(before, buffers(made))
    assert torch.equal(made.train()(views(5, 1)), labels)
    assert not same(before, buffers(made))


def test_a_second_pass_sees_the_rows_of_the_first_and_leaves_the_state() -> None:
    made = engine(mass_start=0.5, mass_end=0.5)
    for seed in range(4):
        first = made(views(5, seed))
        before = buffers(made)
        with second_pass():
            assert_close(made(views(5, seed)), first, rtol=1e-4, atol=1e-6)
        assert same(before, buffers(made))


def test_logits_that_are_not_finite_leave_the_state() -> None:
    made = engine()
    made(views(5))
    before, broken = buffers(made), views(5, 1)
    broken[0, 2, 1] = torch.nan
    assert bool(made(broken)[0].isnan().any())
    assert same(before, buffers(made))


@pytest.mark.parametrize("kind", ["p2ot", "sp2ot"])
def test_it_goes_on_exactly_from_its_state(kind: str) -> None:
    made, other = engine(kind), engine(kind)
    for seed in range(5):
        made(views(5, seed), torch.arange(5) + seed)
    other.load_state_dict(copy.deepcopy(made.state_dict()))
    for seed in range(5, 8):
        index = torch.arange(5) + seed
        assert torch.equal(made(views(5, seed), index), other(views(5, seed), index))


def test_buffers_keep_their_precision() -> None:
    made = engine().bfloat16()
    assert (made.bank.dtype, made.scaling.dtype) == (torch.float32, torch.float64)
    assert made(views(5).bfloat16()).dtype == torch.float32


# The loss


def test_each_view_learns_the_labels_of_the_other() -> None:
    z1, z2 = views(6).double().requires_grad_()
    q1, q2 = torch.rand(2, 6, K, dtype=torch.float64)
    rows = two_view_label_loss(z1, z2, q1, q2, reduction="none")
    assert_close(rows, -(q2 * z1.log_softmax(1) + q1 * z2.log_softmax(1)).sum(1))
    assert_close(two_view_label_loss(z1, z2, q1, q2), rows.mean())
    (grad,) = torch.autograd.grad(rows.sum(), z1)
    assert_close(grad, q2.sum(1, keepdim=True) * z1.softmax(1) - q2)  # a row counts by its mass


def test_weights_and_masks_act_on_rows() -> None:
    (z1, z2), (q1, q2) = views(6), torch.rand(2, 6, K)
    rows = two_view_label_loss(z1, z2, q1, q2, reduction="none")
    weight, mask = torch.rand(6), torch.tensor([True, False, True, True, False, True])
    assert_close(two_view_label_loss(z1, z2, q1, q2, weight=weight, mask=mask), (weight * rows)[mask].sum() / 4)
    none = two_view_label_loss(z1.requires_grad_(), z2, q1, q2, mask=torch.zeros(6, dtype=torch.bool))
    assert float(none.detach()) == 0
    assert none.requires_grad


def test_a_masked_cluster_without_label_costs_nothing() -> None:
    z1, z2 = views(6).clone()
    z1[:, 0] = -torch.inf
    q = torch.rand(6, K)
    q[:, 0] = 0
    z1.requires_grad_()
    loss = two_view_label_loss(z1, z2, q, q)
    (grad,) = torch.autograd.grad(loss, z1)
    assert bool(loss.isfinite())
    assert bool(grad.isfinite().all())


def test_labels_get_no_gradient() -> None:
    (z1, z2), q = views(6), torch.rand(6, K, requires_grad=True)
    assert not two_view_label_loss(z1, z2, q, q).requires_grad


def test_the_loss_compiles_in_one_graph() -> None:
    (z1, z2), (q1, q2) = views(6), torch.rand(2, 6, K)
    compiled = torch.compile(two_view_label_loss, fullgraph=True, backend="aot_eager")
    assert_close(compiled(z1, z2, q1, q2), two_view_label_loss(z1, z2, q1, q2))


# Refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "p2t"}, "kind is 'p2t', expected one of .* did you mean 'p2ot'"),
        ({"num_clusters": 0}, "num_clusters is 0"),
        ({"bank_size": -1}, "bank_size is -1"),
        ({"bank_start": -1}, "bank_start is -1"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"mass_start": 0.0}, "start is 0.0"),
        ({"schedule": "cosine"}, "kind is 'cosine'"),
        ({"kind": "sp2ot", "momentum": 0.0}, "momentum is 0.0"),
        ({"prior": [1.0, 2.0]}, r"prior has shape \(2,\), expected \(4,\)"),
    ],
)
def test_settings_are_refused_when_it_is_made(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PseudoLabels(**{"num_clusters": K, **options})


def test_batches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits has shape \(2, 5, 3\), expected \(V, N, 4\)"):
        engine()(torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match="needs the index"):
        engine("sp2ot")(views(5))
    with pytest.raises(ValueError, match=r"affinity has shape \(3, 4\)"):
        engine("sp2ot").set_affinity(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="other has shape"):
        two_view_label_loss(torch.zeros(3, 2), torch.zeros(2, 2), torch.zeros(3, 2), torch.zeros(3, 2))


# Several ranks


def run_split(rank: int, kind: str, splits: list[tuple[int, ...]]) -> tuple[list[Tensor], dict[str, Tensor]]:
    made, found = engine(kind), []
    for seed, split in enumerate(splits):
        start, total = sum(split[:rank]), sum(split)
        rows = slice(start, start + split[rank])
        found.append(made(views(total, seed)[:, rows], (torch.arange(total) + seed)[rows]))
    return found, buffers(made)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "splits", [[(3, 3), (0, 7), (6, 1), (3, 3)], [(2, 2, 2), (3, 0, 4), (1, 5, 1), (2, 2, 2)]], ids=["two", "three"]
)
def test_ranks_label_as_one_process_does(kind: str, splits: list[tuple[int, ...]], pools: dict[int, Pool]) -> None:
    expected, state = run_split(0, kind, [(sum(split),) for split in splits])
    parts = pools[len(splits[0])].run(run_split, kind, splits)
    for step, labels in enumerate(expected):
        assert_close(torch.cat([found[step] for found, _ in parts], 1), labels)
    for _, held in parts:
        assert all(torch.equal(held[name], state[name]) for name in state)
