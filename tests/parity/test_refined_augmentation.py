"""Refined data augmentation beside timm's recipe that turns mixup off late, and torchvision's CutMix."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from saigen.nn.mixing import CutMix, mix, mixing_weights, soft_labels
from saigen.papers.augmentation.refined_augmentation import RefinedAugmentation, Refinement
from tests.peers import need, need_module

pytestmark = pytest.mark.peers


def images(seed, n=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 8, 8, generator=generator), torch.randint(5, (n,), generator=generator)


class MixupOfTimm:
    """timm's mixup as a first stage; its targets go to the CPU."""

    def __init__(self, timm):
        self.mixup = timm.Mixup(mixup_alpha=0.8, label_smoothing=0.0, num_classes=5)
        self.target = timm.mixup.mixup_target

    def __call__(self, x, y, generator=None):
        x = x.clone()
        share = self.mixup._mix_batch(x)
        return x, self.target(y, 5, share)


def test_mixup_equals_timm():
    need("timm")
    timm = need_module("timm.data")
    backwards = torch.arange(7, -1, -1)
    for seed in range(6):
        x, y = images(seed)
        np.random.seed(seed)
        theirs, labels = MixupOfTimm(timm)(x, y)
        np.random.seed(seed)
        np.random.rand()  # whether to mix at all
        share = float(np.random.beta(0.8, 0.8))
        torch.testing.assert_close(mix(x, share, x, backwards), theirs)
        soft = soft_labels(y, 5)
        torch.testing.assert_close(mix(soft, share, soft, backwards), labels)


def test_the_two_stages_equal_timms_training_with_mixup_off_at_the_end():
    """Its --mixup-off-epoch leaves the learning rate alone: lr_scale=None. Weights after 24 steps, the last 9 without."""
    need("timm")
    timm = need_module("timm.data")
    start = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in (ours, theirs)]
    schedulers = [CosineAnnealingLR(optimizer, 24) for optimizer in optimizers]

    np.random.seed(0)
    augment = RefinedAugmentation(MixupOfTimm(timm))
    refinement = Refinement(
        optimizers[0], steps=24, refine_steps=9, augment=augment, scheduler=schedulers[0], lr_scale=None
    )
    for step in range(24):
        x, y = augment(*images(step))
        optimizers[0].zero_grad()
        F.cross_entropy(ours(x), y).backward()
        optimizers[0].step()
        refinement.step()

    np.random.seed(0)
    peer = MixupOfTimm(timm)
    for step in range(24):
        peer.mixup.mixup_enabled = step < 15
        x, y = peer(*images(step))
        optimizers[1].zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        optimizers[1].step()
        schedulers[1].step()
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_cutmix_has_the_box_of_torchvision(monkeypatch):
    """The same share, centre and partner give the same pixels and labels."""
    need("torchvision")
    v2 = need_module("torchvision.transforms.v2")
    x, y = images(0)
    for seed in range(20):
        ours, labels = CutMix(1.0, 5)(x, y, generator=torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(seed)
        share = mixing_weights(1, 1.0, generator=generator).item()
        row, column = (int(torch.randint(8, (), generator=generator)) for _ in range(2))
        partner = torch.randperm(8, generator=generator)
        transform = v2.CutMix(alpha=1.0, num_classes=5)
        # Its draws are replaced by ours; it rolls the batch by one where we permute it.
        monkeypatch.setattr(
            transform, "_dist", type("Fixed", (), {"sample": lambda self, shape, share=share: torch.tensor(share)})()
        )
        centres = iter([torch.tensor([column]), torch.tensor([row])])
        monkeypatch.setattr(torch, "randint", lambda *args, centres=centres, **kwargs: next(centres))
        params = transform.make_params([x])
        monkeypatch.undo()
        x1, y1, x2, y2 = params["box"]
        half = 0.5 * (1 - share) ** 0.5 * 8
        if int(half) != int(2 * half) // 2:
            continue  # an odd side, rounded once here and twice there
        expected = x.clone()
        expected[..., y1:y2, x1:x2] = x[partner][..., y1:y2, x1:x2]
        assert torch.equal(ours, expected)
        soft = soft_labels(y, 5)
        torch.testing.assert_close(labels, mix(soft, float(params["lam_adjusted"]), soft, partner))
