"""Faster AutoAugment: operations and their gradients, policies relaxed and sampled, the file, the search."""

import copy
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import nn

from saigen.papers.augmentation.faster_autoaugment import (
    AugmentationPolicy,
    DifferentiablePolicy,
    PolicyCritic,
    PolicySearch,
    apply_operation,
    claims,
    gradient_penalty,
    load_official,
    policy_operations,
    search_policy,
    straight_through,
)
from saigen.papers.augmentation.faster_autoaugment.operations import OPERATIONS, warp
from saigen.papers.augmentation.faster_autoaugment.transform import RelaxedDraw, _check_images
from saigen.trial import Trial
from tests.golden.faster_autoaugment.make import unpacked

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "faster_autoaugment" / "official.npz"
REPOSITORY = {
    "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateX", "translate_y": "TranslateY",
    "rotate": "Rotate", "hflip": "HorizontalFlip", "invert": "Invert", "solarize": "Solarize",
    "posterize": "Posterize", "contrast": "Contrast", "saturate": "Color", "brightness": "Brightness",
    "sharpness": "Sharpness", "auto_contrast": "AutoContrast", "equalize": "Equalize",
}  # fmt: skip
SMOOTH = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Contrast", "Color", "Brightness", "Sharpness")
STEPS = ("Solarize", "Posterize", "Cutout")


@pytest.fixture(scope="module")
def golden():
    answers = unpacked(GOLDEN)
    return answers | {key: answers[key].long() for key in ("sub_policies", "labels")}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=6, c=3, side=16, seed=0):
    return torch.randint(0, 256, (n, c, side, side), generator=seeded(seed)) / 255


def small_policy(**options):
    return DifferentiablePolicy(("Rotate", "Invert", "Solarize"), num_sub_policies=2, generator=seeded(), **options)


