"""Nested variational inference (Zimmermann, Wu, Esmaeili, van de Meent, 2021, arXiv 2106.11302).

A nested importance sampler carries weighted samples through densities gamma_0, ..., gamma_K (pi_k = gamma_k / Z_k). At
level k a forward kernel q_k(z_k | z_{k-1}) moves each sample, and a reverse kernel r_{k-1}(z_{k-1} | z_k) accounts for
where it came from. Each level compares two densities on (z_{k-1}, z_k), the proposal and the target:

    p_k = pi_{k-1}(z_{k-1}) q_k(z_k | z_{k-1}),        t_k = pi_k(z_k) r_{k-1}(z_{k-1} | z_k)
    v_k = gamma_k(z_k) r_{k-1}(z_{k-1} | z_k) / (gamma_{k-1}(z_{k-1}) q_k(z_k | z_{k-1})),     w_k = w_{k-1} v_k

E_{p_k}[v_k] is Z_k / Z_{k-1}, and the mean of w_K estimates Z_K without bias where Z_0 = 1. Instead of one bound on the
whole chain, NVI minimises the sum over levels of a divergence between p_k and t_k: reverse, KL(p_k | t_k), or forward,
KL(t_k | p_k). Samples and weights that enter a level are constants to it, so that a level teaches its own kernels and the
two densities it lies between, intermediate densities included.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.nn import functional as F

DIVERGENCES = ("reverse", "forward")
OBJECTIVES = (*DIVERGENCES, "avo")
RESAMPLING = ("systematic", "multinomial")


# Weights


def effective_sample_size(log_weight: Float[Tensor, "..."], dim: int = 0) -> Float[Tensor, "..."]:
    """1 / sum of the squared normalised weights along ``dim``: between 1 and the number of samples.

    >>> effective_sample_size(torch.tensor([0.0, 0.0, -torch.inf])).item()
    2.0
    """
    return torch.exp(2 * log_weight.logsumexp(dim) - (2 * log_weight).logsumexp(dim))


def log_normalizer(log_weight: Float[Tensor, "..."], dim: int = 0) -> Float[Tensor, "..."]:
    """The logarithm of the mean weight along ``dim``, which estimates log Z."""
    return log_weight.logsumexp(dim) - math.log(log_weight.shape[dim])


def resample(
    log_weight: Float[Tensor, "s *b"], scheme: str = "systematic", generator: torch.Generator | None = None
) -> Int[Tensor, "s *b"]:
    """Which sample each of s samples descends from, drawn with the weights along dimension 0, for every batch apart.

    Systematic resampling draws one place u for all (as many descendants as s times the weight, rounded up or down),
    multinomial resampling one place for each.
    """
    if scheme not in RESAMPLING:
        raise ValueError(f"scheme is {scheme!r}, allowed are {', '.join(RESAMPLING)}")
    weight = log_weight.detach().softmax(0).movedim(0, -1).contiguous()
    samples, shape = weight.shape[-1], weight.shape[:-1]
    draw = {"generator": generator, "device": weight.device, "dtype": weight.dtype}
    if scheme == "systematic":
        place = (torch.arange(samples, device=weight.device) + torch.rand(*shape, 1, **draw)) / samples
    else:
        place = torch.rand(*shape, samples, **draw)
    upto = weight.cumsum(-1)
    ancestor = torch.searchsorted(upto / upto[..., -1:], place.contiguous(), right=True)
    return ancestor.clamp(max=samples - 1).movedim(-1, 0)


# The divergence of one level


def level_loss(
    log_v: Float[Tensor, "..."],
    log_weight: Float[Tensor, "..."],
    *,
    log_previous: Float[Tensor, "..."],
    log_target: Float[Tensor, "..."],
    log_forward: Float[Tensor, "..."] | None = None,
    divergence: str = "reverse",
    dim: int = 0,
) -> Float[Tensor, "..."]:
    """The estimate of a level's divergence from samples along ``dim``; its gradient estimates the divergence's gradient.

    ``log_weight`` is log w_{k-1} and makes averages over p_k (with v_k, over t_k) of the samples. ``log_v`` carries the
    gradient through z_k for the reverse divergence, and that of gamma_k and r_{k-1} at fixed samples for the forward.
    ``log_previous`` is log gamma_{k-1}(z_{k-1}) and ``log_target`` log gamma_k(z_k), at fixed samples. With their
    parameters theta, phi of q_k, and averages E and covariances C under p_k and t_k:

        reverse    d/d theta_{k-1} = -C_p(log v, d log gamma_{k-1})
                   d/d theta_k     = E_t(d log gamma_k) - E_p(d log gamma_k)
        forward    d/d theta_{k-1} = E_p(d log gamma_{k-1}) - E_t(d log gamma_{k-1})
                   d/d theta_k     = C_t(log v, d log gamma_k), and likewise for r_{k-1}
                   d/d phi         = -E_t(d log q_k)

    ``log_forward``, log q_k at fixed samples, is needed for the forward divergence, and for the reverse where samples are
    not reparameterised: then d/d phi = -C_p(log v, d log q_k).
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}, allowed are {', '.join(DIVERGENCES)}")
    v, log_weight = log_v.detach(), log_weight.detach()
    under_p, under_t = log_weight.softmax(dim), (log_weight + v).softmax(dim)
    log_ratio = (log_weight + v).logsumexp(dim) - log_weight.logsumexp(dim)  # log Z_k / Z_{k-1}
    score = log_previous if log_forward is None else log_previous + log_forward
    if divergence == "reverse":
        mean = (under_p * v).sum(dim, keepdim=True)
        value = log_ratio - mean.squeeze(dim)
        surrogate = (under_t * log_target - under_p * (log_v + (v - mean) * score)).sum(dim)
    elif log_forward is None:
        raise ValueError("log_forward is None, the forward divergence needs log q_k(z_k | z_{k-1}) at fixed samples")
    else:
        mean = (under_t * v).sum(dim, keepdim=True)
        value = mean.squeeze(dim) - log_ratio
        surrogate = (under_p * log_previous + under_t * ((v - mean) * log_v - score)).sum(dim)
    return value + surrogate - surrogate.detach()


