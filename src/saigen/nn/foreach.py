"""When an optimizer's step is quicker over all parameters at once."""

from collections.abc import Iterator, Sequence

from torch import Tensor

SMALL = 20_000
"""Entries a parameter; above, a CPU's cache rewards finishing one parameter before the next."""


def batches(params: Sequence[Tensor], foreach: bool | None = None) -> Iterator[list[Tensor]]:
    """``params``, of one device and type, in the portions in which ``torch._foreach_*`` should be given them.

    All at once where ``foreach`` is true, one by one where it is false; None: at once on a GPU, and on a CPU where they
    are small, so that calls are what a step costs.

    >>> import torch
    >>> [len(batch) for batch in batches([torch.ones(3)] * 4)], [len(batch) for batch in batches([torch.ones(30_000)] * 2)]
    ([4], [1, 1])
    """
    if foreach is None:
        foreach = params[0].device.type != "cpu" or sum(p.numel() for p in params) < SMALL * len(params)
    yield from [list(params)] if foreach else ([p] for p in params)
