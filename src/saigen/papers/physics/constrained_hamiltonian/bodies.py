"""Bodies as points in Cartesian space, and the constraints between them (sections 3 and 5 of arXiv 2010.13581).

A body of extent k (0 a point mass, 1 a rod, 2 a plate, 3 a solid) is k + 1 points: its centre of mass, and the ends of the
unit vectors along its principal axes. Unit distances from the centre and distances of sqrt(2) between the ends keep it
rigid; its mass and its second moments make a constant mass matrix. Bodies hang together by distances, tethers and joints.

Every constraint C is written in the same way, with a row s_C over the n points, an anchor c_C, and y_C = s_C x - c_C:

    bar    phi = |y|^2 - l^2,   joint    phi = y_k                                   (one a component k of space)
    u_C = dphi/dy = gain_C y_C + basis_C,   du_C/dt = gain_C s_C v                   (gain 2 for bars, 0 for joints)

so that the gradient of phi_C by the position of point i is s_Ci u_C, and no Jacobian need ever be laid out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

EXTENTS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Body:
    """One body: its extent, mass, second moments about the centre of mass (one an axis), and the number of its first point."""

    extent: int
    mass: float
    moments: tuple[float, ...]
    first: int

    @property
    def points(self) -> range:
        """The numbers of its points, the centre of mass first."""
        return range(self.first, self.first + self.extent + 1)


class BodyGraph:
    """Bodies in a space of ``dim`` dimensions, and what holds them together. Bodies are named by number, in order.

    Masses and moments are used where the true system is wanted; networks that learn them look at the graph's form alone.

    >>> rod = BodyGraph(2)
    >>> pivot = rod.body(mass=2.0, moments=[1 / 12])
    >>> rod.joint(pivot, [0.5], None, [0.0, 0.0])
    >>> rod.num_points, rod.num_constraints
    (2, 3)
    """

    def __init__(self, dim: int) -> None:
        if dim not in (1, 2, 3):
            raise ValueError(f"dim is {dim}, allowed are 1, 2 and 3")
        self.dim = dim
        self.bodies: list[Body] = []
        self._bars: list[tuple[dict[int, float], np.ndarray, float]] = []
        self._joints: list[tuple[dict[int, float], np.ndarray]] = []

    def point(self, mass: float = 1.0) -> int:
        """Adds a point mass and returns its number."""
        return self.body(mass)

    def body(self, mass: float = 1.0, moments: Sequence[float] = ()) -> int:
        """Adds a rigid body of as many axes as ``moments`` has entries, and returns its number.

        ``moments`` are the second moments of its mass along its principal axes, about the centre and divided by the mass:
        l^2 / 12 for a uniform rod. The inertia of axis i is I_i = mass * moments_i.
        """
        moments = tuple(float(moment) for moment in moments)
        if not mass > 0.0:
            raise ValueError(f"mass is {mass}, allowed is a number above 0")
        if len(moments) > self.dim:
            raise ValueError(
                f"moments has {len(moments)} entries, allowed are at most {self.dim}, one an axis of space"
            )
        if not all(moment > 0.0 for moment in moments):
            raise ValueError(f"moments is {list(moments)}, allowed are numbers above 0")
        body = Body(len(moments), float(mass), moments, self.num_points)
        self.bodies.append(body)
        centre, *ends = body.points
        for i, end in enumerate(ends):
            self._bar({centre: 1.0, end: -1.0}, 1.0)
            for other in ends[:i]:
                self._bar({other: 1.0, end: -1.0}, math.sqrt(2.0))
        return len(self.bodies) - 1

    def distance(self, a: int, b: int, length: float, at_a: Sequence[float] = (), at_b: Sequence[float] = ()) -> None:
        """Keeps ``length`` between two bodies, |x_a - x_b|^2 = l^2: their centres, or places in their body frames."""
        if a == b:
            raise ValueError(f"b is {b}, allowed is a body other than a")
        self._bar(_minus(self._place(a, at_a, "at_a"), self._place(b, at_b, "at_b")), length)

    def tether(self, a: int, origin: Sequence[float], length: float, at_a: Sequence[float] = ()) -> None:
        """Keeps ``length`` between a body and a point fixed in space, |x_a - c|^2 = l^2."""
        self._bar(self._place(a, at_a, "at_a"), length, self._fixed(origin, "origin"))

    def joint(
        self,
        a: int,
        at_a: Sequence[float],
        b: int | None,
        at_b: Sequence[float],
        axis: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        """Holds a place of body ``a`` and one of body ``b`` together; without ``b``, at the point ``at_b`` of space.

        Places are coordinates along the axes of a body, whose weights over its points are (1 - sum c, c). ``axis``, a
        direction in ``a`` and the one in ``b`` (or in space) that it stays along, makes a hinge of it. A hinge of solids
        repeats what rigidity says already: such a graph wants ``redundant=True`` in the models.
        """
        if a == b:
            raise ValueError(f"b is {b}, allowed is a body other than a")
        there = self._fixed(at_b, "at_b") if b is None else np.zeros(self.dim)
        other = {} if b is None else self._place(b, at_b, "at_b")
        self._joints.append((_minus(self._place(a, at_a, "at_a"), other), there))
        if axis is not None:
            ours, theirs = axis
            there = self._fixed(theirs, "axis") if b is None else np.zeros(self.dim)
            other = {} if b is None else self._place(b, theirs, "axis", direction=True)
            self._joints.append((_minus(self._place(a, ours, "axis", direction=True), other), there))

    def _bar(self, row: dict[int, float], length: float, anchor: np.ndarray | None = None) -> None:
        if not length > 0.0:
            raise ValueError(f"length is {length}, allowed is a number above 0")
        self._bars.append((row, np.zeros(self.dim) if anchor is None else anchor, float(length)))

    def _fixed(self, place: Sequence[float], name: str) -> np.ndarray:
        if len(place) != self.dim:
            raise ValueError(f"{name} has {len(place)} entries, allowed are {self.dim}, a point of space")
        return np.asarray(place, np.float64)

    def _place(self, body: int, at: Sequence[float], name: str, direction: bool = False) -> dict[int, float]:
        if not 0 <= body < len(self.bodies):
            raise ValueError(f"body is {body}, allowed are 0 to {len(self.bodies) - 1}, those added so far")
        centre, *ends = self.bodies[body].points
        if len(at) not in {0, len(ends)} - ({0} if direction else set()):
            raise ValueError(f"{name} has {len(at)} entries, allowed are {len(ends)}, one an axis of body {body}")
        # The weight of the centre is 0 at the end of an axis, and a direction is a difference of two places.
        return {centre: (0.0 if direction else 1.0) - float(sum(at)), **dict(zip(ends, map(float, at), strict=False))}

    @property
    def num_points(self) -> int:
        """n, the number of points."""
        return sum(body.extent + 1 for body in self.bodies)

    @property
    def num_constraints(self) -> int:
        """C, the number of equations, those that keep bodies rigid included."""
        return len(self._bars) + self.dim * len(self._joints)

    def moments(self) -> Float[np.ndarray, "n"]:
        """Mass and inertias in the order of the points: m of a centre, I_i of the end of axis i."""
        return np.array([value for b in self.bodies for value in (b.mass, *(b.mass * moment for moment in b.moments))])

    def mass_basis(self) -> Float[np.ndarray, "n n"]:
        """E of M = E diag(moments) E^T: a body's energy is m |v_0|^2 / 2 + sum_i I_i |v_i - v_0|^2 / 2."""
        basis = np.eye(self.num_points)
        for body in self.bodies:
            basis[body.first, list(body.points[1:])] = -1.0
        return basis

    def rows(self) -> dict[str, np.ndarray]:
        """The constraints as arrays: rows (C, n), anchors (C, d), gain (C, 1), basis (C, d), squares (C,)."""
        d, bars = self.dim, len(self._bars)
        count = self.num_constraints
        arrays = {
            "rows": np.zeros((count, self.num_points)), "anchors": np.zeros((count, d)), "gain": np.zeros((count, 1)),
            "basis": np.zeros((count, d)), "squares": np.zeros(count),
        }  # fmt: skip
        arrays["gain"][:bars] = 2.0
        for c, (row, anchor, length) in enumerate(self._bars):
            arrays["rows"][c, list(row)] = list(row.values())
            arrays["anchors"][c], arrays["squares"][c] = anchor, length**2
        for j, (row, anchor) in enumerate(self._joints):
            block = slice(bars + j * d, bars + (j + 1) * d)
            arrays["rows"][block, list(row)] = list(row.values())
            arrays["anchors"][block], arrays["basis"][block] = anchor, np.eye(d)
        return arrays


