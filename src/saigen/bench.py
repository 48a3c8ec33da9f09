"""Side by side: each room's component against its best public peer, alternating in one process."""

import ctypes
import gc
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from saigen.cards.catalogue import Paper
from saigen.example import Benchmark

ROUNDS = 7


@dataclass(frozen=True)
class Row:
    """A benchmark's result: seconds of ours and of the peer (medians), and peer over ours: above 1 ours is faster.

    ``low`` and ``high`` are the 95 % interval of the ratio over the rounds; where 1 lies between them, the two took the
    same time as far as this machine can tell.
    """

    paper: str
    name: str
    ours: float = 0.0
    peer: float = 0.0
    ratio: float = 0.0
    low: float = 0.0
    high: float = 0.0
    missing: str | None = None

    def __str__(self) -> str:
        return self.missing or f"{self.ratio:.2f} ({self.low:.2f} to {self.high:.2f})"


def benchmarks(papers: Sequence[Paper]) -> Iterator[tuple[Paper, Benchmark]]:
    """Every benchmark of ``papers``."""
    for paper in papers:
        found = getattr(paper.module("examples"), "benchmarks", None)
        if found is not None:
            yield from ((paper, benchmark) for benchmark in found())


def measure(paper: Paper, benchmark: Benchmark, *, rounds: int = ROUNDS, seconds: float = 0.3) -> Row:
    """Times ours and the peer in turn, ``rounds`` times each with ``torch.utils.benchmark``: geometric means of the pairs.

    A peer that is not installed gives a row that says which extra to install. Raises ``ValueError`` for fewer than
    two rounds, which have no interval.
    """
    import numpy as np
    from scipy import stats
    from torch.utils.benchmark import Timer

    if rounds < 2:
        raise ValueError(f"rounds is {rounds}, allowed is at least 2")

    _keep_freed_memory()
    try:
        peer = benchmark.peer()
    except ImportError as error:
        return Row(paper.slug, benchmark.name, missing=f"{error} (pip install 'saigen[{benchmark.extra}]')")
    ours = benchmark.ours()
    pairs = []
    timers = [_timer(Timer, ours), _timer(Timer, peer)]
    for timer in timers:
        timer.timeit(1)
    count = max(1, int(seconds / max(1e-6, timers[1].timeit(1).mean)))
    gc.collect()
    for round_number in range(rounds):
        order = (0, 1) if round_number % 2 == 0 else (1, 0)
        times = {which: timers[which].timeit(count).mean for which in order}
        pairs.append((times[0], times[1]))
    logs = np.log([theirs / mine for mine, theirs in pairs])
    reach = stats.t.ppf(0.975, rounds - 1) * stats.sem(logs)
    return Row(
        paper.slug,
        benchmark.name,
        *np.median(pairs, axis=0).tolist(),
        *np.exp([logs.mean(), logs.mean() - reach, logs.mean() + reach]).tolist(),
    )


def _keep_freed_memory() -> None:
    """glibc gives freed memory back from sizes on that depend on what a process did before, and takes it anew page by page.

    That made a tensor of a megabyte several times as slow in one process as in another, for ours or for the peer; with
    these thresholds fixed both get memory that is there already.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD, in bytes
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD; it can be no larger


def _timer(timer: Any, call: Callable[[], Any]) -> Any:
    import torch

    return timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())


def machine(threads: int | None = None) -> str:
    """What was measured on, with so many threads (by default torch's): times and their ratios hold for it only."""
    import torch

    from saigen.claims.evidence import environment

    threads = threads or torch.get_num_threads()
    found = environment("cpu", threads)
    counted = "1 thread" if threads == 1 else f"{threads} threads"
    return f"{found['processor']}, {counted}, {platform.system()}, torch {torch.__version__}"


def markdown(rows: Sequence[Row], command: str) -> str:
    """The table of ``benchmarks/README.md``."""
    lines = [
        "| paper | benchmark | ours (ms) | peer (ms) | peer / ours (95 % interval) |",
        "| --- | --- | ---: | ---: | ---: |",
        *(
            f"| {row.paper} | {row.name} | {row.ours * 1e3:.2f} | {row.peer * 1e3:.2f} | {row} |"
            if row.missing is None
            else f"| {row.paper} | {row.name} | | | {row} |"
            for row in rows
        ),
    ]
    return f"Measured with `{command}` on {machine()}.\n\n" + "\n".join(lines) + "\n"
