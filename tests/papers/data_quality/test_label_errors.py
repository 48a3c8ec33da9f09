"""Label errors: the official answers recounted, the ranking against brute force, the tool on files, the claims."""

import csv
import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from saigen.papers.data_quality.label_errors import (
    ANSWERS,
    KINDS,
    Benchmark,
    Ranking,
    candidate_errors,
    claims,
    consensus,
    correct,
    error_rate_interval,
    extrapolated_error_rate,
    noise_prevalence,
    read_votes,
    thin,
)
from saigen.papers.data_quality.label_errors.apply import apply
from saigen.trial import Trial

GOLDEN = Path(__file__).parents[2] / "golden" / "label_errors" / "votes.json"
# Candidates checked, errors, correctable, both, neither (off-topic and neutral among them), no agreement: Table 1.
TABLE = {
    "mnist": (100, 15, 10, 0, 3, 2),
    "cifar10": (275, 54, 18, 0, 4, 32),
    "cifar100": (2235, 585, 318, 20, 37, 210),
    "caltech256": (2360, 458, 221, 115, 23, 99),
    "imagenet": (5440, 2916, 1428, 597, 293, 598),
    "quickdraw": (2500, 1870, 1047, 20, 240, 563),
    "20news": (93, 82, 22, 12, 5, 43),
    "imdb": (1310, 725, 173, 0, 208, 344),
    "amazon": (1000, 732, 302, 0, 103, 327),
}
SIZES = {"mnist": 10_000, "cifar10": 10_000, "cifar100": 10_000, "caltech256": 29_780, "imagenet": 50_000, "20news": 7532, "imdb": 25_000}  # fmt: skip


# People -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def votes():
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("name", TABLE)
def test_official_answers_give_the_table(votes, name):
    rows = np.array(votes[name])
    kinds = np.repeat(consensus(rows[:, :-1]), rows[:, -1])
    counts = np.bincount(kinds, minlength=len(KINDS))
    assert (len(kinds), len(kinds) - counts[0], *counts[1:]) == TABLE[name]


def test_audioset_and_the_mean_error_rate_come_out(votes):
    assert votes["audioset"] == [[307, 275]]
    rates = [extrapolated_error_rate(TABLE[name][1], TABLE[name][0], TABLE[name][0], n) for name, n in SIZES.items()]
    rates += [extrapolated_error_rate(275, 307, 307, 20_371)]
    rates += [extrapolated_error_rate(1870, 2500, 6_825_383, 50_426_266)]
    rates += [extrapolated_error_rate(732, 1000, 533_249, 9_996_437)]
    assert len(rates) == 10 and np.mean(rates) == pytest.approx(0.033, abs=0.0005)


def test_given_wins_and_texts_have_their_own_answers():
    assert consensus([[5, 5, 0, 0], [4, 4, 1, 0]]).tolist() == [0, 0]
    assert consensus([[2, 1, 0, 0, 2, 0], [1, 0, 0, 0, 3, 1], [0, 1, 0, 1, 0, 3]]).tolist() == [4, 3, 3]
    assert consensus([[1, 0, 0, 0], [1, 2, 0, 0]], least=[1, 2]).tolist() == [0, 1]
    assert consensus([[3, 2, 0, 0], [2, 3, 0, 0]], least=5).tolist() == [4, 4]


