"""The usual augmentations of photographs, on batches, as ``fit`` takes them: ``(generator, x, y) -> (x, y)``."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def standardised(x: Tensor) -> Tensor:
    """Bytes as floats of about zero mean and unit variance, as photographs have them; floats stay what they are."""
    return (x.float() / 255 - 0.45) / 0.25 if x.dtype == torch.uint8 else x


def shift_and_flip(generator: torch.Generator, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For small images (n, c, h, w): up to an eighth of the side shifted over repeated borders, mirrored half of the time."""
    n, _, h, w = x.shape
    flip = torch.rand(n, generator=generator) < 0.5
    columns = torch.where(flip[:, None], torch.arange(w - 1, -1, -1), torch.arange(w))
    shift = torch.randint(-(h // 8), h // 8 + 1, (2, n, 1), generator=generator)
    rows, columns = (torch.arange(h) + shift[0]).clamp(0, h - 1), columns.add(shift[1]).clamp(0, w - 1)
    x = x[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return standardised(x).permute(0, 3, 1, 2).contiguous(), y


def crop_and_flip(generator: torch.Generator, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For large images: a crop of 0.08-1 of the area and 3/4-4/3 of aspect, resized, mirrored half of the time."""
    n = len(x)
    area, aspect = torch.rand(2, n, generator=generator)
    area, aspect = 0.08 + 0.92 * area, torch.exp((2 * aspect - 1) * math.log(4 / 3))
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    centre_x, centre_y, flip = 2 * torch.rand(3, n, generator=generator) - 1
    zero, mirrored = torch.zeros(n), torch.where(flip < 0, -width, width)
    first = torch.stack([mirrored, zero, centre_x * (1 - width)], 1)
    second = torch.stack([zero, height, centre_y * (1 - height)], 1)
    grid = F.affine_grid(torch.stack([first, second], 1), list(x.shape), align_corners=False)
    return F.grid_sample(standardised(x), grid, padding_mode="border", align_corners=False), y
