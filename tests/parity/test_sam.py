"""SAM and the paper's models against public peers: pytorch_optimizer, timm, curvlinops."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import saigen.papers.training.sam as room
from saigen.papers.training.sam import SAM, hessian_top_eigenvalue
from tests.nn.test_vision_transformer import jittered
from tests.papers.training.test_sam import closure_of, make_batch, make_net, weights
from tests.peers import need, need_module

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_steps_equal_pytorch_optimizer(base, adaptive):
    theirs = need("pytorch_optimizer")
    base = {"SGD": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True), "AdamW": torch.optim.AdamW}[base]
    nets = [make_net().double(), make_net().double()]
    ours = SAM(nets[0].parameters(), base, rho=0.1, adaptive=adaptive, lr=0.05, weight_decay=0.01)
    peer = theirs.SAM(nets[1].parameters(), base, rho=0.1, adaptive=adaptive, lr=0.05, weight_decay=0.01)
    for step in range(8):
        x, y = make_batch(step)
        ours.step(closure_of(nets[0], ours, (x.double(), y)))
        closure = closure_of(nets[1], peer, (x.double(), y))
        closure()  # this peer's step makes the second pass only
        peer.step(closure)
        # this peer takes its norm in float32, whatever the weights are
        torch.testing.assert_close(weights(nets[0]), weights(nets[1]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("sam_vit_tiny_patch16_224", "vit_tiny_patch16_224"),
        ("sam_vit_small_patch32_224", "vit_small_patch32_224"),
        ("sam_mixer_s32_224", "mixer_s32_224"),
    ],
)
def test_models_equal_timm_with_its_exact_gelu(ours, theirs):
    timm = need("timm")
    torch.manual_seed(0)
    model = jittered(getattr(room, ours)(gelu="none")).double().eval()
    peer = timm.create_model(theirs).double().eval()
    peer.load_state_dict(model.state_dict())
    x = torch.rand(1, 3, 224, 224, dtype=torch.double)
    a, b = model(x), peer(x)
    torch.testing.assert_close(a, b, atol=1e-10 * b.abs().max().item(), rtol=0)
    a.square().mean().backward()
    b.square().mean().backward()
    # the gradient of Mixer's second token bias is zero but for rounding (layer norm takes it off): one scale for all
    scale = max(q.grad.abs().max().item() for q in peer.parameters())
    for (name, p), q in zip(model.named_parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-10 * scale, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("sam_vit_base_patch16_224", "vit_base_patch16_224.sam_in1k"),
        ("sam_vit_base_patch32_224", "vit_base_patch32_224.sam_in1k"),
        ("sam_vit_small_patch16_224", "vit_small_patch16_224"),
        ("sam_vit_large_patch16_224", "vit_large_patch16_224"),
        ("sam_mixer_b32_224", "mixer_b32_224"),
        ("sam_mixer_b16_224", "mixer_b16_224"),
        ("sam_mixer_l16_224", "mixer_l16_224"),
    ],
)
def test_timm_checkpoints_have_our_keys_and_shapes(ours, theirs):
    timm = need("timm")
    with torch.device("meta"):
        model, peer = getattr(room, ours)(), timm.create_model(theirs)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in peer.state_dict().items()}
    if "sam" in theirs:
        assert model.default_cfg["mean"] == peer.default_cfg["mean"]
        assert model.default_cfg["crop_pct"] == peer.default_cfg["crop_pct"]


def test_flax_arrays_load_as_timm_loads_them(tmp_path):
    """timm's own reader of the official npz files, and ours, give the same weights."""
    import numpy as np

    need("timm")
    timm_vit = need_module("timm.models.vision_transformer")
    from tests.papers.training.test_sam_models import arrays_of, build, published

    arrays = published(arrays_of("vit"))
    np.savez(tmp_path / "vit.npz", **{key: value.numpy() for key, value in arrays.items()})
    peer = timm_vit.VisionTransformer(
        img_size=8, patch_size=4, num_classes=5, embed_dim=8, depth=2, num_heads=2, mlp_ratio=2
    )
    peer.load_pretrained(str(tmp_path / "vit.npz"))
    ours = build("vit").convert_state_dict(arrays)
    assert ours.keys() == peer.state_dict().keys()
    for key, value in peer.state_dict().items():
        assert torch.equal(value, ours[key]), key


def test_top_eigenvalue_equals_curvlinops():
    from scipy.sparse.linalg import eigsh

    curvlinops = need("curvlinops")
    net = make_net().double()
    x, y = make_batch(n=24)
    operator = curvlinops.HessianLinearOperator(net, nn.CrossEntropyLoss(), list(net.parameters()), [(x.double(), y)])
    theirs = eigsh(operator.to_scipy(), k=1, which="LM", return_eigenvectors=False)[0]
    ours = hessian_top_eigenvalue(
        lambda: F.cross_entropy(net(x.double()), y), net.parameters(), iterations=400, tolerance=1e-7
    )
    assert ours.value == pytest.approx(float(theirs), rel=1e-3)
