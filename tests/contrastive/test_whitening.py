"""Whitening: what comes out is white, and the gradients hold where eigenvalues meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from counterpoise._core import second_pass
from counterpoise.contrastive import Whitening, whiten
from counterpoise.contrastive.whitening import KINDS
from tests.pool import Pool

S, D = 12, 4
kinds = pytest.mark.parametrize("kind", KINDS)


def features(*shape: int, seed: int = 0) -> Tensor:
    """Correlated, off centre and of unlike scales."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*(shape or (S, D)), dtype=torch.float64, generator=g)
    mixing = torch.randn(x.shape[-1], x.shape[-1], dtype=torch.float64, generator=g)
    return x @ mixing + 3


def orthogonal(width: int) -> Tensor:
    g = torch.Generator().manual_seed(7)
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=g))[0]


@kinds
def test_the_mean_is_zero_and_the_covariance_the_identity(kind: str) -> None:
    z = whiten(features(), kind=kind)
    assert_close(z.mean(0), torch.zeros(D, dtype=torch.float64))
    assert_close(z.T.cov(), torch.eye(D, dtype=torch.float64))


@kinds
def test_leading_dimensions_are_batches_of_their_own(kind: str) -> None:
    x = features(2, 3, S, D)
    z = whiten(x, kind=kind)
    assert_close(z[1, 2], whiten(x[1, 2], kind=kind))


@kinds
def test_eps_mixes_the_identity_into_the_covariance(kind: str) -> None:
    x = features()
    z = whiten(x, kind=kind, eps=0.2)
    whitener = torch.linalg.lstsq(x - x.mean(0), z).solution.T
    shrunk = 0.8 * x.T.cov() + 0.2 * torch.eye(D)
    assert_close(whitener @ shrunk @ whitener.T, torch.eye(D, dtype=torch.float64))


@kinds
@pytest.mark.parametrize("correction", [0, 1])
def test_the_correction_is_that_of_the_covariance(kind: str, correction: int) -> None:
    z = whiten(features(), kind=kind, correction=correction)
    assert_close(z.T.cov(correction=correction), torch.eye(D, dtype=torch.float64))


def test_cholesky_does_not_see_a_triangular_mixing() -> None:
    x = features()
    lower = torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).tril()
    lower.diagonal().abs_().add_(0.5)
    assert_close(whiten(x @ lower.T + 5), whiten(x))


def test_cholesky_sees_the_order_of_features_and_zca_does_not() -> None:
    x, order = features(), torch.tensor([2, 0, 3, 1])
    assert_close(whiten(x[:, order], kind="zca"), whiten(x, kind="zca")[:, order])
    assert not torch.allclose(whiten(x[:, order]), whiten(x)[:, order])


def test_zca_turns_with_the_features() -> None:
    x, rotation = features(), orthogonal(D)
    assert_close(whiten(x @ rotation, kind="zca"), whiten(x, kind="zca") @ rotation)


def test_zca_leaves_what_is_white_alone() -> None:
    white = whiten(features(), kind="cholesky")
    assert_close(whiten(white, kind="zca"), white)


def test_zca_moves_x_least_of_all_whitenings() -> None:
    x = features() / 10
    centred, z = x - x.mean(0), whiten(x, kind="zca")
    for other in (whiten(x), z @ orthogonal(D)):
        assert (z - centred).square().sum() < (other - centred).square().sum()


# Weights


