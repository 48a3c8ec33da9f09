"""The contract every room keeps, public for the authors of plug-ins."""

from typing import Any

__all__ = ["Check", "checks", "number_problems", "parametrize_with_checks", "parity_problems", "room_problems"]


def __getattr__(name: str) -> Any:
    # The contract imports torch; the peers helper beside it must not have to.
    if name in __all__:
        from saigen.testing import contract

        return getattr(contract, name)
    raise AttributeError(f"module 'saigen.testing' has no attribute {name!r}")
