"""Simplifying Hamiltonian and Lagrangian neural networks via explicit constraints (Finzi, Wang, Wilson, 2020, arXiv 2010.13581).

In generalised coordinates q the mass matrix M(q) and the potential are intricate, and a network has to learn both. Embedded
in Cartesian coordinates x the same system has constant masses and a simple potential, and moves where Phi(x) = 0:

    H(x, p) = p^T M^-1 p / 2 + V(x),      Psi = (Phi, DPhi^T M^-1 p)
    CHNN:  dz/dt = P J grad H,    P = I - J DPsi (DPsi^T J DPsi)^-1 DPsi^T,    J = [[0, I], [-I, 0]]
    CLNN:  dv/dt = f - M^-1 G (G^T M^-1 G)^-1 (G^T f + Gdot^T v),    f = -M^-1 grad V,  G = dPhi/dx

Only V (a small network) and the masses are learned; the constraints hold exactly, up to the step of the integrator. HNN,
DeLaN and NeuralODE are the paper's baselines in generalised coordinates. All derivatives of the networks by their inputs are
written out, so that training differentiates once; the official code goes through autograd twice.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from saigen.papers.physics.constrained_hamiltonian.bodies import (
    BodyGraph,
    Constraints,
    Rows,
    along,
    directions,
    pull,
    rates,
    residual,
)
from saigen.papers.physics.constrained_hamiltonian.networks import CosSin, TanhNet
from saigen.papers.physics.constrained_hamiltonian.solver import Field, rollout

MASSES = ("learned", "known")
EPSILON = 1e-4
"""What is added to the diagonal of a learned M^-1(q)."""


class Dynamics(nn.Module):
    """A system that moves: states z are positions and velocities (b, 2, ...), the field lives in a phase space of its own."""

    def to_phase(self, z: Tensor) -> Tensor:
        """(x, v) in the coordinates of the field."""
        return z

    def from_phase(self, s: Tensor) -> Tensor:
        """Back to (x, v)."""
        return s

    def vector_field(self, z: Tensor) -> Field:
        """ds/dt as a function of phase-space states of the precision of ``z``; what does not move is computed once."""
        raise NotImplementedError

    def integrate(
        self,
        z0: Float[Tensor, "b 2 *state"],
        t: Float[Tensor, "T"],
        method: str = "rk4",
        *,
        tol: float = 1e-7,
        substeps: int = 1,
    ) -> Float[Tensor, "b T 2 *state"]:
        """Positions and velocities at the times ``t`` (in seconds), from ``z0`` at the first of them.

        ``rk4`` steps from time to time (``substeps`` to each) and is what training differentiates; ``dopri5`` chooses its
        steps for a relative tolerance of ``tol`` and gives no gradient. Below 1e-5 make the model ``double()``. Autocast is
        off inside: rounding would leave the constraints.
        """
        self._check(z0)
        own = next((parameter.dtype for parameter in self.parameters()), z0.dtype)
        if z0.dtype != own:
            raise ValueError(f"z0 is {z0.dtype}, allowed is {own}, the precision of the model")
        with torch.autocast(z0.device.type, enabled=False):
            states = rollout(self.vector_field(z0), self.to_phase(z0), t, method, tol=tol, substeps=substeps)
            return self.from_phase(states)

    def forward(self, z0: Float[Tensor, "b 2 *state"], t: Float[Tensor, "T"]) -> Float[Tensor, "b T 2 *state"]:
        """The rollout that training compares with the truth: RK4, a step from each time to the next."""
        return self.integrate(z0, t)

    def _check(self, z: Tensor) -> None:
        raise NotImplementedError

    @staticmethod
    def convert_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The official code's weights in our names: those of its Lightning wrapper without their prefix."""
        return {name.removeprefix("model."): value for name, value in state.items()}


# Cartesian coordinates and constraints ------------------------------------------------------------------------------


