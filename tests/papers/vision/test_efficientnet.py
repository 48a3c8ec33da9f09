"""EfficientNet against the paper's tables, closed forms and its own other layouts."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from saigen.measure import buffers, macs, parameters
from saigen.nn.conv import Conv2dSame, conv2d, same_padding
from saigen.nn.efficientnet_blocks import DepthwiseSeparable, MBConv, SqueezeExcite
from saigen.papers.vision import efficientnet
from saigen.papers.vision.efficientnet import (
    VARIANTS,
    EfficientNet,
    RMSpropTF,
    Scale,
    claims,
    compound_scale,
    convert_tensorflow,
    round_filters,
    round_repeats,
    search_scaling,
    tf_efficientnet_b0,
)
from saigen.trial import Trial

# stem, repeats, channels, head after rounding (official code)
SHAPES = {
    "b0": (32, (1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320), 1280),
    "b1": (32, (2, 3, 3, 4, 4, 5, 2), (16, 24, 40, 80, 112, 192, 320), 1280),
    "b2": (32, (2, 3, 3, 4, 4, 5, 2), (16, 24, 48, 88, 120, 208, 352), 1408),
    "b3": (40, (2, 3, 3, 5, 5, 6, 2), (24, 32, 48, 96, 136, 232, 384), 1536),
    "b4": (48, (2, 4, 4, 6, 6, 8, 2), (24, 32, 56, 112, 160, 272, 448), 1792),
    "b5": (48, (3, 5, 5, 7, 7, 9, 3), (24, 40, 64, 128, 176, 304, 512), 2048),
    "b6": (56, (3, 6, 6, 8, 8, 11, 3), (32, 40, 72, 144, 200, 344, 576), 2304),
    "b7": (64, (4, 7, 7, 10, 10, 13, 4), (32, 48, 80, 160, 224, 384, 640), 2560),
    "b8": (72, (4, 8, 8, 11, 11, 15, 4), (32, 56, 88, 176, 248, 424, 704), 2816),
    "l2": (136, (6, 11, 11, 16, 16, 22, 6), (72, 104, 176, 344, 480, 824, 1376), 5504),
}
# trainable parameters, with BN statistics, MACs at 224
COUNTS = {
    "b0": (5_288_548, 5_330_564, 385_814_752),
    "b1": (7_794_184, 7_856_232, 569_651_680),
    "b2": (9_109_994, 9_177_562, 658_963_440),
    "b3": (12_233_232, 12_320_528, 962_708_240),
    "b4": (19_341_616, 19_466_816, 1_503_710_432),
    "b5": (30_389_784, 30_562_520, 2_356_493_184),
    "b6": (43_040_704, 43_265_136, 3_360_166_848),
    "b7": (66_347_960, 66_658_680, 5_169_865_152),
    "b8": (87_413_142, 87_793_174, None),
    "l2": (480_309_308, 481_399_996, None),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_and_counts_of_the_tables(variant):
    with torch.device("meta"):
        model = getattr(efficientnet, f"tf_efficientnet_{variant}")()
    stem, repeats, channels, head = SHAPES[variant]
    assert model.conv_stem.out_channels == stem
    assert tuple(len(stage) for stage in model.blocks) == repeats
    outs = [stage[-1].conv_pw if i == 0 else stage[-1].conv_pwl for i, stage in enumerate(model.blocks)]
    assert tuple(layer.out_channels for layer in outs) == channels
    assert model.num_features == head
    trainable, with_statistics, at_224 = COUNTS[variant]
    assert parameters(model) == trainable
    assert parameters(model) + buffers(model) == with_statistics
    if at_224:
        assert macs(model, (3, 224, 224)) == at_224


def test_compound_scaling():
    assert compound_scale(0) == Scale(1, 1, 1)
    assert compound_scale(1).cost == pytest.approx(1.92027)
    assert compound_scale(3).cost == pytest.approx(1.92027**3)
    assert compound_scale(2, 2.0, 1.0, 1.0) == Scale(4, 1, 1)
    assert round_filters(32, 1.0) == 32
    assert round_filters(16, 1.2) == 24  # 16 would be under 90 % of 19.2
    assert round_filters(3, 1.0) == 8
    assert round_repeats(4, 3.1) == 13
    for wrong, text in (
        (lambda: compound_scale(1, beta=0.9), "beta is 0.9"),
        (lambda: round_filters(32, 0), "width is 0"),
        (lambda: round_repeats(3, -1.0), "depth is -1.0"),
    ):
        with pytest.raises(ValueError, match=text):
            wrong()


def test_search_finds_the_best_scale_under_the_constraint():
    def score(scale):
        return -((scale.depth - 1.2) ** 2) - (scale.width - 1.1) ** 2 - (scale.resolution - 1.15) ** 2

    best, scores = search_scaling(score)
    assert best == pytest.approx((1.2, 1.1, 1.15))
    assert all(abs(scale.cost - 2) <= 0.1 + 1e-9 for scale in scores)
    assert (
        len(scores)
        == sum(abs(a * b * b * c * c - 2) <= 0.1 + 1e-9 for a in _grid() for b in _grid() for c in _grid())
        > 50
    )
    with pytest.raises(ValueError, match="none of its points"):
        search_scaling(score, grid=(1.0, 1.01))
    with pytest.raises(ValueError, match="grid is"):
        search_scaling(score, grid=(0.9, 1.1))


def _grid():
    return [1 + 0.05 * i for i in range(21)]


@pytest.mark.parametrize("size", range(5, 20))
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 2, 1), (5, 2, 1), (3, 1, 1), (3, 1, 2), (1, 2, 1), (2, 3, 1)]
)
def test_same_padding_is_tensorflows(size, kernel, stride, dilation):
    # the definition, written as the window that TensorFlow places: the first reaches `before` cells over the edge
    before, after = same_padding(size, kernel, stride, dilation)
    outputs = math.ceil(size / stride)
    reach = (outputs - 1) * stride + dilation * (kernel - 1) + 1
    assert before + size + after == max(reach, size)
    assert 0 <= after - before <= 1
    layer = Conv2dSame(1, 1, kernel, stride, dilation, bias=False)
    x = torch.rand(1, 1, size, size + 3)
    y = layer(x)
    assert y.shape == (1, 1, outputs, math.ceil((size + 3) / stride))
    taps = [
        layer.weight[0, 0, i, j] * x[0, 0, r, c]
        for i in range(kernel)
        for j in range(kernel)
        if 0 <= (r := stride - before + dilation * i) < size
        and 0 <= (c := stride - same_padding(size + 3, kernel, stride, dilation)[0] + dilation * j) < size + 3
    ]
    if outputs > 1:
        assert torch.allclose(y[0, 0, 1, 1], sum(taps), atol=1e-6)


def test_conv_factory():
    assert type(conv2d(3, 8, 3, 1, padding="same")) is torch.nn.Conv2d
    assert type(conv2d(3, 8, 3, 2, padding="same")) is Conv2dSame
    for size in (7, 8):
        assert conv2d(3, 8, 5, 2, padding="symmetric")(torch.zeros(1, 3, size, size)).shape[2] == 4
    with pytest.raises(ValueError, match="padding is 'valid'"):
        conv2d(3, 8, 3, padding="valid")
    with pytest.raises(ValueError, match="kernel_size is 4"):
        conv2d(3, 8, 4)


def test_squeeze_excite_is_its_formula():
    layer = SqueezeExcite(6, 2).double()
    x = torch.rand(2, 6, 3, 4, dtype=torch.float64)
    s = x.mean((2, 3))
    hidden = s @ layer.conv_reduce.weight[:, :, 0, 0].T + layer.conv_reduce.bias
    hidden = hidden / (1 + (-hidden).exp())
    gate = 1 / (1 + (-(hidden @ layer.conv_expand.weight[:, :, 0, 0].T + layer.conv_expand.bias)).exp())
    assert torch.allclose(layer(x), x * gate[:, :, None, None], atol=1e-14)


def test_squeeze_is_relative_to_the_input_and_skips_need_equal_shapes():
    block = MBConv(16, 16, expansion=6)
    assert block.se.conv_reduce.out_channels == 4 and block.has_skip
    assert not MBConv(16, 16, stride=2).has_skip and not MBConv(16, 24).has_skip
    assert isinstance(MBConv(16, 16, se_ratio=0).se, torch.nn.Identity)
    block = DepthwiseSeparable(16, 16).eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 16, 5, 5)
    assert torch.equal(block(x), x)
    with pytest.raises(ValueError, match="expansion is 0"):
        MBConv(16, 16, expansion=0)


def test_drop_path_grows_linearly_from_zero():
    model = EfficientNet(0.25)
    rates = [block.drop_path.drop_probability for stage in model.blocks for block in stage]
    assert rates == pytest.approx([0.2 * i / 16 for i in range(16)])


def test_initial_weights_have_the_official_spread():
    torch.manual_seed(0)
    model = tf_efficientnet_b0()
    for name, fan_out in (("conv_stem", 9 * 32), ("blocks.5.1.conv_pw", 1152), ("blocks.5.1.conv_dw", 25)):
        weight = model.get_submodule(name).weight
        assert weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1)
    assert not model.blocks[1][0].se.conv_reduce.bias.any() and not model.classifier.bias.any()
    assert model.classifier.weight.abs().max().item() == pytest.approx(1000**-0.5, rel=0.01)


def small(**options):
    torch.manual_seed(0)
    return EfficientNet(0.5, 1.1, num_classes=7, **options).eval()


def test_features_head_and_classifier():
    model = small()
    x = torch.rand(2, 3, 67, 96)
    maps = model.forward_pyramid(x)
    assert [tuple(m.shape[2:]) for m in maps] == [(34, 48), (17, 24), (9, 12), (5, 6), (3, 3)]
    assert tuple(m.shape[1] for m in maps) == model.feature_channels
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 3, 3)
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.allclose(pooled, features.mean((2, 3)))
    assert torch.equal(model(x), model.get_classifier()(pooled))
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled) and model.num_classes == 0
    model.reset_classifier(4)
    assert model(x).shape == (2, 4)
    assert model.default_cfg["input_size"] == (3, 224, 224)
    with pytest.raises(ValueError, match="x has 1 channels"):
        model(x[:, :1])


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"in_chans": 0}, "in_chans is 0"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"drop_rate": 1.0}, "drop_rate is 1.0"),
        ({"drop_path_rate": -0.1}, "drop_path_rate is -0.1"),
        ({"padding": "full"}, "padding is 'full'"),
        ({"width": 0.0}, "width is 0.0"),
    ],
)
def test_wrong_arguments(wrong, text):
    with pytest.raises(ValueError, match=text):
        EfficientNet(**wrong)


def as_tensorflow(model, name="efficientnet-b0"):
    """What the official code would have saved: its names and layouts, with shadows and optimizer slots beside them."""
    arrays = {"global_step": np.array(7), f"{name}/stem/conv2d/kernel/RMSProp": np.zeros(3)}

    def kernel(scope, layer, depthwise=False):
        weight = layer.weight.detach().numpy()
        if depthwise:
            arrays[f"{scope}/depthwise_kernel"] = weight.transpose(2, 3, 0, 1)
        elif weight.ndim == 4:
            arrays[f"{scope}/kernel"] = weight.transpose(2, 3, 1, 0)
        else:
            arrays[f"{scope}/kernel"] = weight.T
        if layer.bias is not None:
            arrays[f"{scope}/bias"] = layer.bias.detach().numpy()

    def norm(scope, layer):
        for theirs, ours in (
            ("gamma", layer.weight),
            ("beta", layer.bias),
            ("moving_mean", layer.running_mean),
            ("moving_variance", layer.running_var),
        ):
            arrays[f"{scope}/{theirs}"] = ours.detach().numpy()

    bn = "tpu_batch_normalization"
    kernel(f"{name}/stem/conv2d", model.conv_stem)
    norm(f"{name}/stem/{bn}", model.bn1)
    for i, block in enumerate(block for stage in model.blocks for block in stage):
        scope = f"{name}/blocks_{i}"
        kernel(f"{scope}/depthwise_conv2d", block.conv_dw, depthwise=True)
        kernel(f"{scope}/se/conv2d", block.se.conv_reduce)
        kernel(f"{scope}/se/conv2d_1", block.se.conv_expand)
        if isinstance(block, MBConv):
            kernel(f"{scope}/conv2d", block.conv_pw)
            kernel(f"{scope}/conv2d_1", block.conv_pwl)
            norm(f"{scope}/{bn}", block.bn1), norm(f"{scope}/{bn}_1", block.bn2), norm(f"{scope}/{bn}_2", block.bn3)
        else:
            kernel(f"{scope}/conv2d", block.conv_pw)
            norm(f"{scope}/{bn}", block.bn1), norm(f"{scope}/{bn}_1", block.bn2)
    kernel(f"{name}/head/conv2d", model.conv_head)
    norm(f"{name}/head/{bn}", model.bn2)
    kernel(f"{name}/head/dense", model.classifier)
    return arrays


def trained(model):
    """Statistics and biases that differ from layer to layer."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.copy_(0.5 + torch.rand(tensor.shape))
    return model


