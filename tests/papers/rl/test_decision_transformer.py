"""Decision Transformer: official outputs, causality, padding, returns, agents, environments."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from saigen.papers.rl.decision_transformer import (
    MLPBC,
    Cart,
    ConservativeQ,
    DecisionTransformer,
    DecisionTransformerAtari,
    DTPolicy,
    GraphWalk,
    KeyToDoor,
    action_loss,
    atari_learning_rate,
    decision_transformer_atari_breakout,
    distances,
    evaluate,
    parameter_groups,
    random_graph,
    random_success,
)
from tests.golden.decision_transformer.filling import atari_inputs, filled, gym_inputs

GOLDEN = np.load(Path(__file__).resolve().parents[2] / "golden/decision_transformer/golden.npz")


def official_weights(prefix):
    """The official code's weights, by its names, and the norm of each one's gradient there."""
    weights = json.loads(str(GOLDEN[f"{prefix}/weights"]))
    return {name: filled(name, tuple(shape)) for name, (shape, _) in weights.items()}, {
        name: norm for name, (_, norm) in weights.items()
    }


def assert_gradients(model, norms, rename, merged=()):
    ours = {name: 0.0 if p.grad is None else p.grad.double().norm().item() for name, p in model.named_parameters()}
    for name, norm in norms.items():
        if not any(part in name for part in merged):
            assert ours[rename(name)] == pytest.approx(norm, rel=2e-4, abs=1e-7), name


def small(**options):
    torch.manual_seed(0)
    model = DecisionTransformer(
        5, 3, hidden_size=16, n_layers=2, n_heads=2, context_length=4, max_ep_len=9, **options
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def windows(b=2, k=4):
    torch.manual_seed(1)
    return torch.randn(b, k, 5), torch.randn(b, k, 3), torch.randn(b, k, 1), torch.arange(k).repeat(b, 1)


def test_equals_official_gym():
    model = small()
    weights, norms = official_weights("gym")
    model.load_state_dict(model.convert_state_dict(weights))
    given = gym_inputs()
    out = model(**given)
    kept = given["attention_mask"].bool()
    for name in ("actions", "states", "returns"):
        theirs = torch.from_numpy(GOLDEN[f"gym/output/{name}"])
        torch.testing.assert_close(getattr(out, name)[kept], theirs[kept], rtol=1e-5, atol=1e-5)
    out.actions[kept].square().sum().backward()
    assert_gradients(model, norms, lambda name: name)
    assert norms["transformer.wte.weight"] == 0.0, "nothing reads the word table"


@pytest.mark.parametrize("kind", ["reward_conditioned", "naive"])
def test_equals_official_atari(kind):
    model = DecisionTransformerAtari(4, 3, 9, hidden_size=16, n_layers=2, n_heads=2, conditioned=kind != "naive").eval()
    weights, norms = official_weights(kind)
    if kind == "naive":  # the official code makes the return's embedding in both kinds and leaves it unread here
        weights = {name: value for name, value in weights.items() if not name.startswith("ret_emb")}
    masks = {f"blocks.{i}.attn.mask": torch.ones(1, 1, 10, 10) for i in range(2)}
    model.load_state_dict(model.convert_state_dict({f"module.{k}": v for k, v in (weights | masks).items()}))
    given = atari_inputs()
    if kind == "naive":
        given["returns_to_go"] = None
    logits = model(**given)
    torch.testing.assert_close(logits, torch.from_numpy(GOLDEN[f"{kind}/output/actions"]), rtol=1e-5, atol=1e-5)
    logits.square().sum().backward()
    names = {"ln1": "ln_1", "ln2": "ln_2", "attn.proj": "attn.c_proj", "mlp.0": "mlp.c_fc", "mlp.2": "mlp.c_proj"}

    def rename(name):
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        name = name.replace("blocks.", "transformer.h.").replace("ln_f", "transformer.ln_f")
        return name.replace("tok_emb", "transformer.wte")

    unread = ("ret_emb",) if kind == "naive" else ()
    assert_gradients(model, norms, rename, merged=("attn.query", "attn.key", "attn.value", *unread))


def test_layouts_convert_once_and_only_once():
    model = small()
    weights, _ = official_weights("gym")
    once = model.convert_state_dict(weights)
    twice = model.convert_state_dict(once)
    assert once.keys() == twice.keys() == model.state_dict().keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert "stranger" in model.convert_state_dict({**weights, "stranger": torch.zeros(1)})


def test_the_last_action_may_be_missing_in_atari():
    model = DecisionTransformerAtari(4, 3, 9, hidden_size=16, n_layers=1, n_heads=2).eval()
    given = atari_inputs()
    whole = model(**given)
    short = model(given["states"], given["actions"][:, :-1], given["returns_to_go"], given["timesteps"])
    torch.testing.assert_close(whole, short)
    as_bytes = (given["states"].clamp(0, 1) * 255).round().to(torch.uint8)
    floats = as_bytes.float() / 255
    rest = (given["actions"], given["returns_to_go"], given["timesteps"])
    torch.testing.assert_close(model(as_bytes, *rest), model(floats, *rest))


@pytest.mark.parametrize("conditioned", [True, False])
def test_causal(conditioned):
    """Step t's action depends on R, s up to t and on a before t, and on nothing else."""
    model = small(conditioned=conditioned)
    given = [x.requires_grad_() if x.is_floating_point() else x for x in windows()]
    states, actions, asked, steps = given
    for t in range(4):
        out = model(states, actions, asked if conditioned else None, steps).actions[:, t].sum()
        inputs = [states, actions, *([asked] if conditioned else [])]
        grads = torch.autograd.grad(out, inputs)
        for grad, last in zip(grads, (t, t - 1, t), strict=False):
            assert torch.count_nonzero(grad[:, last + 1 :]) == 0
            if last >= 0:
                assert torch.count_nonzero(grad[:, last]) > 0


