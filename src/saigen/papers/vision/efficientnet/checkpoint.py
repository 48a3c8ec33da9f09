"""EfficientNet checkpoints in the layouts of other code, renamed to ours, which is timm's."""

import re
from collections.abc import Mapping

import torch
from numpy.typing import NDArray
from torch import Tensor

from saigen.nn.tensorflow import torch_variables

# per block, in the order of execution: layer by layer, our name with and without an expansion
_OURS = {
    True: ("conv_pw", "bn1", "conv_dw", "bn2", "se.conv_reduce", "se.conv_expand", "conv_pwl", "bn3"),
    False: (None, None, "conv_dw", "bn1", "se.conv_reduce", "se.conv_expand", "conv_pw", "bn2"),
}
_FLAT = (
    "_expand_conv",
    "_bn0",
    "_depthwise_conv",
    "_bn1",
    "_se_reduce",
    "_se_expand",
    "_project_conv",
    "_bn2",
)


def convert_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's layout: ``features.{stage}.{block}.block.{layer}`` and ``classifier.1``."""
    last = max(int(key.split(".")[1]) for key in state if key.startswith("features."))
    outer = {
        "features.0.0": "conv_stem",
        "features.0.1": "bn1",
        f"features.{last}.0": "conv_head",
        f"features.{last}.1": "bn2",
        "classifier.1": "classifier",
    }
    theirs = {
        True: (
            "block.0.0",
            "block.0.1",
            "block.1.0",
            "block.1.1",
            "block.2.fc1",
            "block.2.fc2",
            "block.3.0",
            "block.3.1",
        ),
        False: (None, None, "block.0.0", "block.0.1", "block.1.fc1", "block.1.fc2", "block.2.0", "block.2.1"),
    }
    converted = {}
    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        if inner := re.fullmatch(r"features\.(\d+)\.(\d+)\.(block\..+)", layer):
            stage, block, part = inner.groups()
            expands = f"features.{stage}.{block}.block.3.0.weight" in state
            if part in theirs[expands]:
                name = _OURS[expands][theirs[expands].index(part)]
                layer = f"blocks.{int(stage) - 1}.{block}.{name}"
        converted[f"{outer.get(layer, layer)}.{kind}"] = value
    return converted


def convert_flat(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``efficientnet_pytorch``'s layout: ``_blocks.{block}.{layer}``, one list of blocks for all stages."""
    # a new stage begins where the number of channels changes; in every published variant it does change
    places, stage, position, channels = {}, 0, -1, None
    for block in range(1 + max(int(key.split(".")[1]) for key in state if key.startswith("_blocks."))):
        out = state[f"_blocks.{block}._project_conv.weight"].shape[0]
        stage, position = (stage, position + 1) if out == channels or channels is None else (stage + 1, 0)
        places[block], channels = f"blocks.{stage}.{position}", out
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    converted = {}
    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        if inner := re.fullmatch(r"_blocks\.(\d+)\.(\w+)", layer):
            block, part = int(inner[1]), inner[2]
            expands = f"_blocks.{block}._expand_conv.weight" in state
            if part in _FLAT:
                layer = f"{places[block]}.{_OURS[expands][_FLAT.index(part)]}"
        converted[f"{outer.get(layer, layer)}.{kind}"] = value
        if kind == "running_var":  # old checkpoints have no counter
            counter = f"{outer.get(layer, layer)}.num_batches_tracked"
            converted.setdefault(counter, torch.zeros((), dtype=torch.int64))
    return converted


def convert_tensorflow(arrays: Mapping[str, NDArray | Tensor], *, ema: bool = True) -> dict[str, Tensor]:
    """The official TensorFlow checkpoint, name -> array, as our state dict.

    Names look like ``efficientnet-b0/blocks_3/conv2d_1/kernel``. With ``ema`` the shadow
    (``…/ExponentialMovingAverage``) is taken where there is one, as in the paper's evaluation.
    """
    outer = {
        "stem/conv2d": "_conv_stem",
        "stem/tpu_batch_normalization": "_bn0",
        "head/conv2d": "_conv_head",
        "head/tpu_batch_normalization": "_bn1",
        "head/dense": "_fc",
    }
    bn = "tpu_batch_normalization"
    inner = {
        True: ("conv2d", bn, "depthwise_conv2d", f"{bn}_1", "se/conv2d", "se/conv2d_1", "conv2d_1", f"{bn}_2"),
        False: (None, None, "depthwise_conv2d", bn, "se/conv2d", "se/conv2d_1", "conv2d", f"{bn}_1"),
    }
    variables, flat = torch_variables(arrays, ema=ema), {}
    for (layer, kind), tensor in variables.items():
        if block := re.fullmatch(r"blocks_(\d+)/(.+)", layer):
            expands = (f"blocks_{block[1]}/conv2d_1", "weight") in variables
            if block[2] not in inner[expands]:
                continue
            key = f"_blocks.{block[1]}.{_FLAT[inner[expands].index(block[2])]}"
        elif layer in outer:
            key = outer[layer]
        else:
            continue
        flat[f"{key}.{kind}"] = tensor
    return convert_flat(flat)
