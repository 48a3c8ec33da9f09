"""The card: a paper's facts as pure data, checked when read."""

import datetime
import math
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, field_validator, model_validator

DOMAINS = (
    "vision",
    "dense",
    "detection",
    "video",
    "representation",
    "analysis",
    "augmentation",
    "losses",
    "training",
    "data_quality",
    "tabular",
    "bayes",
    "language",
    "rl",
    "scene",
    "audio",
    "generative",
    "physics",
)
SLUG = re.compile(r"[a-z][a-z0-9_]{1,48}")
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Kind = Literal["gap", "ratio", "bound", "order", "trend", "exact", "value"]
Scale = Literal["tiny", "laptop", "real", "full"]
NEUTRAL = {"gap": 0.0, "ratio": 1.0, "trend": 0.0, "order": 0.0}
"""What is seen when an idea adds nothing, for the kinds where that is the same everywhere."""


class CardError(ValueError):
    """A card that cannot be read or does not keep the schema; the message names the file, the field and the rule."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Code(Strict):
    """The official repository."""

    repository: Annotated[str, StringConstraints(pattern=r"^[\w.-]+/[\w.-]+$")]
    licence: Text
    path: str | None = None


_WIDE = r"[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]"
_BROKEN_LINE = re.compile(rf"(?<={_WIDE})[ \t]*\n[ \t]*(?={_WIDE})|(?<=[、。，．！？）」])[ \t]*\n[ \t]*(?=\S)")


class Prose(Strict):
    """What a digest says of the paper, in one language. Japanese has no space where a line of the file ends."""

    purpose: Text
    method: Text
    result: Text
    limits: Text

    @field_validator("purpose", "method", "result", "limits")
    @classmethod
    def _lines_joined(cls, text: str) -> str:
        return _BROKEN_LINE.sub("", text)


class Macs(Strict):
    at: tuple[int, ...]
    count: float
    tolerance: float = 0.0


class Number(Strict):
    """A number that needs no training: of a model (parameters, MACs), or what a public function gives."""

    where: Text
    model: str | None = None
    parameters: int | None = None
    macs: Macs | None = None
    options: dict[str, Any] = {}
    name: str | None = None
    call: str | None = None
    args: tuple[Any, ...] = ()
    value: float | None = None
    tolerance: float = 0.0

    @model_validator(mode="after")
    def _complete(self) -> "Number":
        of_model = self.model is not None and (self.parameters is not None or self.macs is not None)
        of_call = self.call is not None and self.value is not None and self.name is not None
        if of_model == of_call:
            raise ValueError("a number has either model with parameters or macs, or name, call and value")
        return self


class Parity(Strict):
    """The same outputs as the official or most trusted implementation, and the test that shows it."""

    against: Text
    test: Annotated[str, StringConstraints(pattern=r"^tests/[\w/]+\.py::\w+$")]


class Quantity(Strict):
    """One measured number of a claim and its two anchors: what the paper reports, and what nothing would give."""

    kind: Kind
    en: Text
    ja: Text
    reported: float | tuple[float, float] | tuple[float, ...]
    nothing: float | None = None
    least: float | None = None
    tolerance: float | None = None
    of: tuple[str, ...] = ()
    clock: bool = False
    binary: bool = False
    unit: str = ""

    @model_validator(mode="after")
    def _anchored(self) -> "Quantity":
        if self.kind == "bound" and self.nothing is None:
            raise ValueError("a bound needs nothing: the loss of the naive way to the same cost")
        if self.kind == "order":
            if len(self.of) < 2 or not isinstance(self.reported, tuple) or len(self.reported) != len(self.of):
                raise ValueError("an order needs of, two or more arms from best to worst, and as many reported values")
            if any(a <= b for a, b in zip(self.reported, self.reported[1:], strict=False)):
                raise ValueError("the reported values of an order must decrease")
        elif isinstance(self.reported, tuple) and len(self.reported) != 2:
            raise ValueError("reported is a number or a range of two numbers")
        if isinstance(self.reported, tuple) and self.kind != "order" and self.reported[0] > self.reported[1]:
            raise ValueError("a reported range goes from low to high")
        if self.kind in ("gap", "ratio", "bound", "trend"):
            if self.anchor == self.neutral:
                raise ValueError("reported and nothing are the same: there is no effect to measure")
            if self.kind == "ratio" and min(self.anchor, self.neutral, self.least or 1.0) <= 0:
                raise ValueError("the anchors of a ratio must be positive")
            if self.least is not None and (self.least - self.neutral) * (self.anchor - self.neutral) < 0:
                raise ValueError("least must lie on the same side of nothing as reported")
        if self.binary and self.kind not in ("gap", "bound"):
            raise ValueError("a binary quantity is a gap or a bound of a share of seeds")
        return self

    @property
    def neutral(self) -> float:
        """What would be seen if the idea added nothing."""
        return NEUTRAL.get(self.kind, math.nan) if self.nothing is None else self.nothing

    @property
    def anchor(self) -> float:
        """The reported value; of a range, the end nearer to nothing."""
        if not isinstance(self.reported, tuple):
            return self.reported
        if self.kind == "order":
            return min(a - b for a, b in zip(self.reported, self.reported[1:], strict=False))
        return (
            min(self.reported, key=lambda value: abs(value - self.neutral))
            if not math.isnan(self.neutral)
            else self.reported[0]
        )


class Claim(Strict):
    """One sentence of the paper, and the quantities it speaks of."""

    id: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{2,60}$")]
    en: Text
    ja: Text
    where: Text
    fair: dict[Literal["laptop", "real", "full"], Literal["direction", "size"]]
    why: Text
    scales: tuple[Scale, ...] = ("tiny", "laptop")
    quantities: dict[str, Quantity]

    @model_validator(mode="after")
    def _measurable(self) -> "Claim":
        if "laptop" not in self.scales:
            raise ValueError(f"claim {self.id} has no laptop scale: every claim has a laptop experiment")
        if not self.quantities:
            raise ValueError(f"claim {self.id} has no quantities")
        for scale in self.scales:
            if self.fairness(scale) != "direction":
                continue
            for name, quantity in self.quantities.items():
                if quantity.kind not in ("exact", "value") and quantity.least is None:
                    raise ValueError(
                        f"quantity {name} of claim {self.id} needs least: scale {scale} is fair only in direction"
                    )
        return self

    def fairness(self, scale: str) -> str:
        """``direction`` or ``size``; ``size`` at the paper's own scale unless the card says otherwise, ``none`` at tiny."""
        return "none" if scale == "tiny" else self.fair.get(scale, "size" if scale == "full" else "direction")

    @property
    def clock(self) -> bool:
        """True where a quantity is wall-clock time, so that the claim is measured alone on the machine."""
        return any(quantity.clock for quantity in self.quantities.values())