def critic(side=8, channels=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trunk = nn.Sequential(nn.Conv2d(channels, 4, 3, 2, 1), nn.Softplus(), nn.Flatten())
        return PolicyCritic(trunk, 4 * (side // 2) ** 2, 5)


# Operations


def test_operation_sets():
    paper, official = policy_operations("paper"), policy_operations("official")
    assert len(paper) == len(set(paper)) == 16 and len(official) == 15
    assert set(paper) - set(official) == {"TranslateX", "Cutout", "SamplePairing"}
    assert official.count("TranslateY") == 2 and set(official) - set(paper) == {"HorizontalFlip"}


@pytest.mark.parametrize("kind", ["levels", "between"])
@pytest.mark.parametrize("theirs", REPOSITORY)
def test_operations_equal_the_official_code(golden, theirs, kind):
    """Values, and gradients of a sum of squares to the image and to mu."""
    name = REPOSITORY[theirs]
    x, mu = golden[kind].clone().requires_grad_(), golden["magnitude"].clone().requires_grad_()
    operation = OPERATIONS[name]
    sign = torch.tensor([1.0, -1.0]) if operation.signed else torch.ones(2)
    argument = None if operation.scale is None else mu * sign * operation.scale
    out = apply_operation(name, x, argument, arithmetic="official")
    torch.testing.assert_close(out, golden[f"{kind}/{theirs}"], rtol=1e-4, atol=2e-5)
    gradients = torch.autograd.grad(out.square().sum(), (x, mu), allow_unused=True)
    for what, gradient in zip(("x", "mu"), gradients, strict=True):
        expected = golden.get(f"{kind}/{theirs}/{what}")
        if (what, kind) != ("x", "levels"):
            assert (gradient is None) == (expected is None), what
        if gradient is not None and expected is not None:
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=2e-3)


def test_equalize_equals_the_official_code_where_it_spreads(golden):
    ours = apply_operation("Equalize", golden["large"], arithmetic="official")
    torch.testing.assert_close(ours, golden["large/equalize"])
    assert not torch.allclose(ours, golden["large"], atol=0.1)


def pillow(x, function):
    """``function`` of each image as Pillow has it, back in [0, 1]."""
    found = [np.asarray(function(Image.fromarray((255 * one).round().byte().permute(1, 2, 0).numpy()))) for one in x]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2) / 255


@pytest.mark.parametrize("level", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_operations_equal_pillow(level):
    """The steps and histograms to the bit; the blends to the level that Pillow cuts off."""
    x = images()
    argument = torch.full((len(x),), level)
    exact = {
        "Invert": ImageOps.invert,
        "HorizontalFlip": ImageOps.mirror,
        "AutoContrast": ImageOps.autocontrast,
        "Equalize": ImageOps.equalize,
        "Solarize": lambda image: ImageOps.solarize(image, 255 * level),
        "Posterize": lambda image: (
            ImageOps.posterize(image, 8 - math.floor((1 - level) * 8)) if level else image.point(lambda value: 0)
        ),
    }
    for name, function in exact.items():
        torch.testing.assert_close(apply_operation(name, x, argument), pillow(x, function), rtol=0, atol=1e-6)
    blends = {"Color": ImageEnhance.Color, "Contrast": ImageEnhance.Contrast}
    blends |= {"Brightness": ImageEnhance.Brightness, "Sharpness": ImageEnhance.Sharpness}
    for name, enhance in blends.items():
        for sign in (1, -1):
            theirs = pillow(x, lambda image, f=1 - sign * level, e=enhance: e(image).enhance(f))
            # Pillow cuts the degenerate image to levels too, so up to the factor's share of one level more.
            assert (apply_operation(name, x, sign * argument) - theirs).abs().max() < (1.01 + 1) / 255, (name, sign)


def test_geometry_equals_pillow_inside():
    """Against Pillow's bilinear transform by the same matrix, away from the border, which it treats differently."""
    x = torch.nn.functional.interpolate(torch.rand(2, 3, 6, 6, generator=seeded()), (24, 24), mode="bicubic").clamp(
        0, 1
    )
    x = (255 * x).round() / 255
    h = w = 24
    cases = {
        ("Rotate", 20.0): lambda image: image.rotate(20, Image.Resampling.BILINEAR),
        ("TranslateX", 0.2): lambda image: image.transform((w, h), Image.Transform.AFFINE, (1, 0, -0.2 * w, 0, 1, 0), Image.Resampling.BILINEAR),
        ("TranslateY", -0.1): lambda image: image.transform((w, h), Image.Transform.AFFINE, (1, 0, 0, 0, 1, 0.1 * h), Image.Resampling.BILINEAR),
        # Our first row stays, Pillow's shear is about the corner half a pixel above it.
        ("ShearX", 0.2): lambda image: image.transform((w, h), Image.Transform.AFFINE, (1, -0.2, 0.1, 0, 1, 0), Image.Resampling.BILINEAR),
        ("ShearY", -0.3): lambda image: image.transform((w, h), Image.Transform.AFFINE, (1, 0, 0, 0.3, 1, -0.15), Image.Resampling.BILINEAR),
    }  # fmt: skip
    inside = apply_operation("ShearX", torch.ones_like(x), torch.full((2,), 0.0))[..., 8:16, 8:16]
    assert inside.min() == 1
    for (name, argument), function in cases.items():
        ours = apply_operation(name, x, torch.full((2,), argument))
        assert (ours - pillow(x, function))[..., 8:16, 8:16].abs().max() < 2.5 / 255, name


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("arithmetic", ["pillow", "official"])
def test_smooth_gradients_are_exact(name, arithmetic):
    # Within [0.4, 0.6] nothing is clamped; contrast's mean is rounded, so the image's share in it has no gradient.
    x = (0.4 + 0.2 * torch.rand(2, 3, 5, 5, generator=seeded(), dtype=torch.float64)).requires_grad_()
    mu = torch.tensor([0.31, -0.17], dtype=torch.float64, requires_grad=True) * OPERATIONS[name].scale
    mu = mu.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, mu: apply_operation(name, x, mu, arithmetic=arithmetic), (x, mu))


@pytest.mark.parametrize("name", STEPS)
def test_steps_pass_the_gradient_straight_to_the_magnitude(name):
    x, mu = images().requires_grad_(), torch.full((6,), 0.6, requires_grad=True)
    out = apply_operation(name, x, mu, generator=seeded())
    upstream = torch.rand(out.shape, generator=seeded(1))
    out.backward(upstream)
    torch.testing.assert_close(mu.grad, upstream.flatten(1).sum(1))
    if name == "Cutout":
        hole = out.detach() != x.detach()
        assert torch.equal(x.grad, torch.where(hole, 0, upstream)) and hole.any()
    else:
        assert x.grad is None


@pytest.mark.parametrize("name", ["AutoContrast", "Equalize"])
def test_histogram_operations_pass_the_gradient_straight_to_the_image(name):
    x = (0.2 + 0.5 * images()).requires_grad_()
    out = apply_operation(name, x)
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and not torch.equal(out.detach(), x.detach())


def test_straight_through():
    mu = torch.rand(3, 1, requires_grad=True)
    out = straight_through(torch.arange(6.0).view(3, 2), mu)
    assert out.tolist() == [[0, 1], [2, 3], [4, 5]]
    out.backward(torch.tensor([[1.0, 2], [3, 4], [5, 6]]))
    assert mu.grad.tolist() == [[3], [7], [11]]


def test_no_magnitude_no_change():
    x = images()
    for name, operation in OPERATIONS.items():
        if operation.signed or name in ("Cutout", "SamplePairing"):
            still = apply_operation(name, x, torch.zeros(6), generator=seeded())
            torch.testing.assert_close(still, x, rtol=0, atol=1e-5)
    for name in ("Solarize", "Posterize"):
        changed = apply_operation(name, x, torch.ones(6))
        assert torch.equal(changed[x < 1], x[x < 1])


def test_cutout_and_sample_pairing():
    x = images(side=16)
    out = apply_operation("Cutout", x, torch.full((6,), 0.5), generator=seeded())
    hole = (out == 0.5).all(1)
    assert (hole.flatten(1).sum(1) <= 64).all() and (hole.flatten(1).sum(1) >= 16).all()
    paired = apply_operation("SamplePairing", x, torch.full((6,), 0.25), generator=seeded(3))
    order = torch.randperm(6, generator=seeded(3))
    torch.testing.assert_close(paired, 0.75 * x + 0.25 * x[order])


def test_warp_is_the_identity_for_the_identity():
    x = images(side=7)
    torch.testing.assert_close(warp(x, torch.eye(3)[:2].expand(6, 2, 3)), x, atol=1e-5, rtol=0)


# The relaxed policy


def test_parameter_counts():
    assert sum(p.numel() for p in DifferentiablePolicy("official").parameters()) == 820
    assert sum(p.numel() for p in DifferentiablePolicy("paper").parameters()) == 900


def official_policy(golden):
    state = {key.removeprefix("policy/"): value for key, value in golden.items() if key.startswith("policy/")}
    kwargs = {"num_sub_policies": 2, "operation_count": 2, "temperature": 0.05}
    return load_official({"policy": state, "policy_kwargs": kwargs, "epoch": 1, "step": 1}, num_chunks=2)


def in_pieces(policy, golden):
    """A pass piece by piece, as the repository goes: between levels its Equalize depends on the number of images."""
    whole = RelaxedDraw(golden["sub_policies"], golden["noise"], golden["signs"])
    pieces = [slice(0, 1), slice(1, 2)]
    draws = [RelaxedDraw(whole.sub_policies[p], whole.noise[:, p], whole.signs[:, p]) for p in pieces]
    return lambda x, generator=None: torch.cat(
        [policy.apply_draw(x[p], draw) for p, draw in zip(pieces, draws, strict=True)]
    )


def test_policy_equals_the_official_code(golden):
    """The same state dict, the same chance: the same images, and the same gradients in all parameters."""
    policy = official_policy(golden)
    out = in_pieces(policy, golden)(golden["between"])
    torch.testing.assert_close(out, golden["relaxed"], rtol=1e-5, atol=1e-5)
    (2 * out - 1).square().sum().backward()
    names = {"weights": "_weights", "magnitudes": "_magnitude", "probabilities": "_probability"}
    compared = 0
    for ours, theirs in names.items():
        gradient = getattr(policy, ours).grad
        for i in range(2):
            for j in range(2):
                prefix = f"policy_gradient/sub_policies.{i}.stages.{j}."
                if ours == "weights":
                    expected = golden.get(prefix + theirs)
                else:
                    parts = [golden.get(f"{prefix}operations.{n}.{theirs}") for n in range(15)]
                    found = [part for part in parts if part is not None]
                    expected = torch.cat(found) if found else None
                if expected is not None:
                    torch.testing.assert_close(gradient[i, j], expected, rtol=1e-4, atol=1e-4)
                    compared += expected.numel()
    assert compared == 4 * 41


def test_a_step_of_the_search_equals_the_official_code(golden):
    policy = official_policy(golden)
    ours = critic(side=6)
    renamed = {
        key.removeprefix("critic/").replace("base_model.conv", "trunk.0").replace("discriminator", "critic"): value
        for key, value in golden.items()
        if key.startswith("critic/")
    }
    ours.load_state_dict(renamed)
    search = PolicySearch(policy, ours, gp_norm="channel")
    search.critic_optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    search.policy_optimizer = torch.optim.SGD(policy.parameters(), 5.0)
    policy.forward = in_pieces(policy, golden)
    policy.project_ = lambda: policy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *size, **options: golden["share"])
        labels = golden["labels"]
        losses = search.step((golden["between"], labels[0]), (golden["real"], labels[1]))
    expected = golden["losses"]
    classification = 0.1 * (losses.classification + losses.policy_classification)
    assert classification == pytest.approx(expected[0].item(), rel=1e-3)
    assert 10 * losses.penalty - losses.distance == pytest.approx(expected[1].item(), rel=1e-3)
    assert -losses.policy_score == pytest.approx(expected[2].item(), rel=1e-3)
    after = {
        key.removeprefix("critic_after/")
        .replace("base_model.conv", "trunk.0")
        .replace("discriminator", "critic"): value
        for key, value in golden.items()
        if key.startswith("critic_after/")
    }
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, after[key], rtol=1e-3, atol=1e-5)
    state = {key.removeprefix("policy_after/"): v for key, v in golden.items() if key.startswith("policy_after/")}
    for name, value in policy.convert_state_dict(state).items():
        torch.testing.assert_close(getattr(policy, name).data, value, rtol=1e-4, atol=1e-4)
        before = official_policy(golden).state_dict()[name]
        assert (value - before).abs().max() > 0.01


