"""Tables with a target: scikit-learn's embedded ones, drawn ones with known truth, and the user's own as CSV or Parquet.

A file has a row an example. Its target is the column named ``target``, ``label``, ``labels``, ``class`` or ``y``, and
otherwise the last one. A CSV may have no header. ``NAME-train.csv`` and ``NAME-test.csv`` in one folder are one table.
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from saigen.data.images import fingerprint
from saigen.data.predictions import LABEL_COLUMNS, TABLES

MISSING = frozenset({"", "?", "na", "n/a", "nan", "null", "none"})
MOST_CLASSES = 20
"""A target of whole numbers is taken for classes up to as many different ones, and for a quantity above."""


@dataclass(frozen=True)
class Table:
    """``x`` (n, d) float64: values, numbers of categories in the columns ``categorical``, NaN where a cell is empty.

    ``y`` (n,) holds int64 indices into ``classes``, or float64 values where ``classes`` is None.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    categorical: tuple[int, ...]
    columns: tuple[str, ...]
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.y)

    @property
    def task(self) -> str:
        return "regression" if self.classes is None else "classification"

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint([self.x, self.y])

    def take(self, indices: Sequence[int] | np.ndarray) -> "Table":
        """The rows at ``indices``, with the classes and categories of the whole table."""
        return replace(self, x=self.x[indices], y=self.y[indices])


def embedded_table(name: str) -> Table:
    """One of scikit-learn's tables: breast_cancer, digits, iris and wine have classes, diabetes a quantity."""
    from sklearn import datasets

    names = ("breast_cancer", "diabetes", "digits", "iris", "wine")
    if name not in names:
        raise ValueError(f"name is {name!r}, allowed are {', '.join(names)}")
    bunch = getattr(datasets, f"load_{name}")()
    classes = None if name == "diabetes" else tuple(str(label) for label in bunch.target_names)
    kind = np.float64 if classes is None else np.int64
    columns = tuple(str(column) for column in bunch.feature_names)
    return Table(name, bunch.data.astype(np.float64), bunch.target.astype(kind), (), columns, classes)


def clusters_table(rng: np.random.Generator, rows: int = 600, columns: int = 20, classes: int = 4) -> Table:
    """Gaussian clusters, two a class, in eight of the columns (or all, where there are fewer); the others are noise."""
    from sklearn.datasets import make_classification

    x, y = make_classification(
        n_samples=rows,
        n_features=columns,
        n_informative=min(8, columns),
        n_redundant=0,
        n_classes=classes,
        random_state=int(rng.integers(2**31)),
    )
    return Table("clusters", x, y.astype(np.int64), (), _numbered(columns), tuple(map(str, range(classes))))


def threshold_table(rng: np.random.Generator, rows: int = 800, columns: int = 12, *, rotated: bool = False) -> Table:
    """Uniform cells; the class is whether exactly one of two columns is above its threshold. Nothing else matters.

    A tree splits along columns and needs two splits for it. ``rotated`` turns the space by a random rotation, after which
    no column says anything by itself.
    """
    x = rng.uniform(-1, 1, (rows, columns))
    first, second = rng.choice(columns, 2, replace=False)
    thresholds = rng.uniform(-0.3, 0.3, 2)
    y = ((x[:, first] > thresholds[0]) ^ (x[:, second] > thresholds[1])).astype(np.int64)
    if rotated:
        from scipy.stats import ortho_group

        x = x @ ortho_group.rvs(columns, random_state=rng)
    return Table("rotated_thresholds" if rotated else "thresholds", x, y, (), _numbered(columns), ("0", "1"))


