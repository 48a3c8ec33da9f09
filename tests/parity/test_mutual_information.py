"""I_NCE against the contrastive loss of CLIP in transformers: values and gradients, from the same scores."""

import math

import pytest
import torch

from saigen.papers.representation.mutual_information import infonce_bound
from tests.peers import need_module


@pytest.mark.peers
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_same_as_the_contrastive_loss_of_clip(scale):
    clip = need_module("transformers.models.clip.modeling_clip")
    scores = (scale * torch.randn(12, 12, generator=torch.Generator().manual_seed(0))).requires_grad_()
    ours, theirs = math.log(12) - infonce_bound(scores), clip.contrastive_loss(scores)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, scores)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
