"""Octave convolution and the networks of its paper (Chen et al., ICCV 2019)."""

from saigen.papers.vision.octave_convolution.layer import (
    OctaveBatchNorm2d,
    OctaveConv2d,
    OctMobileNetV1,
    OctMobileNetV2,
    OctResNet,
    PerGroup,
    global_average,
    memory_ratio,
    oct_mobilenet_v1,
    oct_mobilenet_v2,
    oct_resnet26,
    oct_resnet50,
    oct_resnet101,
    oct_resnet152,
    oct_resnet200,
    work_ratio,
)

__all__ = [
    "OctMobileNetV1",
    "OctMobileNetV2",
    "OctResNet",
    "OctaveBatchNorm2d",
    "OctaveConv2d",
    "PerGroup",
    "global_average",
    "memory_ratio",
    "oct_mobilenet_v1",
    "oct_mobilenet_v2",
    "oct_resnet26",
    "oct_resnet50",
    "oct_resnet101",
    "oct_resnet152",
    "oct_resnet200",
    "work_ratio",
]
