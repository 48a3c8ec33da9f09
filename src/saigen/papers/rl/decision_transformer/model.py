"""Decision Transformer (Chen et al., 2021): a GPT reads (R_1, s_1, a_1, R_2, s_2, a_2, ...) and predicts a_t from what
ends at s_t, where R_t is the return still to come. Trained by plain supervised learning, steered by the R_1 it is given.

``DecisionTransformer`` is the paper's model for state vectors (OpenAI Gym), ``DecisionTransformerAtari`` the one for
frames. The state_dict of the first is that of the official ``gym`` code over plain ``nn.Linear``; that of the second is
the official ``atari`` code's with the blocks in GPT-2's names.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor, nn

from saigen.nn.gpt import GPT, convert_gpt2, convert_mingpt


class DTOutput(NamedTuple):
    """What ``DecisionTransformer`` predicts at each of the k steps; the paper trains the actions only."""

    actions: Tensor
    """(b, k, act_dim), read at the state's token: the action, or logits over the actions if they are discrete."""
    states: Tensor
    """(b, k, state_dim), read at the action's token: the next state."""
    returns: Tensor
    """(b, k, 1), read at the action's token: the next return-to-go."""


class DecisionTransformer(nn.Module):
    """The model for state vectors (section 3; hyper-parameters of Table 9).

    Three tokens a step, R_t, s_t, a_t, each through its own linear embedding; the embedding of the step's time in the
    episode is added to all three and takes the place of a position embedding. Then a layer norm, the causal GPT, and
    the action from the token of s_t.

    ``discrete``: actions are whole numbers, embedded by a table, and ``actions`` are logits (no tanh).
    ``conditioned=False`` leaves the return tokens out: behaviour cloning with the same network; its ``returns``, trained
    on the returns-to-go, make the critic of section 5.5.
    ``context_length`` (K) is how many steps an agent shows the model; the weights do not depend on it.
    ``dropout`` falls on the embeddings, the attention weights and the residual branches.

    >>> model = DecisionTransformer(state_dim=11, act_dim=3).eval()
    >>> b, k = 2, 5
    >>> out = model(torch.zeros(b, k, 11), torch.zeros(b, k, 3), torch.ones(b, k, 1), torch.arange(k).repeat(b, 1))
    >>> out.actions.shape
    torch.Size([2, 5, 3])
    """

    classifier_name = None

    def __init__(
        self,
        state_dim: int,
        act_dim: int,
        *,
        hidden_size: int = 128,
        n_layers: int = 3,
        n_heads: int = 1,
        context_length: int = 20,
        max_ep_len: int = 1000,
        discrete: bool = False,
        conditioned: bool = True,
        action_tanh: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        _at_least_one(state_dim=state_dim, act_dim=act_dim, context_length=context_length, max_ep_len=max_ep_len)
        self.state_dim, self.act_dim = state_dim, act_dim
        self.context_length, self.max_ep_len = context_length, max_ep_len
        self.discrete, self.conditioned = discrete, conditioned
        # The official GPT-2 has a word table of one row that nothing reads; it belongs to the checkpoints.
        self.transformer = GPT(
            hidden_size,
            n_layers,
            n_heads,
            vocabulary=1,
            activation="relu",
            embedding_dropout=dropout,
            attention_dropout=dropout,
            residual_dropout=dropout,
        )
        self.embed_timestep = nn.Embedding(max_ep_len, hidden_size)
        if conditioned:
            self.embed_return = nn.Linear(1, hidden_size)
        self.embed_state = nn.Linear(state_dim, hidden_size)
        self.embed_action = nn.Embedding(act_dim, hidden_size) if discrete else nn.Linear(act_dim, hidden_size)
        self.embed_ln = nn.LayerNorm(hidden_size)
        self.predict_state = nn.Linear(hidden_size, state_dim)
        action_head: list[nn.Module] = [nn.Linear(hidden_size, act_dim)]
        self.predict_action = nn.Sequential(*action_head, *([nn.Tanh()] if action_tanh and not discrete else []))
        self.predict_return = nn.Linear(hidden_size, 1)

    def _hidden(
        self,
        states: Tensor,
        actions: Tensor,
        returns_to_go: Tensor | None,
        timesteps: Tensor,
        mask: Tensor | None,
        last: bool = False,
    ) -> Tensor:
        """The transformer's output at the state's and the action's token (b, k, 2, hidden), or at the last state's."""
        if states.shape[-1] != self.state_dim:
            raise ValueError(f"states has {states.shape[-1]} dimensions, allowed is state_dim {self.state_dim}")
        if self.conditioned and returns_to_go is None:
            raise ValueError("returns_to_go is None, allowed is a tensor (b, k, 1): this model is conditioned on it")
        # A padded discrete action holds any number below zero; no token sees it, but the table must find a row.
        action = self.embed_action(actions.clamp(min=0) if self.discrete else actions)
        tokens = [self.embed_state(states), action]
        if self.conditioned:
            tokens.insert(0, self.embed_return(returns_to_go))
        x = torch.stack(tokens, 2) + self.embed_timestep(timesteps).unsqueeze(2)
        keep = None if mask is None else mask.bool().repeat_interleave(len(tokens), 1)
        k, m, rows = states.shape[1], len(tokens), None
        if last or self.conditioned:  # nothing is read at a return's token: the last block need not compute it
            rows = torch.arange(k * m, device=x.device)
            rows = rows[-2:-1] if last else rows.view(k, m)[:, -2:].flatten()
        return self.transformer(self.embed_ln(x).flatten(1, 2), keep, rows).unflatten(1, (-1, 1 if last else 2))

    def forward(
        self,
        states: Float[Tensor, "b k state_dim"],
        actions: Float[Tensor, "b k act_dim"] | Int[Tensor, "b k"],
        returns_to_go: Float[Tensor, "b k 1"] | None,
        timesteps: Int[Tensor, "b k"],
        attention_mask: Shaped[Tensor, "b k"] | None = None,
    ) -> DTOutput:
        """Predictions at every step of the windows. ``attention_mask`` is 0 at padding, which no kept step then sees.

        Step t's action is predicted from the tokens up to s_t, so ``actions[:, t]`` may hold anything while it is
        sought. Returns are in the unit the model was trained with (return / scale).
        """
        x = self._hidden(states, actions, returns_to_go, timesteps, attention_mask)
        at_state, at_action = x.unbind(2)
        return DTOutput(self.predict_action(at_state), self.predict_state(at_action), self.predict_return(at_action))

    def last_action(
        self,
        states: Float[Tensor, "b k state_dim"],
        actions: Float[Tensor, "b k act_dim"] | Int[Tensor, "b k"],
        returns_to_go: Float[Tensor, "b k 1"] | None,
        timesteps: Int[Tensor, "b k"],
    ) -> Float[Tensor, "b act_dim"]:
        """The prediction at the newest step of a history without padding: all that acting needs."""
        timesteps = timesteps.clamp(max=self.max_ep_len - 1)
        return self.predict_action(self._hidden(states, actions, returns_to_go, timesteps, None, last=True)[:, 0, 0])

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Brings the official ``gym`` layout or that of Transformers' ``DecisionTransformerModel`` to ours.

        Transformers adds row 0 of a position table to every token after the layer norm; that row moves into its bias.
        """
        state = {re.sub(r"^(module\.|decision_transformer\.)+", "", key): value for key, value in state.items()}
        state = {re.sub(r"^encoder\.", "transformer.", key): value for key, value in state.items()}
        position = state.pop("transformer.wpe.weight", None)
        if position is not None and "embed_ln.bias" in state:
            state["embed_ln.bias"] = state["embed_ln.bias"] + position[0]
        return convert_gpt2(state)


class DecisionTransformerAtari(nn.Module):
    """The model for stacks of four 84 x 84 frames and discrete actions (section 4.1; hyper-parameters of Table 8).

    Every token gets a learned position embedding, and one embedding of the window's time in the episode is added to all
    of them. ``conditioned=False`` leaves the return tokens out (behaviour cloning). ``max_timestep`` is the largest
    timestep of the training data; ``tok_emb`` of the official code (here ``transformer.wte``) is not read by anything.

    >>> model = DecisionTransformerAtari(n_actions=4, context_length=3, max_timestep=9).eval()
    >>> frames = torch.zeros(1, 3, 4, 84, 84, dtype=torch.uint8)
    >>> model(frames, torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, 1), torch.tensor([5])).shape
    torch.Size([1, 3, 4])
    """

    classifier_name = None

    def __init__(
        self,
        n_actions: int,
        context_length: int = 30,
        max_timestep: int = 10_000,
        *,
        hidden_size: int = 128,
        n_layers: int = 6,
        n_heads: int = 8,
        conditioned: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        _at_least_one(n_actions=n_actions, context_length=context_length, max_timestep=max_timestep)
        self.act_dim, self.context_length, self.max_timestep = n_actions, context_length, max_timestep
        self.discrete, self.conditioned = True, conditioned
        self.transformer = GPT(
            hidden_size,
            n_layers,
            n_heads,
            vocabulary=n_actions,
            activation="gelu",
            embedding_dropout=dropout,
            attention_dropout=dropout,
            residual_dropout=dropout,
            scaled_residuals=False,
        )
        self.pos_emb = nn.Parameter(torch.zeros(1, 3 * context_length + 1, hidden_size))
        self.global_pos_emb = nn.Parameter(torch.zeros(1, max_timestep + 1, hidden_size))
        self.head = nn.Linear(hidden_size, n_actions, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)
        self.state_encoder = nn.Sequential(
            *(nn.Conv2d(4, 32, 8, stride=4), nn.ReLU(), nn.Conv2d(32, 64, 4, stride=2), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 7 * 7, hidden_size), nn.Tanh()),
        )
        if conditioned:
            self.ret_emb = nn.Sequential(nn.Linear(1, hidden_size), nn.Tanh())
        self.action_embeddings = nn.Sequential(nn.Embedding(n_actions, hidden_size), nn.Tanh())
        nn.init.normal_(self.action_embeddings[0].weight, std=0.02)

    def forward(
        self,
        states: Float[Tensor, "b k 4 84 84"] | UInt8[Tensor, "b k 4 84 84"],
        actions: Int[Tensor, "b j"],
        returns_to_go: Float[Tensor, "b k 1"] | None,
        timesteps: Int[Tensor, "b"],
    ) -> Float[Tensor, "b k actions"]:
        """Logits of the action at every step. Frames are uint8, or floats in [0, 1]; returns are raw.

        ``actions`` has k entries, or k - 1 while the last is being sought. ``timesteps`` is one number a window: that
        of its first step in training; in evaluation the current one, at most ``max_timestep``.
        """
        b, k = states.shape[:2]
        if actions.shape[1] not in (k, k - 1):
            raise ValueError(f"actions has {actions.shape[1]} steps, allowed are {k} or {k - 1} with {k} states")
        if k > self.context_length:
            raise ValueError(f"states has {k} steps, allowed are at most context_length {self.context_length}")
        if self.conditioned and returns_to_go is None:
            raise ValueError("returns_to_go is None, allowed is a tensor (b, k, 1): this model is conditioned on it")
        frames = states if states.is_floating_point() else states.to(self.pos_emb.dtype) / 255.0
        sought = k - actions.shape[1]
        tokens = [self.state_encoder(frames.flatten(0, 1)).unflatten(0, (b, k))]
        tokens.append(F.pad(self.action_embeddings(actions), (0, 0, 0, sought)))
        if self.conditioned:
            tokens.insert(0, self.ret_emb(returns_to_go))
        x = torch.stack(tokens, 2).flatten(1, 2)[:, : k * len(tokens) - sought]
        x = x + self.pos_emb[:, : x.shape[1]] + self.global_pos_emb[0, timesteps].unsqueeze(1)
        return self.head(self.transformer(x)[:, len(tokens) - 2 :: len(tokens)])

    def last_action(
        self,
        states: Float[Tensor, "b k 4 84 84"] | UInt8[Tensor, "b k 4 84 84"],
        actions: Int[Tensor, "b k"],
        returns_to_go: Float[Tensor, "b k 1"] | None,
        timesteps: Int[Tensor, "b k"],
    ) -> Float[Tensor, "b actions"]:
        """Logits at the newest step of a history, as ``DecisionTransformer.last_action``."""
        now = timesteps[:, -1].clamp(max=self.max_timestep)
        return self(states, actions[:, :-1], returns_to_go, now)[:, -1]

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Brings the official ``atari`` layout (minGPT's) to ours."""
        state = {re.sub(r"^(module\.)+", "", key): value for key, value in state.items()}
        state = convert_mingpt(state, prefix="transformer.")
        names = {"tok_emb.weight": "transformer.wte.weight"}
        names |= {f"ln_f.{kind}": f"transformer.ln_f.{kind}" for kind in ("weight", "bias")}
        return {names.get(key, key): value for key, value in state.items()}


