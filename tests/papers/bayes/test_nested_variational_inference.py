"""Nested variational inference: the authors' numbers, closed forms of divergences and weights, gradients, the sampler."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from saigen.papers.bayes.nested_variational_inference import (
    AnnealingPath,
    GaussianKernels,
    NestedSampler,
    RingOfGaussians,
    claims,
    effective_sample_size,
    level_loss,
    log_normalizer,
    resample,
    ring_sampler,
)

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "nested_variational_inference" / "official.npz"
STRIDE = 29


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# The authors' code ------------------------------------------------------------------------------------------------


def parts(kernels, level):
    """The parameters of a level in the official order and layout: weights (out, in)."""
    for name in ("joint", "mean", "variance"):
        yield getattr(kernels, f"{name}_weight"), level, True
        yield getattr(kernels, f"{name}_bias"), level, False


def official_order(sampler):
    return [part for kernels in (sampler.forwards, sampler.reverses) for k in range(4) for part in parts(kernels, k)]


def filled(learned):
    sampler = ring_sampler(5, learned=learned)
    with torch.no_grad():
        for i, (bank, level, is_weight) in enumerate(official_order(sampler)):
            wave = 0.3 * torch.sin(i + 1 + 0.7 * torch.arange(bank[level].numel()))
            bank[level] = wave.view(bank[level].T.shape).T if is_weight else wave.view(bank[level].shape)
    return sampler


def gradients(sampler):
    """The gradient as the authors' parameters have it, and the level that each number belongs to."""
    found = [
        ((bank.grad[level].T if is_weight else bank.grad[level]).flatten(), level)
        for bank, level, is_weight in official_order(sampler)
    ]
    levels = torch.cat([torch.full_like(gradient, level) for gradient, level in found])
    return torch.cat([gradient for gradient, _ in found])[::STRIDE].numpy(), levels[::STRIDE].numpy()


@pytest.mark.parametrize("objective", ["reverse", "avo"])
def test_equals_official_code(objective, double):
    """Weights, kernel gradients and path gradients of the authors' code along its own samples.

    Its first level is a sum over the samples where the others are means; and d log Z_k of each inner density is missing
    from its path gradient (the divergence's has it), so that it comes out as ours plus those. Its ring is in float32.
    """
    with np.load(GOLDEN) as arrays:
        golden = {name.removeprefix(f"{objective}_"): a for name, a in arrays.items() if name.startswith(objective)}
    sampler, z = filled(objective == "reverse"), [torch.from_numpy(level) for level in golden["z"]]
    samples, losses = sampler.replay(z, objective)
    np.testing.assert_allclose(samples.log_weights, golden["log_weight"], rtol=1e-6, atol=1e-5)
    if objective == "avo":
        losses.sum().backward()
        np.testing.assert_allclose(np.cumsum(losses.detach().numpy()), golden["loss"], rtol=1e-6)
        np.testing.assert_allclose(gradients(sampler)[0], golden["gradient"], rtol=1e-5, atol=1e-5)
        return
    scale = torch.tensor([float(len(z[0])), 1, 1, 1])
    (scale * losses).sum().backward()
    np.testing.assert_allclose(gradients(sampler)[0], golden["gradient"], rtol=1e-5, atol=1e-5)

    weights = samples.log_weights.softmax(1)
    log_z = sum((weights[k - 1] * sampler.path(k, z[k])).sum() for k in range(1, 4))
    # Of its first level, the sum over samples reaches what gamma_1 learns through log v, not through log Z_1.
    first = sampler.path(1, z[1])
    theirs = sampler.replay(z, objective)[1][1:].sum() + log_z + (weights[0] * first).sum() - first.sum()
    gradient = torch.autograd.grad(theirs, sampler.path.logits)[0]
    np.testing.assert_allclose(gradient, golden["beta_gradient"], rtol=1e-5, atol=1e-4)


# Closed forms on the line -------------------------------------------------------------------------------------------


class Line(nn.Module):
    """gamma_0 = N(0, 1) and c_k N(m_k, s_k^2), their parameters learned."""

    def __init__(self, means, scales, log_c):
        super().__init__()
        self.means, self.scales, self.log_c = (nn.Parameter(torch.tensor(value)) for value in (means, scales, log_c))
        self.num_targets = len(means) + 1

    def sample(self, shape):
        return torch.randn(*shape, 1)

    def forward(self, k, z):
        if k == 0:
            return Normal(0.0, 1.0).log_prob(z[..., 0])
        return self.log_c[k - 1] + Normal(self.means[k - 1], self.scales[k - 1]).log_prob(z[..., 0])


