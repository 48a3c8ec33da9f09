"""Involution: the operator against its formula and the official code, the layer, RedNet, conversions."""

import hashlib
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from saigen.cards import catalogue
from saigen.nn.resnet import resnet18, resnet50
from saigen.papers.vision import involution as room
from saigen.papers.vision.involution import Involution2d, RedNet, claims, convert_3x3_to_involution, involution2d
from saigen.trial import Trial
from tests.golden.involution.make import draw as golden_draw
from tests.golden.involution.make import golden_state

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "involution" / "golden.safetensors")
# (kernel size, stride, dilation, height, width), odd sizes and strides above the kernel among them
GEOMETRIES = [
    (3, 1, 1, 5, 4),
    (5, 2, 1, 7, 6),
    (7, 2, 1, 4, 9),
    (3, 3, 1, 7, 8),
    (3, 1, 2, 6, 5),
    (3, 2, 2, 7, 7),
    (5, 2, 3, 8, 9),
]


def draw(size, stride, h, w, *, groups=2, channels=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, h, w, generator=generator, dtype=dtype)
    shape = (2, groups, size**2, -(-h // stride), -(-w // stride))
    return x, torch.randn(shape, generator=generator, dtype=dtype)


def by_the_formula(x, kernel, stride, dilation):
    """Equation 4, one pixel and one tap at a time."""
    (b, c, h, w), (_, g, taps, h2, w2) = x.shape, kernel.shape
    size = round(taps**0.5)
    y = torch.zeros(b, c, h2, w2, dtype=x.dtype)
    for channel in range(c):
        for i in range(h2):
            for j in range(w2):
                for u in range(size):
                    for v in range(size):
                        row = i * stride + (u - size // 2) * dilation
                        column = j * stride + (v - size // 2) * dilation
                        if 0 <= row < h and 0 <= column < w:
                            weight = kernel[:, channel // (c // g), u * size + v, i, j]
                            y[:, channel, i, j] += weight * x[:, channel, row, column]
    return y


@pytest.mark.parametrize(("size", "stride", "dilation", "h", "w"), GEOMETRIES)
def test_equals_the_formula(size, stride, dilation, h, w):
    x, kernel = draw(size, stride, h, w)
    expected = by_the_formula(x, kernel, stride, dilation)
    for backend in ("offsets", "unfold"):
        y = involution2d(x, kernel, stride=stride, dilation=dilation, backend=backend)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_other_paddings(padding):
    x = torch.randn(1, 2, 8, 7)
    kernel = torch.randn(1, 1, 25, (8 + 2 * padding - 5) // 2 + 1, (7 + 2 * padding - 5) // 2 + 1)
    both = [involution2d(x, kernel, stride=2, padding=padding, backend=name) for name in ("offsets", "unfold")]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize(("size", "stride", "dilation", "h", "w"), GEOMETRIES[:6])
def test_gradcheck(size, stride, dilation, h, w):
    x, kernel = (t.requires_grad_() for t in draw(size, stride, h, w, channels=2))
    call = partial(involution2d, stride=stride, dilation=dilation)
    assert torch.autograd.gradcheck(call, (x, kernel), fast_mode=True)


@pytest.mark.parametrize(("name", "size", "stride", "side"), [("s1", 7, 1, 6), ("s2", 5, 2, 6)])
def test_equals_official_layer(name, size, stride, side):
    layer = Involution2d(32, size, stride).double()
    layer.load_state_dict(golden_state(layer.state_dict()))
    x = golden_draw(1, 1, 32, side, side).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    found = {"y": y, "grad_x": x.grad, "grad_weight": layer.conv2.conv.weight.grad.flatten(1)}
    for key, value in found.items():
        torch.testing.assert_close(value.float(), GOLDEN[f"layer_{name}.{key}"], rtol=1e-6, atol=1e-5)


def test_equals_official_rednet():
    net = RedNet((1, 2, 4, 1), (16, 32, 64, 128), stem_width=32, num_classes=0).double()
    net.load_state_dict(golden_state(net.state_dict()))
    x = golden_draw(2, 2, 3, 64, 64)
    for mode in ("train", "eval"):
        net.train(mode == "train")
        with torch.no_grad():
            y = net.forward_features(x)[:, ::8].float()
        torch.testing.assert_close(y, GOLDEN[f"rednet.{mode}"], rtol=1e-6, atol=1e-6)


def test_has_the_official_keys():
    net = RedNet((1, 2, 4, 1), (16, 32, 64, 128), stem_width=32, num_classes=0)
    keys = [f"{key} {tuple(value.shape)}" for key, value in net.state_dict().items()]
    with torch.device("meta"):
        big = room.rednet50(num_classes=0)
    keys += [f"50 {key} {tuple(value.shape)}" for key, value in big.state_dict().items()]
    assert hashlib.sha256("\n".join(sorted(keys)).encode()).digest() == bytes(GOLDEN["keys.sha256"].tolist())


def test_official_prefixes_load():
    net = RedNet((1,), (16,), num_classes=3, small_stem=True)
    official = {
        ("head." if key.startswith("fc.") else "backbone.") + key: value for key, value in net.state_dict().items()
    }
    assert list(RedNet.convert_state_dict(official)) == list(net.state_dict())


LAYERS = {64: 4_388, 128: 17_096, 256: 67_472, 512: 268_064}


@pytest.mark.parametrize("channels", LAYERS)
def test_layer_sizes(channels):
    with torch.device("meta"):
        layer, x = Involution2d(channels).eval(), torch.empty(1, channels, 14, 14)
    assert sum(p.numel() for p in layer.parameters()) == LAYERS[channels]
    with FlopCounterMode(display=False) as counter:
        layer(x)
    g = channels // 16
    assert counter.get_total_flops() == 2 * 14 * 14 * (channels**2 // 4 + 49 * g * channels // 4 + 49 * channels)


def test_backward_flops_are_twice_the_forward_ones():
    x, kernel = (t.requires_grad_() for t in draw(3, 1, 5, 4))
    with FlopCounterMode(display=False) as counter:
        involution2d(x, kernel).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * x.numel() * 9


def test_constant_kernels_make_a_depthwise_convolution():
    layer = Involution2d(32, 5, 2).double()
    nn.init.zeros_(layer.conv2.conv.weight)
    nn.init.normal_(layer.conv2.conv.bias)
    x = torch.randn(2, 32, 9, 8, dtype=torch.float64)
    weight = layer.conv2.conv.bias.view(2, 5, 5).repeat_interleave(16, 0)[:, None]
    expected = nn.functional.conv2d(x, weight, stride=2, padding=2, groups=32)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_centre_tap_alone_is_the_identity():
    layer = Involution2d(16, 7)
    nn.init.zeros_(layer.conv2.conv.weight)
    with torch.no_grad():
        layer.conv2.conv.bias.zero_()[24] = 1
    x = torch.randn(2, 16, 6, 5)
    assert torch.equal(layer(x), x)


def test_channels_of_a_group_share_their_kernel():
    x, kernel = draw(3, 1, 5, 5, groups=2, channels=8)
    permutation = torch.tensor([2, 0, 3, 1, 5, 4, 7, 6])  # within the groups
    torch.testing.assert_close(involution2d(x[:, permutation], kernel), involution2d(x, kernel)[:, permutation])


def test_kernel_shape_of_the_paper():
    layer = Involution2d(64, 7, 2)
    x = torch.rand(1, 64, 56, 56)
    assert layer.kernel(x).shape == (1, 4, 49, 28, 28) and layer(x).shape == (1, 64, 28, 28)


@pytest.mark.parametrize("side", [7, 8, 9])
def test_strides_on_odd_sizes(side):
    x = torch.rand(2, 16, side, side + 1)
    assert Involution2d(16, 3, 2)(x).shape == (2, 16, -(-side // 2), -(-(side + 1) // 2))


def test_half_precision_is_summed_in_float32():
    x, kernel = draw(7, 1, 8, 8, dtype=torch.float32)
    low = involution2d(x.bfloat16(), kernel.bfloat16())
    exact = involution2d(x.bfloat16().float(), kernel.bfloat16().float())
    assert low.dtype == torch.bfloat16 and torch.equal(low, exact.bfloat16())
    layer = Involution2d(16, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.rand(1, 16, 8, 8))
    y.float().sum().backward()
    assert layer.conv2.conv.weight.grad.isfinite().all()


def test_channels_last_input_and_gradient():
    x, kernel = draw(3, 2, 6, 6)
    y = involution2d(x.to(memory_format=torch.channels_last), kernel, stride=2)
    assert torch.equal(y, involution2d(x, kernel, stride=2)) and y.is_contiguous()


def test_no_patches_are_copied():
    """The largest tensor the operator makes is the widened kernel, a sixteenth of the patches."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                    self.numel = max(self.numel, tensor.numel())
            return out

    x, kernel = draw(7, 1, 28, 28, channels=32)
    with torch.no_grad(), Largest() as lean:
        room.layer.sum_of_shifts(x, kernel, 1, 3, 1)
    with torch.no_grad(), Largest() as usual:
        involution2d(x, kernel, backend="unfold")
    assert usual.numel == x.numel() * 49 and lean.numel < usual.numel / 10


def test_conversion_takes_the_place_of_3x3_convolutions():
    net = convert_3x3_to_involution(resnet50(num_classes=5), 5)
    layers = [m for m in net.modules() if isinstance(m, Involution2d)]
    assert len(layers) == 16 and all(layer.kernel_size == 5 for layer in layers)
    assert sorted({layer.stride for layer in layers}) == [1, 2]
    assert not any(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in net.modules())
    assert net(torch.rand(2, 3, 64, 64)).shape == (2, 5)
    # where channels change, the convolution stays
    assert sum(isinstance(m, Involution2d) for m in convert_3x3_to_involution(resnet18()).modules()) == 13


@pytest.mark.parametrize("claim", [claim.id for claim in catalogue.paper("involution").card.claim])
def test_claims_run_at_tiny(claim):
    first, again = (getattr(claims, claim)(Trial(seed=1000, scale="tiny")) for _ in range(2))
    quantities = catalogue.paper("involution").card.find_claim(claim).quantities
    assert set(quantities) <= set(first) and all(math.isfinite(value) for value in first.values())
    clocks = {name for name, quantity in quantities.items() if quantity.clock}
    assert {k: v for k, v in first.items() if k not in clocks} == {k: v for k, v in again.items() if k not in clocks}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Involution2d(16, 4), "kernel_size is 4"),
        (lambda: Involution2d(24), "group_channels is 16"),
        (lambda: Involution2d(16, reduction=3), "reduction is 3"),
        (lambda: Involution2d(16, stride=0), "stride is 0"),
        (lambda: Involution2d(16, backend="cuda"), "backend is 'cuda'"),
        (lambda: Involution2d(16)(torch.rand(1, 8, 4, 4)), "x has 8 channels"),
        (lambda: involution2d(torch.rand(1, 4, 5, 5), torch.rand(1, 1, 8, 5, 5)), "kernel has 8 taps"),
        (lambda: involution2d(torch.rand(1, 4, 5, 5), torch.rand(1, 1, 9, 4, 5)), "kernel is for a map of (4, 5)"),
        (lambda: involution2d(torch.rand(1, 4, 5, 5), torch.rand(1, 3, 9, 5, 5)), "in 3 groups"),
        (lambda: involution2d(torch.rand(1, 4, 5, 5), torch.rand(1, 1, 9, 5, 5), padding=-1), "padding is -1"),
        (lambda: involution2d(torch.rand(1, 4, 5, 5), torch.rand(1, 1, 9, 5, 5), dilation=0), "dilation is 0"),
        (lambda: involution2d(torch.rand(1, 4, 5, 5), torch.rand(1, 1, 9, 5, 5), backend="x"), "backend is 'x'"),
        (lambda: convert_3x3_to_involution(nn.Linear(2, 2)), "model has no 3x3"),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(ValueError) as error:
        call()
    assert text in str(error.value)