@kinds
def test_the_weighted_covariance_is_that_of_torch(kind: str) -> None:
    weight = torch.rand(S, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z = whiten(features(), kind=kind, weight=weight)
    assert_close(z.T.cov(aweights=weight), torch.eye(D, dtype=torch.float64))


@kinds
@pytest.mark.parametrize(("axis", "shape"), [("batch", (S, D)), ("channel", (5, 16))])
def test_weight_zero_leaves_a_row_out_whatever_it_holds(kind: str, axis: str, shape: tuple[int, int]) -> None:
    x = features(*shape)
    weight = torch.ones(len(x), dtype=torch.float64)
    weight[1] = 0
    kept = weight > 0
    x[1] = torch.nan
    z = whiten(x, kind=kind, axis=axis, weight=weight)
    assert_close(z[kept], whiten(x[kept], kind=kind, axis=axis))
    assert (z[1] == 0).all()


# Channels


@kinds
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_channel_whitening_makes_examples_uncorrelated_in_every_group(kind: str, groups: int) -> None:
    z = whiten(features(3, 16), kind=kind, axis="channel", groups=groups)
    for group in z.chunk(groups, dim=1):
        assert_close(group @ group.T / (16 / groups - 1), torch.eye(3, dtype=torch.float64))


def test_channel_whitening_in_one_group_centres_every_example() -> None:
    z = whiten(features(3, 16), kind="zca", axis="channel")
    assert_close(z.mean(1), torch.zeros(3, dtype=torch.float64))


def test_channel_whitening_is_batch_whitening_of_the_transpose() -> None:
    x = features(3, 16)
    assert_close(whiten(x, kind="zca", axis="channel"), whiten(x.T, kind="zca").T)


@pytest.mark.parametrize(("axis", "shape"), [("batch", (S, D)), ("channel", (3, 16))])
def test_a_permutation_says_which_channels_form_a_group(axis: str, shape: tuple[int, int]) -> None:
    x = features(*shape)
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(2))
    expected = torch.empty_like(x)
    expected[:, order] = whiten(x[:, order], kind="zca", axis=axis, groups=2)
    assert_close(whiten(x, kind="zca", axis=axis, groups=2, permutation=order), expected)


