"""EfficientNetV2 against the paper's tables, closed forms and its own other layouts; progressive learning by hand."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saigen.measure import buffers, macs, parameters
from saigen.nn.efficientnet_blocks import FusedConv, FusedMBConv, MBConv
from saigen.papers.vision import efficientnet_v2
from saigen.papers.vision.efficientnet_v2 import (
    PAPER_SCHEDULES,
    RELEASE_SCHEDULES,
    STAGES,
    VARIANTS,
    EfficientNetV2,
    ProgressiveLearning,
    ProgressiveSchedule,
    claims,
    convert_tensorflow_v2,
    fused,
    fused_mac_ratio,
    mixup_cutmix,
    plain,
    release_size,
    resize,
    round_width,
    set_dropout,
)

# stem, repeats, channels, head (official block arguments)
SHAPES = {
    "b0": (32, (1, 2, 2, 3, 5, 8), (16, 32, 48, 96, 112, 192), 1280),
    "b1": (32, (2, 3, 3, 4, 6, 9), (16, 32, 48, 96, 112, 192), 1280),
    "b2": (32, (2, 3, 3, 4, 6, 10), (16, 32, 56, 104, 120, 208), 1408),
    "b3": (40, (2, 3, 3, 5, 7, 12), (16, 40, 56, 112, 136, 232), 1536),
    "s": (24, (2, 4, 4, 6, 9, 15), (24, 48, 64, 128, 160, 256), 1280),
    "m": (24, (3, 5, 5, 7, 14, 18, 5), (24, 48, 80, 160, 176, 304, 512), 1280),
    "l": (32, (4, 7, 7, 10, 19, 25, 7), (32, 64, 96, 192, 224, 384, 640), 1280),
    "xl": (32, (4, 8, 8, 16, 24, 32, 8), (32, 64, 96, 192, 256, 512, 640), 1280),
}
# trainable parameters, with BN statistics, MACs at 224
COUNTS = {
    "b0": (7_139_704, 7_200_312, 0.7181e9),
    "b1": (8_141_052, 8_212_124, 1.0159e9),
    "b2": (10_096_086, 10_178_374, 1.1688e9),
    "b3": (14_358_406, 14_467_622, 1.6100e9),
    "s": (21_458_488, 21_612_360, 2.8499e9),
    "m": (54_139_356, 54_431_388, 5.3622e9),
    "l": (118_515_272, 119_027_848, 12.2312e9),
    "xl": (208_119_808, 208_896_832, 17.9016e9),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_and_counts_of_the_tables(variant):
    with torch.device("meta"):
        model = getattr(efficientnet_v2, f"tf_efficientnetv2_{variant}")()
    stem, repeats, channels, head = SHAPES[variant]
    assert model.conv_stem.out_channels == stem
    assert tuple(len(stage) for stage in model.blocks) == repeats
    kinds = [type(stage[0]) for stage in model.blocks]
    assert kinds == [FusedConv, FusedMBConv, FusedMBConv] + [MBConv] * (len(repeats) - 3)
    last = [stage[-1].conv if isinstance(stage[-1], FusedConv) else stage[-1].conv_pwl for stage in model.blocks]
    assert tuple(layer.out_channels for layer in last) == channels
    assert model.num_features == head
    trainable, with_statistics, at_224 = COUNTS[variant]
    assert parameters(model) == trainable
    assert parameters(model) + buffers(model) == with_statistics
    assert macs(model, (3, 224, 224)) == pytest.approx(at_224, rel=1e-4)


def test_default_configuration_has_both_sizes():
    with torch.device("meta"):
        s, b3 = efficientnet_v2.efficientnetv2_s(), efficientnet_v2.efficientnetv2_b3()
    assert s.default_cfg["input_size"] == (3, 300, 300) and s.default_cfg["test_input_size"] == (3, 384, 384)
    assert s.default_cfg["mean"] == (0.5, 0.5, 0.5) and s.default_cfg["crop_pct"] == 1.0
    assert b3.default_cfg["mean"] == (0.485, 0.456, 0.406) and b3.default_cfg["crop_pct"] == pytest.approx(0.904)


def test_a_fused_block_holds_the_linear_mbconv():
    """Without norms and activations between, 1x1 expansion and depthwise 3x3 are one dense 3x3."""
    torch.manual_seed(0)
    expand, depth = nn.Conv2d(5, 20, 1, bias=False), nn.Conv2d(20, 20, 3, 1, 1, groups=20, bias=False)
    block = FusedMBConv(5, 7, expansion=4)
    with torch.no_grad():
        block.conv_exp.weight.copy_(expand.weight * depth.weight)
    x = torch.randn(2, 5, 9, 8)
    assert torch.allclose(block.conv_exp(x), depth(expand(x)), atol=1e-6)


def test_fused_blocks_by_their_formula():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8, 8)
    block = FusedMBConv(6, 6, expansion=4, se_ratio=0.5).eval()
    inner = F.silu(block.bn1(F.conv2d(x, block.conv_exp.weight, padding=1)))
    assert torch.allclose(block(x), x + block.bn2(block.conv_pwl(block.se(inner))), atol=1e-6)
    assert block.se.conv_reduce.out_channels == 3
    one = FusedConv(6, 6).eval()
    assert torch.allclose(one(x), x + F.silu(one.bn1(F.conv2d(x, one.conv.weight, padding=1))), atol=1e-6)
    assert [name for name, _ in one.named_children()] == ["conv", "bn1", "drop_path"]
    assert not FusedConv(6, 8).has_skip and not FusedMBConv(6, 6, stride=2).has_skip
    # only a skip can be dropped
    always = FusedMBConv(6, 6, drop_path=0.99).train()
    assert (always(x) == x).any()


def test_closed_forms():
    for channels in (24, 48, 256):
        with torch.device("meta"):
            dense = FusedMBConv(channels, channels, expansion=4)
            thin = MBConv(channels, channels, expansion=4, se_ratio=0)
        counted = macs(dense, (channels, 8, 8)) / macs(thin, (channels, 8, 8))
        assert fused_mac_ratio(channels) == pytest.approx(counted, rel=1e-12)
    assert [round(fused_mac_ratio(c), 2) for c in (24, 48, 64, 256)] == [4.21, 4.57, 4.67, 4.91]
    assert round_width(16, 1.2) == 16 and round_width(3, 1.0) == 8 and round_width(20, 1.0) == 24
    with pytest.raises(ValueError, match="expansion is 0"):
        fused_mac_ratio(8, 0)
    with pytest.raises(ValueError, match="width is 0"):
        round_width(8, 0)


# --- progressive learning ---------------------------------------------------------------------------------------------


def test_algorithm_1_by_hand():
    schedule = ProgressiveSchedule(350, 4, (128, 380), (5, 25), (0, 0.5), (0, 0), (0.1, 0.5))
    assert schedule == PAPER_SCHEDULES["l"]
    table = schedule.table()
    assert [stage.size for stage in table] == [128, 212, 296, 380]
    assert [stage.rand_augment for stage in table] == pytest.approx([5, 35 / 3, 55 / 3, 25])
    assert [stage.mixup for stage in table] == pytest.approx([0, 1 / 6, 1 / 3, 0.5])
    assert [stage.dropout for stage in table] == pytest.approx([0.1, 0.7 / 3, 1.1 / 3, 0.5])
    assert [stage.first_epoch for stage in table] == [0, 87, 175, 262]
    assert sum(stage.epochs for stage in table) == 350
    for epoch in (0, 86, 87, 174, 349):
        stage = schedule.at(epoch)
        assert stage.first_epoch <= epoch < stage.first_epoch + stage.epochs
    assert ProgressiveSchedule(1, 1).table()[0].size == 300
    with pytest.raises(ValueError, match="epoch is 350"):
        schedule.at(350)


def test_the_released_schedule():
    assert [stage.size for stage in RELEASE_SCHEDULES["s"].table()] == [171, 214, 257, 300]
    assert [stage.size for stage in RELEASE_SCHEDULES["m"].table()] == [192, 256, 320, 384]
    assert [release_size("l", i) for i in range(4)] == [192, 256, 320, 384]
    assert [stage.rand_augment for stage in RELEASE_SCHEDULES["s"].table()] == pytest.approx([5, 20 / 3, 25 / 3, 10])
    assert [stage.rand_augment for stage in RELEASE_SCHEDULES["l"].table()] == pytest.approx([5, 10, 15, 20])
    assert {stage.dropout for stage in RELEASE_SCHEDULES["l"].table()} == {0.4}
    with torch.device("meta"):
        model = efficientnet_v2.tf_efficientnetv2_s()
    cost = RELEASE_SCHEDULES["s"].relative_cost(lambda side: macs(model, (3, side, side)))
    assert cost == pytest.approx(0.658, abs=1e-3)
    for variant in ("m", "l"):  # by pixels; counted in full, 0.598
        assert RELEASE_SCHEDULES[variant].relative_cost() == pytest.approx(0.598, abs=2e-3)
    with pytest.raises(ValueError, match="variant is 'b0'"):
        release_size("b0", 0)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"stages": 0}, "stages is 0"),
        ({"epochs": 3}, "epochs is 3"),
        ({"kind": "linear"}, "kind is 'linear'"),
        ({"size": (0, 32)}, "size is"),
        ({"dropout": (0.1, 1.0)}, "dropout is"),
        ({"mixup": (-0.1, 0.2)}, "mixup is"),
    ],
)
def test_wrong_schedules(wrong, text):
    with pytest.raises(ValueError, match=text):
        ProgressiveSchedule(**({"epochs": 8} | wrong))


def test_dropout_changes_in_place():
    ours = EfficientNetV2(0.25, 0.25, num_classes=3, drop_rate=0.0).train()
    anyones = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    before = [parameter.data_ptr() for parameter in ours.parameters()]
    set_dropout(ours, 0.9)
    set_dropout(anyones, 0.0)
    assert [parameter.data_ptr() for parameter in ours.parameters()] == before
    pooled = ours.forward_head(torch.ones(4, ours.num_features, 1, 1), pre_logits=True)
    assert 0.8 < (pooled == 0).float().mean() < 1.0
    x = torch.rand(2, 4)
    assert torch.equal(anyones(x), anyones[0](x))
    set_dropout(nn.Linear(2, 2), 0)
    with pytest.raises(ValueError, match="allowed is only rate 0"):
        set_dropout(nn.Linear(2, 2), 0.1)


def test_resizing_keeps_kind_and_constants():
    assert resize(torch.full((1, 3, 40, 40), 7, dtype=torch.uint8), 20).unique().tolist() == [7]
    x = torch.rand(2, 3, 24, 24)
    assert resize(x, 24) is x
    assert resize(x, 12).shape == (2, 3, 12, 12) and resize(x, 12).dtype == x.dtype
    with pytest.raises(ValueError, match="size is 0"):
        resize(x, 0)


def test_mixup_by_hand():
    x = torch.arange(4.0)[:, None, None, None].expand(4, 1, 2, 2)
    y = torch.eye(4)
    mixed, labels = mixup_cutmix(x, y, 0.4, 0.0, torch.Generator().manual_seed(0))
    own = labels.diagonal()
    assert (own >= 0.5).all() and len(own.unique()) == 4
    assert torch.allclose(labels.sum(1), torch.ones(4))
    expected = own * torch.arange(4.0) + (1 - own) * torch.arange(4.0).flip(0)
    assert torch.allclose(mixed[:, 0, 0, 0], expected)
    same = mixup_cutmix(x, y)
    assert same[0] is x and same[1] is y
    with pytest.raises(ValueError, match="cutmix is -1"):
        mixup_cutmix(x, y, 0.0, -1)


def test_cutmix_labels_are_areas():
    x = torch.arange(8.0)[:, None, None, None].expand(8, 3, 16, 12)
    mixed, labels = mixup_cutmix(x, torch.eye(8), 0.0, 1.0, torch.Generator().manual_seed(1))
    kept = (mixed == x).float().mean((1, 2, 3))
    assert torch.allclose(labels.diagonal(), kept)
    assert ((mixed == x) | (mixed == x.flip(0))).all() and 0 < kept.mean() < 1
    # what comes from the partner is one box
    for image, own in zip(mixed[:, 0], x[:, 0], strict=True):
        cut = image != own
        rows, columns = cut.any(1), cut.any(0)
        assert torch.equal(cut, rows[:, None] & columns[None])


def test_both_mixes_share_the_batch():
    x = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    y = torch.eye(6)
    _, labels = mixup_cutmix(x, y, 1.0, 1.0, torch.Generator().manual_seed(0))
    assert not labels[:3, 3:].any() and not labels[3:, :3].any()
    assert torch.allclose(labels.sum(1), torch.ones(6))


def test_batches_of_a_stage():
    schedule = ProgressiveSchedule(8, 4, (16, 32), (0, 10), (0, 0.4), dropout=(0.0, 0.3))
    progressive = ProgressiveLearning(schedule, num_classes=5)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.7))
    x, y = torch.rand(6, 3, 32, 32), torch.arange(6) % 5
    loader = [(x, y), (x, y)]
    seen = list(progressive.batches(loader, 0, model))
    assert len(seen) == 2 and seen[0][0].shape == (6, 3, 16, 16) and model[1].p == 0.0
    assert torch.equal(seen[0][1], F.one_hot(y, 5).float())  # nothing is mixed yet, but labels are soft throughout
    (images, labels), _ = progressive.batches(loader, 7, model, torch.Generator().manual_seed(0))
    assert images.shape == x.shape and model[1].p == pytest.approx(0.3) and progressive.augment.magnitude == 10
    assert ((labels > 0).sum(1) == 2).any()
    again = next(progressive.batches(loader, 7, model, torch.Generator().manual_seed(0)))
    assert torch.equal(again[0], images) and torch.equal(again[1], labels)
    levels = (x * 255).round().to(torch.uint8)
    assert next(progressive.batches([(levels, y)], 7))[0].dtype == torch.float32
    progressive.eval()
    assert progressive(x, y)[0] is x
    assert torch.equal(ProgressiveLearning(ProgressiveSchedule(4))(x, y)[1], y)
    with pytest.raises(ValueError, match="num_classes is None"):
        ProgressiveLearning(schedule)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def small():
    torch.manual_seed(0)
    stages = (fused(2, 1, 1, 16), fused(2, 2, 4, 24), plain(2, 2, 4, 40))
    model = EfficientNetV2(stages=stages, stem_channels=16, head_channels=64, num_classes=7).eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.copy_(0.5 + torch.rand(tensor.shape))
    return model


def as_tensorflow(model, name="efficientnetv2-s"):
    """What the official code would have saved: its names and layouts, with an optimizer slot beside them."""
    arrays = {"global_step": np.array(7), f"{name}/stem/conv2d/kernel/RMSProp": np.zeros(3)}
    bn = "tpu_batch_normalization"

    def put(scope, layer):
        if isinstance(layer, nn.BatchNorm2d):
            names = ("gamma", "beta", "moving_mean", "moving_variance")
            tensors = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
            arrays.update({f"{scope}/{n}": t.detach().numpy() for n, t in zip(names, tensors, strict=True)})
            return
        weight = layer.weight.detach().numpy()
        if weight.ndim == 4 and layer.groups > 1:
            arrays[f"{scope}/depthwise_kernel"] = weight.transpose(2, 3, 0, 1)
        else:
            arrays[f"{scope}/kernel"] = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T
        if layer.bias is not None:
            arrays[f"{scope}/bias"] = layer.bias.detach().numpy()

    put(f"{name}/stem/conv2d", model.conv_stem), put(f"{name}/stem/{bn}", model.bn1)
    put(f"{name}/head/conv2d", model.conv_head), put(f"{name}/head/{bn}", model.bn2)
    put(f"{name}/head/dense", model.classifier)
    for i, block in enumerate(block for stage in model.blocks for block in stage):
        scope = f"{name}/blocks_{i}"
        put(f"{scope}/{bn}", block.bn1)
        if isinstance(block, FusedConv):
            put(f"{scope}/conv2d", block.conv)
        elif isinstance(block, FusedMBConv):
            put(f"{scope}/conv2d", block.conv_exp), put(f"{scope}/conv2d_1", block.conv_pwl)
            put(f"{scope}/{bn}_1", block.bn2)
        else:
            put(f"{scope}/conv2d", block.conv_pw), put(f"{scope}/depthwise_conv2d", block.conv_dw)
            put(f"{scope}/se/conv2d", block.se.conv_reduce), put(f"{scope}/se/conv2d_1", block.se.conv_expand)
            put(f"{scope}/conv2d_1", block.conv_pwl)
            put(f"{scope}/{bn}_1", block.bn2), put(f"{scope}/{bn}_2", block.bn3)
    return arrays


def test_tensorflow_names_and_layouts():
    model = small()
    arrays = as_tensorflow(model)
    other = copy.deepcopy(model)
    nn.init.zeros_(other.classifier.weight)
    other.load_state_dict(convert_tensorflow_v2(arrays))
    x = torch.rand(2, 3, 32, 40)
    assert torch.equal(other(x), model(x))
    key = "efficientnetv2-s/head/dense/bias"
    arrays[f"{key}/ExponentialMovingAverage"] = arrays[key] + 1
    assert torch.equal(convert_tensorflow_v2(arrays)["classifier.bias"], model.classifier.bias + 1)
    assert torch.equal(convert_tensorflow_v2(arrays, ema=False)["classifier.bias"], model.classifier.bias)
    tensors = {name: torch.tensor(value) for name, value in arrays.items()}
    assert set(EfficientNetV2.convert_state_dict(tensors)) == set(model.state_dict())


def test_prefixes_and_unknown_keys():
    model = small()
    for prefix in ("module.", "backbone.", "model."):
        state = {prefix + key: value for key, value in model.state_dict().items()}
        assert set(EfficientNetV2.convert_state_dict(state)) == set(model.state_dict())
    assert "odd" in EfficientNetV2.convert_state_dict({"odd": torch.zeros(1)})


def test_features_head_and_classifier():
    model = small()
    x = torch.rand(2, 3, 64, 48)
    maps = model.forward_pyramid(x)
    assert tuple(m.shape[1] for m in maps) == model.feature_channels == (16, 24, 40)
    features = model.forward_features(x)
    assert torch.equal(model(x), model.get_classifier()(model.forward_head(features, pre_logits=True)))
    model.reset_classifier(0)
    assert model(x).shape == (2, 64)
    with pytest.raises(ValueError, match="x has 1 channels"):
        model(x[:, :1])
    with pytest.raises(ValueError, match="stages is"):
        EfficientNetV2(stages=())
    with pytest.raises(ValueError, match="padding is 'full'"):
        EfficientNetV2(padding="full")


def test_the_arms_of_the_claim_cost_what_they_should():
    schedule = claims.SIZES["laptop"].schedule
    short = claims.schedule_of("short", schedule, lambda side: side * side)
    fixed = claims.schedule_of("fixed", schedule, lambda side: side * side)
    assert fixed.epochs == schedule.epochs and fixed.relative_cost() == 1.0
    assert short.epochs / fixed.epochs == pytest.approx(schedule.relative_cost(), abs=0.5 / fixed.epochs)
    assert {stage.rand_augment for stage in fixed.table()} == {schedule.rand_augment[1]}
    assert claims.schedule_of("progressive", schedule, float) == schedule
    assert len(STAGES["s"]) == 6
