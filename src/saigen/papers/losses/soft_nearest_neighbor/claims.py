"""Where do the classes part in a network, and does it help to keep them entangled until the end?

Laptop: textures. A class is the direction and the fineness of a grating that stands at a random place, in a random phase
and strength, among stronger random clouds; so the classes are entangled in the pixels (a nearest neighbour knows next to
nothing) and the layers have something to do. Real and full: CIFAR-10 with the official example's network. Two of the ten
classes, drawn anew for every seed, are kept out of training and are the outliers.
"""

import math
from dataclasses import dataclass

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from saigen.nn.resnet import ResNet
from saigen.papers.losses.soft_nearest_neighbor import (
    EntanglementRegularizer,
    entangled_cnn,
    hidden_features,
    hidden_neighbor_credibility,
    layer_entanglement,
)
from saigen.train import accuracy, cosine, fit, predict
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    train: int
    validation: int
    test: int
    outliers: int
    steps: int
    batch: int
    lr: float
    weight_decays: tuple[float, ...]
    """For the plain network to choose from, as the entangled one chooses from ``factors``."""
    factors: tuple[float, ...]
    blocks: tuple[int, ...]
    """Widths of the four residual blocks of the layer analysis."""
    block_steps: int
    depth: int = 1


SIZES = {
    "tiny": Size(80, 40, 60, 40, 6, 20, 2e-3, (0.0,), (-0.01,), (4, 4, 8, 8), 6),
    "laptop": Size(800, 300, 1_000, 400, 300, 100, 2e-3, (0.0, 0.05, 0.2), (-0.01, -0.03, -0.1), (8, 16, 32, 64), 320),
    "real": Size(4_000, 1_000, 2_000, 500, 380, 128, 1e-3, (0.0, 0.05), (-0.01, -0.1), (8, 16, 32, 64), 310),
    "full": Size(35_000, 5_000, 8_000, 2_000, 13_600, 128, 1e-3, (0.0, 0.05, 0.2), (-0.003, -0.01, -0.03, -0.1, -0.3),
                 (16, 32, 64, 128), 27_300, depth=2),
}  # fmt: skip
NEIGHBORS = 25


def only_the_last_block_parts_the_classes(trial: Trial) -> dict[str, float]:
    """One seed: a residual network trained plainly; the least loss over T after each of its four blocks, on test data."""
    size, parts = SIZES[trial.scale], _data(trial)
    channels = parts["train"][0].shape[1]
    with trial.seeded("blocks"):
        model = ResNet("basic", (size.depth,) * 4, size.blocks, num_classes=8, in_chans=channels, small_stem=True)
    _train(trial, model, parts, size.block_steps, size.lr, 0.05, 0.0, (), "blocks")
    x, y = parts["test"]
    layers = ["layer1", "layer2", "layer3", "layer4"]
    batches = [(x[i : i + 128], y[i : i + 128]) for i in range(0, min(len(x), 1024) - 127 if len(x) >= 128 else 1, 128)]
    rows = layer_entanglement(model, layers, batches)
    first, *_, before, last = (row.loss for row in rows)
    fall = first - last
    return {
        "last_over_first": max(last, 1e-6) / max(first, 1e-6),
        # Where nothing falls at all, nothing falls at the last block either.
        "fall_at_last": (before - last) / fall if fall > 1e-6 else 0.0,
        "accuracy": accuracy(model, x, y),
        **{f"loss_{row.layer}": row.loss for row in rows},
        **{f"loss_at_median_{row.layer}": row.loss_at_median for row in rows},
        **{f"temperature_{row.layer}": row.temperature for row in rows},
    }


