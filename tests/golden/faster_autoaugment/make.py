"""Makes ``official.npz`` beside it with the official code (moskomule/dda): operations, a policy's pass, a search's step.

Run as ``python tests/golden/faster_autoaugment/make.py PATH``, where PATH is a checkout. The repository asks for any kornia
from 0.2 on; with a current one its functions have moved, and are put back where it looks for them. Its randomness is
replaced by noise and signs that are written to the file, so that the same can be drawn elsewhere. homura and hydra,
which only run its loops, are stood in for by empty modules.
"""

import math
import random
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn

L, K, BATCH, SIDE, CHUNKS = 2, 2, 2, 6, 2
NAMES = (
    "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "hflip", "invert", "solarize", "posterize", "contrast",
    "saturate", "brightness", "sharpness", "auto_contrast", "equalize",
)  # fmt: skip
SCALES = {"shear_x": 0.3, "shear_y": 0.3, "translate_x": 0.45, "translate_y": 0.45, "rotate": 30.0}


def trunk() -> nn.Module:
    """With the attribute ``fc`` that the repository replaces."""
    net = nn.Sequential()
    net.add_module("conv", nn.Conv2d(3, 4, 3, stride=2, padding=1))
    net.add_module("act", nn.Softplus())
    net.add_module("flat", nn.Flatten())
    net.add_module("fc", nn.Linear(36, 5))
    return net


def load(path: Path) -> None:
    import kornia

    for name in ("shear", "translate", "rotate"):
        setattr(kornia, name, getattr(kornia.geometry.transform, name))
    for name in ("homura", "homura.vision", "hydra"):
        sys.modules[name] = types.ModuleType(name)
    homura, vision = sys.modules["homura"], sys.modules["homura.vision"]
    homura.trainers = types.SimpleNamespace(TrainerBase=object)
    homura.TensorMap, homura.optim, homura.callbacks = dict, None, None
    vision.DATASET_REGISTRY = None
    sys.modules["hydra"].main = lambda path: lambda function: function
    utils = types.ModuleType("utils")
    utils.Config, utils.MODEL_REGISTRY = object, None
    sys.modules["utils"] = utils
    sys.path[:0] = [str(path), str(path / "faster_autoaugment")]


class Chance:
    """Gives the official code the noise, signs and sub-policies that the file will hold."""

    def __init__(self, generator: torch.Generator, operations: list[nn.Module]) -> None:
        n = len(operations)
        self.sub_policies = torch.arange(CHUNKS).flip(0) % L
        self.noise = torch.randn(K, BATCH, n, generator=generator)
        self.signs = 2.0 * torch.randint(2, (K, BATCH, n), generator=generator) - 1
        self.signed = [op.flip_magnitude for op in operations]
        self.start()

    def start(self) -> None:
        piece = BATCH // CHUNKS
        places = [(c, k, i) for c in range(CHUNKS) for k in range(K) for i in range(len(self.signed))]
        cut = [slice(c * piece, (c + 1) * piece) for c in range(CHUNKS)]
        self.gates = iter([self.noise[k, cut[c], i] for c, k, i in places])
        self.turns = iter([self.signs[k, cut[c], i] for c, k, i in places if self.signed[i]])
        self.choices = iter(self.sub_policies.tolist())

    def install(self) -> None:
        import dda.operations as operations

        chance = self

        class Relaxed:
            def __init__(self, temperature, probability):
                self.temperature, self.probability = temperature, probability

            def rsample(self, size):
                noise = next(chance.gates).view(*size, 1)
                return ((self.probability.logit() + noise) / self.temperature).sigmoid()

        operations.RelaxedBernoulli = Relaxed
        operations.torch = _Torch(chance)
        random.randrange = lambda count: next(chance.choices)


class _Torch:
    """torch, but for the signs."""

    def __init__(self, chance: Chance) -> None:
        self.chance = chance

    def __getattr__(self, name):
        return getattr(torch, name)

    def randint(self, high, size, **options):
        return (next(self.chance.turns) + 1) / 2


