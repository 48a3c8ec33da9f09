"""SegFormer (Xie et al., NeurIPS 2021, arXiv 2105.15203): a hierarchical Transformer encoder without positional
encodings (Mix Transformer, MiT) and a decoder made of linear layers only, for semantic segmentation.

Tokens stay in the layout ``(b, n, c)`` throughout. Seen as ``(b, c, h, w)`` that is ``channels_last``, so that going
between attention, linear layers and convolutions copies nothing.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from saigen.nn.classifier import Classifier
from saigen.nn.drop_path import DropPath
from saigen.papers.dense.segformer.layouts import official_layout

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Table 6 of the paper: channels C_i, depths L_i, and the decoder's channels C. The heads N_i = 1, 2, 5, 8, the expansion
# E_i = 4 and the strides of the reduction, whose squares are the paper's R_i = 64, 16, 4, 1, are the same for all.
WIDTHS = {"b0": (32, 64, 160, 256)} | {f"b{i}": (64, 128, 320, 512) for i in range(1, 6)}
DEPTHS = {
    "b0": (2, 2, 2, 2),
    "b1": (2, 2, 2, 2),
    "b2": (3, 4, 6, 3),
    "b3": (3, 4, 18, 3),
    "b4": (3, 8, 27, 3),
    "b5": (3, 6, 40, 3),
}
DECODER = {"b0": 256, "b1": 256, "b2": 768, "b3": 768, "b4": 768, "b5": 768}


def as_map(tokens: Float[Tensor, "b n c"], h: int, w: int) -> Float[Tensor, "b c h w"]:
    """Tokens seen as a feature map, without a copy."""
    return tokens.unflatten(1, (h, w)).permute(0, 3, 1, 2)


def as_tokens(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
    """A feature map seen as tokens, row by row; no copy where it is ``channels_last``."""
    return x.flatten(2).transpose(1, 2)


class OverlapPatchEmbed(nn.Module):
    """Overlapped patch merging (section 3.1): patches of K pixels, a stride of S, padding K // 2, then a LayerNorm."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride, padding=kernel_size // 2)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n d"], int, int]:
        x = self.proj(x)
        return self.norm(as_tokens(x)), x.shape[2], x.shape[3]


class EfficientSelfAttention(nn.Module):
    """Self-attention whose keys and values come from a map shrunk by ``sr_ratio`` on each side (equations 1 and 2).

    The cost falls from O(N^2) to O(N^2 / R) with R = sr_ratio^2. With ``sr_ratio`` 1 it is standard attention.
    """

    def __init__(self, dim: int, num_heads: int, sr_ratio: int) -> None:
        super().__init__()
        self.num_heads, self.sr_ratio = num_heads, sr_ratio
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)  # keys first, then values
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n c"], h: int, w: int) -> Float[Tensor, "b n c"]:
        reduced = self.norm(as_tokens(self.sr(as_map(x, h, w)))) if self.sr_ratio > 1 else x
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(reduced).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(d_head)) v
        return self.proj(x.transpose(1, 2).flatten(2))


