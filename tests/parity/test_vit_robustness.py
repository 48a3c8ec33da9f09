"""The study's tools on timm's and Transformers' models, and BiT beside timm's."""

import pytest
import torch

from saigen.nn.vision_transformer import VisionTransformer
from saigen.papers.vision.vit_robustness import (
    BiTResNet,
    attention_mask,
    find_blocks,
    lesion,
    resnetv2_50x1_bit,
    restrict_attention,
)
from tests.peers import need, need_module

pytestmark = pytest.mark.peers


def filled(model):
    """Weights that leave nothing at zero."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.data = noise * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model.eval()


def test_bit_equals_timm():
    resnetv2 = need_module("timm.models.resnetv2")
    timm = need("timm")
    with torch.device("meta"):
        theirs = timm.create_model("resnetv2_50x1_bit").state_dict()
        ours = resnetv2_50x1_bit().state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    from functools import partial

    layers = need_module("timm.layers")
    peer = filled(
        resnetv2.ResNetV2(
            (1, 2),
            channels=(128, 256),
            num_classes=7,
            stem_chs=32,
            stem_type="fixed",
            conv_layer=partial(layers.StdConv2d, eps=1e-8),
            norm_layer=partial(layers.GroupNormAct, num_groups=8),
        )
    )
    net = BiTResNet((1, 2), widths=(128, 256), groups=8, num_classes=7)
    net.load_state_dict(BiTResNet.convert_state_dict(peer.state_dict()))
    x = torch.rand(2, 3, 45, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(net(x), peer(x), rtol=1e-4, atol=1e-5)
    loss = [model(x).square().mean() for model in (net, peer)]
    for value in loss:
        value.backward()
    torch.testing.assert_close(net.stem.conv.weight.grad, peer.stem.conv.weight.grad, rtol=1e-3, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("fused", (True, False))
def test_surgery_on_timms_vit_equals_ours(fused):
    module = need_module("timm.models.vision_transformer")
    peer = filled(
        module.VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5)
    )
    for block in peer.blocks:
        block.attn.fused_attn = fused
    ours = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5).eval()
    ours.load_state_dict(peer.state_dict())
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for change in (
        lambda model: lesion(model, blocks=1),
        lambda model: lesion(model, attn=[0, 2], mlp=-1),
        lambda model: restrict_attention(model, 1),
        lambda model: restrict_attention(model, patch_to_patch=False, layers=[0]),
    ):
        clean = peer(x)
        with change(peer), change(ours):
            torch.testing.assert_close(ours(x), peer(x), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(peer(x), clean)
        assert torch.equal(peer(x), clean)


@torch.no_grad()
def test_surgery_on_transformers_vit_equals_ours():
    transformers = need("transformers")
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96
    )
    peer = filled(transformers.ViTForImageClassification(config))
    ours = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=2, norm_eps=config.layer_norm_eps
    ).eval()
    ours.load_state_dict(VisionTransformer.convert_state_dict(peer.state_dict()))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(x), peer(x).logits, rtol=1e-4, atol=1e-5)
    assert len(find_blocks(peer)) == 3 and attention_mask((4, 4), 1).shape == (17, 17)
    for change, options in (
        (lesion, {"blocks": 1}),
        (lesion, {"attn": 2}),
        (restrict_attention, {"max_distance": 1}),
        (restrict_attention, {"max_distance": 0, "layers": [2]}),
    ):
        with change(peer, **options, **({"grid": (4, 4)} if change is restrict_attention else {})):
            theirs = peer(x).logits
        with change(ours, **options):
            torch.testing.assert_close(ours(x), theirs, rtol=1e-4, atol=1e-5)
