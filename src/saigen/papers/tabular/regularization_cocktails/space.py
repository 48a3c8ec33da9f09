"""The thirteen regularisers as a conditional space of nineteen hyper-parameters (Table 1 of the paper), as data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from saigen.papers.tabular.regularization_cocktails.model import MULTIBRANCH, SHAPES
from saigen.papers.tabular.regularization_cocktails.transform import AUGMENTATIONS

TRIALS = 840
"""The paper's budget for the whole cocktail."""
TRIALS_A_NUMBER = 40
"""The paper's budget for one ingredient alone: so many for each hyper-parameter it has."""


@dataclass(frozen=True)
class Parameter:
    """One hyper-parameter: ``options`` to choose from, or a uniform range ``low`` to ``high`` (whole numbers where both are).

    It is asked only where the parameter named by ``when[0]`` has the value ``when[1]``.
    """

    name: str
    options: tuple[Any, ...] = ()
    low: float | int = 0.0
    high: float | int = 0.0
    when: tuple[str, Any] | None = None

    def allows(self, value: Any) -> bool:
        if self.options:
            return any(value is option or value == option for option in self.options)
        number = isinstance(value, int if isinstance(self.low, int) else (int, float)) and not isinstance(value, bool)
        return number and self.low <= value <= self.high

    def __str__(self) -> str:
        return " or ".join(map(repr, self.options)) if self.options else f"{self.low} to {self.high}"


SWITCH = (False, True)
SPACE = (
    Parameter("batch_norm", SWITCH),
    Parameter("use_weight_decay", SWITCH),
    Parameter("weight_decay", low=1e-5, high=0.1, when=("use_weight_decay", True)),
    Parameter("use_dropout", SWITCH),
    Parameter("dropout", low=0.0, high=0.8, when=("use_dropout", True)),
    Parameter("dropout_shape", SHAPES, when=("use_dropout", True)),
    Parameter("skip", SWITCH),
    Parameter("multibranch", MULTIBRANCH, when=("skip", True)),
    Parameter("shake_drop", low=0.0, high=1.0, when=("multibranch", "shake-drop")),
    Parameter("lookahead", SWITCH),
    Parameter("lookahead_steps", low=5, high=10, when=("lookahead", True)),
    Parameter("lookahead_alpha", low=0.5, high=0.8, when=("lookahead", True)),
    Parameter("swa", SWITCH),
    Parameter("snapshots", SWITCH),
    Parameter("augmentation", AUGMENTATIONS),
    Parameter("mixup_alpha", low=0.0, high=1.0, when=("augmentation", "mixup")),
    Parameter("cutout_probability", low=0.0, high=1.0, when=("augmentation", "cutout")),
    Parameter("cutout_ratio", low=0.0, high=1.0, when=("augmentation", "cutout")),
    Parameter("cutmix_probability", low=0.0, high=1.0, when=("augmentation", "cutmix")),
)

INGREDIENTS: Mapping[str, Mapping[str, Any]] = {
    "batch_normalization": {"batch_norm": True},
    "weight_decay": {"use_weight_decay": True},
    "dropout": {"use_dropout": True},
    "skip_connection": {"skip": True},
    "shake_shake": {"skip": True, "multibranch": "shake-shake"},
    "shake_drop": {"skip": True, "multibranch": "shake-drop"},
    "lookahead": {"lookahead": True},
    "stochastic_weight_averaging": {"swa": True},
    "snapshot_ensemble": {"snapshots": True},
    "mixup": {"augmentation": "mixup"},
    "cutout": {"augmentation": "cutout"},
    "cutmix": {"augmentation": "cutmix"},
    "adversarial_training": {"augmentation": "adversarial"},
}
"""Each of the thirteen, and what switches it on."""


