"""Does a search over two numbers beat a tuned plain pipeline on the task itself?

Laptop: scikit-learn's digits on a canvas of 16 pixels, every image turned by up to 25 degrees and moved by up to 2 pixels
once and for all, in training and test data alike; a small convolutional network; 150 training images. Real and full:
CIFAR-10 in the recipe of the paper, on 4,000 images (the paper's reduced set) or on all. The plain pipeline is what the
paper calls baseline augmentation, random crops of a padded image (and, on CIFAR, flips and Cutout); its padding is chosen
on the same validation images as (N, M), and RandAugment runs on top of it.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saigen.data import split
from saigen.nn.image_operations import cutout
from saigen.papers.augmentation.randaugment import RandAugment, rand_augment_operations, search_rand_augment
from saigen.train import accuracy, cosine, fit
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    train: int
    validation: int
    steps: int
    batch: int
    num_ops: tuple[int, ...]
    magnitudes: tuple[int, ...]
    pads: tuple[int, ...]
    """The plain pipelines to choose from."""
    lr: float
    translate: float
    """Pixels at level 10."""
    many: int = 0
    """The larger training set on which the best M is looked for as well; 0 for none."""
    test: int | None = None
    depth: int = 10
    """Of the Wide-ResNet, on CIFAR."""
    widen: int = 1


SIZES = {
    "tiny": Size(60, 60, 6, 20, (1,), (5, 9), (2,), 2e-3, 4.0, many=100, test=100),
    "laptop": Size(150, 300, 500, 50, (1, 2), (2, 5, 9), (1, 2, 3), 2e-3, 4.0, many=600, test=897),
    "real": Size(4_000, 1_000, 620, 128, (1,), (4, 9), (4,), 0.1, 14.0, test=5_000),
    "full": Size(45_000, 5_000, 70_200, 128, (1, 2, 3), (2, 4, 5, 7, 9, 14), (4,), 0.1, 14.0, depth=28, widen=2),
}


def search_beats_plain(trial: Trial) -> dict[str, float]:
    """One seed: the plain pipelines, then RandAugment over the grid on top of the best; both chosen on validation data."""
    size = SIZES[trial.scale]
    digits = trial.scale in ("tiny", "laptop")
    (x, y), (x_val, y_val), (x_test, y_test) = (_digits if digits else _cifar)(trial, size)
    # Colour means nothing on grey images.
    operations = tuple(name for name in rand_augment_operations("paper") if not digits or name != "Color")
    results: dict[tuple[int, int, float, int], tuple[float, float]] = {}

    def train(augment: RandAugment, pad: int, n: int) -> tuple[float, float]:
        key = (n, augment.num_ops, augment.magnitude, pad)
        if key in results:
            return results[key]
        with trial.seeded("weights"):
            model = _digit_network() if digits else WideResNet(size.depth, size.widen)
        if digits:
            optimizer = torch.optim.Adam(model.parameters(), size.lr)
        else:
            optimizer = torch.optim.SGD(model.parameters(), size.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)

        def transform(generator: torch.Generator, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            images = crop(images, pad, generator)
            if digits:
                return augment(images, generator=generator), labels
            flip = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
            images = augment(torch.where(flip, images.flip(-1), images), generator=generator)
            return cutout(images, 8.0, generator=generator), labels

        fit(
            model, lambda net, images, labels: F.cross_entropy(net(images), labels), (x[:n], y[:n]), optimizer=optimizer,
            steps=size.steps, batch_size=size.batch, seed=trial.seed, schedule=cosine(), transform=transform, device=trial.device,
            checkpoint=trial.checkpoint(f"{n}-{augment.num_ops}-{augment.magnitude:g}-{pad}"),
        )  # fmt: skip
        results[key] = (accuracy(model, x_val, y_val), accuracy(model, x_test, y_test))
        total = len(size.pads) + len(size.num_ops) * len(size.magnitudes) + (1 + len(size.magnitudes)) * (size.many > 0)
        trial.progress(len(results), total, f"{n} images, N = {augment.num_ops}, M = {augment.magnitude:g}")
        return results[key]

    def make(num_ops: int, magnitude: float | int) -> RandAugment:
        schedule = "official" if trial.scale == "full" else "increasing"
        fill = 0.0 if digits else 128.0
        return RandAugment(
            num_ops, magnitude, op_set=operations, schedule=schedule, translate=size.translate, fill=fill
        )

    nothing = make(0, 0)
    pad = max(size.pads, key=lambda pad: train(nothing, pad, size.train)[0])
    _, plain = train(nothing, pad, size.train)
    grid = search_rand_augment(
        lambda augment: train(augment, pad, size.train)[0], size.num_ops, size.magnitudes, make=make
    )
    chosen = train(make(*grid.best), pad, size.train)[1]
    values = {
        "gain": chosen - plain,
        "accuracy_plain": plain,
        "accuracy_rand_augment": chosen,
        "pad": float(pad),
        "best_n": float(grid.best[0]),
        "best_m": float(grid.best[1]),
    }
    values |= {f"accuracy_n{n}_m{m}": train(make(n, m), pad, size.train)[1] for n, m in grid.scores}
    if size.many:
        # Reported, not judged: the paper's best M grows with the data; its figure prints no numbers.
        values["accuracy_plain_many"] = train(nothing, pad, size.many)[1]
        values |= {f"accuracy_n1_m{m}_many": train(make(1, m), pad, size.many)[1] for m in size.magnitudes}
    return values


def _digits(trial: Trial, size: Size) -> tuple[tuple[Tensor, Tensor], ...]:
    data = trial.data("digits")
    pool = max(size.train, size.many)
    parts = split(data.y, (pool, size.validation, size.test), trial.rng("split"))
    generator = trial.generator("nuisance")
    n = len(data.x)
    angle = (2 * torch.rand(n, generator=generator) - 1) * (25 * torch.pi / 180)
    # affine_grid counts from -1 to 1, so 2 of 16 pixels are a quarter.
    move = (2 * torch.rand(n, 2, generator=generator) - 1) / 4
    rows = torch.stack([angle.cos(), -angle.sin(), move[:, 0], angle.sin(), angle.cos(), move[:, 1]], -1).view(n, 2, 3)
    x = F.interpolate(data.x, (16, 16), mode="bilinear", align_corners=False)
    x = F.grid_sample(x, F.affine_grid(rows, list(x.shape), align_corners=False), align_corners=False)
    return tuple((x[part], data.y[part]) for part in parts)


def _cifar(trial: Trial, size: Size) -> tuple[tuple[Tensor, Tensor], ...]:
    # Rows beyond those that are needed are not even decoded; they are shuffled, so any first part will do.
    rows = None if trial.scale == "full" else 2 * (size.train + size.validation)
    pool, test = trial.data("images", size=32, limit=rows), trial.data("images", size=32, part="test", limit=size.test)
    train, validation = split(pool.y, (size.train, size.validation), trial.rng("split"))
    return (pool.x[train], pool.y[train]), (pool.x[validation], pool.y[validation]), (test.x, test.y)


def crop(images: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """A window of the images' size from each image with a border of ``pad`` zeros, at a random place."""
    n, _, h, w = images.shape
    padded = F.pad(images, (pad,) * 4)
    top, left = torch.randint(2 * pad + 1, (2, n, 1), generator=generator)
    rows, columns = top + torch.arange(h), left + torch.arange(w)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _digit_network() -> nn.Module:
    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *stage(1, 16),
        nn.MaxPool2d(2),
        *stage(16, 32),
        nn.MaxPool2d(2),
        *stage(32, 32),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


class WideResNet(nn.Module):
    """WRN-depth-widen (Zagoruyko and Komodakis, 2016): pre-activation blocks in three stages, on uint8 images."""

    def __init__(self, depth: int, widen: int, classes: int = 10) -> None:
        super().__init__()
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        blocks = []
        for stage, (inputs, outputs) in enumerate(pairwise(widths)):
            for number in range((depth - 4) // 6):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(_PreActivation(inputs if number == 0 else outputs, outputs, stride))
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.head = nn.BatchNorm2d(widths[-1]), nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        x = x.float().sub(127.5).div(64.0)
        return self.head(self.norm(self.blocks(self.stem(x))).relu().mean((2, 3)))


class _PreActivation(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x).relu()
        skip = x if self.shortcut is None else self.shortcut(y)
        return skip + self.conv2(self.norm2(self.conv1(y)).relu())
