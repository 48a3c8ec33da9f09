"""The systems of the experiments: bodies, potentials, generalised coordinates, initial states (appendix of arXiv 2010.13581).

Lengths are in metres, masses in kilograms, times in seconds; states z are positions and velocities (..., 2, n, d).
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saigen.papers.physics.constrained_hamiltonian.bodies import BodyGraph, newton, project_onto_constraints
from saigen.papers.physics.constrained_hamiltonian.model import CARTESIAN, CHNN, NETWORKS, Dynamics

GRAVITY = 9.81
GYRO_CENTRE = (0.0, 0.0, 0.22172854)
GYRO_MOMENTS = (0.24137838, 0.24137838, 0.036941541)
ROTOR_MOMENTS = (0.0029851343, 0.099063365, 0.021108513)
"""What the official code computes from its meshes (those of the gyroscope times 100), in m and m^2."""
TOLERANCE = 1e-7
"""Relative tolerance of true trajectories, as in the official code."""


class System:
    """A mechanical system whose true motion is known.

    ``graph`` holds its bodies, ``q_dim`` and ``angular_dims`` its generalised coordinates, ``dt`` the time between two
    samples of a trajectory and ``horizon`` a trajectory's length.
    """

    graph: BodyGraph
    q_dim: int
    angular_dims: tuple[int, ...]
    dt: float
    horizon: float

    def potential(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b"]:
        """V(x), in joules."""
        raise NotImplementedError

    def position(self, q: Float[Tensor, "*b q"]) -> Float[Tensor, "*b n d"]:
        """The points at generalised coordinates q."""
        raise NotImplementedError

    def coordinates(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b q"]:
        """Generalised coordinates of the points; angles in (-pi, pi]."""
        raise NotImplementedError

    def _draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Initial states in float64; of a chain, before they are projected onto its constraints."""
        raise NotImplementedError

    @property
    def times(self) -> Float[Tensor, "T"]:
        """The times of a trajectory's samples."""
        return torch.arange(round(self.horizon / self.dt), dtype=torch.float64) * self.dt

    def dynamics(self) -> CHNN:
        """The true motion: CHNN with the true potential and masses, in float64."""
        return CHNN(self.graph, potential=self.potential, masses="known").double()

    def energy(self, z: Float[Tensor, "*b 2 n d"]) -> Float[Tensor, "*b"]:
        """Kinetic and potential energy, in joules."""
        return self.dynamics().energy(z)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Float[Tensor, "b 2 n d"]:
        """Initial states that keep the constraints, in float64; those that no projection brings there are drawn anew."""
        if count < 1:
            raise ValueError(f"count is {count}, allowed is a whole number of at least 1")
        found: list[Tensor] = []
        while sum(map(len, found)) < count:
            z, violation = newton(self.graph, self._draw(count, generator))
            found.append(z[violation <= 1e-5])
        return torch.cat(found)[:count]

    def trajectories(
        self, count: int, generator: torch.Generator | None = None, method: str = "dopri5"
    ) -> Float[Tensor, "b T 2 n d"]:
        """True trajectories at ``times`` from states of ``sample``."""
        return self.follow(self.sample(count, generator), self.times, method)

    @torch.no_grad()
    def follow(
        self, z0: Float[Tensor, "b 2 n d"], t: Float[Tensor, "T"], method: str = "dopri5"
    ) -> Float[Tensor, "b T 2 n d"]:
        """The true motion from ``z0``, in float64."""
        return self.dynamics().integrate(z0.double(), t, method, tol=TOLERANCE)

    def perturbed(
        self, z: Float[Tensor, "b 2 n d"], size: float = 1e-4, generator: torch.Generator | None = None
    ) -> Float[Tensor, "b 2 n d"]:
        """The states with Gaussian noise of that size, brought back onto the constraints: the error that chaos makes of it
        is what a learned model's can be compared with."""
        noise = torch.randn(z.shape, generator=generator, dtype=torch.float64)
        return project_onto_constraints(self.graph, z.double() + size * noise)

    def to_cartesian(self, z: Float[Tensor, "*b 2 q"]) -> Float[Tensor, "*b 2 n d"]:
        """Positions and velocities of generalised coordinates and their rates."""
        q, rate = z.unbind(-2)
        return torch.stack(torch.func.jvp(self.position, (q,), (rate,)), -3)

    def to_generalised(self, z: Float[Tensor, "*b 2 n d"]) -> Float[Tensor, "*b 2 q"]:
        """Generalised coordinates and rates; of trajectories (b, T, 2, n, d), the angles go on over pi along the time T."""
        x, v = z.unbind(-3)
        q = self.coordinates(x)
        if z.ndim == 5 and self.angular_dims:
            angles = list(self.angular_dims)
            q[..., angles] = torch.from_numpy(np.unwrap(q[..., angles].detach().cpu().numpy(), axis=1)).to(q)
        flat = q.reshape(-1, self.q_dim)
        jacobian = torch.func.vmap(torch.func.jacfwd(self.position))(flat).flatten(1, 2)
        rate = torch.linalg.pinv(jacobian) @ v.reshape(len(flat), -1, 1)
        return torch.stack((q, rate.view_as(q)), -2)


