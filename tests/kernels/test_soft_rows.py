"""Kernels of cross-entropy with probabilities, against the plain form: values, gradients, precision, who goes where."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from counterpoise import kernels
from counterpoise._core import at_least_float32, combine_inner, reduce_losses
from counterpoise.kernels import row_functions, soft_rows
from counterpoise.losses import adjusted_cross_entropy, cross_entropy_loss, ldam_loss, logit_adjusted_loss
from counterpoise.losses._inputs import expand_mask
from tests.kernels.compare import assert_accurate, assert_exact, assert_within_two_ulp, value_and_grad

pytestmark = pytest.mark.skipif(
    not kernels.available()["soft_rows_total"]["cpu"], reason="the CPU kernels are not compiled, or are switched off"
)

VECTORS = ("additive", "multiplicative", "margin", "class_weight")


def divergence(
    logits: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    inner: str = "mean",
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = False,
) -> Tensor:
    """KL(target || softmax(logits)) by row, reduced, as the kernel is called and as it is written."""

    def plain(z: Tensor, *, inner: str, **options: Any) -> Tensor:
        z = at_least_float32(z)
        counted = None if mask is None else expand_mask(mask, target[:, 0])
        t = target.to(z.dtype)
        if counted is not None:
            z, t = torch.where(counted.unsqueeze(1), z, 0), torch.where(counted.unsqueeze(1), t, 0)
        log_p = torch.log_softmax(z, 1)
        losses = (torch.xlogy(t, t) - torch.where(t == 0, 0, t * log_p)).sum(1)
        carried = combine_inner(torch.ones_like(losses), counted, inner)[0]
        rows, counted = combine_inner(losses, counted, inner)
        return reduce_losses(rows, counted=counted, carried_weight=carried, **options)

    if not soft_rows.runs_soft_rows(logits, target, weight, mask):
        return plain(logits, weight=weight, inner=inner, reduction=reduction, normalizer=normalizer, sync=sync)
    options = (weight, inner, reduction, normalizer, sync)
    return soft_rows.soft_row_loss(logits, target, plain, (None,) * 4, mask, options, divergence=True)


def distillation(logits: Tensor, target: Tensor, *, mask: Tensor | None = None, **options: Any) -> Tensor:
    """As ``divergence``, of a teacher's logits at temperature 2 of which the target is the softmax."""
    teacher = 2 * torch.where((target == 0).all(1, keepdim=True), 0, target.log())
    if not soft_rows.runs_soft_rows(logits, teacher, options.get("weight"), mask):
        t = torch.softmax(at_least_float32(teacher.to(logits.dtype)) / 2, 1)
        return divergence(logits, t, mask=mask, **options)
    defaults = {"weight": None, "inner": "mean", "reduction": "mean", "normalizer": "count", "sync": False}
    how = {"divergence": True, "target_scale": 0.5}

    def plain(z: Tensor, **options: Any) -> Tensor:
        with kernels.disabled():
            return distillation(z, target, mask=mask, **options)

    given = tuple((defaults | options).values())
    return soft_rows.soft_row_loss(logits, teacher, plain, (None,) * 4, mask, given, **how)