def test_relaxed_pass_equals_the_equation():
    """x <- sum_n softmax(w / eta)_n (b_n O_n(x) + (1 - b_n) x), image by image."""
    policy, x = small_policy(num_chunks=None), images(5)
    with torch.no_grad():
        policy.weights.mul_(0.1)
    draw = policy.draw(5, seeded(4))
    out = policy.apply_draw(x, draw)
    for i, sub in enumerate(draw.sub_policies.tolist()):
        one = x[i : i + 1]
        for stage in range(2):
            mixture = 0
            for n, name in enumerate(policy.operations):
                p, noise = policy.probabilities[sub, stage, n], draw.noise[stage, i, n]
                gate = 1 / (1 + torch.exp(-(torch.log(p / (1 - p)) + noise) / 0.1))
                sign = draw.signs[stage, i, n] if name == "Rotate" else 1
                place = {"Rotate": 0, "Solarize": 1}.get(name)
                mu = None if place is None else policy.magnitudes[sub, stage, place].view(1) * sign
                y = apply_operation(name, one, None if mu is None else mu * OPERATIONS[name].scale)
                weight = torch.exp(policy.weights[sub, stage] / 0.05)
                mixture = mixture + weight[n] / weight.sum() * (gate * y + (1 - gate) * one)
            one = mixture
        torch.testing.assert_close(out[i : i + 1], one, rtol=1e-4, atol=1e-5)


