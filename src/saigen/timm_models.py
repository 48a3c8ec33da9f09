"""saigen's models in timm's registry, for code that builds its models by ``timm.create_model``.

```python
import saigen.timm_models
import timm

model = timm.create_model("saigen_efficientnet_b0", num_classes=10)
timm.list_models("saigen_*")
```

Each name is saigen's with ``saigen_`` before it: timm takes ``/`` for a path or a Hub id and ``:`` for one of its own
sources, and without a prefix ``efficientnet_b0`` would replace timm's.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

import saigen
from saigen import weights
from saigen.cards import catalogue

try:
    from timm.models import is_model, register_model
except ModuleNotFoundError as error:
    raise ImportError(f"saigen.timm_models needs {error.name}: pip install timm") from error

PREFIX = "saigen_"
__all__ = ["PREFIX", "register"]


def register() -> list[str]:
    """Registers every model of ``saigen.list_models()`` and returns timm's names of them.

    Importing this module does it; call it again where a plug-in was installed meanwhile. No room is imported before a
    model of it is built.
    """
    names = []
    for name in saigen.list_models():
        entry = _entry_point(name)
        if not is_model(entry.__name__):
            globals()[entry.__name__] = register_model(entry)
        names.append(entry.__name__)
    return names


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: Any = None,
        **arguments: Any,
    ) -> nn.Module:
        if isinstance(pretrained_cfg, str):
            raise ValueError(f"there is no {PREFIX}{name}.{pretrained_cfg}: saigen's models have no tags")
        config = {**(pretrained_cfg or {}), **(pretrained_cfg_overlay or {})}
        if pretrained and "weights" not in arguments:
            arguments["weights"] = config.get("file") or config.get("hf_hub_id")
            if arguments["weights"] is None:
                raise ValueError(
                    f"{PREFIX}{name} has no weights of its own: give weights=, or pretrained_cfg_overlay=dict(file=…), "
                    "a file, a folder or a Hub id"
                )
        allowed = weights.arguments(getattr(catalogue.find_model(name).load(), name))
        # timm's training script sends every rate it knows of, 0 where the user gave none.
        arguments = {key: value for key, value in arguments.items() if value or key in allowed}
        model = saigen.create_model(name, **arguments)
        # What timm.data reads to choose the size and the normalisation of images.
        model.pretrained_cfg = {"architecture": build.__name__, **getattr(model, "default_cfg", {}), **config}
        return model

    build.__name__ = build.__qualname__ = f"{PREFIX}{name}"
    build.__doc__ = f"``saigen.create_model({name!r})`` with timm's arguments; ``weights`` as there."
    return build


register()