class DWConv(nn.Module):
    """The depthwise 3x3 convolution of Mix-FFN, on tokens; its zero padding is what tells where a token is."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Float[Tensor, "b n c"], h: int, w: int) -> Float[Tensor, "b n c"]:
        return as_tokens(self.dwconv(as_map(x, h, w)))


class MixFFN(nn.Module):
    """x_out = MLP(GELU(Conv3x3(MLP(x_in)))) (equation 3, the residual is the block's).

    ``mix=False`` leaves the convolution out: the plain FFN of the paper's ablation with positional encodings.
    """

    def __init__(self, dim: int, hidden: int, mix: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DWConv(hidden) if mix else None
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "b n c"], h: int, w: int) -> Float[Tensor, "b n c"]:
        x = self.fc1(x)
        if self.dwconv is not None:
            x = self.dwconv(x, h, w)
        return self.fc2(F.gelu(x))


class Block(nn.Module):
    """x += Attention(LN(x)), x += MixFFN(LN(x)), each with stochastic depth."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int,
        mlp_ratio: int | float,
        drop_path: int | float,
        mix: bool,
        eps: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = EfficientSelfAttention(dim, num_heads, sr_ratio)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MixFFN(dim, int(dim * mlp_ratio), mix)

    def forward(self, x: Float[Tensor, "b n c"], h: int, w: int) -> Float[Tensor, "b n c"]:
        x = x + self.drop_path(self.attn(self.norm1(x), h, w))
        return x + self.drop_path(self.mlp(self.norm2(x), h, w))


class MixTransformer(Classifier):
    """Mix Transformer (MiT): four stages of maps at strides 4, 8, 16, 32 with ``embed_dims`` channels.

    ``features(x)`` gives the four maps, ``forward(x)`` the logits of an ImageNet classifier: a linear layer on the mean
    of the last stage's tokens (``num_classes=0``: the mean itself). Any image size of at least 29 pixels will do; sides
    that 32 does not divide give maps of rounded-up sizes.

    ``mix_ffn=False`` and ``pos_embed_size`` (the side of the training images, or ``(height, width)``) make the encoder of
    the paper's ablation (Table 1c): plain FFNs, and a learned positional encoding at every stage, which is interpolated
    bicubically where the image has another size. Parameters and MACs of MiT-B0 to B5 are those of Table 6.

    Raises ``ValueError`` where the four stages' settings do not go together, or an image has too few pixels or another
    number of channels than ``in_chans``.

    >>> mit = MixTransformer((16, 32, 64, 96), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), num_classes=10)
    >>> mit(torch.rand(2, 3, 64, 64)).shape, [tuple(c.shape[1:]) for c in mit.features(torch.rand(2, 3, 64, 64))]
    (torch.Size([2, 10]), [(16, 16, 16), (32, 8, 8), (64, 4, 4), (96, 2, 2)])
    """

    classifier_name = "head"

    def __init__(
        self,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int] = (1, 2, 5, 8),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[int | float] = (4, 4, 4, 4),
        *,
        num_classes: int = 0,
        in_chans: int = 3,
        drop_path_rate: int | float = 0.1,
        mix_ffn: bool = True,
        pos_embed_size: int | tuple[int, int] | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        stages = {
            "embed_dims": embed_dims,
            "depths": depths,
            "num_heads": num_heads,
            "sr_ratios": sr_ratios,
            "mlp_ratios": mlp_ratios,
        }
        for name, values in stages.items():
            if len(values) != 4 or min(values) <= 0:
                raise ValueError(f"{name} is {tuple(values)}, allowed are four positive numbers, one a stage")
        for dim, heads in zip(embed_dims, num_heads, strict=True):
            if dim % heads:
                raise ValueError(
                    f"num_heads is {tuple(num_heads)}, allowed are numbers that divide embed_dims {tuple(embed_dims)}"
                )
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}, allowed is 0 (no classifier) or more")
        if in_chans < 1:
            raise ValueError(f"in_chans is {in_chans}, allowed is 1 or more")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate is {drop_path_rate}, allowed is 0 <= drop_path_rate < 1")
        self.embed_dims, self.num_classes, self.in_chans, self.num_features = (
            tuple(embed_dims),
            num_classes,
            in_chans,
            embed_dims[-1],
        )
        # A stage of stride s sees ceil(side / s) tokens, of which the reduction must leave at least one.
        self.min_size = max(4 * 2**i * (r - 1) + 1 for i, r in enumerate(sr_ratios))
        self.default_cfg = {
            "input_size": (in_chans, 224, 224),
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
        }
        size = (pos_embed_size, pos_embed_size) if isinstance(pos_embed_size, int) else pos_embed_size
        done, total = 0, sum(depths)
        for i in range(4):
            dim = embed_dims[i]
            embed = (
                OverlapPatchEmbed(in_chans, dim, 7, 4) if i == 0 else OverlapPatchEmbed(embed_dims[i - 1], dim, 3, 2)
            )
            # Stochastic depth grows linearly over all blocks, from 0 to drop_path_rate.
            rates = [drop_path_rate * (done + j) / max(1, total - 1) for j in range(depths[i])]
            done += depths[i]
            blocks = [Block(dim, num_heads[i], sr_ratios[i], mlp_ratios[i], rate, mix_ffn, norm_eps) for rate in rates]
            self.add_module(f"patch_embed{i + 1}", embed)
            self.add_module(f"block{i + 1}", nn.ModuleList(blocks))
            self.add_module(f"norm{i + 1}", nn.LayerNorm(dim, eps=norm_eps))
            if size is not None:
                size = tuple(math.ceil(side / (4 if i == 0 else 2)) for side in size)
                self.register_parameter(f"pos_embed{i + 1}", nn.Parameter(torch.empty(1, dim, *size)))
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.has_pos_embed = size is not None
        self.apply(_init_weights)
        if self.has_pos_embed:
            for i in range(4):
                nn.init.trunc_normal_(getattr(self, f"pos_embed{i + 1}"), std=0.02)

    def features(self, x: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """The four maps, at strides 4, 8, 16, 32."""
        if x.shape[1] != self.in_chans:
            raise ValueError(f"x has {x.shape[1]} channels, allowed is in_chans = {self.in_chans}")
        if min(x.shape[2:]) < self.min_size:
            raise ValueError(
                f"x is an image of {x.shape[2]}x{x.shape[3]} pixels, allowed are sides of {self.min_size} or more"
            )
        maps = []
        for i in range(1, 5):
            x, h, w = getattr(self, f"patch_embed{i}")(x)
            if self.has_pos_embed:
                x = x + self._positions(i, h, w)
            for block in getattr(self, f"block{i}"):
                x = block(x, h, w)
            x = as_map(getattr(self, f"norm{i}")(x), h, w)
            maps.append(x)
        return maps

    def _positions(self, stage: int, h: int, w: int) -> Tensor:
        positions = getattr(self, f"pos_embed{stage}")
        if positions.shape[2:] != (h, w):
            positions = F.interpolate(positions, (h, w), mode="bicubic", align_corners=False)
        return as_tokens(positions)

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d _ _"]:
        """The last stage's map, at stride 32."""
        return self.features(x)[-1]

    def forward_head(self, x: Float[Tensor, "b d h w"], pre_logits: bool = False) -> Float[Tensor, "b k"]:
        """The classifier on the mean over the map; ``pre_logits`` leaves it at the mean."""
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def new_classifier(self, num_classes: int) -> nn.Module:
        return super().new_classifier(num_classes).apply(_init_weights)

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Ours from the official or the Transformers layout, of a classifier or of a segmenter's encoder."""
        state = {key.removeprefix("backbone."): value for key, value in official_layout(state).items()}
        return {key: value for key, value in state.items() if not key.startswith("decode_head.")}


class MLP(nn.Module):
    """The linear layer on the tokens of one stage (equation 4, first line)."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, dim)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        return as_map(self.proj(as_tokens(x)), x.shape[2], x.shape[3])


class ConvModule(nn.Module):
    """The linear layer that fuses the stages, with batch norm and ReLU; no bias."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 1, bias=False)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        return F.relu(self.bn(self.conv(x)))


class SegFormerHead(nn.Module):
    """The all-MLP decoder (equation 4): a linear layer a stage, upsampling to stride 4, fusion, classifier.

    With ``early_fusion`` each stage's share of the fusion is computed before the upsampling instead of after it. Both are
    linear and act on different axes, so the result is the same up to rounding, for a fraction of the work.
    """

    def __init__(
        self, in_dims: Sequence[int], dim: int, num_classes: int, dropout: int | float, early_fusion: bool
    ) -> None:
        super().__init__()
        self.early_fusion = early_fusion
        for i, in_dim in enumerate(in_dims, start=1):
            self.add_module(f"linear_c{i}", MLP(in_dim, dim))
        self.linear_fuse = ConvModule(4 * dim, dim)
        self.dropout = nn.Dropout2d(dropout)  # whole channels
        self.linear_pred = nn.Conv2d(dim, num_classes, 1) if num_classes else nn.Identity()

    def fuse(self, maps: Sequence[Float[Tensor, "b _ _ _"]]) -> Float[Tensor, "b d h w"]:
        """The fused map at stride 4, before the classifier."""
        size = maps[0].shape[2:]
        stages = [getattr(self, f"linear_c{i}")(maps[i - 1]) for i in (4, 3, 2, 1)]  # fused in this order
        if not self.early_fusion:
            return self.dropout(self.linear_fuse(torch.cat([_resize(x, size) for x in stages], dim=1)))
        shares = self.linear_fuse.conv.weight.chunk(4, dim=1)
        x = sum(_resize(F.conv2d(x, share), size) for x, share in zip(stages, shares, strict=True))
        return self.dropout(F.relu(self.linear_fuse.bn(x)))

    def forward(self, maps: Sequence[Float[Tensor, "b _ _ _"]]) -> Float[Tensor, "b k h w"]:
        return self.linear_pred(self.fuse(maps))


class SegFormer(Classifier):
    """SegFormer: a MiT ``backbone`` and the all-MLP decoder; ``forward(x)`` gives logits at stride 4.

    ``predict(x)`` gives labels at the image's size, of the whole image or by sliding windows. ``early_fusion`` reorders
    the decoder into an equal but cheaper one (see ``SegFormerHead``). Parameters and MACs are those of Table 6.

    Raises ``ValueError`` for wrong numbers of classes or channels, and for a dropout outside of [0, 1).

    >>> mit = MixTransformer((16, 32, 64, 96), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4))
    >>> model = SegFormer(mit, num_classes=4, decoder_channels=64).eval()
    >>> model(torch.rand(2, 3, 64, 96)).shape, model.predict(torch.rand(2, 3, 64, 96)).shape
    (torch.Size([2, 4, 16, 24]), torch.Size([2, 64, 96]))
    """

    classifier_name = "decode_head.linear_pred"

    def __init__(
        self,
        backbone: MixTransformer,
        num_classes: int = 150,
        decoder_channels: int = 256,
        *,
        dropout: int | float = 0.1,
        early_fusion: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}, allowed is 0 (no classifier) or more")
        if decoder_channels < 1:
            raise ValueError(f"decoder_channels is {decoder_channels}, allowed is 1 or more")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}, allowed is 0 <= dropout < 1")
        self.num_classes, self.num_features = num_classes, decoder_channels
        self.backbone = backbone
        self.decode_head = SegFormerHead(backbone.embed_dims, decoder_channels, num_classes, dropout, early_fusion)
        self.default_cfg = {
            **backbone.default_cfg,
            "input_size": (backbone.in_chans, 512, 512),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
        }
        self.decode_head.apply(_init_weights)
        if num_classes:
            nn.init.normal_(self.decode_head.linear_pred.weight, std=0.01)

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """The encoder's four maps."""
        return self.backbone.features(x)

    def forward_head(
        self, maps: Sequence[Float[Tensor, "b _ _ _"]], pre_logits: bool = False
    ) -> Float[Tensor, "b k h w"]:
        """The decoder on the four maps; ``pre_logits`` leaves it at the fused map."""
        return self.decode_head.fuse(maps) if pre_logits else self.decode_head(maps)

    @torch.no_grad()
    def predict(
        self,
        x: Float[Tensor, "b c h w"],
        size: tuple[int, int] | None = None,
        *,
        crop: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] | None = None,
    ) -> Int[Tensor, "b h2 w2"]:
        """Labels at ``size`` (default: the image's), of the whole image or, given ``crop``, by sliding windows.

        As the paper does it: ADE20K whole, Cityscapes ``crop=1024, stride=768``. The model's mode is left as it is: call
        ``eval()`` first.
        """
        if crop is None:
            logits = self(x)
        else:
            logits = sliding_window_logits(self, x, crop, crop if stride is None else stride)
        return _resize(logits, size or x.shape[2:]).argmax(1)

    def new_classifier(self, num_classes: int) -> nn.Conv2d:
        """A 1x1 convolution."""
        layer = nn.Conv2d(self.num_features, num_classes, 1)
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
        return layer

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Ours from the official or the Transformers layout.

        The official checkpoints carry a ``decode_head.conv_seg`` that nothing uses; it is dropped. To start from an
        ImageNet encoder, load it into ``model.backbone`` through ``MixTransformer.convert_state_dict``.
        """
        state = official_layout(state)
        return {key: value for key, value in state.items() if not key.startswith("decode_head.conv_seg.")}


def sliding_window_logits(
    model: Callable[[Tensor], Tensor],
    x: Float[Tensor, "b c h w"],
    crop: int | tuple[int, int],
    stride: int | tuple[int, int],
) -> Float[Tensor, "b k h w"]:
    """Logits at the image's size from windows of ``crop`` pixels every ``stride``; a pixel's windows are averaged.

    The last window of a row or column is moved back to end at the border. A window's logits are upsampled to its size
    before they are averaged. An image smaller than the window is one window. The paper's Cityscapes setting is crop
    1024, stride 768. Raises ``ValueError`` where the stride would leave gaps.
    """
    crops, strides = ((value, value) if isinstance(value, int) else tuple(value) for value in (crop, stride))
    if min(crops) < 1:
        raise ValueError(f"crop is {crop}, allowed are sizes of 1 pixel or more")
    if any(not 1 <= s <= c for s, c in zip(strides, crops, strict=True)):
        raise ValueError(f"stride is {stride}, allowed is 1 <= stride <= crop ({crop}), or pixels would be left out")
    size = x.shape[2:]
    crops = [min(c, side) for c, side in zip(crops, size, strict=True)]
    tops, lefts = (
        sorted({min(i, side - c) for i in range(0, side - c + s, s)})
        for c, s, side in zip(crops, strides, size, strict=True)
    )
    total, count = None, x.new_zeros(1, 1, *size)
    for top in tops:
        for left in lefts:
            window = (..., slice(top, top + crops[0]), slice(left, left + crops[1]))
            logits = _resize(model(x[window]), crops)
            total = logits.new_zeros(*logits.shape[:2], *size) if total is None else total
            total[window] += logits
            count[window] += 1
    return total / count


def aligned_size(
    height: int, width: int, *, short_side: int = 512, long_side: int = 2048, divisor: int = 32
) -> tuple[int, int]:
    """The size at which an image is looked at whole: AlignedResize, as ``(height, width)``.

    The aspect ratio is kept, the short side becomes ``short_side`` unless the long one would pass ``long_side``, and both
    are rounded up to multiples of ``divisor``; without that last step 0.5 to 1 points of mIoU are lost.

    >>> aligned_size(683, 512), aligned_size(300, 400)
    ((704, 512), (512, 704))
    """
    if min(height, width, short_side, long_side, divisor) < 1:
        raise ValueError(
            f"height, width, short_side, long_side, divisor are {height, width, short_side, long_side, divisor}, allowed is 1 or more"
        )
    scale = min(short_side / min(height, width), long_side / max(height, width))
    return tuple(math.ceil(int(side * scale + 0.5) / divisor) * divisor for side in (height, width))


def segmentation_loss(
    logits: Float[Tensor, "b k h w"], labels: Int[Tensor, "b h2 w2"], ignore_label: int = 255
) -> Float[Tensor, ""]:
    """Cross-entropy of the logits, upsampled bilinearly to the labels' size; the mean over the labelled pixels.

    Pixels of ``ignore_label`` do not count; a batch without any labelled pixel gives 0.
    """
    if logits.ndim != 4 or labels.ndim != 3 or len(logits) != len(labels):
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, allowed is (b, h, w) for logits of {tuple(logits.shape)}"
        )
    labels = labels.long()
    losses = F.cross_entropy(_resize(logits, labels.shape[1:]), labels, ignore_index=ignore_label, reduction="sum")
    return losses / (labels != ignore_label).sum().clamp(min=1)


class SegmentationLoss(nn.Module):
    """``segmentation_loss`` as a module."""

    def __init__(self, ignore_label: int = 255) -> None:
        super().__init__()
        self.ignore_label = ignore_label

    def forward(self, logits: Float[Tensor, "b k h w"], labels: Int[Tensor, "b h2 w2"]) -> Float[Tensor, ""]:
        return segmentation_loss(logits, labels, self.ignore_label)


def param_groups(
    model: nn.Module, lr: float = 6e-5, weight_decay: int | float = 0.01, head_factor: int | float = 10
) -> list[dict]:
    """The recipe's parameter groups for AdamW: the decoder learns ``head_factor`` times as fast, norms do not decay.

    As in the official recipe a norm is what has ``norm`` in its name, so the decoder's batch norm and all biases decay;
    positional encodings, where the ablation has them, do not.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(("head" in name, "norm" in name or "pos_embed" in name), []).append(parameter)
    return [
        {"params": params, "lr": lr * (head_factor if head else 1.0), "weight_decay": 0.0 if norm else weight_decay}
        for (head, norm), params in sorted(groups.items())
    ]


