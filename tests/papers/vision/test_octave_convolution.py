"""Octave convolution: against the usual convolution and the official networks, its identities, its counts."""

import hashlib
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from saigen import weights
from saigen.measure import macs, parameters
from saigen.nn.resnet import resnet50
from saigen.papers.vision import octave_convolution as room
from saigen.papers.vision.octave_convolution import OctaveBatchNorm2d, OctaveConv2d, OctMobileNetV1, OctResNet, PerGroup
from tests.golden.involution.make import draw, golden_state
from tests.golden.octave_convolution.make import OFFICIAL, official_value

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "octave_convolution" / "golden.safetensors")
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def pair(channels, alpha, h, w, *, dtype=torch.float64, seed=0):
    generator, low = torch.Generator().manual_seed(seed), int(alpha * channels)
    high = torch.randn(2, channels - low, h, w, generator=generator, dtype=dtype)
    return high, torch.randn(2, low, -(-h // 2), -(-w // 2), generator=generator, dtype=dtype)


def doubled(x):
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def by_the_formula(layer, x):
    """Section 3.2 written out, with pooling by slices and upsampling by repetition (even sizes)."""

    def pool(x):
        return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4

    def f(x, path):
        return F.conv2d(x, path.weight, None, 1, layer.padding, layer.dilation)

    high, low = x
    if layer.stride == 1:
        y = f(high, layer.conv_h2h) + doubled(f(low, layer.conv_l2h))
        y_low = f(low, layer.conv_l2l) + f(pool(high), layer.conv_h2l)
    else:
        y = f(pool(high), layer.conv_h2h) + f(low, layer.conv_l2h)
        y_low = f(pool(low), layer.conv_l2l) + f(F.avg_pool2d(high, 4), layer.conv_h2l)
    if layer.conv_h2h.bias is not None:
        y, y_low = y + layer.conv_h2h.bias[:, None, None], y_low + layer.conv_h2l.bias[:, None, None]
    return y, y_low


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "dilation", "alpha_in", "alpha_out"), [(1, 1, 0.5, 0.25), (3, 1, 0.25, 0.5), (3, 2, 0.5, 0.5)]
)
def test_equals_the_formula(kernel, dilation, alpha_in, alpha_out, stride, gradients):
    layer = OctaveConv2d(8, 12, kernel, alpha_in, alpha_out, stride, "same", dilation).double()
    x = tuple(part.requires_grad_(gradients) for part in pair(8, alpha_in, 8, 12))
    with torch.set_grad_enabled(gradients):
        for ours, theirs in zip(layer(x), by_the_formula(layer, x), strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck(stride):
    layer = OctaveConv2d(4, 4, 3, 0.5, 0.5, stride, 1).double()
    x = tuple(part.requires_grad_() for part in pair(4, 0.5, 5, 4))
    assert torch.autograd.gradcheck(lambda *x: layer(x), x, fast_mode=True)


def test_without_low_channels_it_is_the_usual_convolution():
    conv = nn.Conv2d(6, 8, 3, padding=1).double()
    x = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    assert torch.equal(OctaveConv2d.from_conv(conv, 0, 0)(x), conv(x))
    strided = nn.Conv2d(6, 8, 3, 2, 1).double()
    pooled = F.conv2d(F.avg_pool2d(x[:, :, :6, :8], 2), strided.weight, strided.bias, padding=1)
    torch.testing.assert_close(OctaveConv2d.from_conv(strided, 0, 0)(x[:, :, :6, :8]), pooled, **EXACT)


@pytest.mark.parametrize(("alpha_in", "alpha_out"), [(0.25, 0.25), (0.5, 0.75), (0, 0.5), (0.5, 0)])
def test_a_1x1_is_the_usual_one_on_doubled_maps(alpha_in, alpha_out):
    conv = nn.Conv2d(8, 12, 1).double()
    layer = OctaveConv2d.from_conv(conv, alpha_in, alpha_out)
    assert torch.equal(layer.pack_weight(), conv.weight)
    high, low = pair(8, alpha_in, 6, 8)
    z = conv(torch.cat([high, doubled(low)], 1))
    y = layer((high, low) if alpha_in else high)
    y = y if isinstance(y, tuple) else (y,)
    split = 12 - int(alpha_out * 12)
    torch.testing.assert_close(y[0], z[:, :split], **EXACT)
    if alpha_out:
        torch.testing.assert_close(y[1], F.avg_pool2d(z[:, split:], 2), **EXACT)


@pytest.mark.parametrize("size", [(7, 9), (8, 5)])
@pytest.mark.parametrize("stride", [1, 2])
def test_odd_sizes(size, stride):
    high, low = OctaveConv2d(8, 8, 3, 0.5, 0.5, stride, 1).double()(pair(8, 0.5, *size))
    assert high.shape[2:] == tuple(-(-n // stride) for n in size)
    assert low.shape[2:] == tuple(-(-n // (2 * stride)) for n in size)


def test_depthwise_groups_do_not_mix():
    layer = OctaveConv2d(8, 8, 3, 0.25, 0.25, padding=1, groups=8).double()
    assert (
        layer.conv_h2l is None
        and layer.conv_l2h is None
        and parameters(layer) == parameters(nn.Conv2d(8, 8, 3, groups=8))
    )
    (high, low), x = pair(8, 0.25, 4, 4), None
    x = layer((high, low))
    torch.testing.assert_close(
        x[1], F.conv2d(low, layer.conv_l2l.weight, layer.conv_l2l.bias, padding=1, groups=2), **EXACT
    )


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("alpha", [0, 0.25, 0.5, 0.75])
def test_parameters_are_those_of_the_usual_layer(alpha, groups):
    assert parameters(OctaveConv2d(16, 32, 3, alpha, alpha, padding=1, groups=groups)) == parameters(
        nn.Conv2d(16, 32, 3, groups=groups)
    )
    assert parameters(OctaveBatchNorm2d(16, alpha)) == 32


def test_starts_with_the_distribution_of_the_usual_layer():
    ours, usual = OctaveConv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3)
    bound = usual.weight.abs().max().item()
    assert abs(ours.pack_weight().std().item() / usual.weight.std().item() - 1) < 0.02
    assert all(abs(p.weight.abs().max().item() / bound - 1) < 0.01 for p in (ours.conv_h2h, ours.conv_l2h))


@pytest.mark.parametrize("alpha", [0.125, 0.25, 0.5, 0.75, 0.875])
def test_work_and_memory_of_a_layer(alpha):
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = OctaveConv2d(64, 64, 3, alpha, alpha, padding=1)

        def forward(self, x):
            low = int(alpha * 64)
            return self.conv((x[:, low:], F.avg_pool2d(x[:, :low], 2)))

    assert macs(Square(), (64, 8, 8)) / (64 * 64 * 64 * 9) == pytest.approx(room.work_ratio(alpha))
    high, low = pair(64, alpha, 8, 8)
    assert (high.numel() + low.numel()) / (2 * 64 * 64) == pytest.approx(room.memory_ratio(alpha))


MACS = {  # G, at alpha 0, 0.125, 0.25, 0.5, 0.75
    26: (2.342, 2.087, 1.858, 1.480, 1.208),
    50: (4.089, 3.565, 3.104, 2.367, 1.880),
    101: (7.801, 6.625, 5.598, 3.991, 2.982),
    152: (11.514, 9.685, 8.092, 5.615, 4.084),
    200: (15.007, 12.564, 10.439, 7.144, 5.121),
}


@pytest.mark.parametrize("depth", [26, 50, 101])
def test_macs_of_the_networks(depth):
    counts = []
    for alpha, expected in zip((0, 0.125, 0.25, 0.5, 0.75), MACS[depth], strict=True):
        with torch.device("meta"):
            net = getattr(room, f"oct_resnet{depth}")(alpha=alpha)
        assert macs(net, (3, 224, 224)) / 1e9 == pytest.approx(expected, abs=6e-4)
        counts.append(parameters(net))
    assert len(set(counts)) == 1


def test_has_the_parameters_of_resnet50():
    with torch.device("meta"):
        assert parameters(room.oct_resnet50(alpha=0.5)) == parameters(resnet50()) == 25_557_032


@pytest.mark.parametrize("name", OFFICIAL)
def test_equals_official_networks(name):
    alpha, se, groups, scaler = OFFICIAL[name]
    lines = bytes(GOLDEN[f"official_{name}.keys"].tolist()).decode().splitlines()
    shapes = {key: tuple(map(int, shape)) for key, *shape in (line.split() for line in lines)}
    state = {f"arg:{key}": official_value(key, shape).float() for key, shape in shapes.items()}
    width = 64 * scaler / groups
    net = OctResNet(
        (1,) * 4, alpha=alpha, preact=True, se=se, groups=groups, width_per_group=int(width), num_classes=50
    )
    weights.load(net, state)
    with torch.no_grad():
        y = net.double().eval()(draw(1, 2, 3, 64, 64))
    torch.testing.assert_close(y.float(), GOLDEN[f"official_{name}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_equals_the_pytorch_port(name):
    make = {
        "resnet": lambda: OctResNet((1,) * 4, alpha=0.5, num_classes=50),
        "mobilenet": lambda: OctMobileNetV1(alpha=0.5, num_classes=50),
    }
    net = make[name]().double()
    net.load_state_dict(golden_state(net.state_dict()))
    for mode in ("eval", "train"):
        y = net.train(mode == "train")(draw(2, 4, 3, 64, 64))
        torch.testing.assert_close(y.detach().float(), GOLDEN[f"{name}_{mode}"], rtol=1e-5, atol=1e-5)
    y.square().mean().backward()
    stem = net.conv1 if name == "resnet" else net.features[0][0]
    torch.testing.assert_close(stem.weight.grad[:4].float(), GOLDEN[f"{name}_grad"], rtol=1e-4, atol=1e-6)


def test_has_the_ports_keys():
    with torch.device("meta"):
        state = room.oct_resnet50(alpha=0.5).state_dict()
    keys = sorted(f"{key} {tuple(value.shape)}" for key, value in state.items())
    assert hashlib.sha256("\n".join(keys).encode()).digest() == bytes(GOLDEN["resnet50.keys"].tolist())
    wrapped = {f"module.{key}": value for key, value in state.items()}
    assert list(OctResNet.convert_state_dict(wrapped)) == list(state)


@pytest.mark.parametrize("name", ["oct_mobilenet_v1", "oct_mobilenet_v2"])
def test_mobilenets(name):
    net = getattr(room, name)(num_classes=7, width=0.25).eval()
    with torch.no_grad():
        x = net.forward_features(torch.rand(1, 3, 65, 64))
        assert x.shape == (1, net.num_features, 3, 2) and net.forward_head(x).shape == (1, 7)
        assert net.forward_head(x, pre_logits=True).shape == (1, net.num_features)
    net.reset_classifier(0)
    assert net(torch.rand(1, 3, 64, 64)).shape == (1, net.num_features) and math.isfinite(parameters(net))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: OctaveConv2d(8, 8, 3, stride=3), "stride is 3"),
        (lambda: OctaveConv2d(8, 8, 0), "kernel_size is 0"),
        (lambda: OctaveConv2d(8, 8, 3), "padding is 0"),
        (lambda: OctaveConv2d(8, 8, 2, padding=1), "padding is 1"),
        (lambda: OctaveConv2d(8, 8, 1, alpha_in=1), "alpha_in is 1"),
        (lambda: OctaveConv2d(8, 8, 1, alpha_out=0.1), "alpha_out is 0.1"),
        (lambda: OctaveConv2d(8, 8, 1, groups=3), "groups is 3"),
        (lambda: OctaveConv2d(8, 8, 3, 0.5, 0.25, padding=1, groups=8), "alpha_out is 0.25"),
        (lambda: OctaveConv2d(8, 8, 1)(torch.rand(1, 8, 4, 4)), "x has (8, 0) channels"),
        (lambda: OctaveConv2d(8, 8, 1, groups=2).pack_weight(), "groups is 2"),
        (lambda: OctaveConv2d.from_conv(nn.Conv2d(8, 8, 3, groups=2), 0.5, 0.5), "conv is"),
        (lambda: OctaveConv2d.from_conv(nn.Conv2d(8, 8, 3, padding=(1, 0)), 0, 0), "conv pads by"),
        (lambda: OctaveBatchNorm2d(8, -1), "alpha is -1"),
        (lambda: PerGroup(nn.BatchNorm2d(8)), "module is"),
        (lambda: OctResNet((1, 1), (16,)), "depths is"),
        (lambda: OctResNet((1,), (16,), in_chans=0), "in_chans is 0"),
        (lambda: OctResNet((1,), (16,), num_classes=-1), "num_classes is -1"),
        (lambda: OctResNet((1,), (16,))(torch.rand(1, 1, 32, 32)), "x has 1 channels"),
        (lambda: OctMobileNetV1(0.1), "width is 0.1"),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(ValueError) as error:
        call()
    assert text in str(error.value)
