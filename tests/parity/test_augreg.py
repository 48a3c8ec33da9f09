"""AugReg's models beside timm's: keys, logits and gradients, and timm's reader of the official files."""

import numpy as np
import pytest
import torch

from saigen import weights
from saigen.papers.vision import augreg as room
from tests.peers import need

pytestmark = pytest.mark.peers
NAMES = [name for name in room.__all__ if name.startswith("vit_")]


@pytest.mark.parametrize("name", NAMES)
def test_timm_checkpoints_have_our_keys_and_shapes(name):
    timm = need("timm")
    with torch.device("meta"):
        model, peer = getattr(room, name)(), timm.create_model(name)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in peer.state_dict().items()}
    for key in ("mean", "std", "crop_pct"):
        assert model.default_cfg[key] == pytest.approx(peer.default_cfg[key])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}),
        ("vit_tiny_r_s16_p8_224", {"img_size": 64, "depth": 1}),
        ("vit_small_r26_s32_224", {"img_size": 64, "depth": 1}),
    ],
)
def test_logits_and_gradients_equal_timm(name, options):
    """With timm's exact GELU; its hybrids add another epsilon to variances, too small to see."""
    timm = need("timm")
    torch.manual_seed(0)
    peer = timm.create_model(name, num_classes=7, **options).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model = weights.load(getattr(room, name)(num_classes=7, gelu="none", **options), peer.state_dict()).eval()
    x = torch.rand(2, 3, 64, 64)
    ours, theirs = model(x), peer(x)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)
    ours.sin().sum().backward()
    theirs.sin().sum().backward()
    gradients = {key: p.grad for key, p in peer.named_parameters()}
    whole = torch.stack([g.norm() for g in gradients.values()]).norm()
    for key, parameter in model.named_parameters():
        assert float((parameter.grad - gradients[key]).norm()) <= 1e-3 * float(whole), key


@pytest.mark.parametrize("case", ["vit", "root", "resnet"])
def test_official_files_load_as_timm_loads_them(case, tmp_path):
    timm = need("timm")
    from tests.golden.augreg.make import CASES, CLASSES, HEADS, LAYERS, MLP, WIDTH
    from tests.papers.vision.test_augreg import arrays, build, published

    np.savez(tmp_path / "official.npz", **published(arrays(case)))
    depths, patch, side = CASES[case]
    sizes = {"img_size": side, "patch_size": patch, "num_classes": CLASSES, "embed_dim": WIDTH, "depth": LAYERS}
    sizes |= {"num_heads": HEADS, "mlp_ratio": MLP / WIDTH}
    from timm.models import vision_transformer as plain
    from timm.models import vision_transformer_hybrid as hybrid

    if depths is None:
        peer = plain.VisionTransformer(**sizes)
    else:
        backbone = hybrid._resnetv2(depths)
        from functools import partial

        embed = partial(hybrid.HybridEmbed, backbone=backbone)
        peer = plain.VisionTransformer(**sizes, embed_layer=embed)
    assert timm is not None
    peer.load_pretrained(str(tmp_path / "official.npz"))
    ours = weights.load(build(case), tmp_path / "official.npz").state_dict()
    assert ours.keys() == peer.state_dict().keys()
    for key, value in peer.state_dict().items():
        assert torch.equal(value, ours[key]), key
