"""Multi-head self-attention and the MLP that follows it, in timm's key layout."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al., 2017): softmax(QKᵀ/√d) V per head, heads concatenated and projected.

    ``fused`` picks ``scaled_dot_product_attention``. Its fused kernels have no second derivative: set it to False
    (``set_fused`` does so for a whole model) where a Hessian-vector product is wanted. Both forms compute the same.

    Raises ``ValueError`` where ``dim`` is no multiple of ``num_heads``.

    >>> import torch
    >>> Attention(64, num_heads=4)(torch.rand(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        fused: bool = True,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}, allowed is a divisor of dim, which is {dim}")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.fused = fused
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def heads(self, x: Float[Tensor, "b n d"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (batch, head, token, channel of the head)."""
        b, n, d = x.shape
        return self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        q, k, v = self.heads(x)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            x = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        # (b, h, n, c) -> (b, n, h c): the fused kernel already lays its output out token by token, so this is a view
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, fused={self.fused}"


def set_fused(model: nn.Module, fused: bool) -> None:
    """Turns fused attention on or off in every ``Attention`` of ``model``.

    >>> set_fused(Attention(64), False)
    """
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused = fused


class MLP(nn.Module):
    """Linear, GELU, linear, on the last axis: the transformer's feed-forward layer (also MLP-Mixer's).

    ``gelu`` is "none" for the exact function (as timm and DeiT) or "tanh" for the approximation JAX defaults to.

    >>> import torch
    >>> MLP(64, 256)(torch.rand(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(self, dim: int, hidden_dim: int, *, gelu: Literal["none", "tanh"] = "none", drop: float = 0.0) -> None:
        super().__init__()
        if gelu not in ("none", "tanh"):
            raise ValueError(f"gelu is {gelu!r}, allowed is 'none' (exact) or 'tanh'")
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU(approximate=gelu)
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))
