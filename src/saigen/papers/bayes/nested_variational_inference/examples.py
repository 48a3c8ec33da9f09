"""Small instances of nested variational inference."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from saigen.example import Example
from saigen.papers.bayes.nested_variational_inference import (
    AnnealingPath,
    GaussianKernels,
    NestedSampler,
    RingOfGaussians,
    effective_sample_size,
    level_loss,
    resample,
    ring_sampler,
)


class _OneKernel(nn.Module):
    """The first kernel's mean and variance, as tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = GaussianKernels(2, 3, hidden=8)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.kernels.moments(0, z)


class _LevelLoss(nn.Module):
    def __init__(self, divergence: str) -> None:
        super().__init__()
        self.divergence = divergence

    def forward(self, log_density: Tensor) -> Tensor:
        return level_loss(
            log_density.detach(), log_density.detach() / 2, log_previous=0.0 * log_density, log_target=0.0 * log_density,
            log_forward=log_density.detach(), divergence=self.divergence,
        )  # fmt: skip


def examples() -> Iterator[Example]:
    """The density, the path, the kernels, the sampler with its objectives, and resampling."""
    yield Example(
        name="ring_of_gaussians",
        kind="module",
        make=RingOfGaussians,
        inputs=lambda generator: (10 * torch.randn(5, 2, generator=generator),),
        code="""import torch
from saigen.papers.bayes.nested_variational_inference import effective_sample_size, log_normalizer, ring_sampler

sampler = ring_sampler(num_targets=4, learned=True, resampling="systematic")     # NVIR*: a learned path, resampled
optimizer = torch.optim.Adam(sampler.parameters(), 1e-2)
for _ in range(20):                                                             # a few thousand in earnest
    optimizer.zero_grad()
    sampler.loss(num_samples=72, objective="reverse").backward()
    optimizer.step()

samples = sampler(1000, batch=(10,), generator=torch.Generator().manual_seed(0))
print(log_normalizer(samples.log_weight).mean(), "log 8 is 2.079")
print(effective_sample_size(samples.log_weight).mean(), sampler.path.betas)""",
        wrong=((lambda: RingOfGaussians(variance=0.0), "variance"), (lambda: RingOfGaussians(count=0), "count")),
    )
    yield Example(
        name="gaussian_kernels",
        kind="module",
        make=_OneKernel,
        inputs=lambda generator: (torch.randn(5, 3, generator=generator),),
        code="""import torch
from torch import nn
from saigen.papers.bayes.nested_variational_inference import AnnealingPath, GaussianKernels, NestedSampler

class Funnel(nn.Module):                                     # any unnormalised log density of (..., dim)
    def forward(self, z):
        return -z[..., 0] ** 2 / 18 - (z[..., 1:] ** 2).sum(-1) * torch.exp(-z[..., 0]) / 2 - z[..., 0]

path = AnnealingPath(Funnel(), num_targets=5, dim=3, scale=3.0, learned=True, monotone=True)
sampler = NestedSampler(path, GaussianKernels(4, dim=3), GaussianKernels(4, dim=3))
print(sampler.loss(64, "forward"))                           # KL(target | proposal) of every level, summed""",
        wrong=(
            (lambda: GaussianKernels(0, 2), "levels"),
            (lambda: GaussianKernels(2, 2, out=5), "out"),
            (lambda: AnnealingPath(RingOfGaussians(), 1), "num_targets"),
            (lambda: AnnealingPath(RingOfGaussians(), 3, scale=-1.0), "scale"),
            (lambda: ring_sampler(3, resampling="residual"), "resampling"),
            (lambda: ring_sampler(3).loss(10, "both"), "objective"),
            (lambda: ring_sampler(3).loss(0), "num_samples"),
            (lambda: ring_sampler(3).loss(10, "avo"), "learned path"),
            (lambda: NestedSampler(AnnealingPath(RingOfGaussians(), 3), GaussianKernels(2, 2), []), "reverses"),
        ),
    )
    for divergence in ("reverse", "forward"):
        yield Example(
            name=f"level_loss_{divergence}",
            kind="function",
            make=lambda divergence=divergence: _LevelLoss(divergence),
            inputs=lambda generator: (torch.randn(30, generator=generator),),
            code="""import torch
from saigen.papers.bayes.nested_variational_inference import level_loss

log_v, log_weight = torch.randn(50), torch.randn(50)         # from a sampler of one's own
zero = torch.zeros(50)                                       # densities that are not learned
print(level_loss(log_v, log_weight, log_previous=zero, log_target=zero))""",
            wrong=(
                (
                    lambda: level_loss(
                        torch.zeros(2), torch.zeros(2), log_previous=torch.zeros(2), log_target=torch.zeros(2),
                        divergence="symmetric",
                    ),
                    "divergence",
                ),
            ),
            batch=None,
        )  # fmt: skip
    yield Example(
        name="resample",
        kind="function",
        make=lambda: lambda log_weight: resample(log_weight, generator=torch.Generator().manual_seed(0)),
        inputs=lambda generator: (torch.randn(30, generator=generator),),
        code="""import torch
from saigen.papers.bayes.nested_variational_inference import effective_sample_size, resample

log_weight = torch.tensor([0.0, 2.0, -1.0, 0.5])
print(effective_sample_size(log_weight), "of 4;", resample(log_weight, generator=torch.Generator().manual_seed(0)))""",
        wrong=((lambda: resample(torch.zeros(3), "residual"), "scheme"),),
        batch=None,
    )
    yield Example(
        name="effective_sample_size",
        kind="loss",
        make=lambda: _Share(),
        inputs=lambda generator: (torch.randn(30, generator=generator),),
        code="""import torch
from saigen.papers.bayes.nested_variational_inference import effective_sample_size

print(effective_sample_size(torch.randn(1000, 4)))           # one a column, between 1 and 1000""",
        batch=None,
    )


class _Share(nn.Module):
    def forward(self, log_weight: Tensor) -> Tensor:
        return effective_sample_size(log_weight)
