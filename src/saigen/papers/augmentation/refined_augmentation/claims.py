"""Does a clean finish lower the risks, and does it gain accuracy, where as many steps are taken in all?

Laptop: scikit-learn's digits, every image turned by up to 25 degrees and moved by up to 2 of its 8 pixels once and for all,
in training and test data alike (the test images three times, in as many positions), and a small convolutional network.
Real: the user's 32-pixel images (CIFAR) and a ResNet-18; full: 224-pixel images (ImageNet) and a ResNet-50. The standard
augmentation S is random shifts, and flips where the images are not digits; the intensive one is mixup, or RandAugment,
on top of it. All arms of a seed share the split, the first weights, the order of the data and the learning rate.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from saigen.data import split
from saigen.data.augmentation import crop_and_flip, shift_and_flip, standardised
from saigen.data.subsets import sample
from saigen.nn.mixing import Mixup
from saigen.nn.resnet import ResNet
from saigen.papers.augmentation.randaugment import RandAugment, rand_augment_operations
from saigen.papers.augmentation.refined_augmentation import (
    OnImages,
    RefinedAugmentation,
    Risks,
    empirical_risks,
    major_feature_share,
)
from saigen.train import accuracy, cosine, fit, predict
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    """One scale. The rate and ``lr_scale`` come from pilots on other seeds."""

    train: int | None
    """None: all there is."""
    test: int | None
    steps: int
    refine_steps: int
    batch: int
    lr: float
    lr_scale: float
    alpha: float
    """Of mixup."""
    rand_augment: tuple[int, float]
    """N and M, on the increasing scale of 10."""
    pixels: int = 0
    """Of the user's images; 0 for digits."""


SIZES = {
    "tiny": Size(60, 100, 8, 3, 20, 0.05, 0.5, 1.0, (1, 9.0)),
    "laptop": Size(300, None, 600, 90, 50, 0.05, 0.5, 1.0, (1, 9.0)),
    # 200 epochs of 50,000 images in batches of 128, the last 25 of them refining
    "real": Size(None, None, 78_000, 9_750, 128, 0.1, 0.1, 1.0, (2, 9.0), pixels=32),
    # 200 epochs of 1.28 million images in batches of 256, the last 20 of them refining
    "full": Size(None, None, 1_000_000, 100_000, 256, 0.1, 0.1, 0.2, (2, 9.0), pixels=224),
}


@dataclass(frozen=True)
class Arm:
    model: nn.Module
    risks: Risks
    accuracy: float
    major_feature_share: float
    """Of nine directions, as many as ten classes span."""


def clean_finish_lowers_the_risks(trial: Trial) -> dict[str, float]:
    """One seed: risk on clean training data and on test data without refinement over with it, for both augmentations.

    Beside them the arm that is only standard, the one that only restarts the learning rate, and the intensive arm with
    its batch norms' statistics taken anew on clean data: what of the gain is the restart's, and what the statistics'.
    """
    values: dict[str, float] = {}
    for name, arm in _arms(trial, controls=True):
        values |= {f"clean_risk_{name}": arm.risks.clean, f"test_risk_{name}": arm.risks.test}
        values |= {f"augmented_risk_{name}": arm.risks.augmented, f"accuracy_{name}": arm.accuracy}
    for kind in ("mixup", "rand_augment"):
        for risk, quantity in (("clean_risk", "empirical_risk_ratio"), ("test_risk", "expected_risk_ratio")):
            values[f"{kind}_{quantity}"] = values[f"{risk}_{kind}"] / max(values[f"{risk}_{kind}_refined"], 1e-12)
    return values


def clean_finish_gains_accuracy(trial: Trial) -> dict[str, float]:
    """One seed: test accuracy with the last steps refining minus with all of them intensive, for both augmentations."""
    values: dict[str, float] = {}
    for name, arm in _arms(trial, controls=False):
        values[f"accuracy_{name}"] = arm.accuracy
        values[f"major_feature_share_{name}"] = arm.major_feature_share
    for kind in ("mixup", "rand_augment"):
        values[f"{kind}_gain"] = values[f"accuracy_{kind}_refined"] - values[f"accuracy_{kind}"]
        values[f"{kind}_refined_over_standard"] = values[f"accuracy_{kind}_refined"] - values["accuracy_standard"]
    return values


