import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from saigen.measure import macs, parameters
from saigen.nn.lv_vit import LVViT
from saigen.nn.vision_transformer import VisionTransformer
from saigen.papers.vision import dynamic_vit as room
from saigen.papers.vision.dynamic_vit import (
    DynamicViT,
    DynamicViTLoss,
    DynamicViTOutput,
    TokenPredictor,
    claims,
    dynamic_vit_loss,
    dynamic_vit_param_groups,
    dynamic_vit_schedule,
    gather_tokens,
    masked_softmax,
)
from saigen.trial import Trial
from tests.golden.dynamic_vit import make as golden

OFFICIAL = np.load(Path(golden.__file__).parent / "official.npz")
RATIOS = [golden.KEEP**stage for stage in (1, 2, 3)]


def backbone(kind: str, num_classes: int = golden.CLASSES):
    if kind == "deit":
        return VisionTransformer(num_classes=num_classes, **golden.DEIT)
    return LVViT(num_classes=num_classes, **golden.LVVIT)


def model(kind: str, keep_ratio: float = golden.KEEP) -> DynamicViT:
    return DynamicViT(backbone(kind), prune_at=golden.PRUNE_AT, keep_ratio=keep_ratio)


def filled(kind: str, keep_ratio: float = golden.KEEP) -> DynamicViT:
    return golden.fill(model(kind, keep_ratio), seed=1)


def images(kind: str) -> torch.Tensor:
    return golden.images((golden.DEIT if kind == "deit" else golden.LVVIT)["img_size"])


both = pytest.mark.parametrize("kind", ["deit", "lvvit"])


def close(mine, theirs, tolerance=1e-5):
    torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(theirs), atol=tolerance, rtol=tolerance)


# --- parity with the official code -----------------------------------------------------------------------------------


@both
def test_official_key_layout_loads(kind):
    ours = {f"{key} {list(value.shape)}" for key, value in model(kind).state_dict().items()}
    assert ours == set(OFFICIAL[f"{kind}.keys"])
    state = filled(kind).state_dict()
    wrapped = {f"module.{key}": value for key, value in state.items()}
    assert DynamicViT.convert_state_dict(wrapped).keys() == state.keys()


@both
def test_equals_official_forward(kind):
    """Dense teacher, pruned inference, and the training pass with the same noise, from the same weights."""
    teacher, student, x = golden.fill(backbone(kind), seed=2).eval(), filled(kind).eval(), images(kind)
    with torch.no_grad():
        features = teacher.forward_features(x)
        close(teacher.head(features[:, 0]), OFFICIAL[f"{kind}.teacher"])
        close(student(x), OFFICIAL[f"{kind}.inference"])
        with golden.fixed_gumbel():
            output = student.forward_masked(x)
    assert np.array_equal(torch.stack(output.decisions).numpy(), OFFICIAL[f"{kind}.decisions"])
    close(output.logits, OFFICIAL[f"{kind}.logits"])
    close(output.tokens[:, :8], OFFICIAL[f"{kind}.tokens"])


@both
def test_equals_official_loss_and_gradients(kind):
    teacher, student, x = golden.fill(backbone(kind), seed=2), filled(kind).eval(), images(kind)
    with golden.fixed_gumbel():
        output = student.forward_masked(x)
    loss = DynamicViTLoss(teacher, student.keep_ratios)(output, x, golden.targets())
    close(loss.detach(), OFFICIAL[f"{kind}.loss"])
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    mine = np.array([[float(gradients[key].norm()), float(gradients[key].sum())] for key in sorted(gradients)])
    np.testing.assert_allclose(mine, OFFICIAL[f"{kind}.gradients"], atol=2e-4, rtol=2e-4)
    assert all(parameter.grad is None for parameter in teacher.parameters())


# --- identities ------------------------------------------------------------------------------------------------------


def test_policy_of_ones_is_softmax():
    scores = torch.randn(2, 3, 7, 7, dtype=torch.double)
    close(masked_softmax(scores, torch.ones(2, 7)), scores.softmax(-1), 1e-5)
    close(masked_softmax(scores, torch.ones(2, 7), eps=0.0), scores.softmax(-1), 1e-12)


