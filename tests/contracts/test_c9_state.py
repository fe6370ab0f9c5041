"""C3 and C9: state lives in buffers, moves only when it should, and survives a round trip exactly."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from counterpoise.samplers import reweighted_loss, second_pass
from tests.contracts.parts import OBJECTIVES, REWEIGHTERS, SAMPLERS, batch_of, build, ids, value

reweighters = pytest.mark.parametrize("part", REWEIGHTERS, ids=ids(REWEIGHTERS))
MODULES = [*OBJECTIVES, *REWEIGHTERS]
modules = pytest.mark.parametrize("part", MODULES, ids=ids(MODULES))


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@modules
def test_round_trips_through_state_dict_copy_and_pickle(part: type) -> None:
    module = build(part)
    steps = [batch_of(part.spec.task, seed=seed) for seed in range(4)]
    for batch in steps[:2]:
        value(module, batch)
    restored = build(part)
    restored.load_state_dict(module.state_dict())
    twins = [restored, copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    for batch in steps[2:]:
        expected = value(module, batch)
        for twin in twins:
            assert torch.equal(value(twin, batch), expected)


@modules
def test_checkpoints_hold_plain_data(part: type, tmp_path) -> None:
    module = build(part)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    assert same(torch.load(tmp_path / "state.pt", weights_only=True), state(module))


@modules
def test_a_call_keeps_no_graph_alive(part: type) -> None:
    module = build(part)
    value(module, batch_of(part.spec.task))
    held = [x for x in vars(module).values() if isinstance(x, torch.Tensor) and x.requires_grad]
    assert not held


@modules
def test_eval_mode_and_second_pass_leave_state_alone(part: type) -> None:
    module, batch = build(part), batch_of(part.spec.task)
    value(module, batch)
    before = state(module)
    with second_pass():
        value(module, batch)
    assert same(state(module), before)
    module.eval()
    value(module, batch)
    assert same(state(module), before)
    module.train()
    value(module, batch)
    assert same(state(module), before) != part.spec.stateful


@modules
def test_state_keeps_its_precision_in_half_modules(part: type) -> None:
    module = build(part)
    before = state(module)
    assert same(state(module.to(torch.bfloat16)), before)
    assert same(state(module.half()), before)


@reweighters
def test_losses_that_are_not_finite_leave_state_alone(part: type) -> None:
    module, batch = build(part), batch_of("reweighter")
    before = state(module)
    batch.inputs[0].data[1] = torch.nan
    value(module, batch)
    assert same(state(module), before)


@reweighters
def test_weights_are_detached_one_a_row(part: type) -> None:
    batch = batch_of("reweighter").fresh()
    weights = value(build(part), batch)
    assert weights.shape == batch.inputs[0].shape
    assert not weights.requires_grad
    assert (weights >= 0).all()


@reweighters
def test_weights_follow_their_rows(part: type) -> None:
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    batch = batch_of("reweighter")
    torch.testing.assert_close(value(build(part), batch.rows(order)), value(build(part), batch)[order])


@reweighters
def test_normalisation_is_what_it_says(part: type) -> None:
    weights = value(build(part), batch_of("reweighter"))
    if part.normalization == "sum_one":
        torch.testing.assert_close(weights.sum(), torch.tensor(1.0, dtype=weights.dtype))
    elif part.normalization == "mean_one":
        torch.testing.assert_close(weights.mean(), torch.tensor(1.0, dtype=weights.dtype))
    else:
        assert part.normalization == "raw"


@reweighters
@pytest.mark.parametrize("loss", [p for p in OBJECTIVES if p.spec.per_row and p.spec.task != "two_view"])
def test_composes_with_every_loss_of_one_value_a_row(part: type, loss: type) -> None:
    batch, told = batch_of(loss.spec.task), batch_of("reweighter").options
    losses = value(build(loss, reduction="none"), batch)
    total = reweighted_loss(losses, build(part), **told)
    weights = build(part)(losses.detach(), **told)
    grads = torch.autograd.grad(total, losses)[0]
    torch.testing.assert_close(grads, weights if part.normalization == "sum_one" else grads)
    assert total.isfinite()


@pytest.mark.parametrize("part", SAMPLERS, ids=ids(SAMPLERS))
def test_samplers_are_seeded_epoch_aware_and_resumable(part: type) -> None:
    sampler = build(part, seed=3)
    first = list(sampler)
    assert first == list(build(part, seed=3))
    assert len(first) == len(sampler)
    assert first != list(build(part, seed=4))
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    other = build(part, seed=3)
    other.load_state_dict({"epoch": 1, "position": 10})
    assert list(other) == second[10:]
    walk = iter(build(part, seed=3))
    assert [next(walk) for _ in range(5)] == first[:5]
