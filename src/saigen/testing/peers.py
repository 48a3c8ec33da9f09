"""Imports peer packages for parity tests and benchmarks, working round what is known to break their import."""

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any


@functools.cache
def tolerate_missing_torchvision_operators() -> None:
    """Lets torchvision, and with it timm and transformers' image models, be imported beside any build of torch."""
    # torchvision's wheel cannot register its compiled operators on a CPU-only torch of another build; it is fake
    # kernels for those operators that make its import fail, and no peer here calls them.
    import torch

    register_fake = torch.library.register_fake

    def patient_register_fake(op: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register_fake(op, *args, **kwargs)

    torch.library.register_fake = patient_register_fake


def import_peer(name: str) -> ModuleType:
    """Imports the peer package ``name``; raises ``ImportError`` where it is not installed."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise ImportError(f"{name} is not installed: pip install 'saigen[peers]'")
    tolerate_missing_torchvision_operators()
    return importlib.import_module(name)
