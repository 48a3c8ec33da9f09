"""What the encoders are judged by: a linear classifier, an adversary of linear classifiers, and the Jacobian."""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class Probe(NamedTuple):
    """How well a linear classifier does on test features."""

    accuracy: float
    log_loss: float
    """Cross-entropy in nats."""


def linear_probe(
    train_z: Float[Tensor, "n d"], train_y: Int[Tensor, "n"], test_z: Float[Tensor, "m d"], test_y: Int[Tensor, "m"], *,
    c: float = 10.0, tol: float = 0.1, max_iter: int = 100, seed: int = 0,
) -> Probe:  # fmt: skip
    """The paper's evaluation: features scaled to [0, 1] by the training set, multinomial logistic regression by SAGA.

    ``c`` is the inverse of the penalty's strength. SAGA stops where an epoch changes the largest weight by less than
    ``tol`` of it: at 0.1 that is a handful of epochs, enough with 60,000 images, too few with a thousand.

    Raises ``ValueError`` for ``c`` or ``tol`` that is not above 0.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.preprocessing import MinMaxScaler

    for name, value in (("c", c), ("tol", tol)):
        if not value > 0:
            raise ValueError(f"{name} is {value}, allowed is above 0")
    scaler = MinMaxScaler()
    train_y, test_y = train_y.cpu().numpy(), test_y.cpu().numpy()
    train, test = scaler.fit_transform(train_z.detach().cpu().numpy()), scaler.transform(test_z.detach().cpu().numpy())
    model = LogisticRegression(solver="saga", C=c, tol=tol, max_iter=max_iter, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(train, train_y)
    loss = log_loss(test_y, model.predict_proba(test), labels=model.classes_)
    return Probe(float(model.score(test, test_y)), float(loss))


@torch.no_grad()
def jacobian_condition_number(encoder: nn.Module, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b"]:
    """log(sigma_1 / sigma_n) of the encoder's Jacobian at each sample (section 3.1): how hard it is to invert there.

    ``encoder`` treats samples apart; it is called in eval mode, and infinity says that a direction is lost altogether.
    """
    training = encoder.training
    encoder.eval()
    try:
        jacobian = torch.func.vmap(torch.func.jacrev(lambda one: encoder(one[None])[0].flatten()))(x)
    finally:
        encoder.train(training)
    sigma = torch.linalg.svdvals(jacobian.flatten(2))
    return sigma[:, 0].log() - sigma[:, -1].log()


@dataclass
class Adversarial:
    """What ``adversarial_linear_training`` leaves beside the encoder."""

    classifier: nn.Linear
    """It followed the encoder through training; for a judgement fit a new one."""
    classifier_losses: list[float] = field(default_factory=list)
    encoder_losses: list[float] = field(default_factory=list)


def uniform_cross_entropy(logits: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    """Cross-entropy of the predictions against the uniform distribution, log K at best: what the adversary minimises."""
    return -logits.log_softmax(1).mean()


def adversarial_linear_training(
    encoder: nn.Module,
    batches: Iterable[tuple[Float[Tensor, "b ..."], Int[Tensor, "b"]]],
    *,
    classes: int = 10,
    warmup: int = 1000,
    steps: int = 4001,
    classifier_steps: int = 10,
    encoder_lr: float = 1e-5,
    classifier_lr: float = 1e-3,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Adversarial:
    """Trains ``encoder`` so that a linear classifier on its features learns nothing (section 3.1, second experiment).

    The classifier trains alone for ``warmup`` steps. Then ``steps`` times: ``classifier_steps`` steps of the classifier
    on the true labels, and one of the encoder towards uniform predictions, all by Adam. ``batches`` yields (x, labels):
    warmup + steps * (classifier_steps + 1) of them. An encoder that is quicker than its classifier fools only that one.

    Raises ``ValueError`` for counts and rates out of range, and where ``batches`` end too early.
    """
    counts = {"classes": (classes, 2), "warmup": (warmup, 0), "steps": (steps, 1), "classifier_steps": (classifier_steps, 1)}  # fmt: skip
    for name, (count, least) in counts.items():
        if count < least:
            raise ValueError(f"{name} is {count}, allowed is {least} or more")
    for name, rate in (("encoder_lr", encoder_lr), ("classifier_lr", classifier_lr)):
        if not 0 < rate < math.inf:
            raise ValueError(f"{name} is {rate}, allowed is above 0")
    source, device = iter(batches), next(encoder.parameters()).device

    def take(count: int) -> list[tuple[Tensor, Tensor]]:
        drawn = list(islice(source, count))
        if len(drawn) < count:
            needed = warmup + steps * (classifier_steps + 1)
            raise ValueError(f"batches ended too early, needed are warmup + steps * (classifier_steps + 1) = {needed}")
        return drawn

    first = take(1)
    source = chain(first, source)
    encoder.train()
    with torch.no_grad():
        z = encoder(first[0][0].to(device))
    classifier = nn.Linear(z.shape[1], classes, device=device, dtype=z.dtype)
    nn.init.xavier_uniform_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    result = Adversarial(classifier)
    of_classifier = torch.optim.Adam(classifier.parameters(), classifier_lr)
    of_encoder = torch.optim.Adam(encoder.parameters(), encoder_lr)

    def train_classifier(count: int) -> None:
        drawn = take(count)
        # The encoder stands still meanwhile: all its features at once.
        with torch.no_grad():
            features = encoder(torch.cat([x for x, _ in drawn]).to(device)).split([len(x) for x, _ in drawn])
        for z, (_, labels) in zip(features, drawn, strict=True):
            loss = F.cross_entropy(classifier(z), labels.to(device))
            of_classifier.zero_grad()
            loss.backward()
            of_classifier.step()
            result.classifier_losses.append(float(loss.detach()))

    for done in range(0, warmup, classifier_steps):
        train_classifier(min(classifier_steps, warmup - done))
    for step in range(steps):
        train_classifier(classifier_steps)
        [(x, _)] = take(1)
        loss = uniform_cross_entropy(classifier(encoder(x.to(device))))
        of_encoder.zero_grad()
        loss.backward()
        of_encoder.step()
        result.encoder_losses.append(float(loss.detach()))
        if on_step is not None:
            on_step(step, steps, result.encoder_losses[-1])
    encoder.eval()
    return result
