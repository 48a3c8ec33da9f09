import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from saigen.data.tables import clusters_table, embedded_table, read_tables, threshold_table


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_embedded_tables_keep_classes_and_quantities_apart():
    cancer, diabetes = embedded_table("breast_cancer"), embedded_table("diabetes")
    assert cancer.x.shape == (569, 30) and cancer.classes == ("malignant", "benign") and cancer.task == "classification"
    assert diabetes.classes is None and diabetes.y.dtype == np.float64 and diabetes.task == "regression"
    assert cancer.take([3, 5]).y.tolist() == cancer.y[[3, 5]].tolist() and len(cancer.take([3, 5])) == 2
    assert cancer.fingerprint != cancer.take([3, 5]).fingerprint
    with pytest.raises(ValueError, match="name is 'boston', allowed are breast_cancer, diabetes"):
        embedded_table("boston")


def test_drawn_tables_are_a_function_of_the_generator():
    for draw in (clusters_table, threshold_table):
        first, again, other = (draw(np.random.default_rng(seed)) for seed in (3, 3, 4))
        assert np.array_equal(first.x, again.x) and not np.array_equal(first.x, other.x)
        assert set(first.y) == set(range(len(first.classes)))


def test_two_splits_solve_the_threshold_table_until_it_is_rotated():
    from sklearn.tree import DecisionTreeClassifier

    scores = []
    for rotated in (False, True):
        table = threshold_table(np.random.default_rng(0), rows=2_000, columns=6, rotated=rotated)
        columns = [(a, b) for a in range(6) for b in range(6) if a != b]
        # The best of all pairs of columns, each as one split under another.
        scores.append(
            max(
                DecisionTreeClassifier(max_depth=4, max_leaf_nodes=8, random_state=0)
                .fit(table.x[:, pair], table.y)
                .score(table.x[:, pair], table.y)
                for pair in map(list, columns)
            )
        )
    assert scores[0] > 0.95 > 0.75 > scores[1]


def test_reads_a_table_without_header_with_categories_and_empty_cells(tmp_path):
    file = write(tmp_path, "people.csv", "M, 0.5, ?, yes\nF, , a, no\nM, 1.5, b, yes\n")
    (table,) = read_tables(file)
    assert table.name == "people" and table.classes == ("no", "yes") and table.y.tolist() == [1, 0, 1]
    assert table.categorical == (0, 2) and table.columns == ("column 0", "column 1", "column 2")
    expected = [[1, 0.5, np.nan], [0, np.nan, 0], [1, 1.5, 1]]
    assert np.array_equal(table.x, expected, equal_nan=True)


def test_reads_a_header_and_the_named_target(tmp_path):
    (table,) = read_tables(write(tmp_path, "a.csv", "Class;width\nx;1\ny;2\n"))
    assert table.columns == ("width",) and table.classes == ("x", "y") and table.x.tolist() == [[1.0], [2.0]]


def test_whole_numbers_are_classes_and_many_of_them_a_quantity(tmp_path):
    (few,) = read_tables(write(tmp_path, "few.csv", "".join(f"0.5,{row % 3 + 3}\n" for row in range(9))))
    (many,) = read_tables(write(tmp_path, "many.csv", "".join(f"0.5,{row}\n" for row in range(30))))
    assert few.classes == ("3", "4", "5") and few.y.tolist() == [0, 1, 2] * 3
    assert many.classes is None and many.y.tolist() == list(range(30))


def test_training_and_test_files_are_one_table_with_one_numbering(tmp_path):
    write(tmp_path, "adult-train.csv", "1,Private,<=50K\n2,State,>50K\n")
    write(tmp_path, "adult-test.csv", "3,Local,<=50K.\n")
    write(tmp_path, "other.csv", "1,a\n2,b\n")
    adult, other = read_tables(tmp_path)
    assert (adult.name, other.name) == ("adult", "other")
    assert adult.classes == ("<=50K", ">50K") and adult.y.tolist() == [0, 0, 1]
    assert adult.x.tolist() == [[3, 0], [1, 1], [2, 2]]


def test_reads_parquet(tmp_path):
    columns = {"size": [1.0, None, 3.0], "kind": ["a", "b", None], "target": [0.25, 0.5, 0.75]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    (table,) = read_tables(tmp_path / "t.parquet")
    assert table.classes is None and table.categorical == (1,) and table.y.tolist() == [0.25, 0.5, 0.75]
    assert np.array_equal(table.x, [[1, 0], [np.nan, 1], [3, np.nan]], equal_nan=True)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no rows"),
        ("a,b\n", "has no rows"),
        ("1,2\n1\n", "line 2 of .* has 1 cells, the first has 2"),
        ("1\n2\n", "has 1 column, needed are a target and at least one more"),
        ("1,a\n2,\n", "row 1 of t.csv has no target"),
        ("1,a\n2,a\n", "has the target a, needed are at least 2 classes"),
        (",a\n,b\n", "column 'column 0' .* is empty in every row"),
        ("1,a\ninf,b\n", "row 1 of t.csv has inf in column 'column 0', allowed are finite numbers"),
        ("1,0.5\n2,inf\n", "row 1 of t.csv has inf in the target"),
    ],
)
def test_says_what_is_wrong_with_a_table(tmp_path, text, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_tables(write(tmp_path, "t.csv", text))


def test_says_what_is_wrong_with_a_path(tmp_path):
    with pytest.raises(ValueError, match="there is no file or folder"):
        read_tables(tmp_path / "nothing")
    with pytest.raises(ValueError, match="has no tables"):
        read_tables(tmp_path)
    with pytest.raises(ValueError, match=r"ends in \.txt, allowed are \.csv"):
        read_tables(write(tmp_path, "t.txt", "1,2\n"))
    write(tmp_path, "a-train.csv", "1,0.5\n")
    write(tmp_path, "a-test.csv", "1,2,0.5\n")
    with pytest.raises(ValueError, match="has other columns than"):
        read_tables(tmp_path)
    (tmp_path / "t.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="cannot read"):
        read_tables(tmp_path / "t.parquet")
