"""What one example costs: ``(logits, target) -> loss per example``.

Every loss is a function and a module of the same defaults; both take ``weight`` and ``mask``, and say what their mean
divides by (``normalizer``).
"""

from counterpoise.losses.adjusted_cross_entropy import adjusted_cross_entropy
from counterpoise.losses.asymmetric import AsymmetricLoss, asymmetric_loss
from counterpoise.losses.asymmetric_single_label import AsymmetricSingleLabelLoss, asymmetric_single_label_loss
from counterpoise.losses.balanced_softmax import BalancedSoftmaxLoss, balanced_softmax_loss
from counterpoise.losses.binary_cross_entropy import BinaryCrossEntropyLoss, binary_cross_entropy_loss
from counterpoise.losses.class_balanced import ClassBalancedLoss, class_balanced_loss
from counterpoise.losses.cross_entropy import CrossEntropyLoss, cross_entropy_loss
from counterpoise.losses.detection import (
    RetinaNetClassificationLoss,
    initialize_classification_layer,
    retinanet_classification_loss,
    sigmoid_prior_bias,
    softmax_prior_bias,
)
from counterpoise.losses.group_vector_scaling import (
    GroupVectorScalingLoss,
    group_scaling,
    group_vector_scaling_loss,
    scaled_margin_loss,
)
from counterpoise.losses.ldam import CosineLinear, LDAMLoss, ldam_loss, ldam_margins
from counterpoise.losses.logit_adjusted import LogitAdjustedLoss, logit_adjusted_loss, post_hoc_logit_adjustment
from counterpoise.losses.sigmoid_focal import SigmoidFocalLoss, sigmoid_focal_loss
from counterpoise.losses.sigmoid_focal_star import SigmoidFocalStarLoss, sigmoid_focal_star_loss
from counterpoise.losses.softmax_focal import SoftmaxFocalLoss, softmax_focal_loss
from counterpoise.losses.task_weights import (
    EqualWeighting,
    StaticWeighting,
    equal_weighted_loss,
    static_weighted_loss,
    task_means,
)
from counterpoise.losses.uncertainty_weighting import (
    UncertaintyWeighting,
    softmax_likelihood,
    uncertainty_regularizers,
    uncertainty_weighted_loss,
    uncertainty_weights,
)
from counterpoise.losses.vector_scaling import VectorScalingLoss, class_scaling, vector_scaling_loss
from counterpoise.memory import ClassStatistics, effective_number_weights

__all__ = [
    "AsymmetricLoss",
    "AsymmetricSingleLabelLoss",
    "BalancedSoftmaxLoss",
    "BinaryCrossEntropyLoss",
    "ClassBalancedLoss",
    "ClassStatistics",
    "CosineLinear",
    "CrossEntropyLoss",
    "EqualWeighting",
    "GroupVectorScalingLoss",
    "LDAMLoss",
    "LogitAdjustedLoss",
    "RetinaNetClassificationLoss",
    "SigmoidFocalLoss",
    "SigmoidFocalStarLoss",
    "SoftmaxFocalLoss",
    "StaticWeighting",
    "UncertaintyWeighting",
    "VectorScalingLoss",
    "adjusted_cross_entropy",
    "asymmetric_loss",
    "asymmetric_single_label_loss",
    "balanced_softmax_loss",
    "binary_cross_entropy_loss",
    "class_balanced_loss",
    "class_scaling",
    "cross_entropy_loss",
    "effective_number_weights",
    "equal_weighted_loss",
    "group_scaling",
    "group_vector_scaling_loss",
    "initialize_classification_layer",
    "ldam_loss",
    "ldam_margins",
    "logit_adjusted_loss",
    "post_hoc_logit_adjustment",
    "retinanet_classification_loss",
    "scaled_margin_loss",
    "sigmoid_focal_loss",
    "sigmoid_focal_star_loss",
    "sigmoid_prior_bias",
    "softmax_focal_loss",
    "softmax_likelihood",
    "softmax_prior_bias",
    "static_weighted_loss",
    "task_means",
    "uncertainty_regularizers",
    "uncertainty_weighted_loss",
    "uncertainty_weights",
    "vector_scaling_loss",
]
