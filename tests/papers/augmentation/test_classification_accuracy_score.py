"""Classification Accuracy Score: counted by hand, identities of the scores, causality of the subjects, wrong input."""

import re

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import entropy, spearmanr
from torch.nn import functional as F

from saigen.papers.augmentation.classification_accuracy_score import (
    VQVAE,
    Discriminator,
    Generator,
    PixelCNN,
    VQVAESampler,
    cas_resnet56,
    claims,
    classification_accuracy_score,
    discriminator_loss,
    draw_labels,
    feature_moments,
    frechet_distance,
    inception_score,
    naive_augmentation_score,
    rank_correlation,
    relative_drop,
    sample_set,
    score_classifier,
)
from saigen.trial import Trial


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def real():
    """Three clouds in the plane."""
    y = torch.arange(300) % 3
    centres = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0]])
    return torch.randn(300, 2, generator=generator()) + centres[y], y


def nearest_mean(x, y):
    means = torch.stack([x[y == k].mean(dim=0) for k in range(3)])
    return lambda images: -torch.cdist(images, means)


# The score ----------------------------------------------------------------------------------------------------------


def test_scores_equal_counting():
    g = generator(1)
    logits, y = torch.randn(200, 8, generator=g), torch.randint(0, 7, (200,), generator=g)
    score = score_classifier(lambda x: logits[x[:, 0].long()], torch.arange(200.0)[:, None], y, batch_size=33)
    right = {k: [] for k in range(8)}
    top5 = 0
    for row, label in zip(logits.tolist(), y.tolist(), strict=True):
        order = sorted(range(8), key=lambda k: -row[k])
        right[label].append(order[0] == label)
        top5 += label in order[:5]
    assert score.top1 == pytest.approx(sum(map(sum, right.values())) / 200) and score.top5 == pytest.approx(top5 / 200)
    for k in range(7):
        assert score.per_class[k] == pytest.approx(np.mean(right[k]))
    assert np.isnan(score.per_class[7])  # a class without an example


def test_logits_that_are_not_finite_are_wrong():
    logits = torch.tensor([[9.0, 0.0], [float("nan"), 0.0], [float("inf"), 0.0]])
    score = score_classifier(lambda x: logits[: len(x)], torch.zeros(3, 1), torch.zeros(3, dtype=torch.long))
    assert score.top1 == pytest.approx(1 / 3) and score.top5 == pytest.approx(1 / 3)


def test_a_copy_scores_like_real_data_and_no_condition_like_chance(real):
    x, y = real

    def copy(labels, g):
        return torch.stack([x[y == k][torch.randint(100, (), generator=g)] for k in labels])

    def unconditional(labels, g):
        return x[torch.randint(len(x), (len(labels),), generator=g)]

    of_real = score_classifier(nearest_mean(x, y), x, y)
    of_copy = classification_accuracy_score(nearest_mean, copy, y, (x, y), generator=generator())
    assert of_real.top1 > 0.98 and abs(of_copy.top1 - of_real.top1) < 0.01
    chance = [
        classification_accuracy_score(nearest_mean, unconditional, y, (x, y), generator=generator(s)).top1 for s in range(30)
    ]  # fmt: skip
    assert 0.15 < np.mean(chance) < 0.5


def test_a_lost_class_is_found_and_bounds_the_score(real):
    x, y = real

    def without_two(labels, g):
        at = torch.where(labels == 2, 0, labels)
        return torch.stack([x[y == k][torch.randint(100, (), generator=g)] for k in at])

    score = classification_accuracy_score(nearest_mean, without_two, y, (x, y), generator=generator())
    of_real = score_classifier(nearest_mean(x, y), x, y)
    assert score.worst_classes(of_real)[0] in (0, 2) and score.top1 < of_real.top1 - 0.1
    assert score.relative_drop(of_real) == pytest.approx((of_real.top1 - score.top1) / of_real.top1)


