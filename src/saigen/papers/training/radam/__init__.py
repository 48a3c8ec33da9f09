from saigen.papers.training.radam.optimizer import DelayedAdam, RAdam
from saigen.papers.training.radam.variance import (
    adaptive_rate_variance,
    adaptive_rate_variances,
    linear_warmup_length,
    longest_sma,
    rectification,
    rectified_warmup,
    simulate_adaptive_rate,
    sma_length,
    warmup_variance,
)

__all__ = [
    "DelayedAdam",
    "RAdam",
    "adaptive_rate_variance",
    "adaptive_rate_variances",
    "linear_warmup_length",
    "longest_sma",
    "rectification",
    "rectified_warmup",
    "simulate_adaptive_rate",
    "sma_length",
    "warmup_variance",
]
