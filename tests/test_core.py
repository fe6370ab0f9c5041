"""The core: the one reduction, seeds, checks, ``Spec``, precise buffers and the second pass."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from counterpoise import _core
from counterpoise._core import (
    Loss,
    No,
    PreciseBuffers,
    Spec,
    at_least_float32,
    check_choice,
    check_number,
    check_per_row,
    check_within,
    combine_inner,
    generator_for,
    in_second_pass,
    mix_seeds,
    reduce_losses,
    second_pass,
    uniform_by_index,
)
from counterpoise._core.checks import did_you_mean

# Reduction

LOSSES = torch.tensor([1.0, 2.0, 4.0, 8.0])
WEIGHT = torch.tensor([1.0, 0.5, 2.0, 3.0])
CARRIED = torch.tensor([2.0, 2.0, 0.25, 1.0])  # already inside LOSSES
COUNTED = torch.tensor([True, False, True, True])
KEPT = (1 * 1 + 4 * 2 + 8 * 3) / 1.0


@pytest.mark.parametrize(
    ("normalizer", "divisor"),
    [
        ("count", 3),
        ("weight", 1 * 2 + 2 * 0.25 + 3 * 1),
        ("positives", 5),
        (7.0, 7),
    ],
)
def test_the_mean_divides_by_what_the_normalizer_names(normalizer: str | float, divisor: float) -> None:
    mean = reduce_losses(
        LOSSES,
        counted=COUNTED,
        weight=WEIGHT,
        carried_weight=CARRIED,
        positives=torch.tensor(5),
        normalizer=normalizer,
    )
    assert_close(mean.item(), KEPT / divisor)


def test_without_a_count_of_positives_rows_that_count_are_taken() -> None:
    assert_close(reduce_losses(LOSSES, counted=COUNTED, normalizer="positives").item(), 13 / 3)


@pytest.mark.parametrize("positives", [0.0, 0.3])
def test_positives_are_at_least_one(positives: float) -> None:
    value = reduce_losses(LOSSES, positives=torch.tensor(positives), normalizer="positives")
    assert value == LOSSES.sum()


def test_the_sum_has_no_divisor() -> None:
    assert reduce_losses(LOSSES, counted=COUNTED, weight=WEIGHT, reduction="sum") == KEPT


def test_none_keeps_one_value_a_row_and_zero_where_it_does_not_count() -> None:
    rows = reduce_losses(LOSSES, counted=COUNTED, weight=WEIGHT, reduction="none")
    assert rows.tolist() == [1.0, 0.0, 8.0, 24.0]


def test_weights_of_rows_reach_every_entry_of_the_row() -> None:
    entries = torch.ones(4, 2, 3)
    weighted = reduce_losses(entries, weight=WEIGHT, reduction="none")
    assert_close(weighted, WEIGHT[:, None, None].expand(4, 2, 3))
    assert_close(reduce_losses(entries, weight=WEIGHT, normalizer="weight").item(), 1.0)


@pytest.mark.parametrize("normalizer", ["count", "weight", "positives"])
@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_that_counts_gives_a_zero_connected_to_the_graph(normalizer: str, rows: int) -> None:
    losses = LOSSES[:rows].clone().requires_grad_()
    value = reduce_losses(losses, counted=torch.zeros(rows, dtype=torch.bool), normalizer=normalizer)
    value.backward()
    assert value.item() == 0
    assert losses.grad is not None
    assert (losses.grad == 0).all()


def test_sync_makes_the_mean_over_ranks_that_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of one and three rows; the global denominator is played back to each."""
    whole = reduce_losses(LOSSES, weight=WEIGHT, normalizer="weight")
    monkeypatch.setattr(_core.reduction, "world_size", lambda: 2)
    monkeypatch.setattr(_core.reduction, "sum_over_ranks", lambda _: WEIGHT.sum())
    parts = [
        reduce_losses(LOSSES[own], weight=WEIGHT[own], normalizer="weight", sync=True)
        for own in (slice(0, 1), slice(1, 4))
    ]
    assert_close(sum(parts) / 2, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "avg"}, r"reduction is 'avg', expected one of \['none', 'mean', 'sum'\]"),
        ({"normalizer": "counts"}, r"normalizer is 'counts', .* did you mean 'count'\?"),
        ({"normalizer": 0.0}, r"normalizer is 0.0, expected a number in \(0, inf\]"),
    ],
)
def test_an_unknown_reduction_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reduce_losses(LOSSES, **options)


