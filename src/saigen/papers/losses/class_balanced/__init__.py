"""The class-balanced loss: re-weighting by the inverse effective number of samples (arXiv 1901.05555)."""

from saigen.papers.losses.class_balanced.loss import (
    ClassBalancedLoss,
    class_balanced_loss,
    class_balanced_weights,
    decay_groups,
    effective_number,
    init_class_prior,
)
from saigen.papers.losses.class_balanced.model import class_balanced_resnet32

__all__ = [
    "ClassBalancedLoss",
    "class_balanced_loss",
    "class_balanced_resnet32",
    "class_balanced_weights",
    "decay_groups",
    "effective_number",
    "init_class_prior",
]