def entangling_helps(trial: Trial) -> dict[str, float]:
    """One seed: the plain network with its best weight decay, then the best factor on top; both by validation accuracy.

    An outlier is told by how few of its nearest training points, over all hidden layers, carry the label it is given.
    """
    size, parts = SIZES[trial.scale], _data(trial)
    digits_like = trial.scale in ("tiny", "laptop")
    layers = ("conv1", "conv2", "conv3", "hidden") if digits_like else ("conv1", "conv2", "conv3")
    arms: dict[tuple[float, float], tuple[nn.Module, float]] = {}
    total = len(size.weight_decays) + len(size.factors)

    def arm(weight_decay: float, factor: float) -> float:
        with trial.seeded("weights"):
            model = _SmallNetwork() if digits_like else entangled_cnn(num_classes=8, in_chans=3, image_size=32)
        _train(trial, model, parts, size.steps, size.lr, weight_decay, factor, layers, f"{weight_decay:g}{factor:+g}")
        arms[weight_decay, factor] = model, accuracy(model, *parts["validation"])
        trial.progress(len(arms), total, f"weight decay {weight_decay:g}, factor {factor:g}")
        return arms[weight_decay, factor][1]

    decay = max(size.weight_decays, key=lambda weight_decay: arm(weight_decay, 0.0))
    factor = max(size.factors, key=lambda factor: arm(decay, factor))
    values = {"factor": factor, "weight_decay": decay}
    for name, key in (("plain", (decay, 0.0)), ("entangled", (decay, factor))):
        values |= {f"{quantity}_{name}": value for quantity, value in _judge(arms[key][0], parts, layers).items()}
    values["accuracy_gain"] = values["accuracy_entangled"] - values["accuracy_plain"]
    values["outlier_gain"] = values["outlier_auroc_entangled"] - values["outlier_auroc_plain"]
    # Not judged: what each factor does, chosen or not.
    for (_, each), (model, _) in arms.items():
        if each:
            judged = _judge(model, parts, layers)
            values[f"accuracy_at_{each:g}"] = judged["accuracy"]
            values[f"outlier_auroc_at_{each:g}"] = judged["outlier_auroc"]
    return values


def _judge(model: nn.Module, parts: dict[str, tuple[Tensor, Tensor]], layers: tuple[str, ...]) -> dict[str, float]:
    x_train, y_train = parts["train"]
    train = hidden_features(model, layers, x_train)
    shares, confidence = [], []
    for part in ("test", "outliers"):
        logits = predict(model, parts[part][0])
        features = hidden_features(model, layers, parts[part][0])
        each = [
            hidden_neighbor_credibility(train[name], y_train, features[name], logits.argmax(-1), NEIGHBORS)
            for name in layers
        ]
        shares.append(torch.stack(each).mean(0))
        confidence.append(logits.softmax(-1).amax(-1))
    known = [1] * len(shares[0]) + [0] * len(shares[1])
    x, y = parts["test"]
    rows = layer_entanglement(model, layers, [(x[:128], y[:128])])
    return {
        "accuracy": accuracy(model, x, y),
        "outlier_auroc": _auroc(known, torch.cat(shares)),
        "confidence_auroc": _auroc(known, torch.cat(confidence)),
        **{f"loss_{row.layer}": row.loss for row in rows},
    }


def _auroc(known: list[int], score: Tensor) -> float:
    # A network that diverged knows nothing: scores that are not numbers are all alike.
    return float(roc_auc_score(known, score.nan_to_num(0.0).numpy()))


def _train(
    trial: Trial, model: nn.Module, parts: dict[str, tuple[Tensor, Tensor]], steps: int, lr: float, weight_decay: float,
    factor: float, layers: tuple[str, ...], name: str,
) -> None:  # fmt: skip
    objective, size = _Objective(model, layers, factor), SIZES[trial.scale]
    fit(
        objective.to(trial.device), lambda both, x, y: both(x, y), parts["train"],
        optimizer=torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay), steps=steps, batch_size=size.batch,
        seed=trial.seed, schedule=cosine(), clip=5.0, device=trial.device, checkpoint=trial.checkpoint(name),
    )  # fmt: skip
    if objective.entangle is not None:
        objective.entangle.close()