@dataclass(frozen=True)
class Cocktail:
    """What is applied, and how much of it; by default nothing, which is the plain network.

    The names are those of ``SPACE``. A number is used only where its ingredient is on. Raises ``ValueError`` for values
    outside the space, and for ``multibranch`` without ``skip``.

    >>> Cocktail(use_dropout=True, swa=True).ingredients
    ('dropout', 'stochastic_weight_averaging')
    """

    batch_norm: bool = False
    use_weight_decay: bool = False
    weight_decay: float | int = 1e-4
    use_dropout: bool = False
    dropout: float | int = 0.5
    dropout_shape: str = "brick"
    skip: bool = False
    multibranch: str | None = None
    shake_drop: float | int = 0.5
    lookahead: bool = False
    lookahead_steps: int = 6
    lookahead_alpha: float | int = 0.6
    swa: bool = False
    snapshots: bool = False
    augmentation: str | None = None
    mixup_alpha: float | int = 0.2
    cutout_probability: float | int = 0.2
    cutout_ratio: float | int = 0.2
    cutmix_probability: float | int = 0.2

    def __post_init__(self) -> None:
        for parameter in SPACE:
            value = getattr(self, parameter.name)
            if not parameter.allows(value):
                raise ValueError(f"{parameter.name} is {value!r}, allowed is {parameter}")
        if self.multibranch is not None and not self.skip:
            raise ValueError(f"multibranch is {self.multibranch!r} without skip, allowed is it only with skip=True")

    @property
    def ingredients(self) -> tuple[str, ...]:
        """Those of the thirteen that are on; a skip connection with two branches, or dropped ones, counts as that."""
        on = [name for name, wanted in INGREDIENTS.items() if all(getattr(self, k) == v for k, v in wanted.items())]
        return tuple(name for name in on if name != "skip_connection" or self.multibranch is None)


def single(ingredient: str) -> tuple[Parameter, ...]:
    """The space of one ingredient alone: its numbers are free, everything else is off.

    Raises ``ValueError`` for a name that is none of the thirteen.

    >>> [p.name for p in single("dropout") if len(p.options) != 1]
    ['dropout', 'dropout_shape']
    """
    if ingredient not in INGREDIENTS:
        raise ValueError(f"ingredient is {ingredient!r}, allowed are {', '.join(INGREDIENTS)}")
    fixed = {p.name: p.options[0] for p in SPACE if p.options and p.name != "dropout_shape"} | INGREDIENTS[ingredient]
    # off, or as the ingredient has it
    narrowed = [Parameter(p.name, (fixed[p.name],), when=p.when) if p.name in fixed else p for p in SPACE]
    settings = Cocktail(**INGREDIENTS[ingredient])
    return tuple(p for p in narrowed if p.when is None or getattr(settings, p.when[0]) == p.when[1])


def trials_of(ingredient: str | None = None) -> int:
    """The paper's number of configurations for an ingredient alone, or for the cocktail.

    >>> trials_of("dropout"), trials_of("skip_connection"), trials_of()
    (80, 0, 840)
    """
    if ingredient is None:
        return TRIALS
    return TRIALS_A_NUMBER * sum(len(parameter.options) != 1 for parameter in single(ingredient))


def configure(choose: Callable[[Parameter], Any], space: tuple[Parameter, ...] = SPACE) -> Cocktail:
    """Asks ``choose`` for each parameter whose condition holds, in the order of ``space``."""
    chosen: dict[str, Any] = {}
    for parameter in space:
        if parameter.when is None or chosen.get(parameter.when[0]) == parameter.when[1]:
            chosen[parameter.name] = parameter.options[0] if len(parameter.options) == 1 else choose(parameter)
    return Cocktail(**chosen)


def sample(rng: np.random.Generator, space: tuple[Parameter, ...] = SPACE) -> Cocktail:
    """A cocktail at random: every option and every range uniformly."""

    def choose(parameter: Parameter) -> Any:
        if parameter.options:
            return parameter.options[rng.integers(len(parameter.options))]
        if isinstance(parameter.low, int):
            return int(rng.integers(parameter.low, parameter.high + 1))
        return float(rng.uniform(parameter.low, parameter.high))

    return configure(choose, space)


def as_cocktail(value: Cocktail | Mapping[str, Any] | None) -> Cocktail:
    """None is the plain network, a mapping the arguments of ``Cocktail``."""
    if value is None:
        return Cocktail()
    if isinstance(value, Cocktail):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"cocktail is {value!r}, allowed is a Cocktail, a mapping of its arguments, or None")
    names = [field.name for field in fields(Cocktail)]
    if unknown := [name for name in value if name not in names]:
        raise ValueError(f"cocktail has {unknown[0]!r}, allowed are {', '.join(names)}")
    return Cocktail(**value)
