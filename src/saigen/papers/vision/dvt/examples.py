"""Small instances of DVT's public components, and its finest transformer and the cascade side by side with timm's DeiT-S."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from saigen.example import Benchmark, Example, Part, seeded, step_of
from saigen.papers.vision.dvt.model import (
    T2T_SPLITS,
    DynamicTransformerCascade,
    FeatureReuse,
    RelationReuse,
    T2TModule,
    TokenPerformer,
    calibrate_thresholds,
    cascade_loss,
    confidence,
    dvt_deit_small,
    first_confident_exit,
)

TINY = {"img_size": 24, "splits": ((8, 8), (6, 6), (4, 4)), "embed_dim": 16, "depth": 2, "num_heads": 2}

CASCADE = """
import saigen, torch

model = saigen.create_model("dvt_deit_small", num_classes=10).eval()
images = torch.rand(2, 3, 224, 224)
logits, exits = model.predict(images, thresholds=(0.7, 0.6))  # exits: which of the 3 stages answered, from 0
model.thresholds = (0.7, 0.6)  # from now on model(images) leaves early as well
"""

T2T = """
import torch
from saigen.papers.vision.dvt import cascade_loss, dvt_t2t_vit_12

model = dvt_t2t_vit_12(num_classes=10, exits=2, drop_path_rate=0.1).train()
logits = model(torch.rand(2, 3, 224, 224))  # one for each exit
cascade_loss(logits, torch.tensor([3, 7])).backward()
"""

BUDGET = """
import torch
from saigen.papers.vision.dvt import budget_thresholds, confidence

held_out = torch.randn(3, 1000, 10)  # logits of all exits (model.forward_exits), of images held out of training
costs = (1.143e9, 3.643e9, 8.801e9)  # multiply-adds up to each exit of DVT-DeiT-S
thresholds = budget_thresholds(confidence(held_out), costs, budget=3.0e9)  # spend 3 GMACs an image on average
"""


def tiny(**options: object) -> DynamicTransformerCascade:
    return DynamicTransformerCascade(num_classes=5, **(TINY | options))


class _Loss(nn.Module):
    def forward(self, first: Tensor, second: Tensor, y: Tensor) -> Tensor:
        return cascade_loss((first, second), y)


def examples() -> Iterator[Example]:
    yield Example(
        name="DynamicTransformerCascade",
        kind="module",
        make=tiny,
        inputs=lambda g: (torch.rand(2, 3, 24, 24, generator=g),),
        code=CASCADE,
        wrong=(
            (lambda: tiny(splits=((8, 8), (8, 8))), "splits"),
            (lambda: tiny(embed="wavelet"), "embed"),
            (lambda: tiny(thresholds=(0.5,)), "thresholds"),
            (lambda: tiny()(torch.rand(1, 3, 25, 25)), "x has shape"),
            (lambda: dvt_deit_small(num_classes=-1), "num_classes"),
            (lambda: dvt_deit_small(img_size=20), "splits"),
        ),
    )
    yield Example(
        name="DynamicTransformerCascade, T2T-ViT",
        kind="module",
        make=lambda: tiny(img_size=96, embed="t2t", splits=T2T_SPLITS, exits=2),
        inputs=lambda g: (torch.rand(2, 3, 96, 96, generator=g),),
        code=T2T,
    )
    yield Example(
        name="T2TModule",
        kind="module",
        make=lambda: T2TModule(T2T_SPLITS[2], 3, 16),
        inputs=lambda g: (torch.rand(2, 3, 32, 32, generator=g),),
        code="""
import torch
from saigen.papers.vision.dvt import Split, T2TModule

tokens = T2TModule(Split(7, 4, 2), 3, 256)(torch.rand(1, 3, 224, 224))  # (1, 196, 256)
""",
    )
    yield Example(
        name="TokenPerformer",
        kind="module",
        make=lambda: TokenPerformer(27, 16),
        inputs=lambda g: (torch.rand(2, 12, 27, generator=g),),
        code="""
import torch
from saigen.papers.vision.dvt import TokenPerformer

y = TokenPerformer(147, 64)(torch.rand(2, 3136, 147))  # attention over 3,136 tokens in linear time: (2, 3136, 64)
""",
        wrong=((lambda: TokenPerformer(4, 3), "width"),),
    )
    yield Example(
        name="FeatureReuse",
        kind="module",
        make=lambda: FeatureReuse(16, grids=(3, 5), context_dim=8, hidden=12),
        inputs=lambda g: (torch.randn(2, 10, 16, generator=g),),
        code="""
