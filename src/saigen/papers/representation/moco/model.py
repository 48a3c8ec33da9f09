"""Momentum Contrast for Unsupervised Visual Representation Learning (He et al., CVPR 2020, arXiv 1911.05722), and MoCo v2.

Contrastive learning as the look-up of a query q in a dictionary of keys (section 3.1): q is to match the key k+ of the
other view of its image and none of K others. The dictionary has to be large and its keys consistent. MoCo keeps it as
a queue of past keys, and encodes keys with f_k, a slowly moving average of the query encoder f_q (section 3.2).

Top to bottom: the contrastive loss, the queue, the momentum update, the method, and the two mechanisms that the paper
compares it with (figure 2): end-to-end and the memory bank. Shuffling BN is in ``shuffling``.
"""

import copy
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from saigen.nn.foreach import batches
from saigen.nn.resnet import resnet50, strip_prefixes
from saigen.papers.representation.moco.shuffling import (
    SplitBatchNorm2d,
    gather,
    rank,
    shuffle_batch,
    unshuffle_batch,
    world,
)

Encoder = Callable[..., nn.Module]
"""Called as ``encoder(num_classes=dim)``: a network over images whose last layer, a linear one, gives ``dim`` outputs."""


# --- the contrastive loss (equation 1)


def contrast(
    q: Float[Tensor, "b d"], k: Float[Tensor, "b d"], negatives: Float[Tensor, "d n"], temperature: float = 0.07
) -> tuple[Float[Tensor, "b n+1"], Int[Tensor, " b"]]:
    """The (K+1)-way classification of equation 1: logits [q . k+, q . k_1, ..., q . k_K] / temperature, and labels 0.

    ``q`` and ``k`` are unit vectors, ``negatives`` unit columns. Gradients flow into all three; MoCo gives keys without.
    Raises ``ValueError`` for a temperature that is not positive and for shapes that do not fit.
    """
    _check_temperature(temperature)
    if q.shape != k.shape or len(negatives) != q.shape[1]:
        raise ValueError(
            f"q, k, negatives have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(negatives.shape)}, allowed are "
            "(b, d), (b, d), (d, n)"
        )
    q = q / temperature  # here it is b d divisions, on the logits it would be b K
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ negatives], 1)
    return logits, torch.zeros(len(q), dtype=torch.long, device=q.device)


def info_nce(
    q: Float[Tensor, "b d"], k: Float[Tensor, "b d"], negatives: Float[Tensor, "d n"], temperature: float = 0.07
) -> Float[Tensor, ""]:
    """InfoNCE (equation 1), mean over the batch: the cross-entropy of ``contrast``. With no negatives it is 0.

    >>> q = F.normalize(torch.randn(4, 8), dim=1)
    >>> info_nce(q, q, torch.zeros(8, 0)).item()
    0.0
    """
    return F.cross_entropy(*contrast(q, k, negatives, temperature))


class InfoNCE(nn.Module):
    """``info_nce`` as a module: unit vectors q, k (b, d) and unit columns (d, K) to a scalar."""

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        _check_temperature(temperature)
        self.temperature = temperature

    def forward(
        self, q: Float[Tensor, "b d"], k: Float[Tensor, "b d"], negatives: Float[Tensor, "d n"]
    ) -> Float[Tensor, ""]:
        return info_nce(q, k, negatives, self.temperature)


def uniform_loss(queue_size: int) -> float:
    """The loss of an encoder that gives everything the same vector, log(K + 1): what a collapse looks like here."""
    if queue_size < 0:
        raise ValueError(f"queue_size is {queue_size}, allowed is queue_size >= 0")
    return math.log(queue_size + 1)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, allowed is temperature > 0")


# --- the dictionary as a queue (section 3.2)


