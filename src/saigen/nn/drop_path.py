"""Stochastic depth (Huang et al., 2016, arXiv 1603.09382), per sample."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class DropPath(nn.Module):
    """Drops a residual branch for whole samples in training; the survivors are divided by the survival probability.

    ``drop_probability`` is the probability that a sample loses the branch, in [0, 1). Eval mode is the identity.

    >>> DropPath(0.2).eval()(torch.ones(2, 3)).sum().item()
    6.0
    """

    def __init__(self, drop_probability: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= drop_probability < 1.0:
            raise ValueError(f"drop_probability is {drop_probability}, allowed is 0 <= drop_probability < 1")
        self.drop_probability = drop_probability

    def forward(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        if self.drop_probability == 0.0 or not self.training:
            return x
        survival = 1.0 - self.drop_probability
        mask = torch.empty(x.shape[0], *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device).bernoulli_(survival)
        return x * mask / survival

    def extra_repr(self) -> str:
        return f"{self.drop_probability:g}"
