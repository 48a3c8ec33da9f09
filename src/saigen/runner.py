"""Runs trials: seeds in parallel, resumable, one file a measurement; then judges what they gave."""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from saigen.cards import catalogue
from saigen.cards.catalogue import Paper, nearest
from saigen.cards.schema import Claim, Scale
from saigen.claims import evidence
from saigen.claims.evidence import Measurement, Store
from saigen.claims.verdict import MOST_SEEDS
from saigen.claims.verdict import SEEDS as FIRST_LOOK
from saigen.files import write_text

SCALES = get_args(Scale)
ONE_THREAD_SCALES = ("tiny", "laptop")
BACKENDS = ("loky", "ray", "dask")
DEVICES = ("cpu", "cuda", "mps", "xpu")


@dataclass(frozen=True)
class Task:
    """A trial to be run, and where its measurement will lie."""

    paper: str
    claim: str
    scale: str
    seed: int
    device: str
    data: str | None
    threads: int
    clock: bool
    key: str
    path: Path
    code: str
    card: str

    @property
    def scratch(self) -> Path:
        """The folder for checkpoints of long arms, beside where the measurement will lie."""
        return self.path.parent / f"{self.path.stem}.scratch"


@dataclass(frozen=True)
class Outcome:
    """What became of a task: a measurement, or the log of its failure; ``reused`` where it lay there already.

    ``unfit`` is the sentence of a claim that asked for the user's data and could not take it: nothing was measured, and
    nothing is wrong with the claim. ``ignored_data`` where there were data of the user's and the claim did not look at them.
    """

    task: Task
    measurement: Measurement | None
    log: str | None = None
    reused: bool = False
    unfit: str | None = None
    ignored_data: bool = False

    @property
    def failed(self) -> bool:
        """True where the claim raised, or gave a value that is not finite."""
        if self.measurement is None:
            return self.unfit is None
        return any(value is None for value in self.measurement.values.values())


@dataclass(frozen=True)
class Options:
    """How to run."""

    scale: str = "laptop"
    seeds: int = FIRST_LOOK
    jobs: int | None = None
    device: str = "cpu"
    data: Path | None = None
    backend: str = "loky"


def check_options(options: Options) -> None:
    """Raises ``ValueError`` with one sentence for an impossible scale, count, device, path or backend."""
    if options.scale not in SCALES:
        raise ValueError(
            f"there is no scale {options.scale!r}{nearest(options.scale, SCALES)}: the scales are {', '.join(SCALES)}"
        )
    if not 1 <= options.seeds <= MOST_SEEDS:
        raise ValueError(f"--seeds is {options.seeds}, allowed is 1 to {MOST_SEEDS} (seeds 0 to N-1)")
    if options.jobs is not None and options.jobs < 1:
        raise ValueError(f"--jobs is {options.jobs}, allowed is a whole number of at least 1")
    if options.backend not in BACKENDS:
        raise ValueError(
            f"there is no backend {options.backend!r}{nearest(options.backend, BACKENDS)}: they are {', '.join(BACKENDS)}"
        )
    if options.data is not None:
        check_data(options.data, options.scale)
    if options.device != "cpu":
        import torch

        kind = options.device.partition(":")[0]
        try:
            # What is no number cannot be copied back: meta is no place to compute.
            torch.zeros(1, device=torch.device(options.device)).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            usable = devices()
            close = "" if kind in usable else nearest(kind, DEVICES)
            raise ValueError(
                f"--device is {options.device!r}, which this machine cannot use{close}: it has {', '.join(usable)}"
            ) from error


def check_data(path: Path, scale: str) -> None:
    """Raises ``ValueError`` where nothing lies there, ``scale`` takes no data, or labels are no labels."""
    if not path.exists():
        raise ValueError(f"--data is {path}, and there is nothing there")
    if scale in ONE_THREAD_SCALES:
        raise ValueError(
            f"--data is {path}, but at scale {scale!r} claims are measured on embedded data: "
            "--data goes with --scale real or full"
        )
    from saigen.data.checks import check_labels

    check_labels(path)


