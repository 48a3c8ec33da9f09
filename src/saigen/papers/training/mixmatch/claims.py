"""Does MixMatch need fewer labels than what came before it, and does each of its parts do its share?

Laptop: scikit-learn's digits, a few labels a class, the other training images without labels, and a small network of the
paper's kind. Real and full: CIFAR-10 and WRN-28-2. All arms of a seed share the split, the first weights, the batches and
their augmentation, Adam with decay on kernels, and the moving average of weights that is evaluated. The baselines are
those of the official code: MixUp with predicted labels for unlabelled images, the Pi-model, and pseudo-labels.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saigen.data import split
from saigen.data.augmentation import shift_and_flip
from saigen.data.semi_supervised import split_labels, with_labelled
from saigen.data.subsets import sample
from saigen.nn.mixing import mix, mixing_weights, soft_labels
from saigen.papers.training.mixmatch import MixMatch, mixmatch_wrn_28_2, statistics_untouched, weight_decay_groups
from saigen.train import EMA, accuracy, fit
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    """One scale. The weights of the unlabelled losses and the rates are the official code's in every arm, tuned in none; the
    lengths of training, the ramp and the averaging at laptop scale come from pilots on other seeds."""

    labels: tuple[int, int]
    """The fewest, and the most: 250 and 4,000 in the paper."""
    unlabelled: int | None
    test: int | None
    steps: int
    batch: int
    lr: float
    weight_decay: float
    lambda_u: float
    rampup: float
    """Of λ_U, as a share of the steps; above 1, training ends on the way up."""
    consistency: float
    """The weight of the Pi-model's loss."""
    ema: float
    net: dict[str, float | int]
    """What the network differs by from WRN-28-2."""
    threshold: float = 0.95
    """From where on a pseudo-label counts."""
    warmup: float = 0.4
    """Of the baselines' unlabelled losses, as a share of the steps."""
    alpha: float = 0.75


_SMALL = {"in_chans": 1, "filters": 16, "repeat": 1, "momentum": 0.1}
SIZES = {
    "tiny": Size((20, 30), 100, 100, 4, 16, 2e-3, 0.02, 75.0, 0.2, 20.0, 0.9, _SMALL | {"filters": 4, "scales": 2}),
    "laptop": Size((20, 50), 1_200, 597, 400, 32, 2e-3, 0.02, 75.0, 0.2, 20.0, 0.99, _SMALL),
    # the paper's images and labels in minutes an arm on one core, with a small network and few of the paper's steps; λ_U
    # rises as in the paper and does not get far: at 75 after a hundred steps all images become one class
    "real": Size(
        (250, 4_000), None, None, 500, 32, 2e-3, 0.02, 75.0, 16_384 / 500, 20.0, 0.99, _SMALL | {"in_chans": 3}
    ),
    # 2^26 images
    "full": Size((250, 4_000), None, None, 2**20, 64, 2e-3, 0.02, 75.0, 2**14 / 2**20, 20.0, 0.999, {}),
}
BASELINES = ("supervised", "mixup", "pi_model", "pseudo_label")


def few_labels_suffice(trial: Trial) -> dict[str, float]:
    """One seed: test accuracy of MixMatch minus the best baseline's, with the fewest and with the most labels."""
    size, values = SIZES[trial.scale], {}
    for name, labels in zip(("fewest", "most"), size.labels, strict=True):
        data = _data(trial, labels)
        arms = {arm: _train(trial, data, arm) for arm in (*BASELINES, "mixmatch")}
        values |= {f"accuracy_{arm}_{name}": value for arm, value in arms.items()}
        values[f"gain_{name}"] = arms["mixmatch"] - max(arms[arm] for arm in BASELINES)
    return values


def every_part_contributes(trial: Trial) -> dict[str, float]:
    """One seed, the fewest labels: what accuracy is lost without sharpening, averaging or MixUp."""
    data = _data(trial, SIZES[trial.scale].labels[0])
    whole = _train(trial, data, "mixmatch")
    without = {
        "sharpening": _train(trial, data, "mixmatch", temperature=1.0),
        "averaging": _train(trial, data, "mixmatch", views=1),
        "mixup": _train(trial, data, "mixmatch", mix_mode="."),
    }
    values = {"accuracy_mixmatch": whole} | {f"accuracy_without_{part}": value for part, value in without.items()}
    return values | {f"loss_without_{part}": whole - value for part, value in without.items()}


