"""The network of "Well-tuned Simple Nets Excel on Tabular Datasets" (Kadra et al., 2021, arXiv 2106.11189).

A plain multilayer perceptron of nine hidden layers, cut into blocks so that the regularisers have a place to stand:

    x -> Linear(d, w) -> groups x blocks of [BN] ReLU Linear [BN] ReLU [Dropout] Linear -> [BN] ReLU -> Linear(w, C)

    without skip        out = F(x)
    skip                out = x + F(x)
    shake-shake         out = x + alpha F1(x) + (1 - alpha) F2(x)
    shake-drop          out = x + (b + alpha - b alpha) F(x),   b ~ Bernoulli(p_l),   p_l = 1 - l / L * p_max

with beta for alpha in the backward pass. The paper's "even" is the constant 1/2, "shake" a draw from U(0, 1) a batch.
"""

import re

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SHAPES = ("funnel", "long_funnel", "diamond", "hexagon", "brick", "triangle", "stairs")
MULTIBRANCH = (None, "shake-shake", "shake-drop")
SHAKES = ("even-even", "shake-even", "shake-shake", "M3")
"""How alpha is drawn in the forward pass, and beta in the backward pass; M3 draws beta between alpha and 1/2."""


def dropout_rates(shape: str, largest: float | int, groups: int = 2, *, truncate: bool = False) -> list[float]:
    """The dropout rate of each group: Auto-PyTorch's shapes of layer widths, drawn with rates, from 0 before to 0 behind.

    The published code makes the steps of its shapes whole numbers, which are 0 for rates: then every shape is a brick,
    but the triangle, which leaves the first group without dropout. ``truncate`` does the same.

    Raises ``ValueError`` for an unknown ``shape``, ``largest`` outside [0, 1) and ``groups`` below 1.

    >>> dropout_rates("funnel", 0.4), dropout_rates("funnel", 0.4, truncate=True)
    ([0.4, 0.2], [0.4, 0.4])
    """
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}, allowed are {', '.join(SHAPES)}")
    if not 0 <= largest < 1:
        raise ValueError(f"largest is {largest}, allowed is a rate of at least 0 and below 1")
    if groups < 1:
        raise ValueError(f"groups is {groups}, allowed is 1 or more")
    return _shape(shape, largest, 0.0, 0.0, groups + 1, truncate)[:groups]


