"""Parameters and multiply-adds, counted without data; time and memory, measured.

Papers mix up MACs and FLOPs. Here a MAC is one multiply-add of a convolution, a linear layer, a matrix product or
attention; FLOPs, where a paper means what the word says, are twice that.
"""

import copy
import math
import statistics
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


def parameters(model: nn.Module, *, trainable_only: bool = False) -> int:
    """Number of parameters; a shared one counts once.

    >>> parameters(nn.Linear(3, 2))
    8
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def buffers(model: nn.Module) -> int:
    """Number of values in floating-point buffers: running means and variances, not step counters.

    >>> buffers(nn.BatchNorm2d(8))
    16
    """
    return sum(b.numel() for b in model.buffers() if b.is_floating_point())


# --- multiply-adds -------------------------------------------------------------------------------------------------


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, transposed: bool, *_: Any
) -> Callable[[Any], int]:
    # weight[0] holds the taps that make one output value (or, transposed, that one input value is spread over)
    taps = weight.shape[1:].numel()
    return lambda out: taps * (x.numel() if transposed else out.numel())


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Callable[[Any], int]:
    *batch, n, d = query.shape
    return lambda out: math.prod(batch) * n * key.shape[-2] * (d + value.shape[-1])


# the reduced dimension times the size of the output is the number of multiply-adds of any matrix product
_COUNTS: dict[Any, Callable[..., Callable[[Any], int]]] = {
    aten.convolution: _convolution,
    aten._convolution: _convolution,
    aten.mm: lambda a, b: lambda out: a.shape[-1] * out.numel(),
    aten.bmm: lambda a, b: lambda out: a.shape[-1] * out.numel(),
    aten.mv: lambda a, b: lambda out: a.numel(),
    aten.dot: lambda a, b: lambda out: a.numel(),
    aten.vdot: lambda a, b: lambda out: a.numel(),
    aten.addmm: lambda bias, a, b, **_: lambda out: a.shape[-1] * out.numel(),
    aten.addmv: lambda bias, a, b, **_: lambda out: a.numel(),
    aten.addr: lambda bias, a, b, **_: lambda out: out.numel(),
    aten.baddbmm: lambda bias, a, b, **_: lambda out: a.shape[-1] * out.numel(),
    aten.addbmm: lambda bias, a, b, **_: lambda out: a.shape[0] * a.shape[-1] * out.numel(),
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_cudnn_attention: _attention,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
}


class _MacCounter(TorchDispatchMode):
    """Adds up the multiply-adds of every operation below it; composite operations are counted by their parts."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket) if func.namespace != "aten" else None
        if formula is not None:  # a room's own operator says what it costs, two a multiply-add
            out = func(*args, **kwargs)
            self.total += formula(*args, **kwargs, out_val=out) // 2
            return out
        count = _COUNTS.get(func._overloadpacket)
        if count is None:
            # inference mode hands composite operations (linear, matmul, conv2d …) over whole
            with self:
                parts = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if parts is NotImplemented else parts
        out = func(*args, **kwargs)
        self.total += count(*args, **kwargs)(out)
        return out


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of ``model`` on the meta device, made without copying a weight."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    memo: dict[int, Any] = {}
    for identity, tensor in tensors.items():
        empty = torch.empty_like(tensor, device="meta")
        memo[identity] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo).to("meta")