ENTRIES = torch.tensor([[1.0, 2.0, 6.0], [4.0, 5.0, 9.0]])
ENTRIES_COUNTED = torch.tensor([[True, False, True], [False, False, False]])


@pytest.mark.parametrize(
    ("inner", "all_count", "some_count"),
    [("mean", [3.0, 6.0], [3.5, 0.0]), ("sum", [9.0, 18.0], [7.0, 0.0])],
)
def test_entries_combine_over_those_that_count(inner: str, all_count: list[float], some_count: list[float]) -> None:
    rows, counted = combine_inner(ENTRIES, None, inner)
    assert rows.tolist() == all_count
    assert counted is None
    rows, counted = combine_inner(ENTRIES, ENTRIES_COUNTED, inner)
    assert rows.tolist() == some_count
    assert counted is not None
    assert counted.tolist() == [True, False]


def test_inner_none_and_single_entries_pass_through() -> None:
    assert combine_inner(ENTRIES, ENTRIES_COUNTED, "none") == (ENTRIES, ENTRIES_COUNTED)
    assert combine_inner(LOSSES, COUNTED, "mean") == (LOSSES, COUNTED)


def test_several_trailing_dimensions_are_entries_of_their_row() -> None:
    assert_close(combine_inner(ENTRIES.reshape(1, 2, 3, 1), None, "sum")[0].tolist(), [27.0])


# Seeds

MASK = (1 << 64) - 1


def splitmix64(state: int) -> tuple[int, int]:
    """The published generator: next state, output."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return state, z ^ (z >> 31)


def test_one_part_is_the_upper_half_of_splitmix64() -> None:
    for seed in (0, 1, 12345, 2**63):
        assert mix_seeds(seed) == splitmix64(seed)[1] >> 32


def test_seeds_of_neighbours_differ() -> None:
    grid = {mix_seeds(seed, epoch) for seed in range(100) for epoch in range(100)}
    assert len(grid) > 9_980  # of 10,000 draws from 2^32, hardly two agree
    assert all(0 <= seed < 2**32 for seed in grid)


def test_order_and_number_of_parts_matter() -> None:
    assert len({mix_seeds(1, 2), mix_seeds(2, 1), mix_seeds(1), mix_seeds(1, 2, 0), mix_seeds(3)}) == 5


def test_generators_of_equal_parts_draw_alike() -> None:
    first, second, third = (torch.rand(4, generator=generator_for(*parts)) for parts in ((1, 2), (1, 2), (1, 3)))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def by_integers(index: int, draw: int, draws: int, *parts: int) -> float:
    """The counter-based draw in Python's unbounded integers."""
    x = (index * draws + draw + mix_seeds(*parts) * 0x9E3779B9) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return ((x ^ (x >> 31)) >> 11) / 2**53


@pytest.mark.parametrize("seed", range(8))
def test_draws_by_index_are_the_mixer_in_unsigned_integers(seed: int) -> None:
    """Seed 0 and others give an offset above 2^63, where int64 wraps."""
    index = [0, 1, 17, 10**12]
    expected = [[by_integers(i, d, 3, seed, 4) for d in range(3)] for i in index]
    assert uniform_by_index(torch.tensor(index), 3, seed, 4).tolist() == expected


def test_a_draw_depends_on_its_index_and_not_on_the_batch() -> None:
    whole = uniform_by_index(torch.arange(20), 2, 5, 6)
    order = torch.tensor([13, 4, 4, 19])
    assert torch.equal(uniform_by_index(order, 2, 5, 6), whole[order])
    assert torch.equal(uniform_by_index(order.int(), 2, 5, 6), whole[order])


def test_draws_by_index_are_uniform() -> None:
    u = uniform_by_index(torch.arange(10_000), 2, 1)
    assert u.dtype == torch.float64
    assert ((u >= 0) & (u < 1)).all()
    bins = u.mul(10).long().flatten().bincount(minlength=10)
    assert ((bins - 2_000).abs() < 5 * math.sqrt(20_000 * 0.1 * 0.9)).all()
    assert torch.corrcoef(u.T)[0, 1].abs() < 0.05
    assert torch.corrcoef(torch.stack([u[:-1, 0], u[1:, 0]]))[0, 1].abs() < 0.05


