"""The image operations of AutoAugment and its descendants, per sample on batches, to the bit as Pillow or TensorFlow do them.

Every operation takes images ``(..., c, h, w)``, float in [0, 1] or uint8, and gives back the same shape and type. All of
them act on the 8-bit levels round(255 x), as the reference implementations do, so a float result lies on k/255 and no
gradient flows. Arguments that are levels (``threshold``, ``addition``, ``fill``) count from 0 to 255 for float images too.
An argument is one number, or a tensor of one number a sample with the leading shape of the images.

Two arithmetics, where they differ: ``"pillow"`` (also timm's) and ``"tensorflow"`` (the AutoAugment and RandAugment code).
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Num, UInt8
from torch import Tensor

Argument = float | int | Tensor
Fill = float | int | Sequence[float | int]

ARITHMETICS = ("pillow", "tensorflow")
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
BLENDS = ("Color", "Contrast", "Brightness", "Sharpness")
OPERATIONS = (
    "Identity",
    "AutoContrast",
    "Equalize",
    "Invert",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Cutout",
    *BLENDS,
    *GEOMETRIC,
)


def apply_operation(
    name: str,
    x: Num[Tensor, "*n c h w"],
    argument: Argument = 0.0,
    *,
    fill: Fill = 128.0,
    arithmetic: str = "pillow",
    generator: torch.Generator | None = None,
) -> Num[Tensor, "*n c h w"]:
    """The operation called ``name`` in the papers, with its ``argument`` (ignored by those that have none).

    ``generator`` draws the place of Cutout. Raises ``ValueError`` for a name that is not in ``OPERATIONS``.

    >>> apply_operation("Invert", torch.tensor([[[0.0, 1.0]]]))
    tensor([[[1., 0.]]])
    """
    match name:
        case "Identity":
            return x
        case "AutoContrast":
            return autocontrast(x, arithmetic=arithmetic)
        case "Equalize":
            return equalize(x)
        case "Invert":
            return invert(x)
        case "Posterize":
            return posterize(x, argument)
        case "Solarize":
            return solarize(x, argument)
        case "SolarizeAdd":
            return solarize_add(x, argument)
        case "Cutout":
            return cutout(x, argument, fill=fill, generator=generator)
        case "Color":
            return color(x, argument, arithmetic=arithmetic)
        case "Contrast":
            return contrast(x, argument, arithmetic=arithmetic)
        case "Brightness":
            return brightness(x, argument)
        case "Sharpness":
            return sharpness(x, argument, arithmetic=arithmetic)
        case "Rotate":
            return rotate(x, argument, fill=fill, arithmetic=arithmetic)
        case "ShearX":
            return shear_x(x, argument, fill=fill, arithmetic=arithmetic)
        case "ShearY":
            return shear_y(x, argument, fill=fill, arithmetic=arithmetic)
        case "TranslateX":
            return translate_x(x, argument, fill=fill, arithmetic=arithmetic)
        case "TranslateY":
            return translate_y(x, argument, fill=fill, arithmetic=arithmetic)
    raise ValueError(f"name is {name!r}, allowed are {', '.join(OPERATIONS)}")


# Levels


def to_levels(x: Num[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    """round(255 x), clipped to 0..255, as uint8; uint8 images are levels already."""
    if x.dtype == torch.uint8:
        return x
    if not x.is_floating_point():
        raise ValueError(f"images are {x.dtype}, allowed are floats in [0, 1] and uint8")
    return (x.detach().float() * 255).round_().clamp_(0, 255).to(torch.uint8)


def from_levels(levels: UInt8[Tensor, "..."], dtype: torch.dtype = torch.float32) -> Num[Tensor, "..."]:
    """Levels as images of ``dtype``: divided by 255, or as they are for uint8."""
    return levels if dtype == torch.uint8 else levels.float().div_(255).to(dtype)


def _images(x: Tensor) -> Tensor:
    """The levels of ``x`` with one batch dimension."""
    if x.ndim < 3:
        raise ValueError(f"images have shape {tuple(x.shape)}, allowed is (..., channels, height, width)")
    return to_levels(x).reshape(-1, *x.shape[-3:])


def _like(levels: Tensor, x: Tensor) -> Tensor:
    return from_levels(levels.reshape(x.shape), x.dtype)


def _per_sample(value: Argument, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """One number a sample, (n, 1, 1, 1), on the CPU: arguments are drawn there and are too few to wait for a device."""
    value = torch.as_tensor(value, dtype=dtype, device="cpu")
    n = math.prod(x.shape[:-3])
    if value.ndim and value.shape != x.shape[:-3]:
        raise ValueError(
            f"an argument has shape {tuple(value.shape)}, allowed is one number or {tuple(x.shape[:-3])}, one a sample"
        )
    return value.reshape(-1, 1, 1, 1).expand(n, 1, 1, 1)


def _check_arithmetic(arithmetic: str) -> None:
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"arithmetic is {arithmetic!r}, allowed are {', '.join(ARITHMETICS)}")


def _entries(levels: Tensor) -> Tensor:
    """Where each pixel's level stands in one long list of tables of 256, one table a plane, (n c h w,)."""
    n, c = levels.shape[:2]
    # 32 bits: bincount and index_select are several times as fast with them as with 64, and as gather.
    planes = torch.arange(0, 256 * n * c, 256, dtype=torch.int32, device=levels.device)
    return (levels.int() + planes.view(n, c, 1, 1)).flatten()


