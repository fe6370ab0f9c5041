"""Which examples count, and how much: samplers ``labels -> indices`` and reweighters ``losses -> weights``.

Samplers split themselves over ranks and resume in mid-epoch. Reweighters map detached per-example losses to detached
weights; :func:`reweighted_loss` composes them with any loss of one value a row.
"""

from counterpoise._core import second_pass
from counterpoise.samplers.class_frequency import (
    ClassBalancedSampler,
    ClassFrequencySampler,
    DeferredBalancedSampler,
    ProgressivelyBalancedSampler,
    SquareRootSampler,
    class_sampling_probabilities,
    progressive_probabilities,
)
from counterpoise.samplers.composition import Reweighter, reweighted_loss
from counterpoise.samplers.epoch_sampler import EpochSampler, ShuffleSampler
from counterpoise.samplers.group_dro import GroupDRO

__all__ = [
    "ClassBalancedSampler",
    "ClassFrequencySampler",
    "DeferredBalancedSampler",
    "EpochSampler",
    "GroupDRO",
    "ProgressivelyBalancedSampler",
    "Reweighter",
    "ShuffleSampler",
    "SquareRootSampler",
    "class_sampling_probabilities",
    "progressive_probabilities",
    "reweighted_loss",
    "second_pass",
]
