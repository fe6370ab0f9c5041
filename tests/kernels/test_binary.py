"""Fused losses of independent labels equal their plain forms, on every path that a caller can take."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor

from counterpoise import kernels
from counterpoise.kernels.binary import focal
from counterpoise.losses import asymmetric_loss, binary_cross_entropy_loss, sigmoid_focal_loss, sigmoid_focal_star_loss
from tests.kernels.compare import assert_accurate, assert_exact, assert_within_two_ulp, compiled, value_and_grad

pytestmark = compiled

LOSSES = {
    "binary cross-entropy": binary_cross_entropy_loss,
    "focal": sigmoid_focal_loss,
    "focal, alpha": partial(sigmoid_focal_loss, alpha=0.25),
    "focal, gamma 0": partial(sigmoid_focal_loss, gamma=0.0),
    "focal, gamma 0.5": partial(sigmoid_focal_loss, gamma=0.5, alpha=0.75),
    "focal, gamma 3.7": partial(sigmoid_focal_loss, gamma=3.7),
    "focal, gamma 9": partial(sigmoid_focal_loss, gamma=9.0),
    "focal*": partial(sigmoid_focal_star_loss, alpha=0.25, beta=0.3),
    "asymmetric": asymmetric_loss,
    "asymmetric, no margin": partial(asymmetric_loss, margin=0.0, gamma_pos=1.0),
    "asymmetric, clamped": partial(asymmetric_loss, eps=1e-2, gamma_pos=1.0),
    "asymmetric, detached": partial(asymmetric_loss, detach_weight=True, gamma_pos=1.0),
    "asymmetric, broken gammas": partial(asymmetric_loss, gamma_neg=2.5, gamma_pos=0.3),
}
SHAPES = [(1,), (7,), (5, 3), (2, 511), (3, 512), (2, 1027), (3, 4, 5), (700, 1)]
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def problem(shape: tuple[int, ...], soft: bool = False, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = 5 * torch.randn(shape, generator=g, dtype=torch.float64)
    t = torch.rand(shape, generator=g, dtype=torch.float64)
    hard = (t < 0.3).double()
    return z, torch.where(torch.rand(shape, generator=g) < 0.5, t, hard) if soft else hard


def on(loss: Callable[..., Tensor], t: Tensor, **options: object) -> Callable[[Tensor], Tensor]:
    """The loss of logits, with everything else fixed and labels in the logits' type."""
    return lambda z: loss(z, t.to(z.dtype) if t.is_floating_point() else t, **options)


@every_loss
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("soft", [False, True])
def test_equals_the_plain_form(loss, shape, soft):
    z, t = problem(shape, soft)
    for options in ({}, {"reduction": "none"}, {"reduction": "sum", "inner": "sum"}, {"inner": "none"}):
        assert_exact(on(loss, t, **options), z)
        assert_accurate(on(loss, t, **options), z)


@every_loss
@pytest.mark.parametrize("inner", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalizer", ["count", "weight", "positives", 3.0])
def test_weights_masks_and_normalizers(loss, inner, normalizer):
    z, t = problem((6, 5))
    weight, rows = torch.linspace(0.5, 2, 6, dtype=torch.float64), torch.tensor([True, True, False, True, False, True])
    entries = torch.arange(30).reshape(6, 5) % 3 > 0
    entries[4] = False
    for options in ({"weight": weight}, {"mask": rows}, {"mask": entries}, {"weight": weight, "mask": entries}):
        for reduction in ("none", "mean", "sum"):
            settings = {**options, "inner": inner, "normalizer": normalizer, "reduction": reduction}
            assert_exact(on(loss, t, **settings), z)


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_logits_round_once(loss, dtype):
    z, t = problem((9, 70))
    assert_within_two_ulp(on(loss, t, reduction="sum", inner="sum"), z, dtype)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float64])
def test_labels_of_any_type(dtype):
    z, t = problem((6, 20))
    expected = sigmoid_focal_loss(z, t)
    torch.testing.assert_close(sigmoid_focal_loss(z, t.to(dtype)), expected, rtol=1e-14, atol=0)