class _Objective(nn.Module):
    """The network and its regulariser as one, so that a checkpoint keeps the temperatures too."""

    def __init__(self, model: nn.Module, layers: tuple[str, ...], factor: float) -> None:
        super().__init__()
        self.model = model
        self.entangle = EntanglementRegularizer(model, layers, factor) if factor else None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(self.model(x), y)
        return loss if self.entangle is None else loss + self.entangle(y)


def _data(trial: Trial) -> dict[str, tuple[Tensor, Tensor]]:
    """Eight known classes in train, validation and test, numbered anew, and the two unknown ones as outliers."""
    size, known = SIZES[trial.scale], torch.randperm(10, generator=trial.generator("known classes"))[:8].sort().values
    number = torch.full((10,), -1).index_put_((known,), torch.arange(8))
    sizes = [size.train, size.validation, size.test]
    if trial.scale in ("tiny", "laptop"):
        generator = trial.generator("textures")
        unknown = (number < 0).nonzero().flatten()
        y = known[torch.randint(8, (sum(sizes),), generator=generator)]
        strange = unknown[torch.randint(2, (size.outliers,), generator=generator)]
        x_parts, y_parts = textures(y, generator).split(sizes), number[y].split(sizes)
        outliers = textures(strange, generator), strange
    else:
        # Rows beyond those that can be needed are not even decoded: eight classes of ten, and a margin.
        few = None if trial.scale == "full" else int(1.4 * (size.train + size.validation))
        pool, held_out = trial.data("images", size=32, limit=few), trial.data("images", size=32, part="test", limit=few)
        order = torch.randperm(len(pool.y), generator=trial.generator("split"))
        inside = order[number[pool.y[order]] >= 0][: size.train + size.validation]
        tested = (number[held_out.y] >= 0).nonzero().flatten()[: size.test]
        strange = (number[held_out.y] < 0).nonzero().flatten()[: size.outliers]
        x = torch.cat([pool.x[inside], held_out.x[tested]])
        y = number[torch.cat([pool.y[inside], held_out.y[tested]])]
        sizes[2] = len(tested)
        x_parts, y_parts = (x.float() / 255 - 0.5).split(sizes), y.split(sizes)
        outliers = held_out.x[strange].float() / 255 - 0.5, held_out.y[strange]
    parts = dict(zip(("train", "validation", "test"), zip(x_parts, y_parts, strict=True), strict=True))
    return parts | {"outliers": outliers}


def textures(y: Tensor, generator: torch.Generator, side: int = 16) -> Tensor:
    """Grey images (n, 1, side, side) of the classes ``y`` in 0..9: five directions of a grating in two finenesses."""
    n = len(y)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, generator=generator)

    v, u = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    angle = (y // 2 * (math.pi / 5)).view(-1, 1, 1)
    cycles = torch.where(y % 2 == 0, 0.13, 0.22).view(-1, 1, 1)
    wave = torch.sin(2 * math.pi * (cycles * (u * angle.cos() + v * angle.sin()) + uniform(0.0, 1.0)))
    window = torch.exp(-((u - uniform(4.0, 12.0)).square() + (v - uniform(4.0, 12.0)).square()) / 50)
    clouds = F.interpolate(
        torch.randn(n, 1, 4, 4, generator=generator), (side, side), mode="bicubic", align_corners=False
    )
    noise = torch.randn(n, side, side, generator=generator)
    return (wave * window * uniform(0.6, 1.0) + 0.8 * clouds[:, 0] + 0.2 * noise)[:, None].clamp(-2.5, 2.5)


class _SmallNetwork(nn.Module):
    """Three convolutions and a hidden layer, no normalisation, as in the official example."""

    def __init__(self, width: int = 16, classes: int = 8) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.ReLU(), nn.MaxPool2d(2))

        self.conv1, self.conv2, self.conv3 = (
            stage(1, width, 5),
            stage(width, 2 * width, 3),
            stage(2 * width, 2 * width, 3),
        )
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(8 * width, 64), nn.ReLU())
        self.classifier = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.hidden(self.conv3(self.conv2(self.conv1(x)))))
