"""Small instances of EfficientNet and its parts, and EfficientNet-B0 beside timm's."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from saigen.example import Benchmark, Example, Part, beside_timm
from saigen.papers.vision.efficientnet import (
    EfficientNet,
    RMSpropTF,
    Scale,
    Stage,
    compound_scale,
    efficientnet_b0,
    search_scaling,
)
from saigen.speed import fastest

MODEL_CODE = """
import torch
import saigen

model = saigen.create_model("tf_efficientnet_b0", num_classes=10).eval()
logits = model(torch.rand(2, 3, 224, 224))
print(logits.shape, model.default_cfg["input_size"])
"""

SCALING_CODE = """
from saigen.papers.vision.efficientnet import EfficientNet, compound_scale

scale = compound_scale(1.0)          # alpha, beta, gamma to the power of phi
print(scale, scale.cost)             # costs about twice as much
model = EfficientNet(scale.width, scale.depth, resolution=round(224 * scale.resolution))
"""

SEARCH_CODE = """
from saigen.papers.vision.efficientnet import search_scaling

def train_and_score(scale):          # train a network of this depth, width and resolution; held-out accuracy
    return -abs(scale.depth - 1.2) - abs(scale.width - 1.1)

best, scores = search_scaling(train_and_score, grid=(1.0, 1.05, 1.1, 1.15, 1.2, 1.25))
print(best, len(scores))
"""

OPTIMIZER_CODE = """
import torch
from saigen.papers.vision.efficientnet import RMSpropTF

model = torch.nn.Linear(4, 2)
optimizer = RMSpropTF(model.parameters(), lr=0.01, weight_decay=1e-5)
model(torch.rand(8, 4)).square().mean().backward()
optimizer.step()
"""


def examples() -> Iterator[Example]:
    # the first blocks of both kinds are enough to meet every layer, and compile in seconds
    stages = (
        Stage(repeats=1, kernel=3, stride=1, expansion=1, channels=16),
        Stage(repeats=2, kernel=5, stride=2, expansion=6, channels=24),
    )
    yield Example(
        name="efficientnet",
        kind="module",
        make=lambda: EfficientNet(0.5, stages=stages, head_channels=128, num_classes=5, resolution=32),
        inputs=lambda generator: (torch.rand(2, 3, 33, 40, generator=generator),),
        code=MODEL_CODE,
        wrong=(
            (lambda: EfficientNet(drop_rate=1.5), "drop_rate"),
            (lambda: EfficientNet(width=0.0), "width"),
            (lambda: efficientnet_b0(in_chans=0), "in_chans"),
        ),
    )
    yield Example(
        name="compound_scale",
        kind="function",
        make=lambda: compound_scale,
        inputs=lambda generator: (1.0,),
        code=SCALING_CODE,
        wrong=((lambda: compound_scale(1.0, alpha=0.5), "alpha"),),
        batch=None,
    )
    yield Example(
        name="search_scaling",
        kind="function",
        make=lambda: search_scaling,
        inputs=lambda generator: (Scale.cost.fget, (1.0, 1.1, 1.2)),
        code=SEARCH_CODE,
        wrong=((lambda: search_scaling(lambda scale: 0.0, grid=(1.0,)), "grid"),),
        batch=None,
    )
    yield Example(
        name="rmsprop_tf",
        kind="optimizer",
        make=lambda params: RMSpropTF(params, lr=0.01),
        code=OPTIMIZER_CODE,
        wrong=((lambda: RMSpropTF([torch.zeros(1, requires_grad=True)], alpha=-1.0), "alpha"),),
        batch=None,
    )


def parts() -> Iterator[Part]:
    stages = (Stage(1, 3, 1, 1, 8), Stage(2, 3, 2, 4, 16), Stage(2, 5, 2, 4, 32))
    yield Part(
        "efficientnet",
        "model",
        lambda classes, channels, side: EfficientNet(
            stages=stages,
            stem_channels=16,
            head_channels=64,
            num_classes=classes,
            in_chans=channels,
            resolution=side,
            bn_momentum=0.1,  # with 0.01, statistics are still those of the start after a few hundred steps
        ),
    )
    # momentum 0.9 lies on top of the rate here and in AdamW does not
    yield Part(
        "RMSpropTF",
        "method",
        lambda recipe: replace(
            recipe, optimizer=lambda model, rate: RMSpropTF(model.parameters(), lr=rate, weight_decay=1e-5)
        ),
    )


def benchmarks() -> Iterator[Benchmark]:
    build = partial(efficientnet_b0, drop_rate=0.0, drop_path_rate=0.0)
    first, *others = beside_timm("efficientnet_b0", build, "efficientnet_b0")

    def quickest() -> Callable[[], Any]:
        x = torch.rand(8, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        return partial(fastest(build().eval(), x), x)

    yield from (first, *others)
    yield Benchmark(
        name="efficientnet_b0 in its fastest form (outputs within 2 %) against eager, forward, batch 8",
        ours=quickest,
        peer=first.peer,
    )
