"""Small instances of the room's public components, and the operator beside its usual implementation."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from saigen.example import Benchmark, Example, Part
from saigen.papers.vision.stand_alone_attention import (
    AttentionStem,
    LocalSelfAttention2d,
    SASAResNet,
    local_attention,
    sasa_resnet26,
    sasa_resnet50,
)

LAYER = """
import torch
from saigen.papers.vision.stand_alone_attention import LocalSelfAttention2d

layer = LocalSelfAttention2d(64, kernel_size=7, num_heads=8, stride=2)  # for nn.Conv2d(64, 64, 3, stride=2, padding=1)
y = layer(torch.rand(1, 64, 28, 28))  # (1, 64, 14, 14)
"""

STEM = """
import torch
from torch import nn
from saigen.papers.vision.stand_alone_attention import AttentionStem

stem = nn.Sequential(AttentionStem(3, 64), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(4))
y = stem(torch.rand(1, 3, 64, 64))  # (1, 64, 16, 16)
shares = stem[0].mixture()  # (16, 4): what each place of a 4x4 square takes of each value matrix
"""

MODEL = """
import torch
import saigen

model = saigen.create_model("sasa_resnet26", num_classes=10)  # conv_stem=False for attention everywhere
logits = model(torch.rand(1, 3, 64, 64))
c2, c3, c4, c5 = model.forward_stages(torch.rand(1, 3, 64, 64))  # for detectors and segmenters
"""

OPERATOR = """
import torch
from saigen.papers.vision.stand_alone_attention import local_attention

q, k, v = torch.rand(3, 2, 4, 8, 14, 14)  # batch 2, 4 heads of 8 channels
rows, columns = torch.rand(2, 5, 4)  # embeddings of the offsets -2 to 2, half of the channels each
y = local_attention(q, k, v, rows, columns, kernel_size=5)
"""


def small_net() -> SASAResNet:
    """Two stages of one block, attention in the second, an attention stem."""
    return SASAResNet(
        (1, 1),
        (8, 8),
        conv_stem=False,
        stem_block=2,
        attention_stages=(2,),
        kernel_size=3,
        num_heads=2,
        num_classes=5,
    )


def operands(generator: torch.Generator) -> tuple[Tensor, ...]:
    q, k, v = torch.randn(3, 2, 2, 4, 6, 5, generator=generator)
    return q, k, v, *torch.randn(2, 3, 2, generator=generator)


def examples() -> Iterator[Example]:
    yield Example(
        name="LocalSelfAttention2d",
        kind="module",
        make=lambda: LocalSelfAttention2d(16, 5, 4, 2),
        inputs=lambda g: (torch.rand(2, 16, 9, 8, generator=g),),
        code=LAYER,
        wrong=(
            (lambda: LocalSelfAttention2d(16, 4), "kernel_size"),
            (lambda: LocalSelfAttention2d(16, num_heads=3), "num_heads"),
            (lambda: LocalSelfAttention2d(8, num_heads=8), "num_heads"),
            (lambda: LocalSelfAttention2d(16, position="learned"), "position"),
            (lambda: LocalSelfAttention2d(16)(torch.rand(1, 4, 8, 8)), "channels"),
        ),
    )
    yield Example(
        name="AttentionStem",
        kind="module",
        make=lambda: AttentionStem(3, 8, num_heads=2),
        inputs=lambda g: (torch.rand(2, 3, 8, 12, generator=g),),
        code=STEM,
        wrong=(
            (lambda: AttentionStem(3, 8, num_heads=8), "num_heads"),
            (lambda: AttentionStem(values="none"), "values"),
            (lambda: AttentionStem()(torch.rand(1, 3, 10, 8)), "multiples of block"),
        ),
    )
    yield Example(
        name="sasa_resnet26",
        kind="module",
        make=small_net,
        inputs=lambda g: (torch.rand(2, 3, 12, 12, generator=g),),
        code=MODEL,
        wrong=(
            (lambda: sasa_resnet26(num_classes=-1), "num_classes"),
            (lambda: SASAResNet((1, 1), (8, 8), attention_stages=(3,)), "attention_stages"),
            (lambda: sasa_resnet26(conv_stem=False, small_stem=True), "small_stem"),
        ),
    )
    yield Example(
        name="local_attention",
        kind="function",
        make=lambda: lambda *tensors: local_attention(*tensors, kernel_size=3),
        inputs=operands,
        code=OPERATOR,
        wrong=((lambda: local_attention(*torch.rand(3, 1, 1, 2, 4, 4), None, None, kernel_size=2), "kernel_size"),),
    )


def _operator(channels: int, side: int, backward: bool, backend: str) -> Callable[[], object]:
    generator, d = torch.Generator().manual_seed(0), channels // 8
    q, k, v = torch.randn(3, 4, 8, d, side, side, generator=generator)
    tensors = [q, k, v, *torch.randn(2, 7, d // 2, generator=generator)]
    tensors = [tensor.requires_grad_(backward) for tensor in tensors]

    def call() -> Tensor:
        return local_attention(*tensors, kernel_size=7, backend=backend)

    return (lambda: call().sum().backward()) if backward else torch.no_grad()(call)


def _network(backend: str) -> Callable[[], object]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = sasa_resnet50(backend=backend).eval()
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return torch.no_grad()(lambda: net(x))


def parts() -> Iterator[Part]:
    yield Part(
        "sasa_resnet",
        "model",
        lambda classes, channels, side: SASAResNet(
            (1, 1),
            (16, 32),
            attention_stages=(1, 2),
            num_heads=2,
            kernel_size=5,
            num_classes=classes,
            in_chans=channels,
        ),
    )


def benchmarks() -> Iterator[Benchmark]:
    for channels, side in ((64, 28), (256, 14)):
        for backward in (False, True):
            what = "forward + backward" if backward else "forward"
            yield Benchmark(
                name=f"local attention 7x7, {channels} channels at {side}x{side}, {what}, against unfold, batch 4",
                ours=lambda c=channels, s=side, b=backward: _operator(c, s, b, "blocks"),
                peer=lambda c=channels, s=side, b=backward: _operator(c, s, b, "windows"),
                extra="",
            )
    yield Benchmark(
        name="sasa_resnet50 forward, against unfold, batch 1",
        ours=lambda: _network("blocks"),
        peer=lambda: _network("windows"),
        extra="",
    )