def _minus(a: dict[int, float], b: dict[int, float]) -> dict[int, float]:
    return a | {point: -weight for point, weight in b.items()}


class Rows(NamedTuple):
    """The constraints in the precision and on the device of a rollout."""

    rows: Tensor
    anchors: Tensor
    gain: Tensor
    basis: Tensor
    squares: Tensor


def directions(c: Rows, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b C d"]:
    """u, the derivative of each constraint by its y."""
    return c.gain * (c.rows @ x - c.anchors) + c.basis


def rates(c: Rows, v: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b C d"]:
    """du/dt."""
    return c.gain * (c.rows @ v)


def along(c: Rows, u: Float[Tensor, "*b C d"], w: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b C"]:
    """G^T w, with G the Jacobian whose directions are u."""
    return (u * (c.rows @ w)).sum(-1)


def pull(c: Rows, u: Float[Tensor, "*b C d"], multipliers: Float[Tensor, "*b C"]) -> Float[Tensor, "*b n d"]:
    """G lambda."""
    return c.rows.mT @ (multipliers.unsqueeze(-1) * u)


def residual(c: Rows, x: Float[Tensor, "*b n d"], v: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b 2 C"]:
    """Phi and its time derivative."""
    y = c.rows @ x - c.anchors
    phi = (y * (0.5 * c.gain * y + c.basis)).sum(-1) - c.squares
    return torch.stack((phi, along(c, c.gain * y + c.basis, v)), -2)


class Constraints(nn.Module):
    """A graph's constraints on the device of a model. They stay in float64, whatever the model is moved to."""

    def __init__(self, graph: BodyGraph) -> None:
        super().__init__()
        self._exact = {**graph.rows(), "mass_basis": graph.mass_basis()}
        for name, array in self._exact.items():
            self.register_buffer(name, torch.from_numpy(array.copy()), persistent=False)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        # Lengths and places that went through float32 would be off by 1e-8 in a float64 rollout.
        for name, array in self._exact.items():
            setattr(self, name, torch.from_numpy(array.copy()).to(getattr(self, name).device))
        return self

    def like(self, x: Tensor) -> Rows:
        """The constraints in the precision of ``x``."""
        return Rows(*(getattr(self, name).to(x) for name in Rows._fields))

    @torch.no_grad()
    def repeat(self, x: Float[Tensor, "b n d"]) -> bool:
        """True where some constraint's gradient lies in the span of the others', at any of the positions."""
        x = x[x.flatten(1).isfinite().all(1)].double()
        rows = self.like(x)
        u = directions(rows, x)
        gram = (rows.rows @ rows.rows.mT) * (u @ u.mT)
        factor, failed = torch.linalg.cholesky_ex(gram)
        # Each pivot is the square of the sine between a gradient and the span of those before it, times its length.
        sine = factor.diagonal(dim1=-2, dim2=-1).square() / gram.diagonal(dim1=-2, dim2=-1)
        return bool(failed.any()) or bool((sine < 1e-10).any())

    def mass_matrix(self, moments: Float[Tensor, "n"]) -> Float[Tensor, "n n"]:
        """M = E diag(moments) E^T: M_00 = m + sum I_i, M_0i = -I_i, M_ii = I_i within a body."""
        basis = self.mass_basis.to(moments)
        return (basis * moments) @ basis.mT

    def inverse_mass_matrix(self, moments: Float[Tensor, "n"]) -> Float[Tensor, "n n"]:
        """M^-1: (sum_a p_a) / m for every point of a body, and p_i / I_i more for the end of axis i."""
        # E^-T is E with the signs turned and transposed: each body's is one level deep.
        basis = (
            2.0 * torch.eye(len(moments), device=moments.device, dtype=moments.dtype) - self.mass_basis.to(moments)
        ).mT
        return (basis / moments) @ basis.mT


def constraint_residual(
    graph: BodyGraph, x: Float[Tensor, "b n d"], v: Float[Tensor, "b n d"]
) -> Float[Tensor, "b 2 C"]:
    """Phi(x) and its time derivative, by how much each constraint is broken."""
    return residual(Constraints(graph).like(x), x, v)


def constraint_jacobian(
    graph: BodyGraph, x: Float[Tensor, "b n d"], v: Float[Tensor, "b n d"]
) -> tuple[Float[Tensor, "b n d C"], Float[Tensor, "b n d C"]]:
    """G = dPhi/dx and its time derivative, which is d(Phi_dot)/dx as well; d(Phi_dot)/dv is G."""
    rows = Constraints(graph).like(x)
    return tuple(torch.einsum("cn,bcd->bndc", rows.rows, u) for u in (directions(rows, x), rates(rows, v)))


def project_onto_constraints(
    graph: BodyGraph, z: Float[Tensor, "b 2 n d"], tol: float = 1e-5, max_steps: int = 500
) -> Float[Tensor, "b 2 n d"]:
    """The states (x, v) moved onto the constraints, each by Newton's method until its RMS violation is below ``tol``.

    A step is the smallest that solves the linearised constraints, clamped to half of the state's RMS. Float64 is wanted.
    Raises ``ValueError`` where a state does not get there within ``max_steps``.
    """
    projected, violation = newton(graph, z, tol, max_steps)
    if not bool((violation <= tol).all()):
        raise ValueError(
            f"z violates the constraints by {violation.max():.1e} after {max_steps} steps, allowed are states nearer to them"
        )
    return projected


@torch.no_grad()
def newton(
    graph: BodyGraph, z: Float[Tensor, "b 2 n d"], tol: float = 1e-5, max_steps: int = 500
) -> tuple[Float[Tensor, "b 2 n d"], Float[Tensor, "b"]]:
    """``project_onto_constraints`` without the complaint: the states, and the RMS violation each of them came in with last."""
    if not tol > 0.0:
        raise ValueError(f"tol is {tol}, allowed is a number above 0")
    if max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}, allowed is a whole number of at least 1")
    if graph.num_constraints == 0:
        return z.clone(), z.new_zeros(len(z))
    rows, z = Constraints(graph).like(z), z.clone()
    violation = z.new_full((len(z),), torch.inf)
    moving = torch.arange(len(z), device=z.device)
    for _ in range(max_steps):
        x, v = z[moving].unbind(1)
        psi = residual(rows, x, v).flatten(1)
        violation[moving] = psi.square().mean(1).sqrt()
        g, g_dot = (
            torch.einsum("cn,bcd->bcnd", rows.rows, u).flatten(2) for u in (directions(rows, x), rates(rows, v))
        )
        jacobian = torch.cat((torch.cat((g, torch.zeros_like(g)), 2), torch.cat((g_dot, g), 2)), 1)
        finite = psi.isfinite().all(1)
        moving, psi, jacobian = moving[finite], psi[finite], jacobian[finite]
        if not len(moving):
            break
        # The pseudo-inverse bears constraints that repeat each other.
        inverse = torch.linalg.pinv(jacobian @ jacobian.mT, hermitian=True)
        step = -(jacobian.mT @ (inverse @ psi.unsqueeze(-1))).view(len(moving), *z.shape[1:])
        limit = 0.5 * z[moving].square().mean((1, 2, 3), keepdim=True).sqrt()
        z[moving] = z[moving] + step.clamp(-limit, limit)
        moving = moving[violation[moving] > tol]
        if not len(moving):
            break
    return z, violation


def kinetic_energy(mass: float, moments: Sequence[float], velocities: Sequence[Sequence[float]]) -> float:
    """v^T M v / 2 of one body, from the velocities of its centre and of the ends of its axes.

    >>> kinetic_energy(2.0, [0.75], [[1.0, 0.0], [1.0, 0.5]])
    1.1875
    """
    v = torch.as_tensor(velocities, dtype=torch.float64)
    if v.ndim != 2 or v.shape[0] != len(moments) + 1:
        raise ValueError(f"velocities has shape {tuple(v.shape)}, allowed are {len(moments) + 1} points")
    graph = BodyGraph(v.shape[1])
    graph.body(mass, moments)
    matrix = Constraints(graph).mass_matrix(torch.from_numpy(graph.moments()))
    return float(0.5 * (v * (matrix @ v)).sum())
