"""Small instances of the room's public components, and NFNet-F0 and AGC beside timm's."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saigen.example import Benchmark, Example, Part
from saigen.papers.vision.nfnet import (
    AGC,
    NF_REGNET,
    NF_RESNET,
    NFNET,
    NFNet,
    WSConv2d,
    adaptive_clip_grad_,
    dm_nfnet_f0,
    nf_resnet50,
    nfnet_param_groups,
    signal_propagation,
)

MODEL = """
import torch
import saigen

model = saigen.create_model("nf_resnet50", num_classes=10)  # dm_nfnet_f0: weights="path/of/timm's/checkpoint.safetensors"
logits = model(torch.rand(1, 3, 64, 64))
c2, c3, c4, c5 = model.forward_stages(torch.rand(1, 3, 64, 64))  # for detectors and segmenters
"""

LAYER = """
import torch
from saigen.papers.vision.nfnet import WSConv2d

layer = WSConv2d(64, 128, 3, stride=2)  # in the place of nn.Conv2d(64, 128, 3, stride=2, padding=1)
y = layer(torch.randn(1, 64, 56, 56))  # (1, 128, 28, 28), of variance 1 as its input is
"""

TRAIN = """
import torch
from saigen.papers.vision.nfnet import AGC, NF_RESNET, NFNet, nfnet_param_groups

model = NFNet((1, 1), (32, 64), design=NF_RESNET, num_classes=10)
# λ = 0.01 is for batches of 1024 to 4096; smaller ones want a larger λ
optimizer = AGC(
    nfnet_param_groups(model, weight_decay=2e-5, clipping=0.01), torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True
)
loss = torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 3]))
loss.backward()
optimizer.step()  # clips, then steps; optimizer.step(closure) works as well
"""

CLIP = """
import torch
from saigen.papers.vision.nfnet import adaptive_clip_grad_

model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
optimizer = torch.optim.AdamW(model.parameters())
model(torch.rand(4, 8)).square().sum().backward()
adaptive_clip_grad_(model[0].parameters(), clipping=0.01)  # all but the last linear layer
optimizer.step()
"""

PLOT = """
import torch
from saigen.papers.vision.nfnet import NF_RESNET, NFNet, signal_propagation

model = NFNet((3, 4), (64, 128), design=NF_RESNET)
for signal in signal_propagation(model, torch.randn(4, 3, 64, 64)):
    print(signal.block, signal.expected_variance, signal.variance, signal.squared_mean)
