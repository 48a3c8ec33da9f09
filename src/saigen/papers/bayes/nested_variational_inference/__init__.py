"""Nested variational inference: every level of a nested importance sampler learns by a divergence of its own (arXiv 2106.11302)."""

from saigen.papers.bayes.nested_variational_inference.model import (
    AnnealingPath,
    GaussianKernels,
    NestedSampler,
    RingOfGaussians,
    Samples,
    avo_loss,
    effective_sample_size,
    level_loss,
    log_normalizer,
    resample,
    ring_sampler,
)

__all__ = [
    "AnnealingPath",
    "GaussianKernels",
    "NestedSampler",
    "RingOfGaussians",
    "Samples",
    "avo_loss",
    "effective_sample_size",
    "level_loss",
    "log_normalizer",
    "resample",
    "ring_sampler",
]