def main(path: Path) -> None:
    """Asks the official code and writes its answers."""
    load(path)
    import policy as official
    import search as official_search
    from dda import functional

    generator = torch.Generator().manual_seed(0)
    answers: dict[str, torch.Tensor] = {}

    # Operations: values, and gradients of the sum of squares, on levels and on what lies between them.
    levels = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), generator=generator) / 255
    between = 0.1 + 0.7 * torch.rand(BATCH, 3, SIDE, SIDE, generator=generator)
    magnitude = torch.tensor([0.15, 0.65])
    answers |= {"levels": levels, "between": between, "magnitude": magnitude}
    for kind, images in (("levels", levels), ("between", between)):
        for name in NAMES:
            x, mu = images.clone().requires_grad_(), magnitude.clone().requires_grad_()
            sign = 1.0 if name in ("solarize", "posterize") else torch.tensor([1.0, -1.0])
            sized = name not in ("hflip", "invert", "auto_contrast", "equalize")
            out = getattr(functional, name)(x, mu * sign * SCALES.get(name, 1.0) if sized else None)
            gradients = torch.autograd.grad(out.square().sum(), (x, mu), allow_unused=True)
            answers[f"{kind}/{name}"] = out.detach()
            for what, gradient in zip(("x", "mu"), gradients, strict=True):
                if gradient is not None and (what, kind) != ("x", "levels"):
                    answers[f"{kind}/{name}/{what}"] = gradient

    # Large enough for Equalize to spread anything.
    answers["large"] = (torch.randint(0, 200, (1, 1, 24, 24), generator=generator) / 255).square()
    answers["large/equalize"] = functional.equalize(answers["large"])

    # A policy's pass with gradients, and the state dict.
    torch.manual_seed(1)
    policy = official.Policy.faster_auto_augment_policy(L, 0.05, K, CHUNKS).train()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.8).add_(0.1)
        for key, parameter in policy.named_parameters():
            if key.endswith("_weights"):
                parameter.mul_(0.3)  # mixtures of several operations
    answers |= {f"policy/{key}": value.clone() for key, value in policy.state_dict().items()}
    operations = list(policy.sub_policies[0].stages[0].operations)
    chance = Chance(generator, operations)
    chance.install()
    answers |= {"sub_policies": chance.sub_policies, "noise": chance.noise, "signs": chance.signs}
    out = policy(between.clone())
    answers["relaxed"] = out.detach() * 0.5 + 0.5
    out.square().sum().backward()
    answers |= {f"policy_gradient/{k}": p.grad for k, p in policy.named_parameters() if p.grad is not None}

    # One step of the search: parameters of both after it.
    torch.manual_seed(2)
    critic = official_search.Discriminator(trunk())
    answers |= {f"critic/{key}": value.clone() for key, value in critic.state_dict().items()}
    trainer = object.__new__(official_search.AdvTrainer)
    trainer.cfg = types.SimpleNamespace(cls_factor=0.1, gp_factor=10.0)
    trainer.model = {"main": critic, "policy": policy}
    trainer.optimizer = {
        "main": torch.optim.SGD(critic.parameters(), 0.1),
        "policy": torch.optim.SGD(policy.parameters(), 5.0),
    }
    real = torch.rand(BATCH, 3, SIDE, SIDE, generator=generator)
    labels = torch.randint(5, (2, BATCH), generator=generator)
    answers |= {"real": real, "labels": labels}
    share = torch.rand(BATCH, generator=generator)
    answers["share"] = share
    trainer.gradient_penalty = types.MethodType(
        _with_share(official_search.AdvTrainer.gradient_penalty, share), trainer
    )

    def passes():
        while True:
            chance.start()
            yield

    again = passes()
    forward = policy.forward
    policy.forward = lambda x: (next(again), forward(x))[1]
    losses = trainer.wgan_loss(2 * real - 1, labels[1], 2 * between.clone() - 1, labels[0])
    answers["losses"] = torch.stack([loss.detach() for loss in losses])
    answers |= {f"critic_after/{key}": value for key, value in critic.state_dict().items()}
    answers |= {f"policy_after/{key}": value for key, value in policy.state_dict().items()}
    np.savez_compressed(Path(__file__).with_name("official.npz"), **packed(answers))


def packed(answers: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """All floats as one vector, and what stands where as lines of text: a thousand small arrays take far more room."""
    lines = [f"{key} {' '.join(map(str, value.shape))}" for key, value in answers.items()]
    values = np.concatenate([value.detach().float().numpy().ravel() for value in answers.values()])
    return {"values": values, "lines": np.array("\n".join(lines))}


def unpacked(file: Path) -> dict[str, torch.Tensor]:
    """What was packed, as tensors of floats."""
    with np.load(file) as found:
        values, lines = torch.from_numpy(found["values"]), str(found["lines"]).split("\n")
    answers, start = {}, 0
    for line in lines:
        key, *shape = line.split()
        size = math.prod(map(int, shape))
        answers[key] = values[start : start + size].view(*map(int, shape))
        start += size
    return answers


def _with_share(function, share):
    """The penalty with ``share`` for what it draws."""

    def penalty(self, real, fake):
        drawn = types.SimpleNamespace(uniform_=lambda low, high: share.view(-1, 1, 1, 1))
        return function(self, _Real(real, drawn), fake)

    return penalty


class _Real:
    """A tensor whose ``new_empty(...).uniform_`` is given."""

    def __init__(self, tensor, drawn) -> None:
        self.tensor, self.drawn = tensor, drawn

    def new_empty(self, *size):
        return self.drawn

    def size(self, dim):
        return self.tensor.size(dim)

    def __rmul__(self, other):
        return other * self.tensor


if __name__ == "__main__":
    main(Path(sys.argv[1]))
