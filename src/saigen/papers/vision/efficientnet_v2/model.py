"""EfficientNetV2: Smaller Models and Faster Training (Tan and Le, ICML 2021, arXiv 2104.00298).

What makes EfficientNet slow to train is said in section 3.2: large images, depthwise convolutions in the early layers,
where channels are few and accelerators idle, and scaling all stages alike. V2 answers with

- Fused-MBConv (figure 2) in stages 1-3: one dense 3x3 convolution instead of a 1x1 and a depthwise one,
- 3x3 kernels only, smaller expansions, a base network found by a search that also weighs training time (table 4),
- scaling that adds layers to the late stages and caps the image size at 480,
- progressive learning (section 4), in ``progressive.py``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from saigen.nn.conv import Padding
from saigen.nn.efficientnet_blocks import EfficientNetBase, Stage
from saigen.papers.vision.efficientnet_v2.checkpoint import convert_tensorflow_v2, convert_torchvision_v2

Number = int | float

# --- Section 3.2: what a fused block costs ----------------------------------------------------------------------------


def fused_mac_ratio(channels: int, expansion: Number = 4, kernel: int = 3) -> float:
    """Multiply-adds of a Fused-MBConv over those of an MBConv without squeeze-and-excitation; both keep size and width.

    With c channels, expansion e and kernel k: (k^2 e c^2 + e c^2) / (2 e c^2 + k^2 e c). Fusing costs four to five times
    the arithmetic, and pays where dense convolutions run that much better than depthwise ones.

    >>> round(fused_mac_ratio(24), 2)
    4.21
    """
    for name, value in (("channels", channels), ("expansion", expansion), ("kernel", kernel)):
        if value < 1:
            raise ValueError(f"{name} is {value}, allowed is at least 1")
    expanded = expansion * channels
    return (kernel**2 + 1) * expanded * channels / (2 * expanded * channels + kernel**2 * expanded)


def round_width(channels: int, width: Number, divisor: int = 8) -> int:
    """Channels times ``width``, to the nearest multiple of ``divisor``: V1's rule without its floor of 90 %.

    >>> round_width(16, 1.2)
    16
    """
    if width <= 0:
        raise ValueError(f"width is {width}, allowed is more than 0")
    return max(divisor, int(channels * width + divisor / 2) // divisor * divisor)


# --- Table 4: the networks --------------------------------------------------------------------------------------------


def fused(repeats: int, stride: int, expansion: int, channels: int) -> Stage:
    """A stage of Fused-MBConv with 3x3 kernels; the search left no squeeze-and-excitation in them."""
    return Stage(repeats, 3, stride, expansion, channels, se_ratio=0.0, fused=True)


def plain(repeats: int, stride: int, expansion: int, channels: int) -> Stage:
    """A stage of MBConv with 3x3 kernels and squeeze-and-excitation of a quarter of the input's channels."""
    return Stage(repeats, 3, stride, expansion, channels)


