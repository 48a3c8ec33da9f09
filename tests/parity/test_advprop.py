"""AdvProp beside timm: the released networks' layout, and batch norms split over a mixed batch."""

import copy

import pytest
import torch
import torch.nn.functional as F

from saigen.papers.vision import advprop
from saigen.papers.vision.advprop import convert_auxiliary_bn, strip_auxiliary_bn, use_branch
from saigen.papers.vision.efficientnet import EfficientNet, efficientnet_b0
from tests.parity.test_efficientnet import randomise, relative
from tests.peers import need, need_module

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("variant", ["b0", "b4"])
def test_same_logits_as_timm(variant):
    timm = need("timm")
    theirs = randomise(timm.create_model(f"tf_efficientnet_{variant}.ap_in1k")).eval()
    ours = getattr(advprop, f"tf_efficientnet_{variant}_ap")().eval()
    ours.load_state_dict(EfficientNet.convert_state_dict(theirs.state_dict()))
    for field in ("mean", "std"):
        assert tuple(ours.default_cfg[field]) == tuple(theirs.default_cfg[field])
    x = torch.randn(2, 3, 65, 98, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) < 1e-5


def test_split_batch_norm_as_timms():
    need("timm")
    layers = need_module("timm.layers")
    ours = efficientnet_b0(num_classes=5, drop_rate=0.0, drop_path_rate=0.0, bn_momentum=0.1).double()
    theirs = layers.convert_splitbn_model(copy.deepcopy(ours), num_splits=2).double().train()
    convert_auxiliary_bn(ours).train()
    assert set(ours.state_dict()) == set(theirs.state_dict())
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(6, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    with use_branch(ours, (0, 1)):
        left = ours(x)
    right = theirs(x)
    assert relative(left, right) < 1e-10
    F.cross_entropy(left, y).backward()
    F.cross_entropy(right, y).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert max(relative(p.grad, gradients[n]) for n, p in ours.named_parameters() if gradients[n].any()) < 1e-8
    statistics = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.allclose(tensor, statistics[name], rtol=1e-10), name
    assert set(strip_auxiliary_bn(ours).state_dict()) == {k for k in statistics if "aux_bn" not in k}


def test_converts_timms_batch_norms_with_activations():
    timm = need("timm")
    theirs = randomise(timm.create_model("efficientnet_b0", num_classes=5)).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(x)
        convert_auxiliary_bn(theirs)
        with use_branch(theirs, 1):
            assert torch.equal(theirs(x), expected)
        assert torch.equal(strip_auxiliary_bn(theirs)(x), expected)
