"""SigLIP: pair by pair as the reference, blocks, the learned scale and bias, tiles, limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, normalize
from torch.testing import assert_close

from counterpoise.contrastive import MemoryBank, SigLIPLoss, siglip_loss
from tests.pool import Pool

N = 6
LABELS = torch.tensor([0, 1, 0, 2, 1, 0])


def pairs(n: int = N, width: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    first, second = torch.randn(2, n, width, dtype=torch.float64, generator=generator)
    return first, second


def by_pairs(z: Tensor, other: Tensor, positive: Tensor, scale: float, bias: float) -> Tensor:
    """Binary cross-entropies of all pairs, summed over each row, (N,)."""
    logits = scale * normalize(z, dim=1) @ normalize(other, dim=1).T + bias
    return binary_cross_entropy_with_logits(logits, positive.double(), reduction="none").sum(1)


def test_it_is_the_binary_cross_entropy_of_every_pair() -> None:
    expected = by_pairs(*pairs(), torch.eye(N), 3.0, -1.0)
    assert_close(siglip_loss(*pairs(), scale=3.0, bias=-1.0, reduction="none"), expected)
    assert_close(siglip_loss(*pairs(), scale=3.0, bias=-1.0), expected.sum() / N)


def test_with_labels_pairs_of_one_class_are_positives() -> None:
    expected = by_pairs(*pairs(), LABELS[:, None] == LABELS, 3.0, -1.0)
    assert_close(siglip_loss(*pairs(), labels=LABELS, scale=3.0, bias=-1.0, reduction="none"), expected)
    unknown = torch.full((N,), -1)
    assert_close(siglip_loss(*pairs(), labels=unknown), siglip_loss(*pairs()))


def test_blocks_make_up_the_whole() -> None:
    """Two halves: a block with positives each, and one of unrelated pairs each."""
    (z, other), half = pairs(8), slice(4)
    rest = slice(4, None)
    with_positives = [siglip_loss(z[part], other[part], reduction="sum") for part in (half, rest)]
    unrelated = [
        siglip_loss(z[a], other[b], negative_only=True, reduction="sum") for a, b in ((half, rest), (rest, half))
    ]
    assert_close(sum(with_positives) + sum(unrelated), siglip_loss(z, other, reduction="sum"))


def test_unrelated_pairs_have_no_positive_whatever_their_labels() -> None:
    expected = by_pairs(*pairs(), torch.zeros(N, N), 10.0, -10.0)
    for labels in (None, LABELS):
        ours = siglip_loss(*pairs(), labels=labels, negative_only=True, reduction="none")
        assert_close(ours, expected)


def test_swapping_the_modalities_leaves_the_mean() -> None:
    z, other = pairs()
    assert_close(siglip_loss(other, z), siglip_loss(z, other))


def test_orthogonal_pairs_at_the_start_cost_what_the_bias_says() -> None:
    eye = torch.eye(N, dtype=torch.float64)
    softplus = [math.log1p(math.exp(-10)), math.log(2)]  # of a negative at -10, of a positive at 10 - 10
    assert math.isclose(siglip_loss(eye, eye).item(), (N - 1) * softplus[0] + softplus[1], rel_tol=1e-12)


def test_large_logits_keep_their_digits() -> None:
    """A positive pair at a logit of 90 costs exp(-90) and not a difference of two nineties."""
    eye = torch.eye(1, 3)
    assert math.isclose(siglip_loss(eye, eye, scale=100.0).item(), math.exp(-90), rel_tol=1e-5)


@pytest.mark.parametrize("tile_elements", [1, N, 2 * N, 4 * N + 1])
@pytest.mark.parametrize("labels", [None, LABELS], ids=["pairs", "labels"])
def test_tiles_equal_the_whole_in_value_and_gradient(labels: Tensor | None, tile_elements: int) -> None:
    def outcome(**options: Any) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (*pairs(), torch.tensor(10.0), torch.tensor(-10.0))]
        z, other, scale, bias = leaves
        rows = siglip_loss(z, other, labels=labels, scale=scale, bias=bias, reduction="none", **options)
        return [rows, *torch.autograd.grad(rows.sum(), leaves)]

    assert_close(outcome(tile_elements=tile_elements), outcome())


@pytest.mark.parametrize("labels", [None, LABELS], ids=["pairs", "labels"])
def test_a_masked_example_is_neither_row_nor_column(labels: Tensor | None) -> None:
    mask = torch.tensor([True, False, True, True, False, True])
    z, other = pairs()
    dropped = siglip_loss(z[mask], other[mask], labels=None if labels is None else labels[mask], reduction="none")
    z[~mask], other[~mask] = torch.nan, torch.nan
    rows = siglip_loss(z, other, labels=labels, mask=mask, reduction="none")
    assert_close(rows[mask], dropped)
    assert (rows[~mask] == 0).all()


def test_scale_and_bias_start_at_ten_and_minus_ten_and_learn() -> None:
    loss = SigLIPLoss()
    assert_close(loss(*pairs()), siglip_loss(*pairs()), rtol=1e-6, atol=0)
    assert [name for name, _ in loss.named_parameters()] == list(loss.no_weight_decay)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.01)
    before = loss(*pairs())
    before.backward()
    optimizer.step()
    assert loss(*pairs()) < before


def test_scale_and_bias_keep_their_precision_in_half_modules() -> None:
    loss = SigLIPLoss(scale=7.0, bias=-1 / 3)
    for module in (loss.half(), loss.bfloat16()):
        assert module.logit_bias.item() == torch.tensor(-1 / 3).item()
        assert module.logit_scale.dtype == torch.float32


def one_rank(rank: int, split: tuple[int, ...], by_label: bool) -> float:
    z, other = pairs(9)
    rows = slice(sum(split[:rank]), sum(split[: rank + 1]))
    return siglip_loss(z[rows], other[rows], labels=torch.arange(9)[rows] % 4 if by_label else None).item()


@pytest.mark.parametrize("by_label", [False, True])
def test_ranks_equal_one_process(by_label: bool, ranks: Pool) -> None:
    found = ranks.run(one_rank, (4, 3, 2), by_label)
    assert sum(found) / 3 == pytest.approx(one_rank(0, (9,), by_label), rel=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: siglip_loss(pairs()[0]), r"other is None, expected the second modality's embeddings \(6, 4\)"),
        (lambda: siglip_loss(*pairs(), scale=0.0), r"scale is 0.0, expected a number in \(0, inf\]"),
        (lambda: SigLIPLoss(scale=-1.0), r"scale is -1.0, expected a number in \(0, inf\]"),
        (lambda: SigLIPLoss()(*pairs(), bank=MemoryBank(4, 4)), r"SigLIPLoss got a bank, expected two modalities"),
    ],
    ids=["one", "scale", "module scale", "bank"],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