class Linear(nn.Module):
    """N(a z + b, e^2) of the last coordinate of z, as a diagonal normal or as one that is not known to be."""

    def __init__(self, a, b, e, diagonal=True):
        super().__init__()
        self.a, self.b, self.e = (nn.Parameter(torch.tensor(value)) for value in (a, b, e))
        self.diagonal = diagonal

    def forward(self, z):
        mean = self.a * z[..., -1:] + self.b
        if self.diagonal:
            return Independent(Normal(mean, self.e.expand_as(mean)), 1)
        return MultivariateNormal(mean, covariance_matrix=self.e.square()[None, None].expand(*mean.shape, 1))


def joint(mean, scale, kernel, swapped=False):
    """The Gaussian of (z, z') where z is N(mean, scale^2) and z' is drawn by ``kernel``."""
    variance, cross = scale.square(), kernel.a * scale.square()
    other = kernel.a.square() * variance + kernel.e.square()
    means, rows = [mean, kernel.a * mean + kernel.b], [[variance, cross], [cross, other]]
    if swapped:
        means, rows = means[::-1], [row[::-1] for row in rows[::-1]]
    return MultivariateNormal(torch.stack(means), torch.stack([torch.stack(row) for row in rows]))


def chain(diagonal=True):
    path = Line([0.5, -0.3], [0.9, 1.2], [0.7, -0.4])
    forwards = [Linear(0.8, 0.1, 0.7, diagonal), Linear(0.9, -0.4, 0.8, diagonal)]
    reverses = [Linear(0.7, -0.1, 0.8, diagonal), Linear(0.6, 0.2, 0.7, diagonal)]
    return NestedSampler(path, forwards, reverses)


def exact(sampler, divergence):
    """The sum of the divergences of the two levels, and what it should be differentiated by."""
    path = sampler.path
    means, scales = [torch.zeros(()), *path.means], [torch.ones(()), *path.scales]
    total = 0.0
    for k in (1, 2):
        p = joint(means[k - 1], scales[k - 1], sampler.forwards[k - 1])
        t = joint(means[k], scales[k], sampler.reverses[k - 1], swapped=True)
        total = total + (kl_divergence(p, t) if divergence == "reverse" else kl_divergence(t, p))
    return total


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("divergence", ["reverse", "forward"])
def test_divergence_and_gradients_are_those_of_the_closed_form(divergence, diagonal, double):
    sampler = chain(diagonal)
    sampler.zero_grad()
    loss = sampler.loss(300_000, divergence, generator=generator())
    loss.backward()
    ours = {name: p.grad.item() if p.ndim == 0 else p.grad.tolist() for name, p in sampler.named_parameters()}
    sampler.zero_grad()
    value = exact(sampler, divergence)
    value.backward()
    assert loss.item() == pytest.approx(value.item(), rel=0.03)
    for name, parameter in sampler.named_parameters():
        expected = np.zeros(2) if parameter.grad is None else parameter.grad.numpy()
        np.testing.assert_allclose(ours[name], expected, atol=0.03, err_msg=name)


def posterior(mean, scale, kernel):
    """The reverse kernel that makes a level exact."""
    gain = kernel.a * scale**2 / (kernel.a**2 * scale**2 + kernel.e**2)
    variance = scale**2 - gain * kernel.a * scale**2
    return Linear(gain.item(), (mean - gain * (kernel.a * mean + kernel.b)).item(), variance.sqrt().item())


def test_exact_kernels_give_equal_weights_and_no_gradient(double):
    forwards = [Linear(0.6, 0.5, 0.9), Linear(0.5, -0.2, 1.1)]
    means, scales = [0.0], [1.0]
    for kernel in forwards:
        scales.append((kernel.a**2 * scales[-1] ** 2 + kernel.e**2).sqrt().item())
        means.append((kernel.a * means[-1] + kernel.b).item())
    reverses = [posterior(means[k], scales[k], forwards[k]) for k in range(2)]
    sampler = NestedSampler(Line(means[1:], scales[1:], [0.7, 1.9]), forwards, reverses)
    samples = sampler(50, generator=generator())
    torch.testing.assert_close(samples.log_weights, torch.tensor([0.7, 1.9])[:, None].expand(2, 50))
    assert effective_sample_size(samples.log_weight).item() == pytest.approx(50)
    assert log_normalizer(samples.log_weight).item() == pytest.approx(1.9)
    loss = sampler.loss(50, "reverse", generator=generator())
    loss.backward()
    assert abs(loss.item()) < 1e-12
    # Sticking the landing: the gradient of the forward kernels is zero sample by sample.
    assert all(p.grad.abs().max() < 1e-12 for kernel in forwards for p in kernel.parameters())
    assert abs(sampler.loss(50, "forward", generator=generator()).item()) < 1e-12


