"""Row-wise kernels against their plain forms: values, gradients, precision, and when the plain form is taken."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from counterpoise import kernels
from counterpoise.kernels import row_functions
from counterpoise.losses import (
    LogitAdjustedLoss,
    adjusted_cross_entropy,
    asymmetric_single_label_loss,
    class_balanced_loss,
    cross_entropy_loss,
    ldam_loss,
    softmax_focal_loss,
)
from counterpoise.memory import ClassStatistics

pytestmark = pytest.mark.skipif(
    not kernels.available()["rows_total"]["cpu"], reason="the CPU kernels are not compiled, or are switched off"
)

LOSSES: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "cross-entropy": (cross_entropy_loss, {}),
    "smoothed": (cross_entropy_loss, {"label_smoothing": 0.1}),
    "adjusted": (adjusted_cross_entropy, {"scale": 3.0, "additive": 1, "multiplicative": 1, "margin": 1}),
    "all": (adjusted_cross_entropy, {"label_smoothing": 0.3, "additive": 1, "class_weight": 1, "margin": 1}),
    "focal": (softmax_focal_loss, {"gamma": 2.0}),
    "focal, root": (softmax_focal_loss, {"gamma": 0.5, "alpha": 0.25}),
    "focal, smoothed": (softmax_focal_loss, {"gamma": 1.5, "label_smoothing": 0.2, "class_weight": 1}),
    "asymmetric": (asymmetric_single_label_loss, {"class_weight": 1}),
    "asymmetric, detached": (
        asymmetric_single_label_loss,
        {"gamma_pos": 0.7, "gamma_neg": 1.3, "detach_weight": True},
    ),
}
VECTORS = ("additive", "multiplicative", "margin", "class_weight")
each_loss = pytest.mark.parametrize("name", LOSSES)


def problem(name: str, *shape: int, dtype: torch.dtype = torch.float64, spread: float = 3.0) -> Any:
    """The loss with its vectors, logits and targets."""
    function, options = LOSSES[name]
    g = torch.Generator().manual_seed(sum(shape))
    vectors = {k: torch.rand(shape[1], generator=g) + 0.1 for k in VECTORS if k in options}
    logits = (torch.randn(shape, generator=g, dtype=torch.float64) * spread).to(dtype)
    target = torch.randint(0, shape[1], shape[:1] + shape[2:], generator=g)
    return function, {**options, **vectors}, logits, target


def evaluate(call: Callable[[Tensor], Tensor], logits: Tensor, upstream: int = 0) -> tuple[Tensor, Tensor]:
    """Value and gradient, with a random upstream gradient."""
    z = logits.detach().requires_grad_()
    value = call(z)
    g = torch.rand(value.shape, generator=torch.Generator().manual_seed(upstream), dtype=value.dtype) + 0.5
    return value.detach(), torch.autograd.grad(value, z, g)[0]


def plain(call: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same on the reference."""
    with kernels.disabled():
        return evaluate(call, logits)


def agree(call: Callable[[Tensor], Tensor], logits: Tensor, **tolerance: float) -> None:
    """Fused and plain give the same."""
    for ours, theirs in zip(evaluate(call, logits), plain(call, logits), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, **(tolerance or {"rtol": 1e-10, "atol": 1e-10}))


@each_loss
@pytest.mark.parametrize("shape", [(7, 10), (33, 17), (3, 2500), (2, 70001), (2, 5, 3, 4), (0, 4), (1, 2)])
def test_float64_is_the_plain_form(name: str, shape: tuple[int, ...]) -> None:
    function, options, logits, target = problem(name, *shape)
    for reduction in ("none", "mean", "sum"):
        agree(lambda z, r=reduction: function(z, target, reduction=r, **options), logits)


