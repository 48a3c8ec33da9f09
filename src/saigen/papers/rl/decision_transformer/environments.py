"""The deterministic tasks the claims are measured on, each a batch of episodes side by side in NumPy.

They speak Gymnasium's vector API (``num_envs``, ``reset(seed=)``, ``step(actions)``) and need no Gymnasium;
``key_to_door_gymnasium`` gives Key-to-Door as a ``gymnasium.Env``. Given the first observation nothing is left to
chance: where luck decides, a high return says little about the actions, and conditioning on it misleads.
"""

from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse.csgraph import shortest_path

MOVES = np.array([[-1, 0], [1, 0], [0, -1], [0, 1]])

Step = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]


class KeyToDoor:
    """Key-to-Door (section 5.4, after Mesnard et al., 2020): three rooms of ``size`` x ``size`` cells, one after another.

    The first room holds a key, the second nothing, the third a door. Each lasts ``phase_steps`` steps whatever happens,
    then the agent is put into the next. The key is taken by stepping on it. The only reward is 1, on reaching the door
    for the first time with the key taken; the episode goes on to its fixed end.
    Where the agent starts and where the key or door is are drawn at ``reset``, uniformly over all pairs of cells two or
    more steps apart. A room lasts at least as long as the longest way through it, so that every episode can be won.

    Observations (n, 2 size^2 + 3): the agent's cell, the key's or door's cell (zeros where there is none) and the room,
    each one-hot. Whether the key is taken cannot be seen outside the first room. Actions (n,): up, down, left, right;
    a step into the wall stays.

    Sizes are ours: with ``phase_steps`` 3 size - 4 (the default) uniformly random walks win 4.0, 3.7 and 3.1 % of the
    episodes in rooms of size 3, 4 and 5; the paper says 3.1 %.

    >>> env = KeyToDoor(num_envs=2)
    >>> observations, _ = env.reset(seed=0)
    >>> observations.shape
    (2, 21)
    """

    n_actions = 4

    def __init__(self, num_envs: int = 1, *, size: int = 3, phase_steps: int | None = None) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}, allowed is a whole number of at least 1")
        if size < 3:
            raise ValueError(f"size is {size}, allowed is a whole number of at least 3")
        phase_steps = 3 * size - 4 if phase_steps is None else phase_steps
        if phase_steps < 2 * (size - 1):
            raise ValueError(
                f"phase_steps is {phase_steps}, allowed is {2 * (size - 1)} or more: the longest way through a room"
            )
        self.num_envs, self.size, self.phase_steps = num_envs, size, phase_steps
        self.horizon = 3 * phase_steps
        self.observation_size = 2 * size**2 + 3
        self._rng = np.random.default_rng()

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """New episodes; ``seed`` fixes the layouts of the whole batch."""
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        n = self.num_envs
        pairs = _pairs(self.size)
        self.start, self.object = np.moveaxis(pairs[self._rng.integers(len(pairs), size=(n, 3))], -1, 0)
        self.object[:, 1] = -1  # nowhere
        self.t = 0
        self.cell = self.start[:, 0].copy()
        self.key, self.won = np.zeros(n, bool), np.zeros(n, bool)
        return self._observe(), {}

    def step(self, actions: np.ndarray) -> Step:
        """Moves every agent; the layouts of the next episodes are drawn at ``reset`` only."""
        room = self.t // self.phase_steps
        row_column = np.stack(np.divmod(self.cell, self.size), 1) + MOVES[np.asarray(actions)]
        row_column = row_column.clip(0, self.size - 1)
        self.cell = row_column[:, 0] * self.size + row_column[:, 1]
        there = self.cell == self.object[:, room]
        rewards = np.zeros(self.num_envs, np.float32)
        if room == 0:
            self.key |= there
            self.object[there, 0] = -1
        if room == 2:
            arrived = there & self.key & ~self.won
            self.won |= arrived
            rewards[arrived] = 1.0
        self.t += 1
        if self.t % self.phase_steps == 0 and self.t < self.horizon:
            self.cell = self.start[:, self.t // self.phase_steps].copy()
        over = np.full(self.num_envs, self.t >= self.horizon)
        return self._observe(), rewards, over, np.zeros(self.num_envs, bool), {}

    def _observe(self) -> Float[np.ndarray, "n d"]:
        room, cells, everyone = min(self.t // self.phase_steps, 2), self.size**2, np.arange(self.num_envs)
        observations = np.zeros((self.num_envs, self.observation_size), np.float32)
        observations[everyone, self.cell] = 1.0
        objects = self.object[:, room]
        observations[everyone[objects >= 0], cells + objects[objects >= 0]] = 1.0
        observations[:, 2 * cells + room] = 1.0
        return observations


def _pairs(size: int) -> Int[np.ndarray, "pairs 2"]:
    """Every (start, object) of cells two or more steps apart."""
    row, column = np.divmod(np.arange(size**2), size)
    apart = np.abs(row[:, None] - row) + np.abs(column[:, None] - column)
    return np.argwhere(apart >= 2)


def random_success(size: int = 3, phase_steps: int | None = None) -> float:
    """The share of Key-to-Door episodes that uniformly random actions win, exactly.

    The chance of stepping on the object within a room's steps, averaged over starts and objects, and squared: the two
    rooms that count are alike and independent.
    """
    steps = 3 * size - 4 if phase_steps is None else phase_steps
    cells = np.arange(size**2)
    row_column = np.stack(np.divmod(cells, size), 1)
    after = (row_column[:, None] + MOVES).clip(0, size - 1)
    move = np.zeros((size**2, size**2))
    np.add.at(move, (cells[:, None], after[..., 0] * size + after[..., 1]), 0.25)
    hits = []
    for start, goal in _pairs(size):
        missing = move.copy()
        missing[:, goal] = 0.0
        hits.append(1.0 - np.linalg.matrix_power(missing, steps)[start].sum())
    return float(np.mean(hits) ** 2)


def key_to_door_gymnasium(**options: Any) -> Any:
    """One Key-to-Door episode at a time as a ``gymnasium.Env``; options are ``size`` and ``phase_steps``.

    Raises ``ImportError`` with the extra's name where Gymnasium is not installed.
    """
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError("Gymnasium environments need the extra rl: pip install 'saigen[rl]'") from error

    class KeyToDoorEnv(gymnasium.Env):
        metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

        def __init__(self) -> None:
            self.batch = KeyToDoor(1, **options)
            self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (self.batch.observation_size,), np.float32)
            self.action_space = gymnasium.spaces.Discrete(self.batch.n_actions)

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
            super().reset(seed=seed)
            observations, _ = self.batch.reset(seed=int(self.np_random.integers(2**31)))
            return observations[0], {}

        def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            observations, rewards, ended, cut, _ = self.batch.step(np.array([action]))
            return observations[0], float(rewards[0]), bool(ended[0]), bool(cut[0]), {}

    return KeyToDoorEnv()


def register() -> None:
    """Makes ``gymnasium.make("saigen/KeyToDoor-v0")`` work; harmless when called again."""
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError("Gymnasium environments need the extra rl: pip install 'saigen[rl]'") from error
    if "saigen/KeyToDoor-v0" not in gymnasium.registry:
        gymnasium.register("saigen/KeyToDoor-v0", entry_point=key_to_door_gymnasium)


def random_graph(nodes: int, edges: float, rng: np.random.Generator) -> Bool[np.ndarray, "n n"]:
    """A random directed graph as an adjacency matrix, each edge there with probability ``edges`` / ``nodes``.

    Drawn again until every node has a way to node 0, the goal.
    """
    if nodes < 2:
        raise ValueError(f"nodes is {nodes}, allowed is a whole number of at least 2")
    if not 1.0 <= edges < nodes:
        raise ValueError(f"edges is {edges}, allowed is 1 <= edges < nodes {nodes}: the mean number out of a node")
    while True:
        adjacency = rng.random((nodes, nodes)) < edges / nodes
        np.fill_diagonal(adjacency, False)
        if np.isfinite(distances(adjacency)).all():
            return adjacency


def distances(adjacency: Bool[np.ndarray, "n n"]) -> Float[np.ndarray, "n"]:
    """The number of edges on the shortest way from each node to node 0; infinite where there is none."""
    return shortest_path(adjacency.T, unweighted=True, indices=0)


class GraphWalk:
    """The paper's illustrative task (section 3): find the shortest way to node 0 of a fixed directed graph.

    An episode is ``horizon`` steps from a node that is not the goal. Each step from another node than the goal costs 1;
    the goal is not left again. Observations (n, nodes) are the node, one-hot; actions (n,) the node to go to; where no
    edge leads there the agent stays. The return is minus the number of steps taken to the goal.
    ``starts`` fixes the starting nodes of the batch (otherwise drawn uniformly at ``reset``).
    """

    def __init__(
        self,
        adjacency: Bool[np.ndarray, "n n"],
        num_envs: int,
        *,
        horizon: int = 10,
        starts: Int[np.ndarray, "b"] | None = None,
    ) -> None:
        if starts is not None and len(starts) != num_envs:
            raise ValueError(f"starts has {len(starts)} nodes, allowed are num_envs {num_envs}")
        self.adjacency, self.num_envs, self.horizon, self.starts = adjacency, num_envs, horizon, starts
        self._rng = np.random.default_rng()

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Puts the agents at their starting nodes."""
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        drawn = 1 + self._rng.integers(len(self.adjacency) - 1, size=self.num_envs)
        self.node = drawn if self.starts is None else np.array(self.starts)
        self.t = 0
        return self._observe(), {}

    def step(self, actions: np.ndarray) -> Step:
        """Follows the edges that exist."""
        rewards = np.where(self.node == 0, 0.0, -1.0).astype(np.float32)
        actions = np.asarray(actions)
        allowed = self.adjacency[self.node, actions] & (self.node != 0)
        self.node = np.where(allowed, actions, self.node)
        self.t += 1
        over = np.full(self.num_envs, self.t >= self.horizon)
        return self._observe(), rewards, over, np.zeros(self.num_envs, bool), {}

    def random_actions(self, rng: np.random.Generator) -> Int[np.ndarray, "b"]:
        """A uniformly drawn edge out of each agent's node (at the goal, any node)."""
        weights = self.adjacency[self.node] + (self.node == 0)[:, None]
        chance = weights / weights.sum(1, keepdims=True)
        return (rng.random((self.num_envs, 1)) < chance.cumsum(1)).argmax(1)

    def _observe(self) -> Float[np.ndarray, "b n"]:
        return np.eye(len(self.adjacency), dtype=np.float32)[self.node]


class Cart:
    """A cart with drag on a straight track, rewarded for its speed: the small task with continuous actions.

    Observations (n, 1) are the speed v; actions (n, 1) the force a in [-1, 1]. ``v <- v + (2 a - v) / 10`` and the reward
    is v, so that an episode's return is how far the cart came. It starts at speeds drawn uniformly in [-0.5, 0.5].
    """

    def __init__(self, num_envs: int, *, horizon: int = 40) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}, allowed is a whole number of at least 1")
        self.num_envs, self.horizon = num_envs, horizon
        self._rng = np.random.default_rng()

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Draws the speeds at the start."""
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        self.speed = self._rng.uniform(-0.5, 0.5, self.num_envs)
        self.t = 0
        return self._observe(), {}

    def step(self, actions: np.ndarray) -> Step:
        """Pushes for one step."""
        self.speed = self.speed + (2.0 * np.clip(np.asarray(actions, np.float64)[:, 0], -1.0, 1.0) - self.speed) / 10.0
        self.t += 1
        over = np.full(self.num_envs, self.t >= self.horizon)
        return self._observe(), self.speed.astype(np.float32), over, np.zeros(self.num_envs, bool), {}

    def _observe(self) -> Float[np.ndarray, "n 1"]:
        return self.speed[:, None].astype(np.float32)
