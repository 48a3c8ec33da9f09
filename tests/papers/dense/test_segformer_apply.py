"""`saigen apply segformer` on a folder of photos: what is written, and what is said of bad input."""

import numpy as np
import pytest
import torch
from PIL import Image

from saigen import weights
from saigen.papers.dense.segformer import segformer_b0
from saigen.papers.dense.segformer.apply import apply, default_palette, load_segmenter, segment


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    weights.save(segformer_b0(num_classes=6), path)
    return str(path)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, shape in (("a.jpg", (50, 70, 3)), ("b.png", (64, 40, 3))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    return folder


def test_colours_a_folder(photos, checkpoint, tmp_path):
    out = tmp_path / "out"
    said = apply([photos], out, weights=checkpoint, size=64)
    assert said.startswith("2 photos coloured") and str(out) in said
    assert sorted(file.name for file in out.iterdir()) == ["a.png", "a_overlay.png", "b.png", "b_overlay.png"]
    indices = Image.open(out / "a.png")
    assert indices.mode == "P" and indices.size == (70, 50)
    pixels = np.asarray(Image.open(photos / "a.jpg").convert("RGB"))
    labels = segment(load_segmenter(checkpoint).eval(), pixels, 64)
    assert np.array_equal(np.asarray(indices), labels) and labels.max() < 6
    colours = default_palette(6)[labels]
    assert np.array_equal(np.asarray(indices.convert("RGB")), colours)
    overlay = np.asarray(Image.open(out / "a_overlay.png")).astype(int)
    assert np.abs(overlay - (pixels.astype(int) + colours) / 2).max() <= 0.5


def test_sliding_and_palette(photos, checkpoint, tmp_path):
    (tmp_path / "colours.txt").write_text("\n".join(f"{i} {i + 1} {i + 2}" for i in range(6)))
    apply(
        [photos / "a.jpg"],
        tmp_path / "o",
        weights=checkpoint,
        size=48,
        sliding=True,
        palette=tmp_path / "colours.txt",
        opacity=1.0,
    )
    overlay = np.asarray(Image.open(tmp_path / "o" / "a_overlay.png"))
    assert np.array_equal(overlay[..., 0], np.asarray(Image.open(tmp_path / "o" / "a.png")))


def test_bad_input_says_one_sentence_and_writes_nothing(photos, checkpoint, tmp_path):
    out = tmp_path / "out"

    def fails(text, inputs=None, **options):
        with pytest.raises(ValueError, match=text) as error:
            apply(inputs or [photos], out, **{"weights": checkpoint, "size": 64, **options})
        assert "\n" not in str(error.value) and not out.exists()

    fails("size is 8", size=8)
    fails("opacity is 2", opacity=2.0)
    fails("no photo or folder", [tmp_path / "nowhere.jpg"])
    fails("has no photos", [tmp_path / "photos", tmp_path])
    fails("there is no such file or folder", weights="nowhere.safetensors")
    fails("device is 'abacus'", device="abacus")
    (tmp_path / "few.txt").write_text("1 2 3\n")
    fails("has 1 colours", palette=tmp_path / "few.txt")
    (tmp_path / "odd.txt").write_text("1 2 3\n" * 5 + "1 2 300\n")
    fails("line 6 of the palette", palette=tmp_path / "odd.txt")
    weights.save(torch.nn.Linear(2, 2), tmp_path / "other.safetensors")
    fails("no SegFormer with a decoder", weights=str(tmp_path / "other.safetensors"))
    (photos / "b.jpg").write_bytes((photos / "a.jpg").read_bytes())
    fails("would both be written to b.png")
    (photos / "b.jpg").unlink()
    whole = (photos / "a.jpg").read_bytes()
    (photos / "a.jpg").write_bytes(whole[: len(whole) // 2])
    fails("cannot read the image .*a.jpg")
    (photos / "a.jpg").write_bytes(b"")
    fails("cannot read the image .*a.jpg")
    with pytest.raises(ValueError, match="overwritten"):
        apply([photos / "b.png"], photos, weights=checkpoint)
