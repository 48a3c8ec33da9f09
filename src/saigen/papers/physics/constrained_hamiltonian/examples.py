"""Small instances of constrained Hamiltonian networks, their baselines, and what they stand on."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from saigen.example import Example
from saigen.papers.physics.constrained_hamiltonian import (
    CHNN,
    CLNN,
    HNN,
    BodyGraph,
    ChainPendulum,
    DeLaN,
    NeuralODE,
    chunks,
    geometric_mean_error,
    kinetic_energy,
    network_for,
    project_onto_constraints,
    relative_error,
    rollout,
    symplectic_projection,
)


def _graph() -> BodyGraph:
    """A rod that swings on its end, and a point mass that hangs from it."""
    graph = BodyGraph(2)
    rod, bob = graph.body(1.0, [0.1]), graph.point(0.5)
    graph.joint(rod, [0.5], None, [0.0, 0.0])
    graph.distance(rod, bob, 0.8, at_a=[-0.5])
    return graph


def _rollout_of(*shape: int) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    return lambda generator: (torch.randn(3, 2, *shape, generator=generator), torch.tensor([0.0, 0.01, 0.02, 0.03]))


class _GeometricMean(nn.Module):
    def forward(self, error: Tensor) -> Tensor:
        return geometric_mean_error(error.square())


def examples() -> Iterator[Example]:
    """The networks, the projector, the projection of states, the integrator and the judged error."""
    yield Example(
        name="chnn",
        kind="module",
        make=lambda: CHNN(_graph(), hidden=8),
        inputs=_rollout_of(3, 2),
        code="""import torch
from saigen.papers.physics.constrained_hamiltonian import CHNN, BodyGraph, ChainPendulum, chunks

graph = BodyGraph(2)                                         # a double pendulum in the plane
first, second = graph.point(), graph.point()
graph.tether(first, [0.0, 0.0], length=ChainPendulum(2).lengths[0])
graph.distance(first, second, length=ChainPendulum(2).lengths[1])
model = CHNN(graph, hidden=64)                               # learns V(x) and the masses

system = ChainPendulum(2)                                    # stands in for measured positions and velocities
z = chunks(system.trajectories(20), length=5).float()        # (20, 5, 2, points, 2)
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
for _ in range(5):                                           # some hundreds in earnest
    optimizer.zero_grad()
    loss = (model(z[:, 0], system.times[:5].float()) - z).abs().mean()
    loss.backward()
    optimizer.step()
print(loss, model.residual(model(z[:, 0], system.times[:5].float())).abs().max())""",
        wrong=(
            (lambda: CHNN(BodyGraph(2)), "graph"),
            (lambda: CHNN(_graph(), masses="fixed"), "masses"),
            (lambda: CHNN(_graph(), hidden=0), "hidden"),
            (lambda: CHNN(_graph(), layers=0), "layers"),
            (lambda: CHNN(_graph(), 4)(torch.zeros(1, 2, 2, 2), torch.zeros(2)), "z0"),
        ),
    )
    yield Example(
        name="clnn",
        kind="module",
        make=lambda: CLNN(_graph(), hidden=8),
        inputs=_rollout_of(3, 2),
        code="""import torch
from saigen.papers.physics.constrained_hamiltonian import Gyroscope, geometric_mean_error, network_for, relative_error

top = Gyroscope()
model = network_for(top, "CLNN", hidden=64).double()         # CHNN, CLNN, HNN, DeLaN or NeuralODE
z0 = top.sample(4, torch.Generator().manual_seed(0))
true = top.follow(z0, top.times)
print(geometric_mean_error(relative_error(model.integrate(z0, top.times, substeps=2), true)))""",
        wrong=(
            (lambda: network_for("Top"), "system"),
            (lambda: network_for("Gyroscope", "LNN"), "network"),
            (lambda: CLNN(_graph(), 4).integrate(*_rollout_of(3, 2)(torch.Generator()), "euler"), "method"),
        ),
    )
    for network, name in ((HNN, "hnn"), (DeLaN, "delan"), (NeuralODE, "neural_ode")):
        yield Example(
            name=name,
            kind="module",
            make=lambda network=network: network(3, hidden=8, angular_dims=(0, 2)),
            inputs=_rollout_of(3),
            code=f"""import torch
from saigen.papers.physics.constrained_hamiltonian import ChainPendulum, {network.__name__}