def test_softmax_at_the_start():
    policy = small_policy()
    nn.init.constant_(policy.weights, 0.5)
    torch.testing.assert_close(policy.freeze().choice, torch.full((2, 2, 3), 1 / 3))
    policy.weights.data[..., 0], policy.weights.data[..., 1] = 1.0, 0.0
    choice = policy.freeze().choice
    assert (choice[..., 0] / choice[..., 1]).log().mean().item() == pytest.approx(20, abs=1e-3)


def test_gates_have_the_given_probability():
    policy = DifferentiablePolicy(("Invert",), num_sub_policies=1, num_stages=1)
    policy.probabilities.data.fill_(0.3)
    x = torch.zeros(20_000, 1, 1, 1)
    out = policy(x, generator=seeded())
    assert (out > 0.5).double().mean().item() == pytest.approx(0.3, abs=0.015)
    assert ((out < 0.05) | (out > 0.95)).double().mean().item() > 0.8
    hard = policy.freeze()(x, generator=seeded())
    assert set(hard.unique().tolist()) == {0.0, 1.0} and hard.mean().item() == pytest.approx(0.3, abs=0.015)


def test_projection_and_gradients_at_the_ends():
    policy = small_policy()
    policy.probabilities.data.fill_(1.7)
    policy.magnitudes.data.fill_(-0.2)
    policy.project_()
    assert policy.probabilities.eq(1).all() and policy.magnitudes.eq(0).all()
    policy(images(), generator=seeded()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())


