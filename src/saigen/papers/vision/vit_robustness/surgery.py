"""Model perturbations, for any transformer that is a list of residual blocks: lesions, short sight, and what blocks say.

``lesion`` and ``restrict_attention`` change a model within a ``with`` block and put everything back after it, exceptions
included; no weight is touched. Blocks are found by name: timm's and our own ViTs (``blocks``), torchvision's and
Transformers' encoders (``layers``, ``layer``); sub-layers likewise, or give the dotted names of the modules.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LISTS = ("blocks", "layers", "layer", "resblocks", "h")
ATTENTIONS = ("attn", "self_attention", "attention", "self_attn")
MLPS = ("mlp", "ffn", "feed_forward")

Number = float | int
Places = Sequence[int | str] | int | str


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The longest list of blocks in ``model``, by dotted name, in their order.

    Raises ``ValueError`` where no module is called like a list of blocks.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in LISTS and isinstance(module, nn.Sequential | nn.ModuleList) and len(module)
    ]
    if not lists:
        raise ValueError(f"model is a {type(model).__name__} without a list of blocks, allowed names are {LISTS}")
    name, longest = max(lists, key=lambda entry: len(entry[1]))
    return {f"{name}.{child}": block for child, block in longest.named_children()}


def _names(model: nn.Module, places: Places, kinds: Sequence[str] = ()) -> list[str]:
    """Dotted names of blocks, or of their sub-layers of one of ``kinds``, from numbers (negative from the end) or names."""
    found = []
    for place in [places] if isinstance(places, int | str) else places:
        if isinstance(place, str):
            found.append(place)
            continue
        blocks = find_blocks(model)
        if not -len(blocks) <= place < len(blocks):
            raise ValueError(f"block is {place}, allowed are {-len(blocks)} to {len(blocks) - 1}")
        name, block = list(blocks.items())[place]
        if kinds:
            kind = next((kind for kind in kinds if isinstance(getattr(block, kind, None), nn.Module)), None)
            if kind is None:
                raise ValueError(f"block {name} has no sub-layer called {' or '.join(kinds)}: give its dotted name")
            name = f"{name}.{kind}"
        found.append(name)
    return found


def _nothing(module: nn.Module) -> Callable[..., Any]:
    """What a sub-layer does that adds zero to the residual stream; PyTorch's attention gives a pair."""
    pair = isinstance(module, nn.MultiheadAttention)
    return lambda x, *_, **__: (torch.zeros_like(x), None) if pair else torch.zeros_like(x)


def _skip(module: nn.Module) -> Callable[..., Any]:
    """What a block does that lets the residual stream go by."""
    return lambda x, *_, **__: x


@contextmanager
def _forwards(model: nn.Module, changes: dict[str, Callable[[nn.Module], Callable[..., Any]]]) -> Iterator[nn.Module]:
    """``model`` while modules, by dotted name, run another forward, made from the module itself."""
    there = dict(model.named_modules())
    for name in changes:
        if name not in there or not name:
            raise ValueError(f"{name!r} is no module of the {type(model).__name__}")
    modules = [there[name] for name in changes]
    before = [module.__dict__.get("forward") for module in modules]
    # PyTorch's encoder would read the weights of its sub-layers past their forwards
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module, change in zip(modules, changes.values(), strict=True):
            module.forward = change(module)
        yield model
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


@contextmanager
def lesion(model: nn.Module, blocks: Places = (), attn: Places = (), mlp: Places = ()) -> Iterator[nn.Module]:
    """``model`` without some blocks, attention layers or MLPs while the ``with`` block lasts; nothing is retrained.

    A block is skipped whole; a sub-layer adds zero to the residual stream, so that x stays x (not norm(x)). Places are
    block numbers, negative ones from the end, or dotted module names. What is removed is not computed.

    Raises ``ValueError`` for a place that is not there.

    >>> from saigen.nn.vision_transformer import VisionTransformer
    >>> model = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=3, num_heads=2).eval()
    >>> with lesion(model, blocks=[1], attn=-1):
    ...     _ = model(torch.rand(1, 3, 16, 16))
    """
    removed = dict.fromkeys((*_names(model, attn, ATTENTIONS), *_names(model, mlp, MLPS)), _nothing)
    with _forwards(model, removed | dict.fromkeys(_names(model, blocks), _skip)):
        yield model