def _uniform(count: int, seed: int) -> tuple[np.random.RandomState, list[float]]:
    draws = np.random.RandomState(seed)
    return draws, [0.6 + 0.8 * draws.rand() for _ in range(count)][::-1]


def _gravity(graph: BodyGraph) -> Callable[[Tensor], Tensor]:
    """g times mass times height of the centres, height being the last coordinate."""
    centres = [body.first for body in graph.bodies]
    masses = [body.mass for body in graph.bodies]
    return lambda x: GRAVITY * (x[..., centres, -1] * x.new_tensor(masses)).sum(-1)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0.0:
            raise ValueError(f"{name} is {value}, allowed is a number above 0")


def _whole(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, allowed is a whole number of at least 1")


class ChainPendulum(System):
    """``links`` point masses in the plane, each on a rod from the one before, the first from the origin.

    Masses and lengths are drawn from [0.6, 1.4] with NumPy's seed 0, or given, one for all. Generalised coordinates are
    the angles of the rods with the downward vertical.
    """

    dt, horizon = 0.03, 3.0

    def __init__(self, links: int = 2, mass: float | None = None, length: float | None = None) -> None:
        _whole(links=links)
        draws, masses = _uniform(links, 0)
        lengths = [0.6 + 0.8 * draws.rand() for _ in range(links)][::-1]
        masses, self.lengths = (
            masses if mass is None else links * [mass],
            lengths if length is None else links * [length],
        )
        self.graph = BodyGraph(2)
        for i in range(links):
            self.graph.point(masses[i])
            if i:
                self.graph.distance(i - 1, i, self.lengths[i])
            else:
                self.graph.tether(0, (0.0, 0.0), self.lengths[0])
        self.q_dim, self.angular_dims = links, tuple(range(links))
        self._potential = _gravity(self.graph)

    def potential(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b"]:
        """Gravity."""
        return self._potential(x)

    def position(self, q: Float[Tensor, "*b q"]) -> Float[Tensor, "*b n d"]:
        """Angles to points."""
        rods = torch.stack((q.sin(), -q.cos()), -1) * q.new_tensor(self.lengths).unsqueeze(-1)
        return rods.cumsum(-2)

    def coordinates(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b q"]:
        """Points to angles."""
        rods = torch.diff(x, dim=-2, prepend=torch.zeros_like(x[..., :1, :]))
        return torch.atan2(rods[..., 0], -rods[..., 1])

    def _draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        z = self.to_cartesian(_normal((count, 2, self.q_dim), generator))
        x = z[:, 0] + 0.2 * _normal(z[:, 0].shape, generator)
        v = 3.0 * (0.5 * z[:, 1] + 0.4 * _normal(z[:, 1].shape, generator))
        return torch.stack((x, v), 1)


def _normal(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class _Spherical(System):
    """Point masses on rods of one length from pivots in space; each has an azimuth and a polar angle about the x axis, so
    that hanging down is no pole."""

    dt, horizon = 0.05, 5.0

    def _hang(self, pivots: list[tuple[float, float, float]], masses: list[float], length: float) -> None:
        self.graph, self.length, self.pivots = BodyGraph(3), length, pivots
        for i, (pivot, mass) in enumerate(zip(pivots, masses, strict=True)):
            self.graph.point(mass)
            self.graph.tether(i, pivot, length)
        self.q_dim = 2 * len(pivots)
        self.angular_dims = tuple(range(self.q_dim))
        self._gravity = _gravity(self.graph)

    def position(self, q: Float[Tensor, "*b q"]) -> Float[Tensor, "*b n d"]:
        """Angles (phi, theta) of each mass to its point."""
        phi, theta = q.unflatten(-1, (-1, 2)).unbind(-1)
        rods = torch.stack((-theta.cos(), theta.sin() * phi.sin(), theta.sin() * phi.cos()), -1)
        return self.length * rods + q.new_tensor(self.pivots)

    def coordinates(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b q"]:
        """Points to angles."""
        a, b, c = (x - x.new_tensor(self.pivots)).unbind(-1)
        return torch.stack((torch.atan2(b, c), torch.atan2((b * b + c * c).sqrt(), -a)), -1).flatten(-2)


class CoupledPendulum(_Spherical):
    """``bobs`` pendulums in space, pivots 1 m apart along x, with springs between neighbours' masses."""

    def __init__(self, bobs: int = 3, mass: float | None = 1.0, length: float = 1.0, spring: float = 10.0) -> None:
        _whole(bobs=bobs)
        _positive(spring=spring)
        masses = _uniform(bobs, 0)[1] if mass is None else bobs * [mass]
        self._hang([(float(i), 0.0, 0.0) for i in range(bobs)], masses, length)
        self.spring = spring

    def potential(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b"]:
        """Gravity, and springs at rest at 1 m."""
        stretch = torch.diff(x, dim=-2).norm(dim=-1) - 1.0
        return self._gravity(x) + 0.5 * self.spring * stretch.square().sum(-1)

    def _draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        z = 0.3 * _normal((count, 2, self.q_dim), generator)
        z[:, 0, 1::2] += np.pi / 2
        z[:, 0, ::2] += np.pi
        return self.to_cartesian(z)


class MagnetPendulum(_Spherical):
    """A pendulum with a magnetic dipole at its end, above ``magnets`` fixed dipoles on a circle of radius 0.1 m.

    The sign of the term m_0 m_i of the dipoles' energy is the official code's, opposite to a textbook's.
    """

    def __init__(self, mass: float = 3.0, length: float = 1.0, moment: float = 0.3, magnets: int = 2) -> None:
        _whole(magnets=magnets)
        _positive(moment=moment)
        self._hang([(0.0, 0.0, 0.0)], [mass], length)
        around = 2 * np.pi * np.arange(magnets) / magnets
        height = np.full(magnets, -1.05 * length)
        self.moment, self.magnets = moment, np.stack((0.1 * np.cos(around), 0.1 * np.sin(around), height), -1)

    def potential(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b"]:
        """Gravity, and the dipoles."""
        place = x[..., 0, :]
        ours = (self.moment * place / place.square().sum(-1, keepdim=True)).unsqueeze(-2)
        r = torch.from_numpy(self.magnets).to(x) - place.unsqueeze(-2)
        square, along = r.square().sum(-1), (ours * r).sum(-1)
        theirs = self.moment * r[..., 2]
        dipoles = (-3 * along * theirs - square * self.moment * ours[..., 2]) / (4 * np.pi * square**2.5)
        return self._gravity(x) + dipoles.sum(-1)

    def _draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        z = _normal((count, 2, 2), generator) * torch.tensor([[0.3, 0.2], [0.05, 0.4]], dtype=torch.float64)
        return self.to_cartesian(z + torch.tensor([[np.pi, np.pi / 2], [0.0, 0.0]], dtype=torch.float64))


def rotation(angles: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3 3"]:
    """R = R_z(phi) R_x(theta) R_z(psi) of intrinsic ZXZ Euler angles."""
    (a, b, c), (d, e, f) = angles.cos().unbind(-1), angles.sin().unbind(-1)
    rows = (
        (a * c - d * b * f, -a * f - d * b * c, d * e),
        (d * c + a * b * f, -d * f + a * b * c, -a * e),
        (e * f, e * c, b),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


class _Solid(System):
    """One solid: its centre of mass and the ends of its three principal axes, turned by Euler angles."""

    def _frame(self, angles: Tensor) -> Tensor:
        """The points about the centre of mass."""
        r = rotation(angles).mT
        return torch.cat((torch.zeros_like(r[..., :1, :]), r), -2)

    @staticmethod
    def _angles(x: Tensor) -> Tensor:
        r = (x[..., 1:, :] - x[..., :1, :]).mT
        phi, psi = torch.atan2(r[..., 0, 2], -r[..., 1, 2]), torch.atan2(r[..., 2, 0], r[..., 2, 1])
        theta = torch.atan2((r[..., 0, 2].square() + r[..., 1, 2].square()).sqrt(), r[..., 2, 2])
        return torch.stack((phi, theta, psi), -1)


class Gyroscope(_Solid):
    """A heavy top whose tip is held at the origin. Mass, place of the centre over the tip and second moments are those that
    the official code computes from its mesh (and multiplies by 100)."""

    dt, horizon = 0.02, 2.0
    q_dim, angular_dims = 3, (0, 1, 2)

    def __init__(
        self, mass: float = 0.1, centre: tuple[float, float, float] = GYRO_CENTRE,
        moments: tuple[float, float, float] = GYRO_MOMENTS,
    ) -> None:  # fmt: skip
        self.centre, self.graph = tuple(centre), BodyGraph(3)
        body = self.graph.body(mass, moments)
        self.graph.joint(body, [-c for c in self.centre], None, (0.0, 0.0, 0.0))
        self._potential = _gravity(self.graph)

    def potential(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b"]:
        """Gravity."""
        return self._potential(x)

    def position(self, q: Float[Tensor, "*b q"]) -> Float[Tensor, "*b n d"]:
        """Euler angles to points."""
        frame = self._frame(q)
        return frame + (q.new_tensor(self.centre) @ frame[..., 1:, :]).unsqueeze(-2)

    def coordinates(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b q"]:
        """Points to Euler angles."""
        return self._angles(x)

    def _draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        z = 3.0 * (torch.rand((count, 2, 3), generator=generator, dtype=torch.float64) - 0.5)
        z[:, 1] *= torch.tensor([3.0, 0.2, 0.0], dtype=torch.float64)
        sign = 2.0 * torch.randint(2, (count,), generator=generator) - 1.0
        z[:, 1, 2] = 1.5 * sign * (_normal((count,), generator) + 7.0)
        return self.to_cartesian(z)


class Rotor(_Solid):
    """A solid that turns and drifts freely: rigidity is its only constraint. Second moments are those of the official mesh."""

    dt, horizon = 0.05, 5.0
    q_dim, angular_dims = 6, (3, 4, 5)

    def __init__(self, mass: float = 0.1, moments: tuple[float, float, float] = ROTOR_MOMENTS) -> None:
        self.graph = BodyGraph(3)
        self.graph.body(mass, moments)

    def potential(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b"]:
        """None: 0."""
        return 0.0 * x[..., 0, 0]

    def position(self, q: Float[Tensor, "*b q"]) -> Float[Tensor, "*b n d"]:
        """Centre and Euler angles to points."""
        return self._frame(q[..., 3:]) + q[..., None, :3]

    def coordinates(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b q"]:
        """Points to centre and Euler angles."""
        return torch.cat((x[..., 0, :], self._angles(x)), -1)

    def _draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        z = (2.0 * _normal((count, 2, 6), generator)).clamp(-3.0, 3.0)
        return self.to_cartesian(z * torch.tensor([0.1] * 3 + [1.0] * 3, dtype=torch.float64))


SYSTEMS: dict[str, type[System]] = {
    "ChainPendulum": ChainPendulum,
    "CoupledPendulum": CoupledPendulum,
    "MagnetPendulum": MagnetPendulum,
    "Gyroscope": Gyroscope,
    "Rotor": Rotor,
}


# Training and judging -----------------------------------------------------------------------------------------------


def network_for(
    system: System | str, network: str = "CHNN", hidden: int = 256, layers: int = 3, **options: object
) -> Dynamics:
    """The network of that name (``NETWORKS``) in the coordinates that it takes of ``system``.

    ``system`` may be a name as well, whose arguments are then the ``options``.
    """
    if network not in NETWORKS:
        raise ValueError(f"network is {network!r}, allowed are {', '.join(NETWORKS)}")
    if isinstance(system, str):
        if system not in SYSTEMS:
            raise ValueError(f"system is {system!r}, allowed are {', '.join(SYSTEMS)}")
        system = SYSTEMS[system](**options)
    if network in CARTESIAN:
        return NETWORKS[network](system.graph, hidden, layers)
    return NETWORKS[network](system.q_dim, hidden, layers, angular_dims=system.angular_dims)


def chunks(
    trajectories: Float[Tensor, "b T *z"], length: int = 5, generator: torch.Generator | None = None
) -> Float[Tensor, "b {length} *z"]:
    """One piece of ``length`` samples of each trajectory, of those that it falls into: the paper's training data."""
    count, samples = trajectories.shape[:2]
    if not 2 <= length <= samples:
        raise ValueError(f"length is {length}, allowed are 2 to {samples}, the samples of a trajectory")
    first = length * torch.randint(samples // length, (count,), generator=generator)
    at = first.unsqueeze(1) + torch.arange(length)
    return trajectories[torch.arange(count).unsqueeze(1), at]


def relative_error(predicted: Float[Tensor, "b T 2 n d"], true: Float[Tensor, "b T 2 n d"]) -> Float[Tensor, "b T"]:
    """|z' - z| / |z' + z| at each time: 1 where there is nothing in common. What is not finite counts as 1."""
    if predicted.shape != true.shape:
        raise ValueError(f"predicted has shape {tuple(predicted.shape)}, allowed is {tuple(true.shape)}, that of true")
    found = (predicted - true).flatten(2).norm(dim=2) / (predicted + true).flatten(2).norm(dim=2)
    return torch.where(found.isfinite(), found, torch.ones_like(found))


def geometric_mean_error(error: Float[Tensor, "b T"]) -> Float[Tensor, "b"]:
    """exp of the mean over time (trapezoids) of log(error + 1e-8)."""
    log = (error + 1e-8).log()
    return (torch.trapezoid(log, dim=1) / (error.shape[1] - 1)).exp()