def test_labels_are_the_real_ones_in_another_order():
    y = torch.tensor([0] * 70 + [1] * 30)
    drawn = draw_labels(y, generator=generator())
    assert drawn.sort().values.equal(y) and not drawn.equal(y)
    many = draw_labels(y, 20_000, generator=generator())
    assert many.float().mean().item() == pytest.approx(0.3, abs=0.02)


def test_samples_do_not_depend_on_how_they_are_batched():
    labels = torch.arange(20) % 4
    whole, parts = (
        sample_set(lambda y, g: y[:, None].float(), labels, generator=generator(), batch_size=b) for b in (20, 3)
    )
    assert whole.equal(parts) and whole[:, 0].long().equal(labels)


def test_augmentation_adds_its_share_and_keeps_the_real_data(real):
    x, _ = real
    seen = []

    def train(images, labels):
        seen.append((len(images), images[: len(x)].equal(x)))
        return nearest_mean(images, labels)

    scores = naive_augmentation_score(
        train, real, lambda labels, g: torch.zeros(len(labels), 2), [0.0, 0.5, 2.0], real, generator=generator()
    )
    assert seen == [(300, True), (450, True), (900, True)] and list(scores) == [0.0, 0.5, 2.0]
    assert scores[0.0].top1 >= scores[2.0].top1


