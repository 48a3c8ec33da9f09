"""Averages n draws: the spread of a mean falls with the square root of n."""

from jaxtyping import Float
from torch import Tensor, nn


class Mean(nn.Module):
    """A linear layer, then the mean over features."""

    classifier_name = "linear"

    def __init__(self, features: int = 8, num_classes: int = 4) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features is {features}, allowed is a whole number of at least 1")
        self.num_classes = num_classes
        self.linear = nn.Linear(features, num_classes)

    def forward(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b k"]:
        return self.linear(x)


def mean_net(*, num_classes: int = 4, in_chans: int = 3, features: int = 8) -> Mean:
    """The paper's net."""
    return Mean(features, num_classes)
