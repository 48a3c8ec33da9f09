"""Channel equilibrium: the block against the official code and closed forms, the networks, the claims."""

import hashlib
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from saigen.cards import catalogue
from saigen.nn.resnet import resnet18
from saigen.papers.vision.channel_equilibrium import (
    CEResNet,
    ChannelEquilibrium2d,
    ce_resnet18,
    ce_resnet50,
    claims,
    inhibited_channel_ratio,
    inverse_sqrt_newton,
)
from saigen.trial import Trial
from tests.golden.channel_equilibrium.make import LAYERS, draw, weights

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "channel_equilibrium" / "golden.safetensors")


def close(ours, name, tolerance=2e-6):
    torch.testing.assert_close(ours.float(), GOLDEN[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", LAYERS)
def test_equals_official_block(name):
    channels, size = LAYERS[name]
    block = ChannelEquilibrium2d(channels, size).double()
    block.load_state_dict(weights(block.state_dict()))
    x = (1.5 * draw(1, 4, channels, 5, 3) + 0.5).requires_grad_()
    y = block(x)
    y.square().mean().backward()
    close(y[:, ::3], f"{name}.y")
    close(x.grad[:, ::3], f"{name}.grad_x")
    close(block.x_weight.grad, f"{name}.grad_w")
    close(block.AR.fc[0].weight.grad, f"{name}.grad_fc")
    block(draw(2, 4, channels, 5, 3))
    for buffer in ("running_mean", "running_wm"):
        close(getattr(block, buffer), f"{name}.{buffer}")
    close(block.AR.running_scale, f"{name}.running_scale")
    close(block.eval()(x)[:, ::3], f"{name}.eval")


def test_equals_official_resnet():
    net = CEResNet("bottleneck", (1, 1, 1, 1), num_classes=10).double()
    net.load_state_dict(weights(net.state_dict()))
    with torch.no_grad():
        for step, mode in enumerate(("train", "again", "eval")):
            net.train(mode != "eval")
            y = net(draw(3 + step, 4, 3, 64, 64))
            torch.testing.assert_close(y.float(), GOLDEN[f"resnet.{mode}"], rtol=1e-5, atol=1e-5)


def test_has_the_official_keys():
    with torch.device("meta"):
        keys = [f"{key} {tuple(value.shape)}" for key, value in ce_resnet50().state_dict().items()]
    assert hashlib.sha256("\n".join(sorted(keys)).encode()).digest() == bytes(GOLDEN["keys.sha256"].tolist())


def test_official_checkpoints_come_from_data_parallel():
    net = CEResNet("basic", (1,), (16,), stages=(1,), num_classes=3, small_stem=True)
    official = {f"module.{key}": value for key, value in net.state_dict().items()}
    assert list(CEResNet.convert_state_dict(official)) == list(net.state_dict())


@pytest.mark.parametrize("d", [1, 3, 16])
def test_newton_tends_to_the_inverse_root(d):
    generator = torch.Generator().manual_seed(d)
    values = torch.linspace(1, 50, d, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator)).Q
    sigma = basis @ values.diag() @ basis.T
    exact = basis @ values.rsqrt().diag() @ basis.T
    torch.testing.assert_close(inverse_sqrt_newton(sigma, 25, rescale=True), exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverse_sqrt_newton(sigma, 25), exact * sigma.trace().sqrt(), rtol=1e-9, atol=1e-9)


def test_newton_on_white_input_is_the_scalar_recursion():
    for steps, value in [(1, 1.46875), (2, 2.1041), (3, 2.8651), (30, 4.0)]:
        root = inverse_sqrt_newton(torch.eye(16, dtype=torch.float64), steps)
        torch.testing.assert_close(root, value * torch.eye(16, dtype=torch.float64), rtol=0, atol=5e-5)


def by_the_formula(block, x):
    """Section 3, one group and one sample at a time."""
    d, out = block.group_size, torch.zeros_like(x)
    s2 = torch.stack([torch.stack([channel.var() for channel in sample]) for sample in x])
    w1, norm, w2 = block.AR.fc[0].weight, block.AR.fc[1], block.AR.fc[3].weight
    u = torch.sigmoid(torch.relu(norm(s2 @ w1.T)) @ w2.T)
    share = torch.sigmoid(block.x_weight)
    for first in range(0, x.shape[1], d):
        rows = x[:, first : first + d].transpose(0, 1).reshape(d, -1)
        sigma = torch.cov(rows, correction=0) + block.eps * torch.eye(d, dtype=x.dtype)
        sigma, root = sigma / sigma.trace(), torch.eye(d, dtype=x.dtype)
        for _ in range(block.iterations):
            root = 1.5 * root - 0.5 * torch.linalg.matrix_power(root, 3) @ sigma
        for n in range(len(x)):
            for c in range(d):
                decorrelated = sum(root[c, j] * x[n, first + j] for j in range(d))
                reweighted = u[n, first + c] / s2.mean().sqrt() * x[n, first + c]
                out[n, first + c] = share * decorrelated + (1 - share) * reweighted
    return out


def test_equals_the_formula():
    block = ChannelEquilibrium2d(12, 4).double()
    with torch.no_grad():
        block.x_weight.fill_(0.7)
    x = 3 * draw(4, 3, 12, 4, 5) - 1
    torch.testing.assert_close(block(x), by_the_formula(block, x), rtol=1e-10, atol=1e-10)
    parts = block.mixing * block.batch_decorrelation(x) + (1 - block.mixing) * block.instance_reweighting(x)
    torch.testing.assert_close(block(x), parts, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"centre": True, "rescale": True}, {"branches": "bd"}, {"branches": "ir"}])