def test_left_padding_changes_nothing():
    model = small()
    states, actions, asked, steps = windows(k=3)
    plain = model(states, actions, asked, steps)
    pad = torch.full((2, 2, 1), -10.0)
    padded = model(
        torch.cat([pad.expand(2, 2, 5), states], 1),
        torch.cat([pad.expand(2, 2, 3), actions], 1),
        torch.cat([pad, asked], 1),
        torch.cat([torch.zeros(2, 2, dtype=torch.long), steps], 1),
        torch.tensor([[0, 0, 1, 1, 1]]).repeat(2, 1),
    )
    for ours, theirs in zip(plain, padded, strict=True):
        assert theirs.isfinite().all()
        torch.testing.assert_close(ours, theirs[:, 2:], rtol=1e-5, atol=1e-5)


def test_loss_leaves_padding_out():
    predicted = torch.zeros(2, 3, 4, requires_grad=True)
    target = torch.ones(2, 3, 4)
    target[0, 0] = float("inf")
    mask = torch.ones(2, 3)
    mask[0, 0] = 0
    loss = action_loss(predicted, target, mask)
    loss.backward()
    assert loss.item() == 1.0
    assert predicted.grad.isfinite().all() and torch.count_nonzero(predicted.grad[0, 0]) == 0
    actions = torch.tensor([[-10, 1], [2, 3]])
    logits = torch.randn(2, 2, 4)
    kept = torch.tensor([[False, True], [True, True]])
    expected = torch.nn.functional.cross_entropy(logits[kept], actions[kept])
    torch.testing.assert_close(action_loss(logits, actions, kept), expected)


