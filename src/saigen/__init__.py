"""saigen (再現): a reading list you can run. Papers as components, and their claims re-measured.

```python
import saigen

model = saigen.create_model("efficientnet_b0", num_classes=10)
results = saigen.run("confident_learning")
```
"""

from typing import TYPE_CHECKING, Any

from saigen.cards.catalogue import list_models, list_papers, paper

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from saigen.runner import run

__all__ = ["create_model", "list_models", "list_papers", "paper", "run"]
__version__ = "0.1.0"


def create_model(
    name: str,
    *,
    num_classes: "int | None" = None,
    in_chans: int = 3,
    weights: "str | Path | None" = None,
    **overrides: Any,
) -> "nn.Module":
    """Builds the model ``name`` (see ``list_models``), with weights if given.

    ``num_classes`` None means the checkpoint's where weights are given, else the model's published count. ``weights`` is
    a local file or folder (which wins) or a Hub id, in our, the official, the timm or the Transformers key layout.
    ``overrides`` are further arguments of the model's own function.
    Raises ``ValueError`` for an unknown name or argument, or a checkpoint that does not fit.

    >>> create_model("efficientnet_b0", num_classes=10).num_classes
    10
    """
    from saigen import weights as reader
    from saigen.cards.catalogue import find_model, nearest

    build = getattr(find_model(name).load(), name)
    allowed = reader.arguments(build)
    for argument in overrides:
        if argument not in allowed:
            others = [other for other in allowed if other not in ("num_classes", "in_chans")]
            raise ValueError(
                f"{name} has no argument {argument!r}{nearest(argument, others)}: it takes {', '.join(others)}"
            )
    if "in_chans" in allowed:
        overrides["in_chans"] = in_chans
    elif in_chans != 3:
        raise ValueError(f"in_chans is {in_chans}, but {name} takes no images")
    if num_classes is not None and "num_classes" not in allowed:
        raise ValueError(f"num_classes is {num_classes}, but {name} has no classes")
    if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 0):
        raise ValueError(f"num_classes is {num_classes!r}, allowed is a whole number of at least 0")
    return reader.create(build, weights, num_classes=num_classes, **overrides)


def __getattr__(name: str) -> Any:
    if name == "run":
        from saigen.runner import run

        return run
    raise AttributeError(f"module 'saigen' has no attribute {name!r}")
