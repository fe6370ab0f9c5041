"""Scores: their bounds and identities, gradients by hand, and what is counted of an example over training."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from counterpoise.samplers import (
    ForgettingEvents,
    MetaWeightNet,
    el2n_scores,
    grand_scores,
    grand_scores_full,
    meta_weight_loss,
    second_pass,
    uncertainty_scores,
)
from tests.pool import Pool

G = torch.Generator().manual_seed(0)
LOGITS = torch.randn(40, 5, generator=G, dtype=torch.float64) * 3
TARGETS = torch.randint(5, (40,), generator=G)
FEATURES = torch.randn(40, 7, generator=G, dtype=torch.float64)


# EL2N and its variants


def test_el2n_is_the_length_of_the_error() -> None:
    error = LOGITS.softmax(1) - torch.nn.functional.one_hot(TARGETS, 5)
    assert_close(el2n_scores(LOGITS, TARGETS), error.norm(dim=1))
    assert_close(el2n_scores(LOGITS, TARGETS, variant="l1"), error.abs().sum(1))


@pytest.mark.parametrize(("variant", "low", "high"), [("l2", 0, math.sqrt(2)), ("l1", 0, 2), ("max_margin", -1, 1)])
def test_scores_stay_within_their_bounds_at_extremes(variant: str, low: float, high: float) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, -torch.inf, 0.0]])
    scores = el2n_scores(logits, torch.tensor([0, 0, 0]), variant=variant)
    assert_close(scores[:2].tolist(), [float(low), float(high)])
    assert scores.isfinite().all()


def test_with_two_classes_el2n_is_root_two_times_the_missing_probability() -> None:
    logits, targets = LOGITS[:, :2], TARGETS % 2
    p = logits.softmax(1).gather(1, targets[:, None])[:, 0]
    assert_close(el2n_scores(logits, targets), math.sqrt(2) * (1 - p))


def test_an_example_fitted_very_well_keeps_its_digits() -> None:
    score = el2n_scores(torch.tensor([[40.0, 0.0]]), torch.tensor([0]))
    assert_close(score.item(), math.sqrt(2) * math.exp(-40), rtol=1e-5, atol=0)


def test_margins_compare_the_label_with_the_others() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    target = torch.tensor([1])
    assert_close(el2n_scores(logits, target, variant="max_margin").item(), 0.2)
    assert_close(el2n_scores(logits, target, variant="sum_margin").item(), 0.5 + 0.2 - 2 * 0.3)


def test_runs_are_averaged_by_their_scores() -> None:
    runs = torch.stack([LOGITS, LOGITS.flip(1), LOGITS * 2])
    assert_close(el2n_scores(runs, TARGETS), torch.stack([el2n_scores(r, TARGETS) for r in runs]).mean(0))
    features = torch.stack([FEATURES, FEATURES, -2 * FEATURES])
    expected = [grand_scores(r, TARGETS, h) for r, h in zip(runs, features, strict=True)]
    assert_close(grand_scores(runs, TARGETS, features), torch.stack(expected).mean(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_at_least_float32_and_follow_their_rows(dtype: torch.dtype) -> None:
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    logits = LOGITS.to(dtype)
    found = el2n_scores(logits, TARGETS)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(el2n_scores(logits[order], TARGETS[order]), found[order])


# Gradient norms


def test_last_layer_grand_is_el2n_times_the_length_of_the_input() -> None:
    expected = el2n_scores(LOGITS, TARGETS) * (1 + FEATURES.square().sum(1)).sqrt()
    assert_close(grand_scores(LOGITS, TARGETS, FEATURES), expected)


def test_for_a_linear_model_the_full_gradient_is_that_of_the_last_layer() -> None:
    model = nn.Linear(7, 5).double()
    full = grand_scores_full(model, FEATURES, TARGETS)
    assert_close(full, grand_scores(model(FEATURES).detach(), TARGETS, FEATURES))


def deep() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 5)).double()


def norm_by_hand(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.zero_grad()
    cross_entropy(model(x[None]), y[None]).backward()
    return math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))


@pytest.mark.parametrize("chunk_size", [1, 7, 100])
def test_the_full_gradient_is_autograds_in_eval_mode(chunk_size: int) -> None:
    model = deep()
    model(FEATURES)  # running statistics
    found = grand_scores_full(model, FEATURES, TARGETS, chunk_size=chunk_size)
    model.eval()
    assert_close(found.tolist(), [norm_by_hand(model, x, y) for x, y in zip(FEATURES, TARGETS, strict=True)])


def test_scoring_leaves_the_model_as_it_was() -> None:
    model = deep()
    model[1].eval()
    model[4].weight.requires_grad_(False)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    full, frozen = grand_scores_full(deep(), FEATURES, TARGETS), grand_scores_full(model, FEATURES, TARGETS)
    assert (frozen < full).all()
    assert [m.training for m in model] == [True, False, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


# Uncertainty


def test_uncertainty_is_largest_for_the_uniform_and_least_for_the_certain() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1e4, 0.0, 0.0, 0.0]])
    for kind, most in (("least_confidence", 0.75), ("entropy", math.log(4)), ("margin", 0.0)):
        least = -1.0 if kind == "margin" else 0.0
        assert_close(uncertainty_scores(logits, kind=kind).tolist(), [most, least])


@pytest.mark.parametrize("kind", ["least_confidence", "entropy", "margin"])
def test_masked_classes_are_as_if_they_were_not_there(kind: str) -> None:
    masked = torch.cat([LOGITS, torch.full((40, 1), -torch.inf, dtype=torch.float64)], 1)
    assert_close(uncertainty_scores(masked, kind=kind), uncertainty_scores(LOGITS, kind=kind))


# Forgetting events


def feed(events: ForgettingEvents, *rows: list[int]) -> ForgettingEvents:
    for row in rows:
        events.record(torch.tensor(row).bool(), torch.arange(len(row)))
    return events


def test_an_event_is_from_right_to_wrong() -> None:
    events = feed(ForgettingEvents(3), [0, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0])
    assert events.events.tolist() == [1, 2, 0]
    assert events.first_learned.tolist() == [1, 0, -1]
    assert events.correct.tolist() == [2, 2, 0]


def test_what_was_never_learned_scores_highest() -> None:
    events = feed(ForgettingEvents(3), [0, 1, 0], [1, 0, 0])
    assert events.scores().tolist() == [0.0, 1.0, math.inf]
    assert events.scores("presentations").tolist() == [0.0, 1.0, 2.0]


def test_an_index_that_comes_twice_counts_once_by_its_first_row() -> None:
    events = ForgettingEvents(4)
    events.record(torch.tensor([True, False, True, False]), torch.tensor([2, 0, 0, 2]))
    assert events.correct.tolist() == [0, 0, 1, 0]
    assert events.presentations.tolist() == [1, 0, 1, 0]


def test_logits_are_read_as_predictions_and_margins() -> None:
    events = ForgettingEvents(40)
    events.update(LOGITS, TARGETS, torch.arange(40))
    events.update(LOGITS.flip(0), TARGETS.flip(0), torch.arange(40).flip(0))
    assert events.correct.tolist() == (2 * (LOGITS.argmax(1) == TARGETS)).tolist()
    assert_close(events.margins(), -el2n_scores(LOGITS, TARGETS, variant="max_margin"))


def quietly(events: ForgettingEvents) -> None:
    events.eval()
    feed(events, [1, 1, 1])


def again(events: ForgettingEvents) -> None:
    with second_pass():
        feed(events, [1, 1, 1])


def not_finite(events: ForgettingEvents) -> None:
    events.update(torch.full((3, 2), torch.nan), torch.zeros(3, dtype=torch.int64), torch.arange(3))


@pytest.mark.parametrize("call", [quietly, again, not_finite])
def test_what_is_no_training_step_moves_nothing(call: Callable[[ForgettingEvents], None]) -> None:
    events = feed(ForgettingEvents(3), [0, 1, 0], [1, 0, 0])
    before = {name: x.clone() for name, x in events.state_dict().items()}
    call(events)
    assert all(torch.equal(x, before[name]) for name, x in events.state_dict().items())


def test_a_loaded_state_goes_on_as_the_saved_one() -> None:
    saved = feed(ForgettingEvents(3), [0, 1, 0], [1, 1, 0])
    loaded = ForgettingEvents(3)
    loaded.load_state_dict(saved.state_dict())
    for events in (saved, loaded):
        feed(events, [0, 0, 1])
    assert loaded.scores().tolist() == saved.scores().tolist() == [1.0, 1.0, 0.0]


def counted(rank: int, rows: tuple[slice, ...]) -> list[list[float]]:
    """Two steps with rows of this rank; index 1 comes once on each of the first two ranks."""
    index = torch.tensor([4, 1, 0, 1, 3])
    events = ForgettingEvents(5)
    for correct in ([1, 1, 0, 0, 1], [0, 0, 1, 1, 1]):
        events.record(torch.tensor(correct).bool()[rows[rank]], index[rows[rank]])
    return [x.tolist() for x in events.state_dict().values()]


def test_ranks_hold_the_counts_of_one_process(ranks: Pool) -> None:
    split = (slice(0, 2), slice(2, 5), slice(5, 5))
    expected = counted(0, (slice(0, 5),))
    assert ranks.run(counted, split) == [expected] * 3


# The meta step


def test_weights_lie_between_zero_and_one_and_carry_a_gradient_to_the_net() -> None:
    net = MetaWeightNet(hidden=8)
    losses = torch.tensor([0.0, 1.0, 50.0], requires_grad=True)
    weights = net(losses)
    weights.sum().backward()
    assert ((weights >= 0) & (weights <= 1)).all()
    assert losses.grad is None
    assert all(p.grad is not None for p in net.parameters())


def meta_setting() -> tuple[nn.Linear, nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model, net = nn.Linear(7, 5).double(), MetaWeightNet(hidden=6).double()
    return model, net, (FEATURES[:10], TARGETS[:10]), (FEATURES[10:], TARGETS[10:])


def rows(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits, targets, reduction="none")


def test_the_meta_loss_is_that_after_one_step_of_the_weighted_batch() -> None:
    model, net, batch, clean = meta_setting()
    found = meta_weight_loss(model, net, rows, batch, clean, step_size=0.3)
    losses = rows(model(batch[0]), batch[1])
    slopes = torch.autograd.grad((net(losses).detach() * losses).mean(), list(model.parameters()))
    weight, bias = (p - 0.3 * g for p, g in zip(model.parameters(), slopes, strict=True))
    assert_close(found, cross_entropy(clean[0] @ weight.T + bias, clean[1]))


def test_its_gradient_is_the_net_s_alone_and_is_right() -> None:
    model, net, batch, clean = meta_setting()
    meta_weight_loss(model, net, rows, batch, clean, step_size=0.3).backward()
    assert all(p.grad is None for p in model.parameters())
    bias = net.layers[2].bias
    values = []
    for shift in (1e-5, -2e-5):
        bias.data += shift
        values.append(float(meta_weight_loss(model, net, rows, batch, clean, step_size=0.3).detach()))
    assert_close(bias.grad.item(), (values[0] - values[1]) / 2e-5, rtol=1e-6, atol=1e-10)


class RowWeights(nn.Module):
    """A free weight a row, whatever its loss."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(count))

    def forward(self, losses: Tensor) -> Tensor:
        return self.weights


