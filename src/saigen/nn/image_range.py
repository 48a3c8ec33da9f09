"""A check for what transforms are given most often by mistake: bytes as floats, or images that are normalised already."""

import torch
from jaxtyping import Num
from torch import Tensor

OVERSHOOT = 0.5
"""How far outside [0, 1] values may lie: interpolation overshoots a little, and is clipped."""


def check_unit_range(x: Num[Tensor, "..."]) -> None:
    """Raises ``ValueError`` where floating-point images ``x`` are clearly not in [0, 1], or hold NaN.

    Looked at on the CPU alone: elsewhere the answer would have to be waited for at every batch.
    """
    if not x.is_floating_point() or x.device.type != "cpu" or x.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (bound.item() for bound in torch.aminmax(x.detach()))
    if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):
        raise ValueError(
            f"x holds values from {low:g} to {high:g}, allowed are images in [0, 1]: divide bytes by 255, and normalise after"
        )
