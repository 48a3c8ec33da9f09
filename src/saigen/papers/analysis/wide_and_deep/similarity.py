"""How alike two representations are: centred kernel alignment without bias, on minibatches, and its first principal part.

X (n, p) are the activations of a layer for n examples and K = X X' their Gram matrix. With the diagonal at zero,

    HSIC_1(K, L) = [tr(K L) + 1'K1 1'L1 / ((n-1)(n-2)) - 2 / (n-2) 1'K L1] / (n (n-3))

is an unbiased estimate of the dependence of two kernels, so that its mean over minibatches is one too, whatever their size:

    CKA(X, Y) = mean HSIC_1(K, L) / sqrt(mean HSIC_1(K, K) mean HSIC_1(L, L))

HSIC_1 is the inner product of the U-centred matrices, K~_ij = K_ij - c_i - c_j with c chosen so that rows sum to zero
beside a zero diagonal (Székely and Rizzo, 2014). That is all that has to be kept of a layer: n (n-1) / 2 numbers.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

KERNELS = ("linear", "rbf")
Number = float | int


def _rows(x: Tensor, name: str = "x") -> Tensor:
    """Flattened rows less their mean, which changes nothing but the digits that are lost; at least float32."""
    if x.ndim < 2 or len(x) < 2:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, allowed is (n, ...) with n >= 2 examples")
    x = x.flatten(1) if x.dtype == torch.float64 else x.flatten(1).float()
    return x - x.mean(0)


def _outer(x: Tensor) -> Tensor:
    """X X', of a large X in blocks: that below the diagonal is that above it, a quarter of the work."""
    if x.numel() < 2**17:
        return x @ x.T
    first, second = x.tensor_split(2)
    across = first @ second.T
    return torch.cat([torch.cat([first @ first.T, across], 1), torch.cat([across.T, second @ second.T], 1)])


def gram(x: Float[Tensor, "n ..."], kernel: str = "linear", bandwidth: Number = 1.0) -> Float[Tensor, "n n"]:
    """The Gram matrix of the rows of ``x`` in float64: linear, of the mean-centred rows, or Gaussian.

    ``"rbf"`` is exp(-d^2 / (2 bandwidth^2 m)) with the median m of the squared distances (Kornblith et al., 2019).
    Raises ``ValueError`` for less than 2 examples, another kernel, and a bandwidth of 0 or less.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}, allowed are {', '.join(KERNELS)}")
    if not bandwidth > 0:
        raise ValueError(f"bandwidth is {bandwidth}, allowed is bandwidth > 0")
    x = _rows(x)
    with torch.autocast(x.device.type, enabled=False):
        product = _outer(x).double()
    if kernel == "linear":
        return product
    square = product.diagonal()
    distance = (square[:, None] + square - 2 * product).clamp(min=0.0)
    median = distance[~torch.eye(len(x), dtype=torch.bool, device=x.device)].median()
    return torch.exp(-distance / (2 * bandwidth**2 * median))


def u_center(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """K~: zero diagonal, rows and columns that sum to zero; whatever is a_i + b_j off the diagonal is gone.

    Raises ``ValueError`` for less than 4 examples, of which nothing would be left.
    """
    n = len(matrix)
    if n < 4:
        raise ValueError(f"a batch has {n} examples, allowed are 4 or more: HSIC_1 divides by n (n - 3)")
    apart = 1.0 - torch.eye(n, dtype=matrix.dtype, device=matrix.device)
    hollow = matrix * apart
    shift = hollow.sum(1) / (n - 2)
    shift = shift - shift.sum() / (2 * (n - 1))
    return (hollow - shift[:, None] - shift) * apart


def unbiased_hsic(
    x: Float[Tensor, "n ..."], y: Float[Tensor, "n ..."], kernel: str = "linear", bandwidth: Number = 1.0
) -> Float[Tensor, ""]:
    """HSIC_1 of two sets of activations of the same examples. It may be slightly negative.

    >>> x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    >>> bool(unbiased_hsic(x, x) > 10 * unbiased_hsic(x, x.roll(1, 0)).abs())
    True
    """
    _same_examples(x, y)
    n = len(x)
    return (u_center(gram(x, kernel, bandwidth)) * u_center(gram(y, kernel, bandwidth))).sum() / (n * (n - 3))


def cka(
    x: Float[Tensor, "n ..."],
    y: Float[Tensor, "n ..."],
    kernel: str = "linear",
    *,
    debiased: bool = True,
    bandwidth: Number = 1.0,
) -> Float[Tensor, ""]:
    """The alignment of two sets of activations, 1 where they are the same but for rotation, scale and shift.

    ``debiased=False`` is the plug-in estimate of before, with the doubly centred matrices: it grows with p / n, above zero
    where there is nothing. Differentiable. Raises ``ValueError`` for another number of examples.

    >>> x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    >>> round(cka(x, 3 * x.flip(1) + 1).item(), 6)
    1.0
    """
    _same_examples(x, y)
    centre = u_center if debiased else _doubly_centred
    a, b = (centre(gram(v, kernel, bandwidth)) for v in (x, y))
    return (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()


def _same_examples(x: Tensor, y: Tensor) -> None:
    if len(x) != len(y):
        raise ValueError(f"y has {len(y)} examples, allowed is as many as x has, {len(x)}")


def _doubly_centred(matrix: Tensor) -> Tensor:
    return matrix - matrix.mean(0) - matrix.mean(1, keepdim=True) + matrix.mean()


# Minibatches


def unit_norm(x: Float[Tensor, "n ..."]) -> Float[Tensor, "n d"]:
    """Each example's activations at norm 1, so that none counts more than another; an option of the official code."""
    return nn.functional.normalize(x.flatten(1), dim=1)