def test_reads_sentiments_by_what_they_were_to_the_review(tmp_path):
    entries = [
        {"id": 1, "given_original_label": "Positive", "our_guessed_label": "Neutral", "mturk": {"positive": 1, "negative": 1, "neutral": 3, "off-topic": 0}},
        {"id": 2, "given_original_label": "Positive", "our_guessed_label": "Negative", "mturk": {"positive": 0, "negative": 4, "neutral": 0, "off-topic": 1}},
    ]  # fmt: skip
    (tmp_path / "amazon.json").write_text(json.dumps(entries))
    found = read_votes(tmp_path / "amazon.json")
    assert found.counts.tolist() == [[1, 3, 0, 1, 0, 0], [0, 4, 0, 0, 0, 1]] and found.rows.tolist() == [1, 2]
    entries[0]["id"] = "test/neg/1"
    (tmp_path / "names.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="test/neg/1"):
        _ = read_votes(tmp_path / "names.json").rows


@pytest.mark.parametrize("text", ["", "{}", "[]", '[{"id": 1}]', '[{"id": 1, "given_original_label": 0, "our_guessed_label": 1, "mturk": {"odd": 1}}]'])  # fmt: skip
def test_what_is_no_file_of_answers_is_named(tmp_path, text):
    (tmp_path / "people.json").write_text(text)
    with pytest.raises(ValueError, match=r"people\.json"):
        read_votes(tmp_path / "people.json")


def test_rates_of_samples_have_an_interval():
    low, high = error_rate_interval(1870, 2500, 6_825_383, 50_426_266)
    assert low < extrapolated_error_rate(1870, 2500, 6_825_383, 50_426_266) < high
    # Of all candidates checked there is nothing left to be uncertain of.
    assert error_rate_interval(54, 275, 275, 10_000) == (0.0054, 0.0054)


# Candidates and the corrected benchmark -----------------------------------------------------------------------------


def test_candidates_are_the_smallest_margins():
    rng = np.random.default_rng(0)
    P = rng.dirichlet(np.full(4, 0.5), 200)
    labels = np.where(rng.random(200) < 0.8, P.argmax(axis=1), rng.integers(0, 4, 200))
    margins = [p[y] - max(p[k] for k in range(4) if k != y) for p, y in zip(P, labels, strict=True)]
    expected = sorted(range(200), key=margins.__getitem__)
    assert candidate_errors(labels, P, count=50).tolist() == expected[:50]
    by_itself = candidate_errors(labels, P)
    assert by_itself.tolist() == expected[: len(by_itself)] and 10 < len(by_itself) < 80


def test_correcting_changes_and_drops_what_it_should():
    benchmark = correct(np.array([0, 1, 2, 0, 1], np.uint16), [0, 1, 2, 3], [0, 1, 2, 4], [1, 2, 0, 1])
    assert benchmark.corrected.tolist() == [0, 2, 2, 0, 1] and benchmark.keep.tolist() == [
        True,
        True,
        False,
        False,
        True,
    ]
    assert benchmark.errors.tolist() == [False, True, False, False, False] and benchmark.prevalence == 1 / 3


# Ranking ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(1)
    original = rng.integers(0, 3, 120)
    corrected = np.where(rng.random(120) < 0.15, (original + 1) % 3, original)
    benchmark = Benchmark(original, corrected, rng.random(120) < 0.9)
    follows = {"large": 0.75, "medium": 0.5, "small": 0.1}  # how often a model repeats an error
    right = {"large": 0.97, "medium": 0.93, "small": 0.9}
    models = {
        name: np.where(
            original == corrected,
            np.where(rng.random(120) < right[name], original, (original + 2) % 3),
            np.where(rng.random(120) < follows[name], original, corrected),
        )
        for name in follows
    }
    return models, benchmark


def test_accuracy_at_the_natural_prevalence_is_plain_accuracy(problem):
    models, benchmark = problem
    ranking, keep = Ranking(models, benchmark), benchmark.keep
    for share, labels in ((0.0, benchmark.original), (1.0, benchmark.corrected)):
        plain = [(model[keep] == labels[keep]).mean() for model in models.values()]
        np.testing.assert_allclose(ranking.accuracy(corrected=share), plain)
    halves = (ranking.accuracy(corrected=0.0) + ranking.accuracy(corrected=1.0)) / 2
    np.testing.assert_allclose(ranking.accuracy(corrected=0.5), halves)


def test_curve_equals_really_dropping_examples(problem):
    models, benchmark = problem
    ranking = Ranking(models, benchmark)
    for prevalence in (0.25, 0.5, 1.0):
        drawn = []
        for seed in range(400):
            part = thin(benchmark, prevalence, random_state=seed)
            assert part.prevalence == pytest.approx(prevalence, abs=0.02)
            drawn.append([(model[part.keep] == benchmark.corrected[part.keep]).mean() for model in models.values()])
        np.testing.assert_allclose(np.mean(drawn, axis=0), ranking.accuracy(part.prevalence), atol=0.006)


def test_flips_equal_a_search_over_prevalences(problem):
    models, benchmark = problem
    ranking = Ranking(models, benchmark)
    before, grid = ranking.accuracy(corrected=0.0), np.linspace(benchmark.prevalence, 1, 200_001)
    expected = {}
    for a, b in itertools.permutations(range(3), 2):
        if before[a] <= before[b]:
            continue
        lead = (1 - grid) * (ranking.clean[a] - ranking.clean[b]) + grid * (ranking.on_corrected[a] - ranking.on_corrected[b])  # fmt: skip
        if (lead < 0).any():
            expected[ranking.names[a], ranking.names[b]] = grid[(lead < 0).argmax()]
    found = {(flip.overtaken, flip.overtaking): flip for flip in ranking.flips()}
    assert found.keys() == expected.keys() and ("large", "small") in found
    for pair, flip in found.items():
        assert flip.prevalence == pytest.approx(expected[pair], abs=1e-5)
        assert flip.rise == pytest.approx(flip.prevalence - benchmark.prevalence)
    assert ranking.overtaken_at("small", "large") is None
    assert ranking.best(corrected=0.0) == "large" and ranking.best(1.0) == "small"
    assert [flip.prevalence for flip in ranking.flips()] == sorted(flip.prevalence for flip in ranking.flips())


def test_prevalence_rises_as_correct_examples_are_dropped():
    # The paper's ImageNet: 1,428 correctable errors, 47,084 correct labels.
    assert noise_prevalence(1428, 47_084) == pytest.approx(0.0294, abs=5e-5)
    assert noise_prevalence(0, 10, 1.0) == 0.0 and noise_prevalence(5, 10, 1.0) == 1.0
    shares = [noise_prevalence(10, 90, dropped) for dropped in np.linspace(0, 1, 11)]
    assert shares == sorted(shares)


# The tool -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path):
    """120 pets with images; the labels of rows 3 and 50 are wrong."""
    rng, names = np.random.default_rng(0), ("cat", "dog", "owl")
    true = np.arange(120) % 3
    given = true.copy()
    given[[3, 50]] = (given[[3, 50]] + 1) % 3
    P = rng.dirichlet(np.ones(3), 120) * 0.2 + 0.8 * np.eye(3)[true]
    pictures = []
    for k in true:
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), 80 * k, np.uint8)).save(buffer, format="PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    columns = {
        "image": pictures,
        "label": [names[k] for k in given],
        **{f"p_{name}": P[:, k] for k, name in enumerate(names)},
        "model_large": [names[k] for k in given],
        "model_small": [names[k] for k in np.where(np.arange(120) == 7, (true + 1) % 3, true)],
    }
    path = tmp_path / "pets.parquet"
    pa.parquet.write_table(pa.table(columns), path)
    return path


