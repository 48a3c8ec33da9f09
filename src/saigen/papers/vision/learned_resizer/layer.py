"""Learned resizer: a small CNN in the place of bilinear resizing, trained with the recognition model (arXiv 2103.09950).

    base = resize(x)                                     what the recognition model used to get
    f0   = resize(BN(φ(conv1x1(φ(conv7x7(x))))))         features at full resolution, resized inside the network
    f    = r residual blocks of 3x3 convolutions on f0
    y    = base + conv7x7(f0 + BN(conv3x3(f)))           two skips: of the features, and of the image

φ is a leaky ReLU of slope 0.2. Only the task's loss trains it: y need not look like x.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Size = int | tuple[int, int]
MODES = ("bilinear", "bicubic", "area", "nearest")


def pair(size: Size, name: str = "size") -> tuple[int, int]:
    """(height, width) of a size that may be one number for both."""
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"{name} is {size}, allowed are heights and widths of at least 1")
    return height, width


class ResidualBlock(nn.Module):
    """x + BN(conv(φ(BN(conv(x))))): (b, width, h, w) to the same shape."""

    def __init__(self, width: int, slope: float, bn_momentum: float, bn_eps: float) -> None:
        super().__init__()
        self.slope = slope
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width, bn_eps, bn_momentum)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width, bn_eps, bn_momentum)

    def forward(self, x: Float[Tensor, "b n h w"]) -> Float[Tensor, "b n h w"]:
        f = F.leaky_relu(self.bn1(self.conv1(x)), self.slope, inplace=True)
        return x + self.bn2(self.conv2(f))


class LearnedResizer(nn.Module):
    """Resizes images (b, in_chans, h, w) of any size to (b, out_chans, *size), in the way the task asks for (section 3).

    ``size`` is a number or (height, width); ``forward(x, size)`` may ask for another one, larger or smaller than the
    input and of another aspect. ``width`` is n and ``num_blocks`` r of the paper. One input channel may become several
    (``out_chans``), each starting from the same resized image. ``mode`` and ``antialias`` are those of
    ``F.interpolate``, with half-pixel centres. ``init="identity"`` starts as plain resizing: the last convolution is 0.

    Images come normalised as the recognition model wants them; the output is not clamped.
    Raises ``ValueError`` for impossible sizes, widths and channels, and for another ``mode`` or ``init``.

    >>> LearnedResizer(24)(torch.rand(2, 3, 48, 37)).shape
    torch.Size([2, 3, 24, 24])
    """

    def __init__(
        self,
        size: Size,
        in_chans: int = 3,
        out_chans: int | None = None,
        width: int = 16,
        num_blocks: int = 1,
        *,
        slope: float = 0.2,
        mode: str = "bilinear",
        antialias: bool = False,
        init: str = "default",
        bn_momentum: float = 0.1,
        bn_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        out_chans = in_chans if out_chans is None else out_chans
        for name, count, least in (("in_chans", in_chans, 1), ("width", width, 1), ("num_blocks", num_blocks, 0)):
            if count < least:
                raise ValueError(f"{name} is {count}, allowed is {name} >= {least}")
        if out_chans != in_chans and (in_chans != 1 or out_chans < 1):
            raise ValueError(f"out_chans is {out_chans}, allowed is in_chans = {in_chans}, or any number from 1 image")
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}, allowed are {', '.join(MODES)}")
        if antialias and mode not in ("bilinear", "bicubic"):
            raise ValueError(f"antialias is True with mode {mode!r}, allowed are 'bilinear' and 'bicubic'")
        if init not in ("default", "identity"):
            raise ValueError(f"init is {init!r}, allowed are 'default' and 'identity'")
        if not 0.0 <= slope < 1.0:
            raise ValueError(f"slope is {slope}, allowed is 0 <= slope < 1")
        self.size, self.in_chans, self.slope = pair(size), in_chans, slope
        self.mode, self.antialias, self.init = mode, antialias, init
        self.conv1 = nn.Conv2d(in_chans, width, 7, padding=3)
        self.conv2 = nn.Conv2d(width, width, 1)
        self.bn = nn.BatchNorm2d(width, bn_eps, bn_momentum)
        blocks = [ResidualBlock(width, slope, bn_momentum, bn_eps) for _ in range(num_blocks)]
        self.blocks = nn.Sequential(*blocks)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width, bn_eps, bn_momentum)
        self.conv4 = nn.Conv2d(width, out_chans, 7, padding=3)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He's initialisation for the leaky ReLU; with ``init="identity"`` the last convolution is 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, self.slope, nonlinearity="leaky_relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.init == "identity":
            nn.init.zeros_(self.conv4.weight)

    def resize(self, x: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c i j"]:
        """The plain resizing inside, of the image and of the features."""
        if self.mode in ("area", "nearest"):
            return F.interpolate(x, size, mode=self.mode)
        return F.interpolate(x, size, mode=self.mode, align_corners=False, antialias=self.antialias)

    def forward(self, x: Float[Tensor, "b c h w"], size: Size | None = None) -> Float[Tensor, "b d i j"]:
        if x.shape[1] != self.in_chans:
            raise ValueError(f"x has {x.shape[1]} channels, allowed is in_chans = {self.in_chans}")
        size = self.size if size is None else pair(size)
        f = F.leaky_relu(self.conv1(x), self.slope, inplace=True)
        f = self.bn(F.leaky_relu(self.conv2(f), self.slope, inplace=True))  # the activation before the norm, here only
        f0 = self.resize(f, size)
        f = f0 + self.bn3(self.conv3(self.blocks(f0)))
        return self.resize(x, size) + self.conv4(f)

    def extra_repr(self) -> str:
        return f"size={self.size}, mode={self.mode!r}, antialias={self.antialias}"

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The layout of ``KushajveerSingh/resize_network_cv``'s ``Resizer``, or ours, with or without ``module.``."""
        names = {
            "module1.0": "conv1",
            "module1.2": "conv2",
            "module1.4": "bn",
            "module3.0": "conv3",
            "module3.1": "bn3",
            "module4": "conv4",
        }
        inner = {"block.0": "conv1", "block.1": "bn1", "block.3": "conv2", "block.4": "bn2"}
        converted = {}
        for key, value in state.items():
            layer, _, kind = key.removeprefix("module.").rpartition(".")
            if layer.startswith("resblocks."):
                _, number, part = layer.split(".", 2)
                layer = f"blocks.{number}.{inner.get(part, part)}"
            converted[f"{names.get(layer, layer)}.{kind}"] = value
        return converted


