"""Refined data augmentation (He, Xie, Chen, Zhang, Wang, Tian, 2019, arXiv 1909.09148): augment hard, then finish clean.

Intensive augmentation I (mixup, CutMix, AutoAugment) on top of the standard one S (crops and flips) makes the
generalisation gap small, but what it trains on is not what is tested: the empirical risk on clean data stays higher than
it need be. The expected risk is at most the sum of both, so train in two stages:

    1. augmentation   min_w  E loss(f_w(I(S(x))), I(y))     the usual schedule, most of the steps
    2. refinement     min_w  E loss(f_w(S(x)), y)           few steps at a small learning rate, from the weights of 1

Stage 1 leads to a region where the gap is small; stage 2 lowers the empirical risk without leaving it.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from scipy.special import digamma
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

Decay = Callable[[torch.optim.Optimizer, int], LRScheduler]


class OnImages(nn.Module):
    """An augmentation of images alone, ``augment(x, generator=…)``, as one of batches: the labels pass.

    >>> from saigen.papers.augmentation.randaugment import RandAugment
    >>> OnImages(RandAugment(2, 9))(torch.rand(4, 3, 8, 8), torch.arange(4))[1].tolist()
    [0, 1, 2, 3]
    """

    def __init__(self, augment: Callable[..., Tensor]) -> None:
        super().__init__()
        self.augment = augment

    def forward(
        self, x: Num[Tensor, "*n c h w"], y: Any, *, generator: torch.Generator | None = None
    ) -> tuple[Num[Tensor, "*n c h w"], Any]:
        return self.augment(x, generator=generator), y


class RefinedAugmentation(nn.Module):
    """I(S(x)) in the first stage, S(x) in the second: ``refine()`` goes over to it.

    ``intensive``, ``standard`` and ``less`` are called as ``part(x, y, generator=generator)`` and give ``(x, y)``; wrap what
    takes images alone in ``OnImages``. ``standard`` is in both stages (None: nothing). ``less`` takes the place of
    ``intensive`` in the second: a weaker mixup, fewer operations; None, as in the paper, leaves S alone, and the labels
    are those that came in. In eval mode the batch passes untouched.

    The stage lies in shared memory, so the copies in a loader's workers, persistent ones too, go over at the same time
    (batches that were fetched ahead are still of the first stage: go over between two epochs). It is no weight: what
    resumes a training sets it again, as ``Refinement`` does.

    >>> from saigen.nn.mixing import Mixup
    >>> augment = RefinedAugmentation(Mixup(1.0, num_classes=10))
    >>> x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    >>> augment(x, y)[1].shape, augment.refine()(x, y)[1].shape
    (torch.Size([4, 10]), torch.Size([4]))
    """

    def __init__(
        self,
        intensive: Callable[..., tuple[Any, Any]],
        standard: Callable[..., tuple[Any, Any]] | None = None,
        *,
        less: Callable[..., tuple[Any, Any]] | None = None,
    ) -> None:
        super().__init__()
        for name, part in (("intensive", intensive), ("standard", standard), ("less", less)):
            if not callable(part) and (part is not None or name == "intensive"):
                raise ValueError(f"{name} is {part!r}, allowed is an augmentation of (x, y)")
        self.intensive, self.standard, self.less = intensive, standard, less
        self._stage = torch.zeros((), dtype=torch.uint8, device="cpu").share_memory_()

    @property
    def refining(self) -> bool:
        """True in the second stage."""
        return bool(self._stage.item())

    def refine(self, on: bool = True) -> "RefinedAugmentation":
        """Goes over to the second stage, or with ``on=False`` back to the first."""
        self._stage.fill_(int(on))
        return self

    def forward(self, x: Any, y: Any, *, generator: torch.Generator | None = None) -> tuple[Any, Any]:
        """One batch, or one sample in a data set: images and labels as ``intensive`` and ``standard`` take them."""
        if not self.training:
            return x, y
        for part in (self.standard, self.less if self.refining else self.intensive):
            if part is not None:
                x, y = part(x, y, generator=generator)
        return x, y


class Refinement:
    """Puts the second stage at the end of any training: call ``step()`` once after every step of the optimizer.

    Of ``steps`` in all the last ``refine_steps`` refine. When their turn comes, ``augment`` goes over to clean data, the
    learning rate of every group restarts at ``lr_scale`` times its initial one and decays from there to 0 by ``decay``
    (``decay(optimizer, refine_steps)`` makes one of torch's schedulers; the cosine by default), and ``frozen`` modules stop
    training, running statistics of their batch norms included. ``lr_scale=None`` changes nothing but the data.
    ``reset`` forgets the optimizer's momenta. ``on_refine`` is called once when the stage begins: a moving average of
    weights, say, should start again there.

    ``scheduler`` is the first stage's own, over ``steps - refine_steps`` steps; it is stepped here and not by the caller.
    ``refine_steps = 0`` is ordinary training with I; ``refine_steps = steps`` and ``lr_scale = 1`` ordinary training with S.
    ``state_dict`` and ``load_state_dict`` go with those of the model and the optimizer; load it after both.

    >>> net = nn.Linear(2, 2)
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    >>> refinement = Refinement(optimizer, steps=100, refine_steps=10)
    >>> for _ in range(90): optimizer.step(); refinement.step()
    >>> refinement.refining, optimizer.param_groups[0]["lr"]
    (True, 0.01)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        steps: int,
        refine_steps: int,
        augment: RefinedAugmentation | None = None,
        scheduler: LRScheduler | None = None,
        lr_scale: float | int | None = 0.1,
        decay: Decay = CosineAnnealingLR,
        frozen: Iterable[nn.Module] = (),
        reset: bool = False,
        on_refine: Callable[[], Any] | None = None,
    ) -> None:
        if steps < 1 or not 0 <= refine_steps <= steps:
            raise ValueError(f"refine_steps is {refine_steps} of steps {steps}, allowed is 0 <= refine_steps <= steps")
        if lr_scale is not None and not 0 < lr_scale < math.inf:
            raise ValueError(
                f"lr_scale is {lr_scale}, allowed is lr_scale > 0, or None to leave the learning rate alone"
            )
        self.optimizer, self.steps, self.refine_steps = optimizer, steps, refine_steps
        self.augment, self.scheduler, self.lr_scale, self.decay = augment, scheduler, lr_scale, decay
        self.frozen, self.reset, self.on_refine = tuple(frozen), reset, on_refine
        self.initial = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        self.done = 0
        self._decay: LRScheduler | None = None
        if augment is not None:
            augment.refine(False)
        if self.refining:
            self._begin()

    @property
    def refining(self) -> bool:
        """True once the second stage has begun."""
        return self.refine_steps > 0 and self.done >= self.steps - self.refine_steps

    def step(self) -> None:
        """One step of the optimizer is done: moves the schedule on, and begins the second stage where it is due.

        Raises ``ValueError`` after the last step.
        """
        if self.done >= self.steps:
            raise ValueError(f"steps is {self.steps}, and as many are done: allowed is one call of step() for each")
        before, self.done = self.refining, self.done + 1
        begins = self.refining and not before
        restarts = begins and self.lr_scale is not None
        if self._decay is not None:
            self._decay.step()
        elif self.scheduler is not None and self.done < self.steps and not restarts:
            self.scheduler.step()
        if begins:
            self._begin()

    def _begin(self) -> None:
        self._go_over()
        if self.reset:
            self.optimizer.state.clear()
        if self.on_refine is not None:
            self.on_refine()

    def _go_over(self) -> None:
        """What has to be set again when a training resumes in the second stage."""
        if self.augment is not None:
            self.augment.refine()
        if self.lr_scale is not None:
            for group, lr in zip(self.optimizer.param_groups, self.initial, strict=True):
                group["lr"] = group["initial_lr"] = self.lr_scale * lr
            self._decay = self.decay(self.optimizer, self.refine_steps)
        for module in self.frozen:
            freeze(module)

    def state_dict(self) -> dict[str, Any]:
        """How far the training is, and where its schedulers stand."""
        parts = {"scheduler": self.scheduler, "decay": self._decay}
        return {"done": self.done, "initial": list(self.initial)} | {
            name: None if part is None else part.state_dict() for name, part in parts.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from ``state``: stage, learning rates and frozen parts are as they were; ``on_refine`` is not called."""
        if len(state["initial"]) != len(self.optimizer.param_groups):
            raise ValueError(
                f"state has {len(state['initial'])} learning rates, allowed is one a group, "
                f"{len(self.optimizer.param_groups)} here"
            )
        self.done, self.initial = int(state["done"]), list(state["initial"])
        if self.augment is not None:
            self.augment.refine(False)
        rates = [(group["lr"], group.get("initial_lr", group["lr"])) for group in self.optimizer.param_groups]
        if self.refining:
            self._go_over()
        # Making a scheduler sets the learning rates: those that were loaded with the optimizer come back.
        for group, (lr, initial) in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"], group["initial_lr"] = lr, initial
        for part, name in ((self.scheduler, "scheduler"), (self._decay, "decay")):
            if part is not None and state[name] is not None:
                part.load_state_dict(state[name])


def freeze(module: nn.Module) -> None:
    """Stops the training of ``module`` for good: no gradients, and batch norms stay in eval mode whatever is called."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._NormBase):
            part.register_forward_pre_hook(_stay_in_eval)
            part.eval()


def _stay_in_eval(module: nn.Module, args: tuple[Any, ...]) -> None:
    module.eval()


# --- what the two stages do: the risks they trade, and closed forms -----------------------------------------------------


@dataclass(frozen=True)
class Risks:
    """Mean losses of the same weights on three distributions (section 3)."""

    augmented: float
    """On I(S(x)) of the training data: what stage 1 minimises."""
    clean: float
    """On the training data themselves: the empirical risk."""
    test: float
    """On test data: the expected risk."""

    @property
    def gap(self) -> float:
        """The generalisation error, test minus clean."""
        return self.test - self.clean


@torch.no_grad()
def empirical_risks(
    model: Callable[[Tensor], Tensor],
    train: tuple[Num[Tensor, "n ..."], Num[Tensor, "n *k"]],
    test: tuple[Num[Tensor, "m ..."], Num[Tensor, "m *k"]],
    augment: Callable[..., tuple[Tensor, Tensor]],
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> Risks:
    """The three risks of a classifier in eval mode; the mode it was in is restored.

    ``augment(x, y, generator=…)`` is what the first stage trains on, ``loss(outputs, y)`` a mean over samples.
    """
    if not len(train[0]) or not len(test[0]):
        raise ValueError(f"train has {len(train[0])} and test {len(test[0])} samples, allowed is at least one of each")
    training = getattr(model, "training", False)
    if isinstance(model, nn.Module):
        model.eval()
    try:
        return Risks(
            augmented=_risk(model, train, loss, batch_size, lambda x, y: augment(x, y, generator=generator)),
            clean=_risk(model, train, loss, batch_size),
            test=_risk(model, test, loss, batch_size),
        )
    finally:
        if isinstance(model, nn.Module):
            model.train(training)


def _risk(
    model: Callable, data: tuple, loss: Callable, batch_size: int, change: Callable = lambda x, y: (x, y)
) -> float:
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    device = data[0].device if parameter is None else parameter.device
    total = 0.0
    for first in range(0, len(data[0]), batch_size):
        x, y = (part.to(device) for part in change(*(part[first : first + batch_size] for part in data)))
        total += float(loss(model(x), y)) * len(x)
    return total / len(data[0])


def major_feature_share(features: Float[Tensor, "n d"], count: int = 1) -> float:
    """The share of the features' variance that lies along their ``count`` major directions (section 4).

    >>> major_feature_share(torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    0.9
    """
    if not 1 <= count <= features.shape[1]:
        raise ValueError(f"count is {count}, allowed is 1 <= count <= {features.shape[1]}, the number of features")
    variances = torch.linalg.svdvals(features.double() - features.double().mean(0)).square()
    total = float(variances.sum())
    return round(float(variances[:count].sum()) / total, 12) if total > 0 else 1.0


def mixup_risk_floor(alpha: float | int, num_classes: int = 10) -> float:
    """The least risk under mixup, in nats: even a perfect classifier of balanced classes cannot go below it.

    The entropy of (λ, 1 - λ), λ ~ Beta(alpha, alpha), in the mean, where the partner is of another class:
    (1 - 1 / k) (ψ(2 alpha + 1) - ψ(alpha + 1)). The clean risk has no such floor, so the two losses do not compare.

    >>> round(mixup_risk_floor(1.0), 4)
    0.45
    """
    if not alpha > 0 or num_classes < 1:
        raise ValueError(f"alpha is {alpha} and num_classes {num_classes}, allowed are alpha > 0 and num_classes >= 1")
    return float((1 - 1 / num_classes) * (digamma(2 * alpha + 1) - digamma(alpha + 1)))


def statistics_kept(steps: int, momentum: float = 0.1) -> float:
    """What is left of a batch norm's running statistics of stage 1 after ``steps`` of stage 2: (1 - momentum)^steps.

    >>> round(statistics_kept(50), 4)
    0.0052
    """
    if steps < 0 or not 0 <= momentum <= 1:
        raise ValueError(f"steps is {steps} and momentum {momentum}, allowed are steps >= 0 and 0 <= momentum <= 1")
    return (1 - momentum) ** steps
