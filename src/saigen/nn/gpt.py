"""The causal transformer of GPT-2 (Radford et al., 2019), for words or for any embedded sequence.

Module names are those of Transformers' ``GPT2Model`` (``wte wpe h.{i}.ln_1 …attn.c_attn … ln_f``) over plain ``nn.Linear``;
``convert_gpt2`` and ``convert_mingpt`` bring the two common checkpoint layouts to it.
"""

import math
import re

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

ACTIVATIONS = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),  # "gelu_new" of GPT-2's own code
}


def causal_mask(keep: Bool[Tensor, "b t"]) -> Bool[Tensor, "b 1 t t"]:
    """What each position may look at: the kept positions up to itself, ``True`` where attention is allowed.

    A position that is not kept still sees itself, so that no row of the softmax is empty; nobody else sees it.

    >>> causal_mask(torch.tensor([[False, True, True]]))[0, 0].int().tolist()
    [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    """
    position = torch.arange(keep.shape[1], device=keep.device)
    past = position[:, None] >= position
    return past & keep[:, None, None, :] | (position[:, None] == position)


class CausalSelfAttention(nn.Module):
    """Multi-head attention to the past; dropout falls on the attention weights and on the output."""

    def __init__(self, width: int, heads: int, attention_dropout: float, residual_dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_dropout = attention_dropout
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.resid_dropout = nn.Dropout(residual_dropout)

    def forward(
        self,
        x: Float[Tensor, "b t c"],
        mask: Bool[Tensor, "#b 1 r t"] | None = None,
        rows: Int[Tensor, "r"] | None = None,
    ) -> Float[Tensor, "b r c"]:
        b, t, c = x.shape
        if rows is None:
            q, k, v = self.c_attn(x).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            weight, bias = self.c_attn.weight, self.c_attn.bias
            q = F.linear(x.index_select(1, rows), weight[:c], bias[:c]).unflatten(2, (self.heads, -1)).transpose(1, 2)
            k, v = F.linear(x, weight[c:], bias[c:]).view(b, t, 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.attention_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """Two linear layers with the activation between them; dropout falls on the output."""

    def __init__(self, width: int, inner: int, activation: str, residual_dropout: float) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, inner)
        self.act = ACTIVATIONS[activation]()
        self.c_proj = nn.Linear(inner, width)
        self.dropout = nn.Dropout(residual_dropout)

    def forward(self, x: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    """Attention, then MLP, each behind its layer norm and added to what came in (pre-LN)."""

    def __init__(
        self,
        width: int,
        heads: int,
        inner: int,
        activation: str,
        attention_dropout: float,
        residual_dropout: float,
        eps: float,
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=eps)
        self.attn = CausalSelfAttention(width, heads, attention_dropout, residual_dropout)
        self.ln_2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, inner, activation, residual_dropout)

    def forward(
        self,
        x: Float[Tensor, "b t c"],
        mask: Bool[Tensor, "#b 1 r t"] | None = None,
        rows: Int[Tensor, "r"] | None = None,
    ) -> Float[Tensor, "b r c"]:
        attended = self.attn(self.ln_1(x), mask, rows)
        x = attended + (x if rows is None else x.index_select(1, rows))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2's stack of ``depth`` causal blocks with a final layer norm.

    ``vocabulary`` makes the token embedding ``wte`` and ``positions`` the position embedding ``wpe``; without
    ``positions`` nothing is added, and the caller embeds time itself. The output head belongs to the caller.
    Weights start as N(0, 0.02), biases at 0; with ``scaled_residuals`` the two projections that write to the residual
    stream start as N(0, 0.02 / sqrt(2 depth)), as in GPT-2.

    >>> GPT(width=8, depth=2, heads=2)(torch.zeros(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        *,
        vocabulary: int | None = None,
        positions: int | None = None,
        inner: int | None = None,
        activation: str = "gelu_tanh",
        embedding_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        residual_dropout: float = 0.1,
        eps: float = 1e-5,
        scaled_residuals: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("depth", depth), ("heads", heads)):
            if value < 1:
                raise ValueError(f"{name} is {value}, allowed is a whole number of at least 1")
        if width % heads:
            raise ValueError(f"heads is {heads}, allowed is a divisor of width {width}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}, allowed are {', '.join(ACTIVATIONS)}")
        for name, value in (
            ("embedding_dropout", embedding_dropout),
            ("attention_dropout", attention_dropout),
            ("residual_dropout", residual_dropout),
        ):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name} is {value}, allowed is 0 <= {name} < 1")
        self.width = width
        self.positions = positions
        inner = 4 * width if inner is None else inner
        if vocabulary is not None:
            self.wte = nn.Embedding(vocabulary, width)
        if positions is not None:
            self.wpe = nn.Embedding(positions, width)
        self.drop = nn.Dropout(embedding_dropout)
        self.h = nn.ModuleList(
            Block(width, heads, inner, activation, attention_dropout, residual_dropout, eps) for _ in range(depth)
        )
        self.ln_f = nn.LayerNorm(width, eps=eps)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                residual = scaled_residuals and name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if residual else 0.02)

    def forward(
        self,
        inputs: Int[Tensor, "b t"] | Float[Tensor, "b t c"],
        keep: Bool[Tensor, "b t"] | None = None,
        rows: Int[Tensor, "r"] | None = None,
    ) -> Float[Tensor, "b _ width"]:
        """The hidden states after the final layer norm, of token ids (b, t) or of embeddings (b, t, width).

        ``keep`` is False at padding; padded positions are seen by no other position. Without it the mask is causal only.
        ``rows`` are the positions whose hidden states are wanted, if not all: the last block computes no others.
        """
        x = inputs if inputs.is_floating_point() else self.wte(inputs)
        t = x.shape[1]
        if self.positions is not None:
            if t > self.positions:
                raise ValueError(f"the sequence has {t} tokens, allowed are at most {self.positions}")
            x = x + self.wpe.weight[:t]
        x = self.drop(x)
        mask = None if keep is None else causal_mask(keep)
        for block in self.h[:-1]:
            x = block(x, mask)
        if rows is not None:
            # Fewer questions than positions: "causal" has to be spelt out.
            mask = causal_mask(torch.ones(1, t, dtype=torch.bool, device=x.device)) if mask is None else mask
            mask = mask.index_select(2, rows)
        return self.ln_f(self.h[-1](x, mask, rows))