# Frechet distance, Inception Score ----------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 5, 30])
def test_distances_equal_scipys(d):
    rng = np.random.default_rng(d)
    one, two = (feature_moments(rng.normal(size=(200, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)) for _ in "ab")
    (m1, C1), (m2, C2) = one, two
    expected = ((m1 - m2) ** 2).sum() + np.trace(C1 + C2 - 2 * sqrtm(C1 @ C2).real)
    assert frechet_distance(*one, *two) == pytest.approx(expected, rel=1e-6)
    P = rng.dirichlet(np.ones(7), 60)
    by_hand = [np.exp(np.mean([entropy(p, part.mean(axis=0)) for p in part])) for part in np.array_split(P, 4)]
    assert inception_score(P, splits=4) == pytest.approx(np.mean(by_hand))


def test_distance_is_zero_for_the_same_moments_and_survives_singular_ones():
    rng = np.random.default_rng(0)
    m, C = feature_moments(rng.normal(size=(40, 6)))
    assert frechet_distance(m, C, m, C) == pytest.approx(0, abs=1e-9)
    # Fewer examples than features: the covariance is singular.
    few, more = feature_moments(rng.normal(size=(4, 20))), feature_moments(rng.normal(size=(5, 20)))
    assert np.isfinite(frechet_distance(*few, *more)) and frechet_distance(*few, *few) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(*few, *more) == pytest.approx(frechet_distance(*more, *few), rel=1e-6)
    # Diagonal: the sum over the axes of (difference of means)^2 + (difference of deviations)^2.
    found = frechet_distance([0, 1], np.diag([4.0, 9.0]), [1, 1], np.diag([1.0, 25.0]))
    assert found == pytest.approx(1 + 1 + 4)


def test_moment_matched_modes_are_invisible_to_the_distance():
    # Two modes, and a Gaussian between them with the same mean and covariance.
    x = np.array([[-1.0], [1.0]] * 500)
    rng = np.random.default_rng(0)
    z = rng.normal(size=(1000, 1))
    z = (z - z.mean()) / z.std(ddof=1) * x.std(ddof=1)
    assert frechet_distance(*feature_moments(x), *feature_moments(z)) == pytest.approx(0, abs=1e-9)


def test_correlation_is_spearmans_of_the_negative_distance():
    rng = np.random.default_rng(0)
    names = "abcdef"
    cas, distance = (dict(zip(names, rng.random(6), strict=True)) for _ in range(2))
    expected = spearmanr(list(cas.values()), [-value for value in distance.values()]).statistic
    assert rank_correlation(cas, dict(reversed(distance.items()))) == pytest.approx(expected)


# Subjects -----------------------------------------------------------------------------------------------------------


def test_each_cell_sees_only_what_comes_before():
    torch.manual_seed(0)
    model = PixelCNN(3, 5, 6, width=8, depth=3).eval()
    grid, y = torch.randint(0, 5, (1, 6, 6)), torch.tensor([1])
    before = model(grid, y)
    for cell in (0, 7, 20, 35):
        changed = grid.clone()
        changed.view(-1)[cell] = (changed.view(-1)[cell] + 1) % 5
        different = (model(changed, y) - before).abs().amax(dim=(0, 1)).view(-1) > 1e-7
        assert not different[: cell + 1].any() and (different[cell + 1 :].any() or cell == 35)
    # The first rows alone give the same: what sampling relies on.
    torch.testing.assert_close(model(grid[:, :3], y), before[:, :, :3])


def test_likelihood_sums_to_one():
    torch.manual_seed(0)
    model = PixelCNN(2, 2, 2, width=4, depth=1).eval()
    grids = torch.cartesian_prod(*[torch.arange(2)] * 4).view(-1, 2, 2)
    log_p = model(grids, torch.ones(16, dtype=torch.long)).log_softmax(dim=1).gather(1, grids[:, None])
    assert log_p.sum(dim=(1, 2, 3)).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_samples_follow_the_model():
    torch.manual_seed(0)
    model = PixelCNN(2, 2, 2, width=4, depth=1).eval()
    with torch.no_grad():
        model.head[-1].weight.mul_(8)
    grids = torch.cartesian_prod(*[torch.arange(2)] * 4).view(-1, 2, 2)
    y = torch.zeros(16, dtype=torch.long)
    p = model(grids, y).log_softmax(dim=1).gather(1, grids[:, None]).sum(dim=(1, 2, 3)).exp()
    drawn = model.sample_grid(torch.zeros(20_000, dtype=torch.long), generator()).flatten(1) @ torch.tensor(
        [8, 4, 2, 1]
    )
    shares = torch.bincount(drawn, minlength=16) / 20_000
    torch.testing.assert_close(shares, p.detach(), atol=0.012, rtol=0)


def test_levels_go_there_and_back():
    model = PixelCNN(2, 17, 8, width=4, depth=1)
    grid = torch.randint(0, 17, (3, 8, 8), generator=generator())
    assert model.to_grid(grid[:, None].float() / 16).equal(grid)


def test_codes_are_the_nearest_and_gradients_pass_straight_through():
    torch.manual_seed(0)
    model = VQVAE(1, 8, 6, 4)
    z = torch.randn(2, 4, 3, 3)
    expected = (z.permute(0, 2, 3, 1)[..., None, :] - model.codebook).square().sum(-1).argmin(-1)
    assert model.nearest(z).equal(expected)
    model.eval()
    x = torch.rand(2, 1, 8, 8)
    codebook = model.codebook.clone()
    reconstruction, codes, _ = model(x)
    torch.testing.assert_close(reconstruction, model.decode(codes), atol=1e-6, rtol=1e-5)
    reconstruction.square().mean().backward()
    assert model.encoder[0].weight.grad.abs().sum() > 0 and model.codebook.equal(codebook)


def test_codebook_moves_to_the_means_of_its_vectors():
    torch.manual_seed(0)
    model = VQVAE(1, 8, 2, 2, decay=0.0)
    vectors, codes = torch.tensor([[1.0, 1.0], [3.0, 3.0], [-1.0, 0.0]]), torch.tensor([0, 0, 1])
    model._move(vectors, codes)
    torch.testing.assert_close(model.codebook, torch.tensor([[2.0, 2.0], [-1.0, 0.0]]))


def test_truncated_noise_stays_inside_and_is_normal():
    torch.manual_seed(0)
    G, seen = Generator(3, 1, 8, width=8, latent=400).eval(), []
    G.forward = lambda z, y: seen.append(z) or z
    G.sample(torch.zeros(100, dtype=torch.long), generator(), truncation=0.7)
    z = seen[0]
    # A standard normal distribution cut at 0.7 has a deviation of 0.3914.
    assert z.abs().max() <= 0.7 and z.std().item() == pytest.approx(0.3914, abs=0.004)


def test_hinge_loss_and_projection():
    on_real, on_fake = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.5])
    assert discriminator_loss(on_real, on_fake).item() == pytest.approx(0.5 + 0.75)
    torch.manual_seed(0)
    D, x = Discriminator(3, 1, width=8).eval(), torch.rand(4, 1, 8, 8)
    y = torch.tensor([0, 1, 2, 0])
    phi = D.features(x).sum(dim=(2, 3))
    expected = F.linear(phi, D.real.weight, D.real.bias)[:, 0] + (D.of_class.weight[y] * phi).sum(dim=1)
    torch.testing.assert_close(D(x, y), expected)


