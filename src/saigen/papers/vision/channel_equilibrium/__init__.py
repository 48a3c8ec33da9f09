"""Channel Equilibrium Networks (Shao et al., ICML 2020)."""

from saigen.papers.vision.channel_equilibrium.layer import (
    CEResNet,
    ChannelEquilibrium2d,
    ce_resnet18,
    ce_resnet50,
    ce_resnet101,
    inhibited_channel_ratio,
    inverse_sqrt_newton,
)

__all__ = [
    "CEResNet",
    "ChannelEquilibrium2d",
    "ce_resnet18",
    "ce_resnet50",
    "ce_resnet101",
    "inhibited_channel_ratio",
    "inverse_sqrt_newton",
]
