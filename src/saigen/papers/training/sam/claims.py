"""The experiments: the same networks trained from scratch on little data, without SAM and with it.

Both arms share the split, the start, the order of the batches and the base optimizer with all its settings.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saigen.data import split
from saigen.nn.mlp_mixer import MLPMixer
from saigen.nn.resnet import ResNet
from saigen.papers.training.sam import (
    SAM,
    SAMVisionTransformer,
    active_neuron_ratio,
    hessian_top_eigenvalue,
    noisy_loss,
)
from saigen.train import accuracy, cosine, fit
from saigen.trial import Trial


@dataclass(frozen=True)
class Arm:
    """A network and how it is trained: ``sizes`` go to its class, ``rho`` is SAM's radius."""

    sizes: dict
    lr: float
    weight_decay: float
    rho: float
    steps: int | None = None  # where it is not trained as long as the others


@dataclass(frozen=True)
class Size:
    """One scale. Learning rates, weight decays and radii come from pilots on other seeds, by held-out accuracy."""

    image: int
    channels: int
    patch: int
    vit: Arm
    mixer: Arm
    resnet: Arm
    train: int
    steps: int
    batch: int
    warmup: int
    curvature_images: int  # how many training images the Hessian is taken on
    noise: float  # of the corrupted test images, in units of the grey level
    test: int | None = None  # at most so many test images
    crop_area: float | None = None  # the smallest share of an image that an Inception crop keeps; None: no augmentation


