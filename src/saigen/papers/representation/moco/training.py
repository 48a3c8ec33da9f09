"""How MoCo is trained, looked at and handed on: schedules, the linear classifier, weights for detectors.

Section 4, the official scripts (``main_moco.py``, ``main_lincls.py``, ``detection``), and MoCo v2 (arXiv 2003.04297).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saigen.nn.resnet import strip_prefixes


@dataclass(frozen=True)
class Recipe:
    """An SGD training: rate ``lr`` at a batch of ``batch_size``, times 0.1 at each of ``milestones``, or along a cosine."""

    lr: float
    epochs: int
    milestones: tuple[int, ...] = ()
    weight_decay: float = 1e-4
    batch_size: int = 256
    momentum: float = 0.9

    def rate(self, epoch: int, batch_size: int | None = None) -> float:
        """The learning rate in ``epoch``, counted from 0, scaled linearly where the batch is another one."""
        if not 0 <= epoch < self.epochs:
            raise ValueError(f"epoch is {epoch}, allowed is 0 to {self.epochs - 1}")
        factor = 0.1 ** sum(epoch >= milestone for milestone in self.milestones)
        if not self.milestones:
            factor = 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        return self._scaled(batch_size) * factor

    def optimizer(self, model: nn.Module, batch_size: int | None = None) -> torch.optim.SGD:
        """SGD over what is trained of ``model``."""
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD(
            trained, self._scaled(batch_size), momentum=self.momentum, weight_decay=self.weight_decay
        )

    def _scaled(self, batch_size: int | None) -> float:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, allowed is batch_size >= 1")
        return self.lr * (batch_size or self.batch_size) / self.batch_size


RECIPES = {
    "v1": Recipe(0.03, 200, (120, 160)),
    "v2": Recipe(0.03, 200),
    "linear": Recipe(30.0, 100, (60, 80), weight_decay=0.0),
}


def recipe(name: str) -> Recipe:
    """The training of ``"v1"`` or ``"v2"`` on ImageNet, or of the ``"linear"`` classifier on frozen features."""
    if name not in RECIPES:
        raise ValueError(f"name is {name!r}, allowed are {', '.join(RECIPES)}")
    return RECIPES[name]


def learning_rate(name: str, epoch: int) -> float:
    """The learning rate of a recipe in an epoch: 0.03 at first, 0.003 from epoch 120 and 0.0003 from 160 in v1."""
    return recipe(name).rate(epoch)


class LinearClassifier(nn.Module):
    """A linear layer on a frozen backbone (section 4.1): images to logits (b, num_classes).

    ``backbone`` gives features (b, num_features), as that of ``MoCo.backbone()``. It stays in eval mode whatever
    ``train()`` says, since batch norm would move its statistics, and gets no gradient. The layer starts at
    N(0, 0.01) and 0. The rate of ``recipe("linear")``, 30, is no mistake: features are small.

    >>> net = LinearClassifier(nn.Flatten(), num_features=12, num_classes=3)
    >>> net(torch.rand(2, 3, 2, 2)).shape
    torch.Size([2, 3])
    """

    def __init__(self, backbone: nn.Module, num_features: int, num_classes: int = 1000) -> None:
        super().__init__()
        if min(num_features, num_classes) < 1:
            raise ValueError(
                f"num_features and num_classes are {num_features} and {num_classes}, allowed is at least 1 for each"
            )
        self.backbone = backbone.requires_grad_(False).eval()
        self.fc = nn.Linear(num_features, num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def train(self, mode: bool = True) -> "LinearClassifier":
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b n"]:
        with torch.no_grad():
            x = self.backbone(x)
        return self.fc(x)


def backbone_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a checkpoint, official or ours, the weights of f_q without its head: what a ResNet of ``num_classes=0`` loads.

    Raises ``ValueError`` where the checkpoint has no query encoder.
    """
    state = strip_prefixes(state, ("module.",))
    found = {
        key.removeprefix("encoder_q."): value
        for key, value in state.items()
        if key.startswith("encoder_q.") and not key.startswith("encoder_q.fc.")
    }
    if not found:
        raise ValueError(f"state has the keys {', '.join(list(state)[:3])}, ..., allowed are those of encoder_q")
    return found


def detectron2_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in the names of detectron2, for fine-tuning a detector (section 4.2); save ``{"model": ...,
    "matching_heuristics": True}`` with pickle, as NumPy arrays.

    Detectors are fine-tuned with their batch norms trained and synchronised, those of new layers as well.
    """
    converted = {}
    for key, value in backbone_state_dict(state).items():
        stage, _, rest = key.partition(".")
        if stage.startswith("layer"):
            key = f"res{int(stage.removeprefix('layer')) + 1}.{rest}"
        else:
            key = f"stem.{key}"
        for number in "123":
            key = key.replace(f"bn{number}.", f"conv{number}.norm.")
        converted[key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")] = value
    return converted