import torch
from saigen.papers.vision.dvt import FeatureReuse

context = FeatureReuse(384, grids=(7, 10))(torch.rand(2, 1 + 7 * 7, 384))  # (2, 101, 48), for the MLP of one block
""",
        wrong=((lambda: FeatureReuse(16, (4, 5))(torch.rand(1, 9, 16)), "tokens"),),
    )
    yield Example(
        name="RelationReuse",
        kind="module",
        make=lambda: RelationReuse(4, grids=(3, 4)),
        inputs=lambda g: (torch.randn(2, 4, 10, 10, generator=g),),
        code="""
import torch
from saigen.papers.vision.dvt import RelationReuse

logits = torch.randn(1, 72, 50, 50)  # of 12 layers with 6 heads, over 7x7 tokens and the class token
extra = RelationReuse(72, grids=(7, 10))(logits)  # (1, 72, 101, 101), to be added to the next stage's
""",
        wrong=((lambda: RelationReuse(4, (3, 4))(torch.rand(1, 4, 9, 9)), "tokens"),),
    )
    yield Example(
        name="cascade_loss",
        kind="loss",
        make=_Loss,
        inputs=lambda g: (torch.randn(3, 5, generator=g), torch.randn(3, 5, generator=g), torch.tensor([0, 2, 4])),
        code=T2T,
    )
    yield Example(
        name="budget_thresholds",
        kind="function",
        make=lambda: lambda c: torch.tensor(calibrate_thresholds(c, (0.5, 0.25, 0.25))),
        inputs=lambda g: (torch.rand(3, 40, generator=g),),
        code=BUDGET,
        wrong=((lambda: calibrate_thresholds(torch.rand(3, 4), (0.5, 0.5)), "fractions"),),
        batch=None,
    )


def parts() -> Iterator[Part]:
    yield Part(
        "dvt_last_exit",
        "model",
        lambda classes, channels, side: _LastExit(
            img_size=side,
            splits=((4, 4), (2, 2)),
            embed_dim=48,
            depth=2,
            num_heads=2,
            num_classes=classes,
            in_chans=channels,
        ),
    )


class _LastExit(DynamicTransformerCascade):
    """In training a cascade gives the logits of every exit; who trains a classifier expects one.

    Linear layers start as Xavier has them: so narrow a network learns from that at once, and hardly from 0.02.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits if isinstance(logits, Tensor) else logits[-1]


class _Stage(nn.Module):
    """The finest transformer alone, from images to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = dvt_deit_small(feature_reuse=False, relation_reuse=False).normal_token

    def forward(self, x: Tensor) -> Tensor:
        return self.stage(x).logits


def benchmarks() -> Iterator[Benchmark]:
    images = torch.rand(8, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    def peer() -> nn.Module:
        import timm

        return timm.create_model("deit_small_patch16_224")

    for train in (False, True):
        what = "forward and backward" if train else "forward"
        yield Benchmark(
            name=f"a stage without reuse (DeiT-S), {what}, batch 8",
            ours=lambda train=train: step_of(seeded(_Stage), images, train=train),
            peer=lambda train=train: step_of(seeded(peer), images, train=train),
        )
    ten = torch.rand(10, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    yield Benchmark(
        name="cascade of DeiT-S, 5, 3 and 2 of 10 images by exit, against all stages as in the official script",
        ours=lambda: _cascade(ten, early=True),
        peer=lambda: _cascade(ten, early=False),
        extra="",
    )
    yield Benchmark(
        name="cascade of DeiT-S, 5, 3 and 2 of 10 images by exit, against DeiT-S on all",
        ours=lambda: _cascade(ten, early=True),
        peer=lambda: step_of(seeded(peer), ten, train=False),
    )


def _cascade(images: Tensor, early: bool) -> Callable[[], Tensor]:
    """Logits of each image's exit; either stages run for who needs them alone, or all do and the exit is looked up."""
    model = seeded(dvt_deit_small).eval()
    with torch.inference_mode():
        sure = confidence(torch.stack(model.forward_exits(images)))
    thresholds = calibrate_thresholds(sure, (0.5, 0.3, 0.2))

    @torch.inference_mode()
    def leaving() -> Tensor:
        return model.predict(images, thresholds)[0]

    @torch.inference_mode()
    def whole() -> Tensor:
        logits = torch.stack(model.forward_exits(images))
        return logits[first_confident_exit(confidence(logits), thresholds), torch.arange(len(images))]

    return leaving if early else whole