def read(path):
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_tool_finds_shows_takes_corrections_and_ranks(table, tmp_path):
    out = tmp_path / "out"
    said = apply([table], out, pred_probs="p_*")
    assert "2 of 120 labels are candidates" in said
    found = read(out / "candidates.csv")
    assert {row["row"] for row in found} == {"3", "50"} and found[0]["judged"] == ""
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "cat" in page and not (out / "ranking.csv").exists()

    answers = tmp_path / "answers.csv"
    answers.write_text("row,answer\n3,guessed\n50,guessed\n")
    said = apply([table], out, pred_probs="p_*", corrections=[answers], models=["model_*"], lang="ja")
    assert "best on the original labels is model_large, on the corrected ones model_small" in said
    corrected = read(out / "corrected_labels.csv")
    assert [corrected[i]["corrected_label"] for i in (3, 50)] == ["cat", "owl"] and corrected[4]["judged"] == ""
    first = read(out / "ranking.csv")[0]
    assert first["model"] == "model_large" and float(first["original"]) == 1.0
    assert float(first["corrected"]) == pytest.approx(118 / 120)
    page = (out / "index.html").read_text()
    assert "<svg" in page and "追い越される" in page and 'lang="ja"' in page


def test_tool_follows_the_majority_and_takes_another_class(table, tmp_path):
    files = []
    for person, (first, second) in enumerate((("guessed", "dog"), ("given", "dog"), ("guessed", "neither"))):
        files.append(tmp_path / f"{person}.csv")
        files[-1].write_text(f"row,answer\n3,{first}\n0,{second}\n")
    apply([table], tmp_path / "out", pred_probs="p_*", corrections=files)
    corrected = read(tmp_path / "out" / "corrected_labels.csv")
    assert (corrected[3]["judged"], corrected[3]["corrected_label"]) == ("correctable", "cat")
    assert (corrected[0]["judged"], corrected[0]["corrected_label"]) == ("correctable", "dog")
    apply([table], tmp_path / "out", pred_probs="p_*", corrections=files, agree=3)
    corrected = read(tmp_path / "out" / "corrected_labels.csv")
    assert corrected[3]["judged"] == "non-agreement" and corrected[3]["keep"] == "false"


