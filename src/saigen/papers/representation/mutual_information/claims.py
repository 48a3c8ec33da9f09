"""Is it mutual information that makes features good? The paper's experiments, on the halves of images and on Gaussians.

The upper and the lower half of an image are the two views, each with an encoder of its own; what counts is how well a
linear classifier does on the features of the upper half. An arm and its rival start from the same weights of a seed and
see the same batches. Nothing is tuned: the arms of a claim have the same rate and the same number of steps.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saigen.data import Images, split
from saigen.papers.representation.mutual_information import (
    BilinearCritic,
    ConcatCritic,
    ConvEncoder,
    CouplingFlow,
    InfoMax,
    InfoMaxLoss,
    MLPEncoder,
    Probe,
    ResidualMLP,
    SeparableCritic,
    adversarial_linear_training,
    dependent_pairs,
    gaussian_mi,
    gaussian_pairs,
    halves,
    jacobian_condition_number,
    linear_probe,
    mi_bound,
)
from saigen.train import cosine, fit, predict
from saigen.trial import Trial

ESTIMATORS = ("infonce", "nwj")


@dataclass(frozen=True)
class Size:
    """The laptop's sizes, where nothing else is said."""

    data: str = "digits"
    train: int | None = 1200  # None: all there is
    test: int | None = 597
    copies: tuple[int, int] = (6, 4)  # of each digit, for training and for testing, every one distorted anew
    side: int = 12  # of an image, in pixels
    couplings: int = 6
    hidden: tuple[int, ...] = (64, 64)  # of a coupling
    widths: tuple[int, ...] = (128, 128, 32)  # of the MLP encoder; the last is the features of the others, too
    channels: int = 38  # as many parameters as the MLP encoder has, as in the paper
    kernel: int = 3
    critic: int = 32  # hidden units of the separable critic; the MLP critic has twice as many
    steps: int = 1500
    pinned_steps: int = 1200
    lr: float = 1e-3
    decay: bool = True  # of the rates, by a cosine
    batch: int = 128
    probe_tol: float = 1e-2
    noise: float = 0.05  # standard deviation, in the experiment on conditioning
    jacobians: int = 64
    adversarial_steps: int = 400
    warmup: int = 500
    encoder_lr: float = 1e-4  # against the linear classifier, which has 1e-3
    gaussian_batch: int = 64
    gaussian_steps: int = 1000
    gaussian_lr: float = 1e-3
    gaussian_judged: int = 300  # batches


