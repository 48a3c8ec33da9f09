"""Wide and deep networks beside torchvision's and timm's, and the study's tools on them."""

import pytest
import torch

from saigen.papers.analysis.wide_and_deep import (
    ActivationRecorder,
    cka_matrix,
    deletable_blocks,
    delete_blocks,
    principal_components,
    residual_blocks,
    scaled_resnet50,
)
from tests.peers import need

pytestmark = pytest.mark.peers


def filled(model):
    """Weights and statistics that leave nothing at zero."""
    generator = torch.Generator().manual_seed(0)
    state = model.state_dict()
    for name, value in state.items():
        if value.ndim > 1:
            state[name] = torch.randn(value.shape, generator=generator) * value[0].numel() ** -0.5
        elif value.is_floating_point():
            state[name] = 0.5 + torch.rand(value.shape, generator=generator)
    model.load_state_dict(state)
    return model.eval()


def test_resnet50_is_torchvisions_but_for_the_pooling():
    torchvision = need("torchvision")
    with torch.device("meta"):
        theirs = torchvision.models.resnet50().state_dict()
        ours = scaled_resnet50().state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    peer = filled(torchvision.models.resnet.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 2, 1], num_classes=7))
    model = scaled_resnet50(0.34, scale_all=True, num_classes=7).eval()
    model.load_state_dict(model.convert_state_dict(peer.state_dict()))
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(model(x), peer(x), rtol=1e-3)
    # of an odd side TensorFlow pads both ends, as PyTorch does
    odd = torch.rand(2, 3, 61, 61, generator=torch.Generator().manual_seed(2))
    for images in (odd, x):
        torch.testing.assert_close(model(images), peer(images), rtol=1e-4, atol=1e-5)
        model.zero_grad(), peer.zero_grad()
        for each in (model, peer):
            each(images).square().mean().backward()
        torch.testing.assert_close(model.conv1.weight.grad, peer.conv1.weight.grad, rtol=1e-3, atol=1e-5)
        peer.maxpool = model.maxpool


@torch.no_grad()
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_tools_on_other_libraries_networks(library):
    peer = need(library)
    make = peer.models.resnet18 if library == "torchvision" else (lambda: peer.create_model("resnet18"))
    torch.manual_seed(0)
    model, x = filled(make()), torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    names = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert list(residual_blocks(model)) == names
    assert deletable_blocks(model) == ("layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1")
    full = model(x)
    with delete_blocks(model, ["layer2.1", "layer4.1"]):
        without = model(x)
    by_hand = model.maxpool(
        getattr(model, "relu", None)(model.bn1(model.conv1(x)))
        if library == "torchvision"
        else model.act1(model.bn1(model.conv1(x)))
    )
    for name in names:
        if name not in ("layer2.1", "layer4.1"):
            by_hand = model.get_submodule(name)(by_hand)
    pool = model.avgpool if library == "torchvision" else model.global_pool
    torch.testing.assert_close(without, model.fc(pool(by_hand).flatten(1)))
    assert not torch.allclose(without, full) and torch.equal(model(x), full)

    # blocks change their norm's output in place: what is recorded is what the norm gave
    inside = {}

    def note(module, inputs, output):
        inside["bn2"] = output.clone()

    handle = model.layer1[0].bn2.register_forward_hook(note)
    with ActivationRecorder(model, ["layer1.0.bn2", "layer1.0"]) as recorder:
        model(x)
    handle.remove()
    kept = recorder.take()
    assert torch.equal(kept["layer1.0.bn2"], inside["bn2"]) and not torch.equal(kept["layer1.0.bn2"], kept["layer1.0"])

    found = cka_matrix(model, x, layers="blocks", batch_size=8, passes=1)
    assert found.rows == tuple(names) and torch.allclose(found.matrix.diagonal(), torch.ones(8, dtype=torch.float64))
    assert (principal_components(model, x, layers="blocks").shares > 1 / 8).all()
