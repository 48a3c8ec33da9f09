"""The bounds, the networks of the authors' notebook once more in NumPy, flows, Gaussians of known information, probes."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saigen.papers.representation.mutual_information import (
    BilinearCritic,
    ConcatCritic,
    ConvEncoder,
    Coupling,
    CouplingFlow,
    InfoMax,
    InfoMaxLoss,
    InnerProductCritic,
    MLPEncoder,
    ResidualMLP,
    SeparableCritic,
    adversarial_linear_training,
    claims,
    dependent_pairs,
    gaussian_divergence,
    gaussian_mi,
    gaussian_pairs,
    gaussian_rho,
    gaussian_scores,
    halves,
    infonce_bound,
    jacobian_condition_number,
    linear_probe,
    mi_bound,
    n_pair_loss,
    nwj_bound,
    tuba_bound,
    uniform_cross_entropy,
)
from saigen.trial import Trial


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Bounds ---------------------------------------------------------------------------------------------------------------


def test_bounds_equal_loops_over_pairs():
    c = 2 * torch.randn(7, 7, dtype=torch.float64, generator=generator())
    log_a = torch.randn(7, dtype=torch.float64, generator=generator(1))
    pairs = range(7)
    infonce = sum(
        math.log(math.exp(c[i, i]) / (sum(math.exp(c[i, j]) for j in pairs) / 7)) for i in pairs
    ) / 7  # fmt: skip
    nwj = sum(float(c[i, i]) for i in pairs) / 7
    nwj -= sum(math.exp(c[i, j] - 1) for i in pairs for j in pairs if i != j) / (7 * 6)
    tuba = 1 + sum(float(c[i, i] - log_a[i]) for i in pairs) / 7
    tuba -= sum(math.exp(c[i, j] - log_a[i]) for i in pairs for j in pairs if i != j) / (7 * 6)
    n_pair = sum(math.log(1 + sum(math.exp(c[i, j] - c[i, i]) for j in pairs if j != i)) for i in pairs) / 7
    assert infonce_bound(c).item() == pytest.approx(infonce, rel=1e-12)
    assert nwj_bound(c).item() == pytest.approx(nwj, rel=1e-12)
    assert tuba_bound(c, log_a).item() == pytest.approx(tuba, rel=1e-12)
    assert n_pair_loss(c).item() == pytest.approx(n_pair, rel=1e-12)
    # section 4: maximising I_NCE is metric learning
    assert infonce == pytest.approx(math.log(7) - n_pair, rel=1e-12)
    assert mi_bound(c, "infonce") == infonce_bound(c) and mi_bound(c, "nwj") == nwj_bound(c)


def test_infonce_is_a_classification_of_the_partner():
    c = torch.randn(9, 9, generator=generator())
    torch.testing.assert_close(infonce_bound(c), math.log(9) - F.cross_entropy(c, torch.arange(9)))


@pytest.mark.parametrize("constant", [-2.0, 0.0, 1.0, 3.0])
def test_bounds_of_a_constant_critic(constant):
    c = torch.full((6, 6), constant, dtype=torch.float64)
    assert infonce_bound(c).item() == pytest.approx(0, abs=1e-12)
    assert nwj_bound(c).item() == pytest.approx(constant - math.exp(constant - 1), abs=1e-12)


def test_infonce_ignores_what_depends_on_x_alone_and_stays_below_log_b():
    c, of_x = torch.randn(8, 8, generator=generator()), torch.randn(8, 1, generator=generator(1))
    torch.testing.assert_close(infonce_bound(c + of_x), infonce_bound(c), rtol=1e-5, atol=1e-5)
    assert abs(infonce_bound(c + of_x.T) - infonce_bound(c)) > 0.01  # of y it does not
    for scale in (1.0, 100.0, 1e6):
        assert infonce_bound(scale * torch.eye(8)) <= math.log(8) + 1e-6
    assert infonce_bound(100 * torch.eye(8)).item() == pytest.approx(math.log(8))


def test_nwj_leaves_the_diagonal_out_and_does_not_overflow():
    c = torch.zeros(4, 4)
    high = c + 300 * torch.eye(4)  # exp(300) is no float32
    assert nwj_bound(high).item() == pytest.approx(300 - math.exp(-1))
    c[0, 1] = 80.0
    c.requires_grad_()
    nwj_bound(c).backward()
    assert torch.isfinite(c.grad).all() and c.grad[0, 1] < -1e30


def test_nwj_is_tuba_with_a_baseline_of_e():
    c = torch.randn(5, 5, generator=generator())
    torch.testing.assert_close(nwj_bound(c), tuba_bound(c, torch.ones(5)))


def test_pinned_loss_pulls_towards_its_target_from_both_sides():
    c = torch.eye(6, requires_grad=True)
    bound = infonce_bound(c)
    [up] = torch.autograd.grad(bound, c)
    for target, sign in ((bound.item() + 0.1, -1), (bound.item() - 0.1, 1)):
        loss = InfoMaxLoss("infonce", target=target)(c)
        assert loss.item() == pytest.approx(0.1, abs=1e-6)
        torch.testing.assert_close(torch.autograd.grad(loss, c)[0], sign * up)
    torch.testing.assert_close(InfoMaxLoss("nwj")(c), -nwj_bound(c))


# Gaussians ------------------------------------------------------------------------------------------------------------


def test_gaussian_scores_are_log_density_ratios():
    from torch.distributions import MultivariateNormal, Normal

    x, y = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator())
    joint = MultivariateNormal(torch.zeros(2).double(), torch.tensor([[1.0, 0.7], [0.7, 1.0]]).double())
    expected = torch.stack(
        [torch.stack([(joint.log_prob(torch.stack([a, b], -1))).sum() for b in y]) for a in x]
    ) - sum(Normal(0.0, 1.0).log_prob(v).sum(1).view(shape) for v, shape in ((x, (5, 1)), (y, (1, 5))))
    torch.testing.assert_close(gaussian_scores(x, y, 0.7), expected)


@pytest.mark.parametrize("mi", [0.5, 2.0, 8.0])
def test_gaussian_mi_and_rho_are_inverse(mi):
    assert gaussian_mi(gaussian_rho(mi, 5), 5) == pytest.approx(mi)
    assert gaussian_mi(-0.3) == pytest.approx(-0.5 * math.log(1 - 0.09))


def best_critic(mi, batches, size=128, dim=8):
    """Both bounds of each batch, with the best critic."""
    rho, draws = gaussian_rho(mi, dim), generator()
    found = []
    for _ in range(batches):
        scores = gaussian_scores(*gaussian_pairs(size, dim, rho, generator=draws), rho)
        found.append((infonce_bound(scores), nwj_bound(1 + scores)))
    return torch.tensor(found)


def test_best_critic_gives_the_mutual_information():
    """I_NWJ is unbiased where its variance lets one see it; I_NCE is too low, and never above log 128 = 4.852."""
    small = best_critic(2.0, 400)
    mean, error = small.mean(0), small.std(0) / 20
    assert abs(mean[1] - 2.0) < 3 * error[1] < 0.1
    assert 1.8 < mean[0] < 2.0 - 3 * error[0]
    large = best_critic(8.0, 200)
    assert large[:, 0].max() <= math.log(128) + 1e-5 and large[:, 0].mean() > 4.5
    assert large[:, 1].std() > 3 * small[:, 1].std()


def test_dependent_pairs_have_the_covariances_of_section_4():
    draws = generator()
    batches = [dependent_pairs(16, generator=draws) for _ in range(6_000)]
    x, y = (torch.stack([batch[view][:, 0] for batch in batches]) for view in (0, 1))
    covariance = torch.cov(torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]]))
    own, other = [[2.0, 0.4], [0.4, 2.0]], [[1.0, -0.5], [-0.5, 1.0]]
    expected = torch.tensor(np.block([[np.array(own), np.array(other)], [np.array(other), np.array(own)]]))
    torch.testing.assert_close(covariance, expected.float(), rtol=0, atol=0.12)


def test_nwj_on_dependent_pairs_is_the_divergence_from_the_negatives():
    draws, found = generator(), []
    for _ in range(2000):
        x, y = (v / math.sqrt(2) for v in dependent_pairs(64, generator=draws))
        found.append(nwj_bound(1 + gaussian_scores(x, y, 0.2) - gaussian_scores(x, y, -0.25)))
    found = torch.stack(found)
    error = found.std().item() / math.sqrt(len(found))
    assert abs(found.mean().item() - gaussian_divergence(0.2, -0.25)) < 3 * error < 0.03
    assert gaussian_divergence(0.2, -0.25) > 5 * gaussian_mi(0.2)


def test_divergence_is_that_of_torch():
    from torch.distributions import MultivariateNormal, kl_divergence

    p, q = (MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, r], [r, 1.0]])) for r in (0.2, -0.25))
    assert gaussian_divergence(0.2, -0.25) == pytest.approx(kl_divergence(p, q).item(), rel=1e-4)
    assert gaussian_divergence(0.4, 0.0) == gaussian_mi(0.4)


# Networks ---------------------------------------------------------------------------------------------------------------


def relu(x):
    return np.maximum(x, 0)


def numpy_mlp(net, x):
    """Layers with ReLU but for the last; of each the weight (out, in) and the bias."""
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    for number, layer in enumerate(layers):
        x = x @ array(layer.weight).T + array(layer.bias)
        x = relu(x) if number < len(layers) - 1 else x
    return x


def array(tensor):
    return tensor.detach().numpy()


def numpy_conv(x, layer, stride=2):
    """(b, h, w, c), padded as TensorFlow's "same"; window by window."""
    kernel = array(layer.weight).transpose(2, 3, 1, 0)
    size = kernel.shape[0]
    out = [-(-n // stride) for n in x.shape[1:3]]
    total = [max((m - 1) * stride + size - n, 0) for m, n in zip(out, x.shape[1:3], strict=True)]
    x = np.pad(x, [(0, 0), *[(t // 2, t - t // 2) for t in total], (0, 0)])
    y = np.zeros((len(x), *out, kernel.shape[3]))
    for i in range(out[0]):
        for j in range(out[1]):
            window = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
            y[:, i, j] = np.tensordot(window, kernel, 3)
    return y + array(layer.bias)


def spread(module):
    """Every weight drawn anew, so that nothing is near zero or one."""
    draws = generator(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draws))
    return module.double()


def test_networks_equal_the_notebook_in_numpy():
    draws = generator()
    x = torch.rand(3, 392, dtype=torch.float64, generator=draws)
    conv = spread(ConvEncoder(channels=6, dim_out=5))
    maps = relu(numpy_conv(relu(numpy_conv(array(x).reshape(-1, 14, 28, 1), conv.conv1)), conv.conv2))
    assert maps.shape == (3, 4, 7, 12)
    mean, std = (getattr(maps, name)((1, 2, 3), keepdims=True) for name in ("mean", "std"))
    maps = (maps - mean) / (std + 1e-6) * array(conv.norm.weight) + array(conv.norm.bias)
    expected = maps.mean((1, 2)) @ array(conv.head.weight).T + array(conv.head.bias)
    np.testing.assert_allclose(array(conv(x)), expected, rtol=1e-9)

    x = torch.randn(4, 9, dtype=torch.float64, generator=draws)
    mlp = spread(MLPEncoder(9, (7, 8, 5)))
    np.testing.assert_allclose(array(mlp(x)), numpy_mlp(mlp.net, array(x)), rtol=1e-9)

    residual, z = spread(ResidualMLP(9, 4)), array(x)
    for number, layer in enumerate(residual.layers):
        step = z @ array(layer.weight).T + array(layer.bias)
        z = (step if number == 3 else relu(step)) + z
    np.testing.assert_allclose(array(residual(x)), z, rtol=1e-9)

    for scale in (False, True):
        flow = spread(CouplingFlow(9, 3, (6, 6), scale=scale))
        chain = []  # as listed there: a coupling, then its permutation; a chain applies the last first
        for coupling in reversed(flow.couplings):
            chain += [coupling, array(coupling.permutation)]
        z = array(x)
        for part in reversed(chain):
            if isinstance(part, np.ndarray):
                z = z[:, part]
                continue
            moved, out = z[:, 4:], numpy_mlp(part.net, z[:, :4])
            factor = np.log1p(np.exp(out[:, 5:])) + 1e-7 if scale else 1.0
            z = np.concatenate([z[:, :4], moved * factor + out[:, :5]], 1)
        np.testing.assert_allclose(array(flow(x)), z, rtol=1e-9)

    x, y = torch.randn(2, 4, 9, dtype=torch.float64, generator=draws)
    for critic, score in (
        (InnerProductCritic(), lambda critic, a, b: a @ b),
        (spread(BilinearCritic(9)), lambda critic, a, b: a @ array(critic.w.weight) @ b),
        (spread(SeparableCritic(9, 6, 5)), lambda critic, a, b: numpy_mlp(critic.phi, a) @ numpy_mlp(critic.psi, b)),
        (spread(ConcatCritic(9, 6)), lambda critic, a, b: numpy_mlp(critic.net, np.concatenate([a, b]))[0]),
        (spread(ConcatCritic(9, 6, layers=3)), lambda critic, a, b: numpy_mlp(critic.net, np.concatenate([a, b]))[0]),
    ):
        expected = [[score(critic, a, b) for b in array(y)] for a in array(x)]
        np.testing.assert_allclose(array(critic(x, y)), expected, rtol=1e-9)


def test_critics_take_batches_of_two_sizes():
    x, y = torch.randn(3, 6), torch.randn(5, 6)
    for critic in (InnerProductCritic(), BilinearCritic(6), SeparableCritic(6, 4, 4), ConcatCritic(6, 4)):
        assert critic(x, y).shape == (3, 5)
    assert BilinearCritic(6, 4)(x, torch.randn(5, 4)).shape == (3, 5)


def test_weights_start_as_in_keras():
    critic = BilinearCritic(100)
    assert critic.w.weight.abs().max() <= math.sqrt(6 / 200) and critic.w.weight.abs().max() > 0.95 * math.sqrt(6 / 200)
    assert all(not layer.bias.any() for layer in MLPEncoder(9, (7, 5)).net if isinstance(layer, nn.Linear))
    for module in (ResidualMLP(40), CouplingFlow(40, 2, (50,))):
        for parameter in module.parameters():
            if parameter.ndim == 2:
                assert 0 < parameter.abs().max() <= 2e-4 and parameter.std().item() == pytest.approx(0.88e-4, rel=0.1)
            else:
                assert not parameter.any()


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("dim", [8, 9])
def test_flows_are_invertible_and_know_their_determinant(dim, scale):
    flow = spread(CouplingFlow(dim, 5, (16, 16), scale=scale))
    x = torch.randn(6, dim, dtype=torch.float64, generator=generator())
    z, log_det = flow.with_log_det(x)
    torch.testing.assert_close(flow.inverse(z), x)
    torch.testing.assert_close(flow(flow.inverse(x)), x)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: flow(one[None])[0]))(x)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet, atol=1e-8, rtol=1e-6)
    assert scale or not log_det.any()
    assert scale is bool((log_det.abs() > 0.1).all())


def test_a_flow_starts_as_a_permutation():
    x = torch.rand(4, 12)
    z = CouplingFlow(12, 6, (8,))(x)
    torch.testing.assert_close(z.sort(1).values, x.sort(1).values, atol=1e-3, rtol=0)
    assert not torch.allclose(z, x, atol=0.05)


def test_a_coupling_moves_its_second_half_only():
    coupling = spread(Coupling(6, (8,), scale=True))
    x = torch.randn(3, 6, dtype=torch.float64)
    z, _ = coupling(x)
    assert torch.equal(z[:, :3], x[:, coupling.permutation][:, :3])
    assert not torch.isclose(z[:, 3:], x[:, coupling.permutation][:, 3:]).any()


def test_halves():
    images = torch.arange(2 * 4 * 3).view(2, 4, 3).float()
    upper, lower = halves(images)
    assert torch.equal(upper, images[:, :2].flatten(1)) and torch.equal(lower, images[:, 2:].flatten(1))


def test_infomax_scores_pair_the_views():
    g1, g2 = nn.Linear(5, 3), nn.Linear(4, 3)
    x1, x2 = torch.randn(6, 5), torch.randn(6, 4)
    scores = InfoMax(g1, g2, InnerProductCritic())(x1, x2)
    torch.testing.assert_close(scores[2, 4], g1(x1[2]) @ g2(x2[4]))


# Probes ---------------------------------------------------------------------------------------------------------------


def test_condition_number_of_known_maps():
    linear = nn.Linear(4, 4).double()
    q, r = (torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q for _ in range(2))
    with torch.no_grad():
        linear.weight.copy_(q @ torch.diag(torch.tensor([8.0, 3.0, 2.0, 0.5]).double()) @ r)
    x = torch.randn(5, 4, dtype=torch.float64)
    found = jacobian_condition_number(linear, x)
    torch.testing.assert_close(found, torch.full((5,), math.log(16.0), dtype=torch.float64))
    assert (jacobian_condition_number(nn.Sequential(linear, nn.ReLU()), x - 100 * torch.ones(4)) > 3).any()
    assert jacobian_condition_number(ResidualMLP(10), torch.randn(3, 10)).max() < 0.1
    net = spread(ResidualMLP(4))
    one = torch.linalg.svdvals(torch.autograd.functional.jacobian(lambda v: net(v[None])[0], x[0]))
    torch.testing.assert_close(jacobian_condition_number(net, x)[0], one[0].log() - one[-1].log())


def clusters(count, draws):
    y = torch.arange(count) % 3
    return F.one_hot(y, 6).float() * 2 + torch.randn(count, 6, generator=draws), y


def test_linear_probe_is_the_regression_it_says():
    from sklearn.linear_model import LogisticRegression

    draws = generator()
    train, test = clusters(300, draws), clusters(200, draws)
    found = linear_probe(*train, *test, tol=1e-6, max_iter=20_000)
    low, high = train[0].min(0).values, train[0].max(0).values
    peer = LogisticRegression(C=10.0, tol=1e-8, max_iter=5000).fit((train[0] - low) / (high - low), train[1])
    scaled = ((test[0] - low) / (high - low)).numpy()
    assert found.accuracy == pytest.approx(peer.score(scaled, test[1].numpy()), abs=0.006)
    chosen = peer.predict_proba(scaled)[np.arange(200), test[1].numpy()]
    assert found.log_loss == pytest.approx(-np.log(chosen).mean(), abs=1e-3)
    assert linear_probe(*train, *test, seed=3) == linear_probe(*train, *test, seed=3)


def test_uniform_cross_entropy():
    logits = torch.randn(4, 5, generator=generator())
    torch.testing.assert_close(uniform_cross_entropy(logits), F.cross_entropy(logits, torch.full((4, 5), 0.2)))
    assert uniform_cross_entropy(torch.ones(4, 5)).item() == pytest.approx(math.log(5))


def test_adversarial_training_equals_a_plain_loop():
    draws = generator()
    batches = [(torch.randn(8, 4, generator=draws), torch.randint(3, (8,), generator=draws)) for _ in range(5 + 3 * 5)]
    encoder = spread(CouplingFlow(4, 2, (6,), scale=True)).float()
    plain = copy.deepcopy(encoder)
    torch.manual_seed(1)
    result = adversarial_linear_training(
        encoder, batches, classes=3, warmup=5, steps=3, classifier_steps=4, encoder_lr=1e-2, classifier_lr=1e-1
    )
    torch.manual_seed(1)
    classifier = nn.Linear(4, 3)
    nn.init.xavier_uniform_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    of_classifier, of_encoder = (torch.optim.Adam(m.parameters(), lr) for m, lr in ((classifier, 1e-1), (plain, 1e-2)))
    stream, losses = iter(batches), []
    for kind in "c" * 5 + ("c" * 4 + "e") * 3:
        x, y = next(stream)
        logits = classifier(plain(x))
        loss = F.cross_entropy(logits, y if kind == "c" else torch.full((8, 3), 1 / 3))
        optimizer = of_classifier if kind == "c" else of_encoder
        classifier.zero_grad()
        plain.zero_grad()
        loss.backward()
        optimizer.step()
        losses += [loss.item()] if kind == "e" else []
    assert result.encoder_losses == pytest.approx(losses, rel=1e-4)
    for ours, theirs in zip(encoder.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(result.classifier_losses) == 17


def test_adversarial_training_hides_what_a_linear_classifier_saw_and_loses_nothing():
    draws = generator()
    x, y = clusters(600, draws)
    test = clusters(300, draws)

    def batches():
        while True:
            chosen = torch.randint(len(y), (64,), generator=draws)
            yield x[chosen], y[chosen]

    encoder = CouplingFlow(6, 4, (32, 32), scale=True)
    before = linear_probe(encoder(x), y, encoder(test[0]), test[1], tol=1e-3).accuracy
    adversarial_linear_training(encoder, batches(), classes=3, warmup=100, steps=250, encoder_lr=2e-3)
    with torch.no_grad():
        after = linear_probe(encoder(x), y, encoder(test[0]), test[1], tol=1e-3).accuracy
        assert (encoder.inverse(encoder(test[0])) - test[0]).abs().max() < 1e-2
    assert before > 0.8 and after < before - 0.1


# The room ---------------------------------------------------------------------------------------------------------------


def test_arms_of_a_seed_start_alike_and_see_the_same_images():
    first, again, other = (claims.Experiment(Trial(seed=seed, scale="tiny")) for seed in (1000, 1000, 1001))
    assert torch.equal(first.train.upper, again.train.upper) and not torch.equal(first.train.y, other.train.y)
    assert first.dim == 32 and first.classes == 10
    shared = claims._noisy(0.1)(generator(), torch.zeros(2, 3), torch.ones(2, 3))
    torch.testing.assert_close(shared[0] + 1, shared[1])


@pytest.mark.parametrize(
    "claim",
    ["invertible_encoders_improve", "adversarial_encoder_hurts", "encoders_become_ill_conditioned"]
    + ["simpler_critics_give_better_features", "encoder_decides_at_equal_bounds", "dependent_batches_break_the_bounds"],
)
def test_claims_give_finite_numbers_and_the_same_again(claim):
    first, again = (getattr(claims, claim)(Trial(seed=1000, scale="tiny")) for _ in range(2))
    assert first == again and all(math.isfinite(value) for value in first.values())


def test_claims_read_images_of_the_user(tmp_path):
    from PIL import Image

    draws = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 20)):
        for label in range(10):
            folder = tmp_path / part / str(label)
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(draws.integers(0, 256, (28, 28), dtype=np.uint8)).save(folder / f"{number}.png")
    experiment = claims.Experiment(Trial(seed=1000, scale="full", data_path=tmp_path))
    assert experiment.train.upper.shape == (200, 392) and experiment.test.lower.shape == (200, 392)
    assert experiment.train.upper.min() >= 0 and experiment.train.upper.max() <= 1


def test_distorted_digits_keep_their_labels_and_differ():
    from saigen.data import digits

    some = digits().subset([0, 1, 2])
    drawn = claims.distorted(some, 2, 12, generator())
    assert drawn.x.shape == (6, 1, 12, 12) and drawn.y.tolist() == 2 * some.y.tolist()
    assert 0 <= drawn.x.min() < 0.01 and 0.9 < drawn.x.max() <= 1
    assert (drawn.x[:3] - drawn.x[3:]).abs().mean((1, 2, 3)).min() > 0.02
    # what a reader sees is still the digit: it correlates with the plain one, scaled up
    plain = F.interpolate(some.x, (12, 12), mode="bilinear", align_corners=False)
    for copy_, original in zip(drawn.x, plain.repeat(2, 1, 1, 1), strict=True):
        assert torch.corrcoef(torch.stack([copy_.flatten(), original.flatten()]))[0, 1] > 0.3
