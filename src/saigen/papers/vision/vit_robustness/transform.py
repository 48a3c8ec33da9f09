"""The corruptions of ImageNet-C and CIFAR-10-C (Hendrycks and Dietterich, 2019, arXiv 1903.12261), on batches of tensors.

Fifteen types at five severities, and three of the benchmark's four validation types. The parameters are those of the
benchmark's code, for images of 224 and of 32 pixels; for images of another size every length scales with the short side.
Each function below takes images (n, c, h, w) in [0, 1], its parameters, the scale and where to draw from, and may leave
[0, 1]: ``corrupt`` clips. What the benchmark does on 8-bit levels (glass, motion, snow, pixelate, JPEG) is done on them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from saigen.nn.filters import box_resize, gaussian_filter, gaussian_matrix, jpeg, pad, sample

Number = float | int

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
"""The fifteen types of ImageNet-C: noise, blur, weather, digital."""
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "saturate")
"""Types that the benchmark keeps for validation."""

# One entry a severity, 1 to 5.
IMAGENET: dict[str, tuple] = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation
    "shot_noise": (60, 25, 12, 5, 3),  # photons a unit of brightness
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),  # share of values
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),  # radius, sigma of its antialiasing
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),  # sigma, largest shift, rounds
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),  # radius, sigma
    "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),  # end, step
    "snow": (  # mean, deviation, zoom, threshold, radius, sigma, weight of the image
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),  # weights of image and frost
    "fog": ((1.5, 2), (2.0, 2), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4)),  # strength, decay
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added to HSV's value
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # factor
    "elastic_transform": tuple(  # strength, sigma, shift of the affine map; the benchmark's 244 is not a slip of ours
        tuple(244 * c for c in entry)
        for entry in ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
    ),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),  # share of the side
    "jpeg_compression": (25, 18, 15, 10, 7),  # quality
    "speckle_noise": (0.15, 0.2, 0.35, 0.45, 0.6),
    "gaussian_blur": (1, 2, 3, 4, 6),
    "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),  # factor and addition to HSV's saturation
}
CIFAR: dict[str, tuple] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "shot_noise": (500, 250, 100, 75, 50),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "elastic_transform": tuple(
        tuple(32 * c for c in entry)
        for entry in ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))
    ),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    "jpeg_compression": (80, 65, 58, 50, 40),
    "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
}
BENCHMARKS = {"imagenet": (IMAGENET, 224), "cifar": (CIFAR, 32)}

ALEXNET_ERRORS = dict(
    zip(
        CORRUPTIONS,
        (
            *(0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816),
            *(0.826572, 0.819324, 0.564592, 0.853204, 0.646056, 0.717840, 0.606500),
        ),
        strict=True,
    )
)
"""AlexNet's error on each type of ImageNet-C, averaged over the severities: the unit of the mCE."""


def corrupt(
    x: Float[Tensor, "*n c h w"],
    name: str,
    severity: int,
    *,
    benchmark: Literal["imagenet", "cifar"] = "imagenet",
    generator: torch.Generator | np.random.RandomState | None = None,
    frost_textures: Float[Tensor, "k c H W"] | None = None,
) -> Float[Tensor, "*n c h w"]:
    """Images (..., c, h, w) in [0, 1], grey or RGB, corrupted by the type ``name`` at ``severity`` 1 to 5.

    ``benchmark`` picks the parameters: "imagenet" (ImageNet-C, made for 224 pixels) or "cifar" (CIFAR-10-C, made for 32);
    at other sizes lengths scale with the short side. ``generator`` draws (default: torch's global one). A NumPy
    ``RandomState`` draws image by image in the benchmark's own order: the same seed then gives the images that the
    benchmark's code makes. ``frost_textures`` are pictures of frost, at least as large as the images, of which crops are
    taken; without them frost is drawn. Returns floats: the benchmark goes on to 8 bits, and to JPEG files.

    Raises ``ValueError`` for unknown names, severities and benchmarks, and for images of another kind.

    >>> corrupt(torch.rand(2, 3, 224, 224), "fog", 3, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3, 224, 224])
    """
    parameters = corruption_parameters(name, severity, benchmark)
    if x.ndim < 3 or x.shape[-3] not in (1, 3) or not x.is_floating_point() or 0 in x.shape:
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}, allowed are floats (..., 1 or 3, height, width)")
    low, high = x.detach().aminmax()
    if low < 0 or high > 1:
        raise ValueError(
            f"x goes from {low:.3g} to {high:.3g}, allowed are images in [0, 1]: normalise after corrupting"
        )
    if frost_textures is not None and (
        frost_textures.shape[1] != x.shape[-3]
        or any(a < b for a, b in zip(frost_textures.shape[-2:], x.shape[-2:], strict=True))
    ):
        raise ValueError(
            f"frost_textures has shape {tuple(frost_textures.shape)}, allowed is no smaller than x: {x.shape}"
        )
    images = x.reshape(-1, *x.shape[-3:])
    images = images if images.dtype == torch.float64 else images.float()
    scale = min(x.shape[-2:]) / BENCHMARKS[benchmark][1]
    function = _FUNCTIONS[name]
    more = {"textures": frost_textures} if name == "frost" else {}
    # the benchmark makes one image after the other
    parts = images.split(1) if isinstance(generator, np.random.RandomState) else (images,)
    done = [function(part, *parameters, scale=scale, draws=_Draws(generator, part), **more) for part in parts]
    return torch.cat(done).clamp(0, 1).to(x.dtype).reshape(x.shape)


