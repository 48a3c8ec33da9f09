"""AdvProp: Adversarial Examples Improve Image Recognition (Xie et al., CVPR 2020, arXiv 1911.09665).

Training on clean and adversarial images together usually costs clean accuracy. The paper's explanation is that the two
follow different distributions, and one set of batch-norm statistics blurs them. So everything is shared but the batch
norms: adversarial images pass through auxiliary ones, which are thrown away after training.

    minimise  L(theta, x, y)  +  max over |e| <= eps of  L(theta, x + e, y)                                       (eq. 3)

    for a batch x (algorithm 1):
        1. x_adv = attack(x) on the network with the auxiliary batch norms
        2. L_clean = L(x) through the main, L_adv = L(x_adv) through the auxiliary batch norms
        3. one step on L_clean + L_adv
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from saigen.papers.vision import efficientnet
from saigen.papers.vision.efficientnet import EfficientNet

Number = int | float
Branch = int | tuple[int, ...]
Loss = Callable[[Tensor, Tensor], Tensor]
KINDS = ("pgd", "i-fgsm", "gd")

# --- Section 4.1: auxiliary batch norms -----------------------------------------------------------------------------


class _Auxiliary:
    """Mixed in front of a batch norm: ``branch`` 0 is the batch norm itself, i > 0 is ``aux_bn[i - 1]``.

    A tuple of branches splits the batch into as many equal parts, one for each, in order.
    """

    branch: Branch = 0

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.branch, int):
            return self._through(self.branch, x)
        if len(x) % len(self.branch):
            raise ValueError(f"x has {len(x)} samples, allowed are multiples of the {len(self.branch)} branches")
        parts = x.chunk(len(self.branch))
        return torch.cat([self._through(branch, part) for branch, part in zip(self.branch, parts, strict=True)])

    def _through(self, branch: int, x: Tensor) -> Tensor:
        return self.aux_bn[branch - 1](x) if branch else super().forward(x)


class AuxiliaryBatchNorm1d(_Auxiliary, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` with auxiliary ones beside it, made by ``convert_auxiliary_bn``."""


