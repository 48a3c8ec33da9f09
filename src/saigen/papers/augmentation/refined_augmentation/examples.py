"""Small instances of the two stages, and the speed of the first one's mixing beside timm's and torchvision's."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from saigen.example import Benchmark, Example, Part, Recipe
from saigen.nn.mixing import CutMix, Mixup
from saigen.papers.augmentation.randaugment import RandAugment
from saigen.papers.augmentation.refined_augmentation import OnImages, RefinedAugmentation, Refinement, empirical_risks


def _batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, 256, (4, 3, 16, 16), generator=generator) / 255, torch.arange(4)


def examples() -> Iterator[Example]:
    yield Example(
        name="mixup_then_clean",
        kind="transform",
        make=lambda: RefinedAugmentation(Mixup(1.0, num_classes=4)),
        inputs=_batch,
        code="""import torch
from saigen.nn.mixing import Mixup
from saigen.papers.augmentation.refined_augmentation import RefinedAugmentation, Refinement

net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(1568, 4))
optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
augment = RefinedAugmentation(Mixup(1.0, num_classes=4))          # on top of your crops and flips, which stay
refinement = Refinement(
    optimizer, steps=40, refine_steps=6, augment=augment, lr_scale=0.1,
    scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 34),
)
images, labels = torch.rand(32, 3, 16, 16), torch.arange(4).repeat(8)
for step in range(40):
    x, y = augment(images, labels)                                 # soft labels, then, while refining, those that came in
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
    refinement.step()                                              # sets the learning rate and the stage
print(refinement.refining, optimizer.param_groups[0]["lr"])""",
        wrong=(
            (lambda: RefinedAugmentation("mixup"), "intensive"),
            (lambda: Mixup(-1.0, 4), "alpha"),
            (lambda: RefinedAugmentation(Mixup(1.0, 2))(torch.rand(4, 3, 2, 2), torch.arange(4)), "y holds"),
        ),
    )
    yield Example(
        name="less_rand_augment",
        kind="transform",
        make=lambda: RefinedAugmentation(
            OnImages(RandAugment(2, 9)), CutMix(1.0, num_classes=4), less=OnImages(RandAugment(1, 2))
        ).refine(),
        inputs=_batch,
        code="""import torch
from saigen.papers.augmentation.randaugment import RandAugment
from saigen.papers.augmentation.refined_augmentation import OnImages, RefinedAugmentation

strong, weak = (OnImages(RandAugment(n, m)) for n, m in ((2, 9), (1, 2)))
augment = RefinedAugmentation(strong, less=weak)     # less-augmented data in the second stage, in place of clean ones
images, labels = torch.rand(8, 3, 32, 32), torch.arange(8)
first = augment(images, labels)
second = augment.refine()(images, labels)            # in a loader's workers too
print(first[0].shape, second[0].shape)""",
        wrong=((lambda: RefinedAugmentation(Mixup(1.0, 2), less=0.5), "less"),),
    )
    yield Example(
        name="refinement",
        kind="function",
        make=lambda: _refined,
        inputs=lambda generator: (torch.randn(16, 4, generator=generator), torch.arange(16) % 3, generator),
        code="""import torch
from saigen.nn.mixing import Mixup
from saigen.papers.augmentation.refined_augmentation import RefinedAugmentation, Refinement, empirical_risks

net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
mixup = Mixup(1.0, num_classes=3)
augment = RefinedAugmentation(mixup)
refinement = Refinement(optimizer, steps=30, refine_steps=10, augment=augment, frozen=[net[1]])   # batch norm stays
x, y = torch.randn(64, 4), torch.randint(3, (64,))
for step in range(30):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(net(augment(x, y)[0]), augment(x, y)[1]).backward()
    optimizer.step()
    refinement.step()
