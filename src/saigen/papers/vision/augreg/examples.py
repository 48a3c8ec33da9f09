"""Small instances of AugReg's public components, and its ViT and hybrid side by side with timm's."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from saigen.example import Benchmark, Example, Part, Recipe
from saigen.papers.vision.augreg.model import (
    AugRegViT,
    HybridEmbed,
    StdConv2d,
    resize_pos_embed,
    vit_small_patch16_224,
    vit_small_r26_s32_224,
)
from saigen.papers.vision.augreg.recipe import AugReg, data_multiplier, mixup, sigmoid_xent

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}

MODEL = """
import saigen, torch

model = saigen.create_model("vit_tiny_patch16_224", num_classes=10)  # weights="Ti_16-i21k-300ep-….npz", or timm's
images = 2 * torch.rand(2, 3, 224, 224) - 1  # scaled to [-1, 1]
logits = model.eval()(images)
"""

HYBRID = """
import saigen, torch

model = saigen.create_model("vit_tiny_r_s16_p8_224", num_classes=10).eval()
features = model.forward_features(2 * torch.rand(1, 3, 224, 224) - 1)  # (1, 50, 192), the class token first
"""

RECIPE = """
import torch
from saigen.papers.vision.augreg import AugReg, augreg_grid, kernel_groups, sigmoid_xent, vit_tiny_patch16_224

cell = augreg_grid()[14]  # medium1, no dropout, weight decay 0.03
augment = AugReg(cell.augmentation, num_classes=10, img_size=32)
model = vit_tiny_patch16_224(num_classes=10, img_size=32, depth=2, head_bias=-2.2, **cell.model_options)
optimizer = torch.optim.AdamW(kernel_groups(model, lr=1e-3, weight_decay=cell.weight_decay))
images, targets = augment(torch.rand(8, 3, 32, 32), torch.randint(10, (8,)))  # targets are soft: (8, 10)
sigmoid_xent(model(2 * images - 1), targets).backward()
optimizer.step()
"""

MULTIPLIER = """
from saigen.papers.vision.augreg import data_multiplier

data_multiplier([500, 1000, 2000, 4000], [0.61, 0.70, 0.78, 0.85], accuracy=0.80)  # 4.9 times the 500 images
"""


def tiny(**options: object) -> AugRegViT:
    return AugRegViT(**(TINY | options))


class _Augment(nn.Module):
    """Soft targets are made of the labels that go along with the images."""

    def __init__(self) -> None:
        super().__init__()
        self.augment = AugReg("medium2", num_classes=5, img_size=16)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.augment(x, y)


def examples() -> Iterator[Example]:
    yield Example(
        name="AugRegViT",
        kind="module",
        make=tiny,
        inputs=lambda g: (torch.rand(2, 3, 32, 32, generator=g),),
        code=MODEL,
        wrong=(
            (lambda: tiny(img_size=30), "img_size"),
            (lambda: tiny(num_heads=3), "num_heads"),
            (lambda: tiny(resnet=(1, 1, 1, 1)), "resnet"),
            (lambda: tiny()(torch.rand(1, 3, 16, 16)), "x has shape"),
            (lambda: vit_small_patch16_224(num_classes=-1), "num_classes"),
        ),
    )
    yield Example(
        name="AugRegViT, hybrid",
        kind="module",
        make=lambda: tiny(resnet=(1, 1)),
        inputs=lambda g: (torch.rand(2, 3, 32, 32, generator=g),),
        code=HYBRID,
    )
    yield Example(
        name="HybridEmbed",
        kind="module",
        make=lambda: HybridEmbed((), 2, 3, 16),
        inputs=lambda g: (torch.rand(2, 3, 16, 16, generator=g),),
        code="""
import torch
from saigen.papers.vision.augreg import HybridEmbed

tokens = HybridEmbed((2, 2, 2, 2), 1, 3, 384)(torch.rand(1, 3, 224, 224))  # (1, 49, 384)
""",
    )
    yield Example(
        name="StdConv2d",
        kind="module",
        make=lambda: StdConv2d(4, 8, 3, 2),
        inputs=lambda g: (torch.rand(2, 4, 9, 8, generator=g),),
        code="""
import torch
from saigen.papers.vision.augreg import StdConv2d

