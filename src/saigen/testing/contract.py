"""The contract: what every public component must survive, one named check after another.

The checks run over the ``examples()`` of every room, those of plug-ins included::

    from saigen.testing import parametrize_with_checks

    @parametrize_with_checks(["my_paper"])
    def test_contract(check):
        check()
"""

import copy
import inspect
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from saigen.cards import catalogue
from saigen.example import Example

SEED = 20211


class NotApplicable(Exception):
    """The check has no meaning for this kind of component."""


@dataclass(frozen=True)
class Check:
    """A check of one example; calling it passes, raises, or returns the reason why it does not apply."""

    paper: str
    name: str
    function: Callable[[Example], None]
    example: Example

    def __call__(self) -> str | None:
        expected = self.example.expected_failures.get(self.name)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(SEED)
                self.function(self.example)
        except NotApplicable as reason:
            return str(reason) or "does not apply"
        except Exception as error:
            if expected is not None:
                return f"expected: {expected}"
            raise AssertionError(f"{self.paper}: {self.example.name} does not survive {self.name}: {error}") from error
        if expected is not None:
            raise AssertionError(
                f"{self.paper}: {self.example.name} now survives {self.name}; drop it from expected_failures"
            )
        return None

    @property
    def id(self) -> str:
        """A name for test reports."""
        return f"{self.paper}-{self.example.name}-{self.name}"


# --- what the checks share ------------------------------------------------------------------------------------------


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def _inputs(example: Example) -> tuple[Any, ...]:
    return example.inputs(_generator())


def _module(example: Example) -> nn.Module:
    if example.kind in ("optimizer", "estimator", "function", "agent"):
        raise NotApplicable(f"a component of kind {example.kind} is not an nn.Module")
    torch.manual_seed(SEED)
    module = example.make()
    if not isinstance(module, nn.Module):
        raise NotApplicable("not an nn.Module")
    return module


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(_plain(output)) if isinstance(leaf, Tensor)]


def _plain(output: Any) -> Any:
    # Dataclasses are not pytrees of torch's unless they are registered.
    if hasattr(output, "__dataclass_fields__"):
        return [_plain(getattr(output, name)) for name in output.__dataclass_fields__]
    if isinstance(output, (list, tuple)):
        return [_plain(item) for item in output]
    if isinstance(output, dict):
        return {key: _plain(value) for key, value in output.items()}
    return output


def _call(module: Callable[..., Any], inputs: tuple[Any, ...], seed: int = SEED) -> list[Tensor]:
    """A call with the global generator seeded, and every generator among the inputs copied, so that it can be repeated."""
    torch.manual_seed(seed)
    copies = tuple(_copy_generator(value) if isinstance(value, torch.Generator) else value for value in inputs)
    return _tensors(module(*copies))


def _copy_generator(generator: torch.Generator) -> torch.Generator:
    twin = torch.Generator(generator.device)
    twin.set_state(generator.get_state())
    return twin


def _assert_equal(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], *, exact: bool = True, rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    assert len(ours) == len(theirs), f"{len(ours)} outputs, expected {len(theirs)}"
    for a, b in zip(ours, theirs, strict=True):
        if exact:
            assert a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()), "the numbers are not the same"
        else:
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)


def _loss(outputs: Sequence[Tensor]) -> Tensor:
    terms = [out.float().square().mean() for out in outputs if out.is_floating_point() and out.requires_grad]
    if not terms:
        raise NotApplicable("nothing to differentiate")
    return torch.stack(terms).sum()


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- the checks -----------------------------------------------------------------------------------------------------


def deepcopy(example: Example) -> None:
    """A deep copy gives the same numbers and shares no parameter."""
    if example.kind == "estimator":
        copy.deepcopy(example.make())
        return
    module = _module(example).eval()
    twin = copy.deepcopy(module)
    _assert_equal(_call(twin, _inputs(example)), _call(module, _inputs(example)))
    shared = {p.data_ptr() for p in module.parameters() if p.numel()} & {
        p.data_ptr() for p in twin.parameters() if p.numel()
    }
    assert not shared, "the copy shares parameters"


def state_dict_round_trip(example: Example) -> None:
    """A state dict written to a file and read with ``weights_only`` gives the same numbers in a fresh instance."""
    module = _module(example).eval()
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    torch.manual_seed(SEED + 1)
    twin = example.make().eval()
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    _assert_equal(_call(twin, _inputs(example)), _call(module, _inputs(example)))


def safetensors_round_trip(example: Example) -> None:
    """Weights written as safetensors give the same numbers in a fresh instance."""
    from safetensors.torch import load_model, save_model

    module = _module(example).eval()
    if not module.state_dict():
        raise NotApplicable("no weights")
    torch.manual_seed(SEED + 1)
    twin = example.make().eval()
    with tempfile.TemporaryDirectory() as folder:
        save_model(module, f"{folder}/model.safetensors")
        load_model(twin, f"{folder}/model.safetensors")
    _assert_equal(_call(twin, _inputs(example)), _call(module, _inputs(example)))