LOSSES: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "cross-entropy": (cross_entropy_loss, {}),
    "smoothed": (cross_entropy_loss, {"label_smoothing": 0.1}),
    "all mass": (cross_entropy_loss, {"label_smoothing": 1.0}),
    "weighted": (adjusted_cross_entropy, {"class_weight": 1}),
    "adjusted": (adjusted_cross_entropy, {"scale": 3.0, "additive": 1, "multiplicative": 1, "margin": 1}),
    "all": (adjusted_cross_entropy, {"label_smoothing": 0.3, "additive": 1, "class_weight": 1, "margin": 1}),
    "divergence": (divergence, {}),
    "distillation": (distillation, {}),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def problem(name: str, *shape: int, spread: float = 3.0) -> Any:
    """The loss with its vectors, float64 logits, and targets of which some are zero, one-hot and no distributions."""
    function, options = LOSSES[name]
    g = torch.Generator().manual_seed(sum(shape))
    vectors = {k: torch.rand(shape[1], generator=g) + 0.1 for k in VECTORS if k in options}
    logits = torch.randn(shape, generator=g, dtype=torch.float64) * spread
    target = torch.softmax(torch.randn(shape, generator=g, dtype=torch.float64) * 2, 1)
    target = target * (torch.rand(shape, generator=g) < 0.7)
    if len(target) > 2:
        target[0] = torch.arange(shape[1]).eq(shape[1] // 2).reshape(-1, *[1] * (len(shape) - 2))
        target[1] = 0
    return function, {**options, **vectors}, logits, target


@each_loss
@pytest.mark.parametrize("shape", [(7, 10), (33, 17), (3, 2500), (2, 70001), (2, 5, 3, 4), (0, 4), (3, 1), (1, 2)])
def test_float64_is_the_plain_form(name: str, shape: tuple[int, ...]) -> None:
    function, options, logits, target = problem(name, *shape)
    for reduction in ("none", "mean", "sum"):
        assert_exact(lambda z, r=reduction: function(z, target, reduction=r, **options), logits)


@each_loss
@pytest.mark.parametrize("dense", [False, True])
def test_every_way_of_counting(name: str, dense: bool) -> None:
    function, options, logits, target = problem(name, 9, 6, *((4,) if dense else ()))
    weight = torch.rand(9, dtype=torch.float64)
    entries = torch.rand(9, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    masks = [None, torch.arange(9) % 3 > 0, torch.zeros(9, dtype=torch.bool), *([entries] if dense else [])]
    normalizers = ("count", "weight", "positives", 3.5)
    for mask, w, n, inner in itertools.product(masks, (None, weight), normalizers, ("mean", "sum", "none")):
        w = w if inner != "none" or not dense else None
        for reduction in ("mean", "sum", "none"):
            settings = {"mask": mask, "weight": w, "inner": inner, "normalizer": n, "reduction": reduction}
            assert_exact(lambda z, s=settings: function(z, target, **s, **options), logits)


@each_loss
def test_rows_that_do_not_count_may_hold_nan(name: str) -> None:
    function, options, logits, target = problem(name, 5, 6)
    logits[1], target[2] = torch.nan, -7
    logits[2] = torch.inf
    mask = torch.tensor([True, False, False, True, True])
    for reduction in ("mean", "none"):
        call = lambda z, r=reduction: function(z, target, mask=mask, reduction=r, **options)  # noqa: E731
        assert_exact(call, logits)
        assert value_and_grad(call, logits)[1].isfinite().all()


@each_loss
@pytest.mark.parametrize("spread", [1.0, 40.0])
def test_float32_is_as_exact_as_the_plain_form(name: str, spread: float) -> None:
    for classes in (9, 1500):
        function, options, logits, target = problem(name, 9, classes, spread=spread)
        for reduction in ("mean", "none"):
            call = lambda z, r=reduction: function(z, target, reduction=r, **options)  # noqa: B023, E731
            assert_accurate(call, logits.clamp(-100, 100))


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [12, 1500])
def test_half_precision_is_float32_rounded(name: str, dtype: torch.dtype, classes: int) -> None:
    function, options, logits, target = problem(name, 6, classes)
    for reduction in ("sum", "none"):
        assert_within_two_ulp(lambda z, r=reduction: function(z, target, reduction=r, **options), logits, dtype)
    value = function(logits.to(dtype), target, **options)
    assert value.dtype == torch.float32


@pytest.mark.parametrize("of_logits", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_targets", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_types_of_targets(of_logits: torch.dtype, of_targets: torch.dtype) -> None:
    function, options, logits, target = problem("all", 6, 40)
    logits, target = logits.to(of_logits), target.to(of_targets)
    ours = value_and_grad(lambda z: function(z, target, **options), logits)
    with kernels.disabled():
        theirs = value_and_grad(lambda z: function(z, target, **options), logits)
    assert ours[0].dtype == theirs[0].dtype
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours[1], theirs[1], rtol=2 * torch.finfo(of_logits).eps + 1e-5, atol=1e-6)


def test_a_float16_gradient_survives_the_scale_of_its_loss() -> None:
    logits = torch.zeros(2, 4000, dtype=torch.float16, requires_grad=True)
    target = torch.eye(4000)[:2]
    (cross_entropy_loss(logits, target, normalizer=1e6) * 2.0**20).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0, 5].item(), 2.0**20 / 4000e6, rtol=1e-2, atol=0)


@each_loss
def test_any_layout(name: str) -> None:
    function, options, logits, target = problem(name, 8, 11)

    def shifted(x: Tensor) -> Tensor:
        return torch.empty(8 * 11 + 1, dtype=x.dtype)[1:].view(8, 11).copy_(x)

    for z in (logits.t().contiguous().t(), shifted(logits), logits[:1].expand(8, 11), logits.repeat(1, 2)[:, ::2]):
        assert_exact(lambda x: function(x, target, **options), z)
    for t in (target.t().contiguous().t(), shifted(target), target[:1].expand(8, 11), target.repeat(2, 1)[::2]):
        assert_exact(lambda x, t=t: function(x, t, **options), logits)
        assert_accurate(lambda x, t=t: function(x, t, **options), shifted(logits.float()))
    mask = torch.arange(16) % 5 > 1
    assert_exact(lambda x: function(x, target, mask=mask[::2], **options), logits)


