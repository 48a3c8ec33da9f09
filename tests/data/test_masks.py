"""CamVid-like folders: what is read, what is made of it for training, and what is said when something is wrong."""

import numpy as np
import pytest
import torch
from PIL import Image

from saigen.data.masks import load_masks


@pytest.fixture
def folder(tmp_path):
    """Two parts of three images of 30x20 pixels with four classes and a few unlabelled pixels."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for kind in ("images", "labels"):
            (tmp_path / part / kind).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(
                tmp_path / part / "images" / f"{i}.jpg"
            )
            labels = rng.integers(0, 4, (20, 30), dtype=np.uint8)
            labels[0, :5] = 255
            Image.fromarray(labels).save(tmp_path / part / "labels" / f"{i}.png")
    return tmp_path


def test_reads_images_and_labels(folder):
    masks = load_masks(folder)
    assert len(masks) == 3 and masks.classes == ("0", "1", "2", "3") and masks.name == folder.name
    image, label = masks[1]
    assert image.shape == (3, 20, 30) and image.dtype == label.dtype == torch.uint8
    stored = np.asarray(Image.open(folder / "train" / "labels" / "1.png"))
    assert np.array_equal(label, stored)
    assert masks.fingerprint == load_masks(folder).fingerprint != load_masks(folder, part="test").fingerprint
    assert [path.stem for path in masks.subset([2, 0]).images] == ["2", "0"]
    assert len(load_masks(folder, limit=2)) == 2


def test_resizes_masks_by_the_nearest_pixel(folder):
    image, label = load_masks(folder, size=(10, 45))[0]
    assert image.shape == (3, 10, 45) and label.shape == (10, 45)
    assert set(label.unique().tolist()) <= {0, 1, 2, 3, 255}


def test_reads_palette_masks_and_names(folder):
    path = folder / "train" / "labels" / "0.png"
    indices = Image.fromarray(np.asarray(Image.open(path)) % 4)
    indices.putpalette([7] * 768)
    indices.save(path)
    (folder / "classes.txt").write_text("sky\nroad\ncar\nvoid\n")
    masks = load_masks(folder)
    assert masks.classes == ("sky", "road", "car", "void")
    assert set(masks[0][1].unique().tolist()) == {0, 1, 2, 255}


def test_decodes_only_when_asked(folder):
    (folder / "train" / "images" / "2.jpg").write_bytes(b"no image")
    masks = load_masks(folder)
    assert masks[0]
    with pytest.raises(ValueError, match=r"cannot read the image .*2\.jpg"):
        masks[2]


def test_crops_are_a_function_of_the_generator(folder):
    masks = load_masks(folder)
    crops = lambda seed: masks.crops([0, 1, 2, 0], (16, 24), torch.Generator().manual_seed(seed))  # noqa: E731
    x, y = crops(0)
    assert x.shape == (4, 3, 16, 24) and x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1
    assert y.shape == (4, 16, 24) and y.dtype == torch.int64 and set(y.unique().tolist()) <= {0, 1, 2, 3, 255}
    again = crops(0)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and not torch.equal(x, crops(1)[0])


def test_a_crop_without_changes_is_the_image(folder):
    masks = load_masks(folder)
    generator = torch.Generator().manual_seed(0)
    x, y = masks.crops([1], (20, 30), generator, scale=(1, 1), flip=0, photometric=False)
    image, label = masks[1]
    torch.testing.assert_close(x[0], image / 255)
    assert torch.equal(y[0], label.long())
    x, y = masks.crops([1], (20, 30), generator, scale=(1, 1), flip=1, photometric=False)
    torch.testing.assert_close(x[0], image.flip(-1) / 255)
    x, y = masks.crops([1], (32, 40), generator, scale=(1, 1), flip=0, photometric=False)
    assert (y[0, 20:] == 255).all() and (y[0, :, 30:] == 255).all() and torch.equal(y[0, :20, :30], label.long())


def test_says_what_is_wrong(folder):
    def fails(text, **options):
        with pytest.raises(ValueError, match=text):
            masks = load_masks(options.pop("path", folder), **options)
            for i in range(len(masks)):
                masks[i]

    fails("there is no folder", path=folder / "nowhere")
    fails("part is 'dev', allowed are", part="dev")
    fails("size is", size=(0, 10))
    fails("limit is 0", limit=0)
    fails("class number 3, allowed are 0 to 1", num_classes=2)
    (folder / "classes.txt").write_text("one\ntwo\nthree\n")
    fails("0.png holds the class number 3, allowed are 0 to 2 and 255")
    (folder / "classes.txt").unlink()
    first = folder / "train" / "labels" / "0.png"
    whole = first.read_bytes()
    Image.fromarray(np.zeros((20, 29), np.uint8)).save(first)
    fails("0.png is 29x20, its image 30x20")
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(first)
    fails(r"0.png holds colours \(mode RGB\)")
    first.write_bytes(whole[: len(whole) // 2])
    fails("cannot read the mask .*0.png")
    first.unlink()
    fails("0.jpg has no mask .*0.png")
    for image in (folder / "train" / "images").iterdir():
        image.unlink()
    fails("has no images")
    (folder / "train" / "images").rmdir()
    fails("has no folder 'images'")
    fails("has no train part", path=folder / "test")
