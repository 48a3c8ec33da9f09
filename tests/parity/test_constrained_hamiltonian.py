"""Accelerations of constrained bodies beside MuJoCo's, which works in joint coordinates."""

import numpy as np
import pytest
import torch

from saigen.papers.physics.constrained_hamiltonian import CHNN, CLNN, ChainPendulum, Gyroscope
from tests.peers import need

pytestmark = pytest.mark.peers


def joint_accelerations(mujoco, xml, position, velocity):
    model = mujoco.MjModel.from_xml_string(xml)
    data = mujoco.MjData(model)
    data.qpos[:], data.qvel[:] = position, velocity
    mujoco.mj_forward(model, data)
    return data.qacc.copy()


def chain(mujoco):
    """Two point masses on rods; MuJoCo's angles are relative, and its hinges turn about -y."""
    system = ChainPendulum(2)
    (m1, m2), (l1, l2) = [body.mass for body in system.graph.bodies], system.lengths
    xml = f"""<mujoco><option gravity="0 0 -9.81"/><worldbody><body><joint type="hinge" axis="0 -1 0"/>
      <inertial pos="0 0 {-l1!r}" mass="{m1!r}" diaginertia="1e-9 1e-9 1e-9"/>
      <body pos="0 0 {-l1!r}"><joint type="hinge" axis="0 -1 0"/>
      <inertial pos="0 0 {-l2!r}" mass="{m2!r}" diaginertia="1e-9 1e-9 1e-9"/></body></body></worldbody></mujoco>"""
    angle, rate = np.array([1.1, -0.7]), np.array([0.9, 2.3])
    found = joint_accelerations(mujoco, xml, np.diff(angle, prepend=0), np.diff(rate, prepend=0))
    z = system.to_cartesian(torch.from_numpy(np.stack((angle, rate)))[None])
    along, across = np.stack((np.cos(angle), np.sin(angle)), 1), np.stack((-np.sin(angle), np.cos(angle)), 1)
    rods = np.cumsum(found)[:, None] * along + (rate**2)[:, None] * across
    return system, z, np.cumsum(np.array(system.lengths)[:, None] * rods, 0)


def top(mujoco):
    """A solid whose tip is held: a ball joint, whose angular velocity and acceleration are in the body's frame."""
    system = Gyroscope(mass=0.3, centre=(0.05, -0.1, 0.25), moments=(0.02, 0.03, 0.01))
    mass, (a, b, c) = 0.3, (0.02, 0.03, 0.01)
    xml = f"""<mujoco><option gravity="0 0 -9.81"/><worldbody><body><joint type="ball"/>
      <inertial pos="0.05 -0.1 0.25" mass="{mass}" diaginertia="{mass * (b + c)} {mass * (a + c)} {mass * (a + b)}"/>
      </body></worldbody></mujoco>"""
    quaternion = np.array([0.6, -0.2, 0.5, 0.3])
    quaternion /= np.linalg.norm(quaternion)
    turn, spin = np.zeros(9), np.array([0.7, -1.1, 4.0])
    mujoco.mju_quat2Mat(turn, quaternion)
    turn = turn.reshape(3, 3)
    found = turn @ joint_accelerations(mujoco, xml, quaternion, spin)
    w = turn @ spin
    centre = turn @ np.array(system.centre)
    x = np.stack((centre, *(centre + turn.T)))
    z = torch.from_numpy(np.stack((x, np.cross(w, x))))[None]
    return system, z, np.cross(found, x) + np.cross(w, np.cross(w, x))


@pytest.mark.parametrize("case", [chain, top])
def test_same_accelerations_as_mujoco(case):
    system, z, expected = case(need("mujoco"))
    assert system.dynamics().residual(z).abs().max() < 1e-12
    for network in (CHNN, CLNN):
        model = network(system.graph, potential=system.potential, masses="known").double()
        field = model.from_phase(model.vector_field(z)(model.to_phase(z)))
        np.testing.assert_allclose(field[0, 1].numpy(), expected, rtol=1e-5, atol=1e-5)