def poly_schedule(
    warmup: int = 1500, warmup_ratio: int | float = 1e-6, power: int | float = 1
) -> Callable[[int, int], float]:
    """The recipe's factor on the learning rate, ``factor(step, total)``: (1 - step / total)^power, warmed up linearly.

    >>> factor = poly_schedule()
    >>> factor(0, 160_000), round(factor(80_000, 160_000), 3)
    (1e-06, 0.5)
    """

    def factor(step: int, total: int) -> float:
        ramp = warmup_ratio + (1 - warmup_ratio) * step / warmup if step < warmup else 1.0
        return ramp * max(0.0, 1 - step / total) ** power

    return factor


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    if x.shape[2:] == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _mit(size: str, num_classes: int, in_chans: int, drop_path_rate: int | float) -> MixTransformer:
    return MixTransformer(
        WIDTHS[size], DEPTHS[size], num_classes=num_classes, in_chans=in_chans, drop_path_rate=drop_path_rate
    )


def _segformer(
    size: str, num_classes: int, in_chans: int, drop_path_rate: int | float, dropout: int | float, early_fusion: bool
) -> SegFormer:
    backbone = _mit(size, 0, in_chans, drop_path_rate)
    model = SegFormer(backbone, num_classes, DECODER[size], dropout=dropout, early_fusion=early_fusion)
    if size == "b5":  # B5 is trained and tested at 640 pixels on ADE20K
        model.default_cfg["input_size"] = (in_chans, 640, 640)
    return model


