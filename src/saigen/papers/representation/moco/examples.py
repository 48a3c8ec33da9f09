"""Small instances of the room's public components, and the side-by-side benchmarks with lightly."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saigen.example import Benchmark, Example
from saigen.nn.resnet import ResNet, resnet50
from saigen.papers.representation.moco import (
    EndToEnd,
    InfoNCE,
    KeyQueue,
    LinearClassifier,
    MemoryBank,
    MoCo,
    MoCoViews,
    SplitBatchNorm2d,
    backbone_state_dict,
    contrast,
    half_life,
    info_nce,
    learning_rate,
    momentum_update_,
    recipe,
    uniform_loss,
)

PRETRAIN = """
import torch
from functools import partial
from saigen.nn.resnet import resnet18
from saigen.papers.representation.moco import MoCo, MoCoViews, half_life

encoder = partial(resnet18, small_stem=True, zero_init=False)  # any encoder(num_classes=...)
model = MoCo(encoder, dim=32, queue_size=64, momentum=0.99, temperature=0.2, mlp=True, bn_splits=4)
print(half_life(0.99), "steps: the training must be much longer")
views = MoCoViews(16, blur=False)
optimizer = torch.optim.SGD(model.encoder_q.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
for step in range(2):
    logits, labels = model(*views(torch.rand(8, 3, 32, 32)))
    loss = torch.nn.functional.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(loss.item(), (logits.argmax(1) == labels).float().mean().item())  # loss and pretext accuracy
"""

PROBE = """
import torch
from functools import partial
from saigen.nn.resnet import resnet18
from saigen.papers.representation.moco import LinearClassifier, MoCo, recipe

pretrained = MoCo(partial(resnet18, small_stem=True), dim=32, queue_size=64)
net = LinearClassifier(pretrained.backbone(), num_features=512, num_classes=10)
optimizer = recipe("linear").optimizer(net, batch_size=8)
loss = torch.nn.functional.cross_entropy(net(torch.rand(8, 3, 32, 32)), torch.arange(8))
loss.backward()
optimizer.step()
"""

OTHERS = """
import torch
from functools import partial
from saigen.nn.resnet import ResNet
from saigen.papers.representation.moco import EndToEnd, MemoryBank

encoder = partial(ResNet, "basic", (1,), (8,), small_stem=True)
x_q, x_k, index = torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16), torch.arange(4)
for logits, labels in (EndToEnd(encoder, dim=16)(x_q, x_k), MemoryBank(encoder, size=100, dim=16, negatives=20)(x_q, index)):
    print(torch.nn.functional.cross_entropy(logits, labels))
"""

LOSS = """
import torch
from saigen.papers.representation.moco import KeyQueue, info_nce, uniform_loss

q, k = torch.nn.functional.normalize(torch.randn(2, 8, 32), dim=2)
queue = KeyQueue(dim=32, size=256)
print(info_nce(q, k, queue(k), temperature=0.2), "collapsed:", uniform_loss(256))
"""

VIEWS = """
import torch
from saigen.papers.representation.moco import MoCoViews

x_q, x_k = MoCoViews(32, version=2)(torch.rand(4, 3, 48, 48), generator=torch.Generator().manual_seed(0))
"""

SPLIT = """
import torch
from saigen.nn.resnet import resnet18
from saigen.papers.representation.moco import SplitBatchNorm2d

