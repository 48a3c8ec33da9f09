"""``saigen apply label_errors DATA --out FOLDER``: candidates to look at, a person's corrections, what they do to a ranking."""

import base64
import io
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.csv
import typer
from PIL import Image

from saigen.data.images import decode
from saigen.data.predictions import Predictions, matching_columns, read_classes, read_predictions, read_table
from saigen.files import replacing, write_text
from saigen.papers.data_quality.label_errors import (
    ANSWERS,
    KINDS,
    Benchmark,
    Ranking,
    candidate_errors,
    consensus,
    correct,
    error_rate_interval,
    extrapolated_error_rate,
    read_votes,
)

FIGURE_POINTS = 21
THUMBNAIL = 160
Answers = dict[int, list[Any]]


def apply(
    inputs: Annotated[
        list[Path],
        typer.Argument(help="One table (CSV, TSV, Parquet), folder of images (CLASS/IMAGE.jpg), or .npy of labels."),
    ],
    out: Annotated[Path, typer.Option(help="The folder for index.html, candidates.csv and what else comes out.")],
    *,
    pred_probs: Annotated[
        str | None,
        typer.Option(
            help="Out-of-sample predicted probabilities: columns of the table ('p_*'), an .npy file (examples x classes), or, "
            "for a folder of images, a table with a column path and one a class."
        ),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="The label column, if it is not named label, target, class or y.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Labels as .npy, where INPUT is an .npy of probabilities.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="How many candidates; by default as many as confident learning counts.")
    ] = None,
    corrections: Annotated[
        list[Path] | None,
        typer.Option(
            help="Answers of a person, as the page saves them (row, answer); once for each person. Or the study's JSON."
        ),
    ] = None,
    agree: Annotated[
        int | None,
        typer.Option(
            help="How many must agree; by default more than half of those who answered, 3 for the study's JSON."
        ),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            help="Predictions of models to rank: columns of the table ('resnet*') or .npy files; more than once."
        ),
    ] = None,
    show: Annotated[int, typer.Option(help="How many candidates the page shows.")] = 300,
    lang: Annotated[str, typer.Option(help="Language of the page: en or ja.")] = "en",
) -> str:
    """Finds labels that are probably wrong, takes people's corrections, and shows what they do to the ranking of models.

    First run it without corrections, open index.html, judge the candidates there and save the answers. Then run it again
    with --corrections, and with --models to see who overtakes whom.

    Raises ``ValueError`` with one sentence for whatever cannot be read or is not what it should be.
    """
    if len(inputs) != 1:
        raise ValueError(f"{len(inputs)} inputs were given, needed is one table, folder or array")
    if lang not in ("en", "ja"):
        raise ValueError(f"--lang is {lang!r}, allowed are en and ja")
    if show < 1 or (agree is not None and agree < 1):
        raise ValueError(f"--show is {show} and --agree {agree}, allowed is 1 or more")
    if models and not corrections:
        raise ValueError("--models were given without --corrections: a ranking needs corrected labels")
    out = Path(out)
    if out.is_file():
        raise ValueError(f"--out is the file {out}, a folder is needed")
    data = read_predictions(inputs[0], label=label, pred_probs=pred_probs, labels=labels)
    candidates = candidate_errors(data.given, data.probabilities, count=count)
    others = data.probabilities.copy()
    others[np.arange(len(data)), data.given] = -np.inf
    suggested = others.argmax(axis=1)
    said = [f"{len(candidates)} of {len(data)} labels are candidates ({len(candidates) / len(data):.2%})"]
    kinds, judged, ranking = np.full(len(data), -1), None, None
    tables: dict[str, dict[str, list[Any]]] = {}
    if corrections:
        rows, kinds[:], suggested, benchmark = _judge(data, corrections, suggested, agree)
        judged = _judged(data, candidates, rows, kinds)
        said.append(f"people judged {judged['checked']} of them and call {judged['errors']} wrong")
        tables["corrected_labels.csv"] = _corrected(data, kinds, benchmark)
        if models:
            ranking = Ranking(_models(data, inputs[0], models), benchmark)
            tables["ranking.csv"] = _ranked(ranking)
            first, now = ranking.best(corrected=0.0), ranking.best()
            said.append(f"best on the original labels is {first}, on the corrected ones {now}")
    tables["candidates.csv"] = _listed(data, candidates, suggested, kinds)
    page = _page(data, candidates, suggested, kinds, judged, ranking, show, lang, inputs[0].name)
    # Nothing is written before everything could be read.
    for name, columns in tables.items():
        _write_csv(out / name, columns)
    write_text(out / "index.html", page)
    return "; ".join(said) + f"; open {out / 'index.html'}"


# Corrections --------------------------------------------------------------------------------------------------------


