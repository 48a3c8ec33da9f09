"""The networks of the study (Nguyen, Raghu, Kornblith, 2021, arXiv 2010.15327): one family each for CIFAR and ImageNet.

For CIFAR, residual networks of 6n + 2 layers ("v1") whose channels are multiplied by a width: 3 stages of n blocks with
16w, 32w and 64w channels. For ImageNet, ResNet-50 whose third stage alone, or all of it, is made deeper or wider. Every
operation is a module of its own, the addition too, as every Keras layer is a "layer" of the paper's heat maps.
"""

import math
import re
from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from saigen.nn.classifier import Classifier
from saigen.nn.conv import conv2d, same_padding
from saigen.nn.mlp_mixer import lecun_normal_
from saigen.nn.resnet import ResNet
from saigen.nn.tensorflow import torch_variables

DEPTHS = (14, 20, 26, 32, 38, 44, 56, 110, 164)
WIDTHS = (1, 2, 4, 8, 10)
Number = float | int


def _he_normal(weight: Tensor) -> None:
    """Keras' He-normal draw, cut off at two deviations."""
    std = math.sqrt(2.0 / weight[0].numel()) / 0.87962566103423978  # so that what is left has variance 2 / fan-in
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class Add(nn.Module):
    """The sum of shortcut and branch, (b, c, h, w) both; a module, so that it can be recorded."""

    def forward(self, x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return x + y


class Block(nn.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))): (b, inputs, h, w) to (b, outputs, h / stride, w / stride).

    The shortcut is the identity or, in the first block of the second and third stage, a 1x1 convolution of stride 2 without
    a norm. Without ``residual`` there is none: the plain network of the same layers.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, residual: bool, projection: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv2d(inputs, outputs, 3, stride, bias=True, padding="same"), _norm(outputs)
        self.relu1 = nn.ReLU()
        self.conv2, self.bn2 = conv2d(outputs, outputs, 3, bias=True, padding="same"), _norm(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if residual and projection else None
        self.add = Add() if residual else None
        self.relu2 = nn.ReLU()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.add is not None:
            y = self.add(x if self.shortcut is None else self.shortcut(x), y)
        return self.relu2(y)


def _norm(channels: int) -> nn.BatchNorm2d:
    # Keras' defaults; its momentum is the share that stays
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class CifarResNetV1(Classifier):
    """Images (b, in_chans, h, w) in [0, 1], not standardised, to logits (b, num_classes).

    ``depth`` is 6n + 2, ``width`` multiplies the 16, 32 and 64 channels of the stages (rounded; less than 1 makes them
    narrower). Pooling is over all that is left: 8x8 for images of 32 pixels, as in the paper. ``residual=False`` leaves the
    shortcuts out. ``num_classes=0`` leaves the head out. Raises ``ValueError`` for impossible sizes.

    >>> import torch
    >>> CifarResNetV1(14, 0.5)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    classifier_name = "fc"
    default_cfg: ClassVar[dict] = {
        "input_size": (3, 32, 32),
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }

    def __init__(
        self, depth: int = 38, width: Number = 1, *, num_classes: int = 10, in_chans: int = 3, residual: bool = True
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth is {depth}, allowed is 6n + 2 with n >= 1: 8, 14, 20, 26, 32, ...")
        if not 16 * width >= 1:
            raise ValueError(f"width is {width}, allowed is width >= 1/16: a channel at least")
        if in_chans < 1:
            raise ValueError(f"in_chans is {in_chans}, allowed is in_chans >= 1")
        self.in_chans = in_chans
        channels = round(16 * width)
        self.conv1, self.bn1 = conv2d(in_chans, channels, 3, bias=True, padding="same"), _norm(channels)
        self.relu1 = nn.ReLU()
        for stage in range(3):
            blocks, outputs = nn.Sequential(), round(16 * width) * 2**stage
            for number in range((depth - 2) // 6):
                down = stage > 0 and number == 0
                blocks.append(Block(channels, outputs, 2 if down else 1, residual, down))
                channels = outputs
            self.add_module(f"layer{stage + 1}", blocks)
        self.num_features = channels
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                _he_normal(module.weight)
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """The map of the last stage, (b, num_features, h / 4, w / 4)."""
        if x.shape[1] != self.in_chans:
            raise ValueError(f"x has {x.shape[1]} channels, allowed is in_chans = {self.in_chans}")
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_head(self, x: Float[Tensor, "b d h w"], pre_logits: bool = False) -> Float[Tensor, "b n"]:
        """Average pooling and, unless ``pre_logits``, the classifier."""
        x = self.flatten(self.pool(x))
        return x if pre_logits else self.fc(x)

    def new_classifier(self, num_classes: int) -> nn.Linear:
        """With He-normal weights."""
        layer = super().new_classifier(num_classes)
        _he_normal(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer

    def convert_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Takes the variables of the official Keras model (``conv2d_3/kernel:0``), numbered as they were made; our own
        keys pass, without a ``module.`` in front.

        Raises ``ValueError`` where there are more or fewer layers than this network has.
        """
        if not any(key.partition(":")[0].endswith("/kernel") for key in state):
            return {key.removeprefix("module."): value for key, value in state.items()}
        variables = torch_variables({f"model/{key.partition(':')[0]}": value for key, value in state.items()})
        blocks = [f"layer{s}.{b}" for s in (1, 2, 3) for b in range(len(self.layer1))]
        convolutions, norms = ["conv1"], ["bn1"]
        for block in blocks:
            convolutions += [f"{block}.conv1", f"{block}.conv2"]
            convolutions += [] if self.get_submodule(block).shortcut is None else [f"{block}.shortcut"]
            norms += [f"{block}.bn1", f"{block}.bn2"]
        names: dict[str, str] = {}
        for kind, ours in (("conv2d", convolutions), ("batch_normalization", norms), ("dense", ["fc"])):
            # numbers go on counting from model to model in one process: only their order says which is which
            theirs = {scope for scope, _ in variables if re.fullmatch(rf"{kind}(_\d+)?", scope)}
            if len(theirs) != len(ours):
                raise ValueError(f"state has {len(theirs)} layers {kind}, this network has {len(ours)}")
            names |= dict(zip(sorted(theirs, key=lambda scope: int(f"0{scope[len(kind) + 1 :]}")), ours, strict=True))
        return {f"{names[scope]}.{kind}": value for (scope, kind), value in variables.items() if scope in names}


def cifar_resnet_v1(
    depth: int = 38, width: Number = 1, *, num_classes: int = 10, in_chans: int = 3, residual: bool = True
) -> CifarResNetV1:
    """The study's network for CIFAR: 565,386 parameters at depth 38 and width 1, 56,065,290 at width 10."""
    return CifarResNetV1(depth, width, num_classes=num_classes, in_chans=in_chans, residual=residual)


class _MaxPoolSame(nn.Module):
    """3x3 windows of stride 2 with TensorFlow's padding: after an even side, not before it."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        pads = [side for size in (x.shape[3], x.shape[2]) for side in same_padding(size, 3, 2)]
        return F.max_pool2d(F.pad(x, pads, value=-math.inf), 3, 2)


class ScaledResNet50(ResNet):
    """ResNet-50 for images (b, in_chans, h, w), one stage of which, the third, is ``depth`` times as deep and ``width``
    times as wide; with ``scale_all`` all stages are (the stem never). ResNet-50 where both are 1.

    Numbers of blocks and channels are rounded. Raises ``ValueError`` where nothing would be left of a stage.
    """

    def __init__(
        self,
        depth: Number = 1,
        width: Number = 1,
        *,
        scale_all: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        blocks, channels = [3, 4, 6, 3], [64, 128, 256, 512]
        for stage in range(4) if scale_all else (2,):
            blocks[stage], channels[stage] = round(depth * blocks[stage]), round(width * channels[stage])
        for name, value, least in (("depth", depth, min(blocks)), ("width", width, min(channels))):
            if least < 1:
                raise ValueError(f"{name} is {value}, allowed are multipliers that leave 1 or more in every stage")
        super().__init__("bottleneck", blocks, channels, num_classes=num_classes, in_chans=in_chans, stem_width=64)
        self.maxpool = _MaxPoolSame()
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.01

    def reset_parameters(self, zero_init: bool = True) -> None:
        """Keras' variance scaling; the last norm of each branch at zero."""
        super().reset_parameters(zero_init)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                lecun_normal_(module.weight)

    def new_classifier(self, num_classes: int) -> nn.Linear:
        """With normal weights of deviation 0.01."""
        layer = super().new_classifier(num_classes)
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
        return layer


def scaled_resnet50(
    depth: Number = 1, width: Number = 1, *, scale_all: bool = False, num_classes: int = 1000, in_chans: int = 3
) -> ScaledResNet50:
    """The study's network for ImageNet: 25,557,032 parameters where ``depth`` and ``width`` are 1."""
    return ScaledResNet50(depth, width, scale_all=scale_all, num_classes=num_classes, in_chans=in_chans)


def regularized(model: nn.Module, l2: Number = 1e-4) -> list[dict]:
    """Parameter groups for SGD: L2 on the kernels of convolutions and linear layers, none on biases and norms.

    Keras adds l2 |W|^2, without a half, so that ``weight_decay`` is twice ``l2``. Raises ``ValueError`` for ``l2`` below 0.

    >>> [group["weight_decay"] for group in regularized(cifar_resnet_v1(14))]
    [0.0002, 0.0]
    """
    if l2 < 0:
        raise ValueError(f"l2 is {l2}, allowed is l2 >= 0")
    kernels = {id(module.weight) for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in kernels], "weight_decay": 2 * l2},
        {"params": [p for p in parameters if id(p) not in kernels], "weight_decay": 0.0},
    ]