def corruption_parameters(name: str, severity: int, benchmark: Literal["imagenet", "cifar"] = "imagenet") -> tuple:
    """The benchmark's parameters of a type at a severity, lengths in its own pixels.

    >>> corruption_parameters("motion_blur", 2)
    (15, 5)
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"benchmark is {benchmark!r}, allowed are {', '.join(BENCHMARKS)}")
    if name not in _FUNCTIONS:
        raise ValueError(f"name is {name!r}, allowed are {', '.join(_FUNCTIONS)}")
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"severity is {severity}, allowed are 1, 2, 3, 4 and 5")
    found = BENCHMARKS[benchmark][0][name][severity - 1]
    return found if isinstance(found, tuple) else (found,)


def mean_corruption_error(
    errors: Mapping[str, Number | Sequence[Number]], baseline: Mapping[str, Number] = ALEXNET_ERRORS
) -> float:
    """The mCE: each type's error, averaged over severities, in units of ``baseline``'s; then the mean over the types.

    ``errors`` maps each type to its error, or to those of its severities, as shares; 1.0 is AlexNet's. Raises
    ``ValueError`` where types are missing or unknown.

    >>> mean_corruption_error({name: error / 2 for name, error in ALEXNET_ERRORS.items()})
    0.5
    """
    if set(errors) != set(baseline):
        odd = ", ".join(sorted(set(errors) ^ set(baseline)))
        raise ValueError(f"errors is for other types than baseline: {odd}; allowed are exactly {', '.join(baseline)}")
    return float(np.mean([np.mean(errors[name]) / baseline[name] for name in baseline]))


class _Draws:
    """Where a corruption draws from: a torch generator for the whole batch, or a ``RandomState`` as the benchmark does.

    Fields that cover images have shape (n, c, h, w); a ``RandomState`` fills them pixel by pixel, channels last.
    """

    def __init__(self, source: torch.Generator | np.random.RandomState | None, like: Tensor) -> None:
        self.source, self.like = source, like

    def _legacy(self, drawn: np.ndarray | float, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        field = torch.as_tensor(np.asarray(drawn)).to(self.like.device, dtype or self.like.dtype)
        return (field.permute(2, 0, 1) if len(shape) == 4 else field).reshape(tuple(shape))

    @staticmethod
    def _size(shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape[2:], shape[1]) if len(shape) == 4 else tuple(shape[1:])

    def _options(self) -> dict:
        device = self.source.device if isinstance(self.source, torch.Generator) else "cpu"
        return {"generator": self.source, "device": device}

    def normal(self, *shape: int) -> Tensor:
        if isinstance(self.source, np.random.RandomState):
            return self._legacy(self.source.normal(size=self._size(shape)), shape)
        return torch.randn(shape, dtype=self.like.dtype, **self._options()).to(self.like.device)

    def uniform(self, low: Number, high: Number, *shape: int) -> Tensor:
        if isinstance(self.source, np.random.RandomState):
            return self._legacy(self.source.uniform(low, high, size=self._size(shape)), shape)
        drawn = torch.rand(shape, dtype=self.like.dtype, **self._options())
        return (low + (high - low) * drawn).to(self.like.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        if isinstance(self.source, np.random.RandomState):
            return self._legacy(self.source.randint(low, high, size=self._size(shape)), shape, torch.int64)
        return torch.randint(low, high, shape, **self._options()).to(self.like.device)

    def poisson(self, rate: Tensor) -> Tensor:
        if isinstance(self.source, np.random.RandomState):
            return self._legacy(self.source.poisson(rate[0].permute(1, 2, 0).cpu().numpy()), rate.shape)
        return torch.poisson(rate.to(self._options()["device"]), generator=self.source).to(rate)


# Noise


def gaussian_noise(x: Tensor, sigma: Number, *, scale: Number, draws: _Draws) -> Tensor:
    return x + sigma * draws.normal(*x.shape)


def speckle_noise(x: Tensor, sigma: Number, *, scale: Number, draws: _Draws) -> Tensor:
    return x + x * sigma * draws.normal(*x.shape)


def shot_noise(x: Tensor, photons: Number, *, scale: Number, draws: _Draws) -> Tensor:
    return draws.poisson(x * photons) / photons


def impulse_noise(x: Tensor, amount: Number, *, scale: Number, draws: _Draws) -> Tensor:
    hit = draws.uniform(0, 1, *x.shape) <= amount
    salt = draws.uniform(0, 1, *x.shape) <= 0.5
    return torch.where(hit, salt.to(x.dtype), x)


# Blur


def gaussian_blur(x: Tensor, sigma: Number, *, scale: Number, draws: _Draws) -> Tensor:
    return gaussian_filter(x, sigma * scale, "edge", 4.0)


def defocus_blur(x: Tensor, radius: Number, alias: Number, *, scale: Number, draws: _Draws) -> Tensor:
    kernel = torch.from_numpy(_disk(radius * scale, alias)).to(x)
    padded, c = pad(x, kernel.shape[0] // 2, "mirror"), x.shape[1]
    return F.conv2d(padded, kernel.expand(c, 1, -1, -1), groups=c)


def glass_blur(x: Tensor, sigma: Number, shift: int, rounds: int, *, scale: Number, draws: _Draws) -> Tensor:
    n, c, h, w = x.shape
    shift = max(1, round(shift * scale))
    # a whole level must not be lost to rounding
    slack = 2000 * torch.finfo(x.dtype).eps
    levels = (255 * gaussian_filter(x, sigma * scale, "edge", 4.0) + slack).floor().flatten(2)
    rows = torch.arange(h - shift, shift, -1, device=x.device)
    columns = torch.arange(w - shift, shift, -1, device=x.device)
    target = (rows[:, None] * w + columns).flatten()
    for _ in range(rounds if len(target) else 0):
        dx, dy = draws.integers(-shift, shift, n, len(target), 2).unbind(-1)
        origin = _origins(target, target + dy * w + dx, h * w)
        levels = levels.gather(2, origin[:, None].expand(-1, c, -1))
    return gaussian_filter(levels.view(n, c, h, w) / 255, sigma * scale, "edge", 4.0)


def _origins(target: Tensor, source: Tensor, count: int) -> Tensor:
    """Where each pixel's value comes from, (n, count), after ``target[i]`` took ``source[:, i]``'s value, i = 0, 1, ….

    The benchmark means to swap the two pixels, but copies: NumPy's rows are views. A source that was a target before has
    its new value, so every pixel points on to another (node ``p``) or to an original (node ``count + p``).
    """
    n = source.shape[0]
    order = torch.full((count,), len(target), device=source.device)
    order[target] = torch.arange(len(target), device=source.device)
    taken_before = order[source] < order[target]
    pointer = torch.arange(count, 2 * count, device=source.device).repeat(n, 2)
    pointer[:, target] = torch.where(taken_before, source, source + count)
    for _ in range(math.ceil(math.log2(count)) + 1):
        onward = pointer.gather(1, pointer)
        if torch.equal(onward, pointer):
            break
        pointer = onward
    return pointer[:, :count] - count


def motion_blur(x: Tensor, radius: Number, sigma: Number, *, scale: Number, draws: _Draws) -> Tensor:
    angle = draws.uniform(-45, 45, x.shape[0])
    return _motion((255 * x).round(), radius * scale, sigma * scale, angle) / 255


def _motion(levels: Tensor, radius: Number, sigma: Number, angle: Tensor) -> Tensor:
    """ImageMagick's motion blur of 8-bit levels: half a Gaussian along a line of pixels, at ``angle`` degrees, (n,)."""
    n, _, h, w = levels.shape
    width = 2 * math.ceil(radius) + 1
    i = torch.arange(width, dtype=torch.float64)
    taps = (-(i**2) / (2 * sigma**2)).exp()
    radians = torch.deg2rad(angle.double().cpu())[:, None]
    down, right = (((i * f(radians) - 0.5).ceil().long() + width).tolist() for f in (torch.sin, torch.cos))
    padded = F.pad(levels, (width,) * 4, mode="replicate")
    out = torch.zeros_like(levels)
    for k in range(n):
        for tap, r, s in zip((taps / taps.sum()).tolist(), down[k], right[k], strict=True):
            out[k].add_(padded[k, :, r : r + h, s : s + w], alpha=tap)
    # its quanta are 257ths of a level, to which it rounds; 8-bit levels are cut off
    return ((257 * out + 0.5).floor() / 257).floor()