def test_a_level_does_not_teach_the_others_kernels(double):
    for objective in ("reverse", "forward", "avo"):
        sampler = ring_sampler(4, learned=objective != "avo")
        _, losses = sampler.replay(list(torch.randn(4, 8, 2, generator=generator()) * 5), objective)
        losses[1].backward()
        for kernels in (sampler.forwards, sampler.reverses):
            for parameter in kernels.parameters():
                assert not parameter.grad[[0, 2]].any(), objective
            assert kernels.mean_bias.grad[1].any()
        if objective != "avo":
            assert sampler.path.logits.grad.all()  # gamma_1 and gamma_2 lie beside level 2


# Weights ------------------------------------------------------------------------------------------------------------


def test_effective_sample_size_and_normalizer():
    log_weight = torch.tensor([[0.3, 1000.0], [0.3, -1000.0], [0.3, -torch.inf]])
    torch.testing.assert_close(effective_sample_size(log_weight), torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(log_normalizer(log_weight), torch.tensor([0.3, 1000.0 - math.log(3)]))
    w = torch.rand(20, generator=generator())
    assert effective_sample_size(w.log()).item() == pytest.approx((w.sum() ** 2 / w.square().sum()).item(), rel=1e-5)


def test_ring_normalizer_and_unbiased_weights():
    """log Z of the ring is log 8: by quadrature, and by the mean weight of samplers that have learned nothing."""
    grid = torch.linspace(-16, 16, 801)
    z = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1)
    assert (RingOfGaussians()(z).exp().sum() * (grid[1] - grid[0]) ** 2).item() == pytest.approx(8, rel=1e-4)
    for resampling in (None, "systematic", "multinomial"):
        samples = ring_sampler(3)(2_000, (200,), generator(), resampling)
        assert log_normalizer(samples.log_weight).exp().mean().item() == pytest.approx(8, rel=0.05)


def test_start_of_the_ring_sampler():
    """At the start forward and reverse kernels are N(z, I) both, so that v_k is a quotient of densities."""
    sampler = ring_sampler(5)
    assert sum(p.numel() for p in ring_sampler(8).parameters()) == 14 * 354 + 6
    z = list(5 * torch.randn(5, 7, 2, generator=generator()))
    samples, _ = sampler.replay(z)
    log_v = torch.stack([sampler.path(k, z[k]) - sampler.path(k - 1, z[k - 1]) for k in range(1, 5)])
    torch.testing.assert_close(samples.log_weights, log_v.cumsum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sampler.path.betas, torch.linspace(0, 1, 5))
    start = MultivariateNormal(torch.zeros(2), 25 * torch.eye(2))
    torch.testing.assert_close(sampler.path(0, z[0]), start.log_prob(z[0]))


@pytest.mark.parametrize("monotone", [True, False])
def test_paths(monotone):
    path = AnnealingPath(RingOfGaussians(), 6, learned=True, monotone=monotone)
    torch.testing.assert_close(path.betas, torch.linspace(0, 1, 6))
    with torch.no_grad():
        path.logits.copy_(torch.tensor([1.0, -2.0, 0.5, -1.0]))
    betas = path.betas
    assert betas[0] == 0 and betas[-1] == 1 and (betas.diff() > 0).all().item() == monotone
    z = torch.randn(6, 3, 2, generator=generator())
    torch.testing.assert_close(path(slice(0, 6), z), torch.stack([path(k, z[k]) for k in range(6)]))
    path(2, z[2]).sum().backward()
    assert path.logits.grad[1] != 0


