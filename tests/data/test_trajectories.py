"""Trajectories: returns-to-go, windows against a plain loop, collection, and Minari's format."""

import numpy as np
import pytest
import torch

from saigen.data.trajectories import (
    Trajectories,
    TrajectoryDataset,
    collect,
    read_minari,
    returns_to_go,
    write_minari,
)

LENGTHS = np.array([4, 1, 7, 2])


def episodes(discrete=False, lengths=LENGTHS):
    rng, n = np.random.default_rng(0), int(lengths.sum())
    return Trajectories(
        rng.normal(size=(n, 3)).astype(np.float32),
        rng.integers(0, 4, n) if discrete else rng.normal(size=(n, 2)).astype(np.float32),
        rng.normal(size=n).astype(np.float32),
        lengths,
        np.arange(len(lengths)) % 2 == 0,
        rng.normal(size=(len(lengths), 3)).astype(np.float32),
    )


def test_returns_to_go_identities():
    data = episodes()
    to_go = data.returns_to_go()
    np.testing.assert_allclose(to_go[data.starts], data.returns, atol=1e-6)
    inside = np.setdiff1d(np.arange(len(to_go)), data.ends - 1)
    np.testing.assert_allclose(to_go[inside] - to_go[inside + 1], data.rewards[inside], atol=1e-6)
    np.testing.assert_allclose(to_go[data.ends - 1], data.rewards[data.ends - 1], atol=1e-6)
    rewards = np.random.default_rng(0).normal(size=(2, 6))
    for gamma in (1.0, 0.9):
        plain = [[sum(gamma ** (k - t) * row[k] for k in range(t, 6)) for t in range(6)] for row in rewards]
        np.testing.assert_allclose(returns_to_go(rewards, gamma), plain, atol=1e-12)
    np.testing.assert_allclose(data.returns_to_go(0.5)[:4], returns_to_go(data.rewards[:4], 0.5), atol=1e-6)


def plain_window(data, start, k, scale, mean, std):
    """The official batch, one window, in a plain loop."""
    episode = int(np.searchsorted(data.ends, start, side="right"))
    end = min(start + k, data.ends[episode])
    n = end - start
    to_go = returns_to_go(data.rewards[start : data.ends[episode]])[:n]
    states = np.concatenate([np.zeros((k - n, 3)), data.observations[start:end]])
    actions = np.concatenate([np.full((k - n, *data.actions.shape[1:]), -10), data.actions[start:end]])
    asked = np.concatenate([np.zeros(k - n), to_go]) / scale
    first = start - data.starts[episode]
    steps = np.concatenate([np.zeros(k - n), np.arange(first, first + n)])
    return (states - mean) / std, actions, asked[:, None], steps, np.arange(k) >= k - n


@pytest.mark.parametrize("discrete", [False, True])
def test_windows_are_the_official_batches(discrete):
    data = episodes(discrete)
    dataset = TrajectoryDataset(data, 5, scale=7.0)
    flat = data.observations.astype(np.float64)
    got = dataset.windows(torch.arange(len(dataset)))
    for start in range(len(dataset)):
        expected = plain_window(data, start, 5, 7.0, flat.mean(0), flat.std(0) + 1e-6)
        for ours, theirs in zip(got, expected, strict=True):
            np.testing.assert_allclose(ours[start].numpy(), theirs, rtol=1e-4, atol=1e-5)
    assert got.actions.dtype == (torch.int64 if discrete else torch.float32)


def test_whole_windows_are_moved_back():
    dataset = TrajectoryDataset(episodes(), 3, whole=True)
    got = dataset.windows(torch.arange(len(dataset)))
    assert got.mask.sum(1).tolist() == [3] * 4 + [1] + [3] * 7 + [2] * 2
    assert got.timesteps[3].tolist() == [1, 2, 3] and got.timesteps[11].tolist() == [4, 5, 6]


def test_sampling_is_in_proportion_to_length_and_repeatable():
    dataset = TrajectoryDataset(episodes(), 1)
    draw = lambda: dataset.sample(14_000, torch.Generator().manual_seed(3))  # noqa: E731
    first = draw()
    assert all(torch.equal(a, b) for a, b in zip(first, draw(), strict=True))
    share = (first.timesteps.flatten() >= 4).double().mean().item()
    assert abs(share - 3 / 14) < 0.02


