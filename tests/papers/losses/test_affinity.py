"""The affinity loss: golden values, the formulas number by number, closed forms, gradients, the head."""

import math

import numpy as np
import pytest
import torch

from saigen.papers.losses.affinity import (
    AffinityHead,
    AffinityLoss,
    affinity_loss,
    diversity_regularizer,
    gaussian_affinity,
    max_margin_loss,
)

F = torch.tensor([[0, 0], [1, 1]], dtype=torch.float64)
W = torch.tensor([[0, 1], [2, 0], [1, 2]], dtype=torch.float64)[:, None]
Y = torch.tensor([0, 2])


def draw(n=7, classes=4, m=3, h=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, h, dtype=torch.float64, generator=generator)
    centers = torch.randn(classes, m, h, dtype=torch.float64, generator=generator)
    return features, centers, torch.arange(n) % classes


def brute_force(features, centers, target, sigma, margin):
    """The formulas as they stand: affinities, each sample's hinge, R."""
    features, centers = features.numpy(), centers.numpy()
    affinity = np.array(
        [[max(math.exp(-sum((f - w) ** 2) / sigma) for w in of_class) for of_class in centers] for f in features]
    )
    hinge = [
        sum(max(0.0, margin + d[j] - d[y]) for j in range(len(centers)) if j != y)
        for d, y in zip(affinity, target.tolist(), strict=True)
    ]
    every = centers.reshape(-1, centers.shape[-1])
    pairs = [sum((every[j] - every[k]) ** 2) for j in range(len(every)) for k in range(j + 1, len(every))]
    mu = sum(pairs) / len(pairs)
    return affinity, hinge, sum((pair - mu) ** 2 for pair in pairs) / len(pairs)


def test_golden_values():
    affinity = gaussian_affinity(F, W, 2.0)
    expected = [[0.60653066, 0.13533528, 0.082085], [0.60653066, 0.36787944, 0.60653066]]
    np.testing.assert_allclose(affinity.numpy(), expected, atol=5e-9)
    each = max_margin_loss(affinity, Y, 0.5, reduction="none")
    np.testing.assert_allclose(each.numpy(), [0.02880462, 0.76134878], atol=5e-9)
    assert max_margin_loss(affinity, Y, 0.5).item() == pytest.approx(0.39507670, abs=5e-9)
    assert diversity_regularizer(W).item() == pytest.approx(2.0)


@pytest.mark.parametrize("m", [1, 3])
def test_equals_brute_force(m):
    for seed in range(4):
        features, centers, target = draw(m=m, seed=seed)
        for sigma, margin in ((2.0, 0.5), (10.0, 0.75), (40.0, 1.0)):
            affinity, hinge, regularizer = brute_force(features, centers, target, sigma, margin)
            ours = gaussian_affinity(features, centers, sigma)
            np.testing.assert_allclose(ours.numpy(), affinity, rtol=1e-10)
            each = max_margin_loss(ours, target, margin, reduction="none")
            np.testing.assert_allclose(each.numpy(), hinge, rtol=1e-10, atol=1e-12)
            assert diversity_regularizer(centers).item() == pytest.approx(regularizer, rel=1e-10)
            loss = affinity_loss(ours, target, centers, margin=margin)
            assert loss.item() == pytest.approx(np.mean(hinge) + regularizer, rel=1e-10)


def test_equals_the_public_implementation():
    """The tensor expressions of the one public implementation (Keras), in NumPy: pairs by an upper triangle of (mC, mC)."""
    features, centers, target = draw()
    f, w, onehot = features.numpy(), centers.numpy(), np.eye(4)[target.numpy()]
    distance = np.exp(-((f[:, None, None] - w[None]) ** 2).sum(-1) / 10.0).max(-1)
    flat = w.reshape(12, 5)
    upper = np.triu(((flat[None] - flat[:, None]) ** 2).sum(-1), 1)
    mu = 2.0 / (12**2 - 12) * upper.sum()
    rw = 2.0 / (12**2 - 12) * np.triu((upper - mu) ** 2, 1).sum()
    losses = np.maximum(0.75 + distance - (onehot * distance).sum(-1, keepdims=True), 0.0)
    expected = ((losses * (1.0 - onehot)).sum(-1) + rw).mean()
    ours = AffinityLoss(0.75)(gaussian_affinity(features, centers, 10.0), target, centers)
    assert ours.item() == pytest.approx(expected, rel=1e-10)