def zoom_blur(x: Tensor, end: Number, step: Number, *, scale: Number, draws: _Draws) -> Tensor:
    factors = np.arange(1, end, step)  # rounding decides whether the end belongs to it, as in the benchmark
    return (x + sum(_zoom(x, float(factor)) for factor in factors)) / (len(factors) + 1)


def _zoom(x: Tensor, factor: Number) -> Tensor:
    """The middle of the images, enlarged to their size."""
    h, w = x.shape[-2:]
    inner = [math.ceil(side / factor) for side in (h, w)]
    top, left = (h - inner[0]) // 2, (w - inner[1]) // 2
    crop = x[..., top : top + inner[0], left : left + inner[1]]
    large = F.interpolate(crop, [round(side * factor) for side in inner], mode="bilinear", align_corners=True)
    top, left = (large.shape[-2] - h) // 2, (large.shape[-1] - w) // 2
    return large[..., top : top + h, left : left + w]


@lru_cache(maxsize=64)
def _disk(radius: Number, alias: Number) -> np.ndarray:
    """A disc of the given radius, its edge smoothed by 3 taps, or by 5 where it is larger than 8 pixels."""
    reach = 8 if radius <= 8 else math.ceil(radius)
    squares = np.arange(-reach, reach + 1) ** 2
    disk = (squares + squares[:, None] <= radius**2).astype(np.float64)
    smooth = gaussian_matrix(len(disk), alias, 1 if radius <= 8 else 2, "mirror")
    disk = smooth @ (disk / disk.sum()) @ smooth.T
    rim = 0
    while rim < reach and not disk[rim].any():
        rim += 1
    return disk[rim : len(disk) - rim, rim : len(disk) - rim].copy()