def test_all_levels_at_once_are_the_levels_one_by_one(double):
    sampler = ring_sampler(4)
    lists = [[Level(kernels, k) for k in range(3)] for kernels in (sampler.forwards, sampler.reverses)]
    one_by_one = NestedSampler(sampler.path, *lists)
    z = list(4 * torch.randn(4, 9, 3, 2, generator=generator()))
    for objective in ("reverse", "forward"):
        together, apart = sampler.replay(z, objective)[1], one_by_one.replay(z, objective)[1]
        torch.testing.assert_close(together, apart)
        gradient = [torch.autograd.grad(loss.sum(), list(sampler.parameters())) for loss in (together, apart)]
        for a, b in zip(*gradient, strict=True):
            torch.testing.assert_close(a, b)


class Level(nn.Module):
    def __init__(self, kernels, k):
        super().__init__()
        self.kernels, self.k = kernels, k

    def forward(self, z):
        return self.kernels(self.k, z)


# Resampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["systematic", "multinomial"])
def test_resampling_keeps_expectations(scheme):
    log_weight = torch.randn(40, 3000, generator=generator())
    ancestor = resample(log_weight, scheme, generator())
    assert ancestor.shape == (40, 3000) and ancestor.min() >= 0 and ancestor.max() < 40
    counts = torch.zeros(40, 3000).scatter_add(0, ancestor, torch.ones(40, 3000))
    expected = 40 * log_weight.softmax(0)
    if scheme == "systematic":
        assert ((counts - expected).abs() < 1 + 1e-4).all()
    assert (counts - expected).mean(1).abs().max() < 0.15
    one = resample(torch.tensor([-torch.inf, 0.0, -torch.inf]), scheme, generator())
    assert one.tolist() == [1, 1, 1]


def test_resampling_resets_the_weights():
    sampler = ring_sampler(4, resampling="systematic")
    levels, samples = sampler._draw(30, (), generator(), "systematic")
    for level, before in zip(levels[1:], samples.log_weights, strict=False):
        torch.testing.assert_close(level.log_weight, log_normalizer(before).expand(30))
    assert torch.isfinite(sampler.loss(30))


# A filter: levels that extend the space -------------------------------------------------------------------------------


class LookAhead(nn.Module):
    """A random walk seen with noise: gamma_k = p(z_1..z_k, x_1..x_k), times p(x_{k+1}.. | z_k) where it looks ahead."""

    def __init__(self, x, look_ahead):
        super().__init__()
        self.x, self.look_ahead, self.num_targets = x, look_ahead, len(x)
        # p(x_k.. | z_{k-1}) is proportional to a Gaussian in z; here by the backward filter as (precision, mean, log c).
        self.messages = [(0.0, 0.0, 0.0)]
        for value in reversed(x[1:]):
            precision, mean, log_c = self.messages[0]
            joint_precision = precision + 1 / 0.25
            joint_mean = (precision * mean + value / 0.25) / joint_precision
            log_c = log_c - 0.5 * math.log(2 * math.pi * 0.25)
            log_c -= 0.5 * (precision * mean**2 + value**2 / 0.25 - joint_precision * joint_mean**2)
            # integrate over the step N(z, 1)
            log_c -= 0.5 * math.log(1 + joint_precision)
            self.messages.insert(0, (joint_precision / (1 + joint_precision), joint_mean, log_c))

    def first(self):
        precision, mean, _ = self.posterior(0)
        return Normal(mean, precision**-0.5)

    def posterior(self, k):
        """Of z_k given z_{k-1} (0 at first) and all that is looked at: precision, and mean without z_{k-1}."""
        precision, mean, _ = self.messages[k] if self.look_ahead else (0.0, 0.0, 0.0)
        total = 1.0 + 1 / 0.25 + precision
        return total, (self.x[k] / 0.25 + precision * mean) / total, 1 / total

    def sample(self, shape):
        return self.first().sample((*shape, 1))

    def forward(self, k, z):
        previous = torch.cat([torch.zeros_like(z[..., :1]), z[..., :-1]], -1)
        log_p = Normal(previous, 1.0).log_prob(z).sum(-1)
        log_p = log_p + Normal(z, 0.5).log_prob(torch.tensor(self.x[: k + 1])).sum(-1)
        if self.look_ahead:
            precision, mean, log_c = self.messages[k]
            log_p = log_p + log_c - 0.5 * precision * (z[..., -1] - mean) ** 2
        # The sampler takes gamma_0 as what it samples from: divide all by its normaliser.
        return log_p - self.log_z0()

    def log_z0(self):
        z = torch.linspace(-12, 12, 4001)
        log_p = Normal(0.0, 1.0).log_prob(z) + Normal(z, 0.5).log_prob(torch.tensor(self.x[0]))
        if self.look_ahead:
            precision, mean, log_c = self.messages[0]
            log_p = log_p + log_c - 0.5 * precision * (z - mean) ** 2
        return (log_p.logsumexp(0) + math.log(24 / 4000)).item()


