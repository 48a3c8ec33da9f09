"""ResNets: published sizes, the mini forms, the head's interface, wrong arguments."""

import pytest
import torch

from saigen.nn import resnet

SIZES = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}


@pytest.mark.parametrize("name", SIZES)
def test_published_parameter_counts(name):
    with torch.device("meta"):
        net = getattr(resnet, name)()
    assert sum(p.numel() for p in net.parameters()) == SIZES[name]


def test_small_stem_keeps_the_resolution():
    net = resnet.resnet18(small_stem=True, num_classes=10).eval()
    with torch.no_grad():
        stages = net.forward_stages(torch.rand(1, 3, 32, 32))
    assert [tuple(s.shape[1:]) for s in stages] == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]


def test_zero_init_makes_blocks_identities():
    net = resnet.ResNet("bottleneck", (2,), (8,), num_classes=0, small_stem=True, stem_width=32).eval()
    x = net.forward_stem(torch.rand(2, 3, 8, 8))
    assert torch.equal(net.layer1(x.clone()), x)
    net = resnet.ResNet("bottleneck", (2,), (8,), num_classes=0, small_stem=True, stem_width=32, zero_init=False).eval()
    assert not torch.allclose(net.layer1(x.clone()), x)


def test_head_interface():
    net = resnet.ResNet("basic", (1, 1), (8, 16), num_classes=5, in_chans=1)
    x = torch.rand(3, 1, 16, 16)
    assert net(x).shape == (3, 5)
    assert net.forward_head(net.forward_features(x), pre_logits=True).shape == (3, net.num_features) == (3, 16)
    net.reset_classifier(7)
    assert net(x).shape == (3, 7) and net.get_classifier().out_features == net.num_classes == 7
    net.reset_classifier(0)
    assert net(x).shape == (3, 16)


def test_wrapper_prefixes_are_taken_away():
    net = resnet.ResNet("basic", (1,), (8,), num_classes=2)
    wrapped = {f"module.backbone.{k}": v for k, v in net.state_dict().items()}
    assert resnet.ResNet.convert_state_dict(wrapped).keys() == net.state_dict().keys()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"block": "dense"}, "block is 'dense'"),
        ({"depths": (1, 2)}, "depths is (1, 2)"),
        ({"depths": (0,), "widths": (8,)}, "depths is (0,)"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"in_chans": 0}, "in_chans is 0"),
        ({"stem_width": 0}, "stem_width is 0"),
        ({"spatial": lambda c, s: None}, "spatial is"),
    ],
)
def test_wrong_arguments(arguments, text):
    with pytest.raises(ValueError) as error:
        resnet.ResNet(**({"block": "basic"} | arguments))
    assert text in str(error.value)


def test_wrong_channel_count():
    with pytest.raises(ValueError, match="x has 1 channels"):
        resnet.ResNet("basic", (1,), (8,))(torch.rand(1, 1, 8, 8))