def mit_b0(*, num_classes: int = 1000, in_chans: int = 3, drop_path_rate: int | float = 0.1) -> MixTransformer:
    """MiT-B0, an ImageNet classifier; 3.3 M parameters without the last layer (Table 6)."""
    return _mit("b0", num_classes, in_chans, drop_path_rate)


def mit_b1(*, num_classes: int = 1000, in_chans: int = 3, drop_path_rate: int | float = 0.1) -> MixTransformer:
    """MiT-B1, an ImageNet classifier; 13.2 M parameters without the last layer (Table 6)."""
    return _mit("b1", num_classes, in_chans, drop_path_rate)


def mit_b2(*, num_classes: int = 1000, in_chans: int = 3, drop_path_rate: int | float = 0.1) -> MixTransformer:
    """MiT-B2, an ImageNet classifier; 24.2 M parameters without the last layer (Table 6)."""
    return _mit("b2", num_classes, in_chans, drop_path_rate)


def mit_b3(*, num_classes: int = 1000, in_chans: int = 3, drop_path_rate: int | float = 0.1) -> MixTransformer:
    """MiT-B3, an ImageNet classifier; 44.1 M parameters without the last layer (Table 6)."""
    return _mit("b3", num_classes, in_chans, drop_path_rate)


def mit_b4(*, num_classes: int = 1000, in_chans: int = 3, drop_path_rate: int | float = 0.1) -> MixTransformer:
    """MiT-B4, an ImageNet classifier; 60.8 M parameters without the last layer (Table 6)."""
    return _mit("b4", num_classes, in_chans, drop_path_rate)


