"""The experiments: delayed credit on Key-to-Door, shortest paths out of random walks, and getting the return asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saigen.data.trajectories import Trajectories, TrajectoryDataset, collect, read_minari
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
from saigen.train import cosine, fit
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    """How big the experiments are; steps are those of the optimizer, episodes what is evaluated."""

    room: int = 3  # Key-to-Door: side of a room
    walks: int = 10_000  # Key-to-Door: random trajectories, the larger of the paper's two numbers
    hidden: int = 32
    layers: int = 2
    lr: float = 5e-3
    steps: int = 500
    batch: int = 128
    cql_steps: int = 2000
    episodes: int = 500
    graph_steps: int = 500
    asked_steps: int = 300  # the return asked for
    asked_episodes: int = 10  # a target
    environment: str = ""  # the return asked for: a Gymnasium id; empty: the cart
    search: int = 0  # iterations of the search for the behaviour policy; 0: the data is the user's


SIZES = {
    "tiny": Size(
        walks=200, hidden=16, layers=1, steps=3, batch=16, cql_steps=3, episodes=20, graph_steps=3, asked_steps=3
    ),
    "laptop": Size(),
    "real": Size(
        room=4,
        hidden=64,
        lr=2e-3,
        steps=5000,
        cql_steps=20_000,
        episodes=1000,
        graph_steps=2000,
        asked_steps=20_000,
        environment="Hopper-v5",
        search=200,
    ),
    "full": Size(asked_steps=100_000, asked_episodes=100, environment="Hopper-v5"),
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
        return float(
            evaluate(agent, KeyToDoor(size.episodes, size=size.room), episodes=size.episodes, seed=test_seed).mean()
        )

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
        train(trial, arm, model, dataset, rows, steps=size.steps, batch=size.batch, lr=size.lr)
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
        model = ConservativeQ(
            env.observation_size, env.n_actions, horizon=env.horizon, gamma=1.0, conservatism=CONSERVATISM
        )
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

    nodes = np.repeat(np.arange(1, len(graph)), 20)
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
        train(trial, arm, model, dataset, rows, steps=size.graph_steps, batch=64, lr=size.lr)
        agent = DTPolicy(model, best[nodes], scale=float(horizon)).to(trial.device)
        returns = evaluate(
            agent, GraphWalk(graph, len(nodes), horizon=horizon, starts=nodes), episodes=len(nodes), seed=test_seed
        )
        return float((-returns == optimal[nodes]).mean())

    dt, bc = optimal_share(True), optimal_share(False)
    start = first[walks.starts]
    return {
        "optimal_path_gap": dt - bc,
        "dt": dt,
        "bc": bc,
        "random_walk": float(
            np.mean([(-walks.returns == optimal[start])[start == node].mean() for node in np.unique(start)])
        ),
        "known_optimum": float((-best[1:] == optimal[1:]).mean()),
    }


def asked_return(trial: Trial) -> dict[str, float]:
    """One seed: data of mixed quality, one model, and the slope of the returns it gets over the returns it is asked for."""
    size = SIZES[trial.scale]
    rng = trial.rng("behaviour")
    make = _gymnasium_maker(size.environment) if size.environment else Cart
    if not size.environment:
        runs = _cart_runs(rng, 300)
    elif size.search:
        runs = _searched_runs(trial, size, make, rng)
    elif trial.data_path is not None:
        runs = read_minari(trial.data_path)
    else:
        raise ValueError(
            f"scale {trial.scale!r} needs data of yours: give --data PATH, a Minari data set of {size.environment}"
        )
    trial.used(size.environment or "cart", runs.fingerprint)
    # The paper's network and settings in MuJoCo; the cart needs less of everything.
    mujoco = bool(size.environment)
    context, limit, scale = (20, 1000, 1000.0) if mujoco else (10, 40, 40.0)
    with trial.seeded("weights"):
        model = DecisionTransformer(
            *(runs.observations.shape[1], runs.actions.shape[1]),
            hidden_size=128 if mujoco else size.hidden,
            n_layers=3 if mujoco else size.layers,
            context_length=context,
            max_ep_len=limit,
            dropout=0.1 if mujoco else 0.0,
        )
    dataset = TrajectoryDataset(runs, context, scale=scale, max_ep_len=limit)
    rows = torch.arange(len(dataset))
    train(trial, "dt", model, dataset, rows, steps=size.asked_steps, batch=64, lr=1e-4 if mujoco else 3e-3)
    low, high = np.quantile(runs.returns, (0.05, 0.95))
    targets = np.repeat(np.linspace(low, high, 8), size.asked_episodes)
    agent = DTPolicy(model, targets, scale=scale, state_mean=dataset.state_mean, state_std=dataset.state_std)
    agent.to(trial.device)
    test_seed = int(trial.rng("evaluation").integers(2**31))
    returns = evaluate(agent, make(len(targets)), episodes=len(targets), seed=test_seed)
    return {
        "slope": float(np.polyfit(targets, returns, 1)[0]),
        "correlation": float(np.corrcoef(targets, returns)[0, 1]) if returns.std() else 0.0,
        "lowest_target": float(low),
        "highest_target": float(high),
    }


def _cart_runs(rng: np.random.Generator, episodes: int) -> Trajectories:
    """Each episode is pushed about a force of its own, with noise: slow, fast, forwards and backwards."""
    force = rng.uniform(-0.8, 0.8, (episodes, 1))

    def act(seen: np.ndarray) -> np.ndarray:
        return np.clip(force + 0.3 * rng.standard_normal(force.shape), -1.0, 1.0).astype(np.float32)

    return collect(Cart(episodes), act, episodes, int(rng.integers(2**31)))


def _gymnasium_maker(environment: str) -> Callable[[int], Any]:
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError("this scale needs the extra rl: pip install 'saigen[rl]'") from error

    def rescaled(env: Any) -> Any:
        return gymnasium.wrappers.RescaleAction(env, np.float32(-1.0), np.float32(1.0))

    return lambda n: gymnasium.make_vec(environment, num_envs=n, vectorization_mode="sync", wrappers=[rescaled])


def _searched_runs(trial: Trial, size: Size, make: Callable[[int], Any], rng: np.random.Generator) -> Trajectories:
    """Linear policies found by random search, from its first to its last; noise on their actions makes the mixture."""
    stages = linear_search(
        make, rng, iterations=size.search, report=lambda done: trial.progress(done, size.search, "behaviour policy")
    )
    env = make(50)
    parts = []
    for stage in stages:
        policy = LinearPolicies(stage.weights[None].repeat(env.num_envs, 0), stage.mean, stage.std)
        noise = rng.uniform(0.0, 0.3, (env.num_envs, 1))

        def act(seen: np.ndarray) -> np.ndarray:
            actions = policy(seen)
            return np.clip(actions + noise * rng.standard_normal(actions.shape), -1.0, 1.0).astype(np.float32)

        parts.append(collect(env, act, env.num_envs, int(rng.integers(2**31))))
    return Trajectories.join(parts)
