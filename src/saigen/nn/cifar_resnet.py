"""The residual networks of 6n + 2 layers for 32-pixel images (He et al., 2016, arXiv 1512.03385, section 4.2).

Three stages of n blocks with 16, 32 and 64 channels, and shortcuts without parameters ("option A"): where the shape
changes, the input is averaged over 2x2 pixels and zero channels are put on both sides, as in the code of Cui et al. (2019).
"""

from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from saigen.nn.classifier import Classifier
from saigen.nn.resnet import conv3x3, strip_prefixes


class CifarBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters: (b, c, h, w) to (b, width, h / stride, w / stride)."""

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(in_channels, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width), nn.BatchNorm2d(width)
        self.stride, self.padding = stride, (width - in_channels) // 2

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            # Where a side is odd, the last window is averaged over the pixels there are.
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        if self.padding:
            x = F.pad(x, (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(x + y)


class CifarResNet(Classifier):
    """Images (b, in_chans, h, w) to logits (b, num_classes); ``depth`` is 6n + 2: 20, 32, 44, 56, 110.

    ``width`` is the channels of the first stage, doubled from stage to stage. ``num_classes=0`` leaves the head out: the
    output is the pooled feature, (b, num_features). The convolutions start as Glorot's uniform, as in the code of Cui et al.

    >>> import torch
    >>> CifarResNet(32)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    classifier_name = "fc"
    # x / 128 - 1 on bytes
    default_cfg: ClassVar[dict] = {
        "input_size": (3, 32, 32),
        "mean": (128 / 255,) * 3,
        "std": (128 / 255,) * 3,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }

    def __init__(self, depth: int = 32, *, num_classes: int = 10, in_chans: int = 3, width: int = 16) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth is {depth}, allowed is 6n + 2 with n >= 1: 8, 14, 20, 26, 32, ...")
        for name, value in {"in_chans": in_chans, "width": width}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}, allowed is {name} >= 1")
        if width % 2:
            raise ValueError(f"width is {width}, allowed are even numbers: half of the new channels stand on each side")
        self.in_chans = in_chans
        self.conv1, self.bn1 = conv3x3(in_chans, width), nn.BatchNorm2d(width)
        channels, blocks = width, (depth - 2) // 6
        for stage in range(3):
            layer, out = nn.Sequential(), width * 2**stage
            for block in range(blocks):
                layer.append(CifarBlock(channels, out, 2 if stage > 0 and block == 0 else 1))
                channels = out
            self.add_module(f"layer{stage + 1}", layer)
        self.num_features = channels
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """The map of the last stage, (b, num_features, h / 4, w / 4)."""
        if x.shape[1] != self.in_chans:
            raise ValueError(f"x has {x.shape[1]} channels, allowed is in_chans = {self.in_chans}")
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_head(self, x: Float[Tensor, "b d h w"], pre_logits: bool = False) -> Float[Tensor, "b n"]:
        """Average pooling and, unless ``pre_logits``, the classifier."""
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Takes a ``module.`` off the front, and the head's other usual name, ``linear``."""
        state = strip_prefixes(state, ("module.",))
        return {
            name.replace("linear.", "fc.", 1) if name.startswith("linear.") else name: v for name, v in state.items()
        }
