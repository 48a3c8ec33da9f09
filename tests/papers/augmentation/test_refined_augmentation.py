"""Refined data augmentation: the two stages against training loops written out, what is frozen or lowered, the risks."""

import copy
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import integrate, stats
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, StepLR

from saigen.nn.mixing import Mixup
from saigen.papers.augmentation.refined_augmentation import (
    OnImages,
    RefinedAugmentation,
    Refinement,
    empirical_risks,
    freeze,
    major_feature_share,
    mixup_risk_floor,
    statistics_kept,
)
from saigen.train import EMA, fit


def make_net(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(12, 6, generator=generator), torch.randint(3, (12,), generator=generator)


def generator_of(step):
    return torch.Generator().manual_seed(1000 + step)


def shift(x, y, generator=None):
    return x + 0.1 * torch.randn(x.shape, generator=generator), y


def optimizer_of(net, kind="SGD"):
    if kind == "SGD":
        return torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)
    return torch.optim.Adam(net.parameters(), lr=0.01)


def one_step(net, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def train(net, optimizer, refinement, first, last):
    for step in range(first, last):
        one_step(net, optimizer, *refinement.augment(*batch(step), generator=generator_of(step)))
        refinement.step()


def state(net):
    return [tensor.clone() for tensor in net.state_dict().values()]


def assert_same(ours, theirs):
    for a, b in zip(state(ours), state(theirs), strict=True):
        assert torch.equal(a, b)


# ---- the two stages ----


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_equals_two_training_loops_written_by_hand(kind):
    """Stage 1 with mixup and a cosine, stage 2 clean from a tenth of the rate by a cosine of its own."""
    total, refine, rate = 20, 6, 0.2 if kind == "SGD" else 0.01
    net, theirs = make_net(), make_net()
    optimizer, plain = optimizer_of(net, kind), optimizer_of(theirs, kind)
    augment = RefinedAugmentation(Mixup(1.0, 3), shift)
    scheduler = CosineAnnealingLR(optimizer, total - refine)
    refinement = Refinement(optimizer, steps=total, refine_steps=refine, augment=augment, scheduler=scheduler)
    for step in range(total):
        generator = generator_of(step)
        x, y = batch(step)
        if step < total - refine:
            lr = rate * 0.5 * (1 + math.cos(math.pi * step / (total - refine)))
            mixed = Mixup(1.0, 3)(*shift(x, y, generator), generator=generator)
        else:
            lr = 0.1 * rate * 0.5 * (1 + math.cos(math.pi * (step - total + refine) / refine))
            mixed = shift(x, y, generator)
        plain.param_groups[0]["lr"] = lr
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr, rel=1e-9)
        assert refinement.refining == augment.refining == (step >= total - refine)
        theirs_loss = one_step(theirs, plain, *mixed)
        ours_loss = one_step(net, optimizer, *augment(x, y, generator=generator_of(step)))
        refinement.step()
        assert ours_loss == pytest.approx(theirs_loss, rel=1e-4)
    for a, b in zip(state(net), state(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="steps is 20"):
        refinement.step()


def test_no_refinement_is_training_with_the_intensive_augmentation_bit_for_bit():
    net, theirs = make_net(), make_net()
    optimizer, plain = optimizer_of(net), optimizer_of(theirs)
    augment = RefinedAugmentation(Mixup(1.0, 3), shift)
    scheduler, theirs_scheduler = CosineAnnealingLR(optimizer, 12), CosineAnnealingLR(plain, 12)
    train(net, optimizer, Refinement(optimizer, steps=12, refine_steps=0, augment=augment, scheduler=scheduler), 0, 12)
    for step in range(12):
        generator = generator_of(step)
        one_step(theirs, plain, *Mixup(1.0, 3)(*shift(*batch(step), generator), generator=generator))
        theirs_scheduler.step()
    assert_same(net, theirs)


def test_refinement_alone_is_training_with_the_standard_augmentation_bit_for_bit():
    net, theirs = make_net(), make_net()
    optimizer, plain = optimizer_of(net), optimizer_of(theirs)
    augment = RefinedAugmentation(Mixup(1.0, 3), shift)
    theirs_scheduler = CosineAnnealingLR(plain, 12)
    train(net, optimizer, Refinement(optimizer, steps=12, refine_steps=12, augment=augment, lr_scale=1), 0, 12)
    for step in range(12):
        one_step(theirs, plain, *shift(*batch(step), generator_of(step)))
        theirs_scheduler.step()
    assert_same(net, theirs)


def test_learning_rates_restart_a_group_each_and_fall_to_zero():
    net = make_net()
    groups = [{"params": net[0].parameters(), "lr": 0.4}, {"params": net[3].parameters(), "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    refinement = Refinement(
        optimizer, steps=30, refine_steps=10, scheduler=StepLR(optimizer, 8, gamma=0.1), lr_scale=0.25
    )
    rates = []
    for _ in range(30):
        optimizer.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
        refinement.step()
    np.testing.assert_allclose(rates[19], [0.004, 0.001])
    np.testing.assert_allclose(rates[20], [0.1, 0.025])
    assert 0 < rates[-1][0] < 0.1 * 0.03
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_other_decays_and_no_change_of_the_rate():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    linear = Refinement(
        optimizer,
        steps=10,
        refine_steps=4,
        lr_scale=0.5,
        decay=lambda optimizer, steps: LinearLR(optimizer, 1, 0, steps),
    )
    rates = []
    for _ in range(10):
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        linear.step()
    np.testing.assert_allclose(rates, [1.0] * 6 + [0.5, 0.375, 0.25, 0.125])

    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    augment = RefinedAugmentation(Mixup(1.0, 3))
    scheduler = CosineAnnealingLR(optimizer, 10)
    only_data = Refinement(optimizer, steps=10, refine_steps=4, augment=augment, scheduler=scheduler, lr_scale=None)
    for step in range(10):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * (1 + math.cos(math.pi * step / 10)))
        assert augment.refining == (step >= 6)
        optimizer.step()
        only_data.step()


def test_less_augmentation_in_place_of_none():
    x, y = batch(0)
    augment = RefinedAugmentation(Mixup(1.0, 3), shift, less=Mixup(0.1, 3)).refine()
    generator = generator_of(0)
    expected = Mixup(0.1, 3)(*shift(x, y, generator), generator=generator)
    found = augment(x, y, generator=generator_of(0))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert augment.refine(False)(x, y)[1].shape == (12, 3) and not augment.refining


def test_labels_are_soft_in_the_first_stage_and_as_given_in_the_second():
    x, y = batch(0)
    augment = RefinedAugmentation(Mixup(1.0, 3))
    assert augment(x, y)[1].shape == (12, 3)
    assert augment.refine()(x, y)[1] is y
    assert augment.eval()(x, y)[0] is x
    images = torch.rand(2, 3, 4, 4)
    double = OnImages(lambda x, generator=None: 2 * x)
    assert torch.equal(RefinedAugmentation(double)(images, y)[0], 2 * images)


# ---- what is frozen, forgotten and started again ----


def test_frozen_modules_keep_weights_and_statistics():
    net = make_net()
    optimizer = optimizer_of(net)
    augment = RefinedAugmentation(Mixup(1.0, 3))
    refinement = Refinement(optimizer, steps=10, refine_steps=5, augment=augment, frozen=[net[0], net[1]])
    train(net, optimizer, refinement, 0, 5)
    before = copy.deepcopy(net.state_dict())
    for step in range(5, 10):
        net.train()
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(net(batch(step)[0]), batch(step)[1]).backward()
        optimizer.step()
        refinement.step()
    after = net.state_dict()
    for key, value in before.items():
        assert torch.equal(value, after[key]) == (not key.startswith("3.")), key
    assert not net[1].training


def test_freeze_normalises_by_the_running_statistics():
    net = make_net()
    for step in range(5):
        net(batch(step)[0])
    expected = copy.deepcopy(net).eval()(batch(9)[0])
    freeze(net)
    torch.testing.assert_close(net.train()(batch(9)[0]), expected)
    assert not any(p.requires_grad for p in net.parameters())


def test_reset_and_the_call_at_the_switch():
    for reset in (False, True):
        net = make_net()
        optimizer = optimizer_of(net)
        ema, calls = EMA(net, 0.5), []

        def restart(net=net, ema=ema, calls=calls):
            calls.append(1)
            ema.model.load_state_dict(net.state_dict())

        augment = RefinedAugmentation(Mixup(1.0, 3))
        refinement = Refinement(optimizer, steps=8, refine_steps=3, augment=augment, reset=reset, on_refine=restart)
        train(net, optimizer, refinement, 0, 5)
        assert bool(optimizer.state) != reset and calls == [1]
        assert_same(net, ema.model)
        train(net, optimizer, refinement, 5, 8)
        assert calls == [1]


# ---- any loop, any loader, any interruption ----


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
@pytest.mark.parametrize("stop", [0, 3, 5, 6, 9])
@pytest.mark.parametrize("lr_scale", [0.1, None])
def test_resumed_training_equals_unbroken_training(kind, stop, lr_scale):
    def make():
        net = make_net()
        optimizer = optimizer_of(net, kind)
        refinement = Refinement(
            optimizer, steps=10, refine_steps=5, augment=RefinedAugmentation(Mixup(1.0, 3), shift),
            scheduler=CosineAnnealingLR(optimizer, 5 if lr_scale else 10), lr_scale=lr_scale, frozen=[net[0]],
        )  # fmt: skip
        return net, optimizer, refinement

    unbroken, optimizer, refinement = make()
    train(unbroken, optimizer, refinement, 0, 10)
    net, optimizer, refinement = make()
    train(net, optimizer, refinement, 0, stop)
    file = io.BytesIO()
    parts = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "refinement": refinement.state_dict()}
    torch.save(parts, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    net, optimizer, refinement = make()
    net.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    refinement.load_state_dict(saved["refinement"])
    assert refinement.augment.refining == (stop >= 5)
    train(net, optimizer, refinement, stop, 10)
    assert_same(net, unbroken)


def test_in_the_training_loop_of_the_house():
    x, y = torch.cat([batch(s)[0] for s in range(4)]), torch.cat([batch(s)[1] for s in range(4)])
    net, seen = make_net(), []
    optimizer = optimizer_of(net)
    augment = RefinedAugmentation(Mixup(1.0, 3))
    refinement = Refinement(optimizer, steps=10, refine_steps=4, augment=augment)

    def loss(model, x, y):
        seen.append((y.ndim, optimizer.param_groups[0]["lr"]))
        return F.cross_entropy(model(x), y)

    fit(
        net, loss, (x, y), optimizer=optimizer, steps=10, batch_size=12, seed=0,
        transform=lambda generator, x, y: augment(x, y, generator=generator), on_step=lambda *_: refinement.step(),
    )  # fmt: skip
    assert [labels for labels, _ in seen] == [2] * 6 + [1] * 4
    np.testing.assert_allclose([lr for _, lr in seen[:7]], [0.2] * 6 + [0.02])


class Samples(torch.utils.data.Dataset):
    def __init__(self, augment):
        self.augment = augment

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.augment(torch.tensor(float(index)), torch.tensor(0))[0]


def _negate(x, y, generator=None):
    return -x, y


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_persistent_workers_go_over_too(start):
    augment = RefinedAugmentation(_negate)
    loader = torch.utils.data.DataLoader(
        Samples(augment), batch_size=4, num_workers=1, persistent_workers=True, multiprocessing_context=start
    )
    assert torch.cat(list(loader)).sum().item() == -28
    augment.refine()
    assert torch.cat(list(loader)).sum().item() == 28


# ---- the risks and the closed forms ----


def test_risks_by_brute_force():
    net = make_net()
    train_set, test_set = batch(0), batch(1)
    net(train_set[0])
    net.train()
    risks = empirical_risks(
        net, train_set, test_set, Mixup(1.0, 3), batch_size=5, generator=torch.Generator().manual_seed(3)
    )
    assert net.training
    net.eval()
    generator = torch.Generator().manual_seed(3)
    losses = []
    for i in range(0, 12, 5):
        x, y = Mixup(1.0, 3)(train_set[0][i : i + 5], train_set[1][i : i + 5], generator=generator)
        losses += (-(y * net(x).log_softmax(-1)).sum(-1)).tolist()
    assert risks.augmented == pytest.approx(np.mean(losses), rel=1e-5)
    for value, (x, y) in ((risks.clean, train_set), (risks.test, test_set)):
        assert value == pytest.approx(float(-net(x).log_softmax(-1)[torch.arange(12), y].mean()), rel=1e-5)
    assert risks.gap == pytest.approx(risks.test - risks.clean)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.5])
