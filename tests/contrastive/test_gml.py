"""GML: class-wise mean similarities, where each gradient goes, its limits, and the queue of keys by class."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, normalize
from torch.testing import assert_close

from counterpoise._core import second_pass
from counterpoise.contrastive import ClassQueue, GMLLoss, gml_loss, gml_terms
from counterpoise.losses import logit_adjusted_loss

COUNTS = [50, 20, 5]
PRIOR = torch.tensor(COUNTS).double() / 75
LABELS, INDEX = torch.tensor([0, 1, 2, 1]), torch.tensor([10, 11, 12, 13])
KEY_LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 0])
KEY_INDEX = torch.tensor([10, 1, 11, 13, 12, 3, 4])


def embeddings() -> tuple[Tensor, Tensor]:
    """Unit queries (4, 5) and keys (7, 5)."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(11, 5, dtype=torch.float64, generator=generator)
    return normalize(rows[:4], dim=1), normalize(rows[4:], dim=1)


def cosines() -> Tensor:
    """Classifier logits (4, 3) in [-1, 1]."""
    return torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def queue_facts() -> dict[str, Tensor]:
    return {"keys": embeddings()[1], "key_labels": KEY_LABELS, "index": INDEX, "key_index": KEY_INDEX}


def loss(z: Tensor | None = None, **options: Any) -> Tensor:
    z = embeddings()[0] if z is None else z
    return gml_loss(z, LABELS, class_counts=COUNTS, **{**queue_facts(), **options})


def by_loops(own: bool, temperature: float) -> list[float]:
    """CE(S + log prior, y) of each row, with or without its own key."""
    z, keys = embeddings()
    losses = []
    for i in range(4):
        adjusted = []
        for c in range(3):
            used = [j for j in range(7) if KEY_LABELS[j] == c and (own or KEY_INDEX[j] != INDEX[i])]
            mean = sum(math.exp(float(z[i] @ keys[j]) / temperature) for j in used) / len(used)
            adjusted.append(math.log(mean) + math.log(PRIOR[c]))
        losses.append(math.log(sum(map(math.exp, adjusted))) - adjusted[LABELS[i]])
    return losses


# Values


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_the_contrast_is_the_double_loop_with_and_without_the_own_key(temperature: float) -> None:
    terms = gml_terms(embeddings()[0], LABELS, class_counts=COUNTS, temperature=temperature, **queue_facts())
    assert_close(terms.contrast.tolist(), by_loops(True, temperature))
    assert_close(terms.temperature.tolist(), by_loops(False, temperature))
    assert terms.supervised.tolist() == terms.distillation.tolist() == [0.0] * 4


def test_the_total_is_the_weighted_sum_of_its_terms() -> None:
    u, v = cosines(), cosines().flip(0)
    terms = gml_terms(
        embeddings()[0], LABELS, class_counts=COUNTS, logits=u, teacher_logits=v, temperature=0.1, **queue_facts()
    )
    ours = loss(
        logits=u,
        teacher_logits=v,
        supervised_weight=0.5,
        contrast_weight=2.0,
        distillation_weight=3.0,
        reduction="none",
    )
    assert_close(ours, 0.5 * terms.supervised + 2 * (terms.contrast + terms.temperature) + 3 * terms.distillation)


def test_without_contrast_it_is_logit_adjustment_of_cosines_at_scale_30() -> None:
    u = cosines()
    ours = loss(logits=u, contrast_weight=0.0)
    assert_close(ours, logit_adjusted_loss(30 * u, LABELS, class_counts=COUNTS, epsilon=0.0))


def test_the_distillation_is_the_divergence_from_the_teacher() -> None:
    u, v = 30 * cosines(), 30 * cosines().flip(0)
    terms = gml_terms(embeddings()[0], LABELS, class_counts=COUNTS, logits=u / 30, teacher_logits=v / 30)
    expected = 16 * kl_div(log_softmax(u / 4, 1), (v / 4).softmax(1), reduction="none").sum(1)
    assert_close(terms.distillation, expected)
    same = gml_terms(embeddings()[0], LABELS, class_counts=COUNTS, logits=u, teacher_logits=u)
    assert same.distillation.abs().max() < 1e-10


