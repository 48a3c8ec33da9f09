"""MixMatch: guessed labels, sharpened, and everything mixed up (arXiv 1905.02249)."""

from saigen.papers.training.mixmatch.loss import (
    MIX_MODES,
    Losses,
    MixMatch,
    expected_share,
    forward_interleaved,
    guess_labels,
    interleave,
    mix_batches,
    sharpen,
    statistics_untouched,
    weight_decay_groups,
)
from saigen.papers.training.mixmatch.model import mixmatch_wrn_28_2, mixmatch_wrn_28_large

__all__ = [
    "MIX_MODES",
    "Losses",
    "MixMatch",
    "expected_share",
    "forward_interleaved",
    "guess_labels",
    "interleave",
    "mix_batches",
    "mixmatch_wrn_28_2",
    "mixmatch_wrn_28_large",
    "sharpen",
    "statistics_untouched",
    "weight_decay_groups",
]
