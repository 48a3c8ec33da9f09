"""Small instances of the room's public components, and the layer beside its usual implementation."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from saigen.example import Benchmark, Example, Part
from saigen.papers.vision.octave_convolution import (
    OctaveBatchNorm2d,
    OctaveConv2d,
    OctMobileNetV2,
    OctResNet,
    PerGroup,
    oct_mobilenet_v1,
    oct_mobilenet_v2,
    oct_resnet26,
    oct_resnet50,
)

LAYER = """
import torch
from torch import nn
from saigen.papers.vision.octave_convolution import OctaveBatchNorm2d, OctaveConv2d, PerGroup

net = nn.Sequential(
    OctaveConv2d(3, 64, 3, alpha_in=0, alpha_out=0.25, padding=1),  # the first layer takes a tensor ...
    OctaveBatchNorm2d(64, 0.25),
    PerGroup(nn.ReLU()),
    OctaveConv2d(64, 128, 3, alpha_in=0.25, alpha_out=0.25, stride=2, padding=1),  # ... pairs (H, L) in between ...
    OctaveConv2d(128, 10, 1, alpha_in=0.25, alpha_out=0),  # ... and the last gives a tensor
)
y = net(torch.rand(1, 3, 32, 32))  # (1, 10, 16, 16)
"""

MODEL = """
import torch
import saigen

model = saigen.create_model("oct_resnet26", num_classes=10, alpha=0.5)  # weights="a/checkpoint.safetensors"
logits = model(torch.rand(1, 3, 64, 64))
"""

MOBILE = """
import torch
import saigen

model = saigen.create_model("oct_mobilenet_v2", num_classes=10, width=0.5, alpha=0.375)
logits = model(torch.rand(1, 3, 64, 64))
"""

FROM_CONV = """
import torch
from torch import nn
from saigen.papers.vision.octave_convolution import OctaveConv2d

