"""RandAugment: two numbers instead of a policy search (arXiv 1909.13719)."""

from saigen.papers.augmentation.randaugment.transform import (
    GridResult,
    RandAugment,
    TrainableRandAugment,
    level_to_argument,
    number_of_policies,
    probability_drawn,
    rand_augment_operations,
    search_rand_augment,
)

__all__ = [
    "GridResult",
    "RandAugment",
    "TrainableRandAugment",
    "level_to_argument",
    "number_of_policies",
    "probability_drawn",
    "rand_augment_operations",
    "search_rand_augment",
]