# Weather


def snow(
    x: Tensor,
    mean: Number,
    deviation: Number,
    zoom: Number,
    threshold: Number,
    radius: Number,
    sigma: Number,
    weight: Number,
    *,
    scale: Number,
    draws: _Draws,
) -> Tensor:
    n, c, h, w = x.shape
    flakes = _zoom(mean + deviation * draws.normal(n, 1, h, w), zoom)
    flakes = torch.where(flakes < threshold, 0, flakes).clamp(0, 1)
    angle = draws.uniform(-135, -45, n)
    flakes = _motion((255 * flakes).floor(), radius * scale, sigma * scale, angle) / 255
    grey = (x * torch.tensor([0.299, 0.587, 0.114]).to(x).view(1, 3, 1, 1)).sum(1, keepdim=True) if c == 3 else x
    x = weight * x + (1 - weight) * torch.maximum(x, grey * 1.5 + 0.5)
    return x + flakes + flakes.flip(-2, -1)


def frost(
    x: Tensor, weight: Number, frost_weight: Number, *, scale: Number, draws: _Draws, textures: Tensor | None
) -> Tensor:
    n, c, h, w = x.shape
    if textures is None:
        # ice grows in needles: the ridges of two plasmas, bluish
        ridges = [1 - (2 * _plasma(draws, n, h, w, 1.8) - 1).abs() for _ in range(2)]
        tint = torch.tensor([0.84, 0.93, 1.0] if c == 3 else [0.92]).to(x).view(1, c, 1, 1)
        return weight * x + frost_weight * tint * (0.15 + 0.85 * torch.maximum(*ridges) ** 3)
    crops = []
    for _ in range(n):
        which = int(draws.integers(0, len(textures), 1))
        top, left = (
            int(draws.integers(0, max(1, have - need), 1))
            for have, need in zip(textures.shape[-2:], (h, w), strict=True)
        )
        crops.append(textures[which, :, top : top + h, left : left + w])
    return weight * x + frost_weight * torch.stack(crops).to(x)


def fog(x: Tensor, strength: Number, decay: Number, *, scale: Number, draws: _Draws) -> Tensor:
    n, _, h, w = x.shape
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + strength * _plasma(draws, n, h, w, decay)) * (brightest / (brightest + strength))


