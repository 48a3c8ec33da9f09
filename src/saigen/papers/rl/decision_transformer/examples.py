"""Small instances of the room's public components, and the forward pass beside Transformers'."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from saigen.example import Benchmark, Example
from saigen.papers.rl.decision_transformer import (
    MLPBC,
    DecisionTransformer,
    DecisionTransformerAtari,
    DTPolicy,
    KeyToDoor,
    atari_learning_rate,
)


def _small(**options: bool) -> DecisionTransformer:
    return DecisionTransformer(5, 2, hidden_size=16, n_layers=2, n_heads=2, context_length=4, max_ep_len=9, **options)


def _windows(generator: torch.Generator) -> tuple[Tensor, ...]:
    mask = torch.ones(2, 4, dtype=torch.long)
    mask[0, :2] = 0
    return (
        torch.randn(2, 4, 5, generator=generator),
        torch.rand(2, 4, 2, generator=generator) * 2 - 1,
        torch.rand(2, 4, 1, generator=generator),
        torch.arange(4).repeat(2, 1),
        mask,
    )


def _frames(generator: torch.Generator) -> tuple[Tensor, ...]:
    return (
        torch.rand(2, 3, 4, 84, 84, generator=generator),
        torch.randint(4, (2, 3), generator=generator),
        torch.rand(2, 3, 1, generator=generator),
        torch.randint(9, (2,), generator=generator),
    )


def examples() -> Iterator[Example]:
    """One example a component."""
    yield Example(
        name="DecisionTransformer",
        kind="module",
        make=_small,
        inputs=_windows,
        code="""
import numpy as np
import torch
from saigen.data.trajectories import TrajectoryDataset, collect
from saigen.papers.rl.decision_transformer import Cart, DecisionTransformer, DTPolicy, action_loss, evaluate

rng = np.random.default_rng(0)
runs = collect(Cart(64), lambda seen: rng.uniform(-1, 1, (64, 1)).astype("float32"), episodes=64, seed=0)
data = TrajectoryDataset(runs, context_length=10, scale=40.0)
model = DecisionTransformer(state_dim=1, act_dim=1, hidden_size=32, n_layers=2, context_length=10, max_ep_len=40)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(20):
    batch = data.sample(64)
    loss = action_loss(model(*batch).actions, batch.actions, batch.mask)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
agent = DTPolicy(model.eval(), 20.0, scale=40.0, state_mean=data.state_mean, state_std=data.state_std)
print(evaluate(agent, Cart(10), episodes=10).mean())
""",
        wrong=(
            (lambda: DecisionTransformer(0, 2), "state_dim"),
            (lambda: DecisionTransformer(5, 2, hidden_size=10, n_heads=3), "heads"),
            (lambda: DecisionTransformer(5, 2, dropout=1.0), "dropout"),
            (lambda: _small()(torch.zeros(1, 2, 6), *_windows(torch.Generator())[1:]), "state_dim"),
        ),
    )
    yield Example(
        name="DecisionTransformerAtari",
        kind="module",
        make=lambda: DecisionTransformerAtari(4, 3, 9, hidden_size=16, n_layers=1, n_heads=2),
        inputs=_frames,
        code="""
import torch
import saigen

model = saigen.create_model("decision_transformer_atari_breakout", max_timestep=100).eval()
frames = torch.zeros(1, 2, 4, 84, 84, dtype=torch.uint8)
asked = torch.tensor([[[90.0], [89.0]]])
print(model(frames, torch.tensor([[1]]), asked, torch.tensor([1]))[:, -1].softmax(-1))
""",
        wrong=(
            (lambda: DecisionTransformerAtari(0), "n_actions"),
            (lambda: DecisionTransformerAtari(4, max_timestep=0), "max_timestep"),
        ),
    )
    yield Example(
        name="MLPBC",
        kind="module",
        make=lambda: MLPBC(5, 2, context_length=4, hidden_size=16),
        inputs=lambda generator: (torch.randn(3, 4, 5, generator=generator),),
        code="""
