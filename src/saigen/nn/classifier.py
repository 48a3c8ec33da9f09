"""What every classifier of the list does with its last layer, under the names that timm has for it."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn


class Classifier(nn.Module):
    """A network that is ``forward_features`` and then ``forward_head``, whose last layer can be replaced.

    A subclass defines those two, sets ``num_features``, names its last layer in ``classifier_name`` and calls
    ``reset_classifier`` in its constructor, or makes the layer itself. ``num_classes`` 0 is a network without it.

    >>> import torch
    >>> class Mean(Classifier):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.conv, self.num_features = nn.Conv2d(3, 8, 1), 8
    ...         self.reset_classifier(10)
    ...     def forward_features(self, x):
    ...         return self.conv(x)
    ...     def forward_head(self, x, pre_logits=False):
    ...         return x.mean((2, 3)) if pre_logits else self.fc(x.mean((2, 3)))
    >>> net = Mean().double()
    >>> net.reset_classifier(5)
    >>> net(torch.rand(2, 3, 4, 4, dtype=torch.double)).shape
    torch.Size([2, 5])
    """

    classifier_name: ClassVar[str] = "fc"
    num_features: int
    num_classes: int

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k ..."]:
        """Logits, of images or (a segmenter's) of places."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The last layer; an identity where ``num_classes`` is 0."""
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int) -> None:
        """Puts a fresh last layer in for ``num_classes`` classes, on the network's device and in its type; 0 takes it away.

        Raises ``ValueError`` for less than 0.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}, allowed is num_classes >= 0")
        self.num_classes = num_classes
        layer = self.new_classifier(num_classes).to(next(self.parameters())) if num_classes else nn.Identity()
        parent, _, name = self.classifier_name.rpartition(".")
        setattr(self.get_submodule(parent), name, layer)

    def new_classifier(self, num_classes: int) -> nn.Module:
        """A last layer with fresh weights; overridden by networks with another layer, or other first weights."""
        return nn.Linear(self.num_features, num_classes)
