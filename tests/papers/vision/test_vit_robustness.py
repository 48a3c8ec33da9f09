"""The robustness study: corruptions against the benchmark's own outputs, attacks, surgery, and the models."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saigen.nn.attention import set_fused
from saigen.nn.vision_transformer import VisionTransformer
from saigen.papers.vision import vit_robustness as room
from saigen.papers.vision.vit_robustness import (
    ALEXNET_ERRORS,
    CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    BiTResNet,
    Normalized,
    attention_mask,
    block_outputs,
    corrupt,
    fgsm,
    find_blocks,
    layer_similarity,
    lesion,
    linear_cka,
    mean_corruption_error,
    pgd,
    restrict_attention,
    restricted_predictions,
    robust_accuracy,
    rotate_and_shift,
    shape_bias,
    spatial_attack,
    transfer_matrix,
)
from saigen.papers.vision.vit_robustness.transform import _FUNCTIONS, _origins
from tests.golden.vit_robustness.make import NAMES, SEED, frost_pictures, picture, places

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "vit_robustness" / "corruptions.npz")
SIDES = {"imagenet": 224, "cifar": 32}
ALL = CORRUPTIONS + EXTRA_CORRUPTIONS


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tensor(image, dtype=torch.float64):
    return torch.from_numpy(image).permute(2, 0, 1).to(dtype)[None] / 255


def small_vit(**options):
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5}
    model = VisionTransformer(**{**sizes, **options}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def images():
    return torch.rand(6, 3, 16, 16, generator=generator())


# Corruptions


@pytest.mark.parametrize("benchmark", SIDES)
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_benchmarks_code(name, benchmark):
    side = SIDES[benchmark]
    frost = torch.cat([tensor(image) for image in frost_pictures(2 * side)[:5]])
    rows, columns = places(side)
    # a wide disc in double precision is slow: its ends are enough
    for severity in (1, 5) if (name, side) == ("defocus_blur", 224) else (1, 2, 3, 4, 5):
        done = 255 * corrupt(
            tensor(picture(0, side)),
            name,
            severity,
            benchmark=benchmark,
            generator=np.random.RandomState(SEED),
            frost_textures=frost,
        )
        index = NAMES.index(name), severity - 1
        kept = GOLDEN[f"{benchmark}_pixels"][index] / 256
        np.testing.assert_allclose(done[0, :, rows, columns].T.numpy(), kept, atol=0.003)
        assert done.mean().item() == pytest.approx(float(GOLDEN[f"{benchmark}_means"][index]), abs=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_single_precision_differs_little_and_batches_draw_apart(name):
    x = torch.cat([tensor(picture(k, 32), torch.float32) for k in (0, 0)])
    done = corrupt(x, name, 3, benchmark="cifar", generator=generator())
    assert done.shape == x.shape and done.dtype == torch.float32 and done.min() >= 0 and done.max() <= 1
    assert not torch.equal(done, x)
    draws = name in [
        "gaussian_noise",
        "shot_noise",
        "impulse_noise",
        "speckle_noise",
        "glass_blur",
        "motion_blur",
        "snow",
    ]
    draws |= name in ["frost", "fog", "elastic_transform"]
    assert torch.equal(done[0], done[1]) == (not draws)
    single, double = (
        corrupt(x[:1].to(dtype), name, 3, benchmark="cifar", generator=np.random.RandomState(3))
        for dtype in (torch.float32, torch.float64)
    )
    assert (single - double).abs().mean() < 1e-3


def test_a_batch_of_legacy_draws_is_one_image_after_the_other():
    x = torch.rand(3, 1, 20, 24, generator=generator(), dtype=torch.float64)
    source = np.random.RandomState(4)
    one_by_one = torch.stack([corrupt(image, "fog", 2, generator=source) for image in x])
    torch.testing.assert_close(corrupt(x, "fog", 2, generator=np.random.RandomState(4)), one_by_one)


@pytest.mark.parametrize("name", ALL)
def test_takes_grey_images_of_any_size_and_leading_shape(name):
    x = torch.rand(2, 2, 1, 11, 8, generator=generator())
    for severity in (1, 5):
        done = corrupt(x, name, severity, generator=generator(1))
        assert done.shape == x.shape and done.isfinite().all()


@pytest.mark.parametrize("name", ("gaussian_noise", "defocus_blur", "fog", "contrast", "jpeg_compression"))
def test_severities_take_images_farther_away(name):
    x = torch.cat([tensor(picture(k, 64), torch.float32) for k in range(4)])
    far = [(corrupt(x, name, s, generator=generator()) - x).square().mean().item() for s in range(1, 6)]
    assert far == sorted(far) and far[4] > 1.5 * far[0]


def test_glass_copies_pixels_one_after_the_other():
    rng, side, shift = np.random.default_rng(0), 9, 2
    target = [h * side + w for h in range(side - shift, shift, -1) for w in range(side - shift, shift, -1)]
    moves = rng.integers(-shift, shift, (len(target), 2))
    source = np.array(target) + moves[:, 0] * side + moves[:, 1]
    values = list(range(side * side))
    for t, s in zip(target, source, strict=True):
        values[t] = values[s]
    assert _origins(torch.tensor(target), torch.from_numpy(source)[None], side * side)[0].tolist() == values


def test_alexnet_is_the_unit_of_the_mce():
    assert list(ALEXNET_ERRORS) == list(CORRUPTIONS) and set(NAMES) == set(ALL) == set(_FUNCTIONS)
    assert mean_corruption_error(ALEXNET_ERRORS) == pytest.approx(1)
    assert mean_corruption_error({name: [0.0, e, e, e, 2 * e] for name, e in ALEXNET_ERRORS.items()}) == pytest.approx(
        1
    )
    with pytest.raises(ValueError, match="snow"):
        mean_corruption_error({name: 0.5 for name in CORRUPTIONS if name != "snow"})


# Attacks


def linear(c=1, side=4, k=3, seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(c * side * side, k))


def test_fgsm_is_the_formula():
    model, x, y = linear(), torch.rand(5, 1, 4, 4, generator=generator()), torch.tensor([0, 1, 2, 0, 1])
    probabilities = model(x).softmax(1)
    # the gradient of a linear model's cross-entropy: (p - onehot) W
    gradient = ((probabilities - F.one_hot(y, 3)) @ model[1].weight).view_as(x)
    expected = (x + 0.05 * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(fgsm(model, x, y, 0.05), expected.detach())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_pgd_stays_in_its_ball_and_beats_fgsm():
    model = small_vit()
    x, y = torch.rand(8, 3, 16, 16, generator=generator()), torch.arange(8) % 5

    def loss(z):
        return F.cross_entropy(model(z), y).item()

    for options in ({}, {"random_start": True, "generator": generator(1)}, {"step_size": 0.05}):
        adversarial = pgd(model, x, y, 0.02, **options)
        assert (adversarial - x).abs().max() <= 0.02 + 1e-6 and adversarial.min() >= 0 and adversarial.max() <= 1
    assert loss(pgd(model, x, y, 0.02, steps=8, step_size=0.01)) > loss(fgsm(model, x, y, 0.02)) > loss(x)
    assert loss(pgd(model, x, y, 0.02, targeted=True)) < loss(x)
    assert torch.equal(pgd(model, x, y, 0.0), x)
    single = pgd(model, x[:1], y[:1], 0.02)
    torch.testing.assert_close(single, pgd(model, x, y, 0.02)[:1], rtol=0, atol=1e-5)


def test_normalized_wants_images_between_0_and_1():
    model = small_vit()
    torch.testing.assert_close(
        Normalized(model)(torch.full((1, 3, 16, 16), 0.5)),
        model(
            (0.5 - torch.tensor([0.485, 0.456, 0.406]))
            .div(torch.tensor([0.229, 0.224, 0.225]))
            .view(1, 3, 1, 1)
            .expand(1, 3, 16, 16)
        ),
    )
    with pytest.raises(ValueError, match="Normalized"):
        fgsm(model, torch.full((1, 3, 16, 16), -1.0), torch.tensor([0]))


def test_turning_and_shifting():
    x = torch.rand(2, 3, 8, 8, generator=generator())
    assert rotate_and_shift(x, 0) is x
    torch.testing.assert_close(rotate_and_shift(x, 90), torch.rot90(x, 1, (2, 3)), rtol=0, atol=1e-5)
    moved = rotate_and_shift(x, 0, down=0.25, right=-0.125)
    torch.testing.assert_close(moved[:, :, 2:, :-1], x[:, :, :-2, 1:], rtol=0, atol=1e-5)
    assert moved[:, :, :2].abs().max() < 1e-5 and moved[:, :, :, -1].abs().max() < 1e-5
    wide = torch.rand(1, 1, 8, 4, generator=generator())
    torch.testing.assert_close(rotate_and_shift(wide, 180), wide.flip(2, 3), rtol=0, atol=1e-5)


def test_spatial_attack_takes_the_worst_point_of_the_grid():
    model = small_vit()
    x, y = torch.rand(6, 3, 16, 16, generator=generator()), torch.arange(6) % 5
    assert torch.equal(spatial_attack(model, x, y, (0,), (0.0,)), x)
    angles, shifts = (-20, 0, 20), (-0.1, 0.1, 0.0)
    fooled = torch.zeros(6, dtype=torch.bool)
    for angle in angles:
        for down in shifts:
            for right in shifts:
                fooled |= model(rotate_and_shift(x, angle, down, right)).argmax(1) != y
    attacked = spatial_attack(model, x, y, angles, shifts)
    assert torch.equal(model(attacked).argmax(1) != y, fooled)


def test_transfer_is_clean_without_an_attack_and_hits_its_own_model_hardest():
    models = {"a": linear(3, 16, 5), "b": linear(3, 16, 5, seed=2)}
    x = torch.rand(20, 3, 16, 16, generator=generator())
    y = models["a"](x).argmax(1)
    nothing = transfer_matrix(models, x, y, lambda model, x, y: x, batch_size=7)
    assert nothing["a"]["a"] == nothing["b"]["a"] == 1.0 and nothing["a"]["b"] == robust_accuracy(models["b"], x, y)
    matrix = transfer_matrix(models, x, y, lambda model, x, y: pgd(model, x, y, 0.05))
    assert matrix["a"]["a"] < matrix["b"]["a"]


def test_shape_bias_counts_decisions():
    found = shape_bias(torch.tensor([0, 0, 1, 3]), torch.tensor([0, 1, 2, 0]), torch.tensor([1, 0, 1, 2]))
    assert found == {"shape_bias": 1 / 3, "shape": 0.25, "texture": 0.5, "neither": 0.25}
    with pytest.raises(ValueError, match="same shape and texture"):
        shape_bias(torch.tensor([0]), torch.tensor([1]), torch.tensor([1]))


def test_predictions_among_some_classes():
    logits = torch.tensor([[9.0, 1, 2, 3], [0, 5, 4, 9]])
    assert restricted_predictions(logits, [1, 2]).tolist() == [2, 1]
    with pytest.raises(ValueError, match="classes"):
        restricted_predictions(logits, [4])


# Surgery


def by_hand(model, x, removed):
    """The blocks one by one, without those that ``removed(i)`` names among "block", "attn" and "mlp"."""
    x = model.embed(x)
    for i, block in enumerate(model.blocks):
        if "block" in removed(i):
            continue
        if "attn" not in removed(i):
            x = x + block.attn(block.norm1(x))
        if "mlp" not in removed(i):
            x = x + block.mlp(block.norm2(x))
    return model.forward_head(model.norm(x))


@torch.no_grad()
def test_lesions_are_the_residual_stream_without_the_layer(images):
    model = small_vit()
    clean = model(images)
    cases = [
        ({"blocks": 1}, lambda i: ["block"] if i == 1 else []),
        ({"attn": -1, "mlp": [0, 2]}, lambda i: {3: ["attn"], 0: ["mlp"], 2: ["mlp"]}.get(i, [])),
        ({"blocks": ["blocks.2"], "attn": 0}, lambda i: {2: ["block"], 0: ["attn"]}.get(i, [])),
        ({"blocks": [2], "attn": 2}, lambda i: ["block"] if i == 2 else []),
        ({"blocks": range(4)}, lambda i: ["block"]),
    ]
    for options, removed in cases:
        with lesion(model, **options) as cut:
            torch.testing.assert_close(cut(images), by_hand(model, images, removed))
        assert torch.equal(model(images), clean)
    with lesion(model):
        assert torch.equal(model(images), clean)
    with pytest.raises(RuntimeError), lesion(model, blocks=0):
        raise RuntimeError
    assert torch.equal(model(images), clean)
    assert list(find_blocks(model)) == [f"blocks.{i}" for i in range(4)]
    for wrong, text in (({"blocks": 4}, "block is 4"), ({"mlp": "nowhere"}, "'nowhere' is no module")):
        with pytest.raises(ValueError, match=text), lesion(model, **wrong):
            pass


def attend_by_hand(model, x, mask, layers):
    x = model.embed(x)
    for i, block in enumerate(model.blocks):
        q, k, v = block.attn.heads(block.norm1(x))
        scores = q @ k.transpose(-2, -1) * block.attn.scale
        if i in layers:
            scores = scores.masked_fill(~mask, float("-inf"))
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + block.attn.proj(out)
        x = x + block.mlp(block.norm2(x))
    return model.forward_head(model.norm(x))


@torch.no_grad()
@pytest.mark.parametrize("fused", (True, False))
def test_restricted_attention_is_a_mask_before_the_softmax(images, fused):
    model = small_vit()
    set_fused(model, fused)
    clean = model(images)
    for distance, layers in ((0, range(4)), (1, (0, 1)), (2.5, (3,))):
        mask = attention_mask((4, 4), distance)
        with restrict_attention(model, distance, layers=list(layers)):
            torch.testing.assert_close(model(images), attend_by_hand(model, images, mask, layers), rtol=1e-4, atol=1e-4)
        assert torch.equal(model(images), clean) and "forward" not in model.blocks[0].__dict__
    for distance in (3, None):
        with restrict_attention(model, distance):
            assert torch.equal(model(images), clean)
    with restrict_attention(model, patch_to_patch=False):
        alone = model(images)
    with restrict_attention(model, 0):
        assert torch.equal(model(images), alone)
    assert not torch.allclose(alone, clean)


def test_masks():
    for metric in ("chebyshev", "euclidean"):
        for distance in (0, 1, 1.5, 2):
            mask = attention_mask((3, 4), distance, metric=metric, num_prefix_tokens=2)
            assert mask[:2].all() and mask[:, :2].all() and mask.diagonal().all() and torch.equal(mask, mask.T)
            for i in range(12):
                for j in range(12):
                    dy, dx = abs(i // 4 - j // 4), abs(i % 4 - j % 4)
                    apart = max(dy, dx) if metric == "chebyshev" else (dy**2 + dx**2) ** 0.5
                    assert bool(mask[i + 2, j + 2]) == (apart <= distance)
    assert attention_mask((5, 5), 4).all() and not attention_mask((5, 5), 4, metric="euclidean").all()
    with pytest.raises(ValueError, match="max_distance"):
        attention_mask((2, 2), -1)


@torch.no_grad()
def test_pytorchs_own_encoder_can_be_cut_and_restricted():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    x = torch.rand(2, 5, 8)
    clean = model(x)
    mask = attention_mask((2, 2), 0)
    with restrict_attention(model, 0, grid=(2, 2)):
        restricted = model(x)
    torch.testing.assert_close(restricted, model(x, mask=~mask), rtol=1e-4, atol=1e-5)
    with lesion(model, attn=1, blocks=0) as cut:
        expected = model.layers[1]
        y = x + expected.linear2(expected.linear1(expected.norm2(x)).relu())
        torch.testing.assert_close(cut(x), model.layers[2](y))
    assert torch.equal(model(x), clean)
    with pytest.raises(ValueError, match="grid"), restrict_attention(model, 1):
        pass
    with pytest.raises(ValueError, match="over 10 tokens"), restrict_attention(model, 0, grid=(3, 3)):
        model(x)


def test_similarities():
    a = torch.rand(40, 6, generator=generator())
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator(1)))[0]
    assert linear_cka(a, a).item() == pytest.approx(1)
    assert linear_cka(a, 3 * a @ rotation + 1).item() == pytest.approx(1, abs=1e-5)
    b = torch.rand(40, 4, generator=generator(2))
    centre = torch.eye(40) - 1 / 40
    ka, kb = (centre @ v @ v.T @ centre for v in (a, b))
    # Kornblith et al.'s HSIC form
    assert linear_cka(a, b).item() == pytest.approx(((ka * kb).sum() / (ka.norm() * kb.norm())).item(), abs=1e-5)


@torch.no_grad()
def test_layer_similarity_compares_block_outputs(images):
    model = small_vit()
    outputs = block_outputs(model, images, batch_size=4)
    x = model.embed(images)
    for block, out in zip(model.blocks, outputs, strict=True):
        x = block(x)
        torch.testing.assert_close(out, x)
    for tokens, part in (("all", slice(None)), ("cls", slice(0, 1)), ("patches", slice(1, None))):
        found = layer_similarity(model, images, tokens=tokens)
        first, last = (outputs[i][:, part].flatten(0, 1) for i in (0, 3))
        first, last = (v - v.mean(0) for v in (first, last))
        expected = ((first * last).sum(1) / (first.norm(dim=1) * last.norm(dim=1))).mean()
        torch.testing.assert_close(found[0, 3], expected)
        assert torch.equal(found, found.T) and torch.equal(found.diagonal(), torch.ones(4))
    # the last block taken away: the one before is what it was
    with lesion(model, blocks=3):
        torch.testing.assert_close(layer_similarity(model, images, kind="cka")[3, 2], torch.tensor(1.0))


# Models


def test_official_layouts_of_bit_load():
    net = BiTResNet((1, 2), widths=(16, 32), groups=4, num_classes=3)
    for name, parameter in net.named_parameters():
        nn.init.normal_(parameter, std=0.5 if "norm" in name else 0.1)
    state = net.state_dict()
    official, arrays = {}, {}
    for key, value in state.items():
        if key.startswith("stages"):
            _, s, _, b, layer, *rest = key.split(".")
            kind = rest[-1]
            number = layer[-1]
            place = f"block{int(s) + 1}.unit{int(b) + 1:02d}"
            official[
                f"module.body.{place}.{layer.replace('norm', 'gn') if layer != 'downsample' else layer}.{kind}"
            ] = value
            place = "resnet/" + place.replace(".", "/")
            if layer == "downsample":
                arrays[f"{place}/a/proj/standardized_conv2d/kernel"] = value.permute(2, 3, 1, 0)
            elif layer.startswith("conv"):
                arrays[f"{place}/{'abc'[int(number) - 1]}/standardized_conv2d/kernel"] = value.permute(2, 3, 1, 0)
            else:
                last = {"weight": "gamma", "bias": "beta"}[kind]
                arrays[f"{place}/{'abc'[int(number) - 1]}/group_norm/{last}"] = value
        elif key.startswith("stem"):
            official["module.root.conv.weight"] = value
            arrays["resnet/root_block/standardized_conv2d/kernel"] = value.permute(2, 3, 1, 0)
        elif key.startswith("norm"):
            official[key.replace("norm", "module.head.gn")] = value
            arrays["resnet/group_norm/" + ("gamma" if key.endswith("weight") else "beta")] = value
        else:
            official[key.replace("head.fc", "module.head.conv")] = value
            weight = key.endswith("weight")
            arrays["resnet/head/conv2d/" + ("kernel" if weight else "bias")] = (
                value.permute(2, 3, 1, 0) if weight else value
            )
    for given in (official, arrays, {f"module.{key}": value for key, value in state.items()}):
        converted = BiTResNet.convert_state_dict(given)
        assert converted.keys() == state.keys()
        assert all(torch.equal(converted[key], state[key]) for key in state)
    assert list(BiTResNet.convert_state_dict({"stranger.key": torch.ones(1)})) == ["stranger.key"]


def test_bit_is_what_its_parts_say():
    net = BiTResNet((1, 1), widths=(16, 32), groups=4, num_classes=3, small_stem=True)
    x = torch.rand(2, 3, 8, 8, generator=generator())
    assert net(x).abs().max() == 0 and net.get_classifier() is net.head.fc
    weight = net.stem.conv.weight
    mean, var = weight.mean((1, 2, 3), keepdim=True), weight.var((1, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(net.stem(x), F.conv2d(x, (weight - mean) / var.sqrt(), padding=1), rtol=1e-4, atol=1e-5)
    features = net.forward_head(net.forward_features(x), pre_logits=True)
    net.reset_classifier(0)
    torch.testing.assert_close(net(x), features)
    net.reset_classifier(7)
    assert copy.deepcopy(net)(x).shape == (2, 7) and room.study_vit("B/32", img_size=64, num_classes=2)(
        torch.rand(1, 3, 64, 64)
    ).shape == (1, 2)