@each_loss
def test_masked_classes_and_large_logits(name: str) -> None:
    function, options, logits, target = problem(name, 4, 1030)
    options = {k: v for k, v in options.items() if k != "multiplicative"}
    other = logits.clone()
    other[:, 3], target[:, 3] = -torch.inf, 0
    assert_exact(lambda z: function(z, target, **options), other)
    first, zero_there = logits.clone(), target.clone()  # a whole chunk is masked, and then it is not
    first[:, :1024], zero_there[:, :1024] = -torch.inf, 0
    for reduction in ("mean", "none"):
        assert_exact(lambda z, r=reduction: function(z, zero_there, reduction=r, **options), first)
    for z in (logits.sign() * 100, logits.sign() * 1e4):
        for dtype in (torch.float64, torch.float32):
            for x in value_and_grad(lambda z: function(z, target, **options), z.to(dtype)):
                assert x.isfinite().all()


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("divergence", "distillation")])
def test_mass_on_a_masked_class_costs_infinitely_much(name: str) -> None:
    function, options, logits, target = problem(name, 4, 6)
    logits[2, 1], target[2, 1] = -torch.inf, 0.5
    with kernels.disabled():
        theirs = value_and_grad(lambda z: function(z, target, reduction="none", **options), logits)
    ours = value_and_grad(lambda z: function(z, target, reduction="none", **options), logits)
    assert ours[0][2].isinf() == (name != "all mass")  # which leaves none there
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, equal_nan=True)


@each_loss
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(name: str, bad: float) -> None:
    function, options, logits, target = problem(name, 4, 6)
    for at in range(6):
        z = logits.clone()
        z[2, at] = bad
        losses = value_and_grad(lambda z: function(z, target, reduction="none", **options), z)[0]
        assert losses[2].isnan()
        assert losses[[0, 1, 3]].isfinite().all()


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives(name: str, reduction: str) -> None:
    function, options, logits, target = problem(name, 3, 4)
    z = logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: function(z, target, reduction=reduction, **options), z)
    assert torch.autograd.gradgradcheck(lambda z: function(z, target, reduction=reduction, **options), z)


def test_a_retained_graph_gives_the_gradient_again() -> None:
    function, options, logits, target = problem("all", 5, 7)
    z = logits.requires_grad_()
    value = function(z, target, **options)
    first = torch.autograd.grad(value, z, torch.tensor(3.0, dtype=z.dtype), retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(value, z)[0], first / 3)


@pytest.mark.parametrize("classes", [40, 70000])
def test_the_same_on_every_run_and_number_of_threads(classes: int) -> None:
    function, options, logits, target = problem("all", 9 if classes > 40 else 900, classes)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            found.append(value_and_grad(lambda z: function(z, target, **options), logits.float()))
    finally:
        torch.set_num_threads(before)
    for value, grad in found[1:]:
        assert torch.equal(value, found[0][0])
        assert torch.equal(grad, found[0][1])


@pytest.mark.parametrize("bad", [-0.25, 1.5, torch.nan, 1 + 1e-12])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bad_targets_are_named(bad: float, reduction: str) -> None:
    logits, target = torch.randn(4, 1500), torch.full((4, 1500), 1 / 1500, dtype=torch.float64)
    target[2, 1400] = bad
    for z in (logits, logits.clone().requires_grad_()):
        with pytest.raises(ValueError, match=rf"target holds {bad}, expected probabilities in \[0, 1\]"):
            cross_entropy_loss(z, target, reduction=reduction)


