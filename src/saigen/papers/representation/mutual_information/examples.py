"""Small instances of the room's public components."""

from collections.abc import Iterator

import torch
from torch import Tensor

from saigen.example import Example
from saigen.papers.representation.mutual_information import (
    BilinearCritic,
    ConcatCritic,
    ConvEncoder,
    Coupling,
    CouplingFlow,
    InfoMax,
    InfoMaxLoss,
    InnerProductCritic,
    MapNorm,
    MLPEncoder,
    ResidualMLP,
    SeparableCritic,
    adversarial_linear_training,
    dependent_pairs,
    gaussian_divergence,
    gaussian_mi,
    gaussian_pairs,
    gaussian_rho,
    gaussian_scores,
    halves,
    infonce_bound,
    jacobian_condition_number,
    linear_probe,
    mi_bound,
    n_pair_loss,
    nwj_bound,
    tuba_bound,
)

TRAIN = """
import torch
from saigen.papers.representation.mutual_information import BilinearCritic, ConvEncoder, InfoMax, InfoMaxLoss, halves, linear_probe

images, labels = torch.rand(128, 28, 28), torch.arange(128) % 10
model, loss = InfoMax(ConvEncoder(), ConvEncoder(), BilinearCritic(100)), InfoMaxLoss("infonce")  # or pinned: target=2.0
optimizer = torch.optim.Adam(model.parameters(), 1e-4)
for step in range(2):
    optimizer.zero_grad()
    loss(model(*halves(images))).backward()
    optimizer.step()

with torch.no_grad():
    features = model.g1(halves(images)[0])
print(linear_probe(features[:96], labels[:96], features[96:], labels[96:]))
"""

FLOW = """
import torch
from saigen.papers.representation.mutual_information import CouplingFlow, adversarial_linear_training, linear_probe

x, y = torch.rand(64, 16), torch.arange(64) % 4
flow = CouplingFlow(16, n_couplings=4, hidden=(32, 32), scale=True)
batches = ((x[chosen], y[chosen]) for chosen in (torch.randint(64, (32,)) for _ in range(20 + 5 * 11)))
adversarial_linear_training(flow, batches, classes=4, warmup=20, steps=5, encoder_lr=1e-4)
with torch.no_grad():
    z = flow(x)
    print(linear_probe(z[:48], y[:48], z[48:], y[48:]))       # by a new classifier
    print((flow.inverse(z) - x).abs().max())                  # nothing is lost
"""

CONDITION = """
import torch
from saigen.papers.representation.mutual_information import ResidualMLP, jacobian_condition_number

print(jacobian_condition_number(ResidualMLP(16), torch.rand(8, 16)))      # near 0: still the identity
"""

CRITICS = """
import torch
from saigen.papers.representation.mutual_information import BilinearCritic, ConcatCritic, InnerProductCritic, SeparableCritic, mi_bound

x, y = torch.randn(2, 8, 100)
for critic in (InnerProductCritic(), BilinearCritic(), SeparableCritic(), ConcatCritic()):
    print(type(critic).__name__, mi_bound(critic(x, y), "infonce"))       # (8, 8) scores: never above log 8
"""

GAUSSIANS = """
import torch
from saigen.papers.representation.mutual_information import gaussian_mi, gaussian_pairs, gaussian_rho, gaussian_scores, infonce_bound, nwj_bound

rho = gaussian_rho(2.0, dim=4)                                # 2 nats in 4 dimensions
scores = gaussian_scores(*gaussian_pairs(128, 4, rho), rho)   # the best critic there is
print(gaussian_mi(rho, 4), infonce_bound(scores), nwj_bound(1 + scores))
"""

DEPENDENT = """
import torch
from saigen.papers.representation.mutual_information import dependent_pairs, gaussian_divergence, gaussian_mi

x, y = dependent_pairs(128, generator=torch.Generator().manual_seed(0))   # one z for the whole batch
print(gaussian_mi(0.2), "is the truth,", gaussian_divergence(0.2, -0.25), "what I_NWJ can say")
"""

PAIRS = {"samples_independent_in_eval": "scores are of all pairs of a batch"}


def scores(generator: torch.Generator) -> tuple[Tensor]:
    """Scores of six pairs."""
    return (torch.randn(6, 6, generator=generator).requires_grad_(),)


def features(generator: torch.Generator, dim: int = 6) -> tuple[Tensor, Tensor]:
    """Five features of each view."""
    return torch.randn(5, dim, generator=generator), torch.randn(5, dim, generator=generator)


