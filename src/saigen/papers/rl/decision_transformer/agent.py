"""Acting: the Decision Transformer asked for a return (section 3), and the agents it is compared with.

An agent has ``reset(episodes, seed)`` and ``act(observations, rewards) -> actions`` over a batch of episodes that run
side by side; ``evaluate`` plays it in any environment with Gymnasium's API.
"""

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn


@runtime_checkable
class Agent(Protocol):
    """What ``evaluate`` plays."""

    def reset(self, episodes: int, seed: int = 0) -> None:
        """Forgets the past; ``episodes`` new ones run side by side."""

    def act(self, observations: np.ndarray, rewards: np.ndarray | None = None) -> np.ndarray:
        """The actions for ``observations``; ``rewards`` are those of the step before (None at the first)."""


class DTPolicy(nn.Module):
    """A trained model as an agent: it keeps the history, shows the model the last K steps and lowers the return asked for.

    ``R_{t+1} = R_t - r_t / scale``, from ``target_return / scale``; with ``delayed`` (all reward comes at the end) R stays.
    ``state_mean``, ``state_std`` and ``scale`` are those of the training data (``TrajectoryDataset`` has them). They are
    buffers: the state_dict of the policy holds all that is needed to act. Discrete actions are drawn from the softmax
    at ``temperature`` (0: the likeliest), continuous ones are the prediction itself.
    The history is shown without padding, which gives the same as the official code's left-padded one.

    ``target_return`` is a number, or an array with one for each episode.

    >>> from saigen.papers.rl.decision_transformer import DecisionTransformer
    >>> policy = DTPolicy(DecisionTransformer(state_dim=3, act_dim=2).eval(), target_return=10.0)
    >>> policy.reset(episodes=4)
    >>> policy.act(np.zeros((4, 3))).shape
    (4, 2)
    """

    def __init__(
        self,
        model: nn.Module,
        target_return: float | np.ndarray = 0.0,
        *,
        scale: float = 1.0,
        state_mean: Shaped[Tensor, "..."] | None = None,
        state_std: Shaped[Tensor, "..."] | None = None,
        delayed: bool = False,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if not scale > 0.0:
            raise ValueError(f"scale is {scale}, allowed is a number above 0")
        if temperature < 0.0:
            raise ValueError(f"temperature is {temperature}, allowed is 0 or more")
        self.model = model
        self.target_return, self.delayed, self.temperature = target_return, delayed, temperature
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("state_mean", torch.zeros(()) if state_mean is None else state_mean.detach().clone())
        self.register_buffer("state_std", torch.ones(()) if state_std is None else state_std.detach().clone())

    def reset(self, episodes: int, seed: int = 0) -> None:
        """Starts ``episodes`` new episodes; ``seed`` fixes the draws of discrete actions."""
        self.generator = torch.Generator().manual_seed(seed)
        asked = np.broadcast_to(np.asarray(self.target_return, np.float32), (episodes,)).copy()
        self._history: list[tuple[Tensor, Tensor]] = []  # (state, return asked for) of the last K steps
        self._actions: list[Tensor] = []  # the actions taken in them
        self._asked = torch.from_numpy(asked).to(self.scale) / self.scale
        self._t = 0

    @torch.no_grad()
    def act(self, observations: np.ndarray, rewards: np.ndarray | None = None) -> np.ndarray:
        """The next action of each episode, given what it sees and the reward of its last step."""
        if rewards is not None and not self.delayed:
            self._asked = self._asked - torch.as_tensor(np.asarray(rewards)).to(self.scale) / self.scale
        state = torch.as_tensor(np.asarray(observations)).to(self.scale.device)
        if state.dtype != torch.uint8:
            state = (state.to(self.state_mean) - self.state_mean) / self.state_std
        k = self.model.context_length
        self._history = [*self._history, (state, self._asked)][-k:]
        states, asked = (torch.stack(column, 1) for column in zip(*self._history, strict=True))
        hidden = (
            torch.zeros(len(state), dtype=torch.long, device=state.device)
            if self.model.discrete
            else torch.zeros(len(state), self.model.act_dim, device=state.device)
        )
        actions = torch.stack([*self._actions, hidden][-k:], 1)
        steps = actions.shape[1]
        timesteps = torch.arange(self._t - steps + 1, self._t + 1, device=state.device).expand(len(state), steps)
        prediction = self.model.last_action(
            states, actions, asked.unsqueeze(-1) if self.model.conditioned else None, timesteps
        )
        if self.model.discrete:
            prediction = draw(prediction, self.temperature, self.generator)
        self._actions = [*self._actions, prediction][-k:]
        self._t += 1
        return prediction.cpu().numpy()


def draw(logits: Float[Tensor, "b a"], temperature: float, generator: torch.Generator) -> Int[Tensor, "b"]:
    """One action a row from the softmax at ``temperature``; the likeliest at 0."""
    if temperature == 0.0:
        return logits.argmax(-1)
    chances = (logits.double().cpu() / temperature).softmax(-1)
    return torch.multinomial(chances, 1, generator=generator).squeeze(1).to(logits.device)


def evaluate(agent: Agent, env: Any, *, episodes: int = 100, seed: int = 0) -> Float[np.ndarray, "episodes"]:
    """The return of each of ``episodes`` episodes of ``agent`` in ``env``.

    ``env`` is a vector environment in Gymnasium's API (``num_envs``; episodes run side by side, rounds of ``num_envs``
    are reset with ``seed``, ``seed + num_envs``, ...), or a single ``gymnasium.Env`` (one episode after the other).
    """
    if episodes < 1:
        raise ValueError(f"episodes is {episodes}, allowed is a whole number of at least 1")
    single = not hasattr(env, "num_envs")
    n = 1 if single else env.num_envs
    returns = []
    for first in range(0, episodes, n):
        observations, _ = env.reset(seed=seed + first)
        agent.reset(n, seed + first)
        total, alive, rewards = np.zeros(n), np.ones(n, bool), None
        while alive.any():
            actions = agent.act(np.asarray(observations)[None] if single else observations, rewards)
            observations, rewards, ended, cut, _ = env.step(actions[0] if single else actions)
            rewards = np.atleast_1d(np.asarray(rewards, np.float64))
            total += np.where(alive, rewards, 0.0)
            alive &= ~np.atleast_1d(ended | cut)
        returns.append(total)
    return np.concatenate(returns)[:episodes]


class MLPBC(nn.Module):
    """The paper's behaviour cloning baseline: the last K states side by side through an MLP to the action.

    ReLU and dropout after each of ``n_layers`` hidden layers; tanh at the end, or logits if ``discrete``. Before K steps
    have passed, the states missing on the left are zeros (after normalisation). It is an agent itself.

    >>> MLPBC(state_dim=3, act_dim=2, context_length=4)(torch.zeros(5, 4, 3)).shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        state_dim: int,
        act_dim: int,
        *,
        context_length: int = 20,
        hidden_size: int = 128,
        n_layers: int = 3,
        dropout: float = 0.1,
        discrete: bool = False,
    ) -> None:
        super().__init__()
        self.context_length, self.discrete, self.temperature = context_length, discrete, 1.0
        layers: list[nn.Module] = []
        width = context_length * state_dim
        for _ in range(n_layers):
            layers += [nn.Linear(width, hidden_size), nn.ReLU(), nn.Dropout(dropout)]
            width = hidden_size
        layers += [nn.Linear(width, act_dim), *([] if discrete else [nn.Tanh()])]
        self.model = nn.Sequential(*layers)
        self.register_buffer("state_mean", torch.zeros(state_dim))
        self.register_buffer("state_std", torch.ones(state_dim))

    def forward(self, states: Float[Tensor, "b k state_dim"]) -> Float[Tensor, "b act_dim"]:
        """The action (or logits) after the last of the k <= K normalised ``states``."""
        states = states[:, -self.context_length :]
        return self.model(F.pad(states, (0, 0, self.context_length - states.shape[1], 0)).flatten(1))

    def reset(self, episodes: int, seed: int = 0) -> None:
        """Forgets the states seen."""
        self.generator = torch.Generator().manual_seed(seed)
        self._states: list[Tensor] = []

    @torch.no_grad()
    def act(self, observations: np.ndarray, rewards: np.ndarray | None = None) -> np.ndarray:
        """The next actions; rewards mean nothing to it."""
        state = (torch.as_tensor(observations).to(self.state_mean) - self.state_mean) / self.state_std
        self._states = [*self._states, state][-self.context_length :]
        prediction = self(torch.stack(self._states, 1))
        return (draw(prediction, self.temperature, self.generator) if self.discrete else prediction).cpu().numpy()


class ConservativeQ(nn.Module):
    """A small discrete CQL (Kumar et al., 2020), the paper's value-learning baseline: Q(s, a) from one observation.

    ``loss`` is the one-step temporal-difference error of double Q-learning plus ``conservatism`` times
    ``logsumexp_a Q(s, a) - Q(s, a of the data)``. Call ``update_target`` after each optimizer step.
    As an agent it is greedy. The step's number in the episode (over ``horizon``) is one more input, so that what it
    lacks is the memory of the past, not the clock.
    """

    def __init__(
        self,
        state_dim: int,
        n_actions: int,
        *,
        horizon: int,
        hidden_size: int = 128,
        gamma: float = 0.99,
        conservatism: float = 1.0,
        target_rate: float = 0.01,
    ) -> None:
        super().__init__()
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"gamma is {gamma}, allowed is 0 <= gamma <= 1")
        if conservatism < 0.0:
            raise ValueError(f"conservatism is {conservatism}, allowed is 0 or more")
        self.horizon, self.gamma, self.conservatism, self.target_rate = horizon, gamma, conservatism, target_rate

        def network() -> nn.Sequential:
            return nn.Sequential(
                *(nn.Linear(state_dim + 1, hidden_size), nn.ReLU()),
                *(nn.Linear(hidden_size, hidden_size), nn.ReLU()),
                nn.Linear(hidden_size, n_actions),
            )

        self.q, self.target = network(), network().requires_grad_(False)
        self.target.load_state_dict(self.q.state_dict())

    def forward(self, states: Float[Tensor, "b d"], timesteps: Int[Tensor, "b"]) -> Float[Tensor, "b a"]:
        """Q(s, .)."""
        return self.q(self._clocked(states, timesteps))

    def _clocked(self, states: Tensor, timesteps: Tensor) -> Tensor:
        return torch.cat([states, (timesteps / self.horizon).to(states)[:, None]], 1)

    def loss(
        self,
        states: Float[Tensor, "b d"],
        actions: Int[Tensor, "b"],
        rewards: Float[Tensor, "b"],
        next_states: Float[Tensor, "b d"],
        timesteps: Int[Tensor, "b"],
        over: Shaped[Tensor, "b"],
    ) -> Float[Tensor, ""]:
        """TD error plus the conservative penalty; ``over`` is true where the episode ended with this step."""
        q = self(states, timesteps)
        taken = q.gather(1, actions[:, None]).squeeze(1)
        with torch.no_grad():
            after = self._clocked(next_states, timesteps + 1)
            best = self.q(after).argmax(1, keepdim=True)
            goal = rewards + self.gamma * torch.where(over.bool(), 0.0, self.target(after).gather(1, best).squeeze(1))
        penalty = (q.logsumexp(1) - taken).mean()
        return F.smooth_l1_loss(taken, goal) + self.conservatism * penalty

    @torch.no_grad()
    def update_target(self) -> None:
        """Moves the target network a little towards the learned one."""
        for slow, fast in zip(self.target.parameters(), self.q.parameters(), strict=True):
            slow.lerp_(fast, self.target_rate)

    def reset(self, episodes: int, seed: int = 0) -> None:
        """Sets the clock back."""
        self._t = 0

    @torch.no_grad()
    def act(self, observations: np.ndarray, rewards: np.ndarray | None = None) -> np.ndarray:
        """The actions of the highest value."""
        states = torch.as_tensor(observations).to(next(self.q.parameters()))
        timesteps = torch.full((len(states),), self._t, device=states.device)
        self._t += 1
        return self(states, timesteps).argmax(1).cpu().numpy()
