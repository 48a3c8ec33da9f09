from saigen.papers.vision.learned_resizer.layer import (
    LearnedResizer,
    ResidualBlock,
    ResizedClassifier,
    freeze_backbone,
    joint_param_groups,
    resizer_macs,
)

__all__ = [
    "LearnedResizer",
    "ResidualBlock",
    "ResizedClassifier",
    "freeze_backbone",
    "joint_param_groups",
    "resizer_macs",
]