def convert_gpt2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Brings Transformers' GPT-2 layout to ours: its ``Conv1D`` weights are (in, out) and are transposed, mask buffers go.

    Works below any prefix; blocks that are in our layout already stay as they are (the shape of ``c_attn`` tells).
    """
    result = {key: value for key, value in state.items() if not re.search(r"(^|\.)attn\.(bias|masked_bias)$", key)}
    for key in state:
        if key.endswith("attn.c_attn.weight") and state[key].shape[1] == 3 * state[key].shape[0]:
            block = key.removesuffix("attn.c_attn.weight")
            for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
                if f"{block}{name}.weight" in state:
                    result[f"{block}{name}.weight"] = state[f"{block}{name}.weight"].T.contiguous()
    return result


def convert_mingpt(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Brings minGPT's layout (``blocks.{i}.ln1 attn.key … mlp.0``) to ours below ``prefix``, the three projections fused.

    Keys that are not of a block keep their names; mask buffers go.
    """
    names = {"ln1": "ln_1", "ln2": "ln_2", "attn.proj": "attn.c_proj", "mlp.0": "mlp.c_fc", "mlp.2": "mlp.c_proj"}
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        found = re.fullmatch(r"blocks\.(\d+)\.(.+?)(?:\.(weight|bias))?", key)
        if found is None:
            result[key] = value
            continue
        block, name, kind = found.groups()
        if name in names:
            result[f"{prefix}h.{block}.{names[name]}.{kind}"] = value
        elif name == "attn.query":
            parts = [state.get(f"blocks.{block}.attn.{part}.{kind}") for part in ("query", "key", "value")]
            if any(part is None for part in parts):
                result[key] = value
            else:
                result[f"{prefix}h.{block}.attn.c_attn.{kind}"] = torch.cat(parts)
        elif name in ("attn.key", "attn.value"):
            if f"blocks.{block}.attn.query.{kind}" not in state:
                result[key] = value
        elif not name.startswith("attn.mask"):
            result[key] = value
    return result
