"""What a room's ``examples.py`` yields: small instances of its public components, and side-by-side benchmarks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Kind = Literal["module", "loss", "transform", "optimizer", "estimator", "function", "agent"]


@dataclass(frozen=True)
class Example:
    """A small instance of one public component; the contract, the cross test and the page are fed from it.

    ``make`` builds the component (for an optimizer it takes the parameters), ``inputs`` the positional arguments of one
    call from a generator (for an estimator ``(X, y)``), ``batch`` names the batch dimension of the first input, and
    ``wrong`` pairs a call that must raise ``ValueError`` with a text its message must contain.
    ``expected_failures`` maps the name of a contract check to the reason why it cannot hold.
    """

    name: str
    kind: Kind
    make: Callable[..., Any]
    code: str
    inputs: Callable[[torch.Generator], tuple[Any, ...]] = lambda generator: ()
    wrong: tuple[tuple[Callable[[], Any], str], ...] = ()
    expected_failures: Mapping[str, str] = field(default_factory=dict)
    batch: int | None = 0


@dataclass(frozen=True)
class Benchmark:
    """Ours against a peer, side by side in one process.

    ``ours`` and ``peer`` each build once and return the zero-argument call to be timed; both do the same work on the
    same inputs. ``extra`` is what has to be installed for the peer.
    """

    name: str
    ours: Callable[[], Callable[[], Any]]
    peer: Callable[[], Callable[[], Any]]
    extra: str = "peers"
