"""CACR in its three forms: loops as the reference, limits of the weights, masks, banks, ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.testing import assert_close

from counterpoise._core import second_pass
from counterpoise.contrastive import CACRLoss, MemoryBank, _cacr, cacr_loss
from tests.pool import Pool

NONE = {"attraction_sharpness": 0.0, "repulsion_sharpness": 0.0}
ATTRACTION, REPULSION = {"repulsion_weight": 0.0}, {"attraction_weight": 0.0}


def views(count: int = 2, n: int = 5, width: int = 4, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(10 * seed + count)
    return torch.randn(count, n, width, dtype=torch.float64, generator=g)


def bank_of(keys: Tensor, *, size: int | None = None) -> MemoryBank:
    bank = MemoryBank(size or len(keys), keys.shape[1], dtype=keys.dtype)
    bank.enqueue(keys)
    return bank


def distance(a: Tensor, b: Tensor) -> float:
    return float((a / a.norm() - b / b.norm()).square().sum())


def mean_under(costs: list[float], sharpness: float) -> float:
    """The mean of costs under weights exp(sharpness * cost)."""
    weights = [math.exp(sharpness * c) for c in costs]
    return sum(w * c for w, c in zip(weights, costs, strict=True)) / sum(weights)


# In the batch


def by_loops(z: Tensor, t_plus: float = 1.0, t_minus: float = 2.0, *, symmetric: bool = False) -> list[float]:
    """One value an anchor, in view-major order."""
    v, n, _ = z.shape
    pairs = v * (v - 1) / (1 if symmetric else 2)
    rows = []
    for a in range(v):
        for i in range(n):
            row = mean_under([distance(z[a, i], z[b, i]) for b in range(v) if b != a], t_plus)
            for b in range(v):
                if b > a or (symmetric and b != a):
                    apart = [distance(z[a, i], z[b, j]) for j in range(n) if j != i]
                    row -= v / pairs * mean_under(apart, -t_minus)
            rows.append(row)
    return rows


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_it_is_the_loop_over_anchors_positives_and_negatives(count: int, symmetric: bool) -> None:
    z = views(count)
    ours = cacr_loss(z, attraction_sharpness=1.5, repulsion_sharpness=0.7, symmetric=symmetric, reduction="none")
    assert_close(ours.tolist(), by_loops(z, 1.5, 0.7, symmetric=symmetric))


def test_the_mean_is_over_anchors() -> None:
    rows = cacr_loss(views(3), reduction="none")
    assert rows.shape == (15,)
    assert_close(cacr_loss(views(3)), rows.mean())


def test_two_views_given_apart_or_stacked_are_the_same() -> None:
    assert torch.equal(cacr_loss(*views()), cacr_loss(views()))


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 30.0])
def test_a_single_positive_has_all_the_weight(sharpness: float) -> None:
    first, second = views()
    expected = sum(distance(a, b) for a, b in zip(first, second, strict=True)) / 5
    assert_close(cacr_loss(first, second, attraction_sharpness=sharpness, **ATTRACTION).item(), expected)


@pytest.mark.parametrize("part", [ATTRACTION, REPULSION])
def test_sharpness_zero_is_the_plain_mean(part: dict[str, float]) -> None:
    z = normalize(views(3), dim=-1)
    if part is ATTRACTION:
        apart = torch.stack([(z[a] - z[b]).square().sum(-1) for a in range(3) for b in range(3) if a != b])
        expected = apart.mean()
    else:
        other = ~torch.eye(5, dtype=torch.bool)
        expected = -torch.stack([torch.cdist(z[a], z[b]).square()[other] for a in range(3) for b in range(a)]).mean()
    assert_close(cacr_loss(z, **part, **NONE), expected)


@pytest.mark.parametrize("part", [ATTRACTION, REPULSION])
@pytest.mark.parametrize("count", [3, 5])
def test_conditional_weights_never_cost_less_than_the_plain_mean(part: dict[str, float], count: int) -> None:
    """They go along with the summands: far positives and near negatives weigh more."""
    z = views(count)
    assert cacr_loss(z, **part) > cacr_loss(z, **part, **NONE)


def test_sharp_attraction_pulls_the_farthest_positive_alone() -> None:
    z = views(4)
    farthest = [max(distance(z[a, i], z[b, i]) for b in range(4) if b != a) for a in range(4) for i in range(5)]
    assert_close(cacr_loss(z, attraction_sharpness=1e4, **ATTRACTION).item(), sum(farthest) / 20)


def test_sharp_repulsion_pushes_the_nearest_negative_alone() -> None:
    first, second = views()
    nearest = [min(distance(first[i], second[j]) for j in range(5) if j != i) for i in range(5)]
    assert_close(cacr_loss(first, second, repulsion_sharpness=1e4, **REPULSION).item(), -sum(nearest) / 5)


def test_it_is_linear_in_both_weights() -> None:
    z = views(3)
    attraction, repulsion = cacr_loss(z, **ATTRACTION), cacr_loss(z, **REPULSION)
    assert_close(cacr_loss(z, attraction_weight=3.0, repulsion_weight=0.5), 3 * attraction + 0.5 * repulsion)


@pytest.mark.parametrize("seed", range(3))
def test_it_lies_between_minus_four_beta_and_four_alpha(seed: int) -> None:
    assert -2.0 <= cacr_loss(views(3, seed=seed), attraction_weight=0.0, repulsion_weight=0.5) <= 0
    assert 0 <= cacr_loss(views(3, seed=seed), repulsion_weight=0.0, attraction_weight=0.5) <= 2


def test_the_order_of_views_matters_only_for_one_sided_repulsion() -> None:
    z, order = views(3), torch.tensor([2, 0, 1])
    assert_close(cacr_loss(z[order], symmetric=True), cacr_loss(z, symmetric=True))
    assert cacr_loss(z[order]) != cacr_loss(z)
    assert_close(cacr_loss(z[order], **ATTRACTION), cacr_loss(z, **ATTRACTION))


def test_with_two_views_symmetric_is_the_mean_of_both_directions() -> None:
    first, second = views()
    both = (cacr_loss(first, second) + cacr_loss(second, first)) / 2
    assert_close(cacr_loss(first, second, symmetric=True), both)


@pytest.mark.parametrize("mode", ["in_batch", "queue", "cross_view"])
def test_equal_embeddings_cost_nothing_and_stay_where_they_are(mode: str) -> None:
    """A saddle: no force points anywhere."""
    z = views(1, n=1).expand(3, 4, 4).clone().requires_grad_()
    given = {"bank": bank_of(z[0].detach())} if mode == "queue" else {}
    loss = cacr_loss(z, None if mode == "in_batch" else z.detach(), mode=mode, **given)
    loss.backward()
    assert_close(loss.item(), 0.0, rtol=0, atol=1e-12)
    assert z.grad.abs().max() < 1e-12


def test_the_cosine_cost_is_half_the_distance() -> None:
    z, sharpness = views(3), {"attraction_sharpness": 2.0, "repulsion_sharpness": 4.0}
    half = cacr_loss(z, attraction_sharpness=1.0, repulsion_sharpness=2.0) / 2
    assert_close(cacr_loss(z, cost="cosine", **sharpness), half)


def test_lengths_do_not_matter_when_it_normalises() -> None:
    first, second = views()
    assert_close(cacr_loss(100 * first, 0.01 * second), cacr_loss(first, second))


def test_without_normalising_distances_are_those_of_the_rows() -> None:
    first, second = views()
    assert_close(cacr_loss(*normalize(views(), dim=-1), normalize=False), cacr_loss(first, second))
    expected = (first - second).square().sum(1).mean()
    assert_close(cacr_loss(first, second, normalize=False, **ATTRACTION), expected)
    other = ~torch.eye(5, dtype=torch.bool)
    apart = torch.cdist(first, second).square()[other].mean()
    assert_close(cacr_loss(first, second, normalize=False, repulsion_sharpness=0.0, **REPULSION), -apart)


def test_the_debiased_repulsion_is_as_released() -> None:
    first, second = views()
    repelled = cacr_loss(first, second, repulsion_weight=3.0, **REPULSION)
    own = cacr_loss(first, second, **ATTRACTION)
    ours = cacr_loss(first, second, repulsion_weight=3.0, positive_prior=0.1, **REPULSION)
    assert_close(ours, (repelled - 0.1 * own) / 0.9)


def test_weight_gradient_none_holds_the_weights() -> None:
    z = views().requires_grad_()
    first, second = normalize(z, dim=-1)
    cost = torch.cdist(first, second).square()
    weights = (-2 * cost.detach()).masked_fill(torch.eye(5, dtype=torch.bool), -torch.inf).softmax(1)
    expected = (first - second).square().sum(1).mean() - (weights * cost).sum(1).mean()
    held, full = cacr_loss(z, weight_gradient="none"), cacr_loss(z)
    assert_close(held, full)
    (of_held,) = torch.autograd.grad(held, z)
    assert_close(of_held, torch.autograd.grad(expected, z)[0])
    assert not torch.allclose(of_held, torch.autograd.grad(full, z)[0])


# The kernel


def test_rbf_is_the_log_of_the_mean_kernel_of_the_batch() -> None:
    z = normalize(views(3), dim=-1)
    values = []
    for a in range(3):
        for b in range(a + 1, 3):
            total = 0.0
            for i in range(5):
                apart = [distance(z[a, i], z[b, j]) for j in range(5) if j != i]
                weights = [math.exp(-0.7 * c) for c in apart]
                total += sum(w * math.exp(-1.5 * c) for w, c in zip(weights, apart, strict=True)) / sum(weights) / 5
            values.append(math.log(total))
    ours = cacr_loss(z, cost="rbf", kernel_sharpness=1.5, repulsion_sharpness=0.7, repulsion_weight=2.0)
    assert_close(ours - cacr_loss(z, **ATTRACTION), torch.tensor(2 * sum(values) / 3, dtype=torch.float64))


def test_rbf_has_no_value_per_anchor() -> None:
    with pytest.raises(ValueError, match=r'reduction is "none", expected "mean" or "sum"'):
        cacr_loss(views(), cost="rbf", reduction="none")
    assert not CACRLoss(cost="rbf").spec.per_row
    assert CACRLoss().spec.per_row


def test_the_mean_kernel_of_rbf_is_weighted() -> None:
    """An example of weight 0 repels nobody but is still repelled: it is a key, and no anchor."""
    z = views(2, n=4)
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    settings = {"cost": "rbf", "normalizer": "weight", "repulsion_sharpness": 0.0}
    first, second = normalize(z, dim=-1)
    kernel = (-2 * torch.cdist(first, second).square()).exp()
    means = kernel.masked_fill(torch.eye(4, dtype=torch.bool), 0).sum(1) / 3
    assert_close(cacr_loss(z, weight=weight, **settings, **REPULSION), means[weight > 0].mean().log())


# Beside a queue


def queue_by_loops(
    q: Tensor, k: Tensor, bank: Tensor, t_plus: float, t_minus: float, *, intra_batch: bool
) -> list[float]:
    v, n, _ = q.shape
    rows = []
    for a in range(v):
        for i in range(n):
            pull = mean_under([distance(q[a, i], k[b, i]) for b in range(v) if b != a], t_plus)
            apart = [distance(q[a, i], key) for key in bank]
            apart += [distance(q[a, i], q[a, j]) for j in range(n) if j != i and intra_batch]
            rows.append(pull - mean_under(apart, -t_minus))
    return rows


@pytest.mark.parametrize("intra_batch", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_beside_a_queue_it_is_the_loop_over_its_keys(count: int, intra_batch: bool) -> None:
    """Each view is compared with the queue by itself; in the release all had the first view's distances."""
    q, k, keys = views(count), views(count, seed=1), views(1, n=7)[0]
    ours = cacr_loss(
        q, k, bank=bank_of(keys), mode="queue", repulsion_sharpness=0.7, intra_batch=intra_batch, reduction="none"
    )
    assert_close(ours.tolist(), queue_by_loops(q, k, keys, 1.0, 0.7, intra_batch=intra_batch))