y = StdConv2d(3, 64, 7, 2)(torch.rand(1, 3, 224, 224))  # (1, 64, 112, 112), padded as TensorFlow pads
""",
    )
    yield Example(
        name="AugReg",
        kind="transform",
        make=_Augment,
        inputs=lambda g: (torch.rand(4, 3, 16, 16, generator=g), torch.tensor([0, 1, 4, 2])),
        code=RECIPE,
        wrong=(
            (lambda: AugReg("brutal", 10), "setting"),
            (lambda: AugReg("none", 0), "num_classes"),
            (lambda: mixup(torch.rand(2, 3), torch.rand(2, 3), -1.0), "alpha"),
        ),
    )
    yield Example(
        name="sigmoid_xent",
        kind="loss",
        make=_Loss,
        inputs=lambda g: (torch.randn(3, 5, generator=g), torch.rand(3, 5, generator=g)),
        code=RECIPE,
    )
    yield Example(
        name="resize_pos_embed",
        kind="function",
        make=lambda: lambda positions: resize_pos_embed(positions, (5, 5)),
        inputs=lambda g: (torch.randn(1, 10, 4, generator=g),),
        code="""
import torch
from saigen.papers.vision.augreg import resize_pos_embed

positions = resize_pos_embed(torch.rand(1, 1 + 14 * 14, 384), (24, 24))  # from 224 to 384 pixels: (1, 577, 384)
""",
        wrong=((lambda: resize_pos_embed(torch.rand(1, 12, 4), (3, 3)), "pos_embed"),),
        batch=None,
    )
    yield Example(
        name="data_multiplier",
        kind="function",
        make=lambda: lambda a: torch.tensor(data_multiplier([1, 2, 4], [0.1, 0.5, 0.9], float(a))),
        inputs=lambda g: (torch.rand((), generator=g),),
        code=MULTIPLIER,
        wrong=((lambda: data_multiplier([2, 1], [0.1, 0.2], 0.1), "sizes"),),
        batch=None,
    )


class _Loss(nn.Module):
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return sigmoid_xent(logits, target)


def parts() -> Iterator[Part]:
    yield Part(
        "vit",
        "model",
        lambda classes, channels, side: AugRegViT(
            img_size=side,
            patch_size=side // 8,
            embed_dim=48,
            depth=2,
            num_heads=3,
            num_classes=classes,
            in_chans=channels,
        ),
    )
    yield Part("AugReg_light2", "method", _augreg)


def _augreg(recipe: Recipe) -> Recipe:
    def transform(generator: torch.Generator, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        augment = AugReg("light2", len(recipe.class_counts), images.shape[-1])
        return augment(*recipe.transform(generator, images, labels), generator=generator)

    # soft targets need a loss that takes them
    return replace(recipe, transform=transform, loss=lambda model, x, y: sigmoid_xent(model(x), y))


def benchmarks() -> Iterator[Benchmark]:
    def pair(name: str, build: Callable[..., nn.Module], timm_name: str, backward: bool, batch: int) -> Benchmark:
        def timed(model: nn.Module) -> Callable[[], object]:
            images = torch.rand(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
            model.train(backward)

            def forward() -> object:
                with torch.inference_mode():
                    return model(images)

            def forward_backward() -> None:
                model.zero_grad(set_to_none=True)
                model(images).sum().backward()

            return forward_backward if backward else forward

        def ours() -> Callable[[], object]:
            torch.manual_seed(0)
            return timed(build(gelu="none"))  # timm's GELU is the exact one

        def peer() -> Callable[[], object]:
            import timm

            torch.manual_seed(0)
            return timed(timm.create_model(timm_name))

        return Benchmark(name=name, ours=ours, peer=peer)

    plain, hybrid = "vit_small_patch16_224", "vit_small_r26_s32_224"
    yield pair("ViT-S/16, forward, batch 8", vit_small_patch16_224, plain, False, 8)
    yield pair("ViT-S/16, forward and backward, batch 8", vit_small_patch16_224, plain, True, 8)
    yield pair("R26+S/32, forward, batch 4", vit_small_r26_s32_224, hybrid, False, 4)
    yield pair("R26+S/32, forward and backward, batch 4", vit_small_r26_s32_224, hybrid, True, 4)
