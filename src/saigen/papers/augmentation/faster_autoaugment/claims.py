"""Do gradients find the augmentation that is missing, is the found policy worth having, and what does finding it cost?

Two settings. *A gap*: the training images (``source``) stand upright, those to be classified are turned by up to 30 degrees,
and there are few of these with labels (``target``); what augmentation has to fill in is known. *The paper's*: both halves
of every batch come from one training set. Laptop: scikit-learn's digits on 16 pixels and a small convolutional network,
the paper's operations but Color. Real and full: the user's 32-pixel images (CIFAR-10) and Wide-ResNets.

The work of a search is counted in passes: how many images go forward and back through a network. The critic's trunk and
the child networks' are the same, so that a pass is the same work in both.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saigen.data import split
from saigen.data.augmentation import shift_and_flip
from saigen.nn.wide_resnet import WideResNet
from saigen.papers.augmentation.faster_autoaugment import (
    AugmentationPolicy,
    DifferentiablePolicy,
    PolicyCritic,
    PolicySearch,
    apply_operation,
    policy_operations,
)
from saigen.train import accuracy, cosine, fit
from saigen.trial import Trial

DEGREES = 30.0
"""Planted: target images are turned by U(-30, 30), which has a root mean square of 17.3."""


@dataclass(frozen=True)
class Size:
    """One scale. Rates and lengths come from pilots on other seeds; those of the real and full scales are the repository's."""

    source: int
    target: int
    test: int | None
    sub_policies: int
    searches: int
    """From how many initial policies; the results are averaged."""
    search_steps: int
    half: int
    policy_lr: float
    child_steps: int
    batch: int
    lr: float
    sampled: int
    """Policies that the sampled search judges."""
    judge_steps: int
    """Of the child networks that judge; in pilots short trainings judged as well for their passes as full ones."""
    paper_steps: int
    """Of the search in the paper's setting, with its own policy_lr."""
    paper_policy_lr: float
    paper_child_steps: int
    whole: bool = False
    """In the paper's setting the children learn from all training images, not only from those of the search."""
    depth: int = 0
    """Of the Wide-ResNet of the search and of the children that judge; 0 for digits."""
    widen: int = 2


SIZES = {
    "tiny": Size(60, 40, 100, 2, 1, 3, 8, 5e-3, 6, 20, 2e-3, 2, 3, 3, 1e-3, 6),
    "laptop": Size(300, 150, None, 4, 2, 100, 32, 1e-2, 400, 50, 2e-3, 16, 100, 400, 1e-3, 400),
    # the search as in the repository: 4,000 images, 20 epochs of batches of 128
    "real": Size(4_000, 1_000, 5_000, 10, 1, 620, 64, 1e-3, 3_100, 128, 0.1, 8, 1_000, 620, 1e-3, 3_100, depth=16),
    # and the children's training: 200 epochs of 50,000 images
    "full": Size(
        4_000, 1_000, None, 10, 1, 620, 64, 1e-3, 6_200, 128, 0.1, 64, 2_000, 620, 1e-3, 78_000, whole=True, depth=40
    ),
}
Set = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """Training images, the few of the same kind as the test images, test images; the network; the operations."""

    source: Set
    target: Set
    test: Set
    everything: Set
    """What children learn from in the paper's setting."""
    classes: int
    trunk: Callable[[], tuple[nn.Module, int]]
    operations: tuple[str, ...]
    colour: bool


def finds_the_planted_operation(trial: Trial) -> dict[str, float]:
    """One seed, a gap: how much of what the policy applies is rotation, before and after, and by what angle."""
    size, task = SIZES[trial.scale], _gap(trial)
    found = [_search(trial, task, number) for number in range(size.searches)]
    values: dict[str, float] = {}
    for name, policies in {
        "initial": [one.initial for one in found],
        "searched": [one.policy for one in found],
    }.items():
        shares = [policy.operation_shares() for policy in policies]
        parts = [one["Rotate"] / max(sum(one.values()), 1e-12) for one in shares]
        harmful = [one["Invert"] + one["Solarize"] for one in shares]
        values[f"rotation_share_{name}"] = _mean(parts)
        values[f"harmful_share_{name}"] = _mean(harmful)
        values[f"degrees_{name}"] = _mean([_degrees(policy) for policy in policies])
    planted = DEGREES / math.sqrt(3)
    values["share_gained"] = values["rotation_share_searched"] - values["rotation_share_initial"]
    values["angle_error"] = abs(values["degrees_searched"] - planted)
    return values | {"angle_error_initial": abs(values["degrees_initial"] - planted), "distance": found[0].distance}