class _Objective(nn.Module):
    """A network and the loss of an arm as one, so that a checkpoint keeps the count of steps too."""

    def __init__(self, arm: str, model: nn.Module, size: Size, classes: int, **options: float | str) -> None:
        super().__init__()
        self.arm, self.model, self.size, self.classes = arm, model, size, classes
        settings = {"alpha": size.alpha, "lambda_u": size.lambda_u, "rampup_steps": int(size.rampup * size.steps)}
        self.mixmatch = MixMatch(classes, **(settings | options))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, y: Tensor, views: Tensor) -> Tensor:
        if self.arm == "mixmatch":
            return self.mixmatch(self.model, x, y, views).total
        warmup = (self.step / (self.size.warmup * self.size.steps)).clamp(max=1.0)
        self.step += 1
        if self.arm == "mixup":
            return self._mixup(x, y, views[:, 0])
        loss = F.cross_entropy(self.model(x), y)
        if self.arm == "supervised":
            return loss
        with statistics_untouched(self.model):
            logits = self.model(views[:, 0])
            if self.arm == "pi_model":
                other = self.model(views[:, 1])
                return loss + warmup * self.size.consistency * F.mse_loss(
                    other.softmax(-1), logits.detach().softmax(-1)
                )
        confident = (logits.softmax(-1).amax(-1) > self.size.threshold).float()
        return loss + warmup * (confident * F.cross_entropy(logits, logits.argmax(-1), reduction="none")).mean()

    def _mixup(self, x: Tensor, y: Tensor, u: Tensor) -> Tensor:
        """MixUp within the labelled and within the unlabelled batch, whose labels are the network's predictions."""

        def mixed(x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
            weights = mixing_weights(len(x), self.size.alpha, dominant=True)
            backwards = torch.arange(len(x) - 1, -1, -1, device=x.device)
            return mix(x, weights, x, backwards), mix(p, weights, p, backwards)

        x, p = mixed(x, soft_labels(y, self.classes))
        loss = F.cross_entropy(self.model(x), p)
        with statistics_untouched(self.model):
            with torch.no_grad():
                q = self.model(u).softmax(-1)
            u, q = mixed(u, q)
            return loss + F.cross_entropy(self.model(u), q)


@dataclass(frozen=True)
class Data:
    labelled: tuple[Tensor, Tensor]
    unlabelled: Tensor
    test: tuple[Tensor, Tensor]
    classes: int
    start: nn.Module
    augment: Callable[..., tuple[Tensor, Tensor]]


def _train(trial: Trial, data: Data, arm: str, views: int = 2, **options: float | str) -> float:
    """Test accuracy of the averaged weights after training one arm."""
    size = SIZES[trial.scale]
    objective = _Objective(arm, copy.deepcopy(data.start), size, data.classes, **options).to(trial.device)
    ema = EMA(objective, size.ema)
    name = "-".join([arm, str(len(data.labelled[1])), str(views), *(f"{k}{v}" for k, v in options.items())])
    fit(
        objective, lambda both, x, y, views: both(x, y, views), (data.unlabelled,),
        optimizer=torch.optim.AdamW(weight_decay_groups(objective, size.weight_decay), lr=size.lr), steps=size.steps,
        batch_size=size.batch, seed=trial.seed, transform=with_labelled(*data.labelled, data.augment, views=views), ema=ema,
        device=trial.device, checkpoint=trial.checkpoint(name), on_step=lambda step, total, loss: trial.progress(step + 1, total, name),
    )  # fmt: skip
    return accuracy(ema.model.model, *data.test)


def _data(trial: Trial, labels: int) -> Data:
    """The same test images whatever ``labels``; those that keep their label are not among the unlabelled ones."""
    size = SIZES[trial.scale]
    if trial.scale in ("tiny", "laptop"):
        digits = trial.data("digits")
        parts = split(digits.y, (size.unlabelled, size.test), trial.rng("split"))
        train, test = (digits.subset(part) for part in parts)
    else:
        train, test = (trial.data("images", size=32, part=part) for part in ("train", "test"))
        train, test = (
            sample(part, count, trial.rng("split")) for part, count in ((train, size.unlabelled), (test, size.test))
        )
    kept, rest = split_labels(train.y, labels, trial.rng("labels"))
    with trial.seeded("weights"):
        start = mixmatch_wrn_28_2(num_classes=len(train.classes), **size.net)
    grey = train.x.shape[1] == 1

    def augment(generator: torch.Generator, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        # shift_and_flip would standardise bytes; the paper's images are in [-1, 1].
        return shift_and_flip(generator, _scaled(x), y, mirror=0.0 if grey else 0.5)

    return Data(
        (train.x[kept], train.y[kept]), train.x[rest], (_scaled(test.x), test.y), len(train.classes), start, augment
    )


def _scaled(x: Tensor) -> Tensor:
    """Bytes, or floats in [0, 1], as floats in [-1, 1]."""
    return 2 * (x / 255 if x.dtype == torch.uint8 else x) - 1
