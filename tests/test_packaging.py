"""What `pip install saigen` brings: the cards, the templates, and only the core dependencies."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from saigen.cards import catalogue

ROOT = Path(__file__).resolve().parent.parent
CORE = {
    "torch", "numpy", "scipy", "scikit-learn", "pillow", "pyarrow", "kornia", "einops", "accelerate", "safetensors",
    "huggingface_hub", "pydantic", "typer", "rich", "jinja2", "matplotlib", "joblib", "filelock", "pooch", "platformdirs",
    "jaxtyping",
}  # fmt: skip


def test_the_core_pulls_only_the_core():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {re.match(r"[\w.-]+", name).group() for name in project["dependencies"]} == CORE


def test_the_wheel_holds_cards_evidence_templates_and_assets(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for paper in catalogue.list_papers():
        if paper.package.startswith("saigen."):
            folder = "saigen/papers/" + f"{paper.domain}/{paper.slug}"
            assert f"{folder}/card.toml" in names
            assert (f"{folder}/evidence.jsonl" in names) == paper.evidence_path.is_file()
    for name in (
        "report/templates/index.html.j2",
        "report/assets/saigen.css",
        "report/digests.toml",
        "room_template/card.toml.j2",
        "py.typed",
    ):
        assert f"saigen/{name}" in names
    assert not [name for name in names if name.startswith("tests/")]