net = SplitBatchNorm2d.convert(resnet18(small_stem=True), splits=4)
net(torch.rand(8, 3, 16, 16))
"""

ENCODER = partial(ResNet, "basic", (1,), (8,), small_stem=True)


def units(generator: torch.Generator, *shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=generator), dim=1).requires_grad_()


def images(generator: torch.Generator, count: int = 4) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=generator)


def examples() -> Iterator[Example]:
    for name, options in (("v1", {}), ("v2", {"mlp": True, "bn_splits": 2, "temperature": 0.2})):
        yield Example(
            name=f"MoCo {name}",
            kind="module",
            make=lambda options=options: MoCo(ENCODER, 8, 24, **options),
            inputs=lambda g: (images(g), images(g)),
            code=PRETRAIN,
            wrong=(
                (lambda: MoCo(ENCODER, 0), "dim is 0"),
                (lambda: MoCo(ENCODER, momentum=1.1), "momentum is 1.1"),
                (lambda: MoCo(ENCODER, temperature=0), "temperature is 0"),
                (lambda: MoCo(ENCODER, bn_splits=0), "bn_splits is 0"),
                (lambda: half_life(0.0), "momentum is 0.0"),
            ),
        )
    yield Example(
        name="EndToEnd",
        kind="module",
        make=lambda: EndToEnd(ENCODER, 8),
        inputs=lambda g: (images(g), images(g)),
        code=OTHERS,
        wrong=((lambda: EndToEnd(ENCODER, temperature=-1), "temperature is -1"),),
        expected_failures={"samples_independent_in_eval": "the batch is the dictionary: that is the mechanism"},
    )
    yield Example(
        name="MemoryBank",
        kind="module",
        make=lambda: MemoryBank(ENCODER, 12, 8, 20),
        inputs=lambda g: (images(g), torch.tensor([3, 0, 11, 7])),
        code=OTHERS,
        wrong=(
            (lambda: MemoryBank(ENCODER, 0), "size and negatives"),
            (lambda: MemoryBank(ENCODER, 4, momentum=-1), "momentum is -1"),
        ),
        expected_failures={"bf16_autocast": "a query's own entry has a logit of minus infinity, as it is to have"},
    )
    yield Example(
        name="KeyQueue",
        kind="module",
        make=lambda: KeyQueue(8, 24),
        inputs=lambda g: (F.normalize(torch.randn(4, 8, generator=g), dim=1),),
        code=LOSS,
        wrong=((lambda: KeyQueue(8, 0), "dim and size"), (lambda: KeyQueue(2, 3)(torch.ones(4, 2)), "k has 4 keys")),
    )
    yield Example(
        name="InfoNCE",
        kind="loss",
        make=lambda: InfoNCE(0.2),
        inputs=lambda g: (units(g, 5, 6), units(g, 5, 6), units(g, 6, 9)),
        code=LOSS,
        wrong=(
            (lambda: InfoNCE(0.0), "temperature"),
            (lambda: contrast(torch.ones(2, 3), torch.ones(2, 3), torch.ones(4, 5)), "shapes"),
            (lambda: uniform_loss(-1), "queue_size"),
        ),
    )
    yield Example(
        name="SplitBatchNorm2d",
        kind="module",
        make=lambda: SplitBatchNorm2d(6, 2),
        inputs=lambda g: (torch.randn(4, 6, 5, 5, generator=g),),
        code=SPLIT,
        wrong=((lambda: SplitBatchNorm2d(6, 0), "splits is 0"),),
    )
    yield Example(
        name="LinearClassifier",
        kind="module",
        make=lambda: LinearClassifier(ENCODER(num_classes=0), 8, 5),
        inputs=lambda g: (images(g),),
        code=PROBE,
        wrong=(
            (lambda: LinearClassifier(nn.Flatten(), 4, 0), "num_features and num_classes"),
            (lambda: recipe("v4"), "name is 'v4'"),
            (lambda: learning_rate("v2", -1), "epoch is -1"),
            (lambda: backbone_state_dict({}), "encoder_q"),
        ),
    )
    for version in (1, 2):
        yield Example(
            name=f"MoCoViews, version {version}",
            kind="transform",
            make=lambda version=version: MoCoViews(16, version=version),
            inputs=lambda g: (torch.rand(3, 3, 20, 20, generator=g), torch.Generator().manual_seed(0)),
            code=VIEWS,
            wrong=((lambda: MoCoViews(version=0), "version is 0"), (lambda: MoCoViews(-1), "size is -1")),
            expected_failures={"compile_fullgraph": "random numbers are drawn by kornia, outside of what is traced"},
        )


def _losses(queue_size: int, batch: int = 256, dim: int = 128) -> tuple[Callable[[], object], Callable[[], object]]:
    """A step of the loss and its dictionary, forward and backward: ours and lightly's."""
    q, k = (torch.randn(batch, dim, generator=torch.Generator().manual_seed(i)) for i in range(2))
    q.requires_grad_()

    def ours() -> Callable[[], object]:
        queue = KeyQueue(dim, queue_size)

        def step() -> None:
            key = F.normalize(k, dim=1)
            info_nce(F.normalize(q, dim=1), key, queue(key), 0.2).backward()

        return step

    def peer() -> Callable[[], object]:
        from lightly.loss import NTXentLoss

        loss = NTXentLoss(0.2, (queue_size, dim))
        return lambda: loss(q, k).backward()

    return ours, peer


def _updates() -> tuple[Callable[[], object], Callable[[], object]]:
    def networks() -> tuple[nn.Module, nn.Module]:
        return resnet50(num_classes=128), resnet50(num_classes=128)

    def ours() -> Callable[[], object]:
        q, k = networks()
        return lambda: momentum_update_(k.requires_grad_(False), q, 0.999)

    def peer() -> Callable[[], object]:
        from lightly.models.utils import update_momentum

        q, k = networks()
        return lambda: update_momentum(q, k, 0.999)

    return ours, peer


def _split_norms() -> tuple[Callable[[], object], Callable[[], object]]:
    x = torch.randn(64, 64, 16, 16, generator=torch.Generator().manual_seed(0))

    def step(layer: nn.Module) -> Callable[[], object]:
        return lambda: layer(x).square().mean().backward()

    def peer() -> Callable[[], object]:
        from lightly.models.batchnorm import SplitBatchNorm

        return step(SplitBatchNorm(64, 8))

    return lambda: step(SplitBatchNorm2d(64, 8)), peer


def benchmarks() -> Iterator[Benchmark]:
    for name, (ours, peer) in (
        ("loss and queue of 4096, forward + backward, batch 256", _losses(4096)),
        ("loss and queue of 65536, forward + backward, batch 256", _losses(65536)),
        ("momentum update of a ResNet-50", _updates()),
        ("split batch norm, 8 devices, forward + backward, batch 64", _split_norms()),
    ):
        yield Benchmark(name=name, ours=ours, peer=peer)
