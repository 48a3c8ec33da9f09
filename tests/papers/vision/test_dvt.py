import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from saigen import weights
from saigen.measure import macs, parameters
from saigen.papers.vision import dvt as room
from saigen.papers.vision.dvt import (
    DynamicTransformerCascade,
    RelationReuse,
    TokenPerformer,
    budget_curve,
    budget_thresholds,
    calibrate_thresholds,
    cascade_loss,
    claims,
    confidence,
    exit_fractions,
    first_confident_exit,
    upsample_tokens,
)
from saigen.papers.vision.dvt.model import DEIT_SPLITS, T2T_SPLITS
from saigen.trial import Trial
from tests.golden.dvt import make as golden

OFFICIAL = np.load(Path(golden.__file__).parent / "official.npz")
both = pytest.mark.parametrize("embed", ["conv", "t2t"])


def official(embed: str, feature: bool = True, relation: bool = True) -> DynamicTransformerCascade:
    splits = T2T_SPLITS if embed == "t2t" else DEIT_SPLITS
    reuse = {"feature_reuse": feature, "relation_reuse": relation}
    return DynamicTransformerCascade(embed=embed, splits=splits, num_classes=golden.CLASSES, **golden.SIZES, **reuse)


def tiny(**options) -> DynamicTransformerCascade:
    sizes = {"img_size": 24, "splits": ((8, 8), (6, 6), (4, 4)), "embed_dim": 16, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    return DynamicTransformerCascade(in_chans=1, **({"num_classes": 5} | sizes | options))


def close(mine, theirs, tolerance=1e-5):
    torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(theirs), atol=tolerance, rtol=tolerance)


# --- parity with the official code -------------------------------------------------------------------------------------------


@both
def test_official_key_layout_loads(embed):
    model = official(embed)
    assert {f"{k} {list(v.shape)}" for k, v in model.state_dict().items()} == set(OFFICIAL[f"{embed}.11.keys"])
    state = model.state_dict()
    wrapped = {f"module.{key}": value for key, value in state.items()}
    assert DynamicTransformerCascade.convert_state_dict(wrapped).keys() == state.keys()


@both
@pytest.mark.parametrize("feature", [True, False])
@pytest.mark.parametrize("relation", [True, False])
def test_equals_official_exits(embed, feature, relation):
    """All three exits of the official code, with and without either kind of reuse, from the same weights."""
    model = golden.fill(official(embed, feature, relation), seed=1).eval()
    with torch.no_grad():
        exits = model.forward_exits(golden.images())
        close(torch.stack(exits), OFFICIAL[f"{embed}.{int(feature)}{int(relation)}.logits"])
        close(model(golden.images()), exits[-1])


