"""SegFormer against its paper's identities, brute-force formulas and the layouts it reads."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from saigen.papers.dense import segformer as room
from saigen.papers.dense.segformer import (
    MixTransformer,
    SegFormer,
    aligned_size,
    mit_b0,
    param_groups,
    poly_schedule,
    segformer_b0,
    segmentation_loss,
    sliding_window_logits,
)
from saigen.papers.dense.segformer.model import DECODER, DEPTHS, WIDTHS, EfficientSelfAttention, MixFFN

# Encoder with the stages' norms and without a classifier, classifier of 1000, segmenters of 150 and of 19 classes.
PARAMETERS = {
    "b0": (3_319_392, 3_576_392, 3_752_694, 3_719_027),
    "b1": (13_151_424, 13_664_424, 13_715_798, 13_682_131),
    "b2": (24_196_288, 24_709_288, 27_461_974, 27_361_235),
    "b3": (44_072_128, 44_585_128, 47_337_814, 47_237_075),
    "b4": (60_842_688, 61_355_688, 64_108_374, 64_007_635),
    "b5": (81_443_008, 81_956_008, 84_708_694, 84_607_955),
}


def small(num_classes: int = 5, **settings) -> SegFormer:
    torch.manual_seed(0)
    encoder = MixTransformer((8, 16, 24, 32), (1, 2, 1, 1), (1, 2, 3, 4), (4, 2, 2, 1), **settings)
    return SegFormer(encoder, num_classes, 16).eval()


def stirred(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model with larger random weights and running statistics, so that no term is near zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(0.0, 0.3, generator=generator)
    return model


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameters_of_every_variant(size):
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    with torch.device("meta"):
        classifier = getattr(room, f"mit_{size}")()
        segmenters = [getattr(room, f"segformer_{size}")(num_classes=k) for k in (150, 19)]
    assert (count(segmenters[0].backbone), count(classifier), *map(count, segmenters)) == PARAMETERS[size]


def test_shapes_at_512():
    with torch.device("meta"):
        model = segformer_b0().eval()
        x = torch.empty(1, 3, 512, 512)
    assert [tuple(c.shape) for c in model.forward_features(x)] == [
        (1, 32, 128, 128), (1, 64, 64, 64), (1, 160, 32, 32), (1, 256, 16, 16)
    ]  # fmt: skip
    assert model(x).shape == (1, 150, 128, 128)


def test_any_size_gives_rounded_up_maps():
    maps = small().forward_features(torch.rand(1, 3, 45, 70))
    assert [tuple(c.shape[2:]) for c in maps] == [(12, 18), (6, 9), (3, 5), (2, 3)]
    with pytest.raises(ValueError, match="17 or more"):
        small()(torch.rand(1, 3, 16, 70))
    assert small()(torch.rand(1, 3, 17, 17)).shape == (1, 5, 5, 5)
    with torch.device("meta"):
        assert segformer_b0().backbone.min_size == 29


def test_reduction_of_one_is_standard_attention():
    torch.manual_seed(0)
    ours = EfficientSelfAttention(12, 3, 1).double()
    theirs = nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.kv.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias.normal_(), ours.kv.bias.normal_()]))
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
        x = torch.randn(2, 20, 12, dtype=torch.float64)
        torch.testing.assert_close(ours(x, 4, 5), theirs(x, x, x, need_weights=False)[0], rtol=0, atol=1e-12)


def test_attention_equals_the_formula():
    """softmax(q k^T / sqrt(d)) v with keys and values of the reduced map, token by token."""
    torch.manual_seed(0)
    attention = stirred(EfficientSelfAttention(6, 2, 2).double())
    x = torch.randn(1, 5 * 4, 6, dtype=torch.float64)  # 5 x 4 tokens: the reduction drops the last row
    with torch.no_grad():
        grid = x.view(5, 4, 6)
        reduced = []
        for i in range(2):
            for j in range(2):
                patch = grid[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].permute(2, 0, 1)  # c, 2, 2
                reduced.append(torch.einsum("ochw,chw->o", attention.sr.weight, patch) + attention.sr.bias)
        reduced = F.layer_norm(torch.stack(reduced), (6,), attention.norm.weight, attention.norm.bias, 1e-5)
        q, kv = attention.q(x[0]), attention.kv(reduced)
        heads = []
        for h in (slice(0, 3), slice(3, 6)):
            weights = torch.softmax(q[:, h] @ kv[:, :6][:, h].T / math.sqrt(3), dim=-1)
            heads.append(weights @ kv[:, 6:][:, h])
        expected = attention.proj(torch.cat(heads, -1))
        torch.testing.assert_close(attention(x, 5, 4)[0], expected, rtol=0, atol=1e-12)


def test_centre_tap_makes_mix_ffn_a_plain_one():
    torch.manual_seed(0)
    mixed, plain = MixFFN(4, 16), MixFFN(4, 16, mix=False)
    with torch.no_grad():
        mixed.dwconv.dwconv.weight.zero_()[:, :, 1, 1] = 1
        mixed.dwconv.dwconv.bias.zero_()
    plain.load_state_dict({k: v for k, v in mixed.state_dict().items() if "dwconv" not in k})
    x = torch.randn(2, 12, 4)
    torch.testing.assert_close(mixed(x, 3, 4), plain(x, 3, 4))


def test_early_fusion_gives_the_same_logits_and_gradients():
    model = stirred(small()).double()
    x = torch.rand(2, 3, 52, 71, dtype=torch.float64)
    outputs, gradients = [], []
    for early in (False, True):
        model.decode_head.early_fusion = early
        logits = model(x)
        model.zero_grad()
        logits.square().sum().backward()
        outputs.append(logits.detach())
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-9)


def test_without_padding_nothing_tells_the_position():
    """Far from the border, moving the image by whole strides moves the maps with it: no absolute position.

    With plain FFNs and no reduction a token sees all others alike, so that on a torus (circular padding) this is exact.
    """
    encoder = stirred(MixTransformer((4, 8, 8, 8), (1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1)), 3).double().eval()
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d) and module.padding != (0, 0):
            module.padding_mode = "circular"
            module._reversed_padding_repeated_twice = [p for p in reversed(module.padding) for _ in range(2)]
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    still, moved = encoder.features(x)[2], encoder.features(x.roll((32, 16), (2, 3)))[2]  # stride 16
    torch.testing.assert_close(moved, still.roll((2, 1), (2, 3)), rtol=1e-9, atol=1e-9)


def test_positional_encoding_is_interpolated_elsewhere_only():
    model = small(mix_ffn=False, pos_embed_size=(32, 48))
    shapes = [tuple(p.shape) for n, p in model.named_parameters() if "pos_embed" in n]
    assert shapes == [(1, 8, 8, 12), (1, 16, 4, 6), (1, 24, 2, 3), (1, 32, 1, 2)]
    assert model.backbone._positions(1, 8, 12).shape == (1, 96, 8)
    same = model.backbone.pos_embed1.flatten(2).transpose(1, 2)
    assert torch.equal(model.backbone._positions(1, 8, 12), same)
    constant = torch.full_like(model.backbone.pos_embed1, 0.7)
    model.backbone.pos_embed1.data.copy_(constant)
    torch.testing.assert_close(model.backbone._positions(1, 20, 30), torch.full((1, 600, 8), 0.7))
    assert not any("dwconv" in name for name, _ in model.named_modules())


def test_sliding_windows_average_as_by_brute_force():
    """Every pixel's logits are the mean over the windows that cover it, computed pixel by pixel."""
    model = stirred(small()).double()
    x = torch.rand(2, 3, 50, 61, dtype=torch.float64)
    crop, stride = (32, 40), (13, 19)
    with torch.no_grad():
        found = sliding_window_logits(model, x, crop, stride)
        tops, lefts = [0, 13, 18], [0, 19, 21]
        windows = {}
        for top in tops:
            for left in lefts:
                window = x[:, :, top : top + 32, left : left + 40]
                windows[top, left] = F.interpolate(model(window), (32, 40), mode="bilinear", align_corners=False)
    expected = torch.empty_like(found)
    for i in range(50):
        for j in range(61):
            seen = [
                logits[:, :, i - top, j - left]
                for (top, left), logits in windows.items()
                if 0 <= i - top < 32 and 0 <= j - left < 40
            ]
            expected[:, :, i, j] = torch.stack(seen).mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_one_window_is_the_whole_image():
    model = stirred(small())
    x = torch.rand(1, 3, 40, 56)
    with torch.no_grad():
        whole = F.interpolate(model(x), (40, 56), mode="bilinear", align_corners=False)
        torch.testing.assert_close(sliding_window_logits(model, x, 64, 48), whole)
    assert torch.equal(model.predict(x), whole.argmax(1))
    assert torch.equal(model.predict(x, crop=64), whole.argmax(1))
    assert model.predict(x, (80, 100)).shape == (1, 80, 100)


