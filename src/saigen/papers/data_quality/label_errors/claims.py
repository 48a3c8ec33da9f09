"""The study's claims: what people said of the candidates, whether planted rates come out, and small models overtaking.

At ``real`` the study's public data are recounted: probabilities, labels and the answers of five people. Below that the
same study is made on the embedded digits: label errors are planted in the test labels, confident learning suggests
candidates, and five simulated people who are right nine times in ten judge them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier

from saigen.data import fingerprint, split
from saigen.papers.data_quality.confident_learning import (
    cross_val_probabilities,
    find_label_issues,
    flip_labels,
    generate_noise_matrix,
    num_label_issues,
)
from saigen.papers.data_quality.label_errors import (
    KINDS,
    Benchmark,
    Ranking,
    candidate_errors,
    consensus,
    extrapolated_error_rate,
    read_votes,
)
from saigen.trial import Trial

STUDIES = ("cifar10", "mnist", "20news")
METHODS = ("confident_learning", "prune_by_noise_rate", "prune_by_class", "both")
CORRECT, CORRECTABLE = KINDS.index("correct"), KINDS.index("correctable")


@dataclass(frozen=True)
class Size:
    """How big an experiment is."""

    rates: tuple[float, ...] = (0.02, 0.05, 0.1)  # of planted label errors
    examples: int = 1797
    folds: int = 5
    reliability: float = 0.9  # how often a simulated person is right
    remembered: int = 100  # images that the annotator of the ranking knows
    train: int = 900
    held_out: int = 150
    test: int = 647
    repeats: float = 0.8  # how often the annotator makes the mistake it is prone to
    widths: tuple[int, ...] = (8, 32, 256)
    penalties: tuple[float, ...] = (1e-3, 1e-1)
    draws: int = 3
    epochs: int = 200


SIZES = {
    "tiny": Size(
        rates=(0.1,), examples=400, folds=3, train=200, held_out=60, test=200, widths=(4, 32), draws=1, epochs=20
    ),
    "laptop": Size(),
    "real": Size(),
}


# The study: candidates, and what people say of them -----------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """One set of the study."""

    labels: np.ndarray
    P: np.ndarray
    rows: np.ndarray  # the candidates that people judged
    kinds: np.ndarray  # what their answers come to
    truth: np.ndarray | None = None

    @property
    def errors(self) -> np.ndarray:
        """The confirmed label errors, as a mask over the set."""
        errors = np.zeros(len(self.labels), bool)
        errors[self.rows[self.kinds != CORRECT]] = True
        return errors

    def counts(self, prefix: str) -> dict[str, float]:
        """The set's line of Table 1, and what each method finds of its errors."""
        found = dict(zip(KINDS, np.bincount(self.kinds, minlength=len(KINDS)), strict=True))
        values = {"candidates": len(self.rows), "errors": int(self.errors.sum()), **found}
        for method in METHODS:
            flagged = find_label_issues(self.labels, self.P, filter_by=method)
            values |= {f"flagged_{method}": flagged.sum(), f"found_{method}": (flagged & self.errors).sum()}
        values["lowest_margins"] = np.isin(
            self.rows, candidate_errors(self.labels, self.P, count=len(self.rows))
        ).mean()
        return {f"{prefix}{name.replace('-', '_')}": float(value) for name, value in values.items()}


def _public(trial: Trial, name: str) -> Judged:
    """One set of the public study from the user's folder."""
    needed = (
        f"a folder with {name}_labels.npy, {name}_pred_probs.npy and {name}_people.json of the study of label errors"
    )
    folder = trial.data_path
    if folder is None or not Path(folder).is_dir():
        raise ValueError(f"--data is {folder}, this claim needs {needed}")
    try:
        labels, P = (
            np.load(Path(folder) / f"{name}_{part}.npy", allow_pickle=False) for part in ("labels", "pred_probs")
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"--data {folder} cannot be read as the study, this claim needs {needed}: {error}") from error
    labels, votes = labels.astype(np.int64), read_votes(Path(folder) / f"{name}_people.json")
    rows = votes.rows
    if (labels[rows] != np.array(votes.given)).any() or (P[rows].argmax(axis=1) != np.array(votes.guessed)).any():
        raise ValueError(f"--data {folder}: the answers to {name} are not about these labels and probabilities")
    trial.used(f"label_errors/{name}", fingerprint([labels, P, rows, votes.counts]))
    return Judged(labels, P, rows, consensus(votes.counts))


