"""The Vision Transformer (Dosovitskiy et al., 2021, arXiv 2010.11929), as DeiT has it, in timm's key layout."""

import re
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from saigen.nn.attention import MLP, Attention
from saigen.nn.classifier import Classifier
from saigen.nn.drop_path import DropPath


class PatchEmbed(nn.Module):
    """Cuts the image into patches that do not overlap and projects each: (b, c, h, w) -> (b, h/p · w/p, dim)."""

    def __init__(self, patch_size: int = 16, in_chans: int = 3, dim: int = 768) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        return self.proj(x).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """One pre-norm transformer block: x + s·attention(norm(x)), then x + s·MLP(norm(x)).

    ``branch_scale`` is s: 1 in ViT, one half in LV-ViT.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        gelu: Literal["none", "tanh"] = "none",
        norm_eps: float = 1e-6,
        branch_scale: float = 1.0,
        fused_attn: bool = True,
    ) -> None:
        super().__init__()
        self.branch_scale = branch_scale
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=drop, fused=fused_attn)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio), gelu=gelu, drop=drop)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        x = x.add(self.drop_path1(self.attn(self.norm1(x))), alpha=self.branch_scale)
        return x.add(self.drop_path2(self.mlp(self.norm2(x))), alpha=self.branch_scale)


class VisionTransformer(Classifier):
    """Vision Transformer classifier: patches, class token, learned positions, ``depth`` blocks, norm, linear head.

    Takes images (b, in_chans, h, w) of size ``img_size`` (an int or (h, w), in pixels, multiples of ``patch_size``) and
    gives logits (b, num_classes), or features (b, embed_dim) where ``num_classes`` is 0.

    - ``global_pool``: "token" classifies the normed class token; "avg" the mean of the spatial tokens, normed after the
      mean as in timm (key ``fc_norm``) or, with ``fc_norm=False``, before it (key ``norm``).
    - ``drop_rate``: the paper's dropout, after the positions, each attention projection and each MLP layer.
      ``drop_path_rate`` grows linearly over the blocks from 0 to this rate.
    - ``gelu``: "none" is exact (timm, DeiT, PyTorch), "tanh" the approximation that JAX's ViT was trained with.
    - ``init``: "trunc_normal" (timm, DeiT: std 0.02 for every linear layer) or "jax" (the paper's code: Xavier-uniform,
      zero head).
    - ``fused_attn=False`` leaves attention to plain operations, which can be differentiated twice.

    A state dict saved at another image size loads: its positions are interpolated (``resize_positions``).
    Raises ``ValueError`` for sizes that do not divide and for inputs of another shape.

    >>> VisionTransformer(img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=4)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 1000])
    """

    classifier_name = "head"

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        class_token: bool = True,
        global_pool: Literal["token", "avg"] = "token",
        fc_norm: bool | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        gelu: Literal["none", "tanh"] = "none",
        norm_eps: float = 1e-6,
        init: Literal["trunc_normal", "jax"] = "trunc_normal",
        fused_attn: bool = True,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if patch_size < 1 or height < patch_size or width < patch_size or height % patch_size or width % patch_size:
            raise ValueError(f"img_size is {img_size}, allowed are multiples of patch_size, which is {patch_size}")
        if depth < 1:
            raise ValueError(f"depth is {depth}, allowed is depth >= 1")
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}, allowed is num_classes >= 0")
        if global_pool not in ("token", "avg"):
            raise ValueError(f"global_pool is {global_pool!r}, allowed is 'token' or 'avg'")
        if global_pool == "token" and not class_token:
            raise ValueError("global_pool is 'token' but class_token is False, allowed is 'avg' without a class token")
        if init not in ("trunc_normal", "jax"):
            raise ValueError(f"init is {init!r}, allowed is 'trunc_normal' or 'jax'")
        fc_norm = global_pool == "avg" if fc_norm is None else fc_norm
        self.img_size = (height, width)
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.grid_size = (height // patch_size, width // patch_size)
        self.num_prefix_tokens = int(class_token)
        self.global_pool = global_pool
        self.num_classes = num_classes
        self.num_features = self.embed_dim = embed_dim
        self.depth = depth
        self.default_cfg = {
            "input_size": (in_chans, height, width),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "interpolation": "bicubic",
            "crop_pct": 0.9,
        }

        tokens = self.num_prefix_tokens + self.grid_size[0] * self.grid_size[1]
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    num_heads,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    drop=drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=drop_path_rate * i / max(depth - 1, 1),
                    gelu=gelu,
                    norm_eps=norm_eps,
                    fused_attn=fused_attn,
                )
                for i in range(depth)
            )
        )
        self.norm = nn.Identity() if fc_norm else nn.LayerNorm(embed_dim, eps=norm_eps)
        self.fc_norm = nn.LayerNorm(embed_dim, eps=norm_eps) if fc_norm else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.init_weights(init)
        self.register_load_state_dict_pre_hook(fit_positions)

    def init_weights(self, init: Literal["trunc_normal", "jax"]) -> None:
        """Draws fresh weights from the global generator."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if init == "trunc_normal":
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif name == "head":
                nn.init.zeros_(module.weight)
            elif name.endswith("qkv"):
                # three square matrices in one: the fan that counts is a single one's
                bound = (6.0 / (module.weight.shape[0] // 3 + module.weight.shape[1])) ** 0.5
                nn.init.uniform_(module.weight, -bound, bound)
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                if init == "jax" and ".mlp." in name:
                    nn.init.normal_(module.bias, std=1e-6)
                else:
                    nn.init.zeros_(module.bias)
        if init == "jax":
            projection = self.patch_embed.proj
            nn.init.trunc_normal_(projection.weight, std=projection.weight[0].numel() ** -0.5)
            nn.init.zeros_(projection.bias)

    def embed(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Patch embeddings behind the class token, positions added: what the first block takes."""
        return embed_image(self, x)

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """All tokens after the last block and ``norm``, the class token first."""
        return self.norm(self.blocks(self.embed(x)))

    def forward_head(self, x: Float[Tensor, "b n d"], pre_logits: bool = False) -> Float[Tensor, "b k"]:
        """Logits from the tokens of ``forward_features``; with ``pre_logits`` the pooled features instead."""
        x = x[:, 0] if self.global_pool == "token" else x[:, self.num_prefix_tokens :].mean(dim=1)
        x = self.fc_norm(x)
        return x if pre_logits else self.head(x)

    def new_classifier(self, num_classes: int) -> nn.Linear:
        return fresh_head(self.norm if isinstance(self.norm, nn.LayerNorm) else self.fc_norm, num_classes)

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our layout from timm's, DeiT's or Transformers' (``ViTForImageClassification``); other keys stay."""
        return convert_vit_state_dict(state)


def embed_image(model: nn.Module, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
    """``model``'s patch embeddings of ``x`` behind its class token (if it has one), its positions added.

    Raises ``ValueError`` where ``x`` is not of ``model.in_chans`` channels and ``model.img_size``.
    """
    if x.shape[1] != model.in_chans or tuple(x.shape[2:]) != model.img_size:
        allowed = f"(batch, {model.in_chans}, {model.img_size[0]}, {model.img_size[1]})"
        raise ValueError(f"x has shape {tuple(x.shape)}, allowed is {allowed}")
    x = model.patch_embed(x)
    if model.cls_token is not None:
        x = torch.cat((model.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
    return model.pos_drop(x + model.pos_embed)


def fresh_head(norm: nn.LayerNorm, num_classes: int) -> nn.Linear:
    """A new linear head behind ``norm``, on its device and in its type."""
    head = nn.Linear(norm.normalized_shape[0], num_classes).to(norm.weight)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def resize_positions(
    pos_embed: Float[Tensor, "1 n d"], grid: tuple[int, int], num_prefix_tokens: int = 1
) -> Float[Tensor, "1 m d"]:
    """Positions for another grid of patches: bicubic and antialiased, from a square grid; prefix tokens keep theirs.

    Raises ``ValueError`` where the given positions are not those of a square grid.

    >>> resize_positions(torch.zeros(1, 1 + 14 * 14, 64), grid=(24, 24)).shape
    torch.Size([1, 577, 64])
    """
    prefix, spatial = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    side = round(spatial.shape[1] ** 0.5)
    if side * side != spatial.shape[1] or side == 0:
        raise ValueError(f"pos_embed has {spatial.shape[1]} spatial positions, allowed is a square number")
    image = spatial.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=grid, mode="bicubic", antialias=True)
    return torch.cat((prefix, image.flatten(2).transpose(1, 2).to(pos_embed.dtype)), dim=1)


def fit_positions(model: nn.Module, state: dict[str, Tensor], prefix: str, *_) -> None:
    """A hook for ``register_load_state_dict_pre_hook``: resizes the positions of a state dict to the model's grid."""
    given = state.get(prefix + "pos_embed")
    if given is None or given.ndim != 3 or given.shape[1:] == model.pos_embed.shape[1:]:
        return
    if given.shape[2] == model.embed_dim:
        state[prefix + "pos_embed"] = resize_positions(given, model.grid_size, model.num_prefix_tokens)


# Transformers' names and ours, as patterns: the longest paths first.
_FROM_TRANSFORMERS = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.attention\.(?:output\.dense|o_proj)\.", r"blocks.\1.attn.proj."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.(?:intermediate\.dense|mlp\.fc1)\.", r"blocks.\1.mlp.fc1."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.(?:output\.dense|mlp\.fc2)\.", r"blocks.\1.mlp.fc2."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
_TRANSFORMERS_QKV = re.compile(
    r"^(?:encoder\.layer|layers)\.(\d+)\.attention\.(?:attention\.(query|key|value)|([qkv])_proj)\.(weight|bias)$"
)


def convert_vit_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's ViT key layout from timm's, DeiT's or Transformers' names, wrappers (``module.`` …) taken off.

    Unknown keys are left alone, so that whoever loads the result can name them.
    """
    converted: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        key = re.sub(r"^(module\.|model\.|backbone\.|vit\.|deit\.)+", "", key)
        if match := _TRANSFORMERS_QKV.match(key):
            block, long, short, kind = match.groups()
            parts.setdefault(f"blocks.{block}.attn.qkv.{kind}", {})[(long or short)[0]] = value
            continue
        for pattern, ours in _FROM_TRANSFORMERS:
            key = re.sub(pattern, ours, key)
        converted[key] = value
    for key, part in parts.items():
        # a checkpoint that lacks one of the three is incomplete: leave what is there under a name nobody expects
        if part.keys() == {"q", "k", "v"}:
            converted[key] = torch.cat([part[name] for name in "qkv"])
        else:
            converted |= {f"{key}.{name}": value for name, value in part.items()}
    return converted