@each_loss
@pytest.mark.parametrize("dense", [False, True])
def test_every_way_of_counting(name: str, dense: bool) -> None:
    function, options, logits, target = problem(name, 9, 6, *((4,) if dense else ()))
    target = torch.where(torch.rand(target.shape, generator=torch.Generator().manual_seed(0)) < 0.3, -1, target)
    weight = torch.rand(9, dtype=torch.float64)
    masks = [None, torch.arange(9) % 3 > 0, torch.zeros(9, dtype=torch.bool)]
    normalizers = ("count", "weight", "positives", 3.5)
    for mask, w, n, inner in itertools.product(masks, (None, weight), normalizers, ("mean", "sum", "none")):
        settings = {
            "mask": mask,
            "weight": w if inner != "none" or not dense else None,
            "inner": inner,
            "normalizer": n,
        }
        agree(lambda z, s=settings: function(z, target, ignore_index=-1, **s, **options), logits)


@each_loss
def test_rows_that_do_not_count_may_hold_nan(name: str) -> None:
    function, options, logits, target = problem(name, 5, 6)
    logits[1], target[2] = torch.nan, -100
    logits[2] = torch.inf
    agree(lambda z: function(z, target, mask=torch.arange(5) != 1, **options), logits)


@each_loss
@pytest.mark.parametrize("spread", [1.0, 40.0])
def test_float32_is_as_exact_as_the_plain_form(name: str, spread: float) -> None:
    function, options, logits, target = problem(name, 9, 1500, spread=spread)
    logits = logits.float().clamp(-100, 100)

    def call(z: Tensor) -> Tensor:
        return function(z, target, **options)

    exact, ours, theirs = plain(call, logits.double()), evaluate(call, logits), plain(call, logits)
    scale = exact[1].abs().max()
    errors = [((got[1] - exact[1]).abs().max() / scale).item() for got in (ours, theirs)]
    assert errors[0] <= max(2 * errors[1], 2e-6)
    assert abs(ours[0] - exact[0]) <= max(2 * abs(theirs[0] - exact[0]), 2e-6 * abs(exact[0]))


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [12, 1500])
def test_half_precision_is_float32_rounded(name: str, dtype: torch.dtype, classes: int) -> None:
    function, options, logits, target = problem(name, 6, classes, dtype=dtype)
    value, grad = evaluate(lambda z: function(z, target, **options), logits)
    exact, exact_grad = plain(lambda z: function(z, target, **options), logits.float())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-6)
    least = torch.finfo(dtype).smallest_normal
    assert ((grad.float() - exact_grad).abs() <= 2 * torch.finfo(dtype).eps * exact_grad.abs().clamp_min(least)).all()


def test_a_float16_gradient_survives_the_scale_of_its_loss() -> None:
    logits = torch.zeros(2, 4000, dtype=torch.float16, requires_grad=True)
    (cross_entropy_loss(logits, torch.tensor([0, 1]), normalizer=1e6) * 2.0**20).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0, 5].item(), 2.0**20 / 4000e6, rtol=1e-2, atol=0)


@each_loss
def test_any_layout(name: str) -> None:
    function, options, logits, target = problem(name, 8, 11)
    buffer = torch.empty(8 * 11 + 1, dtype=logits.dtype)
    shifted = buffer[1:].view(8, 11).copy_(logits)
    for z in (logits.t().contiguous().t(), shifted, logits[:1].expand(8, 11), logits.repeat(1, 2)[:, ::2]):
        agree(lambda x: function(x, target, **options), z)
    agree(lambda x: function(x, target.repeat_interleave(2)[::2], **options), logits)
    mask = torch.arange(16) % 5 > 1
    agree(lambda x: function(x, target, mask=mask[::2], **options), logits)


@each_loss
def test_masked_classes_and_large_logits(name: str) -> None:
    function, options, logits, target = problem(name, 4, 6)
    options = {k: v for k, v in options.items() if k != "multiplicative"}
    rows = torch.arange(4)
    other = logits.clone()
    other[rows, (target + 1) % 6] = -torch.inf
    agree(lambda z: function(z, target, **options), other)
    only = torch.full_like(logits, -torch.inf)
    only[rows, target] = 1.5
    agree(lambda z: function(z, target, **options), only)
    for z in (logits.sign() * 100, logits.sign() * 1e4):
        for x in (
            *evaluate(lambda z: function(z, target, **options), z),
            *evaluate(lambda z: function(z, target, **options), z.float()),
        ):
            assert x.isfinite().all()