class ResizedClassifier(nn.Module):
    """``backbone(normalize(resizer(x)))``: any image-to-logits model behind a resizer, to be trained as one.

    ``resizer`` may be any module from images to images, such as a fixed one to compare with. ``normalize`` is for backbones
    whose input is scaled after resizing; None is the paper's order, images normalised
    before. ``forward(x, size)`` hands ``size`` to the resizer.

    >>> backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> ResizedClassifier(LearnedResizer(16), backbone)(torch.rand(2, 3, 40, 33)).shape
    torch.Size([2, 4])
    """

    def __init__(self, resizer: nn.Module, backbone: nn.Module, normalize: nn.Module | None = None) -> None:
        super().__init__()
        self.resizer, self.backbone = resizer, backbone
        self.normalize = nn.Identity() if normalize is None else normalize

    def forward(self, x: Float[Tensor, "b c h w"], size: Size | None = None) -> Tensor:
        resized = self.resizer(x) if size is None else self.resizer(x, size)
        return self.backbone(self.normalize(resized))


def freeze_backbone(model: ResizedClassifier, frozen: bool = True) -> ResizedClassifier:
    """Lets only the resizer learn, for a first phase before a warm-started backbone; ``frozen=False`` ends it."""
    model.backbone.requires_grad_(not frozen)
    return model


def joint_param_groups(model: ResizedClassifier, lr: float, resizer_lr: float | None = None) -> list[dict]:
    """Parameter groups for joint training: the backbone's at ``lr``, the resizer's at ``resizer_lr`` (None: as the other)."""
    for name, value in (("lr", lr), ("resizer_lr", lr if resizer_lr is None else resizer_lr)):
        if not value >= 0.0:
            raise ValueError(f"{name} is {value}, allowed is {name} >= 0")
    resizer_lr = lr if resizer_lr is None else resizer_lr
    return [
        {"params": list(model.backbone.parameters()), "lr": lr},
        {"params": list(model.resizer.parameters()), "lr": resizer_lr},
    ]


def resizer_macs(width: int, num_blocks: int, in_size: Size, out_size: Size, channels: int = 3) -> int:
    """Multiply-adds of the resizer's convolutions on one image: H W (49 c n + n²) + h w (18 n² r + 9 n² + 49 c n).

    >>> resizer_macs(16, 1, 448, 224)
    988266496
    """
    (height, wide), (h, w), n = pair(in_size, "in_size"), pair(out_size, "out_size"), width
    ends = 49 * channels * n
    return height * wide * (ends + n * n) + h * w * (18 * n * n * num_blocks + 9 * n * n + ends)
