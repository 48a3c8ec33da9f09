"""Labels out of range are named by their place."""

import pytest
import torch

from saigen.nn.labels import check_labels


def test_the_first_label_out_of_range_is_named():
    check_labels(torch.tensor([[0, 1], [2, 0]]), 3)
    check_labels(torch.zeros(0, dtype=torch.int64), 3)
    check_labels(torch.zeros(2, dtype=torch.int64, device="meta"), 3)
    with pytest.raises(ValueError, match=r"target\[1\] is -1, allowed are classes from 0 to 2"):
        check_labels(torch.tensor([0, -1, 7]), 3)
    with pytest.raises(ValueError, match=r"target\[1, 0\] is 3"):
        check_labels(torch.tensor([[0, 1], [3, 0]]), 3)
    with pytest.raises(ValueError, match=r"type torch\.int32"):
        check_labels(torch.tensor([0], dtype=torch.int32), 3)
