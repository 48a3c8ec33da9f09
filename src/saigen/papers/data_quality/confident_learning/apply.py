"""``saigen apply confident_learning DATA --out PATH``: the suspected labels of a user's own data, worst first, with reasons."""

import difflib
import fnmatch
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import typer
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from saigen.files import replacing
from saigen.papers.data_quality.confident_learning import (
    confident_thresholds,
    cross_val_probabilities,
    find_label_issues,
    label_quality_scores,
)
from saigen.papers.data_quality.confident_learning.estimator import FILTERS, SCORES

METHODS = ("prune_by_noise_rate", "prune_by_class", "both", "confident_learning", "predicted_neq_given")
LABEL_NAMES = ("label", "labels", "target", "class", "y")


def apply(
    inputs: Annotated[
        list[Path],
        typer.Argument(help="One table (CSV, TSV, Parquet) with a label column, or labels or probabilities as .npy."),
    ],
    out: Annotated[Path, typer.Option(help="Where the suspected labels go: .csv or .parquet.")],
    *,
    label: Annotated[
        str | None, typer.Option(help=f"The label column; by default the one named {', '.join(LABEL_NAMES)}.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="Labels as .npy, in place of a label column.")] = None,
    pred_probs: Annotated[
        str | None,
        typer.Option(
            help="Out-of-sample predicted probabilities: an .npy file (examples x classes, classes in sorted order), or "
            "columns of the table, comma-separated or with a wildcard ('p_*'). By default they are cross-validated."
        ),
    ] = None,
    ignore: Annotated[str | None, typer.Option(help="Columns that are no features, comma-separated.")] = None,
    header: Annotated[
        bool, typer.Option(help="Whether a CSV begins with column names; without, they are c0, c1, …")
    ] = True,
    filter_by: Annotated[str, typer.Option(help="The method that decides what is suspected.")] = "prune_by_noise_rate",
    rank_by: Annotated[
        str, typer.Option(help="The score to rank by: self_confidence, normalized_margin, confidence_weighted_entropy.")
    ] = "self_confidence",
    model: Annotated[str, typer.Option(help="The classifier: linear, trees, or auto.")] = "auto",
    folds: Annotated[int, typer.Option(help="Folds of the cross-validation.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the folds.")] = 0,
) -> str:
    """Finds the labels of a data set that are probably wrong and writes them, worst first, with reasons.

    Raises ``ValueError`` with one sentence for whatever cannot be read or is not what it should be.
    """
    out = Path(out)
    if out.suffix.lower() not in (".csv", ".parquet"):
        raise ValueError(f"--out is {out}, allowed are files that end in .csv or .parquet")
    if len(inputs) != 1:
        raise ValueError(
            f"{len(inputs)} inputs were given, needed is one file of data (labels and probabilities: "
            "LABELS.npy --pred-probs PROBABILITIES.npy)"
        )
    data = Path(inputs[0])
    if out.resolve() == data.resolve():
        raise ValueError(f"--out is the data file {data} itself, it would be overwritten")
    for option, value, allowed in (
        ("--model", model, ("auto", "linear", "trees")),
        ("--filter-by", filter_by, FILTERS),
        ("--rank-by", rank_by, SCORES),
    ):
        if value not in allowed:
            raise ValueError(f"{option} is {value!r}{_nearest(value, allowed)}, allowed are {', '.join(allowed)}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed is {seed}, allowed is 0 to {2**32 - 1}")
    if folds < 2:
        raise ValueError(f"--folds is {folds}, allowed is 2 or more")

    table, given, P, names = _read(data, label, labels, pred_probs, header)
    given, classes, y = _classes(given, P, names)
    if P is None:
        if folds > max(5, len(y)):
            raise ValueError(f"--folds is {folds}, allowed is 2 to {len(y)}, one for each row of {data}")
        X, kinds = _features(table, _split(ignore))
        encode, classifier = _default_model(kinds, len(y), len(classes), model, seed)
        # Encoding looks at no label, so it is done once; only what learns from labels is cross-validated.
        P = cross_val_probabilities(classifier, encode.fit_transform(X), y, cv=folds, random_state=seed)
    issues = find_label_issues(y, P, filter_by=filter_by, return_indices_ranked_by=rank_by)
    _write(_report(issues, y, P, classes, rank_by), out)
    return _sentence(issues, y, P, classes, out)


# Read -------------------------------------------------------------------------------------------------------------


def _read(
    data: Path, label: str | None, labels: Path | None, pred_probs: str | None, header: bool
) -> tuple[pa.Table | None, np.ndarray, np.ndarray | None, list[str] | None]:
    """The table of features, the given labels, and the probabilities with their column names, where given."""
    if data.suffix.lower() == ".npy":
        array = _load(data)
        if array.ndim == 2 and pred_probs is None and labels is not None:
            return None, _load(Path(labels)), array, None
        if array.ndim == 1 and pred_probs is not None and labels is None:
            return None, array, _load(Path(pred_probs)), None
        raise ValueError(
            f"{data} is an array of shape {array.shape}: needed are probabilities (examples, classes) with --labels FILE.npy, "
            "or labels (examples,) with --pred-probs FILE.npy"
        )
    table = _table(data, header)
    if labels is not None:
        given = _load(Path(labels))
        if given.shape != (table.num_rows,):
            raise ValueError(f"{labels} has shape {given.shape}, {data} has {table.num_rows} rows")
        if label is not None:
            table = table.drop_columns([_column(table, label, "--label")])
    else:
        label = _label_column(table, label)
        given = _given(table, label)
        table = table.drop_columns([label])
    if pred_probs is None:
        return table, given, None, None
    if pred_probs.lower().endswith(".npy"):
        return table, given, _load(Path(pred_probs)), None
    columns = _columns(table, pred_probs)
    try:
        P = np.stack([table.column(name).to_numpy().astype(np.float64) for name in columns], axis=1)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise ValueError(
            f"--pred-probs {pred_probs}: the columns {', '.join(columns)} hold other things than numbers"
        ) from error
    return table, given, P, columns


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}") from error
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"cannot read {path} as a NumPy array: {error}") from error


