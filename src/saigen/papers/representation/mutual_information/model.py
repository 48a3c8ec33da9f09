"""Encoders and critics: what turns two views into a matrix of scores, and decides how good the features get.

Weights start as in Keras: Glorot's uniform draw and biases of 0, except where a layer starts near nothing.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from saigen.nn.conv import Conv2dSame

NEAR_NOTHING = 1e-4
"""Standard deviation of the first weights of residual and coupling layers, cut off at twice that: they start as x -> x."""


def halves(images: Float[Tensor, "b h w"]) -> tuple[Float[Tensor, "b x"], Float[Tensor, "b x"]]:
    """The two views of the paper: the upper and the lower half of each image, flattened.

    Raises ``ValueError`` for images of an odd height.
    """
    if images.ndim != 3 or images.shape[1] % 2:
        raise ValueError(f"images has shape {tuple(images.shape)}, allowed is (b, h, w) with an even h")
    upper, lower = images.flatten(1).chunk(2, dim=1)
    return upper, lower


class InfoMax(nn.Module):
    """Two encoders and a critic: views (b, ...) and (b, ...) to the scores f(g1(x_i), g2(y_j)), (b, b).

    Features for a task are ``g1``'s.

    >>> model = InfoMax(MLPEncoder(392), MLPEncoder(392), BilinearCritic(100))
    >>> model(torch.rand(8, 392), torch.rand(8, 392)).shape
    torch.Size([8, 8])
    """

    def __init__(self, g1: nn.Module, g2: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.g1, self.g2, self.critic = g1, g2, critic

    def forward(self, x1: Float[Tensor, "b ..."], x2: Float[Tensor, "b ..."]) -> Float[Tensor, "b b"]:
        return self.critic(self.g1(x1), self.g2(x2))


# --- encoders -------------------------------------------------------------------------------------------------------


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for before, width in pairwise(widths):
        layers += [nn.Linear(before, width), nn.ReLU()]
    return _keras(nn.Sequential(*layers[:-1]))


def _keras(module: nn.Module) -> nn.Module:
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def _near_nothing(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=NEAR_NOTHING, a=-2 * NEAR_NOTHING, b=2 * NEAR_NOTHING)
            nn.init.zeros_(layer.bias)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}, allowed is 1 or more")


class MLPEncoder(nn.Module):
    """Linear layers with ReLU between them: (b, dim) to (b, widths[-1]). 238,300 parameters at the paper's sizes."""

    def __init__(self, dim: int = 392, widths: Sequence[int] = (300, 300, 100)) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise ValueError(f"widths is {tuple(widths)}, allowed are one or more numbers of 1 or more")
        _check_sizes(dim=dim)
        self.net = _mlp((dim, *widths))

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b e"]:
        return self.net(x)


class ConvEncoder(nn.Module):
    """Two convolutions of stride 2 ("same"), layer norm over the map, the mean over places, a linear layer.

    Takes flattened images (b, h * w) of ``shape`` (h, w) to (b, dim_out). 219,748 parameters at the paper's sizes.
    """

    def __init__(
        self, shape: tuple[int, int] = (14, 28), *, channels: int = 64, kernel: int = 5, dim_out: int = 100
    ) -> None:
        super().__init__()
        _check_sizes(height=shape[0], width=shape[1], channels=channels, kernel=kernel, dim_out=dim_out)
        self.shape = shape
        self.conv1 = Conv2dSame(1, channels, kernel, stride=2)
        self.conv2 = Conv2dSame(channels, 2 * channels, kernel, stride=2)
        self.norm = MapNorm(2 * channels)
        self.head = nn.Linear(2 * channels, dim_out)
        _keras(self)

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b e"]:
        height, width = self.shape
        if x.shape[1] != height * width:
            raise ValueError(f"x has {x.shape[1]} pixels an image, allowed are {height} x {width} = {height * width}")
        maps = self.conv2(self.conv1(x.view(-1, 1, height, width)).relu()).relu()
        return self.head(self.norm(maps).mean((2, 3)))


