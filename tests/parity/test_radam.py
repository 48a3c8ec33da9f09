"""RAdam against pytorch_optimizer."""

import pytest
import torch
import torch.nn.functional as F

from saigen.papers.training.radam import RAdam
from tests.papers.training.test_sam import make_batch, make_net, weights
from tests.peers import need

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("fallback", ["momentum", "skip"])
def test_steps_equal_pytorch_optimizer(fallback):
    theirs = need("pytorch_optimizer")
    nets = [make_net().double(), make_net().double()]
    options = {"lr": 0.05, "betas": (0.9, 0.99), "weight_decay": 0.1}
    ours = RAdam(nets[0].parameters(), fallback=fallback, **options)
    peer = theirs.RAdam(nets[1].parameters(), degenerated_to_sgd=fallback == "momentum", **options)
    for step in range(12):
        x, y = make_batch(step)
        for net, optimizer in zip(nets, (ours, peer), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(net(x.double()), y).backward()
            optimizer.step()
        torch.testing.assert_close(weights(nets[0]), weights(nets[1]), atol=1e-12, rtol=0)