PAPER = {"side": 28, "widths": (300, 300, 100), "channels": 64, "kernel": 5, "critic": 100, "jacobians": 128}
SIZES = {
    "tiny": Size(
        train=200, test=100, copies=(2, 2), side=8, couplings=2, hidden=(16,), widths=(16, 8), channels=4, critic=8,
        steps=12, pinned_steps=12, probe_tol=1e-1, jacobians=8, adversarial_steps=4, warmup=20, gaussian_batch=16,
        gaussian_steps=20, gaussian_judged=10,
    ),
    "laptop": Size(),
    # The user's images, at rates ten times the paper's for a seventh of its steps.
    "real": Size(
        data="images", train=10_000, test=2000, couplings=8, hidden=(256, 256), steps=3000, pinned_steps=3000,
        adversarial_steps=400, warmup=1000, **PAPER,
    ),
    # The authors' notebook, on MNIST.
    "full": Size(
        data="images", train=None, test=None, couplings=30, hidden=(512, 512), steps=21_000,
        pinned_steps=21_000, lr=1e-4, decay=False, probe_tol=1e-1, adversarial_steps=4001, warmup=1000, encoder_lr=1e-5, gaussian_batch=128, gaussian_steps=20_000,
        gaussian_lr=1e-4, gaussian_judged=1000, **PAPER,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Upper and lower halves of images, flattened, and labels."""

    upper: Tensor
    lower: Tensor
    y: Tensor


class Experiment:
    """One seed: its images, and what every arm is put through."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.size = trial, SIZES[trial.scale]
        size = self.size
        if size.data == "digits":
            digits = trial.data("digits")
            chosen = split(digits.y.numpy(), (size.train, size.test), trial.rng("split"))
            generator = trial.generator("distortions")
            parts = [
                distorted(digits.subset(part), copies, size.side, generator)
                for part, copies in zip(chosen, size.copies, strict=True)
            ]
        else:
            parts = []
            for part, count in (("train", size.train), ("test", size.test)):
                images = trial.data("images", size=size.side, part=part)
                count = len(images) if count is None else min(count, len(images))
                parts.append(images.subset(split(images.y.numpy(), (count,), trial.rng(f"split {part}"))[0]).float())
        self.classes = len(parts[0].classes)
        self.train, self.test = (Part(*halves(part.x.mean(1)), part.y) for part in parts)
        self.dim = self.train.upper.shape[1]

    def fit(
        self, model: InfoMax, loss: InfoMaxLoss, arm: str, *, steps: int | None = None, noise: float = 0.0
    ) -> float:
        """Trains ``model`` and returns the mean loss of its last epoch."""
        size, trial = self.size, self.trial
        history = fit(
            model, lambda model, upper, lower: loss(model(upper, lower)), (self.train.upper, self.train.lower),
            optimizer=torch.optim.Adam(model.parameters(), size.lr), steps=steps or size.steps, batch_size=size.batch,
            seed=trial.seed, schedule=cosine() if size.decay else None, transform=_noisy(noise) if noise else None,
            checkpoint=trial.checkpoint(arm), device=trial.device,
            on_step=lambda step, total, _: trial.progress(step, total, arm),
        )  # fmt: skip
        last = history.losses[-max(1, len(self.train.y) // size.batch) :]
        return sum(last) / len(last)

    def probe(self, encoder: nn.Module, noise: float = 0.0) -> Probe:
        """A new linear classifier on the features of the upper half."""
        upper = [part.upper for part in (self.train, self.test)]
        if noise:
            generator = self.trial.generator("noise of the probe")
            upper = [x + noise * torch.randn(x.shape, generator=generator) for x in upper]
        dtype = next((parameter.dtype for parameter in encoder.parameters()), torch.float32)
        train_z, test_z = (predict(encoder, x.to(dtype)) for x in upper)
        return linear_probe(
            train_z, self.train.y, test_z, self.test.y, tol=self.size.probe_tol, max_iter=1000, seed=self.trial.seed
        )

    @torch.no_grad()
    def bound(self, model: InfoMax, estimator: str, part: Part) -> float:
        """The mean bound over batches of ``part``, of the size that the training has."""
        model.eval()
        size, device = min(self.size.batch, len(part.y)), self.trial.device
        order = torch.randperm(len(part.y), generator=self.trial.generator("batches of the bound"))
        starts = range(0, len(order) - size + 1, size)
        values = [
            mi_bound(model(*(x[order[i : i + size]].to(device) for x in (part.upper, part.lower))), estimator)
            for i in starts
        ]
        return torch.stack(values).mean().item()

    def bounds(self, model: InfoMax, estimator: str, arm: str) -> dict[str, float]:
        """The bound on training images, where the authors' code measures it, and on test images."""
        return {
            f"{arm}_bound": self.bound(model, estimator, self.train),
            f"{arm}_test_bound": self.bound(model, estimator, self.test),
        }

    @torch.no_grad()
    def inverse_error(self, flow: CouplingFlow) -> float:
        """The largest error of a pixel of a test image that was encoded and decoded."""
        x = self.test.upper.to(next(flow.parameters()))
        return (flow.inverse(flow(x)) - x).abs().max().item()

    def batches(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        generator, size = self.trial.generator("labelled batches"), min(self.size.batch, len(self.train.y))
        while True:
            for chosen in torch.randperm(len(self.train.y), generator=generator).split(size):
                if len(chosen) == size:
                    yield self.train.upper[chosen].to(dtype), self.train.y[chosen]

    def mlps(self, critic: nn.Module) -> InfoMax:
        return InfoMax(MLPEncoder(self.dim, self.size.widths), MLPEncoder(self.dim, self.size.widths), critic)


def distorted(images: Images, copies: int, side: int, generator: torch.Generator) -> Images:
    """``copies`` of each digit, each turned by up to 14 degrees, scaled by up to 15 %, moved by up to a tenth of its side.

    As scikit-learn has them, digits of 8x8 pixels are told apart from half the pixels, by a linear classifier nearly as
    well as by any other; distorted ones leave features something to gain, and are too many to be learned by heart.
    """
    x, y = images.x.repeat(copies, 1, 1, 1), images.y.repeat(copies)
    turn, size, *shift = (2 * torch.rand(4, len(x), generator=generator) - 1).unbind()
    turn, size, (right, down) = 0.25 * turn, 1 + 0.15 * size, (0.2 * s for s in shift)
    cos, sin = size * turn.cos(), size * turn.sin()
    maps = torch.stack([cos, -sin, right, sin, cos, down], 1).view(-1, 2, 3)
    grid = F.affine_grid(maps, [len(x), 1, side, side], align_corners=False)
    return replace(images, x=F.grid_sample(x, grid, align_corners=False), y=y)


def _noisy(std: float) -> Callable[..., tuple[Tensor, Tensor]]:
    def transform(generator: torch.Generator, upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
        # One draw for both halves, as in the authors' code.
        noise = std * torch.randn(upper.shape, generator=generator)
        return upper + noise, lower + noise

    return transform


def _named(arm: str, probe: Probe) -> dict[str, float]:
    return {f"{arm}_accuracy": probe.accuracy, f"{arm}_log_loss": probe.log_loss}


# --- one function a claim ---------------------------------------------------------------------------------------------


def invertible_encoders_improve(trial: Trial) -> dict[str, float]:
    """One seed: couplings that preserve all information, trained by each bound; against pixels and themselves untrained."""
    experiment = Experiment(trial)
    size, dim = experiment.size, experiment.dim
    with trial.seeded("weights"):
        g1, g2 = (CouplingFlow(dim, size.couplings, size.hidden) for _ in range(2))
        start = InfoMax(g1, g2, BilinearCritic(dim))
    untrained, pixels = experiment.probe(start.g1), experiment.probe(nn.Identity())
    values, errors = _named("untrained", untrained) | _named("pixels", pixels), []
    for estimator in ESTIMATORS:
        model = copy.deepcopy(start)
        values[f"{estimator}_last_loss"] = experiment.fit(model, InfoMaxLoss(estimator), estimator)
        probe = experiment.probe(model.g1)
        values |= _named(estimator, probe) | experiment.bounds(model, estimator, estimator)
        values[f"gain_{estimator}"] = probe.accuracy - max(untrained.accuracy, pixels.accuracy)
        errors.append(experiment.inverse_error(model.g1))
    return values | {"inverse_error": max(errors)}


def adversarial_encoder_hurts(trial: Trial) -> dict[str, float]:
    """One seed: couplings that preserve all information, trained against linear classifiers; judged by a new one.

    In double precision, since the map becomes so ill-conditioned that float32 would lose what it formally keeps.
    """
    experiment = Experiment(trial)
    size = experiment.size
    with trial.seeded("weights"):
        encoder = CouplingFlow(experiment.dim, size.couplings, size.hidden, scale=True)
        encoder.to(trial.device, torch.float64)
        untrained, pixels = experiment.probe(encoder), experiment.probe(nn.Identity())
        history = adversarial_linear_training(
            encoder, experiment.batches(torch.float64), classes=experiment.classes, warmup=size.warmup,
            steps=size.adversarial_steps, encoder_lr=size.encoder_lr,
            on_step=lambda step, total, _: trial.progress(step, total, "adversarial"),
        )  # fmt: skip
    adversarial = experiment.probe(encoder)
    return {
        **_named("pixels", pixels),
        **_named("untrained", untrained),
        **_named("adversarial", adversarial),
        "last_encoder_loss": history.encoder_losses[-1],
        "last_classifier_loss": history.classifier_losses[-1],
        "accuracy_lost": pixels.accuracy - adversarial.accuracy,
        "inverse_error": experiment.inverse_error(encoder),
        "inverse_error_of_float32": min(experiment.inverse_error(copy.deepcopy(encoder).float()), 1e6),
    }


def encoders_become_ill_conditioned(trial: Trial) -> dict[str, float]:
    """One seed: residual layers that start as the identity, trained by each bound; the Jacobian at test images."""
    experiment = Experiment(trial)
    size, dim = experiment.size, experiment.dim
    with trial.seeded("weights"):
        start = InfoMax(ResidualMLP(dim), ResidualMLP(dim), BilinearCritic(dim))
    noise = size.noise * torch.randn(experiment.test.upper.shape, generator=trial.generator("noise of the jacobians"))
    images = (experiment.test.upper + noise)[: size.jacobians].to(trial.device)
    pixels = experiment.probe(nn.Identity(), size.noise)
    values = _named("untrained", experiment.probe(start.g1, size.noise)) | _named("pixels", pixels)
    values["pixel_accuracy"] = pixels.accuracy
    untrained = jacobian_condition_number(start.g1.to(trial.device), images).mean().item()
    values["untrained_log_condition"] = untrained
    for estimator in ESTIMATORS:
        model = copy.deepcopy(start)
        values[f"{estimator}_last_loss"] = experiment.fit(model, InfoMaxLoss(estimator), estimator, noise=size.noise)
        values |= _named(estimator, experiment.probe(model.g1, size.noise))
        # A direction that is lost altogether counts as what float32 resolves.
        conditions = jacobian_condition_number(model.g1, images).clamp(max=-math.log(torch.finfo(torch.float32).eps))
        for share in (0.0, 0.5, 1.0):
            values[f"{estimator}_log_condition_{share:.0%}"] = conditions.quantile(share).item()
        values[f"rise_{estimator}"] = conditions.mean().item() - untrained
    return values


def simpler_critics_give_better_features(trial: Trial) -> dict[str, float]:
    """One seed: MLP encoders with critics of rising capacity, trained by I_NCE and by I_NWJ."""
    experiment = Experiment(trial)
    size, features = experiment.size, experiment.size.widths[-1]
    critics = {
        "bilinear": lambda: BilinearCritic(features),
        "separable": lambda: SeparableCritic(features, size.critic, features),
        "mlp": lambda: ConcatCritic(features, 2 * size.critic),
    }
    values = _named("pixels", experiment.probe(nn.Identity()))
    for name, critic in critics.items():
        with trial.seeded("weights"):  # the encoders first, so that all critics start from the same
            start = experiment.mlps(nn.Identity())
            start.critic = critic()
        for estimator in ESTIMATORS:
            model, arm = copy.deepcopy(start), f"{name}_{estimator}"
            values[f"{arm}_last_loss"] = experiment.fit(model, InfoMaxLoss(estimator), arm)
            values |= _named(arm, experiment.probe(model.g1)) | experiment.bounds(model, estimator, arm)
    for estimator in ESTIMATORS:
        for name in ("bilinear", "separable"):
            values[f"{name}_over_mlp_{estimator}"] = (
                values[f"{name}_{estimator}_accuracy"] - values[f"mlp_{estimator}_accuracy"]
            )
        values[f"mlp_bound_shortfall_{estimator}"] = (
            values[f"bilinear_{estimator}_test_bound"] - values[f"mlp_{estimator}_test_bound"]
        )
    return values


def encoder_decides_at_equal_bounds(trial: Trial) -> dict[str, float]:
    """One seed: convolutions and an MLP, both held at the same I_NCE, of 2 and of 4 nats."""
    experiment = Experiment(trial)
    size, features = experiment.size, experiment.size.widths[-1]
    shape = (size.side // 2, size.side)

    def convolutions() -> ConvEncoder:
        return ConvEncoder(shape, channels=size.channels, kernel=size.kernel, dim_out=features)

    with trial.seeded("weights"):
        starts = {
            "mlp": experiment.mlps(BilinearCritic(features)),
            "conv": InfoMax(convolutions(), convolutions(), BilinearCritic(features)),
        }
    values = _named("pixels", experiment.probe(nn.Identity()))
    for name, start in starts.items():
        values |= _named(f"{name}_untrained", experiment.probe(start.g1))
        for target in (2, 4):
            model, arm = copy.deepcopy(start), f"{name}_{target}"
            values[f"{arm}_last_loss"] = experiment.fit(
                model, InfoMaxLoss("infonce", target=float(target)), arm, steps=size.pinned_steps
            )
            values |= _named(arm, experiment.probe(model.g1)) | experiment.bounds(model, "infonce", arm)
    for target in (2, 4):
        values[f"conv_over_mlp_at_{target}"] = values[f"conv_{target}_accuracy"] - values[f"mlp_{target}_accuracy"]
    misses = [abs(values[f"{name}_{target}_bound"] - target) for name in starts for target in (2, 4)]
    return values | {"largest_miss": max(misses)}


def dependent_batches_break_the_bounds(trial: Trial) -> dict[str, float]:
    """One seed: an MLP critic learns on dependent and on independent batches of the same pairs; the truth is known."""
    size = SIZES[trial.scale]
    shared, own = -0.5, 0.9
    rho = (shared + own) / 2
    truth = gaussian_mi(rho)

    def draw(dependent: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if dependent:
            return dependent_pairs(size.gaussian_batch, shared=shared, own=own, generator=generator)
        x, y = gaussian_pairs(size.gaussian_batch, 1, rho, generator=generator)
        return math.sqrt(2) * x, math.sqrt(2) * y

    values = {"true_mi": truth}
    for estimator in ESTIMATORS:
        for dependent in (True, False):
            arm = f"{estimator}_{'dependent' if dependent else 'independent'}"
            with trial.seeded("weights"):
                critic = ConcatCritic(1, 10, layers=5)
            fit(
                critic, lambda critic, x, y: -mi_bound(critic(x, y), estimator), (torch.zeros(1), torch.zeros(1)),
                optimizer=torch.optim.Adam(critic.parameters(), size.gaussian_lr), steps=size.gaussian_steps,
                batch_size=1, seed=trial.seed, schedule=cosine() if size.decay else None,
                transform=lambda generator, *_: draw(dependent, generator),
                checkpoint=trial.checkpoint(arm), device=trial.device,
                on_step=lambda step, total, _: trial.progress(step, total, arm) if step % 100 == 0 else None,
            )  # fmt: skip
            generator = trial.generator("judged batches")
            with torch.no_grad():
                judged = [
                    mi_bound(critic(*(v.to(trial.device) for v in draw(dependent, generator))), estimator)
                    for _ in range(size.gaussian_judged)
                ]
            values[arm] = torch.stack(judged).mean().item()
        values[f"{estimator}_excess"] = values[f"{estimator}_dependent"] - truth
        values[f"{estimator}_excess_when_independent"] = values[f"{estimator}_independent"] - truth
    return values
