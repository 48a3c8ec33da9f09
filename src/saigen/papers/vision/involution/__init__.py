"""Involution and RedNet (Li et al., CVPR 2021)."""

from saigen.papers.vision.involution.layer import (
    Involution2d,
    RedNet,
    convert_3x3_to_involution,
    involution2d,
    rednet26,
    rednet38,
    rednet50,
    rednet101,
    rednet152,
)

__all__ = [
    "Involution2d",
    "RedNet",
    "convert_3x3_to_involution",
    "involution2d",
    "rednet26",
    "rednet38",
    "rednet50",
    "rednet101",
    "rednet152",
]
