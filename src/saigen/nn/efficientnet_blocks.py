"""The blocks of the MnasNet family: squeeze-and-excitation, depthwise separable and inverted bottleneck convolutions.

Attribute names are timm's, and so are the keys of the state dict.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from saigen.nn.conv import Padding, conv2d
from saigen.nn.drop_path import DropPath


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate in (0, 1) computed from all channel means (Hu et al., 2018, arXiv 1709.01507).

    mean over space -> 1x1 convolution to ``squeezed`` channels -> SiLU -> 1x1 convolution back -> sigmoid.

    >>> SqueezeExcite(8, 2)(torch.zeros(1, 8, 4, 4)).shape
    torch.Size([1, 8, 4, 4])
    """

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        if squeezed < 1:
            raise ValueError(f"squeezed is {squeezed}, allowed is at least 1")
        self.conv_reduce = nn.Conv2d(channels, squeezed, 1)
        self.conv_expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        gate = self.conv_expand(F.silu(self.conv_reduce(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class DepthwiseSeparable(nn.Module):
    """MBConv1: depthwise k x k, squeeze-and-excitation, 1x1 projection; the expansion is left out because it is 1.

    The projection has no activation. The input is added where stride is 1 and the widths agree, after ``drop_path``.

    >>> DepthwiseSeparable(16, 16)(torch.zeros(1, 16, 8, 8)).shape
    torch.Size([1, 16, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        se_ratio: int | float = 0.25,
        drop_path: int | float = 0.0,
        padding: Padding = "same",
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.01,
    ) -> None:
        super().__init__()
        self.has_skip = stride == 1 and in_channels == out_channels
        self.conv_dw = conv2d(in_channels, in_channels, kernel_size, stride, groups=in_channels, padding=padding)
        self.bn1 = nn.BatchNorm2d(in_channels, bn_eps, bn_momentum)
        self.se = SqueezeExcite(in_channels, max(1, int(in_channels * se_ratio))) if se_ratio > 0 else nn.Identity()
        self.conv_pw = conv2d(in_channels, out_channels, 1)
        self.bn2 = nn.BatchNorm2d(out_channels, bn_eps, bn_momentum)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        y = self.se(F.silu(self.bn1(self.conv_dw(x)), inplace=True))
        y = self.bn2(self.conv_pw(y))
        return x + self.drop_path(y) if self.has_skip else y


class MBConv(nn.Module):
    """Inverted bottleneck: 1x1 expansion, depthwise k x k, squeeze-and-excitation, 1x1 projection.

    (Sandler et al., 2018, arXiv 1801.04381; with squeeze-and-excitation: Tan et al., 2019, arXiv 1807.11626.)
    The squeeze is relative to the block's *input* channels, not to the expanded ones. The projection has no activation.
    The input is added where stride is 1 and the widths agree, after ``drop_path``.

    >>> MBConv(16, 24, expansion=6, stride=2)(torch.zeros(1, 16, 8, 8)).shape
    torch.Size([1, 24, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion: int | float = 6,
        kernel_size: int = 3,
        stride: int = 1,
        se_ratio: int | float = 0.25,
        drop_path: int | float = 0.0,
        padding: Padding = "same",
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.01,
    ) -> None:
        super().__init__()
        if expansion < 1:
            raise ValueError(f"expansion is {expansion}, allowed is at least 1")
        expanded = int(in_channels * expansion)
        self.has_skip = stride == 1 and in_channels == out_channels
        self.conv_pw = conv2d(in_channels, expanded, 1)
        self.bn1 = nn.BatchNorm2d(expanded, bn_eps, bn_momentum)
        self.conv_dw = conv2d(expanded, expanded, kernel_size, stride, groups=expanded, padding=padding)
        self.bn2 = nn.BatchNorm2d(expanded, bn_eps, bn_momentum)
        self.se = SqueezeExcite(expanded, max(1, int(in_channels * se_ratio))) if se_ratio > 0 else nn.Identity()
        self.conv_pwl = conv2d(expanded, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels, bn_eps, bn_momentum)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        y = F.silu(self.bn1(self.conv_pw(x)), inplace=True)
        y = F.silu(self.bn2(self.conv_dw(y)), inplace=True)
        y = self.bn3(self.conv_pwl(self.se(y)))
        return x + self.drop_path(y) if self.has_skip else y
