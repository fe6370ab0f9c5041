"""What one example costs: ``(logits, target) -> loss per example``.

Every loss is a function and a module of the same defaults; both take ``weight`` and ``mask``, and say what their mean
divides by (``normalizer``).
"""

from counterpoise.losses.adjusted_cross_entropy import adjusted_cross_entropy
from counterpoise.losses.balanced_softmax import BalancedSoftmaxLoss, balanced_softmax_loss
from counterpoise.losses.class_balanced import ClassBalancedLoss, class_balanced_loss
from counterpoise.losses.cross_entropy import CrossEntropyLoss, cross_entropy_loss
from counterpoise.losses.ldam import CosineLinear, LDAMLoss, ldam_loss, ldam_margins
from counterpoise.losses.logit_adjusted import LogitAdjustedLoss, logit_adjusted_loss, post_hoc_logit_adjustment
from counterpoise.losses.sigmoid_focal import SigmoidFocalLoss, sigmoid_focal_loss
from counterpoise.losses.softmax_focal import SoftmaxFocalLoss, softmax_focal_loss
from counterpoise.memory import ClassStatistics, effective_number_weights

__all__ = [
    "BalancedSoftmaxLoss",
    "ClassBalancedLoss",
    "ClassStatistics",
    "CosineLinear",
    "CrossEntropyLoss",
    "LDAMLoss",
    "LogitAdjustedLoss",
    "SigmoidFocalLoss",
    "SoftmaxFocalLoss",
    "adjusted_cross_entropy",
    "balanced_softmax_loss",
    "class_balanced_loss",
    "cross_entropy_loss",
    "effective_number_weights",
    "ldam_loss",
    "ldam_margins",
    "logit_adjusted_loss",
    "post_hoc_logit_adjustment",
    "sigmoid_focal_loss",
    "softmax_focal_loss",
]