def symplectic_projection(d_psi: Float[Tensor, "*b z k"], f: Float[Tensor, "*b z"]) -> Float[Tensor, "*b z"]:
    """P f = f - J DPsi (DPsi^T J DPsi)^-1 DPsi^T f, as the paper has it, for any constraint gradients DPsi of a state.

    ``CHNN`` solves the same system by its blocks; this is for constraints of one's own.
    """
    if d_psi.shape[-2] % 2 or d_psi.shape[-1] % 2:
        raise ValueError(f"d_psi has shape {tuple(d_psi.shape)}, allowed are even numbers of rows and columns")
    if d_psi.shape[-1] == 0:
        return f
    x, p = d_psi.chunk(2, -2)
    turned = torch.cat((p, -x), -2)
    return f - (turned @ torch.linalg.solve(d_psi.mT @ turned, d_psi.mT @ f.unsqueeze(-1))).squeeze(-1)


def _factor(a: Tensor, redundant: bool) -> Tensor:
    """What solves A lambda = r for A = G^T M^-1 G, computed once a state."""
    return torch.linalg.pinv(a, hermitian=True) if redundant else torch.linalg.cholesky_ex(a).L


def _solve(factor: Tensor, r: Tensor, redundant: bool) -> Tensor:
    r = r.unsqueeze(-1)
    return (factor @ r if redundant else torch.cholesky_solve(r, factor)).squeeze(-1)


def hamiltonian_field(
    x: Float[Tensor, "*b n d"], p: Float[Tensor, "*b n d"], force: Float[Tensor, "*b n d"], m_inv: Float[Tensor, "n n"],
    c: Rows, redundant: bool = False,
) -> tuple[Float[Tensor, "*b n d"], Float[Tensor, "*b n d"]]:  # fmt: skip
    """(dx/dt, dp/dt) = P J grad H for ``force`` = -grad V.

    DPsi = [[G, R], [0, M^-1 G]] with R = d(Phi_dot)/dx, so that DPsi^T J DPsi = [[0, A], [-A, B]] with A = G^T M^-1 G and
    B = R^T M^-1 G - G^T M^-1 R: two solves with the C x C matrix A stand for one with 2C x 2C.
    """
    v = m_inv @ p
    if c.rows.shape[0] == 0:
        return v, force
    u, w = directions(c, x), rates(c, v)
    k = c.rows @ m_inv @ c.rows.mT
    factor = _factor(k * (u @ u.mT), redundant)
    skew = k * (w @ u.mT)
    b = _solve(factor, along(c, u, v), redundant)
    r = along(c, w, v) + along(c, u, m_inv @ force)
    a = _solve(factor, ((skew - skew.mT) @ b.unsqueeze(-1)).squeeze(-1) - r, redundant)
    return v - m_inv @ pull(c, u, b), force + pull(c, u, a) + pull(c, w, b)


def lagrangian_field(
    x: Float[Tensor, "*b n d"], v: Float[Tensor, "*b n d"], force: Float[Tensor, "*b n d"], m_inv: Float[Tensor, "n n"],
    c: Rows, redundant: bool = False,
) -> Float[Tensor, "*b n d"]:  # fmt: skip
    """dv/dt = f - M^-1 G (G^T M^-1 G)^-1 (G^T f + Gdot^T v) for ``force`` = -grad V, f = M^-1 force."""
    f = m_inv @ force
    if c.rows.shape[0] == 0:
        return f
    u, w = directions(c, x), rates(c, v)
    factor = _factor((c.rows @ m_inv @ c.rows.mT) * (u @ u.mT), redundant)
    return f - m_inv @ pull(c, u, _solve(factor, along(c, u, f) + along(c, w, v), redundant))


