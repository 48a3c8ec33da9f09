"""Constrained Hamiltonian networks: the authors' numbers, the projector by brute force, analytic motion, gradients, systems."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from saigen.papers.physics.constrained_hamiltonian import (
    CHNN,
    CLNN,
    HNN,
    BodyGraph,
    ChainPendulum,
    CoupledPendulum,
    DeLaN,
    Gyroscope,
    MagnetPendulum,
    NeuralODE,
    Rotor,
    chunks,
    constraint_jacobian,
    constraint_residual,
    geometric_mean_error,
    kinetic_energy,
    network_for,
    project_onto_constraints,
    relative_error,
    rollout,
    symplectic_projection,
)

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "constrained_hamiltonian" / "official.npz"
STRIDE = 97
SYSTEMS = {
    "chain": lambda: ChainPendulum(3),
    "coupled": lambda: CoupledPendulum(3, mass=None),
    "magnet": MagnetPendulum,
    "gyroscope": Gyroscope,
    "rotor": Rotor,
}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def wave(shape, phase, size=0.3):
    return size * torch.sin(phase + 0.7 * torch.arange(math.prod(shape)).view(shape))


def fill(model):
    """The parameters in the order of their names, filled as the script that made the golden vectors does."""
    parameters = [parameter for _, parameter in sorted(model.named_parameters())]
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(wave(parameter.shape, i + 1))
    return parameters


def strided_gradient(parameters):
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([gradient.flatten() for gradient in found])[::STRIDE]


def two_rods():
    """A rod held at its end, and another held to it."""
    graph = BodyGraph(2)
    first, second = graph.body(1.0, [0.1]), graph.body(1.0, [0.1])
    graph.joint(first, [0.5], None, [0.1, 0.2])
    graph.joint(first, [-0.5], second, [0.6])
    return graph


def graph_of(name):
    return two_rods() if name == "rods" else SYSTEMS[name]().graph


def known(graph, network=CHNN):
    """The motion of a graph's masses under a potential that is not even."""
    return network(
        graph, potential=lambda x: (x[..., 0] * 1.3 + (2 * x).sin().sum(-1)).sum(-1), masses="known"
    ).double()


def on_constraints(graph, count=4, seed=0):
    z = torch.randn(200, 2, graph.num_points, graph.dim, generator=generator(seed))
    return project_onto_constraints(graph, z, 1e-12)[:count]


# The authors' code ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [CHNN, CLNN])
@pytest.mark.parametrize("name", [*SYSTEMS, "rods"])
def test_field_and_gradients_equal_official_code(name, network, golden):
    """Off the constraints too: states are waves. Theirs solves with 2C x 2C and differentiates V by autograd."""
    graph, z = graph_of(name), golden[f"{name}_z"]
    if name == "gyroscope":  # ours has the digits that matter of the place that theirs computes from its mesh
        graph = Gyroscope(centre=tuple(golden["gyroscope_centre"].tolist())).graph
    model = network(graph, 16).double()
    parameters = fill(model)
    field = model.vector_field(z)(z).flatten(1)
    torch.testing.assert_close(field, golden[f"{name}_{network.__name__}"], rtol=1e-7, atol=1e-9)
    (field * wave(field.shape, 2.0)).sum().backward()
    expected = golden[f"{name}_{network.__name__}_gradient"]
    torch.testing.assert_close(strided_gradient(parameters), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("network", "theirs"), [(HNN, "HNN"), (DeLaN, "DeLaN"), (NeuralODE, "NN")])
