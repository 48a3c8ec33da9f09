"""Small instances of the study's tools, and their speed beside the official formula written down in PyTorch."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from saigen.example import Benchmark, Example, Part
from saigen.papers.analysis.wide_and_deep import (
    ActivationRecorder,
    MinibatchCKA,
    accuracy_by_depth,
    block_structure,
    cifar_resnet_v1,
    cka,
    cka_matrix,
    compare_classes,
    compare_examples,
    delete_blocks,
    first_pc,
    gram,
    linear_probe,
    principal_profile,
    regularized,
    remove_pc,
    scaled_resnet50,
    u_center,
    unbiased_hsic,
)

HEAT_MAP = """
import torch
from saigen.papers.analysis.wide_and_deep import block_structure, cifar_resnet_v1, cka_matrix, principal_components

# any model: this one, torchvision's, timm's, Transformers'
model, other = cifar_resnet_v1(depth=14, width=0.5), cifar_resnet_v1(depth=8, width=1)
images = torch.rand(64, 3, 32, 32)
within = cka_matrix(model, images, batch_size=32, passes=2)  # every layer with every layer
print(block_structure(within.matrix), within.rows[:4])
across = cka_matrix(model, images, other, layers="blocks", batch_size=32, passes=2)  # of two models or two seeds
without = cka_matrix(model, images, batch_size=32, passes=2, remove=1)  # without the first principal component
print(principal_components(model, images, layers="blocks").shares)
"""

LESION = """
import torch
from saigen.papers.analysis.wide_and_deep import cifar_resnet_v1, deletable_blocks, delete_blocks

model, images = cifar_resnet_v1(depth=20, width=0.5).eval(), torch.rand(8, 3, 32, 32)
for name in deletable_blocks(model):
    with delete_blocks(model, name):
        logits = model(images)  # without it, nothing retrained
"""

PROBES = """
import torch
from saigen.papers.analysis.wide_and_deep import ActivationRecorder, accuracy_by_depth, cifar_resnet_v1

model = cifar_resnet_v1(depth=8, width=0.5).eval()
x, y = torch.rand(40, 3, 32, 32), torch.arange(40) % 10
with torch.no_grad(), ActivationRecorder(model, "blocks") as recorder:
    model(x[:30])
    train = recorder.take()
    model(x[30:])
    test = recorder.take()
print(accuracy_by_depth(train, y[:30], test, y[30:], pool=True, epochs=5))
"""

ERRORS = """
import torch
from saigen.papers.analysis.wide_and_deep import compare_classes, compare_examples

y = torch.arange(200) % 10
wide, deep = torch.rand(5, 200) < 0.8, torch.rand(6, 200) < 0.8  # which examples each model has right
print(compare_classes(wide, deep, y).p_value)
print(compare_examples(wide, deep)[1:])  # about equal where chance alone is at work
"""

TRAIN = """
import torch
from saigen.papers.analysis.wide_and_deep import regularized, scaled_resnet50

