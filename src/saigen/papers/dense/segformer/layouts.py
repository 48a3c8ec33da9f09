"""The key layouts that SegFormer checkpoints come in, all brought to the official one, which is ours."""

import re

import torch
from torch import Tensor

# Transformers renamed its modules in version 5 but still writes the older names to files; both are read.
RENAMES = [
    (r"^module\.", ""),
    (r"^segformer\.", "backbone."),
    (r"^(backbone\.|)encoder\.", r"\1"),
    (r"^(backbone\.|)(?:patch_embeddings\.(\d)|stages\.(\d)\.patch_embeddings)\.", r"\1patch_embed<\2\3>."),
    (r"^(backbone\.|)(?:block\.(\d)|stages\.(\d)\.blocks)\.(\d+)\.", r"\1block<\2\3>.\4."),
    (r"^(backbone\.|)(?:layer_norm\.(\d)|stages\.(\d)\.layer_norm)\.", r"\1norm<\2\3>."),
    (r"(patch_embed<\d>)\.layer_norm\.", r"\1.norm."),
    (r"\.(?:layer_norm_1|layernorm_before)\.", ".norm1."),
    (r"\.(?:layer_norm_2|layernorm_after)\.", ".norm2."),
    (r"\.attention\.(?:self\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(?:self\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(?:self\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(?:self\.sr|sequence_reduction\.sequence_reduction)\.", ".attn.sr."),
    (r"\.attention\.(?:self|sequence_reduction)\.layer_norm\.", ".attn.norm."),
    (r"\.mlp\.dense(\d)\.", r".mlp.fc\1."),
    (r"^decode_head\.(?:linear_c|linear_projections)\.(\d)\.", r"decode_head.linear_c<\1>."),
    (r"^decode_head\.linear_fuse\.weight$", "decode_head.linear_fuse.conv.weight"),
    (r"^decode_head\.batch_norm\.", "decode_head.linear_fuse.bn."),
    (r"^decode_head\.classifier\.", "decode_head.linear_pred."),
    (r"^classifier\.", "head."),
    (r"<(\d)>", lambda match: str(int(match[1]) + 1)),  # stages count from 0 there, from 1 here
]


def official_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keys renamed to the official layout, keys and values of the attention joined; unknown keys stay."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in RENAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    joined = {}
    for key, value in renamed.items():
        partner = key.replace(".attn.k.", ".attn.v.")
        if ".attn.k." in key and partner in renamed:
            joined[key.replace(".attn.k.", ".attn.kv.")] = torch.cat([value, renamed[partner]])
        elif not (".attn.v." in key and key.replace(".attn.v.", ".attn.k.") in renamed):
            joined[key] = value
    return joined
