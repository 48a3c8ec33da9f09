"""The quickest equivalent form of a module on this machine, checked against the original."""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.benchmark import Timer

FORMS = ("original", "folded", "channels_last", "bf16", "compiled", "compiled bf16")
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


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


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in eval mode whose batch norms are folded into the convolution or linear layer before them.

    Follows the data with torch.fx, so it finds pairs whatever their names; a convolution whose output something else
    reads as well stays as it is. Raises what torch.fx raises where the model's control flow depends on its input.
    """
    model = copy.deepcopy(model).eval()
    graph = fx.symbolic_trace(model)
    modules = dict(graph.named_modules())
    for node in list(graph.graph.nodes):
        norm = modules.get(node.target) if node.op == "call_module" else None
        if not isinstance(norm, _NORMS) or norm.running_mean is None or len(node.args) != 1:
            continue
        before = node.args[0]
        layer = modules.get(before.target) if before.op == "call_module" else None
        shared = len(before.users) > 1 or _uses(graph, before.target) > 1 or _uses(graph, node.target) > 1
        if shared or not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
            continue
        if isinstance(layer, nn.Linear) and not isinstance(norm, nn.BatchNorm1d):
            continue
        fold = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        folded = fold(layer, norm)
        parent, _, name = before.target.rpartition(".")
        setattr(graph.get_submodule(parent), name, folded)
        modules[before.target] = folded
        node.replace_all_uses_with(before)
        graph.graph.erase_node(node)
    graph.graph.lint()
    graph.recompile()
    graph.delete_all_unused_submodules()
    return graph


def _uses(graph: fx.GraphModule, target: Any) -> int:
    return sum(node.op == "call_module" and node.target == target for node in graph.graph.nodes)


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
    for form, make in _makers(original, forms):
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


def _makers(
    original: nn.Module, forms: Sequence[str]
) -> Iterator[tuple[str, Callable[[], tuple[Callable[..., Any], nn.Module]]]]:
    # folding needs a trace of the whole model; where there is none, the other forms start from the original
    try:
        base = fold_batch_norms(original)
    except Exception as problem:
        base, reason = original, problem

        def fail() -> Any:
            raise reason

        if "folded" in forms:
            yield "folded", fail
    else:
        if "folded" in forms:
            yield "folded", lambda: (base, base)
    if "channels_last" in forms:
        yield "channels_last", lambda: _channels_last(base)
    if "bf16" in forms:
        yield "bf16", lambda: _bf16(base)
    if "compiled" in forms:
        yield "compiled", lambda: _compiled(*_channels_last(base))
    if "compiled bf16" in forms:
        yield "compiled bf16", lambda: _compiled(*_bf16(base))


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

    # freezing packs the weights into the layouts of the machine's kernels, once; it needs to see no gradients
    options = {"freezing": True}
    if "cpp.weight_prepack" in inductor.get_config_copy():
        options["cpp.weight_prepack"] = True
    return torch.compile(run, dynamic=False, options=options), model


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
