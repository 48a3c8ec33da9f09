"""Does the score see what the Frechet distance does not: classes that lost their modes?

Laptop: scikit-learn's digits. Real: the user's images in grey at 32 pixels. The Frechet distance and the Inception Score
are measured in the last hidden layer of a classifier trained on real images that neither the generators nor the scored
classifiers see. Every set, real or synthetic, is as large, and every classifier is trained by the same recipe.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.nn import functional as F

from saigen.data import split
from saigen.nn.cifar_resnet import CifarResNet
from saigen.papers.augmentation.classification_accuracy_score import (
    VQVAE,
    Discriminator,
    Generator,
    PixelCNN,
    Score,
    VQVAESampler,
    discriminator_loss,
    draw_labels,
    feature_moments,
    frechet_distance,
    inception_score,
    rank_correlation,
    sample_set,
    score_classifier,
)
from saigen.train import EMA, cosine, fit, predict
from saigen.trial import Trial

Sampler = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Size:
    """How big an experiment is."""

    train: int = 800
    validation: int = 597
    features: int = 400  # real images for the network of the Frechet distance
    side: int = 8
    levels: int = 17
    epochs: int = 30  # of every classifier
    inits: int = 2
    gan_steps: int = 1200
    vqvae_steps: int = 600
    prior_steps: int = 600
    pixel_steps: int = 1200
    width: int = 32
    depth: int = 3
    codes: int = 32
    classes: int = 10  # in how many of them one class is degraded at a time


SIZES = {
    "tiny": Size(train=120, validation=100, features=60, epochs=3, inits=1, gan_steps=3, vqvae_steps=3, prior_steps=3, pixel_steps=3, width=8, depth=1, classes=2),
    "laptop": Size(),
    "real": Size(40_000, 10_000, 10_000, 32, 32, 60, 1, 50_000, 20_000, 20_000, 20_000, 128, 8, 256),
}  # fmt: skip


class Network(nn.Module):
    """The classifier of the digits, with 32 features before the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.classifier = nn.Linear(32, 10)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@dataclass
class Study:
    """Real images, the fixed recipe, and the network that the Frechet distance looks through."""

    trial: Trial
    size: Size
    x: Tensor
    y: Tensor
    validation: tuple[Tensor, Tensor]
    judge: nn.Module

    def train(self, x: Tensor, y: Tensor) -> nn.Module:
        """The fixed recipe: the mean of the probabilities of classifiers from several starts."""
        return Mean([_classifier(self.trial, self.size, x, y, f"classifier {i}") for i in range(self.size.inits)])

    def real(self) -> Score:
        """The score of the real training set itself."""
        return score_classifier(self.train(self.x, self.y), *self.validation)

    def score(self, sampler: Sampler, name: str) -> tuple[Score, Tensor]:
        """CAS of a sampler, and the synthetic set that it was measured with."""
        generator = self.trial.generator(f"samples {name}")
        labels = draw_labels(self.y, generator=generator)
        x = sample_set(sampler, labels, generator=generator, batch_size=len(labels))
        return score_classifier(self.train(x, labels), *self.validation), x

    def distance(self, fake: Tensor) -> tuple[float, float]:
        """Frechet distance to the real training set and Inception Score of as many samples."""
        judge = self.judge
        with torch.no_grad():
            ours, theirs = (
                predict(lambda x: judge.forward_head(judge.forward_features(x), pre_logits=True), part)
                for part in (self.x, fake)
            )
            probabilities = predict(judge, fake).double().softmax(dim=1)
        distance = frechet_distance(*feature_moments(ours.numpy()), *feature_moments(theirs.numpy()))
        return distance, inception_score(probabilities.numpy())