def test_masked_softmax_equals_a_loop():
    scores, policy = torch.randn(1, 1, 5, 5, dtype=torch.double), torch.tensor([[1.0, 0, 1, 0, 1]])
    expected = torch.zeros(5, 5, dtype=torch.double)
    for i in range(5):
        seen = [j for j in range(5) if policy[0, j] == 1 or j == i]
        expected[i, seen] = scores[0, 0, i, seen].softmax(0)
    close(masked_softmax(scores, policy, eps=0.0)[0, 0], expected, 1e-12)


def test_masked_softmax_gradients():
    scores = torch.randn(1, 2, 4, 4, dtype=torch.double, requires_grad=True)
    policy = torch.tensor([[1.0, 0.3, 0.8, 0.6]], dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(masked_softmax, (scores, policy))


def test_masked_softmax_survives_large_half_precision_scores():
    scores = torch.tensor([[[[300.0, -300.0], [-300.0, 300.0]]]], dtype=torch.bfloat16)
    out = masked_softmax(scores, torch.tensor([[1.0, 0.0]]))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


@both
def test_training_pass_with_the_masks_of_inference_equals_inference(kind):
    student, x = filled(kind).eval(), images(kind)
    n = student.pos_embed.shape[1] - 1
    with torch.no_grad():
        kept = student.kept_tokens(x)
        decisions = [torch.zeros(len(x), n).scatter_(1, indices, 1.0) for indices in kept]
        masked = student.forward_masked(x, decisions)
        tokens = student.forward_features(x)
        close(masked.logits, student.head(tokens[:, 0]), 1e-4)
        whole = tokens[:, 1:] if kind == "deit" else student.aux_head(tokens[:, 1:])
        close(gather_tokens(masked.tokens, kept[-1]), whole, 1e-4)
    assert [indices.shape[1] for indices in kept] == list(student.keep_counts)


@both
def test_keep_ratio_one_is_the_dense_backbone(kind):
    student, dense, x = filled(kind, keep_ratio=1.0).eval(), backbone(kind).eval(), images(kind)
    state = {key: value for key, value in student.state_dict().items() if not key.startswith("score_predictor")}
    dense.load_state_dict(state)
    with torch.no_grad():
        close(student(x), dense(x), 1e-6)
        ones = [torch.ones(len(x), dense.pos_embed.shape[1] - 1)] * 3
        close(student.forward_masked(x, ones).logits, dense.head(dense.forward_features(x)[:, 0]), 1e-4)


@both
def test_decisions_never_grow(kind):
    torch.manual_seed(0)
    output = filled(kind).train()(images(kind))
    assert isinstance(output, DynamicViTOutput) and len(output.decisions) == 3
    for before, after in zip(output.decisions, output.decisions[1:], strict=False):
        assert (after <= before).all() and after.sum() < before.sum()
    assert torch.equal(output.mask, output.decisions[-1]) and not output.mask.requires_grad


def test_predictor_is_permutation_equivariant():
    torch.manual_seed(0)
    predictor = golden.fill(TokenPredictor(16), 3).double()
    x, d = torch.randn(2, 9, 16, dtype=torch.double), (torch.rand(2, 9) > 0.5).double()
    order = torch.randperm(9)
    close(predictor(x[:, order], d[:, order]), predictor(x, d)[:, order], 1e-12)
    close(predictor(x), predictor(x, torch.ones(2, 9)), 1e-12)


def test_predictor_survives_an_image_without_tokens():
    x = torch.randn(1, 9, 16, requires_grad=True)
    TokenPredictor(16)(x, torch.zeros(1, 9)).sum().backward()
    assert x.grad.isfinite().all()


def test_dropped_tokens_reach_nobody():
    """The class token's logits do not depend on what is in a dropped token; they do on a kept one."""
    student = filled("deit").eval()
    d = torch.ones(1, 196)
    d[0, 5] = 0
    tokens = student.embed(images("deit")[:1]).detach().requires_grad_()
    x, policy = tokens, torch.cat((torch.ones(1, 1), d), 1)
    for block in student.blocks:
        x = room.model.masked_block(block, x, policy)
    (gradient,) = torch.autograd.grad(student.head(student.norm(x)[:, 0]).norm(), tokens)
    size = gradient.norm(dim=-1)[0, 1:]
    assert size[5] < 1e-3 * size[d[0] == 1].min()


def test_gradients_reach_the_predictors():
    torch.manual_seed(0)
    student = filled("deit").train()
    x = images("deit")
    output = student(x)
    output.logits.square().sum().backward()
    assert all(student.score_predictor[k].in_conv[1].weight.grad.abs().sum() > 0 for k in range(3))


def test_gather_tokens_equals_indexing():
    x, indices = torch.randn(3, 7, 4), torch.randint(7, (3, 5))
    assert torch.equal(gather_tokens(x, indices), torch.stack([x[b, indices[b]] for b in range(3)]))


# --- numbers ---------------------------------------------------------------------------------------------------------


def macs_by_hand(dim: int, keep_ratio: float, mlp_ratio: int = 4, classes: int = 1000) -> int:
    n, total = 196, 196 * dim * 3 * 16 * 16 + dim * classes
    for i in range(12):
        if i in (3, 6, 9) and keep_ratio < 1:
            total += n * (dim * dim + dim * dim // 2 + dim * dim // 8 + dim // 4 * 2)
            n = int(196 * keep_ratio ** (i // 3))
        t = n + 1
        total += t * dim * dim * (4 + 2 * mlp_ratio) + 2 * t * t * dim
    return total


@pytest.mark.parametrize(("name", "dim"), [("deit_256", 256), ("deit_small", 384), ("deit_base", 768)])
@pytest.mark.parametrize("keep_ratio", [1.0, 0.9, 0.7, 0.5])
def test_macs_by_hand(name, dim, keep_ratio):
    build = getattr(room, f"dynamic_vit_{name}")
    assert macs(lambda: build(keep_ratio=keep_ratio), (3, 224, 224)) == macs_by_hand(dim, keep_ratio)


@pytest.mark.parametrize(
    ("keep_ratio", "counts"),
    [(0.9, (176, 158, 142)), (0.8, (156, 125, 100)), (0.7, (137, 96, 67)), (0.6, (117, 70, 42)), (0.5, (98, 49, 24))],
)
def test_keep_counts(keep_ratio, counts):
    with torch.device("meta"):
        assert room.dynamic_vit_deit_small(keep_ratio=keep_ratio).keep_counts == counts


def test_predictor_parameters():
    for c in (256, 384, 512, 768):
        expected = 2 * c + (c * c + c) + (c * c // 2 + c // 2) + (c * c // 8 + c // 4) + (c // 2 + 2)
        assert parameters(TokenPredictor(c)) == expected


# --- loss and recipe -------------------------------------------------------------------------------------------------


def test_loss_of_a_perfect_student_is_the_classification_loss():
    logits, tokens = torch.randn(2, 5), torch.randn(2, 8, 6)
    d = torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 0]]).repeat(1, 2)
    output = DynamicViTOutput(logits, tokens, d, (d,))
    target = torch.tensor([1, 2])
    for kind in ("mse", "kl"):
        loss = dynamic_vit_loss(output, target, logits, tokens, [0.5], token_loss=kind)
        close(loss, F.cross_entropy(logits, target), 1e-6)
    missed = dynamic_vit_loss(output, target, logits, tokens, [0.7])
    close(missed - F.cross_entropy(logits, target), 2 * 0.2**2, 1e-6)


def test_tokens_that_were_dropped_are_not_distilled():
    logits, tokens, d = torch.randn(1, 5), torch.randn(1, 4, 6), torch.tensor([[1.0, 0, 1, 0]])
    other = tokens + (1 - d).unsqueeze(-1)
    loss = [
        dynamic_vit_loss(DynamicViTOutput(logits, t, d, (d,)), torch.tensor([0]), logits, tokens, [0.5])
        for t in (tokens, other)
    ]
    close(loss[0], loss[1], 0)
    none = DynamicViTOutput(logits, other, 0 * d, (0 * d,))
    assert dynamic_vit_loss(none, torch.tensor([0]), logits, tokens, [0.5]).isfinite()


def test_teacher_stays_in_eval_mode():
    loss = DynamicViTLoss(backbone("deit"), RATIOS)
    loss.train()
    assert not loss.teacher.training and loss.training


def test_param_groups_and_schedule():
    student = model("deit")
    groups = dynamic_vit_param_groups(student, lr=1e-3, weight_decay=0.05)
    grouped = {id(p) for group in groups for p in group["params"]}
    left_out = {name for name, p in student.named_parameters() if id(p) not in grouped}
    assert left_out == {"cls_token", "pos_embed"}
    for group in groups:
        assert group["lr"] == pytest.approx(1e-5 if group["backbone"] else 1e-3)
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
    optimizer = torch.optim.AdamW(groups)
    schedule = dynamic_vit_schedule(optimizer, steps_per_epoch=10)
    rates = {True: [], False: []}
    for _ in range(300):
        for backbone_group in (True, False):
            lrs = {g["lr"] for g in optimizer.param_groups if g["backbone"] == backbone_group}
            rates[backbone_group].append(lrs.pop())
        optimizer.step()
        schedule.step()
    assert rates[False][0] == 0 and rates[False][49] == pytest.approx(1e-3) == pytest.approx(max(rates[False]))
    assert rates[True][:50] == [0.0] * 50 and rates[True][50] == pytest.approx(1e-5)
    assert rates[False][-1] == pytest.approx(1e-6, rel=0.5)
    expected = 1e-6 + 0.5 * (1e-3 - 1e-6) * (1 + np.cos(np.pi * 100 / 250))
    assert rates[False][150] == pytest.approx(expected)


# --- use -------------------------------------------------------------------------------------------------------------


@both
def test_tokens_are_really_dropped(kind):
    student = filled(kind).eval()
    seen = []
    for block in student.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    student(images(kind))
    assert seen == [student.pos_embed.shape[1], *(count + 1 for count in student.keep_counts)]


@both
def test_reset_classifier(kind):
    student = model(kind).eval()
    student.reset_classifier(3)
    assert student(images(kind)).shape == (3, 3) and student.get_classifier().out_features == 3
    student.reset_classifier(0)
    x = images(kind)
    assert torch.equal(student(x), student.forward_features(x)[:, 0])
    student.reset_classifier(4)
    assert student(x).shape == (3, 4)
    whole = backbone(kind, num_classes=0).eval()
    assert torch.equal(whole(x), whole.forward_features(x)[:, 0])


@both
def test_backbone_of_another_size_loads(kind):
    options = golden.DEIT if kind == "deit" else golden.LVVIT
    build = VisionTransformer if kind == "deit" else LVViT
    larger = build(**options | {"img_size": 2 * options["img_size"], "num_classes": golden.CLASSES})
    student = DynamicViT(larger, prune_at=golden.PRUNE_AT)
    student.load_state_dict(filled(kind).state_dict())
    assert student.pos_embed.shape[1] == 1 + 4 * (filled(kind).pos_embed.shape[1] - 1)


@both
def test_exports(kind):
    student, x = filled(kind).eval(), images(kind)
    with torch.no_grad():
        exported = torch.export.export(student, (x,)).module()
        close(exported(x), student(x), 1e-5)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"keep_ratio": 0.0}, "keep_ratio"),
        ({"keep_ratio": 1.5}, "keep_ratio"),
        ({"keep_ratio": 0.1}, "keep_ratio"),
        ({"prune_at": (2, 1)}, "prune_at"),
        ({"prune_at": (1, 4)}, "prune_at"),
        ({"prune_at": ()}, "prune_at"),
    ],
)
def test_wrong_arguments(wrong, named):
    with pytest.raises(ValueError, match=named):
        DynamicViT(backbone("deit"), **{"prune_at": golden.PRUNE_AT} | wrong)


