"""The models of AugReg (Steiner et al., 2021, arXiv 2106.10270): ViT from Ti to L, and hybrids with a ResNet in front.

They are the original Vision Transformers without the layer before the head (section 3.2), as JAX has them: the tanh
approximation of GELU, a zero head. Images come scaled to [-1, 1]. Keys are timm's; the official ``.npz`` files load.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from saigen.nn.conv import same_padding
from saigen.nn.flax import vit_from_flax
from saigen.nn.vision_transformer import VisionTransformer, convert_vit_state_dict

# --- the ResNet in front of a hybrid ---------------------------------------------------------------------------------


class StdConv2d(nn.Conv2d):
    """A convolution without bias whose kernels are standardised, padded as TensorFlow pads ("SAME").

    Each output channel's weights lose their mean and are divided by their standard deviation + 1e-5.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        w = self.weight.flatten(1)
        w = w - w.mean(1, keepdim=True)
        # The norm's reduction is several times as fast as torch.std_mean's, which keeps a running variance.
        std = torch.linalg.vector_norm(w, dim=1, keepdim=True) / w.shape[1] ** 0.5
        w = (w * (1 / (std + 1e-5))).view_as(self.weight)
        k, s = self.kernel_size[0], self.stride[0]
        (top, bottom), (left, right) = (same_padding(size, k, s) for size in x.shape[2:])
        if (top, left) != (bottom, right):
            x = F.pad(x, (left, right, top, bottom))
            top = left = 0
        return F.conv2d(x, w, stride=s, padding=(top, left))


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class SameMaxPool(nn.Module):
    """The largest of 3x3 values at every second place, borders as in TensorFlow's "SAME"."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c i j"]:
        # Zero or one place before; the last window may reach over the end, by as many.
        (top, _), (left, _) = (same_padding(size, 3, 2) for size in x.shape[2:])
        return F.max_pool2d(x, 3, 2, (top, left), ceil_mode=True)


class ResidualUnit(nn.Module):
    """A bottleneck: (b, in_channels, h, w) -> (b, 4 width, h / stride, w / stride), normed after each convolution."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * width
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            projection = {"conv": StdConv2d(in_channels, out_channels, 1, stride), "norm": group_norm(out_channels)}
            self.downsample = nn.Sequential(OrderedDict(projection))
        self.conv1, self.norm1 = StdConv2d(in_channels, width, 1), group_norm(width)
        self.conv2, self.norm2 = StdConv2d(width, width, 3, stride), group_norm(width)
        self.conv3, self.norm3 = StdConv2d(width, out_channels, 1), group_norm(out_channels)
        nn.init.zeros_(self.norm3.weight)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        y = F.relu_(self.norm1(self.conv1(x)))
        y = F.relu_(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return F.relu_(y + (x if self.downsample is None else self.downsample(x)))


class ResidualStage(nn.Module):
    """``depth`` bottlenecks, the first of them with ``stride``."""

    def __init__(self, in_channels: int, width: int, depth: int, stride: int) -> None:
        super().__init__()
        units = [
            ResidualUnit(in_channels, width, stride),
            *(ResidualUnit(4 * width, width, 1) for _ in range(depth - 1)),
        ]
        self.blocks = nn.Sequential(*units)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        return self.blocks(x)


def hybrid_backbone(in_chans: int, depths: Sequence[int]) -> nn.Sequential:
    """The root (a quarter of the side), then stages of ``depths`` bottlenecks, each but the first halving the side."""
    root = {
        "conv": StdConv2d(in_chans, 64, 7, 2),
        "norm": group_norm(64),
        "act": nn.ReLU(inplace=True),
        "pool": SameMaxPool(),
    }
    stem = nn.Sequential(OrderedDict(root))
    if not depths:
        return stem
    stages = [
        ResidualStage(64 if i == 0 else 64 * 2 ** (i + 1), 64 * 2**i, depth, 1 if i == 0 else 2)
        for i, depth in enumerate(depths)
    ]
    return nn.Sequential(OrderedDict(stem=stem, stages=nn.Sequential(*stages)))


class HybridEmbed(nn.Module):
    """The feature map of a ResNet, cut into patches and projected: (b, c, h, w) -> (b, tokens, dim)."""

    def __init__(self, depths: Sequence[int], patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.backbone = hybrid_backbone(in_chans, depths)
        channels = 64 * 2 ** (len(depths) + 1) if depths else 64
        self.proj = nn.Conv2d(channels, dim, patch_size, patch_size)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        return self.proj(self.backbone(x)).flatten(2).transpose(1, 2)


# --- the models ------------------------------------------------------------------------------------------------------


class AugRegViT(VisionTransformer):
    """``saigen.nn``'s Vision Transformer as the paper trains it; ``resnet`` puts a ResNet of such depths in front.

    - ``resnet``: None for a plain ViT; () for the root alone, (2, 2, 2, 2) or (3, 4, 6, 3). One token then covers
      ``patch_size`` pixels all the same: 8x8 places of the root's map, or one place behind four stages.
    - ``head_bias``: where the head's biases start. The paper trains with sigmoids (``sigmoid_xent``), for which a start
      at -6.9 (1,000 classes) or -10 (21,843) says that hardly any class is present.

    Takes images (b, in_chans, img_size, img_size), gives logits (b, num_classes). All else as ``VisionTransformer``;
    ``gelu="none"`` is timm's exact GELU. Raises ``ValueError`` where ``patch_size`` does not fit what stands before it.

    >>> AugRegViT(img_size=32, patch_size=8, embed_dim=48, num_heads=3, depth=2)(torch.rand(1, 3, 32, 32)).shape
    torch.Size([1, 1000])
    """

    def __init__(self, *, resnet: Sequence[int] | None = None, head_bias: float = 0.0, **options: Any) -> None:
        super().__init__(**{"gelu": "tanh", "init": "jax", **options})
        in_chans, dim = self.in_chans, self.embed_dim
        if resnet is not None:
            stride = 4 * 2 ** max(len(resnet) - 1, 0)
            if self.patch_size % stride or min(resnet, default=1) < 1:
                raise ValueError(
                    f"resnet is {tuple(resnet)} with patch_size {self.patch_size}, allowed are depths >= 1 whose "
                    f"stride, {stride}, divides patch_size"
                )
            self.patch_embed = HybridEmbed(resnet, self.patch_size // stride, in_chans, dim)
            nn.init.trunc_normal_(self.patch_embed.proj.weight, std=self.patch_embed.proj.weight[0].numel() ** -0.5)
            nn.init.zeros_(self.patch_embed.proj.bias)
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)
        nn.init.normal_(self.pos_embed, std=0.02)
        if self.num_classes:
            nn.init.constant_(self.head.bias, head_bias)
        self.default_cfg |= {
            "mean": (0.5,) * in_chans,
            "std": (0.5,) * in_chans,
            "crop_pct": 1.0 if self.img_size[0] >= 384 else 0.9,
        }

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our layout from the official Flax arrays (``Transformer/encoderblock_0/…``), timm's or Transformers'."""
        return convert_vit_state_dict(vit_from_flax(state))


def resize_pos_embed(
    pos_embed: Float[Tensor, "1 n d"], grid: tuple[int, int], num_prefix_tokens: int = 1
) -> Float[Tensor, "1 m d"]:
    """Positions for another grid as the official fine-tuning makes them: bilinear, corners on corners (section 3.4).

    ``scipy.ndimage.zoom(order=1)`` of a square grid; the class token keeps its own. A state dict loaded at another size
    is resized by timm's rule instead (bicubic, antialiased); call this first for the paper's.

    >>> resize_pos_embed(torch.zeros(1, 197, 64), (24, 24)).shape
    torch.Size([1, 577, 64])
    """
    prefix, spatial = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    side = round(spatial.shape[1] ** 0.5)
    if side < 1 or side * side != spatial.shape[1]:
        raise ValueError(f"pos_embed has {spatial.shape[1]} spatial positions, allowed is a square number")
    image = spatial.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image.float(), size=tuple(grid), mode="bilinear", align_corners=True)
    return torch.cat((prefix, image.flatten(2).transpose(1, 2).to(pos_embed.dtype)), dim=1)


TI = {"embed_dim": 192, "depth": 12, "num_heads": 3}
S = {"embed_dim": 384, "depth": 12, "num_heads": 6}
B = {"embed_dim": 768, "depth": 12, "num_heads": 12}
L = {"embed_dim": 1024, "depth": 24, "num_heads": 16}


def vit_tiny_patch16_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> AugRegViT:
    """ViT-Ti/16: 5.7 M parameters, 1.25 GMACs."""
    return AugRegViT(**{**TI, "num_classes": num_classes, "in_chans": in_chans, "patch_size": 16, **overrides})


def vit_tiny_patch16_384(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> AugRegViT:
    """ViT-Ti/16 at 384 pixels: 5.8 M parameters, 4.7 GMACs."""
    return vit_tiny_patch16_224(num_classes=num_classes, in_chans=in_chans, **{"img_size": 384, **overrides})


def vit_small_patch32_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> AugRegViT:
    """ViT-S/32: 22.9 M parameters, 1.14 GMACs."""
    return AugRegViT(**{**S, "num_classes": num_classes, "in_chans": in_chans, "patch_size": 32, **overrides})


def vit_small_patch32_384(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> AugRegViT:
    """ViT-S/32 at 384 pixels: 22.9 M parameters, 3.4 GMACs."""
    return vit_small_patch32_224(num_classes=num_classes, in_chans=in_chans, **{"img_size": 384, **overrides})


def vit_small_patch16_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> AugRegViT:
    """ViT-S/16: 22.1 M parameters, 4.6 GMACs."""
    return AugRegViT(**{**S, "num_classes": num_classes, "in_chans": in_chans, "patch_size": 16, **overrides})


def vit_small_patch16_384(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> AugRegViT:
    """ViT-S/16 at 384 pixels: 22.2 M parameters, 15.5 GMACs."""
    return vit_small_patch16_224(num_classes=num_classes, in_chans=in_chans, **{"img_size": 384, **overrides})


def vit_base_patch32_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> AugRegViT:
    """ViT-B/32: 88.2 M parameters, 4.4 GMACs."""
    return AugRegViT(**{**B, "num_classes": num_classes, "in_chans": in_chans, "patch_size": 32, **overrides})


def vit_base_patch32_384(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> AugRegViT:
    """ViT-B/32 at 384 pixels: 88.3 M parameters, 13.0 GMACs."""
    return vit_base_patch32_224(num_classes=num_classes, in_chans=in_chans, **{"img_size": 384, **overrides})


def vit_base_patch16_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> AugRegViT:
    """ViT-B/16: 86.6 M parameters, 17.6 GMACs."""
    return AugRegViT(**{**B, "num_classes": num_classes, "in_chans": in_chans, "patch_size": 16, **overrides})


def vit_base_patch16_384(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> AugRegViT:
    """ViT-B/16 at 384 pixels: 86.9 M parameters, 55.5 GMACs."""
    return vit_base_patch16_224(num_classes=num_classes, in_chans=in_chans, **{"img_size": 384, **overrides})


def vit_base_patch8_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> AugRegViT:
    """ViT-B/8, published later: 86.6 M parameters, 78.1 GMACs."""
    return AugRegViT(**{**B, "num_classes": num_classes, "in_chans": in_chans, "patch_size": 8, **overrides})


def vit_large_patch16_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> AugRegViT:
    """ViT-L/16: 304.3 M parameters, 61.6 GMACs."""
    return AugRegViT(**{**L, "num_classes": num_classes, "in_chans": in_chans, "patch_size": 16, **overrides})


def vit_large_patch16_384(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> AugRegViT:
    """ViT-L/16 at 384 pixels: 304.7 M parameters, 191 GMACs."""
    return vit_large_patch16_224(num_classes=num_classes, in_chans=in_chans, **{"img_size": 384, **overrides})


def vit_tiny_r_s16_p8_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> AugRegViT:
    """R+Ti/16, a ResNet's root before ViT-Ti: 6.3 M parameters. In spite of its name a token covers 32 pixels."""
    options = {**TI, "num_classes": num_classes, "in_chans": in_chans, "patch_size": 32, "resnet": ()}
    return AugRegViT(**(options | overrides))


def vit_tiny_r_s16_p8_384(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> AugRegViT:
    """R+Ti/16 at 384 pixels."""
    return vit_tiny_r_s16_p8_224(num_classes=num_classes, in_chans=in_chans, **{"img_size": 384, **overrides})


def vit_small_r26_s32_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> AugRegViT:
    """R26+S/32, a ResNet-26 before ViT-S: 36.4 M parameters."""
    options = {**S, "num_classes": num_classes, "in_chans": in_chans, "patch_size": 32, "resnet": (2, 2, 2, 2)}
    return AugRegViT(**(options | overrides))


def vit_small_r26_s32_384(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> AugRegViT:
    """R26+S/32 at 384 pixels."""
    return vit_small_r26_s32_224(num_classes=num_classes, in_chans=in_chans, **{"img_size": 384, **overrides})


def vit_large_r50_s32_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> AugRegViT:
    """R50+L/32, a ResNet-50 before ViT-L: 329.0 M parameters."""
    options = {**L, "num_classes": num_classes, "in_chans": in_chans, "patch_size": 32, "resnet": (3, 4, 6, 3)}
    return AugRegViT(**(options | overrides))


def vit_large_r50_s32_384(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> AugRegViT:
    """R50+L/32 at 384 pixels."""
    return vit_large_r50_s32_224(num_classes=num_classes, in_chans=in_chans, **{"img_size": 384, **overrides})
