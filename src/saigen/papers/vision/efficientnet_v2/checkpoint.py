"""EfficientNetV2 checkpoints in the layouts of other code, renamed to ours, which is timm's."""

import re
from collections.abc import Mapping

import torch
from numpy.typing import NDArray
from torch import Tensor

from saigen.nn.tensorflow import torch_variables

_MBCONV = ("conv_pw", "bn1", "conv_dw", "bn2", "se.conv_reduce", "se.conv_expand", "conv_pwl", "bn3")
_FUSED = ("conv_exp", "bn1", "conv_pwl", "bn2")
_FUSED_ONE = ("conv", "bn1")
_BN = "tpu_batch_normalization"
_TORCHVISION = {
    _MBCONV: ("0.0", "0.1", "1.0", "1.1", "2.fc1", "2.fc2", "3.0", "3.1"),
    _FUSED: ("0.0", "0.1", "1.0", "1.1"),
    _FUSED_ONE: ("0.0", "0.1"),
}
_TENSORFLOW = {
    _MBCONV: ("conv2d", _BN, "depthwise_conv2d", f"{_BN}_1", "se/conv2d", "se/conv2d_1", "conv2d_1", f"{_BN}_2"),
    _FUSED: ("conv2d", _BN, "conv2d_1", f"{_BN}_1"),
    _FUSED_ONE: ("conv2d", _BN),
}


def convert_torchvision_v2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's layout: ``features.{stage}.{block}.block.{layer}`` and ``classifier.1``."""
    last = max(int(key.split(".")[1]) for key in state if key.startswith("features."))
    outer = {
        "features.0.0": "conv_stem",
        "features.0.1": "bn1",
        f"features.{last}.0": "conv_head",
        f"features.{last}.1": "bn2",
        "classifier.1": "classifier",
    }
    converted = {}
    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        if inner := re.fullmatch(r"features\.(\d+)\.(\d+)\.block\.(.+)", layer):
            stage, block, part = inner.groups()
            scope = f"features.{stage}.{block}.block"
            ours = (
                _MBCONV if f"{scope}.3.0.weight" in state else _FUSED if f"{scope}.1.0.weight" in state else _FUSED_ONE
            )
            if part in _TORCHVISION[ours]:
                layer = f"blocks.{int(stage) - 1}.{block}.{ours[_TORCHVISION[ours].index(part)]}"
        converted[f"{outer.get(layer, layer)}.{kind}"] = value
    return converted


def convert_tensorflow_v2(arrays: Mapping[str, NDArray | Tensor], *, ema: bool = True) -> dict[str, Tensor]:
    """The official TensorFlow checkpoint, name -> array, as our state dict.

    Names look like ``efficientnetv2-s/blocks_3/conv2d_1/kernel``. With ``ema`` the shadow
    (``…/ExponentialMovingAverage``) is taken where there is one, as in the paper's evaluation.
    """
    outer = {
        "stem/conv2d": "conv_stem",
        f"stem/{_BN}": "bn1",
        "head/conv2d": "conv_head",
        f"head/{_BN}": "bn2",
        "head/dense": "classifier",
    }
    parsed = []
    for (layer, kind), tensor in torch_variables(arrays, ema=ema).items():
        inner = re.fullmatch(r"blocks_(\d+)/(.+)", layer)
        if inner or layer in outer:
            parsed.append((layer, inner, kind, tensor))
    names: dict[int, set[str]] = {}
    for _, inner, *_ in parsed:
        if inner:
            names.setdefault(int(inner[1]), set()).add(inner[2])
    kind_of = {
        block: _MBCONV if "depthwise_conv2d" in layers else _FUSED if "conv2d_1" in layers else _FUSED_ONE
        for block, layers in names.items()
    }
    widths = {
        int(inner[1]): value.shape[0]
        for _, inner, kind, value in parsed
        if inner and kind == "weight" and value.ndim == 4 and inner[2] == _last_convolution(kind_of[int(inner[1])])
    }
    places = _places([widths[block] for block in sorted(widths)])
    converted = {}
    for layer, inner, kind, tensor in parsed:
        if inner:
            block = int(inner[1])
            ours, theirs = kind_of[block], _TENSORFLOW[kind_of[block]]
            if inner[2] not in theirs:
                continue
            target = f"{places[block]}.{ours[theirs.index(inner[2])]}"
        else:
            target = outer[layer]
        converted[f"{target}.{kind}"] = tensor
        if kind == "running_var":  # TensorFlow keeps no counter
            converted[f"{target}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    return converted


def _last_convolution(kind: tuple[str, ...]) -> str:
    return "conv2d" if kind == _FUSED_ONE else "conv2d_1"


def _places(widths: list[int]) -> list[str]:
    # a new stage begins where the number of channels changes; in every published variant it does change
    places, stage, position = [], 0, -1
    for block, width in enumerate(widths):
        stage, position = (stage, position + 1) if block == 0 or width == widths[block - 1] else (stage + 1, 0)
        places.append(f"blocks.{stage}.{position}")
    return places