def test_beside_a_queue_two_tensors_are_a_query_and_its_one_key() -> None:
    (q, k), keys = views(), views(1, n=7)[0]
    ours = cacr_loss(q, k, bank=bank_of(keys), mode="queue", intra_batch=False, reduction="none")
    expected = [
        distance(a, b) - mean_under([distance(a, key) for key in keys], -2.0) for a, b in zip(q, k, strict=True)
    ]
    assert_close(ours.tolist(), expected)


def test_slots_never_filled_do_not_repel() -> None:
    (q, k), keys = views(), views(1, n=7)[0]
    half, full = bank_of(keys, size=20), bank_of(keys)
    assert_close(cacr_loss(q, k, bank=half, mode="queue"), cacr_loss(q, k, bank=full, mode="queue"))


def test_beside_an_empty_bank_there_is_attraction_alone() -> None:
    q, k = views().requires_grad_()
    loss = cacr_loss(q, k, bank=MemoryBank(8, 4), mode="queue", intra_batch=False)
    assert_close(loss, cacr_loss(q, k, bank=MemoryBank(8, 4), mode="queue", **ATTRACTION))
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(loss, [q]))


def test_a_gradient_reaches_the_queries_and_never_the_keys() -> None:
    for mode in ("queue", "cross_view"):
        q, k = views().requires_grad_(), views(seed=1).requires_grad_()
        given = {"bank": bank_of(views(1)[0])} if mode == "queue" else {}
        cacr_loss(q, k, mode=mode, **given).backward()
        assert q.grad.norm() > 0
        assert k.grad is None


