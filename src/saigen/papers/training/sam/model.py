"""The Vision Transformers and MLP-Mixers that the paper trains with SAM, from scratch on ImageNet (table 2).

They are the original ViT and Mixer, at 224 pixels, as JAX has them: the tanh approximation of GELU, a zero head, no
layer between the class token and the head. Images come scaled to [-1, 1].
"""

from typing import Any

from torch import Tensor, nn

from saigen.nn.flax import vit_from_flax
from saigen.nn.mlp_mixer import MLPMixer
from saigen.nn.vision_transformer import VisionTransformer, convert_vit_state_dict

# The radius that the paper trains each model with: the less a model knows of images beforehand, the larger it is.
RHO = {
    "sam_vit_small_patch32_224": 0.05,
    "sam_vit_small_patch16_224": 0.1,
    "sam_vit_small_patch14_224": 0.1,
    "sam_vit_small_patch8_224": 0.15,
    "sam_vit_base_patch32_224": 0.15,
    "sam_vit_base_patch16_224": 0.2,
    "sam_mixer_s32_224": 0.1,
    "sam_mixer_s16_224": 0.15,
    "sam_mixer_s8_224": 0.2,
    "sam_mixer_b32_224": 0.35,
    "sam_mixer_b16_224": 0.6,
    "sam_mixer_b8_224": 0.6,
}


class SAMVisionTransformer(VisionTransformer):
    """``saigen.nn``'s Vision Transformer, which also reads the arrays of the official Flax checkpoints.

    >>> import torch
    >>> SAMVisionTransformer(img_size=32, patch_size=8, embed_dim=48, num_heads=3)(torch.rand(1, 3, 32, 32)).shape
    torch.Size([1, 1000])
    """

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our layout from the official Flax arrays (``Transformer/encoderblock_0/…``), timm's or Transformers'."""
        return convert_vit_state_dict(vit_from_flax(state))


def _vit(
    width: int, depth: int, heads: int, patch: int, num_classes: int, in_chans: int, more: dict[str, Any]
) -> SAMVisionTransformer:
    sizes = {"patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
    model = SAMVisionTransformer(
        num_classes=num_classes, in_chans=in_chans, **{"gelu": "tanh", "init": "jax", **sizes, **more}
    )
    model.default_cfg |= {"mean": (0.5,) * in_chans, "std": (0.5,) * in_chans}
    nn.init.zeros_(model.cls_token)
    nn.init.normal_(model.pos_embed, std=0.02)
    return model


def _mixer(width: int, depth: int, patch: int, num_classes: int, in_chans: int, more: dict[str, Any]) -> MLPMixer:
    sizes = {"patch_size": patch, "embed_dim": width, "depth": depth}
    return MLPMixer(num_classes=num_classes, in_chans=in_chans, **{"gelu": "tanh", **sizes, **more})


def sam_vit_tiny_patch16_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> SAMVisionTransformer:
    """ViT-Ti/16: 192 wide, 12 blocks, 3 heads, patches of 16 pixels; 5.7 M parameters."""
    return _vit(192, 12, 3, 16, num_classes, in_chans, overrides)


def sam_vit_small_patch32_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> SAMVisionTransformer:
    """ViT-S/32: 384 wide, 12 blocks, 6 heads, patches of 32 pixels; 22.9 M parameters."""
    return _vit(384, 12, 6, 32, num_classes, in_chans, overrides)


def sam_vit_small_patch16_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> SAMVisionTransformer:
    """ViT-S/16: 384 wide, 12 blocks, 6 heads, patches of 16 pixels; 22.1 M parameters."""
    return _vit(384, 12, 6, 16, num_classes, in_chans, overrides)


def sam_vit_small_patch14_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> SAMVisionTransformer:
    """ViT-S/14: 384 wide, 12 blocks, 6 heads, patches of 14 pixels; 22.0 M parameters."""
    return _vit(384, 12, 6, 14, num_classes, in_chans, overrides)


def sam_vit_small_patch8_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> SAMVisionTransformer:
    """ViT-S/8: 384 wide, 12 blocks, 6 heads, patches of 8 pixels; 22.1 M parameters."""
    return _vit(384, 12, 6, 8, num_classes, in_chans, overrides)


def sam_vit_base_patch32_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> SAMVisionTransformer:
    """ViT-B/32: 768 wide, 12 blocks, 12 heads, patches of 32 pixels; 88.2 M parameters."""
    return _vit(768, 12, 12, 32, num_classes, in_chans, overrides)


def sam_vit_base_patch16_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> SAMVisionTransformer:
    """ViT-B/16: 768 wide, 12 blocks, 12 heads, patches of 16 pixels; 86.6 M parameters."""
    return _vit(768, 12, 12, 16, num_classes, in_chans, overrides)


def sam_vit_base_patch8_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> SAMVisionTransformer:
    """ViT-B/8: 768 wide, 12 blocks, 12 heads, patches of 8 pixels; 86.6 M parameters."""
    return _vit(768, 12, 12, 8, num_classes, in_chans, overrides)


def sam_vit_large_patch16_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> SAMVisionTransformer:
    """ViT-L/16: 1024 wide, 24 blocks, 16 heads, patches of 16 pixels; 304.3 M parameters."""
    return _vit(1024, 24, 16, 16, num_classes, in_chans, overrides)


def sam_mixer_s32_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> MLPMixer:
    """Mixer-S/32: 512 wide, 8 blocks, patches of 32 pixels; 19.1 M parameters."""
    return _mixer(512, 8, 32, num_classes, in_chans, overrides)


def sam_mixer_s16_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> MLPMixer:
    """Mixer-S/16: 512 wide, 8 blocks, patches of 16 pixels; 18.5 M parameters."""
    return _mixer(512, 8, 16, num_classes, in_chans, overrides)


def sam_mixer_s8_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> MLPMixer:
    """Mixer-S/8: 512 wide, 8 blocks, patches of 8 pixels; 20.6 M parameters."""
    return _mixer(512, 8, 8, num_classes, in_chans, overrides)


def sam_mixer_b32_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> MLPMixer:
    """Mixer-B/32: 768 wide, 12 blocks, patches of 32 pixels; 60.3 M parameters."""
    return _mixer(768, 12, 32, num_classes, in_chans, overrides)


def sam_mixer_b16_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> MLPMixer:
    """Mixer-B/16: 768 wide, 12 blocks, patches of 16 pixels; 59.9 M parameters."""
    return _mixer(768, 12, 16, num_classes, in_chans, overrides)


def sam_mixer_b8_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> MLPMixer:
    """Mixer-B/8: 768 wide, 12 blocks, patches of 8 pixels; 64.9 M parameters."""
    return _mixer(768, 12, 8, num_classes, in_chans, overrides)


def sam_mixer_l16_224(*, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> MLPMixer:
    """Mixer-L/16: 1024 wide, 24 blocks, patches of 16 pixels; 208.2 M parameters."""
    return _mixer(1024, 24, 16, num_classes, in_chans, overrides)