@each_loss
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(name: str, bad: float) -> None:
    function, options, logits, target = problem(name, 4, 6)
    for at in (int(target[1]), (int(target[1]) + 1) % 6):
        z = logits.clone()
        z[1, at] = bad
        losses = evaluate(lambda z: function(z, target, reduction="none", **options), z)[0]
        assert losses[1].isnan()
        assert losses[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("name", [name for name in LOSSES if "detached" not in name])  # whose slope is not the value's
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives(name: str, reduction: str) -> None:
    function, options, logits, target = problem(name, 3, 4)
    z = logits.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: function(z, target, reduction=reduction, **options), z)


def test_a_retained_graph_gives_the_gradient_again() -> None:
    function, options, logits, target = problem("all", 5, 7)
    z = logits.requires_grad_()
    value = function(z, target, **options)
    first = torch.autograd.grad(value, z, torch.tensor(3.0, dtype=z.dtype), retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(value, z)[0], first / 3)


@pytest.mark.parametrize("classes", [40, 70000])
def test_the_same_on_every_run_and_number_of_threads(classes: int) -> None:
    function, options, logits, target = problem("all", 9, classes, dtype=torch.float32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            found.append(evaluate(lambda z: function(z, target, **options), logits))
    finally:
        torch.set_num_threads(before)
    for value, grad in found[1:]:
        assert torch.equal(value, found[0][0])
        assert torch.equal(grad, found[0][1])


def test_bad_labels_are_named() -> None:
    logits = torch.randn(4, 3)
    for target, named in ((torch.tensor([0, 3, 1, 2]), "3"), (torch.tensor([0, -1, 1, 2]), "-1")):
        for reduction in ("mean", "none"):
            with pytest.raises(ValueError, match=rf"target holds {named}, expected class indices in \[0, 2\]"):
                cross_entropy_loss(logits.requires_grad_(), target, reduction=reduction)
            with pytest.raises(ValueError, match=rf"target holds {named}, expected class indices in \[0, 2\]"):
                softmax_focal_loss(logits.detach(), target, reduction=reduction)


def test_integer_types_and_bool() -> None:
    logits = torch.randn(4, 2, dtype=torch.float64)
    for dtype in (torch.bool, torch.uint8, torch.int16, torch.int32):
        agree(lambda z, t=dtype: cross_entropy_loss(z, torch.tensor([0, 1, 1, 0]).to(t)), logits)


def test_what_the_kernel_cannot_differentiate_goes_the_plain_way() -> None:
    _, _, logits, target = problem("adjusted", 5, 7)
    for name in VECTORS[:3]:
        vector = torch.rand(7, dtype=torch.float64, requires_grad=True)
        adjusted_cross_entropy(logits, target, **{name: vector}).backward()
        assert vector.grad is not None
        assert vector.grad.abs().sum() > 0
    weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(softmax_focal_loss(logits, target, weight=weight), weight)
    torch.testing.assert_close(slope, softmax_focal_loss(logits, target, reduction="none") / 5)


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


@pytest.mark.parametrize("name", ["all", "focal, smoothed", "asymmetric"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_in_one_graph(name: str, reduction: str) -> None:
    function, options, logits, target = problem(name, 5, 7)

    def call(z: Tensor) -> Tensor:
        return function(z, target, reduction=reduction, weight=torch.ones(5), **options)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(evaluate(compiled, logits), plain(call, logits), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_operators_keep_their_schemas() -> None:
    logits, target = torch.randn(5, 7), torch.arange(5)
    vector, weight, mask = torch.rand(7), torch.rand(5), torch.arange(5) > 0
    ops = torch.ops.counterpoise
    for kind in range(3):
        inputs = (logits, target, mask, vector, vector, vector, vector)
        settings = [kind, 2.0, 0.1, 2.0, 1.0, False, -100, 1, 0.0]
        losses, state, value, grad = torch.zeros(5), torch.zeros(5, 5), torch.zeros(()), torch.zeros(5, 7)
        torch.library.opcheck(ops.rows_each, (*inputs, settings, losses, state))
        ops.rows_each(*inputs, settings, losses, state)
        torch.library.opcheck(ops.rows_backward, (*inputs, settings, state, losses, grad))
        torch.library.opcheck(ops.rows_total, (*inputs, weight, settings, value, state, losses.clone(), None))
        torch.library.opcheck(ops.rows_total, (*inputs, None, settings, value, None, None, grad))


def test_class_vectors_follow_the_prior() -> None:
    _, _, logits, target = problem("cross-entropy", 6, 3)
    loss = LogitAdjustedLoss([5, 3, 2])
    before = loss(logits, target)
    loss.statistics.set_prior(torch.tensor([0.2, 0.2, 0.6]))
    changed = loss(logits, target)
    assert changed != before
    loss.statistics.prior.data.copy_(torch.tensor([0.5, 0.3, 0.2]))
    torch.testing.assert_close(loss(logits, target), before)
    loss.tau = 2.0
    assert loss(logits, target) != before
    with torch.inference_mode():
        loss.tau = 3.0
        loss(logits, target)
    loss(logits.requires_grad_(), target).backward()


def test_counts_may_be_a_list_a_tensor_or_statistics() -> None:
    _, _, logits, target = problem("cross-entropy", 6, 3)
    counts = torch.tensor([5, 3, 2])
    for function in (ldam_loss, class_balanced_loss):
        expected = function(logits, target, class_counts=ClassStatistics(counts))
        assert torch.equal(function(logits, target, class_counts=counts), expected)
        assert torch.equal(function(logits, target, class_counts=[5, 3, 2]), expected)
        assert function(logits, target, class_counts=counts.flip(0)) != expected


@pytest.mark.parametrize(("rows", "classes", "dtype"), [
    (9000, 1000, torch.float32), (3000, 3001, torch.float32), (1500, 3001, torch.float64), (6000, 3001, torch.bfloat16)
])  # fmt: skip
def test_a_gradient_too_large_for_the_caches_is_the_same(rows: int, classes: int, dtype: torch.dtype) -> None:
    """32 MiB and more are written past them; a third of the rows alone is not."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=g).to(dtype)
    target = torch.randint(classes, (rows,), generator=g)
    target[5] = -100

    def gradient(some: slice) -> Tensor:
        leaf = logits[some].clone().requires_grad_()
        return torch.autograd.grad(cross_entropy_loss(leaf, target[some], reduction="sum"), leaf)[0]

    whole = gradient(slice(None))
    assert whole.nbytes >= 2**25 > whole[: rows // 3].nbytes
    for start in range(0, rows, rows // 3):
        part = slice(start, start + rows // 3)
        assert torch.equal(whole[part], gradient(part))


def test_who_follows_every_operator_sees_the_losses_too() -> None:
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    z, target = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
    alone = torch.autograd.grad(cross_entropy_loss(z, target), z)[0]
    with Names():
        watched = torch.autograd.grad(cross_entropy_loss(z, target), z)[0]
    assert "counterpoise.rows_total.default" in seen
    assert torch.equal(alone, watched)


def test_a_view_that_is_not_what_lies_at_its_address() -> None:
    z, target = torch.complex(torch.zeros(4, 3), torch.randn(4, 3)).conj().imag, torch.tensor([0, 1, 2, 0])
    assert z.is_neg()
    agree(lambda x: cross_entropy_loss(x, target), z, rtol=1e-5, atol=1e-6)
    agree(lambda x: adjusted_cross_entropy(x, target, additive=z[0]), torch.randn(4, 3), rtol=1e-5, atol=1e-6)


def test_the_default_device_may_be_another_one() -> None:
    code = (
        "import torch\nwith torch.device('meta'):\n    from counterpoise.losses import cross_entropy_loss\n"
        "z = torch.zeros(4, 3, requires_grad=True)\n"
        "print(cross_entropy_loss(z, torch.tensor([0, 1, 2, 0])).item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(math.log(3), abs=1e-6)


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(row_functions, "_apply_total", refuse)
    logits, target = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        cross_entropy_loss(logits, target)
    cross_entropy_loss(logits.detach(), target)
    with pytest.raises(AssertionError):
        cross_entropy_loss(logits, target)
