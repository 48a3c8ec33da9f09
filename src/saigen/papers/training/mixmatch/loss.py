"""MixMatch: one loss of labelled and unlabelled data (Berthelot, Carlini, Goodfellow, Papernot, Oliver, Raffel, 2019).

    X', U' = MixMatch(X, U, T, K, α)                                                   equation 2
    L_X = mean over X' of H(p, f(x)),   L_U = mean over U' and classes of (q - f(u))²  equations 3 and 4
    L   = L_X + λ_U L_U                                                                equation 5

The batch transformation (algorithm 1): the label of an unlabelled image is guessed as the mean prediction over K of its
augmentations, sharpened at temperature T; then every image, labelled or not, is mixed up with one of all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from scipy.special import betainc
from torch import Tensor, nn

from saigen.nn.mixing import mix, mixing_weights, soft_labels

Model = Callable[[Tensor], Tensor]

MIX_MODES = ("xxy.yxy", "xx.yy", "xx.yxy", "xx.yx", "xx.", ".yy", "xxy.", ".yxy", ".")
"""What labelled images x (before the dot) and unlabelled images y (after it) are mixed with: themselves, both, nothing."""


def sharpen(p: Float[Tensor, "*b k"], temperature: float | int = 0.5) -> Float[Tensor, "*b k"]:
    """p_i^(1/T) / Σ_j p_j^(1/T) (equation 7): T = 1 changes nothing, T to 0 gives a one-hot row.

    Raises ``ValueError`` where T is not positive.

    >>> sharpen(torch.tensor([0.6, 0.3, 0.1]), 0.5)
    tensor([0.7826, 0.1957, 0.0217])
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, allowed is temperature > 0")
    # In logarithms: powers of a small temperature would underflow to 0 / 0.
    return (p.log() / temperature).softmax(-1)


@contextmanager
def statistics_untouched(model: Model) -> Iterator[None]:
    """Within the block batch norms in training mode normalise by their batch and leave their running statistics alone."""
    norms = [
        module
        for module in (model.modules() if isinstance(model, nn.Module) else ())
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats and module.training
    ]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@torch.no_grad()
def guess_labels(
    model: Model, views: Sequence[Float[Tensor, "b ..."]], temperature: float | int = 0.5
) -> Float[Tensor, "b k"]:
    """The sharpened mean of the predictions on the K ``views`` of each image (equations 6 and 7); no gradient flows.

    The model stays in the mode it is in; in training mode every view is normalised by its own batch, and the running
    statistics do not see it.
    """
    if not len(views):
        raise ValueError("views is empty, allowed is at least one augmentation of the unlabelled images")
    with statistics_untouched(model):
        mean = torch.stack([model(view).softmax(-1) for view in views]).mean(0)
    return sharpen(mean, temperature)


