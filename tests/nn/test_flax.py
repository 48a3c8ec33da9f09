import torch

from saigen.nn.flax import vit_from_flax
from saigen.papers.training.sam import model as sam
from tests.papers.vision.test_augreg import arrays, published


def test_plain_vits_convert_as_in_the_room_of_sam():
    """Two readers of the same files agree, whichever way Flax numbered the modules."""
    state = {name: torch.from_numpy(value) for name, value in arrays("vit").items()}
    for given in (state, published(state)):
        ours, theirs = vit_from_flax(given), sam.vit_from_flax(given)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_other_layouts_stay_as_they_are():
    state = {"blocks.0.attn.qkv.weight": torch.zeros(3), "block1/unit1/conv9/kernel": torch.zeros(1)}
    assert vit_from_flax({"blocks.0.attn.qkv.weight": state["blocks.0.attn.qkv.weight"]}).keys() == {
        "blocks.0.attn.qkv.weight"
    }
    incomplete = {"Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/bias": torch.zeros(2, 4)}
    assert vit_from_flax(incomplete).keys() == incomplete.keys()
