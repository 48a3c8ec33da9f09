"""Confident learning (Northcutt, Jiang, Chuang, JAIR 2021): which labels are wrong, from out-of-sample probabilities.

The paper's letters: ỹ the given label (``labels``), y* the true one, p̂(ỹ = j; x) the predicted probabilities (``P``,
n x K), t_j the threshold of class j, C the confident joint and Q the joint distribution, given labels in rows and true
labels in columns. The answers are those of cleanlab 2.9 on the same input, ties included.
"""

import warnings
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from scipy.special import xlogy
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import check_cv
from sklearn.utils import _safe_indexing, check_random_state, column_or_1d, get_tags, indexable
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import check_is_fitted, has_fit_parameter

from saigen.papers.data_quality.confident_learning.checks import (
    SLACK,
    class_indices,
    joint_of_shape,
    labels_and_probabilities,
    one_hot,
    one_of,
)

FILTERS = (
    "prune_by_noise_rate",
    "prune_by_class",
    "both",
    "confident_learning",
    "predicted_neq_given",
    "low_normalized_margin",
    "low_self_confidence",
)
SCORES = ("self_confidence", "normalized_margin", "confidence_weighted_entropy")
TINY = 1e-100


# Count: thresholds, confident joint, joint ------------------------------------------------------------------------


def _against_rest(p: np.ndarray) -> np.ndarray:
    return np.stack((1 - p, p), axis=1)


def _thresholds(y: np.ndarray, P: np.ndarray) -> np.ndarray:
    order, bounds = np.argsort(y, kind="stable"), np.cumsum(np.bincount(y, minlength=P.shape[1]))[:-1]
    own = np.split(P[order, y[order]], bounds)  # one array a class, so that each mean rounds as of that class alone
    return np.clip([p.mean() if p.size else 2 for p in own], 2 * SLACK, None)


def confident_thresholds(
    labels: ArrayLike, pred_probs: ArrayLike, *, multi_label: bool = False
) -> Float[np.ndarray, "..."]:
    """t_j, the mean probability of class j over the examples given label j (Eq. 2); shape (K,), multi-label (K, 2).

    A class that no example was given has threshold 2, which no probability reaches.
    Raises ``ValueError`` for labels or probabilities that are none.

    >>> confident_thresholds([0, 0, 1], [[0.9, 0.1], [0.7, 0.3], [0.2, 0.8]]).round(3).tolist()
    [0.8, 0.8]
    """
    if multi_label:
        Y, P = one_hot(labels, pred_probs)
        return np.stack([_thresholds(y, _against_rest(p)) for y, p in zip(Y.T, P.T, strict=True)])
    return _thresholds(*labels_and_probabilities(labels, pred_probs, least_classes=1))