def test_closed_forms():
    features, centers, target = draw()
    affinity = gaussian_affinity(features, centers, 3.0)
    assert (affinity > 0).all() and (affinity <= 1).all()
    assert torch.allclose(gaussian_affinity(centers[:, 1], centers, 3.0).diagonal(), torch.ones(4).double())
    # no other class is near: the margin holds; all affinities the wrong way round: the upper bound
    certain = torch.eye(4)[target]
    assert max_margin_loss(certain, target, 1.0) == 0
    assert max_margin_loss(1 - certain, target, 0.75).item() == pytest.approx(3 * 1.75)
    # order of the centres of a class
    assert torch.allclose(gaussian_affinity(features, centers[:, [2, 0, 1]], 3.0), affinity)
    # wherever the origin is
    assert torch.allclose(gaussian_affinity(features + 100, centers + 100, 3.0), affinity)
    far = gaussian_affinity((features + 1e3).float(), (centers + 1e3).float(), 3.0)
    assert torch.allclose(far.double(), affinity, rtol=2e-3)


def test_equidistant_centers_have_no_diversity_loss():
    simplex = torch.eye(6, dtype=torch.float64)[:, None]
    assert diversity_regularizer(simplex).item() == pytest.approx(0, abs=1e-25)
    assert diversity_regularizer(torch.randn(2, 1, 5)).item() == 0
    centers = draw()[1]
    assert torch.allclose(diversity_regularizer(3 * centers), 81 * diversity_regularizer(centers))
    assert torch.allclose(diversity_regularizer(centers + 7), diversity_regularizer(centers))
    # four centres cannot be equidistant in a plane
    flat = torch.randn(4, 1, 2, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS([flat], max_iter=200)

    def closure():
        optimizer.zero_grad()
        loss = diversity_regularizer(flat) / torch.pdist(flat[:, 0]).square().mean() ** 2
        loss.backward()
        return loss

    for _ in range(5):
        least = optimizer.step(closure)
    assert least > 0.01


@pytest.mark.parametrize("m", [1, 3])
def test_gradients(m):
    features, centers, target = draw(m=m)
    features, centers = features.requires_grad_(), centers.requires_grad_()

    def loss(f, w, reduction="mean"):
        return affinity_loss(gaussian_affinity(f, w, 4.0), target, w, margin=0.6, reduction=reduction)

    assert torch.autograd.gradcheck(loss, (features, centers))
    assert torch.autograd.gradcheck(lambda f, w: loss(f, w, "none"), (features, centers))
    # -2 / sigma (f - w) d
    affinity = gaussian_affinity(features, centers[:, :1], 4.0)
    (gradient,) = torch.autograd.grad(affinity[0, 2], features)
    expected = -2 / 4.0 * (features[0] - centers[2, 0]) * affinity[0, 2]
    assert torch.allclose(gradient[0], expected) and (gradient[1:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_and_autocast(dtype):
    features, centers, _ = draw(40, 10, 2, 32)
    features, centers = features.to(dtype).float(), centers.to(dtype).float()
    full = gaussian_affinity(features, centers, 64.0)
    assert torch.allclose(gaussian_affinity(features.to(dtype), centers.to(dtype), 64.0), full, rtol=1e-5)
    loss = affinity_loss(full, torch.arange(40) % 10, centers)
    with torch.autocast("cpu", dtype):
        assert torch.equal(gaussian_affinity(features, centers, 64.0), full)
        assert torch.equal(affinity_loss(full, torch.arange(40) % 10, centers), loss)
    far = (1e4 * torch.ones(2, 32)).to(dtype).requires_grad_()
    loss = affinity_loss(gaussian_affinity(far, centers, 1.0), torch.tensor([0, 1]), centers)
    loss.backward()
    assert loss.isfinite() and far.grad.isfinite().all()


def test_head():
    head = AffinityHead(8, num_classes=5, num_centers=2, sigma=16.0)
    assert sum(p.numel() for p in head.parameters()) == 5 * 2 * 8
    features, target = torch.randn(60, 8), torch.arange(60) % 5
    assert torch.equal(head(features), gaussian_affinity(features, head.centers, 16.0))
    assert torch.equal(head.regularizer(), diversity_regularizer(head.centers))
    square = torch.cdist(features.double(), head.centers.detach().flatten(0, 1).double()).square()
    head.fit_sigma(features)
    assert head.sigma.item() == pytest.approx(square.median().item(), rel=1e-2)
    assert AffinityHead(8, 5).load_state_dict(AffinityHead(8, 5).fit_sigma(features).state_dict())
    one = AffinityHead(8, 5).fit_centers(features, target)
    assert torch.allclose(one.centers[3, 0], features[target == 3].mean(0), atol=1e-5)
    # two clusters a class: each gets a centre
    places = torch.randn(5, 2, 8) * 10
    clusters = places[target, torch.arange(60) // 5 % 2] + 0.01 * torch.randn(60, 8)
    head.fit_centers(clusters, target)
    assert torch.allclose(head.centers.sort(1).values, places.sort(1).values, atol=0.1)
    assert AffinityHead(4, 4).centers.std() > 0
    simplex = AffinityHead(4, 4)
    torch.nn.init.zeros_(simplex.centers)
    simplex.centers.data[:, 0] = torch.eye(4)
    assert simplex.equidistance().item() == pytest.approx(0, abs=1e-6) and one.equidistance() > 0.05


def test_training_parts_classes_and_evens_distances():
    torch.manual_seed(0)
    target = torch.arange(90) % 3
    x = torch.randn(90, 6) + 3 * torch.eye(6)[target]
    backbone = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8))
    head, criterion = AffinityHead(8, 3, sigma=16.0), AffinityLoss()
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], 0.02)
    start = criterion(head(backbone(x)), target, head.centers).item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = criterion(head(backbone(x)), target, head.centers)
        loss.backward()
        optimizer.step()
    assert (head(backbone(x)).argmax(1) == target).float().mean() > 0.95
    assert head.equidistance() < 0.02 and loss < 0.6 * start


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian_affinity(torch.zeros(2, 3), torch.zeros(4, 1, 5), 1.0), r"features has shape \(2, 3\)"),
        (lambda: gaussian_affinity(torch.zeros(2, 3), torch.zeros(4, 3), 1.0), "centers has shape"),
        (lambda: gaussian_affinity(torch.zeros(2, 3), torch.zeros(4, 1, 3), -1.0), "sigma is -1.0"),
        (lambda: max_margin_loss(torch.zeros(2, 3), torch.tensor([0, -1])), r"target\[1\] is -1, allowed are classes from 0 to 2"),
        (lambda: max_margin_loss(torch.zeros(2, 3), torch.tensor([0, 1], dtype=torch.int32)), "target has type"),
        (lambda: max_margin_loss(torch.zeros(3), torch.tensor([0])), "target has shape"),
        (lambda: AffinityHead(2, 3, 2).fit_centers(torch.zeros(5, 2), torch.tensor([0, 0, 1, 2, 2])), "class 1 has 1 samples"),
        (lambda: AffinityHead(2, 3).fit_centers(torch.zeros(1, 2), torch.tensor([3])), r"target\[0\] is 3"),
        (lambda: AffinityLoss(margin=float("nan")), "margin is nan"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