def test_floor_of_the_mixup_risk(alpha):
    def entropy(share):
        return -(share * np.log(share) + (1 - share) * np.log(1 - share)) * stats.beta(alpha, alpha).pdf(share)

    expected = integrate.quad(entropy, 0, 1)[0]
    assert mixup_risk_floor(alpha, 4) == pytest.approx(0.75 * expected, rel=1e-6)
    # Labels that the classifier predicts perfectly, mixed: what cross-entropy is left is their entropy.
    y = torch.arange(4).repeat(50)
    found = []
    for seed in range(200):
        _, soft = Mixup(alpha, 4)(torch.zeros(200, 1), y, generator=torch.Generator().manual_seed(seed))
        found.append(float(torch.special.entr(soft).sum(1).mean()))
    assert np.mean(found) == pytest.approx(mixup_risk_floor(alpha, 4), abs=4 * np.std(found) / math.sqrt(200))


def test_share_of_the_major_features_is_that_of_principal_components():
    from sklearn.decomposition import PCA

    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)
    ratios = PCA().fit(features.numpy()).explained_variance_ratio_
    for count in (1, 3, 6):
        assert major_feature_share(features, count) == pytest.approx(ratios[:count].sum(), abs=1e-5)
    assert major_feature_share(torch.ones(4, 2)) == 1.0


