"""The networks of the paper's experiments."""

from saigen.nn.wide_resnet import WideResNet


def mixmatch_wrn_28_2(
    *,
    num_classes: int = 10,
    in_chans: int = 3,
    filters: int = 32,
    scales: int = 3,
    repeat: int = 4,
    momentum: float = 0.001,
    padding: str = "same",
) -> WideResNet:
    """WRN-28-2, 1.5 million parameters: CIFAR-10 and SVHN. ``scales=4`` is the network of STL-10.

    >>> sum(p.numel() for p in mixmatch_wrn_28_2().parameters())
    1469642
    """
    return WideResNet(
        num_classes=num_classes,
        in_chans=in_chans,
        filters=filters,
        scales=scales,
        repeat=repeat,
        momentum=momentum,
        padding=padding,
    )


def mixmatch_wrn_28_large(
    *,
    num_classes: int = 10,
    in_chans: int = 3,
    filters: int = 135,
    scales: int = 3,
    repeat: int = 4,
    momentum: float = 0.001,
    padding: str = "same",
) -> WideResNet:
    """The network of 26 million parameters, with 135 filters in the first stage (table 1)."""
    return mixmatch_wrn_28_2(
        num_classes=num_classes,
        in_chans=in_chans,
        filters=filters,
        scales=scales,
        repeat=repeat,
        momentum=momentum,
        padding=padding,
    )
