"""Small instances of the room's public components, and the same work side by side with cleanlab."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.naive_bayes import GaussianNB

from saigen.example import Benchmark, Example
from saigen.papers.data_quality.confident_learning import (
    ConfidentLearning,
    find_label_issues,
    flip_labels,
    label_quality_scores,
    noise_matrix_from_trace,
)

LABELS, PROBABILITIES = np.array([0, 0, 1, 1]), np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.1, 0.9]])


def _noisy_blobs(generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
    y = torch.arange(60) % 3
    X = torch.randn(60, 2, generator=generator) + 4 * torch.stack((y == 1, y == 2), dim=1)
    y[:3] = (y[:3] + 1) % 3
    return X.numpy().astype(np.float64), y.numpy()


def _labels_and_probabilities(generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
    P = torch.rand(40, 4, generator=generator, dtype=torch.float64).pow(4)
    return torch.arange(40).numpy() % 4, (P / P.sum(dim=1, keepdim=True)).numpy()


def examples():
    """The estimator, the search for label errors, the scores, and the noise."""
    yield Example(
        name="ConfidentLearning",
        kind="estimator",
        make=lambda: ConfidentLearning(GaussianNB(), cv=3, random_state=0),
        inputs=_noisy_blobs,
        code="""
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from saigen.papers.data_quality.confident_learning import ConfidentLearning, flip_labels, generate_noise_matrix

X, y = load_digits(return_X_y=True)
noisy = flip_labels(y, generate_noise_matrix(10, 0.2, random_state=0), random_state=0)

model = ConfidentLearning(LogisticRegression(C=0.01), cv=3, random_state=0).fit(X / 16, noisy)
worst = model.label_quality_.argsort()[:5]
print(model.label_issues_.sum(), "labels look wrong; the worst:", worst, "->", model.suggested_labels_[worst])
print("right in", (noisy != y)[model.label_issues_].mean().round(2), "of them")
""",
        wrong=(
            (lambda: ConfidentLearning(filter_by="magic").fit(*_noisy_blobs(torch.Generator())), "filter_by"),
            (lambda: ConfidentLearning(cv=1).fit(*_noisy_blobs(torch.Generator())), "cv"),
            (lambda: ConfidentLearning(frac_noise=2.0).fit(*_noisy_blobs(torch.Generator())), "frac_noise"),
        ),
    )
    yield Example(
        name="find_label_issues",
        kind="function",
        make=lambda: find_label_issues,
        inputs=_labels_and_probabilities,
        code="""
import numpy as np
from saigen.papers.data_quality.confident_learning import find_label_issues

labels = np.array([0, 0, 1, 1])                                          # as given
pred_probs = np.array([[.9, .1], [.2, .8], [.3, .7], [.1, .9]])          # from models that did not see the example
print(find_label_issues(labels, pred_probs, filter_by="prune_by_noise_rate"))
print(find_label_issues(labels, pred_probs, filter_by="both", return_indices_ranked_by="self_confidence"))
""",
        wrong=(
            (lambda: find_label_issues(LABELS, PROBABILITIES, filter_by="magic"), "filter_by"),
            (lambda: find_label_issues([0, 0, 1, 7], PROBABILITIES), "row 3"),
            (lambda: find_label_issues(LABELS, PROBABILITIES * 0.5), "row 0"),
            (lambda: find_label_issues(LABELS, np.where(PROBABILITIES == 0.3, np.nan, PROBABILITIES)), "row 2"),
            (lambda: find_label_issues(LABELS[:3], PROBABILITIES), "labels"),
            (lambda: find_label_issues(LABELS, PROBABILITIES, frac_noise=0.0), "frac_noise"),
            (lambda: find_label_issues(LABELS, PROBABILITIES, return_indices_ranked_by="magic"), "ranked_by"),
        ),
        batch=None,
    )
    yield Example(
        name="label_quality_scores",
        kind="function",
        make=lambda: partial(label_quality_scores, method="normalized_margin"),
        inputs=_labels_and_probabilities,
        code="""
from saigen.papers.data_quality.confident_learning import label_quality_scores

print(label_quality_scores([0, 1], [[0.9, 0.1], [0.7, 0.3]], method="normalized_margin"))
""",
        wrong=((lambda: label_quality_scores(LABELS, PROBABILITIES, method="magic"), "method"),),
        batch=None,
    )
    yield Example(
        name="noise_matrix_from_trace",
        kind="function",
        make=lambda: (
            lambda labels: flip_labels(
                labels, noise_matrix_from_trace(4, 3.0, sparsity=0.5, random_state=0), random_state=0
            )
        ),
        inputs=lambda generator: (torch.randint(0, 4, (50,), generator=generator).numpy(),),
        code="""
import numpy as np
from saigen.papers.data_quality.confident_learning import flip_labels, noise_matrix_from_trace

noise = noise_matrix_from_trace(4, trace=3.2, sparsity=0.5, random_state=0)      # P(given | true), columns sum to one
true = np.arange(1000) % 4
print((flip_labels(true, noise, random_state=0) != true).mean())                 # about 1 - 3.2 / 4
""",
        wrong=(
            (lambda: noise_matrix_from_trace(4, 4.5), "trace"),
            (lambda: noise_matrix_from_trace(4, 3.0, sparsity=0.9), "sparsity"),
            (lambda: noise_matrix_from_trace(1, 1.0), "num_classes"),
        ),
        batch=None,
    )


def _large(K: int, n: int = 50_000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    true, logits = rng.integers(0, K, n), rng.normal(size=(n, K))
    logits[np.arange(n), true] += 4
    P = np.exp(logits)
    return np.where(rng.random(n) < 0.2, rng.integers(0, K, n), true), P / P.sum(axis=1, keepdims=True)


def _search(K: int, filter_by: str, peer: bool) -> Callable[[], Any]:
    def build() -> Callable[[], Any]:
        labels, P = _large(K)
        find = find_label_issues
        if peer:
            from cleanlab.filter import find_label_issues as find_with_cleanlab

            find = partial(find_with_cleanlab, n_jobs=1)
        return lambda: find(labels, P, filter_by=filter_by, return_indices_ranked_by="normalized_margin")

    return build


def _score(method: str, peer: bool) -> Callable[[], Any]:
    def build() -> Callable[[], Any]:
        labels, P = _large(10)
        score = label_quality_scores
        if peer:
            from cleanlab.rank import get_label_quality_scores as score
        return lambda: score(labels, P, method=method)

    return build


def benchmarks():
    """cleanlab in one process (its worker processes cost it more than they give at these sizes)."""
    for K in (10, 100):
        for filter_by in ("prune_by_noise_rate", "both", "confident_learning"):
            yield Benchmark(
                name=f"find_label_issues {filter_by}, 50,000 x {K}",
                ours=_search(K, filter_by, peer=False),
                peer=_search(K, filter_by, peer=True),
            )
    for method in ("normalized_margin", "confidence_weighted_entropy"):
        yield Benchmark(
            name=f"label_quality_scores {method}, 50,000 x 10", ours=_score(method, False), peer=_score(method, True)
        )