def test_one_key_a_class_is_a_softmax_over_prototypes_with_the_prior() -> None:
    z, keys = embeddings()
    terms = gml_terms(z, LABELS, class_counts=COUNTS, keys=keys[:3], key_labels=torch.arange(3), temperature=0.2)
    assert_close(terms.contrast, cross_entropy(z @ keys[:3].T / 0.2 + PRIOR.log(), LABELS, reduction="none"))


def test_hot_keys_say_nothing_and_leave_the_prior() -> None:
    terms = gml_terms(embeddings()[0], LABELS, class_counts=COUNTS, temperature=1e6, **queue_facts())
    assert_close(terms.contrast, -PRIOR.log()[LABELS], rtol=0, atol=1e-5)


def test_repeating_the_keys_of_one_class_changes_nothing() -> None:
    """The mean over a class is what keeps a head class from winning by its number of keys."""
    head = KEY_LABELS == 0
    facts = {name: x if name == "index" else torch.cat([x, x[head], x[head]]) for name, x in queue_facts().items()}
    assert_close(loss(**facts), loss())


def test_a_uniform_prior_and_equal_slots_are_the_class_averaged_contrast() -> None:
    z, keys = embeddings()
    facts = {"keys": keys[:6], "key_labels": KEY_LABELS[:6]}
    terms = gml_terms(z, LABELS, class_counts=[1, 1, 1], temperature=0.3, **facts)
    s = torch.exp(z @ keys[:6].T / 0.3)
    positive = torch.where(KEY_LABELS[None, :6] == LABELS[:, None], s, 0).sum(1)
    assert_close(terms.contrast, -torch.log(positive / s.sum(1)))


def test_queries_and_keys_are_normalised_unless_told_otherwise() -> None:
    z, keys = embeddings()
    assert_close(loss(3 * z, keys=keys * 0.2), loss())
    assert_close(loss(normalize=False), loss())
    assert (loss(3 * z, normalize=False) - loss()).abs() > 1e-3


def test_the_module_follows_a_sampled_prior() -> None:
    module = GMLLoss(COUNTS).double()
    assert_close(module(embeddings()[0], LABELS, **queue_facts()), loss())
    module.statistics.set_prior(torch.full((3,), 1 / 3))
    ours = module(embeddings()[0], LABELS, **queue_facts())
    assert_close(ours, gml_loss(embeddings()[0], LABELS, class_counts=[1, 1, 1], **queue_facts()))


# Where gradients go


def test_features_learn_at_a_fixed_temperature_and_the_temperature_at_fixed_features() -> None:
    z, keys = (x.requires_grad_() for x in embeddings())
    tau = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    terms = gml_terms(z, LABELS, class_counts=COUNTS, temperature=tau, **{**queue_facts(), "keys": keys})
    of_features = torch.autograd.grad(terms.contrast.sum(), (z, keys, tau), retain_graph=True, allow_unused=True)
    of_tau = torch.autograd.grad(terms.temperature.sum(), (z, keys, tau), allow_unused=True)
    assert [g is not None for g in of_features] == [True, True, False]
    assert [g is not None for g in of_tau] == [False, False, True]


@pytest.mark.parametrize("given", [True, False], ids=["keys", "batch"])
def test_the_gradient_of_features_agrees_with_finite_differences(given: bool) -> None:
    z, keys = (x.requires_grad_() for x in embeddings())

    def contrast(z: Tensor, keys: Tensor) -> Tensor:
        facts = {"keys": keys, "key_labels": KEY_LABELS} if given else {}
        return gml_terms(z, LABELS, class_counts=COUNTS, temperature=0.3, **facts).contrast + 0 * keys.sum()

    assert torch.autograd.gradcheck(contrast, (z, keys))
    assert torch.autograd.gradgradcheck(contrast, (z, keys))


