"""The network, the rows' augmentation, the training and the search: official numbers, formulas by hand, bad input."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_iris, load_wine
from sklearn.metrics import balanced_accuracy_score, log_loss
from torch import nn
from torch.nn import functional as F

from saigen.papers.tabular.regularization_cocktails import (
    INGREDIENTS,
    SPACE,
    Cocktail,
    CocktailClassifier,
    CocktailMLP,
    balanced_accuracy,
    balanced_accuracy_then_log_loss,
    balanced_class_weights,
    cosine_rate,
    cycle_ends,
    dropout_rates,
    fgsm,
    mean_probabilities,
    mixed_loss,
    row_cutmix,
    row_cutout,
    row_mixup,
    sample,
    search_cocktail,
    shake_drop,
    shake_shake,
    single,
    train_cocktail,
    transform,
    trials_of,
)

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "regularization_cocktails" / "official.npz")
SHAPES = ("funnel", "long_funnel", "diamond", "hexagon", "brick", "triangle", "stairs")
X, Y = torch.from_numpy(GOLDEN["x"]), torch.from_numpy(GOLDEN["y"])
NETWORKS = {
    "plain": {},
    "batch_norm": {"batch_norm": True},
    "skip": {"skip": True},
    "skip_batch_norm": {"skip": True, "batch_norm": True},
    **{
        f"{branch}_{shake}": {"skip": True, "multibranch": branch, "shake": shake, "shake_drop": 0.8}
        for branch in ("shake-shake", "shake-drop")
        for shake in ("even-even", "shake-even", "shake-shake", "M3")
    },
}


def official(name):
    """The golden network in our names, filled as the script that made the vectors fills it."""
    model = CocktailMLP(5, 3, width=7, **NETWORKS[name]).double()
    rng = np.random.RandomState(len(name))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.from_numpy(rng.normal(size=p.shape) * (0.5 if p.ndim > 1 else 0.2)))
    return model


# Against the official code ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_is_the_official_one(name):
    model = official(name)
    atol = 1e-6 if name.startswith("shake-drop") else 1e-12  # the official draws are in single precision
    for seed, golden in enumerate(GOLDEN[f"network/{name}/train"]):
        torch.manual_seed(seed)
        logits = model.train()(X)
        model.zero_grad()
        F.cross_entropy(logits, Y).backward()
        ours = np.concatenate([logits.detach().numpy().ravel(), model.stem.weight.grad.numpy().ravel()])
        np.testing.assert_allclose(ours, golden, atol=atol)
    np.testing.assert_allclose(model.eval()(X).detach(), GOLDEN[f"network/{name}/eval"], atol=atol)


@pytest.mark.parametrize("name", ("plain", "skip_batch_norm", "shake-shake_even-even"))
def test_official_state_dicts_load(name):
    model = official(name)
    theirs = dict(zip(GOLDEN[f"network/{name}/keys"].tolist(), model.state_dict().values(), strict=True))
    converted = CocktailMLP.convert_state_dict(theirs)
    assert list(converted) == list(model.state_dict())
    CocktailMLP(5, 3, width=7, **NETWORKS[name]).double().load_state_dict(converted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", (1, 2, 3, 4, 5))
def test_dropout_shapes_are_the_official_ones(shape, groups):
    for name, truncate in (("truncated", True), ("meant", False)):
        golden = GOLDEN[f"shapes/{name}"][SHAPES.index(shape), groups - 1, :groups]
        np.testing.assert_allclose(dropout_rates(shape, 0.4, groups, truncate=truncate), golden, atol=1e-9)
    if groups == 2:
        assert dropout_rates(shape, 0.4, truncate=True) == ([0.0, 0.4] if shape == "triangle" else [0.4, 0.4])


@pytest.mark.parametrize("name", ("mixup", "cutout", "cutmix"))
def test_augmentation_and_loss_are_the_official_ones(name, monkeypatch):
    golden = {key: GOLDEN[f"{name}/{key}"] for key in ("order", "weight", "x", "loss")}
    changed = torch.from_numpy(np.flatnonzero((golden["x"] != X.numpy()).any(0)))
    monkeypatch.setattr(torch, "randperm", lambda n, generator=None: torch.from_numpy(golden["order"]))
    monkeypatch.setattr(transform, "_columns", lambda d, share, generator: changed)
    monkeypatch.setattr(
        transform, "mixing_weights", lambda n, alpha, generator: torch.tensor([golden["weight"].item()]).double()
    )
    batch = {"mixup": lambda: row_mixup(X, Y, 0.6), "cutout": lambda: row_cutout(X, Y, 1.0, 0.5),
             "cutmix": lambda: row_cutmix(X, Y, 1.0)}[name]()  # fmt: skip
    np.testing.assert_allclose(batch.x, golden["x"], atol=1e-7)
    assert batch.weight == pytest.approx(golden["weight"].item(), abs=1e-7)
    weight = torch.sin(torch.arange(15, dtype=torch.float64)).view(3, 5)
    loss = mixed_loss(batch.x @ weight.T, batch, torch.from_numpy(GOLDEN["class_weights"]))
    assert loss.item() == pytest.approx(GOLDEN[f"{name}/loss"].item(), abs=1e-6)


def test_adversarial_rows_and_class_weights_are_the_official_ones():
    weights = torch.from_numpy(GOLDEN["class_weights"])
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 0, 0])
    torch.testing.assert_close(balanced_class_weights(labels, 3).double(), weights, rtol=0, atol=1e-6)
    assert balanced_class_weights(labels, 3)[labels].mean().item() == pytest.approx(1, abs=1e-6)
    assert balanced_class_weights(labels, 4)[3] == 0
    model = nn.Linear(5, 3)
    with torch.no_grad():
        model.weight.copy_(torch.sin(torch.arange(15.0)).view(3, 5))
        model.bias.zero_()
    loss = lambda logits, y: F.cross_entropy(logits, y, weights.float())  # noqa: E731
    ours = fgsm(model, X.float(), Y, 0.05, loss=loss, low=0.0, high=1.0)
    np.testing.assert_allclose(ours, GOLDEN["adversarial/x"], atol=1e-6)
    free = fgsm(model, X.float(), Y, 0.05, loss=loss)
    np.testing.assert_allclose((free - X.float()).abs(), 0.05, atol=1e-6)
    assert loss(model(free), Y) > loss(model(X.float()), Y)
    assert model.weight.grad is None and not free.requires_grad


def test_the_budgets_are_the_official_ones():
    numbers = {"stochastic_weight_averaging": 0, "snapshot_ensemble": 0, "batch_normalization": 0, "skip_connection": 0,
               "shake_shake": 0, "adversarial_training": 0, "cutmix": 1, "mixup": 1, "weight_decay": 1, "shake_drop": 1,
               "lookahead": 2, "cutout": 2, "dropout": 2}  # fmt: skip
    assert {name: trials_of(name) // 40 for name in INGREDIENTS} == numbers
    assert trials_of() == 840 and len(SPACE) == 19


# Against torch ------------------------------------------------------------------------------------------------------


def test_the_learning_rate_is_that_of_cosine_annealing_with_warm_restarts():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=15, T_mult=2)
    ends = cycle_ends(105)
    assert ends == (15, 45, 105) and cycle_ends(35) == (5, 15, 35) and cycle_ends(2) == (1, 2)
    for epoch in range(105):
        assert cosine_rate(epoch, ends) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()
    # where the cycles do not fill the epochs, the last one is stretched and not cut off
    assert cosine_rate(99, cycle_ends(100)) < 0.01


def table(n=64, d=6, classes=3):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d))
    return x, np.arange(n) % classes


def trained(cocktail, watch=None, **options):
    x, y = (torch.from_numpy(part) for part in table())
    torch.manual_seed(0)
    model = CocktailMLP(6, 3, width=8, batch_norm=cocktail.batch_norm, skip=cocktail.skip)
    return train_cocktail(model, x.float(), y, cocktail, epochs=7, batch_size=16, at_cycle_end=watch, **options)


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_averages_are_the_means_of_the_cycle_ends_and_their_batch_norm_is_that_of_the_rows():
    ends = {}
    trained(Cocktail(), lambda epoch, networks: ends.update({epoch: weights(networks[0]).clone()}))
    averaged = {}
    trained(Cocktail(swa=True), lambda epoch, networks: averaged.update({epoch: weights(networks[0]).clone()}))
    assert list(ends) == [1, 3, 7]
    for number, epoch in enumerate(ends):
        mean = torch.stack([ends[e] for e in list(ends)[: number + 1]]).mean(0)
        torch.testing.assert_close(averaged[epoch], mean, rtol=0, atol=1e-6)
    (network,), _ = trained(Cocktail(swa=True, batch_norm=True))
    inputs = []
    network.blocks[0].branch[0].register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    network(torch.from_numpy(table()[0]).float())
    moments = network.blocks[0].branch[0]
    torch.testing.assert_close(moments.running_mean, inputs[0].mean(0), rtol=1e-4, atol=1e-5)


def test_snapshots_are_the_cycle_ends_and_the_last_is_the_average():
    ends = []
    trained(Cocktail(), lambda epoch, networks: ends.append(weights(networks[0]).clone()))
    networks, _ = trained(Cocktail(snapshots=True))
    assert len(networks) == 3
    for network, end in zip(networks, ends, strict=True):
        assert torch.equal(weights(network), end)
    both, _ = trained(Cocktail(snapshots=True, swa=True))
    assert torch.equal(weights(both[0]), ends[0]) and torch.equal(weights(both[1]), ends[1])
    torch.testing.assert_close(weights(both[2]), torch.stack(ends).mean(0), rtol=0, atol=1e-6)
    four, _ = trained(Cocktail(snapshots=True), cycles=4)
    assert len(four) == 3
    x = torch.from_numpy(table()[0]).float()
    mean = torch.stack([network(x).double().softmax(1) for network in networks]).mean(0)
    torch.testing.assert_close(mean_probabilities(networks, x), mean.detach())


def test_lookahead_weight_decay_and_each_augmentation_change_the_training():
    plain = weights(trained(Cocktail())[0][0])
    for cocktail in (
        Cocktail(lookahead=True),
        Cocktail(use_weight_decay=True, weight_decay=0.1),
        *(Cocktail(augmentation=name, cutout_probability=1.0, cutmix_probability=1.0, mixup_alpha=1.0)
          for name in ("mixup", "cutout", "cutmix", "adversarial")),
    ):  # fmt: skip
        assert not torch.allclose(weights(trained(cocktail)[0][0]), plain, atol=1e-5), cocktail.ingredients
    # a number without its switch does nothing
    assert torch.equal(weights(trained(Cocktail(weight_decay=0.1))[0][0]), plain)


# By hand ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("d", "classes", "options", "count"),
    [(30, 2, {}, 2_118_146), (64, 10, {}, 2_139_658), (30, 2, {"batch_norm": True}, 2_127_362),
     (30, 2, {"skip": True, "multibranch": "shake-shake"}, 4_219_394)],
)  # fmt: skip
def test_parameters(d, classes, options, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in CocktailMLP(d, classes, **options).parameters()) == count
        assert CocktailMLP(600, 2).stem.out_features == 600


def test_shaking_has_one_value_and_another_gradient():
    first, second = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    out = shake_shake(first, second, 0.2, 0.9)
    torch.testing.assert_close(out, 0.2 * first + 0.8 * second)
    out.sum().backward()
    np.testing.assert_allclose(first.grad, 0.9)
    np.testing.assert_allclose(second.grad, 0.1)
    x = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    shake_drop(x, 0.0, -0.5, 0.3).sum().backward()
    np.testing.assert_allclose(x.grad, 0.3)
    assert shake_drop(x, 1.0, -0.5, 0.3).sum() == 4
    # eval mode: the expectation p_l + 1/2 - p_l / 2
    assert shake_drop(x, 0.6, 0.5, 0.5)[0, 0].item() == pytest.approx(0.8)


def test_the_mean_of_many_shaken_passes_is_the_pass_in_eval_mode():
    torch.manual_seed(0)
    block = CocktailMLP(3, 2, width=4, groups=1, blocks=1, skip=True, multibranch="shake-drop", shake_drop=0.7)
    x = torch.randn(2, 3)
    with torch.no_grad():
        hidden = block.stem(x)
        many = torch.stack([block.blocks[0].train()(hidden) for _ in range(400)]).mean(0)
        torch.testing.assert_close(many, block.blocks[0].eval()(hidden), atol=0.1, rtol=0.1)


def test_rows_are_mixed_by_the_book():
    x, y = torch.arange(40.0).view(8, 5), torch.arange(8)
    assert torch.equal(row_mixup(x, y, 0.0).x, x) and row_mixup(x, y, 0.0).weight == 1
    mixed = row_mixup(x, y, 1.0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixed.x, mixed.weight * x + (1 - mixed.weight) * x[mixed.other])
    cut = row_cutout(x + 1, y, 1.0, 0.5, generator=torch.Generator().manual_seed(0))
    assert (cut.x == 0).all(0).sum() == 2 and ((cut.x == 0).all(0) | (cut.x == x + 1).all(0)).all() and cut.weight == 1
    assert (row_cutout(x + 1, y, 1.0, 0.0).x == 0).all(0).sum() == 1
    assert torch.equal(row_cutout(x, y, 0.0, 1.0).x, x) and torch.equal(row_cutmix(x, y, 0.0).x, x)
    for seed in range(20):
        mixed = row_cutmix(x, y, 1.0, generator=torch.Generator().manual_seed(seed))
        columns = (mixed.x == x[mixed.other]).all(0)
        assert mixed.weight == pytest.approx(1 - max(1, columns.sum().item()) / 5) or torch.equal(mixed.y, mixed.other)
        assert (columns | (mixed.x == x).all(0)).all()
    before = x.clone()
    assert torch.equal(before, x)


def test_scores_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), 50)
    y = np.concatenate([np.zeros(30, int), np.ones(15, int), np.full(5, 2)])
    assert balanced_accuracy(y, p) == pytest.approx(balanced_accuracy_score(y, p.argmax(1)))
    assert balanced_accuracy(np.array([0, 2]), np.eye(3)[[0, 0]]) == 0.5
    expected = balanced_accuracy_score(y, p.argmax(1)) - 1e-3 * log_loss(y, p)
    assert balanced_accuracy_then_log_loss(y, p) == pytest.approx(expected)


# The space ----------------------------------------------------------------------------------------------------------


def test_the_space_asks_only_what_its_conditions_allow():
    rng = np.random.default_rng(0)
    drawn = [sample(rng) for _ in range(300)]
    assert {name for cocktail in drawn for name in cocktail.ingredients} == set(INGREDIENTS)
    assert all(cocktail.multibranch is None for cocktail in drawn if not cocktail.skip)
    assert all(cocktail.weight_decay == 1e-4 for cocktail in drawn if not cocktail.use_weight_decay)
    assert len({cocktail.weight_decay for cocktail in drawn}) > 100
    assert {cocktail.lookahead_steps for cocktail in drawn} == set(range(5, 11))
    for name in INGREDIENTS:
        assert all(sample(rng, single(name)).ingredients == (name,) for _ in range(5))
    assert Cocktail().ingredients == ()


# The classifier -----------------------------------------------------------------------------------------------------


def small(cocktail=None, **options):
    return CocktailClassifier(cocktail, **{"width": 16, "epochs": 14, "batch_size": 32, "random_state": 0} | options)


@pytest.mark.parametrize("name", INGREDIENTS)
def test_each_ingredient_learns_alone(name):
    X, y = load_wine(return_X_y=True)
    model = small(INGREDIENTS[name], width=32, epochs=21, batch_size=16, learning_rate=1e-2).fit(X[::2], y[::2])
    assert model.score(X[1::2], y[1::2]) > 0.85
    assert len(model.networks_) == (3 if name == "snapshot_ensemble" else 1)
    np.testing.assert_allclose(model.predict_proba(X).sum(1), 1, atol=1e-12)


def test_all_that_can_be_together_learn_together():
    cocktail = Cocktail(batch_norm=True, use_weight_decay=True, use_dropout=True, dropout=0.2, skip=True,
                        multibranch="shake-shake", lookahead=True, swa=True, snapshots=True, augmentation="mixup")  # fmt: skip
    X, y = load_wine(return_X_y=True)
    model = small(cocktail, width=32, epochs=21, batch_size=16, learning_rate=1e-2).fit(X[::2], y[::2])
    assert model.score(X[1::2], y[1::2]) > 0.85 and len(cocktail.ingredients) == 8


def test_categories_and_missing_cells():
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 4, 200).astype(float)
    y = np.array(["even", "odd"])[(kind % 2).astype(int)]
    X = np.column_stack([rng.normal(size=200), kind, np.full(200, 3.0)])
    X[::7, 0], X[::11, 1] = np.nan, np.nan
    model = small(categorical_features=[1], epochs=35, learning_rate=5e-3).fit(X, y)
    known = ~np.isnan(X[:, 1])
    assert (model.predict(X) == y)[known].mean() > 0.95
    # values, the constant column, four categories and the missing one
    assert model.encoder_.transform(X).shape == (200, 2 + 5)
    unseen = np.array([[0.0, 9.0, 3.0]])
    assert model.encoder_.transform(unseen)[0, 2:].sum() == 0 and model.predict(unseen)[0] in ("even", "odd")
    mask = small(categorical_features=[False, True, False], epochs=35, learning_rate=5e-3).fit(X, y)
    np.testing.assert_array_equal(mask.predict_proba(X), model.predict_proba(X))
    values = model.encoder_.transform(X)[:, 0]
    np.testing.assert_allclose(values[0], (np.nanmedian(X[:, 0]) - np.mean(np.where(np.isnan(X[:, 0]), np.nanmedian(X[:, 0]), X[:, 0])))
                               / np.std(np.where(np.isnan(X[:, 0]), np.nanmedian(X[:, 0]), X[:, 0])))  # fmt: skip


def test_the_same_seed_gives_the_same_and_the_global_state_stays():
    X, y = load_iris(return_X_y=True)
    before = torch.get_rng_state()
    cocktail = Cocktail(use_dropout=True, augmentation="cutmix", skip=True, multibranch="shake-drop")
    first, second = small(cocktail).fit(X, y), small(cocktail).fit(X, y)
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(first.predict_proba(X), second.predict_proba(X))
    assert first.loss_curve_ == second.loss_curve_ and len(first.loss_curve_) == 14
    assert small(cocktail, random_state=1).fit(X, y).loss_curve_ != first.loss_curve_


def test_a_last_batch_of_one_row_meets_no_batch_norm_alone():
    X, y = load_iris(return_X_y=True)
    assert len(small(Cocktail(batch_norm=True, swa=True), epochs=2, batch_size=32).fit(X[:129], y[:129]).networks_) == 1


# The search ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched():
    pytest.importorskip("optuna")
    X, y = load_breast_cancer(return_X_y=True)
    return search_cocktail(X[:300], y[:300], classifier=small(epochs=7, learning_rate=5e-3), trials=12, random_state=0)


def test_the_search_finds_what_it_says(searched):
    assert len(searched.trials) == 12 and searched.trials[0].cocktail == Cocktail() and searched.trials[0].complete
    assert searched.score == max(trial.score for trial in searched.trials if trial.complete)
    assert searched.classifier.cocktail_ == searched.cocktail
    assert {trial.epochs for trial in searched.trials} <= {1, 3, 7}, "trials end where cycles end"
    assert searched.epochs < 12 * 7, "Hyperband stopped none"
    assert any(len(trial.cocktail.ingredients) > 2 for trial in searched.trials)


def test_the_search_is_a_function_of_its_seed(searched):
    X, y = load_breast_cancer(return_X_y=True)
    again = search_cocktail(X[:300], y[:300], classifier=small(epochs=7, learning_rate=5e-3), trials=12, random_state=0)
    assert again.trials == searched.trials


def test_the_search_takes_any_budget_and_space():
    pytest.importorskip("optuna")
    X, y = load_iris(return_X_y=True)
    judged = np.arange(0, 150, 4)
    found = search_cocktail(
        X, y, classifier=small(epochs=7), trials=4, space=single("dropout"), validation=judged, pruner=None,
        sampler="random", random_state=0, score=balanced_accuracy_then_log_loss,
    )  # fmt: skip
    assert all(trial.cocktail.ingredients == ("dropout",) and trial.epochs == 7 for trial in found.trials)
    assert found.trials[0].cocktail == Cocktail(use_dropout=True)
    timed = search_cocktail(X, y, classifier=small(epochs=1), trials=None, seconds=0.5, random_state=0)
    assert timed.trials and timed.classifier.predict(X).shape == (150,)
    with pytest.raises(ValueError, match="class 2"):
        search_cocktail(X, y, classifier=small(), trials=1, validation=np.arange(100, 150))


def test_without_optuna_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'saigen\[search\]'"):
        search_cocktail(*load_iris(return_X_y=True), trials=1)


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: CocktailMLP(0, 2), "in_features"),
        (lambda: CocktailMLP(3, 2, multibranch="shake-shake"), "without skip"),
        (lambda: CocktailMLP(3, 2, skip=True, multibranch="shake"), "multibranch"),
        (lambda: CocktailMLP(3, 2, skip=True, shake="odd"), "shake"),
        (lambda: CocktailMLP(3, 2, dropout=1.0), "largest"),
        (lambda: dropout_rates("circle", 0.5), "shape"),
        (lambda: dropout_rates("brick", 0.5, 0), "groups"),
        (lambda: row_mixup(X, Y, -1.0), "alpha"),
        (lambda: row_cutout(X, Y, 1.5, 0.5), "probability"),
        (lambda: row_cutout(X, Y, 0.5, -0.5), "ratio"),
        (lambda: row_cutmix(X, Y, 2.0), "probability"),
        (lambda: fgsm(nn.Linear(5, 3).double(), X, Y, -0.1), "epsilon"),
        (lambda: cycle_ends(0), "epochs"),
        (lambda: Cocktail(dropout=0.9), "dropout is 0.9, allowed is 0.0 to 0.8"),
        (lambda: Cocktail(lookahead_steps=5.5), "lookahead_steps"),
        (lambda: Cocktail(augmentation="noise"), "augmentation"),
        (lambda: Cocktail(multibranch="shake-drop"), "without skip"),
        (lambda: single("early_stopping"), "ingredient"),
        (lambda: small({"droppout": 0.1}).fit(X, Y), "droppout"),
        (lambda: small("mixup").fit(X, Y), "cocktail"),
        (lambda: small(width=0).fit(X, Y), "width"),
        (lambda: small(learning_rate=0.0).fit(X, Y), "learning_rate"),
        (lambda: small(class_weight="even").fit(X, Y), "class_weight"),
        (lambda: small(categorical_features=[7]).fit(X, Y), "columns 0 to 4"),
        (lambda: small(categorical_features=[True]).fit(X, Y), "masks 1 columns"),
        (lambda: small(categorical_features=["kind"]).fit(X, Y), "kind"),
        (lambda: small().fit(X, torch.zeros(6).long()), "1 class"),
        (lambda: search_cocktail(X, Y, trials=None), "budget"),
        (lambda: search_cocktail(X, Y, trials=0), "trials"),
        (lambda: search_cocktail(X, Y, trials=1, seconds=0.0), "seconds"),
        (lambda: search_cocktail(X, Y, trials=1, sampler="grid"), "sampler"),
        (lambda: search_cocktail(X, Y, trials=1, pruner="median"), "pruner"),
        (lambda: search_cocktail(X, Y, trials=1, validation=1.5), "validation"),
        (lambda: search_cocktail(X, Y, trials=1, validation=[9]), "validation"),
    ],
)
def test_wrong_arguments(call, word):
    with pytest.raises(ValueError) as caught:
        call()
    assert word in str(caught.value)


def test_the_rate_at_the_start_and_the_middle_of_a_cycle():
    assert cosine_rate(0, (15, 45)) == 1 and cosine_rate(15, (15, 45)) == 1
    assert cosine_rate(30, (15, 45)) == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
