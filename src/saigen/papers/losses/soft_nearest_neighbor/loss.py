"""The soft nearest neighbor loss as measure and as regulariser (Frosst, Papernot, Hinton, 2019, arXiv 1902.01889).

How entangled are the classes in a layer? For a batch of b activations x with labels y and a temperature T (equation 1):

    l(x, y, T) = -1/b sum_i log  sum_{j != i, y_j = y_i} exp(-|x_i - x_j|^2 / T)  /  sum_{k != i} exp(-|x_i - x_k|^2 / T)

It is the negative log probability that a neighbour drawn by closeness has one's own label: low where classes lie apart,
high where they mingle. Without a temperature it is l'(x, y) = min_T l(x, y, T) (equation 2). The paper minimises cross
entropy plus alpha * sum of l' over the hidden layers with alpha < 0 (equation 3): hidden layers are rewarded for mingling
the classes, and an outlier is then known by how few of its hidden neighbours carry the label it is given.
"""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

METRICS = ("euclidean", "cosine")
OPTIMIZE = ("none", "step", "exact")
REDUCTIONS = ("mean", "sum", "none")
Temperature = float | int | Tensor


# Distances and who is whose neighbour


def pairwise_distance(x: Float[Tensor, "b ..."], metric: str = "euclidean") -> Float[Tensor, "b b"]:
    """Squared Euclidean distances, or 1 - cosine, between the flattened rows, at least in float32."""
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}, allowed are {', '.join(METRICS)}")
    x = x.flatten(1)
    x = x if x.dtype == torch.float64 else x.float()
    # Sixteen-bit products would drown small distances; this part is small, so it is done in full precision.
    with torch.autocast(x.device.type, enabled=False):
        if metric == "cosine":
            x = F.normalize(x, dim=1)
            return 1.0 - x @ x.T
        # Distances do not change with the origin, but the error of the Gram matrix does: put it in the middle.
        x = x - x.mean(0).detach()
        square = x.square().sum(1)
        return (square[:, None] + square - 2.0 * (x @ x.T)).clamp(min=0.0)


def _check_labels(x: Tensor, y: Tensor) -> None:
    if len(x) != len(y):
        raise ValueError(f"y has {len(y)} labels, allowed is one a row of x, which has {len(x)}")


def _neighbors(y: Tensor) -> tuple[Tensor, Tensor]:
    """Masks (b, b): all others, and those of the same label."""
    others = ~torch.eye(len(y), dtype=torch.bool, device=y.device)
    return others, (y[:, None] == y) & others


# The loss