def attention_mask(
    grid: tuple[int, int],
    max_distance: Number | None,
    *,
    metric: Literal["chebyshev", "euclidean"] = "chebyshev",
    num_prefix_tokens: int = 1,
) -> Bool[Tensor, "n n"]:
    """Who may see whom (row sees column): patches no farther than ``max_distance`` patches; prefix tokens see and are seen.

    0 leaves a patch itself and the prefix (class) tokens; None, or the grid's side less one, is no restriction under
    "chebyshev", which measures square windows.

    Raises ``ValueError`` for a negative distance and for another metric.

    >>> attention_mask((1, 3), 1)[1:, 1:].int().tolist()
    [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
    """
    if max_distance is not None and max_distance < 0:
        raise ValueError(f"max_distance is {max_distance}, allowed is max_distance >= 0, or None for no restriction")
    if metric not in ("chebyshev", "euclidean"):
        raise ValueError(f"metric is {metric!r}, allowed is 'chebyshev' or 'euclidean'")
    count = grid[0] * grid[1] + num_prefix_tokens
    mask = torch.ones(count, count, dtype=torch.bool)
    if max_distance is None:
        return mask
    places = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1]))
    apart = (places[:, None] - places).abs()
    # whole numbers on both sides: no pair is lost to a root's last digit
    near = apart.amax(-1) <= max_distance if metric == "chebyshev" else apart.square().sum(-1) <= max_distance**2
    mask[num_prefix_tokens:, num_prefix_tokens:] = near
    return mask


class _Masked(TorchFunctionMode):
    """Within it, attention obeys a mask: fused kernels are handed it, and so is the softmax of hand-written ones."""

    def __init__(self, mask: Tensor) -> None:
        self.mask, self.obeyed = mask, False

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, n = dict(kwargs or {}), len(self.mask)
        name = getattr(function, "__name__", "")
        if name == "scaled_dot_product_attention":
            query, key = args[0], args[1] if len(args) > 1 else kwargs["key"]
            if query.shape[-2] == n == key.shape[-2]:
                given = args[3] if len(args) > 3 else kwargs.get("attn_mask")
                mask = self._join(given, query)
                args = (*args[:3], mask, *args[4:]) if len(args) > 3 else args
                if len(args) <= 3:
                    kwargs["attn_mask"] = mask
                self.obeyed = True
        elif name == "multi_head_attention_forward" and args[0].shape[-3 if args[0].ndim == 3 else -2] == n:
            # its masks are True where attention is not allowed, and it is laid out (tokens, batch, channels)
            given = kwargs.get("attn_mask")
            blocked = ~self.mask.to(args[0].device)
            if given is not None:
                blocked = given | blocked if given.dtype == torch.bool else given.masked_fill(blocked, -math.inf)
            kwargs["attn_mask"], self.obeyed = blocked, True
        elif name == "softmax" and isinstance(args[0], Tensor) and args[0].shape[-2:] == (n, n):
            args = (args[0].masked_fill(~self.mask.to(args[0].device), -math.inf), *args[1:])
            self.obeyed = True
        return function(*args, **kwargs)

    def _join(self, given: Tensor | None, query: Tensor) -> Tensor:
        mask = self.mask.to(query.device)
        if given is None:
            return mask
        return given & mask if given.dtype == torch.bool else given.masked_fill(~mask, -math.inf)


@contextmanager
def restrict_attention(
    model: nn.Module,
    max_distance: Number | None = None,
    *,
    layers: Places | None = None,
    patch_to_patch: bool = True,
    metric: Literal["chebyshev", "euclidean"] = "chebyshev",
    grid: tuple[int, int] | None = None,
    num_prefix_tokens: int | None = None,
) -> Iterator[nn.Module]:
    """``model`` with short-sighted attention while the ``with`` block lasts: see ``attention_mask``.

    ``layers`` are the blocks concerned (numbers or dotted names; all by default). ``patch_to_patch=False`` removes all
    attention between patches: each sees itself and the class token only, which is distance 0. ``grid`` and
    ``num_prefix_tokens`` are read off the model where it has them (``grid_size``, ``num_prefix_tokens``).

    Works for any implementation that goes through ``scaled_dot_product_attention`` or a softmax of (…, n, n) scores.
    Raises ``ValueError`` where the grid is not known, and where attention took place and could not be restricted.

    >>> from saigen.nn.vision_transformer import VisionTransformer
    >>> model = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=3, num_heads=2).eval()
    >>> with restrict_attention(model, max_distance=0, layers=[-1]):
    ...     _ = model(torch.rand(1, 3, 16, 16))
    """
    if grid is None:
        embedding = getattr(model, "patch_embed", None)
        grid = getattr(model, "grid_size", None) or getattr(embedding, "grid_size", None)
    if grid is None:
        raise ValueError(f"grid is None and the {type(model).__name__} has no grid_size, allowed is (rows, columns)")
    if num_prefix_tokens is None:
        num_prefix_tokens = getattr(model, "num_prefix_tokens", 1)
    mask = attention_mask(
        tuple(grid), max_distance if patch_to_patch else 0, metric=metric, num_prefix_tokens=num_prefix_tokens
    )
    names = _names(model, range(len(find_blocks(model))) if layers is None else layers)
    if bool(mask.all()):
        yield model
        return

    def obeying(module: nn.Module) -> Callable[..., Any]:
        forward = module.forward

        def restricted(*args: Any, **kwargs: Any) -> Any:
            with _Masked(mask) as mode:
                out = forward(*args, **kwargs)
            if not mode.obeyed:
                raise ValueError(
                    f"no attention over {len(mask)} tokens in a {type(module).__name__}: give the right grid"
                )
            return out

        return restricted

    with _forwards(model, dict.fromkeys(names, obeying)):
        yield model