def test_the_gradient_of_the_temperature_agrees_with_finite_differences() -> None:
    def of_tau(tau: Tensor) -> Tensor:
        return gml_terms(embeddings()[0], LABELS, class_counts=COUNTS, temperature=tau, **queue_facts()).temperature

    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(of_tau, tau)
    assert torch.autograd.gradgradcheck(of_tau, tau)


def test_the_teacher_gets_no_gradient() -> None:
    v = cosines().requires_grad_()
    assert not gml_terms(
        embeddings()[0], LABELS, class_counts=COUNTS, logits=cosines(), teacher_logits=v
    ).distillation.requires_grad


def test_the_temperature_is_learned_kept_precise_and_named_for_the_optimizer() -> None:
    module = GMLLoss(COUNTS)
    assert math.isclose(module.temperature, 0.1, rel_tol=1e-6)
    assert module.no_weight_decay == ("log_temperature",)
    module.half()
    assert module.log_temperature.dtype == torch.float32
    z, facts = embeddings()[0].float(), {**queue_facts(), "keys": embeddings()[1].float()}
    module(z, LABELS, **facts).backward()
    assert module.log_temperature.grad is not None
    assert module.log_temperature.grad != 0


# Classes and keys that are missing


def test_a_row_whose_only_key_of_its_class_is_its_own_teaches_the_temperature_nothing() -> None:
    """The released code takes the logarithm of zero there."""
    key_index = torch.where(KEY_LABELS == 2, 12, KEY_INDEX)
    facts = {**queue_facts(), "key_index": key_index}
    terms = gml_terms(embeddings()[0], LABELS, class_counts=COUNTS, **facts)
    assert terms.temperature[2] == 0
    assert (terms.temperature[[0, 1, 3]] > 0).all()
    assert (terms.contrast > 0).all()
    assert terms.counted.all()


def test_a_class_without_keys_is_left_out_of_the_softmax() -> None:
    there = KEY_LABELS != 1
    z, keys = embeddings()
    terms = gml_terms(z, LABELS, class_counts=COUNTS, keys=keys[there], key_labels=KEY_LABELS[there])
    alone = gml_terms(
        z[[0, 2]],
        torch.tensor([0, 1]),
        class_counts=[50, 5],
        keys=keys[there],
        key_labels=KEY_LABELS[there] // 2,
    )
    assert_close(terms.contrast[[0, 2]], alone.contrast)
    assert terms.contrast[[1, 3]].tolist() == [0.0, 0.0]
    assert terms.counted.tolist() == [True, False, True, False]


def test_label_minus_one_marks_a_key_that_is_not_usable() -> None:
    unusable = torch.tensor([False, True, False, True, False, False, True])
    z, keys = embeddings()
    ours = gml_loss(z, LABELS, class_counts=COUNTS, keys=keys, key_labels=torch.where(unusable, -1, KEY_LABELS))
    kept = gml_loss(z, LABELS, class_counts=COUNTS, keys=keys[~unusable], key_labels=KEY_LABELS[~unusable])
    assert_close(ours, kept)


def test_rows_without_a_term_are_left_out_of_the_mean() -> None:
    z, keys = embeddings()
    facts = {"keys": keys[:4], "key_labels": KEY_LABELS[:4]}
    ours = gml_loss(z, LABELS, class_counts=COUNTS, **facts)
    of_rows = gml_loss(z, LABELS, class_counts=COUNTS, reduction="none", **facts)
    assert of_rows[2] == 0
    assert_close(ours, of_rows.sum() / 3)


def test_without_any_key_of_its_class_a_batch_is_a_connected_zero() -> None:
    z, keys = embeddings()
    z.requires_grad_()
    total = gml_loss(z, LABELS, class_counts=COUNTS, keys=keys, key_labels=torch.full((7,), -1))
    total.backward()
    assert total.item() == 0
    assert z.grad is not None
    assert (z.grad == 0).all()