@lru_cache(maxsize=8)
def _above_diagonal(n: int, device: torch.device) -> Tensor:
    """Where the entries above the diagonal stand in a flattened (n, n) matrix."""
    return torch.ones(n, n, dtype=torch.bool, device=device).triu(1).flatten().nonzero()[:, 0]


@torch.no_grad()
def centred_gram(x: Float[Tensor, "n ..."], *, remove: int = 0) -> Float[Tensor, " m"]:
    """What minibatch CKA keeps of a layer: the n (n-1) / 2 entries of K~ above the diagonal, float64.

    With ``remove`` the first principal components of the batch are taken out before; see ``remove_pc``.
    """
    matrix = gram(x)
    if remove:
        values, vectors = _components(matrix, remove)
        matrix = matrix - (vectors * values) @ vectors.T
    return u_center(matrix).flatten().index_select(0, _above_diagonal(len(matrix), matrix.device))


class MinibatchCKA(nn.Module):
    """CKA of every layer with every layer, accumulated over minibatches: ``update`` for each, then ``compute``.

    ``layers`` counts the layers of the model; with ``others``, rows are its layers and columns those of another model that
    saw the same examples. The sums are those of the official code, float64: batches should be of one size, since HSIC_1's
    n (n-3) is left out, which otherwise weights them. They are buffers, so that a state dict resumes or moves them.

    >>> generator, sums = torch.Generator().manual_seed(0), MinibatchCKA(2)
    >>> for _ in range(3):
    ...     x = torch.randn(32, 5, generator=generator)
    ...     sums.update([x, 2 * x])
    >>> sums.compute().round(decimals=6)
    tensor([[1., 1.],
            [1., 1.]], dtype=torch.float64)
    """

    def __init__(self, layers: int, others: int | None = None) -> None:
        super().__init__()
        for name, value in (("layers", layers), ("others", layers if others is None else others)):
            if value < 1:
                raise ValueError(f"{name} is {value}, allowed is {name} >= 1")
        self.layers, self.others = layers, others
        self.register_buffer("hsic", torch.zeros(layers, others or layers, dtype=torch.float64))
        if others is not None:
            self.register_buffer("norm", torch.zeros(layers, dtype=torch.float64))
            self.register_buffer("other_norm", torch.zeros(others, dtype=torch.float64))

    @torch.no_grad()
    def update(self, activations: Sequence[Tensor], others: Sequence[Tensor] | None = None) -> None:
        """Adds a batch: each layer's activations, (n, ...), of the model and of the other one where there is one.

        Raises ``ValueError`` for another number of layers, another number of examples, and less than 4.
        """
        both = [activations] if others is None else [activations, others]
        counts = sorted({len(x) for layers in both for x in layers})
        if len(counts) != 1 or not all(len(layers) for layers in both):
            raise ValueError(
                f"activations are of {counts} examples, allowed is the same batch for all layers, 1 or more"
            )
        self.update_grams(*(torch.stack([centred_gram(x) for x in layers]) for layers in both))

    @torch.no_grad()
    def update_grams(self, grams: Float[Tensor, "l m"], others: Float[Tensor, "k m"] | None = None) -> None:
        """The same from what ``centred_gram`` keeps of each layer, stacked."""
        if (others is None) != (self.others is None):
            needed = "none, since there is one model" if self.others is None else f"those of {self.others} layers"
            raise ValueError(f"others is {None if others is None else 'given'}, allowed is {needed}")
        for name, given, count in (("activations", grams, self.layers), ("others", others, self.others)):
            if given is not None and len(given) != count:
                raise ValueError(f"{name} has {len(given)} layers, allowed is {count}")
        if others is not None and grams.shape[1] != others.shape[1]:
            raise ValueError("others has another number of examples, allowed is the same batch for both models")
        grams = grams.to(self.hsic)
        # each entry above the diagonal stands for two
        if others is None:
            self.hsic += 2 * (grams @ grams.T)
            return
        others = others.to(self.hsic)
        self.hsic += 2 * (grams @ others.T)
        self.norm += 2 * grams.square().sum(1)
        self.other_norm += 2 * others.square().sum(1)

    def compute(self) -> Float[Tensor, "l k"]:
        """CKA so far, (layers, layers) or (layers, others); NaN for a layer that says the same of all examples."""
        norm = self.hsic.diagonal() if self.others is None else self.norm
        other = norm if self.others is None else self.other_norm
        return self.hsic / norm.sqrt()[:, None] / other.sqrt()

    def reset(self) -> None:
        """Forgets all batches."""
        for buffer in self.buffers():
            buffer.zero_()


