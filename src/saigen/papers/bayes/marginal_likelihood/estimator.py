"""A scalable marginal likelihood for deep networks (Immer, Bauer, Fortuin, Raetsch, Khan, 2021, arXiv 2104.04975).

With weights theta ~ N(0, diag(delta)^-1) and a likelihood p(y | f(x; theta)), Laplace's method at the trained weights gives

    log p(D | M) ~ log p(D | theta) - 1/2 [ log |H| - log |P0| + theta' P0 theta ],        P0 = diag(delta)
    H = sum_n J_n' Lambda_n J_n + P0

with the Jacobians J of the outputs and the likelihood's second derivative Lambda = diag(p) - pp' for classes, I / sigma^2
for regression: the generalised Gauss-Newton matrix (GGN). Lambda = S S', so that the GGN is a sum over outer products of
vectors J' s; the empirical Fisher (EF) has one such vector a sample, the gradient of its loss. It is kept whole (``full``),
as its diagonal (``diag``), or a block a layer as the Kronecker product of output and input moments (``kron``).
The estimate is differentiable in delta and sigma, so that these are learned while the network trains (``train``), and its
value ranks architectures (``select``), all from the training data alone.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import multivariate_normal
from torch import Tensor, nn
from torch.nn import functional as F

LIKELIHOODS = ("classification", "regression")
STRUCTURES = ("full", "kron", "diag")
CURVATURES = ("ggn", "ef")
PRIORS = ("scalar", "layerwise", "diagonal")
Batches = Iterable[tuple[Tensor, Tensor]]
"""Batches of inputs and labels that can be gone through again: a DataLoader, or a list."""


def _among(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, allowed are {', '.join(allowed)}")


# The vectors J' s


def _columns(f: Tensor, y: Tensor, likelihood: str, curvature: str) -> Float[Tensor, "columns n outputs"]:
    """The columns s of S at each sample, Lambda = S S' (for regression without sigma); for EF the gradient of the loss."""
    outputs = f.shape[1]
    eye = torch.eye(outputs, device=f.device, dtype=f.dtype)
    if likelihood == "regression":
        return (f - y)[None] if curvature == "ef" else eye[:, None, :].expand(outputs, *f.shape)
    p = f.softmax(1)
    if curvature == "ef":
        return (p - eye[y])[None]
    return p.T.sqrt()[:, :, None] * (eye[:, None, :] - p)


@dataclass
class _Layer:
    """What a linear or convolutional layer saw: inputs (n, t, in) and, after the backward pass, vectors (c, n, t, out)."""

    inputs: Tensor
    vectors: Tensor

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """J' s of the weight, (c, n, out * in), and of the bias, (c, n, out)."""
        weight = torch.einsum("cnto,nti->cnoi", self.vectors, self.inputs)
        return weight.flatten(2), self.vectors.sum(2)

    @property
    def squares(self) -> tuple[Tensor, Tensor]:
        """The sums over c and n of the squares of the same."""
        if self.inputs.shape[1] > 1:
            weight, bias = self.rows
            return weight.square().sum((0, 1)), bias.square().sum((0, 1))
        vectors = self.vectors.squeeze(2).square().sum(0)
        return (vectors.T @ self.inputs.squeeze(1).square()).flatten(), vectors.sum(0)