def test_chunks_share_a_sub_policy():
    policy = DifferentiablePolicy(num_sub_policies=50, num_chunks=4, generator=seeded())
    assert torch.equal(
        torch.cat([part.unique() for part in policy.draw(10, seeded()).sub_policies.split(3)]),
        policy.draw(10, seeded()).sub_policies[::3],
    )
    frozen = policy.freeze(num_chunks=3)
    draw = frozen.draw(10, seeded())
    for part in torch.cat([draw.sub_policies[None], draw.operations]).split(4, dim=1):
        assert (part == part[:, :1]).all()
    assert len(policy.freeze().draw(64, seeded()).sub_policies.unique()) > 10


# The frozen policy


def test_frozen_policy_equals_a_loop_over_images():
    policy = DifferentiablePolicy(
        tuple(n for n in policy_operations("paper") if n not in ("Cutout", "SamplePairing")), generator=seeded()
    )
    frozen, x = policy.freeze(), images(40)
    draw = frozen.draw(40, seeded(2))
    out = frozen.apply_draw(x, draw)
    changed = 0
    for i in range(40):
        one = x[i : i + 1]
        for stage in range(2):
            n, name = draw.operations[stage, i], frozen.operations[draw.operations[stage, i]]
            if draw.applied[stage, i]:
                argument = frozen.magnitudes[draw.sub_policies[i], stage, n].view(1) * (OPERATIONS[name].scale or 0)
                argument = argument * draw.signs[stage, i] if OPERATIONS[name].signed else argument
                one = apply_operation(name, one, argument)
                changed += 1
        torch.testing.assert_close(out[i : i + 1], one, rtol=1e-4, atol=1e-5)
    assert changed > 20


def test_operations_are_drawn_by_choice_and_probability():
    choice = torch.tensor([[[0.7, 0.3]]])
    frozen = AugmentationPolicy(
        ("Invert", "HorizontalFlip"), choice, torch.zeros(1, 1, 2), torch.tensor([[[0.5, 1.0]]])
    )
    draw = frozen.draw(20_000, seeded())
    assert (draw.operations == 0).double().mean().item() == pytest.approx(0.7, abs=0.015)
    assert draw.applied.double().mean().item() == pytest.approx(0.65, abs=0.015)
    assert frozen.operation_shares() == pytest.approx({"Invert": 0.35, "HorizontalFlip": 0.3}, abs=1e-6)


def test_the_file_keeps_the_policy(tmp_path):
    for name in ("paper", "official"):
        policy = DifferentiablePolicy(name, generator=seeded(3)).freeze(num_chunks=4)
        policy.save(tmp_path / "policy.json")
        again = AugmentationPolicy.load(tmp_path / "policy.json")
        assert again.operations == policy.operations and again.num_chunks == 4
        for key, value in policy.state_dict().items():
            torch.testing.assert_close(again.state_dict()[key], value, rtol=1e-6, atol=1e-7)
        x = images(32)
        assert torch.equal(again(x, generator=seeded(1)), policy(x, generator=seeded(1)))
    read = json.loads((tmp_path / "policy.json").read_text())
    assert set(read["sub_policies"][0][0][0]) == {"operation", "choice", "probability", "magnitude"}


def test_a_policy_written_by_hand():
    policy = AugmentationPolicy.from_dict(
        {"sub_policies": [[[{"operation": "Rotate", "magnitude": 0.5, "probability": 0.8}, {"operation": "Invert"}]]]}
    )
    assert policy.choice.tolist() == [[[0.5, 0.5]]]
    assert policy.operation_shares() == pytest.approx({"Rotate": 0.4, "Invert": 0.5})
    assert policy.mean_argument("Rotate") == pytest.approx(15)


