from saigen.papers.data_quality.confident_learning.estimator import (
    ConfidentLearning,
    calibrate_confident_joint,
    compute_confident_joint,
    confident_thresholds,
    cross_val_probabilities,
    estimate_joint,
    estimate_noise,
    find_label_issues,
    label_quality_scores,
    num_label_issues,
)
from saigen.papers.data_quality.confident_learning.noise import (
    flip_labels,
    generate_noise_matrix,
    noise_matrix_from_trace,
)

__all__ = [
    "ConfidentLearning",
    "calibrate_confident_joint",
    "compute_confident_joint",
    "confident_thresholds",
    "cross_val_probabilities",
    "estimate_joint",
    "estimate_noise",
    "find_label_issues",
    "flip_labels",
    "generate_noise_matrix",
    "label_quality_scores",
    "noise_matrix_from_trace",
    "num_label_issues",
]
