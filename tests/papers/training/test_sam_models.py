"""The paper's models, and the optimizer, against golden vectors that the official JAX code gave (tests/golden/sam)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import saigen.papers.training.sam as room
from saigen import weights
from saigen.nn.mlp_mixer import MLPMixer
from saigen.papers.training.sam import RHO, SAM, SAMVisionTransformer, sam_mixer_s32_224, sam_vit_tiny_patch16_224

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "sam"
MODELS = [name for name in room.__all__ if name.startswith("sam_")]


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}


def arrays_of(name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix("params:"): value for key, value in golden(name).items() if key.startswith("params:")}


PUBLISHED = {
    "LayerNorm_1": "LayerNorm_2",
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "MlpBlock_0": "MlpBlock_3",
}


def published(arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The ViT's arrays under the names of the published checkpoints, which an older Flax gave."""
    return {"/".join(PUBLISHED.get(part, part) for part in key.split("/")): value for key, value in arrays.items()}


def build(name: str) -> nn.Module:
    if name == "vit":
        return SAMVisionTransformer(
            img_size=8,
            patch_size=4,
            num_classes=5,
            embed_dim=8,
            depth=2,
            num_heads=2,
            mlp_ratio=2.0,
            gelu="tanh",
            init="jax",
        )
    return MLPMixer(
        img_size=8, patch_size=4, num_classes=5, embed_dim=8, depth=2, tokens_dim=6, channels_dim=16, gelu="tanh"
    )


@pytest.mark.parametrize(("name", "names"), [("vit", "published"), ("vit", "new"), ("mixer", "published")])
def test_equals_official_flax_model(name, names, tmp_path):
    vectors = golden(name)
    model = build(name)
    arrays = published(arrays_of(name)) if name == "vit" and names == "published" else arrays_of(name)
    np.savez(tmp_path / "checkpoint.npz", **{key: value.numpy() for key, value in arrays.items()})
    weights.load(model, tmp_path / "checkpoint.npz")  # fails where a key is missing, surplus or misshapen
    x = vectors["x"].permute(0, 3, 1, 2).contiguous().requires_grad_()
    logits = model(x)
    torch.testing.assert_close(logits, vectors["logits"], atol=2e-6, rtol=1e-5)
    logits.sin().sum().backward()
    torch.testing.assert_close(x.grad, vectors["gradient_x"].permute(0, 3, 1, 2), atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(model.head.weight.grad.T, vectors["gradient_head"], atol=2e-6, rtol=1e-4)
    exact = type(model)(**{"img_size": 8, "patch_size": 4, "num_classes": 5, "embed_dim": 8, "depth": 2} | extra(name))
    exact.load_state_dict(model.state_dict())
    assert (exact(x) - logits).abs().max() > 1e-5  # the exact GELU is not what JAX computes


def extra(name: str) -> dict[str, float]:
    return {"num_heads": 2, "mlp_ratio": 2.0} if name == "vit" else {"tokens_dim": 6, "channels_dim": 16}


def test_equals_official_sam_steps():
    """Six steps of the official ``dual_vector`` and ``clip_by_global_norm``, L2 in both passes, Nesterov momentum."""
    vectors = golden("steps")
    w = {key: nn.Parameter(vectors[f"start_{key}"].clone()) for key in "abc"}
    x, y = vectors["x"], vectors["y"]
    optimizer = SAM(
        w.values(),
        torch.optim.SGD,
        rho=float(vectors["rho"]),
        l2=float(vectors["l2"]),
        max_grad_norm=float(vectors["limit"]),
        perturb_eps=0.0,
        lr=float(vectors["lr"]),
        momentum=float(vectors["beta"]),
        nesterov=True,
    )
    clipped = []

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(torch.tanh(x @ w["a"].T + w["b"]) @ w["c"].T, y)
        loss.backward()
        return loss

    for step in range(6):
        optimizer.step(closure)
        clipped.append(torch.cat([p.grad.flatten() for p in w.values()]).norm().item())
        for key, p in w.items():
            # torch's clip_grad_norm_ divides by the norm + 1e-6
            torch.testing.assert_close(p.detach(), vectors[f"step{step}_{key}"], atol=1e-5, rtol=1e-5)
    assert max(clipped) == pytest.approx(float(vectors["limit"]), rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_models_build_on_meta_with_other_heads(name):
    with torch.device("meta"):
        model = getattr(room, name)(num_classes=7, in_chans=1)
    patch = int(name.removesuffix("_224").rpartition("patch")[2]) if "vit" in name else int(name.split("_")[2][1:])
    assert model.patch_size == patch and model.head.out_features == 7
    assert model.default_cfg["input_size"] == (1, 224, 224) and model.default_cfg["mean"] == (0.5,)
    assert all(p.is_meta for p in model.parameters())
    assert set(RHO) <= set(MODELS)


def test_models_start_as_in_the_official_code():
    torch.manual_seed(0)
    vit, mixer = sam_vit_tiny_patch16_224(), sam_mixer_s32_224()
    for model in (vit, mixer):
        assert model.head.weight.abs().max() == 0 and model.head.bias.abs().max() == 0
        assert {m.approximate for m in model.modules() if isinstance(m, nn.GELU)} == {"tanh"}
    assert vit.cls_token.abs().max() == 0 and vit.pos_embed.std().item() == pytest.approx(0.02, rel=0.02)
    assert vit.blocks[0].mlp.fc1.weight.abs().max().item() == pytest.approx((6 / (192 + 768)) ** 0.5, rel=1e-2)
    assert vit.blocks[0].attn.qkv.weight.abs().max().item() == pytest.approx((6 / (192 + 192)) ** 0.5, rel=1e-2)


def test_overrides_and_wrong_arguments():
    model = sam_vit_tiny_patch16_224(img_size=32, num_classes=3, drop_rate=0.1, gelu="none")
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    with pytest.raises(TypeError):
        sam_vit_tiny_patch16_224(size=32)
    with pytest.raises(ValueError, match="img_size is 30"):
        sam_mixer_s32_224(img_size=30)


def test_an_incomplete_or_strange_flax_checkpoint_is_named():
    state = published(arrays_of("vit"))
    del state["Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/kernel"]
    with pytest.raises(ValueError, match=r"blocks.1.attn.qkv.weight is missing.*query/kernel is unexpected"):
        weights.load(build("vit"), state)
    state = arrays_of("mixer")
    with pytest.raises(ValueError, match="pre_logits/kernel is unexpected"):
        weights.load(build("mixer"), state | {"pre_logits/kernel": torch.zeros(8, 8)})


def test_another_head_stays_new_with_a_warning():
    state = published(arrays_of("vit"))
    model = build("vit")
    model.reset_classifier(3)
    with pytest.warns(UserWarning, match="another number of classes"):
        weights.load(model, state)
    assert model(torch.rand(1, 3, 8, 8)).shape == (1, 3)