class _Constrained(Dynamics):
    """What CHNN and CLNN share: a potential, masses, and a graph's constraints. See ``CHNN`` for the arguments."""

    def __init__(
        self,
        graph: BodyGraph,
        hidden: int = 256,
        layers: int = 3,
        *,
        potential: Callable[[Tensor], Tensor] | None = None,
        masses: str = "learned",
        redundant: bool = False,
    ) -> None:
        super().__init__()
        if not graph.bodies:
            raise ValueError("graph is empty, allowed is a graph with one body or more")
        if masses not in MASSES:
            raise ValueError(f"masses is {masses!r}, allowed are {', '.join(MASSES)}")
        self.n, self.d, self.redundant = graph.num_points, graph.dim, redundant
        self.constraints = Constraints(graph)
        self._moments = graph.moments()
        self.known_potential = potential
        if masses == "learned":
            of = {k: [body for body in graph.bodies if body.extent == k] for k in range(graph.dim + 1)}
            self.d_moments = nn.ParameterDict(
                {str(k): nn.init.normal_(nn.Parameter(torch.empty(len(b), k + 1)), std=0.1) for k, b in of.items() if b}
            )
            # The parameters are sorted by extent, the points by body.
            self._order = [point for bodies in of.values() for body in bodies for point in body.points]
            self._order = sorted(range(self.n), key=self._order.__getitem__)
        else:
            self.d_moments = None
        if potential is None:
            self.potential_net = TanhNet(self.n * self.d, 1, hidden, layers)

    def moments(self, like: Tensor) -> Float[Tensor, "n"]:
        """Mass and inertias in the order of the points: exp(theta), or those known, in the precision of ``like``."""
        if self.d_moments is None:
            return torch.from_numpy(self._moments).to(like)
        theta = torch.cat([theta.flatten() for theta in self.d_moments.values()])
        return theta[self._order].exp()

    def potential(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b"]:
        """V(x)."""
        if self.known_potential is not None:
            return self.known_potential(x)
        return self.potential_net(x.flatten(-2)).squeeze(-1)

    def force(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
        """-grad V."""
        if self.known_potential is not None:
            return -torch.func.grad(lambda at: self.known_potential(at).sum())(x)
        return -self.potential_net.pull(x.flatten(-2))[1].view_as(x)

    def energy(self, z: Float[Tensor, "*b 2 n d"]) -> Float[Tensor, "*b"]:
        """H of positions and velocities: v^T M v / 2 + V(x)."""
        x, v = z.unbind(-3)
        mass = self.constraints.mass_matrix(self.moments(z))
        return 0.5 * (v * (mass @ v)).sum((-2, -1)) + self.potential(x)

    def residual(self, z: Float[Tensor, "*b 2 n d"]) -> Float[Tensor, "*b 2 C"]:
        """By how much positions and velocities break the constraints: Phi and its time derivative."""
        return residual(self.constraints.like(z), *z.unbind(-3))

    def _check(self, z: Tensor) -> None:
        if z.ndim != 4 or z.shape[1:] != (2, self.n, self.d):
            raise ValueError(
                f"z0 has shape {tuple(z.shape)}, allowed is (b, 2, {self.n}, {self.d}): positions and velocities of the points"
            )
        if not self.redundant and not torch.compiler.is_compiling() and self.constraints.repeat(z[:, 0]):
            raise ValueError(
                "redundant is False, allowed is True for this graph: at z0 some of its constraints repeat each other or vanish"
            )

    def _inverse(self, z: Tensor) -> Tensor:
        return self.constraints.inverse_mass_matrix(self.moments(z))


class CHNN(_Constrained):
    """Constrained Hamiltonian neural network: V(x) and masses are learned, dz/dt = P J grad H.

    ``graph`` says what the bodies are and how they hang together. ``potential`` is a known V of positions (b, n, d), one
    number a state, in place of the network; ``masses="known"`` takes those of the graph, so that with both the true
    system moves. ``redundant`` bears constraints that repeat each other (hinges of solids), at the price of an
    eigendecomposition a step.
    """

    def to_phase(self, z: Tensor) -> Tensor:
        """(x, p) of (x, v)."""
        x, v = z.unbind(-3)
        return torch.stack((x, self.constraints.mass_matrix(self.moments(z)) @ v), -3)

    def from_phase(self, s: Tensor) -> Tensor:
        """(x, v) of (x, p)."""
        x, p = s.unbind(-3)
        return torch.stack((x, self._inverse(s) @ p), -3)

    def vector_field(self, z: Tensor) -> Field:
        """(dx/dt, dp/dt) of states (x, p)."""
        m_inv, rows = self._inverse(z), self.constraints.like(z)
        return lambda s: self._derivative(s, m_inv, rows)

    def _derivative(self, s: Tensor, m_inv: Tensor, rows: Rows) -> Tensor:
        x, p = s.unbind(-3)
        return torch.stack(hamiltonian_field(x, p, self.force(x), m_inv, rows, self.redundant), -3)


class CLNN(_Constrained):
    """Constrained Lagrangian neural network: the same V and masses, in positions and velocities. Arguments as ``CHNN``."""

    def vector_field(self, z: Tensor) -> Field:
        """(v, dv/dt) of states (x, v)."""
        m_inv, rows = self._inverse(z), self.constraints.like(z)
        return lambda s: self._derivative(s, m_inv, rows)

    def _derivative(self, s: Tensor, m_inv: Tensor, rows: Rows) -> Tensor:
        x, v = s.unbind(-3)
        return torch.stack((v, lagrangian_field(x, v, self.force(x), m_inv, rows, self.redundant)), -3)


# Generalised coordinates: the baselines -----------------------------------------------------------------------------


class _Generalised(Dynamics):
    def __init__(self, q_dim: int, angular_dims: tuple[int, ...]) -> None:
        super().__init__()
        if q_dim < 1:
            raise ValueError(f"q_dim is {q_dim}, allowed is a whole number of at least 1")
        if not set(angular_dims) <= set(range(q_dim)) or len(set(angular_dims)) != len(angular_dims):
            raise ValueError(f"angular_dims is {angular_dims}, allowed are numbers from 0 to {q_dim - 1}, each once")
        self.q_dim, self.angular_dims = q_dim, tuple(angular_dims)

    def _check(self, z: Tensor) -> None:
        if z.ndim != 3 or z.shape[1:] != (2, self.q_dim):
            raise ValueError(
                f"z0 has shape {tuple(z.shape)}, allowed is (b, 2, {self.q_dim}): coordinates and their rates"
            )


class HNN(_Generalised):
    """Hamiltonian network in generalised coordinates: H = p^T M^-1(q) p / 2 + V(q), with M^-1 = L L^T + 1e-4 I learned.

    ``angular_dims`` enter both networks as cosine and sine; the diagonal of L is a softplus.
    """

    def __init__(self, q_dim: int, hidden: int = 256, layers: int = 3, *, angular_dims: tuple[int, ...] = ()) -> None:
        super().__init__(q_dim, angular_dims)
        features = [CosSin(q_dim, self.angular_dims) for _ in range(2)]
        self.potential_net = TanhNet(features[0].num_features, 1, hidden, layers, features[0])
        self.mass_net = TanhNet(features[1].num_features, q_dim * q_dim, hidden, layers, features[1], zero_bias=True)

    def _triangle(self, raw: Tensor) -> Tensor:
        """L of the network's output, whose upper triangle it is."""
        raw = raw.unflatten(-1, (self.q_dim, self.q_dim))
        return (raw.triu(1) + torch.diag_embed(F.softplus(raw.diagonal(dim1=-2, dim2=-1)))).mT

    def _slope(self, raw: Tensor) -> Tensor:
        """dL^T / d(output), entry by entry: 1 above the diagonal, the sigmoid on it, 0 below."""
        raw = raw.unflatten(-1, (self.q_dim, self.q_dim))
        return torch.ones_like(raw).triu(1) + torch.diag_embed(raw.diagonal(dim1=-2, dim2=-1).sigmoid())

    def inverse_mass(self, q: Float[Tensor, "*b q"]) -> Float[Tensor, "*b q q"]:
        """M^-1(q) = L L^T + 1e-4 I."""
        lower = self._triangle(self.mass_net(q))
        return lower @ lower.mT + EPSILON * torch.eye(self.q_dim, device=q.device, dtype=lower.dtype)

    def potential(self, q: Float[Tensor, "*b q"]) -> Float[Tensor, "*b"]:
        """V(q)."""
        return self.potential_net(q).squeeze(-1)

    def momentum(self, z: Float[Tensor, "*b 2 q"]) -> Float[Tensor, "*b q"]:
        """p = M(q) v."""
        q, v = z.unbind(-2)
        m_inv = self.inverse_mass(q)
        return torch.cholesky_solve(v.unsqueeze(-1), torch.linalg.cholesky_ex(m_inv).L).squeeze(-1)

    def energy(self, z: Float[Tensor, "*b 2 q"]) -> Float[Tensor, "*b"]:
        """The learned H of coordinates and rates."""
        q, v = z.unbind(-2)
        return 0.5 * (v * self.momentum(z)).sum(-1) + self.potential(q)

    def to_phase(self, z: Tensor) -> Tensor:
        """(q, p) of (q, v)."""
        return torch.stack((z[..., 0, :], self.momentum(z)), -2)

    def from_phase(self, s: Tensor) -> Tensor:
        """(q, v) of (q, p)."""
        q, p = s.unbind(-2)
        return torch.stack((q, (self.inverse_mass(q) @ p.unsqueeze(-1)).squeeze(-1)), -2)

    def _cotangent(self, raw: Tensor, p: Tensor) -> Tensor:
        """d(p^T M^-1 p / 2) / d(output) of the network."""
        return (((self._triangle(raw).mT @ p) @ p.mT) * self._slope(raw)).flatten(-2)

    def _kinetic(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """L(q), and the gradient by q of p^T M^-1(q) p / 2 at constant p."""
        raw, gradient = self.mass_net.pull(q, lambda raw: self._cotangent(raw, p.unsqueeze(-1)))
        return self._triangle(raw), gradient

    def vector_field(self, z: Tensor) -> Field:
        """(M^-1 p, -dH/dq) of states (q, p)."""
        return self._derivative

    def _derivative(self, s: Tensor) -> Tensor:
        q, p = s.unbind(-2)
        lower, kinetic = self._kinetic(q, p)
        rate = (lower @ (lower.mT @ p.unsqueeze(-1))).squeeze(-1) + EPSILON * p
        return torch.stack((rate, -self.potential_net.pull(q)[1] - kinetic), -2)


class DeLaN(HNN):
    """Deep Lagrangian network: the potential and mass matrix of ``HNN``, in the Euler-Lagrange equations of q and dq/dt.

    d2q/dt2 = M^-1 (dL/dq - dM/dt v) = -M^-1 (dV/dq + d(p^T M^-1 p / 2)/dq) + d(M^-1)/dt p,  p = M v.
    """

    def to_phase(self, z: Tensor) -> Tensor:
        """(q, v) as they are."""
        return z

    def from_phase(self, s: Tensor) -> Tensor:
        """(q, v) as they are."""
        return s

    def vector_field(self, z: Tensor) -> Field:
        """(v, dv/dt) of states (q, v)."""
        return self._derivative

    def _derivative(self, s: Tensor) -> Tensor:
        q, v = s.unbind(-2)
        p = self.momentum(s)
        lower, kinetic = self._kinetic(q, p)
        raw, along = self.mass_net.push(q, v)
        rate = (along.unflatten(-1, (self.q_dim, self.q_dim)) * self._slope(raw)).mT
        force = -self.potential_net.pull(q)[1] - kinetic
        a = lower @ (lower.mT @ force.unsqueeze(-1) + rate.mT @ p.unsqueeze(-1))
        a = a + rate @ (lower.mT @ p.unsqueeze(-1))
        return torch.stack((v, a.squeeze(-1) + EPSILON * force), -2)


class NeuralODE(_Generalised):
    """A network for (dq/dt, d2q/dt2) with no physics in it, of the cosines and sines of the angles and of the rest."""

    def __init__(self, q_dim: int, hidden: int = 256, layers: int = 3, *, angular_dims: tuple[int, ...] = ()) -> None:
        super().__init__(q_dim, angular_dims)
        # The rates are coordinates q_dim to 2 q_dim - 1 of the network's input, and no angles.
        features = CosSin(2 * q_dim, self.angular_dims)
        self.net = TanhNet(features.num_features, 2 * q_dim, hidden, layers, features)

    def vector_field(self, z: Tensor) -> Field:
        """The network's output as a state."""
        return lambda s: self.net(s.flatten(-2)).view_as(s)


NETWORKS: dict[str, Any] = {"CHNN": CHNN, "CLNN": CLNN, "HNN": HNN, "DeLaN": DeLaN, "NeuralODE": NeuralODE}
CARTESIAN = ("CHNN", "CLNN")
