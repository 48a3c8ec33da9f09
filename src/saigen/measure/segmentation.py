"""How well labels of pixels agree: the confusion matrix, intersection over union (IoU) and its mean."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def confusion_matrix(
    predicted: Int[Tensor, "..."], labels: Int[Tensor, "..."], num_classes: int, ignore_label: int = 255
) -> Int[Tensor, "k k"]:
    """Pixels counted by true class (row) and predicted class (column); those labelled ``ignore_label`` do not count.

    Matrices of several images add up. Raises ``ValueError`` for unequal shapes and for classes outside of
    ``0 … num_classes - 1``.

    >>> confusion_matrix(torch.tensor([[0, 1], [1, 1]]), torch.tensor([[0, 0], [1, 255]]), num_classes=2)
    tensor([[1, 1],
            [0, 1]])
    """
    if predicted.shape != labels.shape:
        raise ValueError(
            f"predicted has shape {tuple(predicted.shape)}, allowed is that of labels, {tuple(labels.shape)}"
        )
    counted = labels != ignore_label
    predicted, labels = predicted[counted].long(), labels[counted].long()
    for name, values in (("predicted", predicted), ("labels", labels)):
        if len(values) and (values.min() < 0 or values.max() >= num_classes):
            low, high = int(values.min()), int(values.max())
            raise ValueError(
                f"{name} holds classes from {low} to {high}, allowed are 0 to {num_classes - 1} and {ignore_label}"
            )
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


def class_iou(confusion: Int[Tensor, "k k"]) -> Float[Tensor, "k"]:
    """Each class's intersection over union, in [0, 1]; NaN for a class that is neither there nor predicted."""
    confusion = confusion.double()
    intersection = confusion.diagonal()
    return intersection / (confusion.sum(0) + confusion.sum(1) - intersection)


def mean_iou(confusion: Int[Tensor, "k k"]) -> float:
    """The mean IoU over the classes that are there or predicted, in [0, 1], from one matrix over all images.

    >>> mean_iou(torch.tensor([[1, 1], [0, 1]]))
    0.5
    """
    return class_iou(confusion).nanmean().item()
