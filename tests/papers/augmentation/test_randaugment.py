"""RandAugment: the argument tables, the draw, the batch, the learned weights, the search."""

import functools
import math

import pytest
import torch

from saigen.nn.image_operations import BLENDS, GEOMETRIC, apply_operation
from saigen.papers.augmentation.randaugment import (
    RandAugment,
    TrainableRandAugment,
    level_to_argument,
    number_of_policies,
    probability_drawn,
    rand_augment_operations,
    search_rand_augment,
)
from saigen.papers.augmentation.randaugment.transform import Policy


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=16, c=3, side=20, seed=0):
    return torch.randint(0, 256, (n, c, side, side), generator=seeded(seed)) / 255


def test_operation_sets():
    paper, official, timm = (rand_augment_operations(name) for name in ("paper", "official", "timm"))
    assert (len(paper), len(official), len(timm)) == (14, 16, 15)
    assert set(paper) - set(official) == {"Identity"}
    assert set(official) - set(paper) == {"Invert", "Cutout", "SolarizeAdd"}
    assert set(official) - set(timm) == {"Cutout"}
    assert rand_augment_operations("torchvision") == paper


def test_official_argument_table_at_every_level():
    """The sheet's table, written down once more."""
    for level in (0, 2, 5, 9, 10, 17, 28):
        share = level / 10
        expected = dict.fromkeys(("Identity", "AutoContrast", "Equalize", "Invert"), 0)
        expected |= {"Rotate": 30 * share, "ShearX": 0.3 * share, "ShearY": 0.3 * share}
        expected |= {"TranslateX": 100 * share, "TranslateY": 100 * share}
        expected |= {"Posterize": min(8, int(4 * share)), "Solarize": min(256, int(256 * share))}
        expected |= {"SolarizeAdd": int(110 * share), "Cutout": int(40 * share)} | dict.fromkeys(
            BLENDS, 1.8 * share + 0.1
        )
        for name, value in expected.items():
            assert level_to_argument(name, level) == pytest.approx(value, abs=1e-9), (name, level)


def test_increasing_schedule_starts_at_no_change_and_grows():
    still = {"Posterize": 4, "Solarize": 256, **dict.fromkeys(BLENDS, 1.0), **dict.fromkeys(GEOMETRIC, 0.0)}
    for name, value in still.items():
        assert level_to_argument(name, 0, schedule="increasing") == value
    for name in BLENDS:
        assert level_to_argument(name, 9, schedule="increasing") == pytest.approx(1.81)
        assert level_to_argument(name, 9, sign=-1, schedule="increasing") == pytest.approx(0.19)
        assert level_to_argument(name, 28, sign=-1, schedule="increasing") == 0.1
    assert [level_to_argument("Posterize", m, schedule="increasing") for m in (0, 2.5, 5, 10, 28)] == [4, 3, 2, 0, 0]
    assert [level_to_argument("Solarize", m, schedule="increasing") for m in (0, 5, 10, 28)] == [256, 128, 0, 0]


def test_signs_are_mirror_images():
    for name in GEOMETRIC:
        assert level_to_argument(name, 7, sign=-1) == -level_to_argument(name, 7)
    for name in BLENDS:
        assert level_to_argument(name, 7, sign=-1) == level_to_argument(name, 7)


def test_relative_translation_follows_the_side():
    augment = RandAugment(magnitude=10, op_set="timm")
    assert augment.arguments((200, 100))["TranslateX"] == pytest.approx(45)
    assert augment.arguments((200, 100))["TranslateY"] == pytest.approx(90)
    assert RandAugment(magnitude=9).arguments((32, 32))["TranslateX"] == pytest.approx(90)