# Tone


def invert(x: Num[Tensor, "*n c h w"]) -> Num[Tensor, "*n c h w"]:
    """255 - level."""
    return _like(255 - _images(x), x)


def posterize(x: Num[Tensor, "*n c h w"], bits: Argument) -> Num[Tensor, "*n c h w"]:
    """Keeps the highest ``bits`` bits of every level; clamped to 0..8 (0 is black, 8 changes nothing)."""
    levels = _images(x)
    shift = 8 - _per_sample(bits, x).clamp(0, 8).to(torch.int32)
    mask = torch.bitwise_left_shift(255 >> shift, shift).to(torch.uint8)
    return _like(levels & mask.to(levels.device), x)


def solarize(x: Num[Tensor, "*n c h w"], threshold: Argument) -> Num[Tensor, "*n c h w"]:
    """Inverts the levels >= ``threshold``; 256 and more change nothing."""
    levels = _images(x)
    threshold = _per_sample(threshold, x).ceil().clamp(0, 256).to(torch.int16).to(levels.device)
    # 255 - level is level XOR 255; the mask is 255 where the level is to be inverted.
    return _like((levels >= threshold).view(torch.uint8).mul_(255).bitwise_xor_(levels), x)


def solarize_add(x: Num[Tensor, "*n c h w"], addition: Argument, *, threshold: int = 128) -> Num[Tensor, "*n c h w"]:
    """Adds ``addition`` to the levels < ``threshold`` and clips to 0..255."""
    levels = _images(x)
    addition = _per_sample(addition, x).to(torch.int16).to(levels.device)
    added = levels.to(torch.int16)
    return _like((added + addition * (levels < threshold)).clamp_(0, 255).to(torch.uint8), x)


def autocontrast(x: Num[Tensor, "*n c h w"], *, arithmetic: str = "pillow") -> Num[Tensor, "*n c h w"]:
    """Stretches every channel so that its lowest level becomes 0 and its highest 255; a flat channel stays."""
    _check_arithmetic(arithmetic)
    levels = _images(x)
    dtype = torch.float64 if arithmetic == "pillow" else torch.float32
    low, high = (bound.to("cpu", dtype)[..., None] for bound in (levels.amin((-2, -1)), levels.amax((-2, -1))))
    level = torch.arange(256, dtype=dtype)
    scale = torch.full_like(low, 255) / (high - low)  # a plain 255 / tensor is 255 times a rounded reciprocal
    table = torch.where(high > low, (level * scale + -low * scale).clamp(0, 255), level)
    return _like(table.to(torch.uint8).to(levels.device).flatten().index_select(0, _entries(levels)), x)


