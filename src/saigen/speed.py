"""The quickest equivalent form of a module on this machine, checked against the original."""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.benchmark import Timer

FORMS = ("original", "folded", "channels_last", "bf16", "compiled", "compiled bf16")
# which layers a norm can be folded into
_NORMS = {
    nn.BatchNorm1d: (nn.Linear, nn.Conv1d),
    nn.BatchNorm2d: (nn.Conv2d,),
    nn.BatchNorm3d: (nn.Conv3d,),
}


class Fastest(nn.Module):
    """A module in the form that was quickest; called like the original, for inference.

    ``form`` names the form, ``seconds`` the time of one call of each form that was tried, ``errors`` how far each was
    from the original (relative to the largest output), ``rejected`` why a form was not taken. The first call with
    inputs of another shape may compile again.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        module: nn.Module,
        form: str,
        seconds: dict[str, float],
        errors: dict[str, float],
        rejected: dict[str, str],
    ) -> None:
        super().__init__()
        self.module = module
        self._run = run
        self.form, self.seconds, self.errors, self.rejected = form, seconds, errors, rejected
        self.eval()

    @torch.inference_mode()
    def forward(self, *inputs: Any) -> Any:
        return self._run(*inputs)

    def extra_repr(self) -> str:
        return f"form={self.form!r}"


def fold_batch_norms(model: nn.Module, *inputs: Any) -> nn.Module:
    """A copy of ``model`` in eval mode whose batch norms are folded into the convolution or linear layer before them.

    Which layer comes before which norm is seen in one run on ``inputs``, so any control flow will do. Only pairs are
    folded that hand the very same tensor over, once; a norm that also does something else (a subclass) stays.
    Raises ``ValueError`` where there is no such pair.
    """
    model = copy.deepcopy(model).eval()
    names = {module: name for name, module in model.named_modules()}
    calls: dict[nn.Module, int] = {}
    made: dict[int, tuple[Tensor, nn.Module]] = {}
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        if type(module) in _NORMS:
            _, layer = made.get(id(arguments[0]), (None, None))
            if layer is not None and module.running_mean is not None and isinstance(layer, _NORMS[type(module)]):
                pairs.append((layer, module))
        elif isinstance(output, Tensor):
            made[id(output)] = (output, module)  # held, so that no other tensor takes the identity

    layers = (*_NORMS, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    hooks = [module.register_forward_hook(after) for module in names if isinstance(module, layers)]
    try:
        with torch.inference_mode():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    pairs = [pair for pair in pairs if calls[pair[0]] == 1 and calls[pair[1]] == 1]
    if not pairs:
        raise ValueError("the model has no batch norm that directly follows a convolution or linear layer")
    for layer, norm in pairs:
        fold = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        _replace(model, names[layer], fold(layer, norm))
        _replace(model, names[norm], nn.Identity())
    return model


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def fastest(
    model: nn.Module,
    example: Tensor | Sequence[Any],
    *,
    tolerance: float = 2e-2,
    forms: Sequence[str] = FORMS,
    seconds: float = 1.0,
) -> Fastest:
    """The quickest form of ``model`` for inputs like ``example`` whose outputs agree with those of the original.

    Tried are, each on a copy, and each upon the one before where that worked: batch norms folded into the layers
    before them, channels-last memory, bfloat16 arithmetic, and ``torch.compile`` with frozen weights. The largest
    difference of an output from the original's, relative to the largest absolute output, must be at most
    ``tolerance``; 1e-4 or less rules bfloat16 out, 1e-6 or less most of the rest. Forms that cannot be made here (no
    C++ compiler, untraceable control flow) are passed over and named in ``rejected``. Each form runs for about
    ``seconds``, with as many threads as torch uses now. Only for inference: the result tracks no gradients.

    Raises ``ValueError`` for an unknown form or a negative tolerance.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    >>> quick = fastest(net, torch.rand(1, 3, 8, 8), tolerance=1e-5, forms=("folded",), seconds=0.01)
    >>> quick(torch.rand(2, 3, 8, 8)).shape
    torch.Size([2, 8, 6, 6])
    """
    unknown = [form for form in forms if form not in FORMS]
    if unknown:
        raise ValueError(f"forms has {unknown[0]!r}, allowed are {', '.join(FORMS)}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}, allowed is at least 0")
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    original = copy.deepcopy(model).eval()
    with torch.inference_mode():
        wanted = original(*inputs)
    candidates: dict[str, tuple[Callable[..., Any], nn.Module]] = {"original": (original, original)}
    errors, rejected = {"original": 0.0}, {}
    for form, make in _makers(original, inputs, forms):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run, module = make()
                with torch.inference_mode():
                    error = _difference(run(*inputs), wanted)
        except Exception as problem:  # compilers and tracers fail in a hundred ways, and none of them is the user's
            rejected[form] = f"{type(problem).__name__}: {str(problem).strip().splitlines()[0] if str(problem) else ''}"
            continue
        errors[form] = error
        if not error <= tolerance:
            rejected[form] = f"differs by {error:.2g} of the largest output, allowed is {tolerance:g}"
            continue
        candidates[form] = (run, module)
    times = _times({form: run for form, (run, _) in candidates.items()}, inputs, seconds)
    best = min(times, key=times.__getitem__)
    run, module = candidates[best]
    return Fastest(run, module, best, times, errors, rejected)


Made = tuple[Callable[..., Any], nn.Module]


def _makers(
    original: nn.Module, inputs: tuple[Any, ...], forms: Sequence[str]
) -> Iterator[tuple[str, Callable[[], Made]]]:
    # where nothing can be folded, the other forms start from the original
    try:
        base = fold_batch_norms(original, *inputs)
        with torch.inference_mode():
            if _difference(base(*inputs), original(*inputs)) > 1e-3:
                raise ValueError("something else than the norm reads a layer that it would be folded into")
    except Exception as problem:
        base, reason = original, problem

        def fold() -> Made:
            raise reason
    else:

        def fold() -> Made:
            return base, base

    makers = {
        "folded": fold,
        "channels_last": lambda: _channels_last(base),
        "bf16": lambda: _bf16(base),
        "compiled": lambda: _compiled(*_channels_last(base)),
        "compiled bf16": lambda: _compiled(*_bf16(base)),
    }
    yield from ((form, make) for form, make in makers.items() if form in forms)


def _channels_last(model: nn.Module) -> tuple[Callable[..., Any], nn.Module]:
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)

    def run(*inputs: Any) -> Any:
        return model(*tree_map(_to_channels_last, inputs))

    return run, model


def _to_channels_last(x: Any) -> Any:
    image = isinstance(x, Tensor) and x.ndim == 4
    return x.contiguous(memory_format=torch.channels_last) if image else x


def _bf16(model: nn.Module) -> tuple[Callable[..., Any], nn.Module]:
    model = copy.deepcopy(model).to(torch.bfloat16).to(memory_format=torch.channels_last)

    def run(*inputs: Any) -> Any:
        inputs = tree_map(lambda x: _to_channels_last(_cast(x, torch.float32, torch.bfloat16)), inputs)
        return tree_map(lambda x: _cast(x, torch.bfloat16, torch.float32), model(*inputs))

    return run, model


def _cast(x: Any, source: torch.dtype, target: torch.dtype) -> Any:
    return x.to(target) if isinstance(x, Tensor) and x.dtype == source else x


def _compiled(run: Callable[..., Any], model: nn.Module) -> tuple[Callable[..., Any], nn.Module]:
    import torch._inductor.config as inductor

    # Freezing packs the weights into the layouts of the machine's kernels, once, and fuses activations into convolutions.
    # It is asked for around the call that compiles: Dynamo reads the setting itself, and torch.compile's own ``options``
    # reach only Inductor, after Dynamo has made the weights inputs of the graph, which are not frozen.
    settings = {"freezing": True}
    if "cpp.weight_prepack" in inductor.get_config_copy():
        settings["cpp.weight_prepack"] = True
    compiled, known = torch.compile(run, dynamic=False), set()

    def frozen(*inputs: Any) -> Any:
        kind = tuple(
            (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else repr(x) for x in tree_flatten(inputs)[0]
        )
        if kind in known:
            return compiled(*inputs)
        with inductor.patch(settings):
            output = compiled(*inputs)
        known.add(kind)
        return output

    return frozen, model


def _difference(found: Any, wanted: Any) -> float:
    found, wanted = tree_flatten(found)[0], tree_flatten(wanted)[0]
    if len(found) != len(wanted):
        return float("inf")
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        if not isinstance(b, Tensor) or not b.is_floating_point():
            worst = max(worst, 0.0 if not isinstance(b, Tensor) and a == b else float(not torch.equal(a, b)))
            continue
        scale = b.abs().max().clamp_min(torch.finfo(b.dtype).tiny)
        error = ((a - b).abs().max() / scale).item() if a.shape == b.shape else float("inf")
        worst = max(worst, error if error == error else float("inf"))
    return worst


def _times(runs: dict[str, Callable[..., Any]], inputs: tuple[Any, ...], seconds: float) -> dict[str, float]:
    # in rounds, one form after the other, so that a busy moment of the machine strikes all of them alike
    timers = {
        form: Timer(
            "run(*inputs)",
            globals={"run": torch.inference_mode()(run), "inputs": inputs},
            num_threads=torch.get_num_threads(),
        )
        for form, run in runs.items()
    }
    rounds = 5
    calls = {form: max(1, int(seconds / rounds / timer.timeit(2).median)) for form, timer in timers.items()}
    found: dict[str, list[float]] = {form: [] for form in timers}
    for _ in range(rounds):
        for form, timer in timers.items():
            found[form].append(timer.timeit(calls[form]).median)
    return {form: sorted(times)[rounds // 2] for form, times in found.items()}
