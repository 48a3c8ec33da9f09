"""Does the affinity loss help where classes are imbalanced, does it give every class equal room, does it bear wrong labels?

Tiny and laptop: the embedded digits and a small perceptron. Real: the user's photographs (CIFAR-10) and a ResNet-32. Full:
the user's MNIST, digits 0-4 cut to a tenth, as in the paper's figure. All arms share backbone, start and batches, end in
batch-normalised features, and choose among equally many settings by validation images that are not trained or tested on:
the softmax arms among learning rates and weight decays, the affinity arms among learning rates and sigmas.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.nn import functional as F

from saigen.data.augmentation import shift_and_flip, standardised
from saigen.data.imbalance import ImbalancedSets, balanced_parts, class_counts, imbalanced_indices, step_counts
from saigen.nn.cifar_resnet import CifarResNet
from saigen.papers.losses.affinity import AffinityHead, AffinityLoss
from saigen.train import accuracy, cosine, predict
from saigen.train.selection import fit_best
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    largest: int
    """Training images of a frequent class."""
    factor: int
    """A frequent class over a rare one; half of the classes are rare."""
    validation: int
    test: int
    """Images of every class; at real and full both are taken from the test images."""
    rates: tuple[float, ...]
    decays: tuple[float, ...]
    widths: tuple[float, ...]
    """sigma in units of the features' dimension, which is the squared length of batch-normalised features."""
    batch: int
    steps: int | None = None
    epochs: int | None = None
    mirror: float = 0.5


SIZES = {
    "tiny": Size(20, 5, 3, 5, (3e-3,), (0.01,), (2.0,), 20, steps=4),
    "laptop": Size(120, 20, 19, 35, (1e-3, 3e-3, 1e-2), (0.01, 0.1), (2.0, 8.0), 64, steps=300),
    "real": Size(5_000, 50, 200, 800, (1e-3,), (0.01, 0.1), (2.0, 8.0), 128, epochs=20),
    "full": Size(5_400, 10, 100, 700, (1e-3, 3e-3), (0.01, 0.1), (2.0, 8.0), 128, epochs=100, mirror=0.0),
}
MARGIN = 0.75
CORRUPTED = 0.4
"""Share of the training and validation labels that are replaced by another class, where the claim is about wrong labels."""


def gains_where_classes_are_imbalanced(trial: Trial) -> dict[str, float]:
    """One seed: macro F1 on a balanced test set with softmax, weighted softmax, and affinity with 1 and 5 centres a class."""
    sets, values = _sets(trial), {}
    for arm in ("softmax", "weighted", "affinity", "affinity_5"):
        model, chosen = _train(trial, sets, arm, _macro_f1)
        values |= {f"{arm}_{name}": value for name, value in chosen.items()}
        values[f"{arm}_f1"], values[f"{arm}_rare_recall"] = _macro_f1(model, *sets.test), _rare_recall(model, sets)
    return values | {"f1_gain": values["affinity_f1"] - values["softmax_f1"]}


def gives_every_class_equal_room(trial: Trial) -> dict[str, float]:
    """One seed: how unequal the distances between classes are, and how unlike the spread of rare and frequent classes.

    The distances are those between the centres, and between the rows of the softmax's last layer, which stand in their
    place. A class's spread is the root mean square distance of its test features from their mean.
    """
    sets, values = _sets(trial), {}
    rare = torch.from_numpy(np.flatnonzero(sets.counts < sets.counts.max()))
    for arm in ("softmax", "affinity"):
        model, chosen = _train(trial, sets, arm, _macro_f1)
        values |= {f"{arm}_{name}": value for name, value in chosen.items()}
        places = model.head.centers.flatten(0, 1) if arm == "affinity" else model.head.weight
        distance = torch.pdist(places.detach().double())
        values[f"{arm}_unequal_distances"] = (distance.std(correction=0) / distance.mean()).item()
        features, y = predict(model.backbone, sets.test[0]), sets.test[1]
        spread = torch.stack([features[y == c].var(0, correction=0).sum().sqrt() for c in range(len(sets.counts))])
        is_rare = torch.isin(torch.arange(len(spread)), rare)
        ratio = spread[is_rare].mean() / spread[~is_rare].mean()
        values[f"{arm}_rare_over_frequent_spread"], values[f"{arm}_unequal_spread"] = ratio.item(), abs(math.log(ratio))
    return values | {
        "distances_evened": values["softmax_unequal_distances"] / max(values["affinity_unequal_distances"], 1e-6),
        "spreads_evened": values["softmax_unequal_spread"] - values["affinity_unequal_spread"],
    }


