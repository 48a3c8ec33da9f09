"""Labels and probabilities are brought together by name, by number or by order, and what does not fit is named."""

import re

import numpy as np
import pytest
from PIL import Image

from saigen.data.predictions import matching_columns, read_classes, read_predictions


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_columns_are_matched_to_classes_by_their_names(tmp_path):
    text = "label,p_dog,p_cat,p_owl\ndog,0.8,0.1,0.1\ncat,0.2,0.7,0.1\n"
    found = read_predictions(write(tmp_path / "a.csv", text), pred_probs="p_*", label="label")
    # The class without an example is called what its column is called.
    assert found.classes == ("dog", "cat", "p_owl") and found.given.tolist() == [0, 1] and len(found) == 2
    assert found.probabilities[1].tolist() == [0.2, 0.7, 0.1] and found.fields == {} and found.images is None


def test_numbers_are_the_columns_and_other_names_the_sorted_order(tmp_path):
    numbers = read_predictions(
        write(tmp_path / "n.tsv", "y\ta\tb\tc\n2\t0.1\t0.1\t0.8\n0\t1\t0\t0\n"), pred_probs="a,b,c"
    )
    assert numbers.classes == ("0", "1", "2") and numbers.given.tolist() == [2, 0]
    np.save(tmp_path / "P.npy", np.array([[0.9, 0.1], [0.2, 0.8]]))
    named = read_predictions(write(tmp_path / "s.csv", "text,class\nhello,yes\nbye,no\n"), pred_probs=str(tmp_path / "P.npy"))  # fmt: skip
    assert (
        named.classes == ("no", "yes") and named.given.tolist() == [1, 0] and named.fields == {"text": ["hello", "bye"]}
    )


def test_longest_name_wins():
    table = {"p_cat": [0.5], "p_wild cat": [0.5], "q": [1]}
    assert matching_columns(table, "p_*, q") == ["p_cat", "p_wild cat", "q"]


def test_images_of_a_table_lie_beside_it(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    text = "path,label,p_x,p_y\na.png,x,0.9,0.1\na.png,y,0.9,0.1\n"
    found = read_predictions(write(tmp_path / "t.csv", text), pred_probs="p_*")
    assert found.images == (tmp_path / "a.png", tmp_path / "a.png")


def test_predictions_of_models_are_names_numbers_or_probabilities(tmp_path):
    found = read_predictions(write(tmp_path / "a.csv", "label,p_x,p_y\nx,0.9,0.1\ny,0.9,0.1\n"), pred_probs="p_*")
    assert read_classes(["y", "x"], found, "m").tolist() == [1, 0]
    assert read_classes(np.array([[0.1, 0.9], [0.6, 0.4]]), found, "m").tolist() == [1, 0]
    with pytest.raises(ValueError, match="m: there is no class 'z', the classes are x, y"):
        read_classes(["y", "z"], found, "m")
    with pytest.raises(ValueError, match=re.escape("m has shape (3,)")):
        read_classes([0, 1, 1], found, "m")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("label,p_x,p_y\n", {"pred_probs": "p_*"}, "has no rows"),
        ("a,p_x,p_y\nx,1,0\n", {"pred_probs": "p_*"}, "which column holds the labels"),
        ("label,p_x,p_y\nx,1,0\n,0,1\n", {"pred_probs": "p_*"}, "row 1"),
        ("label,p_x\nx,1\ny,0\nz,0\n", {"pred_probs": "p_*"}, "3 classes, the probabilities 1 columns"),
        ("label,p_x,p_y\nx,1,0\ny,0,1\n", {"pred_probs": "none.npy"}, "there is no file none.npy"),
        ("label,p_x,p_y\nx,1,0\ny,0,1\n", {}, "needs predicted probabilities"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, text, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_predictions(write(tmp_path / "a.csv", text), **options)


def test_folders_without_classes_or_rows_are_named(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "train" / "cat" / "a.png")
    with pytest.raises(ValueError, match="has parts, not classes: give one of train"):
        read_predictions(tmp_path, pred_probs="P.npy")
    with pytest.raises(ValueError, match="needs predicted probabilities"):
        read_predictions(tmp_path / "train")
    write(tmp_path / "P.csv", "path,cat,dog\nother.png,1,0\n")
    with pytest.raises(ValueError, match=r"no row for the image cat/a\.png"):
        read_predictions(tmp_path / "train", pred_probs=str(tmp_path / "P.csv"))
    with pytest.raises(ValueError, match="allowed are"):
        read_predictions(write(tmp_path / "a.xls", "x"), pred_probs="p")