def devices() -> list[str]:
    """The devices of this machine: ``cpu``, and ``cuda:0`` and so on."""
    import torch

    found = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    found += ["xpu"] if torch.xpu.is_available() else []
    found += ["mps"] if torch.backends.mps.is_available() else []
    return found


def plan(
    papers: Sequence[Paper],
    options: Options,
    claims: Sequence[str] = (),
    store: Store | None = None,
    *,
    seeds: Sequence[int] | None = None,
) -> list[Task]:
    """The trials asked for, those with clock quantities last.

    Raises ``ValueError`` for a claim that none of ``papers`` has, or a scale that a named claim cannot be run at.
    """
    store = store or Store()
    known = [claim.id for paper in papers for claim in paper.card.claim]
    for name in claims:
        if name not in known:
            where = papers[0].slug if len(papers) == 1 else "these papers"
            raise ValueError(f"{where} has no claim {name!r}{nearest(name, known)}: the claims are {', '.join(known)}")
    tasks = []
    data = None if options.data is None else str(options.data.resolve())
    data_state = data_key(options.data)
    threads = 1 if options.scale in ONE_THREAD_SCALES else max(1, (os.cpu_count() or 1) // (options.jobs or 1))
    machine = evidence.machine_kind(evidence.environment(options.device, threads))
    for paper in papers:
        code = evidence.code_digest(paper)
        for claim in paper.card.claim:
            if claims and claim.id not in claims:
                continue
            if options.scale not in claim.scales:
                if claims or (len(papers) == 1 and not any(options.scale in c.scales for c in paper.card.claim)):
                    raise ValueError(
                        f"{paper.slug} {claim.id} has no experiment at scale {options.scale!r}: it has {', '.join(claim.scales)}"
                    )
                continue
            card = evidence.claim_digest(claim)
            wanted = seeds if seeds is not None else range(options.seeds)
            if seeds is None and evidence.enough_seeds(claim, 1):
                wanted = range(1)
            key = evidence.digest(repr((code, card, options.device, data_state, machine, threads)))
            for seed in wanted:
                path = store.path(paper.slug, claim.id, options.scale, seed, key)
                tasks.append(
                    Task(
                        paper.slug,
                        claim.id,
                        options.scale,
                        seed,
                        options.device,
                        data,
                        threads,
                        claim.clock,
                        key,
                        path,
                        code,
                        card,
                    )
                )
    return sorted(tasks, key=lambda task: task.clock)


def data_key(path: Path | None) -> str:
    """Tells the user's data apart by names, sizes and times, without reading it."""
    if path is None:
        return ""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    total = hashlib.sha256()
    for file in files:
        status = file.stat()
        total.update(f"{file.relative_to(path)}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    return total.hexdigest()


def forecast(tasks: Sequence[Task], jobs: int, papers: Sequence[Paper]) -> float | None:
    """Seconds the tasks will take, from published and local measurements; None where nothing like them was measured."""
    known: dict[tuple[str, str, str], list[float]] = {}
    for paper in papers:
        for measurement in [*evidence.read_evidence(paper.evidence_path), *Store().measurements(paper.slug)]:
            known.setdefault((paper.slug, measurement.claim, measurement.scale), []).append(measurement.seconds)
    parallel = alone = 0.0
    for task in tasks:
        seconds = known.get((task.paper, task.claim, task.scale))
        if seconds is None:
            if task.scale != "tiny":
                return None
            seconds = [5.0]
        mean = sum(seconds) / len(seconds)
        if task.clock:
            alone += mean
        else:
            parallel += mean
    start = 6.0 if tasks else 0.0
    return start + parallel / max(1, min(jobs, len(tasks) or 1)) + alone


def execute(task: Task) -> Outcome:
    """Runs one trial in this process: its measurement, or the log of its failure. Keeps neither."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(task.threads)
    started = time.perf_counter()
    trial = None
    try:
        paper = catalogue.paper(task.paper)
        module = paper.module("claims")
        trial = _asking_trial(
            seed=task.seed,
            scale=task.scale,
            device=torch.device(task.device),
            data_path=None if task.data is None else Path(task.data),
            scratch=None if task.scale in ONE_THREAD_SCALES else task.scratch,
        )
        returned = getattr(module, task.claim)(trial)
        values = {name: float(value) if math.isfinite(value) else None for name, value in sorted(returned.items())}
        claim = paper.card.find_claim(task.claim)
        for name, quantity in claim.quantities.items():
            missing = [key for key in (quantity.of or (name,)) if key not in values]
            if missing:
                raise KeyError(f"the claim function returned no {', '.join(missing)}")
        setting = dataclasses.asdict(module.SIZES[task.scale])
    except Exception as error:
        unfit = isinstance(error, ValueError) and trial is not None and (trial.asking or _of_the_data(error, task))
        return Outcome(task, None, traceback.format_exc(), unfit=" ".join(str(error).split()) if unfit else None)
    finally:
        torch.set_num_threads(threads)
    measurement = Measurement(
        paper=task.paper,
        claim=task.claim,
        scale=task.scale,
        seed=task.seed,
        values=values,
        seconds=round(time.perf_counter() - started, 3),
        code=task.code,
        card=task.card,
        setting=_plain(setting),
        data=dict(trial.used_data),
        environment=evidence.environment(task.device, task.threads),
        created=datetime.datetime.now(datetime.UTC).replace(microsecond=0),
    )
    # As it will be read back, so that a fresh and a kept measurement print alike.
    ignored = task.data is not None and not trial.asked
    return Outcome(task, Measurement.model_validate_json(measurement.line()), ignored_data=ignored)


def _of_the_data(error: ValueError, task: Task) -> bool:
    """Whether a function of ``saigen.data`` refused what was asked of the user's data: more images than there are, say."""
    if task.data is None:
        return False
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].startswith("saigen.data")


def _asking_trial(**given: Any) -> Any:
    """A trial that knows whether its claim has asked for the user's data and has not noted them as used.

    A ``ValueError`` in between says that the data are not what the claim takes; any later one is the claim's own.
    """
    from saigen.trial import Trial

    class AskingTrial(Trial):
        asking = asked = False

        def __getattribute__(self, name: str) -> Any:
            if name == "data_path":
                self.asking = self.asked = True
            return super().__getattribute__(name)

        def used(self, name: str, fingerprint: str) -> None:
            super().used(name, fingerprint)
            self.asking = False

    return AskingTrial(**given)


def _plain(value: Any) -> Any:
    """What JSON gives back: tuples as lists, keys as text."""
    return json.loads(json.dumps(value, default=str))


def keep(outcome: Outcome, store: Store) -> Outcome:
    """Stores what a task gave, wherever it ran: its measurement, in place of an older failure's log, or that log."""
    task = outcome.task
    if outcome.failed and outcome.measurement is None:
        store.write_failure(task.path, outcome.log or "")
        return outcome
    if outcome.measurement is not None:
        store.write(task.path, outcome.measurement)
        shutil.rmtree(task.scratch, ignore_errors=True)
    store.clear_failure(task.path)
    return outcome


def work(task: Task) -> Outcome:
    """Runs a task and keeps its outcome; one that another process is running is waited for, not run twice."""
    import filelock

    store = Store()
    task.path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{task.path}.lock"):
        found = store.read(task.path)
        outcome = keep(execute(task), store) if found is None else Outcome(task, found, reused=True)
    with contextlib.suppress(OSError):
        os.unlink(f"{task.path}.lock")
    return outcome


def run_tasks(
    tasks: Sequence[Task], options: Options, on_outcome: Callable[[Outcome], None] = lambda outcome: None
) -> list[Outcome]:
    """Runs what is not there yet, in parallel where it may be, and returns every outcome in the order of ``tasks``."""
    store = Store()
    store.check_writable()
    outcomes: dict[Task, Outcome] = {}

    def done(outcome: Outcome) -> None:
        outcomes[outcome.task] = outcome
        on_outcome(outcome)

    waiting = []
    for task in tasks:
        found = store.read(task.path)
        if found is None:
            waiting.append(task)
        else:
            done(Outcome(task, found, reused=True))
    together = [task for task in waiting if not task.clock]
    alone = [task for task in waiting if task.clock]
    if _world_size() > 1:
        for task in waiting:
            done(_work_distributed(task))
    else:
        for outcome in _in_parallel(together, options):
            done(outcome)
        for task in alone:
            done(work(task))
    # Data that some seeds could be measured on fit the claim: what stopped the others is a failure.
    fitting = {(o.task.paper, o.task.claim) for o in outcomes.values() if o.unfit is None}
    for task, outcome in outcomes.items():
        if outcome.unfit is not None and (task.paper, task.claim) in fitting:
            outcomes[task] = dataclasses.replace(outcome, unfit=None)
            if rank() == 0:
                keep(outcomes[task], store)
    return [outcomes[task] for task in tasks]


def _in_parallel(tasks: Sequence[Task], options: Options) -> Iterator[Outcome]:
    import joblib

    jobs = options.jobs or default_jobs(options.scale)
    if not tasks:
        return
    if options.backend != "loky":
        yield from _on_cluster(tasks, options)
        return
    if jobs == 1 or len(tasks) == 1:
        yield from map(work, tasks)
        return
    with joblib.parallel_config(backend="loky", inner_max_num_threads=tasks[0].threads):
        yield from joblib.Parallel(n_jobs=min(jobs, len(tasks)), return_as="generator_unordered", batch_size=1)(
            joblib.delayed(work)(task) for task in tasks
        )


def _on_cluster(tasks: Sequence[Task], options: Options) -> Iterator[Outcome]:
    """joblib's Ray or Dask backend: workers return measurements, which are stored here batch by batch."""
    import joblib

    store = Store()
    width = options.jobs or max(8, 4 * (os.cpu_count() or 1))
    with _ray() if options.backend == "ray" else _dask():
        for start in range(0, len(tasks), width):
            batch = tasks[start : start + width]
            with joblib.parallel_config(backend=options.backend):
                # On another machine the store is not ours to write: the outcomes travel back.
                results = joblib.Parallel(n_jobs=options.jobs or -1)(joblib.delayed(execute)(task) for task in batch)
            yield from (keep(outcome, store) for outcome in results)


@contextlib.contextmanager
def _ray() -> Iterator[None]:
    """The caller's Ray, or one for as long as it is needed: a thread of it tells of lost workers on stdout."""
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise ValueError("--backend ray needs ray: pip install 'saigen[ray]'") from error
    ours = not ray.is_initialized()
    if ours:
        # What the workers say stays in Ray's logs: here it would break into the progress bars.
        ray.init(log_to_driver=False)
    register_ray()
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


@contextlib.contextmanager
def _dask() -> Iterator[None]:
    try:
        import distributed

        distributed.get_client()
    except ImportError as error:
        raise ValueError("--backend dask needs dask: pip install distributed") from error
    except ValueError as error:
        raise ValueError("--backend dask needs a running client in this process: use saigen.run() under one") from error
    yield


def _work_distributed(task: Task) -> Outcome:
    """Under ``torchrun``: every process runs the same trial, rank 0 writes."""
    import torch.distributed

    outcome = execute(task)
    if rank() == 0:
        keep(outcome, Store())
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return outcome


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process under ``torchrun``, else 0."""
    return int(os.environ.get("RANK", "0"))


def default_jobs(scale: str) -> int:
    """As many processes as cores at the scales that use one thread a trial; one at the others, with all threads."""
    return (os.cpu_count() or 1) if scale in ONE_THREAD_SCALES else 1


# --- judging --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClaimResult:
    """A claim at a scale: its verdict, each quantity judged, and the measurements behind them.

    ``unfit`` says why it does not apply to the data that were given; its verdict is then ``not run``.
    """

    paper: str
    claim: str
    scale: str
    verdict: str
    quantities: tuple[Any, ...]
    measurements: tuple[Measurement, ...]
    fresh: bool = True
    unfit: str | None = None

    @property
    def seeds(self) -> int:
        return len(self.measurements)


def judge(
    paper: Paper, claim: Claim, scale: str, measurements: Sequence[Measurement], *, fresh: bool = True
) -> ClaimResult:
    """Judges the one set among ``measurements`` that a verdict may use; ``not run`` where there is none."""
    from saigen.claims.verdict import Verdict, judge_claim

    chosen = evidence.chosen_set(measurements, claim, scale)
    if not chosen:
        return ClaimResult(paper.slug, claim.id, scale, Verdict.NOT_RUN, (), (), fresh)
    verdict, quantities = judge_claim(claim, [m.numbers for m in chosen], scale)
    return ClaimResult(paper.slug, claim.id, scale, verdict, tuple(quantities), tuple(chosen), fresh)


def published(paper: Paper, scales: Sequence[str] = ("laptop", "real", "full")) -> list[ClaimResult]:
    """The published evidence of a paper, judged: fresh where there is fresh evidence, else stale and marked so."""
    code = evidence.code_digest(paper)
    measurements = evidence.read_evidence(paper.evidence_path)
    results = []
    for claim in paper.card.claim:
        for scale in scales:
            if scale not in claim.scales:
                continue
            own = [m for m in measurements if m.claim == claim.id and m.scale == scale]
            fresh = [m for m in own if evidence.is_fresh(m, paper, code)]
            usable = fresh or [m for m in own if _answers(m, claim)]
            results.append(_judge_cached(paper, claim, scale, usable, fresh=bool(fresh) or not usable))
    return results


def _answers(measurement: Measurement, claim: Claim) -> bool:
    """True where an old measurement still has every value that today's card asks for."""
    return all(key in measurement.values for name, q in claim.quantities.items() for key in (q.of or (name,)))


def _judge_cached(
    paper: Paper, claim: Claim, scale: str, measurements: Sequence[Measurement], *, fresh: bool
) -> ClaimResult:
    """``judge``, remembered: judging imports SciPy, and showing what is known must not wait for that."""
    from saigen.claims import verdict as judging

    if not measurements:
        return ClaimResult(paper.slug, claim.id, scale, judging.Verdict.NOT_RUN, (), (), fresh)
    chosen = evidence.chosen_set(measurements, claim, scale)
    rules = Path(judging.__file__).read_bytes()
    key = evidence.digest(
        repr([[m.line() for m in chosen], evidence.claim_digest(claim), scale, evidence.digest(rules)])
    )
    path = evidence.home() / "judged" / f"{key}.json"
    try:
        kept = json.loads(path.read_text())
        quantities = tuple(
            judging.Judged(
                q["name"],
                judging.Verdict(q["verdict"]),
                tuple(float(v) for v in q["values"]),
                None
                if q["interval"] is None
                else judging.Interval(*(float(v) for v in q["interval"][:3]), q["interval"][3]),
                q["bar"],
            )
            for q in kept["quantities"]
        )
        return ClaimResult(
            paper.slug, claim.id, scale, judging.Verdict(kept["verdict"]), quantities, tuple(chosen), fresh
        )
    except (OSError, ValueError, KeyError, TypeError):
        pass
    result = judge(paper, claim, scale, measurements, fresh=fresh)
    as_kept = {
        "verdict": result.verdict,
        "quantities": [
            {
                "name": q.name,
                "verdict": q.verdict,
                "values": [repr(v) for v in q.values],
                "interval": None
                if q.interval is None
                else [repr(q.interval.mean), repr(q.interval.low), repr(q.interval.high), q.interval.n],
                "bar": q.bar,
            }
            for q in result.quantities
        ],
    }
    with contextlib.suppress(ValueError, OSError):
        write_text(path, json.dumps(as_kept))
    return result


@dataclass(frozen=True)
class Standing:
    """How far up the ladder of evidence a paper stands, and what its claims gave."""

    rungs: frozenset[int]
    results: tuple[ClaimResult, ...]

    @property
    def rung(self) -> int:
        """The highest rung that is reached with all below it; 0 where even the first is not."""
        return max((n for n in range(1, 6) if all(m in self.rungs for m in range(1, n + 1))), default=0)

    def result(self, claim: str, scale: str) -> ClaimResult | None:
        """The result of a claim at a scale."""
        return next((r for r in self.results if r.claim == claim and r.scale == scale), None)

    @property
    def headline(self) -> str:
        """The verdict of the paper: its weakest claim at the highest scale at which every claim of that scale was run."""
        from saigen.claims.verdict import Verdict, weakest

        for scale in ("full", "real", "laptop"):
            of_scale = [r for r in self.results if r.scale == scale]
            measured = [r for r in of_scale if r.measurements]
            if measured and len(measured) == len(of_scale):
                return weakest([Verdict(r.verdict) for r in measured])
        return Verdict.NOT_RUN


def standing(paper: Paper) -> Standing:
    """The rungs a paper has reached (3 to 5 by complete, fresh sets of seeds, whatever the verdict) and its results."""
    results = published(paper)
    rungs = {1} if paper.card.number else set()
    rungs |= {2} if paper.card.parity else set()
    for rung, scale in ((3, "laptop"), (4, "real"), (5, "full")):
        complete = [
            r.fresh and evidence.enough_seeds(paper.card.find_claim(r.claim), r.seeds)
            for r in results
            if r.scale == scale
        ]
        # Every claim has a laptop experiment; at the larger scales the page says which claims are still to be measured.
        if complete and (all(complete) if scale == "laptop" else any(complete)):
            rungs.add(rung)
    return Standing(frozenset(rungs), tuple(results))


def run(
    papers: Sequence[str] | str,
    *,
    claims: Sequence[str] = (),
    scale: str = "laptop",
    seeds: int = FIRST_LOOK,
    jobs: int | None = None,
    device: str = "cpu",
    data: str | Path | None = None,
    backend: str = "loky",
) -> list[ClaimResult]:
    """Measures the claims of ``papers`` and judges them; what was measured before and is still fresh is not run again.

    A claim that does not apply to ``data`` has the reason as its result's ``unfit``. Raises ``ValueError`` for wrong
    arguments, and where no claim applies.

    >>> results = run("confident_learning", scale="tiny", seeds=1)  # doctest: +SKIP
    """
    slugs = [papers] if isinstance(papers, str) else list(papers)
    chosen = [catalogue.paper(slug) for slug in slugs]
    options = Options(scale, seeds, jobs, device, None if data is None else Path(data), backend)
    check_options(options)
    tasks = plan(chosen, options, claims)
    results = results_of(chosen, run_tasks(tasks, options))
    check_some_fit(results, options)
    return results


def results_of(papers: Sequence[Paper], outcomes: Sequence[Outcome]) -> list[ClaimResult]:
    """The outcomes of a run, judged claim by claim, in the order of the papers' cards."""
    results = []
    for paper in papers:
        for claim in paper.card.claim:
            own = [o for o in outcomes if o.task.paper == paper.slug and o.task.claim == claim.id]
            if own:
                measured = [o.measurement for o in own if o.measurement is not None]
                result = judge(paper, claim, own[0].task.scale, measured)
                unfit = next((o.unfit for o in own if o.unfit is not None), None)
                results.append(dataclasses.replace(result, unfit=unfit))
    return results


def check_some_fit(results: Sequence[ClaimResult], options: Options) -> None:
    """Raises ``ValueError`` with one sentence where none of the claims applies to the data that were given."""
    if not results or any(result.unfit is None for result in results):
        return
    reasons: dict[str, list[str]] = {}
    for result in results:
        reasons.setdefault(str(result.unfit), []).append(f"{result.paper} {result.claim}")
    why = (
        next(iter(reasons))
        if len(reasons) == 1
        else "; ".join(f"{', '.join(claims)}: {reason}" for reason, claims in reasons.items())
    )
    raise ValueError(
        why if options.data is None else f"--data {options.data} suits none of the claims asked for: {why}"
    )