def avo_loss(log_v: Float[Tensor, "..."], dim: int = 0) -> Float[Tensor, "..."]:
    """The annealed variational objective (Huang et al., 2018): -mean log v_k, every sample alike whatever its weight."""
    return -log_v.mean(dim)


# Kernels, densities and paths


class GaussianKernels(nn.Module):
    """A kernel for each level, q(z' | z) = N(z + mu(h), diag softplus(s(h))) with h = relu(W z + b), all of their own.

    They start at N(z, I). ``residual=False`` leaves out z; ``out`` is the dimension of z' where it differs from that of z.
    The weights of all levels lie together, so that one product serves them all.
    """

    def __init__(
        self, levels: int, dim: int, hidden: int = 50, *, out: int | None = None, residual: bool = True
    ) -> None:
        super().__init__()
        for name, value in (("levels", levels), ("dim", dim), ("hidden", hidden), ("out", dim if out is None else out)):
            if value < 1:
                raise ValueError(f"{name} is {value}, allowed is a whole number of at least 1")
        if residual and out not in (None, dim):
            raise ValueError(f"out is {out}, allowed with residual is dim, {dim}")
        self.levels, self.residual = levels, residual
        out = dim if out is None else out
        self.joint_weight, self.joint_bias = _parameters((levels, dim, hidden), (levels, 1, hidden))
        self.mean_weight, self.mean_bias = _parameters((levels, hidden, out), (levels, 1, out))
        self.variance_weight, self.variance_bias = _parameters((levels, hidden, out), (levels, 1, out))
        for weight in (self.joint_weight, self.joint_bias):  # as nn.Linear does
            nn.init.uniform_(weight, -(dim**-0.5), dim**-0.5)
        for weight in (self.mean_weight, self.mean_bias, self.variance_weight):
            nn.init.zeros_(weight)
        nn.init.constant_(self.variance_bias, math.log(math.e - 1.0))

    def __len__(self) -> int:
        return self.levels

    def moments(self, k: int | slice, z: Float[Tensor, "*s d"]) -> tuple[Float[Tensor, "*s o"], Float[Tensor, "*s o"]]:
        """Mean and variance at ``z``; with a slice of levels, the first dimension of ``z`` runs over them."""
        if isinstance(k, int):
            k, together = slice(k, k + 1), z.reshape(1, -1, z.shape[-1])
        else:
            together = z.flatten(1, -2)
        h = F.relu(torch.baddbmm(self.joint_bias[k], together, self.joint_weight[k]))
        mean = torch.baddbmm(self.mean_bias[k], h, self.mean_weight[k])
        variance = F.softplus(torch.baddbmm(self.variance_bias[k], h, self.variance_weight[k]))
        mean, variance = (moment.view(*z.shape[:-1], moment.shape[-1]) for moment in (mean, variance))
        return mean + z if self.residual else mean, variance

    def forward(self, k: int | slice, z: Float[Tensor, "*s d"]) -> Distribution:
        """The distribution of z' at ``z``; level k of the paper is number k - 1 here, as in any list."""
        mean, variance = self.moments(k, z)
        return Independent(Normal(mean, variance.sqrt(), validate_args=False), 1, validate_args=False)


