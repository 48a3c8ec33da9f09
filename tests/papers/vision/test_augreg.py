import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from saigen import weights
from saigen.papers.vision import augreg as room
from saigen.papers.vision.augreg import (
    AUGREG_SETTINGS,
    AugReg,
    AugRegViT,
    StdConv2d,
    augreg_grid,
    claims,
    data_multiplier,
    kernel_groups,
    mixup,
    recommended_augreg,
    resize_pos_embed,
    sigmoid_xent,
)
from saigen.trial import Trial
from tests.golden.augreg import make as golden

OFFICIAL = np.load(Path(golden.__file__).parent / "official.npz")
cases = pytest.mark.parametrize("case", list(golden.CASES))


def build(case: str) -> AugRegViT:
    depths, patch, side = golden.CASES[case]
    stride = 1 if depths is None else 4 * 2 ** max(len(depths) - 1, 0)
    sizes = {
        "embed_dim": golden.WIDTH,
        "depth": golden.LAYERS,
        "num_heads": golden.HEADS,
        "num_classes": golden.CLASSES,
    }
    mlp_ratio = golden.MLP / golden.WIDTH
    return AugRegViT(img_size=side, patch_size=patch * stride, resnet=depths, mlp_ratio=mlp_ratio, **sizes)


def arrays(case: str) -> dict[str, np.ndarray]:
    shapes = {
        str(name): tuple(int(n) for n in str(shape).split(","))
        for name, shape in zip(OFFICIAL[f"{case}.names"], OFFICIAL[f"{case}.shapes"], strict=True)
    }
    return golden.fill(shapes)


def published(given: dict) -> dict:
    """The names of the published files, whose blocks number their modules through; newer Flax starts anew."""
    new = (("LayerNorm_1", "LayerNorm_2"), ("MlpBlock_0", "MlpBlock_3"), ("Attention_0", "Attention_1"))
    renamed = {}
    for key, value in given.items():
        for theirs, older in new:
            key = key.replace(theirs, older)
        renamed[key] = value
    return renamed


def image(case: str) -> torch.Tensor:
    return torch.from_numpy(golden.images(golden.CASES[case][2])).permute(0, 3, 1, 2).contiguous()


def close(mine, theirs, tolerance=1e-5):
    torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(theirs), atol=tolerance, rtol=tolerance)


# --- parity with the official Flax code, through its .npz files -----------------------------------------------------------


@cases
def test_official_npz_loads_and_gives_the_official_logits(case, tmp_path):
    """A file as the official ones are, read without pickle: the plain ViT, one behind a root, one behind a ResNet."""
    np.savez(tmp_path / "official.npz", **published(arrays(case)))
    model = weights.load(build(case), tmp_path / "official.npz").eval()
    with torch.no_grad():
        close(model(image(case)), OFFICIAL[f"{case}.logits"])


@cases
def test_equals_official_gradients(case):
    state = {name: torch.from_numpy(value) for name, value in arrays(case).items()}
    model = weights.load(build(case), state).eval()
    x = image(case).requires_grad_()
    model(x).sin().sum().backward()
    close(x.grad.abs().sum((2, 3)), OFFICIAL[f"{case}.gradient_x"], 1e-3)
    # norms do not mind how an array is laid out: convert gradients' names by converting the arrays' own
    norms = dict(zip(map(str, OFFICIAL[f"{case}.names"]), OFFICIAL[f"{case}.gradient_norms"], strict=True))
    whole = math.sqrt(sum(value**2 for value in norms.values()))
    mine = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert mine == pytest.approx(whole, rel=1e-4)
    for theirs, ours in (
        ("head/kernel", "head.weight"),
        ("cls", "cls_token"),
        ("embedding/kernel", "patch_embed.proj.weight"),
    ):
        assert float(model.get_parameter(ours).grad.norm()) == pytest.approx(float(norms[theirs]), rel=1e-4)


