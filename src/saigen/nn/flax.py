"""The arrays of the official Flax Vision Transformers, hybrids included, in timm's key layout."""

import re

from torch import Tensor, cat

from saigen.nn.mlp_mixer import flax_array

_OUTSIDE = {
    "embedding/kernel": "patch_embed.proj.weight",
    "embedding/bias": "patch_embed.proj.bias",
    "cls": "cls_token",
    "Transformer/posembed_input/pos_embedding": "pos_embed",
    "Transformer/encoder_norm/scale": "norm.weight",
    "Transformer/encoder_norm/bias": "norm.bias",
    "head/kernel": "head.weight",
    "head/bias": "head.bias",
}
_ENCODER = re.compile(r"^Transformer/encoderblock_(\d+)/(.+)/(kernel|bias|scale)$")
# Published checkpoints number the modules of a block through (0 to 3); newer Flax starts anew for every kind.
_IN_ENCODER = {
    "LayerNorm_0": "norm1",
    "LayerNorm_1": "norm2",
    "LayerNorm_2": "norm2",
    "MlpBlock_0/Dense_0": "mlp.fc1",
    "MlpBlock_0/Dense_1": "mlp.fc2",
    "MlpBlock_3/Dense_0": "mlp.fc1",
    "MlpBlock_3/Dense_1": "mlp.fc2",
}
_ATTENTION = re.compile(r"MultiHeadDotProductAttention_[01]/(query|key|value|out)")
_QKV = ("query", "key", "value")
_ROOT = re.compile(r"^(conv|gn)_root/(kernel|bias|scale)$")
_UNIT = re.compile(r"^block(\d+)/unit(\d+)/(conv|gn)(\d|_proj)/(kernel|bias|scale)$")


def vit_from_flax(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's ViT key layout from the official Flax arrays; keys of any other layout stay as they are.

    Queries, keys and values are (width, heads, head width) there and one matrix of 3 x width rows here. The ResNet in
    front of a hybrid becomes ``patch_embed.backbone``: of a stem alone (R+Ti/16) the stem's layers directly, else
    ``stem`` and ``stages``. A prefix (``opt/target/``, ``params/``) is taken off.

    >>> import torch
    >>> list(vit_from_flax({"Transformer/encoderblock_5/MlpBlock_3/Dense_0/kernel": torch.zeros(192, 768)}))
    ['blocks.5.mlp.fc1.weight']
    """
    ours: dict[str, Tensor] = {}
    parts: dict[str, dict[str, tuple[str, Tensor]]] = {}
    names = {given: re.sub(r"^(opt/target/|params/)", "", given) for given in state}
    stem = "patch_embed.backbone.stem" if any(map(_UNIT.match, names.values())) else "patch_embed.backbone"
    for given, key in names.items():
        value, last = state[given], key.rpartition("/")[2]
        kind = "bias" if last == "bias" else "weight"
        if key in _OUTSIDE:
            ours[_OUTSIDE[key]] = flax_array(value, last)
        elif root := _ROOT.match(key):
            layer = "conv" if root[1] == "conv" else "norm"
            ours[f"{stem}.{layer}.{kind}"] = flax_array(value, last) if value.ndim == 4 else value.reshape(-1)
        elif unit := _UNIT.match(key):
            ours[_unit_key(unit, kind)] = flax_array(value, last) if value.ndim == 4 else value.reshape(-1)
        elif (block := _ENCODER.match(key)) is None:
            ours[given] = value
        elif block[2] in _IN_ENCODER:
            ours[f"blocks.{block[1]}.{_IN_ENCODER[block[2]]}.{kind}"] = flax_array(value, last)
        elif (attention := _ATTENTION.fullmatch(block[2])) is None:
            ours[given] = value
        elif attention[1] == "out":
            rows = value.reshape(-1, value.shape[-1]).T.contiguous() if kind == "weight" else value
            ours[f"blocks.{block[1]}.attn.proj.{kind}"] = rows
        else:
            rows = value.reshape(value.shape[0], -1).T if kind == "weight" else value.reshape(-1)
            parts.setdefault(f"blocks.{block[1]}.attn.qkv.{kind}", {})[attention[1]] = (given, rows)
    for key, part in parts.items():
        if len(part) == len(_QKV):
            ours[key] = cat([part[name][1] for name in _QKV])
        else:  # an incomplete checkpoint: whoever loads it can name what is there
            ours |= dict(part.values())
    return ours


def _unit_key(unit: re.Match[str], kind: str) -> str:
    """A bottleneck's layer: block1/unit1/conv_proj is stages.0.blocks.0.downsample.conv, gn2 is norm2."""
    layer = "conv" if unit[3] == "conv" else "norm"
    place = f"downsample.{layer}" if unit[4] == "_proj" else f"{layer}{unit[4]}"
    return f"patch_embed.backbone.stages.{int(unit[1]) - 1}.blocks.{int(unit[2]) - 1}.{place}.{kind}"
