"""Colours photos by what a SegFormer sees in them."""

import colorsys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image

from saigen import weights as checkpoints
from saigen.data.images import IMAGE_SUFFIXES, decode
from saigen.files import replacing
from saigen.papers.dense import segformer as room
from saigen.papers.dense.segformer.model import (
    DECODER,
    DEPTHS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    WIDTHS,
    SegFormer,
    aligned_size,
)


def apply(
    inputs: Annotated[list[Path], typer.Argument(help="Photos, or folders of photos.")],
    out: Annotated[Path, typer.Option(help="The folder to write NAME.png (class numbers) and NAME_overlay.png to.")],
    *,
    weights: Annotated[
        str, typer.Option(help="A checkpoint file or folder, or a Hub id (nvidia/segformer-b0-finetuned-ade-512-512).")
    ],
    size: Annotated[int, typer.Option(help="The short side photos are looked at with, in pixels.")] = 512,
    sliding: Annotated[
        bool, typer.Option("--sliding", help="Look at the photo as it is, by windows of SIZE pixels every 3/4 SIZE.")
    ] = False,
    palette: Annotated[Path | None, typer.Option(help="A text file of colours, R G B a line, a line a class.")] = None,
    opacity: Annotated[float, typer.Option(help="How much of the overlay is colour, from 0 to 1.")] = 0.5,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, …")] = "cpu",
) -> str:
    """Writes, for each photo, a PNG of class numbers in palette colours and the photo with the colours laid over it."""
    if size < 32:
        raise ValueError(f"size is {size}, allowed is 32 pixels or more")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity is {opacity}, allowed is 0 to 1")
    photos = find_photos(inputs, out)
    model = load_segmenter(weights)
    if not 0 < model.num_classes <= 256:
        raise ValueError(
            f"the checkpoint has {model.num_classes} classes, allowed are 1 to 256, as a PNG of class numbers holds"
        )
    colours = default_palette(model.num_classes) if palette is None else read_palette(palette, model.num_classes)
    try:
        model = model.eval().to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {device!r}, which is not to be had here: {str(error).splitlines()[0]}") from error
    for (
        photo
    ) in photos:  # all are read once before anything is written: a broken one must not leave half the work behind
        decode(photo, str(photo))
    for photo in photos:
        pixels = decode(photo, str(photo))
        labels = segment(model, pixels, size, sliding)
        indices = Image.fromarray(labels)
        indices.putpalette(colours.tobytes())
        overlay = Image.fromarray(((1 - opacity) * pixels + opacity * colours[labels]).round().astype(np.uint8))
        for image, name in ((indices, f"{photo.stem}.png"), (overlay, f"{photo.stem}_overlay.png")):
            with replacing(out / name) as temporary:
                image.save(temporary, format="PNG")
    return f"{len(photos)} photo{'s' if len(photos) > 1 else ''} coloured: class numbers and overlays are in {out}"


def find_photos(inputs: list[Path], out: Path) -> list[Path]:
    """The photos among ``inputs`` and in the folders there; ``ValueError`` where two would be written to one file."""
    photos: list[Path] = []
    for given in inputs:
        if given.is_dir():
            found = sorted(file for file in given.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise ValueError(f"the folder {given} has no photos ({', '.join(IMAGE_SUFFIXES)})")
            photos += found
        elif given.is_file():
            photos.append(given)
        else:
            raise ValueError(f"there is no photo or folder {given}")
    written: dict[str, Path] = {}
    for photo in photos:
        if photo.parent.resolve() == out.resolve():
            raise ValueError(
                f"out is {out}, the folder of {photo.name} itself: give another, so that no photo is overwritten"
            )
        for name in (photo.stem, f"{photo.stem}_overlay"):
            if name in written:
                raise ValueError(
                    f"{written[name]} and {photo} would both be written to {name}.png: apply them to different folders"
                )
            written[name] = photo
    return photos


def load_segmenter(source: str) -> SegFormer:
    """The SegFormer whose checkpoint this is, of B0 to B5 and any number of classes, with its weights."""
    state = SegFormer.convert_state_dict(checkpoints.read(source))
    predicted = state.get("decode_head.linear_pred.weight")
    first = state.get("backbone.patch_embed1.proj.weight")
    if predicted is None or first is None:
        raise ValueError(
            f"weights is {source!r}, which is no SegFormer with a decoder: it has no decode_head.linear_pred"
        )
    depths = tuple(
        len({key.split(".")[2] for key in state if key.startswith(f"backbone.block{i}.")}) for i in range(1, 5)
    )
    found = (first.shape[0], depths, predicted.shape[1])
    size = next((b for b in WIDTHS if (WIDTHS[b][0], DEPTHS[b], DECODER[b]) == found), None)
    if size is None:
        raise ValueError(
            f"weights is {source!r}, a SegFormer of depths {depths} and {first.shape[0]} channels, allowed are B0 to B5"
        )
    model = getattr(room, f"segformer_{size}")(
        num_classes=predicted.shape[0], in_chans=first.shape[1], early_fusion=True
    )
    if model.backbone.in_chans != 3:
        raise ValueError(f"weights is {source!r}, for images of {first.shape[1]} channels, allowed is 3")
    return checkpoints.load(model, state)


@torch.inference_mode()
def segment(model: SegFormer, pixels: np.ndarray, size: int = 512, sliding: bool = False) -> np.ndarray:
    """Class numbers, ``(h, w)`` uint8, of a photo, ``(h, w, 3)`` uint8: whole after AlignedResize, or by windows."""
    h, w = pixels.shape[:2]
    seen = (max(h, 32), max(w, 32)) if sliding else aligned_size(h, w, short_side=size, long_side=4 * size)
    image = Image.fromarray(pixels).resize(seen[::-1], Image.Resampling.BILINEAR)
    x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
    x = (x - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    windows = {"crop": size, "stride": 3 * size // 4} if sliding else {}
    device = next(model.parameters()).device
    return model.predict(x.to(device), (h, w), **windows)[0].byte().cpu().numpy()


def default_palette(count: int) -> np.ndarray:
    """``count`` colours, ``(count, 3)`` uint8: hues a golden ratio apart, so that neighbouring numbers differ."""
    colours = [
        colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.85 - 0.35 * (i // 4 % 2), 0.95 - 0.3 * (i // 2 % 2))
        for i in range(count)
    ]
    return (np.array(colours) * 255).round().astype(np.uint8)


def read_palette(path: Path, count: int) -> np.ndarray:
    """The colours in a text file, ``R G B`` a line; ``ValueError`` where a line is none or there are too few."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the palette {path}: {error}") from error
    if len(lines) < count:
        raise ValueError(f"the palette {path} has {len(lines)} colours, allowed is one for each of the {count} classes")
    colours = []
    for number, line in enumerate(lines[:count], start=1):
        values = line.replace(",", " ").split()[:3]
        if len(values) < 3 or not all(value.isdecimal() and int(value) <= 255 for value in values):
            raise ValueError(
                f"line {number} of the palette {path} is {line!r}, allowed are three numbers from 0 to 255"
            )
        colours.append([int(value) for value in values])
    return np.array(colours, np.uint8)
