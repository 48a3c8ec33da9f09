"""The paper's claims, measured: the noise joint, the precision of finding errors, learning from what is left.

The setting is the paper's (Section 5): class-conditional noise flips 40 % of the training labels, a classifier gives
out-of-sample probabilities by cross-validation on the noisy labels, and the true labels serve only for scoring.
``finds_what_people_confirmed`` takes the public study of label errors instead, whose truth is five people a label.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from saigen.data import fingerprint, split
from saigen.papers.data_quality.confident_learning import (
    calibrate_confident_joint,
    cross_val_probabilities,
    estimate_joint,
    find_label_issues,
    flip_labels,
    generate_noise_matrix,
    label_quality_scores,
)
from saigen.train import cosine, fit, predict
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    """How big an experiment is."""

    train: int  # examples with noisy labels
    test: int  # examples with true labels
    folds: int
    epochs: int = 0  # of the network, where the data are the user's images
    noise: float = 0.4
    sparsity: float = 0.0
    draws: int = 1  # of noise, in the claims on accuracy
    grid: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)  # inverse regularisation of the logistic regression


SIZES = {
    "tiny": Size(train=300, test=200, folds=3, grid=(0.1,)),
    "laptop": Size(train=1200, test=597, folds=5, draws=4),
    "real": Size(train=10_000, test=5_000, folds=4, epochs=15),
}


class Network(nn.Module):
    """A small convolutional network for the user's images, 32 pixels a side."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        stages, width = [], channels
        for wider in (32, 64, 128):
            stages += [nn.Conv2d(width, wider, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]
            stages += [nn.Conv2d(wider, wider, 3, padding=1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]
            width = wider
        self.features = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


Learn = Callable[[np.ndarray, np.ndarray, str], Callable[[np.ndarray], np.ndarray]]
"""From examples, labels and a name for the draws to a function that gives class probabilities."""


@dataclass(frozen=True)
class Study:
    """One draw of the paper's setting."""

    x: np.ndarray
    given: np.ndarray
    true: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int
    learn: Learn
    P: np.ndarray  # out-of-sample probabilities of the noisy labels

    @property
    def errors(self) -> np.ndarray:
        """Which given labels are wrong."""
        return self.given != self.true

    def accuracy(self, keep: np.ndarray, arm: str) -> float:
        """Test accuracy of the learner on the examples of the mask ``keep``."""
        probabilities = self.learn(self.x[keep], self.given[keep], arm)
        return float((probabilities(self.x_test).argmax(axis=1) == self.y_test).mean())


def _study(trial: Trial, noise: float | None = None, draw: int = 0) -> Study:
    size = SIZES[trial.scale]
    if trial.scale in ("tiny", "laptop"):
        images = trial.data("digits")
        chosen, held_out = split(images.y, (size.train, size.test), trial.rng("split"))
        x, y = images.x.flatten(1).numpy().astype(np.float64), images.y.numpy()
        x_train, y_train, x_test, y_test = x[chosen], y[chosen], x[held_out], y[held_out]
        learn = _tuned_logistic_regression(trial, size)
    else:
        train, test = trial.data("images", size=32, part="train"), trial.data("images", size=32, part="test")
        images = train
        chosen = _at_most(train.y, size.train, trial.rng("train part"))
        held_out = _at_most(test.y, size.test, trial.rng("test part"))
        x_train, y_train = train.x[chosen].numpy(), train.y[chosen].numpy()
        x_test, y_test = test.x[held_out].numpy(), test.y[held_out].numpy()
        learn = _network(trial, size, len(images.classes), images.x.shape[1])
    K = len(images.classes)
    noise_matrix = generate_noise_matrix(
        K,
        size.noise if noise is None else noise,
        sparsity=size.sparsity,
        random_state=_state(trial, f"noise matrix {draw}"),
    )
    given = flip_labels(y_train, noise_matrix, random_state=_state(trial, f"noisy labels {draw}"))
    P = _out_of_sample(x_train, given, learn, size.folds, K, trial.rng(f"folds {draw}"), draw)
    return Study(x_train, given, y_train, x_test, y_test, K, learn, P)


def _state(trial: Trial, purpose: str) -> np.random.RandomState:
    return np.random.RandomState(int(trial.rng(purpose).integers(2**31)))


def _at_most(y: torch.Tensor, count: int, rng: np.random.Generator) -> np.ndarray:
    return split(y, (min(count, len(y)),), rng)[0]


def _folds(given: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    fold = np.empty(len(given), np.intp)
    for k in np.unique(given):
        members = rng.permutation(np.flatnonzero(given == k))
        fold[members] = (np.arange(len(members)) + k) % folds
    return fold


def _out_of_sample(
    x: np.ndarray, given: np.ndarray, learn: Learn, folds: int, K: int, rng: np.random.Generator, draw: int
) -> np.ndarray:
    fold, P = _folds(given, folds, rng), np.zeros((len(x), K))
    for f in range(folds):
        P[fold == f] = learn(x[fold != f], given[fold != f], f"fold {f} {draw}")(x[fold == f])
    return P


def _tuned_logistic_regression(trial: Trial, size: Size) -> Learn:
    # Both arms and every fold choose their regularisation by cross-validation on their own noisy labels: strong
    # regularisation is the classic cure for label noise, so an untuned baseline would be a weak one.
    def learn(x: np.ndarray, y: np.ndarray, arm: str) -> Callable[[np.ndarray], np.ndarray]:
        def score(C: float) -> float:
            P = cross_val_probabilities(
                LogisticRegression(C=C, max_iter=300), x, y, cv=3, random_state=_state(trial, "tune")
            )
            return float((np.unique(y)[P.argmax(axis=1)] == y).mean())

        best = max(size.grid, key=score) if len(size.grid) > 1 else size.grid[0]
        model = LogisticRegression(C=best, max_iter=300).fit(x, y)

        def probabilities(x: np.ndarray) -> np.ndarray:
            P = np.zeros((len(x), 10))
            P[:, model.classes_] = model.predict_proba(x)
            return P

        return probabilities

    return learn


def _network(trial: Trial, size: Size, classes: int, channels: int) -> Learn:
    def learn(x: np.ndarray, y: np.ndarray, arm: str) -> Callable[[np.ndarray], np.ndarray]:
        with trial.seeded("weights"):
            model = Network(channels, classes)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)

        def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(model(x.float() / 255), y)

        def augment(generator: torch.Generator, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            mirrored = torch.rand(len(x), 1, 1, 1, generator=generator).to(x.device) < 0.5
            return torch.where(mirrored, x.flip(-1), x), y

        fit(
            model,
            loss,
            (torch.from_numpy(x), torch.from_numpy(y).long()),
            optimizer=optimizer,
            epochs=size.epochs,
            batch_size=128,
            seed=trial.seed,
            schedule=cosine(warmup=50),
            transform=augment,
            device=trial.device,
            checkpoint=trial.checkpoint(arm.replace(" ", "_")),
        )

        def probabilities(x: np.ndarray) -> np.ndarray:
            logits = torch.cat([predict(model, part.float() / 255) for part in torch.from_numpy(x).split(1000)])
            return logits.double().softmax(dim=1).cpu().numpy()

        return probabilities

    return learn


def joint_is_closer_than_confusion(trial: Trial) -> dict[str, float]:
    """One seed: root mean squared error of the joint, counted with thresholds and counted by argmax."""
    study = _study(trial)
    K = study.classes
    true_joint = np.bincount(study.given * K + study.true, minlength=K * K).reshape(K, K) / len(study.true)
    confusion = np.bincount(study.given * K + study.P.argmax(axis=1), minlength=K * K).reshape(K, K)
    # The baseline gets the same calibration to the counts of the given labels as the method.
    confusion = calibrate_confident_joint(confusion, study.given) / len(study.given)
    rmse = float(np.sqrt(((estimate_joint(study.given, study.P) - true_joint) ** 2).mean()))
    rmse_confusion = float(np.sqrt(((confusion - true_joint) ** 2).mean()))
    return {"rmse_ratio": rmse / rmse_confusion, "rmse": rmse, "rmse_confusion": rmse_confusion}


def _found(flagged: np.ndarray, errors: np.ndarray) -> tuple[float, float]:
    right = np.count_nonzero(flagged & errors)
    return float(right / max(1, np.count_nonzero(flagged))), float(right / max(1, np.count_nonzero(errors)))


def errors_are_found_more_precisely(trial: Trial) -> dict[str, float]:
    """One seed: precision and recall of each pruning method, and of disagreement with the argmax."""
    study, values = _study(trial), {}
    for method in ("prune_by_noise_rate", "prune_by_class", "both", "confident_learning", "predicted_neq_given"):
        precision, recall = _found(find_label_issues(study.given, study.P, filter_by=method), study.errors)
        values |= {f"precision_{method}": precision, f"recall_{method}": recall}
        values[f"f1_{method}"] = 2 * precision * recall / max(precision + recall, 1e-12)
    gap = values["precision_prune_by_noise_rate"] - values["precision_predicted_neq_given"]
    return {"precision_gap": gap, **values}


def _accuracies(trial: Trial) -> dict[str, float]:
    """Test accuracies of the same learner, averaged over the draws of noise: a single draw leaves much to chance."""
    size, per_draw = SIZES[trial.scale], []
    for draw in range(size.draws):
        study = _study(trial, draw=draw)
        keep = {
            "all": np.ones(len(study.given), bool),
            "argmax_pruned": ~find_label_issues(study.given, study.P, filter_by="predicted_neq_given"),
            "pruned": ~find_label_issues(study.given, study.P),
        }
        per_draw.append({f"accuracy_{arm}": study.accuracy(kept, f"{arm} {draw}") for arm, kept in keep.items()})
        trial.progress(draw + 1, size.draws)
    return {arm: float(np.mean([values[arm] for values in per_draw])) for arm in per_draw[0]}


def learning_on_what_is_left(trial: Trial) -> dict[str, float]:
    """One seed: test accuracy after training on what pruning by noise rate leaves, over training on all noisy labels."""
    values = _accuracies(trial)
    return {"gain": values["accuracy_pruned"] - values["accuracy_all"], **values}


def thresholds_clean_better_than_argmax(trial: Trial) -> dict[str, float]:
    """One seed: the same, over training on what dropping every disagreement with the argmax leaves."""
    values = _accuracies(trial)
    return {"gain": values["accuracy_pruned"] - values["accuracy_argmax_pruned"], **values}


METHODS = ("prune_by_noise_rate", "prune_by_class", "confident_learning", "both")
STUDIES = ("mnist", "cifar10", "20news")


def finds_what_people_confirmed(trial: Trial) -> dict[str, float]:
    """Share of the confirmed label errors that each method flags.

    At ``real`` the errors are those of the public study of label errors (CIFAR-10, its judged set; MNIST and
    20 Newsgroups beside it): a label that fewer than 3 of 5 people confirmed. Below that scale they are planted in
    10 % of the embedded digits, which shows the same tool at work and is compared with nothing.
    """
    if trial.scale in ("tiny", "laptop"):
        study = _study(trial, noise=0.1)
        return _recalls("", study.given, study.P, study.errors)
    values: dict[str, float] = {}
    for name in STUDIES:
        labels, P, errors = _people(trial, name)
        values |= _recalls("" if name == "cifar10" else f"{name}_", labels, P, errors)
    return values


def _recalls(prefix: str, labels: np.ndarray, P: np.ndarray, errors: np.ndarray) -> dict[str, float]:
    values = {f"{prefix}errors": float(errors.sum())}
    for method in METHODS:
        flagged = find_label_issues(labels, P, filter_by=method)
        values[f"{prefix}recall_{method}"] = _found(flagged, errors)[1]
        values[f"{prefix}found_{method}"] = float(np.count_nonzero(flagged & errors))
        values[f"{prefix}flagged_{method}"] = float(np.count_nonzero(flagged))
    worst = np.argsort(label_quality_scores(labels, P))[: int(values[f"{prefix}flagged_prune_by_noise_rate"])]
    values[f"{prefix}recall_lowest_self_confidence"] = float(errors[worst].sum() / max(1, errors.sum()))
    return values


def _people(trial: Trial, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, probabilities and confirmed errors of one set of the study; errors: under 3 of 5 people said "given"."""
    folder = trial.data_path
    needed = (
        f"a folder with {name}_labels.npy, {name}_pred_probs.npy and {name}_people.json of the study of label errors"
    )
    if folder is None or not Path(folder).is_dir():
        raise ValueError(f"--data is {folder}, this claim needs {needed}")
    try:
        labels = np.load(Path(folder) / f"{name}_labels.npy", allow_pickle=False).astype(np.int64)
        P = np.load(Path(folder) / f"{name}_pred_probs.npy", allow_pickle=False)
        people = json.loads((Path(folder) / f"{name}_people.json").read_text(encoding="utf-8"))
        doubted = [int(entry["id"]) for entry in people if entry["mturk"]["given"] < 3]
    except FileNotFoundError as error:
        raise ValueError(f"--data {folder} has no {Path(error.filename).name}, this claim needs {needed}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--data {folder} cannot be read as the study of label errors ({name}): {error}") from error
    errors = np.zeros(len(labels), bool)
    errors[doubted] = True
    trial.used(f"label_errors/{name}", fingerprint([labels, P, errors]))
    return labels, P, errors