def test_who_goes_which_way(monkeypatch: pytest.MonkeyPatch) -> None:
    function, _, logits, target = problem("adjusted", 5, 7)
    z = logits.clone().requires_grad_()
    assert "_Total" in type(cross_entropy_loss(z, target).grad_fn).__name__
    assert "_Total" in type(logit_adjusted_loss(z, target, class_counts=torch.arange(1, 8)).grad_fn).__name__
    assert "_Total" in type(ldam_loss(z, target, class_counts=torch.arange(1, 8)).grad_fn).__name__
    for name in VECTORS[:3]:
        vector = torch.rand(7, dtype=torch.float64, requires_grad=True)
        function(logits, target, **{name: vector}).backward()
        assert vector.grad is not None
        assert vector.grad.abs().sum() > 0
    soft = target.clone().requires_grad_()
    (slope,) = torch.autograd.grad(cross_entropy_loss(logits, soft), soft)
    torch.testing.assert_close(slope, torch.where(target == 0, 0, -torch.log_softmax(logits, 1) / 5))
    weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(cross_entropy_loss(logits, target, weight=weight), weight)
    torch.testing.assert_close(slope, cross_entropy_loss(logits, target, reduction="none") / 5)

    def refuse(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(row_functions, "_apply_total", refuse)
    with torch.no_grad():
        cross_entropy_loss(z, target)
    cross_entropy_loss(logits, target)
    with pytest.raises(AssertionError):
        cross_entropy_loss(z, target)


@each_loss
def test_transforms_take_the_plain_form(name: str) -> None:
    function, options, logits, target = problem(name, 5, 7)
    by_row = torch.func.vmap(lambda z: function(z, target, reduction="none", **options))(logits[None])[0]
    torch.testing.assert_close(by_row, function(logits, target, reduction="none", **options))
    grad = torch.func.grad(lambda z: function(z, target, **options))(logits)
    z = logits.clone().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(function(z, target, **options), z)[0])
    losses = function(z, target, reduction="none", **options)
    rows = torch.autograd.grad(losses, z, torch.eye(5, dtype=z.dtype), is_grads_batched=True)[0]
    losses = function(z, target, reduction="none", **options)
    torch.testing.assert_close(rows.sum(0), torch.autograd.grad(losses.sum(), z)[0])


@pytest.mark.parametrize("name", ["all", "divergence", "distillation"])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"normalizer": "weight"}])
def test_compiles_in_one_graph(name: str, options: dict[str, Any]) -> None:
    function, settings, logits, target = problem(name, 5, 7)
    torch.compiler.reset()

    def call(z: Tensor) -> Tensor:
        return function(z, target, weight=torch.ones(5), **options, **settings)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    ours, theirs = value_and_grad(compiled, logits), value_and_grad(call, logits)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_operators_keep_their_schemas() -> None:
    logits, target = torch.randn(5, 7), torch.softmax(torch.randn(5, 7), 1)
    vector, weight, mask = torch.rand(7), torch.rand(5), torch.arange(5) > 0
    ops = torch.ops.counterpoise
    inputs = (logits, target, mask, vector, vector, vector, vector)
    for settings in ([False, 2.0, 0.1, 0.0, 1, 0.0], [True, 1.0, 0.0, 0.5, 2, 0.0]):
        losses, state, value, grad = torch.zeros(5), torch.zeros(5, 5), torch.zeros(()), torch.zeros(5, 7)
        torch.library.opcheck(ops.soft_rows_each, (*inputs, settings, losses, state))
        ops.soft_rows_each(*inputs, settings, losses, state)
        torch.library.opcheck(ops.soft_rows_backward, (*inputs, settings, state, losses, grad))
        torch.library.opcheck(ops.soft_rows_total, (*inputs, weight, settings, value, state, losses.clone(), None))
        torch.library.opcheck(ops.soft_rows_total, (*inputs, None, settings, value, None, None, grad))


def test_a_divergence_from_itself_is_zero() -> None:
    logits = torch.randn(6, 2000) * 4
    value, grad = value_and_grad(lambda z: divergence(z, torch.softmax(logits, 1)), logits)
    assert value.abs() < 1e-5
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(6, 1500), (3, 5, 4)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("normalizer", ["count", "weight"])
def test_logits_as_targets_are_their_softmax(shape: tuple[int, ...], smoothing: float, normalizer: str) -> None:
    _, options, logits, _ = problem("adjusted", *shape)
    vectors = {**options, "class_weight": options["margin"].flip(0)}
    scale = vectors.pop("scale")
    teacher = 50 * torch.randn(shape, dtype=torch.float64)
    weight = torch.rand(len(logits), dtype=torch.float64)

    def ours(z: Tensor) -> Tensor:
        ordered = tuple(vectors[name] for name in ("multiplicative", "additive", "margin", "class_weight"))
        options = (weight, "mean", "mean", normalizer, False)
        how = {"scale": scale, "smoothing": smoothing, "target_scale": 0.5}
        return soft_rows.soft_row_loss(z, teacher, pytest.fail, ordered, None, options, **how)

    def theirs(z: Tensor) -> Tensor:
        settings = {"weight": weight, "normalizer": normalizer, "label_smoothing": smoothing, "scale": scale}
        return adjusted_cross_entropy(z, torch.softmax(teacher / 2, 1), **settings, **vectors)

    for a, b in zip(value_and_grad(ours, logits), value_and_grad(theirs, logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_smoothed_divergence_is_the_plain_forms() -> None:
    logits, target = torch.randn(3, 4), torch.softmax(torch.randn(3, 4), 1)
    options = (None, "mean", "mean", "count", False)
    found = soft_rows.soft_row_loss(
        logits, target, lambda *_, **__: "plain", (None,) * 4, None, options, smoothing=0.1, divergence=True
    )
    assert found == "plain"
