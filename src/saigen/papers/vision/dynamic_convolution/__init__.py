"""Dynamic convolution and the networks of its paper (Chen et al., CVPR 2020)."""

from saigen.papers.vision.dynamic_convolution.layer import (
    DyMobileNetV2,
    DynamicConv1d,
    DynamicConv2d,
    DynamicConv3d,
    DyResNet,
    KernelAttention,
    TemperatureSchedule,
    attentions,
    convert_to_dynamic,
    dy_mobilenetv2_035,
    dy_mobilenetv2_050,
    dy_mobilenetv2_075,
    dy_mobilenetv2_100,
    dy_resnet10,
    dy_resnet18,
    set_temperature,
)

__all__ = [
    "DyMobileNetV2",
    "DyResNet",
    "DynamicConv1d",
    "DynamicConv2d",
    "DynamicConv3d",
    "KernelAttention",
    "TemperatureSchedule",
    "attentions",
    "convert_to_dynamic",
    "dy_mobilenetv2_035",
    "dy_mobilenetv2_050",
    "dy_mobilenetv2_075",
    "dy_mobilenetv2_100",
    "dy_resnet10",
    "dy_resnet18",
    "set_temperature",
]