def test_atari_training_recipe():
    model = decision_transformer_atari_breakout(max_timestep=9)
    decayed, rest = parameter_groups(model)
    assert decayed["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith("weight") and "ln" not in names[id(p)] for p in decayed["params"])
    tables = {"transformer.wte.weight", "action_embeddings.0.weight", "pos_emb", "global_pos_emb"}
    assert tables < {names[id(p)] for p in rest["params"]}
    assert len(decayed["params"]) + len(rest["params"]) == len(names)
    factor = atari_learning_rate(1000, final_tokens=100_000, warmup_tokens=10_000)
    assert [factor(step, 0) for step in (0, 8)] == [0.1, 0.9]
    assert factor(54, 0) == pytest.approx(0.5, abs=0.01)
    assert factor(99, 0) == 0.1 < factor(120, 0)
    assert factor(189, 0) == pytest.approx(1.0), "past the end the cosine comes back, as in the official code"


class Recorder(torch.nn.Module):
    """A stand-in for a model: keeps what it is shown."""

    context_length, act_dim, discrete, conditioned = 3, 2, False, True

    def __init__(self):
        super().__init__()
        self.shown = []

    def last_action(self, states, actions, asked, steps):
        self.shown.append((states.clone(), actions.clone(), asked.clone(), steps.clone()))
        return torch.full((len(states), 2), float(len(self.shown)))


@pytest.mark.parametrize("delayed", [False, True])
def test_policy_lowers_the_return_asked_for(delayed):
    recorder = Recorder()
    mean, std = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])
    policy = DTPolicy(recorder, 10.0, scale=2.0, state_mean=mean, state_std=std, delayed=delayed)
    policy.reset(2)
    rewards = None
    for t in range(5):
        policy.act(np.full((2, 2), float(t)), rewards)
        rewards = np.array([1.0, 2.0])
    states, actions, asked, steps = recorder.shown[-1]
    assert steps.tolist() == [[2, 3, 4]] * 2
    assert asked[0, :, 0].tolist() == ([5.0] * 3 if delayed else [4.0, 3.5, 3.0])
    assert asked[1, :, 0].tolist() == ([5.0] * 3 if delayed else [3.0, 2.0, 1.0])
    assert actions[0, :, 0].tolist() == [3.0, 4.0, 0.0], "the sought action is hidden"
    torch.testing.assert_close(states[0, -1], (torch.tensor([4.0, 4.0]) - mean) / std)
    assert recorder.shown[0][0].shape == (2, 1, 2)


def test_policy_carries_its_statistics():
    policy = DTPolicy(small(), 1.0, scale=3.0, state_mean=torch.ones(5), state_std=2 * torch.ones(5))
    twin = DTPolicy(small(), 1.0, state_mean=torch.zeros(5), state_std=torch.ones(5))
    twin.load_state_dict(policy.state_dict())
    assert twin.scale == 3.0 and torch.equal(twin.state_std, policy.state_std)


def walk(env, seed, generator):
    observations, _ = env.reset(seed=seed)
    total, over = np.zeros(env.num_envs), False
    seen = [observations]
    while not over:
        observations, rewards, ended, _, _ = env.step(generator.integers(env.n_actions, size=env.num_envs))
        total += rewards
        over = ended.all()
        seen.append(observations)
    return np.stack(seen), total


@pytest.mark.parametrize("size", [3, 4, 5])
def test_key_to_door_random_success_is_the_closed_form(size):
    chance = random_success(size)
    assert 0.02 <= chance <= 0.05
    n = 20_000
    _, total = walk(KeyToDoor(n, size=size), 0, np.random.default_rng(0))
    assert set(np.unique(total)) == {0.0, 1.0}
    assert abs(total.mean() - chance) < 4 * np.sqrt(chance / n)


def test_key_to_door_can_always_be_won_and_needs_the_key():
    def toward(env, room):
        row, column = np.divmod(env.cell, env.size)
        object_ = np.where(env.object[:, room] >= 0, env.object[:, room], env.cell)
        to_row, to_column = np.divmod(object_, env.size)
        vertical = np.where(to_row < row, 0, 1)
        return np.where(to_row != row, vertical, np.where(to_column < column, 2, 3))

    for takes_key in (True, False):
        env = KeyToDoor(500, size=4)
        env.reset(seed=3)
        total = np.zeros(500)
        for t in range(env.horizon):
            room = t // env.phase_steps
            actions = toward(env, room)
            if room == 0 and not takes_key:
                actions = np.where(actions % 2 == 0, actions + 1, actions - 1)  # away from the key
            total += env.step(actions)[1]
        assert total.mean() == 1.0 if takes_key else total.mean() < 0.3


def test_key_to_door_is_deterministic_and_hides_the_key_later():
    first, _ = walk(KeyToDoor(64), 5, np.random.default_rng(1))
    again, _ = walk(KeyToDoor(64), 5, np.random.default_rng(1))
    assert np.array_equal(first, again)
    env = KeyToDoor(1)
    env.reset(seed=0)
    assert first.shape == (env.horizon + 1, 64, env.observation_size)
    assert (first[env.phase_steps : 2 * env.phase_steps, :, 9:18] == 0).all(), "the second room is empty"
    assert (first[..., :9].sum(-1) == 1).all() and (first[..., 18:].sum(-1) == 1).all()