def test_one_group_does_not_see_the_permutation() -> None:
    x = features(3, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    assert_close(whiten(x, kind="zca", axis="channel", permutation=order), whiten(x, kind="zca", axis="channel"))


# Gradients


def differentiable(kind: str) -> Callable[[Tensor], Tensor]:
    return lambda x: whiten(x, kind=kind)


@kinds
def test_first_and_second_derivatives_agree_with_finite_differences(kind: str) -> None:
    x = features(7, 3).requires_grad_()
    assert torch.autograd.gradcheck(differentiable(kind), x)
    assert torch.autograd.gradgradcheck(differentiable(kind), x)


def test_derivatives_of_zca_hold_where_all_eigenvalues_are_equal() -> None:
    """Where the gradient of an eigendecomposition is 0 / 0."""
    x = whiten(features(7, 3)).detach().requires_grad_()
    assert torch.autograd.gradcheck(differentiable("zca"), x)
    assert torch.autograd.gradgradcheck(differentiable("zca"), x)


def test_the_gradient_of_zca_is_that_of_the_eigendecomposition() -> None:
    x = features().requires_grad_()
    cotangent = features(S, D, seed=5)
    centred = x - x.mean(0)
    values, u = torch.linalg.eigh(centred.T @ centred / (S - 1))
    expected = torch.autograd.grad(centred @ u @ (values**-0.5).diag() @ u.T, x, cotangent)[0]
    assert_close(torch.autograd.grad(whiten(x, kind="zca"), x, cotangent)[0], expected)


# Precision and what cannot be whitened


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_whitened_in_float32(kind: str, dtype: torch.dtype) -> None:
    x = (features() / 10).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = whiten(x, kind=kind)
    assert z.dtype == torch.float32
    assert_close(z, whiten(x.float(), kind=kind))


@kinds
def test_nan_is_never_repaired_or_blamed_on_the_covariance(kind: str) -> None:
    x = features()
    x[3, 1] = torch.nan
    assert whiten(x, kind=kind).isnan().any(1).all()


def dependent() -> Tensor:
    """The last feature is the sum of the others."""
    x = features()
    return torch.cat([x, x.sum(1, keepdim=True)], dim=1)


@kinds
@pytest.mark.parametrize("x", [dependent(), torch.full((S, D), 5.0), features(4, 4)], ids=["sum", "one point", "few"])
def test_shrinking_keeps_value_and_gradient_finite(kind: str, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    z = whiten(x, kind=kind, on_singular="shrink")
    z.square().sum().backward()
    assert z.isfinite().all()
    assert z.abs().max() < 100
    assert x.grad is not None
    assert x.grad.isfinite().all()


@kinds
def test_shrinking_leaves_alone_what_can_be_inverted(kind: str) -> None:
    x = torch.stack([features(), torch.full((S, D), 5.0, dtype=torch.float64)])
    assert_close(whiten(x, kind=kind, on_singular="shrink")[0], whiten(x[0], kind=kind))


@kinds
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_shrinking_does_not_depend_on_the_scale(kind: str, scale: float) -> None:
    x = features(4, 4)
    assert_close(whiten(scale * x, kind=kind, on_singular="shrink"), whiten(x, kind=kind, on_singular="shrink"))


@kinds
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda kind: whiten(features(8, 8), kind=kind),
            r"x holds blocks of S = 8 examples with D = 8 features, and with eps = 0.0 their covariance .* "
            r"expected S - 1 >= D",
        ),
        (lambda kind: whiten(dependent(), kind=kind), r"none that depends on others, eps > 0, or on_singular"),
        (
            lambda kind: whiten(features(8, 16), kind=kind, axis="channel", groups=4),
            r"S = 8 examples with D = 4 features a group.* expected S <= D - 1",
        ),
        (lambda kind: whiten(features(), kind=kind, groups=3), r"x has 4 channels, expected a multiple of groups = 3"),
        (lambda kind: whiten(features(), kind=kind, eps=1.5), r"eps is 1.5, expected a number in \[0, 1\]"),
        (
            lambda kind: whiten(features(), kind=kind, axis="row"),
            r"axis is 'row', expected one of \['batch', 'channel'",
        ),
        (lambda kind: whiten(features()[0], kind=kind), r"x is of shape \(4,\) and torch.float64, expected a floating"),
        (
            lambda kind: whiten(features(), kind=kind, weight=torch.ones(3)),
            r"weight has shape \(3,\), expected \(12,\)",
        ),
        (lambda kind: Whitening(3, kind=kind)(features()), r"x has shape \(12, 4\), expected \(N, 3\)"),
        (lambda _: whiten(features(), kind="pca"), r"kind is 'pca', expected one of \['cholesky', 'zca'\]"),
    ],
    ids=["few", "dependent", "channels", "groups", "eps", "axis", "shape", "weight", "module", "pca"],
)
def test_what_cannot_be_whitened_is_refused(call: Callable[[str], Any], message: str, kind: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(kind)


# The module and its running statistics


def test_the_module_whitens_the_batch_in_training() -> None:
    x = features()
    assert_close(Whitening(D)(x), whiten(x))


def test_running_statistics_follow_by_the_momentum_before_eps() -> None:
    x, module = features(), Whitening(D, eps=0.1, momentum=0.25)
    module(x)
    assert_close(module.running_mean, 0.25 * x.mean(0).float())
    assert_close(module.running_covariance, 0.25 * x.T.cov().float() + 0.75 * torch.eye(D))


def test_evaluation_uses_the_running_statistics_and_a_row_does_not_see_the_others() -> None:
    module, x = Whitening(D, momentum=1.0), features().float()
    module(x)
    module.eval()
    assert_close(module(x), whiten(x), rtol=1e-4, atol=1e-5)
    assert_close(module(x[:1]), module(x)[:1])


def test_without_tracking_evaluation_whitens_the_batch() -> None:
    module = Whitening(D, track_running_stats=False).eval()
    assert_close(module(features()), whiten(features()))


def test_statistics_move_in_training_only_and_never_to_nan() -> None:
    module, x = Whitening(D), features()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with second_pass():
        module(x)
    module.eval()(x)
    module.train()
    x[0, 0] = torch.nan
    module(x)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_statistics_keep_their_precision_in_half_modules() -> None:
    assert Whitening(D).half().running_covariance.dtype == torch.float32


def whitened_share(rank: int, split: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    module = Whitening(D)
    rows = slice(sum(split[:rank]), sum(split[: rank + 1]))
    return module(features()[rows]), module.running_covariance


def test_several_ranks_whiten_with_the_statistics_of_all(ranks: Pool) -> None:
    expected, running = whitened_share(0, (S,))
    found = ranks.run(whitened_share, (7, 0, 5))
    assert_close(torch.cat([z for z, _ in found]), expected)
    for _, of_rank in found:
        assert_close(of_rank, running)
