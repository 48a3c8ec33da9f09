"""Writes official.npz: fields, gradients, constraints, energies and coordinates that the authors' code gives.

    python tests/golden/constrained_hamiltonian/make.py CHECKOUT

CHECKOUT is one of mfinzi/constrained-hamiltonian-neural-networks (no licence stated); networkx, SciPy and matplotlib have
to be there. What else the code asks for is stood in for here: the decorators of its helper package, a reader of its
meshes, the removed ``torch.solve``, and torchdiffeq, which nothing here calls. All in float64. Parameters are filled by a
formula in the order of their names; the test fills ours likewise.
"""

import itertools
import os
import sys
import types
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch

STRIDE = 97


class Wavefront:
    """A reader of Wavefront meshes: vertices, and faces cut into triangles from their first vertex."""

    def __init__(self, name: str, collect_faces: bool = True) -> None:
        lines = [line.split() for line in Path(name).read_text().splitlines()]
        self.vertices = [tuple(map(float, line[1:4])) for line in lines if line[:1] == ["v"]]
        faces = []
        for line in lines:
            if line[:1] == ["f"]:
                corners = [int(corner.split("/")[0]) - 1 for corner in line[1:]]
                faces += [[corners[0], *pair] for pair in itertools.pairwise(corners[1:])]
        self.mesh_list = [types.SimpleNamespace(faces=faces)]


class FixedNumpySeed:
    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.state = np.random.get_state()
        np.random.seed(self.seed)

    def __exit__(self, *_: object) -> None:
        np.random.set_state(self.state)


