"""The models of the study: five Vision Transformers, and the BiT ResNets (Kolesnikov et al., 2020, arXiv 1912.11370).

BiT is a pre-activation ResNet with group norm in the place of batch norm and standardised convolution weights, up to four
times as wide. Keys are timm's (``resnetv2_*_bit``); the official arrays and the official PyTorch layout load as well.
"""

import re
from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from saigen.nn.classifier import Classifier
from saigen.nn.mlp_mixer import flax_array
from saigen.nn.resnet import strip_prefixes
from saigen.nn.vision_transformer import VisionTransformer

VITS = {  # patch, width, depth, heads
    "B/16": (16, 768, 12, 12),
    "B/32": (32, 768, 12, 12),
    "L/16": (16, 1024, 24, 16),
    "L/32": (32, 1024, 24, 16),
    "H/14": (14, 1280, 32, 16),
}


def study_vit(
    variant: str, *, img_size: int = 224, num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.0
) -> VisionTransformer:
    """The study's Vision Transformer "B/16", "B/32", "L/16", "L/32" or "H/14". Raises ``ValueError`` for another.

    >>> study_vit("B/32").grid_size
    (7, 7)
    """
    if variant not in VITS:
        raise ValueError(f"variant is {variant!r}, allowed are {', '.join(VITS)}")
    patch, width, depth, heads = VITS[variant]
    model = VisionTransformer(
        img_size=img_size,
        patch_size=patch,
        in_chans=in_chans,
        num_classes=num_classes,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        drop_rate=drop_rate,
        init="jax",
    )
    model.default_cfg |= {"mean": (0.5,) * in_chans, "std": (0.5,) * in_chans}
    return model


class StdConv2d(nn.Conv2d):
    """A convolution whose filters are standardised, each to mean 0 and variance 1, before every use."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        filters = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(filters, None, None, training=True, momentum=0.0, eps=1e-8).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Downsample(nn.Module):
    """The shortcut where shapes change: a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = StdConv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        return self.conv(x)


class PreActBottleneck(nn.Module):
    """Norm, ReLU, then convolution, three times: 1x1, 3x3 (with the stride), 1x1; the shortcut goes by untouched."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int) -> None:
        super().__init__()
        width = out_channels // 4
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = StdConv2d(in_channels, width, 1, bias=False)
        self.norm2 = nn.GroupNorm(groups, width)
        self.conv2 = StdConv2d(width, width, 3, stride, 1, bias=False)
        self.norm3 = nn.GroupNorm(groups, width)
        self.conv3 = StdConv2d(width, out_channels, 1, bias=False)
        changes = stride != 1 or in_channels != out_channels
        self.downsample = Downsample(in_channels, out_channels, stride) if changes else None

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        active = F.relu_(self.norm1(x))
        shortcut = x if self.downsample is None else self.downsample(active)
        y = self.conv1(active)
        y = self.conv2(F.relu_(self.norm2(y)))
        return self.conv3(F.relu_(self.norm3(y))).add_(shortcut)


class Stem(nn.Module):
    """A 7x7 convolution of stride 2 and a 3x3 max pooling, zeros around both; ``small`` is a 3x3 convolution alone."""

    def __init__(self, in_chans: int, width: int, small: bool) -> None:
        super().__init__()
        self.small = small
        self.conv = StdConv2d(in_chans, width, 3 if small else 7, 1 if small else 2, 1 if small else 3, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        x = self.conv(x)
        # zeros, not minus infinity: the original pads before it pools
        return x if self.small else F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)


class BiTResNet(Classifier):
    """BiT over images (b, in_chans, h, w): logits (b, num_classes), or features where ``num_classes`` is 0.

    ``depths`` are the blocks of each stage; ``widths`` their output channels before ``width_factor``. ``groups`` are those
    of every group norm. ``small_stem`` keeps the resolution of small images. Raises ``ValueError`` for impossible sizes.

    >>> import torch
    >>> BiTResNet((1, 1), widths=(32, 64), groups=8, num_classes=10, small_stem=True)(torch.rand(2, 3, 16, 16)).shape
    torch.Size([2, 10])
    """

    classifier_name = "head.fc"

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 6, 3),
        width_factor: int = 1,
        *,
        widths: Sequence[int] = (256, 512, 1024, 2048),
        groups: int = 32,
        num_classes: int = 1000,
        in_chans: int = 3,
        small_stem: bool = False,
    ) -> None:
        super().__init__()
        if not depths or len(depths) != len(widths) or min(depths) < 1:
            raise ValueError(
                f"depths is {tuple(depths)}, allowed are as many numbers >= 1 as widths has, {len(widths)}"
            )
        if width_factor < 1 or in_chans < 1:
            raise ValueError(f"width_factor is {width_factor} and in_chans is {in_chans}, allowed are numbers >= 1")
        if groups < 1 or any(width * width_factor // 4 % groups or width % 4 for width in widths):
            raise ValueError(f"groups is {groups}, allowed are divisors of a quarter of each width, {tuple(widths)}")
        self.in_chans, self.num_features = in_chans, widths[-1] * width_factor
        self.default_cfg = {
            "input_size": (in_chans, 448, 448),
            "mean": (0.5,) * in_chans,
            "std": (0.5,) * in_chans,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
        }
        channels = widths[0] * width_factor // 4
        self.stem = Stem(in_chans, channels, small_stem)
        self.stages = nn.Sequential()
        for s, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            stage = nn.Module()
            stage.blocks = nn.Sequential()
            for b in range(depth):
                stride = 2 if s > 0 and b == 0 else 1
                stage.blocks.append(PreActBottleneck(channels, width * width_factor, stride, groups))
                channels = width * width_factor
            self.stages.append(stage)
        self.norm = nn.GroupNorm(groups, channels)
        self.head = nn.Module()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.reset_classifier(num_classes)

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """The last stage's map behind its norm, (b, num_features, h', w')."""
        if x.shape[1] != self.in_chans:
            raise ValueError(f"x has {x.shape[1]} channels, allowed is in_chans = {self.in_chans}")
        x = self.stem(x)
        for stage in self.stages:
            x = stage.blocks(x)
        return F.relu(self.norm(x))

    def forward_head(self, x: Float[Tensor, "b d h w"], pre_logits: bool = False) -> Float[Tensor, "b k"]:
        """Average pooling and, unless ``pre_logits``, the classifier."""
        x = x.mean((2, 3), keepdim=True)
        return (x if pre_logits else self.head.fc(x)).flatten(1)

    def new_classifier(self, num_classes: int) -> nn.Conv2d:
        """A 1x1 convolution of zeros, as BiT's is before fine-tuning."""
        layer = nn.Conv2d(self.num_features, num_classes, 1)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """timm's layout from timm's, the official PyTorch one or the official arrays; other keys stay."""
        return convert_bit_state_dict(state)


