"""Small instances of the room's public components, and the side-by-side benchmarks with lightly and timm."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from saigen.example import Benchmark, Example, beside_timm
from saigen.nn.resnet import ResNet, resnet50
from saigen.papers.representation.simsiam import (
    PredictionMLP,
    ProjectionMLP,
    SimSiam,
    SimSiamLoss,
    TwoViews,
    knn_accuracy,
    linear_probe,
    simsiam_loss,
)

PRETRAIN = """
import torch
from saigen.nn.resnet import resnet18
from saigen.papers.representation.simsiam import SimSiam, TwoViews, collapse_std, simsiam_loss

model = SimSiam(resnet18(num_classes=0, small_stem=True), dim=128, pred_dim=32, proj_layers=2)  # any backbone
views = TwoViews(16, blur=False)
optimizer = torch.optim.SGD(model.param_groups(lr=0.03, batch_size=8), momentum=0.9, weight_decay=5e-4)
for step in range(2):
    SimSiam.decay(optimizer, factor=1 - step / 2)  # the predictor keeps its rate
    p1, p2, z1, z2 = model(*views(torch.rand(8, 3, 32, 32)))
    loss = simsiam_loss(p1, p2, z1, z2)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(loss.item(), collapse_std(z1).item() * 128**0.5)  # near 1: spread; 0: collapsed
"""

EVALUATE = """
import torch
from saigen.papers.representation.simsiam import knn_accuracy, linear_probe

features, labels = torch.randn(200, 16), torch.randint(0, 4, (200,))
features[:, 0] += 3 * labels
train, test = (features[:150], labels[:150]), (features[150:], labels[150:])
print(knn_accuracy(*train, *test, k=20), linear_probe(*train, *test))
"""

VIEWS = """
import torch
from saigen.papers.representation.simsiam import TwoViews

x1, x2 = TwoViews(32)(torch.rand(4, 3, 48, 48), generator=torch.Generator().manual_seed(0))
"""

LOSS = """
import torch
from saigen.papers.representation.simsiam import simsiam_loss

p1, p2, z1, z2 = torch.randn(4, 8, 32)
print(simsiam_loss(p1, p2, z1, z2), simsiam_loss(p1, p2, z1, z2, similarity="cross_entropy"))
"""

HEADS = """
import torch
from saigen.papers.representation.simsiam import PredictionMLP, ProjectionMLP

z = ProjectionMLP(512, 2048, layers=2)(torch.randn(8, 512))
p = PredictionMLP(2048, 512)(z)
"""


def make_simsiam() -> SimSiam:
    """SimSiam around a ResNet of one block."""
    backbone = ResNet("basic", (1,), (8,), num_classes=0, small_stem=True)
    return SimSiam(backbone, dim=16, pred_dim=4, proj_layers=2)


def clusters(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and labels, to learn from and to test."""
    z, y = torch.randn(60, 6, generator=generator), torch.arange(60) % 3
    z[:, 0] += 2 * y
    return z[:40], y[:40], z[40:], y[40:]


def examples() -> Iterator[Example]:
    yield Example(
        name="SimSiam",
        kind="module",
        make=make_simsiam,
        inputs=lambda g: (torch.rand(4, 3, 12, 12, generator=g), torch.rand(4, 3, 12, 12, generator=g)),
        code=PRETRAIN,
        wrong=(
            (lambda: SimSiam(nn.Conv2d(3, 4, 1)), "feature_dim"),
            (lambda: SimSiam(nn.Linear(4, 4), feature_dim=4, proj_layers=5), "layers"),
            (lambda: make_simsiam().param_groups(-1.0), "lr"),
        ),
    )
    yield Example(
        name="ProjectionMLP",
        kind="module",
        make=lambda: ProjectionMLP(12, 16),
        inputs=lambda g: (torch.randn(4, 12, generator=g),),
        code=HEADS,
        wrong=((lambda: ProjectionMLP(8, layers=1), "layers"), (lambda: ProjectionMLP(-1), "in_dim")),
    )
    yield Example(
        name="PredictionMLP",
        kind="module",
        make=lambda: PredictionMLP(16, 4),
        inputs=lambda g: (torch.randn(4, 16, generator=g),),
        code=HEADS,
        wrong=((lambda: PredictionMLP(8, 0), "pred_dim"),),
    )
    for similarity in ("cosine", "cross_entropy"):
        yield Example(
            name=f"SimSiamLoss, {similarity}",
            kind="loss",
            make=lambda similarity=similarity: SimSiamLoss(similarity=similarity),
            inputs=lambda g: tuple(torch.randn(5, 8, generator=g, requires_grad=True) for _ in range(4)),
            code=LOSS,
            wrong=(
                (lambda: SimSiamLoss(similarity="l2"), "similarity"),
                (lambda: simsiam_loss(*torch.rand(3, 2, 3), torch.rand(3, 3)), "shapes"),
            ),
            expected_failures={
                "gradcheck": "the stop-gradient is the method: finite differences move with z, the gradient must not"
            },
        )
    yield Example(
        name="TwoViews",
        kind="transform",
        make=lambda: TwoViews(16, blur=False),
        inputs=lambda g: (torch.rand(3, 3, 20, 20, generator=g), torch.Generator().manual_seed(0)),
        code=VIEWS,
        wrong=((lambda: TwoViews(-1), "size"), (lambda: TwoViews(min_scale=2.0), "min_scale")),
        expected_failures={"compile_fullgraph": "random numbers are drawn by kornia, outside of what is traced"},
    )
    for function in (partial(knn_accuracy, k=5), linear_probe):
        name = "knn_accuracy" if isinstance(function, partial) else "linear_probe"
        yield Example(
            name=name,
            kind="function",
            make=lambda function=function: function,
            inputs=clusters,
            code=EVALUATE,
            wrong=(
                (lambda: knn_accuracy(*clusters(torch.Generator()), k=0), "k is 0"),
                (lambda: knn_accuracy(*clusters(torch.Generator()), k=3, temperature=0.0), "temperature"),
                (lambda: linear_probe(*clusters(torch.Generator()), l2=-1.0), "l2"),
            ),
            batch=None,
        )


def _pair(make: Callable[[], tuple[nn.Module, nn.Module]], x: Tensor, backward: bool = True) -> Callable[[], object]:
    projector, predictor = make()

    def call() -> object:
        loss = predictor(projector(x)).square().mean()
        if backward:
            loss.backward()
        return loss

    return call


def _lightly_heads() -> tuple[nn.Module, nn.Module]:
    from lightly.models.modules.heads import SimSiamPredictionHead, SimSiamProjectionHead

    return SimSiamProjectionHead(512, 512, 1024), SimSiamPredictionHead(1024, 256, 1024)


def _lightly_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Callable[[], object]:
    from lightly.loss import NegativeCosineSimilarity

    loss = NegativeCosineSimilarity()
    return lambda: (0.5 * (loss(p1, z2.detach()) + loss(p2, z1.detach()))).backward()


def benchmarks() -> Iterator[Benchmark]:
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    outputs = [torch.randn(512, 2048, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(4)]
    yield Benchmark(
        name="projector and predictor, forward + backward, batch 256",
        ours=lambda: _pair(lambda: (ProjectionMLP(512, 1024), PredictionMLP(1024, 256)), x),
        peer=lambda: _pair(_lightly_heads, x),
    )
    yield Benchmark(
        name="loss, forward + backward, batch 512",
        ours=lambda: lambda: simsiam_loss(*outputs).backward(),
        peer=lambda: _lightly_loss(*outputs),
    )
    yield from beside_timm("resnet50 against timm,", resnet50, "resnet50", forward=4)
