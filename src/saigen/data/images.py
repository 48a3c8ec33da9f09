"""Labelled images: scikit-learn's embedded digits, and the user's own as Parquet (Hugging Face image layout) or folders.

A folder is either ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg`` (``val`` and ``validation`` also serve as test), or
plain ``CLASS/*.jpg``, of which every fifth image of a class is held out for testing.
A Parquet folder holds ``train*.parquet`` and ``test*.parquet`` with the columns ``image`` (bytes) and ``label``.
"""

import hashlib
import io
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
PARTS = {"train": ("train",), "test": ("test", "val", "validation", "valid")}


@dataclass(frozen=True)
class Images:
    """Labelled images: ``x`` is ``(n, c, h, w)``, float32 in [0, 1] or uint8; ``y`` is ``(n,)`` int64."""

    x: Tensor
    y: Tensor
    classes: tuple[str, ...]
    name: str
    fingerprint: str

    def __len__(self) -> int:
        return len(self.y)

    def subset(self, indices: Sequence[int] | np.ndarray | Tensor) -> "Images":
        """The images at ``indices``; name and fingerprint stay those of the whole set."""
        indices = torch.as_tensor(np.asarray(indices))
        return replace(self, x=self.x[indices], y=self.y[indices])

    def sample(self, count: int | None, rng: np.random.Generator) -> "Images":
        """``count`` of the images, drawn so that the classes keep their shares; None, or more than there are: all, shuffled."""
        count = len(self) if count is None else min(count, len(self))
        return self.subset(split(self.y.numpy(), (count,), rng)[0])

    def float(self) -> "Images":
        """The same images as float32 in [0, 1]."""
        return self if self.x.dtype == torch.float32 else replace(self, x=self.x.float() / 255)


def digits() -> Images:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, grey levels scaled to [0, 1]."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(bunch.images.astype(np.float32) / 16.0)[:, None]
    y = torch.from_numpy(bunch.target.astype(np.int64))
    return Images(
        x, y, tuple(str(name) for name in bunch.target_names), "digits", fingerprint([bunch.images, bunch.target])
    )


def fingerprint(arrays: Iterable[np.ndarray | Tensor]) -> str:
    """SHA-256 over the shapes, types and bytes of ``arrays``."""
    digest = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array.numpy() if isinstance(array, Tensor) else array)
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def split(
    y: int | Sequence[int] | np.ndarray | Tensor, sizes: Sequence[int], rng: np.random.Generator
) -> tuple[np.ndarray, ...]:
    """Disjoint random index arrays of the given ``sizes``; with labels instead of a count, every part keeps their shares.

    Raises ``ValueError`` where the sizes ask for more than there is.
    """
    n = y if isinstance(y, int) else len(y)
    if sum(sizes) > n or min(sizes) < 1:
        raise ValueError(f"sizes is {tuple(sizes)}, allowed are counts of at least 1 that sum to {n} or less")
    if isinstance(y, int):
        order = rng.permutation(n)
    else:
        # Every class is spread evenly over [0, 1); sorting by that place makes any prefix stratified.
        labels = np.asarray(y)
        place = np.empty(n)
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            place[members] = (np.arange(len(members)) + rng.random()) / len(members)
        order = np.argsort(place, kind="stable")
    bounds = np.cumsum([0, *sizes])
    parts = [order[start:stop] for start, stop in itertools.pairwise(bounds)]
    return tuple(rng.permutation(part) for part in parts)


