"""EfficientNetV2 beside timm and torchvision: the same logits and gradients from the same random weights."""

import pytest
import torch
import torch.nn.functional as F

from saigen.papers.vision import efficientnet_v2
from saigen.papers.vision.efficientnet_v2 import EfficientNetV2
from tests.parity.test_efficientnet import randomise, relative
from tests.peers import need, need_module

pytestmark = pytest.mark.peers


@pytest.mark.parametrize(
    "name", ["tf_efficientnetv2_b0", "tf_efficientnetv2_b3", "tf_efficientnetv2_s", "efficientnetv2_s"]
)
def test_same_logits_as_timm(name):
    timm = need("timm")
    theirs = randomise(timm.create_model(name)).eval()
    ours = getattr(efficientnet_v2, name)().eval()
    ours.load_state_dict(EfficientNetV2.convert_state_dict(theirs.state_dict()))
    x = torch.randn(2, 3, 65, 98, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) < 1e-5
        assert relative(ours.forward_features(x), theirs.forward_features(x)) < 1e-5
        pooled = [model.forward_head(model.forward_features(x), pre_logits=True) for model in (ours, theirs)]
        assert relative(*pooled) < 1e-5


@pytest.mark.parametrize("name", ["b1", "b2", "m", "l", "xl"])
def test_same_layout_as_timm_in_the_other_variants(name):
    timm = need("timm")
    name = f"tf_efficientnetv2_{name}"
    with torch.device("meta"):
        theirs, ours = timm.create_model(name), getattr(efficientnet_v2, name)()
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in ours.state_dict().items()} == shapes
    modules = dict(theirs.named_modules())
    for key, module in ours.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            same = type(module).__name__ == "Conv2dSame"
            assert same == (type(modules[key]).__name__ == "Conv2dSame")
            assert module.stride == modules[key].stride
            assert same or module.padding == modules[key].padding
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.eps == modules[key].eps
    theirs_cfg = theirs.default_cfg
    for field in ("input_size", "test_input_size", "mean", "std"):
        assert tuple(ours.default_cfg[field]) == tuple(theirs_cfg[field])


def test_same_gradients_as_timm():
    timm = need("timm")
    theirs = randomise(timm.create_model("tf_efficientnetv2_b0", bn_momentum=0.1)).double().train()
    ours = efficientnet_v2.tf_efficientnetv2_b0(drop_rate=0.0, drop_path_rate=0.0).double().train()
    ours.load_state_dict(theirs.state_dict())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 64, 64, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 1000, (4,), generator=generator)
    for model in (ours, theirs):
        F.cross_entropy(model(x), y).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert max(relative(p.grad, gradients[name]) for name, p in ours.named_parameters() if gradients[name].any()) < 1e-8
    statistics = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        if "running" in name:
            assert torch.allclose(tensor, statistics[name], rtol=1e-10)


def test_loads_torchvision():
    need("torchvision")
    theirs = randomise(need_module("torchvision.models").efficientnet_v2_s()).eval()
    ours = efficientnet_v2.efficientnetv2_s(bn_eps=theirs.features[0][1].eps).eval()
    ours.load_state_dict(EfficientNetV2.convert_state_dict(theirs.state_dict()))
    x = torch.randn(2, 3, 75, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) < 1e-5
