"""Does the evidence, which sees the training data alone, choose what test data would have chosen?

Laptop: 300 of the embedded digits to train on and all others to test on, as few data as make priors and architectures
matter. Real and full: the user's images. Networks have no batch norm, and are judged by the log likelihood of their most
probable weights, as in the paper.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_diabetes, make_friedman1
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from saigen.data import fingerprint, split
from saigen.data.subsets import sample
from saigen.papers.bayes.marginal_likelihood import Trained, train
from saigen.train import predict
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    train: int
    test: int
    epochs: int
    frequency: int
    """Epochs between two updates of the prior."""
    batch: int
    lr: float
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    channels: tuple[int, ...]
    """Of the convolutional candidates."""
    rows: int = 150
    """Of each regression set, to train on."""
    test_rows: int = 1_000
    hidden: int = 50
    grid: tuple[float, ...] = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
    """Prior precisions for held-out data to choose from."""
    hyper_steps: int = 20
    burn_in: int = 10


SIZES = {
    "tiny": Size(40, 60, 4, 2, 20, 1e-2, (4,), (1,), (2,), rows=30, grid=(0.1, 1.0), hyper_steps=2, burn_in=0),
    "laptop": Size(300, 1_497, 300, 10, 100, 5e-3, (8, 32, 128), (1, 2), (4, 16)),
    "real": Size(10_000, 10_000, 100, 5, 250, 2e-3, (64, 256), (1, 2), (16, 32, 64)),
    "full": Size(50_000, 10_000, 300, 5, 250, 1e-3, (64, 256), (1, 2), (16, 32, 64)),
}
DEFAULT_WEIGHT_DECAY = 1e-4
HELD_OUT = 0.2


def evidence_ranks_architectures(trial: Trial) -> dict[str, float]:
    """One seed: every candidate learns its own prior while it trains; evidence against test log likelihood over them."""
    size, parts = SIZES[trial.scale], _images(trial)
    candidates = _candidates(trial, parts)
    evidence, test, fit = [], [], []
    for done, make in enumerate(candidates.values()):
        trained = _train(trial, make, parts["train"], "classification")
        evidence.append(trained.log_marginal_likelihood / size.train)
        test.append(-_nll(trained.model, *parts["test"]))
        fit.append(-_nll(trained.model, *parts["train"]))
        trial.progress(done + 1, len(candidates))
    best, mean = max(test), float(np.mean(test))
    by = {"evidence": test[int(np.argmax(evidence))], "training_fit": test[int(np.argmax(fit))]}
    return {
        "rank_correlation": float(spearmanr(evidence, test).statistic),
        # How far the chosen one is on the way from an average candidate to the best.
        "share_of_gain": (by["evidence"] - mean) / (best - mean),
        "share_of_gain_by_training_fit": (by["training_fit"] - mean) / (best - mean),
        "test_best": best,
        "test_mean": mean,
        **{f"evidence_{name}": value for name, value in zip(candidates, evidence, strict=True)},
        **{f"test_{name}": value for name, value in zip(candidates, test, strict=True)},
    }


def evidence_learns_the_prior(trial: Trial) -> dict[str, float]:
    """One seed: prior and noise learned online, chosen on held-out data, and left at a usual weight decay; regression.

    Held-out data are a fifth of the training data: they choose the precision and the noise, and the precision then trains
    on all. The default arm has its noise from held-out data too. Beside it, not judged, the same for a classifier of the
    digits, where the default is as good as what held-out data choose.
    """
    size, values = SIZES[trial.scale], {}
    sets = _regression_sets(trial)
    for done, (name, parts) in enumerate(sets.items()):
        arms = _prior_arms(trial, lambda: _network(trial, parts["train"][0], 1), parts, "regression")
        values |= {f"{name}_{key}": value for key, value in arms.items()}
        trial.progress(done + 1, len(sets) + 1, name)
    parts = _images(trial)
    arms = _prior_arms(trial, _candidates(trial, parts)[f"mlp_{size.widths[-1]}_1"], parts, "classification")
    values |= {f"digits_{key}": value for key, value in arms.items()}
    learned, held_out, default = (
        float(np.mean([values[f"{name}_nll_{arm}"] for name in sets])) for arm in ("learned", "held_out", "default")
    )
    return {"nll_saved_over_default": default - learned, "nll_over_held_out": learned - held_out, **values}


def _prior_arms(
    trial: Trial, make: Callable[[], nn.Module], parts: dict[str, tuple[Tensor, Tensor]], likelihood: str
) -> dict[str, float]:
    """Test NLL of the three arms, all trained by one loop from one start."""
    size, whole = SIZES[trial.scale], parts["train"]
    n = len(whole[1])
    labels = whole[1] if likelihood == "classification" else n
    rest, held_out = split(labels, (n - round(HELD_OUT * n), round(HELD_OUT * n)), trial.rng(f"held out {likelihood}"))
    inside, outside = (tuple(part[index] for part in whole) for index in (rest, held_out))
    default = DEFAULT_WEIGHT_DECAY * n
    # With the noise fixed at one, the penalty is a weight decay; what it stands for follows from the noise.
    tried = {}
    for delta in (*size.grid, default):
        model = _train(trial, make, inside, likelihood, fixed=delta).model
        noise = _rmse(model, *outside) if likelihood == "regression" else None
        tried[delta] = (_nll(model, *outside, noise), noise)
    chosen = min(size.grid, key=lambda delta: tried[delta][0])
    learned = _train(trial, make, whole, likelihood)
    sigma = None if learned.sigma_noise is None else learned.sigma_noise.item()
    values = {"nll_learned": _nll(learned.model, *parts["test"], sigma), "precision_held_out": chosen}
    for name, delta in (("held_out", chosen), ("default", default)):
        model = _train(trial, make, whole, likelihood, fixed=delta).model
        values[f"nll_{name}"] = _nll(model, *parts["test"], tried[delta][1])
    if sigma is not None:
        values |= {"sigma_learned": sigma, "sigma_held_out": tried[chosen][1]}
    return values | {f"precision_{i}": delta for i, delta in enumerate(learned.prior_precision.tolist())}


def _train(
    trial: Trial,
    make: Callable[[], nn.Module],
    part: tuple[Tensor, Tensor],
    likelihood: str,
    fixed: float | None = None,
) -> Trained:
    """Online with a precision for each tensor; with ``fixed`` that precision stays, and the same loop trains."""
    size = SIZES[trial.scale]
    x, y = (tensor.to(trial.device) for tensor in part)
    data = list(zip(x.split(size.batch), y.split(size.batch), strict=True))
    options = {"epochs": size.epochs, "lr": size.lr, "lr_min": size.lr / 100}
    if fixed is None:
        options |= {"frequency": size.frequency, "hyper_steps": size.hyper_steps, "burn_in": size.burn_in}
    else:
        options |= {
            "frequency": size.epochs,
            "hyper_steps": 1,
            "lr_hyper": 0.0,
            "prior_precision": fixed,
            "prior": "scalar",
        }
    return train(make().to(trial.device), data, likelihood, **options)


def _rmse(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return F.mse_loss(predict(model, x), y).sqrt().item()


def _nll(model: nn.Module, x: Tensor, y: Tensor, sigma: float | None = None) -> float:
    """Nats a sample: of classes, or of y in units of its standard deviation with noise ``sigma``."""
    f = predict(model, x)
    return F.cross_entropy(f, y).item() if sigma is None else -Normal(f, sigma).log_prob(y).mean().item()


def _candidates(trial: Trial, parts: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Callable[[], nn.Module]]:
    """A linear classifier, networks of fully connected layers, and convolutional ones; the same start each time."""
    size, (x, y) = SIZES[trial.scale], parts["train"]
    shape, classes = x.shape[1:], int(y.max()) + 1

    def seeded(name: str, build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            with trial.seeded(f"weights {name}"):
                return build()

        return make

    def mlp(width: int, depth: int) -> nn.Module:
        return _mlp(int(np.prod(shape)), width, depth, classes)

    def cnn(channels: int) -> nn.Module:
        layers, inputs, side = [], shape[0], shape[1]
        while side > 2:
            layers += [nn.Conv2d(inputs, channels, 3, stride=2, padding=1), nn.Tanh()]
            inputs, channels, side = channels, 2 * channels, (side + 1) // 2
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * side * side, classes))

    found = {"linear": seeded("linear", lambda: mlp(0, 0))}
    for depth in size.depths:
        for width in size.widths:
            name = f"mlp_{width}_{depth}"
            found[name] = seeded(name, lambda width=width, depth=depth: mlp(width, depth))
    for channels in size.channels:
        found[f"cnn_{channels}"] = seeded(f"cnn_{channels}", lambda channels=channels: cnn(channels))
    return found


def _mlp(inputs: int, width: int, depth: int, outputs: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(depth):
        layers, inputs = [*layers, nn.Linear(inputs, width), nn.Tanh()], width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def _network(trial: Trial, x: Tensor, outputs: int) -> nn.Module:
    with trial.seeded("weights"):
        return _mlp(x.shape[1], SIZES[trial.scale].hidden, 1, outputs)


def _regression_sets(trial: Trial) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Diabetes, and Friedman's first function of five of ten inputs with noise; columns and labels standardised."""
    size, rng = SIZES[trial.scale], trial.rng("regression")
    diabetes = load_diabetes(return_X_y=True)
    friedman = make_friedman1(size.rows + size.test_rows, noise=1.0, random_state=int(rng.integers(2**31)))
    trial.used("diabetes", fingerprint(diabetes))
    found = {}
    for name, (x, y) in (("diabetes", diabetes), ("friedman", friedman)):
        chosen, held_out = split(len(y), (size.rows, min(size.test_rows, len(y) - size.rows)), rng)
        scale = StandardScaler().fit(np.column_stack([x, y])[chosen])
        table = torch.from_numpy(scale.transform(np.column_stack([x, y]))).float()
        found[name] = {part: (table[i, :-1], table[i, -1:]) for part, i in (("train", chosen), ("test", held_out))}
    return found


def _images(trial: Trial) -> dict[str, tuple[Tensor, Tensor]]:
    size = SIZES[trial.scale]
    if trial.scale in ("tiny", "laptop"):
        images = trial.data("digits")
        chosen, held_out = split(images.y, (size.train, size.test), trial.rng("split"))
        return {"train": (images.x[chosen], images.y[chosen]), "test": (images.x[held_out], images.y[held_out])}
    parts = {}
    for part, count in (("train", size.train), ("test", size.test)):
        images = sample(trial.data("images", size=32, part=part), count, trial.rng(part)).float()
        parts[part] = (images.x - 0.5) / 0.25, images.y
    return parts
