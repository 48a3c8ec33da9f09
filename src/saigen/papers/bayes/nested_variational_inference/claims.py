"""Does training each level for itself, the path included, give better samples?

The paper's setting (its annealing experiment): from N(0, 25 I) to a ring of eight Gaussians whose log Z is log 8, 288
samples a training step shared out among the densities, judged on 1,000 samples at a time without resampling. Effective
sample size alone can lie, since a sampler that never sees a mode is content: the error of log Z is judged beside it.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saigen.papers.bayes.nested_variational_inference import (
    AnnealingPath,
    NestedSampler,
    RingOfGaussians,
    effective_sample_size,
    log_normalizer,
    ring_sampler,
)
from saigen.train import cosine, fit
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    num_targets: int
    steps: int
    lr: float = 1e-2
    budget: int = 288
    """Samples a training step, over all densities, as in the paper."""
    samples: int = 1_000
    batches: int = 100
    tuning_batches: int = 20
    """For annealed importance sampling to choose its schedule by, drawn apart from those it is judged on."""


SIZES = {
    "tiny": Size(num_targets=3, steps=4, samples=50, batches=4, tuning_batches=2),
    "laptop": Size(num_targets=4, steps=4_000),
    "real": Size(num_targets=8, steps=20_000),
    "full": Size(num_targets=8, steps=20_000, lr=1e-3),
}
TRANSITIONS = 3
"""Metropolis transitions in the time of one level of the nested sampler, which is two nets, a draw and a density."""


def higher_ess_than_annealed_importance_sampling(trial: Trial) -> dict[str, float]:
    """One seed: NVI with a learned path against annealed importance sampling that takes as long to draw from.

    AIS spends its transitions on more densities or on more steps at each, on a schedule and with a step size that are
    chosen for effective sample size on draws of its own.
    """
    size = SIZES[trial.scale]
    nested = _judge(_train(trial, "reverse", learned=True), trial)
    transitions = TRANSITIONS * (size.num_targets - 1)
    choices = itertools.product([n for n in (1, 2, 3) if transitions % n == 0], (1.0, 2.0, 3.0), (0.5, 1.0, 2.0, 4.0))
    ais = _annealed_importance_sampling(trial, transitions, list(choices), "ais")
    # Not judged: AIS with ten times the transitions, for what it takes to catch up.
    longer = _annealed_importance_sampling(trial, 10 * transitions, [(1, 2.0, 1.0), (1, 2.0, 2.0)], "longer ais")
    return {
        "ess_ratio": nested["ess"] / ais["ess"],
        "log_z_closer": ais["log_z_error"] - nested["log_z_error"],
        **_named(nested=nested, ais=ais, ais_10_times=longer),
    }


def nested_objective_and_learned_path_help(trial: Trial) -> dict[str, float]:
    """One seed: NVI with a learned path, NVI and the annealed variational objective on the fixed one, the same start."""
    learned = _judge(_train(trial, "reverse", learned=True), trial)
    fixed = _judge(_train(trial, "reverse", learned=False), trial)
    avo = _judge(_train(trial, "avo", learned=False), trial)
    return {
        "ess_over_avo": learned["ess"] / avo["ess"],
        "log_z_closer_than_avo": avo["log_z_error"] - learned["log_z_error"],
        **_named(learned=learned, fixed=fixed, avo=avo),
    }


def _named(**arms: dict[str, float]) -> dict[str, float]:
    return {f"{name}_{arm}": value for arm, values in arms.items() for name, value in values.items()}


def _train(trial: Trial, objective: str, learned: bool) -> NestedSampler:
    size = SIZES[trial.scale]
    with trial.seeded("weights"):
        sampler = ring_sampler(size.num_targets, learned=learned)
    count = size.budget // size.num_targets
    # There are no data: a step draws its samples anew, from the stream of (seed, step).
    fit(
        sampler, lambda model, _: model.loss(count, objective), (torch.zeros(1),),
        optimizer=torch.optim.Adam(sampler.parameters(), size.lr, fused=True), steps=size.steps, batch_size=1, seed=trial.seed,
        schedule=cosine(), device=trial.device, checkpoint=trial.checkpoint(f"{objective}{' path' * learned}"),
        on_step=lambda step, total, _: trial.progress(step, total, objective) if step % 500 == 0 else None,
    )  # fmt: skip
    return sampler


def _judge(sampler: NestedSampler, trial: Trial) -> dict[str, float]:
    size = SIZES[trial.scale]
    samples = sampler.cpu()(size.samples, (size.batches,), trial.generator("judged samples"))
    values = _quality(samples.z, samples.log_weight)
    return values | {f"beta_{k}": beta for k, beta in enumerate(sampler.path.betas.tolist())}


def _quality(z: Tensor, log_weight: Tensor) -> dict[str, float]:
    """Share of effective samples, log Z of each batch, and the weight of the mode that has least, 1/8 at best."""
    sector = (torch.atan2(z[..., 0], z[..., 1]) / (2 * math.pi / 8)).round().long() % 8
    mass = torch.zeros(8, *log_weight.shape[1:]).scatter_add(0, sector, log_weight.softmax(0)).mean(1)
    log_z = log_normalizer(log_weight)
    return {
        "ess": (effective_sample_size(log_weight) / len(log_weight)).mean().item(),
        "log_z": log_z.mean().item(),
        "log_z_error": (log_z - math.log(8)).abs().mean().item(),
        "least_mode": mass.min().item(),
    }


Setting = tuple[int, float, float]
"""Metropolis steps at each density, power of the schedule, size of a step."""


def _annealed_importance_sampling(
    trial: Trial, transitions: int, settings: list[Setting], name: str
) -> dict[str, float]:
    """The quality of AIS at the one of ``settings`` whose effective sample size is best on draws of their own."""
    size, path = SIZES[trial.scale], AnnealingPath(RingOfGaussians(), 2)

    def run(setting: Setting, batches: int, purpose: str) -> dict[str, float]:
        return _quality(*_ais(path, transitions, *setting, (size.samples, batches), trial.generator(purpose)))

    best = max(settings, key=lambda setting: run(setting, size.tuning_batches, f"tuning {name}")["ess"])
    chosen = dict(zip(("steps_a_density", "power", "step_size"), map(float, best), strict=True))
    return run(best, size.batches, f"judged {name}") | chosen


def _ais(
    path: AnnealingPath, transitions: int, each: int, power: float, step_size: float, shape: tuple[int, int],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Neal's annealed importance sampling: ``transitions`` Metropolis steps, ``each`` at a density, beta = (k/K)^power.

    A step is Gaussian, ``step_size`` times the width that a mode of the density has.
    """
    densities = transitions // each + 1
    z = path.scale * torch.randn(*shape, path.dim, generator=generator)
    start, target = path.start(z), path.target(z)
    log_weight, before = torch.zeros(shape), 0.0
    for k in range(1, densities + 1):
        beta = (k / densities) ** power
        log_weight, before = log_weight + (beta - before) * (target - start), beta
        if k == densities:
            break
        width = step_size * (beta / path.target.variance + (1 - beta) / path.scale**2) ** -0.5
        for _ in range(each):
            moved = z + width * torch.randn(z.shape, generator=generator)
            start_moved, target_moved = path.start(moved), path.target(moved)
            change = (1 - beta) * (start_moved - start) + beta * (target_moved - target)
            taken = torch.rand(shape, generator=generator).log() < change
            z = torch.where(taken[..., None], moved, z)
            start, target = torch.where(taken, start_moved, start), torch.where(taken, target_moved, target)
    return z, log_weight