def test_tensorflow_names_and_layouts():
    model = trained(small())
    arrays = as_tensorflow(model)
    converted = convert_tensorflow(arrays)
    assert {key: value.shape for key, value in converted.items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    other = small()
    other.load_state_dict(converted)
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(other(x), model(x))

    key = "efficientnet-b0/head/dense/bias"
    arrays[f"{key}/ExponentialMovingAverage"] = arrays[key] + 1
    assert torch.equal(convert_tensorflow(arrays)["classifier.bias"], model.classifier.bias + 1)
    assert torch.equal(convert_tensorflow(arrays, ema=False)["classifier.bias"], model.classifier.bias)
    tensors = {key: torch.tensor(value) for key, value in arrays.items()}
    assert torch.equal(EfficientNet.convert_state_dict(tensors)["classifier.bias"], model.classifier.bias + 1)


def as_efficientnet_pytorch(model):
    """The one-list layout, from ours; its checkpoints have no step counters."""
    state, index = {}, 0
    inner = {
        True: {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
        | {"conv_pwl": "_project_conv", "bn3": "_bn2"},
        False: {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"},
    }
    for stage in model.blocks:
        for block in stage:
            for key, value in block.state_dict().items():
                layer, _, kind = key.rpartition(".")
                layer = {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}.get(
                    layer, inner[isinstance(block, MBConv)].get(layer)
                )
                state[f"_blocks.{index}.{layer}.{kind}"] = value
            index += 1
    for ours, theirs in (("conv_stem", "_conv_stem"), ("bn1", "_bn0"), ("conv_head", "_conv_head"), ("bn2", "_bn1")):
        state |= {f"{theirs}.{kind}": value for kind, value in model.get_submodule(ours).state_dict().items()}
    state |= {f"_fc.{kind}": value for kind, value in model.classifier.state_dict().items()}
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def test_efficientnet_pytorch_layout_and_prefixes():
    model = trained(small())
    x = torch.rand(2, 3, 64, 64)
    for state in (as_efficientnet_pytorch(model), model.state_dict()):
        for prefix in ("", "module.", "backbone."):
            other = small()
            other.load_state_dict(EfficientNet.convert_state_dict({prefix + key: state[key] for key in state}))
            assert torch.equal(other(x), model(x))
    assert EfficientNet.convert_state_dict({"odd": x})["odd"] is x


def test_rmsprop_by_hand():
    p = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = RMSpropTF([p], lr=0.1, weight_decay=0.5)
    s, m, value = 1.0, 0.0, 2.0
    for g in (3.0, -1.0, 0.5):
        p.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
        g += 0.5 * value
        s = 0.9 * s + 0.1 * g * g
        m = 0.9 * m + 0.1 * g / math.sqrt(s + 1e-3)
        value -= m
        assert p.item() == pytest.approx(value, rel=1e-12)
    for wrong, text in (({"lr": -1}, "lr is -1"), ({"alpha": 2}, "alpha is 2"), ({"eps": 0}, "eps is 0")):
        with pytest.raises(ValueError, match=text):
            RMSpropTF([p], **wrong)


def test_trains_on_a_batch():
    stages = efficientnet.model.B0_STAGES[:3]
    model = EfficientNet(0.5, stages=stages, head_channels=64, num_classes=3, drop_rate=0.0, bn_momentum=0.1).train()
    x, y = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    optimizer = RMSpropTF(model.parameters(), lr=0.003)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


# --- claims --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["tiny", "laptop", "real"])
def test_arms_cost_four_times_the_base(scale):
    size = claims.SIZES[scale]
    channels = 3 if size.images == "images" else 1
    assert set(size.arms) == {"depth", "width", "resolution", "compound"}
    claims._costs(size, channels)
    wider = dataclasses.replace(size, arms=size.arms | {"width": (1.0, 2.6, size.base_resolution)})
    with pytest.raises(ValueError, match="width_macs is"):
        claims._costs(wider, channels)


def test_scenes_are_a_function_of_the_generator_and_carry_the_digit():
    digits = Trial(1000).data("digits").subset(range(40))
    one = claims.scenes(digits, 6, 32, Trial(1000).generator("a"))
    two = claims.scenes(digits, 6, 32, Trial(1000).generator("a"))
    assert one.x.shape == (6, 1, 32, 32) and torch.equal(one.x, two.x) and torch.equal(one.y, two.y)
    assert not torch.equal(one.x, claims.scenes(digits, 6, 32, Trial(1001).generator("a")).x)
    # a digit placed alone keeps its ink: mean level over the picture, times the share of the side squared
    placed = claims._place(torch.ones(50, 1, 8, 8), 64, torch.Generator().manual_seed(0))
    side = placed.mean((1, 2, 3)).sqrt()
    assert side.min() > 0.38 and side.max() < 0.82 and side.std() > 0.08


def test_tiny_claims_return_the_quantities():
    values = claims.joint_scaling_beats_single(Trial(1000, "tiny"))
    assert values["over_width"] == values["compound"] - values["width"]
    assert {"depth", "width", "resolution", "compound", "over_depth", "over_resolution", "compound_rate"} <= set(values)
    assert claims.b7_is_smaller_than_gpipe(Trial(1000, "tiny"))["parameter_ratio"] == pytest.approx(8.4, abs=0.05)


def test_the_full_recipe_runs_on_a_folder_of_images(tmp_path, monkeypatch):
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (40 + i, 60, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    arms = dict.fromkeys(claims.SIZES["full"].arms, (1.0, 0.5, 20))
    stages = efficientnet.model.B0_STAGES[:2]
    small = dataclasses.replace(claims.SIZES["full"], base_resolution=16, stages=stages, batch=4, epochs=1, arms=arms)
    monkeypatch.setitem(claims.SIZES, "full", small)
    values = claims.joint_scaling_beats_single(Trial(1000, "full", data_path=tmp_path))
    assert all(0 <= values[arm] <= 1 for arm in arms)
    with pytest.raises(ValueError, match="needs data of yours"):
        claims.joint_scaling_beats_single(Trial(1000, "full"))


def test_the_staircase_is_the_official_one():
    factor = claims._staircase(100)
    assert (
        factor(0, 0) == 0 and factor(250, 0) == pytest.approx(0.5 * 0.97) and factor(500, 0) == pytest.approx(0.97**2)
    )
    assert factor(2400, 0) == pytest.approx(0.97**10)
