"""The documentation: the hook writes a page a paper in both languages, without mkdocs; with it, the site builds strictly."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from saigen.cards.glossary import label

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(hooks):
    return hooks.pages()


@pytest.fixture(params=["en", "ja"])
def lang(request):
    return request.param


def test_each_room_has_a_page_in_both_languages(hooks, pages, lang):
    root, other = hooks.ROOTS[lang], "en" if lang == "ja" else "ja"
    listed = pages[f"{root}papers/index.md"]
    for paper in hooks.papers():
        text, card = pages[f"{root}papers/{paper.slug}.md"], paper.card
        plain = re.sub(r"<[^>]+>", "", text).replace("&#39;", "'").replace("&#34;", '"').replace("&amp;", "&")
        assert re.search(rf"<h1>.*{label('purpose', lang)}", text, flags=re.DOTALL)
        for claim in card.claim:
            assert f'<section class="claim" id="{claim.id}">' in text
            words = {"en": claim.en, "ja": claim.ja}
            assert " ".join(words[lang].split())[:40] in " ".join(plain.split())
            assert words[other].split("\n")[0][:40] not in plain
        assert f"]({paper.slug}.md)" in listed
    assert "mkdocs" not in sys.modules


def test_the_readers_own_runs_stay_out_of_the_documentation(store, plugin, hooks):
    from saigen import runner

    runner.run("mean_of_noise", jobs=1)
    assert label("yours", "en") not in hooks.report.article(plugin, "en")
    assert plugin.slug not in {paper.slug for paper in hooks.papers()}


def test_the_papers_stand_in_the_table_of_contents(hooks):
    nav = [{"Papers": "papers/index.md"}, {"日本語": [{"論文": "ja/papers/index.md"}]}, {"Reference": "reference.md"}]
    english, japanese, reference = hooks.on_config({"nav": nav})["nav"]
    listed = {
        (next(iter(page)), domain) for part in english["Papers"][1:] for domain, pages in part.items() for page in pages
    }
    assert english["Papers"][0] == "papers/index.md"
    assert listed == {(paper.slug, paper.domain) for paper in hooks.papers()}
    first = hooks.papers()[0]
    assert english["Papers"][1][first.domain][0] == {first.slug: f"papers/{first.slug}.md"}
    assert japanese["日本語"][0]["論文"][0] == "ja/papers/index.md"
    assert reference == {"Reference": "reference.md"}


def test_what_the_site_names_is_there_or_written(pages):
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = re.findall(r"[\w/-]+\.(?:md|css)\b", text)
    assert named
    assert [name for name in named if name not in pages and not (ROOT / "docs" / name).is_file()] == []


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    if importlib.util.find_spec("mkdocs") is None:
        if os.environ.get("SAIGEN_REQUIRE") == "all":
            pytest.fail("the documentation needs mkdocs (extra docs)")
        pytest.skip("needs mkdocs: pip install 'saigen[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "ja" / "papers" / "sam" / "index.html").read_text(encoding="utf-8")
    assert '<html lang="ja"' in page and page.count("<article") == page.count("</article>")
