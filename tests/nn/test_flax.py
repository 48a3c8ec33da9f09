import torch

from saigen.nn.flax import vit_from_flax
from tests.papers.vision.test_augreg import arrays, published


def test_both_numberings_of_flax_convert_alike():
    """Published checkpoints number the modules of a block through, newer Flax starts anew for every kind."""
    state = {name: torch.from_numpy(value) for name, value in arrays("vit").items()}
    ours, theirs = vit_from_flax(state), vit_from_flax(published(state))
    assert ours.keys() == theirs.keys() and "blocks.0.attn.qkv.weight" in ours
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_other_layouts_stay_as_they_are():
    state = {"blocks.0.attn.qkv.weight": torch.zeros(3), "block1/unit1/conv9/kernel": torch.zeros(1)}
    assert vit_from_flax({"blocks.0.attn.qkv.weight": state["blocks.0.attn.qkv.weight"]}).keys() == {
        "blocks.0.attn.qkv.weight"
    }
    incomplete = {"Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/bias": torch.zeros(2, 4)}
    assert vit_from_flax(incomplete).keys() == incomplete.keys()