class Deviation(Strict):
    """A place where we differ from the paper or its code."""

    what: Text
    theirs: Text
    ours: Text
    why: Text


class Trap(Strict):
    """A known reason why people miss the paper's number."""

    en: Text
    ja: Text


class Card(Strict):
    """All a digest needs to know of a paper."""

    title: Text
    title_ja: Text
    arxiv: Annotated[str, StringConstraints(pattern=r"^\d{4}\.\d{4,5}$")] | None = None
    url: str | None = None
    published: datetime.date
    venue: Text
    affiliations: tuple[Text, ...]
    code: Code | None = None
    fidelity: Literal["official code", "the text", "reconstruction"]
    digests: tuple[str, ...] = ()
    builds_on: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    tags: tuple[Text, ...]
    extra: str | None = None
    ja: Prose
    en: Prose
    number: tuple[Number, ...] = ()
    parity: tuple[Parity, ...] = ()
    claim: tuple[Claim, ...]
    trap: tuple[Trap, ...] = ()
    deviation: tuple[Deviation, ...] = ()
    deviations: Literal["none"] | None = None

    @field_validator("claim")
    @classmethod
    def _claims_differ(cls, claims: tuple[Claim, ...]) -> tuple[Claim, ...]:
        if not claims:
            raise ValueError("a card has at least one [[claim]]")
        ids = [claim.id for claim in claims]
        if len(set(ids)) != len(ids):
            raise ValueError(f"claim ids repeat: {', '.join(ids)}")
        return claims

    @model_validator(mode="after")
    def _deviations_stated(self) -> "Card":
        if bool(self.deviation) == (self.deviations == "none"):
            raise ValueError('state the deviations: [[deviation]] entries, or deviations = "none"')
        return self

    @property
    def link(self) -> str:
        """Where the paper can be read."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else self.url or ""

    def find_claim(self, claim_id: str) -> Claim:
        """The claim of that id; ``ValueError`` names those there are."""
        for claim in self.claim:
            if claim.id == claim_id:
                return claim
        raise ValueError(
            f"there is no claim {claim_id!r}: the claims are {', '.join(claim.id for claim in self.claim)}"
        )


def read_card(path: Path) -> Card:
    """Reads and checks a card; raises ``CardError`` with the file, the field and the rule in one sentence."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CardError(f"the card {path} cannot be read: {error}") from error
    try:
        return Card.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the card"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise CardError(
            f"the card {path} is broken at {field}: {first['msg'].removeprefix('Value error, ')}{more}"
        ) from error
