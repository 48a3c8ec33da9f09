"""Does the network look other rows up, is it as good as tuned trees, and does it need the other rows for that?

Laptop: drawn look-up tables, scikit-learn's tables and drawn thresholds, with narrow networks (attention between datapoints
is about 100 wide). Real and full: the user's tables, a CSV or Parquet file each, with the paper's networks. A seed draws
split, weights and order; the rows that choose are taken from the training rows, the same share for all.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from torch import Tensor

from saigen.data.tables import Table, embedded_table, read_tables, threshold_table
from saigen.papers.tabular.npt import (
    NonParametricTransformer,
    NPTClassifier,
    NPTRegressor,
    row_corruption_test,
)
from saigen.train.boosting import tuned_boosting
from saigen.trial import Trial

WIDTH = 128
"""Of attention between datapoints at most, where ``embedding_dim`` is not given."""


@dataclass(frozen=True)
class Size:
    look_up_rows: int
    look_up_tables: int
    look_up_steps: int
    tables: tuple[str, ...] = ("iris", "wine", "diabetes", "thresholds", "breast_cancer")
    corrupted: tuple[str, ...] = ("iris", "wine", "diabetes")
    rows: int = 200
    """Most rows to learn from; a fifth of them choose."""
    test_rows: int = 2_000
    steps: int = 300
    rates: tuple[float, ...] = (5e-3,)
    embedding_dim: int | None = None
    depth: int = 4
    heads: int = 4
    batch_size: int | None = None
    label_mask: float = 0.5
    budget: int = 10
    """Candidates of boosting."""
    iterations: int = 150
    libraries: tuple[str, ...] = ("scikit-learn",)


SIZES = {
    "tiny": Size(6, 2, 4, ("iris", "diabetes"), ("iris",), rows=40, steps=3, budget=1, iterations=5),
    "laptop": Size(16, 8, 1200),
    # nine tables of a user in a quarter of an hour a seed, on one core
    "real": Size(
        32, 8, 3_000, rows=600, test_rows=1_000, batch_size=256, budget=20, iterations=300,
        libraries=("scikit-learn", "xgboost"),
    ),
    "full": Size(
        64, 8, 50_000, rows=10**9, test_rows=10**9, steps=200_000, rates=(1e-3,), embedding_dim=64, depth=8, heads=8,
        batch_size=2048, budget=100, iterations=2_000, libraries=("scikit-learn", "xgboost"),
    ),
}  # fmt: skip
FEATURES = 4
TEST_SHARE = 0.3
VALIDATION = 0.2
RARE = 20
"""Rows that a class of the user's tables needs at least; others are left out."""
LEAST_EXPLAINED = -1.0
"""A model that is certain and wrong can lose any number of nats; one such row is not to outweigh all tables."""