def test_gradcheck(options):
    block = ChannelEquilibrium2d(4, 2, reduction=2, **options).double()
    assert torch.autograd.gradcheck(block, (draw(5, 2, 4, 3, 2).requires_grad_(),), fast_mode=True)


def test_textbook_form_whitens():
    block = ChannelEquilibrium2d(8, 8, iterations=25, centre=True, rescale=True, branches="bd", eps=1e-9).double()
    x = torch.einsum("ij,njhw->nihw", draw(6, 8, 8), draw(7, 16, 8, 6, 6)) + 2
    y = block(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.cov(y, correction=0), torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(block.batch_decorrelation(x).transpose(0, 1).flatten(1), y)


def test_groups_of_one_leave_x_alone():
    x = draw(8, 2, 5, 3, 3)
    torch.testing.assert_close(ChannelEquilibrium2d(5, 1, branches="bd").double()(x), x)


def test_reweighting_is_one_factor_a_channel():
    # sixteen hidden units: with two the gates' layer norm knows only (1, -1) and (-1, 1), which samples may share
    x = draw(9, 2, 64, 4, 4)
    factor = ChannelEquilibrium2d(64, 4, branches="ir").double()(x) / x
    torch.testing.assert_close(factor, factor[:, :, :1, :1].expand_as(factor))
    assert not torch.allclose(factor[0], factor[1])


def test_the_weight_chooses_a_branch():
    x, block = draw(10, 2, 8, 4, 4), ChannelEquilibrium2d(8, 4).double()
    for w, branch in [(60.0, block.batch_decorrelation), (-60.0, block.instance_reweighting)]:
        with torch.no_grad():
            block.x_weight.fill_(w)
        torch.testing.assert_close(block(x), branch(x))


def test_a_weak_channel_is_woken():
    """A channel a thousand times weaker than the others of its group leaves the block far less so."""
    mixing = torch.eye(8, dtype=torch.float64)
    mixing[0, 1:] = 0.3  # what little it has in common with the others
    x = torch.einsum("ij,njhw->nihw", mixing, draw(11, 32, 8, 6, 6))
    x[:, 0] *= 1e-3
    y = ChannelEquilibrium2d(8, 8, iterations=12, branches="bd").double()(x)
    before, after = (t.std((0, 2, 3))[0] / t.std((0, 2, 3)).max() for t in (x, y))
    assert before < 2e-3 and after > 20 * before


def test_running_statistics_are_used_in_eval_mode():
    block, x = ChannelEquilibrium2d(8, 4).double(), draw(12, 8, 8, 5, 5)
    for _ in range(200):
        block(x)
    expected = block(x)
    torch.testing.assert_close(block.eval()(x), expected, rtol=1e-6, atol=1e-6)
    one = block(x[:1])
    torch.testing.assert_close(one, block(x)[:1])


def test_an_untrained_block_is_finite_in_eval_mode():
    y = ChannelEquilibrium2d(16).eval()(torch.rand(2, 16, 4, 4))
    assert y.isfinite().all()


def test_constant_input_is_finite_and_has_a_gradient():
    block, x = ChannelEquilibrium2d(16), torch.zeros(2, 16, 4, 4, requires_grad=True)
    block(x).sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in block.parameters())


