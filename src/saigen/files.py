"""Files that are either whole or not there: everything a user could lose is written beside its place and renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` and renames it to ``path`` when the block ends without an exception.

    The block may make a file or a folder there. On an exception the temporary is removed and ``path`` stays as it was.
    Raises ``ValueError`` where the folder of ``path`` cannot be made or written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
    temporary = place / path.name
    try:
        yield temporary
        if temporary.is_file():
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
        if temporary.is_dir() and path.is_dir():
            shutil.rmtree(path)
        try:
            os.replace(temporary, path)
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes ``text`` as UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes ``data``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)