def bears_corrupted_labels(trial: Trial) -> dict[str, float]:
    """One seed: test accuracy after training on balanced classes, a share of whose labels is wrong."""
    sets, values = _sets(trial, balanced=True), {}
    for part in (sets.train, sets.validation):
        wrong = trial.rng(f"labels of {len(part[1])} images")
        off = torch.from_numpy(wrong.integers(1, len(sets.counts), len(part[1])))
        hit = torch.from_numpy(wrong.random(len(part[1])) < CORRUPTED)
        part[1].copy_(torch.where(hit, (part[1] + off) % len(sets.counts), part[1]))
    for arm in ("softmax", "affinity"):
        model, chosen = _train(trial, sets, arm, accuracy)
        values |= {f"{arm}_{name}": value for name, value in chosen.items()}
        values[f"{arm}_accuracy"] = accuracy(model, *sets.test)
    return values | {"accuracy_gain": values["affinity_accuracy"] - values["softmax_accuracy"]}


def _sets(trial: Trial, *, balanced: bool = False) -> ImbalancedSets:
    size, rng = SIZES[trial.scale], trial.rng("split")
    if trial.scale in ("tiny", "laptop"):
        images = trial.data("digits")
        x, y, classes = images.x[:, 0].flatten(1) * 2 - 0.6, images.y, len(images.classes)
        validation, tested, pool = balanced_parts(y, classes, (size.validation, size.test, size.largest), rng)
        x_test, y_test = x, y
    else:
        train, test = (trial.data("images", size=32, part=part) for part in ("train", "test"))
        x, y, x_test, y_test, classes = train.x, train.y, standardised(test.x), test.y, len(train.classes)
        validation, tested = balanced_parts(y_test, classes, (size.validation, size.test), rng)
        pool = np.arange(len(y))
    largest = min(size.largest, int(class_counts(y[pool], classes).min()))
    # The rare classes are drawn anew for every seed; in the paper's MNIST they are 0 to 4.
    counts = step_counts(classes, largest, 1 if balanced else size.factor)
    counts = counts[::-1] if trial.scale == "full" else rng.permutation(counts)
    part = pool[imbalanced_indices(y[pool], counts, rng)]
    return ImbalancedSets(
        (x[part], y[part]), (x_test[validation], y_test[validation]), (x_test[tested], y_test[tested]), counts
    )


class _Classifier(nn.Module):
    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def _train(
    trial: Trial, sets: ImbalancedSets, arm: str, score: Callable[[nn.Module, Tensor, Tensor], float]
) -> tuple[nn.Module, dict[str, float]]:
    """The model of the arm's best settings on the validation set, and those settings."""
    size, photographs, classes = SIZES[trial.scale], trial.scale in ("real", "full"), len(sets.counts)
    with trial.seeded("backbone"):
        if photographs:
            net = CifarResNet(32, num_classes=0, in_chans=sets.train[0].shape[1])
            backbone, width = nn.Sequential(net, nn.BatchNorm1d(net.num_features)), net.num_features
        else:
            width = 64
            layers = (nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, width), nn.BatchNorm1d(width))
            backbone = nn.Sequential(*layers)
    affine, best = arm.startswith("affinity"), None
    weight = torch.tensor(len(sets.train[1]) / classes / sets.counts, dtype=torch.float32, device=trial.device)
    criterion = AffinityLoss(MARGIN)

    def loss(model: _Classifier, x: Tensor, y: Tensor) -> Tensor:
        if affine:
            return criterion(model(x), y, model.head.centers)
        return F.cross_entropy(model(x), y, weight if arm == "weighted" else None)

    for setting in size.widths if affine else size.decays:
        with trial.seeded("head"):
            centers = 5 if arm == "affinity_5" else 1
            head = AffinityHead(width, classes, centers, sigma=setting * width) if affine else nn.Linear(width, classes)
        decay = size.decays[0] if affine else setting
        found = fit_best(
            _Classifier(copy.deepcopy(backbone), head),
            loss,
            sets.train,
            rates=size.rates,
            optimizer=lambda parameters, rate, decay=decay: torch.optim.AdamW(parameters, rate, weight_decay=decay),
            held_out=sets.validation,
            score=score,
            steps=size.steps,
            epochs=size.epochs,
            batch_size=size.batch,
            seed=trial.seed,
            schedule=cosine(warmup=20),
            transform=(lambda g, x, y: shift_and_flip(g, x, y, mirror=size.mirror)) if photographs else None,
            checkpoint=lambda rate, setting=setting: trial.checkpoint(f"{arm}_{setting:g}_{rate:g}"),
            device=trial.device,
            on_step=lambda step, total, _: trial.progress(step + 1, total, arm),
        )
        reached = score(found.model, *sets.validation)
        if best is None or reached > best[0]:
            best = reached, found, setting
    _, found, setting = best
    return found.model, {"sigma" if affine else "decay": setting * width if affine else setting, "rate": found.rate}


def _macro_f1(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float(f1_score(y.numpy(), predict(model, x).argmax(-1).numpy(), average="macro", zero_division=0))


def _rare_recall(model: nn.Module, sets: ImbalancedSets) -> float:
    rare = torch.isin(sets.test[1], torch.from_numpy(np.flatnonzero(sets.counts < sets.counts.max())))
    return accuracy(model, sets.test[0][rare], sets.test[1][rare])
