"""The same answers as cleanlab 2.9 on the same input: masks, rankings, counts, matrices, scores, ties included."""

import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saigen.papers.data_quality.confident_learning import (
    calibrate_confident_joint,
    compute_confident_joint,
    confident_thresholds,
    estimate_joint,
    estimate_noise,
    find_label_issues,
    label_quality_scores,
    num_label_issues,
)
from tests.peers import need, need_module

pytestmark = pytest.mark.peers

PRUNING = ("prune_by_noise_rate", "prune_by_class", "both")
FILTERS = (*PRUNING, "confident_learning", "predicted_neq_given", "low_normalized_margin", "low_self_confidence")
SCORES = ("self_confidence", "normalized_margin", "confidence_weighted_entropy")
SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities of any skew, sharpness and precision; coarse ones are full of ties; classes may be absent."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    K, n = draw(st.integers(2, 12)), draw(st.integers(4, 250))
    true = rng.choice(K, n, p=rng.dirichlet(np.full(K, draw(st.sampled_from([0.3, 1.0, 20.0])))))
    logits = rng.normal(size=(n, K)) * draw(st.sampled_from([0.1, 1.0, 4.0]))
    logits[np.arange(n), true] += draw(st.sampled_from([0.0, 2.0, 6.0]))
    P = np.exp(logits)
    P /= P.sum(axis=1, keepdims=True)
    grain = draw(st.sampled_from([None, 1, 4, 20]))
    if grain is not None:
        parts = np.floor(P * grain)
        parts[np.arange(n), P.argmax(axis=1)] += grain - parts.sum(axis=1)
        P = parts / grain
    labels = np.where(rng.random(n) < draw(st.sampled_from([0.0, 0.2, 0.5])), rng.integers(0, K, n), true)
    labels[:2] = rng.permutation(K)[:2]
    return labels, P.astype(draw(st.sampled_from([np.float64, np.float32])))


@pytest.mark.filterwarnings("ignore")
@SETTINGS
@given(problems(), st.sampled_from([0, 1, 5]), st.sampled_from([0.25, 1.0]))
def test_finds_what_cleanlab_finds(problem, least, share):
    peer = need_module("cleanlab.filter").find_label_issues
    labels, P = problem
    for filter_by in FILTERS:
        options = {"filter_by": filter_by}
        if filter_by in PRUNING:
            options |= {"frac_noise": share, "min_examples_per_class": least}
        np.testing.assert_array_equal(
            find_label_issues(labels, P, **options), peer(labels, P, n_jobs=1, **options), err_msg=filter_by
        )


@pytest.mark.filterwarnings("ignore")
@SETTINGS
@given(problems(), st.sampled_from(FILTERS), st.sampled_from(SCORES), st.booleans())
def test_ranks_as_cleanlab_ranks(problem, filter_by, score, adjust):
    peer = need_module("cleanlab.filter").find_label_issues
    labels, P = problem
    options = {"filter_by": filter_by, "return_indices_ranked_by": score}
    if score != "confidence_weighted_entropy":
        options["rank_by_kwargs"] = {"adjust_pred_probs": adjust}
    np.testing.assert_array_equal(find_label_issues(labels, P, **options), peer(labels, P, n_jobs=1, **options))