conv = nn.Conv2d(64, 64, 3, padding=1)
layer = OctaveConv2d.from_conv(conv, alpha_in=0.5, alpha_out=0.5)  # its four paths are the tiles of conv.weight
high, low = layer((torch.rand(1, 32, 28, 28), torch.rand(1, 32, 14, 14)))
assert torch.equal(layer.pack_weight(), conv.weight)
"""


def small_net() -> OctResNet:
    """Three stages of one block."""
    return OctResNet((1, 1, 1), (8, 8, 8), alpha=0.25, num_classes=5, small_stem=True)


def layers() -> nn.Sequential:
    return nn.Sequential(
        OctaveConv2d(4, 8, 3, 0, 0.5, padding=1),
        OctaveBatchNorm2d(8, 0.5),
        PerGroup(nn.ReLU()),
        OctaveConv2d(8, 8, 3, 0.5, 0.25, stride=2, padding=1),
        OctaveConv2d(8, 4, 1, 0.25, 0),
    )


def examples() -> Iterator[Example]:
    yield Example(
        name="OctaveConv2d",
        kind="module",
        make=layers,
        inputs=lambda g: (torch.rand(2, 4, 9, 8, generator=g),),
        code=LAYER,
        wrong=(
            (lambda: OctaveConv2d(8, 8, 3), "padding"),
            (lambda: OctaveConv2d(8, 8, 1, alpha_in=1.0), "alpha_in"),
            (lambda: OctaveConv2d(8, 8, 1, stride=4), "stride"),
            (lambda: OctaveConv2d(8, 8, 1)(torch.rand(1, 8, 4, 4)), "channels"),
            (lambda: PerGroup(nn.BatchNorm2d(8)), "module"),
        ),
    )
    yield Example(
        name="OctaveConv2d.from_conv",
        kind="module",
        make=lambda: OctaveConv2d.from_conv(nn.Conv2d(8, 8, 3, padding=1), 0, 0.5),
        inputs=lambda g: (torch.rand(2, 8, 8, 8, generator=g),),
        code=FROM_CONV,
        wrong=((lambda: OctaveConv2d.from_conv(nn.Conv2d(8, 8, (3, 1)), 0.5, 0.5), "conv"),),
    )
    yield Example(
        name="oct_resnet26",
        kind="module",
        make=small_net,
        inputs=lambda g: (torch.rand(2, 3, 16, 16, generator=g),),
        code=MODEL,
        wrong=(
            (lambda: oct_resnet26(num_classes=-1), "num_classes"),
            (lambda: oct_resnet26(alpha=1.5), "alpha"),
            (lambda: small_net()(torch.rand(1, 1, 8, 8)), "channels"),
        ),
    )
    yield Example(
        name="oct_mobilenet_v2",
        kind="module",
        make=lambda: OctMobileNetV2(0.25, num_classes=5),
        inputs=lambda g: (torch.rand(2, 3, 32, 32, generator=g),),
        code=MOBILE,
        wrong=(
            (lambda: oct_mobilenet_v2(width=0), "width"),
            (lambda: oct_mobilenet_v1(alpha=-0.5), "alpha"),
        ),
    )


class UsualOctave(nn.Module):
    """The usual implementation: pooling, four convolutions, an enlarged copy, sums that are new maps."""

    def __init__(self, layer: OctaveConv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: object) -> object:
        at = self.layer
        high, low = x if isinstance(x, tuple) else (x, None)
        high = F.avg_pool2d(high, 2, 2) if at.stride == 2 else high
        y = at.conv_h2h(high)
        y_low = None if at.conv_h2l is None else at.conv_h2l(F.avg_pool2d(high, 2, 2))
        if at.conv_l2h is not None:
            from_low = at.conv_l2h(low)
            y = y + (F.interpolate(from_low, scale_factor=2, mode="nearest") if at.stride == 1 else from_low)
        if at.conv_l2l is not None:
            y_low = y_low + at.conv_l2l(F.avg_pool2d(low, 2, 2) if at.stride == 2 else low)
        return y if y_low is None else (y, y_low)


def _layer(usual: bool, kernel_size: int, backward: bool) -> Callable[[], object]:
    torch.manual_seed(0)
    layer: nn.Module = OctaveConv2d(128, 128, kernel_size, padding="same", bias=False)
    layer = UsualOctave(layer) if usual else layer
    x = tuple(torch.randn(8, 64, side, side).requires_grad_(backward) for side in (56, 28))
    if backward:
        return lambda: sum(part.sum() for part in layer(x)).backward()
    return torch.no_grad()(lambda: layer(x))


def _network(usual: bool) -> Callable[[], object]:
    torch.manual_seed(0)
    net, x = oct_resnet50(alpha=0.5).eval(), torch.rand(2, 3, 224, 224)
    if usual:
        for module in list(net.modules()):
            if isinstance(getattr(module, "conv", None), OctaveConv2d):
                module.conv = UsualOctave(module.conv)
    return torch.no_grad()(lambda: net(x))


def parts() -> Iterator[Part]:
    yield Part(
        "oct_resnet",
        "model",
        lambda classes, channels, side: OctResNet(
            (1, 1, 1), (8, 16, 32), alpha=0.25, num_classes=classes, in_chans=channels, small_stem=True
        ),
    )


def benchmarks() -> Iterator[Benchmark]:
    for kernel_size in (1, 3):
        for backward in (False, True):
            what = "forward + backward" if backward else "forward"
            yield Benchmark(
                name=f"octave convolution {kernel_size}x{kernel_size}, {what}, against the usual form, batch 8",
                ours=lambda k=kernel_size, b=backward: _layer(False, k, b),
                peer=lambda k=kernel_size, b=backward: _layer(True, k, b),
                extra="",
            )
    yield Benchmark(
        name="oct_resnet50 forward, alpha 0.5, against the usual form, batch 2",
        ours=lambda: _network(False),
        peer=lambda: _network(True),
        extra="",
    )