@pytest.mark.parametrize("other", [(1, 3), (2, 2)], ids=["next epoch", "next seed"])
def test_draws_of_neighbouring_seeds_and_epochs_are_unrelated(other: tuple[int, int]) -> None:
    index = torch.arange(5_000)
    pair = torch.stack([uniform_by_index(index, 1, *parts).squeeze(1) for parts in ((1, 2), other)])
    assert (pair[0] != pair[1]).all()
    assert torch.corrcoef(pair)[0, 1].abs() < 0.07


# Checks


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_narrow_types_are_widened_and_float64_is_kept(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert at_least_float32(torch.ones(2, dtype=dtype)).dtype == expected


def test_a_near_miss_is_answered_with_the_word_meant() -> None:
    assert did_you_mean("gama", ["alpha", "gamma"]) == ", did you mean 'gamma'?"
    assert did_you_mean("xyz", ["alpha", "gamma"]) == ""
    assert did_you_mean("gama", []) == ""


def test_a_choice_that_is_none_is_refused_with_the_choices() -> None:
    check_choice("color", "red", ("red", "blue"))
    with pytest.raises(
        ValueError, match=r"^color is 'bleu', expected one of \['red', 'blue'\], did you mean 'blue'\?$"
    ):
        check_choice("color", "bleu", ("red", "blue"))


@pytest.mark.parametrize("value", [True, "1", None, torch.tensor(1.0), 1j])
def test_what_is_no_number_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError, match=r"^gamma is .*, expected a number$"):
        check_number("gamma", value)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_a_number_out_of_range_or_nan_is_a_value_error(value: float) -> None:
    with pytest.raises(ValueError, match=r"^alpha is .*, expected a number in \[0, 1\]$"):
        check_number("alpha", value, 0, 1)


def test_an_open_end_excludes_its_number() -> None:
    check_number("scale", 0, 0)
    with pytest.raises(ValueError, match=r"expected a number in \(0, inf\]"):
        check_number("scale", 0, 0, open_low=True)


def test_what_is_one_a_row_is_named_otherwise() -> None:
    check_per_row("weight", None, LOSSES)
    check_per_row("weight", WEIGHT, LOSSES)
    with pytest.raises(ValueError, match=r"^weight has shape \(3,\), expected \(4,\)$"):
        check_per_row("weight", WEIGHT[:3], LOSSES)
    with pytest.raises(TypeError, match=r"^weight is a list, expected a tensor of shape \(4,\)$"):
        check_per_row("weight", [1, 2, 3, 4], LOSSES)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^mask has dtype torch.float32, expected torch.bool$"):
        check_per_row("mask", WEIGHT, LOSSES, dtype=torch.bool)


@pytest.mark.parametrize("value", [-1.0, 3.5, math.nan])
def test_the_first_value_out_of_range_is_named(value: float) -> None:
    values = torch.tensor([0.0, 3.0, value, 99.0])
    with pytest.raises(ValueError, match=rf"^target holds {value}, expected labels in \[0, 3\]$"):
        check_within("target", values, 0, 3, what="labels")


def test_the_ignored_value_may_lie_outside() -> None:
    check_within("target", torch.tensor([0, -100, 3]), 0, 3, what="class indices", ignore=-100)
    check_within("target", torch.tensor([], dtype=torch.int64), 0, 3, what="class indices")


def checked_square(x: Tensor) -> Tensor:
    check_within("x", x, 0, 1, what="probabilities")
    return (x * x).sum()


def test_a_check_stands_aside_in_function_transforms() -> None:
    """A value cannot be read inside vmap or grad."""
    x = torch.tensor([0.5, 2.0])
    assert_close(torch.func.grad(checked_square)(x), 2 * x)
    assert_close(torch.func.vmap(checked_square)(x[:, None]), x * x)
    per_sample = torch.func.vmap(torch.func.grad(checked_square))(x[:, None])
    assert_close(per_sample, 2 * x[:, None])
    with pytest.raises(ValueError, match=r"x holds 2.0"):
        checked_square(x)


