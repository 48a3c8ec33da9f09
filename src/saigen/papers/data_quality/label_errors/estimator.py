"""Label errors in test sets (Northcutt, Athalye, Mueller, NeurIPS 2021): find them, let people judge, see what they change.

The study's three steps, top to bottom. Candidates: as many as confident learning counts, those of the smallest margin
(Section 3.1). People: five a candidate say whether the given label, the suggested one, both or neither is right, and
three must agree (Section 3.2). Ranking: models on the original and on the corrected labels, at every prevalence of
mislabelled examples (Section 5).
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from scipy.stats import binomtest
from sklearn.utils import check_random_state

from saigen.papers.data_quality.confident_learning import label_quality_scores, num_label_issues

ANSWERS = ("given", "guessed", "both", "neither", "neutral", "off-topic")
"""What a person may answer of an example: the columns of a table of votes. The last two stand for texts."""
KINDS = ("correct", "correctable", "multi-label", "neither", "non-agreement")
"""What the answers come to. All but the first are label errors; only ``correctable`` ones get a new label."""
_OUTSIDE = tuple(ANSWERS.index(answer) for answer in ("neither", "neutral", "off-topic"))


# Candidates ---------------------------------------------------------------------------------------------------------


def candidate_errors(labels: ArrayLike, pred_probs: ArrayLike, *, count: int | None = None) -> Int[np.ndarray, " m"]:
    """The examples whose labels a person should look at, worst first (Section 3.1).

    ``labels`` (n,) are class indices, ``pred_probs`` (n, K) out-of-sample probabilities. The candidates are the ``count``
    examples with the smallest margin p(given) - max p(other). By default the count is that of confident learning, the
    off-diagonal sum of the calibrated confident joint, as far as another label than the given one is likelier. Raises ``ValueError`` for a count outside 1 to n, and for what
    confident learning cannot take.

    >>> candidate_errors([0, 0, 1, 1], [[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.1, 0.9]]).tolist()
    [1]
    """
    margin = label_quality_scores(labels, pred_probs, method="normalized_margin")
    if count is None:
        count = num_label_issues(labels, pred_probs, estimation_method="off_diagonal_calibrated")
        count = min(count, np.count_nonzero(margin < 0.5))  # the score is the margin scaled to 0 to 1
    elif not 1 <= count <= len(margin):
        raise ValueError(f"count is {count}, allowed is 1 to the {len(margin)} examples there are")
    return np.argsort(margin, kind="stable")[:count]


# People -------------------------------------------------------------------------------------------------------------


def consensus(votes: ArrayLike, *, least: int | ArrayLike = 3) -> Int[np.ndarray, " m"]:
    """What people's ``votes`` come to, as indices into ``KINDS`` (Section 3.2).

    ``votes`` (m, 4) or (m, 6) counts the answers to each candidate in the order of ``ANSWERS``. A label that ``least``
    people (one number, or one a candidate) confirm is correct, whatever else they say: where "both" could not be
    answered, people gave both answers. Any other label is an error; its kind is what ``least`` people agree on, or
    non-agreement.

    >>> [KINDS[kind] for kind in consensus([[5, 0, 0, 0], [1, 4, 0, 0], [2, 0, 3, 0], [0, 1, 1, 3], [2, 2, 1, 0]])]
    ['correct', 'correctable', 'multi-label', 'neither', 'non-agreement']
    """
    counts = np.asarray(votes)
    if (
        counts.ndim != 2
        or counts.shape[1] not in (4, len(ANSWERS))
        or counts.dtype.kind not in "iu"
        or (counts < 0).any()
    ):
        raise ValueError(
            f"votes has shape {counts.shape} and type {counts.dtype}, needed are counts of 4 or {len(ANSWERS)} answers"
        )
    needed = np.asarray(least)
    if needed.shape not in ((), counts.shape[:1]) or (needed < 1).any():
        raise ValueError(f"least is {least}, allowed is 1 or more, once or for each of {len(counts)} candidates")
    agreed = counts >= needed.reshape(-1, 1)
    neither = agreed[:, [column for column in _OUTSIDE if column < counts.shape[1]]].any(axis=1)
    cases = np.column_stack([agreed[:, 0], agreed[:, 1], agreed[:, 2], neither, np.ones(len(counts), bool)])
    return cases.argmax(axis=1)


def multi_label_error(given: Collection[str], votes: Mapping[str, int], *, least: int = 3) -> bool:
    """Whether a set of labels is wrong: the labels that ``least`` people heard are not exactly those ``given`` (AudioSet).

    >>> multi_label_error({"speech", "crowd"}, {"speech": 5, "crowd": 1, "music": 0})
    True
    """
    if least < 1:
        raise ValueError(f"least is {least}, allowed is 1 or more")
    return {label for label, count in votes.items() if count >= least} != set(given)


def extrapolated_error_rate(errors: int, checked: int, candidates: int, size: int) -> float:
    """The share of label errors in a set of ``size``: the confirmed share of the ``checked`` candidates, for all of them.

    A lower bound (Table 1): errors that are no candidates are not counted. Where all were checked, ``errors / size``.

    >>> round(extrapolated_error_rate(54, 275, 275, 10_000), 4)
    0.0054
    """
    _check_counts(errors, checked, candidates, size)
    return errors / checked * candidates / size


def error_rate_interval(
    errors: int, checked: int, candidates: int, size: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """The Clopper-Pearson interval of ``extrapolated_error_rate``; a point where every candidate was checked.

    >>> low, high = error_rate_interval(732, 1000, 533_249, 9_996_437)
    >>> round(low, 4), round(high, 4)
    (0.0375, 0.0405)
    """
    _check_counts(errors, checked, candidates, size)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, allowed is 0 < confidence < 1")
    if checked == candidates:
        return errors / size, errors / size
    share = binomtest(errors, checked).proportion_ci(confidence, method="exact")
    return float(share.low) * candidates / size, float(share.high) * candidates / size


def _check_counts(errors: int, checked: int, candidates: int, size: int) -> None:
    if checked < 1 or not 0 <= errors <= checked <= candidates <= size:
        raise ValueError(
            f"errors, checked, candidates and size are {errors}, {checked}, {candidates} and {size}, "
            "allowed is 0 <= errors <= checked <= candidates <= size with one checked or more"
        )


# The corrected benchmark --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """A test set with its original and its corrected labels, both (n,) class indices; ``keep`` (n,) marks what counts.

    Examples that belong to several classes, to none, or of which people did not agree, are left out (Section 5).
    """

    original: np.ndarray
    corrected: np.ndarray
    keep: np.ndarray

    def __post_init__(self) -> None:
        shapes = {np.shape(array) for array in (self.original, self.corrected, self.keep)}
        if len(shapes) != 1 or np.ndim(self.original) != 1 or np.asarray(self.keep).dtype != bool:
            raise ValueError(
                f"original, corrected and keep have shapes {[np.shape(a) for a in (self.original, self.corrected, self.keep)]}, "
                "needed are two labels and one truth value an example"
            )

    @property
    def errors(self) -> Bool[np.ndarray, " n"]:
        """The correctable errors: examples that count and whose label was changed."""
        return self.keep & (self.original != self.corrected)

    @property
    def clean(self) -> Bool[np.ndarray, " n"]:
        """The examples that count and whose label stayed."""
        return self.keep & (self.original == self.corrected)

    @property
    def prevalence(self) -> float:
        """The share of correctable errors among the examples that count."""
        return np.count_nonzero(self.errors) / max(1, np.count_nonzero(self.keep))


def correct(labels: ArrayLike, rows: ArrayLike, kinds: ArrayLike, suggested: ArrayLike) -> Benchmark:
    """The benchmark that people's judgement leaves: correctable errors get the suggested label, other errors go.

    ``labels`` (n,); of the judged ones ``rows`` (m,), ``kinds`` (m,) as ``consensus`` gives them, ``suggested`` (m,).
    Raises ``ValueError`` for a row that is not there or stands twice, a kind that is none, and a correctable error whose
    suggested label is the given one.

    >>> benchmark = correct([0, 1, 2, 2], rows=[1, 3], kinds=[1, 4], suggested=[2, 0])
    >>> benchmark.corrected.tolist(), benchmark.keep.tolist()
    ([0, 2, 2, 2], [True, True, True, False])
    """
    y, rows, kinds, suggested = (
        np.array(labels),
        np.asarray(rows, np.intp),
        np.asarray(kinds, np.intp),
        np.asarray(suggested),
    )
    if y.ndim != 1 or not rows.shape == kinds.shape == suggested.shape or rows.ndim != 1:
        raise ValueError(
            f"rows, kinds and suggested have shapes {rows.shape}, {kinds.shape} and {suggested.shape}, needed is one length"
        )
    if rows.size and (rows.min() < 0 or rows.max() >= len(y)):
        wrong = rows[(rows < 0) | (rows >= len(y))][0]
        raise ValueError(f"rows has {wrong}, allowed are 0 to {len(y) - 1}")
    if len(np.unique(rows)) < len(rows):
        values, counts = np.unique(rows, return_counts=True)
        raise ValueError(f"rows has {values[counts > 1][0]} more than once, a row is judged once")
    if kinds.size and (kinds.min() < 0 or kinds.max() >= len(KINDS)):
        raise ValueError(
            f"kinds has {kinds[(kinds < 0) | (kinds >= len(KINDS))][0]}, allowed are 0 to {len(KINDS) - 1}"
        )
    changed = kinds == KINDS.index("correctable")
    if (same := changed & (suggested == y[rows])).any():
        raise ValueError(
            f"suggested for row {rows[same][0]} is the given label {y[rows[same][0]]}, a correction is another one"
        )
    corrected, keep = y.copy(), np.ones(len(y), bool)
    corrected[rows[changed]] = suggested[changed]
    keep[rows[kinds >= KINDS.index("multi-label")]] = False
    return Benchmark(y, corrected, keep)


def noise_prevalence(errors: int, clean: int, dropped: float = 0.0) -> float:
    """N(r) = |E| / (|E| + (1 - r)|clean|): the share of errors once a share r of the correct examples is dropped.

    >>> round(noise_prevalence(1428, 47_084), 4), noise_prevalence(1428, 47_084, 1.0)
    (0.0294, 1.0)
    """
    if errors < 0 or clean < 0 or errors + clean < 1 or not 0 <= dropped <= 1:
        raise ValueError(
            f"errors, clean and dropped are {errors}, {clean} and {dropped}, allowed are counts and a share"
        )
    kept = (1 - dropped) * clean
    return errors / (errors + kept) if errors else 0.0


def thin(
    benchmark: Benchmark, prevalence: float, *, random_state: int | np.random.RandomState | None = None
) -> Benchmark:
    """The benchmark with correctly labelled examples dropped at random until its errors have this ``prevalence``.

    What ``Ranking`` gives exactly in expectation, as one draw. Raises ``ValueError`` below the natural prevalence.
    """
    natural, errors = benchmark.prevalence, np.count_nonzero(benchmark.errors)
    if errors == 0 or not natural <= prevalence <= 1:
        raise ValueError(f"prevalence is {prevalence}, allowed with {errors} correctable errors is {natural:.4g} to 1")
    clean = np.flatnonzero(benchmark.clean)
    left = min(len(clean), round(errors * (1 - prevalence) / prevalence))
    keep = benchmark.errors.copy()
    keep[check_random_state(random_state).permutation(clean)[:left]] = True
    return Benchmark(benchmark.original, benchmark.corrected, keep)


# Ranking ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flip:
    """``overtaken`` is ahead on the original labels; on corrected labels ``overtaking`` is ahead from ``prevalence`` on."""

    overtaken: str
    overtaking: str
    prevalence: float
    rise: float
    """How much higher that is than the natural prevalence; 0 where correcting alone changes the order."""


class Ranking:
    """Models on a benchmark whose labels are partly wrong and partly corrected (Section 5).

    ``predictions`` maps a model's name to its predicted classes (n,). A model is right on a share ``clean`` of the
    correctly labelled examples, and of the correctable errors on a share ``on_original`` by the original and
    ``on_corrected`` by the corrected labels. Dropping correct examples at random until a share N of the examples are
    errors, and correcting a share s of the errors, leaves it in expectation an accuracy of

        A(N, s) = (1 - N) clean + N ((1 - s) on_original + s on_corrected).

    Raises ``ValueError`` where there is no correctable error or no correct example, and for predictions of another length.

    >>> benchmark = Benchmark(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0]), np.ones(4, bool))
    >>> ranking = Ranking({"large": np.array([0, 0, 1, 1]), "small": np.array([0, 1, 1, 0])}, benchmark)
    >>> ranking.accuracy(corrected=0.0).tolist(), ranking.best(corrected=0.0), ranking.best(0.4)
    ([1.0, 0.5], 'large', 'small')
    """

    def __init__(self, predictions: Mapping[str, ArrayLike], benchmark: Benchmark) -> None:
        if not predictions:
            raise ValueError("predictions is empty, needed is one model or more")
        errors, clean = benchmark.errors, benchmark.clean
        if not errors.any() or not clean.any():
            raise ValueError(
                f"benchmark has {np.count_nonzero(errors)} corrected and {np.count_nonzero(clean)} correct labels, "
                "a ranking needs some of both"
            )
        for name, classes in predictions.items():
            if np.shape(classes) != errors.shape:
                raise ValueError(f"predictions of {name!r} have shape {np.shape(classes)}, needed is {errors.shape}")
        predicted = np.stack([np.asarray(classes) for classes in predictions.values()])
        self.benchmark = benchmark
        self.names = tuple(predictions)
        self.clean: Float[np.ndarray, " models"] = (predicted == benchmark.original)[:, clean].mean(axis=1)
        self.on_original: Float[np.ndarray, " models"] = (predicted == benchmark.original)[:, errors].mean(axis=1)
        self.on_corrected: Float[np.ndarray, " models"] = (predicted == benchmark.corrected)[:, errors].mean(axis=1)

    def accuracy(self, prevalence: float | None = None, *, corrected: float = 1.0) -> Float[np.ndarray, " models"]:
        """A(``prevalence``, ``corrected``) of every model; by default at the natural prevalence, all labels corrected."""
        N = self.benchmark.prevalence if prevalence is None else prevalence
        if not 0 <= N <= 1 or not 0 <= corrected <= 1:
            raise ValueError(f"prevalence and corrected are {prevalence} and {corrected}, allowed is 0 to 1")
        of_errors = (1 - corrected) * self.on_original + corrected * self.on_corrected
        return (1 - N) * self.clean + N * of_errors

    def order(self, prevalence: float | None = None, *, corrected: float = 1.0) -> list[str]:
        """The models from best to worst; equals in the order given."""
        accuracy = self.accuracy(prevalence, corrected=corrected)
        return [self.names[i] for i in np.argsort(-accuracy, kind="stable")]

    def best(self, prevalence: float | None = None, *, corrected: float = 1.0) -> str:
        """The model one would choose."""
        return self.order(prevalence, corrected=corrected)[0]

    def flips(self) -> list[Flip]:
        """The pairs whose order on the original labels turns on corrected ones as errors grow more prevalent, soonest first."""
        return sorted(self._flips(), key=lambda flip: flip.prevalence)

    def _flips(self) -> Iterator[Flip]:
        natural, before = self.benchmark.prevalence, self.accuracy(corrected=0.0)
        for a in range(len(self.names)):
            for b in np.flatnonzero(before < before[a]):
                at = self.overtaken_at(self.names[a], self.names[b])
                if at is not None:
                    yield Flip(self.names[a], self.names[b], at, at - natural)

    def overtaken_at(self, ahead: str, behind: str) -> float | None:
        """The prevalence, natural or more, above which ``behind`` beats ``ahead`` on corrected labels; None where never."""
        for name in (ahead, behind):
            if name not in self.names:
                raise ValueError(f"there is no model {name!r}, the models are {', '.join(self.names)}")
        a, b = self.names.index(ahead), self.names.index(behind)
        lead = self.clean[a] - self.clean[b]
        loss = self.on_corrected[b] - self.on_corrected[a]
        natural = self.benchmark.prevalence
        if (1 - natural) * lead < natural * loss:  # correcting the labels is enough
            return natural
        return float(lead / (lead + loss)) if loss > 0 else None