def _plasma(draws: _Draws, n: int, h: int, w: int, decay: Number) -> Tensor:
    """A cloud, (n, 1, h, w) in [0, 1]: diamond-square on a torus whose side is the next power of two."""
    side = 2 ** math.ceil(math.log2(max(h, w, 2)))
    cloud = draws.like.new_zeros(n, 1, side, side)
    step, wibble = side, 100.0
    while step >= 2:
        half = step // 2

        def shaken(total: Tensor, wibble: Number = wibble) -> Tensor:
            return total / 4 + wibble * draws.uniform(-wibble, wibble, *total.shape)

        corner, centre = cloud[..., ::step, ::step], cloud[..., half::step, half::step]
        pair = corner + corner.roll(-1, 2)
        centre.copy_(shaken(pair + pair.roll(-1, 3)))
        cloud[..., ::step, half::step] = shaken(centre + centre.roll(1, 2) + corner + corner.roll(-1, 3))
        cloud[..., half::step, ::step] = shaken(centre + centre.roll(1, 3) + corner + corner.roll(-1, 2))
        step, wibble = half, wibble / decay
    cloud = cloud - cloud.amin((2, 3), keepdim=True)
    return (cloud / cloud.amax((2, 3), keepdim=True))[..., :h, :w]


def brightness(x: Tensor, addition: Number, *, scale: Number, draws: _Draws) -> Tensor:
    # hue and saturation do not change, so that a colour scales with HSV's value; black becomes grey
    value = x.amax(1, keepdim=True)
    raised = (value + addition).clamp(max=1)
    return torch.where(value > 0, x * (raised / value), raised)


# Digital


def contrast(x: Tensor, factor: Number, *, scale: Number, draws: _Draws) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean


def saturate(x: Tensor, factor: Number, addition: Number, *, scale: Number, draws: _Draws) -> Tensor:
    value = x.amax(1, keepdim=True)
    spread = value - x.amin(1, keepdim=True)
    saturation = spread / value.clamp(min=1e-12)
    raised = (saturation * factor + addition).clamp(0, 1)
    # how far each channel lies below HSV's value, as a share of the spread; the hue of grey is red
    grey_hue = torch.tensor([0.0, 1.0, 1.0] if x.shape[1] == 3 else [0.0]).to(x).view(1, -1, 1, 1)
    below = torch.where(spread > 0, (value - x) / spread.clamp(min=1e-12), grey_hue)
    return value * (1 - raised * below)


def elastic_transform(
    x: Tensor, strength: Number, sigma: Number, shift: Number, *, scale: Number, draws: _Draws
) -> Tensor:
    n, _, h, w = x.shape
    centre, reach = torch.tensor([h // 2, w // 2]).double(), min(h, w) // 3
    corners = centre + reach * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    moved = corners + draws.uniform(-shift * scale, shift * scale, n, 3, 2).double().cpu()
    ones = torch.ones(n, 3, 1, dtype=torch.float64)
    # the affine map from the moved corners back to where they were: (x, y, 1) -> (x, y)
    back = torch.linalg.solve(torch.cat((moved, ones), 2), corners.expand(n, 3, 2)).to(x)
    rows, columns = (torch.arange(side, dtype=x.dtype, device=x.device) for side in (h, w))
    from_x, from_y = (
        back[:, 0, k].view(n, 1, 1) * columns
        + back[:, 1, k].view(n, 1, 1) * rows[:, None]
        + back[:, 2, k].view(n, 1, 1)
        for k in (0, 1)
    )
    x = sample(x, from_y, from_x, "mirror")
    right, down = (
        strength * scale * gaussian_filter(draws.uniform(-1, 1, n, 1, h, w), sigma * scale, "repeat", 3.0)[:, 0]
        for _ in range(2)
    )
    return sample(x, rows[:, None] + down, columns + right, "repeat")


def pixelate(x: Tensor, share: Number, *, scale: Number, draws: _Draws) -> Tensor:
    h, w = x.shape[-2:]
    small = box_resize((255 * x).round(), (max(1, int(h * share)), max(1, int(w * share))))
    return box_resize(small, (h, w)) / 255


def jpeg_compression(x: Tensor, quality: int, *, scale: Number, draws: _Draws) -> Tensor:
    return jpeg((255 * x.detach()).round().byte(), quality).to(x) / 255


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        *(
            gaussian_noise,
            shot_noise,
            impulse_noise,
            defocus_blur,
            glass_blur,
            motion_blur,
            zoom_blur,
            snow,
            frost,
            fog,
        ),
        *(brightness, contrast, elastic_transform, pixelate, jpeg_compression, speckle_noise, gaussian_blur, saturate),
    )
}
