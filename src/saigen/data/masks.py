"""The user's own images with index masks, for segmentation: CamVid-like folders.

``{train,val,test}/images/NAME.jpg`` (or another image format) goes with ``{train,val,test}/labels/NAME.png``, an image of
the same size whose pixels are class numbers from 0; 255 is unlabelled. A file ``classes.txt`` beside the parts names the
classes, a line each; those called ``void``, ``ignore`` or ``unlabelled`` do not count. Without it the classes are the
numbers found in the part that is read.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from saigen.data.images import IMAGE_SUFFIXES, decode

PARTS = {"train": ("train",), "val": ("val", "validation", "test"), "test": ("test", "val", "validation")}
VOID = ("void", "ignore", "unlabelled", "unlabeled")
IGNORE_LABEL = 255


@dataclass(frozen=True)
class Masks:
    """Images with index masks, read from their files only when asked for.

    ``masks[i]`` is an image, ``(3, h, w)`` uint8, and its labels, ``(h, w)`` uint8, where 255 does not count.
    """

    images: tuple[Path, ...]
    labels: tuple[Path, ...]
    classes: tuple[str, ...]
    name: str
    fingerprint: str
    size: tuple[int, int] | None = None
    """The height and width that every image is resized to; None leaves each as it is."""
    void: tuple[int, ...] = ()
    """Class numbers that do not count; read as 255."""

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One image and its labels; raises ``ValueError`` that names the file where they do not go together."""
        image_path, label_path = self.images[index], self.labels[index]
        image = decode(image_path, str(image_path), self.size)
        label = _read_indices(label_path)
        if self.size is None and label.shape != image.shape[:2]:
            sizes = f"{label.shape[1]}x{label.shape[0]}, its image {image.shape[1]}x{image.shape[0]}"
            raise ValueError(f"the mask {label_path} is {sizes}, allowed are masks of their image's size")
        counted = label[label != IGNORE_LABEL]
        if counted.size and counted.max() >= len(self.classes):
            raise ValueError(
                f"the mask {label_path} holds the class number {counted.max()}, allowed are 0 to {len(self.classes) - 1} "
                f"and {IGNORE_LABEL} (unlabelled)"
            )
        if self.void:
            label = np.where(np.isin(label, self.void), IGNORE_LABEL, label)
        if self.size is not None and label.shape != self.size:
            label = np.asarray(
                Image.fromarray(label.astype(np.uint8)).resize(self.size[::-1], Image.Resampling.NEAREST)
            )
        image, label = torch.from_numpy(image.copy()), torch.from_numpy(label.astype(np.uint8))
        return image.permute(2, 0, 1).contiguous(), label

    def subset(self, indices: Sequence[int] | np.ndarray | Tensor) -> "Masks":
        """The images at ``indices``; name and fingerprint stay those of the whole set."""
        picked = [int(i) for i in indices]
        return replace(self, images=tuple(self.images[i] for i in picked), labels=tuple(self.labels[i] for i in picked))

    def crops(
        self,
        indices: Sequence[int] | Tensor,
        size: int | tuple[int, int],
        generator: torch.Generator,
        *,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: float = 0.5,
        largest_class: float = 0.75,
        photometric: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """A training batch as the segmentation codebases make it: ``(b, 3, h, w)`` float32 in [0, 1], ``(b, h, w)`` int64.

        Each image is resized by a factor drawn from ``scale``, cropped to ``size`` (up to ten times anew while one class
        has more than ``largest_class`` of the crop), mirrored with probability ``flip``, and its brightness, contrast and
        saturation are changed. What an image is too small for is filled with the mean colour and 255.
        """
        h, w = (size, size) if isinstance(size, int) else size
        pairs = [_crop(*self[int(i)], h, w, generator, scale, flip, largest_class, photometric) for i in indices]
        return torch.stack([image for image, _ in pairs]), torch.stack([label for _, label in pairs])


def load_masks(
    path: str | Path,
    *,
    part: str = "train",
    size: tuple[int, int] | None = None,
    limit: int | None = None,
    num_classes: int | None = None,
) -> Masks:
    """The images and index masks of one ``part`` (``"train"``, ``"val"`` or ``"test"``) of the folder ``path``.

    ``size`` (height, width) resizes them all, masks by the nearest pixel; ``limit`` takes the first so many of a fixed
    shuffle; ``num_classes`` says how many classes there are, where the part need not hold them all (``test``) and there is
    no ``classes.txt``. Raises ``ValueError`` that names what is missing or does not go together.
    """
    path = Path(path)
    if part not in PARTS:
        raise ValueError(f"part is {part!r}, allowed are {', '.join(map(repr, PARTS))}")
    if size is not None and min(size) < 1:
        raise ValueError(f"size is {size}, allowed is a height and a width of 1 pixel or more")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, allowed is 1 or more")
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}: give one with {part}/images and {part}/labels")
    root = next((path / name for name in PARTS[part] if (path / name).is_dir()), None)
    if root is None:
        raise ValueError(f"{path} has no {part} part: expected {part}/images and {part}/labels in it")
    for folder in ("images", "labels"):
        if not (root / folder).is_dir():
            raise ValueError(
                f"{root} has no folder {folder!r}: expected images and, of the same names, labels/NAME.png"
            )
    images = sorted(file for file in (root / "images").iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise ValueError(f"{root / 'images'} has no images ({', '.join(IMAGE_SUFFIXES)})")
    labels = [root / "labels" / f"{file.stem}.png" for file in images]
    missing = [(image, label) for image, label in zip(images, labels, strict=True) if not label.is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more have none)" if len(missing) > 1 else ""
        raise ValueError(f"the image {missing[0][0]} has no mask {missing[0][1]}{more}")
    if limit is not None:
        order = sorted(np.random.default_rng(0).permutation(len(images))[:limit])
        images, labels = [images[i] for i in order], [labels[i] for i in order]
    classes, void = _classes(path, labels, num_classes)
    digest = hashlib.sha256(repr((classes, void, size)).encode())
    for file in (*images, *labels):
        digest.update(file.name.encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return Masks(tuple(images), tuple(labels), classes, path.name, digest.hexdigest(), size, void)


def _classes(path: Path, labels: list[Path], num_classes: int | None) -> tuple[tuple[str, ...], tuple[int, ...]]:
    named = path / "classes.txt"
    if named.is_file():
        try:
            lines = named.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {named}: {error}") from error
        classes = tuple(line.strip() for line in lines if line.strip())
        if not classes:
            raise ValueError(f"{named} names no classes: expected a name a line")
        return classes, tuple(i for i, name in enumerate(classes) if name.lower() in VOID)
    if num_classes is None:
        highest = [values[values != IGNORE_LABEL].max(initial=0) for values in map(_read_indices, labels)]
        num_classes = int(max(highest)) + 1
    return tuple(str(i) for i in range(num_classes)), ()


def _read_indices(path: Path) -> np.ndarray:
    try:
        image = Image.open(path)
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the mask {path}: {error}") from error
    if image.mode not in ("L", "P", "1", "I", "I;16"):
        raise ValueError(
            f"the mask {path} holds colours (mode {image.mode}), allowed are class numbers: grey levels or a palette"
        )
    return np.asarray(image).astype(np.int64)


def _crop(
    image: Tensor,
    label: Tensor,
    h: int,
    w: int,
    generator: torch.Generator,
    scale: tuple[float, float],
    flip: float,
    largest_class: float,
    photometric: bool,
) -> tuple[Tensor, Tensor]:
    def draw(low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    factor = draw(*scale)
    size = [max(1, round(side * factor)) for side in label.shape]
    image = F.interpolate(image[None].float() / 255, size, mode="bilinear", align_corners=False, antialias=True)[0]
    label = F.interpolate(label[None, None].float(), size, mode="nearest-exact")[0, 0].long()
    down, right = max(0, h - size[0]), max(0, w - size[1])
    if down or right:
        mean = image.mean((1, 2), keepdim=True)
        image = F.pad(image - mean, (0, right, 0, down)) + mean
        label = F.pad(label, (0, right, 0, down), value=IGNORE_LABEL)
    for _ in range(10):
        top, left = int(draw() * (label.shape[0] - h + 1)), int(draw() * (label.shape[1] - w + 1))
        window = label[top : top + h, left : left + w]
        counts = torch.bincount(window[window != IGNORE_LABEL], minlength=2)
        if (counts > 0).sum() > 1 and counts.max() < largest_class * counts.sum():
            break
    image = image[:, top : top + h, left : left + w]
    if draw() < flip:
        image, window = image.flip(-1), window.flip(-1)
    if photometric:
        # Each with probability 1/2: brightness by up to 32 of 255 levels, contrast and saturation by factors of 0.5 to 1.5.
        if draw() < 0.5:
            image = image + draw(-32 / 255, 32 / 255)
        if draw() < 0.5:
            image = image * draw(0.5, 1.5)
        if draw() < 0.5:
            grey = image.mean(0, keepdim=True)
            image = grey + (image - grey) * draw(0.5, 1.5)
        image = image.clamp(0, 1)
    return image.contiguous(), window.contiguous()