def test_the_bank_is_only_read_in_training_in_eval_and_in_a_second_pass() -> None:
    (q, k), bank = views(), bank_of(views(1, n=7)[0], size=9)
    before = {name: buffer.clone() for name, buffer in bank.state_dict().items()}
    loss = CACRLoss(mode="queue")
    trained = loss(q, k, bank=bank)
    with second_pass():
        assert torch.equal(loss(q, k, bank=bank), trained)
    assert torch.equal(loss.eval()(q, k, bank=bank.eval()), trained)
    assert all(torch.equal(buffer, before[name]) for name, buffer in bank.state_dict().items())


def test_keys_may_be_enqueued_between_the_loss_and_its_gradient() -> None:
    q, k = views().requires_grad_()
    bank = bank_of(views(1)[0])
    for intra_batch in (False, True):
        loss = cacr_loss(q, k, bank=bank, mode="queue", intra_batch=intra_batch)
        bank.enqueue(k.detach())
        torch.autograd.grad(loss, q)


@pytest.mark.parametrize("through", ["none", "intra_batch", "full"])
def test_beside_a_queue_the_gradient_flows_through_chosen_weights(through: str) -> None:
    (q, k), keys = views().requires_grad_(), normalize(views(1, n=7)[0], dim=1)
    loss = cacr_loss(q, k, bank=bank_of(keys), mode="queue", weight_gradient=through)
    z = normalize(q, dim=1)
    cost = torch.cat([2 - 2 * z @ keys.T, 2 - 2 * z @ z.T], 1)
    own = torch.cat([torch.zeros(5, 7, dtype=torch.bool), torch.eye(5, dtype=torch.bool)], 1)
    passed = {
        "none": cost.detach(),
        "intra_batch": torch.cat([cost[:, :7].detach(), cost[:, 7:]], 1),
        "full": cost,
    }[through]
    weights = (-2 * passed).masked_fill(own, -torch.inf).softmax(1)
    pull = (z - normalize(k, dim=1).detach()).square().sum(1)
    expected = (pull - (weights * cost).sum(1)).mean()
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, q), torch.autograd.grad(expected, q))


