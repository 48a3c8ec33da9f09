"""Makes ``answers.npz`` beside it: what cleanlab 2.9 answers on 300 examples of 6 classes. Needs ``pip install cleanlab==2.9.0``.

Run as ``python tests/golden/confident_learning/make.py``. The probabilities are multiples of 1/64, so that there are ties.
"""

from pathlib import Path

import numpy as np

FILTERS = (
    "prune_by_noise_rate", "prune_by_class", "both", "confident_learning",
    "predicted_neq_given", "low_normalized_margin", "low_self_confidence",
)  # fmt: skip
SCORES = ("self_confidence", "normalized_margin", "confidence_weighted_entropy")


def data() -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities: a skewed class distribution and a quarter of the labels wrong."""
    rng = np.random.default_rng(7)
    true = np.sort(rng.choice(6, 300, p=[0.35, 0.25, 0.15, 0.12, 0.1, 0.03]))
    logits = rng.normal(size=(300, 6))
    logits[np.arange(300), true] += 2.5
    parts = np.floor(64 * np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    parts[np.arange(300), parts.argmax(axis=1)] += 64 - parts.sum(axis=1)
    return np.where(rng.random(300) < 0.25, rng.integers(0, 6, 300), true), parts / 64


def main() -> None:
    """Asks cleanlab and writes its answers."""
    from cleanlab.count import (
        calibrate_confident_joint,
        compute_confident_joint,
        estimate_joint,
        estimate_latent,
        get_confident_thresholds,
        num_label_issues,
    )
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    labels, P = data()
    raw = compute_confident_joint(labels, P, calibrate=False)
    calibrated = calibrate_confident_joint(raw, labels)
    prior, noise, inverse = estimate_latent(calibrated, labels)
    answers = {
        "labels": labels.astype(np.uint8), "pred_probs": (P * 64).astype(np.uint8),
        "thresholds": get_confident_thresholds(labels, P), "raw": raw, "calibrated": calibrated,
        "joint": estimate_joint(labels, P), "prior": prior, "noise": noise, "inverse": inverse,
        "number": num_label_issues(labels, P),
        "number_calibrated": num_label_issues(labels, P, estimation_method="off_diagonal_calibrated"),
    }  # fmt: skip
    for method in FILTERS:
        answers[f"found_{method}"] = find_label_issues(labels, P, filter_by=method, n_jobs=1)
    for method in SCORES:
        answers[f"score_{method}"] = get_label_quality_scores(labels, P, method=method)
        ranked = find_label_issues(labels, P, filter_by="both", return_indices_ranked_by=method, n_jobs=1)
        answers[f"ranked_{method}"] = ranked.astype(np.int16)
    for share in (0.3, 0.7):
        answers[f"part_{share}"] = find_label_issues(labels, P, frac_noise=share, n_jobs=1)
    np.savez_compressed(Path(__file__).with_name("answers.npz"), **answers)


if __name__ == "__main__":
    main()
