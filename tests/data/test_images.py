"""The user's own images: both layouts read, and every way they can be broken is one sentence."""

import io
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from saigen.data import digits, load_images, split
from saigen.trial import Trial


def picture(value: int, size=(40, 32), kind="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value // 2, 255 - value)).save(buffer, kind)
    return buffer.getvalue()


def parquet(path, rows, labels, column="label", image="image"):
    table = pa.table({image: [{"bytes": row, "path": None} for row in rows], column: labels})
    pq.write_table(table, path)


@pytest.fixture
def folder(tmp_path):
    for part, count in (("train", 6), ("test", 3)):
        for name in ("cat", "dog"):
            place = tmp_path / part / name
            place.mkdir(parents=True)
            for i in range(count):
                (place / f"{i}.png").write_bytes(picture(20 * i))
    return tmp_path


def test_folders(folder):
    images = load_images(folder, size=16)
    assert images.x.shape == (12, 3, 16, 16) and images.x.dtype == torch.uint8
    assert images.classes == ("cat", "dog") and images.y.bincount().tolist() == [6, 6]
    assert len(load_images(folder, size=16, part="test")) == 6
    assert len(load_images(folder, size=16, limit=5)) == 5


def test_folders_without_parts_hold_every_fifth_image_out(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(10):
            (tmp_path / name / f"{i}.png").write_bytes(picture(i))
    train, test = (load_images(tmp_path, size=8, part=part) for part in ("train", "test"))
    assert (len(train), len(test)) == (16, 4)


def test_parquet(tmp_path):
    parquet(tmp_path / "train-0.parquet", [picture(10), picture(250, kind="JPEG")], [1, 0])
    images = load_images(tmp_path, size=32)
    assert images.y.tolist() == [1, 0] and images.x.shape == (2, 3, 32, 32)
    assert images.x[0, 0, 0, 0] == 10


def test_the_fingerprint_is_of_the_pixels(tmp_path):
    parquet(tmp_path / "train.parquet", [picture(10), picture(20)], [1, 0])
    first = load_images(tmp_path, size=8).fingerprint
    parquet(tmp_path / "train.parquet", [picture(10), picture(21)], [1, 0])
    assert load_images(tmp_path, size=8).fingerprint != first


def break_truncated(path):
    file = path / "train" / "cat" / "0.png"
    file.write_bytes(file.read_bytes()[:60])
    return "cannot read the image"


def break_empty_class(path):
    (path / "train" / "emu").mkdir()
    return "has no images"


def break_no_part(path):
    import shutil

    shutil.rmtree(path / "train")
    return "has no train part"


@pytest.mark.parametrize("damage", [break_truncated, break_empty_class, break_no_part])
def test_broken_folders(folder, damage):
    said = damage(folder)
    with pytest.raises(ValueError, match=said):
        load_images(folder, size=16)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: parquet(p / "train.parquet", [picture(1)], [0], column="lable"), "no column 'label': its columns are image, lable"),
        (lambda p: parquet(p / "train.parquet", [picture(1)], [0], image="img"), "no column 'image'"),
        (lambda p: parquet(p / "train.parquet", [picture(1)[:50]], [0]), "in row 0 of train.parquet"),
        (lambda p: parquet(p / "train.parquet", [picture(1)], [None]), "row 0 of train.parquet has no label"),
        (lambda p: parquet(p / "train.parquet", [], pa.array([], pa.int64())), "has no rows"),
        (lambda p: (p / "train.parquet").write_bytes(b"PAR1 nonsense"), "cannot read the Parquet file"),
        (lambda p: parquet(p / "test.parquet", [picture(1)], [0]), "has no train part"),
        (lambda p: None, "no class folders"),
    ],
)  # fmt: skip
def test_broken_parquet(tmp_path, make, said):
    make(tmp_path)
    with pytest.raises(ValueError, match=said):
        load_images(tmp_path, size=16)


def test_no_path(tmp_path):
    with pytest.raises(ValueError, match="there is no data at"):
        load_images(tmp_path / "x", size=16)
    with pytest.raises(ValueError, match="give --data PATH"):
        Trial(0, "real").data("images", size=32)
    with pytest.raises(ValueError, match="allowed are digits and images"):
        Trial(0).data("mnist")


def test_digits_and_split():
    images = digits()
    assert images.x.shape == (1797, 1, 8, 8) and images.x.max() == 1.0
    train, test = split(images.y, (600, 897), np.random.default_rng(0))
    assert not set(train) & set(test)
    counts = np.bincount(images.y[train], minlength=10)
    assert counts.min() >= 55 and counts.max() <= 65
    with pytest.raises(ValueError, match="sizes"):
        split(10, (8, 3), np.random.default_rng(0))


def test_a_trial_is_a_function_of_its_seed():
    a, b, c = Trial(1), Trial(1), Trial(2)
    assert a.rng("x").random() == b.rng("x").random() != c.rng("x").random()
    assert a.rng("x").random() != a.rng("y").random()
    before = torch.get_rng_state()
    with a.seeded("w"):
        first = torch.rand(1)
    with b.seeded("w"):
        assert torch.equal(first, torch.rand(1))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (pa.array([0.0, float("nan")]), "row 1 of train.parquet has the label nan"),
        (pa.array([0, 2**40]), "row 1 of train.parquet has the label 1099511627776"),
        (pa.array([[0], [1]]), "column 'label' of train.parquet is of type list<"),
    ],
)
def test_labels_that_are_no_classes(tmp_path, labels, said):
    from saigen.data.checks import check_labels

    pq.write_table(pa.table({"image": [picture(1), picture(2)], "label": labels}), tmp_path / "train.parquet")
    for path in (tmp_path, tmp_path / "train.parquet"):
        with pytest.raises(ValueError, match=re.escape(said)):
            check_labels(path)


@pytest.mark.parametrize("labels", [["cat", "dog"], [0, 9], [None, 1], [1.0, 2.0]])
def test_labels_that_are_classes_or_the_readers_matter(tmp_path, labels):
    from saigen.data.checks import check_labels

    pq.write_table(pa.table({"image": [picture(1), picture(2)], "label": labels}), tmp_path / "train.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nonsense")
    check_labels(tmp_path)
    check_labels(tmp_path / "there is none")