def test_inputs_and_the_global_generator_stay():
    x = images()
    before, state = x.clone(), torch.get_rng_state()
    relaxed = small_policy()
    first, second = relaxed(x, generator=seeded(1)), relaxed(x, generator=seeded(1))
    frozen = relaxed.freeze()
    assert torch.equal(first, second) and torch.equal(frozen(x, generator=seeded()), frozen(x, generator=seeded()))
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)
    assert frozen.eval()(x) is x and relaxed.eval()(x) is x
    assert frozen.train()(x[:0]).shape == x[:0].shape


# The search


def test_gradient_penalty_of_a_linear_critic():
    """The gradient of a linear critic is its weight, wherever it is taken."""
    one = PolicyCritic(nn.Flatten(), 12, 2)
    one.critic = nn.Linear(12, 1)
    x = torch.rand(5, 3, 2, 2)
    weight = one.critic.weight.detach().view(3, 2, 2)
    flat = (weight.norm() - 1).square()
    torch.testing.assert_close(gradient_penalty(one, x, x.flip(0)).detach(), flat)
    channel = (weight.norm(dim=0) - 1).square().mean()
    torch.testing.assert_close(gradient_penalty(one, x, x.flip(0), norm="channel").detach(), channel)


def test_search_finds_an_inversion():
    """Source black, data white: the policy has to invert."""
    policy = DifferentiablePolicy(("Rotate", "Invert", "Cutout"), num_sub_policies=2, generator=seeded())
    search = PolicySearch(policy, critic(channels=1), policy_lr=2e-2)
    y = torch.arange(16) % 5
    for step in range(60):
        source = 0.2 * torch.rand(16, 1, 8, 8, generator=seeded(step))
        search.step((source, y), (1 - source.flip(0), y.flip(0)), generator=seeded(step))
    shares = policy.freeze().operation_shares()
    assert max(shares, key=shares.get) == "Invert", shares
    assert search.passes == 60 * 16 * 5


