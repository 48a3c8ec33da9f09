"""The Wide-ResNet of semi-supervised learning: golden vectors of the official code, sizes, its TensorFlow variables."""

import numpy as np
import pytest
import torch
from torch import nn

from saigen.measure import macs
from saigen.nn.wide_resnet import WideResNet
from tests.papers.training.test_mixmatch import GOLDEN


def official_variables():
    """Drawn again in the order in which the official code makes them."""
    rng, found = np.random.RandomState(2), {}
    with np.load(GOLDEN) as file:
        lines = str(file["network_variables"]).splitlines()
    for line in lines:
        name, *shape = line.split()
        values = rng.standard_normal(tuple(int(side) for side in shape)) * 0.3
        found[name] = torch.from_numpy(np.abs(values) + 0.5 if name.endswith("moving_variance") else values)
    return found


@pytest.mark.parametrize("training", [False, True])
def test_equals_the_official_network(training):
    net = WideResNet(num_classes=3, filters=4, repeat=2).double().train(training)
    missing = net.load_state_dict(net.convert_state_dict(official_variables()), strict=False)
    assert not missing.unexpected_keys and all("num_batches_tracked" in key for key in missing.missing_keys)
    images = np.random.RandomState(1).uniform(-1, 1, (3, 8, 8, 3))
    with np.load(GOLDEN) as file:
        expected = torch.from_numpy(file[f"network_training{int(training)}"]).double()
    logits = net(torch.from_numpy(images).permute(0, 3, 1, 2))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def test_averaged_variables_win_and_own_keys_pass():
    net = WideResNet(num_classes=3, filters=4, repeat=2)
    variables = official_variables()
    variables["classify/dense/kernel/ExponentialMovingAverage"] = torch.ones(16, 3)
    assert torch.equal(net.convert_state_dict(variables)["fc.weight"], torch.ones(3, 16))
    assert net.convert_state_dict(net.state_dict()).keys() == net.state_dict().keys()


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 1_469_642),
        ({"filters": 135}, 25_985_290),
        ({"filters": 135, "num_classes": 100}, 26_033_980),
        ({"scales": 4}, 5_933_770),
    ],
)
def test_parameters(options, count):
    with torch.device("meta"):
        net = WideResNet(**options)
    assert sum(p.numel() for p in net.parameters()) == count


def test_macs_by_hand():
    with torch.device("meta"):
        net = WideResNet()
    count, side, inputs = 32 * 32 * 9 * 3 * 16, 32, 16
    for stage, outputs in enumerate((32, 64, 128)):
        side //= 2 if stage else 1
        area = side * side
        count += area * (9 * inputs * outputs + 9 * outputs * outputs + inputs * outputs)  # with its shortcut
        count += 3 * area * 2 * 9 * outputs * outputs
        inputs = outputs
    assert macs(net, (3, 32, 32)) == count + 128 * 10


def test_any_resolution_and_padding():
    for padding in ("same", "symmetric"):
        net = WideResNet(filters=2, repeat=1, scales=4, in_chans=1, padding=padding)
        for side in (9, 16, 33):
            assert net(torch.zeros(2, 1, side, side)).shape == (2, 10)
    net.reset_classifier(4)
    assert net(torch.zeros(2, 1, 16, 16)).shape == (2, 4)
    net.reset_classifier(0)
    assert net(torch.zeros(2, 1, 16, 16)).shape == (2, 16)


def test_initial_weights():
    net = WideResNet(filters=64, repeat=1)
    kernel = net.blocks[1].conv2.weight
    assert kernel.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    assert net.fc.weight.std().item() == pytest.approx((2 / (256 + 10)) ** 0.5, rel=0.1)
    assert all(not m.bias.any() for m in net.modules() if isinstance(m, nn.Conv2d))
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.001)}


def test_wrong_arguments_are_named():
    for options, name in (
        ({"filters": 0}, "filters is 0"), ({"scales": 0}, "scales is 0"), ({"repeat": 0}, "repeat is 0"),
        ({"in_chans": 0}, "in_chans is 0"), ({"num_classes": -1}, "num_classes is -1"), ({"momentum": 0.0}, "momentum is 0.0"),
        ({"padding": "valid"}, "padding is 'valid'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            WideResNet(**options)