def _parameters(*shapes: tuple[int, ...]) -> Iterator[nn.Parameter]:
    return (nn.Parameter(torch.empty(shape)) for shape in shapes)


class RingOfGaussians(nn.Module):
    """log of the SUM of ``count`` normalised Gaussians on a ring in the plane, covariance ``variance`` I: Z is ``count``."""

    def __init__(self, radius: float | int = 10.0, variance: float | int = 0.5, count: int = 8) -> None:
        super().__init__()
        for name, value in (("radius", radius), ("variance", variance), ("count", count)):
            if not value > 0:
                raise ValueError(f"{name} is {value}, allowed is {name} > 0")
        self.variance = float(variance)
        angles = [2 * math.pi * i / count for i in range(count)]
        centres = torch.tensor([[radius * math.sin(a), radius * math.cos(a)] for a in angles])
        self.register_buffer("centres", centres)

    def forward(self, z: Float[Tensor, "*s 2"]) -> Float[Tensor, " *s"]:
        """log gamma(z)."""
        square = (z[..., None, :] - self.centres).square().sum(-1)
        return (-square / (2 * self.variance)).logsumexp(-1) - math.log(2 * math.pi * self.variance)


class AnnealingPath(nn.Module):
    """gamma_k = gamma_0^(1 - beta_k) gamma_K^beta_k from N(0, scale^2 I) to ``target``, beta from 0 to 1.

    ``num_targets`` counts all densities, the ends included; beta starts linear. With ``learned`` the inner beta are
    parameters: independent logits, or, with ``monotone``, a first logit and increments that stay positive.
    ``target(z)`` gives log gamma_K of ``(..., dim)``.
    """

    def __init__(
        self,
        target: nn.Module,
        num_targets: int,
        *,
        dim: int = 2,
        scale: float | int = 5.0,
        learned: bool = False,
        monotone: bool = False,
    ) -> None:
        super().__init__()
        if num_targets < 2:
            raise ValueError(f"num_targets is {num_targets}, allowed is a whole number of at least 2: the ends count")
        if dim < 1 or not scale > 0:
            name, value = ("dim", dim) if dim < 1 else ("scale", scale)
            raise ValueError(f"{name} is {value}, allowed is {name} > 0")
        self.target, self.num_targets, self.dim, self.scale = target, num_targets, dim, float(scale)
        self.learned, self.monotone = learned, monotone
        linear = [k / (num_targets - 1) for k in range(1, num_targets - 1)]
        logits = [math.log(beta / (1 - beta)) for beta in linear]
        if monotone and logits:
            # softplus of the increments gives back the differences
            steps = [b - a for a, b in itertools.pairwise(logits)]
            logits = [logits[0], *(math.log(math.expm1(step)) for step in steps)]
        self.logits = nn.Parameter(torch.tensor(logits), requires_grad=learned)

    @property
    def betas(self) -> Float[Tensor, " k"]:
        """beta_0 = 0 to beta_K = 1."""
        logits = self.logits
        if self.monotone and len(logits):
            logits = torch.cat([logits[:1], logits[:1] + F.softplus(logits[1:]).cumsum(0)])
        return F.pad(F.pad(torch.sigmoid(logits), (1, 0)), (0, 1), value=1.0)

    def sample(self, shape: Sequence[int]) -> Float[Tensor, "*s d"]:
        """Draws of gamma_0, which is normalised, ``(*shape, dim)``."""
        like = self.logits
        return self.scale * torch.randn(*shape, self.dim, device=like.device, dtype=like.dtype)

    def start(self, z: Float[Tensor, "*s d"]) -> Float[Tensor, " *s"]:
        """log gamma_0(z)."""
        return -0.5 * (z / self.scale).square().sum(-1) - self.dim * (
            math.log(self.scale) + 0.5 * math.log(2 * math.pi)
        )

    def forward(self, k: int | slice, z: Float[Tensor, "*s d"]) -> Float[Tensor, " *s"]:
        """log gamma_k(z); with a slice of levels, the first dimension of ``z`` runs over them."""
        if isinstance(k, slice):
            beta = self.betas[k].view(-1, *(1,) * (z.ndim - 2))
            return torch.lerp(self.start(z), self.target(z), beta.expand(z.shape[:-1]))
        if not 0 <= k < self.num_targets:
            raise ValueError(f"k is {k}, allowed is 0 to {self.num_targets - 1}")
        if k == 0:
            return self.start(z)
        if k == self.num_targets - 1:
            return self.target(z)
        return torch.lerp(self.start(z), self.target(z), self.betas[k])


