"""Who may import whom, and what the front door must not import."""

import ast
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

from saigen.cards import catalogue

SRC = Path(__file__).resolve().parent.parent / "src" / "saigen"
THIRD_PARTY_OF_METHODS = {"torch", "numpy", "scipy", "sklearn", "einops", "jaxtyping", "kornia"}
OF_EXTRAS = {
    "rl": {"gymnasium", "minari", "mujoco"},
    "audio": {"soundfile"},
    "images": {"skimage"},
    "search": {"optuna"},
    "trees": {"xgboost"},
}
NOT_METHODS = {"claims", "examples", "apply"}
LAYERS = [
    {"cli", "testing", "scaffold", "timm_models", "__main__"},
    {"report", "bench", "cross"},
    {"runner"},
    {"trial"},
    {"train", "data", "measure", "weights", "speed"},
    {"nn", "example"},
]
BESIDE = {"claims": {"claims", "cards", "files"}, "cards": {"cards"}, "files": {"files"}}


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("saigen", include_external_packages=True)


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_layers(graph):
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    wrong = []
    for module in graph.modules:
        if not module.startswith("saigen.") or part(module) == "papers":
            continue
        for imported in graph.find_modules_directly_imported_by(module):
            if not imported.startswith("saigen."):
                continue
            ours, theirs = part(module), part(imported)
            if theirs == "papers":
                wrong.append(f"{module} imports the room {imported} by name")
            elif ours in BESIDE:
                if theirs not in BESIDE[ours]:
                    wrong.append(f"{module} imports {imported}")
            elif theirs in BESIDE:
                if theirs != "files" and level[ours] > 2 and ours != "example":
                    wrong.append(f"{module} imports {imported}")
            elif ours != theirs and level[theirs] <= level[ours] and level[theirs] != level[ours]:
                wrong.append(f"{module} imports {imported}, which lies above it")
    assert wrong == []


def rooms():
    return [paper for paper in catalogue.list_papers() if paper.package.startswith("saigen.")]


@pytest.mark.parametrize("paper", rooms(), ids=lambda paper: paper.slug)
def test_a_room_imports_only_what_it_may(paper, graph):
    modules = [f"{paper.package}.{file.stem}" for file in paper.folder.glob("*.py") if file.stem != "__init__"]
    may_build_on = {catalogue.paper(slug).package for slug in paper.card.builds_on}
    wrong = []
    for module in modules:
        stem = module.rpartition(".")[2]
        for imported in graph.find_modules_directly_imported_by(module):
            top = imported.partition(".")[0]
            if top != "saigen":
                allowed = (
                    THIRD_PARTY_OF_METHODS | OF_EXTRAS.get(paper.card.extra or "", set()) | set(sys.stdlib_module_names)
                )
                if stem not in NOT_METHODS and top not in allowed:
                    wrong.append(f"{module} imports {imported}")
                continue
            own = imported.startswith(paper.package)
            # Of a room that it builds on, a room takes the public names: the package, not a file in it.
            of_base = imported in may_build_on
            if own or of_base or part(imported) == "nn":
                continue
            beside = {"claims": {"trial", "train", "data", "measure"}, "examples": {"example", "trial", "train", "data", "measure", "speed"},
                      "apply": {"files", "weights", "data", "measure"}}.get(stem, set())  # fmt: skip
            if part(imported) not in beside:
                wrong.append(f"{module} imports {imported}")
    assert wrong == []


@pytest.mark.parametrize("paper", rooms(), ids=lambda paper: paper.slug)
def test_a_room_has_its_files_and_claims_print_nothing(paper):
    methods = {"model", "layer", "loss", "optimizer", "transform", "estimator", "agent", "renderer"}
    assert methods & {file.stem for file in paper.folder.glob("*.py")}, "no method file"
    assert {"__init__.py", "card.toml", "claims.py", "examples.py"} <= {file.name for file in paper.folder.iterdir()}
    tree = ast.parse((paper.folder / "claims.py").read_text())
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"print", "open"}


def test_no_submodule_bears_the_name_of_a_front_door_function():
    import saigen

    for name in saigen.__all__:
        assert not (SRC / name).exists() and not (SRC / f"{name}.py").exists()


@pytest.mark.parametrize("arguments", [["list"], ["show", "confident_learning"]])
def test_the_front_door_imports_no_torch_and_no_scipy(arguments, tmp_path, monkeypatch):
    code = (
        "import sys, saigen.cli as cli\n"
        f"sys.argv = ['saigen', *{arguments!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "loaded = {'torch', 'scipy', 'sklearn', 'matplotlib', 'pandas'} & set(sys.modules)\n"
        "rooms = [name for name in sys.modules if name.startswith('saigen.papers')]\n"
        "sys.exit(f'loaded {loaded} {rooms}' if loaded or rooms else 0)"
    )
    # The first call may judge, and remembers; what is remembered needs no SciPy.
    subprocess.run([sys.executable, "-m", "saigen", *arguments], check=True, capture_output=True, timeout=300)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_docstrings_and_files_speak_of_the_project_alone():
    """No local paths, no registry hosts, nothing of whoever wrote it."""
    root = SRC.parent.parent
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True).stdout.splitlines()
    bad = []
    for name in listed:
        path = root / name
        if (
            path.suffix in (".py", ".md", ".toml", ".j2", ".txt", ".yml", ".yaml", ".js", ".css")
            and path.is_file()
            and path != Path(__file__).resolve()
        ):
            text = path.read_text(encoding="utf-8", errors="ignore")
            bad += [f"{name}: {word}" for word in ("/work/", "/root/", "pypi.org", "helper-") if word in text]
    assert bad == []
