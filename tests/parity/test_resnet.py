"""ResNets against timm: equal keys, outputs, gradients, running statistics."""

import pytest
import torch

from saigen.nn import resnet
from tests.peers import need

NAMES = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


@pytest.mark.peers
@pytest.mark.parametrize("name", NAMES)
def test_same_keys_and_shapes_as_timm(name):
    timm = need("timm")
    with torch.device("meta"):
        ours, theirs = getattr(resnet, name)(), timm.create_model(name)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.peers
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_same_outputs_and_gradients_as_timm(name):
    timm = need("timm")
    torch.manual_seed(0)
    # without zero init every branch takes part
    theirs = timm.create_model(name, num_classes=10, zero_init_last=False)
    ours = getattr(resnet, name)(num_classes=10)
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 64, 64)
    for mode in (True, False):
        outputs = [net.train(mode)(x) for net in (ours, theirs)]
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
        gradients = []
        for net, y in zip((ours, theirs), outputs, strict=True):
            net.zero_grad()
            y.square().mean().backward()
            gradients.append({k: p.grad for k, p in net.named_parameters()})
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x))
