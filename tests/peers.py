"""Peers for the parity tests: imported here, in one place, and skipped by name where they are missing."""

import importlib
import os
from types import ModuleType

import pytest


def need(name: str) -> ModuleType:
    """The peer package ``name``; the test is skipped where it is missing, or fails where everything is required."""
    from saigen.testing.peers import import_peer

    try:
        return import_peer(name)
    except ImportError as error:
        if os.environ.get("SAIGEN_REQUIRE") == "all":
            pytest.fail(f"{name} is required here but cannot be imported: {error}")
        pytest.skip(f"needs {name}: pip install 'saigen[peers]'")


def need_module(name: str) -> ModuleType:
    """A submodule of a peer, ``timm.layers`` say."""
    need(name.partition(".")[0])
    return importlib.import_module(name)