@pytest.mark.parametrize(
    ("image", "seen"),
    [((683, 512), (704, 512)), ((512, 683), (512, 704)), ((300, 400), (512, 704)), ((256, 2048), (256, 2048)), ((100, 1000), (224, 2048))],
)  # fmt: skip
def test_aligned_size(image, seen):
    assert aligned_size(*image) == seen


def test_loss_is_the_mean_over_labelled_pixels():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 8, 10))
    labels[0, :5] = 255
    large = F.interpolate(logits, (8, 10), mode="bilinear", align_corners=False).log_softmax(1)
    terms = [
        -large[b, labels[b, i, j], i, j]
        for b in range(2)
        for i in range(8)
        for j in range(10)
        if labels[b, i, j] != 255
    ]
    torch.testing.assert_close(segmentation_loss(logits, labels), torch.stack(terms).mean())
    assert segmentation_loss(logits, torch.full((2, 8, 10), 255)) == 0
    labels[labels == 255] = 9
    torch.testing.assert_close(segmentation_loss(logits, labels, ignore_label=9), torch.stack(terms).mean())


def test_param_groups_follow_the_recipe():
    model = small()
    groups = param_groups(model, lr=1e-4, weight_decay=0.02)
    of = {id(p): group for group in groups for p in group["params"]}
    names = dict(model.named_parameters())
    assert len(of) == len(names)
    settings = lambda name: (of[id(names[name])]["lr"], of[id(names[name])]["weight_decay"])  # noqa: E731
    assert settings("backbone.block1.0.attn.q.bias") == (1e-4, 0.02)
    assert settings("backbone.block1.0.attn.norm.weight") == (1e-4, 0.0)
    assert settings("backbone.norm4.bias") == (1e-4, 0.0)
    assert settings("decode_head.linear_fuse.bn.weight") == (pytest.approx(1e-3), 0.02)
    assert settings("decode_head.linear_pred.weight") == (pytest.approx(1e-3), 0.02)
    assert torch.optim.AdamW(groups)