def macs(
    model: nn.Module | Callable[[], nn.Module],
    *shapes: Sequence[int],
    inputs: Sequence[Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Multiply-adds of one forward pass in eval mode over one sample, counted on the meta device.

    ``model`` is a module (left untouched) or a function that builds one, which is then called under
    ``torch.device("meta")``. ``shapes`` are the shapes of its inputs without the batch dimension; a model that takes
    something else is given ``inputs``, tensors with a batch dimension, and the count is for that batch.
    Counted, once each: convolutions, linear layers, matrix products, attention (both of its products). Not counted:
    biases, norms, activations, pooling, products element by element.
    Raises ``ValueError`` unless exactly one of ``shapes`` and ``inputs`` is given.

    >>> macs(nn.Conv2d(3, 8, 3, padding=1, bias=False), (3, 10, 10))
    21600
    """
    if bool(shapes) == (inputs is not None):
        raise ValueError(f"shapes is {shapes} and inputs is {inputs}, allowed is exactly one of the two")
    if isinstance(model, nn.Module):
        model = on_meta(model)
    else:
        with torch.device("meta"):
            model = model()
    if inputs is None:
        inputs = [torch.empty(1, *shape, dtype=dtype, device="meta") for shape in shapes]
    else:
        inputs = [x.to("meta") if isinstance(x, Tensor) else x for x in inputs]
    counter = _MacCounter()
    with torch.no_grad(), torch.device("meta"), counter:
        model.eval()(*inputs)
    return counter.total


# --- time ----------------------------------------------------------------------------------------------------------


def latency(fn: Callable[[], Any], *, threads: int | None = None, min_run_time: float = 0.5) -> float:
    """Median wall-clock seconds of one call of ``fn``, after a warm-up.

    ``threads`` defaults to the number torch uses now. The calls are repeated for at least ``min_run_time`` seconds.
    """
    fn()
    timer = Timer("fn()", globals={"fn": fn}, num_threads=threads or torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=min_run_time).median


def speed_ratio(
    baseline: Callable[[], Any],
    ours: Callable[[], Any],
    pairs: int = 5,
    *,
    threads: int | None = None,
    seconds: float = 0.3,
    rounds: int = 5,
) -> float:
    """How many times as fast ``ours`` is as ``baseline``: wall-clock time of the baseline over ours.

    The two run in alternation for ``pairs`` pairs of about ``seconds`` each side, the order swapped from pair to pair,
    and the median of the log-ratios is taken. Before that, the baseline runs against itself in the same way, and those
    ratios must lie on both sides of 1; ``rounds`` attempts are made. Raises ``RuntimeError`` when none succeeds,
    because a machine on which one thing is steadily faster than itself cannot compare two, and ``ValueError`` for fewer
    than two pairs.
    """
    if pairs < 2:
        raise ValueError(f"pairs is {pairs}, allowed is at least 2")
    threads = threads or torch.get_num_threads()
    a = _Clock(baseline, threads, seconds)
    if not any(_straddles_one(_log_ratios(a, a, pairs)) for _ in range(rounds)):
        raise RuntimeError(
            f"the machine is not quiet: timed against itself {rounds} times over, the baseline was always faster or "
            "always slower than itself; end what else is running and measure again"
        )
    b = _Clock(ours, threads, seconds)
    return math.exp(statistics.median(_log_ratios(a, b, pairs)))


class _Clock:
    """Seconds of one call, from as many calls as fill the given time."""

    def __init__(self, fn: Callable[[], Any], threads: int, seconds: float) -> None:
        fn()
        self.timer = Timer("fn()", globals={"fn": fn}, num_threads=threads)
        once = self.timer.timeit(1).median
        self.calls = max(1, round(seconds / max(once, 1e-9)))

    def __call__(self) -> float:
        return self.timer.timeit(self.calls).median


def _log_ratios(a: Callable[[], float], b: Callable[[], float], pairs: int) -> list[float]:
    ratios = []
    for pair in range(pairs):
        if pair % 2:
            second, first = b(), a()
        else:
            first, second = a(), b()
        ratios.append(math.log(first / second))
    return ratios


def _straddles_one(log_ratios: Sequence[float]) -> bool:
    return min(log_ratios) <= 0.0 <= max(log_ratios)


# --- memory --------------------------------------------------------------------------------------------------------


class _LiveStorages(TorchDispatchMode):
    """Follows the bytes of the storages that operations below it made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_iter((args, kwargs)):
            self._note(tensor, made_here=False)
        out = func(*args, **kwargs)
        for tensor in tree_iter(out):
            self._note(tensor, made_here=True)
        return out

    def _note(self, tensor: Any, made_here: bool) -> None:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        identity = id(storage)
        if identity in self._sizes:
            return
        size = storage.nbytes() if made_here else 0
        self._sizes[identity] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, identity)

    def _forget(self, identity: int) -> None:
        self.live -= self._sizes.pop(identity)


def peak_memory(fn: Callable[[], Any]) -> int:
    """Peak bytes of the tensors that one call of ``fn`` makes, above what there was before it.

    On a GPU this is the peak of the caching allocator. On a CPU (and on meta) it is the largest sum, at any moment, of
    the storages made by torch operations in the call and not yet freed: activations, what autograd keeps, gradients.
    It leaves out what a kernel allocates and frees inside itself, whatever exists before the call, and Python's own
    memory; so it is the same number on every machine. Compiled code hides its operations: measure the eager form.

    >>> peak_memory(lambda: torch.ones(10) + 1)
    80
    """
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    before = 0
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    with _LiveStorages() as storages:
        fn()
    if cuda:
        torch.cuda.synchronize()
        on_gpu = torch.cuda.max_memory_allocated() - before
        if on_gpu > 0:
            return on_gpu
    return storages.peak


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Runs the block with ``number`` torch threads and puts the old number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