class AuxiliaryBatchNorm2d(_Auxiliary, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with auxiliary ones beside it, made by ``convert_auxiliary_bn``."""


class AuxiliaryBatchNorm3d(_Auxiliary, nn.BatchNorm3d):
    """``nn.BatchNorm3d`` with auxiliary ones beside it, made by ``convert_auxiliary_bn``."""


@functools.cache
def _with_auxiliary(kind: type[nn.Module]) -> type[nn.Module]:
    # batch norms of other libraries (with an activation inside, synchronised, ...) get a class of their own
    own = {nn.BatchNorm1d: AuxiliaryBatchNorm1d, nn.BatchNorm2d: AuxiliaryBatchNorm2d}
    own[nn.BatchNorm3d] = AuxiliaryBatchNorm3d
    return own.get(kind) or type(f"Auxiliary{kind.__name__}", (_Auxiliary, kind), {})


def convert_auxiliary_bn(model: nn.Module, auxiliary: int = 1) -> nn.Module:
    """Gives every batch norm in ``model``, in place, ``auxiliary`` more branches that start as copies of it.

    Works on any network with batch norms, of any kind and library. Parameters, their names, outputs and the state of an
    optimizer stay; new keys end in ``aux_bn.{i}.…``, as in timm's split batch norm. A batch norm costs 2 C more parameters
    a branch in training, and nothing once ``strip_auxiliary_bn`` has run. Returns ``model``, or where that is itself a
    batch norm, the converted one. Raises ``ValueError`` for a network without batch norms and for one converted before.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    >>> sorted(set(convert_auxiliary_bn(net).state_dict()) - {"0.weight", "0.bias"})[0]
    '1.aux_bn.0.bias'
    """
    if auxiliary < 1:
        raise ValueError(f"auxiliary is {auxiliary}, allowed is at least 1")
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        raise ValueError(f"model is a {type(model).__name__} without batch norms, allowed are networks with some")
    if any(isinstance(norm, _Auxiliary) for norm in norms):
        raise ValueError("model has auxiliary batch norms, allowed is a network without; use strip_auxiliary_bn first")
    for norm in norms:
        copies = nn.ModuleList(copy.deepcopy(norm) for _ in range(auxiliary))
        norm.__class__ = _with_auxiliary(type(norm))
        norm.aux_bn = copies
    return model


def strip_auxiliary_bn(model: nn.Module) -> nn.Module:
    """Takes the auxiliary branches away, in place: the plain network that is deployed, bit for bit the main branch."""
    for module in list(model.modules()):
        if isinstance(module, _Auxiliary):
            del module.aux_bn
            module.__dict__.pop("branch", None)
            # the class that stands behind the mixin
            module.__class__ = type(module).__mro__[2]
    return model


def without_auxiliary(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of training as one of the plain network: without the keys of auxiliary batch norms."""
    return {key: value for key, value in state.items() if "aux_bn" not in key.split(".")}


def auxiliary_parameters(channels: Sequence[int], auxiliary: int = 1) -> int:
    """Parameters that auxiliary branches add in training to batch norms of these widths: 2 C each (0 once deployed).

    >>> auxiliary_parameters([64, 128])
    384
    """
    if auxiliary < 1:
        raise ValueError(f"auxiliary is {auxiliary}, allowed is at least 1")
    return 2 * auxiliary * sum(channels)


@contextlib.contextmanager
def use_branch(model: nn.Module, branch: Branch) -> Iterator[None]:
    """Within the block all batch norms of ``model`` use ``branch``: 0 the main, 1 the first auxiliary, and so on.

    With a tuple the batch is split into equal parts, one a branch: ``(0, 1)`` is a clean and an adversarial half. After the
    block they use what they used before. Raises ``ValueError`` where there is no such branch.
    """
    norms = [module for module in model.modules() if isinstance(module, _Auxiliary)]
    most = min((len(norm.aux_bn) for norm in norms), default=0)
    for index in (branch,) if isinstance(branch, int) else branch:
        if not 0 <= index <= most:
            raise ValueError(f"branch is {branch}, allowed are 0 to {most} (see convert_auxiliary_bn)")
    before = [norm.branch for norm in norms]
    try:
        for norm in norms:
            norm.branch = branch
        yield
    finally:
        for norm, old in zip(norms, before, strict=True):
            norm.branch = old


# --- Section 5.1 and 5.3: the attackers -----------------------------------------------------------------------------


def steps_for(eps: Number) -> int:
    """Steps of the attack of strength ``eps`` (of 255 levels), of a level each: eps + 1, but 1 where eps is 1.

    >>> [steps_for(eps) for eps in (1, 2, 3, 4)]
    [1, 3, 4, 5]
    """
    if eps < 1:
        raise ValueError(f"eps is {eps}, allowed is at least 1")
    return 1 if eps == 1 else int(eps) + 1


class Attack:
    """The paper's attackers: x_adv near x, in the maximum norm, with a higher loss.

    ``eps`` is the largest change of a pixel and ``step_size`` that of one step, both in levels of 255; ``steps`` is eps + 1
    (1 where eps is 1) unless given. The ``kind`` is

    - "pgd" (Madry et al., 2018): from a random start, signed gradient steps, projected on the eps-ball; the default,
    - "i-fgsm" (Kurakin et al., 2017): the same from the image itself,
    - "gd": from a random start, not projected on the ball; steps x step_size still bounds it.

    Images lie within ``bounds``; where the model is given normalised images, ``mean`` and ``std`` say how, and eps and
    bounds are in pixels before that. ``targeted`` instead lowers the loss of a wrong class, drawn at random. The attack looks
    at the model in eval mode (no dropout, running statistics, which stay untouched), and leaves parameters' gradients
    alone. Calling it with model, x (b, ...), y (b,) gives x_adv, detached, of x's shape.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    >>> x = torch.rand(4, 3, 2, 2)
    >>> bool(((Attack(eps=4)(model, x, torch.tensor([0, 1, 0, 1])) - x).abs() <= 4 / 255 + 1e-6).all())
    True
    """

    def __init__(
        self,
        eps: Number = 4,
        steps: int | None = None,
        step_size: Number = 1,
        *,
        kind: str = "pgd",
        targeted: bool = False,
        bounds: tuple[Number, Number] = (0.0, 1.0),
        mean: Sequence[Number] = (0.0,),
        std: Sequence[Number] = (1.0,),
        loss: Loss = F.cross_entropy,
    ) -> None:
        if eps < 0:
            raise ValueError(f"eps is {eps}, allowed is at least 0")
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}, allowed are {', '.join(map(repr, KINDS))}")
        if steps is not None and steps < 1:
            raise ValueError(f"steps is {steps}, allowed is at least 1")
        if step_size <= 0:
            raise ValueError(f"step_size is {step_size}, allowed is more than 0")
        if not bounds[0] < bounds[1]:
            raise ValueError(f"bounds is {bounds}, allowed is a lower and a higher number")
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"std is {tuple(std)}, allowed are as many positive numbers as in mean, {tuple(mean)}")
        self.eps, self.step_size, self.kind = eps, step_size, kind
        self.steps = (steps_for(eps) if eps >= 1 else 1) if steps is None else steps
        self.targeted, self.bounds, self.mean, self.std, self.loss = targeted, bounds, tuple(mean), tuple(std), loss

    def __call__(
        self, model: nn.Module, x: Float[Tensor, "b ..."], y: Tensor, generator: torch.Generator | None = None
    ) -> Float[Tensor, "b ..."]:
        shape = (1, -1) + (1,) * (x.ndim - 2)
        mean, std = (torch.tensor(v, dtype=x.dtype).view(shape).to(x.device) for v in (self.mean, self.std))
        eps, step = (level / 255 / std for level in (self.eps, self.step_size))
        low, high = ((bound - mean) / std for bound in self.bounds)
        if self.kind != "gd":
            low, high = torch.maximum(x - eps, low), torch.minimum(x + eps, high)
        adversarial = x.detach()
        if self.kind != "i-fgsm":
            noise = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            adversarial = (adversarial + eps * (2 * noise - 1)).clamp(low, high)
        sign = 1.0
        if self.targeted:
            classes = self._classes(model, x)
            y = (y + torch.randint(1, classes, y.shape, generator=generator).to(y.device)) % classes
            sign = -1.0
        with _as_constant(model), torch.enable_grad():
            for _ in range(self.steps):
                adversarial.requires_grad_()
                (gradient,) = torch.autograd.grad(self.loss(model(adversarial), y), adversarial)
                adversarial = (adversarial.detach() + sign * step * gradient.sign()).clamp(low, high)
        return adversarial.detach()

    @staticmethod
    def _classes(model: nn.Module, x: Tensor) -> int:
        with _as_constant(model), torch.no_grad():
            return model(x[:1]).shape[-1]