@both
def test_equals_official_gradients(embed):
    model = golden.fill(official(embed), seed=1).eval()
    cascade_loss(model.forward_exits(golden.images()), golden.targets()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    mine = np.array([[float(gradients[key].norm()), float(gradients[key].sum())] for key in sorted(gradients)])
    np.testing.assert_allclose(mine, OFFICIAL[f"{embed}.11.gradients"], atol=2e-4, rtol=2e-4)


def test_thresholds_and_budget_equal_official_search():
    """Thresholds found, accuracy and mean cost at them, as the official inference script computes them."""
    probabilities = torch.from_numpy(OFFICIAL["budget.probabilities"])
    truth = torch.from_numpy(OFFICIAL["budget.truth"])
    for p, first, second, accuracy, cost in OFFICIAL["budget.rows"]:
        thresholds = calibrate_thresholds(probabilities.amax(-1), exit_fractions(p))
        finite = [1e8 if t == math.inf else t for t in thresholds]  # their stand-in where nobody leaves
        close(torch.tensor(finite[:2]), torch.tensor([first, second], dtype=torch.float32))
        taken = first_confident_exit(probabilities.amax(-1), thresholds)
        assert torch.tensor((1.0, 3.0, 7.0))[taken].mean().item() == pytest.approx(cost, rel=1e-5)
        right = probabilities.argmax(-1).gather(0, taken[None])[0] == truth
        assert right.float().mean().item() == pytest.approx(accuracy, rel=1e-5)


# --- identities --------------------------------------------------------------------------------------------------------------


def test_silenced_reuse_is_a_plain_vit():
    """With zero relations and the reused inputs cut off, a later stage is the plain transformer of its token count."""
    reusing, plain = tiny(), tiny(feature_reuse=False, relation_reuse=False)
    state = {}
    for key, value in reusing.state_dict().items():
        if key in plain.state_dict():
            shape = plain.state_dict()[key].shape
            state[key] = value[tuple(slice(n) for n in shape)]
    plain.load_state_dict(state)
    with torch.no_grad():
        for stage in reusing.stages[1:]:
            stage.relation_reuse_conv[2].weight.zero_()
            stage.relation_reuse_conv[2].bias.zero_()
        stage_a, stage_b = reusing.stages[2].eval(), plain.stages[2].eval()
        x = torch.rand(2, 1, 24, 24)
        features, relations = torch.randn(2, 17, 16), torch.randn(2, 4, 17, 17)
        q = stage_a.blocks[0].attn.heads(torch.randn(2, 37, 16))
        reused = stage_a.relation_reuse_conv(relations)
        assert reused.shape == (2, 4, 37, 37) and not reused.any() and len(q) == 3
        for block in stage_a.blocks:  # the norm mixes in 48 more inputs: take it out to compare
            block.norm2 = torch.nn.Identity()
            block.mlp.fc1.weight[:, 16:] = 0
        for block in stage_b.blocks:
            block.norm2 = torch.nn.Identity()
        close(stage_a(x, features, relations).logits, stage_b(x).logits)


def test_keeping_relations_changes_nothing():
    """Attention by the fused kernel and by kept logits are the same function."""
    stage = tiny().stages[2].eval()
    x, features, relations = torch.rand(2, 1, 24, 24), torch.randn(2, 17, 16), torch.randn(2, 4, 17, 17)
    with torch.no_grad():
        close(stage(x, features, relations, keep=True).logits, stage(x, features, relations).logits)


def test_upsampled_tokens_are_averages():
    """Written out: each new cell is the mean of the doubled cells from ⌊i·2n/m⌋ to ⌈(i+1)·2n/m⌉."""
    x = torch.randn(1, 1 + 9, 2, dtype=torch.double)
    image = x[0, 1:].reshape(3, 3, 2)
    expected = torch.zeros(5, 5, 2, dtype=torch.double)
    for i in range(5):
        for j in range(5):
            rows, columns = (range(math.floor(k * 6 / 5), math.ceil((k + 1) * 6 / 5)) for k in (i, j))
            expected[i, j] = torch.stack([image[r // 2, c // 2] for r in rows for c in columns]).mean(0)
    close(upsample_tokens(x, 5)[0, 1:].reshape(5, 5, 2), expected, 1e-12)
    close(upsample_tokens(x, 5)[:, :1], x[:, :1], 0)


@pytest.mark.parametrize(("side", "grid"), [(7, 10), (10, 14), (2, 3), (4, 4), (3, 8), (5, 2)])
def test_upsampling_as_a_matrix_is_that_of_images(side, grid):
    """As the paper does it: images, doubled to the nearest neighbour, then averaged adaptively."""
    x = torch.randn(2, 1 + side * side, 3, dtype=torch.double)
    image = x[:, 1:].transpose(1, 2).reshape(2, 3, side, side)
    doubled = image.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    expected = torch.nn.functional.adaptive_avg_pool2d(doubled, grid).flatten(2).transpose(1, 2)
    close(upsample_tokens(x, grid)[:, 1:], expected, 1e-12)


def test_relations_are_upsampled_in_queries_and_keys():
    reuse = RelationReuse(3, (3, 4)).double()
    r = torch.randn(2, 3, 10, 10, dtype=torch.double)
    with torch.no_grad():
        mixed = torch.nn.Sequential.forward(reuse, r)
        matrix = upsample_tokens(torch.eye(10, dtype=torch.double)[None], 4)[0]  # (17, 10)
        close(reuse(r), matrix @ mixed @ matrix.T, 1e-12)


def test_performer_is_linear_attention_written_out():
    layer = TokenPerformer(6, 4).double().eval()
    x = torch.randn(1, 5, 6, dtype=torch.double)
    with torch.no_grad():
        layer.w.copy_(torch.randn(2, 4))
        k, q, v = layer.kqv(layer.norm1(x)).float()[0].split(4, dim=-1)
        layer.float()
        kernel = torch.stack(
            [torch.stack([(layer.phi(a[None, None]) * layer.phi(b[None, None])).sum() for b in k]) for a in q]
        )
        y = v + layer.proj(kernel / kernel.sum(1, keepdim=True) @ v)
        close(layer(x.float())[0], y + layer.mlp(layer.norm2(y)), 1e-5)
    rows = TokenPerformer(6, 64).w
    close(rows @ rows.T, 32 * torch.eye(32), 1e-4)
    assert not rows.requires_grad


def test_a_patch_of_23_pixels_needs_its_padding():
    assert [split.grid(224) for split in DEIT_SPLITS] == [7, 10, 14]
    assert DEIT_SPLITS[1]._replace(padding=0).grid(224) == 9


# --- early exit ----------------------------------------------------------------------------------------------------------------


def sharp() -> DynamicTransformerCascade:
    """Heads scaled up, so that confidences spread."""
    model = tiny().eval()
    with torch.no_grad():
        for stage in model.stages:
            stage.head.weight.mul_(60)
    return model


@pytest.mark.parametrize("relation", [True, False])
def test_real_early_exit_equals_the_simulated(relation):
    model = sharp() if relation else tiny(relation_reuse=False).eval()
    x = torch.rand(24, 1, 24, 24, generator=torch.Generator().manual_seed(1)) * 4
    with torch.no_grad():
        exits = torch.stack(model.forward_exits(x))
    thresholds = calibrate_thresholds(confidence(exits), exit_fractions(1.0))
    taken = first_confident_exit(confidence(exits), thresholds)
    assert len(taken.unique()) == 3
    logits, really = model.predict(x, thresholds)
    assert torch.equal(really, taken)
    close(logits, exits.gather(0, taken[None, :, None].expand(1, -1, 5))[0])
    model.thresholds = model.checked(thresholds)
    close(model(x), logits, 0)


def test_stages_not_needed_do_not_run():
    model, x = sharp(), torch.rand(6, 1, 24, 24)
    seen = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    assert model.predict(x, (-math.inf, -math.inf))[1].tolist() == [0] * 6 and seen == [6]
    seen.clear()
    assert model.predict(x, (2.0, 2.0))[1].tolist() == [2] * 6 and seen == [6, 6, 6]
    seen.clear()
    with torch.no_grad():
        half = confidence(model.forward_exits(x)[0]).median().item()
    seen.clear()
    model.predict(x, (half, -math.inf))
    assert seen[0] == 6 and 0 < seen[1] < 6 and len(seen) == 2


def test_calibrated_shares_leave():
    confidences = torch.rand(3, 1000, generator=torch.Generator().manual_seed(0))
    thresholds = calibrate_thresholds(confidences, (0.5, 0.3, 0.2))
    assert first_confident_exit(confidences, thresholds).bincount().tolist() == [500, 300, 200]
    assert calibrate_thresholds(confidences, (0.0, 0.0, 1.0))[:2] == (math.inf, math.inf)
    assert calibrate_thresholds(confidences, (1.0, 0.0, 0.0))[1] == math.inf


@pytest.mark.parametrize("budget", [1.0, 1.5, 3.0, 4.4, 7.0])
def test_budget_is_spent_but_not_passed(budget):
    confidences = torch.rand(3, 2000, generator=torch.Generator().manual_seed(0))
    cost = torch.tensor((1.0, 3.0, 7.0))
    thresholds = budget_thresholds(confidences, cost.tolist(), budget)
    spent = float(cost[first_confident_exit(confidences, thresholds).long()].mean())
    assert spent <= budget + 1e-6 and spent >= budget - 0.02


def test_budget_curve_runs_from_the_first_exit_to_the_last():
    torch.manual_seed(0)
    logits, truth = list(torch.randn(3, 50, 4)), torch.randint(4, (50,))
    spent, right = budget_curve(logits, truth, (1.0, 3.0, 7.0), [(-math.inf, 0.0), (2.0, 2.0)])
    assert spent.tolist() == [1.0, 7.0]
    close(right, torch.stack([(logits[k].argmax(1) == truth).float().mean() for k in (0, 2)]))


def test_loss_sums_over_exits_with_soft_targets_too():
    logits, y = list(torch.randn(3, 4, 5)), torch.tensor([0, 1, 2, 3])
    close(cascade_loss(logits, y), sum(F.cross_entropy(out, y) for out in logits))
    close(cascade_loss(logits, F.one_hot(y, 5).float()), cascade_loss(logits, y))


def test_gradients_reach_the_stage_that_is_reused():
    model = tiny().train()
    F.cross_entropy(model(torch.rand(2, 1, 24, 24))[-1], torch.tensor([0, 1])).backward()
    for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"):
        assert model.less_less_token.get_parameter(name).grad.any()
    # the very last feature of a stage reaches no later logits, its features do
    assert model.less_less_token.blocks[1].mlp.fc2.weight.grad.any()


# --- the ecosystem's conventions ---------------------------------------------------------------------------------------------------


def test_conventions():
    model = room.dvt_deit_small(num_classes=7, exits=1, img_size=64).eval()
    with torch.no_grad():
        x = torch.rand(1, 3, 64, 64)
        tokens = model.forward_features(x)
        assert tokens.shape == (1, 5, 384) and model.forward_head(tokens, pre_logits=True).shape == (1, 384)
        close(model.forward_head(tokens), model(x))
        model.reset_classifier(3)
        assert model(x).shape == (1, 3) and model.get_classifier().out_features == 3
    assert (
        model.default_cfg["input_size"] == (3, 64, 64) and model.get_submodule(model.classifier_name).out_features == 3
    )


def test_a_checkpoint_of_other_classes_leaves_all_heads_new(tmp_path):
    source, target = tiny(), copy.deepcopy(tiny())
    target.reset_classifier(9)
    weights.save(source, tmp_path / "w.safetensors")
    before = [stage.head.weight.clone() for stage in target.stages]
    with pytest.warns(UserWarning, match="new"):
        weights.load(target, tmp_path / "w.safetensors")
    assert all(torch.equal(a, stage.head.weight) for a, stage in zip(before, target.stages, strict=True))
    close(target.less_token.pos_embed, source.less_token.pos_embed, 0)
    broken = source.state_dict()
    broken["less_token.norm.weight"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"less_token\.norm\.weight"):
        weights.load(target, broken)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: tiny(splits=((8, 8), (8, 8))), "splits"),
        (lambda: tiny(splits=((8, 8), (30, 4))), "splits"),
        (lambda: tiny(splits=((8, 8), (6, 6), (4, 4), (3, 3))), "splits"),
        (lambda: tiny(exits=4), "exits"),
        (lambda: tiny(exits=0), "exits"),
        (lambda: tiny(embed="wavelet"), "embed"),
        (lambda: tiny(num_heads=3), "num_heads"),
        (lambda: tiny(thresholds=(0.5,)), "thresholds"),
        (lambda: tiny().predict(torch.rand(1, 1, 24, 24)), "thresholds"),
        (lambda: tiny().predict(torch.rand(1, 1, 24, 24), (0.5, math.nan)), "thresholds"),
        (lambda: tiny()(torch.rand(1, 1, 25, 25)), "x has shape"),
        (lambda: exit_fractions(0.0), "p is"),
        (lambda: calibrate_thresholds(torch.rand(3, 5), (0.5, 0.5)), "fractions"),
        (lambda: calibrate_thresholds(torch.rand(2, 5), (0.8, 0.5)), "fractions"),
        (lambda: budget_thresholds(torch.rand(2, 5), (1.0, 2.0), 0.5), "budget"),
        (lambda: budget_thresholds(torch.rand(2, 5), (2.0, 1.0), 2.0), "costs"),
        (lambda: upsample_tokens(torch.rand(1, 9, 2), 4), "tokens"),
        (lambda: TokenPerformer(4, 3), "width"),
    ],
)
def test_wrong_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.parametrize(
    ("build", "layers", "official"),
    [
        (room.dvt_t2t_vit_12, 12 * 4, (0.468e9, 1.446e9, 3.455e9)),
        (room.dvt_t2t_vit_14, 14 * 6, (1.201e9, 3.818e9, 9.264e9)),
        (room.dvt_deit_small, 12 * 6, (1.143e9, 3.643e9, 8.801e9)),
    ],
)
def test_work_is_the_official_but_for_interpolation_as_a_product(build, layers, official):
    ours, interpolation, depth = [], [0], len(build(exits=1).stages[0].blocks)
    for exits in (1, 2, 3):
        ours.append(macs(lambda exits=exits: build(exits=exits), (3, 224, 224)))
    for n, m in ((1 + 7 * 7, 1 + 10 * 10), (1 + 10 * 10, 1 + 14 * 14)):
        relations, features = layers * (n * n * m + m * n * m), depth * m * n * 48
        interpolation.append(interpolation[-1] + relations + features)
    assert [a - b for a, b in zip(ours, interpolation, strict=True)] == pytest.approx(official, rel=1e-3)


def test_plain_t2t_vits_have_the_published_size():
    with torch.device("meta"):
        for build, count, work in (
            (room.dvt_t2t_vit_12, 6_941_902, 1.763e9),
            (room.dvt_t2t_vit_14, 21_545_550, 4.783e9),
        ):
            plain = build(feature_reuse=False, relation_reuse=False).normal_token
            assert parameters(plain) == count
            assert macs(plain, (3, 224, 224)) == pytest.approx(work, rel=3e-4)


def test_tiny_claim_repeats_itself():
    first, second = (claims.equal_accuracy_at_lower_cost(Trial(1000, "tiny")) for _ in range(2))
    for values in (first, second):
        del values["speedup"]
    assert first == second


def test_without_heads_the_features_of_the_finest_stage_come_out():
    model, x = tiny(thresholds=(0.5, 0.5)).eval(), torch.rand(3, 1, 24, 24)
    model.reset_classifier(0)
    with torch.no_grad():
        assert torch.equal(model(x), model.forward_features(x)[:, 0])
        with pytest.raises(ValueError, match="num_classes is 0"):
            model.predict(x)
        copy = tiny(num_classes=0).eval()
        copy.load_state_dict(model.state_dict())
        assert torch.equal(copy(x), model(x))
        model.reset_classifier(7)
        assert model(x).shape == (3, 7)
