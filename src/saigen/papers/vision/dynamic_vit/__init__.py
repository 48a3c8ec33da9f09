"""DynamicViT: a vision transformer that drops the tokens an image does not need."""

from saigen.papers.vision.dynamic_vit.model import (
    DynamicViT,
    DynamicViTLoss,
    DynamicViTOutput,
    TokenPredictor,
    dynamic_vit_deit_256,
    dynamic_vit_deit_base,
    dynamic_vit_deit_small,
    dynamic_vit_loss,
    dynamic_vit_lvvit_medium,
    dynamic_vit_lvvit_small,
    dynamic_vit_param_groups,
    dynamic_vit_schedule,
    gather_tokens,
    masked_softmax,
)

__all__ = [
    "DynamicViT",
    "DynamicViTLoss",
    "DynamicViTOutput",
    "TokenPredictor",
    "dynamic_vit_deit_256",
    "dynamic_vit_deit_base",
    "dynamic_vit_deit_small",
    "dynamic_vit_loss",
    "dynamic_vit_lvvit_medium",
    "dynamic_vit_lvvit_small",
    "dynamic_vit_param_groups",
    "dynamic_vit_schedule",
    "gather_tokens",
    "masked_softmax",
]
