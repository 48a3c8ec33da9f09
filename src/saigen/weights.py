"""Reads weights: safetensors files and folders, other checkpoints without running code in them, the Hugging Face Hub."""

import copy
import inspect
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from saigen.files import replacing

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar", ".npz")
FOLDER_NAMES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin")
WRAPPERS = ("state_dict", "model", "model_state_dict", "model_state", "state", "module")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def read(source: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by name.

    ``source`` is a file, a folder (as the Hub's), or, where no such path exists, a Hub id ``owner/name`` (``@revision``).
    safetensors are read as they are; others through ``torch.load(weights_only=True)``, and the reader is told;
    ``.npz`` holds plain arrays. Raises ``ValueError`` with one sentence where nothing safe can be read.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return _read_file(path)
    text = str(source)
    if _HUB_ID.fullmatch(text) and path.suffix.lower() not in SUFFIXES:
        return _read_folder(_download(text))
    raise ValueError(f"weights is {text!r}: there is no such file or folder, and it is no Hub id (owner/name)")


def _read_file(path: Path) -> dict[str, Tensor]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"weights is {str(path)!r}, allowed are files that end in {', '.join(SUFFIXES)}")
    if suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if suffix == ".npz":
        return _read_npz(path)
    warnings.warn(
        f"{path.name} is a pickle; only its tensors are read (weights_only=True). Prefer safetensors.", stacklevel=3
    )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here, none of which says more to a user
        raise ValueError(
            f"{path} cannot be read safely: it is truncated, or holds more than tensors ({type(error).__name__}); "
            "convert it to safetensors where you trust it"
        ) from error
    return _unwrap(loaded, path)


def _read_npz(path: Path) -> dict[str, Tensor]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a whole .npz file of plain arrays: {error}") from error


def _unwrap(loaded: object, path: Path) -> dict[str, Tensor]:
    for _ in range(len(WRAPPERS)):  # a wrapper may hold a wrapper, and in a hostile file itself
        if not isinstance(loaded, Mapping) or any(isinstance(value, Tensor) for value in loaded.values()):
            break
        inner = next((loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, Mapping) or not any(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path} holds no tensors by name")
    return {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}


def _read_folder(path: Path) -> dict[str, Tensor]:
    name = next((name for name in FOLDER_NAMES if (path / name).is_file()), None)
    if name is None:
        single = sorted(path.glob("*.safetensors"))
        if len(single) == 1:
            return _read_file(single[0])
        raise ValueError(f"the folder {path} has no weights: expected {' or '.join(FOLDER_NAMES[1:])}")
    if not name.endswith(".index.json"):
        return _read_file(path / name)
    try:
        shards = sorted(set(json.loads((path / name).read_text(encoding="utf-8"))["weight_map"].values()))
        if not all(isinstance(shard, str) for shard in shards):
            raise TypeError("a file's name is text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / name} is not an index of safetensors files") from error
    state: dict[str, Tensor] = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise ValueError(f"{path / name} names {shard!r}, which is not a file of that folder")
        state |= _read_file(path / shard)
    return state


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = hub_id.partition("@")
    try:
        return Path(
            snapshot_download(
                name, revision=revision or None, allow_patterns=["*.safetensors", "*.json", "pytorch_model.bin"]
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ValueError(
            f"weights is {hub_id!r}: there is no such file or folder, and the Hub did not give it ({type(error).__name__})"
        ) from error


def class_count(model: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """The number of classes of a checkpoint already in ``model``'s layout; None where it has no classifier."""
    weight = state.get(f"{getattr(model, 'classifier_name', '')}.weight")
    return None if weight is None else int(weight.shape[0])


def arguments(build: Callable[..., nn.Module]) -> list[str]:
    """The names of what a model's function takes; where it hands further arguments on to its class, also those."""
    names: dict[str, None] = {}
    made = inspect.signature(build).return_annotation
    classes = made.__mro__ if inspect.isclass(made) else ()
    for function in (build, *(vars(cls)["__init__"] for cls in classes if "__init__" in vars(cls))):
        taken = inspect.signature(function).parameters.values()
        names |= {p.name: None for p in taken if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != "self"}
        if not any(p.kind is p.VAR_KEYWORD for p in taken):
            break
    return list(names)


def create(
    build: Callable[..., nn.Module], source: str | Path | None, *, num_classes: int | None, **arguments: object
) -> nn.Module:
    """Builds a model with the checkpoint's number of classes, or another, and loads the checkpoint into it."""
    classes = {} if num_classes is None else {"num_classes": num_classes}
    if source is None:
        return build(**classes, **arguments)
    state = read(source)
    with torch.device("meta"):
        probe = build(**classes, **arguments)
    converted = convert(probe, state)
    found = class_count(probe, converted)
    if num_classes is None and found is not None:
        classes = {"num_classes": found}
    model = build(**classes, **arguments)
    load(model, state)
    return model


def convert(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` in the layout of ``model``: its class knows the layouts it reads."""
    converter = getattr(type(model), "convert_state_dict", None)
    return dict(state) if converter is None else converter(dict(state))


def load(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> nn.Module:
    """Loads a checkpoint into ``model``, in ours or a layout its class converts.

    Only a classifier of another number of classes stays new, with a warning. Every other missing, unexpected or
    misshapen tensor, and one with NaN or infinity in it, raises ``ValueError`` that names it.
    """
    state = convert(model, source if isinstance(source, Mapping) else read(source))
    own = model.state_dict()
    head = getattr(model, "classifier_name", None)
    kept_new: list[str] = []
    if head is not None:
        for name in (f"{head}.weight", f"{head}.bias"):
            if (
                name in own
                and name in state
                and own[name].shape[0] != state[name].shape[0]
                and own[name].shape[1:] == state[name].shape[1:]
            ):
                state[name] = own[name]
                kept_new.append(name)
    # BN's batch counter is bookkeeping that many published checkpoints leave out.
    for name, value in own.items():
        if name.endswith("num_batches_tracked") and name not in state:
            state[name] = value
    # A counter is the least of what tells two networks apart.
    state = dict(sorted(state.items(), key=lambda item: item[0].endswith("num_batches_tracked")))
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is unexpected" for name in state if name not in own]
    problems += _misshapen(model, state)
    problems += [f"{name} holds values that are not finite" for name, value in state.items() if not _finite(value)]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ValueError(f"the checkpoint does not fit {type(model).__name__}: {'; '.join(problems[:5])}{more}")
    model.load_state_dict(state)
    if kept_new:
        warnings.warn(
            f"the checkpoint's classifier has another number of classes; {', '.join(kept_new)} stay new", stacklevel=2
        )
    return model


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or value.is_meta or bool(torch.isfinite(value).all())


def _misshapen(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    # Tried on a twin without storage, so that what a model's own hooks make fit (positions of another image size) counts
    # as fitting, and a checkpoint that does not fit leaves the model as it was.
    twin = copy.deepcopy(model).to("meta")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing is copied to a tensor without storage
            twin.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:
        found = re.findall(
            r"size mismatch for (\S+): .*?torch\.Size\(\[(.*?)\]\).*?torch\.Size\(\[(.*?)\]\)", str(error)
        )
        return [f"{name} has shape ({theirs}), expected ({ours})" for name, theirs, ours in found] or [str(error)]
    return []


def save(model: nn.Module, path: str | Path) -> None:
    """Writes ``model``'s weights as safetensors (tied weights once), whole or not at all."""
    from safetensors.torch import save_model

    with replacing(path) as temporary:
        save_model(model, str(temporary))
