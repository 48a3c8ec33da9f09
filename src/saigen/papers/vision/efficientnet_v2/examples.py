"""Small instances of EfficientNetV2 and its parts, and V2-B0 beside timm's."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from saigen.example import Benchmark, Example, Part
from saigen.papers.vision.efficientnet_v2 import (
    EfficientNetV2,
    FusedMBConv,
    ProgressiveLearning,
    ProgressiveSchedule,
    efficientnetv2_s,
    fused,
    fused_mac_ratio,
    plain,
    round_width,
    set_dropout,
    tf_efficientnetv2_b0,
)

MODEL_CODE = """
import torch
import saigen

model = saigen.create_model("tf_efficientnetv2_b0", num_classes=10).eval()
logits = model(torch.rand(2, 3, 224, 224))
print(logits.shape, model.default_cfg["input_size"], model.default_cfg["test_input_size"])
"""

BLOCK_CODE = """
import torch
from saigen.papers.vision.efficientnet_v2 import FusedMBConv

block = FusedMBConv(24, 48, expansion=4, stride=2)
print(block(torch.rand(2, 24, 32, 32)).shape)
"""

PROGRESSIVE_CODE = """
import torch
from saigen.papers.vision.efficientnet_v2 import ProgressiveLearning, ProgressiveSchedule

images, labels = torch.rand(64, 3, 64, 64), torch.randint(0, 10, (64,))
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=32)
model = torch.nn.Sequential(                       # any model that takes images of several sizes
    torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
    torch.nn.Dropout(), torch.nn.Linear(8, 10),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

schedule = ProgressiveSchedule(epochs=4, stages=4, size=(32, 64), rand_augment=(5, 15), mixup=(0, 0.2), dropout=(0.1, 0.3))
progressive = ProgressiveLearning(schedule, num_classes=10)
for epoch in range(schedule.epochs):
    for x, y in progressive.batches(loader, epoch, model):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    print(progressive.stage)
print(schedule.relative_cost())                    # of the cost at 64 pixels throughout
"""

SCHEDULE_CODE = """
from saigen.papers.vision.efficientnet_v2 import PAPER_SCHEDULES, RELEASE_SCHEDULES

for stage in PAPER_SCHEDULES["s"].table():
    print(stage)
print([stage.size for stage in RELEASE_SCHEDULES["s"].table()])
"""

RATIO_CODE = """
from saigen.papers.vision.efficientnet_v2 import fused_mac_ratio

print([round(fused_mac_ratio(channels), 2) for channels in (24, 48, 64, 256)])
"""


def _batch(generator: torch.Generator) -> tuple[Any, ...]:
    return (
        torch.rand(4, 3, 24, 24, generator=generator),
        torch.randint(0, 5, (4,), generator=generator),
        torch.Generator().manual_seed(0),
    )


def examples() -> Iterator[Example]:
    # one block of each kind is enough to meet every layer, and compiles in seconds
    stages = (fused(2, 1, 1, 16), fused(2, 2, 4, 24), plain(1, 2, 4, 32))
    yield Example(
        name="efficientnet_v2",
        kind="module",
        make=lambda: EfficientNetV2(0.5, stages=stages, head_channels=128, num_classes=5, resolution=(32, 40)),
        inputs=lambda generator: (torch.rand(2, 3, 33, 40, generator=generator),),
        code=MODEL_CODE,
        wrong=(
            (lambda: EfficientNetV2(drop_rate=1.5), "drop_rate"),
            (lambda: EfficientNetV2(depth=0.0), "depth"),
            (lambda: round_width(16, -1.0), "width"),
            (lambda: efficientnetv2_s(in_chans=0), "in_chans"),
        ),
    )
    yield Example(
        name="fused_mbconv",
        kind="module",
        make=lambda: FusedMBConv(8, 8, expansion=4),
        inputs=lambda generator: (torch.rand(2, 8, 9, 12, generator=generator),),
        code=BLOCK_CODE,
        wrong=((lambda: FusedMBConv(8, 8, expansion=0), "expansion"),),
    )
    yield Example(
        name="progressive_learning",
        kind="transform",
        make=lambda: ProgressiveLearning(
            ProgressiveSchedule(4, 2, size=(16, 24), mixup=(0.2, 0.4), cutmix=(0.2, 0.4)), num_classes=5
        ),
        inputs=_batch,
        code=PROGRESSIVE_CODE,
        wrong=(
            (lambda: ProgressiveLearning(ProgressiveSchedule(4, mixup=(0, 0.2))), "num_classes"),
            (lambda: ProgressiveLearning(ProgressiveSchedule(4), augment=nn.Identity()), "augment"),
            (lambda: set_dropout(nn.Linear(2, 2), 0.1), "rate"),
            (lambda: set_dropout(nn.Dropout(), 1.0), "rate"),
        ),
    )
    yield Example(
        name="progressive_schedule",
        kind="function",
        make=lambda: ProgressiveSchedule(350).relative_cost,
        inputs=lambda generator: (),
        code=SCHEDULE_CODE,
        wrong=(
            (lambda: ProgressiveSchedule(3, stages=4), "epochs"),
            (lambda: ProgressiveSchedule(8, kind="linear"), "kind"),
            (lambda: ProgressiveSchedule(8, dropout=(0.0, 1.0)), "dropout"),
            (lambda: ProgressiveSchedule(8).at(8), "epoch"),
        ),
        batch=None,
    )
    yield Example(
        name="fused_mac_ratio",
        kind="function",
        make=lambda: fused_mac_ratio,
        inputs=lambda generator: (24,),
        code=RATIO_CODE,
        wrong=((lambda: fused_mac_ratio(0), "channels"),),
        batch=None,
    )


def parts() -> Iterator[Part]:
    stages = (fused(1, 1, 1, 8), fused(1, 2, 4, 16), plain(2, 2, 4, 32))
    yield Part(
        "efficientnet_v2",
        "model",
        lambda classes, channels, side: EfficientNetV2(
            stages=stages,
            stem_channels=8,
            head_channels=64,
            num_classes=classes,
            in_chans=channels,
            resolution=(side, side),
        ),
    )


def benchmarks() -> Iterator[Benchmark]:
    def pair(
        size: int, batch: int, train: bool
    ) -> tuple[Callable[[], Callable[[], Any]], Callable[[], Callable[[], Any]]]:
        x = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        y = torch.arange(batch) % 1000

        def call(model: nn.Module) -> Callable[[], Any]:
            @torch.inference_mode()
            def forward() -> Any:
                return model(x)

            def forward_backward() -> Any:
                model.zero_grad()
                F.cross_entropy(model(x), y).backward()

            model.train(train)
            return forward_backward if train else forward

        def ours() -> Callable[[], Any]:
            return call(tf_efficientnetv2_b0(drop_rate=0.0, drop_path_rate=0.0))

        def peer() -> Callable[[], Any]:
            model = importlib.import_module("timm").create_model("tf_efficientnetv2_b0")
            model.load_state_dict(tf_efficientnetv2_b0().state_dict())
            return call(model)

        return ours, peer

    ours, peer = pair(224, 8, train=False)
    yield Benchmark(name="tf_efficientnetv2_b0 forward, batch 8", extra="peers", ours=ours, peer=peer)
    ours, peer = pair(192, 4, train=True)
    yield Benchmark(name="tf_efficientnetv2_b0 forward and backward, batch 4", extra="peers", ours=ours, peer=peer)
