"""What can be said of a user's data before anything is measured on them."""

from pathlib import Path

MOST_CLASSES = 100_000


def check_labels(path: Path) -> None:
    """Raises ``ValueError`` where a ``label`` column of the Parquet files at ``path`` holds what is no class.

    Classes are whole numbers from 0 or names. Only the labels are read; files that cannot be read are left to the reader.
    """
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    files = [path] if path.suffix == ".parquet" and path.is_file() else sorted(path.glob("*.parquet"))
    for file in files:
        try:
            if "label" not in pyarrow.parquet.read_schema(file).names:
                continue
            labels = pyarrow.parquet.read_table(file, columns=["label"])["label"].combine_chunks()
        except (pyarrow.ArrowException, OSError):
            continue
        kind = labels.type
        if pyarrow.types.is_floating(kind):
            fine, least = pyarrow.compute.is_finite(labels), "allowed are whole numbers from 0 and names"
        elif pyarrow.types.is_integer(kind):
            fine = pyarrow.compute.less(labels, MOST_CLASSES)
            least = f"allowed are classes from 0 to {MOST_CLASSES - 1}, and names"
        elif (
            any(test(kind) for test in (pyarrow.types.is_string, pyarrow.types.is_large_string))
            or pyarrow.types.is_dictionary(kind)
            or pyarrow.types.is_null(kind)
            or pyarrow.types.is_boolean(kind)
        ):
            continue
        else:
            raise ValueError(f"column 'label' of {file.name} is of type {kind}, allowed are whole numbers and names")
        wrong = pyarrow.compute.indices_nonzero(pyarrow.compute.invert(fine))
        if len(wrong):
            row = wrong[0].as_py()
            raise ValueError(f"row {row} of {file.name} has the label {labels[row].as_py()}, {least}")
