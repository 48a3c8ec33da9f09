"""The confusion matrix and mean IoU against counting by hand."""

import math

import numpy as np
import pytest
import torch

from saigen.measure.segmentation import class_iou, confusion_matrix, mean_iou


def test_equals_counting_sets_of_pixels():
    rng = np.random.default_rng(0)
    predicted, labels = rng.integers(0, 4, (3, 9, 7)), rng.integers(0, 4, (3, 9, 7))
    labels[:, :2] = 255
    predicted, labels = torch.from_numpy(predicted), torch.from_numpy(labels)
    confusion = sum(confusion_matrix(p, y, 5) for p, y in zip(predicted, labels, strict=True))
    assert torch.equal(confusion, confusion_matrix(predicted, labels, 5))
    seen = labels != 255
    for k in range(4):
        a, b = (predicted == k) & seen, (labels == k) & seen
        assert class_iou(confusion)[k].item() == pytest.approx(((a & b).sum() / (a | b).sum()).item())
    assert math.isnan(class_iou(confusion)[4])
    assert mean_iou(confusion) == pytest.approx(class_iou(confusion)[:4].mean().item())


def test_a_perfect_and_a_wholly_wrong_prediction():
    labels = torch.tensor([[0, 1], [1, 0]])
    assert mean_iou(confusion_matrix(labels, labels, 2)) == 1.0
    assert mean_iou(confusion_matrix(1 - labels, labels, 2)) == 0.0


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="shape"):
        confusion_matrix(torch.zeros(2, 2).long(), torch.zeros(2, 3).long(), 2)
    with pytest.raises(ValueError, match="labels holds classes from 0 to 3, allowed are 0 to 1"):
        confusion_matrix(torch.zeros(4).long(), torch.arange(4), 2)
    with pytest.raises(ValueError, match="predicted"):
        confusion_matrix(torch.arange(4), torch.zeros(4).long(), 2)
