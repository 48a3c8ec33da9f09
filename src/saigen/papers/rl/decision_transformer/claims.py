"""The experiments: delayed credit on Key-to-Door, shortest paths out of random walks, and getting the return asked for."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saigen.data.trajectories import Trajectories, TrajectoryDataset, collect
from saigen.papers.rl.decision_transformer import (
    Cart,
    ConservativeQ,
    DecisionTransformer,
    DTPolicy,
    GraphWalk,
    KeyToDoor,
    action_loss,
    distances,
    evaluate,
    random_graph,
    random_success,
)
from saigen.papers.rl.decision_transformer.behaviour import LinearPolicies, linear_search
from saigen.train import constant, cosine, fit
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    """How big the experiments are; episodes are what is evaluated, steps those of the optimizer."""

    room: int  # Key-to-Door: side of a room
    walks: int  # Key-to-Door: random trajectories
    hidden: int
    layers: int
    steps: int
    batch: int
    cql_steps: int
    episodes: int
    graph_steps: int
    starts: int  # shortest path: evaluated episodes a starting node
    conditioning_steps: int
    environment: str = ""  # conditioning: a Gymnasium id; empty: the cart
    search: int = 0  # conditioning: iterations of the search for the behaviour policy


SIZES = {
    "tiny": Size(3, 200, 16, 1, 3, 16, 3, 20, 3, 1, 3),
    "laptop": Size(3, 10_000, 32, 2, 500, 128, 2000, 500, 500, 20, 300),
    "real": Size(5, 10_000, 128, 3, 20_000, 128, 20_000, 1000, 5000, 100, 10_000, "Hopper-v5", 150),
}


def train(
    trial: Trial,
    arm: str,
    model: DecisionTransformer,
    dataset: TrajectoryDataset,
    starts: Tensor,
    *,
    steps: int,
    batch: int,
    lr: float,
) -> DecisionTransformer:
    """AdamW with the paper's weight decay and clipping on windows from ``starts``; a short warm-up, then a cosine."""
    model.to(trial.device)

    def loss(model: nn.Module, states: Tensor, actions: Tensor, asked: Tensor, steps: Tensor, mask: Tensor) -> Tensor:
        # No mask at all where no window is padded: the attention is then plainly causal, and quicker.
        keep = None if dataset.whole else mask
        return action_loss(model(states, actions, asked, steps, keep).actions, actions, keep)

    fit(
        model,
        loss,
        (starts,),
        optimizer=torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4),
        steps=steps,
        batch_size=batch,
        seed=trial.seed,
        schedule=cosine(warmup=max(1, steps // 20)),
        transform=lambda generator, rows: dataset.windows(rows),
        clip=0.25,
        checkpoint=trial.checkpoint(arm),
        device=trial.device,
        on_step=lambda step, total, value: trial.progress(step + 1, total, arm),
    )
    return model


def balanced(walks: Trajectories, won: np.ndarray) -> Tensor:
    """The first rows of all episodes, those that ``won`` (m,) repeated until they are about half.

    What is learned, the actions given the return, does not depend on how often each return is shown; how soon does.
    """
    starts, better = torch.from_numpy(walks.starts), torch.from_numpy(won)
    repeats = int((~better).sum()) // max(1, int(better.sum()))
    return torch.cat([starts[better].repeat(max(1, repeats)), starts[~better]])


def key_to_door(trial: Trial) -> dict[str, float]:
    """One seed: the same random walks for all; success of each agent over the same new episodes."""
    size = SIZES[trial.scale]
    rng = trial.rng("walks")
    env = KeyToDoor(size.walks, size=size.room)
    walks = collect(env, lambda seen: rng.integers(env.n_actions, size=len(seen)), size.walks, int(rng.integers(2**31)))
    won = walks.returns > 0
    trial.used("key_to_door", walks.fingerprint)
    test_seed = int(trial.rng("evaluation").integers(2**31))

    def success(agent: Any) -> float:
        return float(evaluate(agent, KeyToDoor(size.episodes, size=size.room), episodes=size.episodes, seed=test_seed).mean())

    def imitation(arm: str, episodes: Trajectories, rows: Tensor, conditioned: bool = False) -> float:
        with trial.seeded("weights"):
            model = DecisionTransformer(
                env.observation_size,
                env.n_actions,
                hidden_size=size.hidden,
                n_layers=size.layers,
                context_length=env.horizon,
                max_ep_len=env.horizon,
                discrete=True,
                conditioned=conditioned,
                dropout=0.0,
            )
        dataset = TrajectoryDataset(episodes, env.horizon, normalise=False, max_ep_len=env.horizon, whole=True)
        train(trial, arm, model, dataset, rows, steps=size.steps, batch=size.batch, lr=5e-3)
        return success(DTPolicy(model, target_return=1.0).to(trial.device))

    every = torch.from_numpy(walks.starts)
    dt = imitation("dt", walks, balanced(walks, won), conditioned=True)
    bc = imitation("bc", walks, every)
    winners = walks.select(np.flatnonzero(won)) if won.any() else walks
    percent_bc = imitation("percent_bc", winners, torch.from_numpy(winners.starts))
    cql = success(_conservative_q(trial, walks, env, size))
    return {
        "gap_to_bc": dt - bc,
        "gap_to_cql": dt - cql,
        "dt": dt,
        "bc": bc,
        "percent_bc": percent_bc,
        "cql": cql,
        "random": random_success(size.room),
        "winning_walks": float(won.sum()),
    }


def _conservative_q(trial: Trial, walks: Trajectories, env: KeyToDoor, size: Size) -> ConservativeQ:
    seen = torch.from_numpy(walks.observations)
    following = torch.cat([seen[1:], seen[:1]])
    over = torch.zeros(len(seen), dtype=torch.bool)
    over[walks.ends - 1] = True
    with trial.seeded("cql weights"):
        model = ConservativeQ(env.observation_size, env.n_actions, horizon=env.horizon, gamma=1.0, conservatism=CONSERVATISM)
    model.to(trial.device)
    fit(
        model,
        lambda model, *batch: model.loss(*batch),
        (
            seen,
            torch.from_numpy(walks.actions),
            torch.from_numpy(walks.rewards),
            following,
            torch.from_numpy(walks.timesteps),
            over,
        ),
        optimizer=torch.optim.Adam(model.q.parameters(), lr=1e-3),
        steps=size.cql_steps,
        batch_size=256,
        seed=trial.seed,
        checkpoint=trial.checkpoint("cql"),
        device=trial.device,
        on_step=lambda *_: model.update_target(),
    )
    return model


CONSERVATISM = 0.1
"""Weight of the conservative penalty: the best of 0, 0.01, 0.1 and 1 on other seeds."""


def shortest_path(trial: Trial) -> dict[str, float]:
    """One seed: a random graph, random walks on it, and the share of optimal paths when the best return is asked for."""
    size = SIZES[trial.scale]
    rng = trial.rng("graph")
    graph = random_graph(20, 2.0, rng)
    optimal = distances(graph)
    horizon, count = 10, 1000
    env = GraphWalk(graph, count, horizon=horizon)
    walks = collect(env, lambda seen: env.random_actions(rng), count, int(rng.integers(2**31)))
    trial.used("random_walks", walks.fingerprint)
    # The highest return the data shows from each node: the quickest arrival of any walk that passed through it.
    first = walks.observations.argmax(1)
    to_go = walks.returns_to_go()
    arrived = np.repeat(walks.final_observations.argmax(1) == 0, walks.lengths)
    best = np.full(len(graph), -float(horizon))
    np.maximum.at(best, first[arrived], to_go[arrived])

    nodes = np.repeat(np.arange(1, len(graph)), size.starts)
    test_seed = int(trial.rng("evaluation").integers(2**31))

    def optimal_share(conditioned: bool) -> float:
        with trial.seeded("weights"):
            model = DecisionTransformer(
                *(len(graph), len(graph)),
                hidden_size=size.hidden,
                n_layers=size.layers,
                context_length=horizon,
                max_ep_len=horizon,
                discrete=True,
                conditioned=conditioned,
                dropout=0.0,
            )
        dataset = TrajectoryDataset(walks, horizon, scale=horizon, normalise=False, max_ep_len=horizon, whole=True)
        arm = "path_dt" if conditioned else "path_bc"
        rows = balanced(walks, walks.returns > -horizon) if conditioned else torch.from_numpy(walks.starts)
        train(trial, arm, model, dataset, rows, steps=size.graph_steps, batch=64, lr=5e-3)
        agent = DTPolicy(model, best[nodes], scale=horizon).to(trial.device)
        returns = evaluate(agent, GraphWalk(graph, len(nodes), horizon=horizon, starts=nodes), episodes=len(nodes), seed=test_seed)
        return float((-returns == optimal[nodes]).mean())

    dt, bc = optimal_share(True), optimal_share(False)
    start = first[walks.starts]
    return {
        "optimal_path_gap": dt - bc,
        "dt": dt,
        "bc": bc,
        "random_walk": float(np.mean([(-walks.returns == optimal[start])[start == node].mean() for node in np.unique(start)])),
        "known_optimum": float((-best[1:] == optimal[1:]).mean()),
    }


def asked_return(trial: Trial) -> dict[str, float]:
    """One seed: data of mixed quality, one model, and the slope of the returns it gets over the returns it is asked for."""
    size = SIZES[trial.scale]
    rng = trial.rng("behaviour")
    seed = int(rng.integers(2**31))
    if size.environment:
        runs, make, scale, context, limit = _gymnasium_runs(trial, size, rng, seed)
    else:
        runs, make, scale, context, limit = _cart_runs(rng, seed, 300)
    trial.used(size.environment or "cart", runs.fingerprint)
    whole = dict(n_layers=size.layers, hidden_size=size.hidden, dropout=0.1 if size.environment else 0.0)
    with trial.seeded("weights"):
        model = DecisionTransformer(
            runs.observations.shape[1], runs.actions.shape[1], context_length=context, max_ep_len=limit, **whole
        )
    dataset = TrajectoryDataset(runs, context, scale=scale, max_ep_len=limit)
    lr = 1e-4 if size.environment else 3e-3
    train(trial, "dt", model, dataset, torch.arange(len(dataset)), steps=size.conditioning_steps, batch=64, lr=lr)
    low, high = np.quantile(runs.returns, (0.05, 0.95))
    targets = np.repeat(np.linspace(low, high, 8), max(1, size.starts // 2))
    agent = DTPolicy(model, targets, scale=scale, state_mean=dataset.state_mean, state_std=dataset.state_std)
    agent.to(trial.device)
    test_seed = int(trial.rng("evaluation").integers(2**31))
    returns = evaluate(agent, make(len(targets)), episodes=len(targets), seed=test_seed)
    slope = float(np.polyfit(targets, returns, 1)[0])
    correlation = float(np.corrcoef(targets, returns)[0, 1]) if returns.std() else 0.0
    return {"slope": slope, "correlation": correlation, "lowest_target": float(low), "highest_target": float(high)}


def _cart_runs(rng: np.random.Generator, seed: int, episodes: int) -> tuple[Trajectories, Any, float, int, int]:
    """Each episode is pushed about a force of its own, with noise: slow, fast, forwards and backwards."""
    force = rng.uniform(-0.8, 0.8, (episodes, 1))

    def act(seen: np.ndarray) -> np.ndarray:
        return np.clip(force + 0.3 * rng.standard_normal(force.shape), -1.0, 1.0).astype(np.float32)

    env = Cart(episodes)
    return collect(env, act, episodes, seed), Cart, float(env.horizon), 10, env.horizon


def _gymnasium_runs(
    trial: Trial, size: Size, rng: np.random.Generator, seed: int
) -> tuple[Trajectories, Any, float, int, int]:
    """Linear policies found by random search, from the first to the last; noise on their actions makes the mixture."""
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError("this scale needs the extra rl: pip install 'saigen[rl]'") from error

    def make(n: int) -> Any:
        return gymnasium.make_vec(size.environment, num_envs=n, vectorization_mode="sync")

    stages = linear_search(make, rng, iterations=size.search, report=lambda i: trial.progress(i, size.search, "behaviour"))
    env = make(50)
    parts = []
    for i, stage in enumerate(stages):
        noise = rng.uniform(0.0, 0.3, (env.num_envs, 1))
        policy = LinearPolicies(stage.weights[None].repeat(env.num_envs, 0), stage.mean, stage.std)
        parts.append(
            collect(
                env,
                lambda seen, policy=policy, noise=noise: np.clip(
                    policy(seen) + noise * rng.standard_normal((env.num_envs, stage.weights.shape[0])), -1.0, 1.0
                ).astype(np.float32),
                env.num_envs,
                (seed + 1000 * i) % 2**31,
            )
        )
    fields = ("observations", "actions", "rewards", "lengths", "terminated", "final_observations")
    joined = (np.concatenate([getattr(part, name) for part in parts]) for name in fields)
    return Trajectories(*joined), make, 1000.0, 20, 1000
