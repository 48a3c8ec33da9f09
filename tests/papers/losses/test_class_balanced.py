"""The class-balanced loss: the published weights, the official expressions, coverage by chance, gradients, the network."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from saigen.data.imbalance import long_tailed_counts
from saigen.nn.cifar_resnet import CifarBlock, CifarResNet
from saigen.papers.losses.class_balanced import (
    ClassBalancedLoss,
    class_balanced_loss,
    class_balanced_resnet32,
    class_balanced_weights,
    decay_groups,
    effective_number,
    init_class_prior,
)

COUNTS = long_tailed_counts(10, 5000, 100)
KINDS = ("softmax", "sigmoid", "focal")
WEIGHTS = {
    0.9: [0.999466] * 7 + [0.999467, 0.999625, 1.004644],
    0.99: [0.783832, 0.783832, 0.783832, 0.783848, 0.785034, 0.800201, 0.868159, 1.041415, 1.385429, 1.984417],
    0.9999: [0.050611, 0.0769, 0.121134, 0.195037, 0.318805, 0.52459, 0.868349, 1.442627, 2.409223, 3.992724],
}


def batch(n=6, classes=4, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, classes, dtype=torch.float64, generator=generator), torch.arange(n) % classes


def official(logits, target, counts, beta, kind, gamma):
    """The expressions of cifar_main.py, in NumPy."""
    weights = (1.0 - beta) / (1.0 - np.power(beta, counts))
    weights = weights / np.sum(weights) * len(counts)
    z, onehot = np.asarray(logits), np.eye(len(counts))[np.asarray(target)]
    w = (weights[None] * onehot).sum(1)
    if kind == "softmax":
        return np.mean(w * (np.log(np.exp(z).sum(1)) - (z * onehot).sum(1)))
    cross_entropy = np.maximum(z, 0) - z * onehot + np.log1p(np.exp(-np.abs(z)))
    modulator = np.exp(-gamma * onehot * z - gamma * np.log1p(np.exp(-z))) if kind == "focal" else 1.0
    return (w[:, None] * modulator * cross_entropy).sum() / onehot.sum()


@pytest.mark.parametrize("beta", sorted(WEIGHTS))
def test_weights_of_long_tailed_cifar(beta):
    assert class_balanced_weights(COUNTS, beta, dtype=torch.float64).tolist() == pytest.approx(WEIGHTS[beta], abs=6e-7)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_official_expressions(kind, beta, gamma):
    counts = np.array([400, 60, 7, 1])
    for seed in range(3):
        z, y = batch(seed=seed)
        weight = class_balanced_weights(counts, beta, dtype=torch.float64)
        ours = class_balanced_loss(z, y, weight, kind=kind, gamma=gamma)
        assert ours.item() == pytest.approx(official(z, y, counts, beta, kind, gamma), rel=1e-10)
        z.requires_grad_()
        class_balanced_loss(z, y, weight, kind=kind, gamma=gamma).backward()
        step = 1e-6
        for i, c in ((0, 0), (1, 3), (5, 1)):
            nearby = [z.detach().clone() for _ in range(2)]
            nearby[0][i, c] += step
            nearby[1][i, c] -= step
            up, down = (official(near, y, counts, beta, kind, gamma) for near in nearby)
            assert z.grad[i, c].item() == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-8)


def test_golden_focal_values():
    z, y = torch.tensor([[2.0, -1, 0.5], [0, 1, -2]]), torch.tensor([0, 2])
    for gamma, value in ((0.0, 2.773802), (0.5, 2.291960), (1.0, 1.942870), (2.0, 1.463553)):
        assert class_balanced_loss(z, y, kind="focal", gamma=gamma).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("prototypes", [2, 7, 30])
def test_effective_number_is_the_expected_coverage(prototypes):
    """n samples, each on one of N prototypes by chance: the chain over how many are covered, exactly."""
    covered = np.zeros(prototypes + 1)
    covered[0] = 1.0
    beta = (prototypes - 1) / prototypes
    found = effective_number(np.arange(1, 61), beta, dtype=torch.float64)
    for n in range(60):
        stays = np.arange(prototypes + 1) / prototypes
        covered = covered * stays + np.concatenate([[0], (covered * (1 - stays))[:-1]])
        assert found[n].item() == pytest.approx(covered @ np.arange(prototypes + 1), rel=1e-12)


def test_effective_number_between_its_limits():
    n = torch.tensor([1, 2, 10, 1000, 10**7])
    assert effective_number(n, 0.0).tolist() == [1.0] * 5 and effective_number(n, 1.0).tolist() == n.tolist()
    assert class_balanced_weights(COUNTS, 0.0).tolist() == [1.0] * 10
    inverse = class_balanced_weights(COUNTS, 1.0, dtype=torch.float64)
    assert inverse[[0, 1, 9]].tolist() == pytest.approx([0.040236, 0.067128, 4.02365], abs=5e-6)
    assert torch.allclose(inverse * torch.from_numpy(COUNTS), inverse[0] * 5000)
    # the recursion E_n = 1 + beta E_{n-1}, and no digits lost where beta is all but 1
    value = 0.0
    for count in range(1, 200):
        value = 1 + 0.97 * value
        assert effective_number([count], 0.97, dtype=torch.float64).item() == pytest.approx(value, rel=1e-12)
    beta = 1 - 2.0**-40
    assert effective_number([1000], beta, dtype=torch.float64).item() == pytest.approx(
        1000 - 499_500 * 2.0**-40, rel=1e-15
    )
    assert effective_number([10**9], 0.999).item() == pytest.approx(1000)
    for beta in (0.0, 0.9, 0.9999, 1.0):
        assert class_balanced_weights(COUNTS, beta, dtype=torch.float64).sum().item() == pytest.approx(10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    z, y = batch()
    weight = torch.tensor([0.2, 0.5, 1.0, 2.3], dtype=torch.float64)
    for gamma in (0.5, 2.0):
        for reduction in ("mean", "none"):
            assert torch.autograd.gradcheck(
                lambda a, g=gamma, r=reduction: class_balanced_loss(a, y, weight, kind=kind, gamma=g, reduction=r),
                (z.requires_grad_(),),
            )
        assert torch.autograd.gradgradcheck(
            lambda a, g=gamma: class_balanced_loss(a, y, weight, kind=kind, gamma=g), (z,)
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_far_logits_stay_finite(kind, dtype):
    z = torch.tensor([[300.0, -300, 0], [-300, 300, 0], [-1e4, 1e4, 1e4]], dtype=dtype).requires_grad_()
    loss = class_balanced_loss(z, torch.tensor([0, 0, 0]), kind=kind, gamma=0.5, reduction="none")
    loss.sum().backward()
    assert loss.isfinite().all() and z.grad.isfinite().all() and loss.dtype == torch.float32
    assert loss[1] > 290 and loss[0] < 2


@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bits_and_autocast(kind):
    z, y = batch(64, 12)
    z = z.bfloat16().float()
    full = class_balanced_loss(z, y, kind=kind)
    for half in (torch.bfloat16, torch.float16):
        assert class_balanced_loss(z.to(half), y, kind=kind).item() == pytest.approx(full.item(), rel=1e-3)
        with torch.autocast("cpu", half):
            assert class_balanced_loss(z, y, kind=kind).item() == pytest.approx(full.item(), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_reductions_and_maps_of_labels(kind):
    z, y = batch(8)
    loss = ClassBalancedLoss([50, 20, 5, 1], kind=kind, reduction="none").double()
    each = loss(z, y)
    loss.reduction = "sum"
    assert torch.allclose(loss(z, y), each.sum())
    loss.reduction = "mean"
    assert torch.allclose(loss(z, y), each.sum() / 8)  # not divided by the weights
    maps, labels = z.view(2, 2, 2, 4).permute(0, 3, 1, 2), y.view(2, 2, 2)
    assert torch.allclose(loss(maps, labels), each.mean())
    loss.reduction = "none"
    assert torch.allclose(loss(maps, labels).flatten(), each)


def test_focal_forgets_what_is_known():
    z = torch.tensor([[6.0, -6, -6], [-6, 6, 6]])
    easy, hard = (class_balanced_loss(z[i : i + 1], torch.tensor([0]), kind="focal", gamma=2.0) for i in (0, 1))
    plain = [class_balanced_loss(z[i : i + 1], torch.tensor([0]), kind="sigmoid") for i in (0, 1)]
    assert easy / plain[0] < 1e-4 and hard / plain[1] > 0.98
    assert torch.equal(class_balanced_loss(z, torch.tensor([0, 0]), kind="focal", gamma=0.0), sum(plain) / 2)


def test_prior_and_decay():
    layer = init_class_prior(torch.nn.Linear(5, 20))
    assert torch.allclose(torch.zeros(5) @ layer.weight.T + layer.bias, torch.tensor(-math.log(19.0)))
    start = class_balanced_loss(layer.bias[None], torch.tensor([3]), kind="sigmoid").item()
    assert start == pytest.approx(math.log(20) + 19 * math.log(20 / 19), rel=1e-5) and start < 20 * math.log(2)
    decayed, free = decay_groups(layer.parameters(), layer.bias, 2e-4)
    assert decayed == {"params": [layer.weight], "weight_decay": 2e-4}
    assert free["params"] == [layer.bias] and free["weight_decay"] == 0


def test_network():
    model = class_balanced_resnet32()
    assert sum(p.numel() for p in model.parameters()) == 464_154
    assert sum(isinstance(m, torch.nn.Conv2d | torch.nn.Linear) for m in model.modules()) == 32
    assert [p.shape for p in (model.layer1[0].conv1.weight, model.layer3[0].conv1.weight)] == [
        (16, 16, 3, 3),
        (64, 32, 3, 3),
    ]
    model = class_balanced_resnet32(num_classes=7, in_chans=1, kind="focal")
    assert torch.allclose(model.fc.bias.sigmoid(), torch.tensor(1 / 7))
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 7) and (class_balanced_resnet32().fc.bias != -math.log(9)).all()
    model.reset_classifier(0)
    assert model(torch.rand(2, 1, 9, 9)).shape == (2, 64)
    state = {f"module.{k}".replace("fc.", "linear."): v for k, v in CifarResNet(8).state_dict().items()}
    assert set(CifarResNet.convert_state_dict(state)) == set(CifarResNet(8).state_dict())


def test_shortcut_averages_and_pads():
    block = CifarBlock(2, 4, stride=2).eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 2, 4, 4)
    expected = torch.zeros(1, 4, 2, 2)
    expected[:, 1:3] = x.view(1, 2, 2, 2, 2, 2).mean((3, 5))
    assert torch.allclose(block(x), expected)
    assert torch.equal(F.relu(x), CifarBlock(2, 2).eval().apply(lambda m: _zero(m))(x))


def _zero(module):
    if isinstance(module, torch.nn.BatchNorm2d):
        torch.nn.init.zeros_(module.weight)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: effective_number([3, -1], 0.9), r"counts\[1\] is -1"),
        (lambda: effective_number([[3, 1]], 0.9), "counts has shape"),
        (lambda: effective_number(["a"], 0.9), "counts has shape"),
        (lambda: effective_number([3, 1], -0.1), "beta is -0.1"),
        (lambda: class_balanced_weights([3, 1], float("nan")), "beta is nan"),
        (lambda: class_balanced_loss(torch.zeros(2, 3), torch.tensor([0, -1])), r"target\[1\] is -1, allowed are classes from 0 to 2"),
        (lambda: class_balanced_loss(torch.zeros(1, 3, 2, 2), torch.tensor([[[0, 1], [2, 3]]])), r"target\[0, 1, 1\] is 3"),
        (lambda: class_balanced_loss(torch.zeros(2, 3), torch.tensor([0, 1], dtype=torch.int32)), "target has type"),
        (lambda: class_balanced_loss(torch.zeros(3), torch.tensor([0])), "target has shape"),
        (lambda: class_balanced_loss(torch.zeros(2, 3), torch.tensor([0, 1]), torch.ones(2)), "weight has shape"),
        (lambda: class_balanced_loss(torch.zeros(2, 3), torch.tensor([0, 1]), gamma=float("inf")), "gamma is inf"),
        (lambda: CifarResNet(30), "depth is 30"),
        (lambda: CifarResNet(8, width=5), "width is 5"),
        (lambda: CifarResNet(8)(torch.zeros(1, 1, 8, 8)), "x has 1 channels"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
