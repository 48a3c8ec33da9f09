"""The EfficientNet family: squeeze-and-excitation, plain and fused inverted bottlenecks, and the network made of them.

Attribute names are timm's, and so are the keys of the state dict.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from saigen.nn.classifier import Classifier
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


class FusedConv(nn.Module):
    """Fused-MBConv1: with nothing to expand, one k x k convolution is left, and it keeps its batch norm and SiLU.

    The input is added where stride is 1 and the widths agree, after ``drop_path``.

    >>> FusedConv(16, 16)(torch.zeros(1, 16, 8, 8)).shape
    torch.Size([1, 16, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        drop_path: int | float = 0.0,
        padding: Padding = "same",
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.01,
    ) -> None:
        super().__init__()
        self.has_skip = stride == 1 and in_channels == out_channels
        self.conv = conv2d(in_channels, out_channels, kernel_size, stride, padding=padding)
        self.bn1 = nn.BatchNorm2d(out_channels, bn_eps, bn_momentum)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        y = F.silu(self.bn1(self.conv(x)), inplace=True)
        return x + self.drop_path(y) if self.has_skip else y


class FusedMBConv(nn.Module):
    """Fused inverted bottleneck: one dense k x k convolution does the work of MBConv's expansion and depthwise ones.

    (Gupta and Tan, 2019; Tan and Le, 2021, arXiv 2104.00298, figure 2.) k x k to the expanded width -> batch norm ->
    SiLU -> squeeze-and-excitation where ``se_ratio`` asks for it -> 1x1 projection -> batch norm, no activation.
    The input is added where stride is 1 and the widths agree, after ``drop_path``.

    >>> FusedMBConv(16, 24, expansion=4, stride=2)(torch.zeros(1, 16, 8, 8)).shape
    torch.Size([1, 24, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion: int | float = 4,
        kernel_size: int = 3,
        stride: int = 1,
        se_ratio: int | float = 0.0,
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
        self.conv_exp = conv2d(in_channels, expanded, kernel_size, stride, padding=padding)
        self.bn1 = nn.BatchNorm2d(expanded, bn_eps, bn_momentum)
        self.se = SqueezeExcite(expanded, max(1, int(in_channels * se_ratio))) if se_ratio > 0 else nn.Identity()
        self.conv_pwl = conv2d(expanded, out_channels, 1)
        self.bn2 = nn.BatchNorm2d(out_channels, bn_eps, bn_momentum)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        y = F.silu(self.bn1(self.conv_exp(x)), inplace=True)
        y = self.bn2(self.conv_pwl(self.se(y)))
        return x + self.drop_path(y) if self.has_skip else y


class Stage(NamedTuple):
    """``repeats`` blocks of one kind and width, the first with ``stride``, the rest with 1; ``fused`` has no depthwise."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int
    se_ratio: float = 0.25
    fused: bool = False


class EfficientNetBase(Classifier):
    """What the EfficientNets share: stem, stages of (fused) inverted bottlenecks, 1x1 head, pooling, classifier.

    Maps images (b, in_chans, h, w) to logits (b, num_classes); with ``num_classes=0`` to features (b, num_features).
    ``stages`` hold final numbers of layers and channels: a family scales its base network before it comes here.
    Block i of N is skipped with probability ``drop_path_rate`` * i / N. ``bn_momentum`` is PyTorch's.
    Raises ``ValueError`` for rates, classes or channels out of range.
    """

    classifier_name = "classifier"

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        stem_channels: int,
        head_channels: int,
        stem_stride: int = 2,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: int | float = 0.2,
        drop_path_rate: int | float = 0.2,
        padding: Padding = "same",
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.01,
        default_cfg: dict | None = None,
    ) -> None:
        super().__init__()
        if in_chans < 1:
            raise ValueError(f"in_chans is {in_chans}, allowed is at least 1")
        if not stages:
            raise ValueError(f"stages is {stages}, allowed is at least one stage")
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate is {drop_rate}, allowed is 0 <= drop_rate < 1")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate is {drop_path_rate}, allowed is 0 <= drop_path_rate < 1")
        self.drop_rate = drop_rate
        self.in_chans = in_chans
        self.default_cfg = {} if default_cfg is None else dict(default_cfg)

        channels = stem_channels
        self.conv_stem = conv2d(in_chans, channels, 3, stem_stride, padding=padding)
        self.bn1 = nn.BatchNorm2d(channels, bn_eps, bn_momentum)

        block, total, blocks = 0, sum(stage.repeats for stage in stages), []
        for stage in stages:
            layers: list[nn.Module] = []
            for i in range(stage.repeats):
                shared = {
                    "kernel_size": stage.kernel,
                    "stride": stage.stride if i == 0 else 1,
                    "drop_path": drop_path_rate * block / total,
                    "padding": padding,
                    "bn_eps": bn_eps,
                    "bn_momentum": bn_momentum,
                }
                layers.append(self._block(stage, channels, shared))
                channels, block = stage.channels, block + 1
            blocks.append(nn.Sequential(*layers))
        self.blocks = nn.Sequential(*blocks)

        self.num_features = head_channels
        self.conv_head = conv2d(channels, head_channels, 1)
        self.bn2 = nn.BatchNorm2d(head_channels, bn_eps, bn_momentum)
        self.reset_classifier(num_classes)

        # a stage's output is the last before a change of stride unless the next one keeps the stride
        self._pyramid = tuple(i for i in range(len(stages)) if i + 1 == len(stages) or stages[i + 1].stride > 1)
        self.feature_channels = tuple(stages[i].channels for i in self._pyramid)
        self.apply(self._init_weights)

    @staticmethod
    def _block(stage: Stage, channels: int, shared: dict) -> nn.Module:
        if stage.expansion == 1 and stage.fused:
            return FusedConv(channels, stage.channels, **shared)
        if stage.expansion == 1:
            return DepthwiseSeparable(channels, stage.channels, se_ratio=stage.se_ratio, **shared)
        kind = FusedMBConv if stage.fused else MBConv
        return kind(channels, stage.channels, expansion=stage.expansion, se_ratio=stage.se_ratio, **shared)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        elif isinstance(module, nn.Linear):
            bound = 1.0 / math.sqrt(module.out_features)
            nn.init.uniform_(module.weight, -bound, bound)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def new_classifier(self, num_classes: int) -> nn.Module:
        """With uniform weights."""
        return super().new_classifier(num_classes).apply(self._init_weights)

    def _stem(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.in_chans:
            raise ValueError(f"x has {x.shape[1]} channels, allowed is {self.in_chans}")
        return F.silu(self.bn1(self.conv_stem(x)), inplace=True)

    def forward_pyramid(self, x: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """The last map of each stride, 2, 4, 8, 16 and 32, with ``feature_channels`` channels."""
        x = self._stem(x)
        maps = []
        for i, stage in enumerate(self.blocks):
            x = stage(x)
            if i in self._pyramid:
                maps.append(x)
        return maps

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """The map before pooling, (b, num_features, h/32, w/32), rounded up."""
        x = self.blocks(self._stem(x))
        return F.silu(self.bn2(self.conv_head(x)), inplace=True)

    def forward_head(self, x: Float[Tensor, "b d i j"], pre_logits: bool = False) -> Float[Tensor, "b k"]:
        """Pools, drops out and classifies; with ``pre_logits`` it stops before the classifier."""
        x = F.dropout(x.mean((2, 3)), self.drop_rate, self.training)
        return x if pre_logits else self.classifier(x)
