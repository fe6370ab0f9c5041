"""Which examples count, and how much: samplers ``labels -> indices`` and reweighters ``losses -> weights``.

Samplers split themselves over ranks and resume in mid-epoch. Reweighters map detached per-example losses to detached
weights; :func:`reweighted_loss` composes them with any loss of one value a row.
"""

from counterpoise._core import second_pass
from counterpoise.samplers.adawac import AdaWAC, adawac_loss
from counterpoise.samplers.broad import BROAD, group_log_ratios
from counterpoise.samplers.ccs import coverage_centric
from counterpoise.samplers.chi_square_dro import ChiSquareDRO, chi_square_dual, chi_square_value, chi_square_weights
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
from counterpoise.samplers.craig import craig
from counterpoise.samplers.cvar import CVaR, cvar_dual, cvar_value, cvar_weights
from counterpoise.samplers.epoch_sampler import EpochSampler, ShuffleSampler
from counterpoise.samplers.facility_location import facility_location
from counterpoise.samplers.forgetting import ForgettingEvents
from counterpoise.samplers.group_dro import GroupDRO
from counterpoise.samplers.herding import herding
from counterpoise.samplers.just_train_twice import balancing_up_weight, just_train_twice_weights
from counterpoise.samplers.k_center import k_center_greedy
from counterpoise.samplers.kl_dro import KLDRO, kl_ball_temperature, kl_ball_value, kl_ball_weights, kl_dual
from counterpoise.samplers.multilevel import multilevel_estimate, multilevel_sizes
from counterpoise.samplers.pk import PKSampler
from counterpoise.samplers.power_of_few import (
    MetaWeightNet,
    meta_weight_loss,
    moderate_coreset,
    nearest_in_coreset,
    propagate_weights,
)
from counterpoise.samplers.road import RatioNetwork, road_ratio_objective
from counterpoise.samplers.score_sampler import CoresetSampler, ScoreSampler
from counterpoise.samplers.scores import el2n_scores, grand_scores, grand_scores_full
from counterpoise.samplers.selection import Selection
from counterpoise.samplers.tilted_erm import TiltedERM, tilted_value, tilted_weights
from counterpoise.samplers.uncertainty import uncertainty_scores

__all__ = [
    "BROAD",
    "KLDRO",
    "AdaWAC",
    "CVaR",
    "ChiSquareDRO",
    "ClassBalancedSampler",
    "ClassFrequencySampler",
    "CoresetSampler",
    "DeferredBalancedSampler",
    "EpochSampler",
    "ForgettingEvents",
    "GroupDRO",
    "MetaWeightNet",
    "PKSampler",
    "ProgressivelyBalancedSampler",
    "RatioNetwork",
    "Reweighter",
    "ScoreSampler",
    "Selection",
    "ShuffleSampler",
    "SquareRootSampler",
    "TiltedERM",
    "adawac_loss",
    "balancing_up_weight",
    "chi_square_dual",
    "chi_square_value",
    "chi_square_weights",
    "class_sampling_probabilities",
    "coverage_centric",
    "craig",
    "cvar_dual",
    "cvar_value",
    "cvar_weights",
    "el2n_scores",
    "facility_location",
    "grand_scores",
    "grand_scores_full",
    "group_log_ratios",
    "herding",
    "just_train_twice_weights",
    "k_center_greedy",
    "kl_ball_temperature",
    "kl_ball_value",
    "kl_ball_weights",
    "kl_dual",
    "meta_weight_loss",
    "moderate_coreset",
    "multilevel_estimate",
    "multilevel_sizes",
    "nearest_in_coreset",
    "progressive_probabilities",
    "propagate_weights",
    "reweighted_loss",
    "road_ratio_objective",
    "second_pass",
    "tilted_value",
    "tilted_weights",
    "uncertainty_scores",
]
