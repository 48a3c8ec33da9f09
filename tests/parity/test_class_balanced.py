"""The class-balanced losses beside the losses of torch, torchvision and kornia."""

import pytest
import torch
from torch.nn import functional as F

from saigen.papers.losses.class_balanced import class_balanced_loss, class_balanced_weights
from tests.peers import need, need_module

pytestmark = pytest.mark.peers


@pytest.mark.parametrize(
    ("kind", "gamma", "peer"),
    [("softmax", 0.0, "torch"), ("sigmoid", 0.0, "torch")]
    + [("focal", gamma, peer) for gamma in (0.5, 1.0, 2.0) for peer in ("torchvision", "kornia")],
)
def test_terms_equal_those_of_the_libraries(kind, gamma, peer):
    generator = torch.Generator().manual_seed(0)
    z = 4 * torch.randn(50, 7, dtype=torch.float64, generator=generator)
    y = torch.randint(7, (50,), generator=generator)
    weight = class_balanced_weights([500, 300, 90, 40, 12, 5, 1], 0.99, dtype=torch.float64)
    ours, theirs = (z.clone().requires_grad_() for _ in range(2))
    one_hot = F.one_hot(y, 7).to(z.dtype)
    if kind == "softmax":
        terms = F.cross_entropy(theirs, y, reduction="none")
    elif kind == "sigmoid":
        terms = F.binary_cross_entropy_with_logits(theirs, one_hot, reduction="none").sum(1)
    elif peer == "torchvision":
        need("torchvision")
        focal = need_module("torchvision.ops").sigmoid_focal_loss
        terms = focal(theirs, one_hot, alpha=-1, gamma=gamma).sum(1)
    else:
        focal = need_module("kornia.losses").binary_focal_loss_with_logits
        terms = focal(theirs[..., None], one_hot[..., None], None, gamma, reduction="none").sum((1, 2))
    expected = (weight[y] * terms).sum() / len(y)
    found = class_balanced_loss(ours, y, weight, kind=kind, gamma=gamma)
    expected.backward()
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-12)