@pytest.mark.filterwarnings("ignore")
@SETTINGS
@given(problems())
def test_counts_and_scores_as_cleanlab(problem):
    count, rank = need_module("cleanlab.count"), need_module("cleanlab.rank")
    labels, P = problem
    np.testing.assert_array_equal(confident_thresholds(labels, P), count.get_confident_thresholds(labels, P))
    raw = compute_confident_joint(labels, P, calibrate=False)
    np.testing.assert_array_equal(raw, count.compute_confident_joint(labels, P, calibrate=False))
    calibrated = compute_confident_joint(labels, P)
    np.testing.assert_array_equal(calibrated, count.compute_confident_joint(labels, P))
    np.testing.assert_array_equal(
        calibrate_confident_joint(raw * 3 + 1, labels), count.calibrate_confident_joint(raw * 3 + 1, labels)
    )
    np.testing.assert_array_equal(estimate_joint(labels, P), count.estimate_joint(labels, P))
    for ours, theirs in zip(estimate_noise(calibrated, labels), count.estimate_latent(calibrated, labels), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    for method in ("off_diagonal", "off_diagonal_calibrated"):
        ours = num_label_issues(labels, P, estimation_method=method)
        assert ours == count.num_label_issues(labels, P, estimation_method=method)
    for method in SCORES:
        ours = label_quality_scores(labels, P, method=method)
        np.testing.assert_array_equal(ours, rank.get_label_quality_scores(labels, P, method=method))
        if method != "confidence_weighted_entropy":
            ours = label_quality_scores(labels, P, method=method, adjust_pred_probs=True)
            theirs = rank.get_label_quality_scores(labels, P, method=method, adjust_pred_probs=True)
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.filterwarnings("ignore")
@SETTINGS
@given(problems(), st.integers(0, 2**32 - 1))
def test_own_joint_and_own_counts_as_cleanlab(problem, seed):
    peer = need_module("cleanlab.filter").find_label_issues
    labels, P = problem
    K, rng = P.shape[1], np.random.default_rng(seed)
    joint = rng.integers(0, 20, (K, K)) + np.diag(rng.integers(1, 50, K))
    for filter_by in PRUNING:
        options = {"filter_by": filter_by, "confident_joint": joint}
        np.testing.assert_array_equal(find_label_issues(labels, P, **options), peer(labels, P, n_jobs=1, **options))
        # A full joint, since cleanlab divides by zero where a class has no noise at all.
        options |= {
            "confident_joint": joint + 5,
            "num_to_remove_per_class": [c // 4 for c in np.bincount(labels, minlength=K)],
        }
        np.testing.assert_array_equal(find_label_issues(labels, P, **options), peer(labels, P, n_jobs=1, **options))


@pytest.mark.filterwarnings("ignore")
@settings(SETTINGS, max_examples=15)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(8, 80))
def test_multi_label_as_cleanlab(seed, K, n):
    need("cleanlab")
    peer = need_module("cleanlab.multilabel_classification.filter").find_label_issues
    rank = need_module("cleanlab.multilabel_classification.rank")
    count = need_module("cleanlab.count")
    rng = np.random.default_rng(seed)
    P = np.round(rng.beta(0.4, 0.6, (n, K)), 2)
    matrix = (P > 0.5) ^ (rng.random((n, K)) < 0.2)
    matrix[0] = False  # both values in every class: cleanlab cannot take a class that every example has
    labels = [np.flatnonzero(row).tolist() for row in matrix]
    for filter_by in FILTERS:
        ours = find_label_issues(labels, P, filter_by=filter_by, multi_label=True)
        np.testing.assert_array_equal(ours, peer(labels, P, filter_by=filter_by, n_jobs=1), err_msg=filter_by)
        np.testing.assert_array_equal(
            ours, find_label_issues(matrix.astype(int), P, filter_by=filter_by, multi_label=True)
        )
    for score in SCORES:
        options = {"filter_by": "both", "return_indices_ranked_by": score}
        ours = find_label_issues(labels, P, multi_label=True, **options)
        np.testing.assert_array_equal(ours, peer(labels, P, n_jobs=1, **options))
        ours = label_quality_scores(labels, P, method=score, multi_label=True)
        np.testing.assert_array_equal(ours, rank.get_label_quality_scores(labels, P, method=score))
    ours = compute_confident_joint(labels, P, multi_label=True)
    np.testing.assert_array_equal(ours, count.compute_confident_joint(labels, P, multi_label=True))
    ours = estimate_joint(labels, P, multi_label=True)
    np.testing.assert_array_equal(ours, count.estimate_joint(labels, P, multi_label=True))
    assert num_label_issues(labels, P, multi_label=True) == count.num_label_issues(labels, P, multi_label=True)


@pytest.mark.parametrize("K", [10, 100])
def test_large_input_as_cleanlab(K):
    peer = need_module("cleanlab.filter").find_label_issues
    rng = np.random.default_rng(K)
    true, logits = rng.integers(0, K, 20_000), rng.normal(size=(20_000, K))
    logits[np.arange(20_000), true] += 4
    P = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.where(rng.random(20_000) < 0.2, rng.integers(0, K, 20_000), true)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for filter_by in FILTERS:
            options = {"filter_by": filter_by, "return_indices_ranked_by": "normalized_margin"}
            np.testing.assert_array_equal(find_label_issues(labels, P, **options), peer(labels, P, n_jobs=1, **options))