def examples() -> Iterator[Example]:
    """Losses, encoders, critics, and what judges them."""
    for estimator, target in (("infonce", None), ("nwj", None), ("infonce", 2.0), ("nwj", 4.0)):
        yield Example(
            name=f"InfoMaxLoss, {estimator}" + (f", pinned at {target:.0f}" if target else ""),
            kind="loss",
            make=lambda estimator=estimator, target=target: InfoMaxLoss(estimator, target=target),
            inputs=scores,
            code=TRAIN,
            wrong=(
                (lambda: InfoMaxLoss("mine"), "estimator is 'mine'"),
                (lambda: InfoMaxLoss(target=-1.0), "target is -1.0"),
                (lambda: infonce_bound(torch.zeros(2, 3)), "scores has shape (2, 3)"),
                (lambda: nwj_bound(torch.zeros(1, 1)), "scores has shape (1, 1)"),
                (lambda: n_pair_loss(torch.zeros(1, 1)), "scores has shape (1, 1)"),
                (lambda: tuba_bound(torch.zeros(3, 3), torch.zeros(2)), "log_baseline has shape (2,)"),
                (lambda: mi_bound(torch.zeros(3, 3), "js"), "estimator is 'js'"),
            ),
            batch=None,
        )
    yield Example(
        name="InfoMax",
        kind="module",
        make=lambda: InfoMax(MLPEncoder(8, (16, 6)), MLPEncoder(8, (16, 6)), BilinearCritic(6)),
        inputs=lambda g: features(g, 8),
        code=TRAIN,
        expected_failures=PAIRS,
    )
    yield Example(
        name="MLPEncoder",
        kind="module",
        make=lambda: MLPEncoder(8, (16, 6)),
        inputs=lambda g: features(g, 8)[:1],
        code=TRAIN,
        wrong=((lambda: MLPEncoder(0), "dim is 0"), (lambda: MLPEncoder(8, ()), "widths is ()")),
    )
    yield Example(
        name="ConvEncoder",
        kind="module",
        make=lambda: ConvEncoder((4, 8), channels=4, dim_out=6),
        inputs=lambda g: features(g, 32)[:1],
        code=TRAIN,
        wrong=(
            (lambda: ConvEncoder(channels=0), "channels is 0"),
            (lambda: ConvEncoder((4, 8))(torch.zeros(2, 30)), "x has 30 pixels"),
            (lambda: halves(torch.zeros(2, 7, 8)), "images has shape (2, 7, 8)"),
        ),
    )
    yield Example(
        name="MapNorm",
        kind="module",
        make=lambda: MapNorm(3),
        inputs=lambda g: (torch.randn(5, 3, 4, 4, generator=g),),
        code="""import torch
from saigen.papers.representation.mutual_information import MapNorm

print(MapNorm(3)(torch.rand(2, 3, 4, 4)).mean((1, 2, 3)))""",
        wrong=((lambda: MapNorm(0), "channels is 0"),),
    )
    yield Example(
        name="ResidualMLP",
        kind="module",
        make=lambda: ResidualMLP(8, 3),
        inputs=lambda g: features(g, 8)[:1],
        code=CONDITION,
        wrong=((lambda: ResidualMLP(8, 0), "layers is 0"),),
    )
    for scale in (False, True):
        yield Example(
            name=f"CouplingFlow, {'RealNVP' if scale else 'NICE'}",
            kind="module",
            make=lambda scale=scale: CouplingFlow(7, 3, (16,), scale=scale),
            inputs=lambda g: features(g, 7)[:1],
            code=FLOW,
            wrong=(
                (lambda: CouplingFlow(1), "dim is 1"),
                (lambda: CouplingFlow(8, 0), "n_couplings is 0"),
                (lambda: CouplingFlow(8, hidden=()), "hidden is ()"),
                (lambda: CouplingFlow(8, 1, (4,))(torch.zeros(2, 6)), "x has 6 dimensions"),
            ),
        )
    yield Example(
        name="Coupling",
        kind="module",
        make=lambda: Coupling(6, (8,), scale=True),
        inputs=lambda g: features(g)[:1],
        code="""import torch
from saigen.papers.representation.mutual_information import Coupling

coupling, x = Coupling(6, (8,), scale=True), torch.rand(2, 6)
z, log_det = coupling(x)
print((coupling.inverse(z) - x).abs().max(), log_det)""",
        wrong=((lambda: Coupling(1), "dim is 1"), (lambda: Coupling(6, (0,)), "hidden is (0,)")),
    )
    critics = {
        "InnerProductCritic": (InnerProductCritic, ()),
        "BilinearCritic": (lambda: BilinearCritic(6), ((lambda: BilinearCritic(0), "dim is 0"),)),
        "SeparableCritic": (
            lambda: SeparableCritic(6, 8, 4),
            ((lambda: SeparableCritic(6, layers=0), "layers is 0"), (lambda: SeparableCritic(6, 0), "hidden is 0")),
        ),
        "ConcatCritic": (lambda: ConcatCritic(6, 8, layers=2), ((lambda: ConcatCritic(0), "dim_in is 0"),)),
    }
    for name, (make, wrong) in critics.items():
        yield Example(
            name=name, kind="module", make=make, inputs=features, code=CRITICS, wrong=wrong, expected_failures=PAIRS
        )
    yield Example(
        name="gaussian_scores",
        kind="function",
        make=lambda: lambda x, y: gaussian_scores(x, y, 0.5),
        inputs=features,
        code=GAUSSIANS,
        wrong=(
            (lambda: gaussian_scores(torch.zeros(2, 3), torch.zeros(2, 4), 0.5), "x and y have 3 and 4 dimensions"),
            (lambda: gaussian_mi(1.0), "rho is 1.0"),
            (lambda: gaussian_mi(0.5, 0), "dim is 0"),
            (lambda: gaussian_rho(-1.0), "mi is -1.0"),
            (lambda: gaussian_pairs(0, 2, 0.5), "count is 0"),
        ),
        batch=None,
    )
    yield Example(
        name="dependent_pairs",
        kind="function",
        make=lambda: lambda generator: dependent_pairs(8, generator=generator),
        inputs=lambda g: (g,),
        code=DEPENDENT,
        wrong=(
            (lambda: dependent_pairs(0), "count is 0"),
            (lambda: dependent_pairs(4, shared=-1.0), "shared is -1.0"),
            (lambda: dependent_pairs(4, own=1.0), "own is 1.0"),
            (lambda: gaussian_divergence(0.5, 1.5), "rho_negatives is 1.5"),
        ),
        batch=None,
    )
    yield Example(
        name="jacobian_condition_number",
        kind="function",
        make=lambda: lambda x: jacobian_condition_number(ResidualMLP(6).double(), x.double()),
        inputs=lambda g: features(g)[:1],
        code=CONDITION,
        batch=None,
        expected_failures={"global_rng_untouched": "the encoder that it looks at draws its weights"},
    )
    yield Example(
        name="linear_probe",
        kind="function",
        make=lambda: linear_probe,
        inputs=lambda g: (*_labelled(g, 40), *_labelled(g, 20)),
        code=TRAIN,
        wrong=(
            (lambda: linear_probe(*_labelled(None, 9), *_labelled(None, 9), c=0.0), "c is 0.0"),
            (lambda: linear_probe(*_labelled(None, 9), *_labelled(None, 9), tol=-1.0), "tol is -1.0"),
        ),
        batch=None,
    )
    yield Example(
        name="adversarial_linear_training",
        kind="function",
        make=lambda: _adversarial,
        inputs=lambda g: _labelled(g, 12),
        code=FLOW,
        wrong=(
            (lambda: _adversarial(*_labelled(None, 6), classes=1), "classes is 1"),
            (lambda: _adversarial(*_labelled(None, 6), warmup=-1), "warmup is -1"),
            (lambda: _adversarial(*_labelled(None, 6), steps=0), "steps is 0"),
            (lambda: _adversarial(*_labelled(None, 6), classifier_steps=0), "classifier_steps is 0"),
            (lambda: _adversarial(*_labelled(None, 6), encoder_lr=0.0), "encoder_lr is 0.0"),
            (lambda: _adversarial(*_labelled(None, 6), steps=3), "batches ended too early"),
        ),
        batch=None,
        expected_failures={"global_rng_untouched": "encoder and classifier draw their weights"},
    )


def _labelled(generator: torch.Generator | None, count: int) -> tuple[Tensor, Tensor]:
    y = torch.arange(count) % 3
    return torch.randn(count, 4, generator=generator) + y[:, None], y


def _adversarial(x: Tensor, y: Tensor, **options: object) -> Tensor:
    encoder = CouplingFlow(4, 2, (8,))
    options = {"classes": 3, "warmup": 2, "steps": 2, "classifier_steps": 2} | options
    adversarial_linear_training(encoder, ((x, y) for _ in range(8)), **options)
    return encoder(x)