@pytest.mark.parametrize("op_set", ["paper", "official", "torchvision", "timm"])
@pytest.mark.parametrize("arithmetic", ["pillow", "tensorflow"])
def test_a_batch_is_the_operations_one_after_the_other(op_set, arithmetic):
    """Against the algorithm as the paper writes it: a loop over the image's draws."""
    augment = RandAugment(3, 9, op_set=op_set, arithmetic=arithmetic)
    x, policy = images(24), augment.draw(24, generator=seeded(1))
    names = augment.operations
    policy = policy._replace(
        operations=policy.operations.masked_fill(
            policy.operations == (names.index("Cutout") if "Cutout" in names else -1), -1
        )
    )
    result = augment.apply_policy(x, policy)
    for i in range(len(x)):
        one = x[i]
        for number, level, sign in zip(policy.operations[:, i], policy.levels[:, i], policy.signs[:, i], strict=True):
            if number >= 0:
                argument = augment.argument(names[number], level.item(), sign.item(), (20, 20))
                one = apply_operation(names[number], one, argument, fill=augment.fill, arithmetic=arithmetic)
        assert torch.equal(result[i], one)


def test_any_leading_shape_dtype_and_layout():
    augment, x = RandAugment(2, 9, op_set="official"), images(12)
    flat = augment(x, generator=seeded(5))
    assert torch.equal(augment(x.reshape(3, 4, 3, 20, 20), generator=seeded(5)).reshape_as(x), flat)
    assert torch.equal(augment((x * 255).round().to(torch.uint8), generator=seeded(5)) / 255, flat)
    assert torch.equal(augment(x.to(memory_format=torch.channels_last), generator=seeded(5)), flat)
    assert augment(x[0], generator=seeded(5)).shape == x[0].shape
    assert augment(images(6, c=1), generator=seeded(5)).shape == (6, 1, 20, 20)
    assert augment(x[:0]).shape == x[:0].shape