@pytest.mark.parametrize("momentum", [0.1, 0.01])
def test_running_statistics_forget_the_first_stage(momentum):
    norm = nn.BatchNorm1d(1, momentum=momentum)
    norm.running_mean.fill_(1.0)
    for _ in range(50):
        norm(torch.tensor([[-1.0], [1.0]]))
    assert norm.running_mean.item() == pytest.approx(statistics_kept(50, momentum), rel=1e-4)
    assert statistics_kept(50) == pytest.approx(0.00515, abs=5e-6)


def test_wrong_arguments_are_named():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    two = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.ones(1))]}, {"params": [nn.Parameter(torch.ones(1))]}], lr=0.1
    )
    x, y = batch(0)
    for call, name in (
        (lambda: Refinement(optimizer, steps=5, refine_steps=6), "refine_steps is 6"),
        (lambda: Refinement(optimizer, steps=5, refine_steps=-1), "refine_steps is -1"),
        (lambda: Refinement(optimizer, steps=5, refine_steps=1, lr_scale=0.0), "lr_scale is 0.0"),
        (lambda: RefinedAugmentation(None), "intensive is None"),
        (lambda: RefinedAugmentation(Mixup(1, 3), "crop"), "standard is 'crop'"),
        (lambda: empirical_risks(make_net(), (x[:0], y[:0]), (x, y), Mixup(1, 3)), "train has 0"),
        (lambda: major_feature_share(x, 7), "count is 7"),
        (lambda: mixup_risk_floor(0.0), "alpha is 0.0"),
        (lambda: statistics_kept(5, 2.0), "momentum 2.0"),
        (lambda: Refinement(optimizer, steps=5, refine_steps=1).load_state_dict(
            Refinement(two, steps=5, refine_steps=1).state_dict()), "2 learning rates"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            call()