def test_every_subject_gives_images_of_its_class_alike_for_a_seed():
    torch.manual_seed(0)
    subjects = [
        Generator(3, 1, 8, width=8),
        PixelCNN(3, 5, 8, width=8, depth=1),
        VQVAESampler(VQVAE(1, 8, 6, 4), PixelCNN(3, 6, 4, width=8, depth=1)),
    ]
    labels = torch.tensor([0, 1, 2, 2])
    for subject in subjects:
        one, again = subject.sample(labels, generator()), subject.sample(labels, generator())
        assert one.shape == (4, 1, 8, 8) and one.equal(again) and one.min() >= 0 and one.max() <= 1


def test_resnet_has_the_layers_and_parameters_of_the_paper():
    model = cas_resnet56()
    assert sum(p.numel() for p in model.parameters()) == 853_018
    weighted = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(weighted) == 56


# Wrong input and claims ---------------------------------------------------------------------------------------------

X, Y = torch.zeros(4, 2), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: relative_drop(0.0, 0.5), "real is 0.0"),
        (lambda: draw_labels(Y[:0], generator=generator()), "labels has shape (0,)"),
        (lambda: sample_set(lambda y, g: X[:1], Y, generator=generator()), "1 images for 4 labels"),
        (lambda: sample_set(lambda y, g: X, Y, generator=generator(), batch_size=0), "batch_size is 0"),
        (lambda: score_classifier(lambda x: x, X, Y.float()), "type torch.float32"),
        (lambda: score_classifier(lambda x: x, X, Y), "(4, 2) logits, the labels go up to 2"),
        (lambda: score_classifier(lambda x: x, X[:0], Y[:0]), "validation has 0 images"),
        (lambda: feature_moments([[1.0, np.nan], [0.0, 1.0]]), "features has shape (2, 2)"),
        (lambda: inception_score([[0.5, 0.6]]), "row 0 sums to 1.1"),
        (lambda: rank_correlation({"a": 1.0, "b": 2.0, "c": 1.0}, {"a": 1.0, "b": 2.0, "d": 1.0}), "the same three"),
        (lambda: Generator(size=6), "size is 6"),
        (lambda: VQVAESampler(VQVAE(codes=8), PixelCNN(levels=4, size=4)), "prior has 4 levels"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_reference_generators_are_what_they_are_called():
    study = claims._study(Trial(1000, "tiny"))
    labels = torch.arange(10).repeat(20)
    few = claims._few(study, 2, noise=0.0)(labels, generator())
    for k in range(10):
        assert len(few[labels == k].flatten(1).unique(dim=0)) <= 2
    of_class = claims._gaussian(study, 0.0, dimensions=3)(labels, generator())[labels == 4].flatten(1)
    assert torch.linalg.matrix_rank(of_class - of_class.mean(dim=0), atol=1e-4) == 3
    kept = claims._largest_cluster(study)(labels, generator())
    real = {tuple(image.flatten().tolist()) for image in study.x}
    assert all(tuple(image.flatten().tolist()) in real for image in kept)


def test_wrong_labels_are_perfect_to_the_distance_and_worthless_to_the_score():
    values = claims.frechet_prefers_lost_modes(Trial(1000, "tiny"))
    assert values["frechet_wrong_labels"] == pytest.approx(0, abs=1e-6)
