"""Small instances of the room's public components, and the layer beside its usual implementations."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saigen.example import Benchmark, Example, Part
from saigen.papers.vision.dynamic_convolution import (
    DyMobileNetV2,
    DynamicConv1d,
    DynamicConv2d,
    DyResNet,
    KernelAttention,
    TemperatureSchedule,
    convert_to_dynamic,
    dy_mobilenetv2_050,
    dy_resnet10,
    set_temperature,
)

LAYER = """
import torch
from saigen.papers.vision.dynamic_convolution import DynamicConv2d

layer = DynamicConv2d(64, 128, 3, stride=2, padding=1)  # in the place of nn.Conv2d(64, 128, 3, stride=2, padding=1)
x = torch.rand(8, 64, 28, 28)
y = layer(x)  # (8, 128, 14, 14)
pi = layer.attention(x)  # (8, 4): how much of each kernel each image gets
"""

TRAIN = """
import torch
import torch.nn.functional as F
import saigen
from saigen.papers.vision.dynamic_convolution import TemperatureSchedule

model = saigen.create_model("dy_mobilenetv2_035", num_classes=10)
temperature = TemperatureSchedule(model, start=30, end=1, epochs=10)  # do not forget to step it
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
for epoch in range(2):
    temperature.step(epoch)
    loss = F.cross_entropy(model(torch.rand(4, 3, 32, 32)), torch.tensor([0, 1, 2, 3]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""

RESNET = """
import torch
import saigen

model = saigen.create_model("dy_resnet10", num_classes=10)
logits = model(torch.rand(2, 3, 64, 64))
"""

CONVERT = """
import torch
from saigen.nn.resnet import resnet18
from saigen.papers.vision.dynamic_convolution import convert_to_dynamic

model = convert_to_dynamic(resnet18(num_classes=10), num_kernels=2, noise=0.1)  # starts from the weights it has
logits = model(torch.rand(2, 3, 64, 64))
"""


def small_mobilenet() -> DyMobileNetV2:
    return DyMobileNetV2(
        stages=((1, 8, 1, 1), (2, 8, 1, 2)), stem_channels=8, head_channels=16, stem_stride=1, num_classes=5
    )


def examples() -> Iterator[Example]:
    yield Example(
        name="DynamicConv2d",
        kind="module",
        make=lambda: DynamicConv2d(8, 16, 3, 2, 1, temperature=1),
        inputs=lambda g: (torch.rand(2, 8, 18, 17, generator=g),),
        code=LAYER,
        wrong=(
            (lambda: DynamicConv2d(8, 8, 3, groups=3), "groups"),
            (lambda: DynamicConv2d(8, 8, 3, num_kernels=0), "num_kernels"),
            (lambda: DynamicConv2d(8, 8, 3, temperature=-1), "temperature"),
            (lambda: DynamicConv2d(8, 8, 3)(torch.rand(1, 4, 8, 8)), "channels"),
        ),
    )
    yield Example(
        name="dy_mobilenetv2_035",
        kind="module",
        make=small_mobilenet,
        inputs=lambda g: (torch.rand(2, 3, 16, 16, generator=g),),
        code=TRAIN,
        wrong=(
            (lambda: DyMobileNetV2(width=0), "width"),
            (lambda: DyMobileNetV2(positions=()), "positions"),
            (lambda: dy_mobilenetv2_050(num_classes=-1), "num_classes"),
            (lambda: TemperatureSchedule(small_mobilenet(), start=0), "temperature"),
        ),
    )
    yield Example(
        name="dy_resnet10",
        kind="module",
        make=lambda: DyResNet((1, 1), (8, 8), num_classes=5, small_stem=True),
        inputs=lambda g: (torch.rand(2, 3, 12, 12, generator=g),),
        code=RESNET,
        wrong=((lambda: dy_resnet10(drop_rate=1.0), "drop_rate"),),
    )
    yield Example(
        name="convert_to_dynamic",
        kind="module",
        make=lambda: convert_to_dynamic(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))),
        inputs=lambda g: (torch.rand(2, 3, 6, 6, generator=g),),
        code=CONVERT,
        wrong=(
            (lambda: convert_to_dynamic(nn.Conv2d(3, 3, 1)), "model"),
            (lambda: set_temperature(nn.ReLU(), 1), "module"),
        ),
    )
    yield Example(
        name="DynamicConv1d",
        kind="module",
        make=lambda: DynamicConv1d(4, 8, 3, padding=1, groups=2),
        inputs=lambda g: (torch.rand(2, 4, 9, generator=g),),
        code="import torch\nfrom saigen.papers.vision.dynamic_convolution import DynamicConv1d\n\n"
        "y = DynamicConv1d(4, 8, 3, padding=1)(torch.rand(2, 4, 100))  # (2, 8, 100)\n",
        wrong=((lambda: KernelAttention(8, reduction=0), "reduction"),),
    )