@every_loss
def test_class_weights_multiply_entries(loss):
    if getattr(loss, "func", loss) not in (asymmetric_loss, binary_cross_entropy_loss):
        pytest.skip("takes no class weights")
    for shape in ((6, 4), (2, 600), (3, 4, 5)):
        z, t = problem(shape)
        weight = torch.linspace(0.2, 3, shape[1], dtype=torch.float64)
        for options in ({}, {"reduction": "none"}, {"inner": "none"}, {"inner": "none", "reduction": "none"}):
            assert_exact(on(loss, t, class_weight=weight, **options), z)


@pytest.mark.parametrize("loss", [asymmetric_loss, binary_cross_entropy_loss])
def test_class_weights_keep_their_digits_beside_narrow_logits(loss):
    z, t = problem((9, 70))
    narrow, weight = z.bfloat16(), torch.linspace(0.2, 3, 70)
    for context in (nullcontext, kernels.disabled):
        with context():
            found = loss(narrow, t, class_weight=weight)
            torch.testing.assert_close(found, loss(narrow.float(), t, class_weight=weight), rtol=1e-6, atol=0)


@pytest.mark.parametrize("soft", [False, True])
def test_weights_of_the_positive_part(soft):
    for shape in ((6, 4), (2, 600), (3, 4, 5)):
        z, t = problem(shape)
        t = problem(shape, soft)[1].bfloat16().double()  # labels that every type holds
        given = {"pos_weight": torch.linspace(0, 3, shape[1], dtype=torch.float64)}
        for _ in range(2):
            for options in ({}, {"reduction": "none"}, {"inner": "none"}, {"mask": z > -1}):
                assert_exact(on(binary_cross_entropy_loss, t, **given, **options), z)
            assert_accurate(on(binary_cross_entropy_loss, t, **given), z)
            assert_within_two_ulp(on(binary_cross_entropy_loss, t, **given), z, torch.bfloat16)
            given["class_weight"] = torch.linspace(2, 1, shape[1], dtype=torch.float64)


@every_loss
def test_masked_classes_and_extremes(loss):
    z, t = problem((5, 40))
    z[0, :7], t[0, :7] = -torch.inf, 0  # masked classes
    z[1], t[1] = -torch.inf, 0  # a whole row of them
    z[2, :4] = torch.tensor([100.0, -100, 1e4, -1e4])
    for options in ({}, {"reduction": "none"}, {"reduction": "sum"}, {"inner": "none"}):
        assert_exact(on(loss, t, **options), z)
        value, grad = value_and_grad(on(loss, t, **options), z.float())
        assert value.isfinite().all()
        assert grad.isfinite().all()
        assert (grad[1] == 0).all()


@every_loss
def test_what_is_not_finite_propagates(loss):
    z, t = problem((3, 4))
    z[0, 0] = torch.nan
    assert loss(z, t).isnan()
    assert loss(z, t, reduction="none").isnan().tolist() == [True, False, False]


@every_loss
def test_storage_does_not_matter(loss):
    z, t = problem((12, 14))
    expected = value_and_grad(on(loss, t), z.clone())
    wide = torch.zeros(12, 29, dtype=torch.float64)
    wide[:, 1::2] = z
    offset = torch.zeros(12 * 14 + 1, dtype=torch.float64)
    offset[1:] = z.flatten()
    for x in (wide[:, 1::2], offset[1:].view(12, 14), z.t().contiguous().t()):
        for ours, theirs in zip(value_and_grad(on(loss, t), x), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    row = z[:1].expand(12, 14)
    assert_exact(on(loss, t), row)


@every_loss
def test_empty_batches_give_a_connected_zero(loss):
    for shape in ((0,), (0, 5)):
        value, grad = value_and_grad(on(loss, torch.zeros(shape)), torch.zeros(shape))
        assert value == 0
        assert grad.shape == shape


@pytest.mark.parametrize("name", [name for name in LOSSES if "detached" not in name])
def test_second_derivatives(name):
    z, t = problem((4, 5))
    assert torch.autograd.gradgradcheck(on(LOSSES[name], t), z.requires_grad_())
    assert torch.autograd.gradgradcheck(on(LOSSES[name], t, reduction="none", inner="sum"), z)


@every_loss
def test_a_second_backward_gives_the_same(loss):
    z, t = problem((40, 30))
    z = z.float().requires_grad_()
    value = loss(z, t.float())
    first = torch.autograd.grad(value, z, torch.tensor(0.3), retain_graph=True)[0]
    second = torch.autograd.grad(value, z, torch.tensor(0.3))[0]
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-30)


