"""SimSiam: heads, loss identities, the stop-gradient, key layouts, monitors, views."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saigen.cards import catalogue
from saigen.nn.resnet import ResNet, resnet18, resnet50
from saigen.papers.representation.simsiam import (
    PredictionMLP,
    ProjectionMLP,
    SimSiam,
    SimSiamLoss,
    TwoViews,
    claims,
    collapse_std,
    cross_entropy_similarity,
    knn_accuracy,
    linear_probe,
    negative_cosine,
    simsiam_loss,
)
from saigen.trial import Trial


def count(module, trainable=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def small(**options):
    torch.manual_seed(0)
    return SimSiam(nn.Linear(12, 8), feature_dim=8, dim=16, pred_dim=4, **options)


def test_sizes_of_the_paper():
    with torch.device("meta"):
        net = SimSiam(resnet50)
    assert count(net) == 38_201_408 and count(net, trainable=True) == 38_199_360
    assert count(net.backbone) + count(net.projector) == 36_101_184 and count(net.predictor) == 2_100_224


def test_projector_variants():
    three, two = ProjectionMLP(8, 16), ProjectionMLP(8, 16, layers=2)
    assert [type(m).__name__ for m in three] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert [type(m).__name__ for m in two] == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    for head in (three, two):
        assert not head[-1].affine and not head[-2].bias.requires_grad and head[0].bias is None


def test_no_gradient_reaches_the_target():
    net = small()
    x1, x2 = torch.randn(2, 6, 12)
    _, _, z1, z2 = net(x1, x2)
    assert not z1.requires_grad and not z2.requires_grad
    # also where the caller forgot to detach: the gradient is that of p alone, zero to the bit on z
    p, z = torch.randn(6, 16, requires_grad=True), torch.randn(6, 16, requires_grad=True)
    for similarity in ("cosine", "cross_entropy"):
        grads = torch.autograd.grad(simsiam_loss(p, p, z, z, similarity=similarity), (p, z), allow_unused=True)
        assert grads[0].abs().sum() > 0 and grads[1] is None
    # one-sided loss: the branch of x2 gets nothing at all
    x1, x2 = torch.randn(6, 12, requires_grad=True), torch.randn(6, 12, requires_grad=True)
    simsiam_loss(*net(x1, x2), symmetric=False).backward()
    assert x1.grad.abs().sum() > 0 and x2.grad is None


def test_loss_is_least_where_p_and_z_are_parallel():
    z = torch.randn(5, 7, dtype=torch.float64)
    assert math.isclose(negative_cosine(3 * z, z).item(), -1, abs_tol=1e-12)
    assert math.isclose(negative_cosine(-z, z).item(), 1, abs_tol=1e-12)
    assert negative_cosine(z + 0.1 * torch.randn_like(z), z) > -1 + 1e-6


def test_squared_distance_of_unit_vectors():
    p, z = torch.randn(2, 9, 5, dtype=torch.float64)
    squared = (F.normalize(p, dim=1) - F.normalize(z, dim=1)).square().sum(1).mean()
    torch.testing.assert_close(squared, 2 + 2 * negative_cosine(p, z))


def test_symmetric_loss_is_the_mean_of_both_ways():
    p1, p2, z1, z2 = torch.randn(4, 6, 8)
    both = simsiam_loss(p1, p2, z1, z2)
    one, other = simsiam_loss(p1, p2, z1, z2, symmetric=False), simsiam_loss(p2, p1, z2, z1, symmetric=False)
    torch.testing.assert_close(both, (one + other) / 2)
    assert SimSiamLoss()(p1, p2, z1, z2) == both


def test_cross_entropy_similarity():
    p, z = torch.randn(2, 6, 8, dtype=torch.float64)
    expected = F.cross_entropy(p, z.softmax(1))
    torch.testing.assert_close(cross_entropy_similarity(p, z), expected)
    entropy = -(z.softmax(1) * z.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(cross_entropy_similarity(z, z), entropy)
    assert cross_entropy_similarity(p, z) > entropy


@pytest.mark.parametrize("similarity", ["cosine", "cross_entropy"])
def test_gradcheck(similarity):
    p1, p2 = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    z1, z2 = torch.randn(2, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: simsiam_loss(a, b, z1, z2, similarity=similarity), (p1, p2))


def test_without_stop_gradient_and_predictor_constants_are_optimal():
    """What the stop-gradient is there for: equal constant outputs reach the minimum of the plain Siamese loss."""
    constant = torch.ones(4, 8).mul(2)
    assert negative_cosine(constant, constant).item() == pytest.approx(-1)
    assert collapse_std(constant).item() == 0


def test_a_constant_in_the_last_bias_changes_nothing():
    net = small().double()
    x = torch.randn(8, 12, dtype=torch.float64)
    before = net.encode(x)
    with torch.no_grad():
        net.projector[-2].bias += 3.0
    torch.testing.assert_close(net.encode(x), before)


def test_views_have_batch_statistics_of_their_own():
    net, twin = small(), small()
    x1, x2 = torch.randn(6, 12), 5 + torch.randn(6, 12)
    z1 = net(x1, x2)[2]
    torch.testing.assert_close(z1, twin.encode(x1).detach())
    assert net.projector[1].num_batches_tracked == 2


def test_spread_outputs_have_the_standard_deviation_of_the_paper():
    z = torch.randn(4000, 2048, generator=torch.Generator().manual_seed(0))
    assert collapse_std(z).item() == pytest.approx(1 / math.sqrt(2048), rel=1e-2)
    assert collapse_std(z[:1].expand(16, -1)).item() < 1e-7


def test_prediction_is_the_expectation_over_views():
    """Section 5: with h and f linear, the h that is optimal for the squared error puts out E over views of f(T(x))."""
    generator = torch.Generator().manual_seed(0)
    n, images = 40_000, torch.eye(5, dtype=torch.float64)
    index = torch.arange(5).repeat_interleave(n)
    views = images[index] * (1 + 0.5 * torch.randn(5 * n, 1, dtype=torch.float64, generator=generator))
    encoder = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    predictor = torch.linalg.lstsq(images[index], views @ encoder).solution
    torch.testing.assert_close(images @ predictor, images @ encoder, rtol=0, atol=0.03)


def test_official_key_layout():
    net = SimSiam(lambda: resnet18(num_classes=7), dim=32, pred_dim=8)
    official = {}
    for key, value in net.state_dict().items():
        official["module." + key.replace("projector.", "encoder.fc.").replace("backbone.", "encoder.")] = value
    assert {"module.encoder.conv1.weight", "module.encoder.fc.6.bias", "module.encoder.fc.7.running_mean"} <= set(
        official
    )
    assert {"module.predictor.0.weight", "module.predictor.3.bias"} <= set(official)
    converted = SimSiam.convert_state_dict(official)
    assert converted.keys() == net.state_dict().keys()
    net.load_state_dict(converted)
    assert SimSiam.convert_state_dict(net.state_dict()).keys() == net.state_dict().keys()


@pytest.mark.parametrize("build", [lambda: resnet18(num_classes=10), lambda: resnet18(num_classes=0)])
def test_any_backbone(build):
    net = SimSiam(build(), dim=16, pred_dim=4)
    assert net.feature_dim == 512 and net.backbone(torch.rand(2, 3, 32, 32)).shape == (2, 512)


def test_parameter_groups():
    net = small()
    groups = net.param_groups(0.05, 512)
    assert [g["lr"] for g in groups] == [0.1, 0.1] and [g["fix_lr"] for g in groups] == [False, True]
    listed = sum(p.numel() for g in groups for p in g["params"])
    assert listed == count(net, trainable=True) == count(net) - 16
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-4)
    for factor in (0.5, 0.1):
        SimSiam.decay(optimizer, factor)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1 * factor, 0.1])
    groups = net.param_groups(0.05, fix_pred_lr=False)
    assert not any(g["fix_lr"] for g in groups)


def test_knn_votes_are_weighted():
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    y = torch.tensor([0, 1, 1])
    query, label = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    # a near neighbour outvotes two far ones at a low temperature only
    assert knn_accuracy(train, y, query, label, k=3, temperature=0.1) == 1.0
    assert knn_accuracy(train, y, query, label, k=3, temperature=10.0) == 0.0


def test_knn_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(50, 6, generator=generator), torch.randn(30, 6, generator=generator)
    train_y, test_y = torch.randint(4, (50,), generator=generator), torch.randint(4, (30,), generator=generator)
    right = 0
    for z, label in zip(test, test_y, strict=True):
        similarity = F.cosine_similarity(z[None], train)
        votes = torch.zeros(4)
        for i in similarity.argsort(descending=True)[:7]:
            votes[train_y[i]] += math.exp(similarity[i] / 0.1)
        right += int(votes.argmax() == label)
    assert knn_accuracy(train, train_y, test, test_y, k=7, chunk=8) == right / 30


def test_linear_probe():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(300, 5, generator=generator)
    y = (z @ torch.randn(5, 3, generator=generator)).argmax(1)
    assert linear_probe(z[:200], y[:200], z[200:], y[200:]) > 0.9
    from sklearn.linear_model import LogisticRegression

    standard = (z - z[:200].mean(0)) / z[:200].std(0, correction=0)
    peer = LogisticRegression(C=1 / (1e-1 * 200), max_iter=1000).fit(standard[:200], y[:200])
    ours = linear_probe(z[:200], y[:200], z[200:], y[200:], l2=1e-1)
    assert ours == pytest.approx(peer.score(standard[200:], y[200:]), abs=0.011)


def test_linear_probe_of_a_collapsed_encoder_is_chance():
    y = torch.arange(100) % 4
    z = torch.ones(100, 6) + 1e-8 * torch.randn(100, 6)
    assert linear_probe(z, y, z, y) <= 0.26


@pytest.mark.parametrize("blur", [True, False])
def test_two_views(blur):
    x = torch.rand(3, 3, 40, 36, generator=torch.Generator().manual_seed(0))
    views = TwoViews(32, blur=blur)
    state = torch.get_rng_state()
    a, b = views(x, generator=torch.Generator().manual_seed(1))
    again = views(x, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert a.shape == b.shape == (3, 3, 32, 32) and not torch.equal(a, b)
    assert torch.equal(a, again[0]) and torch.equal(b, again[1])
    assert a.min() >= 0 and a.max() <= 1
    other, _ = views(x, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(a, other)


def test_meta_device():
    with torch.device("meta"):
        SimSiam(lambda: ResNet("basic", (1,), (8,)), dim=16, pred_dim=4, proj_layers=2)


@pytest.mark.parametrize("claim", [claim.id for claim in catalogue.paper("simsiam").card.claim])
def test_claims_run_at_tiny(claim):
    first, again = (getattr(claims, claim)(Trial(seed=1000, scale="tiny")) for _ in range(2))
    quantities = catalogue.paper("simsiam").card.find_claim(claim).quantities
    assert set(quantities) <= set(first) and all(math.isfinite(value) for value in first.values())
    clocks = {name for name, quantity in quantities.items() if quantity.clock}
    assert {k: v for k, v in first.items() if k not in clocks} == {k: v for k, v in again.items() if k not in clocks}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ProjectionMLP(8, layers=4), "layers is 4"),
        (lambda: ProjectionMLP(0), "in_dim, hidden_dim, dim are 0"),
        (lambda: PredictionMLP(8, 0), "dim and pred_dim are 8 and 0"),
        (lambda: SimSiam(nn.Conv2d(3, 8, 1)), "feature_dim is None"),
        (lambda: SimSiamLoss(similarity="euclid"), "similarity is 'euclid'"),
        (lambda: simsiam_loss(*torch.rand(4, 2, 3), similarity="l1"), "similarity is 'l1'"),
        (lambda: simsiam_loss(*torch.rand(3, 2, 3), torch.rand(2, 4)), "p1, p2, z1, z2 have shapes"),
        (lambda: small().param_groups(0.0), "lr is 0.0"),
        (
            lambda: knn_accuracy(torch.rand(3, 2), torch.zeros(3).long(), torch.rand(1, 2), torch.zeros(1).long()),
            "k is 200",
        ),
        (lambda: TwoViews(0), "size is 0"),
        (lambda: TwoViews(min_scale=0.0), "min_scale is 0.0"),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(ValueError) as error:
        call()
    assert text in str(error.value)
