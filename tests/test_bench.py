"""Side by side: ratios, intervals, missing peers. No time is asserted, only what a scripted clock makes of it."""

import pytest
import torch.utils.benchmark

from saigen import bench, list_papers, paper
from saigen.example import Benchmark


class ScriptedTimer:
    """Stands in for torch's Timer: each call costs what the callable returns."""

    def __init__(self, statement, globals, num_threads):
        self.call = globals["call"]

    def timeit(self, count):
        seconds = sum(self.call() for _ in range(count)) / count
        return type("Measured", (), {"mean": seconds})


def measure(ours, peer, rounds=7):
    room = paper(list_papers()[0].slug)
    return bench.measure(room, Benchmark("pair", ours=lambda: ours, peer=lambda: peer), rounds=rounds)


@pytest.fixture(autouse=True)
def scripted(monkeypatch):
    monkeypatch.setattr(torch.utils.benchmark, "Timer", ScriptedTimer)


def test_twice_as_fast_is_two():
    row = measure(lambda: 1.0, lambda: 2.0)
    assert (row.ours, row.peer) == (1.0, 2.0)
    assert (row.ratio, row.low, row.high) == pytest.approx((2.0, 2.0, 2.0))


def test_noise_widens_the_interval_around_one():
    noise = iter([1.0, 1.0, 1.0, 1.1, 0.9, 1.2, 0.95, 1.05, 0.85, 1.0, 1.15] * 3)
    row = measure(lambda: 1.0, lambda: next(noise))
    assert row.low < 1 < row.high and row.low < row.ratio < row.high


def test_a_missing_peer_names_the_extra():
    def peer():
        raise ImportError("No module named 'nothing'")

    row = bench.measure(paper(list_papers()[0].slug), Benchmark("pair", ours=lambda: None, peer=peer, extra="peers"))
    assert "saigen[peers]" in str(row)
    assert "saigen[peers]" in bench.markdown([row], "saigen bench")


def test_one_round_has_no_interval():
    with pytest.raises(ValueError, match="rounds is 1"):
        measure(lambda: 1.0, lambda: 1.0, rounds=1)
