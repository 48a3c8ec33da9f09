"""Filters, resampling and compression of images, to the numbers of SciPy, OpenCV and Pillow, on batches of tensors.

Linear filters of a line of pixels are matrices: what they cost does not depend on how wide they are. Borders: "edge" goes
on with the outermost pixel, a|abc; "repeat" reflects and doubles it, cba|abc; "mirror" reflects about it, cb|abc.
"""

import io
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Num, UInt8
from PIL import Image
from torch import Tensor

BORDERS = ("edge", "repeat", "mirror")


def reflect(index: Tensor | np.ndarray, n: int, border: str) -> Tensor | np.ndarray:
    """Whole indices brought into 0..n-1.

    >>> reflect(np.arange(-2, 5), 3, "mirror").tolist()
    [2, 1, 0, 1, 2, 1, 0]
    """
    if border not in BORDERS:
        raise ValueError(f"border is {border!r}, allowed are {', '.join(BORDERS)}")
    if border == "edge" or n == 1:
        return index.clip(0, n - 1)
    last = 2 * n - 1 if border == "repeat" else 2 * n - 2
    period = last + (border == "repeat")
    index = index % period
    return (torch.minimum if isinstance(index, Tensor) else np.minimum)(index, last - index)


def pad(x: Num[Tensor, "*n h w"], by: int, border: str) -> Num[Tensor, "*n h2 w2"]:
    """``x`` with ``by`` more pixels on every side, as many as one likes."""
    rows, columns = (
        torch.from_numpy(reflect(np.arange(-by, side + by), side, border)).to(x.device) for side in x.shape[-2:]
    )
    return x[..., rows, :][..., columns]


@lru_cache(maxsize=64)
def gaussian_matrix(n: int, sigma: float | int, radius: int, border: str) -> np.ndarray:
    """The Gaussian filter of a line of ``n`` pixels with 2 ``radius`` + 1 taps, as an (n, n) matrix in double precision."""
    offsets = np.arange(-radius, radius + 1)
    taps = np.exp(-0.5 * (offsets / sigma) ** 2)
    matrix = np.zeros((n, n))
    rows = np.broadcast_to(np.arange(n)[:, None], (n, len(offsets)))
    np.add.at(matrix, (rows, reflect(rows + offsets, n, border)), taps / taps.sum())
    return matrix


def gaussian_filter(
    x: Float[Tensor, "*n h w"], sigma: float | int, border: str = "repeat", truncate: float | int = 4.0
) -> Float[Tensor, "*n h w"]:
    """SciPy's ``gaussian_filter`` of the last two axes, cut off after ``truncate`` sigmas.

    >>> gaussian_filter(torch.ones(2, 5, 4), 1.5).sum().round().item()
    40.0
    """
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return x
    down, across = (torch.from_numpy(gaussian_matrix(side, sigma, radius, border)).to(x) for side in x.shape[-2:])
    return down @ x @ across.T


@lru_cache(maxsize=64)
def _box_matrix(n: int, m: int) -> np.ndarray:
    """Box resampling of ``n`` to ``m`` pixels, (m, n): a pixel belongs to one box or to the other, as in Pillow."""
    step = n / m
    centre = (np.arange(m)[:, None] + 0.5) * step
    place = (np.arange(n) + 0.5 - centre) / max(step, 1.0)
    inside = ((place > -0.5) & (place <= 0.5)).astype(np.float64)
    return inside / inside.sum(1, keepdims=True)


def box_resize(levels: Float[Tensor, "*n h w"], size: tuple[int, int]) -> Float[Tensor, "*n h2 w2"]:
    """Pillow's ``resize`` to (height, width) with ``BOX``, of 8-bit levels kept as floats; whole levels after each pass."""
    down, across = (
        torch.from_numpy(_box_matrix(have, want)).to(levels) for have, want in zip(levels.shape[-2:], size, strict=True)
    )
    return (down @ (levels @ across.T + 0.5).floor() + 0.5).floor()


def sample(
    x: Float[Tensor, "b c h w"], rows: Float[Tensor, "..."], columns: Float[Tensor, "..."], border: str = "repeat"
) -> Float[Tensor, "b c h w"]:
    """Bilinear values of ``x`` at the places (``rows``, ``columns``), each (b, h, w), in pixels; a border for the rest."""
    b, c, h, w = x.shape
    top, left = rows.floor(), columns.floor()
    down, right = (rows - top)[:, None], (columns - left)[:, None]
    ys, xs = ([reflect(first.long() + step, side, border) for step in (0, 1)] for first, side in ((top, h), (left, w)))
    flat = x.flatten(2)
    (a, d), (e, f) = (
        [flat.gather(2, (y * w + z).flatten(1)[:, None].expand(-1, c, -1)).view(b, c, h, w) for z in xs] for y in ys
    )
    return (1 - down) * ((1 - right) * a + right * d) + down * ((1 - right) * e + right * f)


def jpeg(levels: UInt8[Tensor, "b c h w"], quality: int) -> UInt8[Tensor, "b c h w"]:
    """What is left of grey or RGB images after a JPEG file of ``quality`` 1 to 95, written and read by Pillow.

    Raises ``ValueError`` for other numbers of channels.
    """
    if levels.shape[1] not in (1, 3):
        raise ValueError(f"levels have {levels.shape[1]} channels, allowed are 1 and 3")
    done = []
    for pixels in levels.permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "JPEG", quality=quality)
        done.append(torch.from_numpy(np.array(Image.open(file)).reshape(pixels.shape)).permute(2, 0, 1))
    return torch.stack(done).to(levels.device)
