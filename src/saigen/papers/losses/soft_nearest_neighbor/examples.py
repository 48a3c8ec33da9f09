"""Small instances of the soft nearest neighbor loss and its network, and its speed beside the formula written down."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from saigen.example import Benchmark, Example, Part, Recipe
from saigen.papers.losses.soft_nearest_neighbor import (
    DeepNeighbors,
    EntanglementRegularizer,
    SoftNearestNeighborLoss,
    entangled_cnn,
    hidden_neighbor_credibility,
    soft_nearest_neighbor_loss,
)


def _batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(12, 5, generator=generator), torch.arange(12) % 3


def examples() -> Iterator[Example]:
    wrong_loss = (
        (lambda: SoftNearestNeighborLoss(temperature=0.0), "temperature"),
        (lambda: SoftNearestNeighborLoss(metric="manhattan"), "metric"),
        (lambda: SoftNearestNeighborLoss(optimize="newton"), "optimize"),
        (lambda: SoftNearestNeighborLoss(eps=-1.0), "eps"),
        (lambda: SoftNearestNeighborLoss()(torch.rand(3, 2), torch.zeros(4, dtype=torch.long)), "labels"),
    )
    yield Example(
        name="learned_temperature",
        kind="loss",
        make=lambda: SoftNearestNeighborLoss(temperature=10.0),
        inputs=_batch,
        code="""import torch
from torch.nn.functional import cross_entropy
from saigen.papers.losses.soft_nearest_neighbor import EntanglementRegularizer, entangled_cnn

model = entangled_cnn(num_classes=10)
entangle = EntanglementRegularizer(model, ["conv1", "conv2", "conv3"], factor=-0.1)   # any model, any layers
images, labels = torch.rand(32, 1, 28, 28), torch.arange(32) % 10
loss = cross_entropy(model(images), labels) + entangle(labels)      # after the model's forward pass
loss.backward()
print(float(loss))""",
        wrong=(
            *wrong_loss,
            (lambda: EntanglementRegularizer(entangled_cnn(), ["conv4"]), "conv4"),
            (
                lambda: EntanglementRegularizer(entangled_cnn(), ["conv1"])(torch.zeros(2, dtype=torch.long)),
                "run the model",
            ),
        ),
    )
    yield Example(
        name="least_over_temperature",
        kind="loss",
        make=lambda: SoftNearestNeighborLoss(optimize="exact"),
        inputs=_batch,
        code="""import torch
from saigen.papers.losses.soft_nearest_neighbor import entangled_cnn, layer_entanglement

model = entangled_cnn(num_classes=10)
batches = [(torch.rand(64, 1, 28, 28), torch.randint(10, (64,)))]
for row in layer_entanglement(model, ["conv1", "conv2", "conv3", "classifier"], batches):
    print(row)                                  # how entangled the classes are in each layer""",
        wrong=wrong_loss,
    )
    yield Example(
        name="official_eps",
        kind="loss",
        make=lambda: SoftNearestNeighborLoss(temperature=10.0, metric="cosine", eps=1e-5),
        inputs=_batch,
        code="""import torch
from saigen.papers.losses.soft_nearest_neighbor import soft_nearest_neighbor_loss

x, y = torch.tensor([[0.0, 0], [1, 0], [0, 2], [3, 3]]), torch.tensor([0, 0, 1, 1])
print(soft_nearest_neighbor_loss(x, y, temperature=1.0))                # 1.6077, exact
print(soft_nearest_neighbor_loss(x, y, temperature=1.0, eps=1e-5))      # 1.6540, as the official code has it""",
        wrong=((lambda: soft_nearest_neighbor_loss(*_batch(torch.Generator()), temperature=-1.0), "temperature"),),
    )
    yield Example(
        name="entangled_cnn",
        kind="module",
        make=lambda: entangled_cnn(num_classes=4, width=4),
        inputs=lambda generator: (torch.rand(2, 1, 28, 28, generator=generator),),
        code="""import torch
from saigen.papers.losses.soft_nearest_neighbor import DeepNeighbors, entangled_cnn, hidden_features

model, layers = entangled_cnn(width=8), ["conv1", "conv2", "conv3"]
x, y = torch.rand(200, 1, 28, 28), torch.randint(10, (200,))
train, held_out, new = (hidden_features(model, layers, part) for part in (x[:120], x[120:160], x[160:]))
neighbors = DeepNeighbors(train, y[:120], k=15).calibrate(held_out, y[120:160])
print(neighbors.credibility(new, model(x[160:]).argmax(-1)))            # near 0: an outlier""",
        wrong=(
            (lambda: entangled_cnn(image_size=20), "image_size"),
            (lambda: entangled_cnn(num_classes=-1), "num_classes"),
            (
                lambda: hidden_neighbor_credibility(
                    torch.rand(3, 2), torch.zeros(3).long(), torch.rand(1, 2), torch.zeros(1).long(), k=9
                ),
                "k is 9",
            ),
            (
                lambda: DeepNeighbors({"a": torch.rand(3, 2)}, torch.zeros(3).long(), 2).credibility(
                    {"a": torch.rand(1, 2)}, torch.zeros(1).long()
                ),
                "calibrate",
            ),
        ),
    )


def parts() -> Iterator[Part]:
    yield Part("entangled", "method", _entangled)


def _entangled(recipe: Recipe) -> Recipe:
    """The layer before the classifier is entangled, on top of the recipe's loss."""
    layer = _last_hidden_layer(recipe)

    def loss(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # hooks are put on for one pass: what is trained may be a copy of the recipe's model
        entangle = EntanglementRegularizer(model, [layer], factor=-0.01)
        try:
            return recipe.loss(model, images, labels) + entangle(labels)
        finally:
            entangle.close()

    return replace(recipe, loss=loss)


@torch.no_grad()
def _last_hidden_layer(recipe: Recipe) -> str:
    called: list[str] = []
    handles = [
        child.register_forward_hook(lambda module, inputs, output, name=name: called.append(name))
        for name, child in recipe.model.named_children()
    ]
    training = recipe.model.training
    recipe.model.eval()(torch.zeros(2, recipe.channels, recipe.side, recipe.side))
    recipe.model.train(training)
    for handle in handles:
        handle.remove()
    if len(called) < 2:
        raise ValueError(f"model is a {type(recipe.model).__name__}, allowed are models with a hidden layer")
    return called[-2]


def benchmarks() -> Iterator[Benchmark]:
    for batch, dimensions in ((128, 64), (1024, 256)):
        yield Benchmark(
            name=f"loss, forward and backward, against the official formula in PyTorch, {batch} x {dimensions}",
            ours=_step(lambda x, y: soft_nearest_neighbor_loss(x, y, 100.0, eps=1e-5), batch, dimensions),
            peer=_step(_as_written, batch, dimensions),
        )


def _as_written(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Equation 1 with the official code's 1e-5, step by step; the official code is TensorFlow 1."""
    others = 1.0 - torch.eye(len(x))
    fits = torch.exp(-torch.cdist(x, x).square() / 100.0) * others
    same = (y[:, None] == y[None, :]).float()
    picked = fits / (1e-5 + fits.sum(1, keepdim=True)) * same
    return -torch.log(1e-5 + picked.sum(1)).mean()


def _step(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], batch: int, dimensions: int
) -> Callable[[], Callable[[], Any]]:
    def build() -> Callable[[], Any]:
        x = torch.randn(batch, dimensions, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = torch.arange(batch) % 10
        return lambda: torch.autograd.grad(loss(x, y), x)

    return build