def _table(path: Path, header: bool) -> pa.Table:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            table = pa.parquet.read_table(path)
        elif path.suffix.lower() in (".csv", ".tsv", ".txt"):
            with path.open("rb") as handle:
                first = handle.readline().decode("utf-8", errors="replace")
            delimiter = max(",\t;", key=first.count)
            table = pa.csv.read_csv(
                path,
                read_options=pa.csv.ReadOptions(autogenerate_column_names=not header),
                parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                convert_options=pa.csv.ConvertOptions(strings_can_be_null=True),
            )
            if not header:
                table = table.rename_columns([f"c{i}" for i in range(table.num_columns)])
        else:
            raise ValueError(f"{path} ends in {path.suffix or 'nothing'}, allowed are .csv, .tsv, .parquet and .npy")
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    if table.num_rows == 0:
        raise ValueError(f"{path} has no rows")
    if len(set(table.column_names)) < table.num_columns:
        twice = next(name for name, count in Counter(table.column_names).items() if count > 1)
        raise ValueError(f"{path} has the column {twice!r} more than once")
    return table


def _column(table: pa.Table, name: str, option: str) -> str:
    if name in table.column_names:
        return name
    shown = ", ".join(table.column_names[:12]) + (", …" if table.num_columns > 12 else "")
    raise ValueError(
        f"{option} is {name!r}, which is no column{_nearest(name, table.column_names)}: the columns are {shown}"
    )


def _nearest(given: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, names, 1, 0.5)
    return f", did you mean {near[0]!r}?" if near else ""