# The nested sampler


@dataclass(frozen=True)
class Samples:
    """Weighted samples of the last density: ``z`` (s, *batch, d), ``log_weight`` = log w_K (s, *batch).

    ``log_weights`` holds log w_k after each of the K levels, before any resampling, (K, s, *batch).
    """

    z: Tensor
    log_weight: Tensor
    log_weights: Tensor


Kernels = Sequence[nn.Module] | GaussianKernels


class NestedSampler(nn.Module):
    """A nested importance sampler and its objectives.

    ``path`` is a module with ``num_targets``, ``sample(shape)`` of gamma_0 and ``path(k, z)`` = log gamma_k(z): an
    ``AnnealingPath``, or any other. ``forwards`` and ``reverses`` are a kernel for each of K = num_targets - 1 levels:
    ``GaussianKernels``, or a list of modules that map samples to a ``torch.distributions.Distribution``. With
    ``reverses=None`` a level extends the space instead, as a filter does: what q_k draws is appended to z_{k-1}, and
    gamma_k is a density of both.

    ``resampling`` (``"systematic"``, ``"multinomial"``) resamples after each level but the last in training: NVIR, and
    without it NVI; with a path whose densities are learned they are NVIR* and NVI*.
    """

    def __init__(
        self, path: nn.Module, forwards: Kernels, reverses: Kernels | None, *, resampling: str | None = None
    ) -> None:
        super().__init__()
        _check_resampling(resampling)
        levels = path.num_targets - 1
        for name, kernels in (("forwards", forwards), ("reverses", reverses)):
            if kernels is not None and len(kernels) != levels:
                raise ValueError(f"{name} has {len(kernels)} kernels, allowed is one a level, {levels}")
        self.path, self.resampling = path, resampling
        self.forwards, self.reverses = (
            kernels if kernels is None or isinstance(kernels, GaussianKernels) else nn.ModuleList(kernels)
            for kernels in (forwards, reverses)
        )

    def loss(
        self,
        num_samples: int,
        objective: str = "reverse",
        batch: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """The sum over levels of the objective, ``reverse``, ``forward`` or ``avo``, from ``num_samples`` fresh samples."""
        levels = self._draw(num_samples, batch, generator, self.resampling)[0]
        return self._objective(levels, objective).sum(0).mean()

    @torch.no_grad()
    def forward(
        self,
        num_samples: int,
        batch: Sequence[int] = (),
        generator: torch.Generator | None = None,
        resampling: str | None = None,
    ) -> Samples:
        """``num_samples`` weighted samples for each of ``batch``; resampled between levels only if asked for."""
        _check_resampling(resampling)
        return self._draw(num_samples, batch, generator, resampling)[1]

    def replay(self, z: Sequence[Tensor], objective: str = "reverse") -> tuple[Samples, Float[Tensor, "k *b"]]:
        """Weights and objective of each level along given z_0, ..., z_K, ``(s, *batch, d)``, as if they had been drawn."""
        if len(z) != self.path.num_targets:
            raise ValueError(f"z has {len(z)} levels, allowed is one a density, {self.path.num_targets}")
        levels, samples = self._draw(len(z[0]), z[0].shape[1:-1], None, None, z)
        return samples, self._objective(levels, objective)

    @torch.no_grad()
    def _draw(
        self,
        num_samples: int,
        batch: Sequence[int],
        generator: torch.Generator | None,
        resampling: str | None,
        given: Sequence[Tensor] | None = None,
    ) -> tuple[list["_Level"], Samples]:
        """Samples down the levels: what goes into each and comes out of it. No gradients: to its level it is constant."""
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}, allowed is a whole number of at least 1")
        levels, log_weights = [], []
        with _drawing_from(generator):
            z = self.path.sample((num_samples, *batch)) if given is None else given[0]
            log_previous = self.path(0, z)
            log_weight = torch.zeros_like(log_previous)
            for k in range(1, len(self.forwards) + 1):
                q = _at(self.forwards, k, z)
                if self.reverses is None:
                    drawn = q.sample() if given is None else given[k][..., z.shape[-1] :]
                    z_next, log_reverse = torch.cat([z, drawn], -1), 0.0
                else:
                    drawn = z_next = q.sample() if given is None else given[k]
                    log_reverse = _at(self.reverses, k, z_next).log_prob(z)
                levels.append(_Level(z, drawn, log_weight))
                log_target = self.path(k, z_next)
                log_weight = log_weight + log_target + log_reverse - log_previous - q.log_prob(drawn)
                log_weights.append(log_weight)
                z, log_previous = z_next, log_target
                if resampling is not None and k < len(self.forwards):
                    ancestor = resample(log_weight, resampling)
                    z = z.gather(0, ancestor[..., None].expand_as(z))
                    log_previous = log_previous.gather(0, ancestor)
                    log_weight = log_normalizer(log_weight).expand_as(log_weight)
        return levels, Samples(z, log_weight, torch.stack(log_weights))

    def _objective(self, levels: list["_Level"], objective: str) -> Float[Tensor, "k *b"]:
        """The objective of each level; all at once where path and kernels can."""
        if objective not in OBJECTIVES:
            raise ValueError(f"objective is {objective!r}, allowed are {', '.join(OBJECTIVES)}")
        banks = all(isinstance(kernels, GaussianKernels) for kernels in (self.forwards, self.reverses))
        if banks and isinstance(self.path, AnnealingPath):
            parts = zip(*((level.z, level.drawn, level.log_weight) for level in levels), strict=True)
            together = _Level(*(torch.stack(part) for part in parts))
            return self._level(slice(1, len(levels) + 1), together, objective, 1)
        return torch.stack([self._level(k, level, objective, 0) for k, level in enumerate(levels, start=1)])

    def _level(self, k: int | slice, level: "_Level", objective: str, dim: int) -> Tensor:
        """One level (or, with a slice, several, the first dimension running over them), with its gradients."""
        q = _at(self.forwards, k, level.z)
        reparameterised = objective != "forward" and _is_diagonal_normal(q)
        drawn = _as_drawn(q, level.drawn) if reparameterised else level.drawn
        if objective == "avo":
            self._check_avo(q)
            log_forward, score = q.log_prob(drawn), None
        elif reparameterised:
            # With the parameters of q_k fixed in its density the gradient goes through the draw alone, and vanishes
            # sample by sample where p_k = t_k (sticking the landing).
            log_forward, score = _fixed(q).log_prob(drawn), None
        else:
            score = q.log_prob(drawn)
            log_forward = score.detach()
        z_next = drawn if self.reverses is not None else torch.cat([level.z, drawn], -1)
        log_reverse = 0.0 if self.reverses is None else _at(self.reverses, k, z_next).log_prob(level.z)
        before = k - 1 if isinstance(k, int) else slice(k.start - 1, k.stop - 1)
        log_previous, log_target = self.path(before, level.z), self.path(k, z_next)
        # gamma_{k-1} enters log v as a number: what it learns from a level it learns as a score.
        log_v = log_target + log_reverse - log_previous.detach() - log_forward
        if objective == "avo":
            return avo_loss(log_v, dim)
        return level_loss(
            log_v, level.log_weight, log_previous=log_previous, log_target=self.path(k, z_next.detach()),
            log_forward=score, divergence=objective, dim=dim,
        )  # fmt: skip

    def _check_avo(self, q: Distribution) -> None:
        if not _is_diagonal_normal(q):
            raise ValueError(f"objective is 'avo' with {type(q).__name__} kernels, allowed for it are diagonal normals")
        if any(parameter.requires_grad for parameter in self.path.parameters()):
            raise ValueError(
                "objective is 'avo' with a learned path, allowed for it is a fixed one: it has no log Z terms"
            )