@torch.no_grad()
def block_outputs(
    model: nn.Module, x: Float[Tensor, "n c h w"], *, blocks: Sequence[int | str] | None = None, batch_size: int = 256
) -> list[Tensor]:
    """The outputs of the blocks, after the residual additions, for all images: one tensor a block, on the CPU.

    >>> from saigen.nn.vision_transformer import VisionTransformer
    >>> model = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=3, num_heads=2).eval()
    >>> [tuple(out.shape) for out in block_outputs(model, torch.rand(2, 3, 16, 16), blocks=[0, -1])]
    [(2, 5, 8), (2, 5, 8)]
    """
    names = _names(model, range(len(find_blocks(model))) if blocks is None else blocks)
    modules = dict(model.named_modules())
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        modules[name].register_forward_hook(
            lambda _, __, out, name=name: kept[name].append((out[0] if isinstance(out, tuple) else out).detach().cpu())
        )
        for name in names
    ]
    try:
        for batch in x.split(batch_size):
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(kept[name]) for name in names]


def layer_similarity(
    model: nn.Module,
    x: Float[Tensor, "n c h w"],
    *,
    tokens: Literal["all", "cls", "patches"] = "all",
    kind: Literal["cosine", "cka"] = "cosine",
    num_prefix_tokens: int | None = None,
    batch_size: int = 256,
) -> Float[Tensor, "l l"]:
    """How alike the representations of every two blocks are, (blocks, blocks), over all tokens or the class token.

    "cosine" is the mean over images and tokens of the cosine of the two vectors, each less its block's mean; "cka" the
    linear centred kernel alignment (Kornblith et al., 2019), which no rotation of a block's space changes.

    >>> from saigen.nn.vision_transformer import VisionTransformer
    >>> model = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=3, num_heads=2).eval()
    >>> layer_similarity(model, torch.rand(2, 3, 16, 16), tokens="patches").shape
    torch.Size([3, 3])
    """
    if tokens not in ("all", "cls", "patches"):
        raise ValueError(f"tokens is {tokens!r}, allowed is 'all', 'cls' or 'patches'")
    if kind not in ("cosine", "cka"):
        raise ValueError(f"kind is {kind!r}, allowed is 'cosine' or 'cka'")
    prefix = getattr(model, "num_prefix_tokens", 1) if num_prefix_tokens is None else num_prefix_tokens
    if tokens == "cls" and prefix < 1:
        raise ValueError("tokens is 'cls', allowed are 'all' and 'patches' for a model without a class token")
    part = {"all": slice(None), "cls": slice(0, 1), "patches": slice(prefix, None)}[tokens]
    outputs = [out[:, part].flatten(0, 1) for out in block_outputs(model, x, batch_size=batch_size)]
    similarity = mean_cosine if kind == "cosine" else linear_cka
    count = len(outputs)
    found = torch.ones(count, count)
    for i in range(count):
        for j in range(i):
            found[i, j] = found[j, i] = similarity(outputs[i], outputs[j])
    return found


def mean_cosine(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """The mean over the rows of the cosine between ``a`` and ``b``, each centred over the rows.

    >>> x = torch.rand(5, 3)
    >>> round(mean_cosine(x, 2 * x).item(), 4)
    1.0
    """
    return torch.cosine_similarity(a - a.mean(0), b - b.mean(0)).mean()


def linear_cka(a: Float[Tensor, "n d"], b: Float[Tensor, "n e"]) -> Float[Tensor, ""]:
    """Linear CKA of two sets of ``n`` vectors: ‖AᵀB‖² / (‖AᵀA‖ ‖BᵀB‖) in Frobenius norms, columns centred.

    >>> x = torch.rand(9, 3)
    >>> round(linear_cka(x, 2 * x.flip(1)).item(), 4)
    1.0
    """
    a, b = (v.double() - v.double().mean(0) for v in (a, b))
    norm = torch.linalg.matrix_norm
    return (norm(a.T @ b) ** 2 / (norm(a.T @ a) * norm(b.T @ b))).float()