def _label_column(table: pa.Table, label: str | None) -> str:
    if label is not None:
        return _column(table, label, "--label")
    found = [name for name in table.column_names if name.strip().lower() in LABEL_NAMES]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(table.column_names[:12]) + (", …" if table.num_columns > 12 else "")
    near = next((name for name in table.column_names if _nearest(name.strip().lower(), LABEL_NAMES)), None)
    meant = f", did you mean {near!r}?" if near and not found else ""
    raise ValueError(f"which column holds the labels{meant or '?'} Give --label COLUMN: the columns are {shown}")


def _given(table: pa.Table, label: str) -> np.ndarray:
    column = table.column(label)
    if column.null_count:
        row = next(i for i, value in enumerate(column) if not value.is_valid)
        raise ValueError(f"the label column {label!r} is empty in {column.null_count} rows, the first is row {row}")
    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
        raise ValueError(f"the label column {label!r} holds {column.type} values, needed are class names or numbers")
    if pa.types.is_floating(column.type) or pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        return column.to_numpy()
    return np.array([str(value).strip() for value in column.to_pylist()])


def _split(names: str | None) -> list[str]:
    return [name.strip() for name in (names or "").split(",") if name.strip()]


def _columns(table: pa.Table, wanted: str) -> list[str]:
    columns: list[str] = []
    for name in _split(wanted):
        matched = [c for c in table.column_names if fnmatch.fnmatchcase(c, name)] if set(name) & set("*?[") else []
        if set(name) & set("*?[") and not matched:
            raise ValueError(
                f"--pred-probs: no column matches {name!r}; the columns are {', '.join(table.column_names[:12])}"
            )
        columns += matched or [_column(table, name, "--pred-probs")]
    return columns


