"""Constrained Hamiltonian and Lagrangian neural networks: simple physics in Cartesian coordinates, constraints made explicit
(arXiv 2010.13581)."""

from saigen.papers.physics.constrained_hamiltonian.bodies import (
    BodyGraph,
    constraint_jacobian,
    constraint_residual,
    kinetic_energy,
    project_onto_constraints,
)
from saigen.papers.physics.constrained_hamiltonian.model import (
    CHNN,
    CLNN,
    HNN,
    DeLaN,
    NeuralODE,
    symplectic_projection,
)
from saigen.papers.physics.constrained_hamiltonian.solver import rollout
from saigen.papers.physics.constrained_hamiltonian.systems import (
    ChainPendulum,
    CoupledPendulum,
    Gyroscope,
    MagnetPendulum,
    Rotor,
    System,
    chunks,
    geometric_mean_error,
    network_for,
    relative_error,
)

__all__ = [
    "CHNN",
    "CLNN",
    "HNN",
    "BodyGraph",
    "ChainPendulum",
    "CoupledPendulum",
    "DeLaN",
    "Gyroscope",
    "MagnetPendulum",
    "NeuralODE",
    "Rotor",
    "System",
    "chunks",
    "constraint_jacobian",
    "constraint_residual",
    "geometric_mean_error",
    "kinetic_energy",
    "network_for",
    "project_onto_constraints",
    "relative_error",
    "rollout",
    "symplectic_projection",
]
