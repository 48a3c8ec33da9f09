"""Networks whose derivatives by their inputs are written out, forwards (``push``) and backwards (``pull``).

Both are made of ordinary operations, so that training differentiates them once; no autograd within autograd.
"""

import itertools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn


def _index(places: list[int]) -> slice | list[int]:
    """The places as a slice where they follow one another: that makes no copy."""
    if places and places == list(range(places[0], places[-1] + 1)):
        return slice(places[0], places[-1] + 1)
    return places


class CosSin(nn.Module):
    """Angles as cosine and sine, then whatever is no angle: (cos q_a, sin q_a, q_rest)."""

    def __init__(self, dim: int, angular: tuple[int, ...]) -> None:
        super().__init__()
        rest = [i for i in range(dim) if i not in angular]
        self.angular, self.rest, self.count = _index(list(angular)), _index(rest), len(angular)
        order = [*angular, *rest]
        self.back = None if order == list(range(dim)) else sorted(range(dim), key=order.__getitem__)
        self.num_features = dim + len(angular)

    def forward(self, q: Float[Tensor, "*b q"]) -> Float[Tensor, "*b f"]:
        """The features."""
        angles = q[..., self.angular]
        return torch.cat((angles.cos(), angles.sin(), q[..., self.rest]), -1)

    def pull(self, q: Tensor, cotangent: Tensor) -> Tensor:
        """What a cotangent of the features is for q."""
        angles, a = q[..., self.angular], self.count
        of_angles = angles.cos() * cotangent[..., a : 2 * a] - angles.sin() * cotangent[..., :a]
        found = torch.cat((of_angles, cotangent[..., 2 * a :]), -1)
        return found if self.back is None else found[..., self.back]

    def push(self, q: Tensor, tangent: Tensor) -> Tensor:
        """What a tangent of q is for the features."""
        angles, along = q[..., self.angular], tangent[..., self.angular]
        return torch.cat((-angles.sin() * along, angles.cos() * along, tangent[..., self.rest]), -1)


class TanhNet(nn.Sequential):
    """Features (where there are any), ``layers`` tanh layers of ``hidden`` units, and a linear one; orthogonal weights.

    ``zero_bias`` starts the last bias at 0; all others are torch's.
    """

    def __init__(
        self, inputs: int, outputs: int, hidden: int, layers: int, features: nn.Module | None = None, zero_bias: bool = False
    ) -> None:  # fmt: skip
        if hidden < 1:
            raise ValueError(f"hidden is {hidden}, allowed is a whole number of at least 1")
        if layers < 1:
            raise ValueError(f"layers is {layers}, allowed is a whole number of at least 1")
        widths = [inputs] + layers * [hidden]
        blocks = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(widths)]
        last = nn.Linear(hidden, outputs)
        for linear in (*(block[0] for block in blocks), last):
            nn.init.orthogonal_(linear.weight)
        if zero_bias:
            nn.init.zeros_(last.bias)
        super().__init__(*([] if features is None else [features]), *blocks, last)
        self.has_features = features is not None

    def _hidden(self, x: Tensor) -> list[Tensor]:
        h, states = self[0](x) if self.has_features else x, []
        for block in self._blocks():
            h = block(h)
            states.append(h)
        return states

    def _blocks(self) -> list[nn.Module]:
        return list(self)[1 if self.has_features else 0 : -1]

    def _linears(self) -> list[nn.Linear]:
        return [block[0] for block in self._blocks()]

    def pull(
        self, x: Tensor, cotangent: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Float[Tensor, "*b o"], Float[Tensor, "*b i"]]:
        """The output, and the gradient by ``x`` of ``cotangent(output) . output`` with the cotangent held (of the sum
        without one)."""
        states, last = self._hidden(x), self[-1]
        output = last(states[-1])
        weight = last.weight
        g = (output.new_ones(()) if cotangent is None else cotangent(output)).expand_as(output) @ weight
        for h, linear in zip(states[::-1], self._linears()[::-1], strict=True):
            g = (g * (1.0 - h * h)) @ linear.weight
        return output, self[0].pull(x, g) if self.has_features else g

    def push(self, x: Tensor, tangent: Tensor) -> tuple[Float[Tensor, "*b o"], Float[Tensor, "*b o"]]:
        """The output, and its derivative along ``tangent``."""
        states = self._hidden(x)
        d = self[0].push(x, tangent) if self.has_features else tangent
        for h, linear in zip(states, self._linears(), strict=True):
            d = (d @ linear.weight.mT) * (1.0 - h * h)
        return self[-1](states[-1]), d @ self[-1].weight.mT