def _planted(trial: Trial, rate: float) -> Judged:
    """The digits with label errors planted at ``rate``, and five simulated people."""
    size, images = SIZES[trial.scale], trial.data("digits")
    (chosen,) = split(images.y, (size.examples,), trial.rng("examples"))
    x, truth = images.x.flatten(1).numpy()[chosen], images.y.numpy()[chosen]
    noise = generate_noise_matrix(10, rate, random_state=_state(trial, f"noise matrix {rate}"))
    labels = flip_labels(truth, noise, random_state=_state(trial, f"noisy labels {rate}"))
    model = LogisticRegression(C=0.1, max_iter=300)
    P = cross_val_probabilities(model, x, labels, cv=size.folds, random_state=_state(trial, f"folds {rate}"))
    rows = candidate_errors(labels, P)
    guessed, rng = P[rows].argmax(axis=1), trial.rng(f"people {rate}")
    right = np.where(labels[rows] == truth[rows], 0, np.where(guessed == truth[rows], 1, 3))
    # A person who errs takes one of the other answers: given, guessed, both or neither.
    answers = (
        right[:, None] + np.where(rng.random((len(rows), 5)) < size.reliability, 0, rng.integers(1, 4, (len(rows), 5)))
    ) % 4
    votes = (answers[:, :, None] == np.arange(4)).sum(axis=1)
    return Judged(labels, P, rows, consensus(votes), truth)


def _state(trial: Trial, purpose: str) -> np.random.RandomState:
    return np.random.RandomState(int(trial.rng(purpose).integers(2**31)))


def the_table_comes_out(trial: Trial) -> dict[str, float]:
    """Table 1 of three public sets recounted (CIFAR-10 without a prefix), and their totals (``all_``).

    Below ``real`` one set with 5 % planted errors, compared with nothing.
    """
    if trial.scale != "real":
        values = _planted(trial, SIZES[trial.scale].rates[-1]).counts("")
        return values | {f"all_{name}": value for name, value in values.items()}
    sets = {name: _public(trial, name).counts("") for name in STUDIES}
    values = dict(sets["cifar10"])
    for name in STUDIES[1:]:
        values |= {f"{name}_{key}": value for key, value in sets[name].items()}
    for key in values.keys() & sets["mnist"].keys():
        each = [counts[key] for counts in sets.values()]
        values[f"all_{key}"] = min(each) if key == "lowest_margins" else sum(each)
    return values


def half_of_the_candidates_are_errors(trial: Trial) -> dict[str, float]:
    """The share of the candidates that people do not confirm, as the mean over the sets."""
    if trial.scale == "real":
        sets = {name: _public(trial, name) for name in STUDIES}
    else:
        sets = {f"planted_{rate:g}": _planted(trial, rate) for rate in SIZES[trial.scale].rates}
    shares = {name: float(judged.errors.sum() / max(1, len(judged.rows))) for name, judged in sets.items()}
    return {"confirmed_share": float(np.mean([*shares.values()])), **shares}


def planted_rates_come_out(trial: Trial) -> dict[str, float]:
    """How far the estimates of the error rate are from the planted rate, on average over several rates."""
    off: dict[str, list[float]] = {"people": [], "count": [], "disagreement": []}
    values: dict[str, float] = {}
    for rate in SIZES[trial.scale].rates:
        judged = _planted(trial, rate)
        n, truth = len(judged.labels), float((judged.labels != judged.truth).mean())
        estimates = {
            "people": extrapolated_error_rate(int(judged.errors.sum()), len(judged.rows), len(judged.rows), n),
            "count": num_label_issues(judged.labels, judged.P, estimation_method="off_diagonal_calibrated") / n,
            # The naive count has the same probabilities.
            "disagreement": float((judged.P.argmax(axis=1) != judged.labels).mean()),
        }
        for name, estimate in estimates.items():
            off[name].append(abs(estimate - truth))
            values[f"{name}_{rate:g}"] = estimate
        values[f"planted_{rate:g}"] = truth
    mean = {f"off_{name}": float(np.mean(each)) for name, each in off.items()}
    return {
        "rate_error": mean["off_people"],
        "over_disagreement": mean["off_count"] / mean["off_disagreement"],
        **mean,
        **values,
    }