_TINY_NET = {"embed_dim": 16, "depth": 1}
_SMALL_NET = {"embed_dim": 32, "depth": 2}
SIZES = {
    "tiny": Size(
        image=8, channels=1, patch=4,
        vit=Arm(_TINY_NET | {"num_heads": 2}, 3e-3, 0.1, 0.1),
        mixer=Arm(_TINY_NET, 3e-3, 0.1, 0.15),
        resnet=Arm({"block": "basic", "depths": (1,), "widths": (8,)}, 0.1, 1e-3, 0.05),
        train=60, steps=4, batch=30, warmup=2, curvature_images=30, noise=0.3, test=100,
    ),
    "laptop": Size(
        image=8, channels=1, patch=2,
        vit=Arm(_SMALL_NET | {"num_heads": 4}, 1e-2, 0.5, 0.1),
        mixer=Arm(_SMALL_NET, 6e-3, 0.5, 0.3),
        resnet=Arm({"block": "basic", "depths": (1, 1), "widths": (16, 32)}, 0.1, 1e-2, 0.05),
        train=300, steps=600, batch=50, warmup=20, curvature_images=300, noise=0.3,
    ),
    "real": Size(
        image=32, channels=3, patch=8,
        vit=Arm({"embed_dim": 48, "depth": 3, "num_heads": 4}, 3e-3, 0.5, 0.1),
        mixer=Arm({"embed_dim": 48, "depth": 3}, 3e-3, 0.5, 0.3),
        resnet=Arm({"block": "basic", "depths": (1, 1, 1), "widths": (16, 32, 64)}, 0.1, 5e-3, 0.05),
        train=2000, steps=800, batch=50, warmup=50, curvature_images=250, noise=0.1, test=2000, crop_area=0.4,
    ),
    # the paper's recipe: 300 epochs of ImageNet in batches of 4096 (its ResNets: 90), 10,000 steps of warm-up
    "full": Size(
        image=224, channels=3, patch=16,
        vit=Arm({"embed_dim": 384, "depth": 12, "num_heads": 6}, 3e-3, 0.3, 0.1),
        mixer=Arm({"embed_dim": 512, "depth": 8}, 3e-3, 0.3, 0.15),
        resnet=Arm({"block": "bottleneck", "depths": (3, 4, 6, 3), "widths": (64, 128, 256, 512)}, 1.6, 1e-4, 0.02, steps=28_080),
        train=1_281_167, steps=93_600, batch=4096, warmup=10_000, curvature_images=4096, noise=0.1, crop_area=0.05,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Sets:
    """Images, float in [0, 1] or bytes, and labels."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int


def _sets(trial: Trial, size: Size) -> Sets:
    if trial.scale in ("tiny", "laptop"):
        digits = trial.data("digits")
        held_out = size.test or len(digits) - size.train
        train, test = (digits.subset(part) for part in split(digits.y, (size.train, held_out), trial.rng("split")))
        return Sets((train.x, train.y), (test.x, test.y), len(digits.classes))
    train, test = (trial.data("images", size=size.image, part=part) for part in ("train", "test"))
    if size.train < len(train):
        (drawn,) = split(train.y, (size.train,), trial.rng("split"))
        train = train.subset(drawn)
    if size.test is not None and size.test < len(test):
        (drawn,) = split(test.y, (size.test,), trial.rng("split of the test images"))
        test = test.subset(drawn)
    return Sets((train.x, train.y), (test.float().x, test.y), len(train.classes))


def _build(kind: str, size: Size, classes: int) -> nn.Module:
    common = {"num_classes": classes, "in_chans": size.channels}
    patches = {"img_size": size.image, "patch_size": size.patch, "gelu": "tanh"}
    if kind == "vit":
        return SAMVisionTransformer(**size.vit.sizes, **common, **patches, init="jax")
    if kind == "mixer":
        return MLPMixer(**size.mixer.sizes, **common, **patches)
    return ResNet(**size.resnet.sizes, **common, small_stem=size.image < 64)


def _scaled(x: Tensor) -> Tensor:
    x = x / 255 if x.dtype == torch.uint8 else x
    return 2 * x - 1


def _inception_crop(smallest: float) -> Callable[..., tuple[Tensor, Tensor]]:
    """The paper's only augmentation: crops of ``smallest`` to 1 of the area, 3:4 to 4:3 wide, and flips, a draw an image."""

    def transform(generator: torch.Generator, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        area, shape, right, down, side = torch.rand(5, len(x), generator=generator)
        area, shape = smallest + (1 - smallest) * area, (2 * shape - 1) * math.log(4 / 3)
        width, height = ((area * (sign * shape).exp()).sqrt().clamp(max=1) for sign in (1, -1))
        flip = torch.where(side < 0.5, -1.0, 1.0)
        theta = torch.zeros(len(x), 2, 3)
        theta[:, 0, 0], theta[:, 0, 2] = flip * width, (2 * right - 1) * (1 - width)
        theta[:, 1, 1], theta[:, 1, 2] = height, (2 * down - 1) * (1 - height)
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False), y

    return transform


def _cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(_scaled(x)), y)


def _train(trial: Trial, size: Size, sets: Sets, kind: str, with_sam: bool) -> nn.Module:
    arm: Arm = getattr(size, kind)
    with trial.seeded(f"weights of the {kind}"):
        model = _build(kind, size, sets.classes).to(trial.device)
    base, more = (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}) if kind == "resnet" else (torch.optim.AdamW, {})
    optimizer = SAM(
        model.parameters(),
        base,
        rho=arm.rho if with_sam else 0.0,
        model=model,
        lr=arm.lr,
        weight_decay=arm.weight_decay,
        **more,
    )
    name = f"{kind}_{'sam' if with_sam else 'plain'}"
    fit(
        model,
        _cross_entropy,
        sets.train,
        optimizer=optimizer,
        steps=arm.steps or size.steps,
        batch_size=size.batch,
        seed=trial.seed,
        schedule=cosine(warmup=size.warmup),
        transform=None if size.crop_area is None else _inception_crop(size.crop_area),
        clip=1.0,
        checkpoint=trial.checkpoint(name),
        device=trial.device,
        on_step=lambda step, total, loss: trial.progress(step + 1, total, name),
    )
    return model.eval()


