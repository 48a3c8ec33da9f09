"""The Non-Parametric Transformer: attention between the rows of a table and between its columns (arXiv 2106.02584)."""

from saigen.papers.tabular.npt.estimator import NPTClassifier, NPTRegressor, row_corruption_test
from saigen.papers.tabular.npt.model import NonParametricTransformer, SelfAttentionBlock
from saigen.papers.tabular.npt.optimizer import Lamb, flat_then_cosine, lookahead_lamb
from saigen.papers.tabular.npt.table import (
    TableEncoder,
    cosine_tradeoff,
    known_entries,
    mask_entries,
    npt_loss,
    stratified_batches,
)

__all__ = [
    "Lamb",
    "NPTClassifier",
    "NPTRegressor",
    "NonParametricTransformer",
    "SelfAttentionBlock",
    "TableEncoder",
    "cosine_tradeoff",
    "flat_then_cosine",
    "known_entries",
    "lookahead_lamb",
    "mask_entries",
    "npt_loss",
    "row_corruption_test",
    "stratified_batches",
]