def rows_are_looked_up(trial: Trial) -> dict[str, float]:
    """One seed: fresh tables of rows that each occur twice, once with their label and once without; then labels are changed."""
    size = SIZES[trial.scale]
    values = {}
    for number, arm in enumerate(("npt", "row_wise")):
        with trial.seeded("weights"):
            model = NonParametricTransformer(
                [2] * (FEATURES + 1), embedding_dim=16, depth=4, heads=4, dropout=0.0, between_datapoints=arm == "npt"
            ).to(trial.device)
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, size.look_up_steps)
        generator = trial.generator("tables")
        for step in range(size.look_up_steps):
            x, y = _look_up(size, generator, trial.device)
            loss = ((_copies(model, x, y) - y) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                trial.progress(number * size.look_up_steps + step, 2 * size.look_up_steps, arm)
        values |= {f"{key}_{arm}": value for key, value in _looked_up(model, size, trial).items()}
        values[f"last_loss_{arm}"] = loss.item()
    return {
        "rmse_saved": 1 - values["rmse_npt"] / values["rmse_row_wise"],
        "follows_changed_labels": values["follows_npt"],
        **values,
    }


def _look_up(size: Size, generator: torch.Generator, device: torch.device, tables: int = 0) -> tuple[Tensor, Tensor]:
    """Features and labels, all of them N(0, 1): nothing but the other row says anything about a label."""
    drawn = torch.randn(tables or size.look_up_tables, size.look_up_rows, FEATURES + 1, generator=generator)
    return drawn[..., :-1].to(device), drawn[..., -1].to(device)


def _copies(model: Callable[[list[Tensor]], list[Tensor]], x: Tensor, y: Tensor) -> Tensor:
    """Predictions for the second of each pair, whose label is masked."""
    tokens = torch.zeros_like(y)
    columns = [
        torch.stack([torch.cat([value, value], 1), torch.cat([tokens, tokens], 1)], -1) for value in x.unbind(-1)
    ]
    label = torch.stack([torch.cat([y, tokens], 1), torch.cat([tokens, tokens + 1], 1)], -1)
    return model([*columns, label])[-1][:, y.shape[1] :, 0]


@torch.no_grad()
def _looked_up(model: NonParametricTransformer, size: Size, trial: Trial) -> dict[str, float]:
    """On new tables: the error; and, where one label of a table is changed, how its copy's prediction goes with it."""
    model.eval()
    generator = trial.generator("test tables")
    x, y = _look_up(size, generator, trial.device, tables=8 * size.look_up_tables)
    before = _copies(model, x, y)
    changed = y.clone()
    changed[:, 0] = torch.randn(len(y), generator=generator).to(trial.device)
    after = _copies(model, x, changed)
    asked, moved = changed[:, 0] - y[:, 0], after[:, 0] - before[:, 0]
    return {
        "rmse": float(((before - y) ** 2).mean().sqrt()),
        # the slope of the regression of one on the other: 1 where the prediction goes all the way
        "follows": float((asked * moved).sum() / (asked**2).sum()),
        "others_moved": float((after - before)[:, 1:].abs().mean()),
    }


def on_par_with_boosting(trial: Trial) -> dict[str, float]:
    """One seed: NPT, tuned boosted trees, and the plain arms, on every table; the shares of the target they explain."""
    size, values = SIZES[trial.scale], {}
    tables = list(_tables(trial, size.tables))
    for done, table in enumerate(tables):
        train, test = _split(trial, table, size)
        arms = {"npt": _npt(trial, train, size)} | _trees(trial, train, size) | _plain(train)
        for arm, model in arms.items():
            values[f"explained_{arm}_{table.name}"] = _explained(model, train, test)
            if table.classes:
                values[f"accuracy_{arm}_{table.name}"] = float(accuracy_score(test.y, model.predict(test.x)))
        values[f"last_loss_{table.name}"] = arms["npt"].loss_curve_[-1]
        trial.progress(done + 1, len(tables), table.name)
    names = [key.removeprefix("explained_npt_") for key in values if key.startswith("explained_npt_")]
    mean = {
        arm: float(np.mean([values[f"explained_{arm}_{name}"] for name in names]))
        for arm in arms  # every table has the same
    }
    trees = max(mean[arm] for arm in arms if arm.startswith("trees"))
    return {
        "explained_lost_to_trees": trees - mean["npt"],
        "explained_lost_by_neighbours": trees - mean["neighbours"],
        **{f"mean_{arm}": value for arm, value in mean.items()},
        **values,
    }


def other_rows_matter(trial: Trial) -> dict[str, float]:
    """One seed: what is explained, and what is left of it when every column of the other rows is shuffled by itself.

    Labels are masked seldom, as in most of the paper's runs on small tables: the network meets the others' labels.
    """
    size, values, lost = SIZES[trial.scale], {}, []
    size = replace(size, steps=2 * size.steps, label_mask=0.15)
    tables = list(_tables(trial, size.corrupted))
    for done, table in enumerate(tables):
        train, test = _split(trial, table, size)
        model = _npt(trial, train, size)
        seed = int(trial.rng("corruption").integers(2**31))
        losses = np.array(row_corruption_test(model, test.x, test.y, repeats=10, random_state=seed))
        if not table.classes:
            losses = losses**2
        of = losses / _uninformed(train, test)
        values |= {f"explained_{table.name}": float(1 - of[0]), f"explained_corrupted_{table.name}": float(1 - of[1])}
        values[f"last_loss_{table.name}"] = model.loss_curve_[-1]
        lost.append(of[1] - of[0])
        trial.progress(done + 1, len(tables), table.name)
    return {"explained_lost": float(np.mean(lost)), **values}


# Data -------------------------------------------------------------------------------------------------------------


def _tables(trial: Trial, names: tuple[str, ...]) -> Iterator[Table]:
    if trial.scale in ("tiny", "laptop"):
        for name in names:
            table = threshold_table(trial.rng("thresholds"), rows=600) if name == "thresholds" else embedded_table(name)
            trial.used(name, table.fingerprint)
            yield table
        return
    if trial.data_path is None:
        raise ValueError(f"scale {trial.scale!r} needs tables of yours: give --data PATH")
    for table in read_tables(trial.data_path):
        trial.used(table.name, table.fingerprint)
        yield _without_rare_classes(table)


def _without_rare_classes(table: Table) -> Table:
    """A class of a handful of rows cannot be in every part, and a model that has not met it cannot be judged on it."""
    if table.classes is None:
        return table
    kept = np.flatnonzero(np.bincount(table.y, minlength=len(table.classes)) >= RARE)
    if len(kept) < 2:
        raise ValueError(f"{table.name} has {len(kept)} classes of {RARE} rows or more, needed are two")
    table = table.take(np.flatnonzero(np.isin(table.y, kept)))
    return replace(table, y=np.searchsorted(kept, table.y), classes=tuple(table.classes[k] for k in kept))


def _split(trial: Trial, table: Table, size: Size) -> tuple[Table, Table]:
    rng = trial.rng(f"split {table.name}")
    stratify = table.y if table.classes else None
    train, test = train_test_split(
        np.arange(len(table)), test_size=TEST_SHARE, stratify=stratify, random_state=int(rng.integers(2**31))
    )
    if len(train) > size.rows:
        strata = table.y[train] if table.classes else None
        train = train_test_split(train, train_size=size.rows, stratify=strata, random_state=int(rng.integers(2**31)))[0]
    return table.take(train), table.take(test[: size.test_rows])


# Arms -------------------------------------------------------------------------------------------------------------


def _npt(trial: Trial, train: Table, size: Size, **options: Any) -> NPTClassifier | NPTRegressor:
    """Of the learning rates, the one whose validation loss is lowest."""
    columns = train.x.shape[1] + 1
    narrow = max(size.heads, WIDTH // columns // size.heads * size.heads)
    make = NPTClassifier if train.classes else NPTRegressor
    seed = int(trial.rng(f"npt {train.name}").integers(2**31))
    tried = [
        make(
            categorical_features=list(train.categorical), embedding_dim=size.embedding_dim or min(narrow, 16),
            depth=size.depth, heads=size.heads, steps=size.steps, learning_rate=rate, batch_size=size.batch_size,
            label_mask=size.label_mask, validation_fraction=VALIDATION, device=str(trial.device), random_state=seed, **options,
        ).fit(train.x, train.y)
        for rate in size.rates
    ]  # fmt: skip
    return min(tried, key=lambda model: model.validation_loss_)


def _trees(trial: Trial, train: Table, size: Size) -> dict[str, Any]:
    found = {}
    for library in size.libraries:
        if library == "xgboost" and not _has_xgboost():
            continue
        found[f"trees_{library.replace('-', '_')}"] = tuned_boosting(
            train.x, train.y, task=train.task, categorical=train.categorical, validation=VALIDATION, budget=size.budget,
            rng=trial.rng(f"trees {train.name}"), library=library, most_iterations=size.iterations, patience=30,
        ).estimator  # fmt: skip
    return found


def _has_xgboost() -> bool:
    from importlib.util import find_spec

    return find_spec("xgboost") is not None


def _plain(train: Table) -> dict[str, Any]:
    """The naive look at other rows, the best number of neighbours by cross-validation; and a linear model."""
    least = int(np.bincount(train.y).min()) if train.classes else len(train)
    folds = max(2, min(5, least))
    neighbours = [k for k in (1, 3, 5, 10, 20, 40) if k <= len(train) // 2]
    penalties = np.logspace(-4, 4, 9)
    if train.classes:
        scoring = "neg_log_loss"
        nearest, linear = KNeighborsClassifier(), LogisticRegression(max_iter=2_000)
        strengths = {"C": penalties}
    else:
        scoring = "neg_mean_squared_error"
        nearest, linear = KNeighborsRegressor(), Ridge()
        strengths = {"alpha": penalties}
    numbers = [column for column in range(train.x.shape[1]) if column not in train.categorical]
    models = {"neighbours": (nearest, {"n_neighbors": neighbours}), "linear": (linear, strengths)}
    return {
        name: make_pipeline(
            ColumnTransformer(
                [
                    ("numbers", make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), numbers),
                    ("categories", OneHotEncoder(handle_unknown="ignore"), list(train.categorical)),
                ]
            ),
            GridSearchCV(model, grid, scoring=scoring, cv=folds),
        ).fit(train.x, train.y)
        for name, (model, grid) in models.items()
    }


def _explained(model: Any, train: Table, test: Table) -> float:
    """1 less the loss over that of always saying what the training rows are on average; 1 is all there is."""
    if test.classes:
        predicted = np.clip(model.predict_proba(test.x), 1e-7, 1)  # as certain as single precision can be
        predicted /= predicted.sum(axis=1, keepdims=True)
        loss = log_loss(test.y, predicted, labels=np.arange(len(test.classes)))
    else:
        loss = np.mean((test.y - model.predict(test.x)) ** 2)
    return float(max(1 - loss / _uninformed(train, test), LEAST_EXPLAINED))


def _uninformed(train: Table, test: Table) -> float:
    """The loss of always saying what the training rows are on average."""
    if not test.classes:
        return float(np.mean((test.y - train.y.mean()) ** 2))
    share = np.bincount(train.y, minlength=len(test.classes)) / len(train)
    return float(log_loss(test.y, np.tile(share, (len(test), 1)), labels=np.arange(len(test.classes))))