def interleave(batches: Sequence[Num[Tensor, "b ..."]]) -> list[Num[Tensor, "b ..."]]:
    """Swaps the i-th of as many groups of the first batch with that of the i-th batch, so that the first holds some of each.

    Batch norm then sees labelled and unlabelled images in all batches. Done twice it is the identity. Groups are as equal
    as can be, larger ones last.

    >>> [batch.tolist() for batch in interleave([torch.zeros(5), torch.ones(5)])]
    [[0.0, 0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0, 0.0]]
    """
    n, k = len(batches[0]), len(batches)
    if any(len(batch) != n for batch in batches):
        raise ValueError(f"batches have {[len(batch) for batch in batches]} rows, allowed is as many in each")
    groups = [list(batch.split([n // k + (i >= k - n % k) for i in range(k)])) for batch in batches]
    for i in range(1, k):
        groups[0][i], groups[i][i] = groups[i][i], groups[0][i]
    return [torch.cat(group) for group in groups]


def forward_interleaved(model: Model, batches: Sequence[Float[Tensor, "b ..."]]) -> list[Float[Tensor, "b k"]]:
    """The logits of every batch, from interleaved ones; only the first of those moves batch norm's running statistics."""
    first, *rest = interleave(batches)
    logits = [model(first)]
    with statistics_untouched(model):
        logits += [model(batch) for batch in rest]
    return interleave(logits)


def mix_batches(
    xs: Sequence[Float[Tensor, "b ..."]],
    ps: Sequence[Float[Tensor, "b k"]],
    alpha: float | int = 0.75,
    *,
    mode: str = "xxy.yxy",
    generator: torch.Generator | None = None,
) -> tuple[list[Float[Tensor, "b ..."]], list[Float[Tensor, "b k"]]]:
    """MixUp of the labelled batch (the first) and the unlabelled ones, images and label distributions.

    Each image has its own λ ~ Beta(α, α), of which the larger of λ and 1 - λ is taken (equations 8 to 11), so that it
    stays mostly itself, and its own partner out of a random permutation. ``mode`` is one of ``MIX_MODES``; those but the
    first are the ablations of table 4. Of the paper's method, W = Shuffle(Concat(X, U)) is ``"xxy.yxy"``.
    """
    if mode not in MIX_MODES:
        raise ValueError(f"mode is {mode!r}, allowed are {', '.join(MIX_MODES)}")
    pairs = list(zip(xs, ps, strict=True))
    labelled, unlabelled = pairs[:1], pairs[1:]

    def mixed(pairs: list, partners: list) -> list:
        (x, p), (others, targets) = (tuple(torch.cat(part) for part in zip(*g, strict=True)) for g in (pairs, partners))
        weights = mixing_weights(len(x), alpha, dominant=True, generator=generator).to(x.device)
        order = torch.randperm(len(x), generator=generator).to(x.device)
        sizes = [len(pair[0]) for pair in pairs]
        x, p = mix(x, weights, others, order), mix(p, weights, targets, order)
        return list(zip(x.split(sizes), p.split(sizes), strict=True))

    left, right = mode.split(".")
    everything = mixed(pairs, pairs) if mode == "xxy.yxy" else None
    if left:
        labelled = (everything or mixed(pairs, pairs))[:1] if left == "xxy" else mixed(labelled, labelled)
    if right == "yx":
        unlabelled = [mixed([pair], pairs[:1])[0] for pair in unlabelled]
    elif right == "yxy":
        unlabelled = (everything or mixed(pairs, pairs))[1:]
    elif right:
        unlabelled = mixed(unlabelled, unlabelled)
    xs, ps = zip(*labelled, *unlabelled, strict=True)
    return list(xs), list(ps)


class Losses(NamedTuple):
    """What one call gives: ``total`` = ``labelled`` + ``weight`` ``unlabelled``."""

    total: Float[Tensor, ""]
    labelled: Float[Tensor, ""]
    unlabelled: Float[Tensor, ""]
    weight: Float[Tensor, ""]


class MixMatch(nn.Module):
    """MixMatch's loss for any classifier: ``mixmatch(model, x, y, views).total.backward()``.

    ``x`` (b, ...) is an augmented labelled batch with classes ``y`` (b,) or soft labels (b, k), ``views`` (b, K, ...) are
    K augmentations of each of b unlabelled samples. λ_U rises linearly from 0 to ``lambda_u`` over the first
    ``rampup_steps`` calls in training mode, which the module counts (the count is in its state dict, so a resumed
    training goes on where it was). ``teacher`` guesses the labels in place of the model: the ablation with averaged
    weights. ``mix_mode`` is one of ``MIX_MODES``. ``generator``, on the CPU, draws the mixing.

    The paper's values are the defaults, for CIFAR-10; λ_U is 150 for CIFAR-100, 250 for SVHN and 50 for STL-10. Train
    with Adam at 0.002 and a weight decay on kernels (``weight_decay_groups``), and evaluate a moving average of the weights.

    >>> from torch import nn
    >>> net, mixmatch = nn.Linear(4, 3), MixMatch(num_classes=3, rampup_steps=100)
    >>> losses = mixmatch(net, torch.rand(8, 4), torch.arange(8) % 3, torch.rand(8, 2, 4))
    >>> losses.total.backward()
    >>> losses.weight.item(), int(mixmatch.step)
    (0.0, 1)
    """

    def __init__(
        self,
        num_classes: int,
        *,
        temperature: float | int = 0.5,
        alpha: float | int = 0.75,
        lambda_u: float | int = 75.0,
        rampup_steps: int = 16_384,
        mix_mode: str = "xxy.yxy",
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}, allowed is num_classes >= 2")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, allowed is temperature > 0")
        for name, value in (("alpha", alpha), ("lambda_u", lambda_u), ("rampup_steps", rampup_steps)):
            if not value >= 0:
                raise ValueError(f"{name} is {value}, allowed is {name} >= 0")
        if mix_mode not in MIX_MODES:
            raise ValueError(f"mix_mode is {mix_mode!r}, allowed are {', '.join(MIX_MODES)}")
        self.num_classes, self.temperature, self.alpha = num_classes, temperature, alpha
        self.lambda_u, self.rampup_steps, self.mix_mode = lambda_u, rampup_steps, mix_mode
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(
        self,
        model: Model,
        x: Float[Tensor, "b ..."],
        y: Num[Tensor, "b *k"],
        views: Float[Tensor, "b K ..."],
        *,
        teacher: Model | None = None,
        generator: torch.Generator | None = None,
    ) -> Losses:
        """The loss, its two parts and λ_U; raises ``ValueError`` for unequal batches and for an empty unlabelled set."""
        if not len(views) or views.ndim < 2 or not views.shape[1]:
            raise ValueError(f"views has shape {tuple(views.shape)}, allowed is (b, K, ...) with b and K of at least 1")
        if len(x) != len(views) or views.shape[2:] != x.shape[1:]:
            raise ValueError(
                f"views has shape {tuple(views.shape)} and x {tuple(x.shape)}, allowed are (b, K, ...) and (b, ...): "
                "as many unlabelled as labelled samples"
            )
        unlabelled = views.unbind(1)
        q = guess_labels(model if teacher is None else teacher, unlabelled, self.temperature)
        p = soft_labels(y, self.num_classes).to(q.dtype)
        if q.shape[1] != self.num_classes:
            raise ValueError(f"num_classes is {self.num_classes}, and the model gives {q.shape[1]} logits")
        xs, targets = mix_batches(
            [x, *unlabelled], [p, *[q] * len(unlabelled)], self.alpha, mode=self.mix_mode, generator=generator
        )
        logits = forward_interleaved(model, xs)
        loss_x = F.cross_entropy(logits[0], targets[0])
        loss_u = F.mse_loss(torch.cat(logits[1:]).softmax(-1), torch.cat(targets[1:]))
        weight = self.lambda_u * self.ramp()
        if self.training:
            self.step += 1
        return Losses(loss_x + weight * loss_u, loss_x, loss_u, weight)

    def ramp(self) -> Float[Tensor, ""]:
        """min(1, step / rampup_steps), at the present step."""
        return (
            (self.step / self.rampup_steps).clamp(max=1.0) if self.rampup_steps else torch.ones_like(self.step).float()
        )

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, temperature={self.temperature:g}, alpha={self.alpha:g}, "
            f"lambda_u={self.lambda_u:g}, rampup_steps={self.rampup_steps}, mix_mode={self.mix_mode}"
        )


def weight_decay_groups(model: nn.Module, weight_decay: float | int = 0.02) -> list[dict]:
    """Groups for ``torch.optim.AdamW``: kernels (two and more dimensions) decay, biases and norms do not.

    AdamW multiplies by 1 - lr weight_decay a step, which is 4e-5 at the paper's 0.002 and 0.02.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay is {weight_decay}, allowed is weight_decay >= 0")
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def expected_share(alpha: float | int) -> float:
    """The mean of max(λ, 1 - λ), λ ~ Beta(α, α): how much of an image is its own after mixing.

    2 E[λ; λ > 1/2] = 1 - I_1/2(α + 1, α), by the regularised incomplete beta function.

    >>> round(expected_share(0.75), 4), round(expected_share(1.0), 4)
    (0.7782, 0.75)
    """
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}, allowed is alpha > 0")
    return float(1.0 - betainc(alpha + 1.0, alpha, 0.5))
