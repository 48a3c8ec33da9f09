"""Which papers combine: each model of the list trained with each method of the list, beside the same model trained plainly.

A pair is measured as a claim is: a seed draws data, weights and order, both arms share them and choose their learning rate
on held-out images, and what the method gains is the difference of the two test accuracies. The parts come from the
``parts()`` of the rooms' ``examples.py``, those of plug-ins included.
"""

import inspect
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from saigen.cards import catalogue
from saigen.cards.catalogue import Paper, nearest
from saigen.claims.evidence import code_digest, digest, home
from saigen.claims.verdict import Interval, interval
from saigen.data import split
from saigen.example import Part, Recipe
from saigen.files import write_text
from saigen.runner import data_key
from saigen.train import accuracy, cosine, fit
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    train: int
    held_out: int
    test: int
    side: int
    steps: int
    batch: int
    rates: tuple[float, ...]


SIZES = {
    "tiny": Size(100, 50, 100, 16, 8, 25, (3e-3,)),
    "laptop": Size(300, 200, 1000, 16, 240, 50, (1e-3, 4e-3)),
    "real": Size(4000, 1000, 4000, 32, 1600, 50, (1e-3, 4e-3)),
}
SCALES = tuple(SIZES)


@dataclass(frozen=True)
class Entry:
    """A part and the paper it comes from."""

    paper: Paper
    part: Part

    @property
    def name(self) -> str:
        return self.part.name


@dataclass(frozen=True)
class Cell:
    """One seed of one pair. ``method`` is None where the model was trained plainly; ``missing`` says why there is no pair."""

    model: str
    method: str | None
    seed: int
    accuracy: float | None = None
    rate: float | None = None
    missing: str | None = None


def entries(kind: str, papers: Sequence[Paper] | None = None) -> list[Entry]:
    """The models, or the methods, that ``papers`` (by default all) bring."""
    found = []
    for paper in catalogue.list_papers() if papers is None else papers:
        parts = getattr(paper.module("examples"), "parts", None)
        if parts is not None:
            found += [Entry(paper, part) for part in parts() if part.kind == kind]
    return found


def choose(kind: str, names: Sequence[str]) -> list[Entry]:
    """The parts of a kind called ``names``, or those of the papers called so; all of them for no names.

    Raises ``ValueError`` for a name that neither a part nor a paper with parts has.
    """
    known = entries(kind)
    if not names:
        return known
    chosen: dict[str, Entry] = {}
    for name in names:
        found = [entry for entry in known if name in (entry.name, entry.paper.slug)]
        if not found:
            every = [entry.name for entry in known]
            raise ValueError(f"{kind}s is {name!r}{nearest(name, every)}: allowed are {', '.join(every)}")
        chosen |= {entry.name: entry for entry in found}
    return list(chosen.values())


def recipe(
    trial: Trial, model: Entry, method: Entry | None, size: Size, counts: tuple[int, ...], channels: int
) -> Recipe:
    """How ``model`` is trained, with what ``method`` changes; both arms of a seed begin with the same weights.

    Raises ``ValueError`` where the method cannot be had with this model.
    """
    with trial.seeded(f"weights {model.name}"):
        net = model.part.make(len(counts), channels, size.side)
    plain = Recipe(net, counts, channels, size.side, size.steps)
    with trial.seeded(f"weights {model.name} method"):
        return plain if method is None else method.part.make(plain)