def test_graph_walk():
    graph = random_graph(20, 2.0, np.random.default_rng(0))
    optimal = distances(graph)
    assert optimal[0] == 0 and np.isfinite(optimal).all()
    for node in range(1, 20):  # brute force: one step closer along some edge, never two
        assert optimal[node] == 1 + min(optimal[after] for after in np.flatnonzero(graph[node]))
    starts = np.arange(1, 20)
    env = GraphWalk(graph, 19, horizon=12, starts=starts)
    env.reset(seed=0)
    total = np.zeros(19)
    for _ in range(12):
        best = np.array([np.flatnonzero(graph[n])[optimal[np.flatnonzero(graph[n])].argmin()] for n in env.node])
        total += env.step(best)[1]
    assert np.array_equal(-total, optimal[1:])


class Best:
    """An agent that asks the environment's own arrays."""

    def reset(self, episodes, seed=0):
        self.seeds = [*getattr(self, "seeds", []), seed]

    def act(self, observations, rewards=None):
        return np.ones((len(observations), 1), np.float32)


def test_evaluate_counts_each_episode_once():
    agent = Best()
    returns = evaluate(agent, Cart(4, horizon=7), episodes=10, seed=100)
    assert returns.shape == (10,) and agent.seeds == [100, 104, 108]
    assert np.array_equal(returns, evaluate(Best(), Cart(4, horizon=7), episodes=10, seed=100))
    with pytest.raises(ValueError, match="episodes is 0"):
        evaluate(agent, Cart(1), episodes=0)


def test_baselines_act():
    clone = MLPBC(2, 1, context_length=3).eval()
    clone.reset(2)
    assert clone.act(np.zeros((2, 2), np.float32)).shape == (2, 1)
    states = torch.randn(5, 1, 2)
    padded = torch.cat([torch.zeros(5, 2, 2), states], 1)
    torch.testing.assert_close(clone(states), clone(padded))
    torch.manual_seed(0)
    q = ConservativeQ(2, 3, horizon=5, gamma=1.0, conservatism=0.0)
    batch = (
        torch.randn(8, 2),
        torch.randint(3, (8,)),
        torch.ones(8),
        torch.randn(8, 2),
        torch.zeros(8, dtype=torch.long),
    )
    over = torch.ones(8, dtype=torch.bool)
    taken = q(batch[0], batch[4]).gather(1, batch[1][:, None]).squeeze(1)
    expected = torch.nn.functional.smooth_l1_loss(taken, torch.ones(8))
    torch.testing.assert_close(q.loss(*batch, over), expected)
    before = [p.clone() for p in q.target.parameters()]
    q.loss(*batch, over).backward()
    assert all(p.grad is None for p in q.target.parameters())
    with torch.no_grad():
        next(q.q.parameters()).add_(1.0)
    q.update_target()
    assert not torch.equal(before[0], next(q.target.parameters()))
    q.reset(4)
    assert q.act(np.zeros((4, 2), np.float32)).shape == (4,)


def test_context_of_one_step_and_wrong_calls():
    model = DecisionTransformer(2, 1, hidden_size=8, n_layers=1, context_length=1, max_ep_len=3).eval()
    assert np.isfinite(evaluate(DTPolicy(model, 1.0), OneState(3), episodes=3)).all()
    with pytest.raises(ValueError, match="returns_to_go is None"):
        small()(*windows()[:2], None, windows()[3])
    with pytest.raises(ValueError, match="actions has 1 steps"):
        given = atari_inputs()
        DecisionTransformerAtari(4, 3, 9, hidden_size=16, n_layers=1, n_heads=2)(
            given["states"], given["actions"][:, :1], given["returns_to_go"], given["timesteps"]
        )


class OneState(Cart):
    """The cart with a second, constant observation, longer than the model's table of timesteps."""

    def _observe(self):
        return np.stack([self.speed, np.zeros(self.num_envs)], 1).astype(np.float32)
