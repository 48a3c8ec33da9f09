"""Small instances of the room's public components, and the Frechet distance side by side with the usual matrix root."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saigen.example import Benchmark, Example
from saigen.papers.augmentation.classification_accuracy_score import (
    VQVAE,
    Discriminator,
    Generator,
    PixelCNN,
    VQVAESampler,
    cas_resnet56,
    classification_accuracy_score,
    draw_labels,
    feature_moments,
    frechet_distance,
    inception_score,
    naive_augmentation_score,
    rank_correlation,
    relative_drop,
    sample_set,
    score_classifier,
)

IMAGES, LABELS = torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])


def _labels(generator: torch.Generator, n: int = 4) -> Tensor:
    return torch.randint(0, 3, (n,), generator=generator)


def _nearest_mean(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    means = torch.stack([x[y == k].flatten(1).mean(dim=0) for k in range(3)])
    return lambda images: -torch.cdist(images.flatten(1), means)


def _score(x: Tensor, y: Tensor) -> Tensor:
    score = classification_accuracy_score(
        _nearest_mean,
        lambda labels, generator: labels[:, None].float() + torch.randn(len(labels), 2, generator=generator) * 0.1,
        y,
        (x, y),
        generator=torch.Generator().manual_seed(0),
    )
    return torch.from_numpy(score.per_class)


def examples():
    """The score, the distances beside it, and the subjects."""
    yield Example(
        name="classification_accuracy_score",
        kind="function",
        make=lambda: _score,
        inputs=lambda generator: (
            torch.arange(30)[:, None].remainder(3) + torch.randn(30, 2, generator=generator) * 0.1,
            torch.arange(30) % 3,
        ),
        code="""
import torch
from saigen.papers.augmentation.classification_accuracy_score import classification_accuracy_score, score_classifier

y = torch.arange(300) % 3
x = torch.randn(300, 2) + 4 * torch.nn.functional.one_hot(y, 3)[:, :2]       # real images, three classes

def train(x, y):                                                             # the fixed recipe
    means = torch.stack([x[y == k].mean(dim=0) for k in range(3)])
    return lambda images: -torch.cdist(images, means)

def sampler(labels, generator):                                              # it mixes up class 2 with class 0
    at = 4 * torch.nn.functional.one_hot(labels, 3)[:, :2] * (labels[:, None] != 2)
    return torch.randn(len(labels), 2, generator=generator) + at.float()

cas = classification_accuracy_score(train, sampler, y, (x, y), generator=torch.Generator().manual_seed(0))
real = score_classifier(train(x, y), x, y)
print(cas.top1, cas.per_class, f"drop {cas.relative_drop(real):.1%}")
""",
        wrong=(
            (lambda: score_classifier(lambda x: x.flatten(1), IMAGES, LABELS[:2]), "validation"),
            (lambda: score_classifier(lambda x: x.flatten(1)[:, :2], IMAGES, LABELS), "logits"),
            (lambda: sample_set(lambda y, g: IMAGES[:1], LABELS, generator=torch.Generator()), "sampler"),
            (lambda: draw_labels(LABELS, 0, generator=torch.Generator()), "count"),
            (lambda: draw_labels(LABELS[:0], generator=torch.Generator()), "labels"),
            (
                lambda: naive_augmentation_score(
                    _nearest_mean,
                    (IMAGES, LABELS),
                    lambda y, g: IMAGES,
                    [-1.0],
                    (IMAGES, LABELS),
                    generator=torch.Generator(),
                ),
                "ratios",
            ),
            (lambda: relative_drop(0.0, 0.1), "real"),
        ),
        batch=None,
    )
    yield Example(
        name="frechet_distance",
        kind="function",
        make=lambda: lambda a, b: frechet_distance(*feature_moments(a), *feature_moments(b)),
        inputs=lambda generator: tuple(torch.randn(2, 40, 6, generator=generator).numpy()),
        code="""
import numpy as np
from saigen.papers.augmentation.classification_accuracy_score import feature_moments, frechet_distance, inception_score

rng = np.random.default_rng(0)
real, fake = rng.normal(size=(500, 8)), rng.normal(0.5, 1.2, size=(500, 8))
print(frechet_distance(*feature_moments(real), *feature_moments(fake)), inception_score(np.eye(10)))
""",
        wrong=(
            (lambda: feature_moments(np.zeros((1, 3))), "features"),
            (lambda: frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3)), "covariances"),
            (lambda: inception_score(np.ones((2, 2))), "row 0"),
            (lambda: inception_score(np.eye(2), splits=3), "splits"),
            (lambda: rank_correlation({"a": 1.0}, {"a": 1.0}), "three"),
        ),
        batch=None,
    )
    yield Example(
        name="Generator",
        kind="module",
        make=lambda: Generator(3, 1, 8, width=8, latent=4),
        inputs=lambda generator: (torch.randn(4, 4, generator=generator), _labels(generator)),
        code="""