def test_without_keys_rows_contrast_with_one_another_and_not_with_themselves() -> None:
    z, labels = embeddings()[0], torch.tensor([0, 1, 0, 1])
    terms = gml_terms(z, labels, class_counts=[3, 1], temperature=0.5)
    for i in range(4):
        adjusted = []
        for c, prior in enumerate((0.75, 0.25)):
            used = [j for j in range(4) if labels[j] == c and j != i]
            mean = sum(math.exp(float(z[i] @ z[j]) / 0.5) for j in used) / len(used)
            adjusted.append(math.log(prior * mean))
        expected = math.log(sum(map(math.exp, adjusted))) - adjusted[labels[i]]
        assert math.isclose(terms.contrast[i].item(), expected, rel_tol=1e-10)
    assert_close(terms.temperature, terms.contrast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tiny_temperature_stays_finite(dtype: torch.dtype) -> None:
    """A sum shifted by the row's maximum underflows for classes far from it; here each class has its own."""
    z, keys = (x.to(dtype).requires_grad_() for x in embeddings())
    tau = torch.tensor(1e-3, dtype=dtype, requires_grad=True)
    value = loss(z, keys=keys, temperature=tau)
    gradients = torch.autograd.grad(value, (z, keys, tau))
    assert value.isfinite()
    assert all(g.isfinite().all() for g in gradients)


def test_float16_is_computed_in_float32() -> None:
    z, keys = (x.half() for x in embeddings())
    u = cosines().half()
    ours = loss(z, keys=keys, logits=u)
    assert ours.dtype == torch.float32
    assert_close(ours, loss(z.float(), keys=keys.float(), logits=u.float()))


def test_masked_rows_may_hold_anything() -> None:
    z, u = embeddings()[0], cosines()
    mask, labels = torch.tensor([True, True, False, True]), torch.where(LABELS == 2, 99, LABELS)
    z[2], u[2] = torch.nan, torch.nan
    ours = gml_loss(z, labels, class_counts=COUNTS, logits=u, teacher_logits=u, mask=mask, **queue_facts())
    facts = {**queue_facts(), "index": INDEX[mask]}
    kept = gml_loss(z[mask], LABELS[mask], class_counts=COUNTS, logits=u[mask], teacher_logits=u[mask], **facts)
    assert_close(ours, kept)
    assert gml_loss(z, labels, class_counts=COUNTS, mask=mask).isfinite()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loss(key_labels=None, keys=embeddings()[1]), r"key_labels is None, expected it together with keys"),
        (lambda: loss(index=None), r"key_index was given without index and keys, expected all three"),
        (lambda: loss(keys=embeddings()[1][:, :3]), r"keys has shape \(7, 3\), expected \(M, 5\)"),
        (lambda: loss(key_labels=KEY_LABELS + 1), r"key_labels holds 3, expected class indices in \[-1, 2\]"),
        (lambda: gml_loss(embeddings()[0], LABELS + 1, class_counts=COUNTS), r"labels holds 3, expected class indices"),
        (lambda: loss(teacher_logits=cosines()), r"teacher_logits was given without logits, expected both"),
        (
            lambda: loss(logits=cosines(), teacher_logits=cosines()[:, :2]),
            r"teacher_logits has shape \(4, 2\), expected \(4, 3\)",
        ),
        (lambda: GMLLoss(COUNTS, temperature=0.0), r"temperature is 0.0, expected a number in \(0, inf\]"),
        (lambda: GMLLoss(COUNTS, contrast_weight=-1.0), r"contrast_weight is -1.0, expected a number in \[0, inf\]"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# The queue by class


def queue(**options: Any) -> ClassQueue:
    return ClassQueue(16, 2, [50, 10, 2], generator=torch.Generator().manual_seed(0), **options)


def enqueue(to: ClassQueue, labels: list[int], first: int) -> None:
    """Rows whose features tell their dataset index."""
    index = torch.arange(first, first + len(labels))
    to.enqueue(index[:, None].float().expand(-1, 2), torch.tensor(labels), index)


@pytest.mark.parametrize("per_class", [1, 2, 4])
@pytest.mark.parametrize("counts", [[50, 10, 2], [1, 1, 1, 1], [1000, 1, 0], [7]])
def test_every_slot_belongs_to_a_class_and_every_class_has_its_own(counts: list[int], per_class: int) -> None:
    bank = ClassQueue(20, 2, counts, per_class=per_class)
    slots = bank.slots_per_class
    assert int(slots.sum()) == 20
    assert (slots >= per_class).all()
    assert torch.equal(bank.labels.bincount(), slots)
    share = per_class + (20 - len(counts) * per_class) * torch.tensor(counts) / sum(counts)
    assert (slots - share).abs().max() < 1


def test_it_starts_with_unit_vectors_and_indices_of_no_example() -> None:
    bank = queue()
    assert_close(bank.features.norm(dim=1), torch.ones(16))
    assert bank.index.tolist() == list(range(-16, 0))


def test_each_class_is_a_ring_of_its_own() -> None:
    bank = queue()  # 11, 3 and 2 slots
    enqueue(bank, [1, 1], 100)
    enqueue(bank, [1, 0, 1], 102)
    assert bank.index[11:14].tolist() == [104, 101, 102]
    assert bank.index[:2].tolist() == [103, -15]
    assert bank.pointers.tolist() == [1, 1, 0]
    assert (bank.features[11:14, 0] == bank.index[11:14]).all()


def test_of_more_rows_than_slots_of_a_class_the_first_remain() -> None:
    bank = queue()
    enqueue(bank, [2, 2, 2, 2, 0], 50)
    assert bank.index[14:].tolist() == [50, 51]
    assert bank.pointers.tolist() == [1, 0, 0]


def test_the_queue_feeds_the_loss() -> None:
    bank, module = ClassQueue(16, 5, COUNTS), GMLLoss(COUNTS)
    z = embeddings()[0].float()
    bank.enqueue(z, LABELS, INDEX)
    facts = {"keys": bank.features, "key_labels": bank.labels, "index": INDEX, "key_index": bank.index}
    assert module(z, LABELS, **facts).isfinite()


@pytest.mark.parametrize("reason", ["eval", "second pass", "not finite"])
def test_nothing_is_written_when_it_should_not_be(reason: str) -> None:
    bank = queue()
    before = {name: x.clone() for name, x in bank.state_dict().items()}
    features = torch.full((2, 2), torch.nan) if reason == "not finite" else torch.ones(2, 2)
    if reason == "eval":
        bank.eval()
    arguments = features, torch.tensor([0, 1]), torch.tensor([5, 6])
    if reason == "second pass":
        with second_pass():
            bank.enqueue(*arguments)
    else:
        bank.enqueue(*arguments)
    assert all(torch.equal(x, before[name]) for name, x in bank.state_dict().items())


def test_a_loaded_queue_goes_on_where_the_saved_one_was() -> None:
    saved, loaded = queue(), ClassQueue(16, 2, [50, 10, 2])
    enqueue(saved, [0, 1, 1, 2], 7)
    loaded.load_state_dict(saved.state_dict())
    for bank in (saved, loaded):
        enqueue(bank, [1, 2, 2, 0], 20)
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in saved.state_dict().items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ClassQueue(5, 2, [1, 1, 1]), r"size is 5, expected a number in \[6, inf\]"),
        (lambda: ClassQueue(5, 2, [1, 1], per_class=0), r"per_class is 0, expected"),
        (lambda: queue().enqueue(torch.ones(2, 3), LABELS[:2], INDEX[:2]), r"features has shape \(2, 3\), expected"),
        (lambda: queue().enqueue(torch.ones(2, 2), LABELS, INDEX[:2]), r"labels has shape \(4,\), expected \(2,\)"),
        (lambda: queue().enqueue(torch.ones(2, 2), LABELS[:2] + 2, INDEX[:2]), r"labels holds 3, expected class"),
    ],
)
def test_what_does_not_fit_the_queue_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