# Across views


def cross_view_by_loops(q: Tensor, k: Tensor, t_plus: float, t_minus: float) -> list[float]:
    """Keys of the first views; one value a key."""
    rows = []
    for u in range(len(k)):
        for i in range(k.shape[1]):
            met = [v for v in range(len(q)) if v != u]
            own = [distance(q[v, i], k[u, i]) for v in met]
            apart = [[distance(q[v, i], k[u, j]) for j in range(k.shape[1]) if j != i] for v in met]
            forces = [c - mean_under(a, -t_minus) for c, a in zip(own, apart, strict=True)]
            weights = [math.exp(t_plus * c) for c in own]
            rows.append(sum(w * f for w, f in zip(weights, forces, strict=True)) / sum(weights))
    return rows


@pytest.mark.parametrize("keys", [1, 2, 3, 4])
def test_across_views_it_is_the_loop_over_keys_and_the_queries_of_other_views(keys: int) -> None:
    q, k = views(4), views(4, seed=1)[:keys]
    ours = cacr_loss(q, k, mode="cross_view", repulsion_sharpness=0.7, reduction="none")
    assert ours.shape == (keys * 5,)
    assert_close(ours.tolist(), cross_view_by_loops(q, k, 1.0, 0.7))


def test_across_views_one_key_meets_all_queries() -> None:
    """As the key of a fourth view would."""
    q, k = views(4), views(4, seed=1)
    ours = cacr_loss(q[:3], k[3], mode="cross_view", reduction="none")
    assert_close(ours, cacr_loss(q, k, mode="cross_view", reduction="none")[-5:])


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_across_views_rbf_with_one_query_is_twice_the_temperature_times_cross_entropy(temperature: float) -> None:
    q, k = normalize(views(), dim=-1)
    rows = 2 * temperature * cross_entropy(q @ k.T / temperature, torch.arange(5), reduction="none")
    ours = cacr_loss(
        q,
        k,
        mode="cross_view",
        cost="rbf",
        attraction_sharpness=1 / temperature,
        repulsion_sharpness=0.5 / temperature,
        reduction="none",
    )
    assert_close(ours, rows)


