"""Small instances of Faster AutoAugment's components, and the part a found policy plays in any training."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from saigen.example import Benchmark, Example, Part, Recipe
from saigen.papers.augmentation.faster_autoaugment import (
    AugmentationPolicy,
    DifferentiablePolicy,
    PolicyCritic,
    PolicySearch,
    apply_operation,
    policy_operations,
    search_policy,
)

_FEW = ("Rotate", "Invert", "Solarize")


def _images(generator: torch.Generator) -> tuple[torch.Tensor]:
    return (torch.randint(0, 256, (4, 3, 16, 16), generator=generator) / 255,)


def _critic() -> PolicyCritic:
    return PolicyCritic(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Softplus(), nn.Flatten()), 256, num_classes=4)


def examples() -> Iterator[Example]:
    yield Example(
        name="differentiable_policy",
        kind="transform",
        make=lambda: DifferentiablePolicy(_FEW, num_sub_policies=2),
        inputs=_images,
        code="""import torch
from saigen.papers.augmentation.faster_autoaugment import DifferentiablePolicy, PolicyCritic, search_policy

policy = DifferentiablePolicy("paper", num_sub_policies=2)            # 10 in the paper
trunk = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.ReLU(), torch.nn.Flatten())   # any; a Wide-ResNet
critic = PolicyCritic(trunk, num_features=8 * 8 * 8, num_classes=10)
images, labels = torch.rand(64, 3, 16, 16), torch.randint(10, (64,))  # float in [0, 1]
loader = torch.utils.data.DataLoader(list(zip(images, labels)), batch_size=32, shuffle=True)
search = search_policy(policy, critic, loader, epochs=1)              # 20 in the paper
print(search.passes, policy.freeze().operation_shares())""",
        wrong=(
            (lambda: DifferentiablePolicy("imagenet"), "ops"),
            (lambda: DifferentiablePolicy(temperature=-1.0), "temperature"),
            (lambda: search_policy(DifferentiablePolicy(_FEW), _critic(), []), "loader"),
        ),
    )
    yield Example(
        name="augmentation_policy",
        kind="transform",
        make=_frozen,
        inputs=_images,
        code="""import tempfile
import torch
from saigen.papers.augmentation.faster_autoaugment import AugmentationPolicy, DifferentiablePolicy

policy = DifferentiablePolicy("paper").freeze()                # after a search
with tempfile.TemporaryDirectory() as folder:
    policy.save(f"{folder}/policy.json")                       # plain JSON
    policy = AugmentationPolicy.load(f"{folder}/policy.json")
images = torch.rand(64, 3, 32, 32)                             # float in [0, 1]
print(policy(images, generator=torch.Generator().manual_seed(0)).shape)
by_hand = AugmentationPolicy.from_dict({"sub_policies": [[[{"operation": "Rotate", "magnitude": 0.5, "probability": 0.8}]]]})
print(by_hand.mean_argument("Rotate"))                         # degrees""",
        wrong=(
            (lambda: AugmentationPolicy.from_dict({"sub_policies": []}), "sub_policies"),
            (lambda: AugmentationPolicy(("Invert",), *torch.full((3, 1, 1, 1), 2.0)), "outside"),
        ),
    )
    yield Example(
        name="policy_critic",
        kind="module",
        make=_critic,
        inputs=_images,
        code="""import torch
from saigen.papers.augmentation.faster_autoaugment import PolicyCritic, gradient_penalty

critic = PolicyCritic(torch.nn.Flatten(), num_features=3 * 16 * 16, num_classes=10)
images = torch.rand(8, 3, 16, 16)
logits, scores = critic(images)
print(logits.shape, scores.shape, gradient_penalty(critic, images, 1 - images))""",
        wrong=((lambda: PolicyCritic(nn.Flatten(), 0, 10), "num_features"),),
    )
    yield Example(
        name="policy_search",
        kind="function",
        make=lambda: _searched,
        inputs=lambda generator: (*_images(generator), torch.arange(4), generator),
        code="""import torch
from saigen.papers.augmentation.faster_autoaugment import DifferentiablePolicy, PolicyCritic, PolicySearch

# What is augmented and what it is to look like may come from two places: scans, and photographs of the same letters.
source, target = torch.rand(16, 1, 16, 16), torch.rand(16, 1, 16, 16)
labels = torch.randint(5, (16,))
policy = DifferentiablePolicy(("Rotate", "ShearX", "Brightness"), num_sub_policies=2)
search = PolicySearch(policy, PolicyCritic(torch.nn.Flatten(), 256, num_classes=5), policy_lr=5e-3)
for step in range(3):
    losses = search.step((source, labels), (target, labels))
print(losses)""",
        wrong=((lambda: PolicySearch(DifferentiablePolicy(_FEW), _critic(), gp_norm="pixel"), "gp_norm"),),
        batch=None,
    )


