"""Labelled examples with predicted probabilities, as a user has them: a table, a folder of images, or arrays.

A table (CSV, TSV, Parquet) has a label column and a column of probabilities a class, or its probabilities lie in an
``.npy`` file. A folder holds ``CLASS/IMAGE.jpg``; its probabilities are an ``.npy`` file in the order of the sorted
relative paths, or a table with a column ``path``.
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saigen.data.images import IMAGE_SUFFIXES

LABEL_COLUMNS = ("label", "labels", "target", "class", "y")
IMAGE_COLUMNS = ("image", "path", "file", "filename")
TABLES = {".csv": ",", ".tsv": "\t", ".parquet": None, ".pq": None}


@dataclass(frozen=True)
class Predictions:
    """``given`` (n,) indices into ``classes``, ``probabilities`` (n, K), and what there is to show of each example.

    ``names`` are file paths or row numbers, ``images`` files or encoded bytes (None where there are none), ``fields`` the
    other columns of a table.
    """

    given: np.ndarray
    probabilities: np.ndarray
    classes: tuple[str, ...]
    names: tuple[str, ...]
    images: tuple[Path | bytes, ...] | None
    fields: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.given)

    def class_index(self, answer: Any) -> int:
        """The class that ``answer`` names; ``ValueError`` with the classes there are."""
        text = str(answer).strip()
        if text in self.classes:
            return self.classes.index(text)
        shown = ", ".join(self.classes[:12]) + (", …" if len(self.classes) > 12 else "")
        raise ValueError(f"there is no class {text!r}, the classes are {shown}")


def read_predictions(
    data: str | Path, *, label: str | None = None, pred_probs: str | None = None, labels: str | Path | None = None
) -> Predictions:
    """Reads what is at ``data``; ``label`` names the label column, ``pred_probs`` a file or columns (``"p_*"``).

    ``labels`` is an ``.npy`` file of labels where ``data`` has none. Raises ``ValueError`` with one sentence that names the
    file, column or row where something is missing or is not what it should be.
    """
    data = Path(data)
    if data.is_dir():
        return _from_folder(data, pred_probs)
    if data.suffix.lower() == ".npy":
        given, P = (_array(Path(labels)), _array(data)) if labels is not None else (_array(data), None)
        P = _array(Path(pred_probs)) if P is None and pred_probs else P
        if given.ndim != 1 or P is None:
            raise ValueError(
                f"{data} has shape {given.shape}: needed are labels (n,) with probabilities, or probabilities with labels"
            )
        return _checked(given, P, None, [str(i) for i in range(len(given))], None, {})
    table = read_table(data)
    column = _label_column(table, label) if labels is None else None
    given = np.array([_text(value) for value in table[column]]) if column is not None else _array(Path(labels))
    if column is not None and "" in given:
        raise ValueError(f"row {int(np.flatnonzero(given == '')[0])} of {data} has no label in column {column!r}")
    if pred_probs is None:
        raise ValueError(f"{data} needs predicted probabilities: give their columns ('p_*') or an .npy file")
    if pred_probs.lower().endswith(".npy"):
        P, names = _array(Path(pred_probs)), []
    else:
        names = matching_columns(table, pred_probs)
        P = _numbers(table, names)
    images = _images(table, data.parent)
    shown = {key: values for key, values in table.items() if key not in (*names, column) and _plain(values)}
    return _checked(given, P, names or None, [str(i) for i in range(len(given))], images, shown)


def read_table(path: str | Path) -> dict[str, list[Any]]:
    """The columns of a CSV, TSV or Parquet file; ``ValueError`` where it is none, has no rows or cannot be read."""
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if path.suffix.lower() not in TABLES:
        raise ValueError(f"{path} ends in {path.suffix or 'nothing'}, allowed are {', '.join(TABLES)} and .npy")
    delimiter = TABLES[path.suffix.lower()]
    try:
        if delimiter is None:
            table = pyarrow.parquet.read_table(path)
        else:
            parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
            table = pyarrow.csv.read_csv(path, parse_options=parse)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    if table.num_rows == 0:
        raise ValueError(f"{path} has no rows")
    return {name: table.column(name).to_pylist() for name in table.column_names}


def matching_columns(table: dict[str, list[Any]], wanted: str) -> list[str]:
    """The columns that ``wanted`` names: names and patterns, comma-separated; ``ValueError`` for one that is not there."""
    columns: list[str] = []
    for name in filter(None, (part.strip() for part in wanted.split(","))):
        found = [name] if name in table else fnmatch.filter(table, name)
        if not found:
            raise ValueError(f"there is no column {name!r}, the columns are {', '.join(list(table)[:12])}")
        columns += [column for column in found if column not in columns]
    return columns


def read_classes(values: Sequence[Any], predictions: Predictions, what: str) -> np.ndarray:
    """Class names or numbers, one an example, as class indices (n,); probabilities (n, K) by their largest."""
    array = np.asarray(values)
    if array.ndim == 2 and array.shape == predictions.probabilities.shape:
        return array.argmax(axis=1)
    if array.shape != (len(predictions),):
        raise ValueError(f"{what} has shape {array.shape}, needed is one class for each of {len(predictions)} examples")
    try:
        return np.array([predictions.class_index(_text(value)) for value in array.tolist()])
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def _from_folder(folder: Path, pred_probs: str | None) -> Predictions:
    files = sorted(
        (file for file in folder.glob("*/**/*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()),
        key=lambda file: file.relative_to(folder).as_posix(),
    )
    if not files:
        raise ValueError(f"{folder} has no images: expected CLASS/IMAGE.jpg")
    names = [file.relative_to(folder).as_posix() for file in files]
    given = np.array([name.split("/")[0] for name in names])
    if set(given) <= {"train", "test", "val", "validation", "valid"}:
        raise ValueError(f"{folder} has parts, not classes: give one of {', '.join(sorted(set(given)))}")
    if pred_probs is None:
        raise ValueError(f"{folder} needs predicted probabilities: an .npy file, or a table with a column path")
    source = Path(pred_probs)
    if source.suffix.lower() == ".npy":
        P, columns = _array(source), None
    else:
        table = read_table(source)
        if "path" not in table:
            raise ValueError(f"{source} has no column 'path', its columns are {', '.join(list(table)[:12])}")
        columns = [name for name in table if name != "path"]
        row = {str(path): i for i, path in enumerate(table["path"])}
        if missing := [name for name in names if name not in row]:
            raise ValueError(f"{source} has no row for the image {missing[0]} ({len(missing)} are missing)")
        P = _numbers(table, columns)[[row[name] for name in names]]
    return _checked(given, P, columns, names, tuple(files), {})


def _checked(
    given: np.ndarray,
    P: np.ndarray,
    columns: Sequence[str] | None,
    names: Sequence[str],
    images: tuple[Path | bytes, ...] | None,
    fields: dict[str, list[Any]],
) -> Predictions:
    if P.ndim != 2 or len(P) != len(given):
        raise ValueError(f"the probabilities have shape {P.shape}, needed is ({len(given)}, classes)")
    classes, y = _classes(np.array([_text(value) for value in given.tolist()]), P.shape[1], columns)
    return Predictions(y, P.astype(np.float64), classes, tuple(names), images, fields)


def _classes(given: np.ndarray, K: int, columns: Sequence[str] | None) -> tuple[tuple[str, ...], np.ndarray]:
    """The class of each probability column, and the given labels as indices: by name, by number, or in sorted order."""
    found = sorted(set(given))
    if columns is not None:
        named = [_named_after(column, found) for column in columns]
        if len({name for name in named if name is not None} & set(found)) == len(found):
            classes = tuple(column if name is None else name for column, name in zip(columns, named, strict=True))
            if len(set(classes)) == K:
                return classes, np.array([classes.index(value) for value in given])
    if all(value.isdecimal() and int(value) < K for value in found):
        return tuple(map(str, range(K))), given.astype(np.int64)
    if len(found) == K:
        return tuple(found), np.searchsorted(found, given)
    raise ValueError(
        f"the labels have {len(found)} classes, the probabilities {K} columns: needed is one column a class, named after it"
    )


def _named_after(column: str, classes: Sequence[str]) -> str | None:
    if column in classes:
        return column
    ends = [name for name in classes if any(column.endswith(f"{mark}{name}") for mark in "_-. :/")]
    return max(ends, key=len) if ends else None


def _label_column(table: dict[str, list[Any]], label: str | None) -> str:
    if label is not None:
        return matching_columns(table, label)[0]
    found = [name for name in table if name.strip().lower() in LABEL_COLUMNS]
    if len(found) == 1:
        return found[0]
    raise ValueError(f"which column holds the labels? Name it; the columns are {', '.join(list(table)[:12])}")


def _images(table: dict[str, list[Any]], folder: Path) -> tuple[Path | bytes, ...] | None:
    for name in (name for name in table if name.lower() in IMAGE_COLUMNS):
        cells = [cell.get("bytes") or cell.get("path") if isinstance(cell, dict) else cell for cell in table[name]]
        if all(isinstance(cell, bytes) for cell in cells):
            return tuple(cells)
        if all(isinstance(cell, str) and Path(cell).suffix.lower() in IMAGE_SUFFIXES for cell in cells):
            return tuple(folder / cell for cell in cells)
    return None


def _plain(values: list[Any]) -> bool:
    return not any(isinstance(value, (bytes, dict, list)) for value in values[:20])


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _numbers(table: dict[str, list[Any]], columns: Sequence[str]) -> np.ndarray:
    try:
        return np.array([table[name] for name in columns], dtype=np.float64).T
    except (TypeError, ValueError) as error:
        raise ValueError(f"the columns {', '.join(columns)} hold other things than numbers") from error


def _array(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}") from error
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"cannot read {path} as a NumPy array: {error}") from error
