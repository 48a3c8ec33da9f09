"""Dynamic convolution against timm: the mixing of kernels, and MobileNetV2 that it is put into."""

import pytest
import torch

from saigen import weights
from saigen.nn.mobilenet_v2 import MobileNetV2
from saigen.papers.vision.dynamic_convolution import DynamicConv2d
from tests.peers import need, need_module

pytestmark = pytest.mark.peers


@pytest.mark.parametrize(("kernel", "stride", "groups"), [(3, 1, 1), (3, 2, 1), (1, 1, 1), (3, 1, 8), (5, 2, 2)])
def test_equals_timm_condconv(kernel, stride, groups):
    """timm mixes kernels by weights from outside: given our attention, it gives our output and gradients."""
    layers = need_module("timm.layers")
    ours = DynamicConv2d(8, 16, kernel, stride, kernel // 2, groups=groups, temperature=2).double()
    theirs = layers.CondConv2d(8, 16, kernel, stride, kernel // 2, groups=groups, bias=True, num_experts=4).double()
    with torch.no_grad():
        theirs.weight.copy_(ours.weight.flatten(1))
        theirs.bias.copy_(ours.bias)
    x = torch.randn(3, 8, 10, 11, dtype=torch.float64)
    y, expected = ours(x), theirs(x, ours.attention(x).detach())
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.weight.grad.flatten(1), theirs.weight.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "width"), [("mobilenetv2_100", 1.0), ("mobilenetv2_050", 0.5), ("mobilenetv2_035", 0.35)]
)
def test_mobilenet_v2_loads_timms_weights(name, width):
    timm = need("timm")
    theirs = timm.create_model(name, num_classes=10).eval()
    ours = MobileNetV2(width, num_classes=10).eval()
    weights.load(ours, theirs.state_dict())
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
