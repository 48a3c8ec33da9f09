"""Small instances of DynamicViT's public components, and its backbone side by side with timm's."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from saigen.example import Benchmark, Example, Part, beside_timm, seeded, step_of
from saigen.nn.vision_transformer import VisionTransformer
from saigen.papers.vision.dynamic_vit.model import (
    DynamicViT,
    DynamicViTOutput,
    TokenPredictor,
    dynamic_vit_deit_small,
    dynamic_vit_loss,
)

TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 10}


def _model(**options: object) -> DynamicViT:
    return DynamicViT(VisionTransformer(**TINY), prune_at=(1, 2, 3), **options)


class _Loss(nn.Module):
    """The loss as a function of tensors: what training differentiates, and what the teacher says."""

    def forward(self, logits: Tensor, tokens: Tensor, d: Tensor, teacher: Tensor, taught: Tensor, y: Tensor) -> Tensor:
        output = DynamicViTOutput(logits, tokens, (d > 0.5).to(d), (d,))
        return dynamic_vit_loss(output, y, teacher, taught, [0.7])


def examples() -> Iterator[Example]:
    yield Example(
        name="DynamicViT",
        kind="module",
        make=_model,
        inputs=lambda generator: (torch.rand(2, 3, 32, 32, generator=generator),),
        code="""
import saigen, torch

model = saigen.create_model("dynamic_vit_deit_small", keep_ratio=0.7, num_classes=10).eval()
images = torch.rand(1, 3, 224, 224)
with torch.inference_mode():
    logits = model(images)               # (1, 10), from 67 of 196 tokens in the end
    kept = model.kept_tokens(images)     # which of the 14x14 grid each stage kept, the best first
print(logits.shape, [k.shape[1] for k in kept])
""",
        wrong=(
            (lambda: _model(keep_ratio=2.0), "keep_ratio"),
            (lambda: _model(keep_ratio=0.0), "keep_ratio"),
            (lambda: DynamicViT(VisionTransformer(**TINY), prune_at=(3, 6)), "prune_at"),
            (lambda: _model()(torch.rand(1, 3, 16, 16)), "x has shape"),
            (lambda: dynamic_vit_deit_small(img_size=100), "img_size"),
        ),
    )
    yield Example(
        name="DynamicViTLoss",
        kind="loss",
        make=_Loss,
        inputs=lambda generator: (
            torch.randn(2, 10, generator=generator),
            torch.randn(2, 6, 8, generator=generator),
            torch.rand(2, 6, generator=generator),
            torch.randn(2, 10, generator=generator),
            torch.randn(2, 6, 8, generator=generator),
            torch.tensor([3, 7]),
        ),
        code="""
import copy, torch
from saigen.nn.vision_transformer import VisionTransformer
from saigen.papers.vision.dynamic_vit import (
    DynamicViT, DynamicViTLoss, dynamic_vit_param_groups, dynamic_vit_schedule
)

teacher = VisionTransformer(img_size=32, patch_size=4, embed_dim=64, depth=6, num_heads=2, num_classes=10)  # trained
student = DynamicViT(copy.deepcopy(teacher), prune_at=(2, 3, 4), keep_ratio=0.7).train()
criterion = DynamicViTLoss(teacher, student.keep_ratios)
optimizer = torch.optim.AdamW(dynamic_vit_param_groups(student))
schedule = dynamic_vit_schedule(optimizer, steps_per_epoch=1)
images, labels = torch.rand(8, 3, 32, 32), torch.randint(10, (8,))
loss = criterion(student(images), images, labels)
loss.backward()
optimizer.step()
schedule.step()
""",
    )
    yield Example(
        name="TokenPredictor",
        kind="module",
        make=lambda: TokenPredictor(32),
        inputs=lambda generator: (
            torch.randn(2, 9, 32, generator=generator),
            (torch.rand(2, 9, generator=generator) > 0.3).float(),
        ),
        code="""
import torch
from saigen.papers.vision.dynamic_vit import TokenPredictor

tokens, kept = torch.rand(2, 196, 384), torch.ones(2, 196)
log_pi = TokenPredictor(384)(tokens, kept)   # (2, 196, 2): log-probabilities of keeping, of dropping
""",
        wrong=((lambda: TokenPredictor(6), "dim"),),
    )


def parts() -> Iterator[Part]:
    yield Part(
        "dynamic_vit",
        "model",
        lambda classes, channels, side: _Logits(
            VisionTransformer(
                img_size=side,
                patch_size=side // 8,
                embed_dim=48,
                depth=3,
                num_heads=3,
                num_classes=classes,
                in_chans=channels,
                init="jax",  # so narrow a network learns from it at once, and hardly from 0.02
            ),
            prune_at=(1, 2),
        ),
    )


class _Logits(DynamicViT):
    """In training DynamicViT gives what its own loss needs; who trains a classifier expects logits."""

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        return output if isinstance(output, Tensor) else output.logits


def benchmarks() -> Iterator[Benchmark]:
    def dense() -> VisionTransformer:
        return VisionTransformer(embed_dim=384, num_heads=6)

    yield from beside_timm("DeiT-S, dense,", dense, "deit_small_patch16_224", training=8)
    images = torch.rand(8, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    def peer() -> nn.Module:
        import timm

        return timm.create_model("deit_small_patch16_224")

    yield Benchmark(
        name="DynamicViT-DeiT-S/0.7 against dense DeiT-S, forward, batch 8",
        ours=lambda: step_of(seeded(dynamic_vit_deit_small), images, train=False),
        peer=lambda: step_of(seeded(peer), images, train=False),
    )
