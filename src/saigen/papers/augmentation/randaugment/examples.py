"""Small instances of RandAugment's components, and its speed beside torchvision's and kornia's."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from saigen.example import Benchmark, Example, Part, Recipe
from saigen.papers.augmentation.randaugment import RandAugment, TrainableRandAugment, rand_augment_operations


def _images(generator: torch.Generator) -> tuple[torch.Tensor]:
    return (torch.randint(0, 256, (4, 3, 16, 16), generator=generator) / 255,)


def examples() -> Iterator[Example]:
    yield Example(
        name="rand_augment",
        kind="transform",
        make=lambda: RandAugment(num_ops=2, magnitude=9),
        inputs=_images,
        code="""import torch
from saigen.papers.augmentation.randaugment import RandAugment

augment = RandAugment(num_ops=2, magnitude=9, schedule="increasing", translate=10)  # translate: pixels at level 10
print(augment.arguments())                      # what M = 9 means for each operation
images = torch.rand(64, 3, 32, 32)              # float in [0, 1], or uint8; a batch, or one image
print(augment(images, generator=torch.Generator().manual_seed(0)).shape)""",
        wrong=(
            (lambda: RandAugment(num_ops=-1), "num_ops"),
            (lambda: RandAugment(op_set="imagenet"), "op_set"),
            (lambda: RandAugment(schedule="cosine"), "schedule"),
            (lambda: RandAugment()(torch.zeros(1, 3, 8, 8, dtype=torch.int64)), "int64"),
            (lambda: RandAugment()(torch.full((1, 3, 8, 8), 255.0)), "to 255"),
            (lambda: RandAugment(op_set=("Color",))(torch.rand(1, 4, 8, 8)), "channels"),
        ),
    )
    yield Example(
        name="trainable_rand_augment",
        kind="transform",
        make=lambda: TrainableRandAugment(RandAugment(num_ops=2, magnitude=9, op_set=("Identity", "Rotate", "Invert"))),
        inputs=_images,
        code="""import torch
from saigen.papers.augmentation.randaugment import RandAugment, TrainableRandAugment

trainable = TrainableRandAugment(RandAugment(num_ops=2, magnitude=9))
critic = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 10)).requires_grad_(False)  # trained without augmentation
images, labels = torch.rand(8, 3, 16, 16), torch.arange(8)      # validation data
torch.nn.functional.cross_entropy(critic(trainable(images)), labels).backward()
print(trainable.alpha.grad.shape, trainable.sampler())          # draws by the learned weights""",
        wrong=((lambda: TrainableRandAugment(RandAugment(num_ops=0)), "num_ops"),),
    )


def _batch(n: int, side: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def parts() -> Iterator[Part]:
    yield Part("RandAugment", "method", _augmented)


def _augmented(recipe: Recipe) -> Recipe:
    def transform(generator: torch.Generator, images: torch.Tensor, labels: torch.Tensor):
        # colour means nothing on grey images, and translation is in pixels
        operations = tuple(n for n in rand_augment_operations("paper") if images.shape[1] == 3 or n != "Color")
        augment = RandAugment(1, 5, op_set=operations, schedule="increasing", translate=images.shape[-1] / 4)
        images, labels = recipe.transform(generator, images, labels)
        return augment(images, generator=generator), labels

    return replace(recipe, transform=transform)


def benchmarks() -> Iterator[Benchmark]:
    def ours(n: int, side: int, floats: bool):
        def make():
            augment = RandAugment(2, 9, op_set="torchvision")
            images = _batch(n, side) / 255 if floats else _batch(n, side)
            return lambda: augment(images)

        return make

    def torchvision(n: int, side: int):
        def make():
            from torchvision.transforms import v2

            augment = v2.RandAugment(2, 9)
            images = _batch(n, side)
            # Each image draws its own operations, as ours do; on a whole batch torchvision draws them once.
            return lambda: torch.stack([augment(image) for image in images])

        return make

    def kornia(n: int, side: int):
        def make():
            from kornia.augmentation.auto import RandAugment as KorniaRandAugment

            augment = KorniaRandAugment(n=2, m=9)
            images = _batch(n, side) / 255
            return lambda: augment(images)

        return make

    for n, side in ((128, 32), (16, 224)):
        yield Benchmark(
            f"RandAugment, uint8, {n} images of {side} pixels, each its own draw",
            ours(n, side, False),
            torchvision(n, side),
        )
        yield Benchmark(
            f"RandAugment, float, {n} images of {side} pixels (the peer draws once a batch)",
            ours(n, side, True),
            kornia(n, side),
        )