def costs_less_than_sampling(trial: Trial) -> dict[str, float]:
    """One seed, a gap: the passes of a sampled search that does as well, over those of the search by gradients.

    The sampled search draws policies as the other one's initial policies are drawn, trains a child network with each on
    the source, shortly, and keeps that with the highest accuracy on the target images with labels, which the other search
    uses as its critic's real data. What a policy is worth is the test accuracy of a child trained in full with it; what
    the best of k is worth, the expectation over all choices of k among those that were judged. k is taken where that
    first reaches the policy searched by gradients; at least one, and where it never does, all of them, which is in the
    sampled search's favour.
    """
    size, task = SIZES[trial.scale], _gap(trial)
    children = 0

    def child(policy: AugmentationPolicy | None, data: Set, name: str, steps: int | None = None) -> nn.Module:
        nonlocal children
        children += 1
        trial.progress(children, 2 * size.sampled + size.searches + 2, name)
        return _train(trial, task, data, policy, name, steps)

    none = child(None, task.source, "no policy")
    found = [_search(trial, task, number) for number in range(size.searches)]
    searched = [accuracy(child(one.policy, task.source, f"searched {i}"), *task.test) for i, one in enumerate(found)]
    judged, tested = [], []
    for number in range(size.sampled):
        policy = _initial(trial, task, f"sample {number}").freeze()
        judge = child(policy, task.source, f"judge {number}", size.judge_steps)
        judged.append(accuracy(judge, *task.target))
        tested.append(accuracy(child(policy, task.source, f"sampled {number}"), *task.test))
    both = tuple(torch.cat(parts) for parts in zip(task.source, task.target, strict=True))
    with_target = child(None, both, "source and target")

    best = expected_best(judged, tested)
    quality = _mean(searched)
    needed = policies_needed(best, quality)
    # The target images go through the judged child once, without a way back: a third of a pass each.
    one = size.judge_steps * min(size.batch, len(task.source[0])) + len(task.target[0]) / 3
    return {
        "cost_ratio": needed * one / found[0].passes,
        "gain_over_best_sampled": quality - best[-1],
        "gain_over_random": quality - best[0],
        "policies_needed": needed,
        "never_reached": float(max(best) < quality),
        "passes_gradients": float(found[0].passes),
        "passes_one_sample": one,
        "accuracy_searched": quality,
        "accuracy_none": accuracy(none, *task.test),
        "accuracy_with_target": accuracy(with_target, *task.test),
        "distance": found[0].distance,
    } | {f"accuracy_best_of_{k}": best[k - 1] for k in sorted({1, 2, 4, 8, 16, size.sampled}) if k <= size.sampled}


def searched_policy_gains(trial: Trial) -> dict[str, float]:
    """One seed, the paper's setting: test accuracy with the searched policy over none and over the policies it started from."""
    size, task = SIZES[trial.scale], _one_set(trial)
    steps = size.paper_child_steps
    none = accuracy(_train(trial, task, task.everything, None, "no policy", steps), *task.test)
    arms: dict[str, list[float]] = {"random": [], "searched": []}
    shares = []
    for number in range(size.searches):
        found = _search(trial, task, number, steps=size.paper_steps, policy_lr=size.paper_policy_lr)
        for name, policy in {"random": found.initial, "searched": found.policy}.items():
            network = _train(trial, task, task.everything, policy, f"{name} {number}", steps)
            arms[name].append(accuracy(network, *task.test))
        shares.append(found.policy.operation_shares())
        trial.progress(number + 1, size.searches, "searched")
    means = {f"accuracy_{name}": _mean(values) for name, values in arms.items()}
    applied = {f"share_{name}": _mean([one[name] for one in shares]) for name in sorted(set(task.operations))}
    return {
        "gain_over_none": means["accuracy_searched"] - none,
        "gain_over_random": means["accuracy_searched"] - means["accuracy_random"],
        "accuracy_none": none,
        "distance": found.distance,
    } | means | applied  # fmt: skip


