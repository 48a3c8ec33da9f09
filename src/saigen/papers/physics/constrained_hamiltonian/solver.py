"""Fixed and adaptive Runge-Kutta rollouts of an autonomous field."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from scipy.integrate import solve_ivp
from torch import Tensor

METHODS = ("rk4", "dopri5")
Field = Callable[[Tensor], Tensor]


def rollout(
    field: Field,
    s0: Float[Tensor, "b *state"],
    t: Float[Tensor, "T"],
    method: str = "rk4",
    *,
    tol: float = 1e-7,
    substeps: int = 1,
) -> Float[Tensor, "b T *state"]:
    """The states at the times ``t``, from ``s0`` at the first of them.

    ``rk4`` takes ``substeps`` steps from one time to the next and can be differentiated; it is the 3/8 rule, as in
    torchdiffeq. ``dopri5`` is SciPy's Dormand-Prince pair at relative tolerance ``tol`` (absolute: a hundredth of it), one
    step size for the whole batch and no gradient. Times that it cannot reach, since the field blows up, hold NaN.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, allowed are {', '.join(METHODS)}")
    if t.ndim != 1 or len(t) < 1:
        raise ValueError(f"t has shape {tuple(t.shape)}, allowed are times in a row, one or more")
    if substeps < 1:
        raise ValueError(f"substeps is {substeps}, allowed is a whole number of at least 1")
    if not tol > 0.0:
        raise ValueError(f"tol is {tol}, allowed is a number above 0")
    return _rk4(field, s0, t, substeps) if method == "rk4" else _dopri5(field, s0, t, tol)


def _rk4(field: Field, s: Tensor, t: Tensor, substeps: int) -> Tensor:
    states = [s]
    for step in (t[1:] - t[:-1]).unbind(0):
        h = step.to(s.dtype) / substeps
        for _ in range(substeps):
            k1 = field(s)
            k2 = field(s + h * k1 / 3)
            k3 = field(s + h * (k2 - k1 / 3))
            k4 = field(s + h * (k1 - k2 + k3))
            s = s + h * (k1 + 3 * (k2 + k3) + k4) / 8
        states.append(s)
    return torch.stack(states, 1)


@torch.no_grad()
def _dopri5(field: Field, s0: Tensor, t: Tensor, tol: float) -> Tensor:
    times = t.detach().cpu().double().numpy()

    def derivative(_: float, flat: np.ndarray) -> np.ndarray:
        return field(torch.from_numpy(flat).to(s0).view(s0.shape)).flatten().cpu().double().numpy()

    states = torch.full((len(times), *s0.shape), torch.nan, dtype=s0.dtype, device=s0.device)
    states[0] = s0
    if len(times) > 1 and bool(s0.isfinite().all()):
        start = s0.flatten().cpu().double().numpy()
        with np.errstate(all="ignore"):
            found = solve_ivp(derivative, (times[0], times[-1]), start, "RK45", times, rtol=tol, atol=tol / 100)
        reached = torch.from_numpy(found.y.T.copy()).to(s0).view(-1, *s0.shape)
        states[: len(reached)] = reached
    return states.transpose(0, 1).contiguous()