def test_the_meta_gradient_distrusts_wrong_labels() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=g)
    true = (x[:, 0] > 0).long()
    given = torch.where(torch.arange(200) % 4 == 0, 1 - true, true)
    torch.manual_seed(0)
    model, net = nn.Linear(2, 2), RowWeights(160)
    for _ in range(30):
        losses = rows(model(x[160:]), true[160:])
        slopes = torch.autograd.grad(losses.mean(), list(model.parameters()))
        model.load_state_dict({k: p - s for (k, p), s in zip(model.state_dict().items(), slopes, strict=True)})
    meta_weight_loss(model, net, rows, (x[:160], given[:160]), (x[160:], true[160:]), step_size=0.1).backward()
    wrong = given[:160] != true[:160]
    assert net.weights.grad[wrong].mean() > 0 > net.weights.grad[~wrong].mean()


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: el2n_scores(LOGITS, TARGETS + 4), r"targets holds \d, expected class indices in \[0, 4\]"),
        (lambda: el2n_scores(LOGITS, TARGETS[:3]), r"targets has shape \(3,\), expected \(40,\)"),
        (lambda: el2n_scores(LOGITS[0], TARGETS), r"logits has shape \(5,\), expected \(N, C\) or \(R, N, C\)"),
        (lambda: el2n_scores(LOGITS, TARGETS, variant="margin"), r"variant is 'margin', expected one of"),
        (lambda: grand_scores(LOGITS, TARGETS, FEATURES[:9]), r"features has shape \(9, 7\), expected \(40, 5?"),
        (lambda: grand_scores_full(nn.ReLU(), FEATURES, TARGETS), r"model has no parameter"),
        (lambda: uncertainty_scores(LOGITS, kind="bald"), r"kind is 'bald', expected one of"),
        (lambda: ForgettingEvents(0), r"num_examples is 0, expected a number in \[1, inf\]"),
        (lambda: ForgettingEvents(3).record(torch.ones(1).bool(), torch.tensor([3])), r"index holds 3"),
        (lambda: ForgettingEvents(3).scores("zero"), r"never_learned is 'zero', expected one of"),
        (lambda: MetaWeightNet(0), r"hidden is 0, expected a number in \[1, inf\]"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_types_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TypeError, match=r"logits has dtype torch.int64, expected a floating type"):
        el2n_scores(LOGITS.long(), TARGETS)
    with pytest.raises(TypeError, match=r"targets has dtype torch.float64, expected class indices"):
        el2n_scores(LOGITS, TARGETS.double())