def _classes(
    given: np.ndarray, P: np.ndarray | None, names: list[str] | None
) -> tuple[np.ndarray, list[Any], np.ndarray]:
    """The classes in the order of the probabilities' columns, and the given labels as indices into them."""
    if given.ndim != 1:
        raise ValueError(f"the labels have shape {given.shape}, needed is one label an example")
    if given.dtype.kind == "f":
        if not np.isfinite(given).all():
            raise ValueError(
                f"the label of row {int((~np.isfinite(given)).argmax())} is {given[~np.isfinite(given)][0]}"
            )
        if (given != np.rint(given)).any():
            row = int((given != np.rint(given)).argmax())
            raise ValueError(f"the label of row {row} is {given[row]}, class labels are needed and not measurements")
        given = given.astype(np.int64)
    found, y = np.unique(given, return_inverse=True)
    if len(found) < 2:
        raise ValueError(f"every label is {_plain(found[0])!r}, labels of at least 2 classes are needed")
    if len(found) > max(20, len(given) // 2):
        raise ValueError(f"the labels have {len(found)} different values in {len(given)} rows: is that the label?")
    if P is None:
        return given, [_plain(c) for c in found], y
    if P.ndim != 2 or len(P) != len(given):
        raise ValueError(f"the probabilities have shape {P.shape}, needed is ({len(given)}, classes)")
    by_name = _named_after(found, names)
    if by_name is not None:
        others = [name for i, name in enumerate(names or []) if i not in by_name]
        order = {index: _plain(c) for c, index in zip(found, by_name, strict=True)}
        classes = [order.get(i, names[i]) for i in range(P.shape[1])] if names else []
        if len(by_name) + len(others) == P.shape[1]:
            return given, classes, np.asarray(by_name)[y]
    if given.dtype.kind in "iu" and given.min() >= 0 and given.max() < P.shape[1]:
        return given, list(range(P.shape[1])), given.astype(np.int64)
    if len(found) == P.shape[1]:
        return given, [_plain(c) for c in found], y
    raise ValueError(
        f"the probabilities have {P.shape[1]} columns, the labels {len(found)} classes: needed is one column a class, "
        "or labels that are the columns' numbers from 0"
    )


def _named_after(classes: np.ndarray, names: Sequence[str] | None) -> list[int] | None:
    """For each class the one probability column that is named after it ("cat", "p_cat"); None where that is unclear."""
    if names is None:
        return None
    columns = []
    for c in classes:
        same = [i for i, name in enumerate(names) if name == str(c)]
        ends = [i for i, name in enumerate(names) if any(name.endswith(f"{mark}{c}") for mark in "_-. :/")]
        if len(same or ends) != 1:
            return None
        columns.append((same or ends)[0])
    return columns if len(set(columns)) == len(columns) else None


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


# Predict ----------------------------------------------------------------------------------------------------------


def _features(table: pa.Table, ignored: list[str]) -> tuple[np.ndarray, list[str]]:
    """An array of features, one column each, and what each holds: number, category, words or characters.

    Names, codes and text without spaces are read by their characters.
    """
    for name in ignored:
        table = table.drop_columns([_column(table, name, "--ignore")])
    columns: list[np.ndarray] = []
    kinds: list[str] = []
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if column.null_count == len(column):
            continue
        if pa.types.is_temporal(column.type) and not pa.types.is_duration(column.type):
            column = column.cast(pa.timestamp("us") if pa.types.is_date(column.type) else column.type).cast(pa.int64())
        if hasattr(column.type, "value_type") and pa.types.is_nested(column.type):
            block = _vectors(name, column)
            columns += list(block.T)
            kinds += ["number"] * block.shape[1]
        elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            values = np.array(["" if v is None else v.strip() for v in column.to_pylist()], dtype=object)
            if any(values):
                columns.append(values)
                kinds.append(_kind_of_strings(values))
        elif pa.types.is_primitive(column.type) or pa.types.is_decimal(column.type):
            values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
            columns.append(np.where(np.isfinite(values), values, np.nan))
            kinds.append("number")
        else:
            raise ValueError(
                f"column {name!r} holds {column.type} values, which are no features here: "
                "leave it out with --ignore, or give --pred-probs"
            )
    if not columns:
        raise ValueError("the table has no columns to predict the label from: give --pred-probs")
    if set(kinds) == {"number"}:
        return np.stack(columns, axis=1), kinds
    X = np.empty((table.num_rows, len(columns)), dtype=object)
    for i, values in enumerate(columns):
        X[:, i] = values
    return X, kinds


def _vectors(name: str, column: pa.Array) -> np.ndarray:
    try:
        block = np.array(column.to_pylist(), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"column {name!r} holds lists that are not numbers of one length: leave it out with --ignore"
        ) from error
    return np.where(np.isfinite(block), block, np.nan).reshape(len(block), -1)


def _kind_of_strings(values: np.ndarray) -> str:
    if np.mean([len(value.split()) for value in values if value]) >= 4:
        return "words"
    return "characters" if len(set(values)) > max(50, len(values) // 5) else "category"


def _default_model(kinds: list[str], n: int, classes: int, model: str, seed: int) -> tuple[ColumnTransformer, Any]:
    """Numbers imputed and scaled, categories one-hot, text as TF-IDF; then trees where they pay, else a linear model."""
    has_text = bool({"words", "characters"} & set(kinds))
    trees = model == "trees" or (model == "auto" and not has_text and n >= 1000 and classes <= 20)
    if has_text and trees:
        raise ValueError("--model is trees, data with text columns needs linear")
    parts: list[tuple[str, Any, Any]] = []
    numbers = [i for i, kind in enumerate(kinds) if kind == "number"]
    categories = [i for i, kind in enumerate(kinds) if kind == "category"]
    if numbers:
        impute = SimpleImputer(strategy="median", keep_empty_features=True, add_indicator=True)
        parts.append(("numbers", make_pipeline(impute, StandardScaler()), numbers))
    if categories:
        encode = OneHotEncoder(
            handle_unknown="infrequent_if_exist", min_frequency=2, max_categories=100, sparse_output=not trees
        )
        parts.append(("categories", encode, categories))
    for i, kind in enumerate(kinds):
        if kind == "words":
            tfidf = TfidfVectorizer(
                sublinear_tf=True, ngram_range=(1, 2), token_pattern=r"\b\w+\b", max_features=50_000
            )
            parts.append((f"words {i}", tfidf, i))
        elif kind == "characters":
            tfidf = TfidfVectorizer(sublinear_tf=True, analyzer="char_wb", ngram_range=(1, 3), max_features=50_000)
            parts.append((f"characters {i}", tfidf, i))
    encode = ColumnTransformer(parts)
    if trees:
        return encode, HistGradientBoostingClassifier(max_iter=200, early_stopping=True, random_state=seed)
    return encode, LogisticRegression(C=10.0 if has_text else 1.0, max_iter=1000)


# Write ------------------------------------------------------------------------------------------------------------


def _report(issues: np.ndarray, y: np.ndarray, P: np.ndarray, classes: list[Any], rank_by: str) -> pa.Table:
    P64 = np.asarray(P, dtype=np.float64)
    suggested, quality = P64.argmax(axis=1), label_quality_scores(y, P, method=rank_by)
    thresholds = confident_thresholds(y, P)
    by_method = {method: find_label_issues(y, P, filter_by=method) for method in METHODS}
    rows = []
    for rank, row in enumerate(issues.tolist(), start=1):
        given, other = int(y[row]), int(suggested[row])
        flagged = [method for method in METHODS if by_method[method][row]]
        rows.append(
            {
                "rank": rank,
                "row": row,
                "given_label": classes[given],
                "suggested_label": classes[other],
                "quality": float(quality[row]),
                "p_given": float(P64[row, given]),
                "p_suggested": float(P64[row, other]),
                "flagged_by": ";".join(flagged),
                "reason": _reason(classes, given, other, P64[row], thresholds, len(flagged)),
            }
        )
    label_type = pa.int64() if all(isinstance(c, int) and not isinstance(c, bool) for c in classes) else pa.string()
    names = [("rank", pa.int64()), ("row", pa.int64()), ("given_label", label_type), ("suggested_label", label_type)]
    names += [("quality", pa.float64()), ("p_given", pa.float64()), ("p_suggested", pa.float64())]
    names += [("flagged_by", pa.string()), ("reason", pa.string())]
    if label_type == pa.string():
        rows = [row | {key: str(row[key]) for key in ("given_label", "suggested_label")} for row in rows]
    return pa.Table.from_pylist(rows, schema=pa.schema(names))


def _reason(classes: list[Any], given: int, other: int, p: np.ndarray, thresholds: np.ndarray, methods: int) -> str:
    if given == other:
        return f"Labelled {classes[given]}, which is still the likeliest but with only {p[given]:.3f} among the least certain labels."
    typical = "no typical value, as no example has that label"
    if thresholds[other] <= 1:
        typical = f"{'at or above' if p[other] >= thresholds[other] else 'below'} the {thresholds[other]:.3f} typical of that label"
    return (
        f"Labelled {classes[given]} (probability {p[given]:.3f}), but models that had not seen it say {classes[other]} "
        f"({p[other]:.3f}, {typical}); {methods} of {len(METHODS)} methods agree."
    )


def _write(report: pa.Table, out: Path) -> None:
    with replacing(out) as temporary:
        if out.suffix.lower() == ".csv":
            pa.csv.write_csv(report, temporary)
        else:
            pa.parquet.write_table(report, temporary)


def _sentence(issues: np.ndarray, y: np.ndarray, P: np.ndarray, classes: list[Any], out: Path) -> str:
    pairs = Counter(zip(y[issues].tolist(), P[issues].argmax(axis=1).tolist(), strict=True))
    often = ""
    if pairs:
        (given, other), count = pairs.most_common(1)[0]
        often = f", most often {classes[given]} that looks like {classes[other]} ({count})"
    return f"{len(issues)} of {len(y)} labels look wrong ({len(issues) / len(y):.1%}){often}; written, worst first, to {out}"
