"""The image operations of a policy, differentiable in their magnitudes (Faster AutoAugment, section 3.2).

A magnitude mu lies in [0, 1]; ``argument`` scales it and gives it a sign. Geometry is bilinear and the blends are linear,
so their gradients are exact. Solarize, Posterize and the size of Cutout's hole are steps in mu, and the gradient of a step
is 0; there the straight-through estimator takes d out / d mu = 1 at every pixel. AutoContrast and Equalize have no mu and
hand the gradient on to the image as it came.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from saigen.nn import image_operations as levels

ARITHMETICS = ("pillow", "official")


@dataclass(frozen=True)
class Operation:
    """What the magnitude of an operation means: ``scale`` at mu = 1 (None: it has none), and whether its sign is drawn."""

    scale: float | None = None
    signed: bool = False


OPERATIONS = {
    "ShearX": Operation(0.3, signed=True),
    "ShearY": Operation(0.3, signed=True),
    "TranslateX": Operation(0.45, signed=True),  # of the side
    "TranslateY": Operation(0.45, signed=True),
    "Rotate": Operation(30.0, signed=True),  # degrees
    "HorizontalFlip": Operation(),
    "Invert": Operation(),
    "Solarize": Operation(1.0),  # the threshold: mu = 1 changes nothing
    "Posterize": Operation(1.0),  # the share of the 8 bits that is kept: mu = 1 changes nothing
    "Contrast": Operation(1.0, signed=True),  # 1 - the factor of the blend
    "Color": Operation(1.0, signed=True),
    "Brightness": Operation(1.0, signed=True),
    "Sharpness": Operation(1.0, signed=True),
    "AutoContrast": Operation(),
    "Equalize": Operation(),
    "Cutout": Operation(20 / 32),  # the hole's side, of the image's: AutoAugment's 20 pixels of CIFAR's 32
    "SamplePairing": Operation(0.4),  # the weight of the other image, as in AutoAugment
}
_AUTO_AUGMENT = (
    "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "AutoContrast", "Invert", "Equalize", "Solarize",
    "Posterize", "Contrast", "Color", "Brightness", "Sharpness", "Cutout", "SamplePairing",
)  # fmt: skip
# The repository has TranslateY twice and no TranslateX.
_OFFICIAL = (
    "ShearX", "ShearY", "TranslateY", "TranslateY", "Rotate", "HorizontalFlip", "Invert", "Solarize", "Posterize",
    "Contrast", "Color", "Brightness", "Sharpness", "AutoContrast", "Equalize",
)  # fmt: skip
OPERATION_SETS = {"paper": _AUTO_AUGMENT, "official": _OFFICIAL}


def straight_through(forward: Float[Tensor, "*a"], backward: Float[Tensor, "*b"]) -> Float[Tensor, "*a"]:
    """``forward``'s numbers, and ``backward``'s gradient: what comes in, summed to the shape of ``backward``.

    >>> mu = torch.tensor(0.7, requires_grad=True)
    >>> out = straight_through(torch.tensor([0.25, 0.5]), mu)
    >>> out.sum().backward()
    >>> out.tolist(), mu.grad.item()
    ([0.25, 0.5], 2.0)
    """
    return forward + (backward - backward.detach()) if backward.requires_grad else forward


def apply_operation(
    name: str,
    x: Float[Tensor, "b c h w"],
    argument: Float[Tensor, " b"] | None = None,
    *,
    arithmetic: str = "pillow",
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b c h w"]:
    """The operation ``name`` on images in [0, 1], with one ``argument`` an image: mu times its scale and its sign.

    ``"pillow"`` gives what AutoAugment's operations give: the steps and the histogram operations to the bit, on the
    levels round(255 x); the blends before they are cut to levels. ``"official"`` repeats the repository's formulas.
    ``generator`` draws Cutout's places and SamplePairing's partners. Outside the image there is 0. Raises ``ValueError``
    for an unknown name or arithmetic, for a missing argument, or for images that are not grey or RGB where colour counts.
    """
    if name not in OPERATIONS:
        raise ValueError(f"name is {name!r}, allowed are {', '.join(OPERATIONS)}")
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"arithmetic is {arithmetic!r}, allowed are {', '.join(ARITHMETICS)}")
    if OPERATIONS[name].scale is not None and (argument is None or argument.shape != x.shape[:1]):
        given = None if argument is None else tuple(argument.shape)
        raise ValueError(f"argument of {name} is {given}, allowed is one number an image, ({len(x)},)")
    official = arithmetic == "official"
    match name:
        case "ShearX" | "ShearY" | "TranslateX" | "TranslateY" | "Rotate":
            out = warp(x, _source(name, argument, *x.shape[-2:]))
        case "HorizontalFlip":
            return x.flip(-1)
        case "Invert":
            return 1 - x
        case "Solarize":
            out = _solarize(x, argument) if official else levels.solarize(x.detach(), 255 * argument.detach())
            out = straight_through(out, argument.view(-1, 1, 1, 1))
        case "Posterize":
            out = straight_through(_posterize(x, argument, official), argument.view(-1, 1, 1, 1))
        case "Contrast":
            mean = (_grey(255 * x, official).flatten(1).mean(1) + 0.5).floor().view(-1, 1, 1, 1) / 255
            out = _blend(mean, x, argument)
        case "Color":
            out = _blend(_grey(x, official), x, argument)
        case "Brightness":
            out = _blend(torch.zeros_like(x), x, argument)
        case "Sharpness":
            out = _blend(_smooth(x, official), x, argument)
        case "AutoContrast":
            out = straight_through((_auto_contrast if official else levels.autocontrast)(x.detach()), x)
        case "Equalize":
            out = straight_through((_equalize if official else levels.equalize)(x.detach()), x)
        case "Cutout":
            out = _cutout(x, argument, generator)
        case "SamplePairing":
            partners = torch.randperm(len(x), generator=generator).to(x.device)
            out = torch.lerp(x, x[partners], argument.view(-1, 1, 1, 1))
    return out.clamp(0, 1)


# Geometry


def warp(x: Float[Tensor, "b c h w"], matrix: Float[Tensor, "b 2 3"]) -> Float[Tensor, "b c h w"]:
    """Bilinear samples at A q + t, for pixels q = (x, y) counted from the image's centre; 0 outside.

    Differentiable in both; ``matrix`` holds [A t], one an image.
    """
    h, w = x.shape[-2:]
    scale = matrix.new_tensor([w / 2, h / 2])  # affine_grid counts from -1 to 1
    full = torch.cat([scale, scale.new_ones(1)])
    grid = F.affine_grid(matrix * full / scale[:, None], list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)


def _source(name: str, argument: Tensor, h: int, w: int) -> Tensor:
    """Where each pixel comes from: positive arguments shear and move to the right and down, and turn counter-clockwise."""
    zero, one = torch.zeros_like(argument), torch.ones_like(argument)
    match name:
        case "ShearX":  # the first row of pixels stays
            entries = (one, -argument, -argument * (h - 1) / 2, zero, one, zero)
        case "ShearY":
            entries = (one, zero, zero, -argument, one, -argument * (w - 1) / 2)
        case "TranslateX":
            entries = (one, zero, -argument * w, zero, one, zero)
        case "TranslateY":
            entries = (one, zero, zero, zero, one, -argument * h)
        case _:
            cos, sin = torch.cos(torch.deg2rad(argument)), torch.sin(torch.deg2rad(argument))
            entries = (cos, -sin, zero, sin, cos, zero)
    return torch.stack(entries, -1).view(-1, 2, 3)


# Colour


def _blend(degenerate: Tensor, x: Tensor, argument: Tensor) -> Tensor:
    """degenerate + (1 - argument)(x - degenerate): argument 0 is the image, 1 the degenerate one."""
    return degenerate + (1 - argument.view(-1, 1, 1, 1)) * (x - degenerate)


def _grey(x: Tensor, official: bool) -> Tensor:
    if x.shape[1] == 1:
        return x
    if x.shape[1] != 3:
        raise ValueError(f"images have {x.shape[1]} channels, allowed are 1 and 3 for Color and Contrast")
    # ITU-R 601 has 0.114 for blue; the repository writes 0.110, which darkens white by 0.4 %.
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + (0.110 if official else 0.114) * x[:, 2:]


def _smooth(x: Tensor, official: bool) -> Tensor:
    """[[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13; the border stays (Pillow) or is reflected (the repository)."""
    kernel = x.new_ones(3, 3)
    kernel[1, 1] = 5
    kernel = (kernel / 13).expand(x.shape[1], 1, 3, 3)
    if official:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), kernel, groups=x.shape[1])
    if min(x.shape[-2:]) < 3:
        return x
    inner = F.pad(x.new_ones(x.shape[-2] - 2, x.shape[-1] - 2), (1, 1, 1, 1)) > 0
    return torch.where(inner, F.conv2d(x, kernel, padding=1, groups=x.shape[1]), x)


def _posterize(x: Tensor, argument: Tensor, official: bool) -> Tensor:
    if official:
        # It shifts 64-bit integers up and down again, so that no bit is lost: only the level is cut to a whole one.
        return (255 * x.detach()).floor() / 255
    return levels.posterize(x.detach(), 8 - ((1 - argument.detach()) * 8).floor())


def _cutout(x: Tensor, argument: Tensor, generator: torch.Generator | None) -> Tensor:
    """A grey square of side ``argument`` times the image's, anywhere; outside it the gradient to the image is exact."""
    half = argument.detach() * min(x.shape[-2:]) / 2
    hole = levels.cutout(torch.zeros_like(x[:, :1]), half, fill=255.0, generator=generator)
    return straight_through((1 - hole) * x + 0.5 * hole, argument.view(-1, 1, 1, 1))


# The repository's histogram operations, which differ from Pillow's in the constant 0.1 and where an image has no white


def _solarize(x: Tensor, argument: Tensor) -> Tensor:
    x = x.detach()
    return torch.where(x < argument.detach().view(-1, 1, 1, 1), x, 1 - x)


def _auto_contrast(x: Tensor) -> Tensor:
    planes = 255 * x.clamp(0, 1).flatten(0, 1).flatten(1)
    low, high = planes.amin(1, keepdim=True), planes.amax(1, keepdim=True)
    table = ((torch.arange(256, dtype=x.dtype, device=x.device) - low) * (255 / (high - low + 0.1))).floor()
    return table.gather(1, planes.long()).reshape_as(x) / 255


def _equalize(x: Tensor) -> Tensor:
    planes = 255 * x.clamp(0, 1).flatten(0, 1).flatten(1)
    # One histogram of all planes, each 256 above the one before; between levels its bins depend on how many there are.
    end = 256 * len(planes)
    entries = planes + torch.arange(0, end, 256, dtype=x.dtype, device=x.device)[:, None]
    histogram = entries.histc(end, 0, end - 1).view(-1, 256)
    cumulative = histogram.cumsum(1)
    step = ((cumulative[:, -1:] - histogram[:, -1:]) / 255).floor()
    table = F.pad(cumulative, (1, 0))[:, :256] + (step / 2).floor()
    return (table / (step + 0.1)).floor().gather(1, planes.long()).reshape_as(x) / 255
