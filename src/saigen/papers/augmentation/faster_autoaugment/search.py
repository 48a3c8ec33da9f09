"""The search: a Wasserstein critic that is also a classifier, and the policy against it (section 3.3).

Half of a batch, A, is augmented and the other, N, left as it is. In turn

    critic and classifier:  min  lambda_cls CE(N) - mean D(N) + mean D(policy(A)) + lambda_gp GP
    policy:                 min  lambda_cls CE(policy(A)) - mean D(policy(A))

so that what the policy makes can be told neither from the data nor from its class.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from saigen.papers.augmentation.faster_autoaugment.transform import DifferentiablePolicy

GP_NORMS = ("flatten", "channel")
Batch = tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"]]


class PolicyCritic(nn.Module):
    """A classifier and a critic on one trunk: images (b, c, h, w) in [0, 1] to logits (b, n) and scores (b,).

    ``trunk`` takes images less ``mean`` over ``std`` (in [-1, 1] with the paper's 0.5) to (b, ``num_features``). The heads
    are linear, and linear-ReLU-linear of the same width.

    >>> critic = PolicyCritic(nn.Flatten(), 12, num_classes=5)
    >>> [part.shape for part in critic(torch.rand(2, 3, 2, 2))]
    [torch.Size([2, 5]), torch.Size([2])]
    """

    def __init__(
        self, trunk: nn.Module, num_features: int, num_classes: int, *, mean: float = 0.5, std: float = 0.5
    ) -> None:
        super().__init__()
        for name, value in {"num_features": num_features, "num_classes": num_classes}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}, allowed is {name} >= 1")
        if not std > 0:
            raise ValueError(f"std is {std}, allowed is std > 0")
        self.trunk, self.mean, self.std = trunk, mean, std
        self.classifier = nn.Linear(num_features, num_classes)
        self.critic = nn.Sequential(nn.Linear(num_features, num_features), nn.ReLU(), nn.Linear(num_features, 1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n"], Float[Tensor, " b"]]:
        return self.of_normalised(self.normalise(x))

    def normalise(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return (x - self.mean) / self.std

    def of_normalised(self, z: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n"], Float[Tensor, " b"]]:
        """Logits and scores of images that the trunk can take as they are."""
        features = self.trunk(z)
        return self.classifier(features), self.critic(features)[:, 0]


def gradient_penalty(
    critic: PolicyCritic,
    real: Float[Tensor, "b c h w"],
    fake: Float[Tensor, "b c h w"],
    *,
    norm: str = "flatten",
    share: Float[Tensor, " b"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """mean (||dD/dz|| - 1)^2 at z = a real + (1 - a) fake, a ~ U(0, 1) an image (``share``, where it is given).

    z are normalised images. ``"flatten"`` takes one norm an image (Gulrajani et al., 2017), ``"channel"`` one a pixel over
    its channels, which is what the repository does.
    """
    if norm not in GP_NORMS:
        raise ValueError(f"norm is {norm!r}, allowed are {', '.join(GP_NORMS)}")
    if share is None:
        share = torch.rand(len(real), generator=generator)
    share = share.to(real).view(-1, 1, 1, 1)
    z = critic.normalise(share * real + (1 - share) * fake).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic.of_normalised(z)[1].sum(), z, create_graph=True)
    length = gradient.flatten(1).norm(dim=1) if norm == "flatten" else gradient.norm(dim=1)
    return (length - 1).square().mean()


class SearchLosses(NamedTuple):
    """Of one step: the classifier on clean images, the critic's estimate of the distance, the penalty, the policy's two."""

    classification: float
    distance: float
    penalty: float
    policy_classification: float
    policy_score: float


class PolicySearch:
    """Searches ``policy`` against ``critic``, a step at a time.

    Adam with ``lr`` for the critic and ``policy_lr`` for the policy. ``passes`` counts the work: how many images have gone
    forward and back through the critic (its batch of each kind once, the penalty's twice, for it is differentiated twice).
    ``state_dict`` holds all that a search needs to go on. Raises ``ValueError`` for weights below 0 and unknown norms.
    """

    def __init__(
        self,
        policy: DifferentiablePolicy,
        critic: PolicyCritic,
        *,
        cls_weight: float = 0.1,
        gp_weight: float = 10.0,
        gp_norm: str = "flatten",
        lr: float = 1e-3,
        policy_lr: float = 1e-3,
        betas: tuple[float, float] = (0.0, 0.999),
    ) -> None:
        for name, value in {"cls_weight": cls_weight, "gp_weight": gp_weight}.items():
            if not value >= 0:
                raise ValueError(f"{name} is {value}, allowed is {name} >= 0")
        if gp_norm not in GP_NORMS:
            raise ValueError(f"gp_norm is {gp_norm!r}, allowed are {', '.join(GP_NORMS)}")
        self.policy, self.critic = policy, critic
        self.cls_weight, self.gp_weight, self.gp_norm = cls_weight, gp_weight, gp_norm
        self.critic_optimizer = torch.optim.Adam(critic.parameters(), lr, betas)
        self.policy_optimizer = torch.optim.Adam(policy.parameters(), policy_lr, betas)
        self.passes = 0

    def step(self, augmented: Batch, real: Batch, *, generator: torch.Generator | None = None) -> SearchLosses:
        """One update of the critic and one of the policy; ``augmented`` is what the policy works on."""
        (x_a, y_a), (x_n, y_n) = augmented, real
        if len(x_a) != len(x_n) or len(x_a) == 0:
            raise ValueError(
                f"augmented has {len(x_a)} images and real {len(x_n)}, allowed are equally many, at least 1"
            )
        self.policy.train()
        self.critic.train().requires_grad_(True)
        with torch.no_grad():
            fake = self.policy(x_a, generator=generator)
        logits, scores = self.critic(x_n)
        classification = F.cross_entropy(logits, y_n)
        distance = scores.mean() - self.critic(fake)[1].mean()
        penalty = gradient_penalty(self.critic, x_n, fake, norm=self.gp_norm, generator=generator)
        self.critic_optimizer.zero_grad()
        (self.cls_weight * classification - distance + self.gp_weight * penalty).backward()
        self.critic_optimizer.step()

        self.critic.requires_grad_(False)
        logits, scores = self.critic(self.policy(x_a, generator=generator))
        policy_classification, policy_score = F.cross_entropy(logits, y_a), scores.mean()
        self.policy_optimizer.zero_grad()
        (self.cls_weight * policy_classification - policy_score).backward()
        self.policy_optimizer.step()
        self.policy.project_()
        self.critic.requires_grad_(True)
        self.passes += 5 * len(x_a)
        parts = (classification, distance, penalty, policy_classification, policy_score)
        return SearchLosses(*(part.item() for part in parts))

    def state_dict(self) -> dict[str, Any]:
        """The policy, the critic, both optimizers and the count of passes."""
        parts = ("policy", "critic", "critic_optimizer", "policy_optimizer")
        return {name: getattr(self, name).state_dict() for name in parts} | {"passes": self.passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("policy", "critic", "critic_optimizer", "policy_optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.passes = state["passes"]


def search_policy(
    policy: DifferentiablePolicy,
    critic: PolicyCritic,
    loader: Iterable[Batch],
    *,
    epochs: int = 20,
    generator: torch.Generator | None = None,
    on_step: Callable[[int, SearchLosses], None] | None = None,
    **settings: Any,
) -> PolicySearch:
    """The paper's search: every batch of ``loader`` is halved, the first half augmented, for ``epochs`` passes over it.

    ``loader`` gives images in [0, 1] and labels; ``settings`` are those of ``PolicySearch``. The policy is changed in place;
    the search is returned, with its ``passes``. Raises ``ValueError`` for a batch of one image and for an empty loader.
    """
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}, allowed is epochs >= 1")
    search, step = PolicySearch(policy, critic, **settings), 0
    for _ in range(epochs):
        for x, y in loader:
            half = len(x) // 2
            if half == 0:
                raise ValueError("loader gave a batch of one image, allowed are two or more: one half is augmented")
            losses = search.step((x[:half], y[:half]), (x[half : 2 * half], y[half : 2 * half]), generator=generator)
            if on_step is not None:
                on_step(step, losses)
            step += 1
    if step == 0:
        raise ValueError("loader is empty, allowed is one batch or more")
    return search
