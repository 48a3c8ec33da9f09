"""A new room: its files, and the tests that fail by name until it is filled."""

import os
import re
import subprocess
import sys

import pytest

from saigen.cards import catalogue
from saigen.cards.schema import read_card
from saigen.scaffold import scaffold


@pytest.fixture
def package(tmp_path):
    """An installed plug-in package without rooms yet."""
    folder = tmp_path / "some_papers"
    folder.mkdir()
    (folder / "__init__.py").touch()
    info = tmp_path / "some_papers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-papers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[saigen.papers]\nsome = some_papers\n")
    yield folder
    catalogue.refresh()


@pytest.mark.parametrize("given", ["2501.00001", "arXiv:2501.00001v3", "https://arxiv.org/abs/2501.00001"])
def test_the_card_of_a_new_room_has_its_arxiv_id(package, given):
    written = scaffold(given, domain="vision", slug="a_new_one", into=package)
    assert all(path.is_file() for path in written)
    assert read_card(package / "vision" / "a_new_one" / "card.toml").arxiv == "2501.00001"


def test_a_new_room_fails_by_name_until_it_is_filled(package):
    scaffold("a_new_one", domain="vision", into=package)
    paths = os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rf", str(package.parent / "tests" / "test_a_new_one.py")],
        capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    failed = set(re.findall(r"FAILED \S+::(\w+)", done.stdout))
    assert {"test_contract", "test_nothing_is_left_to_fill", "test_equals_an_independent_formula"} <= failed
    assert "FILL: the method" in done.stdout
