"""Small instances of the affinity loss and its head; the benchmarks beside torch and the formula of public implementations."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from saigen.example import Benchmark, Example, Part, Recipe
from saigen.papers.losses.affinity import (
    AffinityHead,
    AffinityLoss,
    affinity_loss,
    diversity_regularizer,
    gaussian_affinity,
    max_margin_loss,
)


def _batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.rand(8, 4, generator=generator), torch.arange(8) % 4, torch.randn(4, 2, 3, generator=generator)


def examples() -> Iterator[Example]:
    yield Example(
        name="affinity_loss",
        kind="loss",
        make=lambda: AffinityLoss(margin=0.75),
        inputs=_batch,
        code="""import torch
from saigen.papers.losses.affinity import AffinityHead, AffinityLoss

backbone = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.BatchNorm1d(64))
head = AffinityHead(64, num_classes=3, sigma=128.0)      # in the place of torch.nn.Linear(64, 3)
criterion = AffinityLoss(margin=0.75)
x, y = torch.randn(32, 16), torch.arange(32) % 3
criterion(head(backbone(x)), y, head.centers).backward()
print(head(backbone(x)).argmax(1))                       # the class of the nearest centre""",
        wrong=(
            (lambda: AffinityLoss(margin=0.0), "margin is 0.0"),
            (lambda: AffinityLoss(margin=1.5), "margin is 1.5"),
            (lambda: AffinityLoss(diversity=-1.0), "diversity is -1.0"),
            (lambda: AffinityLoss(reduction="max"), "reduction"),
            (lambda: max_margin_loss(torch.zeros(2, 3), torch.tensor([0, 3])), "target[1] is 3"),
            (lambda: max_margin_loss(torch.zeros(2, 3), torch.tensor([0, 1, 2])), "target has shape (3,)"),
            (
                lambda: affinity_loss(torch.zeros(1, 3), torch.tensor([0]), torch.zeros(3, 2)),
                "centers has shape (3, 2)",
            ),
        ),
    )
    yield Example(
        name="max_margin_without_diversity",
        kind="loss",
        make=lambda: AffinityLoss(margin=1.0, diversity=0.0, reduction="none"),
        inputs=_batch,
        code="""import torch
from saigen.papers.losses.affinity import diversity_regularizer, gaussian_affinity, max_margin_loss

features, centers = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[[0.0, 1.0]], [[2.0, 0.0]], [[1.0, 2.0]]])
affinity = gaussian_affinity(features, centers, sigma=2.0)
print(max_margin_loss(affinity, torch.tensor([0, 2]), margin=0.5))   # 0.3951
print(diversity_regularizer(centers))                                # 2""",
        wrong=((lambda: diversity_regularizer(torch.zeros(1, 1, 3)), "2 centres or more"),),
    )
    yield Example(
        name="affinity_head",
        kind="module",
        make=lambda: AffinityHead(6, num_classes=4, num_centers=3, sigma=8.0),
        inputs=lambda generator: (torch.randn(5, 6, generator=generator),),
        code="""import torch
from saigen.papers.losses.affinity import AffinityHead

features, y = torch.randn(90, 64), torch.arange(90) % 3
head = AffinityHead(64, num_classes=3, num_centers=5)
head.fit_centers(features, y).fit_sigma(features)        # amid the features that are there, so that no centre lies dead
print(head.sigma, head.regularizer(), head.equidistance())""",
        wrong=(
            (lambda: AffinityHead(0, 4), "in_features"),
            (lambda: AffinityHead(6, 1), "num_classes"),
            (lambda: AffinityHead(6, 4, 0), "num_centers"),
            (lambda: AffinityHead(6, 4, sigma=0.0), "sigma is 0.0"),
            (lambda: AffinityHead(6, 4)(torch.zeros(2, 5)), "features has shape (2, 5)"),
            (lambda: AffinityHead(2, 3).fit_centers(torch.zeros(2, 2), torch.tensor([0, 2])), "class 1 has 0 samples"),
            (lambda: AffinityHead(2, 3).fit_sigma(torch.zeros(2, 2), quantile=0.0), "quantile is 0.0"),
        ),
    )


def parts() -> Iterator[Part]:
    yield Part("Affinity", "method", _with_affinity)


def _with_affinity(recipe: Recipe) -> Recipe:
    """What were the logits become the features: the head finds its centres among them."""
    classes = len(recipe.class_counts)
    criterion = AffinityLoss()

    def loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return criterion(model(images), labels, model[-1].centers)

    return replace(recipe, model=nn.Sequential(recipe.model, AffinityHead(classes, classes)), loss=loss)


def benchmarks() -> Iterator[Benchmark]:
    for peer, batch in (("torch.cdist and multi_margin_loss", 1024), ("differences, as public implementations", 128)):
        yield Benchmark(
            name=f"affinities of 100 classes x 5 centres, hinge and diversity, {batch} x 128, against {peer}, with backward",
            ours=_step("ours", batch),
            peer=_step(peer, batch),
        )


def _step(whose: str, batch: int) -> Callable[[], Callable[[], Any]]:
    def build() -> Callable[[], Any]:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(batch, 128, generator=generator).requires_grad_()
        centers = torch.randn(100, 5, 128, generator=generator).requires_grad_()
        target = torch.randint(100, (batch,), generator=generator)

        def ours() -> None:
            affinity = gaussian_affinity(features, centers, 128.0)
            affinity_loss(affinity, target, centers).backward()

        def peer() -> None:
            every = centers.flatten(0, 1)
            if whose.startswith("torch"):
                square = torch.cdist(features, every).square().unflatten(1, (100, 5))
                pairs = torch.pdist(every).square()
            else:
                square = (features[:, None, None] - centers).square().sum(-1)
                pairs = (every[:, None] - every).square().sum(-1)[*torch.triu_indices(500, 500, 1)]
            affinity = torch.exp(-square / 128.0).amax(-1)
            margin = 100 * F.multi_margin_loss(affinity, target, margin=0.75)
            (margin + (pairs - pairs.mean()).square().mean()).backward()

        return ours if whose == "ours" else peer

    return build
