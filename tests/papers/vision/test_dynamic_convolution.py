"""Dynamic convolution: against its formula and a loop over samples, identities, the temperature, counts."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from saigen import weights
from saigen.measure import macs, parameters
from saigen.nn.mobilenet_v2 import InvertedResidual, MobileNetV2
from saigen.papers.vision import dynamic_convolution as room
from saigen.papers.vision.dynamic_convolution import (
    DyMobileNetV2,
    DynamicConv1d,
    DynamicConv2d,
    DynamicConv3d,
    DyResNet,
    KernelAttention,
    TemperatureSchedule,
    attentions,
    convert_to_dynamic,
    set_temperature,
)
from tests.golden.dynamic_convolution.make import LAYERS, inputs
from tests.golden.involution.make import golden_state

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "dynamic_convolution" / "golden.safetensors")
EXACT = {"rtol": 1e-10, "atol": 1e-10}
# kernel, stride, padding, dilation, groups, side: grouped, unfolded and pointwise forms among them
GEOMETRIES = [
    (3, 1, 1, 1, 1, 12),
    (3, 2, 1, 1, 1, 6),
    (3, 1, 2, 2, 4, 9),
    (5, 2, 0, 1, 8, 9),
    (1, 1, 0, 1, 1, 5),
    (1, 2, 0, 1, 1, 7),
    (1, 1, 1, 1, 1, 5),
    (1, 1, 0, 1, 2, 5),
]


def layer_and_input(kernel, stride, padding, dilation, groups, side, **options):
    torch.manual_seed(0)
    layer = DynamicConv2d(8, 16, kernel, stride, padding, dilation, groups, temperature=1, **options).double()
    return layer, 3 * torch.randn(3, 8, side, side + 1, dtype=torch.float64)


def convolve(layer, x, weight, bias=None):
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_equals_a_loop_over_samples(geometry):
    layer, x = layer_and_input(*geometry)
    pi = layer.attention(x)
    assert pi.std(0).max() > 1e-3  # the samples do differ
    rows = []
    for sample, row in zip(x, pi, strict=True):
        weight = sum(p * kernel for p, kernel in zip(row, layer.weight, strict=True))
        bias = sum(p * b for p, b in zip(row, layer.bias, strict=True))
        rows.append(convolve(layer, sample[None], weight, bias))
    torch.testing.assert_close(layer(x), torch.cat(rows), **EXACT)


@pytest.mark.parametrize("geometry", GEOMETRIES[:5])
def test_equals_the_mix_of_outputs(geometry):
    layer, x = layer_and_input(*geometry)
    parts = torch.stack([convolve(layer, x, w, b) for w, b in zip(layer.weight, layer.bias, strict=True)])
    expected = torch.einsum("nk,knchw->nchw", layer.attention(x), parts)
    torch.testing.assert_close(layer(x), expected, **EXACT)


@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_known_implementation(name):
    dims, c_in, c_out, kernel, stride, padding, groups, bias, steps = LAYERS[name]
    build = {1: DynamicConv1d, 2: DynamicConv2d}[dims]
    # its squeeze has int(16 / 4) + 1 = 5 units
    layer = build(
        c_in, c_out, kernel, stride, padding, 1, groups, bias, reduction=3.2, temperature=max(1, 34 - 3 * steps)
    ).double()
    own = layer.state_dict()
    theirs = {key: value for key, value in own.items() if not key.endswith("temperature")}
    for fc in ("attention.fc1.weight", "attention.fc2.weight"):
        theirs[fc] = theirs[fc].reshape(*theirs[fc].shape, *(1,) * dims)
    state = DyResNet.convert_state_dict(golden_state(theirs))
    layer.load_state_dict(state | {"attention.temperature": own["attention.temperature"]})
    x = inputs(dims).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    found = {"y": y, "grad_x": x.grad[:1], "grad_fc1": layer.attention.fc1.weight.grad}
    for key, value in found.items():
        expected = GOLDEN[f"{name}.{key}"].reshape(value.shape)
        torch.testing.assert_close(value.detach().float(), expected, rtol=1e-5, atol=1e-5)


def test_one_kernel_is_the_usual_convolution():
    layer, x = layer_and_input(*GEOMETRIES[0], num_kernels=1)
    torch.testing.assert_close(layer(x), convolve(layer, x, layer.weight[0], layer.bias[0]), **EXACT)


def test_a_high_temperature_gives_the_mean_kernel():
    layer, x = layer_and_input(*GEOMETRIES[0])
    set_temperature(layer, 1e12)
    torch.testing.assert_close(layer(x), convolve(layer, x, layer.weight.mean(0), layer.bias.mean(0)), **EXACT)


def test_kernels_may_change_places():
    layer, x = layer_and_input(*GEOMETRIES[2])
    y, order = layer(x), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias, layer.attention.fc2.weight, layer.attention.fc2.bias):
            parameter.copy_(parameter[order].clone())
    torch.testing.assert_close(layer(x), y, **EXACT)


def test_attention_does_not_see_places():
    attention, x = KernelAttention(8, temperature=1).double(), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    shuffled = x.flatten(2)[:, :, torch.randperm(16)].view_as(x)
    torch.testing.assert_close(attention(shuffled), attention(x), **EXACT)
    torch.testing.assert_close(attention(x).sum(1), torch.ones(2, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("geometry", [(3, 1, 1, 1, 1, 8), (3, 2, 1, 1, 1, 5), (3, 1, 1, 1, 8, 4), (1, 2, 0, 1, 1, 4)])
def test_gradcheck(geometry):
    layer, x = layer_and_input(*geometry, num_kernels=2)
    assert torch.autograd.gradcheck(layer, x[:2].requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("build", [DynamicConv1d, DynamicConv2d, DynamicConv3d])
def test_dimensions_and_sizes(build):
    static = {DynamicConv1d: nn.Conv1d, DynamicConv2d: nn.Conv2d, DynamicConv3d: nn.Conv3d}[build]
    x = torch.rand(2, 4, *(7, 6, 5)[: build.dims])
    for options in ({"padding": 1, "stride": 2}, {"padding": "same", "dilation": 2}, {"padding": "valid"}):
        assert build(4, 6, 3, **options)(x).shape == static(4, 6, 3, **options)(x).shape
    assert build(4, 6, 1)(x[:0]).shape[:2] == (0, 6)


def test_starts_from_a_convolution():
    conv = nn.Conv2d(8, 4, 3, padding=1)
    layer, x = DynamicConv2d.from_conv(conv, noise=0.5), torch.rand(2, 8, 9, 9)
    assert layer.weight.std(0).min() > 0
    set_temperature(layer, 1e9)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-4, atol=1e-5)


def test_temperature_falls_in_a_line_and_is_saved():
    net = nn.Sequential(DynamicConv2d(4, 4, 1), nn.ReLU(), DynamicConv2d(4, 4, 1))
    schedule = TemperatureSchedule(net)
    assert [schedule.step(epoch) for epoch in (0, 2.5, 5, 10, 50)] == [30, 22.75, 15.5, 1, 1]
    assert [attention.temperature.item() for attention in attentions(net)] == [1, 1]
    schedule.step(5)
    assert net.state_dict()["2.attention.temperature"].item() == 15.5
    assert TemperatureSchedule(net, 30, 2, epochs=0).step(0) == 2


def test_attention_is_float32_under_autocast():
    layer = DynamicConv2d(8, 8, 3, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        pi = layer.attention(torch.rand(2, 8, 4, 4))
        y = layer(torch.rand(2, 8, 4, 4))
    y.float().sum().backward()
    assert pi.dtype == torch.float32 and layer.weight.grad.isfinite().all()


SIZES = {
    "100": (3_504_872, 300.8e6),
    "075": (2_636_424, 209.1e6),
    "050": (1_968_680, 97.1e6),
    "035": (1_677_128, 59.3e6),
}


@pytest.mark.parametrize("name", SIZES)
def test_static_mobilenet_has_the_known_counts(name):
    with torch.device("meta"):
        net = MobileNetV2(int(name) / 100)
    assert parameters(net) == SIZES[name][0] and macs(net, (3, 224, 224)) == pytest.approx(SIZES[name][1], rel=1e-3)


def test_positions_of_a_block():
    net = DyMobileNetV2(0.35, positions=("project",), num_classes=3)
    for block in net.modules():
        if isinstance(block, InvertedResidual):
            last = block.conv_pwl if block.expands else block.conv_pw
            assert isinstance(last, DynamicConv2d) and type(block.conv_dw) is nn.Conv2d
    assert type(net.conv_head) is nn.Conv2d


def test_every_convolution_but_the_first_is_dynamic():
    net = room.dy_resnet10(num_classes=3)
    static = [name for name, part in net.named_modules() if isinstance(part, nn.Conv2d)]
    assert static == ["conv1"] and len(attentions(net)) == 11
    assert len(attentions(DyResNet((1,) * 4, static_shortcuts=True))) == 8


def test_weights_without_temperatures_load():
    net = room.DyResNet((1, 1), (8, 16), num_classes=3, small_stem=True)
    state = {f"module.{key}": value for key, value in net.state_dict().items() if not key.endswith("temperature")}
    weights.load(net, state)
    assert {attention.temperature.item() for attention in attentions(net)} == {1.0}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: DynamicConv2d(8, 8, 3, groups=3), "groups is 3"),
        (lambda: DynamicConv2d(8, 8, (3, 3, 3)), "kernel_size is (3, 3, 3)"),
        (lambda: DynamicConv2d(8, 8, 3, stride=0), "stride is 0"),
        (lambda: DynamicConv2d(8, 8, 3, padding=-1), "padding is -1"),
        (lambda: DynamicConv2d(8, 8, 3, padding="full"), "padding is 'full'"),
        (lambda: DynamicConv2d(8, 8, 3, 2, padding="same"), "padding is 'same'"),
        (lambda: DynamicConv2d(8, 8, 3, num_kernels=0), "num_kernels is 0"),
        (lambda: DynamicConv2d(8, 8, 3, reduction=0), "reduction is 0"),
        (lambda: DynamicConv2d(8, 8, 3, temperature=0), "temperature is 0"),
        (lambda: DynamicConv2d(8, 8, 3)(torch.rand(1, 4, 8, 8)), "x has 4 channels"),
        (lambda: DynamicConv2d.from_conv(nn.Conv2d(4, 4, 3, padding_mode="circular")), "conv pads"),
        (lambda: DynamicConv2d.from_conv(nn.Conv2d(4, 4, 3), noise=-1), "noise is -1"),
        (lambda: set_temperature(nn.Linear(2, 2), 1), "module has no"),
        (lambda: TemperatureSchedule(DynamicConv2d(4, 4, 1), epochs=-1), "epochs is -1"),
        (lambda: convert_to_dynamic(nn.Conv2d(3, 3, 1)), "model has 1 convolutions"),
        (lambda: convert_to_dynamic(nn.Sequential(nn.Conv2d(3, 3, 1)), skip=("x",)), "skip is"),
        (lambda: DyMobileNetV2(positions=("stem",)), "positions is"),
        (lambda: DyResNet((1,), (8,), drop_rate=1), "drop_rate is 1"),
        (lambda: room.dy_mobilenetv2_050(num_classes=-1), "num_classes is -1"),
        (lambda: MobileNetV2(0), "width is 0"),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(ValueError) as error:
        call()
    assert text in str(error.value)