system = ChainPendulum(2)
model = {network.__name__}(system.q_dim, hidden=64, angular_dims=system.angular_dims)
q = system.to_generalised(system.sample(3)).float()          # angles and their rates
print(system.to_cartesian(model(q, system.times[:10].float())).shape)""",
            wrong=(
                (lambda network=network: network(0), "q_dim"),
                (lambda network=network: network(2, angular_dims=(3,)), "angular_dims"),
                (lambda network=network: network(2, 4)(torch.zeros(1, 2, 3), torch.zeros(2)), "z0"),
            ),
        )
    yield Example(
        name="symplectic_projection",
        kind="function",
        make=lambda: symplectic_projection,
        inputs=lambda generator: (
            torch.randn(3, 8, 2, generator=generator),
            torch.randn(3, 8, generator=generator),
        ),
        code="""import torch
from saigen.papers.physics.constrained_hamiltonian import symplectic_projection

d_psi = torch.randn(4, 2)                                    # gradients of phi and phi_dot by the state (x, p)
f = torch.randn(4)                                           # J grad H
print(d_psi.mT @ symplectic_projection(d_psi, f))            # 0: nothing is left across the constraints""",
        wrong=((lambda: symplectic_projection(torch.zeros(3, 2), torch.zeros(3)), "d_psi"),),
    )
    yield Example(
        name="project_onto_constraints",
        kind="function",
        make=lambda: lambda z: project_onto_constraints(_graph(), z),
        inputs=lambda generator: (torch.randn(4, 2, 3, 2, generator=generator, dtype=torch.float64),),
        code="""import torch
from saigen.papers.physics.constrained_hamiltonian import BodyGraph, constraint_residual, kinetic_energy, project_onto_constraints

graph = BodyGraph(3)
top = graph.body(mass=0.1, moments=[0.24, 0.24, 0.04])       # a solid: its centre and the ends of three axes
graph.joint(top, [0.0, 0.0, -0.2], None, [0.0, 0.0, 0.0])    # its tip stays at the origin
z = project_onto_constraints(graph, torch.randn(5, 2, 4, 3, dtype=torch.float64))
print(constraint_residual(graph, z[:, 0], z[:, 1]).abs().max())
print(kinetic_energy(2.0, [0.75], [[1.0, 0.0], [1.0, 0.5]]), "J of a rod that moves and turns")""",
        wrong=(
            (lambda: BodyGraph(0), "dim"),
            (lambda: _graph().point(-1.0), "mass"),
            (lambda: _graph().tether(0, [0.0], 1.0), "origin"),
            (lambda: _graph().tether(0, [0.0, 0.0], 0.0), "length"),
            (lambda: project_onto_constraints(_graph(), torch.zeros(1, 2, 3, 2), tol=0.0), "tol"),
            (lambda: kinetic_energy(1.0, [0.1], [[1.0, 0.0]]), "velocities"),
        ),
    )
    yield Example(
        name="rollout",
        kind="function",
        make=lambda: lambda s: rollout(lambda s: -s, s, torch.tensor([0.0, 0.5, 1.0])),
        inputs=lambda generator: (torch.randn(2, 5, generator=generator),),
        code="""import torch
from saigen.papers.physics.constrained_hamiltonian import rollout

decay = rollout(lambda s: -s, torch.ones(1, 1), torch.tensor([0.0, 1.0]), "dopri5")
print(decay[0, 1], "exp(-1) is 0.3679")""",
        wrong=(
            (lambda: rollout(lambda s: s, torch.zeros(1, 1), torch.zeros(2), "euler"), "method"),
            (lambda: rollout(lambda s: s, torch.zeros(1, 1), torch.zeros(2), substeps=0), "substeps"),
        ),
    )
    yield Example(
        name="geometric_mean_error",
        kind="loss",
        make=_GeometricMean,
        inputs=lambda generator: (0.1 + torch.rand(3, 6, generator=generator),),
        code="""import torch
from saigen.papers.physics.constrained_hamiltonian import ChainPendulum, geometric_mean_error, relative_error

system = ChainPendulum(3)                                    # chaos: what becomes of a disturbance of 1e-4?
z = system.sample(4, torch.Generator().manual_seed(0))
true, other = (system.follow(start, system.times) for start in (z, system.perturbed(z)))
print(geometric_mean_error(relative_error(other, true)))""",
        wrong=(
            (lambda: ChainPendulum(0), "links"),
            (lambda: chunks(torch.zeros(1, 4, 2, 1, 2), length=5), "length"),
            (lambda: relative_error(torch.zeros(1, 3, 2, 1, 2), torch.zeros(1, 4, 2, 1, 2)), "predicted"),
        ),
    )
