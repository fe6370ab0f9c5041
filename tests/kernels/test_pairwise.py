"""Sums over pairs in tiles against the plain forms, with tiles so small that every edge is met."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from counterpoise import kernels
from counterpoise.contrastive import (
    ascl_loss,
    cacr_loss,
    clip_loss,
    ntxent_loss,
    siglip_loss,
    supcon_loss,
)
from counterpoise.contrastive.info_nce import (
    InfoNCE,
    info_nce,
    not_self,
    positive_or_bank,
    same_class,
    same_label,
)
from counterpoise.kernels import pair_rules, pair_tiles, pairwise
from counterpoise.memory import MemoryBank

pytestmark = pytest.mark.skipif(
    not kernels.available()["pairwise_rows"]["cpu"], reason=str(kernels.available()["pairwise_rows"]["why_not"])
)
ROWS, KEYS, WIDTH = 41, 67, 9


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairwise, "SMALL", 0)
    monkeypatch.setitem(pair_tiles.TILES, "cpu", (16, 24))
    monkeypatch.setattr(pairwise, "STRIP", (15, 32))
    monkeypatch.setattr(pairwise, "WIDEST_STRIP", 3)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ran in tiles."""
    names: list[str] = []
    for name in ("masked_sums", "softmax_mean", "sigmoid_sums", "softmax_sums"):
        real: Callable[..., Any] = getattr(pairwise, name)

        def noted(*args: Any, _real: Callable[..., Any] = real, _name: str = name, **kwargs: Any) -> Any:
            names.append(_name)
            return _real(*args, **kwargs)

        monkeypatch.setattr(pairwise, name, noted)
    return names


