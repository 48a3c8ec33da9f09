"""A scalable marginal likelihood by Laplace's method, for priors and architectures chosen without validation data (arXiv 2104.04975)."""

from saigen.papers.bayes.marginal_likelihood.estimator import (
    LaplaceEvidence,
    Trained,
    linear_log_evidence,
    mackay_fixed_point,
    select,
    train,
)

__all__ = ["LaplaceEvidence", "Trained", "linear_log_evidence", "mackay_fixed_point", "select", "train"]