@contextlib.contextmanager
def _as_constant(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for the parameters; afterwards everything is as before."""
    training = [module for module in model.modules() if module.training]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


# --- Algorithm 1, and fine-grained AdvProp (section 4.2) ------------------------------------------------------------

View = Attack | Callable[[Tensor], Tensor]


class AdvPropTerms(NamedTuple):
    """The loss, its parts (clean first, then one a view) and the images that were made."""

    loss: Float[Tensor, ""]
    parts: tuple[Float[Tensor, ""], ...]
    images: tuple[Tensor, ...]


class AdvProp:
    """The training loss L_clean + L_adv of a network converted by ``convert_auxiliary_bn``.

    ``views`` are what is trained on beside the clean images, one auxiliary branch each: an ``Attack`` is made on that
    branch, another callable maps images to images (fine-grained AdvProp: PGD of several strengths, AutoAugment, ...).
    By default there is one PGD of eps 4. All parts have the same weight, and pass as one concatenated batch.
    With ``separate=False`` everything goes through the main batch norms: traditional adversarial training (eq. 2).
    ``terms(model, x, y)`` also gives the parts and the images.

    >>> net = convert_auxiliary_bn(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)))
    >>> AdvProp(Attack(eps=1))(net, torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])).shape
    torch.Size([])
    """

    def __init__(self, *views: View, loss: Loss = F.cross_entropy, separate: bool = True, mean: bool = False) -> None:
        self.views = views or (Attack(),)
        self.loss, self.separate, self.mean = loss, separate, mean

    def __call__(
        self, model: nn.Module, x: Float[Tensor, "b ..."], y: Tensor, generator: torch.Generator | None = None
    ) -> Float[Tensor, ""]:
        return self.terms(model, x, y, generator).loss

    def terms(
        self, model: nn.Module, x: Float[Tensor, "b ..."], y: Tensor, generator: torch.Generator | None = None
    ) -> AdvPropTerms:
        branches = tuple(range(len(self.views) + 1)) if self.separate else (0,) * (len(self.views) + 1)
        images = [x]
        for branch, view in zip(branches[1:], self.views, strict=True):
            with use_branch(model, branch):
                images.append(view(model, x, y, generator) if isinstance(view, Attack) else view(x))
        # one batch norm over the concatenated batch is what "joint" means; separate ones split it
        with use_branch(model, branches if self.separate else 0):
            logits = model(torch.cat(images))
        parts = tuple(self.loss(part, y) for part in logits.chunk(len(images)))
        total = torch.stack(parts).sum()
        return AdvPropTerms(total / len(parts) if self.mean else total, parts, tuple(images))


# --- the released networks ------------------------------------------------------------------------------------------


def _released(variant: str) -> Callable[..., EfficientNet]:
    base = getattr(efficientnet, f"tf_efficientnet_{variant}")

    def build(
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: Number = efficientnet.VARIANTS[variant].drop_rate,
        drop_path_rate: Number = 0.2,
    ) -> EfficientNet:
        model = base(num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        model.default_cfg |= {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        return model

    build.__name__ = build.__qualname__ = f"tf_efficientnet_{variant}_ap"
    build.__doc__ = (
        f"EfficientNet-{variant.upper()} for weights trained with AdvProp (timm's tf_efficientnet_{variant}.ap_in1k): "
        "images are normalised with mean and standard deviation 0.5."
    )
    return build


tf_efficientnet_b0_ap = _released("b0")
tf_efficientnet_b1_ap = _released("b1")
tf_efficientnet_b2_ap = _released("b2")
tf_efficientnet_b3_ap = _released("b3")
tf_efficientnet_b4_ap = _released("b4")
tf_efficientnet_b5_ap = _released("b5")
tf_efficientnet_b6_ap = _released("b6")
tf_efficientnet_b7_ap = _released("b7")
tf_efficientnet_b8_ap = _released("b8")