def expected_best(judged: Sequence[float], tested: Sequence[float]) -> list[float]:
    """For k = 1 … K: the mean of ``tested`` of the best by ``judged``, over all choices of k of the K; equals share.

    >>> expected_best([0.1, 0.3, 0.2], [1.0, 3.0, 2.0])
    [2.0, 2.6666666666666665, 3.0]
    """
    order = sorted(range(len(judged)), key=lambda i: -judged[i])
    level = {v: _mean([tested[i] for i in order if judged[i] == v]) for v in set(judged)}
    ranked, count = [level[judged[i]] for i in order], len(order)
    # The r-th is the best of k where the other k - 1 come from those behind it.
    return [
        sum(math.comb(count - 1 - r, k - 1) * value for r, value in enumerate(ranked)) / math.comb(count, k)
        for k in range(1, count + 1)
    ]


def policies_needed(best: Sequence[float], quality: float) -> float:
    """The first k, between whole numbers too, at which ``best`` of k reaches ``quality``; all, where it never does.

    >>> policies_needed([0.5, 0.7, 0.8], 0.75), policies_needed([0.5, 0.7, 0.8], 0.9), policies_needed([0.5, 0.7], 0.4)
    (2.5, 3.0, 1.0)
    """
    if best[0] >= quality:
        return 1.0
    for k, (below, above) in enumerate(pairwise(best), start=1):
        if above >= quality:
            return round(k + (quality - below) / (above - below), 12)
    return float(len(best))


@dataclass(frozen=True)
class Found:
    initial: AugmentationPolicy
    policy: AugmentationPolicy
    passes: int
    distance: float
    """The critic's last estimate, mean D(real) - mean D(augmented)."""


def _initial(trial: Trial, task: Task, purpose: str) -> DifferentiablePolicy:
    count = SIZES[trial.scale].sub_policies
    return DifferentiablePolicy(
        task.operations, num_sub_policies=count, num_chunks=None, generator=trial.generator(purpose)
    )


def _search(trial: Trial, task: Task, number: int, steps: int | None = None, policy_lr: float | None = None) -> Found:
    size = SIZES[trial.scale]
    policy = _initial(trial, task, f"policy {number}").to(trial.device)
    initial = policy.freeze().cpu()
    with trial.seeded(f"critic {number}"):
        critic = PolicyCritic(*task.trunk(), num_classes=task.classes).to(trial.device)
    search = PolicySearch(policy, critic, policy_lr=policy_lr or size.policy_lr)
    generator = trial.generator(f"search {number}")
    steps = steps or size.search_steps
    for step in range(steps):
        halves = []
        for x, y in (task.source, task.target):
            rows = torch.randint(len(x), (size.half,), generator=generator)
            halves.append((_unit(x[rows]).to(trial.device), y[rows].to(trial.device)))
        losses = search.step(*halves, generator=generator)
        if step % 50 == 0:
            trial.progress(step, steps, f"search {number}")
    return Found(initial, policy.freeze().cpu(), search.passes, losses.distance)


