"""The network of the paper's experiments on long-tailed CIFAR: ResNet-32 with shortcuts that have no parameters."""

from saigen.nn.cifar_resnet import CifarResNet
from saigen.papers.losses.class_balanced.loss import KINDS, init_class_prior


def class_balanced_resnet32(*, num_classes: int = 10, in_chans: int = 3, kind: str = "softmax") -> CifarResNet:
    """ResNet-32 for 32-pixel images; 464,154 parameters for CIFAR-10.

    For ``kind`` ``"sigmoid"`` or ``"focal"`` the last layer starts at a probability of 1 / num_classes.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, allowed are {', '.join(KINDS)}")
    model = CifarResNet(32, num_classes=num_classes, in_chans=in_chans)
    if kind != "softmax" and num_classes > 1:
        init_class_prior(model.fc)
    return model