def _shape(shape: str, largest: float | int, first: float, last: float, layers: int, truncate: bool) -> list[float]:
    """Widths, or rates, of ``layers`` layers behind one of ``first``; the last is ``last``."""
    if layers < 2:
        return [last] * layers
    largest = max(first, largest)

    def steps(start: float, stop: float) -> float:
        step = max(0.0, (stop - start) / (layers - 1))
        return float(int(step)) if truncate else step

    if shape == "brick":
        return [largest] * (layers - 1) + [last]
    if shape == "triangle":
        return [first + (i + 1) * steps(first, largest) for i in range(layers - 2)] + [largest, last]
    if shape == "funnel":
        return [largest - i * steps(last, largest) for i in range(layers - 1)] + [last]
    if shape == "stairs":
        level = [largest] * (1 + layers % 2)
        for i in range(layers // 2 - 1):
            level += [largest - 2 * (i + 1) * steps(last, largest)] * 2
        return level + [last]
    if shape == "long_funnel":
        flat = layers // 2
        return _shape("brick", largest, first, largest, flat, truncate) + _shape(
            "funnel", largest, first, last, layers - flat, truncate
        )
    if shape == "diamond":
        rise = layers // 2 + 1
        up = _shape("triangle", largest, first, largest, rise, truncate)[:-2]
        return up + _shape("funnel", largest, largest, last, layers - rise + 2, truncate)
    slope = layers // 3 + 1  # hexagon
    return (
        _shape("triangle", largest, first, largest, slope, truncate)
        + _shape("brick", largest, largest, largest, layers - 2 * slope, truncate)
        + _shape("funnel", largest, largest, last, slope, truncate)
    )


def shake_shake(
    first: Float[Tensor, "n w"], second: Float[Tensor, "n w"], alpha: Tensor | float | int, beta: Tensor | float | int
) -> Float[Tensor, "n w"]:
    """``alpha first + (1 - alpha) second``, whose gradient is that of ``beta first + (1 - beta) second``.

    >>> shake_shake(torch.ones(1, 1), torch.zeros(1, 1), 0.25, 0.5).item()
    0.25
    """
    return _with_gradient_of(alpha * first + (1 - alpha) * second, beta * first + (1 - beta) * second)


def shake_drop(
    x: Float[Tensor, "n w"], b: Tensor | float | int, alpha: Tensor | float | int, beta: Tensor | float | int
) -> Float[Tensor, "n w"]:
    """``(b + alpha - b alpha) x``, with the gradient of ``(b + beta - b beta) x``: b = 1 leaves the branch as it is.

    >>> shake_drop(torch.ones(1, 1), 0.0, 0.25, 0.5).item()
    0.25
    """
    return _with_gradient_of((b + alpha - b * alpha) * x, (b + beta - b * beta) * x)


def _with_gradient_of(value: Tensor, other: Tensor) -> Tensor:
    return other + (value - other).detach()


def _alpha_beta(shake: str, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    def draw() -> Tensor:
        return torch.rand((), device=like.device)

    alpha = 0.5 if shake.startswith("even") else draw()
    if shake == "M3":
        # from the smaller of alpha and 1/2 upwards, as far as they are apart
        return alpha, alpha.clamp(max=0.5) + draw() * (alpha - 0.5).abs()
    return alpha, 0.5 if shake.endswith("even") else draw()


class Block(nn.Module):
    """Two linear layers of one width, and what the cocktail adds: (n, w) to (n, w).

    ``keep`` is shake-drop's p_l, the probability that the branch is left as it is.
    """

    def __init__(
        self,
        width: int,
        *,
        batch_norm: bool = False,
        dropout: float | int | None = None,
        skip: bool = False,
        multibranch: str | None = None,
        keep: float | int = 1.0,
        shake: str = "even-even",
    ) -> None:
        super().__init__()
        self.skip, self.multibranch, self.keep, self.shake = skip, multibranch, keep, shake
        self.branch = self._branch(width, batch_norm, dropout)
        self.other = self._branch(width, batch_norm, dropout) if multibranch == "shake-shake" else None

    @staticmethod
    def _branch(width: int, batch_norm: bool, dropout: float | int | None) -> nn.Sequential:
        def norm() -> list[nn.Module]:
            return [nn.BatchNorm1d(width)] if batch_norm else []

        drop = [] if dropout is None else [nn.Dropout(dropout)]
        return nn.Sequential(
            *norm(), nn.ReLU(), nn.Linear(width, width), *norm(), nn.ReLU(), *drop, nn.Linear(width, width)
        )

    def forward(self, x: Float[Tensor, "n w"]) -> Float[Tensor, "n w"]:
        out = self.branch(x)
        if self.multibranch is not None:
            alpha, beta = _alpha_beta(self.shake, out) if self.training else (0.5, 0.5)
            if self.other is not None:
                out = shake_shake(out, self.other(x), alpha, beta)
            else:
                b = self.keep
                if self.training:
                    b = (torch.rand((), device=x.device) <= self.keep).to(out.dtype)
                out = shake_drop(out, b, alpha, beta)
        return x + out if self.skip else out

    def extra_repr(self) -> str:
        return f"skip={self.skip}, multibranch={self.multibranch}, keep={self.keep:g}, shake={self.shake}"


class CocktailMLP(nn.Module):
    """The paper's network: rows (n, d) of standardised and one-hot columns to logits (n, C).

    - ``width``: 512 in the paper; it grows to ``in_features`` where these are more, as in the published code.
    - ``groups``, ``blocks``: 2 groups of 2 blocks of two layers, nine hidden layers with the first.
    - ``batch_norm``: before every ReLU. ``skip``: blocks become residual.
    - ``dropout``: the largest rate, or None; ``dropout_shape`` gives each group its own, see ``dropout_rates``;
      ``truncate_shapes`` as there.
    - ``multibranch``: ``"shake-shake"`` (twice the blocks) or ``"shake-drop"`` with the largest probability
      ``shake_drop``, both only with ``skip``; ``shake`` says how they draw, the paper has ``"even-even"``.

    Raises ``ValueError`` for what is outside that.

    >>> CocktailMLP(30, 2, batch_norm=True, skip=True)(torch.randn(4, 30)).shape
    torch.Size([4, 2])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        width: int = 512,
        groups: int = 2,
        blocks: int = 2,
        batch_norm: bool = False,
        dropout: float | int | None = None,
        dropout_shape: str = "brick",
        skip: bool = False,
        multibranch: str | None = None,
        shake_drop: float | int = 0.5,
        shake: str = "even-even",
        truncate_shapes: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("num_classes", num_classes), ("width", width),
                            ("groups", groups), ("blocks", blocks)):  # fmt: skip
            if value < 1:
                raise ValueError(f"{name} is {value}, allowed is 1 or more")
        if multibranch not in MULTIBRANCH:
            raise ValueError(f"multibranch is {multibranch!r}, allowed are {', '.join(map(repr, MULTIBRANCH))}")
        if multibranch is not None and not skip:
            raise ValueError(f"multibranch is {multibranch!r} without skip, allowed is it only with skip=True")
        if not 0 <= shake_drop <= 1:
            raise ValueError(f"shake_drop is {shake_drop}, allowed is a probability")
        if shake not in SHAKES:
            raise ValueError(f"shake is {shake!r}, allowed are {', '.join(SHAKES)}")
        rates = [None] * groups
        if dropout is not None:
            rates = dropout_rates(dropout_shape, dropout, groups, truncate=truncate_shapes)
        width, layers = max(width, in_features), groups * blocks
        self.stem = nn.Linear(in_features, width)
        self.blocks = nn.ModuleList(
            Block(
                width,
                batch_norm=batch_norm,
                dropout=rates[layer // blocks],
                skip=skip,
                multibranch=multibranch,
                keep=1 - (layer + 1) / layers * shake_drop,
                shake=shake,
            )
            for layer in range(layers)
        )
        self.norm = nn.BatchNorm1d(width) if batch_norm else nn.Identity()
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n classes"]:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(F.relu(self.norm(x)))

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor], blocks: int = 2) -> dict[str, Tensor]:
        """A state dict of the published code (embedding, backbone, head in a row) in our names."""
        last = max((int(found[1]) for key in state if (found := re.match(r"1\.(\d+)\.\d+\.layers", key))), default=0)
        found = {}
        for key, value in state.items():
            key = re.sub(r"^1\.0\.", "stem.", key)
            key = re.sub(r"^2\.0\.", "head.", key)
            key = re.sub(rf"^1\.{last + 1}\.", "norm.", key)
            key = re.sub(
                r"^1\.(\d+)\.(\d+)\.(shake_shake_)?layers\.",
                lambda m: f"blocks.{(int(m[1]) - 1) * blocks + int(m[2])}.{'other' if m[3] else 'branch'}.",
                key,
            )
            found[key] = value
        return found
