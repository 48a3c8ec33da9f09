from saigen.papers.data_quality.label_errors.estimator import (
    ANSWERS,
    KINDS,
    Benchmark,
    Flip,
    Ranking,
    candidate_errors,
    consensus,
    correct,
    error_rate_interval,
    extrapolated_error_rate,
    multi_label_error,
    noise_prevalence,
    thin,
)
from saigen.papers.data_quality.label_errors.study import Votes, read_votes

__all__ = [
    "ANSWERS",
    "KINDS",
    "Benchmark",
    "Flip",
    "Ranking",
    "Votes",
    "candidate_errors",
    "consensus",
    "correct",
    "error_rate_interval",
    "extrapolated_error_rate",
    "multi_label_error",
    "noise_prevalence",
    "read_votes",
    "thin",
]
