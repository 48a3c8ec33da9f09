import pytest
import torch

from saigen.nn.attention import MLP
from saigen.nn.mlp_mixer import MLPMixer, TokenMLP, convert_mixer_state_dict, lecun_normal_
from tests.nn.test_vision_transformer import jittered
from tests.peers import need_module

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_classes": 7}


def test_token_mlp_is_the_mlp_on_the_other_axis():
    torch.manual_seed(0)
    tokens = TokenMLP(9, 5).double()
    channels = MLP(9, 5).double()
    channels.load_state_dict(tokens.state_dict())
    x = torch.randn(2, 9, 3, dtype=torch.double)
    torch.testing.assert_close(tokens(x), channels(x.transpose(1, 2)).transpose(1, 2), atol=1e-14, rtol=0)


@pytest.mark.peers
@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_equals_timm_in_outputs_and_gradients(gelu):
    mixer = need_module("timm.models.mlp_mixer")
    torch.manual_seed(0)
    ours = jittered(MLPMixer(**TINY, gelu=gelu)).double()
    theirs = mixer.MlpMixer(
        img_size=32,
        patch_size=8,
        embed_dim=48,
        num_blocks=2,
        num_classes=7,
        act_layer=lambda: torch.nn.GELU(approximate=gelu),
    ).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(3, 3, 32, 32, dtype=torch.double)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-12, rtol=0)
    torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x), atol=1e-12, rtol=0)
    ours(x).sin().sum().backward()
    theirs(x).sin().sum().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-11, rtol=0, msg=name)


@pytest.mark.peers
@pytest.mark.parametrize("name", ["mixer_s32_224", "mixer_b16_224"])
def test_keys_and_shapes_are_timms(name):
    timm = need_module("timm")
    sizes = {"mixer_s32_224": {"embed_dim": 512, "depth": 8, "patch_size": 32}, "mixer_b16_224": {}}
    with torch.device("meta"):
        ours, theirs = MLPMixer(**sizes[name]), timm.create_model(name)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_flax_names_and_layouts():
    model = jittered(MLPMixer(**TINY))
    state = model.state_dict()
    flax = {
        "opt/target/pre_head_layer_norm/scale": state["norm.weight"],
        "opt/target/pre_head_layer_norm/bias": state["norm.bias"],
    }
    for ours, theirs in (("stem.proj", "stem"), ("head", "head")):
        kernel = state[f"{ours}.weight"]
        flax[f"opt/target/{theirs}/kernel"] = kernel.permute(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T
        flax[f"opt/target/{theirs}/bias"] = state[f"{ours}.bias"]
    for i in range(2):
        for norm in (1, 2):
            flax[f"opt/target/MixerBlock_{i}/LayerNorm_{norm - 1}/scale"] = state[f"blocks.{i}.norm{norm}.weight"]
            flax[f"opt/target/MixerBlock_{i}/LayerNorm_{norm - 1}/bias"] = state[f"blocks.{i}.norm{norm}.bias"]
        for mlp, mixing in (("mlp_tokens", "token_mixing"), ("mlp_channels", "channel_mixing")):
            for fc in (1, 2):
                flax[f"opt/target/MixerBlock_{i}/{mixing}/Dense_{fc - 1}/kernel"] = state[
                    f"blocks.{i}.{mlp}.fc{fc}.weight"
                ].T
                flax[f"opt/target/MixerBlock_{i}/{mixing}/Dense_{fc - 1}/bias"] = state[f"blocks.{i}.{mlp}.fc{fc}.bias"]
    converted = MLPMixer.convert_state_dict(flax)
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key], state[key]) for key in state)
    wrapped = convert_mixer_state_dict(
        {f"module.{key}": value for key, value in state.items()} | {"surplus/kernel": torch.zeros(2, 3)}
    )
    assert wrapped.keys() == state.keys() | {"surplus/kernel"}


def test_init_is_lecun_normal_with_a_zero_head():
    torch.manual_seed(0)
    weight = lecun_normal_(torch.empty(400, 2500))
    assert weight.std().item() == pytest.approx(2500**-0.5, rel=5e-3)
    assert weight.abs().max().item() <= 2 * 2500**-0.5 / 0.8796256
    model = MLPMixer(**TINY)
    assert model(torch.rand(2, 3, 32, 32)).abs().max() == 0


def test_head_can_be_replaced_and_read():
    model = MLPMixer(**TINY)
    x = torch.rand(2, 3, 32, 32)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 16, 48)
    assert model.forward_head(tokens, pre_logits=True).shape == (2, 48)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.get_classifier() is model.head
    model.reset_classifier(0)
    assert model(x).shape == (2, 48)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: MLPMixer(img_size=30, patch_size=16), "img_size is 30"),
        (lambda: MLPMixer(depth=0), "depth is 0"),
        (lambda: MLPMixer(num_classes=-1), "num_classes is -1"),
        (lambda: MLPMixer(**TINY)(torch.rand(2, 1, 32, 32)), "x has shape (2, 1, 32, 32)"),
        (lambda: MLPMixer(**TINY)(torch.rand(2, 3, 64, 64)), "x has shape (2, 3, 64, 64)"),
        (lambda: MLPMixer(**TINY).reset_classifier(-2), "num_classes is -2"),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(ValueError, match="allowed") as raised:
        call()
    assert text in str(raised.value)
