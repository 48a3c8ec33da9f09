"""NPT: the authors' outputs, loss and optimizer; who sees whom; what is masked; and that no label leaks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from torch.nn import functional as F

from saigen.papers.tabular.npt import (
    Lamb,
    NonParametricTransformer,
    NPTClassifier,
    NPTRegressor,
    SelfAttentionBlock,
    TableEncoder,
    claims,
    cosine_tradeoff,
    flat_then_cosine,
    known_entries,
    lookahead_lamb,
    mask_entries,
    npt_loss,
    row_corruption_test,
    stratified_batches,
)
from saigen.papers.tabular.npt.estimator import TRAIN, VALIDATION
from saigen.trial import Trial
from tests.golden.npt.make import CASES, masked, table, wave

GOLDEN = np.load(Path(__file__).resolve().parents[2] / "golden" / "npt" / "official.npz")
SMALL = {"embedding_dim": 8, "depth": 2, "heads": 2, "dropout": 0.0, "steps": 3, "random_state": 0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network(dims=(3, 2, 2), categorical=(0,), **options):
    options = {"embedding_dim": 8, "depth": 4, "heads": 2} | options
    torch.manual_seed(1)
    return NonParametricTransformer(list(dims), list(categorical), **options).double().eval()


def rows(n=9, dims=(3, 2, 2), seed=0):
    return [torch.randn(n, width, generator=generator(seed + j), dtype=torch.float64) for j, width in enumerate(dims)]


# The authors' code ------------------------------------------------------------------------------------------------


def official(name):
    case = CASES[name]
    shapes = [tuple(map(int, shape.split(","))) for shape in GOLDEN[f"{name}_shapes"]]
    state = {str(key): wave(i, shapes[i]) for i, key in enumerate(GOLDEN[f"{name}_keys"])}
    model = NonParametricTransformer(
        case["dims"], case["categorical"], embedding_dim=8, depth=case["depth"], heads=4, dropout=0.0,
        patches=case["patches"] or None, type_embedding=not case["patches"],
    ).double()  # fmt: skip
    model.load_state_dict(model.convert_state_dict(state), strict=True)
    columns = table(case["dims"], case["categorical"], 7)
    return model, columns, *masked(columns)


@pytest.mark.parametrize("name", list(CASES))
def test_equals_official_forward(name):
    model, _, inputs, _ = official(name)
    outputs = torch.cat(model(inputs), dim=1)
    assert torch.allclose(outputs, torch.from_numpy(GOLDEN[f"{name}_outputs"]), rtol=1e-10, atol=1e-10)


def test_equals_official_loss_and_gradients():
    model, columns, inputs, mask = official("mixed")
    features, labels = mask.clone(), mask.clone()
    features[:, 0] = False
    labels[:, 1:] = False
    loss = npt_loss(model(inputs), columns, features, labels, 0.3, categorical=[0, 2])
    # the official code adds up in single precision, whatever its tensors are
    assert loss.item() == pytest.approx(GOLDEN["loss"].item(), rel=1e-6)
    loss.backward()
    converted = model.convert_state_dict({str(key): torch.tensor(0) for key in GOLDEN["gradient_keys"]})
    norms = dict(zip(converted, GOLDEN["gradient_norms"], strict=True))
    for key, parameter in model.named_parameters():
        assert float(parameter.grad.norm()) == pytest.approx(norms[key], rel=1e-6, abs=1e-9)


def test_lamb_equals_official():
    p = torch.nn.Parameter(wave(0, (3, 4)))
    optimizer = Lamb([p], lr=0.05, weight_decay=0.01)
    for step in range(8):
        p.grad = wave(step + 3, (3, 4)) * 10.0 ** (step % 3)
        optimizer.step()
        assert np.allclose(p.detach().numpy(), GOLDEN["lamb"][step], rtol=1e-10)


def test_own_keys_pass_the_conversion():
    state = network().state_dict()
    assert NonParametricTransformer.convert_state_dict(state).keys() == state.keys()


# The network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_norm", [False, True])
@pytest.mark.parametrize("scale", ["width", "head"])
def test_block_is_the_formula(kv_norm, scale):
    torch.manual_seed(0)
    block = SelfAttentionBlock(6, 2, kv_norm=kv_norm, scale=scale).double().eval()
    H = torch.randn(1, 5, 6, dtype=torch.float64)
    normed = F.layer_norm(H, (6,), block.norm_attention.weight, block.norm_attention.bias, 1e-12)
    source = normed if kv_norm else H
    q, k, v = block.query(normed)[0], block.key(source)[0], block.value(source)[0]
    heads = []
    for part in (slice(0, 3), slice(3, 6)):
        scores = q[:, part] @ k[:, part].T / (6 if scale == "width" else 3) ** 0.5
        heads.append(scores.softmax(1) @ v[:, part])
    residual = block.residual(H) + block.mix(torch.cat(heads, 1))
    hidden = block.feed_forward[0](F.layer_norm(residual, (6,), eps=1e-12))
    expected = residual + block.feed_forward[3](F.gelu(hidden))
    assert torch.allclose(block(H), expected, atol=1e-12)
    assert sum(p.numel() for p in block.parameters()) == 13 * 6**2 + 14 * 6


def test_rows_permuted_permute_the_outputs_and_columns_do_not():
    model, columns = network((2, 2, 2), ()), rows(dims=(2, 2, 2))
    order = torch.randperm(9, generator=generator())
    for out, permuted in zip(model(columns), model([column[order] for column in columns]), strict=True):
        assert torch.allclose(out[order], permuted, atol=1e-12)
    assert not torch.allclose(model(columns)[0], model([columns[1], columns[0], columns[2]])[1], atol=1e-3)


@pytest.mark.parametrize("how", ["between_datapoints", "values"])
def test_without_attention_between_datapoints_rows_do_not_matter(how):
    model, columns = network(between_datapoints=how != "between_datapoints"), rows()
    if how == "values":
        for block in model.blocks[::2]:
            torch.nn.init.zeros_(block.value.weight)
    changed = [torch.cat([column[:1], column[1:] + 1]) for column in columns]
    assert all(
        torch.allclose(a[0], b[0], atol=1e-12) for a, b in zip(model(columns), model(changed), strict=True)
    )  # fmt: skip
    whole = network()
    assert not torch.allclose(whole(columns)[0][0], whole(changed)[0][0], atol=1e-4)


def test_a_query_is_predicted_as_if_alone_and_changes_nothing():
    model, columns = network(), rows()
    together = model(columns, queries=4)
    alone = model([torch.cat([column[:5], column[7:8]]) for column in columns], queries=1)
    others = model([column[:5] for column in columns])
    for a, b, c in zip(together, alone, others, strict=True):
        assert torch.allclose(a[7], b[5], atol=1e-12) and torch.allclose(a[:5], c, atol=1e-12)


def test_a_batch_of_tables_is_each_table():
    model, first, second = network(), rows(seed=0), rows(seed=9)
    both = model([torch.stack(pair) for pair in zip(first, second, strict=True)])
    for out, a, b in zip(both, model(first), model(second), strict=True):
        assert torch.allclose(out, torch.stack([a, b]), atol=1e-12)


def test_patches_read_images():
    model = NonParametricTransformer([2] * 12 + [4], [12], embedding_dim=8, depth=2, heads=2, patches=3).eval()
    outputs = model([torch.rand(5, 2) for _ in range(12)] + [torch.rand(5, 4)])
    assert [tuple(out.shape) for out in outputs] == [(5, 1)] * 12 + [(5, 3)]
    own = NonParametricTransformer(
        [2] * 12 + [4], [12], embedding_dim=8, depth=2, heads=2, patches=3, shared_patches=False
    )
    assert len(own.embedding.embed) == 3
    with pytest.raises(ValueError, match="patches is 5"):
        NonParametricTransformer([2] * 12 + [4], [12], embedding_dim=8, depth=2, heads=2, patches=5)


# The table --------------------------------------------------------------------------------------------------------


def test_encoding_by_hand():
    x = np.array([[7.0, 1.0, 5.0], [3.0, 3.0, 5.0], [7.0, np.nan, 5.0]])
    encoder = TableEncoder(x, np.array([10.0, 14.0, np.nan]), [0])
    assert encoder.input_dims == [3, 2, 2, 2] and encoder.categorical == [0]
    new = np.array([[3.0, 4.0, 5.0], [9.0, np.nan, 6.0]])
    category, number, constant, target = encoder.encode(new, np.array([12.0, 16.0]))
    assert category.tolist() == [[1, 0, 0], [0, 0, 1]]  # 9 was never seen: as if missing
    assert number.tolist() == [[2, 0], [0, 1]]  # mean 2, deviation 1
    assert constant.tolist() == [[0, 0], [1, 0]]  # no deviation to divide by
    assert target.tolist() == [[0, 0], [2, 0]]
    assert encoder.encode(new, None)[-1].tolist() == [[0, 1], [0, 1]]


def test_masking_shares_and_candidates():
    columns = TableEncoder(
        np.random.default_rng(0).integers(0, 3, (4000, 2)).astype(float), np.zeros(4000), [0]
    ).encode(np.random.default_rng(0).integers(0, 3, (4000, 2)).astype(float), np.arange(4000) % 2.0)  # fmt: skip
    before = [column.clone() for column in columns]
    candidates = known_entries(columns)
    candidates[:1000] = False
    changed, mask = mask_entries(columns, candidates, 0.2, categorical=[0], random_share=0.3, generator=generator())
    assert not (mask & ~candidates).any() and 0.18 < mask[1000:].double().mean() < 0.22
    token = torch.stack([column[:, -1] == 1 for column in changed], 1)
    assert not (token & ~mask).any() and 0.66 < token[mask].double().mean() < 0.74
    for j, (column, old, new) in enumerate(zip(columns, before, changed, strict=True)):
        assert torch.equal(column, old) and torch.equal(new[~mask[:, j]], old[~mask[:, j]])
        assert (new[token[:, j], :-1] == 0).all()
    assert (changed[0].sum(1) == 1).all()  # a random category is one-hot
    random = changed[1][mask[:, 1] & ~token[:, 1], 0]
    assert abs(random.mean()) < 0.2 and 0.8 < random.std() < 1.2
    whole, mask = mask_entries(columns, candidates, 1.0)
    assert torch.equal(mask, candidates) and (whole[2][1000:, -1] == 1).all()


def test_loss_by_hand():
    outputs = [torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[2.0], [3.0]])]
    truth = [torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])]
    features = torch.tensor([[False, True], [False, True]])
    labels = torch.tensor([[True, False], [False, False]])
    loss = npt_loss(outputs, truth, features, labels, 0.25, categorical=[0])
    assert float(loss) == pytest.approx(0.25 * (1 + 9) / 2 + 0.75 * np.log(2))
    assert float(npt_loss(outputs, truth, features, torch.zeros_like(labels), 0.0, categorical=[0])) == 0


def test_schedules():
    assert cosine_tradeoff(3, 12, 0.8) == pytest.approx(0.8 * 0.5 * (np.cos(np.pi / 4) + 1))
    rate = flat_then_cosine(0.7)
    assert [rate(step, 100) for step in (0, 70, 85, 100)] == pytest.approx([1, 1, 0.5, 0], abs=1e-9)


def test_batches_keep_the_proportions_and_take_every_row_once():
    groups = np.repeat([0, 1, 2], [700, 200, 100])
    batches = list(stratified_batches(groups, 64, np.random.default_rng(0)))
    assert sorted(np.concatenate(batches)) == list(range(1000)) and max(map(len, batches)) <= 64
    for batch in batches:
        counts = np.bincount(groups[batch], minlength=3)
        assert np.abs(counts - np.array([0.7, 0.2, 0.1]) * len(batch)).max() <= 1.5


def test_lookahead_lamb_is_lamb_up_to_the_slow_step():
    def run(make, steps):
        p = torch.nn.Parameter(wave(0, (3, 4)))
        optimizer = make([p])
        for step in range(steps):
            p.grad = wave(step, (3, 4))
            optimizer.step()
        return p.detach()

    start, fast, slow = wave(0, (3, 4)), run(Lamb, 6), run(lookahead_lamb, 6)
    assert torch.equal(run(Lamb, 5), run(lookahead_lamb, 5))
    assert torch.allclose(slow, start + 0.5 * (fast - start))


# Nothing leaks ----------------------------------------------------------------------------------------------------


def regression(n=40, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3))
    return x, x @ np.array([1.0, -2.0, 0.5]) + 0.1 * rng.normal(size=n)


def test_labels_that_are_masked_or_held_out_do_not_reach_the_network():
    model = NPTRegressor(**SMALL).fit(*regression())
    columns = [column.float() for column in model.context_]
    modes = torch.where(torch.arange(40) < 30, TRAIN, VALIDATION)
    inputs, _, labels = model._masked(columns, known_entries(columns), modes, generator(5))
    hidden = labels[:, -1] | (modes == VALIDATION)
    assert 5 < labels[:, -1].sum() < 25 and not labels[modes == VALIDATION].any()
    other = [*columns[:-1], columns[-1] + hidden[:, None] * torch.tensor([3.0, 0.0])]
    again, _, _ = model._masked(other, known_entries(other), modes, generator(5))
    assert all(torch.equal(a, b) for a, b in zip(inputs, again, strict=True))
    assert (inputs[-1][modes == VALIDATION] == torch.tensor([0.0, 1.0])).all()


def test_labels_of_validation_rows_change_no_weight():
    x, y = regression()
    model = NPTRegressor(**SMALL, evaluate_every=100).fit(x, y)
    held_out = model.validation_rows_
    assert len(held_out) == 8
    y[held_out] += 100
    again = NPTRegressor(**SMALL, evaluate_every=100).fit(x, y)
    assert all(
        torch.equal(a, b) for a, b in zip(*(m.network_.state_dict().values() for m in (model, again)), strict=True)
    )
    assert again.validation_loss_ > model.validation_loss_ and model.encoder_.mean[-1] == again.encoder_.mean[-1]
    y[np.setdiff1d(np.arange(40), held_out)[0]] += 100  # a training label does
    other = NPTRegressor(**SMALL, evaluate_every=100).fit(x, y)
    assert not torch.equal(*(m.network_.blocks[0].mix.weight for m in (again, other)))


def test_labels_of_predicted_rows_change_no_prediction():
    x, y = regression()
    model = NPTRegressor(**SMALL).fit(x, y)
    context = [column[:30] for column in model.context_]
    queries = [column[30:] for column in model.context_]
    flipped = [*queries[:-1], -queries[-1]]
    (a, _), (b, _) = next(model._predicted(context, queries)), next(model._predicted(context, flipped))
    assert torch.equal(a, b)


@pytest.mark.parametrize("label_mask", [0.5, 1.0])
def test_labels_of_training_rows_are_seen_unless_always_masked(label_mask):
    x, y = regression()
    model = NPTRegressor(**SMALL | {"steps": 30}, label_mask=label_mask).fit(x, y)
    before = model.predict(x[:5] + 0.1)
    model.context_[-1][:, 0] *= -1
    assert np.allclose(before, model.predict(x[:5] + 0.1), atol=1e-12) == (label_mask == 1.0)


def test_predicted_rows_see_each_other_only_when_transductive():
    x, y = regression()
    for transductive in (False, True):
        model = NPTRegressor(**SMALL | {"steps": 30}, transductive=transductive).fit(x[:30], y[:30])
        same = np.allclose(model.predict(x[30:])[:4], model.predict(x[30:34]), atol=1e-12)
        assert same != transductive


def test_unlabelled_rows_are_seen_and_bring_no_label():
    x, y = regression()
    model = NPTRegressor(**SMALL).fit(x[:30], y[:30], X_unlabelled=x[30:])
    plain = NPTRegressor(**SMALL).fit(x[:30], y[:30])
    assert len(model.context_[0]) == len(plain.context_[0]) == 30
    assert model.encoder_.mean[-1] == plain.encoder_.mean[-1] and model.encoder_.mean[0] != plain.encoder_.mean[0]
    assert not np.allclose(model.predict(x), plain.predict(x))


# The estimators ---------------------------------------------------------------------------------------------------


def test_categories_missing_values_and_batches():
    rng = np.random.default_rng(0)
    x = np.column_stack([rng.choice([3.0, 5.0, 8.0, 9.0], 240), rng.normal(size=240)])
    y = np.where(np.isin(x[:, 0], (3.0, 9.0)), "in", "out")
    x[::9, 1] = np.nan
    model = NPTClassifier(
        embedding_dim=16, depth=2, heads=2, steps=200, learning_rate=5e-3, batch_size=64, stratify_classes=True,
        categorical_features=[0], label_mask=0.5, random_state=0,
    ).fit(x[:160], y[:160])  # fmt: skip
    assert model.score(x[160:], y[160:]) > 0.95
    assert np.isfinite(model.predict_proba([[4.0, np.nan]])).all()  # a category that was never there
    whole, after = row_corruption_test(model, x[160:], y[160:], repeats=2, random_state=0)
    assert whole > 0 and np.isfinite(after)


def test_row_corruption_leaves_a_row_wise_network_alone_and_others_not():
    x, y = load_iris(return_X_y=True)
    for between in (False, True):
        model = NPTClassifier(**SMALL | {"steps": 40}, between_datapoints=between).fit(x[::2], y[::2])
        whole, after = row_corruption_test(model, x[1::2], y[1::2], repeats=2, random_state=0)
        assert (whole == pytest.approx(after, abs=1e-12)) != between


def test_same_seed_same_model_and_pickle(tmp_path):
    import pickle

    x, y = load_iris(return_X_y=True)
    model, again = (NPTClassifier(**SMALL).fit(x, y) for _ in range(2))
    assert np.array_equal(model.predict_proba(x), again.predict_proba(x))
    assert np.array_equal(pickle.loads(pickle.dumps(model)).predict_proba(x), model.predict_proba(x))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"label_mask": 0}, "label_mask"),
        ({"feature_mask": 1.5}, "feature_mask"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"batch_size": 1}, "batch_size"),
        ({"steps": 0}, "steps"),
        ({"clip": 0}, "clip"),
        ({"depth": 3}, "depth"),
        ({"heads": 3}, "embedding_dim"),
        ({"scale": "none"}, "scale"),
        ({"categorical_features": [4]}, "categorical_features"),
        ({"embedding_dim": 4096}, "parameters"),
    ],
)
def test_wrong_arguments(options, said):
    with pytest.raises(ValueError, match=said):
        NPTClassifier(**SMALL | options).fit(*load_iris(return_X_y=True))


def test_wrong_calls():
    model, columns = network(), rows()
    with pytest.raises(ValueError, match="wide"):
        model(columns[::-1])
    with pytest.raises(ValueError, match="queries"):
        model(columns, queries=10)
    fitted = NPTClassifier(**SMALL, transductive=True).fit(*load_iris(return_X_y=True))
    with pytest.raises(ValueError, match="transductive"):
        row_corruption_test(fitted, *load_iris(return_X_y=True))


# The claims -------------------------------------------------------------------------------------------------------


def test_the_users_tables(tmp_path, monkeypatch):
    small = replace(
        claims.SIZES["real"], rows=60, steps=3, embedding_dim=4, depth=2, heads=2, batch_size=32, budget=1, iterations=5,
        libraries=("scikit-learn",), rates=(1e-3, 1e-2),
    )  # fmt: skip
    monkeypatch.setitem(claims.SIZES, "real", small)
    rng = np.random.default_rng(0)
    rows = [f"{rng.choice(['a', 'b', '?'])},{rng.normal():.3f},{rng.choice(['yes', 'no'])}" for _ in range(80)]
    rows[3] = "a,0.1,perhaps"  # one row of a class is left out
    (tmp_path / "first.csv").write_text("colour,size,label\n" + "\n".join(rows))
    (tmp_path / "second.csv").write_text("a,b\n" + "\n".join(f"{v:.3f},{2 * v:.3f}" for v in rng.normal(size=90)))
    trial = Trial(1000, "real", data_path=tmp_path)
    values = claims.on_par_with_boosting(trial)
    assert set(trial.used_data) == {"first", "second"} and np.isfinite(list(values.values())).all()
    assert {"accuracy_npt_first", "explained_trees_scikit_learn_second"} <= values.keys()
    assert np.isfinite(claims.other_rows_matter(trial)["explained_lost"])
    with pytest.raises(ValueError, match="--data"):
        claims.on_par_with_boosting(Trial(1000, "real"))


def test_the_look_up_can_only_be_solved_by_looking():
    x, y = claims._look_up(claims.SIZES["laptop"], generator(), torch.device("cpu"))

    def looks(columns):
        n = columns[0].shape[1] // 2
        return [torch.cat([column[:, :n, :1], column[:, :n, :1]], 1) for column in columns]

    assert torch.equal(claims._copies(looks, x, y), y)
    hidden = []
    claims._copies(lambda columns: hidden.append(columns) or looks(columns), x, y)
    assert (hidden[0][-1][:, y.shape[1] :, 0] == 0).all() and (hidden[0][-1][:, y.shape[1] :, 1] == 1).all()