def _is_simple(module: nn.Module) -> bool:
    """A layer whose weight meets its input in one product."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear)


def _as_positions(module: nn.Module, x: Tensor) -> Tensor:
    """The input as (n, t, in): of a convolution the patches, of a linear layer what lies between batch and features."""
    if isinstance(module, nn.Conv2d):
        return F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).mT
    return x.reshape(len(x), -1, x.shape[-1])


def _vectors_as_positions(module: nn.Module, g: Tensor) -> Tensor:
    if isinstance(module, nn.Conv2d):
        return g.flatten(3).mT
    return g.reshape(*g.shape[:2], -1, g.shape[-1])


@contextmanager
def _recording(layers: Iterable[nn.Module]) -> Iterator[dict[nn.Module, list[tuple[Tensor, Tensor]]]]:
    """Within the block, the inputs and outputs of every call of ``layers``."""
    calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        calls.setdefault(module, []).append((inputs[0].detach(), output))
        return output.clone()  # what comes after may work in place

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


# The evidence


class LaplaceEvidence:
    """The Laplace estimate of log p(D | M) of ``model`` at its present weights.

    ``likelihood`` is ``"classification"`` (logits, integer labels) or ``"regression"`` (outputs and labels (n, outputs),
    noise N(0, sigma^2 I)); ``structure`` one of ``full``, ``kron``, ``diag``; ``curvature`` ``ggn`` or ``ef``.
    ``likelihood_scale`` multiplies the log likelihood and its curvature, for data that are counted too often or too seldom.
    Kronecker factors are those of linear layers and convolutions; every other parameter is a dense block of its own.
    Networks with batch norm are refused, since there a sample's Jacobian is not its own.

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(layer.weight)
    >>> x, y = torch.eye(2), torch.zeros(2, 1)
    >>> evidence = LaplaceEvidence(layer, "regression", structure="full").fit([(x, y)])
    >>> round(evidence.log_marginal_likelihood(1.0, 1.0).item(), 4)         # log N(0 | 0, 2 I)
    -2.531
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str = "classification",
        *,
        structure: str = "kron",
        curvature: str = "ggn",
        likelihood_scale: float | int = 1.0,
    ) -> None:
        _among("likelihood", likelihood, LIKELIHOODS)
        _among("structure", structure, STRUCTURES)
        _among("curvature", curvature, CURVATURES)
        if not likelihood_scale > 0:
            raise ValueError(f"likelihood_scale is {likelihood_scale}, allowed is likelihood_scale > 0")
        self.model, self.likelihood, self.structure, self.curvature = model, likelihood, structure, curvature
        self.likelihood_scale = float(likelihood_scale)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("model has no trainable parameters, allowed is at least one")
        name_of = {p: name for name, p in self.parameters.items()}
        self._layers: dict[nn.Module, tuple[str | None, str | None]] = {}
        self._rest = set(self.parameters)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise ValueError(
                    "model has batch norm, allowed are networks in which a sample's output depends on that sample alone"
                )
            if _is_simple(module):
                names = (name_of.get(module.weight), name_of.get(module.bias))
                owned = {name for name in names if name is not None}
                if owned <= self._rest:
                    self._layers[module] = names
                    self._rest -= owned
                elif owned:
                    raise ValueError(f"{sorted(owned)[0]} is shared by two layers, allowed is one owner a parameter")
        self.n_data = 0

    @property
    def num_parameters(self) -> int:
        """P."""
        return sum(p.numel() for p in self.parameters.values())

    def fit(self, data: Batches) -> "LaplaceEvidence":
        """Goes through ``data`` once and keeps log likelihood and curvature at the present weights, theta with them."""
        self.n_data, self._misfit, self._positions = 0, 0.0, {}
        self._sums: dict[str, Tensor] = {}
        mode = self.model.training
        self.model.eval()
        try:
            for x, y in data:
                self._add(x, y)
        finally:
            self.model.train(mode)
        if not self.n_data:
            raise ValueError("data is empty, allowed is at least one batch with a sample")
        self.theta = torch.cat([p.detach().flatten() for p in self.parameters.values()]).double()
        self._sizes = [p.numel() for p in self.parameters.values()]
        if self.structure == "full":
            self._matrix, self._eigenvalues = self._sums.pop("full"), None
        elif self.structure == "diag":
            self._eigenvalues = torch.cat([self._sums[name] for name in self.parameters]).clamp(min=0)
        else:
            self._eigenvalues = torch.cat(self._kron_eigenvalues())
        return self

    def _add(self, x: Tensor, y: Tensor) -> None:
        with _recording(self._layers) as calls, torch.enable_grad():
            f = self.model(x)
        self._check(f, y)
        with torch.no_grad():
            if self.likelihood == "classification":
                self._misfit = self._misfit + F.cross_entropy(f, y, reduction="sum").double()
            else:
                self._misfit = self._misfit + (f - y).double().square().sum()
        self.n_data, self.outputs = self.n_data + len(y), f.shape[1]
        columns = _columns(f.detach(), y, self.likelihood, self.curvature)
        layers = self._backpropagate(f, columns, calls)
        rest = self._rest_rows(x, columns)
        if self.structure == "kron":
            for module, layer in layers.items():
                name = next(name for name in self._layers[module] if name is not None)
                inputs, vectors = layer.inputs.flatten(0, 1), layer.vectors.flatten(0, 2)
                self._accumulate(f"{name}/in", inputs.T @ inputs)
                self._accumulate(f"{name}/out", vectors.T @ vectors)
                self._positions[name] = layer.inputs.shape[1]
            for name, rows in rest.items():
                rows = rows.flatten(0, 1)
                self._accumulate(f"{name}/dense", rows.T @ rows)
        elif self.structure == "diag":
            for module, layer in layers.items():
                for name, square in zip(self._layers[module], layer.squares, strict=True):
                    if name is not None:
                        self._accumulate(name, square)
            for name, rows in rest.items():
                self._accumulate(name, rows.square().sum((0, 1)))
        else:
            for module, layer in layers.items():
                rest |= {name: rows for name, rows in zip(self._layers[module], layer.rows, strict=True) if name}
            rows = torch.cat([rest[name] for name in self.parameters], -1).flatten(0, 1).double()
            self._accumulate("full", rows.T @ rows)

    def _accumulate(self, name: str, value: Tensor) -> None:
        value = value.detach().double()
        self._sums[name] = value if name not in self._sums else self._sums[name] + value

    def _backpropagate(
        self, f: Tensor, columns: Tensor, calls: Mapping[nn.Module, list[tuple[Tensor, Tensor]]]
    ) -> dict[nn.Module, _Layer]:
        """The inputs of every layer and the vectors that the columns become at its output, all columns at once."""
        outputs = [output for module in calls for _, output in calls[module]]
        if not outputs:
            return {}
        gradients = iter(
            torch.autograd.grad(f, outputs, columns, is_grads_batched=True, allow_unused=True, materialize_grads=True)
        )
        return {
            module: _Layer(
                torch.cat([_as_positions(module, x) for x, _ in made], 1),
                torch.cat([_vectors_as_positions(module, next(gradients)) for _ in made], 2),
            )
            for module, made in calls.items()
        }

    def _rest_rows(self, x: Tensor, columns: Tensor) -> dict[str, Tensor]:
        """J' s of the parameters that belong to no linear layer or convolution, (c, n, p), a sample at a time."""
        if not self._rest:
            return {}
        parameters = {name: self.parameters[name].detach() for name in self.parameters if name in self._rest}

        def rows(one: Tensor, column: Tensor) -> dict[str, Tensor]:
            _, pull = torch.func.vjp(lambda p: torch.func.functional_call(self.model, p, one[None])[0], parameters)
            return torch.func.vmap(lambda s: pull(s)[0])(column)

        found = torch.func.vmap(rows)(x, columns.transpose(0, 1))
        return {name: row.transpose(0, 1).flatten(2) for name, row in found.items()}

    def _kron_eigenvalues(self) -> list[Tensor]:
        """Of each parameter, in the model's order: sum_n (g g') times the mean over n of (a a'), exact in both factors."""
        found: dict[str, Tensor] = {}
        for weight, bias in self._layers.values():
            name = weight or bias
            if name is None:
                continue
            outer = torch.linalg.eigvalsh(self._sums[f"{name}/out"]).clamp(min=0)
            inner = torch.linalg.eigvalsh(self._sums[f"{name}/in"]).clamp(min=0) / (self.n_data * self._positions[name])
            if weight is not None:
                found[weight] = torch.outer(outer, inner).flatten()
            if bias is not None:
                found[bias] = outer
        for name in self._rest:
            found[name] = torch.linalg.eigvalsh(self._sums[f"{name}/dense"]).clamp(min=0)
        return [found[name] for name in self.parameters]

    def _check(self, f: Tensor, y: Tensor) -> None:
        if f.ndim != 2:
            raise ValueError(f"model gives outputs of shape {tuple(f.shape)}, allowed is (n, outputs)")
        if self.likelihood == "regression":
            if y.shape != f.shape:
                raise ValueError(f"y has shape {tuple(y.shape)}, allowed for regression is that of f, {tuple(f.shape)}")
        elif y.shape != f.shape[:1] or y.is_floating_point():
            raise ValueError(f"y has shape {tuple(y.shape)} and type {y.dtype}, allowed are {len(f)} whole numbers")
        elif len(y) and not 0 <= int(y.min()) <= int(y.max()) < f.shape[1]:
            raise ValueError(f"y goes from {int(y.min())} to {int(y.max())}, allowed are classes 0 to {f.shape[1] - 1}")
        if not torch.isfinite(f).all():
            raise ValueError("model gives outputs that are not finite, allowed are finite ones")

    # The three terms, differentiable in prior precision and noise

    @property
    def _double(self) -> dict[str, object]:
        return {"dtype": torch.float64, "device": self.theta.device}

    def _noise(self, sigma_noise: float | int | Tensor | None) -> Tensor:
        if (sigma_noise is None) == (self.likelihood == "regression"):
            need = "a positive number" if self.likelihood == "regression" else "none: classes have no noise"
            raise ValueError(f"sigma_noise is {sigma_noise}, allowed with {self.likelihood} is {need}")
        sigma = torch.as_tensor(1.0 if sigma_noise is None else sigma_noise, **self._double)
        if sigma.numel() != 1 or not bool(sigma > 0):
            raise ValueError(f"sigma_noise is {sigma_noise}, allowed is one positive number")
        return sigma.reshape(())

    def _prior(self, prior_precision: float | int | Tensor) -> Tensor:
        """delta as one number, one a tensor, or one a weight."""
        delta = torch.as_tensor(prior_precision, **self._double).reshape(-1)
        allowed = {1, len(self.parameters)} | ({len(self.theta)} if self.structure != "kron" else set())
        if len(delta) not in allowed:
            raise ValueError(
                f"prior_precision has {len(delta)} numbers, allowed with {self.structure} are "
                + ", ".join(map(str, sorted(allowed)))
            )
        if not bool((delta > 0).all()):
            raise ValueError(f"prior_precision is {prior_precision}, allowed are positive numbers")
        return delta

    def log_likelihood(self, sigma_noise: float | int | Tensor | None = None) -> Float[Tensor, ""]:
        """log p(D | theta), times the scale."""
        self._check_fitted()
        sigma = self._noise(sigma_noise)
        if self.likelihood == "classification":
            return -self.likelihood_scale * self._misfit
        constant = self.n_data * self.outputs * (sigma.log() + 0.5 * math.log(2 * math.pi))
        return -self.likelihood_scale * (self._misfit / (2 * sigma.square()) + constant)

    def log_det_ratio(
        self, prior_precision: float | int | Tensor, sigma_noise: float | int | Tensor | None = None
    ) -> Float[Tensor, ""]:
        """log |H| - log |P0|: how much the data narrow the prior. Never negative; it is Occam's razor."""
        self._check_fitted()
        delta, sigma = self._prior(prior_precision), self._noise(sigma_noise)
        # EF's vectors are gradients, with 1 / sigma^2 each; the GGN's have 1 / sigma.
        factor = self.likelihood_scale * sigma ** (-2 if self.curvature == "ggn" else -4)
        if self.structure == "full":
            each = delta if len(delta) == len(self.theta) else _repeat(delta, self._sizes)
            return _LogDeterminant.apply(self._matrix, factor, each) - each.log().sum()
        if len(delta) == len(self._sizes):
            parts = self._eigenvalues.split(self._sizes)
            return sum(torch.log1p((factor / d) * part).sum() for part, d in zip(parts, delta, strict=True))
        return torch.log1p((factor / delta) * self._eigenvalues).sum()

    def scatter(self, prior_precision: float | int | Tensor) -> Float[Tensor, ""]:
        """theta' P0 theta."""
        self._check_fitted()
        delta, square = self._prior(prior_precision), self.theta.square()
        if len(delta) == len(self._sizes):
            square = torch.stack([part.sum() for part in square.split(self._sizes)])
        return (delta * square).sum()

    def log_marginal_likelihood(
        self, prior_precision: float | int | Tensor, sigma_noise: float | int | Tensor | None = None
    ) -> Float[Tensor, ""]:
        """The estimate, in nats, float64; ``prior_precision`` is one number, one a tensor, or (not for kron) one a weight."""
        complexity = self.log_det_ratio(prior_precision, sigma_noise) + self.scatter(prior_precision)
        return self.log_likelihood(sigma_noise) - 0.5 * complexity

    def _check_fitted(self) -> None:
        if not self.n_data:
            raise ValueError("the evidence has no data yet, allowed is this after fit(data)")


