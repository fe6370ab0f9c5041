"""On a GPU: fused equals plain, nothing waits for the device, the same twice, inside a captured graph too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

import counterpoise.ot._iterations as iterations
from counterpoise import kernels
from counterpoise.contrastive import ASCLLoss, CACRLoss, CLIPLoss, NTXentLoss, SigLIPLoss, SupConLoss
from counterpoise.kernels import selection
from counterpoise.losses import (
    asymmetric_loss,
    asymmetric_single_label_loss,
    balanced_softmax_loss,
    cross_entropy_loss,
    ldam_loss,
    logit_adjusted_loss,
    sigmoid_focal_loss,
    sigmoid_focal_star_loss,
    softmax_focal_loss,
)
from counterpoise.memory import MemoryBank
from counterpoise.neighbors import nearest_neighbors
from counterpoise.ot import partial_sinkhorn, sinkhorn, unbalanced_sinkhorn
from counterpoise.ot._sides import Ceiling, Side
from counterpoise.ot.unbalanced import Shift
from counterpoise.samplers import facility_location, k_center_greedy
from tests.kernels.compare import assert_accurate, assert_exact, assert_within_two_ulp, value_and_grad
from tests.kernels.test_transport import KINDS, problem, wide

pytestmark = pytest.mark.skipif(
    not any(row["cuda"] for row in kernels.available().values()),
    reason="no CUDA device, or its kernels are not compiled",
)

LABELS = {
    "focal": partial(sigmoid_focal_loss, alpha=0.25),
    "focal, gamma 0.5": partial(sigmoid_focal_loss, gamma=0.5),
    "focal*": partial(sigmoid_focal_star_loss, beta=0.3),
    "asymmetric": asymmetric_loss,
    "asymmetric, clamped": partial(asymmetric_loss, eps=1e-2, gamma_pos=1.0, margin=0.0),
}


def counts(c: int) -> Tensor:
    return torch.linspace(500, 5, c).long()


CLASSES = {
    "cross-entropy": lambda z, y, **o: cross_entropy_loss(z, y, **o),
    "smoothed": lambda z, y, **o: cross_entropy_loss(z, y, label_smoothing=0.1, **o),
    "logit-adjusted": lambda z, y, **o: logit_adjusted_loss(z, y, class_counts=counts(z.shape[1]).to(z.device), **o),
    "balanced softmax": lambda z, y, **o: balanced_softmax_loss(
        z, y, class_counts=counts(z.shape[1]).to(z.device), **o
    ),
    "LDAM": lambda z, y, **o: ldam_loss(z, y, scale=1.5, class_counts=counts(z.shape[1]).to(z.device), **o),
    "softmax focal": lambda z, y, **o: softmax_focal_loss(z, y, **o),
    "asymmetric, one label": lambda z, y, **o: asymmetric_single_label_loss(z, y, **o),
}
OPTIONS = [{}, {"reduction": "none"}, {"reduction": "sum"}]


def binary_problem(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    z = 5 * torch.randn(shape, generator=g, dtype=torch.float64)
    return z.cuda(), (torch.rand(shape, generator=g) < 0.3).cuda()


def class_problem(n: int, c: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return 5 * torch.randn(n, c, generator=g, dtype=torch.float64).cuda(), torch.randint(c, (n,), generator=g).cuda()


def fixed(loss: Callable[..., Tensor], y: Tensor, options: dict[str, object]) -> Callable[[Tensor], Tensor]:
    return lambda z: loss(z, y, **options)


@pytest.mark.parametrize("loss", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("shape", [(1,), (70_001,), (33, 7), (5, 1027), (3, 4, 5), (0, 4)], ids=str)
def test_losses_of_labels(loss, shape):
    z, t = binary_problem(shape)
    mask, weight = torch.arange(len(z), device="cuda") % 3 > 0, torch.linspace(0.5, 2, len(z), device="cuda")
    for options in [*OPTIONS, {"inner": "none"}, {"mask": mask, "weight": weight}]:
        assert_exact(fixed(loss, t, options), z)
        if len(z):
            assert_accurate(fixed(loss, t, options), z)
    for dtype in (torch.bfloat16, torch.float16):
        assert_within_two_ulp(fixed(loss, t, {"reduction": "sum", "inner": "sum"}), z, dtype)


@pytest.mark.parametrize("loss", CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("shape", [(1, 2), (33, 7), (5, 1027), (64, 10_000), (2, 300_000)], ids=str)
def test_losses_of_classes(loss, shape):
    z, y = class_problem(*shape)
    y[0] = -100
    weight = torch.linspace(0.5, 2, len(z), device="cuda", dtype=torch.float64)
    for options in [*OPTIONS, {"weight": weight}]:
        assert_exact(fixed(loss, y, options), z)
        assert_accurate(fixed(loss, y, options), z)
    for dtype in (torch.bfloat16, torch.float16):
        assert_within_two_ulp(fixed(loss, y, {"reduction": "sum"}), z, dtype)


@pytest.mark.parametrize("loss", list(CLASSES.values())[:5], ids=list(CLASSES)[:5])
@pytest.mark.parametrize("shape", [(1, 2), (33, 7), (5, 1027), (64, 10_000), (2, 300_000)], ids=str)
def test_losses_of_probabilities(loss, shape):
    z, _ = class_problem(*shape)
    t = torch.softmax(z.roll(1, 1) / 2, 1)
    z[:, 0], t[:, 0] = -torch.inf, 0
    mask, weight = torch.arange(len(z), device="cuda") % 3 < 2, torch.linspace(0.5, 2, len(z), device="cuda")
    for options in [*OPTIONS, {"mask": mask, "weight": weight}]:
        assert_exact(fixed(loss, t, options), z)
        assert_accurate(fixed(loss, t, options), z)
    for dtype in (torch.bfloat16, torch.float16):
        for of_target in (torch.float32, dtype):
            assert_within_two_ulp(fixed(loss, t.to(of_target), {"reduction": "sum"}), z, dtype)


def bank() -> MemoryBank:
    return MemoryBank(300, 16, init="random", generator=torch.Generator().manual_seed(1), dtype=torch.float64).cuda()


OBJECTIVES = {
    "NT-Xent": lambda z, o: NTXentLoss(temperature=0.2)(z, o),
    "NT-Xent, bank": lambda z, o: NTXentLoss(temperature=0.2)(z, o, bank=bank().to(z.dtype)),
    "SupCon": lambda z, o: SupConLoss(temperature=0.2)(z, o, labels=torch.arange(len(z), device=z.device) % 9),
    "ASCL": lambda z, o: ASCLLoss()(z, o.detach(), bank=bank().to(z.dtype)),
    "CLIP": lambda z, o: CLIPLoss().cuda()(z, o),
    "SigLIP": lambda z, o: SigLIPLoss().cuda()(z, o),
    "CACR": lambda z, o: CACRLoss()(z, o),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("n", [33, 700])
def test_objectives(objective, n):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 16, generator=g, dtype=torch.float64).cuda() for _ in range(2))
    assert_exact(lambda z: objective(z, b.to(z.dtype)), a)
    assert_exact(lambda z: objective(a.to(z.dtype), z), b) if objective is not OBJECTIVES["ASCL"] and n == 33 else None
    ours = value_and_grad(lambda z: objective(z, b.float()), a.float())
    true = value_and_grad(lambda z: objective(z, b), a)
    for x, y in zip(ours, true, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4 * y.abs().max().item())


@pytest.mark.parametrize("name", [*LABELS, *CLASSES])
def test_nothing_waits_for_the_device_and_runs_repeat(name):
    loss = (LABELS | CLASSES)[name]
    z, y = (binary_problem if name in LABELS else lambda shape: class_problem(*shape))((300, 1000))
    z = z.float()
    expected = value_and_grad(fixed(loss, y, {}), z, torch.ones((), device="cuda"))
    torch.cuda.synchronize()
    upstream, leaf = torch.ones((), device="cuda"), z.clone().requires_grad_()
    if name not in ("logit-adjusted", "balanced softmax", "LDAM"):  # as functions these move counts to the device
        torch.cuda.set_sync_debug_mode("error")
    try:
        value = loss(leaf, y)
        (grad,) = torch.autograd.grad(value, leaf, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(value.detach(), expected[0])
    assert torch.equal(grad, expected[1])


@pytest.mark.parametrize("upstream", [1.0, 3.0])
@pytest.mark.parametrize("drops_out", [False, True])
@pytest.mark.parametrize("loss", LABELS.values(), ids=LABELS)
def test_a_gradient_that_came_with_its_total(loss, drops_out, upstream):
    z, t = binary_problem((700, 33))
    if drops_out:
        z[5, 3], t[5, 3] = -torch.inf, False
    by = torch.tensor(upstream, dtype=torch.float64, device="cuda")
    for options in ({}, {"inner": "sum"}, {"inner": "none"}, {"inner": "sum", "reduction": "sum"}):
        ours = value_and_grad(fixed(loss, t, options), z, by)
        with kernels.disabled():
            theirs = value_and_grad(fixed(loss, t, options), z, by)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * b.abs().max().item())


def test_graph_capture():
    z, t = binary_problem((64, 100))
    z = z.float().requires_grad_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(sigmoid_focal_loss(z, t), z)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (grad,) = torch.autograd.grad(sigmoid_focal_loss(z, t), z)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(grad, torch.autograd.grad(sigmoid_focal_loss(z, t), z)[0], rtol=0, atol=0)


SOLVERS = {
    "balanced": partial(sinkhorn, epsilon=0.05),
    "unbalanced": partial(unbalanced_sinkhorn, epsilon=0.05, penalty_a=0.5, penalty_b=1.0),
    "half unbalanced": partial(unbalanced_sinkhorn, epsilon=0.05, penalty_a=float("inf"), penalty_b=1.0),
    "partial": partial(partial_sinkhorn, mass=0.7, epsilon=0.05),
    "in logarithms": partial(sinkhorn, epsilon=1e-4, scaling=None),
}


@pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("shape", [(1, 1), (40, 30), (700, 100), (64, 3000), (3000, 6), (5, 33, 20)], ids=str)
def test_transport(shape, solve):
    g = torch.Generator().manual_seed(0)
    cost = torch.rand(shape, generator=g, dtype=torch.float64).cuda()
    assert kernels.transport.takes(cost, "transport_scale")
    fused = solve(cost, max_iterations=60, tolerance=0)
    again = solve(cost, max_iterations=60, tolerance=0)
    with kernels.disabled():
        plain = solve(cost, max_iterations=60, tolerance=0)
    assert torch.equal(fused.plan, again.plan)
    torch.testing.assert_close(fused.plan, plain.plan, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(fused.f, plain.f, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 3), (131, 17), (900, 100), (1200, 1000), (9, 2101), (40, 65, 33)], ids=str)
def test_every_operator_of_transport(shape, kind, dtype):
    """Start, kernel, ten iterations, ten in logarithms and the plan, with void masses and a forbidden pair."""

    def results(p):
        f, g, reach = iterations.start_of(p)
        kernel = p.kernel(f, g)
        found = iterations.advance(p, kernel, p.columns.reference, 10)
        numbers = {"spread": f.new_tensor(reach), "kernel": kernel.matrix.clone()}
        numbers |= {name: getattr(found, name) for name in ("f", "g", "u", "v", "s")}
        numbers["plan"] = kernel.plan(found.u, found.v)
        logs = iterations.in_logarithms(p, g, 4)
        return numbers | {"log f": logs.f, "log g": logs.g}

    fused = results(on_device(problem(shape, dtype, kind, zeros=True)))
    for name in ("scale", "kernel", "plan_", "start", "sweep"):
        assert kernels.transport.takes(torch.empty(shape, dtype=dtype, device="cuda"), f"transport_{name}")
    p = on_device(wide(problem(shape, dtype, kind, zeros=True)))
    with kernels.disabled():
        plain = results(p)
    for name, wanted in plain.items():
        some = torch.ones_like(wanted, dtype=torch.bool)
        if name[-1] in "fu" and wanted.shape == p.rows.mass.shape:
            some = p.rows.mass > 0
        elif name[-1] in "gvs" and wanted.shape == p.columns.mass.shape:
            some = p.columns.mass > 0
        limit = (1e-5 if dtype == torch.float32 else 1e-9) * max(float(wanted[some].abs().max()), 0.05)
        assert float((fused[name][some] - wanted[some]).abs().max()) <= limit, name


def on_device(p):
    """A problem of tests/kernels/test_transport.py on the GPU."""

    def side(s):
        ceiling = None if s.ceiling is None else Ceiling(s.ceiling.amount.cuda(), s.ceiling.value.cuda())
        penalty, mass = None if s.penalty is None else s.penalty.cuda(), s.mass.cuda()
        return Side(mass, mass if s.reference is s.mass else s.reference.cuda(), s.epsilon, penalty, ceiling)

    rows, columns = side(p.rows), side(p.columns)
    shift = None if p.shift is None else Shift(rows.mass, columns.mass, rows.penalty, columns.penalty, p.ranks)
    return replace(p, cost=p.cost.cuda(), rows=rows, columns=columns, total=p.total.cuda(), shift=shift)


def test_iterations_of_transport_wait_for_nothing():
    p = on_device(problem((700, 100), torch.float32, "partial"))
    f, g, _ = iterations.start_of(p)
    kernel = p.kernel(f, g)
    torch.cuda.set_sync_debug_mode("error")
    try:
        iterations.advance(p, kernel, p.columns.reference, 10)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


GRID = torch.cat([draw(2000, 5).mul(2).round(), -draw(2000, 5).mul(2).round()])  # of mean 0: distances are exact
POINTS = {"normal": draw(5000, 24), "copies": draw(900, 24).repeat(3, 1), "grid": GRID}


@pytest.mark.parametrize("points", POINTS.values(), ids=POINTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k_center(points, dtype):
    x = points.to("cuda", dtype)
    assert selection.takes(x.double(), "follow")
    fused = k_center_greedy(x, 300, first=0)
    with kernels.disabled():
        plain = k_center_greedy(x, 300, first=0)
    for other in (plain, k_center_greedy(x.cpu(), 300, first=0)):
        assert torch.equal(fused.indices.cpu(), other.indices.cpu())
        torch.testing.assert_close(fused.gains.cpu(), other.gains.cpu(), rtol=1e-12, atol=1e-12)
    assert torch.equal(fused.assignment, plain.assignment)


def test_k_center_among_more_leaders_than_one_block_follows():
    x = draw(5000, 9000).float().cuda()
    assert not selection.takes(x[:256].double(), "follow")
    fused = k_center_greedy(x, 20, first=0)
    with kernels.disabled():
        plain = k_center_greedy(x, 20, first=0)
    assert torch.equal(fused.indices, plain.indices)


def test_picks_are_followed_to_the_last_bit_of_the_distances():
    points = POINTS["copies"].cuda()[:1000]
    start, index = torch.linalg.vector_norm(points, dim=1), torch.arange(len(points), device="cuda")
    left = start.clone()
    picks, gaps = selection.follow(points, index, left, -1.0, 0, 40)
    assert (len(picks), len(gaps)) == (40, 40)
    for pick in picks:
        start = torch.minimum(start, selection.distances(points, index, points, index.new_full(index.shape, pick)))
        start[pick] = 0
    assert torch.equal(left, start)


@pytest.mark.parametrize("points", POINTS.values(), ids=POINTS)
@pytest.mark.parametrize(
    "select",
    [
        lambda x: facility_location(x, 120),
        lambda x: facility_location(x.float(), 120),
        lambda x: facility_location(x, 60, metric="cosine"),
        lambda x: facility_location(x, 60, method="stochastic"),
        lambda x: facility_location(similarity=(x @ x.T).abs(), budget=60),
    ],
    ids=["distance", "float32", "cosine", "stochastic", "dense"],
)
def test_facility_location(points, select):
    x = points.cuda()
    fused = select(x)
    with kernels.disabled():
        plain = select(x)
    for other in (plain, select(x)):
        assert torch.equal(fused.indices, other.indices)
        assert torch.equal(fused.weights, other.weights)
        torch.testing.assert_close(fused.gains, other.gains, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rounding", [-1.0, 0.0, 0.3])
@pytest.mark.parametrize("shape", [(1, 1), (65, 31), (512, 512), (3000, 77)], ids=str)
def test_gains_are_the_sums_of_the_cpu(shape, rounding):
    tile, before = draw(*shape), draw(1, shape[0], seed=1)[0].abs()
    tile = tile if rounding < 0 else tile.square() - 0.01
    for after in (None, before / 2):
        found, wanted = torch.ones(shape[1], dtype=torch.float64).cuda(), torch.ones(shape[1], dtype=torch.float64)
        arguments = tile.cuda(), before.cuda(), None if after is None else after.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            selection.add_taken(found, arguments[0], rounding, *arguments[1:])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        selection.add_taken(wanted, tile, rounding, before, after)
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 18, 333, 2048])
@pytest.mark.parametrize(("queries", "widths"), [(1, [150_000, 99_999]), (70, [40_000, 3, 5001])], ids=str)
def test_the_least_costs(queries, widths, count, dtype):
    costs = draw(queries, sum(widths)).to("cuda", dtype)
    costs[0] = costs[0].mul(100).round()  # ties at every place
    costs[-1, ::7] = torch.nan
    first, *rest = costs.split(widths, dim=1)
    first, rest, start = first.contiguous(), [tile.contiguous() for tile in rest], widths[0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = selection.nearest_of(first, count)
        for tile in rest:
            selection.see_nearest(tile, start, *found)
            start += tile.shape[1]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    values, columns = costs.nan_to_num(nan=torch.inf, posinf=torch.inf).sort(dim=1, stable=True)
    assert torch.equal(found[0], values[:, :count])
    assert torch.equal(found[1], columns[:, :count])


def test_more_than_are_kept_take_the_plain_form():
    costs = draw(3, 5000).cuda()
    assert selection.nearest_of(costs, 2048) is not None
    assert selection.nearest_of(costs, 2049) is None


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "inner_product"])
@pytest.mark.parametrize(("queries", "k"), [(1, 10), (70, 1), (600, 10), (70, 100), (20, 2500)])
@pytest.mark.parametrize("kind", ["normal", "copies", "grid", "float64"])
def test_neighbours(kind, queries, k, metric):
    keys, x = draw(150_000, 8), draw(queries, 8, seed=1)
    if kind == "copies":
        keys = keys[:50_000].repeat(3, 1)
    elif kind == "grid":
        keys, x = keys.mul(4).round(), x.mul(4).round()
    if kind != "float64":
        keys, x = keys.float(), x.float()
    keys, x = keys.cuda(), x.cuda()
    fused = nearest_neighbors(x, keys, k, metric=metric)
    with kernels.disabled():
        plain = nearest_neighbors(x, keys, k, metric=metric)
    assert torch.equal(fused[0], plain[0])
    assert torch.equal(fused[1], plain[1])


def test_second_derivatives():
    z, t = binary_problem((4, 5))
    assert torch.autograd.gradgradcheck(lambda x: sigmoid_focal_loss(x, t), z.requires_grad_())
    z, y = class_problem(4, 5)
    assert torch.autograd.gradgradcheck(lambda x: cross_entropy_loss(x, y), z.requires_grad_())


def test_compiles():
    z, t = binary_problem((64, 100))
    traced = torch.compile(sigmoid_focal_loss, fullgraph=True)
    ours, theirs = (value_and_grad(lambda x, f=f: f(x, t), z.float()) for f in (traced, sigmoid_focal_loss))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
