"""Labels that fit: the one check of losses that take class numbers."""

import torch
from torch import Tensor


def check_labels(target: Tensor, classes: int) -> None:
    """Raises ``ValueError`` where ``target`` is not int64, or has a label outside 0 to ``classes`` - 1, naming the first.

    The labels themselves are read on the CPU and outside ``torch.compile`` only: reading them would break a graph, or make
    an accelerator wait; there the device's own check of indices stops a label out of range.

    >>> check_labels(torch.tensor([0, 2]), 3)
    """
    if target.dtype != torch.int64:
        raise ValueError(f"target has type {target.dtype}, allowed is torch.int64")
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside = (target < 0) | (target >= classes)
    if outside.any():
        at = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"target[{', '.join(map(str, at))}] is {target[at].item()}, allowed are classes from 0 to {classes - 1}"
        )
