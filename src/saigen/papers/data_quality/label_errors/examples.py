"""Small instances of the room's public components, and candidates side by side with cleanlab."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from saigen.example import Benchmark as SideBySide
from saigen.example import Example
from saigen.papers.data_quality.label_errors import (
    Benchmark,
    Ranking,
    candidate_errors,
    consensus,
    correct,
    error_rate_interval,
    extrapolated_error_rate,
    multi_label_error,
    noise_prevalence,
    read_votes,
    thin,
)

LABELS, PROBABILITIES = np.array([0, 0, 1, 1]), np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.1, 0.9]])


def _labels_and_probabilities(generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
    P = torch.rand(40, 4, generator=generator, dtype=torch.float64).pow(4)
    return torch.arange(40).numpy() % 4, (P / P.sum(dim=1, keepdim=True)).numpy()


def _benchmark() -> Benchmark:
    original = np.arange(20) % 4
    return Benchmark(original, np.where(np.arange(20) < 3, (original + 1) % 4, original), np.arange(20) != 19)


def examples():
    """Candidates, people's answers, corrected labels and the ranking."""
    yield Example(
        name="candidate_errors",
        kind="function",
        make=lambda: candidate_errors,
        inputs=_labels_and_probabilities,
        code="""
import numpy as np
from saigen.papers.data_quality.label_errors import candidate_errors

labels = np.array([0, 0, 1, 1])                                          # as given
pred_probs = np.array([[.9, .1], [.2, .8], [.3, .7], [.1, .9]])          # from models that did not see the example
print(candidate_errors(labels, pred_probs), candidate_errors(labels, pred_probs, count=2))
""",
        wrong=(
            (lambda: candidate_errors(LABELS, PROBABILITIES, count=0), "count"),
            (lambda: candidate_errors(LABELS, PROBABILITIES / 2), "row 0"),
            (lambda: candidate_errors([0, 0, 1, 7], PROBABILITIES), "row 3"),
        ),
        batch=None,
    )
    yield Example(
        name="consensus",
        kind="function",
        make=lambda: consensus,
        inputs=lambda generator: (torch.randint(0, 6, (30, 4), generator=generator).numpy(),),
        code="""
from saigen.papers.data_quality.label_errors import KINDS, consensus, correct

votes = [[5, 0, 0, 0], [1, 4, 0, 0], [2, 2, 1, 0]]                       # given, guessed, both, neither
kinds = consensus(votes)
print([KINDS[kind] for kind in kinds])
benchmark = correct([7, 7, 3, 1], rows=[0, 1, 2], kinds=kinds, suggested=[1, 1, 8])
print(benchmark.corrected, benchmark.keep, benchmark.prevalence)
""",
        wrong=(
            (lambda: consensus([[1, 2, 3]]), "votes"),
            (lambda: consensus([[1, 2, 3, -1]]), "votes"),
            (lambda: consensus([[5, 0, 0, 0]], least=0), "least"),
            (lambda: correct([0, 1], [2], [1], [0]), "rows"),
            (lambda: correct([0, 1], [1, 1], [1, 1], [0, 0]), "more than once"),
            (lambda: correct([0, 1], [1], [9], [0]), "kinds"),
            (lambda: correct([0, 1], [1], [1], [1]), "suggested"),
            (lambda: multi_label_error({"a"}, {"a": 5}, least=0), "least"),
            (lambda: read_votes("no_such_file.json"), "no_such_file.json"),
        ),
        batch=None,
    )
    yield Example(
        name="Ranking",
        kind="function",
        make=lambda: lambda wide, narrow: Ranking({"wide": wide, "narrow": narrow}, _benchmark()).accuracy(0.5),
        inputs=lambda generator: tuple(torch.randint(0, 4, (2, 20), generator=generator).numpy()),
        code="""
import numpy as np
from saigen.papers.data_quality.label_errors import Benchmark, Ranking

original = np.array([0, 0, 0, 0, 1, 1, 1, 1])
corrected = np.array([0, 0, 0, 1, 1, 1, 1, 1])                           # the fourth label was wrong
models = {"large": original, "small": np.array([1, 0, 0, 1, 1, 1, 1, 1])}
ranking = Ranking(models, Benchmark(original, corrected, np.ones(8, bool)))
print(ranking.accuracy(corrected=0.0), ranking.accuracy(corrected=1.0))
for flip in ranking.flips():
    print(f"{flip.overtaking} overtakes {flip.overtaken} at a prevalence of {flip.prevalence:.3f}")
""",
        wrong=(
            (lambda: Ranking({}, _benchmark()), "predictions"),
            (lambda: Ranking({"a": [1, 2]}, _benchmark()), "'a'"),
            (lambda: Ranking({"a": LABELS}, Benchmark(LABELS, LABELS, np.ones(4, bool))), "benchmark"),
            (lambda: Benchmark(LABELS, LABELS[:2], np.ones(4, bool)), "original"),
            (lambda: Ranking({"a": np.zeros(20)}, _benchmark()).accuracy(1.5), "prevalence"),
            (lambda: Ranking({"a": np.zeros(20)}, _benchmark()).overtaken_at("a", "b"), "'b'"),
            (lambda: thin(_benchmark(), 0.01), "prevalence"),
            (lambda: noise_prevalence(3, 10, 1.5), "dropped"),
        ),
        batch=None,
    )
    yield Example(
        name="extrapolated_error_rate",
        kind="function",
        make=lambda: extrapolated_error_rate,
        inputs=lambda generator: (732, 1000, 533_249, 9_996_437),
        code="""
from saigen.papers.data_quality.label_errors import error_rate_interval, extrapolated_error_rate

print(extrapolated_error_rate(732, 1000, 533_249, 9_996_437), error_rate_interval(732, 1000, 533_249, 9_996_437))
""",
        wrong=(
            (lambda: extrapolated_error_rate(5, 4, 10, 100), "errors"),
            (lambda: error_rate_interval(2, 4, 10, 100, confidence=1.0), "confidence"),
        ),
        batch=None,
    )


def _candidates(K: int, peer: bool) -> Callable[[], Any]:
    def build() -> Callable[[], Any]:
        rng, n = np.random.default_rng(0), 50_000
        true, logits = rng.integers(0, K, n), rng.normal(size=(n, K))
        logits[np.arange(n), true] += 4
        P = np.exp(logits)
        P /= P.sum(axis=1, keepdims=True)
        labels = np.where(rng.random(n) < 0.05, rng.integers(0, K, n), true)
        return partial(_cleanlabs_candidates if peer else candidate_errors, labels, P)

    return build


def _cleanlabs_candidates(labels: np.ndarray, P: np.ndarray) -> np.ndarray:
    from cleanlab.count import num_label_issues
    from cleanlab.rank import get_normalized_margin_for_each_label

    count = num_label_issues(labels, P, estimation_method="off_diagonal_calibrated")
    return np.argsort(get_normalized_margin_for_each_label(labels, P))[:count]


def benchmarks():
    """cleanlab's count and margins."""
    for K in (10, 100):
        yield SideBySide(
            name=f"candidate_errors, 50,000 x {K}", ours=_candidates(K, peer=False), peer=_candidates(K, peer=True)
        )
