"""Small instances of the network, its masking, loss and optimizer, and of the two estimators."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saigen.example import Benchmark, Example
from saigen.papers.tabular.npt import (
    Lamb,
    NonParametricTransformer,
    NPTClassifier,
    NPTRegressor,
    flat_then_cosine,
    mask_entries,
    npt_loss,
    row_corruption_test,
    stratified_batches,
)

SMALL = {"embedding_dim": 8, "depth": 2, "heads": 2, "steps": 40, "learning_rate": 2e-2, "random_state": 0}
ROW_WISE = "attends between the rows of a batch: they are the table"


class _Table(nn.Module):
    """The network on a table of one tensor, as the contract calls modules: every column is a number."""

    def __init__(self, columns: int = 3) -> None:
        super().__init__()
        self.network = NonParametricTransformer([2] * columns, embedding_dim=8, depth=2, heads=2)

    def forward(self, x: Tensor) -> Tensor:
        columns = [torch.stack([column, torch.zeros_like(column)], dim=-1) for column in x.unbind(-1)]
        return torch.cat(self.network(columns), dim=-1)


def _blobs(generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
    y = torch.arange(60) % 3
    x = torch.randn(60, 2, generator=generator) + 4 * torch.stack((y == 1, y == 2), dim=1)
    return x.numpy().astype(np.float64), y.numpy()


def _line(generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
    x = torch.randn(60, 2, generator=generator).numpy().astype(np.float64)
    return x, x[:, 0] - x[:, 1]


def _fit(make: Callable[..., Any], **options: Any) -> Callable[[], Any]:
    return lambda: make(**SMALL | options).fit(*_blobs(torch.Generator()))


def _loss(x: Tensor) -> Tensor:
    columns = [torch.stack([column, torch.zeros_like(column)], dim=-1) for column in x.unbind(-1)]
    everything = torch.ones_like(x, dtype=torch.bool)
    return npt_loss([column[..., :1] ** 2 for column in columns], columns, everything, everything, 0.5)


def examples() -> Iterator[Example]:
    """The network, LAMB, the loss, and the estimators."""
    yield Example(
        name="NonParametricTransformer",
        kind="module",
        make=_Table,
        inputs=lambda generator: (torch.randn(6, 3, generator=generator),),
        code="""import torch
from saigen.papers.tabular.npt import NonParametricTransformer