def test_search_policy_halves_batches_and_resumes():
    x, y = images(16, side=8), torch.arange(16) % 5
    loader = [(x[:8], y[:8]), (x[8:], y[8:])]

    def fresh():
        return small_policy(), critic()

    straight = search_policy(*fresh(), loader, epochs=2, generator=seeded())
    generator = seeded()
    first = search_policy(*fresh(), loader, epochs=1, generator=generator)
    second = PolicySearch(*fresh())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for a, b in loader:
        second.step((a[:4], b[:4]), (a[4:], b[4:]), generator=generator)
    assert straight.passes == second.passes == 4 * 4 * 5
    for ours, theirs in zip(straight.policy.parameters(), second.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(parameter.requires_grad for parameter in straight.critic.parameters())


def test_wrong_arguments():
    x = images()
    policy = small_policy()
    cases = [
        (lambda: policy_operations("imagenet"), "ops"),
        (lambda: policy_operations(("Rotate", "Twist")), "Twist"),
        (lambda: apply_operation("Twist", x), "Twist"),
        (lambda: apply_operation("Rotate", x), "argument of Rotate"),
        (lambda: apply_operation("Rotate", x, torch.zeros(3)), "argument of Rotate"),
        (lambda: apply_operation("Invert", x, arithmetic="jax"), "arithmetic"),
        (lambda: apply_operation("Color", torch.rand(1, 2, 4, 4), torch.zeros(1)), "2 channels"),
        (lambda: DifferentiablePolicy(num_stages=0), "num_stages"),
        (lambda: DifferentiablePolicy(temperature=0), "temperature"),
        (lambda: DifferentiablePolicy(num_chunks=0), "num_chunks"),
        (lambda: AugmentationPolicy(("Invert",), *torch.zeros(3, 1, 1, 2)), "shape"),
        (lambda: AugmentationPolicy(("Invert",), *torch.full((3, 1, 1, 1), math.nan)), "NaN"),
        (lambda: AugmentationPolicy.from_dict({}), "sub_policies"),
        (lambda: AugmentationPolicy.from_dict({"sub_policies": [[[{"operation": "Twist"}]]]}), "Twist"),
        (
            lambda: AugmentationPolicy.from_dict({"sub_policies": [[[{"operation": "Invert", "choice": 0.5}]]]}),
            "add up to 1",
        ),
        (lambda: AugmentationPolicy.from_dict({"sub_policies": [[[{"operation": "Invert"}]], []]}), "stages"),
        (lambda: AugmentationPolicy.from_dict({"sub_policies": [[[{"name": "Invert"}]]]}), "the keys name"),
        (
            lambda: AugmentationPolicy.from_dict({"sub_policies": [[[{"operation": "Invert", "probabilty": 1}]]]}),
            "probabilty",
        ),
        (lambda: policy.freeze().mean_argument("Invert"), "Invert"),
        (lambda: load_official({"state": 1}), "policy"),
        (lambda: policy.convert_state_dict({"sub_policies.0.stages.0._weights": torch.zeros(3)}), "lacks"),
        (lambda: PolicyCritic(nn.Flatten(), 0, 2), "num_features"),
        (lambda: gradient_penalty(critic(), x, x, norm="pixel"), "norm"),
        (lambda: PolicySearch(policy, critic(), gp_weight=-1), "gp_weight"),
        (lambda: PolicySearch(policy, critic(), gp_norm="pixel"), "gp_norm"),
        (lambda: PolicySearch(policy, critic()).step((x, x), (x[:2], x)), "equally many"),
        (lambda: search_policy(policy, critic(), [], epochs=1), "empty"),
        (lambda: search_policy(policy, critic(), [], epochs=0), "epochs"),
        (lambda: search_policy(policy, critic(), [(x[:1], torch.zeros(1))]), "batch of one"),
    ]
    for call, text in cases:
        with pytest.raises(ValueError, match=text):
            call()


@pytest.mark.parametrize("x", [torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.rand(3, 4, 4)])
def test_images_of_another_type_or_shape_are_refused(x):
    # The check itself: under the tests' run-time type checks no such image comes as far.
    with pytest.raises(ValueError, match="images are torch"):
        _check_images(x)


def test_a_policy_of_other_operations_refuses_the_official_state(golden):
    state = {key.removeprefix("policy/"): value for key, value in golden.items() if key.startswith("policy/")}
    grey = tuple(name for name in policy_operations("official") if name != "Equalize")
    with pytest.raises(ValueError, match="which a policy of"):
        DifferentiablePolicy(grey, num_sub_policies=2).convert_state_dict(state)


# The experiments


def test_expected_best_equals_all_choices():
    judged, tested = [0.5, 0.9, 0.7, 0.7, 0.1], [0.6, 0.8, 0.9, 0.5, 0.2]
    found = claims.expected_best(judged, tested)
    for k in range(1, 6):
        values = []
        for chosen in itertools.combinations(range(5), k):
            top = max(judged[i] for i in chosen)
            # Equals share: which of 2 and 3 comes first is a toss-up in every choice that holds them.
            best = [i for i in range(5) if judged[i] == top] if top == 0.7 else [judged.index(top)]
            values.append(sum(tested[i] for i in best) / len(best))
        assert found[k - 1] == pytest.approx(sum(values) / len(values))
    assert found[0] == pytest.approx(sum(tested) / 5) and found[-1] == 0.8


def test_policies_needed():
    best = [0.5, 0.6, 0.6, 0.9]
    assert claims.policies_needed(best, 0.3) == 1 and claims.policies_needed(best, 0.55) == pytest.approx(1.5)
    assert claims.policies_needed(best, 0.6) == pytest.approx(2) and claims.policies_needed(best, 0.95) == 4


def test_the_angle_of_a_known_policy():
    entry = {"operation": "Rotate", "magnitude": 0.5, "probability": 0.64}
    policy = AugmentationPolicy.from_dict({"sub_policies": [[[entry], [entry | {"probability": 0.36}]]]})
    assert claims._degrees(policy) == pytest.approx(15)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        many = DifferentiablePolicy(policy_operations("paper")[:14] + ("Cutout",), num_sub_policies=4000).freeze()
    # The card's nothing: 17.32 less what a policy turns that has not been searched.
    assert 30 / math.sqrt(3) - claims._degrees(many) == pytest.approx(12.85, abs=0.15)


def test_gap_and_paper_settings():
    trial = Trial(1000, "tiny")
    gap, one = claims._gap(trial), claims._one_set(trial)
    assert len(gap.target[0]) == 40 and gap.trunk()[1] == 64 and "Color" not in gap.operations
    assert torch.equal(one.source[0], one.target[0]) and torch.equal(one.everything[0], one.source[0])
    assert torch.equal(gap.source[0], claims._task(trial).source[0])
    assert not torch.equal(gap.target[0], claims._task(trial).target[0])