@dataclass(frozen=True)
class _Level:
    """What goes into a level, samples and log w_{k-1}, and what its forward kernel drew."""

    z: Tensor
    drawn: Tensor
    log_weight: Tensor


def _check_resampling(resampling: str | None) -> None:
    if resampling not in (None, *RESAMPLING):
        raise ValueError(f"resampling is {resampling!r}, allowed are None, {', '.join(RESAMPLING)}")


def _at(kernels: nn.Module, k: int | slice, z: Tensor) -> Distribution:
    """The kernel of level k, counted from 1, at ``z``."""
    if isinstance(k, slice):
        return kernels(slice(k.start - 1, k.stop - 1), z)
    return kernels(k - 1, z) if isinstance(kernels, GaussianKernels) else kernels[k - 1](z)


def _is_diagonal_normal(q: Distribution) -> bool:
    return isinstance(q.base_dist if isinstance(q, Independent) else q, Normal)


def _fixed(q: Distribution) -> Distribution:
    """The diagonal normal ``q`` with its parameters as constants."""
    if isinstance(q, Independent):
        return Independent(_fixed(q.base_dist), q.reinterpreted_batch_ndims, validate_args=False)
    return Normal(q.loc.detach(), q.scale.detach(), validate_args=False)


def _as_drawn(q: Distribution, z: Tensor) -> Tensor:
    """``z`` with the gradient it has as a reparameterised draw of the diagonal normal ``q``."""
    base = q.base_dist if isinstance(q, Independent) else q
    noise = ((z - base.loc) / base.scale).detach()
    moved = base.loc + base.scale * noise
    return z + (moved - moved.detach())


@contextmanager
def _drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """torch's distributions draw from the global generators: with ``generator`` these follow it and are then put back."""
    with nullcontext() if generator is None else torch.random.fork_rng():
        if generator is not None:
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
        yield


# The paper's annealing experiment


def ring_sampler(
    num_targets: int = 8,
    *,
    learned: bool = True,
    monotone: bool = False,
    resampling: str | None = None,
    hidden: int = 50,
) -> NestedSampler:
    """From N(0, 25 I) to the ring of eight Gaussians in ``num_targets`` densities, every kernel with a net of its own.

    >>> sampler = ring_sampler(4)
    >>> samples = sampler(1000, generator=torch.Generator().manual_seed(0))
    >>> samples.z.shape, bool(1 <= effective_sample_size(samples.log_weight) <= 1000)
    (torch.Size([1000, 2]), True)
    """
    path = AnnealingPath(RingOfGaussians(), num_targets, learned=learned, monotone=monotone)
    forwards, reverses = (GaussianKernels(num_targets - 1, 2, hidden) for _ in range(2))
    return NestedSampler(path, forwards, reverses, resampling=resampling)
