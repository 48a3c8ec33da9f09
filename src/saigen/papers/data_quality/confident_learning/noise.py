"""Class-conditional label noise as the paper draws it: noise matrices of a given trace and sparsity, and flips."""

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from sklearn.utils import check_random_state

_TRIES = 1000


def noise_matrix_from_trace(
    num_classes: int,
    trace: float,
    *,
    sparsity: float = 0.0,
    prior: ArrayLike | None = None,
    random_state: int | np.random.RandomState | None = None,
) -> Float[np.ndarray, "k k"]:
    """A random noise matrix N[i, j] = P(given i | true j) with ``trace`` on its diagonal; its columns sum to one.

    ``sparsity`` is the share of off-diagonal entries that are zero (Section 5). The matrix is learnable for the class
    ``prior`` P(true) (default: uniform): P(given k, true k) > P(given k) P(true k) for each k. Each class keeps at
    least one other class to be confused with, so ``sparsity`` is at most (K - 2) / (K - 1).
    Raises ``ValueError`` for a trace outside 1 < trace < K, and where no learnable matrix was drawn.

    >>> N = noise_matrix_from_trace(4, 3.0, sparsity=0.5, random_state=0)
    >>> round(float(N.trace()), 6), int((N == 0).sum()), N.sum(axis=0).round(6).tolist()
    (3.0, 6, [1.0, 1.0, 1.0, 1.0])
    """
    K = num_classes
    if K < 2:
        raise ValueError(f"num_classes is {K}, allowed is 2 or more")
    if not 1 < trace < K:
        raise ValueError(f"trace is {trace}, allowed is 1 < trace < {K}")
    if not 0 <= sparsity <= (K - 2) / (K - 1):
        raise ValueError(f"sparsity is {sparsity}, allowed for {K} classes is 0 to {(K - 2) / (K - 1):.4g}")
    p = np.full(K, 1 / K) if prior is None else np.asarray(prior, dtype=float)
    if p.shape != (K,) or (p <= 0).any() or abs(p.sum() - 1) > 1e-6:
        raise ValueError(f"prior is {prior}, needed are {K} positive probabilities that sum to 1")
    rng, zeros = check_random_state(random_state), round(sparsity * K * (K - 1))
    for _ in range(_TRIES):
        stays = _spread(rng, K, trace)
        noisy = np.zeros((K, K), bool)  # which classes each true class (column) is confused with
        noisy[(rng.randint(1, K, size=K) + np.arange(K)) % K, np.arange(K)] = True
        more = np.flatnonzero(~(noisy | np.eye(K, dtype=bool)))
        noisy.flat[rng.permutation(more)[: K * (K - 2) - zeros]] = True
        N = rng.exponential(size=(K, K)) * noisy
        N *= (1 - stays) / N.sum(axis=0)
        np.fill_diagonal(N, stays)
        if (N.diagonal() > N @ p).all():
            return N
    raise ValueError(f"trace is {trace}: no learnable matrix in {_TRIES} draws for sparsity {sparsity} and prior {p}")


def _spread(rng: np.random.RandomState, K: int, total: float) -> np.ndarray:
    """K shares in (0, 1) that sum to ``total``: a flat Dirichlet draw, shrunk toward its mean where it leaves the range."""
    mean, share = total / K, rng.dirichlet(np.ones(K)) * total
    room = np.where(share > mean, 0.99 * (1 - mean), 0.99 * mean)
    return mean + (share - mean) * min(1.0, (room / np.maximum(np.abs(share - mean), 1e-12)).min())


def generate_noise_matrix(
    num_classes: int,
    noise: float,
    *,
    sparsity: float = 0.0,
    prior: ArrayLike | None = None,
    random_state: int | np.random.RandomState | None = None,
) -> Float[np.ndarray, "k k"]:
    """A noise matrix that flips a share ``noise`` of the labels of balanced classes: trace K (1 - noise).

    The paper's settings on CIFAR-10 are noise 0.2, 0.4, 0.7 with sparsity 0, 0.2, 0.4, 0.6. See
    ``noise_matrix_from_trace``.

    >>> float(generate_noise_matrix(10, 0.4, sparsity=0.6, random_state=0).trace().round(6))
    6.0
    """
    if not 0 < noise < 1 - 1 / num_classes:
        raise ValueError(
            f"noise is {noise}, allowed for {num_classes} classes is 0 < noise < {1 - 1 / num_classes:.4g}"
        )
    trace = num_classes * (1 - noise)
    return noise_matrix_from_trace(num_classes, trace, sparsity=sparsity, prior=prior, random_state=random_state)


def flip_labels(
    labels: ArrayLike, noise_matrix: ArrayLike, *, random_state: int | np.random.RandomState | None = None
) -> Int[np.ndarray, " n"]:
    """Each label j redrawn from column j of ``noise_matrix``, independently of the example (the paper's Eq. for CNP).

    >>> flip_labels([0, 1, 2], np.roll(np.eye(3), 1, axis=0)).tolist()
    [1, 2, 0]
    """
    y, N = np.asarray(labels), np.asarray(noise_matrix, dtype=float)
    if N.ndim != 2 or N.shape[0] != N.shape[1] or (N < 0).any() or (np.abs(N.sum(axis=0) - 1) > 1e-6).any():
        raise ValueError(f"noise_matrix has shape {N.shape}, needed are square probabilities whose columns sum to 1")
    if y.ndim != 1 or y.dtype.kind not in "iu" or (y.size and (y.min() < 0 or y.max() >= len(N))):
        raise ValueError(f"labels of shape {y.shape} and type {y.dtype}, needed are class indices 0 to {len(N) - 1}")
    levels = np.cumsum(N, axis=0) / N.sum(axis=0)
    draws = check_random_state(random_state).random_sample(len(y))
    return (draws[:, None] >= levels.T[y]).sum(axis=1).clip(max=len(N) - 1)