def action_loss(
    predicted: Float[Tensor, "b k act_dim"],
    actions: Float[Tensor, "b k act_dim"] | Int[Tensor, "b k"],
    mask: Shaped[Tensor, "b k"] | None = None,
) -> Float[Tensor, ""]:
    """The training loss: mean squared error of the actions, cross-entropy if they are discrete, over the kept steps.

    >>> action_loss(torch.zeros(1, 2, 3), torch.tensor([[[1.0, 1, 1], [9, 9, 9]]]), torch.tensor([[1, 0]])).item()
    1.0
    """
    keep = torch.ones(actions.shape[:2], dtype=torch.bool, device=actions.device) if mask is None else mask.bool()
    if actions.is_floating_point():
        # Chosen before squaring, not multiplied after: whatever stands at padding leaves no trace in the gradient.
        loss = torch.where(keep.unsqueeze(-1), predicted - actions, 0.0).square().mean(-1)
    else:
        loss = F.cross_entropy(predicted.flatten(0, 1), actions.clamp(min=0).flatten(), reduction="none")
        loss = torch.where(keep, loss.view(actions.shape), 0.0)
    return loss.sum() / keep.sum()


def parameter_groups(model: nn.Module, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """Parameter groups of the Atari training: only the weights of linear and convolutional layers decay (minGPT's rule).

    The Gym training has one group instead: AdamW with weight decay 1e-4 on everything.
    """
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))}
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]