# 100 rows of a target of 3 classes and of two numbers, each with its mask token
table = [torch.eye(4)[torch.arange(100) % 3], torch.randn(100, 2), torch.randn(100, 2)]
model = NonParametricTransformer([4, 2, 2], categorical=[0], embedding_dim=16, depth=4, heads=4)
print([tuple(column.shape) for column in model(table)])          # every entry of the table, predicted from all of it""",
        wrong=(
            (lambda: NonParametricTransformer([2, 1]), "input_dims"),
            (lambda: NonParametricTransformer([2, 2], [2]), "categorical"),
            (lambda: NonParametricTransformer([2, 2], depth=3), "depth"),
            (lambda: NonParametricTransformer([2, 2], embedding_dim=12), "embedding_dim"),
        ),
        expected_failures={"samples_independent_in_eval": ROW_WISE},
    )
    yield Example(
        name="Lamb",
        kind="optimizer",
        make=lambda params: Lamb(params, lr=0.01),
        code="""import torch
from saigen.papers.tabular.npt import flat_then_cosine, lookahead_lamb

model = torch.nn.Linear(4, 1)
optimizer, rate = lookahead_lamb(model.parameters(), lr=1e-2), flat_then_cosine(0.7)
x = torch.randn(64, 4)
for step in range(100):
    optimizer.param_groups[0]["lr"] = 1e-2 * rate(step, 100)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(loss.item())""",
        wrong=(
            (lambda: Lamb([nn.Parameter(torch.ones(1))], lr=-1.0), "lr"),
            (lambda: Lamb([nn.Parameter(torch.ones(1))], betas=(1.0, 0.9)), "betas"),
            (lambda: flat_then_cosine(1.5), "flat"),
        ),
    )
    yield Example(
        name="npt_loss",
        kind="function",
        make=lambda: _loss,
        inputs=lambda generator: (torch.randn(5, 3, generator=generator),),
        code="""import numpy as np
import torch
from saigen.papers.tabular.npt import TableEncoder, known_entries, mask_entries, npt_loss

x, y = np.random.default_rng(0).normal(size=(50, 3)), np.arange(50) % 2
encoder = TableEncoder(x, y, classes=2)
table = encoder.encode(x, y)
label = torch.zeros(50, 4, dtype=torch.bool)
label[:, 3] = True
of = {"categorical": encoder.categorical}
inputs, labels = mask_entries(table, label, 0.5, **of)                                # half of the labels
inputs, features = mask_entries(inputs, known_entries(table) & ~label, 0.15, **of)    # and some of the features
outputs = [column[:, :-1] for column in inputs]                                   # a network's, in earnest
print(npt_loss(outputs, table, features, labels, tradeoff=0.5, **of))""",
        wrong=(
            (lambda: mask_entries([torch.zeros(2, 2)], torch.ones(2, 1, dtype=torch.bool), 1.5), "probability"),
            (lambda: next(stratified_batches(np.zeros(3, int), 0, np.random.default_rng(0))), "batch_size"),
        ),
        batch=None,
    )
    yield Example(
        name="NPTClassifier",
        kind="estimator",
        make=lambda: NPTClassifier(**SMALL),
        inputs=_blobs,
        code="""from sklearn.datasets import load_wine
from sklearn.model_selection import train_test_split
from saigen.papers.tabular.npt import NPTClassifier, row_corruption_test

X, y = load_wine(return_X_y=True)
X, X_test, y, y_test = train_test_split(X, y, stratify=y, random_state=0)
model = NPTClassifier(embedding_dim=8, depth=4, heads=4, steps=100, learning_rate=1e-2, random_state=0).fit(X, y)
print(model.score(X_test, y_test))
print(row_corruption_test(model, X_test, y_test, random_state=0))      # log loss, and with the other rows scrambled""",
        wrong=(
            (_fit(NPTClassifier, label_mask=0.0), "label_mask"),
            (_fit(NPTClassifier, batch_size=1), "batch_size"),
            (_fit(NPTClassifier, categorical_features=[2]), "categorical_features"),
            (_fit(NPTClassifier, embedding_dim=2**15), "parameters"),
            (lambda: row_corruption_test(NPTClassifier(), *_blobs(torch.Generator()), repeats=0), "repeats"),
        ),
    )
    yield Example(
        name="NPTRegressor",
        kind="estimator",
        make=lambda: NPTRegressor(**SMALL),
        inputs=_line,
        code="""import numpy as np
from saigen.papers.tabular.npt import NPTRegressor

rng = np.random.default_rng(0)
X = np.column_stack([rng.integers(0, 4, 200), rng.normal(size=200)])       # a category and a number
y = np.array([3.0, -1.0, 0.0, 2.0])[X[:, 0].astype(int)] + X[:, 1]
X[::10, 1] = np.nan                                                        # missing values may stay
model = NPTRegressor(categorical_features=[0], embedding_dim=16, depth=2, heads=2, steps=150, learning_rate=1e-2, random_state=0)
print(model.fit(X[:150], y[:150]).score(X[150:], y[150:]))""",
        wrong=(
            (_fit(NPTRegressor, feature_mask=-0.1), "feature_mask"),
            (_fit(NPTRegressor, validation_fraction=1.0), "validation_fraction"),
            (_fit(NPTRegressor, clip=0.0), "clip"),
        ),
    )


def _lamb_step(peer: bool) -> Callable[[], Callable[[], Any]]:
    def build() -> Callable[[], Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = NonParametricTransformer([2] * 6, embedding_dim=16, depth=4, heads=4)
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.01)
        if peer:
            from pytorch_optimizer import Lamb as Peer

            return Peer(model.parameters(), lr=1e-6, weight_decay=0.0).step
        return Lamb(model.parameters(), lr=1e-6).step

    return build


def benchmarks() -> Iterator[Benchmark]:
    """LAMB's step beside pytorch_optimizer's; the network itself has no peer among the packages."""
    yield Benchmark(name="LAMB step on a network of six columns", ours=_lamb_step(False), peer=_lamb_step(True))
