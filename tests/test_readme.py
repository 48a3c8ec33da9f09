"""The READMEs say what is: their table is that of today's evidence, their code runs, their links lead somewhere."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(params=["en", "ja"])
def lang(request):
    return request.param


@pytest.fixture(scope="module")
def readme():
    spec = importlib.util.spec_from_file_location("docs_readme", ROOT / "docs" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_that_of_todays_evidence(readme, lang):
    now, wanted = readme.written(lang)
    assert now == wanted, f"{readme.FILES[lang]} is behind the evidence: run `make readme`"


def test_the_code_runs(readme, lang):
    blocks = re.findall(r"(?s)```python\n(.*?)```", (ROOT / readme.FILES[lang]).read_text(encoding="utf-8"))
    assert blocks
    for block in blocks:
        exec(block, {})


def test_links_and_pictures_are_there(readme, lang):
    text = (ROOT / readme.FILES[lang]).read_text(encoding="utf-8")
    local = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    assert local and [link for link in local if not (ROOT / link).is_file()] == []


def test_both_languages_name_the_same_commands(readme):
    commands = [
        sorted(set(re.findall(r"`(?:saigen|make) [a-z]+", (ROOT / name).read_text(encoding="utf-8"))))
        for name in readme.FILES.values()
    ]
    assert commands[0] == commands[1]