def measure(model: Entry, method: Entry | None, seed: int, scale: str = "laptop", data: Path | None = None) -> Cell:
    """Trains one arm of one seed at each of the scale's learning rates, and tests the one that held-out images choose."""
    size = SIZES[scale]
    trial = Trial(seed, scale, data_path=data)
    torch.set_num_threads(1)
    (x, y), held_out, test, counts = _data(trial, size)
    tried = []
    for rate in size.rates:
        try:
            how = recipe(trial, model, method, size, counts, x.shape[1])
        except ValueError as error:
            return Cell(model.name, method and method.name, seed, missing=str(error))
        fit(
            how.model, how.loss, (x, y), optimizer=how.optimizer(how.model, rate), steps=size.steps,
            batch_size=size.batch, seed=seed, schedule=cosine(warmup=size.steps // 20), transform=how.transform,
        )  # fmt: skip
        # of equal scores the larger rate wins
        tried.append((accuracy(how.model, *held_out), rate, accuracy(how.model, *test)))
    _, rate, right = max(tried)
    return Cell(model.name, method and method.name, seed, right, rate)


def _data(trial: Trial, size: Size) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    if trial.data_path is None:
        images = trial.data("digits")
        parts = split(images.y, (size.train, size.held_out, size.test), trial.rng("split"))
        x = F.interpolate(images.x, (size.side, size.side), mode="bilinear", align_corners=False)
        train, held_out, test = ((x[part], images.y[part]) for part in parts)
    else:
        images = trial.data("images", size=size.side)
        others = trial.data("images", size=size.side, part="test").float()
        chosen, aside = split(images.y, (size.train, size.held_out), trial.rng("split"))
        (left_out,) = split(others.y, (min(size.test, len(others)),), trial.rng("split test"))
        parts = [images.subset(chosen).float(), images.subset(aside).float(), others.subset(left_out)]
        train, held_out, test = ((part.x, part.y) for part in parts)
    counts = tuple(torch.bincount(train[1], minlength=len(images.classes)).tolist())
    return train, held_out, test, counts


# --- many of them ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One cell that is to be measured, and where it is kept."""

    model: str
    method: str | None
    seed: int
    scale: str
    data: Path | None
    path: Path


def tasks(models: Sequence[Entry], methods: Sequence[Entry], seeds: int, scale: str, data: Path | None) -> list[Task]:
    """Every pair and every model alone, seed by seed. What was measured with the same code before has its file already."""
    code = {entry.paper.slug: _code(entry.paper) for entry in (*models, *methods)}
    state = data_key(data)
    made = []
    for seed in range(seeds):
        for model in models:
            for method in (None, *methods):
                parts = [model.name, code[model.paper.slug], seed, scale, state]
                parts += [method.name, code[method.paper.slug]] if method else [None]
                name = (
                    f"{model.name}-{method.name if method else 'plain'}-{scale}-{seed:04d}-{digest(repr(parts))[:16]}"
                )
                made.append(
                    Task(model.name, method and method.name, seed, scale, data, home() / "cross" / f"{name}.json")
                )
    return made


def _code(paper: Paper) -> str:
    own = [Path(inspect.getfile(Part)), Path(__file__), paper.folder / "examples.py"]
    return code_digest(paper) + "".join(digest(file.read_bytes()) for file in own)


def read(task: Task) -> Cell | None:
    """What was measured for ``task`` before; None where nothing was, or what lies there cannot be read."""
    try:
        return Cell(**json.loads(task.path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def work(task: Task) -> tuple[Task, Cell]:
    """Measures one cell and keeps it, in a process of its own."""
    model = choose("model", [task.model])[0]
    method = choose("method", [task.method])[0] if task.method else None
    cell = measure(model, method, task.seed, task.scale, task.data)
    write_text(task.path, json.dumps(asdict(cell)))
    return task, cell


def run(waiting: Sequence[Task], jobs: int) -> Iterator[tuple[Task, Cell]]:
    """Measures ``waiting``, as they get done; what is done is kept, whatever comes then."""
    import joblib

    if jobs == 1 or len(waiting) < 2:
        yield from map(work, waiting)
        return
    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        yield from joblib.Parallel(n_jobs=min(jobs, len(waiting)), return_as="generator_unordered", batch_size=1)(
            joblib.delayed(work)(task) for task in waiting
        )


# --- what came out --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """What a method gains with a model: the difference in test accuracy over seeds; None where there is no such pair."""

    model: str
    method: str
    gain: Interval | None
    plain: float
    missing: str | None = None

    @property
    def tells(self) -> bool:
        """The interval over seeds is all above 0, or all below."""
        return self.gain is not None and self.gain.n > 1 and (self.gain.low > 0 or self.gain.high < 0)

    def __str__(self) -> str:
        if self.gain is None:
            return "-"
        reach = f" ± {100 * (self.gain.high - self.gain.mean):.1f}" if self.gain.n > 1 else ""
        return f"{100 * self.gain.mean:+.1f}{reach}"


def pairs(cells: Iterable[Cell]) -> list[Pair]:
    """The gains, model by model and method by method, in the order they come in."""
    by_key = {(cell.model, cell.method, cell.seed): cell for cell in cells}
    models = list(dict.fromkeys(model for model, _, _ in by_key))
    methods = list(dict.fromkeys(method for _, method, _ in by_key if method))
    seeds = sorted({seed for _, _, seed in by_key})
    found = []
    for model in models:
        plain = {seed: by_key[model, None, seed].accuracy for seed in seeds}
        mean = sum(plain.values()) / len(plain)
        for method in methods:
            arms = [by_key[model, method, seed] for seed in seeds]
            missing = next((cell.missing for cell in arms if cell.missing), None)
            gain = None if missing else interval([cell.accuracy - plain[cell.seed] for cell in arms])
            found.append(Pair(model, method, gain, mean, missing))
    return found


def rows(found: Sequence[Pair]) -> tuple[list[str], list[list[Pair]]]:
    """The methods, and a row of pairs a model."""
    methods = list(dict.fromkeys(pair.method for pair in found))
    by_model: dict[str, list[Pair]] = {}
    for pair in found:
        by_model.setdefault(pair.model, []).append(pair)
    return methods, list(by_model.values())


def markdown(found: Sequence[Pair], seeds: int, scale: str, how: str, figure: str) -> str:
    """The table as Markdown, gains that tell from 0 in bold; ``how`` says by what command and where, ``figure`` is the heat map."""
    methods, lines = rows(found)
    told, measured = sum(pair.tells for pair in found), sum(pair.gain is not None for pair in found)
    text = [
        "# Which papers combine",
        "",
        f"Points of test accuracy that a method gains over plain training (AdamW, cross-entropy) of the same model, with the 95 % interval "
        f"over {seeds} seeds, scale {scale}. Both arms begin with the same weights and choose their learning rate on held-out images. "
        "A dash stands where a method cannot be had with a model.",
        "",
        f"Bold is what tells from 0: {told} of {measured} pairs. Of pairs that gain nothing about 1 in 20 would be bold as well.",
        "",
        how,
        "",
        "| model | plain | " + " | ".join(methods) + " |",
        "| --- | ---: |" + " ---: |" * len(methods),
    ]
    for row in lines:
        gains = [f"**{pair}**" if pair.tells else str(pair) for pair in row]
        text.append(f"| {row[0].model} | {100 * row[0].plain:.1f} | " + " | ".join(gains) + " |")
    text += ["", f"![The same as a heat map]({figure})"]
    return "\n".join(text) + "\n"


def document(found: Sequence[Pair], cells: Iterable[Cell]) -> str:
    """Pairs and the arms behind them as one JSON document, in the order of their names."""
    listed = [asdict(pair) for pair in sorted(found, key=lambda pair: (pair.model, pair.method))]
    for pair in listed:
        if pair["gain"] is not None and pair["gain"]["n"] == 1:  # one seed says nothing of its spread
            pair["gain"] |= {"low": None, "high": None}
    arms = [asdict(cell) for cell in sorted(cells, key=lambda cell: (cell.model, cell.method or "", cell.seed))]
    return json.dumps({"pairs": listed, "arms": arms}, indent=1)
