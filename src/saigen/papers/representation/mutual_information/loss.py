"""Lower bounds on mutual information from a critic's scores, and Gaussian pairs of which the truth is known.

``scores[i, j]`` is the critic f(x_i, y_j) of B pairs (x_i, y_i): the diagonal holds pairs of the joint distribution,
the rest pairs of the marginals. All values are in nats; a bound is to be maximised.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

Estimator = Literal["infonce", "nwj"]
ESTIMATORS = ("infonce", "nwj")

# --- bounds ---------------------------------------------------------------------------------------------------------


def infonce_bound(scores: Float[Tensor, "b b"]) -> Float[Tensor, ""]:
    """I_NCE (section 2): mean over i of C_ii - log (1/B) sum_j exp C_ij, the diagonal among the sum.

    Never above log B, whatever the critic; a function of x alone, added to the critic, changes nothing.

    Raises ``ValueError`` for scores that are not square.

    >>> infonce_bound(torch.zeros(4, 4))
    tensor(0.)
    """
    pairs = _pairs(scores)
    return math.log(pairs) + (scores.diagonal() - scores.logsumexp(1)).mean()


def tuba_bound(scores: Float[Tensor, "b b"], log_baseline: Float[Tensor, "b"] | None = None) -> Float[Tensor, ""]:
    """I_TUBA: 1 + mean_i C'_ii - mean over i != j of exp C'_ij, with C'_ij = C_ij - log a(x_i).

    ``log_baseline`` is log a(x_i), by default 0.

    Raises ``ValueError`` for scores that are not square, of less than two pairs, and for a baseline of another length.
    """
    pairs = _pairs(scores, least=2)
    if log_baseline is not None:
        if log_baseline.shape != (pairs,):
            raise ValueError(f"log_baseline has shape {tuple(log_baseline.shape)}, allowed is ({pairs},), one a row")
        scores = scores - log_baseline[:, None]
    itself = torch.eye(pairs, dtype=torch.bool, device=scores.device)
    # One exponential, at the end: that of a single large score would overflow where the mean does not.
    log_marginal = scores.masked_fill(itself, -math.inf).flatten().logsumexp(0) - math.log(pairs * (pairs - 1))
    return 1 + scores.diagonal().mean() - log_marginal.exp()


def nwj_bound(scores: Float[Tensor, "b b"]) -> Float[Tensor, ""]:
    """I_NWJ (section 2): mean_i C_ii - (1/e) mean over i != j of exp C_ij, which is I_TUBA with a(x) = e.

    Unbiased, of a variance that grows with exp(MI). The best critic is 1 + log p(x, y) / (p(x) p(y)).

    >>> nwj_bound(torch.ones(4, 4))
    tensor(0.)
    """
    return tuba_bound(scores - 1)


def mi_bound(scores: Float[Tensor, "b b"], estimator: Estimator) -> Float[Tensor, ""]:
    """I_NCE or I_NWJ; ``ValueError`` for another ``estimator``."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}, allowed are 'infonce' and 'nwj'")
    return infonce_bound(scores) if estimator == "infonce" else nwj_bound(scores)


def n_pair_loss(scores: Float[Tensor, "b b"]) -> Float[Tensor, ""]:
    """The multi-class N-pair loss of metric learning: mean_i log(1 + sum over j != i of exp(C_ij - C_ii)).

    Section 4: I_NCE = log B - this, so that maximising I_NCE is metric learning. With one negative it is the triplet
    loss with a soft margin.
    """
    pairs = _pairs(scores, least=2)
    itself = torch.eye(pairs, dtype=torch.bool, device=scores.device)
    margins = (scores - scores.diagonal()[:, None]).masked_fill(itself, 0)  # exp 0: the one of the formula
    return margins.logsumexp(1).mean()


class InfoMaxLoss(nn.Module):
    """What the paper minimises: minus a bound, or with ``target`` its distance |I - t| from a value it is pinned at.

    ``estimator`` is ``"infonce"`` or ``"nwj"``; ``target`` t is in nats (section 3.3: 2 and 4).

    >>> InfoMaxLoss("infonce", target=2.0)(torch.zeros(8, 8))
    tensor(2.)
    """

    def __init__(self, estimator: Estimator = "infonce", *, target: float | None = None) -> None:
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator is {estimator!r}, allowed are 'infonce' and 'nwj'")
        if target is not None and not 0 <= target < math.inf:
            raise ValueError(f"target is {target}, allowed is None or a number of nats from 0")
        super().__init__()
        self.estimator: Estimator = estimator
        self.target = target

    def forward(self, scores: Float[Tensor, "b b"]) -> Float[Tensor, ""]:
        bound = mi_bound(scores, self.estimator)
        return -bound if self.target is None else (bound - self.target).abs()

    def extra_repr(self) -> str:
        return f"{self.estimator}, target={self.target}"


