"""Shuffling BN (section 3.3, appendix A.9): batch norm that looks at each device's share of a batch, and a batch of keys
that is shuffled among the devices, so that a query and its key are not given away by common statistics."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

# --- several devices: what one of them needs of all


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


class AllGather(torch.autograd.Function):
    """Rows of all processes; backward, each takes home what all of them have to say of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(world())[rank()]


def gather(x: Tensor) -> Tensor:
    """``x`` of every process, one after the other; as many rows in each. Gradients flow."""
    return x if world() == 1 else AllGather.apply(x)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation of (b, c, h, w) as on ``splits`` devices: sample i by the statistics of those i modulo ``splits``.

    One set of parameters and running statistics; the latter move by the mean over the devices. In eval mode it is the
    usual layer. Raises ``ValueError`` for ``splits`` below 1, and in training for a batch that does not divide.
    """

    def __init__(self, num_features: int, splits: int, **options: float | bool | None) -> None:
        super().__init__(num_features, **options)
        if splits < 1:
            raise ValueError(f"splits is {splits}, allowed is splits >= 1")
        self.splits = splits

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if not self.training:
            return super().forward(x)
        (b, c, h, w), s = x.shape, self.splits
        if b % s:
            raise ValueError(f"the batch is {b}, allowed is a multiple of splits = {s}")
        mean = var = None
        share = self.momentum
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            mean, var = self.running_mean.repeat(s), self.running_var.repeat(s)
            share = 1 / float(self.num_batches_tracked) if share is None else share
        weight, bias = (None if p is None else p.repeat(s) for p in (self.weight, self.bias))
        # neighbours in the batch become groups of channels, each with statistics of its own
        y = F.batch_norm(x.reshape(b // s, s * c, h, w), mean, var, weight, bias, True, share or 0.0, self.eps)
        if mean is not None and var is not None:
            self.running_mean.copy_(mean.view(s, c).mean(0))
            self.running_var.copy_(var.view(s, c).mean(0))
        return y.reshape(b, c, h, w)

    @classmethod
    def convert(cls, module: nn.Module, splits: int) -> nn.Module:
        """``module`` with every ``nn.BatchNorm2d`` in it made one of these, with the same parameters and statistics."""
        if type(module) is nn.BatchNorm2d:
            split = cls(
                module.num_features,
                splits,
                eps=module.eps,
                momentum=module.momentum,
                affine=module.affine,
                track_running_stats=module.track_running_stats,
            )
            split._parameters, split._buffers, split.training = module._parameters, module._buffers, module.training
            return split
        for name, child in module.named_children():
            setattr(module, name, cls.convert(child, splits))
        return module


@torch.no_grad()
def shuffle_batch(
    x: Float[Tensor, "b ..."], generator: torch.Generator | None = None
) -> tuple[Float[Tensor, "b ..."], Int[Tensor, " n"]]:
    """``x`` in a random order, over all processes, and what brings it back: ``unshuffle_batch(shuffled, inverse)`` is x."""
    everything = gather(x)
    order = torch.randperm(len(everything), generator=generator).to(x.device)
    if world() > 1:
        dist.broadcast(order, src=0)
    return everything[order.view(world(), -1)[rank()]], order.argsort()


def unshuffle_batch(y: Float[Tensor, "b ..."], inverse: Int[Tensor, " n"]) -> Float[Tensor, "b ..."]:
    """Brings what was computed of a shuffled batch back into the order from before; gradients flow."""
    return gather(y)[inverse.view(world(), -1)[rank()]]