def test_statistics_stay_in_float32_under_autocast():
    block, x = ChannelEquilibrium2d(16), torch.randn(4, 16, 6, 6)
    full = block(x)
    before = block.running_wm.clone()
    with torch.autocast("cpu", torch.bfloat16):
        half = block(x.bfloat16())
    assert half.dtype == torch.bfloat16 and block.running_wm.dtype == torch.float32
    torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.05)
    assert not torch.equal(before, block.running_wm)


BLOCKS = {64: 2_081, 256: 32_897, 512: 131_329, 1024: 524_801}


@pytest.mark.parametrize("channels", BLOCKS)
def test_block_sizes(channels):
    with torch.device("meta"):
        block = ChannelEquilibrium2d(channels)
    assert sum(p.numel() for p in block.parameters()) == BLOCKS[channels] == channels**2 // 2 + channels // 2 + 1


def test_networks_are_placed_as_in_the_paper():
    with torch.device("meta"):
        net = ce_resnet50()
    sizes = {name: m.group_size for name, m in net.named_modules() if isinstance(m, ChannelEquilibrium2d)}
    assert len(sizes) == 1 + 3 + 4 + 6 and sizes.pop("ce1") == 64 and set(sizes.values()) == {16}
    assert not any(name.startswith("layer4") for name in sizes)


def test_before_the_norm_is_another_network_of_the_same_size():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        after, before = (
            CEResNet("basic", (1,), (16,), stages=(1,), num_classes=3, small_stem=True, placement=p)
            for p in ("after", "before")
        )
    before.load_state_dict(after.state_dict())
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(after(x), before(x))


def test_inhibited_channels_are_counted():
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([1.0, 1.0, 1e-3, 1.0]))
        net[1].bias.copy_(torch.tensor([0.0, 0.0, 0.0, -50.0]))
    x = draw(13, 8, 2, 6, 6).float()
    net.train()
    for _ in range(50):
        net(x)
    net[0].eval()
    assert inhibited_channel_ratio(net, [x[:4], x[4:]]) == {"2": 0.5}
    assert net.training and not net[0].training
    # the maps of a block's two ReLUs, and none of its own hooks left behind
    ratios = inhibited_channel_ratio(resnet18(num_classes=2), [torch.rand(2, 3, 32, 32)])
    assert len(ratios) == 17 and not net[2]._forward_hooks


@pytest.mark.parametrize("claim", [claim.id for claim in catalogue.paper("channel_equilibrium").card.claim])
def test_claims_run_at_tiny(claim):
    first, again = (getattr(claims, claim)(Trial(seed=1000, scale="tiny")) for _ in range(2))
    quantities = catalogue.paper("channel_equilibrium").card.find_claim(claim).quantities
    assert set(quantities) <= set(first) and all(math.isfinite(value) for value in first.values())
    assert first == again


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ChannelEquilibrium2d(0), "num_channels is 0"),
        (lambda: ChannelEquilibrium2d(8, 0), "group_size is 0"),
        (lambda: ChannelEquilibrium2d(8, iterations=0), "iterations is 0"),
        (lambda: ChannelEquilibrium2d(8, reduction=9), "reduction is 9"),
        (lambda: ChannelEquilibrium2d(8, momentum=0.0), "momentum is 0.0"),
        (lambda: ChannelEquilibrium2d(8, eps=0.0), "eps is 0.0"),
        (lambda: ChannelEquilibrium2d(8, branches="all"), "branches is 'all'"),
        (lambda: ChannelEquilibrium2d(8)(torch.rand(2, 4, 3, 3)), "num_channels = 8"),
        (lambda: ChannelEquilibrium2d(8)(torch.rand(2, 8, 1, 1)), "x is a map of (1, 1)"),
        (lambda: CEResNet("basic", stages=(5,)), "stages is (5,)"),
        (lambda: ce_resnet18(placement="around"), "placement is 'around'"),
        (lambda: inverse_sqrt_newton(torch.eye(3), 0), "iterations is 0"),
        (lambda: inverse_sqrt_newton(torch.rand(2, 3)), "matrix has the shape (2, 3)"),
        (lambda: inhibited_channel_ratio(nn.ReLU(), [], 1.5), "threshold is 1.5"),
        (lambda: inhibited_channel_ratio(nn.Linear(2, 2), []), "model has no nn.ReLU"),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(ValueError) as error:
        call()
    assert text in str(error.value)
