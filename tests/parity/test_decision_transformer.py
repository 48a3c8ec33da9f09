"""Decision Transformer against Transformers' model, and Key-to-Door, evaluation and search in Gymnasium."""

import numpy as np
import pytest
import torch

from saigen.data.trajectories import collect
from saigen.papers.rl.decision_transformer import (
    DecisionTransformer,
    DTPolicy,
    KeyToDoor,
    evaluate,
    key_to_door_gymnasium,
    register,
)
from saigen.papers.rl.decision_transformer.behaviour import linear_search
from tests.peers import need


@pytest.mark.peers
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("action_tanh", [True, False])
def test_equals_transformers(padded, action_tanh):
    transformers = need("transformers")
    torch.manual_seed(0)
    config = transformers.DecisionTransformerConfig(
        state_dim=11, act_dim=3, max_ep_len=50, hidden_size=32, n_head=2, action_tanh=action_tanh
    )
    theirs = transformers.DecisionTransformerModel(config).eval()
    with torch.no_grad():  # away from the zeros and ones of the initialisation
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = DecisionTransformer(11, 3, hidden_size=32, n_heads=2, max_ep_len=50, action_tanh=action_tanh).eval()
    ours.load_state_dict(ours.convert_state_dict(theirs.state_dict()))
    b, k = 6, 7
    mask = torch.ones(b, k, dtype=torch.long)
    if padded:
        for row in range(b):
            mask[row, :row] = 0
    states, actions, asked = torch.randn(b, k, 11), torch.randn(b, k, 3), torch.randn(b, k, 1)
    steps = torch.randint(50, (b, k))
    kept = mask.bool()
    a = ours(states, actions, asked, steps, mask if padded else None)
    b_ = theirs(states=states, actions=actions, returns_to_go=asked, timesteps=steps, attention_mask=mask)
    for x, y in zip(a, (b_.action_preds, b_.state_preds, b_.return_preds), strict=True):
        torch.testing.assert_close(x[kept], y[kept], rtol=1e-4, atol=1e-5)
    for outputs in (a, (b_.action_preds, b_.state_preds, b_.return_preds)):
        sum(out[kept].square().sum() for out in outputs).backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in theirs.named_parameters()}
    grads.pop("encoder.wpe.weight")
    for name, grad in ours.convert_state_dict(grads).items():
        mine = ours.get_parameter(name).grad
        torch.testing.assert_close(torch.zeros_like(grad) if mine is None else mine, grad, rtol=1e-3, atol=1e-4)


def test_key_to_door_is_a_gymnasium_environment():
    gymnasium = pytest.importorskip("gymnasium", reason="needs gymnasium: pip install 'saigen[rl]'")
    from gymnasium.utils.env_checker import check_env

    check_env(key_to_door_gymnasium(), skip_render_check=True)
    register()
    register()
    env = gymnasium.make("saigen/KeyToDoor-v0", size=4)
    model = DecisionTransformer(35, 4, hidden_size=8, n_layers=1, max_ep_len=24, discrete=True).eval()
    returns = evaluate(DTPolicy(model, 1.0), env, episodes=3, seed=5)
    assert set(returns) <= {0.0, 1.0}
    assert env.observation_space.shape == (KeyToDoor(1, size=4).observation_size,)


def test_search_and_evaluation_in_gymnasium():
    gymnasium = pytest.importorskip("gymnasium", reason="needs gymnasium: pip install 'saigen[rl]'")

    def make(n):
        wrap = lambda env: gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))  # noqa: E731
        return gymnasium.make_vec(
            "MountainCarContinuous-v0", num_envs=n, vectorization_mode="sync", wrappers=[wrap], max_episode_steps=30
        )

    stages = linear_search(make, np.random.default_rng(0), iterations=3, directions=4, best=2, keep=2)
    assert len(stages) == 2 and stages[0].weights.shape == (1, 2) and not np.array_equal(*(s.weights for s in stages))
    env = make(3)
    data = collect(env, lambda seen: np.zeros((3, 1), np.float32), episodes=4, seed=0)
    assert data.lengths.tolist() == [30] * 4 and not data.terminated.any()
    model = DecisionTransformer(2, 1, hidden_size=8, n_layers=1, context_length=5, max_ep_len=30).eval()
    returns = evaluate(DTPolicy(model, 0.0), env, episodes=4, seed=0)
    assert returns.shape == (4,) and np.isfinite(returns).all()
