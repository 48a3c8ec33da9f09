"""MobileNetV2 (Sandler et al., 2018, arXiv 1801.04381), in timm's key layout: ReLU6, no squeeze-and-excitation."""

from jaxtyping import Float
from torch import Tensor, nn

from saigen.nn.classifier import Classifier
from saigen.nn.conv import conv2d
from saigen.nn.resnet import strip_prefixes

# expansion, channels, repeats, stride of the first block (table 2)
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def round_to_eight(channels: int | float) -> int:
    """The nearest multiple of 8, at least 8, and not below nine tenths.

    >>> round_to_eight(32 * 0.35)
    16
    """
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class InvertedResidual(nn.Module):
    """1x1 expansion (where it is more than 1), depthwise 3x3, 1x1 projection without an activation, and a shortcut.

    >>> import torch
    >>> InvertedResidual(16, 24, expansion=6, stride=2)(torch.zeros(1, 16, 8, 8)).shape
    torch.Size([1, 24, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        # timm's names: without an expansion the projection is conv_pw, and the second batch norm the last
        self.expands = expansion > 1
        if self.expands:
            self.conv_pw = conv2d(in_channels, inner, 1)
            self.bn1 = nn.BatchNorm2d(inner)
            self.conv_dw = conv2d(inner, inner, 3, stride, groups=inner)
            self.bn2 = nn.BatchNorm2d(inner)
            self.conv_pwl = conv2d(inner, out_channels, 1)
            self.bn3 = nn.BatchNorm2d(out_channels)
        else:
            self.conv_dw = conv2d(inner, inner, 3, stride, groups=inner)
            self.bn1 = nn.BatchNorm2d(inner)
            self.conv_pw = conv2d(inner, out_channels, 1)
            self.bn2 = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU6(inplace=True)
        self.has_skip = stride == 1 and in_channels == out_channels

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        if self.expands:
            y = self.act(self.bn1(self.conv_pw(x)))
            y = self.bn3(self.conv_pwl(self.act(self.bn2(self.conv_dw(y)))))
        else:
            y = self.bn2(self.conv_pw(self.act(self.bn1(self.conv_dw(x)))))
        return y.add_(x) if self.has_skip else y


class MobileNetV2(Classifier):
    """MobileNetV2 over images (b, in_chans, h, w): logits (b, num_classes), or features where that is 0.

    ``width`` multiplies all channels (those of the head only where it is above 1), rounded to multiples of 8.
    ``stages`` are rows of expansion, channels, repeats and stride; ``stem_stride=1`` is for small images.
    Raises ``ValueError`` for widths, rates, classes or channels out of range.

    >>> import torch
    >>> MobileNetV2(0.35, num_classes=10)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """

    classifier_name = "classifier"

    def __init__(
        self,
        width: int | float = 1.0,
        *,
        stages: tuple[tuple[int, int, int, int], ...] = STAGES,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: int | float = 0.2,
        stem_stride: int = 2,
        stem_channels: int = 32,
        head_channels: int = 1280,
    ) -> None:
        super().__init__()
        if width <= 0:
            raise ValueError(f"width is {width}, allowed is more than 0")
        if in_chans < 1:
            raise ValueError(f"in_chans is {in_chans}, allowed is at least 1")
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate is {drop_rate}, allowed is 0 <= drop_rate < 1")
        self.in_chans, self.drop_rate = in_chans, drop_rate
        channels = round_to_eight(stem_channels * width)
        self.conv_stem = conv2d(in_chans, channels, 3, stem_stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU6(inplace=True)
        self.blocks = nn.Sequential()
        for expansion, base, repeats, stride in stages:
            out, stage = round_to_eight(base * width), nn.Sequential()
            for i in range(repeats):
                stage.append(InvertedResidual(channels, out, expansion, 1 if i else stride))
                channels = out
            self.blocks.append(stage)
        self.num_features = round_to_eight(head_channels * max(1.0, width))
        self.conv_head = conv2d(channels, self.num_features, 1)
        self.bn2 = nn.BatchNorm2d(self.num_features)
        self.reset_classifier(num_classes)
        self.default_cfg = {
            "input_size": (in_chans, 224, 224),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "interpolation": "bicubic",
            "crop_pct": 0.875,
        }
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """The map before pooling, (b, num_features, h / 32, w / 32), rounded up."""
        if x.shape[1] != self.in_chans:
            raise ValueError(f"x has {x.shape[1]} channels, allowed is {self.in_chans}")
        x = self.blocks(self.act(self.bn1(self.conv_stem(x))))
        return self.act(self.bn2(self.conv_head(x)))

    def forward_head(self, x: Float[Tensor, "b d i j"], pre_logits: bool = False) -> Float[Tensor, "b k"]:
        """Pools, drops out and classifies; with ``pre_logits`` it stops before the classifier."""
        x = nn.functional.dropout(x.mean((2, 3)), self.drop_rate, self.training)
        return x if pre_logits else self.classifier(x)

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """timm's keys are ours; a wrapper's ``module.`` or ``backbone.`` in front is taken away."""
        return strip_prefixes(state, ("module.", "backbone."))
