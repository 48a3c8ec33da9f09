"""AdvProp by hand: branches, attackers, identities of the loss, and the layout of the released weights."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saigen.measure import buffers, parameters
from saigen.nn.resnet import resnet50
from saigen.papers.vision import advprop
from saigen.papers.vision.advprop import (
    AdvProp,
    Attack,
    AuxiliaryBatchNorm2d,
    auxiliary_parameters,
    claims,
    convert_auxiliary_bn,
    steps_for,
    strip_auxiliary_bn,
    use_branch,
    without_auxiliary,
)
from saigen.papers.vision.efficientnet import tf_efficientnet_b0


def small(seed=0, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 4 * 4, classes),
    )  # fmt: skip


def batch(n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 8, 8, generator=generator), torch.randint(0, 3, (n,), generator=generator)


# --- auxiliary batch norms --------------------------------------------------------------------------------------------


def test_conversion_keeps_the_network():
    plain = small()
    x, _ = batch()
    converted = convert_auxiliary_bn(copy.deepcopy(plain), auxiliary=2)
    for mode in (True, False):
        for net in (plain, converted):
            net.train(mode)[6].p = 0.0
        assert torch.equal(plain(x), converted(x))
    keys = set(converted.state_dict()) - set(plain.state_dict())
    assert keys and all("aux_bn." in key for key in keys)
    plain.load_state_dict(without_auxiliary(converted.state_dict()))
    stripped = strip_auxiliary_bn(converted)
    assert type(stripped[1]) is nn.BatchNorm2d and set(stripped.state_dict()) == set(plain.state_dict())
    assert torch.equal(stripped(x), plain(x))


def test_a_branch_sees_and_changes_only_its_own():
    net = convert_auxiliary_bn(small()).train()
    x, y = batch()
    main, aux = net[1].running_mean.clone(), net[1].aux_bn[0].running_mean.clone()
    with use_branch(net, 1):
        F.cross_entropy(net(x), y).backward()
    assert torch.equal(net[1].running_mean, main) and not torch.equal(net[1].aux_bn[0].running_mean, aux)
    assert net[1].weight.grad is None and net[1].aux_bn[0].weight.grad.any()
    assert net[1].branch == 0
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()
    assert net[1].aux_bn[0].weight.grad is None and net[1].weight.grad.any()


def test_a_split_batch_is_its_parts():
    net = convert_auxiliary_bn(small(), auxiliary=2).train()
    net[6].p = 0.0
    x, _ = batch(9)
    alone = copy.deepcopy(net)
    with use_branch(net, (0, 2, 1)):
        together = net(x)
    for i, branch in enumerate((0, 2, 1)):
        with use_branch(alone, branch):
            part = alone(x[3 * i : 3 * i + 3])
        assert torch.allclose(together[3 * i : 3 * i + 3], part, atol=1e-6)
    for key, value in net.state_dict().items():
        assert torch.allclose(value, alone.state_dict()[key]), key
    with use_branch(net, (0, 1)), pytest.raises(ValueError, match="x has 9 samples"):
        net(x)


class WithActivation(nn.BatchNorm2d):
    """As other libraries have it: a batch norm with an activation inside."""

    def forward(self, x):
        return super().forward(x).relu()


def test_any_batch_norm_of_any_network():
    x = torch.randn(4, 5, 6, 6)
    for norm, shape in (
        (nn.BatchNorm1d(5), (4, 5)),
        (nn.BatchNorm3d(5), (4, 5, 2, 2, 2)),
        (WithActivation(5), x.shape),
    ):
        kind, plain = type(norm), copy.deepcopy(norm)
        converted = convert_auxiliary_bn(norm)
        assert isinstance(converted, kind)
        z = torch.randn(shape)
        assert torch.equal(converted(z), plain(z))
        with use_branch(converted, 1):
            assert torch.equal(converted(z), copy.deepcopy(plain).train()(z))
        assert type(strip_auxiliary_bn(converted)) is kind
    sync = convert_auxiliary_bn(nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4)))
    assert isinstance(sync[1], nn.SyncBatchNorm) and isinstance(sync[1].aux_bn[0], nn.SyncBatchNorm)
    bare = convert_auxiliary_bn(nn.BatchNorm2d(3, affine=False, track_running_stats=False))
    assert torch.equal(strip_auxiliary_bn(bare)(x[:, :3]), nn.BatchNorm2d(3, affine=False)(x[:, :3]))
    net = pickle.loads(pickle.dumps(convert_auxiliary_bn(small())))
    assert type(net[1]) is AuxiliaryBatchNorm2d


def test_counts_of_resnet50():
    with torch.device("meta"):
        net = resnet50()
        widths = [m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        before, statistics = parameters(net), buffers(net)
        convert_auxiliary_bn(net)
    assert before == 25_557_032 and parameters(net) == 25_610_152
    assert auxiliary_parameters(widths) == 53_120
    assert buffers(net) == 2 * statistics
    assert parameters(strip_auxiliary_bn(net)) == before


def test_wrong_use_of_branches():
    with pytest.raises(ValueError, match="auxiliary is 0"):
        convert_auxiliary_bn(small(), 0)
    with pytest.raises(ValueError, match="auxiliary is 0"):
        auxiliary_parameters([3], 0)
    with pytest.raises(ValueError, match="without batch norms"):
        convert_auxiliary_bn(nn.Linear(2, 2))
    net = convert_auxiliary_bn(small())
    with pytest.raises(ValueError, match="has auxiliary batch norms"):
        convert_auxiliary_bn(net)
    with pytest.raises(ValueError, match="branch is 2"), use_branch(net, 2):
        pass
    with pytest.raises(ValueError, match="branch is 1"), use_branch(small(), 1):
        pass


# --- attackers --------------------------------------------------------------------------------------------------------


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()


def test_pgd_finds_the_optimum_of_a_linear_model():
    net = linear()
    x = 0.5 + 0.1 * torch.rand(5, 3, 2, 2, dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 0, 1])
    margin = (net[1].weight[1] - net[1].weight[0]).view(3, 2, 2)
    best = x + 8 / 255 * torch.where(y == 1, -1.0, 1.0)[:, None, None, None] * margin.sign()
    for attack in (Attack(8, 20), Attack(8, 10, kind="i-fgsm"), Attack(8, 1, step_size=8, kind="i-fgsm")):
        assert torch.allclose(attack(net, x, y), best, atol=1e-12)
    # towards the one wrong class is away from the right one
    assert torch.allclose(Attack(8, 20, targeted=True)(net, x, y), best, atol=1e-12)
    assert torch.equal(Attack(0, 3)(net, x, y), x)


def test_one_step_is_the_signed_gradient():
    net, (x, y) = small().eval(), batch()
    x = x * 0.8 + 0.1
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    inside = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(inside), y), inside)
    assert torch.allclose(Attack(3, 1, 3, kind="i-fgsm")(net, x, y), x + 3 / 255 * gradient.sign(), atol=1e-6)


def test_what_bounds_an_attack():
    net, (x, y) = small(), batch()
    start = torch.Generator().manual_seed(0)
    for attack in (Attack(4), Attack(1), Attack(4, targeted=True), Attack(4, 3, 2, kind="i-fgsm")):
        adversarial = attack(net, x, y, start)
        assert (adversarial - x).abs().max() <= attack.eps / 255 + 1e-6
        assert adversarial.min() >= 0 and adversarial.max() <= 1 and not adversarial.requires_grad
    free = Attack(1, 8, kind="gd")(net, x, y, start)
    assert 1 / 255 < (free - x).abs().max() <= 9 / 255 + 1e-6
    assert [steps_for(eps) for eps in (1, 2, 3, 4)] == [1, 3, 4, 5] and Attack(4).steps == 5
    with pytest.raises(ValueError, match="eps is 0"):
        steps_for(0)


def test_an_attack_raises_the_loss_and_leaves_no_trace():
    net, (x, y) = convert_auxiliary_bn(small()).train(), batch(24)
    state, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    before = torch.get_rng_state()
    one, two = (Attack(8)(net, x, y, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(one, two)
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key])
    assert [m.training for m in net.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    net.eval()
    assert F.cross_entropy(net(one), y) > F.cross_entropy(net(x), y)
    with torch.no_grad():  # gradients are its own business
        assert Attack(8)(net, x, y).shape == x.shape


def test_normalised_images_are_attacked_in_pixels():
    net, (x, y) = small(), batch()
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    m, s = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))

    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, pixels):
            return self.net((pixels - m) / s)

    attack = Attack(6, mean=mean, std=std)
    outside = attack(net, (x - m) / s, y, torch.Generator().manual_seed(0)) * s + m
    inside = Attack(6)(Normalised().eval(), x, y, torch.Generator().manual_seed(0))
    assert torch.allclose(outside, inside, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"eps": -1}, "eps is -1"),
        ({"steps": 0}, "steps is 0"),
        ({"step_size": 0}, "step_size is 0"),
        ({"kind": "cw"}, "kind is 'cw'"),
        ({"bounds": (1.0, 0.0)}, "bounds is"),
        ({"std": (0.0,)}, "std is"),
    ],
)
def test_wrong_attacks(wrong, text):
    with pytest.raises(ValueError, match=text):
        Attack(**wrong)


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_without_an_attack_the_loss_is_twice_the_clean_one():
    net, (x, y) = small(), batch()
    net[6].p = 0.0
    plain = copy.deepcopy(net)
    convert_auxiliary_bn(net)
    loss = AdvProp(Attack(0, 1))(net, x, y)
    loss.backward()
    clean = F.cross_entropy(plain(x), y)
    clean.backward()
    assert torch.allclose(loss, 2 * clean, atol=1e-6)
    assert torch.allclose(net[0].weight.grad, 2 * plain[0].weight.grad, atol=1e-5)
    assert torch.allclose(net[1].weight.grad, plain[1].weight.grad, atol=1e-5)
    assert torch.allclose(net[1].aux_bn[0].weight.grad, plain[1].weight.grad, atol=1e-5)
    assert torch.allclose(AdvProp(Attack(0, 1), mean=True)(convert_auxiliary_bn(copy.deepcopy(plain)), x, y), clean)


def test_fine_grained_views_go_through_their_own_branches():
    net, (x, y) = convert_auxiliary_bn(small(), 2).train(), batch()
    net[6].p = 0.0
    reference = copy.deepcopy(net)
    terms = AdvProp(lambda images: 1 - images, Attack(4)).terms(net, x, y, torch.Generator().manual_seed(0))
    assert len(terms.parts) == len(terms.images) == 3
    assert torch.equal(terms.images[0], x) and torch.equal(terms.images[1], 1 - x)
    with use_branch(reference, 2):
        assert torch.equal(terms.images[2], Attack(4)(reference, x, y, torch.Generator().manual_seed(0)))
    for branch, (part, images) in enumerate(zip(terms.parts, terms.images, strict=True)):
        with use_branch(reference, branch):
            assert torch.allclose(part, F.cross_entropy(reference(images), y), atol=1e-6)
    assert torch.allclose(terms.loss, sum(terms.parts))


def test_joint_training_is_one_norm_over_both():
    net, (x, y) = small(), batch()
    net[6].p = 0.0
    reference = copy.deepcopy(net)
    terms = AdvProp(Attack(4), separate=False).terms(net, x, y, torch.Generator().manual_seed(0))
    both = reference(torch.cat(terms.images))
    assert torch.allclose(terms.loss, 2 * F.cross_entropy(both, y.repeat(2)), atol=1e-5)


def test_too_few_branches_are_refused():
    net, (x, y) = convert_auxiliary_bn(small()), batch()
    with pytest.raises(ValueError, match="branch is 2"):
        AdvProp(Attack(1), Attack(4))(net, x, y)


# --- the released networks --------------------------------------------------------------------------------------------


def test_released_networks():
    with torch.device("meta"):
        b0, b8, plain = advprop.tf_efficientnet_b0_ap(), advprop.tf_efficientnet_b8_ap(), tf_efficientnet_b0()
    assert parameters(b0) == 5_288_548 and parameters(b8) == 87_413_142
    assert set(b0.state_dict()) == set(plain.state_dict())
    assert b0.default_cfg["mean"] == b0.default_cfg["std"] == (0.5, 0.5, 0.5)
    assert plain.default_cfg["mean"] == (0.485, 0.456, 0.406)


# --- the claim's own parts --------------------------------------------------------------------------------------------


def test_corruptions_change_images_and_keep_their_range():
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    made = claims.corruptions(x, torch.Generator().manual_seed(0))
    assert len(made) == 18
    for images in made:
        assert images.shape == x.shape and images.min() >= 0 and images.max() <= 1 and not torch.equal(images, x)
    flat = torch.full((2, 1, 16, 16), 0.3)
    blurred = claims.corruptions(flat, torch.Generator().manual_seed(0))[3:6]
    assert all(torch.allclose(images, flat, atol=1e-6) for images in blurred)
