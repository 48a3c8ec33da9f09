"""Residual networks (He et al., 2016, arXiv 1512.03385), in torchvision's and timm's key layout.

The form everybody trains today: the stride of a bottleneck stands in its 3x3 convolution ("v1.5"), the last batch norm
of each residual branch may start at zero (Goyal et al., 2017, arXiv 1706.02677, section 5.1), so that a block starts as
the identity. ``small_stem`` is the usual form for 32-pixel images: a 3x3 convolution of stride 1 and no max pooling.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from saigen.nn.classifier import Classifier

Spatial = Callable[[int, int], nn.Module]
"""Builds the layer of a block that looks at neighbours, from (channels, stride): same channels in and out."""


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """The projection of a residual block; ``None`` where the shapes agree and the shortcut is the identity."""
    if stride == 1 and in_channels == out_channels:
        return None
    projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(projection, nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (b, in_channels, h, w) to (b, width, h / stride, w / stride)."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int = 1, spatial: Spatial | None = None) -> None:
        super().__init__()
        if spatial is not None:
            raise ValueError(
                f"spatial is {spatial}, allowed is None in a BasicBlock: only a Bottleneck can swap its 3x3"
            )
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, width, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn2

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.act2(y)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut: (b, in_channels, h, w) to (b, 4 width, h / stride, w / stride).

    ``spatial(channels, stride)`` builds what stands in the place of the 3x3 convolution.
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int = 1, spatial: Spatial | None = None) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(width, width, stride) if spatial is None else spatial(width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.act3 = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, out_channels, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn3

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.act2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.act3(y)


class ResNet(Classifier):
    """A residual network over images (b, in_chans, h, w) that gives logits (b, num_classes).

    ``depths`` are the blocks of each stage and ``widths`` their inner channels (a bottleneck puts out four times as
    many); every stage but the first halves the resolution. Mini networks are ``depths`` and ``widths`` of any equal
    length. ``num_classes=0`` leaves the head out: the output is the pooled feature, (b, num_features).
    ``zero_init`` starts the last batch norm of each branch at zero. Raises ``ValueError`` for impossible sizes.

    >>> import torch
    >>> net = ResNet("basic", depths=(1, 1), widths=(8, 16), num_classes=10, small_stem=True)
    >>> net(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    classifier_name = "fc"
    default_cfg: ClassVar[dict] = {
        "input_size": (3, 224, 224),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "interpolation": "bilinear",
        "crop_pct": 0.875,
    }

    def __init__(
        self,
        block: str,
        depths: Sequence[int] = (2, 2, 2, 2),
        widths: Sequence[int] = (64, 128, 256, 512),
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        stem_width: int | None = None,
        small_stem: bool = False,
        zero_init: bool = True,
        spatial: Spatial | None = None,
    ) -> None:
        super().__init__()
        blocks = {"basic": BasicBlock, "bottleneck": Bottleneck}
        if block not in blocks:
            raise ValueError(f"block is {block!r}, allowed is 'basic' or 'bottleneck'")
        if not depths or len(depths) != len(widths) or min(*depths, *widths) < 1:
            raise ValueError(
                f"depths is {tuple(depths)} and widths is {tuple(widths)}, allowed are as many of the one as of the "
                "other, all at least 1"
            )
        if in_chans < 1:
            raise ValueError(f"in_chans is {in_chans}, allowed is in_chans >= 1")
        stem_width = widths[0] if stem_width is None else stem_width
        if stem_width < 1:
            raise ValueError(f"stem_width is {stem_width}, allowed is stem_width >= 1")
        self.in_chans = in_chans
        self._build_stem(stem_width, small_stem)
        channels, self.stages = stem_width, len(depths)
        for s, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            stage = nn.Sequential()
            for b in range(depth):
                stage.append(blocks[block](channels, width, 2 if s > 0 and b == 0 else 1, spatial))
                channels = width * blocks[block].expansion
            self.add_module(f"layer{s + 1}", stage)
        self.num_features = channels
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.reset_classifier(num_classes)
        self.reset_parameters(zero_init)

    def _build_stem(self, width: int, small: bool) -> None:
        if small:
            self.conv1 = conv3x3(self.in_chans, width)
        else:
            self.conv1 = nn.Conv2d(self.in_chans, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)

    def reset_parameters(self, zero_init: bool = True) -> None:
        """Kaiming-normal convolutions (fan out); with ``zero_init`` the last batch norm of each branch is zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, BasicBlock | Bottleneck) and zero_init:
                nn.init.zeros_(module.last_norm.weight)

    def forward_stem(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        return self.maxpool(self.act1(self.bn1(self.conv1(x))))

    def forward_stages(self, x: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """The output of every stage, from fine to coarse: what detectors and segmenters stand on."""
        if x.shape[1] != self.in_chans:
            raise ValueError(f"x has {x.shape[1]} channels, allowed is in_chans = {self.in_chans}")
        x, outputs = self.forward_stem(x), []
        for s in range(self.stages):
            x = getattr(self, f"layer{s + 1}")(x)
            outputs.append(x)
        return outputs

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """The map of the last stage, (b, num_features, h', w')."""
        return self.forward_stages(x)[-1]

    def forward_head(self, x: Float[Tensor, "b d h w"], pre_logits: bool = False) -> Float[Tensor, "b n"]:
        """Average pooling and, unless ``pre_logits``, the classifier."""
        x = self.global_pool(x).flatten(1)
        return x if pre_logits else self.fc(x)

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """torchvision's and timm's keys are ours; a wrapper's ``module.`` or ``backbone.`` in front is taken away."""
        return strip_prefixes(state, ("module.", "backbone."))


def strip_prefixes(state: dict[str, Tensor], prefixes: Sequence[str]) -> dict[str, Tensor]:
    """``state`` with the given prefixes, in that order, taken from the front of every key that has them."""
    for prefix in prefixes:
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def resnet18(*, num_classes: int = 1000, in_chans: int = 3, small_stem: bool = False, zero_init: bool = True) -> ResNet:
    """ResNet-18: 11,689,512 parameters at 1000 classes."""
    return ResNet(
        "basic", (2, 2, 2, 2), num_classes=num_classes, in_chans=in_chans, small_stem=small_stem, zero_init=zero_init
    )


def resnet34(*, num_classes: int = 1000, in_chans: int = 3, small_stem: bool = False, zero_init: bool = True) -> ResNet:
    """ResNet-34: 21,797,672 parameters at 1000 classes."""
    return ResNet(
        "basic", (3, 4, 6, 3), num_classes=num_classes, in_chans=in_chans, small_stem=small_stem, zero_init=zero_init
    )


def _bottleneck_resnet(
    depths: Sequence[int], num_classes: int, in_chans: int, small_stem: bool, zero_init: bool
) -> ResNet:
    return ResNet(
        "bottleneck", depths, num_classes=num_classes, in_chans=in_chans, small_stem=small_stem, zero_init=zero_init
    )


def resnet50(*, num_classes: int = 1000, in_chans: int = 3, small_stem: bool = False, zero_init: bool = True) -> ResNet:
    """ResNet-50: 25,557,032 parameters at 1000 classes."""
    return _bottleneck_resnet((3, 4, 6, 3), num_classes, in_chans, small_stem, zero_init)


def resnet101(
    *, num_classes: int = 1000, in_chans: int = 3, small_stem: bool = False, zero_init: bool = True
) -> ResNet:
    """ResNet-101: 44,549,160 parameters at 1000 classes."""
    return _bottleneck_resnet((3, 4, 23, 3), num_classes, in_chans, small_stem, zero_init)


def resnet152(
    *, num_classes: int = 1000, in_chans: int = 3, small_stem: bool = False, zero_init: bool = True
) -> ResNet:
    """ResNet-152: 60,192,808 parameters at 1000 classes."""
    return _bottleneck_resnet((3, 8, 36, 3), num_classes, in_chans, small_stem, zero_init)
