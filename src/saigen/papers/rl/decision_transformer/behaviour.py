"""A behaviour policy trained on the spot, to collect data of every quality: linear policies by random search."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float


class Stage(NamedTuple):
    """A linear policy at some point of the search, with the normalisation of its observations."""

    weights: np.ndarray
    """(act_dim, state_dim)"""
    mean: np.ndarray
    std: np.ndarray
    score: float
    """Mean return of the directions tried in that iteration."""


class LinearPolicies:
    """Each environment of a batch has its own linear policy: ``a = clip(W (s - mean) / std, -1, 1)``."""

    def __init__(self, weights: Float[np.ndarray, "n a d"], mean: np.ndarray, std: np.ndarray) -> None:
        self.weights, self.mean, self.std = weights, mean, std

    def __call__(self, observations: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n a"]:
        actions = np.einsum("nad,nd->na", self.weights, (observations - self.mean) / self.std)
        return actions.clip(-1.0, 1.0).astype(np.float32)


def linear_search(
    make: Callable[[int], Any],
    rng: np.random.Generator,
    *,
    iterations: int,
    directions: int = 16,
    best: int = 8,
    step_size: float = 0.02,
    noise: float = 0.03,
    keep: int = 10,
    bonus: float = 1.0,
    report: Callable[[int], None] = lambda iteration: None,
) -> list[Stage]:
    """Augmented random search (Mania et al., 2018; version V2-t) in a Gymnasium vector environment, all directions at once.

    Every iteration plays one episode of the policy moved by +-``noise`` along each of ``directions`` random directions
    and steps towards the ``best`` of them. ``make(n)`` builds a vector environment of n. ``bonus`` is taken off every
    step's reward while searching (the reward of merely staying up). Actions lie in [-1, 1]. Returns ``keep`` stages, evenly from first to last.
    """
    if not 1 <= best <= directions:
        raise ValueError(f"best is {best}, allowed is 1 <= best <= directions {directions}")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, allowed is a whole number of at least 1")
    env = make(2 * directions)
    observations, _ = env.reset(seed=int(rng.integers(2**31)))
    d, a = observations.shape[1], env.single_action_space.shape[0]
    weights, count = np.zeros((a, d)), 1e-8
    mean, square = np.zeros(d), np.zeros(d)
    stages = []
    for iteration in range(iterations):
        deltas = rng.standard_normal((directions, a, d))
        std = np.sqrt(np.maximum(square / count - mean**2, 1e-8)) if iteration else np.ones(d)
        policy = LinearPolicies(weights + noise * np.concatenate([deltas, -deltas]), mean.copy(), std)
        observations, _ = env.reset(seed=int(rng.integers(2**31)))
        total, returns, alive = np.zeros(2 * directions), np.zeros(2 * directions), np.ones(2 * directions, bool)
        seen_sum, seen_square, seen = np.zeros(d), np.zeros(d), 0
        while alive.any():
            kept = observations[alive]
            seen_sum, seen_square, seen = seen_sum + kept.sum(0), seen_square + (kept**2).sum(0), seen + len(kept)
            observations, rewards, ended, cut, _ = env.step(policy(observations))
            total += np.where(alive, rewards - bonus, 0.0)
            returns += np.where(alive, rewards, 0.0)
            alive &= ~(ended | cut)
        stages.append(Stage(weights.copy(), policy.mean, std, float(returns.mean())))
        plus, minus = total[:directions], total[directions:]
        top = np.argsort(-np.maximum(plus, minus))[:best]
        spread = np.concatenate([plus[top], minus[top]]).std() + 1e-8
        weights = weights + step_size / (best * spread) * np.einsum("k,kad->ad", plus[top] - minus[top], deltas[top])
        total_sum = mean * count + seen_sum
        count += seen
        mean, square = total_sum / count, square + seen_square
        report(iteration + 1)
    env.close()
    return [stages[i] for i in np.unique(np.linspace(0, len(stages) - 1, keep).round().astype(int))]
