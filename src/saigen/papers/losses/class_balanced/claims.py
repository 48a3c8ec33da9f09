"""Does re-weighting by the effective number help where classes are imbalanced, and does it beat the inverse frequency?

Tiny and laptop: digits whose samples overlap. Each class has a hundred handwritten digits to train on; its samples are
drawn from these with replacement, each with noise of its own. So a class of 400 samples is worth less than 400, which is
what the effective number is about, and all imbalance factors of the paper fit. Which digit is frequent is drawn anew for
every seed. Real and full: the user's images (CIFAR-10 for the paper's sets) with the paper's ResNet-32.

Validation and test are balanced, as the paper's test sets are, and of other handwriting than the training set. Every arm
chooses its learning rate by the validation set; with one rate there is nothing to choose.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from saigen.data.augmentation import shift_and_flip, standardised
from saigen.data.imbalance import ImbalancedSets, balanced_parts, class_counts, imbalanced_indices, long_tailed_counts
from saigen.papers.losses.class_balanced import (
    class_balanced_loss,
    class_balanced_resnet32,
    class_balanced_weights,
    decay_groups,
    init_class_prior,
)
from saigen.train import accuracy, cosine
from saigen.train import steps as stepped
from saigen.train.selection import fit_best
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    largest: int
    """Samples of the most frequent class."""
    validation: int
    test: int
    """Images of every class; at real and full both are taken from the test images."""
    rates: tuple[float, ...]
    batch: int
    betas: tuple[float, ...]
    """Below 1, which is the inverse frequency: validation chooses."""
    steps: int | None = None
    epochs: int | None = None


FACTORS = (10, 20, 50, 100, 200)
SIZES = {
    "tiny": Size(40, 2, 4, (3e-3,), 20, (0.9, 0.99), steps=5),
    "laptop": Size(400, 20, 50, (1e-3, 3e-3, 1e-2), 64, (0.9, 0.97, 0.99, 0.997), steps=400),
    "real": Size(5_000, 200, 800, (0.1,), 128, (0.9, 0.99, 0.999, 0.9999), epochs=30),
    "full": Size(5_000, 200, 800, (0.1,), 128, (0.9, 0.99, 0.999, 0.9999), epochs=200),
}
BASES, VIEWS, NOISE = 100, 4, 0.25
GAMMA = 1.0
"""Of the focal loss, as in the runs that the repository prints."""


def every_loss_gains(trial: Trial) -> dict[str, float]:
    """One seed, imbalance 50: balanced accuracy with softmax, sigmoid and focal loss, plain and class-balanced."""
    values = {}
    sets = _sets(trial, 50)
    for kind in ("softmax", "sigmoid", "focal"):
        for arm, beta in (("plain", 0.0), ("balanced", _beta(trial))):
            values |= {f"{kind}_{arm}_{name}": value for name, value in _train(trial, sets, kind, beta).items()}
        values[f"{kind}_gain"] = values[f"{kind}_balanced_accuracy"] - values[f"{kind}_plain_accuracy"]
    return values


def every_imbalance_gains(trial: Trial) -> dict[str, float]:
    """One seed: what the class-balanced softmax loss gains in balanced accuracy at each imbalance factor of the paper."""
    values = {}
    for factor in FACTORS:
        sets = _sets(trial, factor)
        for arm, beta in (("plain", 0.0), ("balanced", _beta(trial))):
            values |= {f"{arm}_{name}_{factor}": value for name, value in _train(trial, sets, "softmax", beta).items()}
        values[f"gain_{factor}"] = values[f"balanced_accuracy_{factor}"] - values[f"plain_accuracy_{factor}"]
    return values


def beats_inverse_frequency(trial: Trial) -> dict[str, float]:
    """One seed, imbalance 200: beta by the validation set against inverse class frequency, softmax loss."""
    values, validated = {}, {}
    sets = _sets(trial, 200)
    for beta in (0.0, *SIZES[trial.scale].betas, 1.0):
        found = _train(trial, sets, "softmax", beta)
        validated[beta] = found["validation"]
        values |= {f"{name}_at_{beta:g}": value for name, value in found.items()}
    best = max(SIZES[trial.scale].betas, key=validated.__getitem__)
    return values | {
        "beta": best,
        "gain_over_inverse": values[f"accuracy_at_{best:g}"] - values["accuracy_at_1"],
        "head_gain_over_inverse": values[f"head_at_{best:g}"] - values["head_at_1"],
    }


def _beta(trial: Trial) -> float:
    """0.9999 at 5,000 samples of the largest class, as in the paper's runs: twice as many prototypes as such samples."""
    return 1.0 - 1.0 / (2 * SIZES[trial.scale].largest)


