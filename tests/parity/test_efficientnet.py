"""EfficientNet beside timm and torchvision: the same logits and gradients from the same random weights."""

import pytest
import torch
import torch.nn.functional as F

from saigen.papers.vision import efficientnet
from saigen.papers.vision.efficientnet import EfficientNet, RMSpropTF
from tests.peers import need, need_module

pytestmark = pytest.mark.peers


def randomise(model, seed=0):
    """Weights at their initial size, but statistics, scales and biases that nothing can hide behind."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif name.endswith("running_mean") or (tensor.ndim == 1 and name.endswith("bias")):
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
        elif tensor.ndim == 1:
            tensor.copy_(0.7 + 0.6 * torch.rand(tensor.shape, generator=generator))
        elif tensor.ndim > 1:
            fan_in = tensor[0].numel()
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * fan_in**-0.5)
    return model


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("variant", ["b0", "b1", "b2", "b3", "b4", "b5"])
@pytest.mark.parametrize("prefix", ["", "tf_"])
def test_same_logits_as_timm(variant, prefix):
    timm = need("timm")
    theirs = randomise(timm.create_model(f"{prefix}efficientnet_{variant}")).eval()
    ours = getattr(efficientnet, f"{prefix}efficientnet_{variant}")().eval()
    ours.load_state_dict(EfficientNet.convert_state_dict(theirs.state_dict()))
    x = torch.randn(2, 3, 97, 130, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) < 1e-5
        assert relative(ours.forward_features(x), theirs.forward_features(x)) < 1e-5
        assert (
            relative(
                ours.forward_head(ours.forward_features(x), pre_logits=True),
                theirs.forward_head(theirs.forward_features(x), pre_logits=True),
            )
            < 1e-5
        )


@pytest.mark.parametrize("variant", ["b6", "b7", "b8", "l2"])
@pytest.mark.parametrize("prefix", ["", "tf_"])
def test_same_layout_as_timm_in_the_large_variants(variant, prefix):
    timm = need("timm")
    name = f"{prefix}efficientnet_{variant}"
    with torch.device("meta"):
        theirs, ours = timm.create_model(name), getattr(efficientnet, name)()
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


@pytest.mark.parametrize("prefix", ["", "tf_"])
def test_same_gradients_as_timm(prefix):
    timm = need("timm")
    theirs = randomise(timm.create_model(f"{prefix}efficientnet_b0", bn_momentum=0.01)).double().train()
    build = getattr(efficientnet, f"{prefix}efficientnet_b0")
    ours = build(drop_rate=0.0, drop_path_rate=0.0).double().train()
    ours.load_state_dict(theirs.state_dict())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 64, 64, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 1000, (4,), generator=generator)
    for model in (ours, theirs):
        F.cross_entropy(model(x), y).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    worst = max(relative(p.grad, gradients[name]) for name, p in ours.named_parameters() if gradients[name].any())
    assert worst < 1e-8
    statistics = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        if "running" in name:
            assert torch.allclose(tensor, statistics[name], rtol=1e-10)


@pytest.mark.parametrize("variant", ["b0", "b2", "b5"])
def test_loads_torchvision(variant):
    need("torchvision")
    models = need_module("torchvision.models")
    theirs = randomise(getattr(models, f"efficientnet_{variant}")()).eval()
    eps = theirs.features[0][1].eps
    ours = getattr(efficientnet, f"efficientnet_{variant}")(bn_eps=eps).eval()
    ours.load_state_dict(EfficientNet.convert_state_dict(theirs.state_dict()))
    x = torch.randn(2, 3, 75, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) < 1e-5


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"weight_decay": 1e-2, "alpha": 0.8, "eps": 1e-2}])
def test_rmsprop_steps_as_timms(foreach, options):
    need("timm")
    optim = need_module("timm.optim")

    def train(make):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2)).double()
        optimizer = make(net.parameters())
        x, y = torch.randn(20, 5).double(), torch.randint(0, 2, (20,))
        for step in range(25):
            optimizer.param_groups[0]["lr"] = 0.05 * 0.9**step
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    ours = train(lambda params: RMSpropTF(params, lr=0.05, foreach=foreach, **options))
    base = {"alpha": 0.9, "eps": 1e-3, "momentum": 0.9} | options
    assert relative(ours, train(lambda params: optim.RMSpropTF(params, lr=0.05, **base))) < 1e-10
