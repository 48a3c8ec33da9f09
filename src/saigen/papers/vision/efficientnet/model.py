"""EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks (Tan and Le, ICML 2019, arXiv 1905.11946).

A network can be made deeper (d), wider (w) or fed larger images (r); each alone saturates. The paper scales all three
with one coefficient phi, d = alpha^phi, w = beta^phi, r = gamma^phi under alpha * beta^2 * gamma^2 = 2 (Eq. 3), so that
multiply-adds grow as 2^phi, and applies this to a network found by architecture search, B0 (Table 1).
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from saigen.nn.conv import Padding
from saigen.nn.efficientnet_blocks import EfficientNetBase, Stage
from saigen.papers.vision.efficientnet.checkpoint import convert_flat, convert_tensorflow, convert_torchvision

Number = int | float

# --- Section 3: compound scaling -----------------------------------------------------------------------------------


class Scale(NamedTuple):
    """Factors on depth (layers per stage), width (channels) and resolution (side of the input)."""

    depth: Number
    width: Number
    resolution: Number

    @property
    def cost(self) -> float:
        """Factor on multiply-adds, d * w^2 * r^2 (Section 3.2)."""
        return self.depth * self.width**2 * self.resolution**2


def compound_scale(phi: Number, alpha: Number = 1.2, beta: Number = 1.1, gamma: Number = 1.15) -> Scale:
    """Equation 3: depth alpha^phi, width beta^phi, resolution gamma^phi; the defaults are the paper's.

    The published B1-B7 (``VARIANTS``) are rounded by hand and not these numbers.

    >>> compound_scale(1).cost
    1.9202700000000003
    """
    for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
        if value < 1:
            raise ValueError(f"{name} is {value}, allowed is at least 1")
    return Scale(alpha**phi, beta**phi, gamma**phi)


def round_filters(channels: int, width: Number, divisor: int = 8) -> int:
    """Channels times ``width``, to the nearest multiple of ``divisor``, but not below 90 % of the exact product.

    >>> round_filters(80, 1.1)
    88
    """
    if width <= 0:
        raise ValueError(f"width is {width}, allowed is more than 0")
    exact = channels * width
    rounded = max(divisor, int(exact + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * exact else rounded


def round_repeats(repeats: int, depth: Number) -> int:
    """Repeats times ``depth``, rounded up.

    >>> round_repeats(3, 1.1)
    4
    """
    if depth <= 0:
        raise ValueError(f"depth is {depth}, allowed is more than 0")
    return math.ceil(repeats * depth)


def search_scaling(
    train_eval: Callable[[Scale], Number],
    grid: Iterable[Number] = tuple(1 + 0.05 * i for i in range(21)),
    *,
    cost: Number = 2.0,
    tolerance: Number = 0.1,
) -> tuple[Scale, dict[Scale, float]]:
    """Step 1 of Section 3.3: phi = 1, a grid search for alpha, beta, gamma on the small base network.

    Tries every (alpha, beta, gamma) from ``grid`` whose alpha * beta^2 * gamma^2 is within ``tolerance`` of ``cost``;
    ``train_eval`` trains and scores a network of that scale (higher is better; on held-out data, not on the test set).
    Returns the best and all scores; ties go to the cheaper. Raises ``ValueError`` where no point of the grid qualifies.

    >>> search_scaling(lambda s: -abs(s.width - 1.1), grid=(1.0, 1.1, 1.15, 1.2))[0]
    Scale(depth=1.2, width=1.1, resolution=1.15)
    """
    values = sorted(set(grid))
    if not values or values[0] < 1:
        raise ValueError(f"grid is {values}, allowed are factors of at least 1")
    scales = [Scale(*point) for point in itertools.product(values, repeat=3)]
    scales = [scale for scale in scales if abs(scale.cost - cost) <= tolerance + 1e-9]
    if not scales:
        raise ValueError(f"grid is {values}, but none of its points costs {cost} within tolerance {tolerance}")
    scores = {scale: train_eval(scale) for scale in scales}
    return max(scores, key=lambda scale: (scores[scale], -scale.cost)), scores


# --- Table 1: the base network, B0 ---------------------------------------------------------------------------------


B0_STAGES = (
    Stage(repeats=1, kernel=3, stride=1, expansion=1, channels=16),
    Stage(repeats=2, kernel=3, stride=2, expansion=6, channels=24),
    Stage(repeats=2, kernel=5, stride=2, expansion=6, channels=40),
    Stage(repeats=3, kernel=3, stride=2, expansion=6, channels=80),
    Stage(repeats=3, kernel=5, stride=1, expansion=6, channels=112),
    Stage(repeats=4, kernel=5, stride=2, expansion=6, channels=192),
    Stage(repeats=1, kernel=3, stride=1, expansion=6, channels=320),
)


@dataclass(frozen=True)
class Variant:
    """Width and depth factors, side of the input, dropout before the classifier."""

    width: float
    depth: float
    resolution: int
    drop_rate: float


VARIANTS = {
    "b0": Variant(1.0, 1.0, 224, 0.2),
    "b1": Variant(1.0, 1.1, 240, 0.2),
    "b2": Variant(1.1, 1.2, 260, 0.3),
    "b3": Variant(1.2, 1.4, 300, 0.3),
    "b4": Variant(1.4, 1.8, 380, 0.4),
    "b5": Variant(1.6, 2.2, 456, 0.4),
    "b6": Variant(1.8, 2.6, 528, 0.5),
    "b7": Variant(2.0, 3.1, 600, 0.5),
    "b8": Variant(2.2, 3.6, 672, 0.5),  # from the official code; first used by AdvProp
    "l2": Variant(4.3, 5.3, 800, 0.5),  # from the official code; first used by Noisy Student
}


class EfficientNet(EfficientNetBase):
    """The network of Table 1, scaled in ``width`` and ``depth``; the third factor is the size of the image it is given.

    Maps images (b, in_chans, h, w) to logits (b, num_classes); with ``num_classes=0`` to features (b, num_features).
    Channel counts are multiples of ``divisor``.
    ``padding`` is "same" (TensorFlow's, of the paper and its checkpoints) or "symmetric". Block i of N is skipped with
    probability ``drop_path_rate`` * i / N. ``bn_momentum`` is PyTorch's: 0.01 is TensorFlow's 0.99.
    State-dict keys are timm's. Raises ``ValueError`` for factors, rates, classes or channels out of range.

    >>> EfficientNet(width=0.25, num_classes=10)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        width: Number = 1.0,
        depth: Number = 1.0,
        *,
        stages: tuple[Stage, ...] = B0_STAGES,
        stem_channels: int = 32,
        stem_stride: int = 2,
        head_channels: int = 1280,
        divisor: int = 8,
        num_classes: int = 1000,
        in_chans: int = 3,
        resolution: int = 224,
        drop_rate: Number = 0.2,
        drop_path_rate: Number = 0.2,
        padding: Padding = "same",
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.01,
    ) -> None:
        super().__init__(
            tuple(
                stage._replace(
                    repeats=round_repeats(stage.repeats, depth),
                    channels=round_filters(stage.channels, width, divisor),
                )
                for stage in stages
            ),
            stem_channels=round_filters(stem_channels, width, divisor),
            head_channels=round_filters(head_channels, width, divisor),
            stem_stride=stem_stride,
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            padding=padding,
            bn_eps=bn_eps,
            bn_momentum=bn_momentum,
            default_cfg={
                "input_size": (in_chans, resolution, resolution),
                "mean": (0.485, 0.456, 0.406),
                "std": (0.229, 0.224, 0.225),
                "interpolation": "bicubic",
                "crop_pct": round(resolution / (resolution + 32), 3),
            },
        )

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Renames the keys of a checkpoint to ours, which are timm's; unknown keys stay as they are.

        Read are timm's, torchvision's, ``efficientnet_pytorch``'s and the official TensorFlow names, each also under
        a prefix ("module.", "backbone.", "model.").
        """
        if any(key.split("/", 1)[-1].startswith("stem/") for key in state):
            return convert_tensorflow(state)
        for prefix in ("module.", "backbone.", "model."):
            if state and all(key.startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
        if "features.0.0.weight" in state:
            return convert_torchvision(state)
        if "_conv_stem.weight" in state:
            return convert_flat(state)
        return dict(state)


# --- Table 2: B0-B7, and two larger ones of the official code --------------------------------------------------------


def _variant(name: str, variant: str, padding: Padding, bn_eps: float) -> Callable[..., EfficientNet]:
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
        bn_momentum: float = 0.01,
    ) -> EfficientNet:
        return EfficientNet(
            numbers.width,
            numbers.depth,
            num_classes=num_classes,
            in_chans=in_chans,
            resolution=numbers.resolution,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            padding=padding,
            bn_eps=bn_eps,
            bn_momentum=bn_momentum,
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = (
        f"EfficientNet-{variant.upper()}: width {numbers.width}, depth {numbers.depth}, {numbers.resolution} px, "
        f'dropout {numbers.drop_rate}, padding "{default_padding}", BN epsilon {default_eps}.'
    )
    return build


# the paper's padding and epsilon; TensorFlow checkpoints need them
tf_efficientnet_b0 = _variant("tf_efficientnet_b0", "b0", "same", 1e-3)
tf_efficientnet_b1 = _variant("tf_efficientnet_b1", "b1", "same", 1e-3)
tf_efficientnet_b2 = _variant("tf_efficientnet_b2", "b2", "same", 1e-3)
tf_efficientnet_b3 = _variant("tf_efficientnet_b3", "b3", "same", 1e-3)
tf_efficientnet_b4 = _variant("tf_efficientnet_b4", "b4", "same", 1e-3)
tf_efficientnet_b5 = _variant("tf_efficientnet_b5", "b5", "same", 1e-3)
tf_efficientnet_b6 = _variant("tf_efficientnet_b6", "b6", "same", 1e-3)
tf_efficientnet_b7 = _variant("tf_efficientnet_b7", "b7", "same", 1e-3)
tf_efficientnet_b8 = _variant("tf_efficientnet_b8", "b8", "same", 1e-3)
tf_efficientnet_l2 = _variant("tf_efficientnet_l2", "l2", "same", 1e-3)

# PyTorch's habits: symmetric padding, epsilon 1e-5; for checkpoints trained that way
efficientnet_b0 = _variant("efficientnet_b0", "b0", "symmetric", 1e-5)
efficientnet_b1 = _variant("efficientnet_b1", "b1", "symmetric", 1e-5)
efficientnet_b2 = _variant("efficientnet_b2", "b2", "symmetric", 1e-5)
efficientnet_b3 = _variant("efficientnet_b3", "b3", "symmetric", 1e-5)
efficientnet_b4 = _variant("efficientnet_b4", "b4", "symmetric", 1e-5)
efficientnet_b5 = _variant("efficientnet_b5", "b5", "symmetric", 1e-5)
efficientnet_b6 = _variant("efficientnet_b6", "b6", "symmetric", 1e-5)
efficientnet_b7 = _variant("efficientnet_b7", "b7", "symmetric", 1e-5)
efficientnet_b8 = _variant("efficientnet_b8", "b8", "symmetric", 1e-5)
efficientnet_l2 = _variant("efficientnet_l2", "l2", "symmetric", 1e-5)
