"""Policies: relaxed while they are searched, sampled once they are found (Faster AutoAugment, section 3, arXiv 1911.06987).

A policy has L sub-policies of K stages. A stage chooses one of N operations by weights w, and applies it with
probability p at magnitude mu. While it is searched, every choice is a mixture and every gate soft:

    x <- sum_n softmax(w / eta)_n (b_n O_n(x; mu_n) + (1 - b_n) x),    b_n ~ RelaxedBernoulli(p_n)

so that w, p and mu have gradients; afterwards n ~ softmax(w / eta) and b ~ Bernoulli(p).
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saigen.nn.image_range import check_unit_range
from saigen.papers.augmentation.faster_autoaugment.operations import (
    ARITHMETICS,
    OPERATION_SETS,
    OPERATIONS,
    apply_operation,
)

_REPOSITORY_NAMES = {"Saturate": "Color"}
_EPS = 1e-6


def policy_operations(ops: str | Sequence[str] = "paper") -> tuple[str, ...]:
    """The names of ``"paper"`` (16 operations), of ``"official"`` (the repository's 15), or those given, checked."""
    if isinstance(ops, str):
        if ops not in OPERATION_SETS:
            raise ValueError(f"ops is {ops!r}, allowed are {', '.join(OPERATION_SETS)} and a sequence of operations")
        return OPERATION_SETS[ops]
    unknown = [name for name in ops if name not in OPERATIONS]
    if unknown or not ops:
        raise ValueError(f"ops is {tuple(ops)}, allowed are one or more of {', '.join(OPERATIONS)}")
    return tuple(ops)


class RelaxedDraw(NamedTuple):
    """What chance decides while a policy is searched, for b images and K stages of N operations."""

    sub_policies: Int[Tensor, " b"]
    noise: Float[Tensor, "k b n"]
    """Logistic, of the gates."""
    signs: Float[Tensor, "k b n"]


class DifferentiablePolicy(nn.Module):
    """A policy over images (b, c, h, w) in [0, 1] with gradients in all of its parameters, to be searched.

    L is ``num_sub_policies``, K ``num_stages``, eta ``temperature``. A batch is cut into ``num_chunks`` pieces, each of
    which draws one sub-policy; None: every image draws its own. ``gate_temperature`` is the relaxed Bernoulli's.
    ``arithmetic`` is that of the operations. All parameters start uniform in [0, 1], from ``generator`` if given; after
    each step of an optimizer ``project_()`` takes magnitudes and probabilities back into [0, 1], where a clamp in the
    forward pass would leave them without a gradient. In eval mode images pass untouched, as through ``nn.Dropout``;
    ``freeze()`` gives the transform that samples. Section 3.1.

    >>> policy = DifferentiablePolicy("official")
    >>> sum(p.numel() for p in policy.parameters()), policy(torch.rand(8, 3, 16, 16)).shape
    (820, torch.Size([8, 3, 16, 16]))
    """

    def __init__(
        self,
        ops: str | Sequence[str] = "paper",
        *,
        num_sub_policies: int = 10,
        num_stages: int = 2,
        temperature: float = 0.05,
        gate_temperature: float = 0.1,
        num_chunks: int | None = 8,
        arithmetic: str = "pillow",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.operations = policy_operations(ops)
        for name, value in {"num_sub_policies": num_sub_policies, "num_stages": num_stages}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value}, allowed is a whole number >= 1")
        for name, value in {"temperature": temperature, "gate_temperature": gate_temperature}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}, allowed is {name} > 0")
        _check(num_chunks, arithmetic)
        self.temperature, self.gate_temperature = temperature, gate_temperature
        self.num_chunks, self.arithmetic = num_chunks, arithmetic
        # Where the magnitude of an operation stands among those that have one.
        self.places = [
            sum(OPERATIONS[other].scale is not None for other in self.operations[:i])
            if OPERATIONS[name].scale is not None
            else None
            for i, name in enumerate(self.operations)
        ]
        shape, sized = (num_sub_policies, num_stages), sum(place is not None for place in self.places)
        self.weights = nn.Parameter(torch.empty(*shape, len(self.operations)))
        self.magnitudes = nn.Parameter(torch.empty(*shape, sized))
        self.probabilities = nn.Parameter(torch.empty(*shape, len(self.operations)))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, 0, 1, generator=generator)

    def forward(
        self, x: Float[Tensor, "b c h w"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "b c h w"]:
        """The relaxed augmentation; ``generator`` is on the CPU."""
        _check_images(x)
        if not self.training or len(x) == 0:
            return x
        return self.apply_draw(x, self.draw(len(x), generator), generator)

    def draw(self, batch: int, generator: torch.Generator | None = None) -> RelaxedDraw:
        """Draws sub-policies, gates' noise and signs for ``batch`` images."""
        count, stages, kinds = self.weights.shape
        uniform = torch.rand(stages, batch, kinds, generator=generator).clamp(_EPS, 1 - _EPS)
        signs = 2.0 * torch.randint(2, (stages, batch, kinds), generator=generator) - 1
        return RelaxedDraw(_chunked(count, batch, self.num_chunks, generator), uniform.logit(), signs)

    def apply_draw(
        self, x: Float[Tensor, "b c h w"], draw: RelaxedDraw, generator: torch.Generator | None = None
    ) -> Float[Tensor, "b c h w"]:
        """Applies what was drawn: each operation runs once a stage, with every image's own magnitude."""
        which = draw.sub_policies.to(x.device)
        for stage in range(self.weights.shape[1]):
            noise, signs = draw.noise[stage].to(x), draw.signs[stage].to(x)
            choice = (self.weights[which, stage] / self.temperature).softmax(-1)
            # The logit needs 0 < p < 1; its gradient passes the ends.
            p = self.probabilities[which, stage]
            p = p + (p.detach().clamp(_EPS, 1 - _EPS) - p.detach())
            gate = torch.sigmoid((p.logit() + noise) / self.gate_temperature)
            magnitude = self.magnitudes[which, stage]
            mixture = torch.zeros_like(x)
            for i, (name, place) in enumerate(zip(self.operations, self.places, strict=True)):
                argument = None if place is None else _argument(name, magnitude[:, place], signs[:, i])
                y = apply_operation(name, x, argument, arithmetic=self.arithmetic, generator=generator)
                open_, weight = (part[:, i].view(-1, 1, 1, 1) for part in (gate, choice))
                mixture = mixture + weight * (open_ * y + (1 - open_) * x).clamp(0, 1)
            x = mixture
        return x

    @torch.no_grad()
    def project_(self) -> "DifferentiablePolicy":
        """Takes magnitudes and probabilities to the nearest numbers in [0, 1]."""
        self.magnitudes.clamp_(0, 1)
        self.probabilities.clamp_(0, 1)
        return self

    @torch.no_grad()
    def freeze(self, num_chunks: int | None = None) -> "AugmentationPolicy":
        """The policy as it stands as a transform that samples; the repository trains with 16 chunks."""
        magnitudes = torch.zeros_like(self.weights)
        for i, place in enumerate(self.places):
            if place is not None:
                magnitudes[..., i] = self.magnitudes[..., place].clamp(0, 1)
        choice = (self.weights / self.temperature).softmax(-1)
        return AugmentationPolicy(
            self.operations,
            choice,
            magnitudes,
            self.probabilities.detach().clamp(0, 1),
            num_chunks=num_chunks,
            arithmetic=self.arithmetic,
        )

    def convert_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The repository's keys (``sub_policies.0.stages.1.operations.2._magnitude``) in ours; our own keys pass.

        Its mean and standard deviation, temperatures and kernel are settings here, and are dropped. Raises
        ``ValueError`` where a parameter is missing or an operation has no business having a magnitude.
        """
        if not any(key.startswith("sub_policies.") for key in state):
            return dict(state)
        used: set[str] = set()

        def take(key: str) -> Tensor:
            if key not in state:
                raise ValueError(f"state lacks {key}, allowed are the parameters of {tuple(self.weights.shape)}")
            used.add(key)
            return state[key]

        count, stages, kinds = self.weights.shape
        found: dict[str, list[Tensor]] = {"weights": [], "magnitudes": [], "probabilities": []}
        for prefix in (f"sub_policies.{i}.stages.{j}." for i in range(count) for j in range(stages)):
            sized = [n for n in range(kinds) if self.places[n] is not None]
            found["weights"].append(take(prefix + "_weights"))
            found["magnitudes"].append(torch.cat([take(f"{prefix}operations.{n}._magnitude") for n in sized]))
            found["probabilities"].append(
                torch.cat([take(f"{prefix}operations.{n}._probability") for n in range(kinds)])
            )
        left = [key for key in state if key not in used and key.split(".")[-1] in _REPOSITORY_PARAMETERS]
        if left:
            raise ValueError(f"state has {left[0]}, which a policy of {', '.join(self.operations)} has not")
        return {name: torch.stack(parts).view(count, stages, -1) for name, parts in found.items()}


_REPOSITORY_PARAMETERS = ("_weights", "_magnitude", "_probability")


def load_official(
    checkpoint: Mapping[str, Any], ops: str | Sequence[str] = "official", *, num_chunks: int | None = 8
) -> DifferentiablePolicy:
    """The policy of a checkpoint of the repository (moskomule/dda), what ``torch.load(path, weights_only=True)`` gives.

    It has the keys ``policy`` and ``policy_kwargs``. The result computes in the repository's arithmetic.
    """
    for key in ("policy", "policy_kwargs"):
        if key not in checkpoint:
            raise ValueError(f"checkpoint has the keys {', '.join(checkpoint)}, allowed is one with {key}")
    kwargs = checkpoint["policy_kwargs"]
    policy = DifferentiablePolicy(
        tuple(_REPOSITORY_NAMES.get(name, name) for name in policy_operations(ops)),
        num_sub_policies=kwargs["num_sub_policies"],
        num_stages=kwargs["operation_count"],
        temperature=kwargs["temperature"],
        num_chunks=num_chunks,
        arithmetic="official",
    )
    policy.load_state_dict(policy.convert_state_dict(checkpoint["policy"]))
    return policy


class Draw(NamedTuple):
    """What is applied to b images in each of K stages: operations, whether they are, and their signs."""

    sub_policies: Int[Tensor, " b"]
    operations: Int[Tensor, "k b"]
    applied: Bool[Tensor, "k b"]
    signs: Float[Tensor, "k b"]


class AugmentationPolicy(nn.Module):
    """A found policy as a transform of images (b, c, h, w) in [0, 1]: nothing is soft, nothing is learned.

    ``choice`` (L, K, N) holds the probability with which each of the ``ops`` is chosen, ``magnitudes`` and
    ``probabilities`` mu and p in [0, 1]. A batch is cut into ``num_chunks`` pieces, each of which draws one sub-policy and
    one operation a stage; None, the default: every image draws its own. In eval mode images pass untouched. ``save`` and
    ``load`` write and read a plain file. Raises ``ValueError`` for shapes that do not agree and numbers outside [0, 1].

    >>> policy = AugmentationPolicy.from_dict({"sub_policies": [[[{"operation": "Invert"}]]]})
    >>> policy(torch.zeros(1, 1, 1, 2)).tolist()
    [[[[1.0, 1.0]]]]
    """

    def __init__(
        self,
        ops: str | Sequence[str],
        choice: Float[Tensor, "l k n"],
        magnitudes: Float[Tensor, "l k n"],
        probabilities: Float[Tensor, "l k n"],
        *,
        num_chunks: int | None = None,
        arithmetic: str = "pillow",
    ) -> None:
        super().__init__()
        self.operations = policy_operations(ops)
        _check(num_chunks, arithmetic)
        self.num_chunks, self.arithmetic = num_chunks, arithmetic
        for name, value in {"choice": choice, "magnitudes": magnitudes, "probabilities": probabilities}.items():
            if value.ndim != 3 or value.shape != choice.shape or value.shape[-1] != len(self.operations):
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, allowed is (sub-policies, stages, {len(self.operations)}), "
                    "the same for all three"
                )
            if not value.is_meta and not ((value >= 0) & (value <= 1)).all():
                raise ValueError(f"{name} holds numbers outside [0, 1] or NaN, allowed are 0 to 1")
            self.register_buffer(name, value.detach().clone())

    def forward(
        self, x: Float[Tensor, "b c h w"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "b c h w"]:
        """Augments each image; ``generator`` is on the CPU."""
        _check_images(x)
        if not self.training or len(x) == 0:
            return x
        return self.apply_draw(x, self.draw(len(x), generator), generator)

    def draw(self, batch: int, generator: torch.Generator | None = None) -> Draw:
        """Draws what will be applied to ``batch`` images."""
        count, stages, _ = self.choice.shape
        which = _chunked(count, batch, self.num_chunks, generator)
        operations = []
        for stage in range(stages):
            if self.num_chunks is None:
                found = torch.multinomial(
                    self.choice[which.to(self.choice.device), stage].cpu(), 1, generator=generator
                )
                operations.append(found[:, 0])
            else:
                first = _starts(batch, self.num_chunks)
                rows = self.choice[which[first].to(self.choice.device), stage].cpu()
                found = torch.multinomial(rows, 1, generator=generator)[:, 0]
                operations.append(found.repeat_interleave(torch.diff(first, append=torch.tensor([batch]))))
        chosen = torch.stack(operations)
        p = self.probabilities.cpu()[which, torch.arange(stages)[:, None], chosen]
        applied = torch.rand(stages, batch, generator=generator) < p
        signs = 2.0 * torch.randint(2, (stages, batch), generator=generator) - 1
        return Draw(which, chosen, applied, signs)

    @torch.no_grad()
    def apply_draw(
        self, x: Float[Tensor, "b c h w"], draw: Draw, generator: torch.Generator | None = None
    ) -> Float[Tensor, "b c h w"]:
        """Applies what was drawn: each operation runs once a stage, on the images that drew it."""
        magnitudes = self.magnitudes.cpu()
        for stage, (operations, applied, signs) in enumerate(
            zip(draw.operations, draw.applied, draw.signs, strict=True)
        ):
            parts, order = [x], [torch.arange(len(x))]
            place = order[0].clone()
            start = len(x)
            for i in operations[applied].unique().tolist():
                rows = torch.nonzero((operations == i) & applied)[:, 0]
                name = self.operations[i]
                argument = None
                if OPERATIONS[name].scale is not None:
                    argument = _argument(name, magnitudes[draw.sub_policies[rows], stage, i], signs[rows]).to(x)
                part = x[rows.to(x.device)]
                parts.append(apply_operation(name, part, argument, arithmetic=self.arithmetic, generator=generator))
                place[rows] = torch.arange(start, start + len(rows))
                start += len(rows)
            x = torch.cat(parts)[place.to(x.device)] if len(parts) > 1 else x
        return x

    def operation_shares(self) -> dict[str, float]:
        """How often each operation is applied in a stage: choice times probability, averaged over stages."""
        shares = (self.choice * self.probabilities).mean((0, 1)).tolist()
        return {
            name: sum(s for other, s in zip(self.operations, shares, strict=True) if other == name)
            for name in self.operations
        }

    def mean_argument(self, name: str) -> float:
        """The argument of ``name`` (degrees, share of the side), averaged over its applications; NaN if there are none."""
        if name not in self.operations or OPERATIONS[name].scale is None:
            raise ValueError(f"name is {name!r}, allowed are operations of the policy that have a magnitude")
        columns = [i for i, other in enumerate(self.operations) if other == name]
        often = (self.choice * self.probabilities)[..., columns]
        return (OPERATIONS[name].scale * (often * self.magnitudes[..., columns]).sum() / often.sum()).item()

    def to_dict(self) -> dict[str, Any]:
        """The policy in plain words: sub-policies of stages of operations, and how often each is chosen."""
        rows = zip(self.choice.tolist(), self.magnitudes.tolist(), self.probabilities.tolist(), strict=True)
        sub_policies = [
            [
                [
                    {"operation": name, "choice": choice, "probability": p}
                    | ({} if OPERATIONS[name].scale is None else {"magnitude": magnitude})
                    for name, choice, magnitude, p in zip(self.operations, *stage, strict=True)
                ]
                for stage in zip(*row, strict=True)
            ]
            for row in rows
        ]
        settings = {"operations": list(self.operations), "num_chunks": self.num_chunks, "arithmetic": self.arithmetic}
        return {"format": 1, **settings, "sub_policies": sub_policies}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "AugmentationPolicy":
        """The policy of ``to_dict``, or one written by hand: what is left out is chosen equally often, applied always.

        An operation may stand in a stage as often as in ``operations``, which lists all there are unless given.
        """
        if data.get("format", 1) != 1 or not data.get("sub_policies"):
            raise ValueError("the policy has no sub_policies or another format, allowed is format 1 with sub_policies")
        stages = [stage for row in data["sub_policies"] for stage in row]
        if len({len(row) for row in data["sub_policies"]}) != 1 or not stages or not all(stages):
            raise ValueError(
                "the sub-policies have different or no stages, allowed are equally many of them, none empty"
            )
        for entry in (entry for stage in stages for entry in stage):
            unknown = set(entry) - {"operation", "choice", "probability", "magnitude"}
            if unknown or "operation" not in entry:
                raise ValueError(
                    f"an operation has the keys {', '.join(entry)}, allowed are operation, and choice, probability, magnitude"
                )
        names = policy_operations(
            data.get("operations") or tuple(dict.fromkeys(e["operation"] for s in stages for e in s))
        )
        table = torch.zeros(3, len(stages), len(names), dtype=torch.float64)
        for number, stage in enumerate(stages):
            free = list(range(len(names)))
            for entry in stage:
                name = entry["operation"]
                place = next((i for i in free if names[i] == name), None)
                if place is None:
                    raise ValueError(f"operation is {name!r}, allowed are {', '.join(names[i] for i in free)}")
                free.remove(place)
                values = entry.get("choice", 1 / len(stage)), entry.get("magnitude", 0.0), entry.get("probability", 1.0)
                table[:, number, place] = torch.tensor(values, dtype=torch.float64)
        if not (table[0].sum(-1) - 1).abs().max() < 1e-3:
            raise ValueError("the choices of a stage do not add up to 1, allowed are probabilities")
        choice, magnitudes, probabilities = table.float().view(3, len(data["sub_policies"]), -1, len(names))
        settings = {key: data[key] for key in ("num_chunks", "arithmetic") if key in data}
        return cls(names, choice, magnitudes, probabilities, **settings)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the policy to a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "AugmentationPolicy":
        """Reads a policy from a JSON file."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def extra_repr(self) -> str:
        count, stages, kinds = self.choice.shape
        return f"{count} sub-policies of {stages} stages, {kinds} operations, arithmetic={self.arithmetic}"


def _argument(name: str, magnitude: Tensor, sign: Tensor) -> Tensor:
    return magnitude * (sign * OPERATIONS[name].scale if OPERATIONS[name].signed else OPERATIONS[name].scale)


def _check_images(x: Tensor) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(
            f"images are {x.dtype} of shape {tuple(x.shape)}, allowed are floats in [0, 1] of shape (b, c, h, w)"
        )
    check_unit_range(x)


def _starts(batch: int, chunks: int) -> Tensor:
    """Where the pieces begin that ``torch.chunk`` makes."""
    return torch.arange(0, batch, math.ceil(batch / chunks))


def _chunked(count: int, batch: int, chunks: int | None, generator: torch.Generator | None) -> Tensor:
    """One of ``count`` sub-policies for every image of a batch, the same within a piece."""
    if chunks is None:
        return torch.randint(count, (batch,), generator=generator)
    first = _starts(batch, chunks)
    drawn = torch.randint(count, (len(first),), generator=generator)
    return drawn.repeat_interleave(torch.diff(first, append=torch.tensor([batch])))


def _check(num_chunks: int | None, arithmetic: str) -> None:
    if num_chunks is not None and (isinstance(num_chunks, bool) or not isinstance(num_chunks, int) or num_chunks < 1):
        raise ValueError(f"num_chunks is {num_chunks}, allowed is None or a whole number >= 1")
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"arithmetic is {arithmetic!r}, allowed are {', '.join(ARITHMETICS)}")