STAGES = {
    "base": (
        fused(1, 1, 1, 16), fused(2, 2, 4, 32), fused(2, 2, 4, 48),
        plain(3, 2, 4, 96), plain(5, 1, 6, 112), plain(8, 2, 6, 192),
    ),
    "s": (
        fused(2, 1, 1, 24), fused(4, 2, 4, 48), fused(4, 2, 4, 64),
        plain(6, 2, 4, 128), plain(9, 1, 6, 160), plain(15, 2, 6, 256),
    ),
    "m": (
        fused(3, 1, 1, 24), fused(5, 2, 4, 48), fused(5, 2, 4, 80),
        plain(7, 2, 4, 160), plain(14, 1, 6, 176), plain(18, 2, 6, 304), plain(5, 1, 6, 512),
    ),
    "l": (
        fused(4, 1, 1, 32), fused(7, 2, 4, 64), fused(7, 2, 4, 96),
        plain(10, 2, 4, 192), plain(19, 1, 6, 224), plain(25, 2, 6, 384), plain(7, 1, 6, 640),
    ),
    "xl": (
        fused(4, 1, 1, 32), fused(8, 2, 4, 64), fused(8, 2, 4, 96),
        plain(16, 2, 4, 192), plain(24, 1, 6, 256), plain(32, 2, 6, 512), plain(8, 1, 6, 640),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """Stages and stem, factors on width and depth, sides of the training and test images, dropout, normalisation."""

    stages: str
    stem: int
    train: int
    test: int
    drop_rate: float
    width: float = 1.0
    depth: float = 1.0
    imagenet_statistics: bool = False


VARIANTS = {
    "s": Variant("s", 24, 300, 384, 0.2),
    "m": Variant("m", 24, 384, 480, 0.3),
    "l": Variant("l", 32, 384, 480, 0.4),
    "xl": Variant("xl", 32, 384, 512, 0.4),
    # the base network of the search, scaled as V1 was (table 10 compares them)
    "b0": Variant("base", 32, 192, 224, 0.2, imagenet_statistics=True),
    "b1": Variant("base", 32, 192, 240, 0.2, 1.0, 1.1, True),
    "b2": Variant("base", 32, 208, 260, 0.3, 1.1, 1.2, True),
    "b3": Variant("base", 32, 240, 300, 0.3, 1.2, 1.4, True),
}


class EfficientNetV2(EfficientNetBase):
    """A network of Table 4, scaled in ``width`` and ``depth`` where it is a base network.

    Maps images (b, in_chans, h, w) to logits (b, num_classes); with ``num_classes=0`` to features (b, num_features).
    ``resolution`` are the sides of the training and the test images, for ``default_cfg``: the network takes any size, and
    is meant to see larger images in use than in training. ``padding`` is "same" (TensorFlow's, of the paper and its
    checkpoints) or "symmetric". Block i of N is skipped with probability ``drop_path_rate`` * i / N. ``bn_momentum`` is
    PyTorch's: 0.1 is the 0.9 of the released configuration. State-dict keys are timm's.
    Raises ``ValueError`` for factors, rates, classes or channels out of range.

    >>> import torch
    >>> EfficientNetV2(width=0.25, depth=0.25, num_classes=10)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        width: Number = 1.0,
        depth: Number = 1.0,
        *,
        stages: tuple[Stage, ...] = STAGES["base"],
        stem_channels: int = 32,
        stem_stride: int = 2,
        head_channels: int = 1280,
        divisor: int = 8,
        num_classes: int = 1000,
        in_chans: int = 3,
        resolution: tuple[int, int] = (192, 224),
        drop_rate: Number = 0.2,
        drop_path_rate: Number = 0.2,
        padding: Padding = "same",
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.1,
        imagenet_statistics: bool = False,
    ) -> None:
        if depth <= 0:
            raise ValueError(f"depth is {depth}, allowed is more than 0")
        train, test = resolution
        super().__init__(
            tuple(
                stage._replace(
                    repeats=math.ceil(stage.repeats * depth), channels=round_width(stage.channels, width, divisor)
                )
                for stage in stages
            ),
            stem_channels=round_width(stem_channels, width, divisor),
            head_channels=round_width(head_channels, width, divisor),
            stem_stride=stem_stride,
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            padding=padding,
            bn_eps=bn_eps,
            bn_momentum=bn_momentum,
            default_cfg={
                "input_size": (in_chans, train, train),
                "test_input_size": (in_chans, test, test),
                "mean": (0.485, 0.456, 0.406) if imagenet_statistics else (0.5, 0.5, 0.5),
                "std": (0.229, 0.224, 0.225) if imagenet_statistics else (0.5, 0.5, 0.5),
                "interpolation": "bicubic",
                # images of 320 pixels and more are resized and not cropped
                "crop_pct": 1.0 if test >= 320 else round(test / (test + 32), 3),
            },
        )

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Renames the keys of a checkpoint to ours, which are timm's; unknown keys stay as they are.

        Read are timm's, torchvision's and the official TensorFlow names, each also under a prefix ("module.",
        "backbone.", "model.").
        """
        if any(key.split("/", 1)[-1].startswith("stem/") for key in state):
            return convert_tensorflow_v2(state)
        for prefix in ("module.", "backbone.", "model."):
            if state and all(key.startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
        return convert_torchvision_v2(state) if "features.0.0.weight" in state else dict(state)


def _variant(name: str, variant: str, padding: Padding, bn_eps: float) -> Callable[..., EfficientNetV2]:
    numbers = VARIANTS[variant]
    default_padding, default_eps = padding, bn_eps

    def build(
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: Number = numbers.drop_rate,
        drop_path_rate: Number = 0.2,
        padding: Padding = default_padding,
        bn_eps: float = default_eps,
        bn_momentum: float = 0.1,
    ) -> EfficientNetV2:
        return EfficientNetV2(
            numbers.width,
            numbers.depth,
            stages=STAGES[numbers.stages],
            stem_channels=numbers.stem,
            num_classes=num_classes,
            in_chans=in_chans,
            resolution=(numbers.train, numbers.test),
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            padding=padding,
            bn_eps=bn_eps,
            bn_momentum=bn_momentum,
            imagenet_statistics=numbers.imagenet_statistics,
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = (
        f"EfficientNetV2-{variant.upper()}: trained at {numbers.train} px, used at {numbers.test} px, "
        f'dropout {numbers.drop_rate}, padding "{default_padding}", BN epsilon {default_eps}.'
    )
    return build


# the paper's padding and epsilon; TensorFlow checkpoints need them
tf_efficientnetv2_s = _variant("tf_efficientnetv2_s", "s", "same", 1e-3)
tf_efficientnetv2_m = _variant("tf_efficientnetv2_m", "m", "same", 1e-3)
tf_efficientnetv2_l = _variant("tf_efficientnetv2_l", "l", "same", 1e-3)
tf_efficientnetv2_xl = _variant("tf_efficientnetv2_xl", "xl", "same", 1e-3)
tf_efficientnetv2_b0 = _variant("tf_efficientnetv2_b0", "b0", "same", 1e-3)
tf_efficientnetv2_b1 = _variant("tf_efficientnetv2_b1", "b1", "same", 1e-3)
tf_efficientnetv2_b2 = _variant("tf_efficientnetv2_b2", "b2", "same", 1e-3)
tf_efficientnetv2_b3 = _variant("tf_efficientnetv2_b3", "b3", "same", 1e-3)

# PyTorch's habits: symmetric padding, epsilon 1e-5; for checkpoints trained that way
efficientnetv2_s = _variant("efficientnetv2_s", "s", "symmetric", 1e-5)
efficientnetv2_m = _variant("efficientnetv2_m", "m", "symmetric", 1e-5)
efficientnetv2_l = _variant("efficientnetv2_l", "l", "symmetric", 1e-5)
efficientnetv2_xl = _variant("efficientnetv2_xl", "xl", "symmetric", 1e-5)
efficientnetv2_b0 = _variant("efficientnetv2_b0", "b0", "symmetric", 1e-5)
efficientnetv2_b1 = _variant("efficientnetv2_b1", "b1", "symmetric", 1e-5)
efficientnetv2_b2 = _variant("efficientnetv2_b2", "b2", "symmetric", 1e-5)
efficientnetv2_b3 = _variant("efficientnetv2_b3", "b3", "symmetric", 1e-5)
