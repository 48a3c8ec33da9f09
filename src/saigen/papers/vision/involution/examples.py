"""Small instances of the room's public components, and the operator beside its usual implementation."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saigen.example import Benchmark, Example, Part
from saigen.papers.vision.involution import (
    Involution2d,
    RedNet,
    convert_3x3_to_involution,
    involution2d,
    rednet26,
    rednet50,
)

LAYER = """
import torch
from saigen.papers.vision.involution import Involution2d

layer = Involution2d(64, kernel_size=7, stride=2)  # in the place of nn.Conv2d(64, 64, 3, stride=2, padding=1)
y = layer(torch.rand(1, 64, 56, 56))  # (1, 64, 28, 28)
kernels = layer.kernel(torch.rand(1, 64, 56, 56))  # (1, 4, 49, 28, 28): what each pixel asks of its neighbours
"""

MODEL = """
import torch
import saigen

model = saigen.create_model("rednet26", num_classes=10)  # weights="path/of/an/official/checkpoint.pth"
logits = model(torch.rand(1, 3, 64, 64))
c2, c3, c4, c5 = model.forward_stages(torch.rand(1, 3, 64, 64))  # for detectors and segmenters
"""

CONVERT = """
import torch
from saigen.nn.resnet import resnet18
from saigen.papers.vision.involution import convert_3x3_to_involution

model = convert_3x3_to_involution(resnet18(num_classes=10), kernel_size=7)
logits = model(torch.rand(2, 3, 64, 64))
"""

OPERATOR = """
import torch
from saigen.papers.vision.involution import involution2d

x = torch.rand(2, 32, 14, 14)
kernel = torch.softmax(torch.rand(2, 2, 9, 14, 14), dim=2)  # kernels of your own: 2 groups, 3x3 taps
y = involution2d(x, kernel, dilation=2)
"""


def small_rednet() -> RedNet:
    """Two stages of one block."""
    return RedNet((1, 1), (16, 16), kernel_size=3, num_classes=5, stem_width=32, small_stem=True)


def operands(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.rand(2, 8, 6, 5, generator=generator), torch.rand(2, 2, 9, 6, 5, generator=generator)


def examples() -> Iterator[Example]:
    yield Example(
        name="Involution2d",
        kind="module",
        make=lambda: Involution2d(16, 5, 2, group_channels=8),
        inputs=lambda g: (torch.rand(2, 16, 9, 8, generator=g),),
        code=LAYER,
        wrong=(
            (lambda: Involution2d(64, 6), "kernel_size"),
            (lambda: Involution2d(40), "group_channels"),
            (lambda: Involution2d(64, reduction=7), "reduction"),
            (lambda: Involution2d(16)(torch.rand(1, 4, 8, 8)), "channels"),
        ),
    )
    yield Example(
        name="rednet26",
        kind="module",
        make=small_rednet,
        inputs=lambda g: (torch.rand(2, 3, 12, 12, generator=g),),
        code=MODEL,
        wrong=(
            (lambda: rednet26(num_classes=-1), "num_classes"),
            (lambda: rednet26(kernel_size=4), "kernel_size"),
            (lambda: small_rednet()(torch.rand(1, 1, 8, 8)), "channels"),
        ),
    )
    yield Example(
        name="involution2d",
        kind="function",
        make=lambda: involution2d,
        inputs=operands,
        code=OPERATOR,
        wrong=((lambda: involution2d(torch.rand(1, 4, 6, 6), torch.rand(1, 1, 9, 3, 3)), "kernel"),),
    )
    yield Example(
        name="convert_3x3_to_involution",
        kind="module",
        make=lambda: convert_3x3_to_involution(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)), 3),
        inputs=lambda g: (torch.rand(2, 16, 6, 6, generator=g),),
        code=CONVERT,
        wrong=((lambda: convert_3x3_to_involution(nn.Conv2d(3, 3, 1)), "model"),),
    )


def unfold_involution(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """The usual implementation: copy every patch, multiply, add up."""
    b, c, (g, taps, h, w) = x.shape[0], x.shape[1], kernel.shape[1:]
    size = round(taps**0.5)
    patches = F.unfold(x, size, padding=size // 2, stride=stride).view(b, g, c // g, taps, h, w)
    return (kernel.unsqueeze(2) * patches).sum(3).view(b, c, h, w)


def _operator(stride: int, backward: bool, function: Callable[..., Tensor]) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 64, 56, 56, generator=generator).requires_grad_(backward)
    kernel = torch.randn(8, 4, 49, 56 // stride, 56 // stride, generator=generator).requires_grad_(backward)
    if backward:
        return lambda: function(x, kernel, stride=stride).sum().backward()
    return lambda: function(x, kernel, stride=stride)


def _rednet(backend: str) -> Callable[[], object]:
    net, x = rednet50().eval(), torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for layer in net.modules():
        if isinstance(layer, Involution2d):
            layer.backend = backend
    return torch.no_grad()(lambda: net(x))


def parts() -> Iterator[Part]:
    yield Part(
        "rednet",
        "model",
        lambda classes, channels, side: RedNet(
            (1, 1),
            (16, 32),
            kernel_size=5,
            group_channels=4,
            num_classes=classes,
            in_chans=channels,
            stem_width=32,
            small_stem=True,
        ),
    )


def benchmarks() -> Iterator[Benchmark]:
    for stride in (1, 2):
        for backward in (False, True):
            what = "forward + backward" if backward else "forward"
            yield Benchmark(
                name=f"involution 7x7, stride {stride}, {what}, against unfold, batch 8",
                ours=lambda stride=stride, backward=backward: _operator(stride, backward, involution2d),
                peer=lambda stride=stride, backward=backward: _operator(stride, backward, unfold_involution),
                extra="",
            )
    yield Benchmark(
        name="rednet50 forward, against unfold, batch 2",
        ours=lambda: _rednet("offsets"),
        peer=lambda: _rednet("unfold"),
        extra="",
    )
