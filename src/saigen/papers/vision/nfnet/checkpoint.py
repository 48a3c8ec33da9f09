"""The official code's parameters, renamed to our layout, which is timm's."""

import re
from collections.abc import Mapping

import torch
from numpy.typing import NDArray
from torch import Tensor

_HAIKU = re.compile(r"stem_conv\d|initial_conv|final_conv|linear|nf(_res)?_block(_\d+)?")


def convert_haiku(arrays: Mapping[str, NDArray | Tensor]) -> dict[str, Tensor]:
    """The official code's parameters, ``NFNet/~/nf_block_3/~/conv1b/w`` -> array, as our state dict.

    Kernels turn from (h, w, in, out) to (out, in, h, w) and linear weights from (in, out) to (out, in). The official
    code keeps its blocks in one row; a stage begins at each block that has ``conv_shortcut``.
    """
    tree: dict[tuple[str, ...], Tensor] = {}
    for key, value in arrays.items():
        path = tuple(part for part in key.split("/") if part != "~")
        start = next((i for i, part in enumerate(path) if _HAIKU.fullmatch(part)), 0)
        tree[path[start:]] = torch.as_tensor(value)

    blocks = {path[0] for path in tree if "block" in path[0]}
    order = sorted(blocks, key=lambda name: int(name.rpartition("_")[2]) if name[-1].isdigit() else 0)
    places, stage, position = {}, -1, 0
    for name in order:
        stage, position = (stage + 1, 0) if (name, "conv_shortcut", "w") in tree else (stage, position + 1)
        places[name] = f"stages.{stage}.{position}"

    gated = "attn" if any("initial_conv" in path for path in tree) and "nf_res_block" not in blocks else "attn_last"
    layers = {
        "conv0": "conv1",
        "conv1": "conv2",
        "conv1b": "conv2b",
        "conv2": "conv3",
        "conv_shortcut": "downsample.conv",
        "squeeze_excite.linear": f"{gated}.fc1",
        "squeeze_excite.linear_1": f"{gated}.fc2",
        "linear": "head.fc",
        "initial_conv": "stem.conv",
        "final_conv": "final_conv",
        **{f"stem_conv{i}": f"stem.conv{i + 1}" for i in range(4)},
    }
    converted = {}
    for (*module, kind), value in tree.items():
        place = [places[module[0]]] if module and module[0] in places else []
        layer = ".".join(module[len(place) :])
        name = ".".join([*place, *([layers.get(layer, layer)] if layer else [])])
        if kind == "w":
            value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.t()
            if "squeeze_excite" in layer:
                value = value[:, :, None, None]
        elif kind == "gain":
            value = value.reshape(-1, 1, 1, 1)
        kind = {"w": "weight", "b": "bias", "skip_gain": "skipinit_gain"}.get(kind, kind)
        converted[f"{name}.{kind}"] = value.contiguous()
    return converted
