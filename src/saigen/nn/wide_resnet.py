"""Wide residual networks (Zagoruyko and Komodakis, 2016) in the form that semi-supervised learning compares methods on.

That form (Oliver et al., 2018; MixMatch's code) has leaky ReLUs, biases in the convolutions, TensorFlow's padding and
batch norm, and a first block whose shortcut starts from the activated input.
"""

from collections.abc import Mapping
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from saigen.nn.classifier import Classifier
from saigen.nn.conv import conv2d
from saigen.nn.tensorflow import torch_variables

SLOPE = 0.1


class _Block(nn.Module):
    """Pre-activation: norm, activation, 3x3 convolution, twice; a 1x1 convolution on the shortcut of another width."""

    def __init__(self, inputs: int, outputs: int, stride: int, padding: str, activated_shortcut: bool) -> None:
        super().__init__()
        self.activated_shortcut = activated_shortcut
        self.bn1 = _norm(inputs)
        self.conv1 = conv2d(inputs, outputs, 3, stride, bias=True, padding=padding)
        self.bn2 = _norm(outputs)
        self.conv2 = conv2d(outputs, outputs, 3, bias=True, padding=padding)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        y = F.leaky_relu(self.bn1(x), SLOPE)
        x = y if self.activated_shortcut else x
        y = self.conv2(F.leaky_relu(self.bn2(self.conv1(y)), SLOPE))
        return y + (x if self.shortcut is None else self.shortcut(x))


class WideResNet(Classifier):
    """Images (b, in_chans, h, w) in [-1, 1] to logits (b, num_classes).

    ``scales`` stages of ``repeat`` blocks, the i-th with ``filters`` 2^i channels; every stage but the first halves the
    resolution. ``filters=32``, ``scales=3``, ``repeat=4`` is WRN-28-2. ``momentum`` is batch norm's in PyTorch's sense:
    TensorFlow's 0.999 is 0.001, which takes thousands of steps to forget the first statistics. ``padding`` is ``"same"``
    (TensorFlow's) or ``"symmetric"``. ``num_classes=0`` leaves the head out. Raises ``ValueError`` for impossible sizes.

    >>> import torch
    >>> WideResNet(filters=4, repeat=1, num_classes=5)(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 5])
    """

    classifier_name = "fc"
    # 2 x - 1
    default_cfg: ClassVar[dict] = {
        "input_size": (3, 32, 32),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        filters: int = 32,
        scales: int = 3,
        repeat: int = 4,
        momentum: float = 0.001,
        padding: str = "same",
    ) -> None:
        super().__init__()
        for name, value in (("in_chans", in_chans), ("filters", filters), ("scales", scales), ("repeat", repeat)):
            if value < 1:
                raise ValueError(f"{name} is {value}, allowed is {name} >= 1")
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}, allowed is num_classes >= 0")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum is {momentum}, allowed is 0 < momentum <= 1")
        self.conv1 = conv2d(in_chans, 16, 3, bias=True, padding=padding)
        self.blocks = nn.Sequential()
        inputs = 16
        for scale in range(scales):
            outputs = filters << scale
            for number in range(repeat):
                stride = 2 if scale > 0 and number == 0 else 1
                self.blocks.append(_Block(inputs, outputs, stride, padding, scale == 0 and number == 0))
                inputs = outputs
        self.bn = _norm(inputs)
        self.num_features = inputs
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """The last feature map, normalised and activated."""
        return F.leaky_relu(self.bn(self.blocks(self.conv1(x))), SLOPE)

    def forward_head(self, x: Float[Tensor, "b d h w"], pre_logits: bool = False) -> Float[Tensor, "b n"]:
        """Average pooling and, unless ``pre_logits``, the classifier."""
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def new_classifier(self, num_classes: int) -> nn.Linear:
        """With Xavier-normal weights."""
        layer = super().new_classifier(num_classes)
        nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer

    def convert_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The variables of the official TensorFlow code (``classify/conv2d_3/kernel``), numbered as they were made, in our
        keys, the moving averages of the weights where there are any; our own keys pass."""
        if not any(key.endswith(("/kernel", "/kernel/ExponentialMovingAverage")) for key in state):
            return dict(state)
        convolutions, norms = ["conv1"], []
        for number, block in enumerate(self.blocks):
            convolutions += [f"blocks.{number}.conv1", f"blocks.{number}.conv2"]
            convolutions += [] if block.shortcut is None else [f"blocks.{number}.shortcut"]
            norms += [f"blocks.{number}.bn1", f"blocks.{number}.bn2"]
        names = {_numbered("conv2d", i): name for i, name in enumerate(convolutions)}
        names |= {_numbered("batch_normalization", i): name for i, name in enumerate([*norms, "bn"])}
        names["dense"] = "fc"
        return {f"{names.get(scope, scope)}.{kind}": value for (scope, kind), value in torch_variables(state).items()}


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _numbered(kind: str, number: int) -> str:
    return f"{kind}_{number}" if number else kind