def test_inputs_stay_and_the_same_seed_gives_the_same_images():
    augment, x = RandAugment(2, 9), (images() * 255).round().to(torch.uint8)
    before, state = x.clone(), torch.get_rng_state()
    first, second, third = (augment(x, generator=seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(x, before) and torch.equal(first, second) and not torch.equal(first, third)
    assert torch.equal(torch.get_rng_state(), state)


def test_identity_cases():
    x = torch.rand(4, 3, 8, 8)
    assert RandAugment(0)(x) is x
    assert RandAugment(2, 9).eval()(x) is x
    names = ("Identity", *GEOMETRIC, *BLENDS)
    x = images()
    assert torch.equal(RandAugment(3, 0, op_set=names, schedule="increasing")(x), x)
    assert torch.equal(RandAugment(3, 9, probability=0.0)(x), x)


def test_operations_are_drawn_uniformly_and_independently():
    policy = RandAugment(2, 9).draw(40000, generator=seeded())
    pairs = torch.zeros(14, 14).index_put_(tuple(policy.operations), torch.ones(40000), accumulate=True)
    chi2 = ((pairs - 40000 / 196) ** 2 / (40000 / 196)).sum().item()
    assert abs(chi2 - 195) < 5 * math.sqrt(2 * 195)
    assert abs(policy.signs.double().mean().item()) < 0.02
    drawn = (policy.operations == 3).any(0).double().mean().item()
    assert drawn == pytest.approx(probability_drawn(2, 14), abs=0.006)
    gated = RandAugment(2, 9, op_set="timm").draw(40000, generator=seeded())
    assert (gated.operations < 0).double().mean().item() == pytest.approx(0.5, abs=0.01)


def test_magnitude_modes():
    levels = {mode: RandAugment(2, 8, magnitude_mode=mode).draw(5000, progress=0.25, generator=seeded()).levels for mode in
              ("constant", "random", "linear", "random_increasing")}  # fmt: skip
    assert levels["constant"].unique().tolist() == [8.0] and levels["linear"].unique().tolist() == [2.0]
    assert levels["random"].mean().item() == pytest.approx(4, abs=0.1) and levels["random"].max() > 7.9
    assert (
        levels["random_increasing"].mean().item() == pytest.approx(1, abs=0.03)
        and levels["random_increasing"].max() <= 2
    )
    noisy = RandAugment(2, 9, magnitude_std=0.5).draw(5000, generator=seeded()).levels
    assert noisy.std().item() == pytest.approx(0.5, abs=0.05) and noisy.max() <= 10


def test_weights_replace_the_uniform_choice():
    weights = torch.zeros(2, 14)
    weights[0, 3], weights[1, 5] = 1.0, 2.0
    policy = RandAugment(2, 9, weights=weights).draw(100, generator=seeded())
    assert policy.operations[0].unique().tolist() == [3] and policy.operations[1].unique().tolist() == [5]


def test_numbers():
    assert probability_drawn(2, 14) == pytest.approx(0.1378, abs=5e-5)
    assert probability_drawn(2, 16) == pytest.approx(0.1211, abs=5e-5)
    assert number_of_policies(2, 14) == 196


def test_relaxed_choice_is_the_mixture_and_its_gradient():
    augment = RandAugment(1, 9, op_set=("Invert", "Brightness", "Rotate"))
    trainable = TrainableRandAugment(augment).double()
    x = images(4).double()
    with torch.no_grad():
        trainable.alpha.copy_(torch.tensor([[0.3, -0.2, 0.9]]))
    policy = augment.draw(4, generator=seeded(2))
    parts = [augment.apply_policy(x, Policy(torch.full((1, 4), i), policy.levels, policy.signs)) for i in range(3)]
    expected = sum(w * part for w, part in zip(trainable.alpha.softmax(-1)[0], parts, strict=True))
    assert torch.allclose(trainable(x, generator=seeded(2)), expected, atol=1e-12)

    def of(alpha):
        return torch.func.functional_call(trainable, {"alpha": alpha}, (x,), {"generator": seeded(2)}).sum((1, 2, 3))

    assert torch.autograd.gradcheck(of, (trainable.alpha.detach().requires_grad_(),))


def test_weights_are_learned_at_every_step_of_the_chain():
    """A fixed critic that hates inverted images: both layers learn not to invert."""
    trainable = TrainableRandAugment(RandAugment(2, 9, op_set=("Identity", "Invert", "Solarize")))
    optimizer = torch.optim.Adam(trainable.parameters(), 0.2)
    x = images(8) * 0.4
    for step in range(30):
        loss = trainable(x, generator=seeded(step)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = trainable.sampler().weights
    assert weights.shape == (2, 3) and torch.allclose(weights.sum(-1), torch.ones(2))
    assert (weights[:, 1] < 0.05).all()
    straight = torch.rand(2, 3, 8, 8, requires_grad=True)
    trainable(straight, generator=seeded()).sum().backward()
    assert torch.equal(straight.grad, torch.ones_like(straight))


def test_grid_search():
    seen = []

    def train(augment):
        seen.append((augment.num_ops, augment.magnitude))
        return math.nan if augment.num_ops == 3 else -abs(augment.magnitude - 5) - abs(augment.num_ops - 2)

    result = search_rand_augment(train, (3, 1, 2), (9, 5), make=functools.partial(RandAugment, op_set="official"))
    assert seen == [(n, m) for n in (1, 2, 3) for m in (5, 9)]
    assert result.best == (2, 5) and result.scores[2, 5] == 0
    assert search_rand_augment(lambda augment: 0.5, (1, 2), (5, 9)).best == (1, 5)
    with pytest.raises(ValueError, match="num_ops is"):
        search_rand_augment(train, (), (5,))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"num_ops": -1}, "num_ops"), ({"num_ops": True}, "num_ops"), ({"magnitude": -2}, "magnitude"),
        ({"op_set": "imagenet"}, "op_set"), ({"op_set": ("Rotate", "Blur")}, "op_set"), ({"op_set": ()}, "op_set"),
        ({"schedule": "cosine"}, "schedule"), ({"max_level": 0}, "max_level"), ({"magnitude_mode": "cosine"}, "magnitude_mode"),
        ({"probability": 1.5}, "probability"), ({"translate": -1}, "translate"), ({"cutout": -1}, "cutout"),
        ({"arithmetic": "jax"}, "arithmetic"), ({"weights": torch.ones(2, 3)}, "weights"), ({"magnitude_std": -1}, "magnitude_std"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=f"{name} (is|has)"):
        RandAugment(**arguments)
    with pytest.raises(ValueError, match="progress is 2"):
        RandAugment()(torch.rand(1, 3, 4, 4), progress=2)