def read_tables(path: str | Path) -> list[Table]:
    """The tables at ``path``: one file, or all files of a folder in the order of their names.

    Raises ``ValueError`` with one sentence that names the file, and the row or column, where something is not as it should be.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in TABLES)
        if not files:
            raise ValueError(f"{path} has no tables: expected files that end in {', '.join(TABLES)}")
    elif path.is_file():
        if path.suffix.lower() not in TABLES:
            raise ValueError(f"{path} ends in {path.suffix or 'nothing'}, allowed are {', '.join(TABLES)}")
        files = [path]
    else:
        raise ValueError(f"there is no file or folder {path}")
    parts: dict[str, list[Path]] = {}
    for file in files:
        parts.setdefault(re.sub(r"[-_](train|test)$", "", file.stem) if len(files) > 1 else file.stem, []).append(file)
    return [_table(name, members) for name, members in parts.items()]


def _table(name: str, files: list[Path]) -> Table:
    header, cells, places = None, [], []
    for file in files:
        columns, rows = _cells(file)
        if header is not None and columns != header:
            raise ValueError(f"{file} has other columns than {files[0]}: they have one name and are read as one table")
        header, cells = columns, cells + rows
        places += [f"row {row} of {file.name}" for row in range(len(rows))]
    assert header is not None
    if len(header) < 2:
        raise ValueError(f"{files[0]} has {len(header)} column, needed are a target and at least one more")
    named = [column for column, title in enumerate(header) if title.strip().lower() in LABEL_COLUMNS]
    target = named[0] if len(named) == 1 else len(header) - 1
    y, classes = _target([row[target] for row in cells], places)
    others = [column for column in range(len(header)) if column != target]
    encoded = [_column([row[column] for row in cells], header[column], places) for column in others]
    categorical = tuple(number for number, (_, is_category) in enumerate(encoded) if is_category)
    x = np.stack([values for values, _ in encoded], axis=1)
    return Table(name, x, y, categorical, tuple(header[column] for column in others), classes)


def _cells(file: Path) -> tuple[list[str], list[list[str | None]]]:
    """Column names and cells as text, None where one is empty."""
    if TABLES[file.suffix.lower()] is None:
        header, rows = _parquet(file)
    else:
        header, rows = _separated(file, TABLES[file.suffix.lower()])
    if not rows:
        raise ValueError(f"{file} has no rows")
    return header, [[_text(cell) for cell in row] for row in rows]


def _parquet(file: Path) -> tuple[list[str], list[Sequence[Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"cannot read {file}: {str(error).splitlines()[0]}") from error
    return table.column_names, list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def _separated(file: Path, delimiter: str) -> tuple[list[str], list[Sequence[Any]]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            first = stream.readline()
            stream.seek(0)
            if delimiter == "," and first.count(";") > first.count(","):
                delimiter = ";"
            rows = [row for row in csv.reader(stream, delimiter=delimiter, skipinitialspace=True) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    if not rows:
        raise ValueError(f"{file} has no rows")
    width = len(rows[0])
    for number, row in enumerate(rows):
        if len(row) != width:
            raise ValueError(f"line {number + 1} of {file} has {len(row)} cells, the first has {width}")
    # Names are no numbers: a first row with a number in it, or of one text column repeated, is data.
    if any(_number(cell) is not None or cell.strip() == "" for cell in rows[0]) or len(set(rows[0])) < width:
        return list(_numbered(width)), rows
    return [cell.strip() for cell in rows[0]], rows[1:]


def _target(cells: list[str | None], places: list[str]) -> tuple[np.ndarray, tuple[str, ...] | None]:
    if None in cells:
        raise ValueError(f"{places[cells.index(None)]} has no target: give it one, or take the row out")
    numbers = [_number(cell) for cell in cells]
    if None not in numbers:
        y = _finite(numbers, "the target", places)
        if (y != np.round(y)).any() or len(np.unique(y)) > MOST_CLASSES:
            return y, None
        values, indices = np.unique(y, return_inverse=True)
        classes = tuple(str(int(value)) for value in values)
    else:
        # Adult's test part writes "<=50K." for the "<=50K" of its training part.
        found = set(cells)
        names = [cell.removesuffix(".") if cell.removesuffix(".") in found else cell for cell in cells]
        values, indices = np.unique(names, return_inverse=True)
        classes = tuple(str(value) for value in values)
    if len(classes) < 2:
        raise ValueError(f"every row up to {places[-1]} has the target {classes[0]}, needed are at least 2 classes")
    return indices.astype(np.int64), classes


def _column(cells: list[str | None], title: str, places: list[str]) -> tuple[np.ndarray, bool]:
    """Values with NaN for what is missing, and whether they are numbers of categories."""
    present = [cell for cell in cells if cell is not None]
    if not present:
        raise ValueError(f"column {title!r} up to {places[-1]} is empty in every row: take it out")
    numbers = [np.nan if cell is None else _number(cell) for cell in cells]
    if None not in numbers:
        return _finite(numbers, f"column {title!r}", places, missing=True), False
    number = {category: index for index, category in enumerate(sorted(set(present)))}
    return np.array([np.nan if cell is None else number[cell] for cell in cells]), True


def _finite(numbers: list[Any], what: str, places: list[str], *, missing: bool = False) -> np.ndarray:
    values = np.array(numbers, dtype=np.float64)
    wrong = np.isinf(values) if missing else ~np.isfinite(values)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(f"{places[row]} has {values[row]} in {what}, allowed are finite numbers")
    return values


def _text(cell: Any) -> str | None:
    if cell is None or (isinstance(cell, float) and np.isnan(cell)):
        return None
    text = str(cell).strip().strip("'\"").strip()
    return None if text.lower() in MISSING else text


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _numbered(columns: int) -> tuple[str, ...]:
    return tuple(f"column {number}" for number in range(columns))