import torch
from saigen.papers.augmentation.classification_accuracy_score import Generator

G = Generator(num_classes=10, channels=1, size=8)
print(G.sample(torch.arange(10), torch.Generator().manual_seed(0), truncation=0.5).shape)
""",
        wrong=(
            (lambda: Generator(size=10), "size"),
            (lambda: Generator().sample(LABELS, torch.Generator(), truncation=0.0), "truncation"),
        ),
    )
    yield Example(
        name="Discriminator",
        kind="module",
        make=lambda: Discriminator(3, 1, width=8),
        inputs=lambda generator: (torch.rand(4, 1, 8, 8, generator=generator), _labels(generator)),
        code="""
import torch
from saigen.papers.augmentation.classification_accuracy_score import Discriminator, discriminator_loss

D = Discriminator(num_classes=10)
x, y = torch.rand(6, 1, 8, 8), torch.arange(6)
print(discriminator_loss(D(x, y), D(torch.zeros_like(x), y)))
""",
    )
    yield Example(
        name="PixelCNN",
        kind="module",
        make=lambda: PixelCNN(3, 5, 4, width=8, depth=2),
        inputs=lambda generator: (torch.randint(0, 5, (4, 4, 4), generator=generator), _labels(generator)),
        code="""
import torch
from saigen.papers.augmentation.classification_accuracy_score import PixelCNN

model = PixelCNN(num_classes=10, levels=17, size=8, width=16, depth=2)
x, y = torch.rand(5, 1, 8, 8), torch.arange(5)
print(model.loss(model.to_grid(x), y), model.sample(y, torch.Generator().manual_seed(0)).shape)
""",
        wrong=((lambda: PixelCNN(levels=1), "levels"), (lambda: PixelCNN(depth=0), "depth")),
    )
    yield Example(
        name="VQVAE",
        kind="module",
        make=lambda: VQVAE(1, 8, 6, 4),
        inputs=lambda generator: (torch.rand(4, 1, 8, 8, generator=generator),),
        code="""
import torch
from saigen.papers.augmentation.classification_accuracy_score import VQVAE, PixelCNN, VQVAESampler

autoencoder, prior = VQVAE(codes=32), PixelCNN(num_classes=10, levels=32, size=4, width=16, depth=2)
x, y = torch.rand(5, 1, 8, 8), torch.arange(5)
print(autoencoder.loss(x), prior.loss(autoencoder.encode(x), y))
print(VQVAESampler(autoencoder, prior).sample(y, torch.Generator().manual_seed(0)).shape)
""",
        wrong=(
            (lambda: VQVAE(codes=1), "codes"),
            (lambda: VQVAE(decay=1.0), "decay"),
            (lambda: VQVAESampler(VQVAE(codes=8), PixelCNN(levels=9, size=4)), "prior"),
        ),
    )
    yield Example(
        name="cas_resnet56",
        kind="module",
        make=lambda: cas_resnet56(num_classes=3, in_chans=1),
        inputs=lambda generator: (torch.rand(2, 1, 8, 8, generator=generator),),
        code="""
import torch
from saigen.papers.augmentation.classification_accuracy_score import cas_resnet56

model = cas_resnet56()
print(sum(p.numel() for p in model.parameters()), model(torch.rand(2, 3, 32, 32)).shape)
""",
        wrong=((lambda: cas_resnet56(in_chans=0), "in_chans is 0"),),
    )


def _distance(dimensions: int, peer: bool) -> Callable[[], Any]:
    def build() -> Callable[[], Any]:
        rng = np.random.default_rng(0)
        one, two = (feature_moments(rng.normal(scale=s, size=(2 * dimensions, dimensions))) for s in (1.0, 1.3))
        if not peer:
            return lambda: frechet_distance(*one, *two)
        from scipy.linalg import sqrtm

        def usual() -> float:
            (m1, C1), (m2, C2) = one, two
            return ((m1 - m2) ** 2).sum() + np.trace(C1 + C2 - 2 * sqrtm(C1 @ C2).real)

        return usual

    return build


def benchmarks():
    """The formula as it is usually computed, by scipy's root of C1 C2."""
    for dimensions in (64, 512):
        yield Benchmark(
            name=f"frechet_distance, {dimensions} features",
            ours=_distance(dimensions, peer=False),
            peer=_distance(dimensions, peer=True),
        )