def test_wrong_backbone_and_input():
    with pytest.raises(ValueError, match="class token"):
        DynamicViT(VisionTransformer(**golden.DEIT, global_pool="avg"), prune_at=(1,))
    with pytest.raises(ValueError, match="x has shape"):
        model("deit")(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="dim"):
        TokenPredictor(6)


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    teacher = backbone("deit")
    student = DynamicViT(copy.deepcopy(teacher), prune_at=golden.PRUNE_AT).train()
    criterion, x, y = DynamicViTLoss(teacher, student.keep_ratios), images("deit"), torch.tensor([0, 1, 2])
    optimizer = torch.optim.AdamW(dynamic_vit_param_groups(student, lr=3e-3, backbone_scale=1.0))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = criterion(student(x), x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


# --- the experiment --------------------------------------------------------------------------------------------------


def test_digit_scenes_hold_the_digit_and_lower_clutter():
    digits, y = 1 + torch.rand(5, 1, 8, 8), torch.arange(5)
    scenes, labels = claims.digit_scenes(torch.Generator().manual_seed(0), digits, y, digits, clutter=4, contrast=0.4)
    assert scenes.shape == (5, 1, 24, 24) and torch.equal(labels, y)
    cells = scenes.unfold(2, 4, 4).unfold(3, 4, 4).reshape(5, 36, 16)
    is_digit, is_noise = cells.min(-1).values >= 1, cells.max(-1).values <= 0.1
    assert (is_digit.sum(1) == 4).all()
    assert ((~is_digit & ~is_noise).sum(1) <= 4).all() and (~is_digit & ~is_noise).any()
    for i in range(5):
        close(cells[i][is_digit[i]].sum(), digits[i].sum(), 1e-4)
        first = int(is_digit[i].nonzero()[0])
        close(scenes[i, 0, 4 * (first // 6) :, 4 * (first % 6) :][:8, :8], digits[i, 0], 0)


def test_mixing_keeps_the_labels_a_distribution_and_the_crop_keeps_the_pixels():
    x, y = torch.rand(6, 3, 16, 16), torch.arange(6)
    for seed in range(6):
        mixed, soft = claims.mix(torch.Generator().manual_seed(seed), x, y, classes=10)
        assert mixed.shape == x.shape and soft.min() >= 0.0
        close(soft.sum(1), torch.ones(6), 1e-5)
    cropped = claims.crop_and_flip(torch.Generator().manual_seed(0), x)
    assert cropped.shape == x.shape and set(cropped.flatten().tolist()) <= set(x.flatten().tolist())


def test_a_rule_keeps_the_best_and_no_rule_is_dense():
    vit, x = golden.fill(backbone("deit"), seed=2), images("deit")
    dense = claims.ThinnedByRule(vit, (), (), claims.at_random).eval()
    with torch.no_grad():
        close(dense(x), vit.eval()(x), 1e-6)
        by_place = claims.ThinnedByRule(
            vit, (1, 2), (100, 7), lambda block, x: -torch.arange(x.shape[1] - 1.0).expand(3, -1)
        )
        _, tokens, now = by_place.train()(x)
    assert tokens.shape[1] == 7 and torch.equal(now, torch.arange(7).expand(3, -1))


def test_the_experiment_runs_on_images_of_ones_own(tmp_path, monkeypatch):
    from PIL import Image

    generator = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for label in "ab":
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / label / f"{i}.png")
    net = claims.DEIT_TI_4 | {"embed_dim": 16, "num_heads": 2, "depth": 4}
    small = dataclasses.replace(
        claims.SIZES["real"],
        net=net,
        prune_at=(1, 2, 3),
        batch=8,
        dense_epochs=1,
        tune_epochs=2,
        warmup_epochs=1,
        ema=0.9,
    )
    monkeypatch.setitem(claims.SIZES, "real", small)
    monkeypatch.setattr(claims, "_cost", lambda trial, size: {})
    values = claims.pruning_tokens_is_cheap(Trial(seed=1000, scale="real", data_path=tmp_path))
    assert all(
        0.0 <= value <= 1.0 for name, value in values.items() if name.startswith("accuracy_") and "drop" not in name
    )
    assert values["accuracy_drop"] == values["accuracy_dense"] - values["accuracy_dynamic"]
