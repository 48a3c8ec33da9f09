"""Shapes are checked at run time in the tests, by beartype through jaxtyping's import hook; nothing a test runs touches
the user's own store."""

import os
import random
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["SAIGEN_HOME"] = tempfile.mkdtemp(prefix="saigen-home-")
ROOT = Path(__file__).resolve().parent.parent
PLUGIN = Path(__file__).resolve().parent / "plugin"

from jaxtyping import config, install_import_hook  # noqa: E402

if not any(name.startswith("saigen.papers") or name.startswith("saigen.nn") for name in sys.modules):
    install_import_hook(["saigen.papers", "saigen.nn"], "beartype.beartype")

import numpy  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_weights_every_time():
    """Modules draw their first weights from the global generators: every test begins from the same state of them."""
    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)


@pytest.fixture(autouse=True)
def no_shape_checks_under_compile(request):
    """``torch.compile`` and ``torch.export`` cannot trace the wrappers of the checks, and a wrong shape is to meet our own
    ``ValueError`` before beartype's complaint: those tests run without them."""
    name = request.node.name
    if not any(word in name for word in ("compile", "export", "fastest", "wrong_arguments")):
        yield
        return
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty store of local runs."""
    monkeypatch.setenv("SAIGEN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def plugin(monkeypatch):
    """The plug-in package ``hello_papers``, installed for one test."""
    from saigen.cards import catalogue

    monkeypatch.syspath_prepend(str(PLUGIN))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PLUGIN), *filter(None, [os.environ.get("PYTHONPATH")])]))
    catalogue.refresh()
    yield catalogue.paper("mean_of_noise")
    monkeypatch.undo()
    catalogue.clear_import("hello_papers")
    catalogue.refresh()