def _pairs(scores: Tensor, least: int = 1) -> int:
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or len(scores) < least:
        raise ValueError(f"scores has shape {tuple(scores.shape)}, allowed is (b, b) with b of {least} or more")
    return len(scores)


# --- pairs of known mutual information --------------------------------------------------------------------------------


def gaussian_mi(rho: float, dim: int = 1) -> float:
    """Mutual information of two ``dim``-dimensional Gaussians whose coordinates correlate by ``rho``: -(d/2) log(1 - rho^2).

    >>> round(gaussian_mi(0.2), 4)  # the pairs of section 4
    0.0204
    """
    _check_rho(rho)
    _check_count("dim", dim)
    return -0.5 * dim * math.log1p(-(rho**2))


def gaussian_rho(mi: float, dim: int = 1) -> float:
    """The correlation at which ``gaussian_mi`` is ``mi`` nats."""
    _check_count("dim", dim)
    if not 0 <= mi < math.inf:
        raise ValueError(f"mi is {mi}, allowed is a number of nats from 0")
    return math.sqrt(-math.expm1(-2 * mi / dim))


def gaussian_divergence(rho: float, rho_negatives: float) -> float:
    """KL divergence, in nats, of two standard Gaussian pairs that correlate by ``rho`` and by ``rho_negatives``.

    What I_NWJ can reach at most where the negatives (x_i, y_j) of a batch correlate: the mutual information is the case
    ``rho_negatives = 0``. For section 4's dependent batches (0.2 against -0.25) it is five times the mutual information.

    >>> round(gaussian_divergence(0.2, -0.25), 4), gaussian_divergence(0.5, 0.0) == gaussian_mi(0.5)
    (0.1081, True)
    """
    _check_rho(rho)
    _check_rho(rho_negatives, "rho_negatives")
    if rho_negatives == 0:
        return gaussian_mi(rho)
    left = 1 - rho_negatives**2
    return (1 - rho * rho_negatives) / left - 1 + 0.5 * math.log(left / (1 - rho**2))


def gaussian_scores(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], rho: float) -> Float[Tensor, "n m"]:
    """The best critic where coordinates of x and y correlate by ``rho``: log p(x_i, y_j) / (p(x_i) p(y_j)).

    I_NCE takes it as it is, I_NWJ with 1 added.
    """
    _check_rho(rho)
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"x and y have {x.shape[-1]} and {y.shape[-1]} dimensions, allowed is the same number")
    left = 1 - rho**2
    squares = x.square().sum(1)[:, None] + y.square().sum(1)
    return -0.5 * x.shape[1] * math.log(left) + (rho * (x @ y.T) - 0.5 * rho**2 * squares) / left


def gaussian_pairs(
    count: int, dim: int, rho: float, *, generator: torch.Generator | None = None
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """``count`` independent pairs of standard Gaussians whose coordinates correlate by ``rho``."""
    _check_rho(rho)
    _check_count("count", count)
    _check_count("dim", dim)
    x, other = torch.randn(2, count, dim, generator=generator)
    return x, rho * x + math.sqrt(1 - rho**2) * other


def dependent_pairs(
    count: int, *, shared: float = -0.5, own: float = 0.9, generator: torch.Generator | None = None
) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "n 1"]]:
    """A batch of section 4: pairs (x_i, y_i) = z + e_i with one z for the whole batch.

    z has correlation ``shared`` and each e_i ``own``, of variance 1 all. A pair alone is Gaussian of variance 2 and
    correlation (shared + own) / 2 = 0.2; the negatives (x_i, y_j) correlate by shared / 2 = -0.25 instead of 0, as frames
    of one video or patches of one image do. A bound that takes them for independent is none.
    """
    _check_count("count", count)
    _check_rho(shared, "shared")
    _check_rho(own, "own")
    z, e = (gaussian_pairs(n, 1, rho, generator=generator) for n, rho in ((1, shared), (count, own)))
    return z[0] + e[0], z[1] + e[1]


def _check_rho(rho: float, name: str = "rho") -> None:
    if not -1 < rho < 1:
        raise ValueError(f"{name} is {rho}, allowed is a correlation between -1 and 1, both excluded")


def _check_count(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{name} is {count}, allowed is 1 or more")
