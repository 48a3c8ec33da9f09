"""Which labels are kept, against the official script's rule written out, and the batches of both kinds."""

import numpy as np
import pytest
import torch

from saigen.data.semi_supervised import split_labels, with_labelled


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("counts", [(50, 50, 50), (60, 25, 5), (7, 100, 31, 2)])
@pytest.mark.parametrize("labels", [4, 11, 30])
def test_labels_are_spread_as_the_official_script_spreads_them(counts, labels):
    y = rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    share, expected = np.array(counts) / max(counts), np.zeros(len(counts))
    for _ in range(labels):
        expected[np.argmax(share - expected / max(expected.max(), 1))] += 1
    assert (expected > 0).all()
    kept, rest = split_labels(y, labels, rng())
    assert np.bincount(y[kept], minlength=len(counts)).tolist() == expected.tolist()
    assert sorted([*kept, *rest]) == list(range(len(y)))


def test_equal_classes_have_equally_many_and_the_seed_decides_which():
    y = torch.arange(10).repeat(30)
    kept, _ = split_labels(y, 40, rng(0))
    assert np.bincount(y[kept]).tolist() == [4] * 10
    again, other = (split_labels(y, 40, rng(seed))[0] for seed in (0, 1))
    assert kept.tolist() == again.tolist() != other.tolist()


def test_wrong_labels_are_named():
    for y, labels, name in (
        ([0, 1, 0, 1], 1, "labels is 1"),
        ([0, 1, 0, 1], 4, "labels is 4"),
        ([0, 2, 0, 2], 2, "class 1 has no sample"),
        ([0, -1], 1, "y holds -1"),
        ([0.0, 1.0], 1, "y is float64"),
    ):
        with pytest.raises(ValueError, match=name):
            split_labels(y, labels, rng())


def noisy(generator, x, y):
    return x + torch.rand(x.shape, generator=generator), y


def test_batches_hold_each_label_as_often_and_independent_views():
    x, y = torch.arange(6.0)[:, None] * 10, torch.arange(6)
    transform = with_labelled(x, y, noisy, views=3)
    u = torch.arange(15.0)[:, None] * 100
    labelled, labels, views = transform(torch.Generator().manual_seed(0), u)
    assert labelled.shape == (15, 1) and views.shape == (15, 3, 1)
    counts = labels.bincount()
    assert counts.max() - counts.min() == 1 and counts.sum() == 15
    assert torch.equal((labelled[:, 0] / 10).floor().long(), labels)
    assert torch.equal((views / 100).floor()[:, :, 0], torch.arange(15.0)[:, None].expand(15, 3))
    assert len(views.flatten().unique()) == 45
    again = transform(torch.Generator().manual_seed(0), u)
    assert all(torch.equal(a, b) for a, b in zip(again, (labelled, labels, views), strict=True))


def test_wrong_batches_are_named():
    x, y = torch.zeros(3, 1), torch.arange(3)
    for call, name in (
        (lambda: with_labelled(x, y[:2], noisy), "x has 3 and y 2"),
        (lambda: with_labelled(x[:0], y[:0], noisy), "x has 0"),
        (lambda: with_labelled(x, y, noisy, views=0), "views is 0"),
    ):
        with pytest.raises(ValueError, match=name):
            call()