def _both(trial: Trial, size: Size, sets: Sets, kind: str) -> Iterator[tuple[str, nn.Module]]:
    """The network trained without SAM, then with it."""
    yield f"{kind}_plain", _train(trial, size, sets, kind, with_sam=False)
    yield f"{kind}_sam", _train(trial, size, sets, kind, with_sam=True)


def sam_flattens_the_minimum(trial: Trial) -> dict[str, float]:
    """λ_max of the training loss after AdamW over λ_max after SAM, for a ViT and a Mixer, on the same images.

    Beside it the training loss (λ_max falls with it), the loss under weight noise and the share of active neurons.
    """
    size = SIZES[trial.scale]
    sets = _sets(trial, size)
    (drawn,) = split(sets.train[1], (size.curvature_images,), trial.rng("images for the Hessian"))
    x, y = (tensor[torch.from_numpy(drawn)].to(trial.device) for tensor in sets.train)
    values: dict[str, float] = {}
    for kind in ("vit", "mixer"):
        for arm, model in _both(trial, size, sets, kind):

            def loss(model: nn.Module = model) -> Tensor:
                return _cross_entropy(model, x, y)

            top = hessian_top_eigenvalue(loss, model.parameters(), generator=trial.generator("power iteration"))
            values[f"{arm}_curvature"] = abs(top.value)  # dominant: the largest magnitude, whatever its sign
            with torch.no_grad():
                values[f"{arm}_loss"] = float(loss())
            values[f"{arm}_noisy_loss"] = noisy_loss(
                loss, model.parameters(), sigma=0.03, samples=5, generator=trial.generator("weight noise")
            )
            active = active_neuron_ratio(model, _scaled(x))
            values[f"{arm}_active_in_first_layer"] = next(iter(active.values()))
        values[f"{kind}_flattening"] = values[f"{kind}_plain_curvature"] / values[f"{kind}_sam_curvature"]
    return values


def sam_improves_accuracy_and_robustness(trial: Trial) -> dict[str, float]:
    """Test accuracy with SAM minus without, on clean and on corrupted images, for a ViT and a Mixer."""
    size = SIZES[trial.scale]
    sets = _sets(trial, size)
    x, y = sets.test
    corrupted = _corrupted(x, size.noise, trial.generator("noise on the images"))
    values: dict[str, float] = {}
    for kind in ("vit", "mixer"):
        for arm, model in _both(trial, size, sets, kind):
            values[f"{arm}_accuracy"] = accuracy(model, _scaled(x), y)
            values[f"{arm}_corrupted"] = sum(accuracy(model, _scaled(c), y) for c in corrupted) / len(corrupted)
        for what in ("accuracy", "corrupted"):
            values[f"{kind}_{what}_gain"] = values[f"{kind}_sam_{what}"] - values[f"{kind}_plain_{what}"]
    return values


def sam_helps_a_mixer_more_than_a_resnet(trial: Trial) -> dict[str, float]:
    """The Mixer's gain in test accuracy minus a ResNet's, each trained as the paper trains its kind."""
    size = SIZES[trial.scale]
    sets = _sets(trial, size)
    x, y = sets.test
    values: dict[str, float] = {}
    for kind in ("mixer", "resnet"):
        for arm, model in _both(trial, size, sets, kind):
            values[f"{arm}_accuracy"] = accuracy(model, _scaled(x), y)
        values[f"{kind}_gain"] = values[f"{kind}_sam_accuracy"] - values[f"{kind}_plain_accuracy"]
    return values | {"mixer_over_resnet": values["mixer_gain"] - values["resnet_gain"]}


def _corrupted(x: Tensor, noise: float, generator: torch.Generator) -> list[Tensor]:
    """Three of ImageNet-C's families: Gaussian noise, blur (3x3 mean), and contrast cut to 0.4."""
    noisy = (x + noise * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return [noisy, blurred, mean + 0.4 * (x - mean)]