def mit_b5(*, num_classes: int = 1000, in_chans: int = 3, drop_path_rate: int | float = 0.1) -> MixTransformer:
    """MiT-B5, an ImageNet classifier; 81.4 M parameters without the last layer (Table 6)."""
    return _mit("b5", num_classes, in_chans, drop_path_rate)


def segformer_b0(
    *,
    num_classes: int = 150,
    in_chans: int = 3,
    drop_path_rate: int | float = 0.1,
    dropout: int | float = 0.1,
    early_fusion: bool = False,
) -> SegFormer:
    """SegFormer-B0 with ADE20K's 150 classes, 3.8 M parameters (Table 1a)."""
    return _segformer("b0", num_classes, in_chans, drop_path_rate, dropout, early_fusion)


def segformer_b1(
    *,
    num_classes: int = 150,
    in_chans: int = 3,
    drop_path_rate: int | float = 0.1,
    dropout: int | float = 0.1,
    early_fusion: bool = False,
) -> SegFormer:
    """SegFormer-B1 with ADE20K's 150 classes, 13.7 M parameters (Table 1a)."""
    return _segformer("b1", num_classes, in_chans, drop_path_rate, dropout, early_fusion)


def segformer_b2(
    *,
    num_classes: int = 150,
    in_chans: int = 3,
    drop_path_rate: int | float = 0.1,
    dropout: int | float = 0.1,
    early_fusion: bool = False,
) -> SegFormer:
    """SegFormer-B2 with ADE20K's 150 classes, 27.5 M parameters (Table 1a)."""
    return _segformer("b2", num_classes, in_chans, drop_path_rate, dropout, early_fusion)