print(empirical_risks(net, (x, y), (x, y), mixup))""",
        wrong=(
            (lambda: Refinement(_optimizer(), steps=10, refine_steps=11), "refine_steps"),
            (lambda: Refinement(_optimizer(), steps=10, refine_steps=1, lr_scale=0), "lr_scale"),
            (
                lambda: empirical_risks(
                    nn.Linear(2, 2), (torch.rand(0, 2), torch.rand(0)), (torch.rand(1, 2), torch.rand(1)), Mixup(1, 2)
                ),
                "train has 0",
            ),
        ),
        batch=None,
    )


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)


def _refined(x: torch.Tensor, y: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A linear classifier after eight steps with mixup and four without."""
    weight = nn.Parameter(torch.zeros(3, x.shape[1]))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    augment = RefinedAugmentation(Mixup(1.0, num_classes=3))
    refinement = Refinement(optimizer, steps=12, refine_steps=4, augment=augment)
    for _ in range(12):
        mixed, labels = augment(x, y, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(mixed @ weight.T, labels).backward()
        optimizer.step()
        refinement.step()
    return weight.detach()


def parts() -> Iterator[Part]:
    yield Part("Mixup_then_clean", "method", _clean_finish)


def _clean_finish(recipe: Recipe) -> Recipe:
    augment, optimizers = RefinedAugmentation(Mixup(1.0, num_classes=len(recipe.class_counts))), []

    def optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
        made = recipe.optimizer(model, rate)
        for group in made.param_groups:
            group["steps_done"] = 0  # in the state of the optimizer, so that a resumed training knows its stage

        def count(made: torch.optim.Optimizer, *_: Any) -> None:
            for group in made.param_groups:
                group["steps_done"] += 1

        made.register_step_post_hook(count)
        optimizers[:] = [made]
        return made

    def transform(generator: torch.Generator, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = recipe.transform(generator, x, y)
        done = optimizers[0].param_groups[0]["steps_done"] if optimizers else 0
        # the last fifth; the learning rate is low there in any case
        return augment.refine(done >= 0.8 * recipe.steps)(x, y, generator=generator)

    return replace(recipe, optimizer=optimizer, transform=transform)


def benchmarks() -> Iterator[Benchmark]:
    """The first stage's mixing: the only work that the method adds to a step."""

    def images(side: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return torch.rand(n, 3, side, side, generator=generator), torch.randint(1000, (n,), generator=generator)

    def ours(mixing: type[nn.Module], side: int, n: int) -> Callable[[], Callable[[], Any]]:
        def build() -> Callable[[], Any]:
            augment = RefinedAugmentation(mixing(1.0, 1000))
            batch = images(side, n)
            return lambda: augment(*batch)

        return build

    def timm(side: int, n: int) -> Callable[[], Callable[[], Any]]:
        def build() -> Callable[[], Any]:
            from timm.data import Mixup as TimmMixup

            mixup = TimmMixup(mixup_alpha=1.0, label_smoothing=0.0, num_classes=1000)
            x, y = images(side, n)

            def call() -> Any:
                # timm mixes in place and puts its targets on the GPU unless told; a copy keeps the images as they are.
                from timm.data.mixup import mixup_target

                mixed, share = x.clone(), mixup._mix_batch
                return mixed, mixup_target(y, 1000, share(mixed), 0.0)

            return call

        return build

    def torchvision(name: str, side: int, n: int) -> Callable[[], Callable[[], Any]]:
        def build() -> Callable[[], Any]:
            from torchvision.transforms import v2

            transform = getattr(v2, name)(alpha=1.0, num_classes=1000)
            batch = images(side, n)
            return lambda: transform(*batch)

        return build

    for side, n in ((32, 128), (224, 32)):
        yield Benchmark(f"mixup stage, {n} images of {side} pixels, timm", ours(Mixup, side, n), timm(side, n))
        yield Benchmark(
            f"mixup stage, {n} images of {side} pixels, torchvision",
            ours(Mixup, side, n),
            torchvision("MixUp", side, n),
        )
        yield Benchmark(
            f"CutMix stage, {n} images of {side} pixels, torchvision",
            ours(CutMix, side, n),
            torchvision("CutMix", side, n),
        )