def _arms(trial: Trial, controls: bool) -> Iterator[tuple[str, Arm]]:
    """Every arm takes ``size.steps`` steps; those that refine share the first stage of their kind."""
    size, data = SIZES[trial.scale], _data(trial)
    first = size.steps - size.refine_steps
    mixup = Mixup(size.alpha, data.classes)

    def standard(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return data.standard(generator, x, y)

    def train(model: nn.Module, augment: RefinedAugmentation, steps: int, name: str, second: bool = False) -> nn.Module:
        lr = size.lr * size.lr_scale if second else size.lr
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
        fit(
            model, lambda net, x, y: F.cross_entropy(net(x), y), data.train, optimizer=optimizer, steps=steps,
            batch_size=size.batch, seed=trial.seed + 10_000 * second, schedule=cosine(), device=trial.device, checkpoint=trial.checkpoint(name),
            transform=lambda generator, x, y: augment(x, y, generator=generator),
            on_step=lambda step, total, loss: trial.progress(step + 1, total, name),
        )  # fmt: skip
        return model

    def judged(model: nn.Module) -> Arm:
        risks = empirical_risks(model, data.clean, data.test, mixup, generator=trial.generator("risk under mixup"))
        features = _features(model, data.test[0][:500])
        return Arm(model, risks, accuracy(model, *data.test), major_feature_share(features, min(9, features.shape[1])))

    def start() -> nn.Module:
        with trial.seeded("weights"):
            return data.network()

    operations = tuple(name for name in rand_augment_operations("paper") if data.colour or name != "Color")
    rand_augment = RandAugment(
        *size.rand_augment,
        op_set=operations,
        schedule="increasing",
        translate=0.25,
        relative=True,
        fill=128.0 if data.colour else 0.0,
    )
    nothing = RefinedAugmentation(lambda x, y, generator: (x, y), standard)
    yield "standard", judged(train(start(), nothing, size.steps, "standard"))
    # RandAugment takes bytes or [0, 1], so it goes before the standard augmentation, which standardises.
    kinds = {
        "mixup": RefinedAugmentation(mixup, standard),
        "rand_augment": RefinedAugmentation(_chain(OnImages(rand_augment), standard), less=standard),
    }
    for kind, augment in kinds.items():
        intensive = train(start(), augment, size.steps, kind)
        yield kind, judged(intensive)
        if controls:
            yield f"{kind}_statistics", judged(_statistics_anew(intensive, data.train, standard, trial))
        stage = train(start(), augment, first, f"{kind} stage 1")
        if controls:
            restarted = train(copy.deepcopy(stage), augment, size.refine_steps, f"{kind} restart", second=True)
            yield f"{kind}_restart", judged(restarted)
        refined = train(stage, augment.refine(), size.refine_steps, f"{kind} refinement", second=True)
        yield f"{kind}_refined", judged(refined)


def _features(model: nn.Module, x: Tensor) -> Tensor:
    """What the classifier is given, one row an image."""
    rows: list[Tensor] = []
    classifier = model[-1] if isinstance(model, nn.Sequential) else model.get_classifier()
    hook = classifier.register_forward_pre_hook(lambda module, args: rows.append(args[0].detach().cpu()))
    try:
        predict(model, x)
    finally:
        hook.remove()
    return torch.cat(rows)


def _chain(*parts: Callable) -> Callable:
    def both(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        for part in parts:
            x, y = part(x, y, generator=generator)
        return x, y

    return both


def _statistics_anew(model: nn.Module, train: tuple[Tensor, Tensor], standard: Callable, trial: Trial) -> nn.Module:
    """A copy whose batch norms have seen the clean training data only; the weights stay."""
    model, generator = copy.deepcopy(model), trial.generator("statistics")
    x, y = train
    order = torch.randperm(len(x), generator=generator)[:10_000]
    update_bn((standard(x[i], y[i], generator=generator)[0] for i in order.split(100)), model, device=trial.device)
    return model.eval()


@dataclass(frozen=True)
class Data:
    train: tuple[Tensor, Tensor]
    clean: tuple[Tensor, Tensor]
    """Training data, at most 10,000 of them, as the network takes them without any augmentation."""
    test: tuple[Tensor, Tensor]
    classes: int
    standard: Callable[..., tuple[Tensor, Tensor]]
    network: Callable[[], nn.Module]
    colour: bool


def _data(trial: Trial) -> Data:
    size = SIZES[trial.scale]
    if size.pixels:
        train, test = (trial.data("images", size=size.pixels, part=part) for part in ("train", "test"))
        train, test = (
            sample(part, count, trial.rng("split")) for part, count in ((train, size.train), (test, size.test))
        )
        classes = len(train.classes)
        block, depths = ("basic", (2, 2, 2, 2)) if size.pixels < 64 else ("bottleneck", (3, 4, 6, 3))
        return Data(
            (train.x, train.y), (standardised(train.x[:10_000]), train.y[:10_000]), (standardised(test.x), test.y), classes,
            shift_and_flip if size.pixels < 64 else crop_and_flip,
            partial(ResNet, block, depths, num_classes=classes, small_stem=size.pixels < 64), True,
        )  # fmt: skip
    digits = trial.data("digits")
    test = size.test or len(digits) - size.train
    train, test = (digits.subset(part) for part in split(digits.y, (size.train, test), trial.rng("split")))
    generator = trial.generator("positions")
    x, x_test = displaced(train.x, generator), displaced(test.x.repeat(3, 1, 1, 1), generator)
    return Data(
        (x, train.y), (x, train.y), (x_test, test.y.repeat(3)), 10, partial(shift_and_flip, mirror=0.0), _small_network, False
    )  # fmt: skip


def displaced(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned by up to 25 degrees and moved by up to a quarter of its side."""
    angle, right, down = (2 * torch.rand(3, len(x), generator=generator) - 1) * torch.tensor(
        [[25 * torch.pi / 180], [0.25], [0.25]]
    )
    rows = torch.stack([angle.cos(), -angle.sin(), right, angle.sin(), angle.cos(), down], -1).view(-1, 2, 3)
    return F.grid_sample(x, F.affine_grid(rows, list(x.shape), align_corners=False), align_corners=False)


def _small_network() -> nn.Sequential:
    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *stage(1, 16),
        *stage(16, 16),
        nn.MaxPool2d(2),
        *stage(16, 32),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