def rows(n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(n, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def ids(n: int, first: int = 0, classes: int = 5, seed: int = 0) -> Tensor:
    labels = torch.randint(-1, classes, (n,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([torch.arange(first, first + n), labels], dim=1)


def derivatives(f: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
    """Values, and the gradients of all inputs under a random upstream gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    found = f(*leaves)
    values = [x for x in (found if isinstance(found, tuple) else (found,)) if x.requires_grad]
    generator = torch.Generator().manual_seed(9)
    upstream = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in values]
    grads = torch.autograd.grad(values, leaves, upstream, allow_unused=True, materialize_grads=True)
    return [*(x.detach() for x in values), *grads]


def same(f: Callable[..., Any], *inputs: Tensor) -> None:
    """Both paths: float64 to 1e-10, float32 no further from float64 than twice the plain form, or 2e-6."""
    ours = derivatives(f, *inputs)
    with kernels.disabled():
        plain = derivatives(f, *inputs)
        exact = plain if inputs[0].dtype == torch.float64 else derivatives(f, *(x.double() for x in inputs))
    for a, b, c in zip(ours, plain, exact, strict=True):
        size = float(c.abs().max()) or 1.0
        error, allowed = float((a.double() - c).abs().max()), float((b.double() - c).abs().max())
        limit = 1e-10 * size if inputs[0].dtype == torch.float64 else max(2 * allowed, 2e-6 * size)
        assert error <= limit, (error, allowed, size)


# ---- InfoNCE ------------------------------------------------------------------------------------------------------


def contrast(found: InfoNCE) -> tuple[Tensor, ...]:
    return found.loss, torch.where(found.log_sum_exp == -torch.inf, 0, found.log_sum_exp), found.positive_log_prob


POSITIVE = {"label": same_label, "class": same_class, "index": None}
CANDIDATE = {"all": None, "not self": not_self, "label": same_label, "bank": positive_or_bank}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("candidate", CANDIDATE)
@pytest.mark.parametrize("positive", POSITIVE)
def test_rules_of_two_tensors(
    positive: str, candidate: str, weighted: bool, dtype: torch.dtype, taken: list[str]
) -> None:
    key_ids = ids(KEYS, seed=1)
    key_ids[-9:, 0] = -1
    weight = torch.randn(KEYS, dtype=dtype, generator=torch.Generator().manual_seed(3))
    weight[[0, 5, 66]] = -torch.inf
    index = torch.randint(0, KEYS, (ROWS, 3), generator=torch.Generator().manual_seed(4))
    arguments: dict[str, Any] = {
        "query_ids": ids(ROWS, seed=2),
        "key_ids": key_ids,
        "positive": POSITIVE[positive] or index,
        "candidate": CANDIDATE[candidate],
        "key_log_weight": weight if weighted else None,
        "itself": torch.arange(ROWS).flip(0) if weighted else None,
    }
    same(
        lambda q, k, tau: contrast(info_nce(q, k, temperature=tau, **{n: _typed(x, q) for n, x in arguments.items()})),
        rows(ROWS, dtype),
        rows(KEYS, dtype, 1),
        torch.tensor(0.4, dtype=dtype),
    )
    assert set(taken) == {"masked_sums"}


def _typed(x: Any, like: Tensor) -> Any:
    return x.to(like.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [0.5, 9.0])  # one shift for all rows, or the largest logit of each
@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("positive", POSITIVE)
def test_rules_of_one_tensor(positive: str, itself: bool, size: float, dtype: torch.dtype) -> None:
    own = ids(ROWS)
    arguments: dict[str, Any] = {
        "query_ids": own,
        "key_ids": own,
        "positive": POSITIVE[positive] or torch.arange(ROWS).roll(7)[:, None].repeat(1, 2),
        "candidate": None if itself else not_self,
        "itself": torch.arange(ROWS) if itself else None,
    }
    same(lambda z, tau: contrast(info_nce(z, z, temperature=tau, **arguments)), size * rows(ROWS, dtype),
         torch.tensor(0.7, dtype=dtype))  # fmt: skip


def test_one_tensor_takes_half_of_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: made.append(out.numel()) or real(a, b, out=out))
    z, own = rows(96), ids(96)
    info_nce(z, z, query_ids=own, key_ids=own)
    assert sum(made) <= 96 * (96 + 16) / 2
    made.clear()
    info_nce(z, z.clone(), query_ids=own, key_ids=own)
    assert sum(made) == 96 * 96


def test_a_row_numbered_otherwise_is_no_mirror() -> None:
    own = ids(ROWS)
    same(
        lambda z: contrast(
            info_nce(z, z, query_ids=own, key_ids=own, candidate=None, itself=torch.arange(ROWS).roll(1))
        ),
        rows(ROWS),
    )


@pytest.mark.parametrize("shape", [(), (ROWS,)])
def test_temperatures_and_further_logits(shape: tuple[int, ...]) -> None:
    own = {"query_ids": ids(ROWS), "key_ids": ids(KEYS)}
    tau = 0.3 + torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    same(
        lambda q, k, tau, extra: contrast(info_nce(q, k, temperature=tau, extra_logits=extra, **own)),
        rows(ROWS),
        rows(KEYS, seed=1),
        tau,
        rows(ROWS, seed=2),
    )


def test_keys_without_gradient_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = rows(KEYS, seed=1)
    none = torch.empty(ROWS, 0, dtype=torch.int64)
    some = torch.randint(0, KEYS, (ROWS, 2), generator=torch.Generator().manual_seed(1))
    for positive in (none, some):
        arguments: dict[str, Any] = {"query_ids": ids(ROWS), "key_ids": ids(KEYS), "candidate": None}
        same(lambda q, p=positive, a=arguments: contrast(info_nce(q, bank, positive=p, **a))[1:], rows(ROWS))
    q = rows(ROWS).requires_grad_()
    found = info_nce(q, bank, positive=none, **arguments).log_sum_exp.sum()
    monkeypatch.setattr(torch, "mm", None)
    found.backward()
    assert q.grad is not None


def test_ids_of_any_size() -> None:
    large = torch.tensor([-(2**62), -1, 0, 1, 2**31, 2**31 + 1, 2**62])
    pick = torch.randint(0, 7, (2, ROWS + KEYS), generator=torch.Generator().manual_seed(2))
    own = large[pick].T.contiguous()
    for positive, candidate in itertools.product((same_label, same_class), CANDIDATE.values()):
        same(
            lambda q, k, p=positive, c=candidate: contrast(
                info_nce(q, k, query_ids=own[:ROWS], key_ids=own[ROWS:], positive=p, candidate=c)
            ),
            rows(ROWS),
            rows(KEYS, seed=1),
        )


def test_a_rule_of_ones_own_and_learned_weights_are_plain(taken: list[str]) -> None:
    own: dict[str, Any] = {"query_ids": ids(ROWS), "key_ids": ids(KEYS)}
    info_nce(rows(ROWS), rows(KEYS, seed=1), positive=lambda q, k: same_label(q, k), **own)
    info_nce(rows(ROWS), rows(KEYS, seed=1), key_log_weight=torch.zeros(KEYS, requires_grad=True), **own)
    with kernels.disabled():
        info_nce(rows(ROWS), rows(KEYS, seed=1), **own)
    assert not taken
    info_nce(rows(ROWS), rows(KEYS, seed=1), **own)
    assert taken


def test_no_rows_or_no_keys() -> None:
    for n, m in ((0, KEYS), (ROWS, 0), (0, 0)):
        found = info_nce(rows(n), rows(m, seed=1), query_ids=ids(n), key_ids=ids(m))
        assert found.loss.shape == (n,)
        assert not found.valid.any()


def test_a_small_batch_takes_the_matrix(monkeypatch: pytest.MonkeyPatch, taken: list[str]) -> None:
    monkeypatch.setattr(pairwise, "SMALL", ROWS * KEYS)
    info_nce(rows(ROWS), rows(KEYS, seed=1), query_ids=ids(ROWS), key_ids=ids(KEYS))
    assert not taken


def layouts(x: Tensor) -> Iterator[Tensor]:
    yield x.T.contiguous().T
    yield torch.cat([x, x], dim=1)[:, :WIDTH]
    yield torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    yield x[:1].expand_as(x)


def test_layouts() -> None:
    own: dict[str, Any] = {"query_ids": ids(ROWS), "key_ids": ids(KEYS)}
    q, k = rows(ROWS, torch.float32), rows(KEYS, torch.float32, 1)
    for a, b in zip(layouts(q), layouts(k), strict=True):
        expected = info_nce(a.contiguous(), b.contiguous(), **own).loss
        assert_close(info_nce(a, b, **own).loss, expected)
        a, b = a.clone(memory_format=torch.preserve_format).requires_grad_(), b.detach().requires_grad_()
        for grad in torch.autograd.grad(info_nce(a, b, **own).loss.sum(), (a, b)):
            assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_logits_keep_their_digits(dtype: torch.dtype) -> None:
    own = ids(ROWS)
    z = rows(ROWS, dtype)
    z = 10 * z / z.norm(dim=1, keepdim=True)
    same(lambda z: contrast(info_nce(z, z, query_ids=own, key_ids=own, temperature=1.0)), z)
    same(lambda q, k: contrast(info_nce(q, k, query_ids=own, key_ids=own, temperature=1.0)), z, -z)


@pytest.mark.parametrize("two", [False, True])
def test_products_in_bfloat16_are_torchs_own_switch(two: bool, taken: list[str]) -> None:
    """Where the processor has none they stay in float32; sums and results are float32 everywhere."""
    z, other = rows(300, torch.float32).requires_grad_(), rows(300, torch.float32, seed=1).requires_grad_()
    leaves = (z, other) if two else (z,)

    def run() -> tuple[Tensor, ...]:
        loss = clip_loss(z, other) if two else supcon_loss(z, other.detach(), labels=ids(300)[:, 1])
        return loss, *torch.autograd.grad(loss, leaves)

    exact, before = run(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = run()
    finally:
        torch.set_float32_matmul_precision(before)
    assert taken
    for x, y in zip(found, exact, strict=True):
        assert x.dtype == torch.float32
        assert_close(x, y, rtol=0, atol=0.02 * float(y.abs().max()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("alone", [False, True])
def test_what_is_not_finite_comes_through(bad: float, alone: bool) -> None:
    z, own = rows(ROWS), ids(ROWS)
    z[3, 2] = bad
    keys = z if alone else z.clone()
    found = info_nce(z, keys, query_ids=own, key_ids=own)
    with kernels.disabled():  # a logit of minus infinity is no candidate
        plain = info_nce(z, keys, query_ids=own, key_ids=own)
    assert not plain.log_sum_exp.isfinite().all()
    assert torch.equal(found.log_sum_exp.isfinite(), plain.log_sum_exp.isfinite())
    assert torch.equal(found.loss.isfinite(), plain.loss.isfinite())


def test_a_row_without_candidates_is_minus_infinity() -> None:
    own = ids(ROWS)
    z = rows(ROWS).requires_grad_()
    for keys in (z, z.detach().clone().requires_grad_()):
        found = info_nce(z, keys, query_ids=own, key_ids=own, candidate=same_label)
        assert ((found.log_sum_exp == -torch.inf) == ~found.valid).all()
        (grad,) = torch.autograd.grad(found.loss.sum(), z)
        assert grad.isfinite().all()


def test_second_derivatives() -> None:
    own = {"query_ids": ids(7), "key_ids": ids(7)}
    z, other = rows(7)[:, :3].requires_grad_(), rows(7, seed=1)[:, :3].requires_grad_()
    tau = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda z, tau: info_nce(z, z, temperature=tau, **own).loss.sum(), (z, tau))
    assert torch.autograd.gradgradcheck(lambda q, k: info_nce(q, k, **own).loss.sum(), (z, other))
    assert torch.autograd.gradgradcheck(lambda q, k, b: siglip_loss(q, k, scale=2.0, bias=b), (z, other, tau))
    for gradient in ("full", "none"):
        assert torch.autograd.gradcheck(lambda q, k: cacr_loss(q, k, weight_gradient="full"), (z, other))
        (first,) = torch.autograd.grad(cacr_loss(z, other, weight_gradient=gradient), z, create_graph=True)
        with kernels.disabled():
            (plain,) = torch.autograd.grad(cacr_loss(z, other, weight_gradient=gradient), z, create_graph=True)
        assert_close(torch.autograd.grad(first.sin().sum(), z)[0], torch.autograd.grad(plain.sin().sum(), z)[0])


def test_transforms_take_the_plain_form(taken: list[str]) -> None:
    own = {"query_ids": ids(ROWS), "key_ids": ids(KEYS)}
    q, k = rows(ROWS), rows(KEYS, seed=1)

    def loss(q: Tensor) -> Tensor:
        return info_nce(q, k, **own).loss.sum()

    transformed = torch.func.grad(loss)(q)
    assert not taken
    leaf = q.clone().requires_grad_()
    assert_close(transformed, torch.autograd.grad(loss(leaf), leaf)[0])
    found = info_nce(leaf, k.clone().requires_grad_(), **own).loss
    upstream = torch.eye(ROWS, dtype=q.dtype)
    batched = torch.autograd.grad(found, leaf, upstream, is_grads_batched=True, retain_graph=True)[0]
    assert_close(batched[3], torch.autograd.grad(found, leaf, upstream[3])[0])


def test_compiled_as_a_whole() -> None:
    a, b = rows(ROWS, torch.float32), rows(ROWS, torch.float32, 1)
    compiled = torch.compile(lambda a, b: ntxent_loss(a, b), fullgraph=True, backend="aot_eager")
    expected, found = derivatives(lambda a, b: ntxent_loss(a, b), a, b), derivatives(compiled, a, b)
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_the_same_bits_with_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pair_tiles.TILES, "cpu", (256, 1024))
    z = torch.randn(1100, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(1100) % 13
    found = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            rules = pair_rules.pairs(
                z, positive=pair_rules.SAME_LABEL, candidate=pair_rules.NOT_SELF,
                query_ids=torch.stack([torch.arange(1100), labels], 1),
                key_ids=torch.stack([torch.arange(1100), labels], 1),
            )  # fmt: skip
            products = (z[:200] @ z[200:].T).contiguous() if not found else found[0][0].clone()
            top, total, similarity, mass = torch.full((1100,), 90.0), *(torch.zeros(1100) for _ in range(3))
            place = (0, 200, *rules.arguments())
            torch.ops.counterpoise.pairwise_both(products, *place, top, total, similarity, mass)
            slopes = products.clone()
            more = (top, torch.ones(1100), None, None, 0, torch.ones(1100), True, True)
            torch.ops.counterpoise.pairwise_slopes(slopes, *place, *more)
            found.append((products, total, similarity, mass, slopes))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


class _Largest(TorchDispatchMode):
    """The largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            self.elements = max(self.elements, x.numel() if isinstance(x, Tensor) else 0)
        return out


@pytest.mark.parametrize("fixed", [None, 0, 20])
def test_gradients_that_come_with_the_mean_serve_every_upstream(fixed: int | None) -> None:
    q, k = (rows(n, seed=seed).requires_grad_() for n, seed in ((ROWS, 0), (KEYS, 1)))
    usable = torch.zeros(KEYS, dtype=torch.float64)
    usable[::3] = -torch.inf
    rules = pair_rules.pairs(q, itself=torch.arange(ROWS), log_weight=usable, sharpness=0.7)
    upstreams = torch.full((ROWS,), -1.5, dtype=q.dtype), rows(ROWS, seed=2)[:, 0], torch.zeros(ROWS, dtype=q.dtype)

    def mean(even: bool) -> Tensor:
        return pairwise.softmax_mean(q, k, rules, lambda *_: (), fixed=fixed, constant=fixed or 0, even=even)[0]

    ours, plain = mean(True), mean(False)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    for upstream in upstreams:  # the graph is retained
        found, expected = (torch.autograd.grad(x, (q, k), upstream, retain_graph=True) for x in (ours, plain))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_rows_without_a_candidate_have_no_mean_to_follow() -> None:
    q, k = rows(ROWS).requires_grad_(), rows(1, seed=1).requires_grad_()
    rules = pair_rules.pairs(q, itself=torch.arange(ROWS))
    value, log_sum = pairwise.softmax_mean(q, k, rules, lambda *_: (), fixed=0, even=True)
    value.sum().backward()
    assert value[0] == 0
    assert log_sum[0] == -torch.inf
    assert q.grad is not None
    assert not q.grad[0].any()
    torch.testing.assert_close(q.grad[1:], k.detach().expand(ROWS - 1, -1))
    torch.testing.assert_close(k.grad, q.detach()[1:].sum(0, keepdim=True))


def test_nothing_of_the_size_of_all_pairs_is_made() -> None:
    a, b = (torch.randn(300, WIDTH, requires_grad=True) for _ in range(2))
    bank = full_bank(torch.float32, 512)
    labels = torch.arange(300) % 7
    losses = {
        "NT-Xent": lambda: ntxent_loss(a, b),
        "SupCon": lambda: supcon_loss(a, b, labels=labels),
        "CLIP": lambda: clip_loss(a, b),
        "SigLIP": lambda: siglip_loss(a, b),
        "ASCL": lambda: ascl_loss(a, b, bank=bank),
        "CACR": lambda: cacr_loss(a, b),
        "CACR, queue": lambda: cacr_loss(a, b, bank=bank, mode="queue"),
    }
    for name, loss in losses.items():
        with _Largest() as seen:
            loss().backward()
        assert seen.elements <= 2 * 812 * (WIDTH + 2), name


# ---- objectives ---------------------------------------------------------------------------------------------------


def full_bank(dtype: torch.dtype, size: int = KEYS) -> MemoryBank:
    bank = MemoryBank(size, WIDTH, init="empty").to(dtype)
    labels = torch.randint(0, 5, (size - 5,), generator=torch.Generator().manual_seed(7))
    bank.enqueue(rows(size - 5, dtype, 8), labels)
    return bank


LABELS = torch.randint(0, 5, (ROWS,), generator=torch.Generator().manual_seed(1))
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "labels": {"labels": LABELS},
    "mask": {"mask": torch.arange(ROWS) % 4 > 0, "weight": torch.arange(ROWS) / 10},
    "labels and mask": {"labels": LABELS, "mask": torch.arange(ROWS) % 4 > 0},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_objectives_with_labels(options: dict[str, Any], dtype: torch.dtype, taken: list[str]) -> None:
    a, b, tau = rows(ROWS, dtype), rows(ROWS, dtype, 1), torch.tensor(0.2, dtype=dtype)
    banks = {x: full_bank(x) for x in (torch.float32, torch.float64)}
    more = {**options, "reduction": "none"}
    same(lambda a, b, t: ntxent_loss(a, b, temperature=t, **more), a, b, tau)
    same(lambda a, b, t: ntxent_loss(a, b, temperature=t, bank=banks[a.dtype], **more), a, b, tau)
    for form in ("out", "in"):
        same(lambda a, b, t, f=form: supcon_loss(a, b, temperature=t, form=f, **more), a, b, tau)
    same(lambda a, b, t: supcon_loss(a, b, temperature=t, bank=banks[a.dtype], **more), a, b, tau)
    same(lambda a, b, t: clip_loss(a, b, temperature=t, **more), a, b, tau)
    assert set(taken) == {"masked_sums"}
    same(lambda a, b, t: siglip_loss(a, b, scale=2 / t, bias=-t, **more), a, b, tau)
    same(lambda a, b: siglip_loss(a, b, negative_only=True, **more), a, b)
    assert set(taken) == {"masked_sums", "sigmoid_sums"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("neighbors", [1, 5])
@pytest.mark.parametrize("filled", [0, 1, KEYS - 5])
def test_ascl(filled: int, neighbors: int, dtype: torch.dtype, taken: list[str]) -> None:
    banks = {x: MemoryBank(KEYS, WIDTH, init="empty").to(x) for x in (torch.float32, torch.float64)}
    for x, bank in banks.items():
        if filled:
            bank.enqueue(rows(filled, dtype, 8).to(x), torch.zeros(filled, dtype=torch.int64))
    b = rows(ROWS, dtype, 1)
    same(
        lambda a: ascl_loss(a, b.to(a.dtype), bank=banks[a.dtype], num_neighbors=neighbors, reduction="none"),
        rows(ROWS, dtype),
    )
    assert set(taken) == {"masked_sums", "softmax_sums"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("gradient", [None, "full", "none", "intra_batch"])
@pytest.mark.parametrize("mode", ["in_batch", "queue", "cross_view"])
def test_cacr(mode: str, gradient: str | None, reduction: str, dtype: torch.dtype, taken: list[str]) -> None:
    if gradient == "intra_batch" and mode != "queue":
        pytest.skip("the queue's alone")
    banks = {x: full_bank(x) for x in (torch.float32, torch.float64)}
    a, b = rows(ROWS, dtype), rows(ROWS, dtype, 1)

    def loss(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        bank = banks[a.dtype] if mode == "queue" else None
        return cacr_loss(a, b, bank=bank, mode=mode, weight_gradient=gradient, reduction=reduction, **options)

    for cost in ("euclidean", "cosine") if mode == "queue" else ("euclidean", "cosine", "rbf"):
        if (mode, cost) == ("in_batch", "rbf"):
            continue
        for options in ({}, OPTIONS["mask"]):
            same(lambda a, b, c=cost, o=options: loss(a, b, cost=c, **o), a, b)
        if mode != "queue":
            same(lambda a, b, c=cost: loss(a / 3, b / 3, cost=c, normalize=False), a, b)
    assert taken


# ---- operators ----------------------------------------------------------------------------------------------------


def test_operators_keep_their_schemas() -> None:
    own = ids(ROWS)
    rules = pair_rules.pairs(
        rows(1), positive=pair_rules.SAME_LABEL, candidate=pair_rules.NOT_SELF, query_ids=own, key_ids=own
    )
    vector = rows(ROWS)[:, 0].contiguous()
    place = rows(16)[:, :8].contiguous(), 0, 16, *rules.arguments()
    ops = torch.ops.counterpoise
    calls = {
        ops.pairwise_rows: (vector, vector.clone(), None, vector.clone(), vector.clone(), None, True),
        ops.pairwise_both: (vector, vector.clone(), vector.clone(), None),
        ops.pairwise_slopes: (vector, vector, None, None, 0, vector, True, True),
        ops.pairwise_sigmoid: (vector[0], vector.clone()),
        ops.pairwise_sigmoid_slopes: (vector[0], vector, vector.clone()),
    }
    for op, more in calls.items():
        torch.library.opcheck(op.default, (*place, *more))


def test_a_tile_too_wide_or_on_the_diagonal_is_refused() -> None:
    rules = pair_rules.pairs(rows(1)).arguments()
    wide, vector = torch.zeros(1, 4097), torch.zeros(8)
    with pytest.raises(RuntimeError, match="columns"):
        torch.ops.counterpoise.pairwise_rows(wide, 0, 0, *rules, vector, vector, None, None, None, None, False)
    with pytest.raises(RuntimeError, match="diagonal"):
        torch.ops.counterpoise.pairwise_both(torch.zeros(4, 4), 0, 2, *rules, vector, vector, vector, None)


def test_the_module_under_test_is_the_one_in_use() -> None:
    assert sys.modules["counterpoise.contrastive.info_nce"].pairwise is pairwise