def _grouped(layer: DynamicConv2d) -> Callable[[Tensor], Tensor]:
    """The usual implementation: a group a sample, whatever the kernel."""

    def forward(x: Tensor) -> Tensor:
        n, weight = x.shape[0], layer.attention(x) @ layer.weight.flatten(1)
        weight = weight.view(n * layer.out_channels, *layer.weight.shape[2:])
        groups = n * layer.groups
        y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), weight, None, layer.stride, layer.padding, layer.dilation, groups)
        return y.view(n, layer.out_channels, *y.shape[2:])

    return forward


def _condconv(layer: DynamicConv2d) -> Callable[[Tensor], Tensor]:
    """timm's mixing of kernels, given our attention."""
    from timm.layers import CondConv2d

    options = {"stride": layer.stride[0], "padding": layer.padding[0], "groups": layer.groups}
    peer = CondConv2d(layer.in_channels, layer.out_channels, layer.kernel_size[0], num_experts=4, **options)
    peer.weight.data.copy_(layer.weight.data.flatten(1))
    return lambda x: peer(x, layer.attention(x))


LAYERS = {  # name: channels in and out, kernel, groups, side
    "1x1, 96 to 24 channels": (96, 24, 1, 1, 56),
    "3x3, 64 channels": (64, 64, 3, 1, 56),
    "3x3, 512 channels": (512, 512, 3, 1, 7),
    "3x3 depthwise, 144 channels": (144, 144, 3, 144, 56),
}


def _call(
    name: str, backward: bool, form: Callable[[DynamicConv2d], Callable[[Tensor], Tensor]]
) -> Callable[[], object]:
    c_in, c_out, kernel, groups, side = LAYERS[name]
    torch.manual_seed(0)
    layer = DynamicConv2d(c_in, c_out, kernel, padding=kernel // 2, groups=groups, bias=False)
    x = torch.randn(8, c_in, side, side).requires_grad_(backward)
    run = form(layer)
    return (lambda: run(x).sum().backward()) if backward else torch.no_grad()(lambda: run(x))


def parts() -> Iterator[Part]:
    yield Part(
        "dy_mobilenetv2",
        "model",
        lambda classes, channels, side: DyMobileNetV2(
            stages=((3, 8, 1, 1), (3, 16, 1, 2)),
            stem_channels=8,
            head_channels=32,
            stem_stride=1,
            num_classes=classes,
            in_chans=channels,
        ),
    )


def benchmarks() -> Iterator[Benchmark]:
    for name in LAYERS:
        for backward in (False, True):
            what = "forward + backward" if backward else "forward"
            yield Benchmark(
                name=f"dynamic convolution {name}, {what}, against groups, batch 8",
                ours=lambda n=name, b=backward: _call(n, b, lambda layer: layer),
                peer=lambda n=name, b=backward: _call(n, b, _grouped),
                extra="",
            )
            yield Benchmark(
                name=f"dynamic convolution {name}, {what}, against timm's CondConv2d, batch 8",
                ours=lambda n=name, b=backward: _call(n, b, lambda layer: layer),
                peer=lambda n=name, b=backward: _call(n, b, _condconv),
            )
