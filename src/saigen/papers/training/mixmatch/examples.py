"""Small instances of MixMatch's pieces and its network, and a step's speed beside one written in plain PyTorch."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saigen.data.augmentation import shift_and_flip
from saigen.example import Benchmark, Example, Part, Recipe
from saigen.papers.training.mixmatch import (
    MixMatch,
    guess_labels,
    interleave,
    mixmatch_wrn_28_2,
    mixmatch_wrn_28_large,
    sharpen,
    weight_decay_groups,
)


class _Objective(nn.Module):
    """A classifier and its loss as one module, as a training loop checkpoints them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.1), nn.Linear(8, 3))
        self.mixmatch = MixMatch(num_classes=3, rampup_steps=2)

    def forward(self, x: Tensor, y: Tensor, views: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.mixmatch(self.model, x, y, views, generator=generator).total


def _batch(generator: torch.Generator) -> tuple[Any, ...]:
    x, views = torch.randn(6, 4, generator=generator), torch.randn(6, 2, 4, generator=generator)
    return x, torch.arange(6) % 3, views, generator


def examples() -> Iterator[Example]:
    yield Example(
        name="MixMatch",
        kind="transform",
        make=_Objective,
        inputs=_batch,
        expected_failures={
            "compile_fullgraph": "labels on the CPU are checked by their values, and the mixing draws from a generator; "
            "the classifier compiles by itself"
        },
        code="""import torch
from saigen.nn.wide_resnet import WideResNet
from saigen.papers.training.mixmatch import MixMatch, weight_decay_groups

net = WideResNet(num_classes=10, filters=8, repeat=1)                # any classifier; the paper's: mixmatch_wrn_28_2()
average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
optimizer = torch.optim.AdamW(weight_decay_groups(net, 0.02), lr=0.002)
mixmatch = MixMatch(num_classes=10, lambda_u=75, rampup_steps=16384)
for step in range(3):
    x, y = torch.rand(8, 3, 16, 16) * 2 - 1, torch.randint(10, (8,))   # labelled, augmented
    views = torch.rand(8, 2, 3, 16, 16) * 2 - 1                        # two augmentations of each unlabelled image
    losses = mixmatch(net, x, y, views)
    optimizer.zero_grad()
    losses.total.backward()
    optimizer.step()
    average.update_parameters(net)                                     # what is evaluated
print(float(losses.labelled), float(losses.unlabelled), float(losses.weight))""",
        wrong=(
            (lambda: MixMatch(num_classes=1), "num_classes"),
            (lambda: MixMatch(3, temperature=0), "temperature"),
            (lambda: MixMatch(3, mix_mode="all"), "mix_mode"),
            (lambda: MixMatch(3)(nn.Linear(4, 3), torch.rand(2, 4), torch.arange(2), torch.rand(0, 2, 4)), "views"),
            (lambda: MixMatch(3)(nn.Linear(4, 3), torch.rand(2, 4), torch.arange(2), torch.rand(3, 2, 4)), "as many"),
            (lambda: weight_decay_groups(nn.Linear(2, 2), -1), "weight_decay"),
        ),
    )
    yield Example(
        name="guessed_labels",
        kind="function",
        make=lambda: lambda u: guess_labels(nn.Softmax(-1), u.unbind(1), 0.5),
        inputs=lambda generator: (torch.randn(5, 2, 3, generator=generator),),
        code="""import torch
from saigen.papers.training.mixmatch import guess_labels, interleave, sharpen

net = torch.nn.Linear(4, 3)
views = torch.rand(5, 2, 4)                                  # two augmentations of five samples
print(guess_labels(net, views.unbind(1), temperature=0.5))   # the mean prediction, sharpened; no gradient
print(sharpen(torch.tensor([0.6, 0.3, 0.1]), 0.5))
print([batch.tolist() for batch in interleave([torch.zeros(6), torch.ones(6), torch.full((6,), 2.0)])])""",
        wrong=(
            (lambda: sharpen(torch.rand(3), 0), "temperature"),
            (lambda: guess_labels(nn.Linear(2, 2), []), "views"),
            (lambda: interleave([torch.zeros(2), torch.zeros(3)]), "rows"),
        ),
    )
    for name, make in (("mixmatch_wrn_28_2", mixmatch_wrn_28_2), ("mixmatch_wrn_28_large", mixmatch_wrn_28_large)):
        yield Example(
            name=name,
            kind="module",
            make=lambda make=make: make(filters=4, repeat=1, num_classes=5),
            inputs=lambda generator: (2 * torch.rand(2, 3, 16, 16, generator=generator) - 1,),
            code=f"""import saigen
import torch

model = saigen.create_model("{name}", num_classes=10{", filters=8" if name.endswith("large") else ""})
with torch.no_grad():
    print(model(torch.rand(2, 3, 32, 32) * 2 - 1).shape)       # images in [-1, 1]""",
            wrong=(
                (lambda make=make: make(filters=0), "filters"),
                (lambda make=make: make(num_classes=-1), "num_classes"),
                (lambda make=make: make(padding="none"), "padding"),
            ),
        )


def benchmarks() -> Iterator[Benchmark]:
    """No peer offers the step as a component, so it is timed beside the same step in plain PyTorch, as public ports write it."""

    def plain(net: nn.Module, x: Tensor, y: Tensor, views: Tensor) -> Tensor:
        first, second = views.unbind(1)
        with torch.no_grad():
            p = (net(first).softmax(1) + net(second).softmax(1)) / 2
            q = p**2 / (p**2).sum(1, keepdim=True)
        images, labels = torch.cat([x, first, second]), torch.cat([F.one_hot(y, 10).float(), q, q])
        share = torch.distributions.Beta(0.75, 0.75).sample((len(images),))
        share = torch.maximum(share, 1 - share)
        order = torch.randperm(len(images))
        wide = share[:, None, None, None]
        images = wide * images + (1 - wide) * images[order]
        labels = share[:, None] * labels + (1 - share[:, None]) * labels[order]
        logits = interleave([net(part) for part in interleave(images.split(len(x)))])
        loss = -(labels[: len(x)] * logits[0].log_softmax(1)).sum(1).mean()
        return loss + 75 * (torch.cat(logits[1:]).softmax(1) - labels[len(x) :]).square().mean()

    def step(ours: bool, filters: int, batch: int) -> Callable[[], Callable[[], Any]]:
        def build() -> Callable[[], Any]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                net = mixmatch_wrn_28_2(filters=filters, repeat=1)
                x, y, views = torch.rand(batch, 3, 32, 32), torch.arange(batch) % 10, torch.rand(batch, 2, 3, 32, 32)
            mixmatch = MixMatch(10, rampup_steps=0)

            def call() -> None:
                net.zero_grad()
                (mixmatch(net, x, y, views).total if ours else plain(net, x, y, views)).backward()

            return call

        return build

    for filters, batch in ((4, 16), (16, 16)):
        name = f"MixMatch step, {filters} filters, batch of {batch}"
        yield Benchmark(name, step(True, filters, batch), step(False, filters, batch))


def parts() -> Iterator[Part]:
    yield Part("MixMatch", "method", _semi_supervised)


def _semi_supervised(recipe: Recipe) -> Recipe:
    # Where every image has a label, the images of the batch are the unlabelled ones as well, and a weight of 1 needs no ramp.
    mixmatch = MixMatch(len(recipe.class_counts), lambda_u=1.0, rampup_steps=0)

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        views = [shift_and_flip(generator, images, labels, mirror=0.0)[0] for _ in range(2)]
        return mixmatch(model, images, labels, torch.stack(views, dim=1), generator=generator).total

    return replace(recipe, loss=loss)
