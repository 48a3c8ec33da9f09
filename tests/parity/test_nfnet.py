"""NFNet beside timm: the same logits, features and gradients from the same random weights, and the same clipping."""

import pytest
import torch
import torch.nn.functional as F

from saigen.papers.vision import nfnet
from saigen.papers.vision.nfnet import NFNet, adaptive_clip_grad_
from tests.peers import need, need_module

pytestmark = pytest.mark.peers


def randomise(model):
    """Weights at their initial size, but gains, biases and skip gains that nothing can hide behind."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("gain"):
                tensor.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                tensor.copy_(0.2 * noise)
            else:
                tensor.copy_(noise * tensor[0].numel() ** -0.5)
    return model


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


CASES = [
    ("dm_nfnet_f0", {}),
    ("dm_nfnet_f1", {}),
    ("nf_resnet26", {"like": "timm"}),
    ("nf_resnet50", {"like": "timm"}),
    ("nf_seresnet26", {"like": "timm", "se_ratio": 1 / 16}),
    *[(f"nf_regnet_b{level}", {"like": "timm"}) for level in range(3)],
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_same_logits_as_timm(name, options):
    timm = need("timm")
    theirs = randomise(timm.create_model(name)).eval()
    ours = getattr(nfnet, name.replace("nf_seresnet", "nf_resnet"))(**options).eval()
    ours.load_state_dict(NFNet.convert_state_dict(theirs.state_dict()))
    x = torch.randn(2, 3, 97, 130, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = ours.forward_features(x)
        assert relative(features, theirs.forward_features(x)) < 1e-5
        assert relative(ours(x), theirs(x)) < 1e-5
        pooled = theirs.forward_head(features, pre_logits=True)
        assert relative(ours.forward_head(features, pre_logits=True), pooled) < 1e-5


@pytest.mark.parametrize("level", range(7))
def test_same_layout_and_metadata_as_timm(level):
    timm = need("timm")
    with torch.device("meta"):
        theirs, ours = timm.create_model(f"dm_nfnet_f{level}"), getattr(nfnet, f"dm_nfnet_f{level}")()
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }
    for key in ("input_size", "test_input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"):
        assert ours.default_cfg[key] == theirs.default_cfg[key], key


@pytest.mark.parametrize("level", [3, 4, 5])
def test_same_layout_of_the_large_regnets(level):
    timm = need("timm")
    with torch.device("meta"):
        theirs = timm.create_model(f"nf_regnet_b{level}")
        ours = getattr(nfnet, f"nf_regnet_b{level}")(like="timm")
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }


def test_timms_nfnet_is_refused():
    timm = need("timm")
    with torch.device("meta"):
        state = timm.create_model("nfnet_f0").state_dict()
    with pytest.raises(ValueError, match="another network"):
        NFNet.convert_state_dict(state)


def test_same_gradients_as_timm():
    timm = need("timm")
    theirs = randomise(timm.create_model("dm_nfnet_f0", num_classes=7)).double().train()
    ours = nfnet.dm_nfnet_f0(num_classes=7, drop_rate=0.0, stochdepth_rate=0.0).double().train()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 41, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for model in (ours, theirs):
        F.cross_entropy(model(x), torch.tensor([3])).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert max(relative(p.grad, gradients[name]) for name, p in ours.named_parameters()) < 1e-8


@pytest.mark.parametrize("clipping", [0.003, 0.01, 0.16])
def test_clips_as_timm(clipping):
    need("timm")
    agc = need_module("timm.utils.agc")
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 4, 3, 3), (5, 7), (6,), ()]
    ours, theirs = ([torch.nn.Parameter(torch.randn(s, generator=g)) for s in shapes] for g in twins())
    for a, b in zip(ours, theirs, strict=True):
        a.grad = torch.randn(a.shape, generator=generator) * 0.05
        b.grad = a.grad.clone()
    adaptive_clip_grad_(ours, clipping)
    agc.adaptive_clip_grad(theirs, clip_factor=clipping)
    assert all(torch.allclose(a.grad, b.grad, rtol=1e-5, atol=0) for a, b in zip(ours, theirs, strict=True))


def twins():
    return torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