def test_both_numberings_and_prefixes_of_flax_are_read():
    state = {name: torch.from_numpy(value) for name, value in arrays("resnet").items()}
    expected = AugRegViT.convert_state_dict(state)
    renamed = {"opt/target/" + key: value for key, value in published(state).items()}
    assert "opt/target/Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel" in renamed
    given = AugRegViT.convert_state_dict(renamed)
    assert given.keys() == expected.keys() == build("resnet").state_dict().keys()
    assert all(torch.equal(given[key], expected[key]) for key in expected)


def test_unknown_arrays_are_named_and_missing_ones_too():
    state = {name: torch.from_numpy(value) for name, value in arrays("vit").items()}
    with pytest.raises(ValueError, match="pre_logits/kernel"):
        weights.load(build("vit"), state | {"pre_logits/kernel": torch.zeros(8, 8)})
    del state["Transformer/encoderblock_1/MultiHeadDotProductAttention_0/key/kernel"]
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv\.weight is missing"):
        weights.load(build("vit"), state)


# --- the models ---------------------------------------------------------------------------------------------------------------


def test_standardised_kernels_are_what_the_formula_says():
    layer = StdConv2d(3, 4, 3, 2).double()
    x = torch.randn(1, 3, 7, 8, dtype=torch.double)
    w = layer.weight.detach().numpy()
    w = w - w.mean((1, 2, 3), keepdims=True)
    w = torch.from_numpy(w / (w.std((1, 2, 3), keepdims=True) + 1e-5))
    # "SAME" at stride 2: 7 is padded by 1 and 1, 8 by 0 and 1
    close(layer(x), F.conv2d(F.pad(x, (0, 1, 1, 1)), w, stride=2), 1e-12)


def test_a_new_model_starts_at_its_head_bias():
    model = room.vit_tiny_patch16_224(num_classes=10, img_size=32, depth=1, head_bias=-6.9).eval()
    with torch.no_grad():
        close(model(torch.rand(2, 3, 32, 32)), torch.full((2, 10), -6.9))
    assert model.default_cfg["mean"] == (0.5, 0.5, 0.5) and model.blocks[0].mlp.act.approximate == "tanh"
    assert not model.cls_token.any()


def test_hybrids_see_a_token_each_32_pixels():
    for build_hybrid in (room.vit_tiny_r_s16_p8_224, room.vit_small_r26_s32_224, room.vit_large_r50_s32_224):
        with torch.device("meta"):
            model = build_hybrid()
            assert model.forward_features(torch.empty(1, 3, 224, 224)).shape[1] == 50
            assert build_hybrid(img_size=384).pos_embed.shape[1] == 145
    model = room.vit_tiny_r_s16_p8_224(img_size=64, depth=1, num_classes=3)
    model.reset_classifier(4)
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 4) and model.get_classifier().out_features == 4


def test_residual_branches_start_silent():
    unit = build("resnet").patch_embed.backbone.stages[1].blocks[0]
    x = torch.rand(1, 256, 4, 4)
    close(unit(x), F.relu(unit.downsample(x)))


def test_positions_are_resized_as_scipy_does():
    from scipy.ndimage import zoom

    positions = torch.randn(1, 1 + 16, 6)
    theirs = zoom(positions[0, 1:].reshape(4, 4, 6).numpy(), (7 / 4, 7 / 4, 1), order=1).reshape(1, 49, 6)
    resized = resize_pos_embed(positions, (7, 7))
    close(resized[:, 1:], theirs, 1e-6)
    close(resized[:, :1], positions[:, :1], 0)


# --- the recipe ----------------------------------------------------------------------------------------------------------------


def test_the_sweep_has_28_cells():
    grid = augreg_grid()
    assert len(set(grid)) == 28 and {cell.augmentation for cell in grid} == set(AUGREG_SETTINGS)
    assert grid[-1].model_options == {"drop_rate": 0.1, "drop_path_rate": 0.1}
    assert recommended_augreg("B/16", "imagenet21k") == "light2"