import torch
from saigen.papers.rl.decision_transformer import MLPBC

print(MLPBC(state_dim=11, act_dim=3, context_length=20)(torch.zeros(8, 20, 11)).shape)
""",
    )
    yield Example(
        name="KeyToDoor",
        kind="agent",
        make=lambda: DTPolicy(
            DecisionTransformer(
                21, 4, hidden_size=16, n_layers=1, context_length=15, max_ep_len=15, discrete=True
            ).eval(),
            1.0,
        ),
        code="""
from saigen.papers.rl.decision_transformer import DecisionTransformer, DTPolicy, KeyToDoor, evaluate

model = DecisionTransformer(21, 4, hidden_size=16, n_layers=1, context_length=15, max_ep_len=15, discrete=True).eval()
won = evaluate(DTPolicy(model, target_return=1.0), KeyToDoor(num_envs=200, size=3), episodes=200)
print(f"untrained: {won.mean():.1%} of the episodes")
""",
        wrong=(
            (lambda: KeyToDoor(2, size=2), "size"),
            (lambda: KeyToDoor(2, size=4, phase_steps=3), "phase_steps"),
            (lambda: DTPolicy(_small(), scale=0.0), "scale"),
            (lambda: DTPolicy(_small(), temperature=-1.0), "temperature"),
        ),
        batch=None,
    )
    yield Example(
        name="atari_learning_rate",
        kind="function",
        make=lambda: lambda step: torch.tensor(atari_learning_rate(128 * 30, 2 * 500_000 * 90)(int(step), 0)),
        inputs=lambda generator: (torch.tensor(7),),
        code="""
from saigen.papers.rl.decision_transformer import atari_learning_rate

factor = atari_learning_rate(tokens_a_step=128 * 30, final_tokens=2 * 500_000 * 90)
print([round(factor(step, 0), 3) for step in (0, 1, 2, 10_000, 20_000)])
""",
        batch=None,
    )


def benchmarks() -> Iterator[Benchmark]:
    """The Hopper model on full windows against ``transformers.DecisionTransformerModel`` with the same weights."""
    for name, batch, train in (
        ("forward, batch 64 x 20 steps", 64, False),
        ("forward and backward, batch 64 x 20 steps", 64, True),
        ("forward, batch 1 x 20 steps", 1, False),
    ):
        yield Benchmark(
            name=f"decision_transformer_hopper {name}",
            ours=lambda batch=batch, train=train: _ours(batch, train),
            peer=lambda batch=batch, train=train: _peer(batch, train),
        )


def _batch(size: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(size, 20, dtype=torch.long)
    mask[: size // 4, :5] = 0
    return (
        torch.randn(size, 20, 11, generator=generator),
        torch.randn(size, 20, 3, generator=generator),
        torch.randn(size, 20, 1, generator=generator),
        torch.arange(20).repeat(size, 1),
        mask,
    )


def _hugging_face() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    return transformers.DecisionTransformerModel(
        transformers.DecisionTransformerConfig(state_dim=11, act_dim=3, max_ep_len=1000)
    )


def _timed(call: Callable[[], Tensor], model: nn.Module, train: bool) -> Callable[[], None]:
    model.train(train)

    def run() -> None:
        with torch.set_grad_enabled(train):
            actions = call()
        if train:
            model.zero_grad(set_to_none=True)
            actions.square().mean().backward()

    return run


def _ours(size: int, train: bool) -> Callable[[], None]:
    model, batch = DecisionTransformer(11, 3), _batch(size)
    model.load_state_dict(model.convert_state_dict(_hugging_face().state_dict()))
    return _timed(lambda: model(*batch).actions, model, train)


def _peer(size: int, train: bool) -> Callable[[], None]:
    model, batch = _hugging_face(), _batch(size)
    names = ("states", "actions", "returns_to_go", "timesteps", "attention_mask")
    inputs = dict(zip(names, batch, strict=True))
    return _timed(lambda: model(**inputs).action_preds, model, train)
