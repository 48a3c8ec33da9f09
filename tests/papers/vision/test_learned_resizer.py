"""The learned resizer: its formula, its identities, a public layout, and sizes of every kind."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saigen.cards import catalogue
from saigen.measure import macs, parameters
from saigen.papers.vision.learned_resizer import (
    LearnedResizer,
    ResizedClassifier,
    claims,
    freeze_backbone,
    joint_param_groups,
    resizer_macs,
)
from saigen.trial import Trial


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.is_floating_point():
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model


@pytest.mark.parametrize("training", [False, True])
def test_equals_the_formula(training):
    net = randomised(LearnedResizer((10, 7), width=6, num_blocks=2)).double().train(training)
    p = dict(net.state_dict())
    x = torch.randn(3, 3, 21, 18, dtype=torch.float64)

    def norm(x, name):
        mean, var = p[f"{name}.running_mean"], p[f"{name}.running_var"]
        if training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        scale = p[f"{name}.weight"] / (var + 1e-5).sqrt()
        return x * scale.view(1, -1, 1, 1) + (p[f"{name}.bias"] - mean * scale).view(1, -1, 1, 1)

    def leaky(x):
        return torch.where(x > 0, x, 0.2 * x)

    def resize(x):
        return F.interpolate(x, (10, 7), mode="bilinear", align_corners=False)

    a = leaky(F.conv2d(x, p["conv1.weight"], p["conv1.bias"], padding=3))
    a = norm(leaky(F.conv2d(a, p["conv2.weight"], p["conv2.bias"])), "bn")
    f0 = f = resize(a)
    for k in range(2):
        g = leaky(norm(F.conv2d(f, p[f"blocks.{k}.conv1.weight"], padding=1), f"blocks.{k}.bn1"))
        f = f + norm(F.conv2d(g, p[f"blocks.{k}.conv2.weight"], padding=1), f"blocks.{k}.bn2")
    f = f0 + norm(F.conv2d(f, p["conv3.weight"], padding=1), "bn3")
    expected = resize(x) + F.conv2d(f, p["conv4.weight"], p["conv4.bias"], padding=3)
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-10)


class PublicBlock(nn.Module):
    def __init__(self, n):
        super().__init__()
        conv = lambda: nn.Conv2d(n, n, 3, 1, 1, bias=False)  # noqa: E731
        self.block = nn.Sequential(conv(), nn.BatchNorm2d(n), nn.LeakyReLU(0.2), conv(), nn.BatchNorm2d(n))

    def forward(self, x):
        return x + self.block(x)


class PublicLayout(nn.Module):
    """Modules in the order and under the names that the public PyTorch implementation gives them."""

    def __init__(self, n, r):
        super().__init__()
        self.module1 = nn.Sequential(
            nn.Conv2d(3, n, 7, padding=3), nn.LeakyReLU(0.2), nn.Conv2d(n, n, 1), nn.LeakyReLU(0.2), nn.BatchNorm2d(n)
        )
        self.resblocks = nn.Sequential(*[PublicBlock(n) for _ in range(r)])
        self.module3 = nn.Sequential(nn.Conv2d(n, n, 3, 1, 1, bias=False), nn.BatchNorm2d(n))
        self.module4 = nn.Conv2d(n, 3, 7, padding=3)

    def forward(self, x):
        shrink = lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)  # noqa: E731
        f0 = shrink(self.module1(x))
        return self.module4(f0 + self.module3(self.resblocks(f0))) + shrink(x)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_loads_the_public_layout(prefix):
    theirs = randomised(PublicLayout(8, 2)).double().train()
    ours = LearnedResizer(12, width=8, num_blocks=2).double().train()
    ours.load_state_dict(LearnedResizer.convert_state_dict({prefix + k: v for k, v in theirs.state_dict().items()}))
    x, y = (torch.randn(2, 3, 24, 24, dtype=torch.float64).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    a, b = ours(x), theirs(y)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for out in (a, b):
        out.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ours.conv1.weight.grad, theirs.module1[0].weight.grad, rtol=1e-8, atol=1e-8)
    state = ours.state_dict()
    assert LearnedResizer.convert_state_dict(state).keys() == state.keys()


@pytest.mark.parametrize("antialias", [False, True])
def test_identity_is_plain_resizing(antialias):
    net = LearnedResizer(11, init="identity", antialias=antialias)
    x = torch.randn(2, 3, 32, 25)
    plain = F.interpolate(x, (11, 11), mode="bilinear", align_corners=False, antialias=antialias)
    assert torch.equal(net(x), plain)
    net(x).square().sum().backward()
    assert net.conv4.weight.grad.abs().sum() > 0  # and leaves it in training


@pytest.mark.parametrize("size", [(1, 1), (13, 40), (64, 3), (31, 29)])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "area", "nearest"])
def test_any_size_to_any_size(size, mode):
    net = LearnedResizer(8, width=4, mode=mode)
    assert net(torch.randn(2, 3, 31, 29), size).shape == (2, 3, *size)
    assert net(torch.randn(2, 3, *size)).shape == (2, 3, 8, 8)


def test_one_channel_becomes_three():
    net = LearnedResizer(8, 1, 3, init="identity")
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(net(x), F.interpolate(x, (8, 8), mode="bilinear").expand(-1, 3, -1, -1))


def test_gradient_reaches_the_first_convolution_through_the_backbone():
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = ResizedClassifier(LearnedResizer(9), backbone, nn.InstanceNorm2d(3))
    model(torch.randn(2, 3, 20, 20)).square().sum().backward()
    assert model.resizer.conv1.weight.grad.abs().sum() > 0
    assert model(torch.randn(2, 3, 20, 20), (7, 8)).shape == (2, 4)
    freeze_backbone(model)
    assert not any(p.requires_grad for p in backbone.parameters()) and model.resizer.conv1.weight.requires_grad
    freeze_backbone(model, frozen=False)
    groups = joint_param_groups(model, 0.1, 0.02)
    assert [group["lr"] for group in groups] == [0.1, 0.02]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert joint_param_groups(model, 0.1)[1]["lr"] == 0.1


@pytest.mark.parametrize(("n", "r"), [(16, 1), (16, 3), (32, 2)])
def test_counts_by_hand(n, r):
    with torch.device("meta"):
        net = LearnedResizer((30, 20), width=n, num_blocks=r)
    by_hand = (147 * n + n) + (n * n + n) + 2 * n + r * (18 * n * n + 4 * n) + (9 * n * n + 2 * n) + (147 * n + 3)
    assert parameters(net) == by_hand
    assert macs(net, (3, 50, 44)) == resizer_macs(n, r, (50, 44), (30, 20))


def test_eval_does_not_look_at_the_batch():
    net = randomised(LearnedResizer(6, width=4)).eval()
    x = torch.randn(4, 3, 13, 13)
    torch.testing.assert_close(net(x)[:1], net(x[:1]), rtol=1e-5, atol=1e-5)


def test_stripes_are_a_function_of_the_generator_and_of_eight_kinds():
    x, y = claims.stripes(64, 32, Trial(1000).generator("a"))
    again, _ = claims.stripes(64, 32, Trial(1000).generator("a"))
    assert x.shape == (64, 1, 32, 32) and torch.equal(x, again) and set(y.tolist()) == set(range(8))


@pytest.mark.parametrize("claim", [claim.id for claim in catalogue.paper("learned_resizer").card.claim])
def test_claims_run_at_tiny(claim):
    first, again = (getattr(claims, claim)(Trial(seed=1000, scale="tiny")) for _ in range(2))
    quantities = catalogue.paper("learned_resizer").card.find_claim(claim).quantities
    assert set(quantities) <= set(first) and all(math.isfinite(value) for value in first.values()) and first == again


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: LearnedResizer((8, 0)), "size is (8, 0)"),
        (lambda: LearnedResizer(8, in_chans=0), "in_chans is 0"),
        (lambda: LearnedResizer(8, num_blocks=-1), "num_blocks is -1"),
        (lambda: LearnedResizer(8, 3, 1), "out_chans is 1"),
        (lambda: LearnedResizer(8, mode="linear"), "mode is 'linear'"),
        (lambda: LearnedResizer(8, mode="area", antialias=True), "antialias is True"),
        (lambda: LearnedResizer(8, init="zero"), "init is 'zero'"),
        (lambda: LearnedResizer(8, slope=1.5), "slope is 1.5"),
        (lambda: LearnedResizer(8)(torch.rand(1, 4, 8, 8)), "x has 4 channels"),
        (lambda: resizer_macs(16, 1, 448, 0), "out_size is 0"),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(ValueError) as error:
        call()
    assert text in str(error.value)