def test_long_episodes_and_frames():
    data = episodes()
    assert TrajectoryDataset(data, 2, max_ep_len=3).timesteps.max() == 2
    frames = Trajectories(
        np.random.default_rng(0).integers(0, 256, (14, 2, 4, 4), dtype=np.uint8),
        data.actions,
        data.rewards,
        data.lengths,
        data.terminated,
        np.zeros((4, 2, 4, 4), np.uint8),
    )
    window = TrajectoryDataset(frames, 3, normalise=False).windows(torch.tensor([3]))
    assert window.states.dtype == torch.uint8 and window.states[0, :2].sum() == 0


def test_top_select_join_delayed():
    data = episodes()
    best = data.top(0.5)
    assert best.lengths.sum() <= 7 and best.returns[0] == data.returns.max()
    assert len(data.top(1e-9)) == 1
    assert data.top(1.0).returns.tolist() == sorted(data.returns, reverse=True)
    again = Trajectories.join([data.select([0, 1]), data.select([2, 3])])
    assert again.fingerprint == data.fingerprint
    assert np.array_equal(data.select([2]).rewards, data.rewards[5:12])
    late = data.delayed()
    np.testing.assert_allclose(late.returns, data.returns, atol=1e-6)
    assert np.count_nonzero(late.rewards) == 4 and (late.returns_to_go()[:4] == late.returns_to_go()[0]).all()


def test_collect_cuts_episodes_of_their_own_length():
    class Countdown:
        """Environment i ends after i + 1 steps, then goes on with the next episode, as Gymnasium's do."""

        num_envs = 3

        def reset(self, *, seed=None):
            self.t, self.seed = np.zeros(3, int), seed
            return self.t[:, None].astype(np.float32), {}

        def step(self, actions):
            self.t += 1
            ended = self.t == np.arange(1, 4)
            return self.t[:, None].astype(np.float32), self.t * 1.0, ended & (self.t < 3), ended & (self.t == 3), {}

    data = collect(Countdown(), lambda seen: np.zeros((3, 1), np.float32), episodes=5, seed=0)
    assert data.lengths.tolist() == [1, 2, 3, 1, 2]
    assert data.terminated.tolist() == [True, True, False, True, True]
    assert data.observations[:, 0].tolist() == [0, 0, 1, 0, 1, 2, 0, 0, 1]
    assert data.final_observations[:, 0].tolist() == [1, 2, 3, 1, 2]
    assert data.returns.tolist() == [1, 3, 6, 1, 3]


@pytest.mark.parametrize("discrete", [False, True])
def test_minari_round_trip(discrete, tmp_path):
    minari = pytest.importorskip("minari", reason="needs minari: pip install 'saigen[rl]'")
    data = episodes(discrete)
    write_minari(data, tmp_path / "set")
    again = read_minari(tmp_path / "set")
    for name in ("observations", "actions", "rewards", "lengths", "terminated", "final_observations"):
        assert np.array_equal(getattr(data, name), getattr(again, name)), name
    theirs = minari.MinariDataset(tmp_path / "set")
    assert theirs.total_episodes == 4 and theirs.total_steps == 14
    assert [len(episode) for episode in theirs.iterate_episodes()] == LENGTHS.tolist()


def test_bad_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no metadata\.json"):
        read_minari(tmp_path)
    data = episodes()
    with pytest.raises(ValueError, match="rewards has 13 rows"):
        Trajectories(
            data.observations, data.actions, data.rewards[1:], *(data.lengths, data.terminated, data.observations[:4])
        )
    broken = data.rewards.copy()
    broken[2] = np.nan
    with pytest.raises(ValueError, match="rewards has values that are not finite"):
        Trajectories(data.observations, data.actions, broken, *(data.lengths, data.terminated, data.observations[:4]))
    with pytest.raises(ValueError, match="share is 0"):
        data.top(0.0)
    with pytest.raises(ValueError, match="scale is 0"):
        TrajectoryDataset(data, 2, scale=0.0)
    with pytest.raises(ValueError, match="context_length is 0"):
        TrajectoryDataset(data, 0)
