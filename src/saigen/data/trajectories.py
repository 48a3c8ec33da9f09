"""Episodes of an agent in an environment: collected, read and written in Minari's format, cut into training windows."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from scipy.signal import lfilter
from torch import Tensor

from saigen.files import replacing

MISSING = "reading and writing Minari data sets needs the extra rl: pip install 'saigen[rl]'"


def returns_to_go(rewards: np.ndarray, gamma: float = 1.0) -> np.ndarray:
    """What is still to come, along the last axis: ``R_t = r_t + gamma R_{t+1}``; undiscounted by default.

    >>> returns_to_go(np.array([0.0, 2.0, 1.0])).tolist()
    [3.0, 3.0, 1.0]
    """
    rewards = np.asarray(rewards, np.float64)
    return lfilter([1.0], [1.0, -gamma], rewards[..., ::-1], axis=-1)[..., ::-1]


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Episodes laid end to end: step arrays of N rows, and the lengths of the m episodes, which sum to N.

    ``observations`` (N, ...) are what the agent saw before each action, ``final_observations`` (m, ...) what it saw
    after the last one; ``actions`` are (N, act_dim) floats or (N,) whole numbers; ``terminated`` (m,) is False where an
    episode was cut off by a time limit.
    Raises ``ValueError`` for arrays that do not fit together, or rewards or float observations that are not finite.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    lengths: np.ndarray
    terminated: np.ndarray
    final_observations: np.ndarray

    def __post_init__(self) -> None:
        steps, episodes = int(self.lengths.sum()), len(self.lengths)
        if episodes == 0 or (self.lengths < 1).any():
            raise ValueError(f"lengths has {episodes} episodes, allowed are one or more of at least one step each")
        for name in ("observations", "actions", "rewards"):
            if len(getattr(self, name)) != steps:
                raise ValueError(f"{name} has {len(getattr(self, name))} rows, allowed are {steps}, the sum of lengths")
        for name in ("terminated", "final_observations"):
            if len(getattr(self, name)) != episodes:
                raise ValueError(f"{name} has {len(getattr(self, name))} rows, allowed are {episodes}, one an episode")
        for name in ("observations", "actions", "rewards"):
            array = getattr(self, name)
            if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                raise ValueError(f"{name} has values that are not finite, allowed are finite numbers")

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def ends(self) -> np.ndarray:
        """The row after each episode's last (m,)."""
        return np.cumsum(self.lengths)

    @property
    def starts(self) -> np.ndarray:
        """The row of each episode's first step (m,)."""
        return self.ends - self.lengths

    @property
    def timesteps(self) -> np.ndarray:
        """Each step's number in its episode, from 0 (N,)."""
        return np.arange(len(self.rewards)) - np.repeat(self.starts, self.lengths)

    @property
    def returns(self) -> np.ndarray:
        """Each episode's sum of rewards (m,)."""
        return np.add.reduceat(self.rewards.astype(np.float64), self.starts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the arrays."""
        digest = hashlib.sha256()
        for array in (self.observations, self.actions, self.rewards, self.lengths):
            digest.update(f"{array.shape}{array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def returns_to_go(self, gamma: float = 1.0) -> np.ndarray:
        """The return still to come at each step (N,)."""
        if gamma == 1.0:
            total = np.cumsum(self.rewards.astype(np.float64))
            return np.repeat(total[self.ends - 1], self.lengths) - total + self.rewards
        parts = np.split(self.rewards, self.ends[:-1])
        return np.concatenate([returns_to_go(part, gamma) for part in parts])

    def select(self, episodes: Sequence[int] | np.ndarray) -> "Trajectories":
        """The given episodes, in the given order."""
        episodes = np.asarray(episodes)
        lengths = self.lengths[episodes]
        shift = np.repeat(self.starts[episodes] - (np.cumsum(lengths) - lengths), lengths)
        rows = np.arange(int(lengths.sum())) + shift
        return Trajectories(
            self.observations[rows],
            self.actions[rows],
            self.rewards[rows],
            lengths,
            self.terminated[episodes],
            self.final_observations[episodes],
        )

    def top(self, share: float) -> "Trajectories":
        """The best episodes by return, as many as fit into ``share`` of all steps (at least one): the data of %BC."""
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share is {share}, allowed is 0 < share <= 1")
        order = np.argsort(-self.returns, kind="stable")
        fits = np.cumsum(self.lengths[order]) <= share * len(self.rewards)
        return self.select(order[: max(1, int(fits.sum()))])

    @staticmethod
    def join(parts: Sequence["Trajectories"]) -> "Trajectories":
        """All episodes of all parts, in order."""
        names = [field.name for field in fields(Trajectories)]
        return Trajectories(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def delayed(self) -> "Trajectories":
        """The same episodes with all of the reward moved to the last step."""
        rewards = np.zeros_like(self.rewards)
        rewards[self.ends - 1] = self.returns
        return Trajectories(
            self.observations, self.actions, rewards, self.lengths, self.terminated, self.final_observations
        )


class Windows(NamedTuple):
    """A batch of training windows of K steps, padded on the left."""

    states: Tensor
    """(b, K, state_dim) float32, normalised; padding is 0 before that."""
    actions: Tensor
    """(b, K, act_dim) float32 or (b, K) int64; -10 at padding."""
    returns_to_go: Tensor
    """(b, K, 1) float32, divided by the scale; 0 at padding."""
    timesteps: Tensor
    """(b, K) int64; 0 at padding."""
    mask: Tensor
    """(b, K) bool; False at padding."""


class TrajectoryDataset:
    """Windows of up to ``context_length`` steps out of ``trajectories``, as the Decision Transformer is trained on them.

    A window is named by the step it starts at: steps drawn uniformly are episodes drawn in proportion to their length
    with a uniform start. A window that reaches the end of its episode is padded on the left. With ``whole`` it is moved
    back instead, as far as the episode's start, so that it holds as many steps as there are.

    States are normalised with the mean and the standard deviation (+1e-6) of ``trajectories``; ``state_mean`` and
    ``state_std`` belong to the trained policy, as does ``scale``, by which returns are divided. ``normalise=False``
    leaves states as they are (frames). Timesteps beyond ``max_ep_len`` count as the last.

    >>> flat = np.arange(6, dtype=np.float32)
    >>> steps = Trajectories(flat[:, None], flat[:, None], flat, np.array([4, 2]), np.ones(2, bool), np.zeros((2, 1)))
    >>> TrajectoryDataset(steps, 3, normalise=False).windows(torch.tensor([2])).returns_to_go.flatten().tolist()
    [0.0, 5.0, 3.0]
    """

    def __init__(
        self,
        trajectories: Trajectories,
        context_length: int,
        *,
        scale: float = 1.0,
        normalise: bool = True,
        max_ep_len: int = 1000,
        whole: bool = False,
    ) -> None:
        if context_length < 1:
            raise ValueError(f"context_length is {context_length}, allowed is a whole number of at least 1")
        if not scale > 0.0:
            raise ValueError(f"scale is {scale}, allowed is a number above 0")
        self.context_length, self.scale, self.whole = context_length, scale, whole
        states = trajectories.observations
        self.state_mean, self.state_std = torch.zeros(()), torch.ones(())
        if normalise:
            self.state_mean = torch.from_numpy(states.mean(0, dtype=np.float64)).float()
            self.state_std = torch.from_numpy(states.std(0, dtype=np.float64) + 1e-6).float()
        self.states = torch.from_numpy(np.ascontiguousarray(states))
        if normalise:
            self.states = (self.states.float() - self.state_mean) / self.state_std
        self.padding_state = (
            -self.state_mean / self.state_std if normalise else torch.zeros((), dtype=self.states.dtype)
        )
        discrete = np.issubdtype(trajectories.actions.dtype, np.integer)
        self.actions = torch.from_numpy(np.ascontiguousarray(trajectories.actions)).to(
            torch.int64 if discrete else torch.float32
        )
        self.returns = torch.from_numpy(trajectories.returns_to_go() / scale).float()
        self.timesteps = torch.from_numpy(np.minimum(trajectories.timesteps, max_ep_len - 1))
        self.first = torch.from_numpy(np.repeat(trajectories.starts, trajectories.lengths))
        self.after = torch.from_numpy(np.repeat(trajectories.ends, trajectories.lengths))

    def __len__(self) -> int:
        """How many windows there are: one a step."""
        return len(self.returns)

    def windows(self, starts: Int[Tensor, "b"]) -> Windows:
        """The windows that start at the given rows."""
        first, after = self.first[starts], self.after[starts]
        if self.whole:
            starts = torch.minimum(starts, after - self.context_length).maximum(first)
        rows = torch.arange(self.context_length) + (torch.minimum(starts + self.context_length, after))[:, None]
        rows -= self.context_length
        mask = rows >= starts[:, None]
        rows = torch.where(mask, rows, starts[:, None])

        def padded(values: Tensor, padding: Tensor | float) -> Tensor:
            keep = mask.view(*mask.shape, *[1] * (values.ndim - 1))
            return torch.where(keep, values[rows], torch.as_tensor(padding, dtype=values.dtype))

        return Windows(
            padded(self.states, self.padding_state),
            padded(self.actions, -10),
            padded(self.returns, 0.0).unsqueeze(-1),
            padded(self.timesteps, 0),
            mask,
        )

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> Windows:
        """``batch_size`` windows at starts drawn uniformly over all steps."""
        return self.windows(torch.randint(len(self), (batch_size,), generator=generator))


def collect(env: Any, act: Callable[[np.ndarray], np.ndarray], episodes: int, seed: int) -> Trajectories:
    """Runs ``act``, a function of a batch of observations, for ``episodes`` episodes in a vector environment.

    ``env`` speaks Gymnasium's vector API (``num_envs, reset(seed=), step(actions)``, reset at the next step). Episodes
    run side by side, ``num_envs`` at a time; the batch that starts with episode i is reset with ``seed + i``.
    """
    if episodes < 1:
        raise ValueError(f"episodes is {episodes}, allowed is a whole number of at least 1")
    parts = []
    for first in range(0, episodes, env.num_envs):
        observations, _ = env.reset(seed=seed + first)
        alive = np.ones(env.num_envs, bool)
        terminated, final = np.zeros(env.num_envs, bool), np.array(observations)
        steps: list[tuple[np.ndarray, ...]] = []
        while alive.any():
            actions = np.asarray(act(observations))
            after, rewards, ended, cut, _ = env.step(actions)
            steps.append((np.array(observations), actions, np.asarray(rewards, np.float32), alive.copy()))
            now = alive & (ended | cut)
            terminated[now], final[now] = ended[now], after[now]
            alive &= ~now
            observations = after
        # (time, env) to (env, time), so that the rows of an episode lie together
        seen, done, got, valid = (np.swapaxes(np.stack(column), 0, 1) for column in zip(*steps, strict=True))
        parts.append(Trajectories(seen[valid], done[valid], got[valid], valid.sum(1), terminated, final))
    joined = Trajectories.join(parts)
    return joined if len(joined) == episodes else joined.select(np.arange(episodes))


def read_minari(path: str | Path) -> Trajectories:
    """Reads a Minari data set from its folder (the one that holds ``metadata.json``, or its parent with ``data``).

    Raises ``ValueError`` where the folder holds no such data set, or its observations or actions are no plain arrays;
    ``ImportError`` with the extra's name where Minari is not installed.
    """
    path = Path(path)
    folder = next((place for place in (path, path / "data") if (place / "metadata.json").is_file()), None)
    if folder is None:
        raise ValueError(f"{path} holds no Minari data set: there is no metadata.json in it or in its folder data")
    try:
        import minari
    except ImportError as error:
        raise ImportError(MISSING) from error
    try:
        episodes = list(minari.MinariDataset(folder).iterate_episodes())
    except (ValueError, KeyError, OSError, AssertionError) as error:
        raise ValueError(f"{folder} cannot be read as a Minari data set: {error}") from error
    for episode in episodes:
        for name in ("observations", "actions"):
            if not isinstance(getattr(episode, name), np.ndarray):
                kind = type(getattr(episode, name)).__name__
                raise ValueError(f"{name} of {folder} are a {kind}, allowed are plain arrays (Box or Discrete spaces)")
    if not episodes:
        raise ValueError(f"{folder} has no episodes, allowed are one or more")
    lengths = np.array([len(episode.rewards) for episode in episodes])
    actions = np.concatenate([episode.actions for episode in episodes])
    observations = np.concatenate([episode.observations[:-1] for episode in episodes])
    return Trajectories(
        observations if observations.dtype == np.uint8 else observations.astype(np.float32),
        actions.astype(np.int64 if np.issubdtype(actions.dtype, np.integer) else np.float32),
        np.concatenate([episode.rewards for episode in episodes]).astype(np.float32),
        lengths,
        np.array([bool(episode.terminations[-1]) for episode in episodes]),
        np.stack([episode.observations[-1] for episode in episodes]).astype(observations.dtype),
    )


def write_minari(trajectories: Trajectories, path: str | Path, name: str = "saigen/trajectories-v0") -> None:
    """Writes ``trajectories`` as a Minari data set (arrow files) into the folder ``path``, whole or not at all.

    ``name`` is Minari's id of the data set. Load it with ``minari.MinariDataset(path)`` or ``read_minari(path)``.
    """
    try:
        import gymnasium
        from minari import __version__
        from minari.data_collector import EpisodeBuffer
        from minari.dataset.minari_storage import MinariStorage
    except ImportError as error:
        raise ImportError(MISSING) from error

    def space(array: np.ndarray) -> Any:
        if array.ndim == 1:
            return gymnasium.spaces.Discrete(int(array.max()) + 1)
        bounds = (0, 255) if array.dtype == np.uint8 else (-np.inf, np.inf)
        return gymnasium.spaces.Box(*bounds, shape=array.shape[1:], dtype=array.dtype)

    def episodes() -> Any:
        for i, (start, end) in enumerate(zip(trajectories.starts, trajectories.ends, strict=True)):
            last = np.arange(end - start) == end - start - 1
            seen = trajectories.observations[start:end]
            yield EpisodeBuffer(
                id=i,
                observations=np.concatenate([seen, trajectories.final_observations[i : i + 1].astype(seen.dtype)]),
                actions=trajectories.actions[start:end],
                rewards=list(trajectories.rewards[start:end]),
                terminations=list(last & trajectories.terminated[i]),
                truncations=list(last & ~trajectories.terminated[i]),
            )

    with replacing(path) as temporary:
        storage = MinariStorage.new(
            temporary,
            space(trajectories.observations),
            space(trajectories.actions),
            data_format="arrow",
            jpeg_encoding=False,
        )
        storage.update_metadata({"dataset_id": name, "minari_version": __version__})
        storage.update_episodes(episodes())
