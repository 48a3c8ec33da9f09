"""Stand-Alone Self-Attention in Vision Models (Ramachandran et al., NeurIPS 2019)."""

from saigen.papers.vision.stand_alone_attention.layer import (
    AttentionStem,
    LocalSelfAttention2d,
    SASAResNet,
    local_attention,
    sasa_resnet26,
    sasa_resnet38,
    sasa_resnet50,
)

__all__ = [
    "AttentionStem",
    "LocalSelfAttention2d",
    "SASAResNet",
    "local_attention",
    "sasa_resnet26",
    "sasa_resnet38",
    "sasa_resnet50",
]
