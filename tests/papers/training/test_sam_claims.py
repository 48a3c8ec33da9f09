"""What the experiments of sam are made of: the same start for both arms, corruptions, crops."""

import dataclasses

import torch

from saigen.papers.training.sam import claims
from saigen.trial import Trial


def test_both_arms_share_start_split_and_order(monkeypatch):
    size = dataclasses.replace(claims.SIZES["tiny"], steps=3)
    trial = Trial(seed=1000, scale="tiny")
    sets = claims._sets(trial, size)
    starts, batches = [], []
    original = claims.fit

    def watching(model, loss, data, **options):
        starts.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))

        def seen(model, x, y):
            batches.append(y.tolist())
            return loss(model, x, y)

        return original(model, seen, data, **options)

    monkeypatch.setattr(claims, "fit", watching)
    arms = dict(claims._both(trial, size, sets, "mixer"))
    assert list(arms) == ["mixer_plain", "mixer_sam"]
    assert torch.equal(starts[0], starts[1])
    assert batches[3::2] == batches[4::2] == batches[:3]  # each batch twice with SAM, once without
    again = dict(claims._both(trial, size, sets, "mixer"))
    for arm in arms:
        assert all(torch.equal(p, q) for p, q in zip(arms[arm].parameters(), again[arm].parameters(), strict=True))


def test_train_and_test_images_are_disjoint_and_drawn_anew_for_each_seed():
    size = claims.SIZES["laptop"]
    sets = [claims._sets(Trial(seed=seed, scale="laptop"), size) for seed in (1000, 1001)]
    assert len(sets[0].train[1]) == size.train and len(sets[0].train[1]) + len(sets[0].test[1]) == 1797
    assert not torch.equal(sets[0].train[0], sets[1].train[0])
    train = {image.numpy().tobytes() for image in sets[0].train[0]}
    test = [image.numpy().tobytes() for image in sets[0].test[0]]
    assert sum(image in train for image in test) <= 5  # digits itself holds a few equal images


def test_corruptions_keep_shape_and_brightness():
    x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy, blurred, flat = claims._corrupted(x, 0.1, torch.Generator().manual_seed(1))
    for corrupted in (noisy, blurred, flat):
        assert corrupted.shape == x.shape and (corrupted - x).abs().max() > 0.05
        torch.testing.assert_close(corrupted.mean(), x.mean(), atol=0.02, rtol=0)
    torch.testing.assert_close(flat.std(dim=(1, 2, 3)), 0.4 * x.std(dim=(1, 2, 3)))


def test_inception_crops():
    crop = claims._inception_crop(0.3)
    ramp = torch.linspace(0, 1, 16).expand(64, 1, 16, 16).clone()  # grey grows from left to right
    x, y = crop(torch.Generator().manual_seed(0), ramp, torch.arange(64))
    assert x.shape == ramp.shape and torch.equal(y, torch.arange(64))
    left, right = x[:, 0, 8, 0], x[:, 0, 8, -1]
    flipped = left > right
    assert 16 < flipped.sum() < 48
    width = (right - left).abs()  # the share of the width that was kept
    assert width.min() > 0.3 and width.max() <= 1.0 and width.std() > 0.05
    again, _ = crop(torch.Generator().manual_seed(0), (ramp * 255).to(torch.uint8), y)
    torch.testing.assert_close(again, x, atol=0.01, rtol=0)