def _judge(
    data: Predictions, files: list[Path], suggested: np.ndarray, agree: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Benchmark]:
    """The judged rows, the kind of every row (-1: not judged), the suggested labels, and the corrected benchmark."""
    answers: Answers = {}
    of_study = False
    for file in files:
        of_study |= file.suffix.lower() == ".json"
        for row, given in (_study_answers if file.suffix.lower() == ".json" else _table_answers)(file, data).items():
            answers.setdefault(row, []).extend(given)
    rows, suggested = np.array(sorted(answers)), suggested.copy()
    votes = np.zeros((len(rows), len(ANSWERS)), np.int64)
    for i, row in enumerate(rows.tolist()):
        tally = Counter(_resolve(answer, data, row, int(suggested[row])) for answer in answers[row])
        votes[i] = [tally[answer] for answer in ANSWERS]
        # A class that is neither given nor suggested is a better suggestion where more people name it.
        others = [(count, answer) for answer, count in tally.items() if isinstance(answer, int)]
        if others and max(others)[0] > votes[i, 1]:
            votes[i, 1], suggested[row] = max(others)
    least = np.array([len(answers[row]) // 2 + 1 for row in rows.tolist()])
    if agree is not None or of_study:
        least = np.full(len(rows), 3 if agree is None else agree)
    kinds = np.full(len(data), -1)
    kinds[rows] = consensus(votes, least=least)
    return rows, kinds, suggested, correct(data.given, rows, kinds[rows], suggested[rows])


def _table_answers(file: Path, data: Predictions) -> Answers:
    table = read_table(file)
    if not {"row", "answer"} <= set(table):
        raise ValueError(f"{file} has the columns {', '.join(table)}, needed are row and answer")
    answers: Answers = {}
    for line, (row, answer) in enumerate(zip(table["row"], table["answer"], strict=True)):
        if not isinstance(row, int) or not 0 <= row < len(data):
            raise ValueError(f"line {line + 2} of {file} has row {row}, allowed are 0 to {len(data) - 1}")
        if row in answers:
            raise ValueError(f"{file} answers row {row} twice: give each person's answers in a file of their own")
        text = "" if answer is None else str(answer).strip()
        if text not in ANSWERS and text not in data.classes:
            raise ValueError(
                f"line {line + 2} of {file} answers {text!r}, allowed are {', '.join(ANSWERS)} or the name of a class"
            )
        answers[row] = [text]
    return answers


def _study_answers(file: Path, data: Predictions) -> Answers:
    votes = read_votes(file)
    rows = votes.rows
    if rows.min() < 0 or rows.max() >= len(data):
        raise ValueError(f"{file} judges row {rows.max()}, allowed are 0 to {len(data) - 1}")
    return {
        int(row): [answer for answer, count in zip(ANSWERS, counts, strict=True) for _ in range(count)]
        for row, counts in zip(rows, votes.counts, strict=True)
    }


def _resolve(answer: str, data: Predictions, row: int, suggested: int) -> str | int:
    """An answer of ``ANSWERS``, or the index of a class that is neither given nor suggested."""
    if answer in ANSWERS and answer not in data.classes:
        return answer
    index = data.class_index(answer)
    return "given" if index == data.given[row] else "guessed" if index == suggested else index


def _judged(data: Predictions, candidates: np.ndarray, rows: np.ndarray, kinds: np.ndarray) -> dict[str, Any]:
    checked = np.intersect1d(candidates, rows)
    errors = int((kinds[checked] > 0).sum())
    counts = {"errors": errors, "checked": len(checked), "kinds": dict.fromkeys(KINDS, 0)}
    for kind in kinds[rows]:
        counts["kinds"][KINDS[kind]] += 1
    if len(checked):
        sizes = (errors, len(checked), len(candidates), len(data))
        counts |= {"rate": extrapolated_error_rate(*sizes), "interval": error_rate_interval(*sizes)}
    return counts


# Models -------------------------------------------------------------------------------------------------------------


def _models(data: Predictions, source: Path, wanted: list[str]) -> dict[str, np.ndarray]:
    models: dict[str, np.ndarray] = {}
    for name in wanted:
        if name.lower().endswith(".npy"):
            try:
                found = {Path(name).stem: np.load(name, allow_pickle=False)}
            except (OSError, ValueError) as error:
                raise ValueError(f"--models {name} cannot be read as a NumPy array: {error}") from error
        elif source.is_dir() or source.suffix.lower() == ".npy":
            raise ValueError(f"--models is {name!r}, with {source} it has to be .npy files")
        else:
            table = read_table(source)
            found = {column: table[column] for column in matching_columns(table, name)}
        if twice := models.keys() & found.keys():
            raise ValueError(f"--models name {min(twice)!r} twice")
        models |= {model: read_classes(values, data, f"--models {model}") for model, values in found.items()}
    return models


# What is written ----------------------------------------------------------------------------------------------------


def _listed(
    data: Predictions, candidates: np.ndarray, suggested: np.ndarray, kinds: np.ndarray
) -> dict[str, list[Any]]:
    P = data.probabilities
    return {
        "rank": list(range(1, len(candidates) + 1)),
        "row": candidates.tolist(),
        "name": [data.names[row] for row in candidates],
        "given_label": [data.classes[data.given[row]] for row in candidates],
        "suggested_label": [data.classes[suggested[row]] for row in candidates],
        "p_given": P[candidates, data.given[candidates]].tolist(),
        "p_suggested": P[candidates, suggested[candidates]].tolist(),
        "judged": [KINDS[kinds[row]] if kinds[row] >= 0 else "" for row in candidates],
    }


def _corrected(data: Predictions, kinds: np.ndarray, benchmark: Benchmark) -> dict[str, list[Any]]:
    return {
        "row": list(range(len(data))),
        "name": list(data.names),
        "given_label": [data.classes[k] for k in benchmark.original],
        "corrected_label": [data.classes[k] for k in benchmark.corrected],
        "judged": [KINDS[kind] if kind >= 0 else "" for kind in kinds],
        "keep": benchmark.keep.tolist(),
    }


def _ranked(ranking: Ranking) -> dict[str, list[Any]]:
    """A line for each model and prevalence: accuracy by original, half corrected and corrected labels."""
    columns: dict[str, list[Any]] = {
        "model": [],
        "prevalence": [],
        "original": [],
        "half_corrected": [],
        "corrected": [],
    }
    for prevalence in np.linspace(ranking.benchmark.prevalence, 1.0, FIGURE_POINTS):
        shares = [ranking.accuracy(prevalence, corrected=share) for share in (0.0, 0.5, 1.0)]
        for model, accuracies in zip(ranking.names, zip(*shares, strict=True), strict=True):
            for key, value in zip(columns, (model, float(prevalence), *map(float, accuracies)), strict=True):
                columns[key].append(value)
    return columns


def _write_csv(path: Path, columns: dict[str, list[Any]]) -> None:
    with replacing(path) as temporary:
        pa.csv.write_csv(pa.table(columns), temporary)


def _page(
    data: Predictions,
    candidates: np.ndarray,
    suggested: np.ndarray,
    kinds: np.ndarray,
    judged: dict[str, Any] | None,
    ranking: Ranking | None,
    show: int,
    lang: str,
    title: str,
) -> str:
    P = data.probabilities
    cards = [
        {
            "row": int(row),
            "name": data.names[row],
            "given": data.classes[data.given[row]],
            "suggested": data.classes[suggested[row]],
            "p_given": P[row, data.given[row]],
            "p_suggested": P[row, suggested[row]],
            "image": None if data.images is None else _thumbnail(data.images[row], data.names[row]),
            "fields": {key: values[row] for key, values in data.fields.items() if data.images is None},
            "judged": KINDS[kinds[row]] if kinds[row] >= 0 else "",
        }
        for row in candidates[:show]
    ]
    accuracies = None
    if ranking is not None:
        original, corrected = ranking.accuracy(corrected=0.0), ranking.accuracy()
        each = zip(ranking.names, original, corrected, ranking.on_original, ranking.on_corrected, strict=True)
        accuracies = sorted(each, key=lambda line: -line[1])
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    )
    return template.render(
        cards=cards,
        count=len(candidates),
        size=len(data),
        judged=judged,
        accuracies=accuracies,
        flips=[] if ranking is None else ranking.flips(),
        prevalence=None if ranking is None else ranking.benchmark.prevalence,
        figure=None if ranking is None else _figure(ranking),
        answers=ANSWERS[:4],
        lang=lang,
        title=title,
    )


def _thumbnail(source: Path | bytes, name: str) -> str:
    image = Image.fromarray(decode(source, name))
    if max(image.size) < THUMBNAIL:
        factor = THUMBNAIL // max(image.size)
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _figure(ranking: Ranking) -> str:
    """Accuracy on corrected labels over the prevalence of label errors, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    prevalences = np.linspace(ranking.benchmark.prevalence, 1.0, FIGURE_POINTS)
    curves = np.stack([ranking.accuracy(prevalence) for prevalence in prevalences])
    for name, curve in zip(ranking.names, curves.T, strict=True):
        axes.plot(prevalences, curve, label=name)
    axes.set_xlabel("prevalence of mislabelled examples")
    axes.set_ylabel("accuracy on corrected labels")
    axes.legend(fontsize="small")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
