"""Small instances of the network, the rows' augmentation, the classifier and the search; Lookahead beside its peer."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saigen.example import Benchmark, Example
from saigen.nn.lookahead import Lookahead
from saigen.papers.tabular.regularization_cocktails import (
    Cocktail,
    CocktailClassifier,
    CocktailMLP,
    fgsm,
    row_cutmix,
    row_cutout,
    row_mixup,
    search_cocktail,
)

X, Y = torch.zeros(4, 3), torch.arange(4) % 2


def _rows(generator: torch.Generator) -> tuple[Tensor, Tensor, torch.Generator]:
    return torch.randn(8, 5, generator=generator), torch.arange(8) % 3, generator


def _table(generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
    y = torch.arange(60) % 3
    x = torch.randn(60, 4, generator=generator) + 3 * torch.stack((y == 1, y == 2, y == 0, y == 1), dim=1)
    return x.double().numpy(), y.numpy()


def _linear() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(5, 3)


def _small(**options: Any) -> CocktailClassifier:
    return CocktailClassifier(width=32, epochs=21, batch_size=32, learning_rate=0.005, random_state=0, **options)


def _search(x: np.ndarray, y: np.ndarray) -> Tensor:
    found = search_cocktail(x, y, classifier=_small(), trials=3, random_state=0)
    return torch.tensor([trial.score for trial in found.trials])


def examples() -> Iterator[Example]:
    """The network with two mixes of regularisers, the augmenters, the classifier, and the search (extra ``search``)."""
    for name, options in (
        ("CocktailMLP", {"batch_norm": True, "dropout": 0.3, "dropout_shape": "funnel", "skip": True}),
        ("CocktailMLP_shake_shake", {"skip": True, "multibranch": "shake-shake", "shake": "shake-shake"}),
        ("CocktailMLP_shake_drop", {"skip": True, "multibranch": "shake-drop"}),
    ):
        yield Example(
            name=name,
            kind="module",
            make=lambda options=options: CocktailMLP(5, 3, width=8, **options),
            inputs=lambda generator: (torch.randn(4, 5, generator=generator),),
            code=f"""import torch
from saigen.papers.tabular.regularization_cocktails import CocktailMLP

model = CocktailMLP(30, 2, {", ".join(f"{key}={value!r}" for key, value in options.items())})
print(model(torch.randn(128, 30)).shape, sum(p.numel() for p in model.parameters()))""",
            wrong=(
                (lambda: CocktailMLP(0, 2), "in_features"),
                (lambda: CocktailMLP(3, 2, multibranch="shake-drop"), "without skip"),
                (lambda: CocktailMLP(3, 2, dropout=0.5, dropout_shape="round"), "shape"),
            ),
        )
    for name, call, arguments, wrong in (
        ("row_mixup", lambda x, y, generator: row_mixup(x, y, 0.4, generator=generator), "0.4",
         (lambda: row_mixup(X, Y, -1.0), "alpha")),
        ("row_cutout", lambda x, y, generator: row_cutout(x, y, 0.8, 0.5, generator=generator), "probability=0.8, ratio=0.5",
         (lambda: row_cutout(X, Y, 2.0, 0.5), "probability")),
        ("row_cutmix", lambda x, y, generator: row_cutmix(x, y, 0.8, generator=generator), "probability=0.8",
         (lambda: row_cutmix(X, Y, -0.1), "probability")),
    ):  # fmt: skip
        yield Example(
            name=name,
            kind="function",
            make=lambda call=call: call,
            inputs=_rows,
            code=f"""import torch
from saigen.papers.tabular.regularization_cocktails import {name}, mixed_loss

x, y, model = torch.randn(128, 30), torch.randint(2, (128,)), torch.nn.Linear(30, 2)
batch = {name}(x, y, {arguments})
mixed_loss(model(batch.x), batch).backward()""",
            wrong=(wrong,),
            batch=None,
        )
    yield Example(
        name="fgsm",
        kind="function",
        make=lambda: lambda x, y, generator: fgsm(_linear(), x, y),
        inputs=_rows,
        code="""import torch
from saigen.papers.tabular.regularization_cocktails import fgsm

x, y, model = torch.randn(128, 30), torch.randint(2, (128,)), torch.nn.Linear(30, 2)
print((fgsm(model, x, y, epsilon=0.007) - x).abs().max())""",
        wrong=((lambda: fgsm(nn.Identity(), X, Y, -1.0), "epsilon"),),
        batch=None,
    )
    yield Example(
        name="CocktailClassifier",
        kind="estimator",
        make=lambda: _small(cocktail=Cocktail(skip=True, swa=True, snapshots=True, augmentation="mixup")),
        inputs=_table,
        code="""from sklearn.datasets import load_wine
from sklearn.model_selection import cross_val_score
from saigen.papers.tabular.regularization_cocktails import Cocktail, CocktailClassifier

X, y = load_wine(return_X_y=True)                       # NaN where a cell is empty
cocktail = Cocktail(batch_norm=True, use_dropout=True, dropout=0.2, swa=True, augmentation="mixup")
model = CocktailClassifier(cocktail, width=64, epochs=21, batch_size=32, random_state=0)   # categorical_features=[3, 5]
print(cocktail.ingredients, cross_val_score(model, X, y, cv=3, scoring="balanced_accuracy"))""",
        wrong=(
            (lambda: _small(cocktail={"droppout": 0.1}).fit(X, Y), "droppout"),
            (lambda: _small(categorical_features=[3]).fit(X, Y), "columns 0 to 2"),
            (lambda: CocktailClassifier(epochs=0).fit(X, Y), "epochs"),
        ),
    )
    if importlib.util.find_spec("optuna") is not None:
        yield Example(
            name="search_cocktail",
            kind="function",
            make=lambda: _search,
            inputs=_table,
            code="""from sklearn.datasets import load_wine
from saigen.papers.tabular.regularization_cocktails import CocktailClassifier, search_cocktail

X, y = load_wine(return_X_y=True)
small = CocktailClassifier(width=64, epochs=21, batch_size=32)          # the paper's size without these arguments
found = search_cocktail(X, y, classifier=small, trials=5, random_state=0)   # 840 in the paper; or seconds=600
print(found.cocktail.ingredients, found.score, [trial.epochs for trial in found.trials])
print(found.classifier.predict(X[:5]))""",
            wrong=(
                (lambda: search_cocktail(X, Y, trials=0), "trials"),
                (lambda: search_cocktail(X, Y, trials=1, sampler="grid"), "sampler"),
                (lambda: search_cocktail(X, Y, trials=1, validation=0.0), "validation"),
            ),
            batch=None,
        )


def benchmarks() -> Iterator[Benchmark]:
    """Lookahead, the one ingredient that has a peer of its own; the others are torch's, or a line."""

    def step(peer: bool) -> Callable[[], Callable[[], Any]]:
        def build() -> Callable[[], Any]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = CocktailMLP(30, 2)
            inner = torch.optim.AdamW(model.parameters(), fused=True)
            if peer:
                optimizer = importlib.import_module("pytorch_optimizer").Lookahead(inner, k=5, alpha=0.5)
            else:
                optimizer = Lookahead(inner, 5, 0.5)
            for p in model.parameters():
                p.grad = torch.ones_like(p)

            def five() -> None:
                for _ in range(5):
                    optimizer.step()

            return five

        return build

    yield Benchmark("Lookahead around AdamW, five steps of the paper's network", step(False), step(True))