def atari_learning_rate(
    tokens_a_step: int, final_tokens: int, warmup_tokens: int = 512 * 20
) -> Callable[[int, int], float]:
    """The Atari training's factor of the learning rate, as ``schedule(step, total)``.

    It counts predicted actions as tokens (batch x context length a step), rises linearly over ``warmup_tokens`` and
    falls by a cosine to 10 % on the way to ``final_tokens``, which the official code sets to 2 x transitions x 3 K:
    so far that the five epochs of the paper see only the start of the fall.
    """

    def factor(step: int, total: int) -> float:
        tokens = (step + 1) * tokens_a_step
        if tokens < warmup_tokens:
            return tokens / max(1, warmup_tokens)
        progress = (tokens - warmup_tokens) / max(1, final_tokens - warmup_tokens)
        return max(0.1, 0.5 * (1.0 + math.cos(math.pi * progress)))

    return factor


def _at_least_one(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, allowed is a whole number of at least 1")


def decision_transformer_hopper(
    *, state_dim: int = 11, act_dim: int = 3, context_length: int = 20, max_ep_len: int = 1000, dropout: float = 0.1
) -> DecisionTransformer:
    """Hopper of D4RL: target returns 3600 and 1800, return scale 1000."""
    return DecisionTransformer(
        state_dim, act_dim, context_length=context_length, max_ep_len=max_ep_len, dropout=dropout
    )


def decision_transformer_halfcheetah(
    *, state_dim: int = 17, act_dim: int = 6, context_length: int = 20, max_ep_len: int = 1000, dropout: float = 0.1
) -> DecisionTransformer:
    """HalfCheetah of D4RL: target returns 12000 and 6000, return scale 1000."""
    return DecisionTransformer(
        state_dim, act_dim, context_length=context_length, max_ep_len=max_ep_len, dropout=dropout
    )


def decision_transformer_walker2d(
    *, state_dim: int = 17, act_dim: int = 6, context_length: int = 20, max_ep_len: int = 1000, dropout: float = 0.1
) -> DecisionTransformer:
    """Walker2d of D4RL: target returns 5000 and 2500, return scale 1000."""
    return DecisionTransformer(
        state_dim, act_dim, context_length=context_length, max_ep_len=max_ep_len, dropout=dropout
    )


def decision_transformer_reacher(
    *, state_dim: int = 12, act_dim: int = 2, context_length: int = 5, max_ep_len: int = 100, dropout: float = 0.1
) -> DecisionTransformer:
    """The official code's goal-conditioned 2-D Reacher: target returns 76 and 40, return scale 10."""
    return DecisionTransformer(
        state_dim, act_dim, context_length=context_length, max_ep_len=max_ep_len, dropout=dropout
    )


def decision_transformer_atari_breakout(
    *, n_actions: int = 4, context_length: int = 30, max_timestep: int = 10_000, dropout: float = 0.1
) -> DecisionTransformerAtari:
    """Breakout: target return 90."""
    return DecisionTransformerAtari(n_actions, context_length, max_timestep, dropout=dropout)


def decision_transformer_atari_qbert(
    *, n_actions: int = 6, context_length: int = 30, max_timestep: int = 10_000, dropout: float = 0.1
) -> DecisionTransformerAtari:
    """Qbert: target return 14000 in the official code, 2500 in the paper's text."""
    return DecisionTransformerAtari(n_actions, context_length, max_timestep, dropout=dropout)


def decision_transformer_atari_pong(
    *, n_actions: int = 6, context_length: int = 50, max_timestep: int = 10_000, dropout: float = 0.1
) -> DecisionTransformerAtari:
    """Pong: target return 20, the one game with 50 steps of context."""
    return DecisionTransformerAtari(n_actions, context_length, max_timestep, dropout=dropout)


def decision_transformer_atari_seaquest(
    *, n_actions: int = 18, context_length: int = 30, max_timestep: int = 10_000, dropout: float = 0.1
) -> DecisionTransformerAtari:
    """Seaquest: target return 1150 in the official code, 1450 in the paper's text."""
    return DecisionTransformerAtari(n_actions, context_length, max_timestep, dropout=dropout)