def equalize(x: Num[Tensor, "*n c h w"]) -> Num[Tensor, "*n c h w"]:
    """Spreads every channel's histogram evenly, by Pillow's (and TensorFlow's) integer rule."""
    levels = _images(x)
    n, c, h, w = levels.shape
    entries = _entries(levels)
    histogram = torch.bincount(entries, minlength=256 * n * c).view(n, c, 256)
    last = histogram.gather(-1, (histogram > 0).mul(torch.arange(256, device=levels.device)).argmax(-1, keepdim=True))
    step = (h * w - last) // 255
    before = histogram.cumsum(-1) - histogram
    table = ((before + step // 2) // step.clamp(min=1)).clamp_(0, 255)
    table = torch.where(step > 0, table, torch.arange(256, device=levels.device))
    return _like(table.to(torch.uint8).flatten().index_select(0, entries), x)


# Blends: degenerate + factor (image - degenerate), truncated to a level; factor 1 is the image, 0 the degenerate one


def _blend(degenerate: Tensor | float, levels: Tensor, factor: Tensor) -> Tensor:
    blended = levels.float().sub_(degenerate).mul_(factor.to(levels.device)).add_(degenerate)
    return blended.clamp_(0, 255).to(torch.uint8)


def luma(x: Num[Tensor, "*n c h w"], *, arithmetic: str = "pillow") -> Float[Tensor, "m 1 h w"]:
    """The grey levels of 1- or 3-channel images (ITU-R 601), as whole float32 numbers, the leading dimensions as one."""
    _check_arithmetic(arithmetic)
    levels = _images(x)
    if levels.shape[1] == 1:
        return levels.float()
    if levels.shape[1] != 3:
        raise ValueError(
            f"images have {levels.shape[1]} channels, allowed are 1 (grey) and 3 (RGB) for Color and Contrast"
        )
    red, green, blue = (levels[:, i : i + 1].float() for i in range(3))
    if arithmetic == "pillow":
        # Pillow's fixed point; every sum stays below 2^24, so float32 is exact.
        grey = red.mul_(19595).add_(green.mul_(38470)).add_(blue.mul_(7471))
        return grey.add_(32768).mul_(1 / 65536).floor_()
    # rgb_to_grayscale goes to floats in [0, 1], and back by the truncation of 255.5 x.
    red, green, blue = (channel.mul_(1 / 255) for channel in (red, green, blue))
    return red.mul_(0.2989).add_(green.mul_(0.587)).add_(blue.mul_(0.114)).mul_(255.5).floor_()


def color(x: Num[Tensor, "*n c h w"], factor: Argument, *, arithmetic: str = "pillow") -> Num[Tensor, "*n c h w"]:
    """Saturation: blends with the grey image. A 1-channel image stays."""
    return _like(_blend(luma(x, arithmetic=arithmetic), _images(x), _per_sample(factor, x)), x)


def contrast(x: Num[Tensor, "*n c h w"], factor: Argument, *, arithmetic: str = "pillow") -> Num[Tensor, "*n c h w"]:
    """Blends with a flat grey image: the rounded mean luma, or for ``"tensorflow"`` the number of pixels / 256.

    That quirk of the official code (it sums a histogram instead of averaging with it) makes the flat image white for
    everything from 256x256 pixels on, and nearly black for small images.
    """
    _check_arithmetic(arithmetic)
    levels = _images(x)
    if arithmetic == "tensorflow":
        return _like(
            _blend(float(min(255, levels.shape[-2] * levels.shape[-1] // 256)), levels, _per_sample(factor, x)), x
        )
    mean = luma(x).double().mean((-3, -2, -1), keepdim=True).add_(0.5).floor_().float()
    return _like(_blend(mean, levels, _per_sample(factor, x)), x)


def brightness(x: Num[Tensor, "*n c h w"], factor: Argument) -> Num[Tensor, "*n c h w"]:
    """Blends with black."""
    levels = _images(x)
    return _like(levels.float().mul_(_per_sample(factor, x).to(levels.device)).clamp_(0, 255).to(torch.uint8), x)


def sharpness(x: Num[Tensor, "*n c h w"], factor: Argument, *, arithmetic: str = "pillow") -> Num[Tensor, "*n c h w"]:
    """Blends with the image smoothed by [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13; the border stays.

    The smoothed level is rounded by Pillow and truncated by TensorFlow.
    """
    _check_arithmetic(arithmetic)
    levels = _images(x)
    if min(levels.shape[-2:]) < 3:
        return x
    grey = levels.to(torch.int16)
    rows = grey[..., :-2] + grey[..., 1:-1] + grey[..., 2:]
    total = rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :] + 4 * grey[..., 1:-1, 1:-1]
    # The sum is a whole number and 13 is odd, so half a unit of slack makes the float division exact.
    smooth = total.float().add_(6.5 if arithmetic == "pillow" else 0.5).div_(13.0).floor_()
    result = levels.clone()
    result[..., 1:-1, 1:-1] = _blend(smooth, levels[..., 1:-1, 1:-1], _per_sample(factor, x))
    return _like(result, x)


# Geometry: the nearest pixel of the source, ``fill`` where that lies outside


def affine(
    x: Num[Tensor, "*n c h w"], matrix: Num[Tensor, "m 6"], *, fill: Fill = 128.0, arithmetic: str = "pillow"
) -> Num[Tensor, "*n c h w"]:
    """Samples at (a x + b y + c, d x + e y + f) for the rows (a, b, c, d, e, f) of ``matrix``, one a sample, nearest pixel.

    Pillow's pixels are squares with centres at +0.5, its arithmetic has 16 fractional bits; TensorFlow's are points at
    whole numbers, rounded half away from zero.
    """
    _check_arithmetic(arithmetic)
    levels = _images(x)
    n, c, h, w = levels.shape
    if len(matrix) != n:
        raise ValueError(f"matrix has {len(matrix)} rows, allowed are {n}, one a sample")
    if arithmetic == "pillow":
        # Pillow moves whole rows and columns where there is neither shear nor rotation, and rounds the offset alone.
        rows = []
        for a, b, c_, d, e, f in matrix.tolist():
            c_, f = c_ + 0.5 * (a + b), f + 0.5 * (d + e)
            c_, f = (math.floor(c_) + 0.5, math.floor(f) + 0.5) if b == d == 0.0 else (c_, f)
            rows.append([math.floor(number * 65536 + 0.5) for number in (a, b, c_, d, e, f)])
        dtype = torch.int32 if max(h, w) < 8192 else torch.int64
        row, column = torch.arange(h, dtype=dtype, device=x.device), torch.arange(w, dtype=dtype, device=x.device)
        a, b, c_, d, e, f = torch.tensor(rows, dtype=dtype).to(x.device).view(n, 6, 1, 1).unbind(1)
        source_x = (column * a + (row[:, None] * b + c_)).bitwise_right_shift_(16)
        source_y = (column * d + (row[:, None] * e + f)).bitwise_right_shift_(16)
    else:
        row, column = torch.arange(h, device=x.device).float(), torch.arange(w, device=x.device).float()
        a, b, c_, d, e, f = matrix.float().to(x.device).view(n, 6, 1, 1).unbind(1)
        source_x, source_y = (
            _round_half_away(a * column + b * row[:, None] + c_),
            _round_half_away(d * column + e * row[:, None] + f),
        )
    # The sign bit of any of the four is set where the pixel lies outside; shifted down it is a mask of ones.
    outside = (source_x | (w - 1 - source_x)).bitwise_or_(source_y).bitwise_or_(h - 1 - source_y)
    outside.bitwise_right_shift_(31 if outside.dtype == torch.int32 else 63)
    # One more pixel at the end of every plane holds the fill; what lies outside looks there.
    padded = torch.empty(n, c, h * w + 1, dtype=torch.uint8, device=x.device)
    padded[..., :-1] = levels.flatten(2)
    padded[..., -1] = _fill_levels(fill, c).to(x.device)
    place = source_y.mul_(w).add_(source_x).bitwise_and_(~outside).bitwise_or_(outside & (h * w)).flatten(1)
    place = place.to(torch.int32 if padded.numel() < 2**31 else torch.int64)
    planes = torch.arange(0, n * c * (h * w + 1), h * w + 1, dtype=place.dtype, device=x.device).view(n, c, 1)
    return _like(padded.flatten().index_select(0, (place[:, None] + planes).flatten()), x)


def _round_half_away(x: Tensor) -> Tensor:
    # abs() + 0.5 is exact where it matters: coordinates are far below 2^23.
    return x.abs().add_(0.5).floor_().mul_(x.sign()).int()


def _fill_levels(fill: Fill, channels: int) -> Tensor:
    values = [float(value) for value in fill] if isinstance(fill, Sequence) else [float(fill)]
    if len(values) not in (1, channels) or not all(0 <= value <= 255 for value in values):
        raise ValueError(f"fill is {fill}, allowed is one level or {channels} levels from 0 to 255")
    return torch.tensor(values).round().to(torch.uint8).expand(channels)


def geometry_matrix(
    name: str, argument: float | int, h: int, w: int, arithmetic: str = "pillow"
) -> tuple[float | int, ...]:
    """The six numbers of ``affine`` for one of ``GEOMETRIC`` on an image of ``h`` by ``w`` pixels."""
    match name:
        case "ShearX":
            return 1.0, argument, 0.0, 0.0, 1.0, 0.0
        case "ShearY":
            return 1.0, 0.0, 0.0, argument, 1.0, 0.0
        case "TranslateX":
            return 1.0, 0.0, argument, 0.0, 1.0, 0.0
        case "TranslateY":
            return 1.0, 0.0, 0.0, 0.0, 1.0, argument
        case "Rotate":
            radians = math.radians(argument % 360.0)
            # Fifteen digits, as Pillow has it, so that right angles are exact; and the centre in its or TensorFlow's pixels.
            cos, sin = round(math.cos(radians), 15), round(math.sin(radians), 15)
            x, y = (w / 2, h / 2) if arithmetic == "pillow" else ((w - 1) / 2, (h - 1) / 2)
            return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y
    raise ValueError(f"name is {name!r}, allowed are {', '.join(GEOMETRIC)}")


def _geometry(name: str, x: Tensor, argument: Argument, fill: Fill, arithmetic: str) -> Tensor:
    h, w = x.shape[-2:]
    arguments = _per_sample(argument, x, torch.float64).flatten().tolist()
    matrix = torch.tensor([geometry_matrix(name, value, h, w, arithmetic) for value in arguments], dtype=torch.float64)
    return affine(x, matrix, fill=fill, arithmetic=arithmetic)


def shear_x(
    x: Num[Tensor, "*n c h w"], shear: Argument, *, fill: Fill = 128.0, arithmetic: str = "pillow"
) -> Num[Tensor, "*n c h w"]:
    """Pixel (x, y) comes from (x + shear y, y)."""
    return _geometry("ShearX", x, shear, fill, arithmetic)


def shear_y(
    x: Num[Tensor, "*n c h w"], shear: Argument, *, fill: Fill = 128.0, arithmetic: str = "pillow"
) -> Num[Tensor, "*n c h w"]:
    """Pixel (x, y) comes from (x, shear x + y)."""
    return _geometry("ShearY", x, shear, fill, arithmetic)


def translate_x(
    x: Num[Tensor, "*n c h w"], pixels: Argument, *, fill: Fill = 128.0, arithmetic: str = "pillow"
) -> Num[Tensor, "*n c h w"]:
    """Pixel (x, y) comes from (x + pixels, y): positive numbers move the image to the left."""
    return _geometry("TranslateX", x, pixels, fill, arithmetic)


def translate_y(
    x: Num[Tensor, "*n c h w"], pixels: Argument, *, fill: Fill = 128.0, arithmetic: str = "pillow"
) -> Num[Tensor, "*n c h w"]:
    """Pixel (x, y) comes from (x, y + pixels): positive numbers move the image up."""
    return _geometry("TranslateY", x, pixels, fill, arithmetic)


def rotate(
    x: Num[Tensor, "*n c h w"], degrees: Argument, *, fill: Fill = 128.0, arithmetic: str = "pillow"
) -> Num[Tensor, "*n c h w"]:
    """Rotates counter-clockwise about the centre of the image."""
    return _geometry("Rotate", x, degrees, fill, arithmetic)


def cutout(
    x: Num[Tensor, "*n c h w"],
    half: Argument,
    *,
    centre: Num[Tensor, "*n 2"] | None = None,
    fill: Fill = 128.0,
    generator: torch.Generator | None = None,
) -> Num[Tensor, "*n c h w"]:
    """Fills a square of side 2 ``half`` pixels, clipped at the border; its centre (row, column) is uniform if not given."""
    levels = _images(x)
    n, c, h, w = levels.shape
    half = _per_sample(half, x)
    if centre is None:
        places = torch.rand(n, 2, generator=generator)
        centre = (places * torch.tensor([h, w])).floor()
    row, column = centre.reshape(n, 2, 1, 1).float().cpu().unbind(1)
    rows, columns = torch.arange(h).view(1, h, 1), torch.arange(w).view(1, 1, w)
    half = half[:, 0]
    hole = ((rows >= row - half) & (rows < row + half)) & ((columns >= column - half) & (columns < column + half))
    hole = hole[:, None].to(x.device, torch.uint8)
    filled = _fill_levels(fill, c).to(x.device).view(1, c, 1, 1)
    return _like(levels * (1 - hole) + hole * filled, x)
