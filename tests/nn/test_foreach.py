"""The portions in which an optimizer updates its parameters."""

import pytest
import torch

from saigen.nn.foreach import SMALL, batches


@pytest.mark.parametrize(
    ("sizes", "foreach", "expected"),
    [
        ([3, 5, 7], None, [3]),
        ([3, 5, 7], False, [1, 1, 1]),
        ([2 * SMALL, 2 * SMALL], None, [1, 1]),
        ([2 * SMALL, 2 * SMALL], True, [2]),
        ([2 * SMALL, 1, 1], None, [3]),  # small on average: the calls still count most
    ],
)
def test_portions(sizes, foreach, expected):
    params = [torch.empty(size) for size in sizes]
    found = list(batches(params, foreach))
    assert [len(batch) for batch in found] == expected
    assert all(a is b for a, b in zip([p for batch in found for p in batch], params, strict=True))