def soft_nearest_neighbor_loss(
    x: Float[Tensor, "b ..."],
    y: Int[Tensor, " labels"],
    temperature: Temperature = 1.0,
    *,
    metric: str = "euclidean",
    eps: float | int = 0.0,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    """l(x, y, T) of the activations ``x`` (b, ...), flattened, with labels ``y`` (b,); equation 1.

    With ``eps = 0`` it is exact, in the log domain; samples without another of their label have no neighbour to hope for
    and are left out (0 in ``reduction="none"``). ``eps = 1e-5`` is the official code: it is added to the denominator and
    inside the logarithm, and such samples count -log(eps). ``x`` may be bfloat16 or under autocast; T may be a tensor
    that is learned.

    >>> x, y = torch.tensor([[0.0, 0], [1, 0], [0, 2], [3, 3]]), torch.tensor([0, 0, 1, 1])
    >>> round(soft_nearest_neighbor_loss(x, y, temperature=1.0).item(), 6)
    1.607681
    """
    _check_labels(x, y)
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature is {temperature}, allowed is temperature > 0")
    if eps < 0:
        raise ValueError(f"eps is {eps}, allowed is eps >= 0")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, allowed are {', '.join(REDUCTIONS)}")
    return _reduce(*_per_sample(pairwise_distance(x, metric), y, temperature, eps), reduction)


def _per_sample(distance: Tensor, y: Tensor, temperature: Temperature, eps: float) -> tuple[Tensor, Tensor]:
    """Each sample's loss and whether it counts; of several temperatures (t, 1, 1) the losses are (t, b)."""
    others, same = _neighbors(y)
    logits = -distance / temperature
    if eps > 0:
        # Products with masks of truth values cost a conversion each way; the labels' own is a matrix of numbers here.
        fits = logits.exp().masked_fill(~others, 0.0)
        picked = torch.linalg.vecdot(fits, same.to(fits.dtype)) / (eps + fits.sum(-1))
        return -(eps + picked).log(), torch.ones_like(y, dtype=torch.bool)
    counts = same.any(1)
    # Rows without a positive get some instead of none: a log of zero would leave NaN in the gradients of all.
    others, same = others | ~counts[:, None], same | ~counts[:, None]
    low = float("-inf")
    loss = logits.masked_fill(~others, low).logsumexp(-1) - logits.masked_fill(~same, low).logsumexp(-1)
    return loss * counts, counts


def _reduce(loss: Tensor, counts: Bool[Tensor, " b"], reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum(-1) / counts.sum().clamp(min=1) if reduction == "mean" else loss.sum(-1)


# The temperature


def inverse_temperature_step(
    x: Float[Tensor, "b ..."],
    y: Int[Tensor, " labels"],
    inverse: Float[Tensor, ""],
    *,
    initial: float | int = 100.0,
    lr: float | int = 0.1,
    metric: str = "euclidean",
    eps: float | int = 0.0,
) -> Float[Tensor, ""]:
    """The official update: with T = ``initial`` / t, one gradient step t <- t - ``lr`` dl/dt. No gradient flows.

    t is kept above 1e-4, which the official code does not see to: below 0 the loss would reward distance.
    """
    _check_labels(x, y)
    with torch.no_grad():
        distance = pairwise_distance(x, metric)
        inverse = inverse.to(distance.dtype)
        slope = _slope(distance / initial, y, inverse, eps)
        return (inverse - lr * slope).clamp(min=1e-4)


def _slope(distance: Tensor, y: Tensor, inverse: Tensor, eps: float) -> Tensor:
    """dl/dt of the mean loss with logits -t d. It is E[d among the same] - E[d among all others], each weighed by the fit."""
    others, same = _neighbors(y)
    logits = -distance * inverse
    if eps > 0:
        fits = logits.exp() * others
        total, mine = eps + fits.sum(1), (fits * same).sum(1)
        falls_total, falls_mine = (fits * distance).sum(1), (fits * distance * same).sum(1)
        return ((falls_mine * total - mine * falls_total) / total.square() / (eps + mine / total)).mean()
    counts = same.any(1)
    others, same = others | ~counts[:, None], same | ~counts[:, None]
    low = float("-inf")
    near = (logits.masked_fill(~same, low).softmax(1) * distance).sum(1)
    all_near = (logits.masked_fill(~others, low).softmax(1) * distance).sum(1)
    return _reduce((near - all_near) * counts, counts, "mean")


def optimal_temperature(
    x: Float[Tensor, "b ..."], y: Int[Tensor, " labels"], *, metric: str = "euclidean", eps: float | int = 0.0
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(l', T) of equation 2: the least loss over T, and where it is reached to about five digits.

    Over 33 temperatures from 1e-4 to 1e4 times the median distance, then six times over 17 between the neighbours of the
    best. By the envelope theorem the loss at this T has the gradient of l'. Where every nearest neighbour has one's own
    label the least loss is 0 for T -> 0, and T stays at the lower end.
    """
    _check_labels(x, y)
    distance = pairwise_distance(x.detach(), metric)  # the best T is a number: no gradient flows through its search
    others, _ = _neighbors(y)
    # The median without a shape that depends on data: the diagonal is put above everything.
    among = distance.masked_fill(~others, float("inf")).flatten().sort().values
    scale = (
        among[len(y) * max(0, len(y) - 1) // 2]
        if len(y)
        else torch.ones((), dtype=distance.dtype, device=distance.device)
    )
    scale = torch.where(scale.isfinite(), scale, 1.0).clamp(min=torch.finfo(distance.dtype).tiny * 1e6)

    logs = torch.linspace(-math.log(1e4), math.log(1e4), 33, dtype=distance.dtype, device=distance.device)
    for points in (17,) * 6 + (0,):
        values = _at_temperatures(distance, y, scale * logs.exp(), eps)
        best = values.argmin()
        if points:
            low, high = logs.take((best - 1).clamp(min=0)), logs.take((best + 1).clamp(max=len(logs) - 1))
            logs = low + (high - low) * torch.arange(points, dtype=logs.dtype, device=logs.device) / (points - 1)
    return values.take(best), scale * logs.take(best).exp()


def _at_temperatures(distance: Tensor, y: Tensor, temperatures: Tensor, eps: float) -> Tensor:
    """The mean loss at each of the temperatures (t,); all at once, unless that asks for more than 64 MiB."""
    temperatures = temperatures.view(-1, 1, 1)
    parts = [temperatures] if temperatures.numel() * distance.numel() <= 2**24 else temperatures.split(1)
    return torch.cat([_reduce(*_per_sample(distance, y, part, eps), "mean") for part in parts])


class SoftNearestNeighborLoss(nn.Module):
    """The loss with its temperature: fixed, the official one-step update, or exactly least for each batch.

    ``optimize="step"`` carries t = T0 / T from batch to batch in the buffer ``inverse`` and moves it in training mode
    only; ``"exact"`` minimises over T at every call; ``"none"`` keeps ``temperature``.

    >>> loss = SoftNearestNeighborLoss(temperature=100.0, optimize="step")
    >>> loss(torch.randn(8, 4), torch.arange(8) % 2).shape
    torch.Size([])
    """

    def __init__(
        self,
        temperature: float | int = 100.0,
        *,
        optimize: str = "step",
        lr: float | int = 0.1,
        metric: str = "euclidean",
        eps: float | int = 0.0,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, allowed is temperature > 0")
        if optimize not in OPTIMIZE:
            raise ValueError(f"optimize is {optimize!r}, allowed are {', '.join(OPTIMIZE)}")
        if metric not in METRICS:
            raise ValueError(f"metric is {metric!r}, allowed are {', '.join(METRICS)}")
        if eps < 0:
            raise ValueError(f"eps is {eps}, allowed is eps >= 0")
        self.temperature, self.optimize, self.lr, self.metric, self.eps = float(temperature), optimize, lr, metric, eps
        self.register_buffer("inverse", torch.ones(()))

    def forward(self, x: Float[Tensor, "b ..."], y: Int[Tensor, " labels"]) -> Float[Tensor, ""]:
        if self.optimize == "exact":
            _, temperature = optimal_temperature(x, y, metric=self.metric, eps=self.eps)
        else:
            if self.optimize == "step" and self.training:
                inverse = inverse_temperature_step(
                    x, y, self.inverse, initial=self.temperature, lr=self.lr, metric=self.metric, eps=self.eps
                )
                self.inverse.copy_(inverse)
            temperature = self.temperature / self.inverse.clone()
        return soft_nearest_neighbor_loss(x, y, temperature, metric=self.metric, eps=self.eps)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, optimize={self.optimize}, metric={self.metric}, eps={self.eps:g}"


# On the layers of a model


class LayerTap:
    """Keeps what the named ``layers`` of ``model`` gave in its last forward pass, in ``features``; ``close()`` ends it."""

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        modules = dict(model.named_modules())
        if not layers:
            raise ValueError("layers is empty, allowed are one or more names of model.named_modules()")
        for name in layers:
            if not name or name not in modules:
                close = difflib.get_close_matches(name, modules, n=1)
                hint = f", did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"layers has {name!r}, allowed are names of model.named_modules(){hint}")
        self.layers = tuple(layers)
        self.features: dict[str, Tensor] = {}
        self._handles = [modules[name].register_forward_hook(self._keep(name)) for name in layers]

    def _keep(self, name: str):
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            self.features[name] = output

        return hook

    def take(self) -> dict[str, Tensor]:
        """The features, in the order of ``layers``, which are then forgotten."""
        missing = [name for name in self.layers if name not in self.features]
        if missing:
            raise ValueError(f"layers has {missing[0]!r}, which gave nothing: run the model forward first")
        features, self.features = {name: self.features[name] for name in self.layers}, {}
        return features

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> "LayerTap":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class EntanglementRegularizer(nn.Module):
    """alpha * sum over hidden layers of l', to be added to the loss of any model; equation 3.

    Forward hooks listen to ``layers`` (names of ``model.named_modules()``; not the logits, which must part the classes).
    ``factor`` is alpha: negative entangles, as the paper advises, positive separates. Call it with the labels after each
    forward pass of the model. ``close()`` takes the hooks away. The official example has alpha = -10 and T = 100.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> entangle = EntanglementRegularizer(model, ["1"], factor=-0.1)
    >>> x, y = torch.randn(16, 4), torch.arange(16) % 2
    >>> (F.cross_entropy(model(x), y) + entangle(y)).backward()
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        factor: float | int = -10.0,
        *,
        temperature: float | int = 100.0,
        optimize: str = "step",
        metric: str = "euclidean",
        eps: float | int = 0.0,
    ) -> None:
        super().__init__()
        if not math.isfinite(factor):
            raise ValueError(f"factor is {factor}, allowed is a finite number")
        self.factor = factor
        self.losses = nn.ModuleList(
            SoftNearestNeighborLoss(temperature, optimize=optimize, metric=metric, eps=eps) for _ in layers
        )
        self.tap = LayerTap(model, layers)

    def forward(self, y: Int[Tensor, " labels"]) -> Float[Tensor, ""]:
        features = self.tap.take().values()
        return self.factor * torch.stack([loss(x, y) for loss, x in zip(self.losses, features, strict=True)]).sum()

    def close(self) -> None:
        """Takes the hooks off the model."""
        self.tap.close()


@torch.no_grad()
def hidden_features(
    model: nn.Module, layers: Sequence[str], x: Float[Tensor, "n ..."], batch_size: int = 256
) -> dict[str, Float[Tensor, "n d"]]:
    """What each of ``layers`` gives for all of ``x`` in eval mode, flattened, on the CPU; hidden mode and hooks are restored."""
    training, device = model.training, next((p.device for p in model.parameters()), x.device)
    model.eval()
    parts: dict[str, list[Tensor]] = {name: [] for name in layers}
    try:
        with LayerTap(model, layers) as tap:
            for batch in x.split(batch_size):
                model(batch.to(device))
                for name, feature in tap.take().items():
                    parts[name].append(feature.flatten(1).cpu())
    finally:
        model.train(training)
    return {name: torch.cat(part) for name, part in parts.items()}


@dataclass(frozen=True)
class LayerEntanglement:
    """One row of the layer analysis: l' and its temperature, and l at T = the median squared distance, batch means."""

    layer: str
    loss: float
    temperature: float
    loss_at_median: float


@torch.no_grad()
def layer_entanglement(
    model: nn.Module,
    layers: Sequence[str],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    metric: str = "euclidean",
) -> list[LayerEntanglement]:
    """The paper's analysis (section 3): how entangled the classes are in each layer, over ``batches`` of (x, y).

    Compare batches of the same size only: the loss of mingled classes grows with the number of classes in a batch.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [row.layer for row in layer_entanglement(model, ["0", "2"], [(torch.randn(8, 4), torch.arange(8) % 2)])]
    ['0', '2']
    """
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in layers}
    for x, y in batches:
        for name, feature in hidden_features(model, layers, x).items():
            label = y.cpu()
            loss, temperature = optimal_temperature(feature, label, metric=metric)
            distance = pairwise_distance(feature, metric)
            median = (
                distance[~torch.eye(len(label), dtype=torch.bool)].median().clamp(min=torch.finfo(distance.dtype).tiny)
            )
            at_median = soft_nearest_neighbor_loss(feature, label, median, metric=metric)
            rows[name].append((loss.item(), temperature.item(), at_median.item()))
    if not all(rows.values()):
        raise ValueError("batches is empty, allowed are one or more pairs (x, y)")
    means = {name: torch.tensor(values, dtype=torch.float64).mean(0).tolist() for name, values in rows.items()}
    return [LayerEntanglement(name, *mean) for name, mean in means.items()]


# Outliers by their hidden neighbours (section 5)


@torch.no_grad()
def hidden_neighbor_credibility(
    train_features: Float[Tensor, "n d"],
    train_labels: Int[Tensor, " n"],
    features: Float[Tensor, "m d"],
    predictions: Int[Tensor, " m"],
    k: int = 25,
    *,
    metric: str = "euclidean",
) -> Float[Tensor, " m"]:
    """The share of the ``k`` nearest training points that carry the predicted label; outliers have few."""
    if not 1 <= k <= len(train_features):
        raise ValueError(f"k is {k}, allowed is 1 <= k <= {len(train_features)}, the training points")
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}, allowed are {', '.join(METRICS)}")
    shares = []
    for part, label in zip(features.split(1024), predictions.split(1024), strict=True):
        if metric == "cosine":
            near = (F.normalize(part, dim=1) @ F.normalize(train_features, dim=1).T).topk(k).indices
        else:
            near = torch.cdist(part, train_features).topk(k, largest=False).indices
        shares.append((train_labels[near] == label[:, None]).to(features.dtype).mean(1))
    return torch.cat(shares)


class DeepNeighbors:
    """Deep k-nearest neighbours over several layers: credibility as the rank among held-out data of known labels.

    A point's nonconformity with a label is the number of its ``k`` nearest training points, over all layers, that carry
    another one. Its credibility is the share of the calibration data whose nonconformity with their true labels is at
    least as large (Papernot and McDaniel, 2018, which the paper builds its outlier test on). Features are dictionaries
    as ``hidden_features`` gives them.
    """

    def __init__(
        self, train: Mapping[str, Tensor], labels: Int[Tensor, " n"], k: int = 75, *, metric: str = "euclidean"
    ) -> None:
        self.train, self.labels, self.k, self.metric = dict(train), labels, k, metric
        self.calibration: Tensor | None = None

    def nonconformity(self, features: Mapping[str, Tensor], labels: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Neighbours of another label, counted over the layers."""
        missing = sorted(set(self.train) ^ set(features))
        if missing:
            raise ValueError(f"features has layers {sorted(features)}, allowed are {sorted(self.train)}")
        shares = [
            hidden_neighbor_credibility(
                self.train[name], self.labels, features[name], labels, self.k, metric=self.metric
            )
            for name in self.train
        ]
        return self.k * (1.0 - torch.stack(shares)).sum(0)

    def calibrate(self, features: Mapping[str, Tensor], labels: Int[Tensor, " m"]) -> "DeepNeighbors":
        """Takes the measure from held-out data with their true ``labels``."""
        self.calibration = self.nonconformity(features, labels).sort().values
        return self

    def credibility(self, features: Mapping[str, Tensor], labels: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
        """In [0, 1]; outliers are near 0. ``labels`` are the model's predictions."""
        if self.calibration is None:
            raise ValueError(
                "the neighbours are not calibrated: call calibrate(features, labels) with held-out data first"
            )
        nonconformity = self.nonconformity(features, labels)
        below = torch.searchsorted(self.calibration, nonconformity)
        return 1.0 - below.to(nonconformity.dtype) / len(self.calibration)


# Generated data (section 3)


def real_fake_entanglement(
    real: Float[Tensor, "n ..."], fake: Float[Tensor, "m ..."], temperature: Temperature | None = None
) -> Float[Tensor, ""]:
    """l with the labels real and generated, at ``temperature`` or the least over T: high where nothing tells them apart.

    A measure of a generator, or a bonus for it: it is differentiable in both batches. Equal batches reach about log 2.
    """
    x = torch.cat([real.flatten(1), fake.flatten(1)])
    y = torch.cat([torch.zeros(len(real), dtype=torch.long), torch.ones(len(fake), dtype=torch.long)]).to(x.device)
    chosen = optimal_temperature(x, y)[1] if temperature is None else temperature
    return soft_nearest_neighbor_loss(x, y, chosen)
