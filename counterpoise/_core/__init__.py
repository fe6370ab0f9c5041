"""What every room needs and no user calls: input checks, the one reduction, ``Spec``, the second-pass context."""

from counterpoise._core.checks import (
    at_least_float32,
    check_choice,
    check_device,
    check_embeddings,
    check_number,
    check_per_row,
    check_within,
    readable,
    without_autocast,
)
from counterpoise._core.modules import Loss, PreciseBuffers
from counterpoise._core.passes import in_second_pass, second_pass
from counterpoise._core.ranks import rank, sum_over_ranks, world_size
from counterpoise._core.reduction import INNERS, check_reduction, combine_inner, reduce_losses
from counterpoise._core.seeds import generator_for, mix_seeds, normal_by_index, uniform_by_index
from counterpoise._core.spec import No, Spec

__all__ = [
    "INNERS",
    "Loss",
    "No",
    "PreciseBuffers",
    "Spec",
    "at_least_float32",
    "check_choice",
    "check_device",
    "check_embeddings",
    "check_number",
    "check_per_row",
    "check_reduction",
    "check_within",
    "combine_inner",
    "generator_for",
    "in_second_pass",
    "mix_seeds",
    "normal_by_index",
    "rank",
    "readable",
    "reduce_losses",
    "second_pass",
    "sum_over_ranks",
    "uniform_by_index",
    "without_autocast",
    "world_size",
]
