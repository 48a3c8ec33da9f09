"""Faster AutoAugment: augmentation policies searched by gradients (arXiv 1911.06987)."""

from saigen.papers.augmentation.faster_autoaugment.operations import apply_operation, straight_through
from saigen.papers.augmentation.faster_autoaugment.search import (
    PolicyCritic,
    PolicySearch,
    SearchLosses,
    gradient_penalty,
    search_policy,
)
from saigen.papers.augmentation.faster_autoaugment.transform import (
    AugmentationPolicy,
    DifferentiablePolicy,
    load_official,
    policy_operations,
)

__all__ = [
    "AugmentationPolicy",
    "DifferentiablePolicy",
    "PolicyCritic",
    "PolicySearch",
    "SearchLosses",
    "apply_operation",
    "gradient_penalty",
    "load_official",
    "policy_operations",
    "search_policy",
    "straight_through",
]