def _train(
    trial: Trial, task: Task, data: Set, policy: AugmentationPolicy | None, name: str, steps: int | None = None
) -> nn.Module:
    """A child network; all children of a seed share the first weights and the order of the images."""
    size = SIZES[trial.scale]
    with trial.seeded("child"):
        trunk, features = task.trunk()
        network = nn.Sequential(_Centre(), trunk, nn.Linear(features, task.classes))

    def transform(generator: torch.Generator, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = _unit(x)
        x = x if policy is None else policy(x, generator=generator)
        # The basic augmentation of photographs, in every arm.
        return shift_and_flip(generator, x, y) if task.colour else (x, y)

    if size.depth:
        optimizer = torch.optim.SGD(network.parameters(), size.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    else:
        optimizer = torch.optim.Adam(network.parameters(), size.lr)
    fit(
        network, lambda net, x, y: F.cross_entropy(net(x), y), data, optimizer=optimizer, steps=steps or size.child_steps,
        batch_size=size.batch, seed=trial.seed, schedule=cosine(), transform=transform, device=trial.device,
        checkpoint=trial.checkpoint(name),
    )  # fmt: skip
    return network


class _Centre(nn.Module):
    """Images in [0, 1], or bytes, to [-1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * _unit(x) - 1


def _unit(x: Tensor) -> Tensor:
    return x.float() / 255 if x.dtype == torch.uint8 else x


def _degrees(policy: AugmentationPolicy) -> float:
    """The root mean square of the angle by which an image is turned in all stages together."""
    place = policy.operations.index("Rotate")
    often = (policy.choice * policy.probabilities)[..., place]
    return (often * (30 * policy.magnitudes[..., place]).square()).sum(1).mean().sqrt().item()


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# Data


def _gap(trial: Trial) -> Task:
    """Source images as they are, target and test images turned by U(-30, 30)."""
    task = _task(trial)
    generator = trial.generator("angles")

    def turned(part: Set) -> Set:
        x, y = part
        angles = (2 * torch.rand(len(x), generator=generator) - 1) * DEGREES
        pieces = zip(x.split(500), angles.split(500), strict=True)
        x = torch.cat([_as(apply_operation("Rotate", _unit(piece), angle), x) for piece, angle in pieces])
        return x, y

    return replace(task, target=turned(task.target), test=turned(task.test))


def _one_set(trial: Trial) -> Task:
    """The paper's setting: what is augmented and what is not come from the same images.

    Digits are turned by up to 25 degrees and moved by up to 2 of 16 pixels once and for all, in training and test data
    alike, so that there is something for augmentation to fill in.
    """
    task = _task(trial)
    if task.colour:
        return replace(task, target=task.source)
    generator = trial.generator("nuisance")

    def moved(part: Set) -> Set:
        x, y = part
        angle, right, down = 2 * torch.rand(3, len(x), generator=generator) - 1
        for name, argument in (("Rotate", 25 * angle), ("TranslateX", right / 8), ("TranslateY", down / 8)):
            x = apply_operation(name, x, argument)
        return x, y

    source = moved(task.source)
    return replace(task, source=source, target=source, test=moved(task.test), everything=source)


def _as(x: Tensor, like: Tensor) -> Tensor:
    return (255 * x).round().to(torch.uint8) if like.dtype == torch.uint8 else x


def _task(trial: Trial) -> Task:
    size = SIZES[trial.scale]
    if not size.depth:
        data = trial.data("digits")
        test = len(data.y) - size.source - size.target if size.test is None else size.test
        parts = split(data.y, (size.source, size.target, test), trial.rng("split"))
        x = F.interpolate(data.x, (16, 16), mode="bilinear", align_corners=False)
        # Colour means nothing on grey images.
        operations = tuple(name for name in policy_operations("paper") if name != "Color")
        sets = [(x[part], data.y[part]) for part in parts]
        return Task(*sets, sets[0], 10, _digit_trunk, operations, colour=False)
    pool = trial.data("images", size=32, limit=None if size.whole else 3 * (size.source + size.target))
    test_part = trial.data("images", size=32, part="test", limit=size.test)
    source, target = split(pool.y, (size.source, size.target), trial.rng("split"))
    sets = [(pool.x[source], pool.y[source]), (pool.x[target], pool.y[target]), (test_part.x, test_part.y)]
    everything = (pool.x, pool.y) if size.whole else sets[0]
    return Task(
        *sets, everything, len(pool.classes), lambda: _wide_trunk(size), policy_operations("paper"), colour=True
    )


def _digit_trunk() -> tuple[nn.Module, int]:
    layers = [nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(512, 64), nn.ReLU()), 64


def _wide_trunk(size: Size) -> tuple[nn.Module, int]:
    network = WideResNet(num_classes=0, filters=16 * size.widen, repeat=(size.depth - 4) // 6, momentum=0.1)
    return network, network.num_features
