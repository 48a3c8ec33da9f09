"""Small instances of the class-balanced loss and its network; the benchmarks beside torch, torchvision and kornia."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from saigen.example import Benchmark, Example, Part, Recipe
from saigen.papers.losses.class_balanced import (
    ClassBalancedLoss,
    class_balanced_loss,
    class_balanced_resnet32,
    class_balanced_weights,
    decay_groups,
    effective_number,
    init_class_prior,
)

_COUNTS = (90, 30, 9, 3)


def _batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return 3 * torch.randn(8, 4, generator=generator), torch.arange(8) % 4


def examples() -> Iterator[Example]:
    wrong_loss = (
        (lambda: ClassBalancedLoss(_COUNTS, beta=1.5), "beta is 1.5"),
        (lambda: ClassBalancedLoss((5, 0, 3)), "counts[1] is 0"),
        (lambda: ClassBalancedLoss(_COUNTS, kind="hinge"), "kind"),
        (lambda: ClassBalancedLoss(_COUNTS, kind="focal", gamma=-1.0), "gamma"),
        (lambda: ClassBalancedLoss(_COUNTS, reduction="max"), "reduction"),
        (lambda: ClassBalancedLoss(_COUNTS)(torch.zeros(2, 4), torch.tensor([0, 4])), "target[1] is 4"),
        (lambda: ClassBalancedLoss(_COUNTS)(torch.zeros(2, 3), torch.tensor([0, 1])), "weight has shape (4,)"),
        (lambda: ClassBalancedLoss(_COUNTS)(torch.zeros(2, 4), torch.tensor([0, 1, 2])), "target has shape (3,)"),
    )
    yield Example(
        name="class_balanced_softmax",
        kind="loss",
        make=lambda: ClassBalancedLoss(_COUNTS, beta=0.99),
        inputs=_batch,
        code="""import torch
from saigen.papers.losses.class_balanced import ClassBalancedLoss

counts = [5000, 500, 50]                             # training samples of each class
model = torch.nn.Linear(16, 3)
criterion = ClassBalancedLoss(counts, beta=0.9999)   # in the place of torch.nn.CrossEntropyLoss()
x, y = torch.randn(32, 16), torch.randint(3, (32,))
criterion(model(x), y).backward()
print(criterion.weight)""",
        wrong=wrong_loss,
    )
    yield Example(
        name="class_balanced_sigmoid",
        kind="loss",
        make=lambda: ClassBalancedLoss(_COUNTS, beta=0.9, kind="sigmoid", reduction="none"),
        inputs=_batch,
        code="""import torch
from saigen.papers.losses.class_balanced import class_balanced_weights, effective_number

print(effective_number([10, 100, 1000, 10000], beta=0.999))     # about 10, 95, 632 and 1000 of at most 1000
print(class_balanced_weights([10, 100, 1000, 10000], beta=0.999))   # for any loss with class weights""",
        wrong=(
            (lambda: effective_number([], 0.9), "counts has shape (0,)"),
            (lambda: class_balanced_weights([1.0, float("nan")], 0.9), "counts[1] is nan"),
        ),
    )
    yield Example(
        name="class_balanced_focal",
        kind="loss",
        make=lambda: ClassBalancedLoss(_COUNTS, beta=0.999, kind="focal", gamma=0.5),
        inputs=_batch,
        code="""import torch
from saigen.papers.losses.class_balanced import ClassBalancedLoss, decay_groups, init_class_prior

model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
last = init_class_prior(model[-1])                   # sigmoids start at 1 / C ...
groups = decay_groups(model.parameters(), last.bias, weight_decay=2e-4)    # ... and the decay leaves that bias alone
optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
criterion = ClassBalancedLoss([5000, 500, 50], kind="focal", gamma=1.0)
criterion(model(torch.randn(32, 16)), torch.randint(3, (32,))).backward()
optimizer.step()""",
        wrong=(
            (lambda: init_class_prior(torch.nn.Linear(4, 3, bias=False)), "layer is Linear"),
            (lambda: decay_groups([], torch.nn.Parameter(torch.zeros(3)), 1e-4), "none of the parameters"),
        ),
    )
    yield Example(
        name="class_balanced_resnet32",
        kind="module",
        make=lambda: class_balanced_resnet32(num_classes=4, kind="sigmoid"),
        inputs=lambda generator: (torch.rand(2, 3, 16, 16, generator=generator),),
        code="""import torch
import saigen

model = saigen.create_model("class_balanced_resnet32", num_classes=10, kind="focal")
images = torch.rand(2, 3, 32, 32)
logits = model((images - 128 / 255) / (128 / 255))   # x / 128 - 1 on bytes
print(logits.sigmoid())                              # near 1 / 10 before training""",
        wrong=(
            (lambda: class_balanced_resnet32(kind="hinge"), "kind"),
            (lambda: class_balanced_resnet32(in_chans=0), "in_chans"),
        ),
    )


def parts() -> Iterator[Part]:
    yield Part("ClassBalanced_focal", "method", _balanced)


def _balanced(recipe: Recipe) -> Recipe:
    # as many prototypes a class as in the paper's runs: twice the samples of the largest
    beta = 1.0 - 1.0 / (2 * max(recipe.class_counts))
    # without it the sigmoids' negatives, C - 1 for each positive, drown what the images say, and some nets never recover
    init_class_prior(recipe.model.get_classifier())
    criterion = ClassBalancedLoss(recipe.class_counts, beta, kind="focal")
    return replace(recipe, loss=lambda model, images, labels: criterion(model(images), labels))


def benchmarks() -> Iterator[Benchmark]:
    for kind, peer in (("softmax", "torch"), ("sigmoid", "torch"), ("focal", "torchvision"), ("focal", "kornia")):
        yield Benchmark(
            name=f"class-balanced {kind} loss against {peer}, 4096 x 100, forward and backward",
            ours=_loss("ours", kind),
            peer=_loss(peer, kind),
        )


def _loss(whose: str, kind: str) -> Callable[[], Callable[[], Any]]:
    """The peers' terms, weighed and reduced as the paper does."""

    def build() -> Callable[[], Any]:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(4096, 100, generator=generator).requires_grad_()
        target = torch.randint(100, (4096,), generator=generator)
        weight = class_balanced_weights(torch.arange(1, 101), 0.99)

        def terms() -> torch.Tensor:
            one_hot = F.one_hot(target, 100).to(logits.dtype)
            if whose == "torchvision":
                from torchvision.ops import sigmoid_focal_loss

                return sigmoid_focal_loss(logits, one_hot, alpha=-1, gamma=1.0)
            if whose == "kornia":
                from kornia.losses import binary_focal_loss_with_logits

                focal = binary_focal_loss_with_logits(
                    logits[..., None], one_hot[..., None], None, 1.0, reduction="none"
                )
                return focal[..., 0]
            return F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")

        def step() -> None:
            logits.grad = None
            if whose == "ours":
                loss = class_balanced_loss(logits, target, weight, kind=kind, gamma=1.0)
            elif kind == "softmax":
                loss = F.cross_entropy(logits, target, weight, reduction="sum") / len(target)
            else:
                loss = (terms().sum(1) * weight[target]).sum() / len(target)
            loss.backward()

        return step

    return build