@every_loss
def test_the_same_on_every_run_and_for_every_number_of_threads(loss):
    z, t = problem((700, 300))
    z = z.float()
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2, 3):
            torch.set_num_threads(n)
            found.append(value_and_grad(on(loss, t), z))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for pair in found[1:] for a, b in zip(pair, found[0], strict=True))


@every_loss
def test_compiles_as_one_graph(loss):
    z, t = problem((4, 6))
    for options in ({}, {"reduction": "none"}, {"mask": t >= 0, "weight": torch.ones(4)}):
        torch.compiler.reset()
        traced = torch.compile(loss, fullgraph=True, backend="aot_eager")
        ours = value_and_grad(lambda x, f=traced, o=options: f(x, t, **o), z.float())
        theirs = value_and_grad(on(loss, t, **options), z.float())
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_transforms_take_the_plain_form():
    z, t = problem((4, 6))
    rows = torch.vmap(lambda a, b: sigmoid_focal_loss(a, b))(z, t)
    torch.testing.assert_close(rows, sigmoid_focal_loss(z, t, reduction="none"))
    _, expected = value_and_grad(on(sigmoid_focal_loss, t, reduction="sum"), z, torch.ones(()))
    torch.testing.assert_close(torch.func.grad(on(sigmoid_focal_loss, t, reduction="sum"))(z), expected)
    jacobian = torch.autograd.functional.jacobian(on(sigmoid_focal_loss, t, reduction="none"), z, vectorize=True)
    torch.testing.assert_close(jacobian.sum(0), expected)
    _, tangent = torch.func.jvp(on(sigmoid_focal_loss, t, reduction="sum"), (z,), (torch.ones_like(z),))
    torch.testing.assert_close(tangent, expected.sum())


@every_loss
def test_labels_out_of_range_are_named(loss):
    z, t = problem((3, 4))
    t[1, 2] = 1.5
    for options in ({}, {"reduction": "none"}):
        with pytest.raises(ValueError, match=r"target holds 1\.5, expected labels in \[0, 1\]"):
            loss(z, t, **options)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1, 2] = False
    assert loss(z, t, mask=mask).isfinite()


def test_no_gradient_is_made_that_nobody_takes():
    z, t = problem((64, 64))
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as watched:
        sigmoid_focal_loss(z.requires_grad_(), t)
    events = watched.key_averages()
    assert "counterpoise::binary_total" in {event.key for event in events}
    assert sum(max(event.self_cpu_memory_usage, 0) for event in events) < 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_are_registered_as_they_should(dtype):
    z, t = problem((5, 7))
    z, t = z.to(dtype), t.to(dtype)
    inputs, settings = (z, t, None, None), [7, *focal(None, 2.0), True, 0.0]
    one, rows = torch.ones((), dtype=dtype), torch.ones(5, dtype=dtype)
    ops = torch.ops.counterpoise
    for op, arguments in (
        (ops.binary_rows, (*inputs, settings, rows.clone(), rows.clone())),
        (ops.binary_rows_backward, (*inputs, settings, rows, z.clone())),
        (ops.binary_total, (*inputs, None, settings, one.clone(), one.clone(), None)),
        (ops.binary_total, (*inputs, rows, settings, one.clone(), None, z.clone())),
        (ops.binary_total_backward, (*inputs, None, settings, one, one, z.clone())),
    ):
        torch.library.opcheck(op, arguments)


def test_disabled_means_plain():
    z, t = problem((64, 64))
    with kernels.disabled(), torch.profiler.profile() as watched:
        sigmoid_focal_loss(z, t)
    assert not any(event.key.startswith("counterpoise::") for event in watched.key_averages())