@pytest.mark.parametrize(("name", "angular"), [("angles", (0, 1, 2)), ("mixed", (1, 2))])
def test_baselines_equal_official_code(network, theirs, name, angular, golden):
    model = network(3, 16, angular_dims=angular).double()
    parameters = fill(model)
    s = (wave((2, 6), 0.4, 1.1) + 0.2).view(2, 2, 3)
    field = model.vector_field(s)(s).flatten(1)
    torch.testing.assert_close(field, golden[f"{theirs}_{name}"], rtol=1e-8, atol=1e-9)
    (field * wave(field.shape, 2.0)).sum().backward()
    torch.testing.assert_close(strided_gradient(parameters), golden[f"{theirs}_{name}_gradient"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", [*SYSTEMS, "rods"])
def test_constraints_equal_official_code(name, golden):
    """Theirs come in another order: all bars between points, tethers, joints."""
    graph, z = graph_of(name), golden[f"{name}_z"]
    x, v = z.unbind(1)
    ours, theirs = constraint_residual(graph, x, v), golden[f"{name}_phi"]
    assert ours.shape == theirs.shape
    order = [int((ours[0, 0] - value).abs().argmin()) for value in theirs[0, 0]]
    assert sorted(order) == list(range(graph.num_constraints))
    torch.testing.assert_close(ours[..., order], theirs)
    g, rate = constraint_jacobian(graph, x, v)
    d_phi = golden[f"{name}_d_phi"]
    torch.testing.assert_close(g[..., order], d_phi[:, 0, :, :, 0])
    torch.testing.assert_close(g[..., order], d_phi[:, 1, :, :, 1])
    torch.testing.assert_close(rate[..., order], d_phi[:, 0, :, :, 1])


def test_inverse_mass_equals_official_code(golden):
    model = CHNN(two_rods(), 16).double()
    fill(model)
    z = golden["rods_z"]
    moments = model.moments(z)
    ours = model.constraints.inverse_mass_matrix(moments)
    torch.testing.assert_close(ours, golden["rods_m_inv"])
    torch.testing.assert_close(ours @ model.constraints.mass_matrix(moments), torch.eye(4))


@pytest.mark.parametrize("name", SYSTEMS)
def test_systems_equal_official_code(name, golden):
    """Masses, energies, both ways between coordinates, and the projection onto the constraints."""
    system = SYSTEMS[name]()
    z = system.to_cartesian(golden[f"{name}_q"])
    # Their places of springs, magnets and moments come through float32.
    torch.testing.assert_close(z, golden[f"{name}_cartesian"], rtol=1e-6, atol=1e-6)
    moments = torch.from_numpy(system.graph.moments())
    mass = system.dynamics().constraints.mass_matrix(moments)
    torch.testing.assert_close(mass, golden[f"{name}_mass_matrix"], rtol=1e-6, atol=1e-8)
    if name != "rotor":
        torch.testing.assert_close(system.energy(z), golden[f"{name}_energy"], rtol=1e-6, atol=1e-6)
    back, theirs = system.to_generalised(z), golden[f"{name}_generalised"]
    turns = (back - theirs)[:, 0] / (2 * math.pi)
    torch.testing.assert_close(turns, turns.round(), rtol=0, atol=1e-6)
    torch.testing.assert_close(back[:, 1], theirs[:, 1], rtol=1e-6, atol=1e-6)
    projected = project_onto_constraints(system.graph, golden[f"{name}_off"])
    torch.testing.assert_close(projected, golden[f"{name}_projected"], rtol=1e-6, atol=1e-6)


def test_official_names_load():
    model = network_for("ChainPendulum", "CHNN", links=2)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    assert {"model.d_moments.0", "model.potential_net.0.0.weight", "model.potential_net.3.bias"} <= set(state)
    model.load_state_dict(CHNN.convert_state_dict(state))
    names = set(network_for("Gyroscope", "HNN").state_dict())
    assert {"potential_net.1.0.weight", "potential_net.4.bias", "mass_net.4.weight"} <= names


# The projector by brute force ---------------------------------------------------------------------------------------


def test_field_is_the_projector_of_the_paper():
    """P J grad H with DPsi and grad H by automatic differentiation, and P P = P, DPsi^T dz/dt = 0."""
    graph = two_rods()
    model = known(graph)
    z = torch.randn(3, 2, 4, 2, generator=generator())
    s = model.to_phase(z).flatten(1)
    half = s.shape[1] // 2

    def psi(flat):
        x, p = flat.view(2, 4, 2)
        v = model.constraints.inverse_mass_matrix(torch.from_numpy(graph.moments())) @ p
        return constraint_residual(graph, x[None], v[None]).flatten()

    def hamiltonian(flat):
        return model.energy(model.from_phase(flat.view(1, 2, 4, 2)))[0]

    for row, field in zip(s, model.vector_field(z)(model.to_phase(z)).flatten(1), strict=True):
        d_psi = torch.autograd.functional.jacobian(psi, row).mT
        gradient = torch.autograd.functional.jacobian(hamiltonian, row)
        j = torch.zeros(2 * half, 2 * half)
        j[:half, half:], j[half:, :half] = torch.eye(half), -torch.eye(half)
        p = torch.eye(2 * half) - j @ d_psi @ torch.linalg.inv(d_psi.mT @ j @ d_psi) @ d_psi.mT
        torch.testing.assert_close(p @ p, p)
        torch.testing.assert_close(field, p @ j @ gradient)
        torch.testing.assert_close(d_psi.mT @ field, torch.zeros(d_psi.shape[1]))
        torch.testing.assert_close(symplectic_projection(d_psi, j @ gradient), field)


@pytest.mark.parametrize("name", [*SYSTEMS, "rods"])
def test_hamiltonian_and_lagrangian_accelerate_alike(name):
    graph = graph_of(name)
    z = on_constraints(graph)
    ours, theirs = known(graph), known(graph, CLNN)
    m_inv = ours.constraints.inverse_mass_matrix(torch.from_numpy(graph.moments()))
    rate, force = ours.vector_field(z)(ours.to_phase(z)).unbind(1)
    v, acceleration = theirs.vector_field(z)(z).unbind(1)
    torch.testing.assert_close(rate, v, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(m_inv @ force, acceleration, rtol=1e-7, atol=1e-6)


def test_without_constraints_it_is_newton():
    graph = BodyGraph(2)
    for mass in (1.0, 3.0):
        graph.point(mass)
    z = torch.randn(5, 2, 2, 2, generator=generator())
    for network in (CHNN, CLNN):
        model = known(graph, network)
        field = model.from_phase(model.vector_field(z)(model.to_phase(z)))
        x = z[:, 0]
        force = -2 * (2 * x).cos() - torch.tensor([1.3, 0.0])
        torch.testing.assert_close(field[:, 1], force / torch.tensor([1.0, 3.0])[:, None])


def test_a_hinge_is_redundant_and_can_be_borne():
    """A solid on a hinge along z through its centre's neighbour is a physical pendulum about that axis."""
    graph = BodyGraph(3)
    plate = graph.body(2.0, [0.3, 0.2, 0.1])
    graph.joint(plate, [-0.4, 0.0, 0.0], None, [0.0, 0.0, 0.0], axis=([0.0, 0.0, 1.0], [0.0, 0.0, 1.0]))
    assert graph.num_constraints == 12
    model = CHNN(graph, potential=lambda x: 2.0 * 9.81 * x[..., 0, 1], masses="known", redundant=True).double()
    angle = torch.tensor(0.6)
    a, b = torch.stack((angle.cos(), angle.sin(), 0 * angle)), torch.stack((-angle.sin(), angle.cos(), 0 * angle))
    centre = 0.4 * a
    x = torch.stack((centre, centre + a, centre + b, centre + torch.tensor([0.0, 0.0, 1.0])))
    z = torch.stack((x, torch.zeros_like(x)))[None]
    assert model.residual(z).abs().max() < 1e-12
    assert model.integrate(z, torch.tensor([0.0, 0.01])).isfinite().all()
    model.redundant = False
    with pytest.raises(ValueError, match="redundant is False"):
        model.integrate(z, torch.tensor([0.0, 0.01]))
    model.redundant = True
    acceleration = model.from_phase(model.vector_field(z)(model.to_phase(z)))[0, 1]
    # Inertia about the axis: second moments along x and y, and the centre's own; torque m g l cos(angle).
    expected = -9.81 * 0.4 * angle.cos() / (0.3 + 0.2 + 0.4**2)
    torch.testing.assert_close(acceleration[1] - acceleration[0], expected * b)


def test_redundant_gives_the_same_where_nothing_repeats():
    graph = two_rods()
    z = on_constraints(graph)
    one, two = known(graph), known(graph)
    two.redundant = True
    torch.testing.assert_close(two.vector_field(z)(z), one.vector_field(z)(z))


# Analytic motion ----------------------------------------------------------------------------------------------------


def test_single_pendulum_is_the_angle_equation():
    """theta'' = -(g / l) sin theta, integrated by SciPy's DOP853 at 1e-11."""
    system = ChainPendulum(1, mass=1.7, length=0.8)
    q = torch.tensor([[[2.0], [0.5]]])
    found = solve_ivp(
        lambda _, s: (s[1], -9.81 / 0.8 * math.sin(s[0])), (0, 3), (2.0, 0.5), "DOP853", system.times, rtol=1e-11, atol=1e-12
    )  # fmt: skip
    true = system.to_cartesian(torch.from_numpy(found.y.T)[:, :, None])
    for model in (system.dynamics(), CLNN(system.graph, potential=system.potential, masses="known").double()):
        ours = model.integrate(system.to_cartesian(q), system.times, "dopri5", tol=1e-9)[0]
        torch.testing.assert_close(ours, true, rtol=0, atol=1e-6)


def test_double_pendulum_is_the_textbook_equation():
    """The equations of two point masses in angles, from their 2 x 2 mass matrix."""
    system = ChainPendulum(2)
    (m1, m2), (l1, l2) = [body.mass for body in system.graph.bodies], system.lengths

    def field(_, s):
        a, b, da, db = s
        c, d = math.cos(a - b), math.sin(a - b)
        mass = np.array([[(m1 + m2) * l1**2, m2 * l1 * l2 * c], [m2 * l1 * l2 * c, m2 * l2**2]])
        force = np.array(
            [
                -m2 * l1 * l2 * d * db**2 - (m1 + m2) * 9.81 * l1 * math.sin(a),
                m2 * l1 * l2 * d * da**2 - m2 * 9.81 * l2 * math.sin(b),
            ]
        )
        return np.concatenate([[da, db], np.linalg.solve(mass, force)])

    start = (1.1, -0.4, 0.7, 1.3)
    found = solve_ivp(field, (0, 3), start, "DOP853", system.times, rtol=1e-11, atol=1e-12)
    true = system.to_cartesian(torch.from_numpy(found.y.T).unflatten(1, (2, 2)))
    ours = system.dynamics().integrate(true[:1], system.times, "dopri5", tol=1e-9)[0]
    torch.testing.assert_close(ours, true, rtol=0, atol=1e-5)


def test_a_free_body_obeys_eulers_equations():
    """I dw/dt = (I w) x w in the body frame, and the centre drifts."""
    system = Rotor(mass=0.5, moments=(0.3, 0.2, 0.1))
    z = system.sample(1, generator(3))
    inertia = 0.5 * np.array([0.3, 0.4, 0.5])  # about x: the moments along y and z

    def spin(z):
        r, rate = (part[1:] - part[:1] for part in z)
        w = r @ rate.mT
        return torch.stack((w[2, 1], w[0, 2], w[1, 0]))

    times = torch.linspace(0, 2, 9)
    ours = system.dynamics().integrate(z, times, "dopri5", tol=1e-10)[0]
    found = solve_ivp(
        lambda _, w: np.cross(inertia * w, w) / inertia, (0, 2), spin(z[0]).numpy(), "DOP853", times, rtol=1e-11, atol=1e-12
    )  # fmt: skip
    torch.testing.assert_close(torch.stack([spin(state) for state in ours]).numpy(), found.y.T, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours[:, 0, 0], z[0, 0, 0] + times[:, None] * z[0, 1, 0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", SYSTEMS)
def test_energy_and_constraints_stay(name):
    system = SYSTEMS[name]()
    times = system.times[:30]
    z = system.follow(system.sample(3, generator(1)), times)
    assert z.shape == (3, 30, 2, system.graph.num_points, system.graph.dim)
    true = system.dynamics()
    assert true.residual(z).abs().max() < 2e-5
    energy = true.energy(z)
    assert (energy - energy[:, :1]).abs().max() < 1e-4 * (1 + energy.abs().max())


def test_kinetic_energy_of_a_rod():
    mass, length, speed, spin = 1.3, 0.7, 2.0, 5.0
    found = kinetic_energy(mass, [length**2 / 12], [[speed, 0.0], [speed, spin]])
    assert found == pytest.approx(mass * speed**2 / 2 + mass * length**2 / 12 * spin**2 / 2)
    with pytest.raises(ValueError, match="velocities has shape"):
        kinetic_energy(1.0, [0.1], [[1.0, 0.0]])


# Networks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [CHNN, CLNN])
def test_learned_force_and_energy_belong_together(network):
    model = network(ChainPendulum(2).graph, 16).double()
    x = torch.randn(4, 2, 2, generator=generator(), requires_grad=True)
    gradient = torch.autograd.grad(model.potential(x).sum(), x)[0]
    torch.testing.assert_close(model.force(x), -gradient)


@pytest.mark.parametrize("angular", [(0, 1), (1,), ()])
def test_baselines_are_the_equations_of_their_hamiltonian(angular):
    """HNN's field is J grad H by autograd; DeLaN's is the Euler-Lagrange equation of the same energy by autograd."""
    hamiltonian, lagrangian = (network(2, 16, angular_dims=angular).double() for network in (HNN, DeLaN))
    lagrangian.load_state_dict(hamiltonian.state_dict())
    s = torch.randn(1, 2, 2, generator=generator())

    def energy(s):
        q, p = s[0]
        return 0.5 * p @ hamiltonian.inverse_mass(q) @ p + hamiltonian.potential(q)

    by_q, by_p = torch.autograd.functional.jacobian(energy, s)[0]
    torch.testing.assert_close(hamiltonian.vector_field(s)(s)[0], torch.stack((by_p, -by_q)))

    def action(q, v):
        return 0.5 * v @ torch.linalg.inv(lagrangian.inverse_mass(q)) @ v - lagrangian.potential(q)

    q, v = s[0]
    mass = torch.func.hessian(action, 1)(q, v)
    mixed = torch.func.jacfwd(torch.func.grad(action, 1), 0)(q, v)
    expected = torch.linalg.solve(mass, torch.func.grad(action, 0)(q, v) - mixed @ v)
    torch.testing.assert_close(lagrangian.vector_field(s)(s)[0], torch.stack((v, expected)))
    assert hamiltonian.energy(hamiltonian.from_phase(s)).item() == pytest.approx(energy(s).item())


def test_training_differentiates_the_rollout():
    """Finite differences of a loss over two steps, for a mass and a weight of each network."""
    system = ChainPendulum(2)
    z = system.follow(system.sample(3, generator()), system.times[:3])
    for network in ("CHNN", "CLNN", "HNN", "DeLaN", "NeuralODE"):
        model = network_for(system, network, hidden=6).double()
        data = z if network in ("CHNN", "CLNN") else system.to_generalised(z)

        def loss(model=model, data=data):
            return (model(data[:, 0], system.times[:3]) - data).square().mean()

        loss().backward()
        for parameter in model.parameters():
            if parameter.numel() > 1:
                continue
            gradient = 0.0 if parameter.grad is None else parameter.grad.item()
            with torch.no_grad():
                parameter += 1e-5
                up = loss()
                parameter -= 2e-5
                down = loss()
                parameter += 1e-5
            assert gradient == pytest.approx((up - down).item() / 2e-5, abs=1e-8)
        first = next(p for p in model.parameters() if p.ndim == 2)
        with torch.no_grad():
            first[0, 0] += 1e-5
            up = loss()
            first[0, 0] -= 2e-5
            down = loss()
            first[0, 0] += 1e-5
        assert first.grad[0, 0].item() == pytest.approx((up - down).item() / 2e-5, rel=1e-4, abs=1e-9), network


def test_mixed_extents_keep_the_order_of_points():
    graph = BodyGraph(2)
    graph.body(1.0, [0.1])
    graph.point(1.0)
    graph.body(1.0, [0.2])
    model = CHNN(graph, 8)
    with torch.no_grad():
        model.d_moments["0"].copy_(torch.tensor([[10.0]]).log())
        model.d_moments["1"].copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).log())
    torch.testing.assert_close(model.moments(torch.zeros(())), torch.tensor([1.0, 2.0, 10.0, 3.0, 4.0]))


def test_constraints_stay_exact_through_float32():
    graph = BodyGraph(2)
    graph.point()
    graph.tether(0, (0.1, 0.3), 0.7)
    model = CHNN(graph, 4).float().double()
    assert model.constraints.squares[0].item() == 0.7**2
    assert model.constraints.anchors[0, 0].item() == 0.1


# Rollouts -----------------------------------------------------------------------------------------------------------


def test_runge_kutta_is_of_fourth_order_and_the_three_eighths_rule():
    field = lambda s: torch.stack((s[:, 1], -s[:, 0] * s[:, 0]), 1)  # noqa: E731
    s0 = torch.tensor([[1.0, 0.3]])
    exact = rollout(field, s0, torch.tensor([0.0, 1.0]), "dopri5", tol=1e-12)[0, 1]
    errors = [
        (rollout(field, s0, torch.tensor([0.0, 1.0]), substeps=n)[0, 1] - exact).abs().max().item() for n in (4, 8, 16)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.4)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(4, abs=0.4)
    # Its tableau, by hand: nodes 0, 1/3, 2/3, 1 and weights 1/8, 3/8, 3/8, 1/8.
    h, k = 0.5, []
    for row in ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)):
        k.append(field(s0 + h * sum((a * b for a, b in zip(row, k, strict=True)), torch.zeros_like(s0))))
    by_hand = s0 + h * (k[0] + 3 * k[1] + 3 * k[2] + k[3]) / 8
    torch.testing.assert_close(rollout(field, s0, torch.tensor([0.0, 0.5]))[:, 1], by_hand)


def test_a_field_that_blows_up_gives_nan_and_counts_as_nothing_in_common():
    states = rollout(lambda s: s * s, torch.ones(1, 1), torch.tensor([0.0, 0.5, 2.0]), "dopri5")
    assert states[0, 1, 0] == pytest.approx(2.0, rel=1e-5) and states[0, 2].isnan().all()
    true = torch.ones(1, 3, 2, 1, 1)
    assert relative_error(states.view(1, 3, 1, 1, 1) * true, true)[0, 2] == 1.0


def test_errors_by_hand():
    true = torch.ones(1, 3, 2, 1, 1)
    predicted = true.clone()
    predicted[0, 1] = 3.0
    torch.testing.assert_close(relative_error(predicted, true), torch.tensor([[0.0, 0.5, 0.0]]))
    torch.testing.assert_close(relative_error(-true, true), torch.ones(1, 3))
    error = torch.tensor([[1e-2, 1e-4, 1e-6]])
    assert geometric_mean_error(error).item() == pytest.approx(1e-4, rel=1e-2)


# Systems ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SYSTEMS)
def test_samples_keep_the_constraints_and_coordinates_go_both_ways(name):
    system = SYSTEMS[name]()
    z = system.sample(20, generator(2))
    assert constraint_residual(system.graph, *z.unbind(1)).abs().max() < 1e-5
    # Not all of 1e-5: projected states keep the constraints to that, angles exactly.
    torch.testing.assert_close(system.to_cartesian(system.to_generalised(z)), z, rtol=0, atol=1e-4)
    assert torch.equal(z, system.sample(20, generator(2)))


def test_angles_go_on_over_a_turn():
    system = ChainPendulum(1, length=1.0)
    z = system.to_cartesian(torch.stack((torch.linspace(0, 9, 40), torch.ones(40)), 1)[None, :, :, None])
    torch.testing.assert_close(system.to_generalised(z)[0, :, 0, 0], torch.linspace(0, 9, 40))


def test_a_perturbed_state_is_near_and_keeps_the_constraints():
    system = ChainPendulum(3)
    z = system.sample(10, generator())
    other = system.perturbed(z, 1e-4, generator(1))
    assert constraint_residual(system.graph, *other.unbind(1)).abs().max() < 1e-5
    assert 1e-5 < (other - z).abs().max() < 2e-3


def test_chunks_are_pieces_of_their_trajectories():
    z = torch.arange(6 * 23.0).view(6, 23, 1)
    found = chunks(z, 5, generator())
    assert found.shape == (6, 5, 1)
    assert ((found[:, 1:] - found[:, :-1]) == 1).all()
    assert ((found[:, 0, 0] - z[:, 0, 0]) % 5 == 0).all() and (found[:, -1, 0] < z[:, 20, 0]).all()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: BodyGraph(4), "dim is 4"),
        (lambda: BodyGraph(2).point(0.0), "mass is 0.0"),
        (lambda: BodyGraph(2).body(1.0, [0.1, 0.1, 0.1]), "moments has 3"),
        (lambda: BodyGraph(2).body(1.0, [-0.1]), "moments is"),
        (lambda: two_rods().tether(0, (0.0,), 1.0), "origin has 1"),
        (lambda: two_rods().tether(0, (0.0, 0.0), 0.0), "length is 0.0"),
        (lambda: two_rods().distance(0, 0, 1.0), "b is 0"),
        (lambda: two_rods().distance(0, 5, 1.0), "body is 5"),
        (lambda: two_rods().joint(0, [0.1, 0.1], 1, [0.0]), "at_a has 2"),
        (lambda: two_rods().joint(1, [0.1], 1, [0.0]), "b is 1"),
        (lambda: project_onto_constraints(two_rods(), torch.zeros(1, 2, 4, 2), 0.0), "tol is 0.0"),
        (lambda: project_onto_constraints(two_rods(), torch.full((1, 2, 4, 2), math.nan)), "z violates"),
        (lambda: CHNN(BodyGraph(2)), "graph is empty"),
        (lambda: CHNN(two_rods(), masses="free"), "masses is 'free'"),
        (lambda: CHNN(two_rods(), 0), "hidden is 0"),
        (lambda: CHNN(two_rods(), layers=0), "layers is 0"),
        (lambda: CHNN(two_rods()).integrate(torch.zeros(1, 2, 3, 2), torch.zeros(1)), "z0 has shape"),
        (lambda: HNN(2).float().integrate(torch.zeros(1, 2, 2), torch.zeros(1)), "z0 is torch.float64"),
        (lambda: HNN(0), "q_dim is 0"),
        (lambda: HNN(2, angular_dims=(2,)), "angular_dims is"),
        (lambda: HNN(2).integrate(torch.zeros(1, 2, 3), torch.zeros(1)), "z0 has shape"),
        (lambda: HNN(2).integrate(torch.zeros(1, 2, 2), torch.zeros(1), "euler"), "method is 'euler'"),
        (lambda: HNN(2).integrate(torch.zeros(1, 2, 2), torch.zeros(1), substeps=0), "substeps is 0"),
        (lambda: HNN(2).integrate(torch.zeros(1, 2, 2), torch.zeros(1), tol=0.0), "tol is 0.0"),
        (lambda: network_for("Pendulum"), "system is 'Pendulum'"),
        (lambda: network_for("Rotor", "LNN"), "network is 'LNN'"),
        (lambda: ChainPendulum(0), "links is 0"),
        (lambda: CoupledPendulum(spring=0.0), "spring is 0.0"),
        (lambda: Rotor().sample(0), "count is 0"),
        (lambda: chunks(torch.zeros(1, 4, 1), 5), "length is 5"),
        (lambda: symplectic_projection(torch.zeros(3, 2), torch.zeros(3)), "d_psi has shape"),
    ],
)
def test_wrong_arguments_are_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()