"""


def small_nfnet() -> NFNet:
    design = replace(NFNET, group_size=8)
    return NFNet((1, 1), (16, 32), design=design, stem_width=16, head_width=32, num_classes=5)


def examples() -> Iterator[Example]:
    yield Example(
        name="nfnet",
        kind="module",
        make=small_nfnet,
        inputs=lambda g: (torch.randn(2, 3, 33, 40, generator=g),),
        code=MODEL,
        wrong=(
            (lambda: dm_nfnet_f0(activation="mish"), "activation"),
            (lambda: dm_nfnet_f0(drop_rate=1.0), "drop_rate"),
            (lambda: small_nfnet()(torch.rand(1, 1, 32, 32)), "channels"),
        ),
    )
    yield Example(
        name="nf_resnet",
        kind="module",
        make=lambda: NFNet((1, 1), (16, 32), design=NF_RESNET, stem_width=8, num_classes=5, numerics="official"),
        inputs=lambda g: (torch.randn(2, 3, 33, 40, generator=g),),
        code=MODEL,
        wrong=((lambda: nf_resnet50(like="torchvision"), "like"),),
    )
    yield Example(
        name="nf_regnet",
        kind="module",
        make=lambda: NFNet((1, 1), (16, 24), design=NF_REGNET, stem_width=16, head_width=32, num_classes=5),
        inputs=lambda g: (torch.randn(2, 3, 33, 40, generator=g),),
        code=MODEL.replace("nf_resnet50", "nf_regnet_b0"),
        wrong=((lambda: NFNet((1,), (8, 8)), "depths"),),
    )
    yield Example(
        name="WSConv2d",
        kind="module",
        make=lambda: WSConv2d(8, 12, 3, 2, groups=4),
        inputs=lambda g: (torch.randn(2, 8, 9, 8, generator=g),),
        code=LAYER,
        wrong=((lambda: WSConv2d(8, 8, 2), "kernel_size"), (lambda: WSConv2d(8, 8, 3, groups=3), "groups")),
    )
    yield Example(
        name="AGC",
        kind="optimizer",
        make=lambda params: AGC(params, torch.optim.SGD, clipping=0.02, lr=0.1, momentum=0.9, nesterov=True),
        code=TRAIN,
        wrong=((lambda: AGC([torch.zeros(1, requires_grad=True)], clipping=0.0, lr=0.1), "clipping"),),
        batch=None,
    )
    yield Example(
        name="adaptive_clip_grad_",
        kind="function",
        make=lambda: adaptive_clip_grad_,
        inputs=lambda g: (_with_gradient(g),),
        code=CLIP,
        wrong=((lambda: adaptive_clip_grad_([], eps=0.0), "eps"),),
        batch=None,
    )
    yield Example(
        name="signal_propagation",
        kind="function",
        make=lambda: partial(signal_propagation, small_nfnet()),
        inputs=lambda g: (torch.randn(2, 3, 16, 16, generator=g),),
        code=PLOT,
        batch=None,
    )


def _with_gradient(generator: torch.Generator) -> Tensor:
    weight = nn.Parameter(torch.randn(4, 3, generator=generator))
    weight.grad = torch.randn(4, 3, generator=generator)
    return weight


def parts() -> Iterator[Part]:
    yield Part(
        "nf_resnet",
        "model",
        lambda classes, channels, side: NFNet(
            (1, 1), (32, 64), design=NF_RESNET, stem_width=16, num_classes=classes, in_chans=channels
        ),
    )
    yield Part(
        "AGC",
        "method",
        lambda recipe: replace(
            recipe,
            optimizer=lambda model, rate: AGC(
                model.parameters(), torch.optim.AdamW, clipping=0.16, lr=rate, weight_decay=0.05
            ),
        ),
    )


def benchmarks() -> Iterator[Benchmark]:
    def timm(name: str) -> nn.Module:
        return importlib.import_module("timm").create_model(name)

    def call(model: nn.Module, size: int, batch: int, train: bool) -> Callable[[], Any]:
        x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        y = torch.arange(batch) % 1000

        @torch.inference_mode()
        def forward() -> Any:
            return model(x)

        def forward_backward() -> Any:
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()

        model.train(train)
        return forward_backward if train else forward

    def ours(size: int, batch: int, train: bool) -> Callable[[], Any]:
        return call(dm_nfnet_f0(drop_rate=0.0, stochdepth_rate=0.0), size, batch, train)

    def peer(size: int, batch: int, train: bool) -> Callable[[], Any]:
        model = timm("dm_nfnet_f0")
        model.load_state_dict(dm_nfnet_f0().state_dict())
        return call(model, size, batch, train)

    for size, batch, train in ((192, 4, False), (192, 2, True)):
        what = "forward and backward" if train else "forward"
        yield Benchmark(
            name=f"dm_nfnet_f0 {what}, batch {batch}",
            ours=lambda size=size, batch=batch, train=train: ours(size, batch, train),
            peer=lambda size=size, batch=batch, train=train: peer(size, batch, train),
        )

    def clip(function: Callable[..., None]) -> Callable[[], Any]:
        model = dm_nfnet_f0()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator)
        parameters = [p for group in nfnet_param_groups(model)[:2] for p in group["params"]]
        return lambda: function(parameters)

    yield Benchmark(
        name="AGC of dm_nfnet_f0's gradients",
        ours=lambda: clip(adaptive_clip_grad_),
        peer=lambda: clip(importlib.import_module("timm.utils.agc").adaptive_clip_grad),
    )