def _confident_class(P: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """argmax p̂, and the class each example is counted in (-1: none reaches its threshold)."""
    reach, argmax = thresholds - SLACK, P.argmax(axis=1)
    guess = argmax.copy()
    rest = np.flatnonzero(P[np.arange(len(P)), argmax] < reach[argmax])
    above = P[rest] >= reach
    many, first = np.count_nonzero(above, axis=1), above.argmax(axis=1)
    guess[rest] = np.where(many > 1, argmax[rest], np.where(many == 1, first, -1))
    return argmax, guess


def _count(y: np.ndarray, guess: np.ndarray, K: int) -> np.ndarray:
    confident = guess >= 0
    C = np.bincount(y[confident] * K + guess[confident], minlength=K * K).reshape(K, K)
    np.fill_diagonal(C, C.diagonal().clip(min=1))
    return C


def _round_rows(A: np.ndarray) -> np.ndarray:
    """Whole numbers with the row sums kept: half to even, then one up (down) where most was cut off (added)."""
    whole = A.round()
    short = A.sum(axis=1).round() - whole.sum(axis=1)
    order = np.argsort(A - whole, axis=1)
    order = np.where((short > 0)[:, None], order[:, ::-1], order)
    step = (np.arange(A.shape[1]) < np.abs(short)[:, None]) * np.sign(short)[:, None]
    np.put_along_axis(whole, order, np.take_along_axis(whole, order, axis=1) + step, axis=1)
    return whole.astype(np.int64)


def _calibrate(C: np.ndarray, y: np.ndarray) -> np.ndarray:
    given = np.bincount(y, minlength=len(C))
    scaled = C / np.clip(C.sum(axis=1), TINY, None)[:, None] * given[:, None]
    return _round_rows(scaled / np.clip(scaled.sum(), TINY, None) * len(y))


def calibrate_confident_joint(
    confident_joint: ArrayLike, labels: Any, *, multi_label: bool = False
) -> Int[np.ndarray, "..."]:
    """C with row i summing to the number of examples given label i, in whole numbers (Eq. 3's numerator).

    >>> calibrate_confident_joint([[2, 1], [0, 3]], [0, 0, 0, 0, 0, 0, 1, 1]).tolist()
    [[4, 2], [0, 2]]
    """
    C = np.asarray(confident_joint)
    if multi_label:
        Y, _ = one_hot(labels, np.zeros((len(labels), len(C))))
        return np.stack([_calibrate(c, y) for c, y in zip(joint_of_shape(C, len(C), 3), Y.T, strict=True)])
    C = joint_of_shape(C, len(C), 2)
    return _calibrate(C, class_indices(labels, len(C)))


def compute_confident_joint(
    labels: Any,
    pred_probs: ArrayLike,
    *,
    thresholds: ArrayLike | None = None,
    calibrate: bool = True,
    multi_label: bool = False,
) -> Int[np.ndarray, "..."]:
    """The confident joint C (Eq. 1): examples given label i (row) that confidently belong to class j (column).

    Each example is counted in the one class whose threshold its probability reaches; where several are reached, in the
    most probable class. ``calibrate`` makes the rows sum to the counts of the given labels. Multi-label: one 2 x 2
    joint (absent, present) a class, shape (K, 2, 2).

    >>> compute_confident_joint([0, 0, 1, 1], [[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.1, 0.9]]).tolist()
    [[1, 1], [0, 2]]
    """
    if multi_label:
        Y, P = one_hot(labels, pred_probs)
        t = [None] * P.shape[1] if thresholds is None else np.broadcast_to(thresholds, (P.shape[1], 2))
        return np.stack([_joint_of(y, _against_rest(p), t_j, calibrate) for y, p, t_j in zip(Y.T, P.T, t, strict=True)])
    y, P = labels_and_probabilities(labels, pred_probs, least_classes=1)
    if thresholds is not None and np.shape(thresholds) != (P.shape[1],):
        raise ValueError(f"thresholds has shape {np.shape(thresholds)}, needed is one for each of {P.shape[1]} classes")
    return _joint_of(y, P, thresholds, calibrate)


def _joint_of(y: np.ndarray, P: np.ndarray, thresholds: ArrayLike | None, calibrate: bool) -> np.ndarray:
    t = _thresholds(y, P) if thresholds is None else np.asarray(thresholds)
    C = _count(y, _confident_class(P, t)[1], P.shape[1])
    return _calibrate(C, y) if calibrate else C


def estimate_joint(
    labels: Any, pred_probs: ArrayLike, *, confident_joint: ArrayLike | None = None, multi_label: bool = False
) -> Float[np.ndarray, "..."]:
    """Q̂ (Eq. 3): the share of the data given label i (row) whose true label is j (column); sums to one.

    >>> estimate_joint([0, 0, 1, 1], [[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.1, 0.9]]).tolist()
    [[0.25, 0.25], [0.0, 0.5]]
    """
    if confident_joint is None:
        C = compute_confident_joint(labels, pred_probs, multi_label=multi_label)
    else:
        C = calibrate_confident_joint(confident_joint, labels, multi_label=multi_label)
    return C / np.clip(C.sum(axis=(-2, -1), keepdims=True), TINY, None)


def estimate_noise(
    confident_joint: ArrayLike, labels: ArrayLike
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, "k k"], Float[np.ndarray, "k k"]]:
    """From C: the prior P(true), the noise matrix P(given | true) and its inverse P(true | given).

    Columns are conditioned on: ``noise[i, j]`` = P(given i | true j) and ``inverse[j, i]`` = P(true j | given i);
    columns sum to one. The prior is P(true k) = P(given k) inverse[k, k] / noise[k, k].

    >>> prior, noise, inverse = estimate_noise([[3, 1], [0, 4]], [0, 0, 0, 0, 1, 1, 1, 1])
    >>> noise.round(2).tolist(), inverse.round(2).tolist()
    ([[1.0, 0.2], [0.0, 0.8]], [[0.75, 0.0], [0.25, 1.0]])
    """
    C = joint_of_shape(confident_joint, len(np.asarray(confident_joint)), 2)
    y = class_indices(labels, len(C))
    noise = C / np.clip(C.sum(axis=0).astype(float), TINY, None)
    inverse = C.T / np.clip(C.sum(axis=1).astype(float), TINY, None)
    given = np.bincount(y, minlength=len(C)) / float(len(y))
    prior = (inverse.diagonal() / np.clip(noise.diagonal(), TINY, None) * given).clip(1e-6, 1.0)
    columns = [m / np.clip(m.sum(axis=0), TINY, None) for m in (noise, inverse)]
    return prior / np.clip(prior.sum(), TINY, None), *columns