def _frozen() -> AugmentationPolicy:
    return DifferentiablePolicy(_FEW, num_sub_policies=2, generator=torch.Generator().manual_seed(0)).freeze()


def _searched(x: torch.Tensor, y: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The weights of a policy after two steps."""
    policy = DifferentiablePolicy(_FEW, num_sub_policies=2, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        critic = _critic()
    search = PolicySearch(policy, critic)
    for _ in range(2):
        search.step((x, y), (x.flip(0), y.flip(0)), generator=generator)
    return policy.weights.detach()


def parts() -> Iterator[Part]:
    """A found policy, written by hand: small turns and moves, and some noise in colour."""
    yield Part("FasterAutoAugment", "method", _augmented)


def _augmented(recipe: Recipe) -> Recipe:
    affine = [("Rotate", 0.4), ("ShearX", 0.4), ("TranslateX", 0.25), ("TranslateY", 0.25)]
    tone = [("Contrast", 0.4), ("Brightness", 0.4), ("Sharpness", 0.6), ("AutoContrast", 0.0)]
    sub_policy = [
        [{"operation": name, "magnitude": magnitude, "probability": 0.6} for name, magnitude in stage]
        for stage in (affine, tone)
    ]
    policy = AugmentationPolicy.from_dict({"sub_policies": [sub_policy]})

    def transform(generator: torch.Generator, images: torch.Tensor, labels: torch.Tensor):
        images, labels = recipe.transform(generator, images, labels)
        return policy(images, generator=generator), labels

    return replace(recipe, transform=transform)


def benchmarks() -> Iterator[Benchmark]:
    """The operations beside kornia's, on whole batches with a number an image; and a found policy beside its AutoAugment."""
    arguments = {"Rotate": 20.0, "ShearX": 0.2, "Equalize": None, "Posterize": 0.5, "Sharpness": -0.5}

    def batch(n: int, side: int) -> torch.Tensor:
        return torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(0)) / 255

    def ours(name: str, n: int, side: int) -> Callable[[], Callable[[], Any]]:
        def build() -> Callable[[], Any]:
            images, value = batch(n, side), arguments[name]
            argument = None if value is None else torch.full((n,), value)
            return lambda: apply_operation(name, images, argument)

        return build

    def kornia(name: str, n: int, side: int) -> Callable[[], Callable[[], Any]]:
        def build() -> Callable[[], Any]:
            from kornia import enhance
            from kornia.geometry import transform

            images, value = batch(n, side), arguments[name]
            number = None if value is None else torch.full((n,), value)
            shear = torch.stack([torch.full((n,), 0.2), torch.zeros(n)], 1)
            calls = {
                "Rotate": lambda: transform.rotate(images, number),
                "ShearX": lambda: transform.shear(images, shear),
                "Equalize": lambda: enhance.equalize(images),
                "Posterize": lambda: enhance.posterize(images, torch.full((n,), 4)),
                "Sharpness": lambda: enhance.sharpness(images, torch.full((n,), 1.5)),
            }
            return calls[name]

        return build

    def policy(n: int, side: int, chunks: int) -> Callable[[], Any]:
        generator = torch.Generator().manual_seed(0)
        found = DifferentiablePolicy(policy_operations("paper"), num_sub_policies=25, generator=generator)
        images, frozen = batch(n, side), found.freeze(num_chunks=chunks)
        return lambda: frozen(images)

    def auto_augment(n: int, side: int) -> Callable[[], Any]:
        from kornia.augmentation.auto import AutoAugment

        images, augment = batch(n, side), AutoAugment("cifar10")
        return lambda: augment(images)

    for name in arguments:
        yield Benchmark(f"{name}, 128 images of 32 pixels", ours(name, 128, 32), kornia(name, 128, 32))
    for n, side in ((128, 32), (16, 224)):
        yield Benchmark(
            f"a policy of 25 sub-policies, {n} images of {side} pixels, drawn once a batch",
            lambda n=n, side=side: policy(n, side, chunks=1),
            lambda n=n, side=side: auto_augment(n, side),
        )
