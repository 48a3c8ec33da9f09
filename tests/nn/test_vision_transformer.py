import pytest
import torch

from saigen.nn.attention import MLP, Attention, set_fused
from saigen.nn.vision_transformer import VisionTransformer, resize_positions
from tests.peers import need

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}


def jittered(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, so that no norm or bias is trivially one or zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def test_fused_and_plain_attention_agree_with_gradients():
    torch.manual_seed(0)
    attention = Attention(32, num_heads=4).double()
    x = torch.randn(2, 5, 32, dtype=torch.double, requires_grad=True)
    fused = attention(x)
    (fused_gradient,) = torch.autograd.grad(fused.sin().sum(), x)
    set_fused(attention, False)
    plain = attention(x)
    (plain_gradient,) = torch.autograd.grad(plain.sin().sum(), x)
    torch.testing.assert_close(fused, plain, atol=1e-12, rtol=0)
    torch.testing.assert_close(fused_gradient, plain_gradient, atol=1e-12, rtol=0)


def test_plain_attention_has_second_derivatives():
    torch.manual_seed(0)
    model = VisionTransformer(**TINY, fused_attn=False)
    parameters = list(model.parameters())
    loss = model(torch.rand(2, 3, 32, 32)).square().sum()
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    hvp = torch.autograd.grad(sum((g * g.detach()).sum() for g in gradients), parameters)
    assert all(h.isfinite().all() for h in hvp)
    assert sum(h.abs().sum() for h in hvp) > 0


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("norm_after", [True, False])
def test_pooling(pool, norm_after):
    model = VisionTransformer(**TINY, global_pool=pool, fc_norm=norm_after, class_token=pool == "token").eval()
    x = torch.rand(2, 3, 32, 32)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 16 + (pool == "token"), 48)
    assert model.forward_head(tokens, pre_logits=True).shape == (2, 48)
    torch.testing.assert_close(model(x), model.forward_head(tokens))
    assert hasattr(model.norm, "weight") is not norm_after


def test_loading_at_another_size_interpolates_positions():
    small, large = VisionTransformer(**TINY), VisionTransformer(**TINY | {"img_size": (64, 32)})
    large.load_state_dict(small.state_dict())
    torch.testing.assert_close(large.pos_embed, resize_positions(small.pos_embed, (8, 4)))
    torch.testing.assert_close(large.pos_embed[:, 0], small.pos_embed[:, 0])
    with pytest.raises(ValueError, match="square"):
        resize_positions(torch.zeros(1, 9, 4), (4, 4))


def test_positions_interpolate_to_themselves():
    positions = torch.randn(1, 17, 8)
    torch.testing.assert_close(resize_positions(positions, (4, 4)), positions, atol=1e-5, rtol=0)


def test_jax_init_starts_at_zero_logits():
    model = VisionTransformer(**TINY, init="jax")
    assert model(torch.rand(1, 3, 32, 32)).abs().max() == 0
    bound = (6 / (48 + 48)) ** 0.5
    assert 0.95 * bound < model.blocks[0].attn.qkv.weight.abs().max() <= bound


def test_reset_classifier_and_meta():
    with torch.device("meta"):
        model = VisionTransformer(drop_path_rate=0.1)
    assert sum(p.numel() for p in model.parameters()) == 86_567_656
    model = VisionTransformer(**TINY)
    model.reset_classifier(3)
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 3) and model.get_classifier().out_features == 3
    model.reset_classifier(0)
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 48)


def test_drop_path_rates_grow_linearly():
    model = VisionTransformer(**TINY | {"depth": 5}, drop_path_rate=0.2)
    rates = [block.drop_path1.drop_probability for block in model.blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"img_size": 30}, "img_size"),
        ({"num_heads": 5}, "num_heads"),
        ({"global_pool": "max"}, "global_pool"),
        ({"class_token": False}, "class_token"),
        ({"init": "he"}, "init"),
        ({"gelu": "relu"}, "gelu"),
        ({"num_classes": -1}, "num_classes"),
        ({"depth": 0}, "depth"),
    ],
)
def test_wrong_arguments(wrong, named):
    with pytest.raises(ValueError, match=named):
        VisionTransformer(**TINY | wrong)


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (1, 1, 32, 32)])
def test_wrong_input(shape):
    with pytest.raises(ValueError, match="x has shape"):
        VisionTransformer(**TINY)(torch.rand(shape))


def test_mlp_gelu():
    x = torch.linspace(-3, 3, 64).reshape(4, 16)
    exact, approximate = MLP(16, 32), MLP(16, 32, gelu="tanh")
    approximate.load_state_dict(exact.state_dict())
    torch.testing.assert_close(exact(x), approximate(x), atol=2e-3, rtol=0)
    assert not torch.equal(exact(x), approximate(x))


@pytest.mark.peers
@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("deit_tiny_patch16_224", {"embed_dim": 192, "num_heads": 3}),
        ("vit_small_patch16_224", {"embed_dim": 384, "num_heads": 6}),
        ("vit_tiny_patch16_224", {"embed_dim": 192, "num_heads": 3, "global_pool": "avg"}),
        (
            "vit_tiny_patch16_224",
            {"embed_dim": 192, "num_heads": 3, "global_pool": "avg", "fc_norm": False, "class_token": False},
        ),
    ],
)
def test_equals_timm(name, ours):
    """Outputs and every gradient, from the same jittered weights and inputs."""
    timm = need("timm")
    options = {"class_token", "global_pool", "fc_norm"}
    peer = timm.create_model(name, img_size=64, depth=3, **{k: v for k, v in ours.items() if k in options}).double()
    model = VisionTransformer(img_size=64, depth=3, **ours).double()
    model.load_state_dict(VisionTransformer.convert_state_dict(jittered(peer).state_dict()))
    x = torch.rand(2, 3, 64, 64, dtype=torch.double)
    mine, theirs = model(x), peer(x)
    torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)
    mine.sin().sum().backward()
    theirs.sin().sum().backward()
    gradients = {key: p.grad for key, p in peer.named_parameters()}
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[key], atol=1e-10, rtol=1e-8, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.peers
def test_positions_as_timm():
    need("timm")
    from timm.layers import resample_abs_pos_embed

    positions = torch.randn(1, 197, 16)
    torch.testing.assert_close(resize_positions(positions, (24, 20)), resample_abs_pos_embed(positions, [24, 20]))


@pytest.mark.peers
def test_loads_transformers():
    transformers = need("transformers")
    config = transformers.ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=192,
        num_labels=7,
        layer_norm_eps=1e-6,
    )
    peer = jittered(transformers.ViTForImageClassification(config)).eval()
    model = VisionTransformer(**TINY).eval()
    model.load_state_dict(VisionTransformer.convert_state_dict(peer.state_dict()))
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model(x), peer(x).logits, atol=1e-5, rtol=1e-5)
