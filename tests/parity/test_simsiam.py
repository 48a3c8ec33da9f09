"""SimSiam against lightly: heads and loss, outputs and gradients, from the same weights."""

import pytest
import torch

from saigen.papers.representation.simsiam import PredictionMLP, ProjectionMLP, negative_cosine, simsiam_loss
from tests.peers import need, need_module


def lightly_heads(in_dim, dim, pred_dim):
    need("lightly")
    heads = need_module("lightly.models.modules.heads")
    return heads.SimSiamProjectionHead(in_dim, in_dim, dim), heads.SimSiamPredictionHead(dim, pred_dim, dim)


@pytest.mark.peers
def test_same_outputs_and_gradients_as_lightly():
    torch.manual_seed(0)
    theirs = lightly_heads(24, 32, 8)
    ours = ProjectionMLP(24, 32), PredictionMLP(32, 8)
    for mine, other in zip(ours, theirs, strict=True):
        state = {key.removeprefix("layers."): value for key, value in other.state_dict().items()}
        missing, unexpected = mine.load_state_dict(state, strict=False)
        # the untrained bias of the last linear, which lightly leaves out
        assert not unexpected and set(missing) <= {"6.bias"}
    with torch.no_grad():
        ours[0][6].bias.zero_()
    loss = need_module("lightly.loss").NegativeCosineSimilarity()
    x1, x2 = torch.randn(2, 16, 24)
    results = []
    for (projector, predictor), mode in ((ours, "ours"), (theirs, "theirs")):
        z1, z2 = projector(x1), projector(x2)
        p1, p2 = predictor(z1), predictor(z2)
        if mode == "ours":
            value = simsiam_loss(p1, p2, z1, z2)
        else:
            value = 0.5 * (loss(p1, z2.detach()) + loss(p2, z1.detach()))
        value.backward()
        grads = [p.grad for head in (projector, predictor) for p in head.parameters() if p.grad is not None]
        results.append((z1, p1, value, grads))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.peers
def test_same_loss_as_lightly_for_extreme_vectors():
    need("lightly")
    loss = need_module("lightly.loss").NegativeCosineSimilarity()
    for scale in (1e-6, 1.0, 1e6):
        p, z = scale * torch.randn(8, 16), torch.randn(8, 16)
        torch.testing.assert_close(negative_cosine(p, z), loss(p, z))
    assert negative_cosine(torch.zeros(2, 3), torch.zeros(2, 3)) == loss(torch.zeros(2, 3), torch.zeros(2, 3)) == 0
