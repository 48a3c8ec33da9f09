"""Small instances of the room's public components, and the block beside the usual way to compute it."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from saigen.example import Benchmark, Example, Part
from saigen.papers.vision.channel_equilibrium import (
    CEResNet,
    ChannelEquilibrium2d,
    ce_resnet50,
    inhibited_channel_ratio,
    inverse_sqrt_newton,
)

BLOCK = """
import torch
from torch import nn
from saigen.papers.vision.channel_equilibrium import ChannelEquilibrium2d

layer = nn.Sequential(
    nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), ChannelEquilibrium2d(64), nn.ReLU()
)
y = layer(torch.rand(4, 3, 32, 32))  # (4, 64, 32, 32)
share = layer[2].mixing  # of batch decorrelation; the rest is instance reweighting
"""

MODEL = """
import torch
import saigen

model = saigen.create_model("ce_resnet50", num_classes=10)  # weights="path/of/an/official/checkpoint.pth"
logits = model(torch.rand(2, 3, 64, 64))
"""

NEWTON = """
import torch
from saigen.papers.vision.channel_equilibrium import inverse_sqrt_newton

x = torch.rand(16, 1000)
root = inverse_sqrt_newton(torch.cov(x), 10, rescale=True)
white = root @ (x - x.mean(1, keepdim=True))  # torch.cov(white) is close to the identity
"""

INHIBITED = """
import torch
from saigen.nn.resnet import resnet18
from saigen.papers.vision.channel_equilibrium import inhibited_channel_ratio

model = resnet18(num_classes=10)
shares = inhibited_channel_ratio(model, [torch.rand(4, 3, 64, 64)], threshold=0.01)
worst = max(shares, key=shares.get)  # the layer with most channels nearly silent
"""


def small_net() -> CEResNet:
    """Two stages of one block, the first with channel equilibrium."""
    return CEResNet("basic", (1, 1), (8, 16), stages=(1,), group_size=4, num_classes=5, small_stem=True)


def positive(generator: torch.Generator) -> tuple[Tensor]:
    x = torch.rand(6, 20, generator=generator)
    return (x @ x.T + 0.1 * torch.eye(6),)


def examples() -> Iterator[Example]:
    yield Example(
        name="ChannelEquilibrium2d",
        kind="module",
        make=lambda: ChannelEquilibrium2d(16, 8),
        inputs=lambda g: (torch.rand(2, 16, 6, 5, generator=g),),
        code=BLOCK,
        wrong=(
            (lambda: ChannelEquilibrium2d(16, iterations=0), "iterations"),
            (lambda: ChannelEquilibrium2d(16, reduction=0), "reduction"),
            (lambda: ChannelEquilibrium2d(16)(torch.rand(2, 16, 1, 1)), "pixels"),
        ),
    )
    yield Example(
        name="ce_resnet50",
        kind="module",
        make=small_net,
        inputs=lambda g: (torch.rand(2, 3, 12, 12, generator=g),),
        code=MODEL,
        wrong=(
            (lambda: ce_resnet50(num_classes=-1), "num_classes"),
            (lambda: CEResNet("basic", stages=(0,)), "stages"),
            (lambda: small_net()(torch.rand(1, 1, 8, 8)), "channels"),
        ),
    )
    yield Example(
        name="inverse_sqrt_newton",
        kind="function",
        make=lambda: inverse_sqrt_newton,
        inputs=positive,
        code=NEWTON,
        batch=None,
        wrong=((lambda: inverse_sqrt_newton(torch.rand(2, 3)), "matrix"),),
    )
    yield Example(
        name="inhibited_channel_ratio",
        kind="function",
        make=lambda: lambda x: torch.tensor(list(inhibited_channel_ratio(torch.nn.ReLU(), [x]).values())),
        inputs=lambda g: (torch.randn(2, 4, 3, 3, generator=g),),
        code=INHIBITED,
        wrong=((lambda: inhibited_channel_ratio(torch.nn.ReLU(), [], 0.0), "threshold"),),
    )


def two_branches(block: ChannelEquilibrium2d, x: Tensor) -> Tensor:
    """The usual implementation: channels first, one branch after the other, then their weighted sum."""
    n, c, h, w = x.shape
    gates = block.AR(x.flatten(2).var(-1))
    reweighted = gates[:, :, None, None].expand_as(x) * x
    rows = x.transpose(0, 1).reshape(block.groups, block.group_size, -1)
    root = block.running_wm
    if block.training:
        centred = rows - rows.mean(-1, keepdim=True)
        identity = torch.eye(block.group_size).expand_as(root)
        sigma = torch.baddbmm(identity, centred, centred.mT, beta=block.eps, alpha=1 / rows.shape[-1])
        root = inverse_sqrt_newton(sigma, block.iterations)
    mixed = (root @ rows).view(c, n, h, w).transpose(0, 1).contiguous()
    share = block.mixing
    return share * mixed + (1 - share) * reweighted


def _block(training: bool, usual: bool) -> Callable[[], object]:
    torch.manual_seed(0)
    block = ChannelEquilibrium2d(256).train(training)
    x = torch.randn(8, 256, 28, 28).requires_grad_(training)
    call = (lambda: two_branches(block, x)) if usual else (lambda: block(x))
    return (lambda: call().sum().backward()) if training else torch.no_grad()(call)


def parts() -> Iterator[Part]:
    yield Part(
        "ce_resnet",
        "model",
        lambda classes, channels, side: CEResNet(
            "basic", (1, 1), (16, 32), stages=(1,), num_classes=classes, in_chans=channels, small_stem=True
        ),
    )


def benchmarks() -> Iterator[Benchmark]:
    for training in (False, True):
        yield Benchmark(
            name=f"channel equilibrium, {'forward + backward' if training else 'forward'}, against two branches, batch 8",
            ours=lambda training=training: _block(training, False),
            peer=lambda training=training: _block(training, True),
            extra="",
        )
