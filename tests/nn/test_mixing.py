"""Mixup and CutMix: the distribution of the weights, and every pixel and label against formulas written out."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from saigen.nn.mixing import CutMix, Mixup, mix, mixing_weights, soft_labels


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("alpha", [0.3, 0.75, 1.0, 4.0])
def test_weights_follow_the_beta_distribution(alpha):
    weights = mixing_weights(20_000, alpha, generator=seeded())
    assert stats.kstest(weights.numpy(), stats.beta(alpha, alpha).cdf).pvalue > 0.001
    dominant = mixing_weights(20_000, alpha, dominant=True, generator=seeded())
    assert torch.equal(dominant, torch.maximum(weights, 1 - weights))


def test_small_alpha_gives_zeros_and_ones_and_no_nan():
    for alpha in (0.0, 1e-5):
        weights = mixing_weights(2_000, alpha, generator=seeded())
        assert weights.isfinite().all() and ((weights < 1e-6) | (weights > 1 - 1e-6)).float().mean() > 0.99
        assert abs(weights.mean().item() - 0.5) < 0.05


def test_mean_of_the_dominant_weight():
    assert mixing_weights(200_000, 1.0, dominant=True, generator=seeded()).mean().item() == pytest.approx(
        0.75, abs=2e-3
    )
    assert mixing_weights(200_000, 0.75, dominant=True, generator=seeded()).mean().item() == pytest.approx(
        0.7782, abs=2e-3
    )


@pytest.mark.parametrize("per_sample", [False, True])
def test_mixup_equals_the_formula_written_out(per_sample):
    x, y = torch.rand(6, 2, 3, 3, generator=seeded(1)), torch.tensor([0, 3, 1, 2, 2, 0])
    mixed, labels = Mixup(0.4, num_classes=4, per_sample=per_sample)(x, y, generator=seeded(5))
    generator = seeded(5)
    weights = mixing_weights(6 if per_sample else 1, 0.4, generator=generator).numpy()
    partner = torch.randperm(6, generator=generator).numpy()
    for i in range(6):
        share, j = weights[i if per_sample else 0], partner[i]
        np.testing.assert_allclose(mixed[i], share * x[i].numpy() + (1 - share) * x[j].numpy(), atol=1e-6)
        expected = np.zeros(4)
        expected[y[i]] += share
        expected[y[j]] += 1 - share
        np.testing.assert_allclose(labels[i], expected, atol=1e-6)


def test_loss_of_soft_labels_is_the_mixed_loss():
    """lam CE(., y_i) + (1 - lam) CE(., y_j), the form of the published code."""
    logits, y, partner = torch.randn(5, 3, generator=seeded(2)), torch.tensor([0, 1, 2, 1, 0]), torch.arange(4, -1, -1)
    soft = soft_labels(y, 3)
    both = 0.3 * F.cross_entropy(logits, y) + 0.7 * F.cross_entropy(logits, y[partner])
    torch.testing.assert_close(F.cross_entropy(logits, mix(soft, 0.3, soft, partner)), both)
    assert torch.equal(mix(soft, 1.0, soft, partner), soft)


def test_cutmix_takes_a_box_and_its_area():
    x = torch.arange(8).float().view(8, 1, 1, 1).expand(8, 3, 10, 12)
    y = torch.arange(8)
    areas = []
    for seed in range(40):
        mixed, labels = CutMix(1.0, num_classes=8)(x, y, generator=seeded(seed))
        foreign = mixed != x
        own = labels[torch.arange(8), y]
        for i in range(8):
            assert torch.equal(foreign[i, 0], foreign[i, 1])
            if foreign[i].any():
                rows, columns = foreign[i, 0].any(1).nonzero(), foreign[i, 0].any(0).nonzero()
                box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
                assert int(box) == int(foreign[i, 0].sum())
                assert own[i].item() == pytest.approx(1 - int(box) / 120, abs=1e-6)
                other = int(mixed[i][foreign[i]][0])
                assert labels[i, other].item() == pytest.approx(int(box) / 120, abs=1e-6)
        torch.testing.assert_close(labels.sum(1), torch.ones(8))
        areas.append(own.min().item())
    assert min(areas) < 0.5 and max(areas) > 0.8


def test_eval_mode_and_alpha_zero_leave_the_images():
    x, y = torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 1, 0])
    for module in (Mixup(1.0, 2).eval(), Mixup(0.0, 2), CutMix(1.0, 2).eval(), CutMix(0.0, 2)):
        mixed, labels = module(x, y)
        assert torch.equal(mixed, x) and torch.equal(labels, F.one_hot(y, 2).float())
        assert torch.equal(module(x, labels)[1], labels)


def test_mix_has_the_gradients_of_the_formula():
    x, others = torch.randn(3, 2, dtype=torch.double), torch.randn(4, 2, dtype=torch.double)
    weights, order = torch.rand(3, dtype=torch.double), torch.tensor([3, 0, 0])
    x.requires_grad_()
    others.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: mix(a, weights, b, order), (x, others))
    assert torch.autograd.gradcheck(lambda a, b: mix(a, 0.3, b, order), (x, others))
    expected = weights[:, None] * x + (1 - weights[:, None]) * others[order]
    torch.testing.assert_close(mix(x, weights, others, order), expected)


def test_wrong_arguments_are_named():
    x, levels = torch.rand(2, 1, 2, 2), torch.zeros(2, dtype=torch.uint8)
    for call, name in (
        (lambda: mixing_weights(2, -1.0), "alpha is -1"),
        (lambda: Mixup(-0.5, 3), "alpha is -0.5"),
        (lambda: CutMix(1.0, 0), "num_classes is 0"),
        (lambda: Mixup(1.0, 3)(x, torch.tensor([0, 3])), "y holds 0 to 3"),
        (lambda: Mixup(1.0, 3)(x, torch.tensor([-1, 2])), "y holds -1 to 2"),
        (lambda: Mixup(1.0, 3)(x, torch.rand(2, 4)), "shape"),
        (lambda: mix(levels, 0.5, levels, torch.arange(2)), "x is torch.uint8"),
    ):
        with pytest.raises(ValueError, match=name):
            call()
