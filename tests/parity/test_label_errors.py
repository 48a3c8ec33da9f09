"""Candidates against cleanlab."""

import numpy as np
import pytest

from saigen.papers.data_quality.label_errors import candidate_errors
from tests.peers import need_module

pytestmark = pytest.mark.peers


@pytest.mark.parametrize(("seed", "K"), [(0, 2), (1, 5), (2, 20)])
def test_candidates_equal_cleanlabs(seed, K):
    num_label_issues = need_module("cleanlab.count").num_label_issues
    margin_of = need_module("cleanlab.rank").get_normalized_margin_for_each_label
    rng = np.random.default_rng(seed)
    true, logits = rng.integers(0, K, 800), rng.normal(size=(800, K))
    logits[np.arange(800), true] += 3
    P = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.where(rng.random(800) < 0.15, rng.integers(0, K, 800), true)
    count = int(num_label_issues(labels, P, estimation_method="off_diagonal_calibrated"))
    worst = np.argsort(margin_of(labels, P), kind="stable")
    np.testing.assert_array_equal(candidate_errors(labels, P, count=count), worst[:count])
    np.testing.assert_array_equal(candidate_errors(labels, P), worst[: min(count, (P.argmax(axis=1) != labels).sum())])