def segformer_b3(
    *,
    num_classes: int = 150,
    in_chans: int = 3,
    drop_path_rate: int | float = 0.1,
    dropout: int | float = 0.1,
    early_fusion: bool = False,
) -> SegFormer:
    """SegFormer-B3 with ADE20K's 150 classes, 47.3 M parameters (Table 1a)."""
    return _segformer("b3", num_classes, in_chans, drop_path_rate, dropout, early_fusion)


def segformer_b4(
    *,
    num_classes: int = 150,
    in_chans: int = 3,
    drop_path_rate: int | float = 0.1,
    dropout: int | float = 0.1,
    early_fusion: bool = False,
) -> SegFormer:
    """SegFormer-B4 with ADE20K's 150 classes, 64.1 M parameters (Table 1a)."""
    return _segformer("b4", num_classes, in_chans, drop_path_rate, dropout, early_fusion)


def segformer_b5(
    *,
    num_classes: int = 150,
    in_chans: int = 3,
    drop_path_rate: int | float = 0.1,
    dropout: int | float = 0.1,
    early_fusion: bool = False,
) -> SegFormer:
    """SegFormer-B5 with ADE20K's 150 classes, 84.7 M parameters (Table 1a)."""
    return _segformer("b5", num_classes, in_chans, drop_path_rate, dropout, early_fusion)