class KeyQueue(nn.Module):
    """The last ``size`` keys, first in, first out: called with new keys (b, dim) it gives the dictionary (dim, size).

    What is given is a copy from before the new keys came in: gradients need it as it was, and a positive key must not
    be among its own negatives. Keys come in only in training mode, those of all processes; the oldest leave. At first
    the queue is full of random unit vectors. Raises ``ValueError`` for sizes below 1 and for more keys than ``size``.

    >>> queue = KeyQueue(dim=8, size=6)
    >>> negatives = queue(F.normalize(torch.randn(4, 8), dim=1))
    >>> negatives.shape, queue.ptr.item()
    (torch.Size([8, 6]), 4)
    """

    def __init__(self, dim: int = 128, size: int = 65536) -> None:
        super().__init__()
        if min(dim, size) < 1:
            raise ValueError(f"dim and size are {dim} and {size}, allowed is at least 1 for each")
        self.size = size
        self.register_buffer("keys", F.normalize(torch.randn(dim, size), dim=0))
        self.register_buffer("ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, k: Float[Tensor, "b d"]) -> Float[Tensor, "d n"]:
        if not self.training:
            return self.keys
        negatives = self.keys.clone()
        self.enqueue(k)
        return negatives

    @torch.no_grad()
    def enqueue(self, k: Float[Tensor, "b d"]) -> None:
        """Takes keys in at ``ptr``, over the oldest ones, and moves ``ptr`` on, modulo the size."""
        k = gather(k)
        if len(k) > self.size:
            raise ValueError(f"k has {len(k)} keys, allowed are at most size = {self.size}")
        # slots as a tensor: nothing waits for the device to say where the pointer is
        slots = (self.ptr + torch.arange(len(k), device=self.ptr.device)) % self.size
        self.keys.index_copy_(1, slots, k.T.to(self.keys.dtype))
        self.ptr.copy_((self.ptr + len(k)) % self.size)


# --- the momentum update (equation 2)


@torch.no_grad()
def momentum_update_(target: nn.Module, source: nn.Module, m: float) -> None:
    """theta_k <- m theta_k + (1 - m) theta_q for every parameter (equation 2). Buffers stay: f_k has its own statistics.

    Raises ``ValueError`` unless 0 <= m <= 1 and both networks have the same parameters.
    """
    if not 0 <= m <= 1:
        raise ValueError(f"m is {m}, allowed is 0 <= m <= 1")
    theta_k, theta_q = list(target.parameters()), list(source.parameters())
    if [p.shape for p in theta_k] != [p.shape for p in theta_q]:
        raise ValueError(
            f"source has {len(theta_q)} parameters, allowed are those of target, {len(theta_k)}, of the same shapes"
        )
    start = 0
    for portion in batches(theta_k) if theta_k else ():
        torch._foreach_lerp_(portion, theta_q[start : start + len(portion)], 1 - m)
        start += len(portion)


def half_life(momentum: float) -> float:
    """After how many steps half of f_k's weights are newer than now: log(1/2) / log(m); 693 steps at m = 0.999.

    A training must be much longer, or f_k stays at its random start. Raises ``ValueError`` unless 0 < m < 1.
    """
    if not 0 < momentum < 1:
        raise ValueError(f"momentum is {momentum}, allowed is 0 < momentum < 1")
    return math.log(0.5) / math.log(momentum)


# --- the method (algorithm 1)


def _build(encoder: Encoder, dim: int, mlp: bool, bn_splits: int) -> nn.Module:
    if dim < 1:
        raise ValueError(f"dim is {dim}, allowed is dim >= 1")
    if bn_splits < 1:
        raise ValueError(f"bn_splits is {bn_splits}, allowed is bn_splits >= 1")
    network = encoder(num_classes=dim)
    if mlp:
        name, head = _head(network)
        hidden = nn.Linear(head.in_features, head.in_features)
        setattr(network, name, nn.Sequential(hidden, nn.ReLU(), head))
    return SplitBatchNorm2d.convert(network, bn_splits) if bn_splits > 1 else network


def _head(network: nn.Module) -> tuple[str, nn.Module]:
    """The name and the module of the last layer, v1's linear one or v2's MLP."""
    for name in ("fc", "classifier", "head"):
        head = getattr(network, name, None)
        if isinstance(head, nn.Linear | nn.Sequential):
            return name, head
    raise ValueError(
        f"encoder gives a {type(network).__name__}, allowed is a network whose last layer is a linear one called fc, "
        "classifier or head"
    )


class _Contrastive(nn.Module):
    """What the three mechanisms share: f_q with its head, and the way from an image to a unit vector."""

    def __init__(self, encoder: Encoder, dim: int, temperature: float, mlp: bool, bn_splits: int) -> None:
        super().__init__()
        _check_temperature(temperature)
        self.encoder_q = _build(encoder, dim, mlp, bn_splits)
        self.temperature, self.bn_splits = temperature, bn_splits

    def encode(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b d"]:
        """q = f_q(x), of length 1."""
        return F.normalize(self.encoder_q(x), dim=1)

    def encode_keys(self, encoder: nn.Module, x: Float[Tensor, "b ..."], shuffle: bool) -> Float[Tensor, "b d"]:
        """k = f_k(x), of length 1, with shuffling BN where there is more than one set of batch statistics."""
        if not (self.training and shuffle and (self.bn_splits > 1 or world() > 1)):
            return F.normalize(encoder(x), dim=1)
        x, inverse = shuffle_batch(x)
        return unshuffle_batch(F.normalize(encoder(x), dim=1), inverse)

    def backbone(self) -> nn.Module:
        """A copy of f_q without its head, for what comes after pre-training: images to features."""
        network = copy.deepcopy(self.encoder_q)
        setattr(network, _head(network)[0], nn.Identity())
        return network


class MoCo(_Contrastive):
    """MoCo around an encoder (algorithm 1): two views (b, ...) to logits (b, 1 + queue_size) and labels (b), all 0.

    In training mode a call first moves f_k towards f_q by ``momentum``, then encodes the keys, and at last puts them
    into the queue; in eval mode nothing moves. Train by ``F.cross_entropy(logits, labels)``. ``mlp`` is the head of
    MoCo v2. ``bn_splits`` lets one device stand in for so many (official: 8) in its batch norms, so that ``shuffle``
    has something to shuffle; under ``torch.distributed`` the processes themselves do.
    Raises ``ValueError`` for sizes below 1, a temperature that is not positive, and unless 0 <= momentum <= 1.

    >>> from saigen.nn.resnet import ResNet
    >>> net = MoCo(partial(ResNet, "basic", (1,), (8,)), dim=16, queue_size=32)
    >>> logits, labels = net(torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32))
    >>> F.cross_entropy(logits, labels).backward()
    >>> logits.shape, net.queue.ptr.item()
    (torch.Size([4, 33]), 4)
    """

    def __init__(
        self,
        encoder: Encoder,
        dim: int = 128,
        queue_size: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.07,
        *,
        mlp: bool = False,
        bn_splits: int = 1,
        shuffle: bool = True,
    ) -> None:
        super().__init__(encoder, dim, temperature, mlp, bn_splits)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum is {momentum}, allowed is 0 <= momentum <= 1")
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.queue = KeyQueue(dim, queue_size)
        self.momentum, self.shuffle = momentum, shuffle

    def forward(
        self, x_q: Float[Tensor, "b ..."], x_k: Float[Tensor, "b ..."]
    ) -> tuple[Float[Tensor, "b n"], Int[Tensor, " b"]]:
        q = self.encode(x_q)
        with torch.no_grad():
            if self.training:
                momentum_update_(self.encoder_k, self.encoder_q, self.momentum)
            k = self.encode_keys(self.encoder_k, x_k, self.shuffle)
        return contrast(q, k.to(q.dtype), self.queue(k).to(q.dtype), self.temperature)

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official checkpoints (``module.encoder_q.*``, ``module.encoder_k.*``, ``queue``, ``queue_ptr``) to ours."""
        names = {"queue": "queue.keys", "queue_ptr": "queue.ptr"}
        return {names.get(key, key): value for key, value in strip_prefixes(state, ("module.",)).items()}


# --- the two other mechanisms (figure 2)


class EndToEnd(_Contrastive):
    """Both encoders are trained and the dictionary is the batch (figure 2a): two views to logits (b, b), labels 0..b-1.

    Under ``torch.distributed`` it is the batch of all processes, through which gradients flow. ``shared`` makes f_k
    and f_q one network; else they are two that start equal.
    """

    def __init__(
        self,
        encoder: Encoder,
        dim: int = 128,
        temperature: float = 0.07,
        *,
        mlp: bool = False,
        bn_splits: int = 1,
        shuffle: bool = True,
        shared: bool = False,
    ) -> None:
        super().__init__(encoder, dim, temperature, mlp, bn_splits)
        if not shared:
            self.encoder_k = copy.deepcopy(self.encoder_q)
        self.shared, self.shuffle = shared, shuffle

    def forward(
        self, x_q: Float[Tensor, "b ..."], x_k: Float[Tensor, "b ..."]
    ) -> tuple[Float[Tensor, "b n"], Int[Tensor, " b"]]:
        q = self.encode(x_q)
        k = self.encode_keys(self.encoder_q if self.shared else self.encoder_k, x_k, self.shuffle)
        labels = torch.arange(len(q), device=q.device) + rank() * len(q)
        return q / self.temperature @ gather(k).T, labels


class MemoryBank(_Contrastive):
    """A stored vector of each of ``size`` images is its key (figure 2b): views (b, ...) and their numbers (b) to logits.

    Logits are (b, 1 + negatives), labels 0. The negatives of a batch are drawn from the bank, with replacement; a
    query's own entry among them does not count. In training the entries of the batch then move: ``momentum`` times
    the old vector plus the rest of q, back to length 1. In eval mode nothing moves and all of the bank is negatives.
    Raises ``ValueError`` for sizes below 1, numbers beyond ``size``, and unless 0 <= momentum <= 1.
    """

    def __init__(
        self,
        encoder: Encoder,
        size: int,
        dim: int = 128,
        negatives: int = 65536,
        momentum: float = 0.5,
        temperature: float = 0.07,
        *,
        mlp: bool = False,
        bn_splits: int = 1,
    ) -> None:
        super().__init__(encoder, dim, temperature, mlp, bn_splits)
        if min(size, negatives) < 1:
            raise ValueError(f"size and negatives are {size} and {negatives}, allowed is at least 1 for each")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum is {momentum}, allowed is 0 <= momentum <= 1")
        self.size, self.negatives, self.momentum = size, negatives, momentum
        self.register_buffer("bank", F.normalize(torch.randn(size, dim), dim=1))

    def forward(
        self, x: Float[Tensor, "b ..."], index: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b n"], Int[Tensor, " b"]]:
        if (
            not torch.compiler.is_compiling()
            and len(index)
            and not 0 <= int(index.min()) <= int(index.max()) < self.size
        ):
            raise ValueError(f"index goes from {index.min()} to {index.max()}, allowed is 0 to {self.size - 1}")
        q = self.encode(x)
        k = self.bank[index].to(q.dtype)
        drawn = torch.arange(self.size, device=index.device)
        if self.training:
            drawn = torch.randint(self.size, (self.negatives,)).to(index.device)
        logits, labels = contrast(q, k, self.bank[drawn].T.to(q.dtype), self.temperature)
        own = F.pad(drawn == index[:, None], (1, 0))
        if self.training:
            self._update(q.detach(), index)
        return logits.masked_fill(own, -math.inf), labels

    @torch.no_grad()
    def _update(self, q: Tensor, index: Tensor) -> None:
        q, index = gather(q.to(self.bank.dtype)), gather(index)
        self.bank[index] = F.normalize(torch.lerp(q, self.bank[index], self.momentum), dim=1)


# --- the paper's networks


def moco_v1_resnet50(*, queue_size: int = 65536, bn_splits: int = 1) -> MoCo:
    """MoCo v1 as on ImageNet (section 3.3): ResNet-50, 128 outputs, m = 0.999, temperature 0.07."""
    return MoCo(partial(resnet50, zero_init=False), queue_size=queue_size, bn_splits=bn_splits)


def moco_v2_resnet50(*, queue_size: int = 65536, bn_splits: int = 1) -> MoCo:
    """MoCo v2 (arXiv 2003.04297): an MLP head and temperature 0.2, and the views and the schedule of ``recipe("v2")``."""
    return MoCo(
        partial(resnet50, zero_init=False), queue_size=queue_size, temperature=0.2, mlp=True, bn_splits=bn_splits
    )
