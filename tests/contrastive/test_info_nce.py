"""The one InfoNCE against a double loop: rules, weights, further candidates, temperatures, tiles."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.testing import assert_close

from counterpoise.contrastive.info_nce import InfoNCE, info_nce, not_self, same_label

ROWS, KEYS, WIDTH = 6, 9, 4


def inputs() -> dict[str, Tensor]:
    """Queries that are the first six of nine keys, in three classes; the last key is of a class of its own."""
    generator = torch.Generator().manual_seed(0)
    keys = normalize(torch.randn(KEYS, WIDTH, dtype=torch.float64, generator=generator), dim=1)
    labels = torch.tensor([0, 1, 2, 0, 1, 3, 0, 1, 4])
    ids = torch.stack([torch.arange(KEYS), labels], dim=1)
    return {"queries": keys[:ROWS].clone(), "keys": keys, "query_ids": ids[:ROWS], "key_ids": ids}


def by_loops(
    queries: Tensor,
    keys: Tensor,
    positive: Tensor,
    candidate: Tensor,
    temperature: list[float],
    key_log_weight: Tensor | None = None,
    extra_logits: Tensor | None = None,
) -> list[float]:
    """The formula entry by entry; positive and candidate (N, M), a row without positives is 0."""
    losses = []
    for i in range(len(queries)):
        s = [float(queries[i] @ keys[j]) / temperature[i] for j in range(len(keys))]
        a = [0.0] * len(keys) if key_log_weight is None else key_log_weight.tolist()
        terms = [math.exp(s[j] + a[j]) for j in range(len(keys)) if candidate[i, j]]
        if extra_logits is not None:
            terms += [math.exp(x) for x in extra_logits[i].tolist()]
        t = [float(positive[i, j]) * (a[j] > -math.inf) for j in range(len(keys))]
        mass = sum(t)
        losses.append(-sum(t[j] / mass * (s[j] - math.log(sum(terms))) for j in range(len(keys))) if mass else 0.0)
    return losses


def rules(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return same_label(x["query_ids"], x["key_ids"]), not_self(x["query_ids"], x["key_ids"])


def test_every_row_is_the_printed_formula() -> None:
    x = inputs()
    expected = by_loops(x["queries"], x["keys"], *rules(x), [0.3] * ROWS)
    assert_close(info_nce(**x, temperature=0.3).loss.tolist(), expected)


def test_one_positive_a_row_is_cross_entropy_of_the_similarities() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(5, WIDTH, dtype=torch.float64, generator=generator) for _ in range(2))
    ids = torch.stack([torch.arange(5), torch.arange(5)], dim=1)
    result = info_nce(q, k, query_ids=ids, key_ids=ids + torch.tensor([100, 0]), candidate=not_self, temperature=0.2)
    assert_close(result.loss, cross_entropy(q @ k.T / 0.2, torch.arange(5), reduction="none"))


def test_log_sum_exp_and_positive_log_probability_make_up_the_loss() -> None:
    x = inputs()
    result = info_nce(**x, temperature=0.5)
    positive, _ = rules(x)
    mean_similarity = (positive * (x["queries"] @ x["keys"].T)).sum(1) / positive.sum(1).clamp_min(1) / 0.5
    has = result.valid
    assert_close(result.loss[has], (result.log_sum_exp - mean_similarity)[has])
    assert torch.equal(result.loss, -result.positive_log_prob)


def test_a_row_without_positives_is_zero_and_not_valid() -> None:
    x = inputs()
    x["queries"].requires_grad_()
    result = info_nce(**x)
    assert result.valid.tolist() == [True, True, False, True, True, False]
    assert result.loss[2] == result.loss[5] == 0
    (gradient,) = torch.autograd.grad(result.loss.sum(), x["queries"])
    assert (gradient[2] == 0).all()
    assert gradient.isfinite().all()


def test_an_unknown_label_is_nobodys_positive() -> None:
    x = inputs()
    x["key_ids"][:, 1] = -1
    x["query_ids"][:, 1] = -1
    assert not info_nce(**x).valid.any()


def test_positive_probabilities_are_normalised_over_the_keys() -> None:
    x = inputs()
    t = torch.rand(ROWS, KEYS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    _, candidate = rules(x)
    t = t * candidate
    result = info_nce(**x, positive=lambda q, k: t, temperature=0.4)
    assert_close(result.loss.tolist(), by_loops(x["queries"], x["keys"], t, candidate, [0.4] * ROWS))
    assert_close(info_nce(**x, positive=lambda q, k: 7 * t, temperature=0.4).loss, result.loss)


def test_key_weights_multiply_the_terms_of_the_sum() -> None:
    x = inputs()
    w = torch.randn(KEYS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = by_loops(x["queries"], x["keys"], *rules(x), [0.5] * ROWS, key_log_weight=w)
    assert_close(info_nce(**x, key_log_weight=w, temperature=0.5).loss.tolist(), expected)


def test_a_key_of_weight_zero_is_as_good_as_absent() -> None:
    x = inputs()
    w = torch.zeros(KEYS, dtype=torch.float64)
    w[[3, 8]] = -torch.inf
    kept = w > -torch.inf
    without = {**x, "keys": x["keys"][kept], "key_ids": x["key_ids"][kept]}
    left, right = info_nce(**x, key_log_weight=w), info_nce(**without)
    assert_close(left.loss, right.loss)
    assert torch.equal(left.valid, right.valid)


def test_a_doubled_key_is_a_key_of_weight_two_to_the_sum() -> None:
    x = inputs()
    w = torch.zeros(KEYS, dtype=torch.float64)
    w[8] = math.log(2)  # nobody's positive
    doubled = {
        **x,
        "keys": torch.cat([x["keys"], x["keys"][8:]]),
        "key_ids": torch.cat([x["key_ids"], x["key_ids"][8:]]),
    }
    assert_close(info_nce(**x, key_log_weight=w).loss, info_nce(**doubled).loss)


def test_extra_logits_are_candidates_that_are_never_positive() -> None:
    x = inputs()
    extra = torch.randn(ROWS, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    expected = by_loops(x["queries"], x["keys"], *rules(x), [0.2] * ROWS, extra_logits=extra)
    assert_close(info_nce(**x, extra_logits=extra, temperature=0.2).loss.tolist(), expected)


def test_row_weight_multiplies_the_loss_alone() -> None:
    x = inputs()
    w = torch.arange(ROWS, dtype=torch.float64)
    plain, weighted = info_nce(**x), info_nce(**x, row_weight=w)
    assert_close(weighted.loss, w * plain.loss)
    assert torch.equal(weighted.positive_log_prob, plain.positive_log_prob)


# Temperature


def test_a_temperature_that_is_a_parameter_gets_its_gradient() -> None:
    x = inputs()
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(info_nce(**x, temperature=tau).loss.sum(), tau)
    step = 1e-6
    above, below = (info_nce(**x, temperature=0.3 + s).loss.sum() for s in (step, -step))
    assert_close(gradient, (above - below) / (2 * step), rtol=1e-6, atol=0)


def test_temperatures_may_differ_from_row_to_row() -> None:
    x = inputs()
    tau = torch.tensor([0.1, 0.2, 0.3, 0.5, 1.0, 2.0], dtype=torch.float64)
    expected = by_loops(x["queries"], x["keys"], *rules(x), tau.tolist())
    assert_close(info_nce(**x, temperature=tau).loss.tolist(), expected)


def test_a_high_temperature_tends_to_the_log_of_the_number_of_candidates() -> None:
    result = info_nce(**inputs(), temperature=1e9)
    assert_close(result.loss[result.valid], torch.full((4,), math.log(KEYS - 1), dtype=torch.float64))


# Tiles


@pytest.mark.parametrize("tile_elements", [1, KEYS, 2 * KEYS, 4 * KEYS + 1, 10**6])
def test_tiles_equal_the_whole_in_value_and_gradient(tile_elements: int) -> None:
    x = inputs()
    leaves = {
        "queries": x["queries"],
        "keys": x["keys"],
        "key_log_weight": torch.linspace(-1, 1, KEYS, dtype=torch.float64),
        "extra_logits": torch.linspace(-1, 2, 2 * ROWS, dtype=torch.float64).reshape(ROWS, 2),
        "temperature": torch.linspace(0.1, 1, ROWS, dtype=torch.float64),
        "row_weight": torch.linspace(0, 2, ROWS, dtype=torch.float64),
    }
    ids = {"query_ids": x["query_ids"], "key_ids": x["key_ids"]}

    def outcome(**options: Any) -> tuple[InfoNCE, tuple[Tensor, ...]]:
        own = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
        result = info_nce(**own, **ids, **options)
        scalar = result.loss.sum() + result.log_sum_exp.cos().sum()
        return result, torch.autograd.grad(scalar, list(own.values()))

    (whole, gradients), (tiled, tiled_gradients) = outcome(), outcome(tile_elements=tile_elements)
    assert_close(tuple(tiled), tuple(whole))
    assert_close(tiled_gradients, gradients)


def test_rules_see_a_tile_of_queries_and_all_keys() -> None:
    shapes = []

    def rule(query_ids: Tensor, key_ids: Tensor) -> Tensor:
        shapes.append((len(query_ids), len(key_ids)))
        return same_label(query_ids, key_ids)

    info_nce(**inputs(), positive=rule, tile_elements=4 * KEYS)
    assert shapes == [(4, KEYS), (2, KEYS)]


def test_no_query_gives_no_row() -> None:
    x = inputs()
    result = info_nce(x["queries"][:0], x["keys"], query_ids=x["query_ids"][:0], key_ids=x["key_ids"])
    assert result.loss.shape == (0,)


# Positives by index, the row itself, and the fused path


def by_index(x: dict[str, Tensor]) -> Tensor:
    """Two positives a row, of which the rules know nothing."""
    return torch.tensor([[1, 6], [4, 7], [3, 8], [6, 0], [1, 7], [0, 8]])


def test_positives_may_be_given_by_index() -> None:
    x = inputs()
    index = by_index(x)
    t = torch.zeros(ROWS, KEYS, dtype=torch.bool).scatter(1, index, True)
    weights = torch.zeros(KEYS, dtype=torch.float64)
    weights[7] = -torch.inf
    for w in (None, weights):
        given = info_nce(**x, positive=index, key_log_weight=w, temperature=0.3)
        ruled = info_nce(**x, positive=lambda q, k: t, key_log_weight=w, temperature=0.3)
        assert_close(tuple(given), tuple(ruled))
        tiled = info_nce(**x, positive=index, key_log_weight=w, temperature=0.3, tile_elements=2 * KEYS)
        assert_close(tuple(tiled), tuple(given))


def test_the_row_itself_is_no_candidate_with_or_without_a_mask() -> None:
    x = inputs()
    itself = info_nce(**x, candidate=None, itself=torch.arange(ROWS))
    assert_close(tuple(itself), tuple(info_nce(**x)))
    assert info_nce(**x, candidate=None).loss[0] > itself.loss[0]


def test_the_log_sum_exp_does_not_need_a_positive() -> None:
    x = inputs()
    none = torch.zeros(ROWS, 0, dtype=torch.int64)
    result = info_nce(**x, positive=none, candidate=None, temperature=0.3)
    assert_close(result.log_sum_exp, (x["queries"] @ x["keys"].T / 0.3).logsumexp(1))
    assert not result.valid.any()


def test_a_row_without_a_candidate_has_a_log_sum_exp_of_minus_infinity_and_no_gradient() -> None:
    x = inputs()
    x["queries"].requires_grad_()
    gone = torch.full((KEYS,), -torch.inf, dtype=torch.float64)
    result = info_nce(**x, key_log_weight=gone)
    assert (result.log_sum_exp == -torch.inf).all()
    (gradient,) = torch.autograd.grad(result.loss.sum(), x["queries"])
    assert torch.equal(gradient, torch.zeros_like(gradient))


SUMS: dict[str, dict[str, Any]] = {
    "rules": {},
    "itself": {"candidate": None, "itself": torch.arange(ROWS)},
    "weights": {"key_log_weight": torch.linspace(-1, 1, KEYS, dtype=torch.float64)},
    "a key gone": {"key_log_weight": torch.tensor([0.0, 0, 0, -torch.inf, 0, 0, 0, 0, 0], dtype=torch.float64)},
    "soft": {"positive": lambda q, k: same_label(q, k) * torch.linspace(0.1, 1, KEYS, dtype=torch.float64)},
}


@pytest.mark.parametrize("options", SUMS.values(), ids=SUMS)
def test_the_fused_path_equals_the_plain_one_in_value_and_gradients(options: dict[str, Any]) -> None:
    """Further logits of -inf change nothing, and take the plain path."""
    x = inputs()

    def outcome(q: Tensor, k: Tensor, plain: bool) -> Tensor:
        extra = torch.full((ROWS, 1), -torch.inf, dtype=torch.float64) if plain else None
        result = info_nce(q, k, query_ids=x["query_ids"], key_ids=x["key_ids"], extra_logits=extra, **options)
        return result.loss.sum() + result.log_sum_exp.cos().sum()

    def derivatives(plain: bool) -> list[Tensor]:
        leaves = [x[name].clone().requires_grad_() for name in ("queries", "keys")]
        value = outcome(*leaves, plain)
        first = torch.autograd.grad(value, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)
        once = torch.autograd.grad(outcome(*leaves, plain), leaves)
        return [value, *first, *second, *once]

    assert_close(derivatives(False), derivatives(True))


@pytest.mark.parametrize("options", SUMS.values(), ids=SUMS)
def test_the_gradient_of_the_fused_path_agrees_with_finite_differences(options: dict[str, Any]) -> None:
    x = inputs()

    def losses(q: Tensor, k: Tensor) -> Tensor:
        return info_nce(q, k, query_ids=x["query_ids"], key_ids=x["key_ids"], temperature=0.5, **options).loss

    assert torch.autograd.gradcheck(losses, [x[name].requires_grad_() for name in ("queries", "keys")])


def test_the_fused_path_keeps_one_table_of_similarities() -> None:
    x = inputs()
    kept = []

    def pack(saved: Tensor) -> Tensor:
        if saved.shape == (ROWS, KEYS) and saved.is_floating_point():
            kept.append(saved)
        return saved

    x["queries"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        info_nce(**x)
    assert len(kept) == 1