def test_nothing_is_nothing():
    x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 1])
    out, target = AugReg("none", 3)(x, y)
    assert torch.equal(out, x) and torch.equal(target, F.one_hot(y, 3).float())
    out, target = AugReg("strong2", 3).eval()(x, y)
    assert torch.equal(out, x) and torch.equal(target, F.one_hot(y, 3).float())
    out, target = AugReg("light1", 3)(x.repeat(8, 1, 1, 1), y.repeat(8), generator=torch.Generator().manual_seed(0))
    assert not torch.equal(out, x.repeat(8, 1, 1, 1)) and torch.equal(target, F.one_hot(y, 3).float().repeat(8, 1))


def test_mixup_mixes_with_the_next_sample_and_stays_mostly_itself():
    x, y = torch.eye(4), F.one_hot(torch.arange(4)).float()
    shares = []
    for seed in range(300):
        mixed, target = mixup(x, y, 0.5, generator=torch.Generator().manual_seed(seed))
        share = float(mixed[0, 0])
        close(mixed, share * x + (1 - share) * x.roll(1, 0))
        close(target, mixed)
        shares.append(share)
    assert min(shares) >= 0.5 and max(shares) <= 1
    # E max(λ, 1-λ) of the arcsine law Beta(1/2, 1/2) is 1/2 + 1/π
    assert np.mean(shares) == pytest.approx(0.5 + 1 / math.pi, abs=0.03)


def test_augmentation_scales_with_the_image():
    small, large = AugReg("medium1", 3, img_size=28).rand_augment, AugReg("medium1", 3).rand_augment
    assert large.argument("TranslateX", 10) == 8 * small.argument("TranslateX", 10)
    assert large.argument("Rotate", 10) == small.argument("Rotate", 10)


def test_sigmoid_loss_sums_over_classes():
    logits, target = torch.randn(3, 4, dtype=torch.double), torch.rand(3, 4, dtype=torch.double)
    p = logits.sigmoid()
    expected = -(target * p.log() + (1 - target) * (1 - p).log()).sum(1).mean()
    close(sigmoid_xent(logits, target), expected, 1e-12)


def test_only_kernels_decay():
    model = build("root")
    kernels, others = kernel_groups(model, lr=0.1, weight_decay=0.3)
    assert kernels["weight_decay"] == 0.3 and others["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in kernels["params"]} == {"weight"}
    assert {"pos_embed", "cls_token", "norm.weight"} <= {names[id(p)] for p in others["params"]}
    assert len(kernels["params"]) + len(others["params"]) == len(names)


def test_data_multiplier_reads_the_curve():
    curve = ([100, 200, 400, 1600], [0.5, 0.6, 0.58, 0.9])
    assert data_multiplier(*curve, 0.6) == pytest.approx(2)
    assert data_multiplier(*curve, 0.75) == pytest.approx(2 * 8**0.5)
    assert data_multiplier(*curve, 0.95) == pytest.approx(16)
    assert data_multiplier(*curve, 0.45) == pytest.approx(2**-0.5)
    assert data_multiplier(*curve, 0.0) == pytest.approx(1 / 16)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: AugReg("brutal", 10), "setting"),
        (lambda: AugReg("none", 0), "num_classes"),
        (lambda: mixup(torch.rand(2, 3), torch.rand(2, 3), -1.0), "alpha"),
        (lambda: recommended_augreg("H/14", "imagenet1k"), "model"),
        (lambda: recommended_augreg("S/16", "cifar"), "dataset"),
        (lambda: data_multiplier([2, 1], [0.1, 0.2], 0.1), "sizes"),
        (lambda: data_multiplier([1], [0.1], 0.1), "sizes"),
        (lambda: resize_pos_embed(torch.rand(1, 12, 4), (3, 3)), "pos_embed"),
        (lambda: room.vit_small_patch16_224(img_size=225), "img_size"),
        (lambda: room.vit_small_r26_s32_224(patch_size=16), "resnet"),
        (lambda: room.vit_tiny_patch16_224(num_heads=5), "num_heads"),
        (lambda: build("vit")(torch.rand(1, 3, 24, 24)), "x has shape"),
    ],
)
def test_wrong_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_tiny_claim_repeats_itself():
    first, second = (claims.augmentation_is_worth_data(Trial(1000, "tiny")) for _ in range(2))
    assert first == second
