"""Small instances of the room's public components, and the resizer's speed beside its layers in their usual form."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from saigen.example import Benchmark, Example, Part, Recipe
from saigen.papers.vision.learned_resizer import (
    LearnedResizer,
    ResizedClassifier,
    joint_param_groups,
    resizer_macs,
)

RESIZER = """
import torch
from saigen.papers.vision.learned_resizer import LearnedResizer

resizer = LearnedResizer(64)  # init="identity" starts as plain bilinear resizing
y = resizer(torch.randn(2, 3, 128, 96))  # (2, 3, 64, 64)
z = resizer(torch.randn(2, 3, 50, 50), size=(80, 70))  # any input to any size
"""

JOINT = """
import torch
from saigen.nn.resnet import resnet18
from saigen.papers.vision.learned_resizer import LearnedResizer, ResizedClassifier, joint_param_groups

model = ResizedClassifier(LearnedResizer(32), resnet18(num_classes=10))
optimizer = torch.optim.SGD(joint_param_groups(model, lr=0.005, resizer_lr=0.01), momentum=0.9)
loss = torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.tensor([0, 1, 2, 3]))
loss.backward()
optimizer.step()
"""

COST = """
from saigen.papers.vision.learned_resizer import resizer_macs

print(resizer_macs(width=16, num_blocks=1, in_size=448, out_size=224))  # 988266496
"""


def small_classifier() -> ResizedClassifier:
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    return ResizedClassifier(LearnedResizer(10, width=4), backbone)


def examples() -> Iterator[Example]:
    yield Example(
        name="LearnedResizer",
        kind="module",
        make=lambda: LearnedResizer((9, 12), width=4, num_blocks=2),
        inputs=lambda g: (torch.randn(2, 3, 21, 17, generator=g),),
        code=RESIZER,
        wrong=(
            (lambda: LearnedResizer(0), "size"),
            (lambda: LearnedResizer(8, width=0), "width"),
            (lambda: LearnedResizer(8, 3, 4), "out_chans"),
            (lambda: LearnedResizer(8, mode="trilinear"), "mode"),
            (lambda: LearnedResizer(8)(torch.rand(1, 1, 9, 9)), "channels"),
        ),
    )
    yield Example(
        name="ResizedClassifier",
        kind="module",
        make=small_classifier,
        inputs=lambda g: (torch.randn(2, 3, 21, 17, generator=g),),
        code=JOINT,
        wrong=((lambda: joint_param_groups(small_classifier(), lr=-1.0), "lr"),),
    )
    yield Example(
        name="resizer_macs",
        kind="function",
        make=lambda: resizer_macs,
        inputs=lambda g: (16, 1, 448, 224),
        code=COST,
        wrong=((lambda: resizer_macs(16, 1, 0, 224), "in_size"),),
        batch=None,
    )


def parts() -> Iterator[Part]:
    yield Part("LearnedResizer", "method", _resized)


def _resized(recipe: Recipe) -> Recipe:
    """Images pass through the resizer at their own size: what it learns is what to show the model."""
    resizer = LearnedResizer(recipe.side, in_chans=recipe.channels)
    return replace(recipe, model=ResizedClassifier(resizer, recipe.model))


def benchmarks() -> Iterator[Benchmark]:
    for train in (False, True):
        what = "forward and backward" if train else "forward"
        yield Benchmark(
            name=f"resizer, 448 to 224 pixels, {what}, against the layers one by one, batch 4",
            ours=_step(LearnedResizer, train),
            peer=_step(_LayerByLayer, train),
        )


class _LayerByLayer(nn.Module):
    """The resizer as it is usually put together in PyTorch, of modules; there is no public package to compare with."""

    def __init__(self, size: int, width: int = 16) -> None:
        super().__init__()
        self.size = size
        self.before = nn.Sequential(
            nn.Conv2d(3, width, 7, padding=3), nn.LeakyReLU(0.2), nn.Conv2d(width, width, 1), nn.LeakyReLU(0.2),
            nn.BatchNorm2d(width),
        )  # fmt: skip
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.after = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.last = nn.Conv2d(width, 3, 7, padding=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        resized = F.interpolate(self.before(x), self.size, mode="bilinear", align_corners=False)
        features = resized + self.after(resized + self.block(resized))
        return F.interpolate(x, self.size, mode="bilinear", align_corners=False) + self.last(features)


def _step(make: Callable[[int], nn.Module], train: bool) -> Callable[[], Callable[[], Any]]:
    def build() -> Callable[[], Any]:
        model, x = make(224).train(train), torch.rand(4, 3, 448, 448, generator=torch.Generator().manual_seed(0))

        @torch.inference_mode()
        def forward() -> Any:
            return model(x)

        def forward_and_backward() -> Any:
            model.zero_grad()
            model(x).square().mean().backward()

        return forward_and_backward if train else forward

    return build
