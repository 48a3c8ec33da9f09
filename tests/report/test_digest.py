"""The digests: each list in its own order and form, within Zenn's rules."""

import re

import pytest

from saigen.cards import catalogue
from saigen.report import zenn
from saigen.report.digest import lists, sentences, write_digest

EXPECTED = {
    "2019-part-1": (5, 29),
    "ml-news-2020-w45": (4, 9),
    "monthly-2021-05": (1, 7),
    "ai-paper-reading-2021-07": (3, 21),
    "washizaki-articles": (2, 12),
}


def test_the_five_lists_with_all_their_entries():
    assert {name: (len(d.section), sum(len(s.entry) for s in d.section)) for name, d in lists().items()} == EXPECTED


def test_order_is_the_lists_own():
    top = [entry.paper for entry in lists()["ai-paper-reading-2021-07"].section[1].entry]
    assert top[:4] == ["dvt", "decision_transformer", "segformer", "sam"]
    assert lists()["washizaki-articles"].section[0].entry[0].paper == "npt"


@pytest.mark.parametrize("lang", ["ja", "en"])
@pytest.mark.parametrize("name", EXPECTED)
def test_a_digest_is_written_within_zenns_rules(tmp_path, name, lang):
    written = write_digest(name, tmp_path, lang=lang)
    assert {path.suffix for path in written} == {".md"}
    article = tmp_path / "articles" / f"saigen-{name}.md"
    text = article.read_text(encoding="utf-8")
    assert zenn.problems(text, slug=article.stem, root=tmp_path) == []
    found = lists()[name]
    places = [
        text.find(entry.link)
        for section in found.section
        for entry in section.entry
        if entry.link and entry.paper not in found.highlights
    ]
    assert -1 not in places
    if name != "ai-paper-reading-2021-07":  # its presenter's pick stands in two sections
        assert places == sorted(places)
    for slug in {entry.paper for section in found.section for entry in section.entry} & {
        p.slug for p in catalogue.list_papers()
    }:
        card = catalogue.paper(slug).card
        assert (card.title_ja if lang == "ja" else card.title) in text


def test_the_forms_differ(tmp_path):
    for name in EXPECTED:
        write_digest(name, tmp_path, lang="ja")
    read = lambda name: (tmp_path / f"saigen-{name}.md").read_text(encoding="utf-8")  # noqa: E731
    assert "## 1. " in read("2019-part-1") and "次回" in read("2019-part-1")
    assert "今週のハイライト" in read("ml-news-2020-w45")
    assert "## 2021年" in read("washizaki-articles")
    slides = (tmp_path / "saigen-ai-paper-reading-2021-07-slides.md").read_text(encoding="utf-8")
    assert slides.startswith("---\nmarp: true") and slides.count("\n---\n") > 21 and "著者所属" in slides


def test_measured_numbers_stand_beside_reported_ones(tmp_path):
    from saigen import runner

    measured = [p for p in catalogue.list_papers() if any(r.measurements for r in runner.published(p))]
    if not measured:
        pytest.fail("no room has published evidence")
    name = next(d for d in measured[0].card.digests)
    write_digest(name, tmp_path, lang="en", formats=["markdown"])
    assert re.search(r"reported .+ → measured ", (tmp_path / f"saigen-{name}.md").read_text(encoding="utf-8"))


def test_a_papers_evidence_is_judged_once_for_all_forms(tmp_path, monkeypatch):
    from saigen import runner

    asked, standing = [], runner.standing
    monkeypatch.setattr(runner, "standing", lambda paper: asked.append(paper.slug) or standing(paper))
    write_digest("ai-paper-reading-2021-07", tmp_path, lang="ja")
    assert asked and len(asked) == len(set(asked))


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="--format is 'zen', did you mean 'zenn'"):
        write_digest("2019-part-1", tmp_path, formats=["zen"])
    with pytest.raises(ValueError, match="--lang"):
        write_digest("2019-part-1", tmp_path, lang="fr")


def test_sentences():
    assert sentences("一つ目。二つ目。") == ["一つ目。", "二つ目。"]
    assert sentences("It cuts 0.5 points. It is fast.") == ["It cuts 0.5 points.", "It is fast."]


GOOD = zenn.front_matter("題名", "📚", ["pytorch"]) + "\n# 本文\n"


@pytest.mark.parametrize(
    ("text", "slug", "said"),
    [
        (GOOD, "short", "12 to 50"),
        ("no front matter", "a-good-long-slug", "no front matter"),
        (GOOD.replace('"tech"', '"news"'), "a-good-long-slug", "allowed are tech and idea"),
        (GOOD.replace("📚", "📚📚"), "a-good-long-slug", "one emoji"),
        (GOOD.replace('["pytorch"]', '["a","b","c","d","e","f"]'), "a-good-long-slug", "up to 5"),
        (GOOD.replace('["pytorch"]', '["Py Torch"]'), "a-good-long-slug", "lower-case"),
        (GOOD.replace("題名", "長" * 71), "a-good-long-slug", "71 characters"),
        (GOOD + "<div>x</div>\n", "a-good-long-slug", "HTML"),
        (GOOD + "![x](figures/a.png)\n", "a-good-long-slug", "below /images"),
        (GOOD + "![x](/images/a.bmp)\n", "a-good-long-slug", "none of"),
        (GOOD + "あ" * 80_001, "a-good-long-slug", "80"),
    ],
)
def test_the_validator_finds(text, slug, said):
    assert any(said in problem for problem in zenn.problems(text, slug=slug))


def test_the_validator_is_content():
    assert zenn.problems(GOOD + "a<br>b\n", slug="a-good-long-slug") == []
