"""What the experiments of radam are made of: shared starts and orders, the two networks, frozen steps."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from saigen.papers.training.radam import claims
from saigen.trial import Trial


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for label in ("a", "b"):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return tmp_path


def test_arms_share_start_and_order(monkeypatch):
    monkeypatch.setitem(claims.SIZES, "laptop", dataclasses.replace(claims.SIZES["laptop"], steps=3, depth=1, width=8))
    trial = Trial(seed=1000, scale="laptop")
    sets = claims._sets(trial)
    assert [len(part[1]) for part in (sets.train, sets.held_out, sets.test)] == [1000, 297, 500]
    losses = {
        name: claims._train(trial, sets, arm, 1e-2, **options)[1].losses
        for name, arm, options in (
            ("adam", "adam", {}),
            ("radam", "radam", {}),
            ("warm-up", "adam", {"warmup": 5}),
            ("frozen", "adam", {"freeze_steps": 2}),
        )
    }
    assert len({found[0] for found in losses.values()}) == 1  # one start, one first batch
    assert losses["adam"][1] != losses["radam"][1] != losses["warm-up"][2]
    assert len(losses["frozen"]) == 5 and losses["adam"][1:] != losses["frozen"][1:3]


def test_layer_norm_stands_after_each_sum():
    model = claims.RowTransformer(depth=2, width=8, classes=10)
    assert not any(layer.norm_first for layer in model.layers)
    first, second = (layer.linear1.weight for layer in model.layers)
    assert not torch.equal(first, second)  # each layer has a start of its own


@pytest.mark.parametrize(
    "claim",
    ["rectified_adam_needs_no_warmup", "rectified_adam_equals_tuned_warmup", "adam_needs_more_samples_not_warmup"],
)
def test_runs_with_images(images, monkeypatch, claim):
    small = {"rates": (1e-3,), "warmups": (1, 2), "steps": 2, "batch": 8, "train": 16, "held_out": 8}
    monkeypatch.setitem(claims.SIZES, "real", dataclasses.replace(claims.SIZES["real"], **small, beta2=0.5, depth=1))
    values = getattr(claims, claim)(Trial(seed=1000, scale="real", data_path=images))
    assert all(np.isfinite(value) for value in values.values())
