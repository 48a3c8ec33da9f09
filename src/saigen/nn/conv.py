"""Convolutions padded the way TensorFlow pads them."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Padding = str
"""``"same"``, as TensorFlow pads, or ``"symmetric"``."""


def same_padding(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """Zeros before and after a dimension of ``size`` so that the output has ceil(size / stride) values.

    TensorFlow's "SAME": where the total is odd, the larger half comes after.

    >>> same_padding(224, kernel=3, stride=2)
    (0, 1)
    """
    total = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    return total // 2, total - total // 2


class Conv2dSame(nn.Conv2d):
    """``nn.Conv2d`` with TensorFlow's "SAME" padding, worked out from the size of each input.

    Maps (b, in_channels, h, w) to (b, out_channels, ceil(h / stride), ceil(w / stride)). A layer trained in TensorFlow
    with stride 2 pads an even input on one side only; symmetric padding shifts its grid by a pixel.

    >>> Conv2dSame(3, 8, 3, stride=2)(torch.zeros(1, 3, 7, 10)).shape
    torch.Size([1, 8, 4, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding=0, dilation=dilation, groups=groups, bias=bias
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        top, bottom = same_padding(x.shape[2], self.kernel_size[0], self.stride[0], self.dilation[0])
        left, right = same_padding(x.shape[3], self.kernel_size[1], self.stride[1], self.dilation[1])
        if (top, left) != (bottom, right):
            x = F.pad(x, (left, right, top, bottom))
            top = left = 0
        return F.conv2d(x, self.weight, self.bias, self.stride, (top, left), self.dilation, self.groups)


def conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    *,
    groups: int = 1,
    bias: bool = False,
    padding: Padding = "symmetric",
) -> nn.Conv2d:
    """A convolution whose output has ceil(size / stride) values a side, padded "same" (TensorFlow) or "symmetric".

    With stride 1 the two are one and the same for an odd kernel. Raises ``ValueError`` for another ``padding`` and for
    an even kernel, which cannot be padded symmetrically.
    """
    if padding not in ("same", "symmetric"):
        raise ValueError(f"padding is {padding!r}, allowed are 'same' and 'symmetric'")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}, allowed are odd numbers from 1")
    if padding == "same" and stride > 1 and kernel_size > 1:
        return Conv2dSame(in_channels, out_channels, kernel_size, stride, groups=groups, bias=bias)
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=bias)