def test_across_views_queries_are_weighted_by_how_far_they_are() -> None:
    """As released, for two queries at temperature 0.5."""
    q, k = normalize(views(2), dim=-1), normalize(views(1), dim=-1)[0]
    p = (torch.stack([(view - k).square().sum(1) for view in q]) / 0.5).softmax(0)
    costs = torch.stack([cross_entropy(view @ k.T / 0.5, torch.arange(5), reduction="none") for view in q])
    ours = cacr_loss(
        q, k, mode="cross_view", cost="rbf", attraction_sharpness=2.0, repulsion_sharpness=1.0, reduction="none"
    )
    assert_close(ours, (2 * 0.5 * p * costs).sum(0))


def test_across_views_weights_hold_still_unless_told_otherwise() -> None:
    q, k = views(3).requires_grad_(), views(1)[0]
    still, full = (cacr_loss(q, k, mode="cross_view", weight_gradient=x) for x in (None, "full"))
    assert_close(still, full)
    assert not torch.allclose(torch.autograd.grad(still, q)[0], torch.autograd.grad(full, q)[0])


# What all forms share

FORMS: dict[str, dict[str, Any]] = {
    "in_batch": {},
    "symmetric": {"symmetric": True, "weight_gradient": "none"},
    "rbf": {"cost": "rbf"},
    "debiased": {"positive_prior": 0.1},
    "queue": {"mode": "queue"},
    "queue alone": {"mode": "queue", "intra_batch": False, "weight_gradient": "full"},
    "cross_view": {"mode": "cross_view"},
    "cross_view rbf": {"mode": "cross_view", "cost": "rbf"},
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
WITH_ROWS = {name: form for name, form in FORMS.items() if name != "rbf"}
WITH_KEYS = {name: form for name, form in FORMS.items() if "mode" in form}


def taken(form: dict[str, Any], z: Tensor, **options: Any) -> Tensor:
    """A form on three views; keys are fixed functions of them, the bank is always the same."""
    mode, width = form.get("mode", "in_batch"), z.shape[2]
    other = None if mode == "in_batch" else (z.detach() + 0.3).flip(0)
    bank = bank_of(views(1, n=6, width=width, seed=3)[0].to(z), size=8) if mode == "queue" else None
    return cacr_loss(z, other, bank=bank, **form, **options)


@forms
def test_a_masked_example_is_neither_anchor_nor_key(form: dict[str, Any]) -> None:
    z, mask = views(3, n=6), torch.tensor([True, False, True, True, False, True])
    kept = z[:, mask].clone().requires_grad_()
    z[:, ~mask] = torch.nan
    z.requires_grad_()
    masked, alone = taken(form, z, mask=mask), taken(form, kept)
    assert_close(masked, alone)
    masked.backward()
    alone.backward()
    assert_close(z.grad[:, mask], kept.grad)
    assert (z.grad[:, ~mask] == 0).all()


@forms
def test_a_mask_that_leaves_one_example_or_none_gives_finite_gradients(form: dict[str, Any]) -> None:
    for left in (0, 1):
        z = views(3).requires_grad_()
        taken(form, z, mask=torch.arange(5) < left).backward()
        assert z.grad.isfinite().all()


@pytest.mark.parametrize("form", WITH_ROWS.values(), ids=WITH_ROWS)
def test_weights_multiply_rows(form: dict[str, Any]) -> None:
    z, weight = views(3), torch.tensor([1.0, 2.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    rows = taken(form, z, reduction="none")
    assert_close(taken(form, z, weight=weight, reduction="none"), rows * weight.repeat(3))
    assert_close(taken(form, z, weight=weight, normalizer="weight"), (rows * weight.repeat(3)).sum() / 3 / weight.sum())


@forms
def test_the_order_of_examples_does_not_matter(form: dict[str, Any]) -> None:
    z = views(3)
    assert_close(taken(form, z[:, torch.tensor([3, 1, 4, 0, 2])]), taken(form, z))


@forms
def test_tiles_change_nothing(form: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    z = views(3).requires_grad_()
    whole = taken(form, z)
    expected = torch.autograd.grad(whole, z)
    monkeypatch.setattr(_cacr, "TILE_ELEMENTS", 12)
    tiled = taken(form, z)
    assert_close(tiled, whole)
    assert_close(torch.autograd.grad(tiled, z), expected)


@forms
@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_extremes_stay_finite_in_float32(form: dict[str, Any], scale: float, dtype: torch.dtype) -> None:
    z = (views(3) * scale).to(dtype).requires_grad_()
    loss = taken(form, z, attraction_sharpness=500.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert z.grad.isfinite().all()


@forms
def test_nan_is_never_repaired(form: dict[str, Any]) -> None:
    z = views(3)
    z[1, 2] = torch.nan
    assert taken(form, z).isnan()


def fixed(form: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Keys of three views that do not depend on the queries, and a bank where the form takes one."""
    return views(3, n=3, seed=1), {"bank": bank_of(views(1)[0])} if form["mode"] == "queue" else {}


@pytest.mark.parametrize("form", WITH_KEYS.values(), ids=WITH_KEYS)
def test_with_gradients_through_all_weights_they_agree_with_finite_differences(form: dict[str, Any]) -> None:
    keys, given = fixed(form)
    loss = CACRLoss(**form | {"weight_gradient": "full"})
    assert torch.autograd.gradcheck(lambda z: loss(z, keys, **given), views(3, n=3).requires_grad_())


@pytest.mark.parametrize("form", WITH_KEYS.values(), ids=WITH_KEYS)
@pytest.mark.filterwarnings("ignore")
def test_it_compiles_to_one_graph(form: dict[str, Any]) -> None:
    torch._dynamo.reset()
    (keys, given), loss = fixed(form), CACRLoss(**form)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    z, again = views(3, n=3).requires_grad_(), views(3, n=3).requires_grad_()
    weight, mask = torch.rand(3), torch.tensor([True, True, False])
    compiled(z, keys, **given, weight=weight, mask=mask).backward()
    loss(again, keys, **given, weight=weight, mask=mask).backward()
    assert_close(z.grad, again.grad)


# Several ranks


def averaged(x: Tensor) -> Tensor:
    total = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return total


def step(rank: int, form: dict[str, Any], split: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Loss and gradient of a parameter in front of it, averaged over ranks; with weights, and a mask on one rank."""
    rows = slice(sum(split[:rank]), sum(split[: rank + 1]))
    z, parameter = views(3, n=11)[:, rows], views(1, n=4, seed=5)[0].requires_grad_()
    weight, mask = torch.arange(1.0, 12, dtype=torch.float64)[rows], (torch.arange(11) != 2)[rows]
    loss = taken(form, z @ parameter, weight=weight, mask=mask if rank == 0 else None)
    loss.backward()
    return averaged(loss), averaged(parameter.grad)


@forms
@pytest.mark.parametrize("split", [(4, 7), (5, 1, 5), (6, 0, 5)], ids=["two", "uneven", "an empty rank"])
def test_ranks_equal_one_process(form: dict[str, Any], split: tuple[int, ...], pools: dict[int, Pool]) -> None:
    expected = step(0, form, (11,))
    for got in pools[len(split)].run(step, form, split):
        assert_close(got, expected, rtol=1e-6, atol=1e-9)


def one_example_on_one_rank(rank: int) -> str:
    try:
        cacr_loss(torch.randn(2, int(rank == 1), 3))
    except ValueError as error:
        return str(error)
    return ""


def test_one_example_over_all_ranks_is_refused_by_all(ranks: Pool) -> None:
    assert ranks.run(one_example_on_one_rank) == ["z holds one example, expected at least two: the others repel"] * 3


# What is refused

CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "one example": (lambda: cacr_loss(*views(n=1)), "z holds one example, expected at least two"),
    "one view": (lambda: cacr_loss(views(1)), "z holds one view, expected two or more"),
    "mode": (lambda: cacr_loss(*views(), mode="moco"), r"mode is 'moco', expected one of"),
    "cost": (lambda: cacr_loss(*views(), cost="rfb"), r"cost is 'rfb', .* did you mean 'rbf'"),
    "cost of mode": (lambda: cacr_loss(*views(), mode="queue", cost="rbf"), r"cost is 'rbf', expected one of"),
    "no bank": (lambda: cacr_loss(*views(), mode="queue"), "bank is None in mode 'queue'"),
    "bank": (lambda: cacr_loss(*views(), bank=MemoryBank(3, 4)), "bank is given in mode 'in_batch'"),
    "width": (lambda: cacr_loss(*views(), bank=MemoryBank(3, 5), mode="queue"), "bank has width 5, expected 4"),
    "no keys": (lambda: cacr_loss(views(), mode="cross_view"), "other is None, expected the embeddings"),
    "keys": (lambda: cacr_loss(views(), views(n=3), mode="cross_view"), r"other has shape \(2, 3, 4\)"),
    "one key view": (
        lambda: cacr_loss(views(), views(1), bank=MemoryBank(3, 4), mode="queue"),
        "other holds 1 view, expected two or more",
    ),
    "alpha": (lambda: cacr_loss(*views(), attraction_weight=-1.0), r"attraction_weight is -1.0, expected"),
    "sharpness": (lambda: CACRLoss(repulsion_sharpness=math.inf), r"repulsion_sharpness is inf, expected"),
    "zero": (lambda: CACRLoss("cross_view", "rbf", repulsion_sharpness=0.0), r"repulsion_sharpness is 0.0, .* \(0"),
    "prior": (lambda: CACRLoss(positive_prior=1.0), r"positive_prior is 1.0, expected a number in \[0, 1\)"),
    "prior of rbf": (lambda: CACRLoss(cost="rbf", positive_prior=0.1), r"positive_prior is 0.1"),
    "symmetric": (lambda: CACRLoss("queue", symmetric=True), "symmetric is True in mode 'queue'"),
    "gradient": (lambda: CACRLoss(weight_gradient="intra_batch"), "weight_gradient is 'intra_batch', expected one of"),
    "normalize": (lambda: CACRLoss("queue", normalize=False), "normalize is False, expected True with a bank"),
    "labels": (lambda: CACRLoss()(*views(), labels=torch.arange(5)), "labels are given, expected none"),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_does_not_fit_is_refused(call: str) -> None:
    attempt, message = CALLS[call]
    with pytest.raises(ValueError, match=message):
        attempt()


def test_its_spec_says_what_its_mode_needs() -> None:
    assert CACRLoss().spec.needs == ()
    assert CACRLoss("queue").spec.needs == ("momentum_encoder", "bank")
    assert CACRLoss("cross_view").spec.needs == ("momentum_encoder", "predictor")