def _sets(trial: Trial, factor: int) -> ImbalancedSets:
    (x, y), validation, test = _digits(trial) if trial.scale in ("tiny", "laptop") else _images(trial)
    classes = int(y.max()) + 1
    largest = min(SIZES[trial.scale].largest, int(class_counts(y, classes).min()))
    counts = long_tailed_counts(classes, largest, min(factor, largest))
    # Which class is frequent is drawn anew for every seed; the paper takes the classes of CIFAR in their own order.
    counts = counts if trial.scale == "full" else trial.rng("frequent classes").permutation(counts)
    part = imbalanced_indices(y, counts, trial.rng("long tail"))
    return ImbalancedSets((x[part], y[part]), validation, test, counts)


def _digits(trial: Trial) -> list[tuple[Tensor, Tensor]]:
    """As many overlapping samples of each digit as the largest class may have; validation and test of other handwriting."""
    images, size, rng = trial.data("digits"), SIZES[trial.scale], trial.rng("handwriting")
    members = [rng.permutation(np.flatnonzero(images.y.numpy() == c)) for c in range(10)]
    held_out = (BASES, BASES + size.validation, BASES + size.validation + size.test)
    parts = {
        "training": [rng.choice(of_class[:BASES], size.largest) for of_class in members],
        "validation": [np.repeat(of_class[held_out[0] : held_out[1]], VIEWS) for of_class in members],
        "test": [np.repeat(of_class[held_out[1] : held_out[2]], VIEWS) for of_class in members],
    }
    sets = []
    for name, drawn in parts.items():
        x, y = images.x[np.concatenate(drawn)], images.y[np.concatenate(drawn)]
        noise = torch.randn(x.shape, generator=trial.generator(f"noise of the {name} images"))
        sets.append((2 * x - 0.6 + 2 * NOISE * noise, y))
    return sets


def _images(trial: Trial) -> list[tuple[Tensor, Tensor]]:
    """The user's images; validation and test are balanced parts of their test images."""
    train, test = (trial.data("images", size=32, part=part) for part in ("train", "test"))
    size = SIZES[trial.scale]
    parts = balanced_parts(test.y, len(train.classes), (size.validation, size.test), trial.rng("test"))
    return [(train.x, train.y), *((standardised(test.x[part]), test.y[part]) for part in parts)]


def _network(trial: Trial, sets: ImbalancedSets, kind: str) -> nn.Module:
    """The network, its last layer as the loss wants it at the start."""
    classes, shape = len(sets.counts), sets.train[0].shape[1:]
    with trial.seeded("weights"):
        if trial.scale in ("real", "full"):
            return class_balanced_resnet32(num_classes=classes, in_chans=shape[0], kind=kind)
        model = nn.Sequential(nn.Flatten(), nn.Linear(shape.numel(), 128), nn.ReLU(), nn.Linear(128, classes))
    if kind != "softmax":
        init_class_prior(model[-1])
    return model


def _train(trial: Trial, sets: ImbalancedSets, kind: str, beta: float) -> dict[str, float]:
    """Accuracy on the balanced test set, of its most and its least frequent third, and on the validation set."""
    size, photographs = SIZES[trial.scale], trial.scale in ("real", "full")
    weight = class_balanced_weights(sets.counts, beta).to(trial.device)
    per_epoch = len(sets.train[1]) // size.batch

    def optimizer(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        if not photographs:
            return torch.optim.AdamW(parameters, rate)
        every = list(parameters)  # the last of them is the bias of the last layer
        groups = (
            [{"params": every, "weight_decay": 2e-4}] if kind == "softmax" else decay_groups(every, every[-1], 2e-4)
        )
        return torch.optim.SGD(groups, rate, momentum=0.9)

    best = fit_best(
        _network(trial, sets, kind),
        lambda model, x, y: class_balanced_loss(model(x), y, weight, kind=kind, gamma=GAMMA),
        sets.train,
        rates=size.rates,
        optimizer=optimizer,
        held_out=sets.validation,
        steps=size.steps,
        epochs=size.epochs,
        batch_size=size.batch,
        seed=trial.seed,
        schedule=stepped((0.8, 0.9), gamma=0.01, warmup=5 * per_epoch) if photographs else cosine(warmup=20),
        transform=shift_and_flip if photographs else None,
        checkpoint=lambda rate: trial.checkpoint(f"{kind}_{beta:g}_{sets.counts.max() // sets.counts.min()}_{rate:g}"),
        device=trial.device,
        on_step=lambda step, total, _: trial.progress(step + 1, total, f"{kind}, beta {beta:g}"),
    )
    x, y = sets.test
    order, third = np.argsort(-sets.counts, kind="stable"), len(sets.counts) // 3
    head, tail = (torch.isin(y, torch.from_numpy(part)) for part in (order[:third], order[-third:]))
    return {
        "accuracy": accuracy(best.model, x, y),
        "head": accuracy(best.model, x[head], y[head]),
        "tail": accuracy(best.model, x[tail], y[tail]),
        "validation": accuracy(best.model, *sets.validation),
        "rate": best.rate,
    }