_LETTER = {"a": "1", "b": "2", "c": "3"}
_KIND = {"kernel": "weight", "gamma": "weight", "scale": "weight", "beta": "bias", "bias": "bias", "weight": "weight"}


def convert_bit_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's keys of a BiT ResNet; the official arrays (``resnet/block1/unit01/a/…``) are turned round.

    >>> import torch
    >>> list(convert_bit_state_dict({"body.block2.unit03.gn1.weight": torch.ones(512)}))
    ['stages.1.blocks.2.norm1.weight']
    """
    ours = {}
    for key, value in strip_prefixes(state, ("module.", "model.", "backbone.", "resnet/")).items():
        *path, last = re.split(r"[./]", key)
        place = ".".join(path)
        unit = re.fullmatch(r"(?:body\.)?block(\d+)\.unit(\d+)\.(.+)", place)
        if unit:
            stage, number, layer = unit.groups()
            array = re.fullmatch(r"([abc])\.(?:(proj)\.)?(standardized_conv2d|group_norm)", layer)
            if array:
                letter, projection, kind = array.groups()
                kind = "norm" if kind == "group_norm" else "conv"
                layer = "downsample.conv" if projection else kind + _LETTER[letter]
            layer = {"downsample": "downsample.conv"}.get(re.sub(r"^gn(\d)$", r"norm\1", layer), layer)
            layer = re.sub(r"^gn(\d)$", r"norm\1", layer)
            name = f"stages.{int(stage) - 1}.blocks.{int(number) - 1}.{layer}"
        else:
            outside = {
                "root.conv": "stem.conv",
                "root_block.standardized_conv2d": "stem.conv",
                "head.gn": "norm",
                "group_norm": "norm",
                "head.conv": "head.fc",
                "head.conv2d": "head.fc",
            }
            name = outside.get(place, place)
        if name == place:
            ours[key] = value
        else:
            ours[f"{name}.{_KIND.get(last, last)}"] = flax_array(value, last)
    return ours


def resnetv2_50x1_bit(*, num_classes: int = 1000, in_chans: int = 3) -> BiTResNet:
    """BiT-R50x1: 25.5 M parameters."""
    return BiTResNet((3, 4, 6, 3), 1, num_classes=num_classes, in_chans=in_chans)


def resnetv2_101x1_bit(*, num_classes: int = 1000, in_chans: int = 3) -> BiTResNet:
    """BiT-R101x1: 44.5 M parameters."""
    return BiTResNet((3, 4, 23, 3), 1, num_classes=num_classes, in_chans=in_chans)


def resnetv2_50x3_bit(*, num_classes: int = 1000, in_chans: int = 3) -> BiTResNet:
    """BiT-R50x3: 217.3 M parameters."""
    return BiTResNet((3, 4, 6, 3), 3, num_classes=num_classes, in_chans=in_chans)


def resnetv2_101x3_bit(*, num_classes: int = 1000, in_chans: int = 3) -> BiTResNet:
    """BiT-R101x3: 387.9 M parameters."""
    return BiTResNet((3, 4, 23, 3), 3, num_classes=num_classes, in_chans=in_chans)


def resnetv2_152x4_bit(*, num_classes: int = 1000, in_chans: int = 3) -> BiTResNet:
    """BiT-R152x4: 936.5 M parameters."""
    return BiTResNet((3, 8, 36, 3), 4, num_classes=num_classes, in_chans=in_chans)
