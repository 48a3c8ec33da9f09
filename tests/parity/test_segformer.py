"""SegFormer against Transformers: the same weights give the same logits and gradients."""

import pytest
import torch

import saigen
from saigen.papers.dense.segformer import MixTransformer, SegFormer, segmentation_loss
from tests.peers import need

pytestmark = pytest.mark.peers

WIDTHS, DEPTHS = (8, 16, 40, 64), (1, 2, 1, 1)


def stirred(model):
    """Random weights and running statistics large enough that no term is near zero."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(0.0, 0.3, generator=generator)
    return model.double().eval()


def config(**settings):
    # num_labels draws on names that differ a class; the depths and widths are small, the structure is all there.
    return need("transformers").SegformerConfig(
        hidden_sizes=list(WIDTHS), depths=list(DEPTHS), decoder_hidden_size=16, num_labels=5, **settings
    )


def segmenters():
    theirs = stirred(need("transformers").SegformerForSemanticSegmentation(config()))
    # Transformers has one epsilon, 1e-5, in every layer norm; the official blocks have 1e-6.
    ours = SegFormer(MixTransformer(WIDTHS, DEPTHS, norm_eps=1e-5), 5, 16).double().eval()
    ours.load_state_dict(SegFormer.convert_state_dict(theirs.state_dict()))
    return ours, theirs


@pytest.mark.parametrize("early_fusion", [False, True])
def test_equals_transformers_segmenter(early_fusion):
    ours, theirs = segmenters()
    ours.decode_head.early_fusion = early_fusion
    x = torch.rand(2, 3, 70, 93, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(x).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(x), expected, rtol=1e-10, atol=1e-10)


def test_equals_transformers_classifier():
    theirs = stirred(need("transformers").SegformerForImageClassification(config()))
    ours = MixTransformer(WIDTHS, DEPTHS, num_classes=5, norm_eps=1e-5).double().eval()
    ours.load_state_dict(MixTransformer.convert_state_dict(theirs.state_dict()))
    x = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(x).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(x), expected, rtol=1e-10, atol=1e-10)


def test_gradients_and_loss_equal_transformers():
    ours, theirs = segmenters()
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    labels = torch.randint(0, 5, (2, 64, 64), generator=torch.Generator().manual_seed(1))
    labels[:, :10] = 255
    expected = theirs(x, labels=labels).loss
    expected.backward()
    loss = segmentation_loss(ours(x), labels)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    converted = SegFormer.convert_state_dict(gradients)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, converted[name], rtol=1e-7, atol=1e-9, msg=name)


def test_saved_transformers_checkpoints_load_by_name(tmp_path):
    """What ``save_pretrained`` writes (the older names) loads through ``create_model``, with its number of classes."""
    transformers = need("transformers")
    full = transformers.SegformerConfig(
        hidden_sizes=[32, 64, 160, 256], depths=[2, 2, 2, 2], decoder_hidden_size=256, num_labels=7
    )
    x = torch.rand(1, 3, 64, 64)
    for name, theirs in (
        ("segformer_b0", transformers.SegformerForSemanticSegmentation(full).eval()),
        ("mit_b0", transformers.SegformerForImageClassification(full).eval()),
    ):
        theirs.save_pretrained(tmp_path / name)
        ours = saigen.create_model(name, weights=tmp_path / name).eval()
        assert ours.num_classes == 7
        with torch.no_grad():
            # 1e-4: the epsilons differ here.
            torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-4, atol=1e-4)


def test_official_layout_equals_transformers():
    """An official checkpoint, with its wrapper and its stray key, and the same weights in Transformers."""
    ours, theirs = segmenters()
    official = {f"module.{key}": value for key, value in ours.state_dict().items()}
    official["module.decode_head.conv_seg.weight"] = torch.zeros(5, 128, 1, 1, dtype=torch.float64)
    again = SegFormer(MixTransformer(WIDTHS, DEPTHS, norm_eps=1e-5), 5, 16).double().eval()
    again.load_state_dict(SegFormer.convert_state_dict(official))
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(again(x), theirs(x).logits, rtol=1e-10, atol=1e-10)
