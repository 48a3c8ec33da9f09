"""The GPT base: causal, blind to padding, initialised as GPT-2, minGPT's layout."""

import math

import pytest
import torch

from saigen.nn.gpt import GPT, causal_mask, convert_gpt2, convert_mingpt


def model(**options):
    torch.manual_seed(0)
    return GPT(16, 3, 4, **options).eval()


def test_a_token_sees_itself_and_the_past():
    gpt = model(vocabulary=11, positions=8)
    tokens = torch.randint(11, (2, 8))
    other = tokens.clone()
    other[:, 5] = (other[:, 5] + 1) % 11
    a, b = gpt(tokens), gpt(other)
    assert torch.equal(a[:, :5], b[:, :5]) and not torch.allclose(a[:, 5:], b[:, 5:])


def test_padding_is_seen_by_nobody():
    gpt, x = model(), torch.randn(2, 6, 16)
    keep = torch.ones(2, 6, dtype=torch.bool)
    keep[0, :3] = False
    changed = x.clone()
    changed[0, :3] += 5.0
    a, b = gpt(x, keep), gpt(changed, keep)
    assert torch.equal(a[keep], b[keep]) and a.isfinite().all()
    torch.testing.assert_close(gpt(x, torch.ones_like(keep)), gpt(x))
    torch.testing.assert_close(gpt(x[:1], keep[:1])[:, 3:], gpt(x[:1, 3:]))
    assert causal_mask(keep).shape == (2, 1, 6, 6)


def test_rows_are_those_of_the_whole():
    gpt, x = model(), torch.randn(2, 6, 16)
    keep = torch.tensor([[False, True, True, True, True, True], [True] * 6])
    rows = torch.tensor([1, 2, 5])
    for given in (None, keep):
        torch.testing.assert_close(gpt(x, given, rows), gpt(x, given)[:, rows])


def test_initialisation_is_that_of_gpt_2():
    torch.manual_seed(0)
    gpt = GPT(128, 8, 4, vocabulary=1000)
    block = gpt.h[0]
    assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
    assert gpt.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert all((p == 0).all() for name, p in gpt.named_parameters() if name.endswith("bias"))
    plain = GPT(128, 8, 4, scaled_residuals=False)
    assert plain.h[0].mlp.c_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_layouts():
    gpt = model(vocabulary=11)
    state = gpt.state_dict()
    linear = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    theirs = {
        name: value.T.contiguous() if name.endswith("weight") and any(part in name for part in linear) else value
        for name, value in state.items()
    }
    theirs["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    theirs["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    for given in (theirs, state):
        converted = convert_gpt2(given)
        assert converted.keys() == state.keys()
        assert all(torch.equal(converted[name], state[name]) for name in state)
    below = convert_gpt2({f"transformer.{name}": value for name, value in theirs.items()})
    assert torch.equal(below["transformer.h.1.mlp.c_proj.weight"], state["h.1.mlp.c_proj.weight"])
    assert convert_mingpt({"blocks.0.attn.key.weight": torch.ones(1), "x": torch.ones(1)}).keys() == {
        "blocks.0.attn.key.weight",
        "x",
    }


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((10, 2, 3), "heads is 3"),
        ((0, 2, 1), "width is 0"),
        ((8, 0, 1), "depth is 0"),
    ],
)
def test_wrong_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        GPT(*arguments)
    with pytest.raises(ValueError, match="activation is 'tanh'"):
        GPT(8, 1, 1, activation="tanh")
    with pytest.raises(ValueError, match="at most 4"):
        model(positions=4)(torch.zeros(1, 5, 16))