def stand_in() -> None:
    modules = {
        "oil": {}, "oil.utils": {}, "oil.utils.utils": {"export": lambda f: f, "Named": type, "FixedNumpySeed": FixedNumpySeed},
        "torchdiffeq": {"odeint": None}, "pywavefront": {"Wavefront": Wavefront},
    }  # fmt: skip
    for name, contents in modules.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(contents)
    # The packages' own __init__ files import by hand what lies in them, cart poles and all.
    for name in ("biases", "biases.systems", "biases.models", "biases.dynamics"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [name.replace(".", "/")]
    Solution = namedtuple("Solution", ["solution", "lu"])
    torch.solve = lambda b, a: Solution(torch.linalg.solve(a, b), None)


def wave(shape: tuple[int, ...], phase: float, size: float = 0.3) -> torch.Tensor:
    place = torch.arange(int(np.prod(shape)), dtype=torch.float64).view(shape)
    return size * torch.sin(phase + 0.7 * place)


def fill(model: torch.nn.Module) -> list[torch.Tensor]:
    parameters = [parameter for _, parameter in sorted(model.named_parameters())]
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(wave(parameter.shape, i + 1))
    return parameters


def main(checkout: str) -> None:
    out = Path(__file__).with_name("official.npz").resolve()
    os.chdir(checkout)
    sys.path.insert(0, ".")
    stand_in()
    torch.set_default_dtype(torch.float64)
    from biases.models.constrained_hnn import CHNN
    from biases.models.constrained_lnn import CLNN
    from biases.models.hnn import HNN
    from biases.models.lnn import DeLaN
    from biases.models.nn import NN
    from biases.systems.chain_pendulum import ChainPendulum
    from biases.systems.coupled_pendulum import CoupledPendulum
    from biases.systems.gyroscope import Gyroscope
    from biases.systems.magnet_pendulum import MagnetPendulum
    from biases.systems.rigid_body import BodyGraph, project_onto_constraints, rigid_DPhi, rigid_Phi
    from biases.systems.rotor import Rotor

    rods = BodyGraph()
    for i in range(2):
        rods.add_extended_nd(i, m=1.0, moments=torch.tensor([0.1]), d=1)
    rods.add_joint(0, torch.tensor([0.5]), pos2=torch.tensor([0.1, 0.2]))
    rods.add_joint(0, torch.tensor([-0.5]), 1, torch.tensor([0.6]))
    systems = {
        "chain": ChainPendulum(3), "coupled": CoupledPendulum(3, m=None), "magnet": MagnetPendulum(), "gyroscope": Gyroscope(),
        "rotor": Rotor(),
    }  # fmt: skip
    shapes = {
        "chain": (3, 2),
        "coupled": (3, 3),
        "magnet": (1, 3),
        "gyroscope": (4, 3),
        "rotor": (4, 3),
        "rods": (4, 2),
    }
    graphs = {**{name: system.body_graph for name, system in systems.items()}, "rods": rods}
    values = {}

    def keep(name: str, value: torch.Tensor) -> None:
        values[name] = value.detach().numpy()

    for name, graph in graphs.items():
        n, d = shapes[name]
        z = torch.randn(2, 2, n, d, generator=torch.Generator().manual_seed(n + d))
        keep(f"{name}_z", z)
        keep(f"{name}_phi", rigid_Phi(graph, z[:, 0], z[:, 1]))
        keep(f"{name}_d_phi", rigid_DPhi(graph, z[:, 0], z[:, 1]))
        for network in (CHNN, CLNN):
            model = network(graph, dof_ndim=d, hidden_size=16)
            parameters = fill(model)
            field = model(torch.tensor(0.0), z.reshape(2, -1))
            (field * wave(field.shape, 2.0)).sum().backward()
            keep(f"{name}_{network.__name__}", field)
            gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            keep(f"{name}_{network.__name__}_gradient", torch.cat([g.flatten() for g in gradient])[::STRIDE])
    keep("rods_m_inv", CHNN_minv(graphs["rods"], CHNN))

    for name, system in systems.items():
        n, d = shapes[name]
        q = wave((3, 2, system.D), 0.9, 0.8) + 0.9
        z = system.body2globalCoords(q)
        keep(f"{name}_q", q)
        keep(f"{name}_cartesian", z)
        keep(f"{name}_generalised", system.global2bodyCoords(z.clone()))
        momentum = system.M @ z[:, 1]
        keep(f"{name}_mass_matrix", system.M)
        xp = torch.stack((z[:, 0], momentum), 1).reshape(3, -1)
        if name != "rotor":
            keep(f"{name}_energy", system.hamiltonian(None, xp))
        off = z[:1] + wave(z[:1].shape, 0.3, 0.1)
        keep(f"{name}_off", off)
        keep(f"{name}_projected", project_onto_constraints(system.body_graph, off.clone(), tol=1e-5))
    for name in ("gyroscope", "rotor"):
        graph, mass = graphs[name], graphs[name].nodes[0]["m"]
        moments = torch.stack([torch.as_tensor(graph.edges[0, f"0_{i}"]["I"]) for i in range(3)]) / mass
        keep(f"{name}_moments", moments)
    keep("gyroscope_centre", -graphs["gyroscope"].nodes[0]["joint"][0])

    for network in (HNN, DeLaN, NN):
        for name, dim, angular in (("angles", 3, (0, 1, 2)), ("mixed", 3, (1, 2))):
            model = network(None, dof_ndim=dim, hidden_size=16, angular_dims=angular)
            parameters = fill(model)
            s = wave((2, 2 * dim), 0.4, 1.1) + 0.2
            field = model(torch.tensor(0.0), s)
            (field * wave(field.shape, 2.0)).sum().backward()
            keep(f"{network.__name__}_{name}", field)
            gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            keep(f"{network.__name__}_{name}_gradient", torch.cat([g.flatten() for g in gradient])[::STRIDE])
    np.savez_compressed(out, **values)


def CHNN_minv(graph, network) -> torch.Tensor:
    model = network(graph, dof_ndim=2, hidden_size=16)
    fill(model)
    return model.Minv(torch.eye(4))


if __name__ == "__main__":
    main(sys.argv[1])
