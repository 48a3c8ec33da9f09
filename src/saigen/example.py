"""What a room's ``examples.py`` yields: small instances of its public components, side-by-side benchmarks, and the parts
that its components play in the training of any classifier."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

Kind = Literal["module", "loss", "transform", "optimizer", "estimator", "function", "agent"]


@dataclass(frozen=True)
class Example:
    """A small instance of one public component; the contract, the cross test and the page are fed from it.

    ``make`` builds the component (for an optimizer it takes the parameters), ``inputs`` the positional arguments of one
    call from a generator (for an estimator ``(X, y)``), ``batch`` names the batch dimension of the first input, and
    ``wrong`` pairs a call that must raise ``ValueError`` with a text its message must contain.
    ``expected_failures`` maps the name of a contract check to the reason why it cannot hold.
    """

    name: str
    kind: Kind
    make: Callable[..., Any]
    code: str
    inputs: Callable[[torch.Generator], tuple[Any, ...]] = lambda generator: ()
    wrong: tuple[tuple[Callable[[], Any], str], ...] = ()
    expected_failures: Mapping[str, str] = field(default_factory=dict)
    batch: int | None = 0


@dataclass(frozen=True)
class Benchmark:
    """Ours against a peer, side by side in one process.

    ``ours`` and ``peer`` each build once and return the zero-argument call to be timed; both do the same work on the
    same inputs. ``extra`` is what has to be installed for the peer.
    """

    name: str
    ours: Callable[[], Callable[[], Any]]
    peer: Callable[[], Callable[[], Any]]
    extra: str = "peers"


def step_of(model: nn.Module, images: Tensor, *, train: bool) -> Callable[[], Any]:
    """What is timed of a classifier: its forward pass in eval mode, or in training a forward and a backward pass."""
    labels = torch.arange(len(images)) % 1000
    model.train(train)

    @torch.inference_mode()
    def forward() -> Any:
        return model(images)

    def forward_and_backward() -> Any:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()

    return forward_and_backward if train else forward


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """What ``build()`` makes with the global generator at 0, which is afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def beside_timm(
    label: str, build: Callable[[], nn.Module], name: str, *, side: int = 224, forward: int = 8, training: int = 4
) -> Iterator[Benchmark]:
    """Forward pass and training step of ``build()`` beside timm's model ``name`` with the same weights.

    ``forward`` and ``training`` are the batches, of images of ``side`` pixels; ``build`` leaves out what is random.
    """

    for train, batch in ((False, forward), (True, training)):
        images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0))

        def ours(train: bool = train, images: Tensor = images) -> Callable[[], Any]:
            return step_of(seeded(build), images, train=train)

        def peer(train: bool = train, images: Tensor = images) -> Callable[[], Any]:
            model = importlib.import_module("timm").create_model(name)
            model.load_state_dict(seeded(build).state_dict())
            return step_of(model, images, train=train)

        what = "forward and backward" if train else "forward"
        yield Benchmark(name=f"{label} {what}, batch {batch}", ours=ours, peer=peer)


def _adamw(model: nn.Module, rate: float) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)


def _cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def _unchanged(generator: torch.Generator, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return images, labels


@dataclass(frozen=True)
class Recipe:
    """How a classifier of images is trained: what a method changes, and what it leaves as it was.

    ``model`` takes images (b, channels, side, side) in [0, 1] to logits (b, classes); ``class_counts`` counts the training labels;
    ``optimizer(model, rate)`` makes the optimizer; ``loss(model, images, labels)`` gives a scalar;
    ``transform(generator, images, labels)`` a batch in place of a batch.
    """

    model: nn.Module
    class_counts: tuple[int, ...]
    channels: int
    side: int
    steps: int
    optimizer: Callable[[nn.Module, float], Optimizer] = _adamw
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = _cross_entropy
    transform: Callable[[torch.Generator, Tensor, Tensor], tuple[Tensor, Tensor]] = _unchanged


@dataclass(frozen=True)
class Part:
    """A component as it takes part in the training of any classifier; ``saigen cross`` pairs models with methods.

    A model is made by ``make(classes, channels, side)``, a small instance for images of ``side`` pixels, at least 16.
    A method is ``make(recipe)``, which gives the recipe back with what the method changes; it raises ``ValueError`` where
    it cannot be had with that model (auxiliary batch norms, say, for a network without batch norm).
    """

    name: str
    kind: Literal["model", "method"]
    make: Callable[..., Any]