def _repeat(delta: Tensor, sizes: list[int]) -> Tensor:
    """One number, or one a tensor, as one a weight."""
    if len(delta) == 1:
        return delta.expand(sum(sizes))
    return torch.cat([d.expand(size) for d, size in zip(delta, sizes, strict=True)])


class _LogDeterminant(torch.autograd.Function):
    """log |factor M + diag(delta)|, its derivatives from the same Cholesky factor: the diagonal of the inverse is enough."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, factor: Tensor, delta: Tensor) -> Tensor:
        precision = factor * matrix
        precision.diagonal().add_(delta)
        root = torch.linalg.cholesky(precision)
        ctx.save_for_backward(root, factor, delta)
        return 2 * root.diagonal().log().sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor]:
        root, factor, delta = ctx.saved_tensors
        inverse = torch.cholesky_inverse(root).diagonal()
        # tr(H^-1 factor M) = P - tr(H^-1 diag(delta))
        return None, gradient * (len(delta) - (inverse * delta).sum()) / factor, gradient * inverse


# Learning the prior and the noise while the network trains


@dataclass
class Trained:
    """A network that chose its own regularisation: in it the weights of the epoch with the highest evidence."""

    model: nn.Module
    evidence: LaplaceEvidence
    """Fitted at those weights."""
    prior_precision: Tensor
    sigma_noise: Tensor | None
    log_marginal_likelihood: float
    """At those weights, prior precision and noise."""
    trace: list[float]
    """The evidence after each update of prior and noise."""


def train(
    model: nn.Module,
    data: Batches,
    likelihood: str = "classification",
    *,
    structure: str = "kron",
    curvature: str = "ggn",
    prior: str = "layerwise",
    epochs: int = 500,
    lr: float = 1e-3,
    lr_min: float | None = None,
    burn_in: int = 0,
    frequency: int = 1,
    hyper_steps: int = 100,
    lr_hyper: float = 0.1,
    prior_precision: float = 1.0,
    sigma_noise: float = 1.0,
    likelihood_scale: float = 1.0,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
) -> Trained:
    """Trains ``model`` in place and, every ``frequency`` epochs after ``burn_in``, its prior precision and noise.

    An epoch goes through ``data`` once on the mean loss plus the prior's part, theta' P0 theta / (2 N). An update fits the
    curvature and takes ``hyper_steps`` steps of Adam on (log delta, log sigma) uphill on the evidence, with the curvature
    as it is. ``lr`` decays exponentially to ``lr_min``. In the end the epoch with the highest evidence counts. ``prior`` is
    ``scalar``, ``layerwise`` (a delta for each tensor) or ``diagonal`` (one for each weight; not with ``kron``).
    """
    _among("prior", prior, PRIORS)
    for name, value in (("epochs", epochs), ("frequency", frequency), ("hyper_steps", hyper_steps)):
        if value < 1:
            raise ValueError(f"{name} is {value}, allowed is a whole number of at least 1")
    for name, value in (("prior_precision", prior_precision), ("sigma_noise", sigma_noise), ("lr", lr)):
        if not value > 0:
            raise ValueError(f"{name} is {value}, allowed is {name} > 0")
    if burn_in + frequency > epochs:
        raise ValueError(
            f"burn_in is {burn_in} with frequency {frequency}, allowed is one update at least in {epochs} epochs"
        )
    if prior == "diagonal" and structure == "kron":
        raise ValueError("prior is 'diagonal' with structure 'kron', allowed for that structure are scalar, layerwise")
    evidence = LaplaceEvidence(
        model, likelihood, structure=structure, curvature=curvature, likelihood_scale=likelihood_scale
    )
    parameters = list(evidence.parameters.values())
    device = parameters[0].device
    size = {"scalar": 1, "layerwise": len(parameters), "diagonal": evidence.num_parameters}[prior]
    log_delta = torch.full((size,), math.log(prior_precision), dtype=torch.float64, device=device, requires_grad=True)
    log_sigma = torch.tensor(math.log(sigma_noise), dtype=torch.float64, device=device, requires_grad=True)
    regression = likelihood == "regression"
    hyper = torch.optim.Adam([log_delta, log_sigma] if regression else [log_delta], lr_hyper)
    weights = optimizer(parameters, lr=lr)
    decay = (lr_min / lr) ** (1 / epochs) if lr_min is not None else 1.0
    schedule = torch.optim.lr_scheduler.ExponentialLR(weights, decay)
    n_data = sum(len(y) for _, y in data)
    if not n_data:
        raise ValueError("data is empty, allowed is at least one batch with a sample")

    def noise() -> Tensor | None:
        return log_sigma.exp() if regression else None

    def unit(f: Tensor) -> float:
        """What a nat is worth in the loss: for regression that is the mean squared error, whatever sigma may be."""
        return 2 * math.exp(2 * log_sigma.item()) / f.shape[1] if regression else 1.0

    best, trace = (-math.inf, None), []
    for epoch in range(1, epochs + 1):
        model.train()
        delta = _per_parameter(log_delta.detach().exp(), parameters)
        for x, y in data:
            weights.zero_grad()
            f = model(x)
            misfit = F.mse_loss(f, y) if regression else F.cross_entropy(f, y)
            penalty = sum((d * p.square()).sum() for d, p in zip(delta, parameters, strict=True))
            loss = likelihood_scale * misfit + unit(f) * penalty / (2 * n_data)
            loss.backward()
            weights.step()
        schedule.step()
        if epoch <= burn_in or (epoch - burn_in) % frequency:
            continue
        evidence.fit(data)
        for _ in range(hyper_steps):
            hyper.zero_grad()
            value = evidence.log_marginal_likelihood(log_delta.exp(), noise())
            (-value).backward()
            hyper.step()
        with torch.no_grad():
            trace.append(evidence.log_marginal_likelihood(log_delta.exp(), noise()).item())
        if trace[-1] > best[0]:
            best = trace[-1], (copy.deepcopy(model.state_dict()), log_delta.detach().exp(), log_sigma.detach().exp())
    if best[1] is None:
        raise ValueError(f"lr is {lr} and lr_hyper {lr_hyper}, allowed are rates at which the evidence stays finite")
    state, delta, sigma = best[1]
    model.load_state_dict(state)
    model.eval()
    evidence.fit(data)
    return Trained(model, evidence, delta, sigma if regression else None, best[0], trace)


def _per_parameter(delta: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """delta in the shape of each parameter, or one number for all of it."""
    delta = delta.to(parameters[0].dtype)
    if len(delta) == 1:
        return [delta[0]] * len(parameters)
    if len(delta) == len(parameters):
        return list(delta)
    parts = delta.split([p.numel() for p in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


def select(
    candidates: Mapping[str, Callable[[], nn.Module]],
    data: Batches,
    likelihood: str = "classification",
    **options: object,
) -> dict[str, Trained]:
    """Trains each of ``candidates`` (functions that build a network) by ``train``; best evidence first."""
    if not candidates:
        raise ValueError("candidates is empty, allowed is at least one")
    trained = {name: train(make(), data, likelihood, **options) for name, make in candidates.items()}
    return dict(sorted(trained.items(), key=lambda item: -item[1].log_marginal_likelihood))


# Where the evidence is known exactly


def linear_log_evidence(
    X: np.ndarray | list, y: np.ndarray | list, prior_precision: float | int, sigma_noise: float | int
) -> float:
    """log N(y | 0, X X' / delta + sigma^2 I), the evidence of y = X w + noise, which Laplace with a full GGN gives exactly.

    >>> round(linear_log_evidence([[1.0], [2.0]], [1.0, 1.0], 1.0, 1.0), 4)
    -2.9838
    """
    X, y = np.asarray(X, float), np.asarray(y, float)
    if X.ndim != 2 or y.shape != X.shape[:1]:
        raise ValueError(f"X has shape {X.shape} and y {y.shape}, allowed are (n, d) and (n,)")
    for name, value in (("prior_precision", prior_precision), ("sigma_noise", sigma_noise)):
        if not value > 0:
            raise ValueError(f"{name} is {value}, allowed is {name} > 0")
    covariance = X @ X.T / prior_precision + sigma_noise**2 * np.eye(len(y))
    return float(multivariate_normal(np.zeros(len(y)), covariance).logpdf(y))


def mackay_fixed_point(X: np.ndarray | list, y: np.ndarray | list, tolerance: float = 1e-12) -> tuple[float, float]:
    """The delta and sigma of highest evidence for y = X w + noise, by MacKay's updates.

    With eigenvalues lambda of X'X / sigma^2 and the mean w: gamma = sum lambda / (lambda + delta), the number of weights
    that the data determine; delta = gamma / |w|^2, sigma^2 = |y - X w|^2 / (n - gamma). Where the data speak for no weight
    at all, delta has no highest value and ends at 1e12.
    """
    X, y = np.asarray(X, float), np.asarray(y, float)
    if X.ndim != 2 or y.shape != X.shape[:1]:
        raise ValueError(f"X has shape {X.shape} and y {y.shape}, allowed are (n, d) and (n,)")
    values, vectors = np.linalg.eigh(X.T @ X)
    values, projected = values.clip(0), vectors.T @ X.T @ y
    delta, variance = 1.0, max(float(y.var()), 1e-300)
    for _ in range(100_000):
        w = projected / (values + delta * variance)
        gamma = (values / (values + delta * variance)).sum()
        residual = y @ y - 2 * w @ projected + (values * w**2).sum()
        new = min(gamma / max(w @ w, 1e-300), 1e12), residual / (len(y) - gamma)
        change = max(abs(math.log(new[0] / delta)), abs(math.log(new[1] / variance)))
        delta, variance = new
        if change < tolerance:
            break
    return float(delta), float(math.sqrt(variance))
