"""Attacks on any classifier: gradients (FGSM, PGD), shifts and turns, other models' adversarial images; and cue conflicts.

Images are (b, c, h, w) in [0, 1], before normalisation: wrap a model that wants normalised images in ``Normalized``, so
that a radius is in units of pixels. A model is any callable from images to logits (b, k). Attacks leave its parameters,
their gradients and its mode alone: call ``model.eval()`` first where robustness is measured.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Number = float | int
Classifier = Callable[[Tensor], Tensor]
Attack = Callable[[Classifier, Tensor, Tensor], Tensor]
"""Makes adversarial images from a model, images and labels: ``functools.partial(pgd, eps=1 / 255)``, say."""


class Normalized(nn.Module):
    """``model`` behind its own normalisation: takes images in [0, 1].

    ``mean`` and ``std`` are one number a channel, those of the model's ``default_cfg`` where it has one.
    Raises ``ValueError`` where their lengths differ or a deviation is not positive.

    >>> Normalized(nn.Flatten(), mean=(0.5,), std=(0.5,))(torch.zeros(1, 1, 1, 2))
    tensor([[-1., -1.]])
    """

    def __init__(
        self, model: nn.Module, mean: Sequence[Number] | None = None, std: Sequence[Number] | None = None
    ) -> None:
        super().__init__()
        known = getattr(model, "default_cfg", {})
        mean, std = (known.get(name) if given is None else given for name, given in (("mean", mean), ("std", std)))
        if mean is None or std is None:
            raise ValueError("mean and std are None, allowed is None only for a model with a default_cfg")
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean is {tuple(mean)} and std is {tuple(std)}, allowed are as many of each, std > 0")
        self.model, self.mean, self.std = model, tuple(mean), tuple(std)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        if x.shape[1] != len(self.mean):
            raise ValueError(f"x has {x.shape[1]} channels, allowed are {len(self.mean)}, as many as mean has")
        mean, std = (
            torch.tensor(values, dtype=x.dtype, device=x.device).view(1, -1, 1, 1) for values in (self.mean, self.std)
        )
        return self.model((x - mean) / std)


def fgsm(
    model: Classifier, x: Float[Tensor, "b c h w"], y: Int[Tensor, "b"], eps: Number = 1 / 255
) -> Float[Tensor, "b c h w"]:
    """The fast gradient sign method (Goodfellow et al., 2015): one step of ``eps`` up the loss in every pixel.

    The paper's radius is one grey level. Raises ``ValueError`` for a negative radius and images outside [0, 1].

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> (fgsm(model, torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]), 0.1) - 0.5).abs().amax() <= 0.1 + 1e-6
    tensor(True)
    """
    return pgd(model, x, y, eps, steps=1, step_size=eps)


def pgd(
    model: Classifier,
    x: Float[Tensor, "b c h w"],
    y: Int[Tensor, "b"],
    eps: Number = 1 / 255,
    *,
    steps: int = 8,
    step_size: Number | None = None,
    random_start: bool = False,
    targeted: bool = False,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b c h w"]:
    """Projected gradient descent (Madry et al., 2018): ``steps`` sign steps within ``eps`` of every pixel, in [0, 1].

    ``step_size`` is ``eps / steps`` by default, as in the paper: 8 steps of an eighth of a grey level. ``random_start``
    begins anywhere in the ball, drawn by ``generator``; ``targeted`` steps down the loss of ``y`` instead of up.

    Raises ``ValueError`` for negative radii, no steps, and images outside [0, 1].

    >>> model, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.rand(3, 1, 2, 2)
    >>> pgd(model, x, torch.tensor([0, 1, 1]), eps=4 / 255).shape
    torch.Size([3, 1, 2, 2])
    """
    if eps < 0:
        raise ValueError(f"eps is {eps}, allowed is eps >= 0, in units of pixels in [0, 1]")
    if steps < 1:
        raise ValueError(f"steps is {steps}, allowed is a whole number of at least 1")
    step_size = eps / steps if step_size is None else step_size
    if step_size < 0:
        raise ValueError(f"step_size is {step_size}, allowed is step_size >= 0")
    x = _checked(x)
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    adversarial = x.clone()
    if random_start:
        device = "cpu" if generator is None else generator.device
        noise = torch.rand(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
        adversarial = (x + eps * (2 * noise - 1)).clamp(0, 1)
    way = -step_size if targeted else step_size
    for _ in range(steps):
        gradient = _gradient(model, adversarial, y)
        adversarial = torch.clamp(adversarial.add_(gradient.sign_(), alpha=way), low, high)
    return adversarial


def _checked(x: Tensor) -> Tensor:
    x = x.detach()
    if x.numel() and (x.min() < 0 or x.max() > 1):
        raise ValueError(f"x goes from {x.min():.3g} to {x.max():.3g}, allowed are images in [0, 1]; see Normalized")
    return x


def _gradient(model: Classifier, x: Tensor, y: Tensor) -> Tensor:
    # the sum, not the mean: half precision would lose small gradients of large batches
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)[0]


@torch.no_grad()
def spatial_attack(
    model: Classifier,
    x: Float[Tensor, "b c h w"],
    y: Int[Tensor, "b"],
    angles: Sequence[Number] = tuple(range(-30, 31, 2)),
    shifts: Sequence[Number] = (-0.1, -0.05, 0.0, 0.05, 0.1),
) -> Float[Tensor, "b c h w"]:
    """The worst of a grid of rotations and translations (Engstrom et al., 2019): where the loss of ``y`` is largest.

    ``angles`` in degrees, ``shifts`` as shares of the side, tried in both directions; what comes into view is black.
    A sample that no point of the grid fools keeps the point that is nearest to it.

    >>> model, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), torch.rand(3, 1, 4, 4)
    >>> spatial_attack(model, x, torch.tensor([0, 1, 1]), angles=(-30, 0, 30), shifts=(0.0,)).shape
    torch.Size([3, 1, 4, 4])
    """
    x = _checked(x)
    worst, worst_loss = x.clone(), torch.full((len(x),), -math.inf, device=x.device)
    for angle in angles:
        for down in shifts:
            for right in shifts:
                moved = rotate_and_shift(x, angle, down, right)
                logits = model(moved)
                # a fooled model beats any loss of one that is not
                loss = F.cross_entropy(logits.float(), y, reduction="none") + 1e6 * (logits.argmax(1) != y)
                better = loss > worst_loss
                worst[better], worst_loss[better] = moved[better], loss[better]
    return worst


def rotate_and_shift(
    x: Float[Tensor, "b c h w"], degrees: Number, down: Number = 0.0, right: Number = 0.0
) -> Float[Tensor, "b c h w"]:
    """Images turned counter-clockwise about their centre and moved by shares of their sides; bilinear, black outside.

    >>> rotate_and_shift(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), 90).round().tolist()
    [[[[2.0, 4.0], [1.0, 3.0]]]]
    """
    if degrees == 0 and down == 0 and right == 0:
        return x
    h, w = x.shape[-2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # where each pixel comes from, in coordinates that go from -1 to 1 on either axis
    from_x = [cos, -sin * h / w, -2 * (cos * right) + 2 * sin * h / w * down]
    from_y = [sin * w / h, cos, -2 * (sin * w / h * right) - 2 * cos * down]
    back = torch.tensor([from_x, from_y], dtype=x.dtype, device=x.device).expand(len(x), 2, 3)
    return F.grid_sample(x, F.affine_grid(back, list(x.shape), align_corners=False), align_corners=False)


def robust_accuracy(
    model: Classifier,
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, "n"],
    attack: Attack | None = None,
    *,
    source: Classifier | None = None,
    batch_size: int = 256,
) -> float:
    """The share of images that ``model`` still gets right after ``attack``, made for it or for the model ``source``.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> 0 <= robust_accuracy(model, torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 1]), fgsm) <= 1
    True
    """
    right = 0
    for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
        if attack is not None:
            images = attack(model if source is None else source, images, labels)
        with torch.no_grad():
            right += int((model(images).argmax(1) == labels).sum())
    return right / len(x)


def transfer_matrix(
    models: Mapping[str, Classifier],
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, "n"],
    attack: Attack,
    *,
    batch_size: int = 256,
) -> dict[str, dict[str, float]]:
    """Accuracies ``[i][j]`` of model j on the images that the attack made with model i.

    >>> models = {name: nn.Sequential(nn.Flatten(), nn.Linear(4, 2)) for name in "ab"}
    >>> list(transfer_matrix(models, torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 1]), fgsm)["a"])
    ['a', 'b']
    """
    return {
        i: {
            j: robust_accuracy(target, x, y, attack, source=source, batch_size=batch_size)
            for j, target in models.items()
        }
        for i, source in models.items()
    }


def shape_bias(predictions: Int[Tensor, "n"], shapes: Int[Tensor, "n"], textures: Int[Tensor, "n"]) -> dict[str, float]:
    """What a model goes by where shape and texture disagree (Geirhos et al., 2019).

    Returns ``shape_bias``, the share of shape decisions among those for either cue (nan where there are none), and the
    shares ``shape``, ``texture`` and ``neither`` of all. Raises ``ValueError`` where an image's two cues agree.

    >>> shape_bias(torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 0, 0]), torch.tensor([1, 1, 1, 1]))["shape_bias"]
    0.6666666666666666
    """
    agreeing = int((shapes == textures).sum())
    if agreeing or len(shapes) == 0:
        raise ValueError(
            f"{agreeing} of {len(shapes)} images have the same shape and texture, allowed are none of some"
        )
    shape, texture = ((predictions == cue).double().mean().item() for cue in (shapes, textures))
    bias = shape / (shape + texture) if shape + texture else math.nan
    return {"shape_bias": bias, "shape": shape, "texture": texture, "neither": 1 - shape - texture}


def restricted_predictions(logits: Float[Tensor, "n k"], classes: Sequence[int] | Int[Tensor, "m"]) -> Int[Tensor, "n"]:
    """The most likely of ``classes`` (as ImageNet-A and -R count, which have 200 of the 1000), in the numbers of all.

    Raises ``ValueError`` where ``classes`` is empty or names a class that has no logit.

    >>> restricted_predictions(torch.tensor([[9.0, 1.0, 2.0]]), [1, 2])
    tensor([2])
    """
    classes = torch.as_tensor(classes, device=logits.device)
    if not len(classes) or classes.min() < 0 or classes.max() >= logits.shape[1]:
        raise ValueError(f"classes is {classes.tolist()}, allowed are some of 0 to {logits.shape[1] - 1}")
    return classes[logits[:, classes].argmax(1)]
