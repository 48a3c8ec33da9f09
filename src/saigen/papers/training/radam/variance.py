"""The variance of the adaptive learning rate: sections 3 and 4 of arXiv 1908.03265.

For gradients g ~ N(0, σ²), independent, the squared adaptive rate ψ² = t / Σ g² over t of them follows the scaled inverse
chi-square distribution with ρ = t degrees of freedom and scale 1/σ². An exponential running mean is taken for a simple
mean (SMA) over the ρ_t newest gradients, with the same centre of mass, which makes every formula below one of ρ_t.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from scipy.special import betaln
from torch import Tensor


def sma_length(step: int, beta2: float) -> float:
    """ρ_t: the length of the simple moving average that the running mean is worth after ``step`` steps (equation 4).

    ρ_1 = 1, and it grows to ρ_∞ = 2 / (1 - β₂) - 1. Raises ``ValueError`` for a step below 1 or β₂ outside [0, 1).

    >>> round(sma_length(7, 0.999), 4)
    6.992
    """
    _check_step(step, beta2)
    decayed = beta2**step
    return longest_sma(beta2) - 2 * step * decayed / (1 - decayed)


def longest_sma(beta2: float) -> float:
    """ρ_∞ = 2 / (1 - β₂) - 1, what ρ_t grows to.

    >>> round(longest_sma(0.999))
    1999
    """
    _check_step(1, beta2)
    return 2 / (1 - beta2) - 1


def rectification(step: int, beta2: float) -> float:
    """r_t = √(C_var / Var[ψ]): what makes the variance of r_t ψ that of a fully grown running mean; 0 where ρ_t <= 4.

    It is smaller than 1 and grows to 1. Raises ``ValueError`` as ``sma_length`` does.

    >>> round(rectification(100, 0.999), 6)
    0.215335
    """
    rho, longest = sma_length(step, beta2), longest_sma(beta2)
    if rho <= 4:
        return 0.0
    return math.sqrt((rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho))


def adaptive_rate_variance(rho: float, sigma: float = 1.0, order: Literal["exact", "first"] = "exact") -> float:
    """Var[ψ] after ρ gradients of standard deviation ``sigma``.

    - ``"exact"`` (theorem 1): (ρ / (ρ - 2) - ρ 2^(2ρ - 5) / π · B((ρ - 1)/2, (ρ - 1)/2)²) / σ², which falls as ρ grows;
    - ``"first"`` (equation 6): ρ / (2 (ρ - 2)(ρ - 4) σ²), the first-order approximation that r_t is made of.

    Infinite where there is no variance: up to ρ = 2, for the approximation up to 4.
    Raises ``ValueError`` for a ``rho`` or ``sigma`` that is not above 0, and an unknown ``order``.

    >>> round(adaptive_rate_variance(5.0) / adaptive_rate_variance(500.0))
    250
    """
    if not rho > 0 or not sigma > 0:
        raise ValueError(f"rho is {rho} and sigma is {sigma}, allowed are numbers above 0")
    if order == "first":
        return rho / (2 * (rho - 2) * (rho - 4) * sigma**2) if rho > 4 else math.inf
    if order != "exact":
        raise ValueError(f"order is {order!r}, allowed is 'exact' or 'first'")
    if rho <= 2:
        return math.inf
    # E[ψ²] - E[ψ]², the second from its logarithm: 2^(2ρ) and the beta function leave the range of floats early
    mean_of_square = rho / (rho - 2)
    square_of_mean = math.exp(
        math.log(rho) + (2 * rho - 5) * math.log(2) - math.log(math.pi) + 2 * betaln((rho - 1) / 2, (rho - 1) / 2)
    )
    return (mean_of_square - square_of_mean) / sigma**2


def adaptive_rate_variances(
    steps: int, beta2: float, *, rectified: bool = False, order: Literal["exact", "first"] = "exact"
) -> Float[Tensor, " t"]:
    """Var[ψ_t] for t = 1 … ``steps`` with σ = 1, by the formula; ``rectified``: Var[r_t ψ_t].

    Infinite where there is none; rectified, 0 up to ρ_t = 4, where no adaptive step is made, then constant for
    ``"first"``, of which r_t is made, and nearly so for ``"exact"``. Float64.

    >>> [round(v, 3) for v in adaptive_rate_variances(7, 0.999).tolist()[4:]]
    [0.252, 0.175, 0.132]
    """
    values = []
    for t in range(1, steps + 1):
        r = rectification(t, beta2) if rectified else 1.0
        values.append(r**2 * adaptive_rate_variance(sma_length(t, beta2), order=order) if r else 0.0)
    return torch.tensor(values, dtype=torch.float64)


def simulate_adaptive_rate(
    steps: int, beta2: float, *, trajectories: int, generator: torch.Generator
) -> Float[Tensor, "n t"]:
    """ψ_t = √((1 - β₂ᵗ) / v_t) itself, for t = 1 … ``steps``, of Gaussian gradients with σ = 1 (figure 1). Float64.

    Its variance over the ``trajectories`` is what the formulas approximate: they know neither that the running mean
    weighs new gradients more, nor that ρ_t is no whole number. Raises ``ValueError`` for counts below 1.

    >>> psi = simulate_adaptive_rate(50, 0.99, trajectories=100, generator=torch.Generator().manual_seed(0))
    >>> psi.shape
    torch.Size([100, 50])
    """
    _check_step(steps, beta2)
    if trajectories < 1:
        raise ValueError(f"trajectories is {trajectories}, allowed is a whole number of at least 1")
    v = torch.zeros(trajectories, dtype=torch.float64)
    rates = torch.empty(steps, trajectories, dtype=torch.float64)
    for t in range(1, steps + 1):
        g = torch.randn(trajectories, dtype=torch.float64, generator=generator)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        torch.div(1 - beta2**t, v, out=rates[t - 1])
    return rates.sqrt_().T


def rectified_warmup(step: int, beta2: float, threshold: float = 5.0) -> float:
    """The warm-up that RAdam is: Adam with the learning rate α_t · rectified_warmup(t) takes RAdam's steps.

    0 while ρ_t <= threshold (where RAdam, by ``fallback``, takes momentum steps or none), then r_t. So warm-up is
    variance reduction, and RAdam a warm-up without a length to tune. For a PyTorch scheduler, which counts from 0:
    ``LambdaLR(adam, lambda epoch: rectified_warmup(epoch + 1, 0.999))``.

    >>> [round(rectified_warmup(t, 0.999), 3) for t in (5, 6, 1000, 10_000)]
    [0.0, 0.026, 0.645, 1.0]
    """
    return rectification(step, beta2) if sma_length(step, beta2) > threshold else 0.0


def linear_warmup_length(beta2: float) -> int:
    """The linear warm-up that RAdam can be exchanged for, by the rule of thumb of Ma and Yarats (arXiv 1910.04209).

    2 / (1 - β₂) steps: 2000 for 0.999, 200 for 0.99.

    >>> linear_warmup_length(0.999)
    2000
    """
    _check_step(1, beta2)
    return round(2 / (1 - beta2))


def warmup_variance(step: int, beta2: float, warmup: int) -> float:
    """Var[min(t / T_w, 1) ψ_t]: what linear warm-up over ``warmup`` steps makes of the variance (section 3.2), σ = 1.

    Raises ``ValueError`` for a negative ``warmup``.

    >>> warmup_variance(100, 0.999, warmup=1000) < 0.02 * warmup_variance(100, 0.999, warmup=0)
    True
    """
    if warmup < 0:
        raise ValueError(f"warmup is {warmup}, allowed is a whole number of at least 0")
    factor = min(step / warmup, 1.0) if warmup else 1.0
    return factor**2 * adaptive_rate_variance(sma_length(step, beta2))


def _check_step(step: int, beta2: float) -> None:
    if not step >= 1:
        raise ValueError(f"step is {step}, allowed is a whole number of at least 1")
    if not 0.0 <= beta2 < 1.0:
        raise ValueError(f"beta2 is {beta2}, allowed is 0 <= beta2 < 1")