def decode(data: bytes | Path, what: str, size: int | tuple[int, int] | None = None) -> np.ndarray:
    """One image as ``(h, w, 3)`` uint8; raises ``ValueError`` naming ``what`` where it cannot be read whole.

    ``size`` as a number scales the short side and crops the centre to a square; as ``(height, width)`` it resizes.
    """
    try:
        image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
        image = image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {what}: {error}") from error
    if isinstance(size, int):
        scale = size / min(image.size)
        if scale != 1.0:
            image = image.resize(
                [max(size, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC, reducing_gap=3.0
            )
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    elif size is not None:
        image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.asarray(image)


def load_images(path: str | Path, *, size: int, part: str = "train", limit: int | None = None) -> Images:
    """The user's labelled images at ``path`` as uint8 squares of ``size`` pixels.

    ``part`` is ``"train"`` or ``"test"``; ``limit`` takes the first so many (of shuffled files or rows).
    Raises ``ValueError`` naming the file, column or folder where the data cannot be read.
    """
    path = Path(path)
    if part not in PARTS:
        raise ValueError(f"part is {part!r}, allowed are 'train' and 'test'")
    if size < 1:
        raise ValueError(f"size is {size}, allowed is a number of pixels of at least 1")
    if not path.exists():
        raise ValueError(f"there is no data at {path}: give a folder of images or of Parquet files")
    parquet = (
        [path]
        if path.is_file() and path.suffix == ".parquet"
        else sorted(path.glob("*.parquet"))
        if path.is_dir()
        else []
    )
    if parquet:
        blobs, labels, classes = _from_parquet(path, parquet, part, limit)
    elif path.is_dir():
        blobs, labels, classes = _from_folders(path, part, limit)
    else:
        raise ValueError(f"{path} is neither a folder of images nor a Parquet file")
    pixels = np.stack([decode(blob, what, size) for blob, what in blobs])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    y = torch.tensor(labels)
    return Images(x, y, classes, path.name, fingerprint([x, y]))


def _from_parquet(path: Path, files: list[Path], part: str, limit: int | None):
    import pyarrow
    import pyarrow.parquet

    wanted = [file for file in files if any(file.stem.startswith(name) for name in PARTS[part])]
    if not wanted:
        raise ValueError(f"{path} has no {part} part: its Parquet files are {', '.join(file.name for file in files)}")
    try:
        table = pyarrow.concat_tables([pyarrow.parquet.read_table(file) for file in wanted])
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"cannot read the Parquet file {wanted[0]}: {error}") from error
    for column in ("image", "label"):
        if column not in table.column_names:
            raise ValueError(
                f"{wanted[0].name} has no column {column!r}: its columns are {', '.join(table.column_names)}"
            )
    if limit is not None:
        table = table.slice(0, limit)
    if table.num_rows == 0:
        raise ValueError(f"{wanted[0].name} has no rows")
    labels = table["label"].to_pylist()
    missing = [row for row, label in enumerate(labels) if label is None]
    if missing:
        raise ValueError(f"row {missing[0]} of {wanted[0].name} has no label")
    values = sorted(set(labels))
    if all(isinstance(value, int) for value in values):
        if values[0] < 0:
            raise ValueError(
                f"column 'label' of {wanted[0].name} holds {values[0]}, allowed are numbers from 0 and names"
            )
        classes = tuple(str(value) for value in range(values[-1] + 1))
    else:
        index = {value: number for number, value in enumerate(values)}
        classes, labels = tuple(str(value) for value in values), [index[label] for label in labels]
    blobs = []
    for row, cell in enumerate(table["image"].to_pylist()):
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(data, bytes):
            raise ValueError(f"row {row} of {wanted[0].name} holds no image bytes in column 'image'")
        blobs.append((data, f"in row {row} of {wanted[0].name}"))
    return blobs, labels, classes


def _from_folders(path: Path, part: str, limit: int | None):
    root = next((path / name for name in PARTS[part] if (path / name).is_dir()), None)
    held_out = root is None
    root = path if held_out else root
    if held_out and any((path / name).is_dir() for names in PARTS.values() for name in names):
        raise ValueError(f"{path} has no {part} part: expected a folder named {' or '.join(PARTS[part])}")
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if not folders:
        raise ValueError(f"{root} has no class folders: expected CLASS/IMAGE.jpg")
    found: list[tuple[Path, int]] = []
    for label, folder in enumerate(folders):
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise ValueError(f"the class folder {folder} has no images ({', '.join(IMAGE_SUFFIXES)})")
        if held_out:
            files = [file for number, file in enumerate(files) if (number % 5 == 4) == (part == "test")]
        found += [(file, label) for file in files]
    if not found:
        raise ValueError(f"{root} has too few images for a {part} part: it takes five of a class")
    # A fixed shuffle, so that a limit takes from all classes.
    order = np.random.default_rng(0).permutation(len(found))[:limit]
    blobs = [(found[i][0], str(found[i][0])) for i in order]
    return blobs, [found[i][1] for i in order], tuple(folder.name for folder in folders)