def test_schedule_follows_the_recipe():
    factor = poly_schedule()
    assert factor(0, 160_000) == 1e-6
    assert factor(750, 160_000) == pytest.approx((1e-6 + (1 - 1e-6) / 2) * (1 - 750 / 160_000))
    assert factor(1500, 160_000) == pytest.approx(1 - 1500 / 160_000)
    assert factor(160_000, 160_000) == 0


def test_official_layout_loads_and_stray_keys_go():
    model = stirred(small())
    state = model.state_dict()
    official = {f"module.{key}": value for key, value in state.items()}
    official |= {
        "module.decode_head.conv_seg.weight": torch.rand(5, 128, 1, 1),
        "module.decode_head.conv_seg.bias": torch.rand(5),
    }
    converted = SegFormer.convert_state_dict(official)
    assert converted.keys() == state.keys() and all(torch.equal(converted[k], state[k]) for k in state)
    assert "decode_head.other" in SegFormer.convert_state_dict({"decode_head.other": torch.rand(1)})


def test_encoder_checkpoints_load_into_classifier_and_segmenter():
    torch.manual_seed(0)
    classifier = stirred(
        MixTransformer((8, 16, 24, 32), (1, 2, 1, 1), (1, 2, 3, 4), (4, 2, 2, 1), num_classes=7)
    ).eval()
    state = MixTransformer.convert_state_dict(classifier.state_dict())
    assert state.keys() == classifier.state_dict().keys() and "head.weight" in state
    segmenter = small()
    encoder = {key: value for key, value in state.items() if not key.startswith("head.")}
    segmenter.backbone.load_state_dict(encoder)
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(segmenter.forward_features(x)[3], classifier.forward_features(x))
    back = MixTransformer.convert_state_dict(segmenter.state_dict())
    assert back.keys() == encoder.keys()


def test_classifier_conventions():
    model = mit_b0(num_classes=7).eval()
    x = torch.rand(1, 3, 64, 64)
    features = model.forward_features(x)
    assert features.shape == (1, 256, 2, 2) and model.forward_head(features, pre_logits=True).shape == (1, 256)
    torch.testing.assert_close(model(x), model.head(features.flatten(2).mean(-1)))
    assert model.get_classifier() is model.head and model.num_features == 256
    model.reset_classifier(3)
    assert model(x).shape == (1, 3) and model.num_classes == 3
    model.reset_classifier(0)
    assert model(x).shape == (1, 256)
    segmenter = segformer_b0(num_classes=2)
    segmenter.reset_classifier(4)
    assert segmenter.eval()(x).shape == (1, 4, 16, 16)


def test_initialisation_is_the_papers():
    torch.manual_seed(0)
    model = segformer_b0()
    head = model.decode_head.linear_pred
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.05) and not head.bias.any()
    dwconv = model.backbone.block3[0].mlp.dwconv.dwconv
    assert dwconv.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.05)
    assert model.backbone.block4[0].attn.q.weight.std().item() == pytest.approx(0.02, rel=0.05)
    eps = {name: m.eps for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    assert eps["backbone.patch_embed2.norm"] == eps["backbone.block1.0.attn.norm"] == 1e-5
    assert eps["backbone.norm3"] == eps["backbone.block1.0.norm1"] == eps["backbone.block1.0.norm2"] == 1e-6
    rates = [m.drop_probability for n, m in model.named_modules() if n.endswith("drop_path")]
    assert rates == pytest.approx([0.1 * i / 7 for i in range(8)])


def test_tables_agree():
    assert WIDTHS.keys() == DEPTHS.keys() == DECODER.keys() == PARAMETERS.keys()