# Principal components


class PrincipalComponent(NamedTuple):
    """The first principal component of the mean-centred rows of X."""

    scores: Float[Tensor, " n"]
    """X v: where each example lies along it."""
    direction: Float[Tensor, " p"]
    """v, of norm 1; of the two signs the one whose largest entry is positive."""
    share: float
    """Of the variance, in [0, 1]."""


def _components(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues and eigenvectors of a Gram matrix, largest first."""
    if not 1 <= k < len(matrix):
        raise ValueError(f"k is {k}, allowed is 1 <= k < n = {len(matrix)} examples")
    values, vectors = torch.linalg.eigh(matrix)
    return values[-k:].flip(0).clamp(min=0.0), vectors[:, -k:].flip(1)


@torch.no_grad()
def first_pc(x: Float[Tensor, "n ..."]) -> PrincipalComponent:
    """The first principal component of the activations ``x``, through their n x n Gram matrix.

    >>> line = torch.outer(torch.arange(5.0), torch.tensor([3.0, 4.0]))
    >>> found = first_pc(line)
    >>> round(found.share, 6), [round(v, 6) for v in found.direction.tolist()]
    (1.0, [0.6, 0.8])
    """
    rows = _rows(x).double()
    matrix = rows @ rows.T
    values, vectors = _components(matrix, 1)
    direction = nn.functional.normalize(vectors[:, 0] @ rows, dim=0)
    direction = direction * torch.where(direction[direction.abs().argmax()] < 0, -1.0, 1.0)
    total = matrix.trace().item()
    return PrincipalComponent(rows @ direction, direction, values[0].item() / total if total > 0 else math.nan)


@torch.no_grad()
def remove_pc(x: Float[Tensor, "n ..."], k: int = 1) -> Float[Tensor, "n p"]:
    """The flattened, mean-centred rows without their first ``k`` principal components: X - X V V'.

    >>> line = torch.outer(torch.arange(5.0), torch.tensor([3.0, 4.0]))
    >>> round(remove_pc(line).abs().max().item(), 4)
    0.0
    """
    rows = _rows(x).double()
    _, vectors = _components(rows @ rows.T, k)
    return (rows - vectors @ (vectors.T @ rows)).to(x.dtype)


class PrincipalProfile(NamedTuple):
    """What the first principal component is to each layer, and whether layers share it."""

    layers: tuple[str, ...]
    shares: Float[Tensor, " l"]
    """Of each layer's variance."""
    cosines: Float[Tensor, "l l"]
    """|cosine| of the scores of two layers over the examples: 1 where they order and space the examples alike."""


@torch.no_grad()
def principal_profile(grams: dict[str, Float[Tensor, "n n"]]) -> PrincipalProfile:
    """The first components of several layers from their linear Gram matrices (see ``gram``) of the same examples."""
    if not grams:
        raise ValueError("grams is empty, allowed are the Gram matrices of one or more layers")
    shares, scores = [], []
    for matrix in grams.values():
        values, vectors = _components(matrix, 1)
        shares.append(values[0] / matrix.trace())
        scores.append(vectors[:, 0])
    along = torch.stack(scores)
    return PrincipalProfile(tuple(grams), torch.stack(shares), (along @ along.T).abs())


# The block


class BlockStructure(NamedTuple):
    """The longest run of layers that are all alike."""

    start: int
    stop: int
    """One past the last layer."""
    fraction: float
    """Of all layers."""


def block_structure(matrix: Float[Tensor, "l l"], threshold: Number = 0.9) -> BlockStructure:
    """The longest interval of layers whose every pair has CKA of at least ``threshold``; of equals the first.

    The paper shows blocks and does not measure them: this definition is ours. Compare networks on the same kind of layers
    only, since trivial neighbours (a norm, its activation) lengthen every run. Raises ``ValueError`` for a matrix that is
    not square, and a threshold outside (0, 1].

    >>> block_structure(torch.tensor([[1.0, 0.5, 0.1], [0.5, 1.0, 0.95], [0.1, 0.95, 1.0]]))
    BlockStructure(start=1, stop=3, fraction=0.6666666666666666)
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"matrix has shape {tuple(matrix.shape)}, allowed is a square (layers, layers)")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}, allowed is 0 < threshold <= 1")
    # the diagonal is 1 by definition; NaN (a constant layer) is like nothing
    unlike = ~(matrix >= threshold).cpu()
    best, start = (0, 0), 0
    for stop in range(1, len(matrix) + 1):
        before: Int[Tensor, " k"] = unlike[stop - 1, start : stop - 1].nonzero()
        if len(before):
            start += int(before[-1]) + 1
        if stop - start > best[1] - best[0]:
            best = (start, stop)
    return BlockStructure(*best, (best[1] - best[0]) / len(matrix))