# The ranking --------------------------------------------------------------------------------------------------------


def _annotated(trial: Trial, draw: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Digits, true labels, and the labels of an annotator prone to the same mistakes in training and test data.

    The annotator remembers a few images at half the resolution and names what it sees after the likest of them; of its
    mistakes ``repeats`` reach the labels. Noise that ignores the image could be learned by no model, so that it would say
    nothing of how models differ.
    """
    size, images = SIZES[trial.scale], trial.data("digits")
    x, y = images.x.numpy(), images.y.numpy()
    order, rng = trial.rng(f"annotator {draw}").permutation(len(y)), trial.rng(f"mistakes {draw}")
    known, rest = order[: size.remembered], order[size.remembered :]
    seen = x.reshape(len(x), 4, 2, 4, 2).mean(axis=(2, 4)).reshape(len(x), -1)
    named = KNeighborsClassifier(1).fit(seen[known], y[known]).predict(seen[rest])
    given = np.where(rng.random(len(rest)) < size.repeats, named, y[rest])
    return x.reshape(len(x), -1)[rest], y[rest], given


def small_models_overtake(trial: Trial) -> dict[str, float]:
    """One seed: networks of growing width learn from the annotator's labels; ranked on original and corrected labels.

    Every width chooses its penalty on held-out data with the annotator's labels, as it would be chosen in practice. The
    shares are averaged over annotators before the widest and the narrowest are compared.
    """
    size, shares, prevalence = SIZES[trial.scale], [], []
    for draw in range(size.draws):
        x, y, given = _annotated(trial, draw)
        train, held_out, test = split(given, (size.train, size.held_out, size.test), trial.rng(f"split {draw}"))
        predictions = {}
        for width in size.widths:
            models = [
                MLPClassifier(
                    (width,),
                    alpha=penalty,
                    learning_rate_init=3e-3,
                    max_iter=size.epochs,
                    random_state=_state(trial, f"weights {draw}"),
                ).fit(x[train], given[train])
                for penalty in size.penalties
            ]
            best = max(models, key=lambda model: model.score(x[held_out], given[held_out]))
            predictions[str(width)] = best.predict(x[test])
        benchmark = Benchmark(given[test], y[test], np.ones(len(test), bool))
        ranking = Ranking(predictions, benchmark)
        shares.append([ranking.clean, ranking.on_original, ranking.on_corrected])
        prevalence.append(benchmark.prevalence)
        trial.progress(draw + 1, size.draws)
    clean, on_original, on_corrected = np.mean(shares, axis=0)
    natural = float(np.mean(prevalence))
    repeated = on_original - on_corrected
    values = {"repeated": float(repeated[-1] - repeated[0]), "rise": _rise(natural, clean, on_original, on_corrected)}
    for i, width in enumerate(size.widths):
        values |= {
            f"clean_{width}": clean[i],
            f"original_{width}": on_original[i],
            f"corrected_{width}": on_corrected[i],
        }
    return {name: float(value) for name, value in values.items()} | {"prevalence": natural}


def _rise(natural: float, clean: np.ndarray, on_original: np.ndarray, on_corrected: np.ndarray) -> float:
    """By how much errors must grow more prevalent until the narrowest beats the widest on corrected labels.

    As much as there is, 1 - ``natural``, where it never does, and where the widest was not ahead on the original labels.
    """
    lead, loss = clean[-1] - clean[0], on_corrected[0] - on_corrected[-1]
    ahead = (1 - natural) * lead + natural * (on_original[-1] - on_original[0]) > 0
    if not ahead or loss <= 0:
        return 1 - natural
    return max(0.0, float(lead / (lead + loss)) - natural) if lead > 0 else 0.0