# Rank -------------------------------------------------------------------------------------------------------------


def _best_other(y: np.ndarray, P: np.ndarray) -> np.ndarray:
    others = P.copy()
    others[np.arange(len(y)), y] = -np.inf
    return others.max(axis=1)


def _scores(y: np.ndarray, P: np.ndarray, method: str) -> np.ndarray:
    own = P[np.arange(len(y)), y]
    if method == "self_confidence":
        return own
    if method == "normalized_margin":
        return (own - _best_other(y, P) + 1) / 2
    # 512 rows at a time stay in the cache.
    blocks = (P[at : at + 512].clip(min=0) for at in range(0, len(P), 512))
    entropy = np.concatenate([-xlogy(p, p).sum(axis=1) for p in blocks] or [P[:0, 0]]) / np.log(P.shape[1])
    ratio = entropy / np.clip(own, 1e-6, None)
    return np.log(ratio + 1) / np.clip(ratio, 1e-6, None)


def _adjusted(P: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    shifted = P - thresholds + thresholds.max()
    return shifted / shifted.sum(axis=1, keepdims=True)


def _quality(
    y: np.ndarray, P: np.ndarray, method: str, adjust: bool, rows: np.ndarray | slice = slice(None)
) -> np.ndarray:
    one_of("method", method, SCORES)
    if adjust and method == "confidence_weighted_entropy":
        raise ValueError("adjust_pred_probs is True, confidence_weighted_entropy allows only False")
    return _scores(y[rows], _adjusted(P[rows], _thresholds(y, P)) if adjust else P[rows], method)


def label_quality_scores(
    labels: Any,
    pred_probs: ArrayLike,
    *,
    method: str = "self_confidence",
    adjust_pred_probs: bool = False,
    multi_label: bool = False,
) -> Float[np.ndarray, " n"]:
    """How likely each given label is right, from 0 (wrong) to 1.

    ``self_confidence`` is p̂(given), ``normalized_margin`` (p̂(given) - max of the others + 1) / 2, and
    ``confidence_weighted_entropy`` log(r + 1) / r of r, the normalised entropy over p̂(given). ``adjust_pred_probs``
    first subtracts the thresholds t. Multi-label: an exponential moving average (0.8) over the classes' scores, from
    best to worst.

    >>> label_quality_scores([0, 1], [[0.9, 0.1], [0.7, 0.3]], method="normalized_margin").round(3).tolist()
    [0.9, 0.3]
    """
    if not multi_label:
        return _quality(*labels_and_probabilities(labels, pred_probs, least_classes=1), method, adjust_pred_probs)
    Y, P = one_hot(labels, pred_probs)
    each = [_quality(y, _against_rest(p), method, adjust_pred_probs) for y, p in zip(Y.T, P.T, strict=True)]
    average, *rest = np.sort(np.stack(each), axis=0)[::-1]
    for score in rest:
        average = 0.8 * score + (1 - 0.8) * average
    return average


# Find -------------------------------------------------------------------------------------------------------------


def _smallest(D: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """In each row of ``D`` the ``counts`` smallest; equal values at the edge in the order of ``np.argsort``."""
    counts = np.minimum(counts, D.shape[1])
    edge = np.sort(D, axis=1)[np.arange(len(D)), counts - 1]
    chosen = (edge[:, None] >= D) & (counts > 0)[:, None]
    for row in np.flatnonzero(np.count_nonzero(chosen, axis=1) != counts):
        chosen[row] = False
        chosen[row, np.argsort(D[row])[: counts[row]]] = True
    return chosen


def _prune_counts(C: np.ndarray, least: int, frac_noise: float) -> np.ndarray:
    """How many to prune for (given, true): at least ``least`` stay in each class, and only ``frac_noise`` go."""
    stay = np.maximum(C.diagonal(), least)
    spread = (stay - C.diagonal()) / np.maximum(np.count_nonzero(C, axis=1) - 1.0, 1.0)
    full = np.maximum(C - spread[:, None], 0)
    np.fill_diagonal(full, stay)
    part = full * frac_noise
    np.fill_diagonal(part, stay)
    np.fill_diagonal(part, stay + (full - part).sum(axis=1))
    return part.astype(np.int64)


def _counts_for(per_class: ArrayLike, counts: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Scales the prune counts to ``num_to_remove_per_class`` as cleanlab 2.9 does: along the true class."""
    wanted = np.asarray(per_class)
    if wanted.shape != given.shape or (wanted < 0).any() or (wanted > given).any():
        raise ValueError(
            f"num_to_remove_per_class is {per_class}, needed is for each class 0 to its count {given.tolist()}"
        )
    share = counts.T / counts.sum(axis=0)
    noise = share.sum(axis=1) - share.diagonal()
    scaled = (share.T * wanted / np.where(noise > 0, noise, np.inf)).T
    np.fill_diagonal(scaled, given - wanted)
    return _round_rows(scaled).T


def _prune(y: np.ndarray, P: np.ndarray, counts: np.ndarray, least: int, filter_by: str) -> np.ndarray:
    flagged, small = np.zeros(len(y), bool), []
    order, bounds = np.argsort(y, kind="stable"), np.cumsum(np.bincount(y, minlength=P.shape[1]))[:-1]
    for k, rows in enumerate(np.split(order, bounds)):
        if len(rows) <= least:
            small += [k] if len(rows) else []
            continue
        of_class, found = P[rows], []
        if filter_by != "prune_by_noise_rate":
            found.append(_smallest(of_class[None, :, k], np.array([len(rows) - counts[k, k]]).clip(0))[0])
        if filter_by != "prune_by_class":
            toward = np.flatnonzero((counts[k] > 0) & (np.arange(len(counts)) != k))
            margins = of_class[:, k] - np.ascontiguousarray(of_class.T[toward])
            found.append(_smallest(margins, counts[k, toward]).any(axis=0))
        flagged[rows] = np.logical_and.reduce(found)
    if small:
        warnings.warn(f"label errors in class {small} are not looked for: {least} or fewer examples", stacklevel=4)
    return flagged


def _predicted_as_given(y: np.ndarray, P: np.ndarray, argmax: np.ndarray) -> np.ndarray:
    """Where argmax p̂ is the given label once SLACK is added to the given label's probability."""
    same = argmax == y
    rest = np.flatnonzero(~same)
    own, best = P[rest, y[rest]] + P.dtype.type(SLACK), P[rest, argmax[rest]]
    same[rest] = (own > best) | ((own == best) & (y[rest] < argmax[rest]))
    return same


def _find(
    y: np.ndarray, P: np.ndarray, filter_by: str, frac_noise: float, per_class: Any, least: int, C: Any
) -> np.ndarray:
    K = P.shape[1]
    argmax, guess = _confident_class(P, _thresholds(y, P))
    if filter_by == "predicted_neq_given":
        flagged = argmax != y
    elif filter_by in ("prune_by_noise_rate", "prune_by_class", "both"):
        C = _calibrate(_count(y, guess, K), y) if C is None else joint_of_shape(C, K, 2)
        counts = _prune_counts(C, least, frac_noise)
        if per_class is not None:
            counts = _counts_for(per_class, counts, np.bincount(y, minlength=K))
        flagged = _prune(y, P, counts, least, filter_by)
    else:
        flagged = (guess >= 0) & (guess != y)
    flagged &= ~_predicted_as_given(y, P, argmax)
    if filter_by.startswith("low_"):
        lowest = np.argsort(_scores(y, P, filter_by[4:]))[: np.count_nonzero(flagged)]
        flagged = np.zeros(len(y), bool)
        flagged[lowest] = True
    return flagged


def find_label_issues(
    labels: Any,
    pred_probs: ArrayLike,
    *,
    return_indices_ranked_by: str | None = None,
    rank_by_kwargs: dict[str, Any] | None = None,
    filter_by: str = "prune_by_noise_rate",
    frac_noise: float = 1.0,
    num_to_remove_per_class: ArrayLike | None = None,
    min_examples_per_class: int = 1,
    confident_joint: ArrayLike | None = None,
    n_jobs: int | None = None,
    verbose: bool = False,
    multi_label: bool = False,
) -> Bool[np.ndarray, " n"] | Int[np.ndarray, " m"]:
    """Which labels are wrong, from out-of-sample probabilities (Section 3.2): a mask, or indices ranked worst first.

    ``labels`` (n,) are class indices, ``pred_probs`` (n, K) probabilities from models that did not see the example.
    ``filter_by``: ``prune_by_noise_rate`` (for each pair of classes as many as C says, by margin), ``prune_by_class``
    (for each class as many as C says, by self-confidence), ``both`` of them, ``confident_learning`` (the examples
    counted off the diagonal of C), ``predicted_neq_given`` (the naive way), ``low_normalized_margin`` and
    ``low_self_confidence`` (the lowest scores, as many as ``confident_learning`` finds).
    ``return_indices_ranked_by`` is a method of ``label_quality_scores``, ``rank_by_kwargs`` may hold its
    ``adjust_pred_probs``. ``frac_noise`` is the share of the found errors wanted, ``min_examples_per_class`` stay in
    each class, ``confident_joint`` stands in for the estimated one (K x K; multi-label K x 2 x 2).
    ``multi_label``: ``labels`` is a list of class indices an example (or an n x K matrix of 0 and 1), each class is
    judged against the rest, and an example is found where any class is. ``n_jobs`` and ``verbose`` are taken so that
    calls written for cleanlab run; they change nothing. Raises ``ValueError`` naming the row, class or argument.

    >>> find_label_issues([0, 0, 1, 1], [[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.1, 0.9]]).tolist()
    [False, True, False, False]
    """
    one_of("filter_by", filter_by, FILTERS)
    adjust = dict(rank_by_kwargs or {}).get("adjust_pred_probs", False)
    if set(rank_by_kwargs or {}) - {"adjust_pred_probs"}:
        raise ValueError(f"rank_by_kwargs is {rank_by_kwargs}, allowed is adjust_pred_probs")
    if return_indices_ranked_by is not None:
        one_of("return_indices_ranked_by", return_indices_ranked_by, SCORES)
    if not 0 < frac_noise <= 1:
        raise ValueError(f"frac_noise is {frac_noise}, allowed is 0 < frac_noise <= 1")
    if min_examples_per_class < 0:
        raise ValueError(f"min_examples_per_class is {min_examples_per_class}, allowed is 0 or more")
    pruning = filter_by in ("prune_by_noise_rate", "prune_by_class", "both")
    if not pruning and (frac_noise != 1 or num_to_remove_per_class is not None):
        raise ValueError(
            f"frac_noise and num_to_remove_per_class go with the prune_by filters, filter_by is {filter_by}"
        )
    options = (filter_by, frac_noise, num_to_remove_per_class, min_examples_per_class)

    if multi_label:
        flagged = _find_multi_label(labels, pred_probs, options, confident_joint)
    else:
        y, P = labels_and_probabilities(labels, pred_probs)
        flagged = _find(y, P, *options, confident_joint)
    if return_indices_ranked_by is None:
        return flagged
    found = np.flatnonzero(flagged)
    if multi_label:
        scores = label_quality_scores(
            labels, pred_probs, method=return_indices_ranked_by, adjust_pred_probs=adjust, multi_label=True
        )[found]
    else:
        scores = _quality(y, P, return_indices_ranked_by, adjust, found)
    return found[np.argsort(scores)]


def _find_multi_label(
    labels: Any, pred_probs: ArrayLike, options: tuple, confident_joint: ArrayLike | None
) -> np.ndarray:
    Y, P = one_hot(labels, pred_probs)
    filter_by, frac_noise, per_class, least = options
    C = [None] * P.shape[1] if confident_joint is None else joint_of_shape(confident_joint, P.shape[1], 3)
    number = [None] * P.shape[1] if per_class is None else [[count, 0] for count in per_class]
    lowest = filter_by.startswith("low_")
    each = [
        _find(y, _against_rest(p), "confident_learning" if lowest else filter_by, frac_noise, number_k, least, C_k)
        for y, p, number_k, C_k in zip(Y.T, P.T, number, C, strict=True)
    ]
    flagged = np.any(each, axis=0)
    if lowest:
        order = np.argsort(label_quality_scores(labels, pred_probs, multi_label=True))[: np.count_nonzero(flagged)]
        flagged = np.isin(np.arange(len(P)), order)
    return flagged


def num_label_issues(
    labels: Any,
    pred_probs: ArrayLike,
    *,
    confident_joint: ArrayLike | None = None,
    estimation_method: str = "off_diagonal",
    multi_label: bool = False,
) -> int:
    """How many labels are wrong: the examples counted off the diagonal of C, or n (1 - trace Q̂).

    ``off_diagonal`` counts examples whose prediction differs from the label, ``off_diagonal_calibrated`` takes the
    calibrated joint, ``off_diagonal_custom`` the ``confident_joint`` given.

    >>> num_label_issues([0, 0, 1, 1], [[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.1, 0.9]])
    1
    """
    one_of("estimation_method", estimation_method, ("off_diagonal", "off_diagonal_calibrated", "off_diagonal_custom"))
    if multi_label or estimation_method == "off_diagonal":
        found = find_label_issues(labels, pred_probs, filter_by="confident_learning", multi_label=multi_label)
        return int(np.count_nonzero(found))
    custom = estimation_method == "off_diagonal_custom"
    if custom and confident_joint is None:
        raise ValueError("confident_joint is None, estimation_method 'off_diagonal_custom' needs one")
    y, P = labels_and_probabilities(labels, pred_probs)
    Q = estimate_joint(y, P, confident_joint=confident_joint if custom else None)
    return int(np.rint((1.0 - Q.trace()) * len(y)))


# Learn: out-of-sample probabilities, prune, train again -----------------------------------------------------------


def _stratified_folds(
    y: np.ndarray, folds: int, random_state: np.random.RandomState
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each class dealt over the folds in random order; a class's only example is in every training part, never held out."""
    fold, at = np.empty(len(y), np.intp), 0
    for k, members in enumerate(np.bincount(y)):
        fold[y == k] = random_state.permutation((at + np.arange(members)) % folds) if members > 1 else -1
        at += members
    return [(np.flatnonzero(fold != f), np.flatnonzero(fold == f)) for f in range(folds) if (fold == f).any()]


def _fit_and_predict(
    estimator: Any, X: Any, y: np.ndarray, train: np.ndarray, held_out: np.ndarray, K: int
) -> np.ndarray:
    model = clone(estimator).fit(_safe_indexing(X, train), y[train])
    P = np.zeros((len(held_out), K))
    P[:, model.classes_] = model.predict_proba(_safe_indexing(X, held_out))
    return P


def cross_val_probabilities(
    estimator: Any,
    X: Any,
    labels: ArrayLike,
    *,
    cv: Any = 5,
    random_state: int | np.random.RandomState | None = None,
    n_jobs: int | None = None,
) -> Float[np.ndarray, "n k"]:
    """Out-of-sample probabilities of every example, each from a clone of ``estimator`` that did not see it.

    Columns are the classes in sorted order (``np.unique(labels)``). ``cv`` is a number of shuffled stratified folds,
    or a scikit-learn splitter or an iterable of splits that hold each example out once. An example that is the only
    one of its class cannot be held out: it gets probability 1 for its own label. Raises ``ValueError`` for fewer than
    2 classes, for ``cv`` below 2 and for an estimator without ``predict_proba``.

    >>> X = np.r_[np.zeros((6, 1)), np.ones((6, 1))]
    >>> cross_val_probabilities(LogisticRegression(), X, [0] * 6 + [1] * 6, cv=3, random_state=0).argmax(axis=1).tolist()
    [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    """
    if not hasattr(estimator, "predict_proba"):
        raise ValueError(f"estimator is {estimator}, needed is one with predict_proba")
    X, labels = indexable(X, np.asarray(labels))
    classes, y = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"labels hold {len(classes)} class, at least 2 classes are needed")
    if isinstance(cv, (int, np.integer)):
        if cv < 2:
            raise ValueError(f"cv is {cv}, allowed is 2 or more folds")
        splits = _stratified_folds(y, cv, check_random_state(random_state))
    else:
        splits = list(check_cv(cv, y, classifier=True).split(X, y))
    parts = Parallel(n_jobs=n_jobs)(
        delayed(_fit_and_predict)(estimator, X, y, *split, len(classes)) for split in splits
    )
    P = np.eye(len(classes))[y]
    for (_, held_out), part in zip(splits, parts, strict=True):
        P[held_out] = part
    return P


def _delegates(name: str):
    return available_if(lambda self: hasattr(getattr(self, "estimator_", self.estimator or LogisticRegression()), name))


class ConfidentLearning(ClassifierMixin, MetaEstimatorMixin, BaseEstimator):
    """A classifier that finds the wrong labels of its training data, drops them and learns from the rest.

    ``fit`` predicts every example out of sample (``cv`` folds), finds label errors (``filter_by``, ``frac_noise``,
    ``min_examples_per_class`` as in ``find_label_issues``), and fits a clone of ``estimator`` (default: logistic
    regression) on what is left. ``reweight`` gives examples with label k the weight 1 / P(given k | true k), so that
    classes that lost more count as before (Section 3.2). Of each class at least its best example stays.

    After ``fit``: ``label_issues_`` (mask), ``label_quality_`` (self-confidence), ``suggested_labels_``,
    ``pred_probs_``, ``confident_joint_``, ``joint_``, ``noise_matrix_``, ``inverse_noise_matrix_``, ``prior_``,
    ``classes_``, ``estimator_``.

    >>> X, y = np.r_[np.zeros((20, 1)), np.ones((20, 1))], np.repeat([0, 1], 20)
    >>> y[0] = 1
    >>> ConfidentLearning(random_state=0).fit(X, y).label_issues_.nonzero()[0].tolist()
    [0]
    """

    def __init__(
        self,
        estimator=None,
        *,
        cv=5,
        filter_by="prune_by_noise_rate",
        frac_noise=1.0,
        min_examples_per_class=1,
        reweight=False,
        random_state=None,
        n_jobs=None,
    ):
        self.estimator = estimator
        self.cv = cv
        self.filter_by = filter_by
        self.frac_noise = frac_noise
        self.min_examples_per_class = min_examples_per_class
        self.reweight = reweight
        self.random_state = random_state
        self.n_jobs = n_jobs

    def fit(self, X, y, *, pred_probs=None):
        """Finds the label errors of ``y`` and fits on the rest.

        ``pred_probs`` (n, K), columns in sorted order of the classes, takes the place of cross-validation.
        """
        one_of("filter_by", self.filter_by, FILTERS)
        estimator = LogisticRegression() if self.estimator is None else self.estimator
        if self.reweight and not has_fit_parameter(estimator, "sample_weight"):
            raise ValueError(f"reweight is True, but fit of {estimator} takes no sample_weight")
        if y is None:
            raise ValueError("ConfidentLearning requires y to be passed, but the target y is None")
        X, y = indexable(X, y)
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y holds {len(self.classes_)} class, at least 2 classes are needed")
        if pred_probs is None:
            pred_probs = cross_val_probabilities(
                estimator, X, codes, cv=self.cv, random_state=self.random_state, n_jobs=self.n_jobs
            )
        codes, P = labels_and_probabilities(codes, pred_probs)
        if P.shape[1] != len(self.classes_):
            raise ValueError(f"pred_probs has {P.shape[1]} columns, y has {len(self.classes_)} classes")
        self.pred_probs_ = P
        self.label_issues_ = find_label_issues(
            codes,
            P,
            filter_by=self.filter_by,
            frac_noise=self.frac_noise,
            min_examples_per_class=self.min_examples_per_class,
        )
        self.label_quality_ = label_quality_scores(codes, P)
        self.suggested_labels_ = self.classes_[P.argmax(axis=1)]
        self.confident_joint_ = compute_confident_joint(codes, P)
        self.joint_ = estimate_joint(codes, P)
        self.prior_, self.noise_matrix_, self.inverse_noise_matrix_ = estimate_noise(self.confident_joint_, codes)
        keep = ~self.label_issues_
        for k in np.setdiff1d(np.arange(len(self.classes_)), codes[keep]):
            members = np.flatnonzero(codes == k)
            keep[members[self.label_quality_[members].argmax()]] = True
        weights = {}
        if self.reweight:
            weights = {"sample_weight": 1 / np.clip(self.noise_matrix_.diagonal(), SLACK, None)[codes[keep]]}
        rows = np.flatnonzero(keep)
        self.estimator_ = clone(estimator).fit(_safe_indexing(X, rows), y[rows], **weights)
        for attribute in ("n_features_in_", "feature_names_in_"):
            if hasattr(self.estimator_, attribute):
                setattr(self, attribute, getattr(self.estimator_, attribute))
        return self

    def predict(self, X):
        """The class of each example, by the classifier that learned from the cleaned data."""
        check_is_fitted(self)
        return self.estimator_.predict(X)

    def predict_proba(self, X):
        """The probability of each class (columns as ``classes_``)."""
        check_is_fitted(self)
        return self.estimator_.predict_proba(X)

    @_delegates("decision_function")
    def decision_function(self, X):
        """The decision values of the fitted classifier, where it has them."""
        check_is_fitted(self)
        return self.estimator_.decision_function(X)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        of_estimator = get_tags(LogisticRegression() if self.estimator is None else self.estimator)
        tags.input_tags.sparse = of_estimator.input_tags.sparse
        tags.input_tags.allow_nan = of_estimator.input_tags.allow_nan
        return tags