class Step(nn.Module):
    def __init__(self, path, k):
        super().__init__()
        self.posterior = path.posterior(k)

    def forward(self, z):
        precision, mean, gain = self.posterior
        mean = mean + gain * z[..., -1:]
        return Independent(Normal(mean, torch.full_like(mean, precision**-0.5)), 1)


def test_filter_with_exact_look_ahead_has_equal_weights(double):
    """Where gamma_k knows the future, weights are equal and log Z is that of the Kalman filter; otherwise it is unbiased."""
    x = [0.3, -1.0, 2.5, 4.0]
    covariance = torch.minimum(torch.arange(4)[:, None], torch.arange(4)) + 1.0 + 0.25 * torch.eye(4)
    evidence = MultivariateNormal(torch.zeros(4), covariance).log_prob(torch.tensor(x)).item()
    for look_ahead in (True, False):
        path = LookAhead(x, look_ahead)
        sampler = NestedSampler(path, [Step(path, k) for k in range(1, 4)], None)
        samples = sampler(4_000, (20,), generator())
        log_z = samples.log_weight + path.log_z0()
        assert samples.z.shape == (4_000, 20, 4)
        if look_ahead:
            torch.testing.assert_close(log_z, torch.full_like(log_z, evidence), rtol=1e-5, atol=1e-5)
        else:
            assert effective_sample_size(samples.log_weight).max() < 3_000
            assert log_normalizer(log_z).exp().mean().log().item() == pytest.approx(evidence, abs=0.02)
        for objective in ("reverse", "forward"):
            assert torch.isfinite(sampler.loss(10, objective, generator=generator()))


# The rest -----------------------------------------------------------------------------------------------------------


def test_generator_decides_and_global_state_stays():
    sampler, state = ring_sampler(3), torch.get_rng_state()
    a, b = (sampler(10, (2,), generator(5)).z for _ in range(2))
    assert torch.equal(a, b) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(a, sampler(10, (2,), generator(6)).z)
    assert torch.equal(sampler.loss(10, generator=generator(5)), sampler.loss(10, generator=generator(5)))


def test_training_lowers_the_divergence_and_learns_the_path():
    torch.manual_seed(0)
    sampler = ring_sampler(3)
    before = sampler.loss(2_000, generator=generator()).item()
    optimizer = torch.optim.Adam(sampler.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        sampler.loss(96).backward()
        optimizer.step()
    assert sampler.loss(2_000, generator=generator()).item() < 0.6 * before
    assert 0 < sampler.path.betas[1] < 0.45


def test_wrong_arguments():
    sampler = ring_sampler(3)
    fixed = ring_sampler(3, learned=False)
    for call, text in (
        (lambda: NestedSampler(sampler.path, GaussianKernels(3, 2), sampler.reverses), "forwards has 3"),
        (lambda: sampler.replay([torch.zeros(2, 2)] * 2), "z has 2 levels"),
        (lambda: sampler.loss(10, "avo"), "learned path"),
        (lambda: chain(False).loss(10, "avo"), "MultivariateNormal"),
        (lambda: fixed.path(3, torch.zeros(2, 2)), "k is 3"),
        (lambda: GaussianKernels(2, 2, out=3), "out is 3"),
        (lambda: resample(torch.zeros(3), "residual"), "scheme"),
        (
            lambda: level_loss(
                *[torch.zeros(2)] * 2, log_previous=torch.zeros(2), log_target=torch.zeros(2), divergence="forward"
            ),
            "log_forward",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_ais_baseline_is_unbiased_and_better_with_more_transitions():
    path = AnnealingPath(RingOfGaussians(), 2)
    few, many = (claims._quality(*claims._ais(path, n, 1, 2.0, 1.0, (1_000, 20), generator())) for n in (3, 30))
    assert abs(few["log_z"] - math.log(8)) < 0.1 and abs(many["log_z"] - math.log(8)) < 0.05
    assert many["ess"] > 2 * few["ess"] and many["least_mode"] > 0.1
