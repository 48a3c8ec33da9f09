"""MoCo (He et al., CVPR 2020) and MoCo v2."""

from saigen.papers.representation.moco.model import (
    EndToEnd,
    InfoNCE,
    KeyQueue,
    MemoryBank,
    MoCo,
    contrast,
    half_life,
    info_nce,
    moco_v1_resnet50,
    moco_v2_resnet50,
    momentum_update_,
    uniform_loss,
)
from saigen.papers.representation.moco.shuffling import SplitBatchNorm2d, shuffle_batch, unshuffle_batch
from saigen.papers.representation.moco.training import (
    LinearClassifier,
    Recipe,
    backbone_state_dict,
    detectron2_state_dict,
    learning_rate,
    recipe,
)
from saigen.papers.representation.moco.transform import MoCoViews, moco_v1_augment, moco_v2_augment

__all__ = [
    "EndToEnd",
    "InfoNCE",
    "KeyQueue",
    "LinearClassifier",
    "MemoryBank",
    "MoCo",
    "MoCoViews",
    "Recipe",
    "SplitBatchNorm2d",
    "backbone_state_dict",
    "contrast",
    "detectron2_state_dict",
    "half_life",
    "info_nce",
    "learning_rate",
    "moco_v1_augment",
    "moco_v1_resnet50",
    "moco_v2_augment",
    "moco_v2_resnet50",
    "momentum_update_",
    "recipe",
    "shuffle_batch",
    "uniform_loss",
    "unshuffle_batch",
]