class MapNorm(nn.Module):
    """Layer norm over all values of a sample's map (b, c, h, w), then a scale and a shift of each channel.

    It is (x - mean) / (std + 1e-6), the epsilon outside of the root.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        _check_sizes(channels=channels)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        std, mean = torch.std_mean(x, (1, 2, 3), correction=0, keepdim=True)
        return (x - mean) / (std + self.eps) * self.weight[:, None, None] + self.bias[:, None, None]


class ResidualMLP(nn.Module):
    """x <- relu(W x + b) + x, layer after layer, the last without ReLU (section 3.1, third experiment).

    It starts as the identity, invertible, and nothing keeps it so. (b, dim) to (b, dim).
    """

    def __init__(self, dim: int = 392, layers: int = 5) -> None:
        super().__init__()
        _check_sizes(dim=dim, layers=layers)
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        _near_nothing(self)

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        for layer in self.layers[:-1]:
            x = layer(x).relu() + x
        return self.layers[-1](x) + x


class Coupling(nn.Module):
    """A fixed random permutation, then: the first half stays, and says how the second is shifted (NICE) and scaled.

    The scale is softplus(s) + 1e-7 where RealNVP has exp(s): steadier, and as invertible. Without ``scale`` volumes are
    preserved.
    """

    def __init__(self, dim: int, hidden: Sequence[int] = (512, 512), *, scale: bool = False) -> None:
        super().__init__()
        if dim < 2:
            raise ValueError(f"dim is {dim}, allowed is 2 or more")
        if not hidden or min(hidden) < 1:
            raise ValueError(f"hidden is {tuple(hidden)}, allowed are one or more widths of 1 or more")
        self.kept, self.scale = dim // 2, scale
        self.net = _mlp((self.kept, *hidden, (2 if scale else 1) * (dim - self.kept)))
        _near_nothing(self)
        self.register_buffer("permutation", torch.randperm(dim))

    def _shift_and_scale(self, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.scale:
            return self.net(kept), None
        shift, raw = self.net(kept).chunk(2, dim=-1)
        return shift, F.softplus(raw) + 1e-7

    def forward(self, x: Float[Tensor, "b d"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b"]]:
        """The image of x, and log |det| of the Jacobian there."""
        x = x[..., self.permutation]
        kept, moved = x[..., : self.kept], x[..., self.kept :]
        shift, scale = self._shift_and_scale(kept)
        if scale is None:
            return torch.cat([kept, moved + shift], -1), x.new_zeros(len(x))
        return torch.cat([kept, moved * scale + shift], -1), scale.log().sum(-1)

    def inverse(self, z: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """The x that ``forward`` takes to z."""
        kept, moved = z[..., : self.kept], z[..., self.kept :]
        shift, scale = self._shift_and_scale(kept)
        moved = moved - shift if scale is None else (moved - shift) / scale
        return torch.cat([kept, moved], -1)[..., self.permutation.argsort()]


class CouplingFlow(nn.Module):
    """An encoder that cannot lose information: couplings one after another, (b, dim) to (b, dim).

    Whatever its weights, I(g1(x); g2(y)) = I(x; y). With ``scale`` RealNVP (of a softplus), else NICE; it starts as a
    permutation of its input (times constants). 13,922,040 and 16,938,480 parameters at the paper's 30 couplings.

    >>> flow = CouplingFlow(8, 3, hidden=(16,), scale=True)
    >>> x = torch.rand(5, 8)
    >>> torch.allclose(flow.inverse(flow(x)), x, atol=1e-4)
    True
    """

    def __init__(
        self, dim: int = 392, n_couplings: int = 30, hidden: Sequence[int] = (512, 512), *, scale: bool = False
    ) -> None:
        super().__init__()
        _check_sizes(n_couplings=n_couplings)
        self.dim = dim
        self.couplings = nn.ModuleList(Coupling(dim, hidden, scale=scale) for _ in range(n_couplings))

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        return self.with_log_det(x)[0]

    def with_log_det(self, x: Float[Tensor, "b d"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b"]]:
        """The features, and log |det| of the Jacobian of each: 0 without ``scale``."""
        if x.shape[-1] != self.dim:
            raise ValueError(f"x has {x.shape[-1]} dimensions, allowed are {self.dim}")
        log_det = x.new_zeros(len(x))
        for coupling in self.couplings:
            x, step = coupling(x)
            log_det = log_det + step
        return x, log_det

    def inverse(self, z: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """The input that ``forward`` takes to z, to rounding error."""
        for coupling in reversed(self.couplings):
            z = coupling.inverse(z)
        return z


# --- critics --------------------------------------------------------------------------------------------------------


class InnerProductCritic(nn.Module):
    """f(x, y) = x^T y: features (n, d) and (m, d) to scores (n, m)."""

    def forward(self, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
        return x @ y.T


class BilinearCritic(nn.Module):
    """f(x, y) = x^T W y: features (n, dim) and (m, dim_y) to scores (n, m). ``dim_y`` is by default ``dim``."""

    def __init__(self, dim: int = 100, dim_y: int | None = None) -> None:
        super().__init__()
        dim_y = dim if dim_y is None else dim_y
        _check_sizes(dim=dim, dim_y=dim_y)
        self.w = _keras(nn.Linear(dim_y, dim, bias=False))

    def forward(self, x: Float[Tensor, "n d"], y: Float[Tensor, "m e"]) -> Float[Tensor, "n m"]:
        return x @ self.w(y).T


class SeparableCritic(nn.Module):
    """f(x, y) = phi(x)^T psi(y) with an MLP each: features (n, dim_in) and (m, dim_in) to scores (n, m)."""

    def __init__(self, dim_in: int = 100, hidden: int = 100, dim_out: int = 100, *, layers: int = 1) -> None:
        super().__init__()
        _check_sizes(dim_in=dim_in, hidden=hidden, dim_out=dim_out, layers=layers)
        self.phi, self.psi = (_mlp((dim_in, *[hidden] * layers, dim_out)) for _ in range(2))

    def forward(self, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
        return self.phi(x) @ self.psi(y).T


class ConcatCritic(nn.Module):
    """f(x, y) = MLP([x, y]) for all pairs, "MLP critic" in the paper: (n, dim_in) and (m, dim_in) to scores (n, m).

    The first layer is applied to x and to y once each instead of to every pair, which is the same sum.
    """

    def __init__(self, dim_in: int = 100, hidden: int = 200, *, layers: int = 1) -> None:
        super().__init__()
        _check_sizes(dim_in=dim_in, hidden=hidden, layers=layers)
        self.net = _mlp((2 * dim_in, *[hidden] * layers, 1))

    def forward(self, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
        first, *rest = self.net
        of_x, of_y = first.weight.chunk(2, dim=1)
        pairs = F.linear(x, of_x, first.bias)[:, None] + F.linear(y, of_y)
        for layer in rest:
            pairs = layer(pairs)
        return pairs.squeeze(-1)