model = scaled_resnet50(depth=1, width=0.25, num_classes=10)  # the third stage alone is scaled
optimizer = torch.optim.SGD(regularized(model, l2=5e-5), lr=0.1, momentum=0.9)
torch.nn.functional.cross_entropy(model(torch.rand(2, 3, 64, 64)), torch.tensor([0, 1])).backward()
optimizer.step()
"""


def _pair(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(12, 5, generator=generator)
    return x, x @ torch.randn(5, 3, generator=generator) + torch.randn(12, 3, generator=generator)


def _images(generator: torch.Generator) -> tuple[Tensor]:
    return (torch.rand(2, 3, 16, 16, generator=generator),)


def _heat_map(x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cifar_resnet_v1(8, 0.25)
    return cka_matrix(model, x, batch_size=4, passes=2).matrix


def _right(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.rand(3, 40, generator=generator) < 0.8, torch.rand(4, 40, generator=generator) < 0.7


def examples() -> Iterator[Example]:
    x, y = torch.rand(6, 3), torch.arange(6) % 2
    yield Example(
        name="cifar_resnet_v1",
        kind="module",
        make=lambda: cifar_resnet_v1(14, 0.25, num_classes=4),
        inputs=_images,
        code=LESION,
        wrong=(
            (lambda: cifar_resnet_v1(15), "depth is 15"),
            (lambda: cifar_resnet_v1(width=0.01), "width is 0.01"),
            (lambda: cifar_resnet_v1(in_chans=0), "in_chans is 0"),
            (lambda: cifar_resnet_v1(num_classes=-1), "num_classes is -1"),
            (lambda: cifar_resnet_v1(8)(torch.rand(1, 1, 8, 8)), "x has 1 channels"),
            (lambda: delete_blocks(cifar_resnet_v1(8), "layer2.0").__enter__(), "layer2.0"),
        ),
    )
    yield Example(
        name="plain",
        kind="module",
        make=lambda: cifar_resnet_v1(8, 0.25, residual=False),
        inputs=_images,
        code=PROBES,
        wrong=(
            (lambda: ActivationRecorder(cifar_resnet_v1(8), ["layer9"]), "layer9"),
            (lambda: ActivationRecorder(torch.nn.Linear(2, 2), "blocks"), "no residual blocks"),
            (lambda: ActivationRecorder(cifar_resnet_v1(8)).take(), "nothing was recorded"),
            (lambda: linear_probe(x, y[:3], x), "y has 3"),
            (lambda: linear_probe(x, y, x, epochs=0), "epochs is 0"),
            (lambda: linear_probe(x, y, x, l2=-1.0), "l2 is -1"),
            (lambda: accuracy_by_depth({"a": x}, y, {"b": x}, y), "test has layers"),
        ),
    )
    yield Example(
        name="scaled_resnet50",
        kind="module",
        make=lambda: scaled_resnet50(0.5, 0.1, scale_all=True, num_classes=4),
        inputs=lambda generator: (torch.rand(2, 3, 40, 40, generator=generator),),
        code=TRAIN,
        wrong=(
            (lambda: scaled_resnet50(depth=0.01), "depth is 0.01"),
            (lambda: scaled_resnet50(width=0.0001), "width is 0.0001"),
            (lambda: regularized(cifar_resnet_v1(8), -1.0), "l2 is -1"),
        ),
    )
    yield Example(
        name="cka",
        kind="function",
        make=lambda: cka,
        inputs=_pair,
        code=HEAT_MAP,
        wrong=(
            (lambda: cka(torch.rand(5, 2), torch.rand(6, 2)), "y has 6 examples"),
            (lambda: cka(torch.rand(5, 2), torch.rand(5, 2), kernel="cubic"), "kernel is 'cubic'"),
            (lambda: cka(torch.rand(5, 2), torch.rand(5, 2), "rbf", bandwidth=0.0), "bandwidth is 0"),
            (lambda: unbiased_hsic(torch.rand(3, 2), torch.rand(3, 2)), "3 examples"),
            (lambda: gram(torch.rand(3)), "x has shape"),
            (lambda: u_center(torch.rand(3, 3)), "4 or more"),
            (lambda: block_structure(torch.rand(2, 3)), "matrix has shape"),
            (lambda: block_structure(torch.eye(2), 0.0), "threshold is 0"),
            (lambda: first_pc(torch.rand(1, 4)), "n >= 2"),
            (lambda: remove_pc(torch.rand(4, 4), k=4), "k is 4"),
            (lambda: principal_profile({}), "grams is empty"),
        ),
    )
    yield Example(
        name="cka_matrix",
        kind="function",
        make=lambda: _heat_map,
        inputs=lambda generator: (torch.rand(9, 3, 8, 8, generator=generator),),
        code=HEAT_MAP,
        wrong=(
            (lambda: cka_matrix(cifar_resnet_v1(8), torch.rand(8, 3, 8, 8)), "batch_size is 256"),
            (lambda: cka_matrix(cifar_resnet_v1(8), torch.rand(8, 3, 8, 8), batch_size=4, passes=0), "passes is 0"),
            (lambda: cka_matrix(cifar_resnet_v1(8), torch.rand(8, 3, 8, 8), batch_size=4, remove=-1), "remove is -1"),
            (lambda: MinibatchCKA(0), "layers is 0"),
            (lambda: MinibatchCKA(1).update([]), "1 or more"),
            (lambda: MinibatchCKA(2).update([torch.rand(5, 2)]), "activations has 1 layers"),
            (lambda: MinibatchCKA(1).update([torch.rand(5, 2)], [torch.rand(5, 2)]), "others is given"),
            (lambda: MinibatchCKA(1, 1).update([torch.rand(5, 2)], [torch.rand(6, 2)]), "same batch"),
        ),
    )
    yield Example(
        name="who_errs_where",
        kind="function",
        make=lambda: compare_examples,
        inputs=_right,
        code=ERRORS,
        wrong=(
            (lambda: compare_examples(torch.ones(1, 4) > 0, torch.ones(2, 4) > 0), "2 or more models"),
            (lambda: compare_examples(torch.ones(2, 4) > 0, torch.ones(2, 5) > 0), "right_b has 5"),
            (lambda: compare_classes(torch.ones(2, 4) > 0, torch.ones(2, 4) > 0, torch.zeros(3).long()), "y has 3"),
        ),
    )


def parts() -> Iterator[Part]:
    yield Part(
        "cifar_resnet_v1",
        "model",
        lambda classes, channels, side: cifar_resnet_v1(8, 0.5, num_classes=classes, in_chans=channels),
    )


def benchmarks() -> Iterator[Benchmark]:
    for layers, features, n in ((40, 4096, 256), (120, 1024, 256)):
        yield Benchmark(
            name=f"minibatch CKA beside the official formula in PyTorch, {layers} layers of {features}, batch {n}",
            ours=_sums(_ours, layers, features, n),
            peer=_sums(_as_written, layers, features, n),
        )


def _ours(activations: list[Tensor]) -> Tensor:
    sums = MinibatchCKA(len(activations))
    sums.update(activations)
    return sums.compute()


def _as_written(activations: list[Tensor]) -> Tensor:
    """The official accumulation step by step, whole matrices, float32 products and float64 sums; it is TensorFlow."""
    grams = []
    for x in activations:
        matrix = (x.flatten(1) @ x.flatten(1).T).double()
        n = len(matrix)
        matrix.fill_diagonal_(0.0)
        means = matrix.sum(0) / (n - 2)
        means = means - means.sum() / (2 * (n - 1))
        matrix = matrix - means[:, None] - means[None, :]
        matrix.fill_diagonal_(0.0)
        grams.append(matrix.flatten())
    stacked = torch.stack(grams)
    hsic = stacked @ stacked.T
    norm = hsic.diagonal().sqrt()
    return hsic / norm[:, None] / norm


def _sums(
    compute: Callable[[list[Tensor]], Tensor], layers: int, features: int, n: int
) -> Callable[[], Callable[[], Any]]:
    def build() -> Callable[[], Any]:
        generator = torch.Generator().manual_seed(0)
        activations = [torch.randn(n, features, generator=generator) for _ in range(layers)]
        return lambda: compute(activations)

    return build
