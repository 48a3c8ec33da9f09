"""Small instances of AdvProp's parts."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from saigen.example import Example, Part, Recipe
from saigen.papers.vision.advprop import (
    AdvProp,
    Attack,
    auxiliary_parameters,
    convert_auxiliary_bn,
    strip_auxiliary_bn,
    tf_efficientnet_b0_ap,
    use_branch,
)

TRAINING_CODE = """
import torch
from saigen.papers.vision.advprop import AdvProp, Attack, convert_auxiliary_bn, strip_auxiliary_bn

model = torch.nn.Sequential(                      # any network with batch norms
    torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
    torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 10),
)
convert_auxiliary_bn(model)
loss = AdvProp(Attack(eps=4))                     # PGD of 5 steps; eps is in levels of 255, images are in [0, 1]
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
images, labels = torch.rand(16, 3, 32, 32), torch.randint(0, 10, (16,))
for _ in range(3):
    optimizer.zero_grad()
    loss(model, images, labels).backward()
    optimizer.step()
strip_auxiliary_bn(model).eval()                  # what is deployed: the plain network
"""

FINE_CODE = """
import torch
from saigen.papers.augmentation.randaugment import RandAugment
from saigen.papers.vision.advprop import AdvProp, Attack, convert_auxiliary_bn

model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.Linear(7200, 10))
convert_auxiliary_bn(model, auxiliary=3)          # clean images, augmented ones, a weak and a strong attack
loss = AdvProp(RandAugment(2, 9), Attack(eps=1), Attack(eps=4))
terms = loss.terms(model, torch.rand(8, 3, 32, 32), torch.randint(0, 10, (8,)))
print([part.item() for part in terms.parts])
"""

ATTACK_CODE = """
import torch
from saigen.papers.vision.advprop import Attack

model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
for attack in (Attack(eps=4), Attack(eps=1), Attack(eps=4, kind="i-fgsm"), Attack(eps=4, kind="gd")):
    print(attack.kind, attack.steps, (attack(model, images, labels) - images).abs().max().item() * 255)
"""

MODEL_CODE = """
import torch
import saigen

model = saigen.create_model("tf_efficientnet_b0_ap", num_classes=10).eval()
images = torch.rand(2, 3, 224, 224)
print(model((images - 0.5) / 0.5).shape, model.default_cfg["mean"], model.default_cfg["std"])
"""


def _net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 4),
    )


def _step(generator: torch.Generator) -> tuple[Any, ...]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = convert_auxiliary_bn(_net())
    x = torch.rand(6, 3, 8, 8, generator=generator)
    y = torch.randint(0, 4, (6,), generator=generator)
    return net, x, y, torch.Generator().manual_seed(0)


def examples() -> Iterator[Example]:
    yield Example(
        name="convert_auxiliary_bn",
        kind="module",
        make=lambda: convert_auxiliary_bn(_net()),
        inputs=lambda generator: (torch.rand(2, 3, 8, 10, generator=generator),),
        code=TRAINING_CODE,
        wrong=(
            (lambda: convert_auxiliary_bn(_net(), 0), "auxiliary"),
            (lambda: convert_auxiliary_bn(nn.Linear(2, 2)), "batch norms"),
            (lambda: use_branch(_net(), 1).__enter__(), "branch"),
        ),
    )
    yield Example(
        name="strip_auxiliary_bn",
        kind="module",
        make=lambda: strip_auxiliary_bn(convert_auxiliary_bn(_net())),
        inputs=lambda generator: (torch.rand(2, 3, 8, 10, generator=generator),),
        code=FINE_CODE,
        wrong=((lambda: auxiliary_parameters([8], 0), "auxiliary"),),
    )
    yield Example(
        name="attack",
        kind="function",
        make=lambda: Attack(eps=4),
        inputs=_step,
        code=ATTACK_CODE,
        wrong=(
            (lambda: Attack(eps=-1), "eps"),
            (lambda: Attack(steps=0), "steps"),
            (lambda: Attack(kind="cw"), "kind"),
            (lambda: Attack(std=(0.0,)), "std"),
        ),
        batch=None,
    )
    yield Example(
        name="adv_prop",
        kind="function",
        make=lambda: AdvProp(Attack(eps=1)),
        inputs=_step,
        code=MODEL_CODE,
        wrong=((lambda: tf_efficientnet_b0_ap(in_chans=0), "in_chans"),),
        batch=None,
    )


def parts() -> Iterator[Part]:
    yield Part("AdvProp", "method", _advprop)


def _advprop(recipe: Recipe) -> Recipe:
    return replace(
        recipe, model=convert_auxiliary_bn(copy.deepcopy(recipe.model)), loss=AdvProp(Attack(eps=8, steps=1))
    )