# Spec


@pytest.mark.parametrize("name", ["per_row", "weight_linear", "compiles", "double_backward"])
def test_a_promise_is_not_refused_without_a_reason(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^Spec.{name} is False without a reason, expected No\('why'\)$"):
        Spec(task="multiclass", source="none", **{name: False})
    spec = Spec(task="multiclass", source="none", **{name: No("it is so")})
    assert not getattr(spec, name)
    assert spec.exemptions == {name: "it is so"}


def test_a_single_process_part_gives_its_reason() -> None:
    with pytest.raises(
        ValueError, match=r"Spec.distributed is 'single_process' without a reason in Spec.exempt\['C6'\]"
    ):
        Spec(task="clustering", source="none", distributed="single_process")
    spec = Spec(task="clustering", source="none", distributed="single_process", exempt={"C6": "solves on the host"})
    assert spec.exemptions == {"C6": "solves on the host"}


def test_an_unknown_distributed_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Spec.distributed is 'everywhere', expected one of"):
        Spec(task="multiclass", source="none", distributed="everywhere")  # type: ignore[arg-type]


def test_a_spec_without_exemptions_promises_all() -> None:
    assert Spec(task="multiclass", source="none").exemptions == {}


# Modules


class Holder(PreciseBuffers):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("dual", torch.tensor([1 / 3], dtype=torch.float64))
        self.register_buffer("weights", torch.tensor([1 / 3]))
        self.register_buffer("step", torch.tensor(3))
        self.register_buffer("nothing", None)
        self.inner = nn.Linear(2, 2)


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(torch.float16),
        lambda m: nn.Sequential(m).half()[0],
    ],
    ids=["half", "bfloat16", "double", "to", "inside a model"],
)
def test_buffers_keep_their_type_and_digits(cast: Callable[[nn.Module], nn.Module]) -> None:
    holder = cast(Holder())
    assert holder.dual.dtype == torch.float64
    assert holder.dual.item() == 1 / 3
    assert holder.weights.dtype == torch.float32
    assert torch.equal(holder.weights, torch.tensor([1 / 3]))
    assert holder.step.dtype == torch.int64
    assert holder.nothing is None
    assert holder.inner.weight.dtype != torch.float32  # what is inside it is cast as usual


def test_buffers_follow_to_another_device() -> None:
    assert Holder().to("meta").dual.device.type == "meta"


def test_a_loss_hands_back_its_options_as_they_stand() -> None:
    loss = Loss(gamma=2.0, reduction="mean", normalizer="count", sync=False)
    loss.gamma = 3.0
    assert loss.options == {"gamma": 3.0, "reduction": "mean", "normalizer": "count", "sync": False}
    assert "gamma=3.0" in repr(loss)


def test_a_loss_without_class_weights_says_so() -> None:
    with pytest.raises(ValueError, match=r"Loss takes no class_weight"):
        Loss(reduction="mean", normalizer="count", sync=False).set_class_weight([1.0])


# The second pass


def test_second_passes_nest() -> None:
    assert not in_second_pass()
    with second_pass():
        with second_pass():
            assert in_second_pass()
        assert in_second_pass()
    assert not in_second_pass()


def test_a_second_pass_ends_with_an_exception() -> None:
    with pytest.raises(RuntimeError, match="diverged"), second_pass():
        raise RuntimeError("diverged")
    assert not in_second_pass()


def test_class_weights_and_statistics_of_a_loss_of_ones_own() -> None:
    class Own(Loss):
        def __init__(self, class_weight: torch.Tensor | None) -> None:
            super().__init__(reduction="mean", normalizer="count", sync=False)
            self.class_weight = class_weight

    assert Own(None).class_weight is None
    weighted = Own(torch.ones(3))
    assert set(weighted.state_dict()) == {"class_weight"}
    weighted.class_weight = None
    assert weighted.class_weight is None
    assert not hasattr(weighted, "statistics")
    with pytest.raises(TypeError, match="statistics is a int"):
        weighted.statistics = 3
    learned = Own(torch.nn.Parameter(torch.ones(3)))
    assert isinstance(learned.class_weight, torch.nn.Parameter)