class Mean(nn.Module):
    """The mean of the members' probabilities, as logits."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x).softmax(dim=1) for member in self.members]).mean(dim=0).log()


def _classifier(trial: Trial, size: Size, x: Tensor, y: Tensor, name: str) -> nn.Module:
    with trial.seeded(name):
        model = Network() if size.side == 8 else CifarResNet(20, num_classes=int(y.max()) + 1, in_chans=1)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    loss = lambda net, images, labels: F.cross_entropy(net(images), labels)  # noqa: E731
    fit(model, loss, (x, y), optimizer=optimizer, epochs=size.epochs, batch_size=64 if size.side == 8 else 128,
        seed=trial.seed, schedule=cosine(), device=trial.device)  # fmt: skip
    return model.eval()


def _study(trial: Trial) -> Study:
    size = SIZES[trial.scale]
    sizes = (size.train, size.features, size.validation)
    if size.side == 8:
        images = trial.data("digits")
        parts = split(images.y, sizes, trial.rng("split"))
        (x, y), (x_judge, y_judge), validation = ((images.x[part], images.y[part]) for part in parts)
    else:
        images, test = trial.data("images", size=32, part="train"), trial.data("images", size=32, part="test")
        real, judge = split(images.y, sizes[:2], trial.rng("split"))
        (chosen,) = split(test.y, (min(size.validation, len(test)),), trial.rng("validation"))
        grey = [(of.x[part].float().mean(1, keepdim=True) / 255, of.y[part]) for of, part in ((images, real), (images, judge), (test, chosen))]  # fmt: skip
        (x, y), (x_judge, y_judge), validation = grey
    return Study(trial, size, x, y, validation, _classifier(trial, size, x_judge, y_judge, "judge"))


# The subjects -------------------------------------------------------------------------------------------------------


def _gan(study: Study) -> Sampler:
    trial, size, classes = study.trial, study.size, int(study.y.max()) + 1
    with trial.seeded("gan"):
        G = Generator(classes, 1, size.side, size.width).to(trial.device)
        D = Discriminator(classes, 1, size.width).to(trial.device)
        average = EMA(G, 0.99)
        of_g = torch.optim.Adam(G.parameters(), 1e-3, betas=(0.0, 0.9))
        of_d = torch.optim.Adam(D.parameters(), 2e-3, betas=(0.0, 0.9))
        for step in range(size.gan_steps):
            rows = torch.randint(len(study.y), (64,))
            x, y = study.x[rows].to(trial.device), study.y[rows].to(trial.device)
            fake = G(torch.randn(64, G.latent, device=trial.device), y)
            of_d.zero_grad()
            discriminator_loss(D(x, y), D(fake.detach(), y)).backward()
            of_d.step()
            of_g.zero_grad()
            (-D(fake, y).mean()).backward()
            of_g.step()
            average.update(G)
            if step % 500 == 0:
                trial.progress(step, size.gan_steps, "GAN")
    return average.model.cpu().sample


def _fitted(study: Study, model: nn.Module, data: tuple[Tensor, ...], steps: int, name: str) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    fit(model, lambda net, *batch: net.loss(*batch), data, optimizer=optimizer, steps=steps, batch_size=64,
        seed=study.trial.seed, schedule=cosine(warmup=20), device=study.trial.device, checkpoint=study.trial.checkpoint(name))  # fmt: skip
    model.cpu().eval()


def _vqvae(study: Study) -> VQVAESampler:
    size, classes = study.size, int(study.y.max()) + 1
    with study.trial.seeded("vqvae"):
        autoencoder = VQVAE(1, size.width, size.codes)
        prior = PixelCNN(classes, size.codes, size.side // 2, size.width, size.depth)
    _fitted(study, autoencoder, (study.x,), size.vqvae_steps, "vqvae")
    with torch.no_grad():
        codes = torch.cat([autoencoder.encode(part) for part in study.x.split(500)])
    _fitted(study, prior, (codes, study.y), size.prior_steps, "prior")
    return VQVAESampler(autoencoder, prior)


def _autoregressive(study: Study) -> Sampler:
    size, classes = study.size, int(study.y.max()) + 1
    with study.trial.seeded("autoregressive"):
        model = PixelCNN(classes, size.levels, size.side, size.width, size.depth)
    _fitted(study, model, (model.to_grid(study.x), study.y), size.pixel_steps, "autoregressive")
    return model.sample


def likelihood_models_teach_more(trial: Trial) -> dict[str, float]:
    """One seed: a GAN, a VQ-VAE and an autoregressive model of the same images, by CAS and by Frechet distance."""
    study = _study(trial)
    vqvae = _vqvae(study)
    subjects = {"gan": _gan(study), "vqvae": vqvae.sample, "autoregressive": _autoregressive(study)}
    real = study.real()
    values = {"cas_real": real.top1, **_measured(study, subjects, real)}
    # The decoder's share of what is lost: real images, encoded and decoded.
    values["cas_reconstructed"] = score_classifier(
        study.train(vqvae.reconstruct(study.x), study.y), *study.validation
    ).top1
    return {
        "vqvae_gap": values["cas_vqvae"] - values["cas_gan"],
        "autoregressive_gap": values["cas_autoregressive"] - values["cas_gan"],
        "frechet_ratio": values["frechet_vqvae"] / max(values["frechet_gan"], 1e-9),
        "gan_drop": (real.top1 - values["cas_gan"]) / real.top1,
        **values,
    }


def _measured(study: Study, samplers: dict[str, Sampler], real: Score) -> dict[str, float]:
    cas, distances, values = {}, {}, {}
    for number, (name, sampler) in enumerate(samplers.items()):
        score, fake = study.score(sampler, name)
        distances[name], values[f"inception_{name}"] = study.distance(fake)
        cas[name] = score.top1
        worst = int(score.worst_classes(real)[0])
        values[f"worst_class_loss_{name}"] = float(real.per_class[worst] - score.per_class[worst])
        study.trial.progress(number + 1, len(samplers), name)
    values |= {f"cas_{name}": value for name, value in cas.items()}
    values |= {f"frechet_{name}": value for name, value in distances.items()}
    return values | {"correlation": rank_correlation(cas, distances)}


# Reference generators -----------------------------------------------------------------------------------------------


def _few(study: Study, count: int, noise: float = 0.02) -> Sampler:
    """``count`` real images a class, again and again: sharp, and without most modes."""
    rng = study.trial.rng("few")
    kept = [
        study.x[rng.permutation(np.flatnonzero(study.y.numpy() == k))[:count]] for k in range(int(study.y.max()) + 1)
    ]

    def sample(labels: Tensor, generator: torch.Generator) -> Tensor:
        chosen = torch.stack([kept[k][int(torch.randint(len(kept[k]), (), generator=generator))] for k in labels])
        return chosen + noise * torch.randn(chosen.shape, generator=generator)

    return sample


def _largest_cluster(study: Study, clusters: int = 4) -> Sampler:
    """Only the largest of a few clusters of each class."""
    kept = []
    for k in range(int(study.y.max()) + 1):
        x = study.x[study.y == k]
        assigned = KMeans(clusters, n_init=3, random_state=study.trial.seed).fit_predict(x.flatten(1).numpy())
        kept.append(x[assigned == np.bincount(assigned).argmax()])

    def sample(labels: Tensor, generator: torch.Generator) -> Tensor:
        return torch.stack([kept[k][int(torch.randint(len(kept[k]), (), generator=generator))] for k in labels])

    return sample


def _gaussian(study: Study, noise: float, dimensions: int = 8) -> Sampler:
    """A Gaussian of a few principal components a class, and noise on every pixel: diverse, and dirty."""
    fitted = [PCA(dimensions).fit(study.x[study.y == k].flatten(1).numpy()) for k in range(int(study.y.max()) + 1)]

    def sample(labels: Tensor, generator: torch.Generator) -> Tensor:
        z = torch.randn(len(labels), dimensions, generator=generator).double().numpy()
        x = np.stack([fitted[k].mean_ + (row * np.sqrt(fitted[k].explained_variance_)) @ fitted[k].components_ for k, row in zip(labels.tolist(), z, strict=True)])  # fmt: skip
        image = torch.from_numpy(x).float().view(len(labels), *study.x.shape[1:])
        return image + noise * torch.randn(image.shape, generator=generator)

    return sample


def _copy(study: Study) -> Sampler:
    """A real image of the class, at random."""
    return _few(study, len(study.y), noise=0.0)


def frechet_prefers_lost_modes(trial: Trial) -> dict[str, float]:
    """One seed: a sharp generator without most modes against a diverse, dirty one, and others for the correlation."""
    study = _study(trial)
    samplers = {
        "few": _few(study, 8),
        "dirty": _gaussian(study, 0.45),
        "few_more": _few(study, 15),
        "cluster": _largest_cluster(study),
        "less_dirty": _gaussian(study, 0.3),
        "clean": _gaussian(study, 0.0),
    }
    real = study.real()
    values = {"cas_real": real.top1, **_measured(study, samplers, real)}
    # Labels mean nothing to the Frechet distance: real images under the wrong labels are perfect to it.
    wrong = study.y[torch.randperm(len(study.y), generator=trial.generator("wrong labels"))]
    values["cas_wrong_labels"] = score_classifier(study.train(study.x, wrong), *study.validation).top1
    values["frechet_wrong_labels"] = study.distance(study.x)[0]
    return {
        "cas_gap": values["cas_dirty"] - values["cas_few"],
        "frechet_ratio": values["frechet_dirty"] / values["frechet_few"],
        **values,
    }


def lost_classes_are_found(trial: Trial) -> dict[str, float]:
    """One seed: one class after another keeps three images; how often it is the class with the largest loss of accuracy."""
    study = _study(trial)
    copy, few = _copy(study), _few(study, 3)
    real, _ = study.score(copy, "copy")
    found, losses, others = [], [], []
    for k in range(study.size.classes):

        def degraded(labels: Tensor, generator: torch.Generator, k: int = k) -> Tensor:
            whole, part = copy(labels, generator), few(labels, generator)
            return torch.where((labels == k)[:, None, None, None], part, whole)

        score, _ = study.score(degraded, "copy")
        loss = real.per_class - score.per_class
        found.append(int(score.worst_classes(real)[0]) == k)
        losses.append(loss[k])
        others.append(np.nanmean(np.delete(loss, k)))
        trial.progress(k + 1, study.size.classes)
    return {
        "found": float(np.mean(found)),
        "loss_of_class": float(np.mean(losses)),
        "loss_of_others": float(np.mean(others)),
    }