def resumed_training(example: Example) -> None:
    """Four steps in one go and two and two with everything saved in between give the same bits."""
    if example.kind == "optimizer":
        _resumed_optimizer(example)
        return

    def steps(module: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            optimizer.zero_grad()
            _loss(_call(module, _inputs(example), seed=number)).backward()
            optimizer.step()

    straight = _module(example).train()
    if not any(p.requires_grad for p in straight.parameters()):
        raise NotApplicable("nothing to train")
    start = copy.deepcopy(straight.state_dict())
    make = lambda module: torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)  # noqa: E731
    steps(straight, make(straight), range(4))
    torch.manual_seed(SEED + 2)
    first = example.make().train()
    first.load_state_dict(start)
    optimizer = make(first)
    steps(first, optimizer, range(2))
    buffer = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    torch.manual_seed(SEED + 3)
    second = example.make().train()
    second.load_state_dict(saved["model"])
    optimizer = make(second)
    optimizer.load_state_dict(saved["optimizer"])
    steps(second, optimizer, range(2, 4))
    _assert_equal(list(second.state_dict().values()), list(straight.state_dict().values()))


def _resumed_optimizer(example: Example) -> None:
    def problem() -> tuple[nn.Module, Callable[[int], Tensor]]:
        torch.manual_seed(SEED)
        net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        return (
            net,
            lambda number: net(torch.randn(16, 5, generator=torch.Generator().manual_seed(number))).square().mean(),
        )

    def steps(net: nn.Module, value: Callable[[int], Tensor], optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = value(number)
                loss.backward()
                return loss

            optimizer.step(closure)

    net, value = problem()
    steps(net, value, example.make(net.parameters()), range(6))
    half, half_value = problem()
    optimizer = example.make(half.parameters())
    steps(half, half_value, optimizer, range(3))
    buffer = io.BytesIO()
    torch.save({"net": half.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    rest, rest_value = problem()
    rest.load_state_dict(saved["net"])
    optimizer = example.make(rest.parameters())
    optimizer.load_state_dict(saved["optimizer"])
    steps(rest, rest_value, optimizer, range(3, 6))
    _assert_equal(list(rest.state_dict().values()), list(net.state_dict().values()))


def compile_fullgraph(example: Example) -> None:
    """``torch.compile(fullgraph=True)`` traces eval mode without a break and gives the same numbers."""
    module = _module(example).eval()
    inputs = _inputs(example)
    torch._dynamo.reset()
    with _quiet(), torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        _assert_equal(_call(compiled, inputs), _call(module, inputs), exact=False)


def export(example: Example) -> None:
    """``torch.export`` captures eval mode and the program gives the same numbers."""
    module = _module(example).eval()
    inputs = _inputs(example)
    if not all(isinstance(value, Tensor) for value in inputs):
        raise NotApplicable("takes more than tensors")
    with _quiet(), torch.no_grad():
        program = torch.export.export(module, inputs)
        _assert_equal(_call(program.module(), inputs), _call(module, inputs), exact=False)


def bf16_autocast(example: Example) -> None:
    """Under bf16 autocast the outputs are finite and near those in float32."""
    module = _module(example).eval()
    with torch.no_grad():
        full = _call(module, _inputs(example))
        with torch.autocast("cpu", torch.bfloat16):
            half = _call(module, _inputs(example))
    for a, b in zip(half, full, strict=True):
        if b.is_floating_point():
            assert torch.isfinite(a.float()).all() or not torch.isfinite(b).all(), "not finite under bf16 autocast"
            scale = b.abs().max().item() + 1e-6
            assert (a.float() - b).abs().mean().item() <= 0.1 * scale, "far from float32"


def gradcheck(example: Example) -> None:
    """Gradients of a loss are those of finite differences in float64."""
    if example.kind != "loss":
        raise NotApplicable("only losses are small enough")
    module = _module(example).eval().double()
    inputs = tuple(
        v.double().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v for v in _inputs(example)
    )

    def call(*values: Any) -> tuple[Tensor, ...]:
        return tuple(out for out in _call(module, values) if out.requires_grad)

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


def meta_device(example: Example) -> None:
    """Builds under ``torch.device('meta')``: the constructor does no arithmetic on tensors."""
    _module(example)
    with torch.device("meta"):
        module = example.make()
    assert all(p.is_meta for p in module.parameters()), "a parameter was made elsewhere"


def other_batch_sizes(example: Example) -> None:
    """Takes a batch of one and of three times the size."""
    module = _module(example).eval()
    inputs = _inputs(example)
    size = _batch_size(example, inputs)
    with torch.no_grad():
        for repeat in (slice(0, 1), None):
            changed = tuple(_change_batch(value, size, repeat, example.batch) for value in inputs)
            try:
                _call(module, changed)
            except ValueError as error:
                # A loss over pairs may refuse a batch of one, in a clear sentence.
                if repeat is None or example.kind != "loss" or not str(error):
                    raise


def _batch_size(example: Example, inputs: tuple[Any, ...]) -> int:
    if example.batch is None or not inputs or not isinstance(inputs[0], Tensor) or inputs[0].ndim <= example.batch:
        raise NotApplicable("no batch dimension")
    return inputs[0].shape[example.batch]


def _change_batch(value: Any, size: int, part: slice | None, dim: int) -> Any:
    if not isinstance(value, Tensor) or value.ndim <= dim or value.shape[dim] != size:
        return value
    if part is None:
        return torch.cat([value] * 3, dim)
    return value.narrow(dim, 0, 1)


def samples_independent_in_eval(example: Example) -> None:
    """In eval mode a sample's outputs do not depend on the others of its batch."""
    if example.kind != "module":
        raise NotApplicable(f"a {example.kind} may look at the whole batch")
    module = _module(example).eval()
    inputs = _inputs(example)
    size = _batch_size(example, inputs)
    if size < 2:
        raise NotApplicable("a batch of one")
    with torch.no_grad():
        together = _call(module, inputs)
        alone = _call(module, tuple(_change_batch(value, size, slice(0, 1), example.batch) for value in inputs))
    for a, b in zip(alone, together, strict=True):
        if b.ndim > example.batch and b.shape[example.batch] == size:
            torch.testing.assert_close(
                a.narrow(example.batch, 0, 1), b.narrow(example.batch, 0, 1), rtol=1e-3, atol=1e-4
            )


def deterministic(example: Example) -> None:
    """The same seed gives the same numbers, in training mode too."""
    if example.kind == "estimator":
        import numpy as np

        X, y = _inputs(example)
        first, second = example.make().fit(X, y), example.make().fit(X, y)
        if hasattr(first, "predict"):
            np.testing.assert_array_equal(first.predict(X), second.predict(X))
        return
    if example.kind == "function":
        _assert_equal(_call(example.make(), _inputs(example)), _call(example.make(), _inputs(example)))
        return
    module = _module(example).train()
    start = copy.deepcopy(module.state_dict())
    first = [out.detach().clone() for out in _call(module, _inputs(example))]
    module.load_state_dict(start)
    _assert_equal(_call(module, _inputs(example)), first)


def global_rng_untouched(example: Example) -> None:
    """Importing, eval mode, and whatever takes a generator of its own leave the global random state alone."""
    import numpy as np

    takes_own = any(isinstance(value, torch.Generator) for value in _inputs(example))
    if example.kind in ("estimator", "function"):
        made = example.make()
        inputs = _inputs(example)
        before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
        made.fit(*inputs) if example.kind == "estimator" else made(*inputs)
    else:
        module = _module(example)
        if example.kind == "transform" and not takes_own:
            raise NotApplicable("draws from the global generator, as dropout does")
        module.eval()
        inputs = _inputs(example)
        before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
        with torch.no_grad():
            module(*inputs)
    assert torch.equal(before, torch.get_rng_state()), "torch's global generator moved"
    assert (before_numpy == np.random.get_state()[1]).all(), "NumPy's global generator moved"


def wrong_arguments(example: Example) -> None:
    """Every wrong argument raises ``ValueError`` that names it and says what is allowed."""
    if not example.wrong:
        raise NotApplicable("no wrong arguments are listed")
    for call, text in example.wrong:
        try:
            call()
        except ValueError as error:
            assert text in str(error), f"the message does not say {text!r}: {error}"
        else:
            raise AssertionError(f"a wrong {text} was accepted")


def code_runs(example: Example) -> None:
    """The copyable code of the page runs as it stands."""
    with _quiet():
        exec(compile(example.code, f"<{example.name}>", "exec"), {"__name__": "__example__"})


def sklearn_checks(example: Example) -> None:
    """scikit-learn's own estimator checks."""
    if example.kind != "estimator":
        raise NotApplicable("not an estimator")
    from sklearn.utils.estimator_checks import check_estimator

    expected = {
        name.removeprefix("sklearn:"): why
        for name, why in example.expected_failures.items()
        if name.startswith("sklearn:")
    }
    with _quiet():
        check_estimator(example.make(), expected_failed_checks=expected, on_skip=None)


CHECKS: tuple[Callable[[Example], None], ...] = (
    deepcopy,
    state_dict_round_trip,
    safetensors_round_trip,
    resumed_training,
    compile_fullgraph,
    export,
    bf16_autocast,
    gradcheck,
    meta_device,
    other_batch_sizes,
    samples_independent_in_eval,
    deterministic,
    global_rng_untouched,
    wrong_arguments,
    code_runs,
    sklearn_checks,
)


def checks(papers: Sequence[str] | None = None) -> list[Check]:
    """Every check of every example of ``papers`` (of all rooms by default)."""
    entries = catalogue.list_papers() if papers is None else [catalogue.paper(slug) for slug in papers]
    found = []
    for entry in entries:
        for example in entry.module("examples").examples():
            unknown = [
                n
                for n in example.expected_failures
                if not n.startswith("sklearn:") and n not in {f.__name__ for f in CHECKS}
            ]
            if unknown:
                raise ValueError(f"{entry.slug}: expected_failures names {unknown[0]!r}, which is no check")
            found += [Check(entry.slug, function.__name__, function, example) for function in CHECKS]
    return found


def parametrize_with_checks(papers: Sequence[str] | None = None) -> Any:
    """A ``pytest`` decorator that hands each check of each example to a test as ``check``."""
    import pytest

    every = checks(papers)
    return pytest.mark.parametrize("check", every, ids=[check.id for check in every])


def room_problems(slug: str) -> list[str]:
    """What binds a card to its room and does not hold, a sentence each; an empty list where all is well.

    Each model name is a public function of the room that builds, each claim id has its function, each parity test is a
    file that is there, both languages carry the same numbers and the glossary's renderings.
    """
    from saigen.cards.glossary import missing_renderings, numbers_in

    entry = catalogue.paper(slug)
    card = entry.card
    problems = []
    room = entry.load()
    claims_module = entry.module("claims")
    for field in ("purpose", "method", "result", "limits"):
        en, ja = getattr(card.en, field), getattr(card.ja, field)
        if numbers_in(en) != numbers_in(ja):
            odd = sorted(set(numbers_in(en)) ^ set(numbers_in(ja)))
            problems.append(
                f"{slug}: the numbers of [en] and [ja] {field} differ: {', '.join(odd) or 'one stands more often'}"
            )
        problems += [f"{slug}: [ja] {field} lacks the rendering of {term}" for term in missing_renderings(en, ja)]
    for claim in card.claim:
        function = getattr(claims_module, claim.id, None)
        if not callable(function) or len(inspect.signature(function).parameters) != 1:
            problems.append(f"{slug}: claims.py has no function {claim.id}(trial)")
        if numbers_in(claim.en) != numbers_in(claim.ja):
            problems.append(f"{slug}: the numbers of claim {claim.id} differ between en and ja")
        problems += [
            f"{slug}: claim {claim.id} scale {s} has no entry in SIZES"
            for s in claim.scales
            if s not in claims_module.SIZES
        ]
    problems += [
        f"{slug}: model {name} is no public name of the room"
        for name in card.models
        if name not in getattr(room, "__all__", ())
    ]
    for name in getattr(room, "__all__", ()):
        if not hasattr(room, name):
            problems.append(f"{slug}: __all__ names {name}, which is not there")
    if not entry.has("examples.py"):
        problems.append(f"{slug}: there is no examples.py")
    return problems


def number_problems(slug: str) -> list[str]:
    """The ``[[number]]`` entries of a card that do not come out, a sentence each (built on the ``meta`` device)."""
    from saigen.measure import macs, parameters

    entry = catalogue.paper(slug)
    room = entry.load()
    problems = []
    for number in entry.card.number:
        if number.call is not None:
            found = getattr(room, number.call)(*number.args)
            if abs(float(found) - number.value) > number.tolerance:
                problems.append(f"{slug}: {number.name} is {found}, the card says {number.value}")
            continue
        with torch.device("meta"):
            model = getattr(room, number.model)(**number.options)
        if number.parameters is not None and parameters(model) != number.parameters:
            problems.append(
                f"{slug}: {number.model} has {parameters(model):,} parameters, the card says {number.parameters:,}"
            )
        if number.macs is not None:
            found = macs(model, number.macs.at)
            if abs(found - number.macs.count) > number.macs.tolerance * number.macs.count:
                problems.append(
                    f"{slug}: {number.model} has {found:,} MACs at {number.macs.at}, the card says {number.macs.count:,.0f}"
                )
    return problems


def parity_problems(slug: str, root: Path) -> list[str]:
    """The ``[[parity]]`` entries of a card whose test is not there; ``root`` is the checkout."""
    problems = []
    for parity in catalogue.paper(slug).card.parity:
        file, _, name = parity.test.partition("::")
        if not (root / file).is_file() or f"def {name}(" not in (root / file).read_text(encoding="utf-8"):
            problems.append(f"{slug}: the parity test {parity.test} is not there")
    return problems