def test_tool_reads_folders_and_arrays(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "pets"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(folder / name / f"{i:02d}.png")
    true = np.repeat([0, 1], 20)
    true[5] = 1
    P = 0.9 * np.eye(2)[true] + 0.05
    np.save(tmp_path / "P.npy", P)
    assert "1 of 40" in apply([folder], tmp_path / "out", pred_probs=str(tmp_path / "P.npy"))
    assert read(tmp_path / "out" / "candidates.csv")[0]["name"] == "cat/05.png"
    order = rng.permutation(40)
    paths = [f"{name}/{i:02d}.png" for name in ("cat", "dog") for i in range(20)]
    lines = ["path,dog,cat", *(f"{paths[i]},{P[i, 1]},{P[i, 0]}" for i in order)]
    (tmp_path / "P.csv").write_text("\n".join(lines))
    apply([folder], tmp_path / "out", pred_probs=str(tmp_path / "P.csv"))
    listed = read(tmp_path / "out" / "candidates.csv")[0]
    assert (listed["name"], listed["given_label"], listed["suggested_label"]) == ("cat/05.png", "cat", "dog")
    np.save(tmp_path / "y.npy", np.repeat([0, 1], 20).astype(np.uint16))
    for data, options in (
        ("y.npy", {"pred_probs": str(tmp_path / "P.npy")}),
        ("P.npy", {"labels": tmp_path / "y.npy"}),
    ):
        apply([tmp_path / data], tmp_path / "out", **options)
        assert read(tmp_path / "out" / "candidates.csv")[0]["row"] == "5"


def test_page_shows_rows_and_escapes_them(tmp_path):
    lines = ["text,label,p_a,p_b", *(f"row {i},{'ab'[i % 2]},{1 - i % 2},{i % 2}" for i in range(40))]
    lines[4] = "<script>alert(1)</script>,a,0,1"
    (tmp_path / "texts.csv").write_text("\n".join(lines))
    apply([tmp_path / "texts.csv"], tmp_path / "out", pred_probs="p_a,p_b")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "&lt;script&gt;alert(1)" in page and "<script>alert" not in page


def wrong_uses(table, tmp_path):
    (tmp_path / "bad_row.csv").write_text("row,answer\n999,given\n")
    (tmp_path / "bad_answer.csv").write_text("row,answer\n3,perhaps\n")
    (tmp_path / "twice.csv").write_text("row,answer\n3,given\n3,guessed\n")
    (tmp_path / "columns.csv").write_text("line,said\n3,given\n")
    (tmp_path / "fine.csv").write_text("row,answer\n3,guessed\n")
    np.save(tmp_path / "short.npy", np.zeros(5, int))
    columns = {"pred_probs": "p_*"}
    return [
        ([], {}, "0 inputs"),
        ([table], {}, "needs predicted probabilities"),
        ([tmp_path / "none.csv"], columns, "there is no file"),
        ([table], {"pred_probs": "q_*"}, "there is no column 'q_*'"),
        ([table], {"pred_probs": "label"}, "hold other things than numbers"),
        ([table], columns | {"label": "kind"}, "there is no column 'kind'"),
        ([table], columns | {"count": 500}, "count is 500"),
        ([table], columns | {"lang": "fr"}, "--lang is 'fr'"),
        ([table], columns | {"show": 0}, "--show is 0"),
        ([table], columns | {"models": ["model_*"]}, "without --corrections"),
        ([table], columns | {"corrections": [tmp_path / "bad_row.csv"]}, "row 999"),
        ([table], columns | {"corrections": [tmp_path / "bad_answer.csv"]}, "'perhaps'"),
        ([table], columns | {"corrections": [tmp_path / "twice.csv"]}, "answers row 3 twice"),
        ([table], columns | {"corrections": [tmp_path / "columns.csv"]}, "needed are row and answer"),
        ([table], columns | {"corrections": [tmp_path / "fine.csv"], "models": ["resnet"]}, "there is no column 'resnet'"),
        ([table], columns | {"corrections": [tmp_path / "fine.csv"], "models": [str(tmp_path / "short.npy")]}, "shape (5,)"),
        ([tmp_path], {}, "has no images"),
    ]  # fmt: skip


def test_wrong_use_of_the_tool_is_named(table, tmp_path):
    for inputs, options, message in wrong_uses(table, tmp_path):
        with pytest.raises(ValueError, match=re.escape(message)):
            apply(inputs, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# The claims ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_study(tmp_path):
    for name in claims.STUDIES:
        true = np.arange(60) % 3
        P = 0.9 * np.eye(3)[true] + 0.1 / 3
        labels = true.copy()
        labels[[4, 9]] = (labels[[4, 9]] + 1) % 3
        people = [
            {"id": i, "given_original_label": int(labels[i]), "our_guessed_label": int(P[i].argmax()), "mturk": dict(zip(ANSWERS, counts, strict=False))}
            for i, counts in ((4, (0, 5, 0, 0)), (9, (4, 1, 0, 0)))
        ]  # fmt: skip
        np.save(tmp_path / f"{name}_labels.npy", labels.astype(np.uint16))
        np.save(tmp_path / f"{name}_pred_probs.npy", P)
        (tmp_path / f"{name}_people.json").write_text(json.dumps(people))
    return tmp_path


def test_real_data_are_recounted(small_study):
    trial = Trial(0, "real", data_path=small_study)
    values = claims.the_table_comes_out(trial)
    assert (values["candidates"], values["errors"], values["correctable"], values["all_errors"]) == (2, 1, 1, 3)
    assert values["lowest_margins"] == 1.0 and values["found_prune_by_noise_rate"] == 1.0
    assert set(trial.used_data) == {f"label_errors/{name}" for name in claims.STUDIES}
    assert claims.half_of_the_candidates_are_errors(trial)["confirmed_share"] == 0.5


def test_other_data_are_refused(small_study):
    with pytest.raises(ValueError, match="this claim needs"):
        claims.the_table_comes_out(Trial(0, "real"))
    np.save(small_study / "mnist_labels.npy", np.zeros(60, np.uint16))
    with pytest.raises(ValueError, match="not about these labels"):
        claims.the_table_comes_out(Trial(0, "real", data_path=small_study))
    (small_study / "cifar10_pred_probs.npy").unlink()
    with pytest.raises(ValueError, match="cifar10_pred_probs"):
        claims.the_table_comes_out(Trial(0, "real", data_path=small_study))


def test_rise_is_what_the_ranking_says():
    clean, on_original, on_corrected = np.array([0.9, 0.94]), np.array([0.1, 0.5]), np.array([0.8, 0.4])
    natural = 0.05
    rise = claims._rise(natural, clean, on_original, on_corrected)
    at = natural + rise
    accuracy = (1 - at) * clean + at * on_corrected
    assert accuracy[0] == pytest.approx(accuracy[1]) and rise > 0
    # Not ahead on the original labels, or never overtaken: as much as there is.
    assert claims._rise(natural, clean[::-1], on_original[::-1], on_corrected) == 0.95
    assert claims._rise(natural, clean, on_original, on_corrected[::-1]) == 0.95
