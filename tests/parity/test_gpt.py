"""The GPT base against Transformers' GPT-2."""

import pytest
import torch

from saigen.nn.gpt import GPT, convert_gpt2
from tests.peers import need


@pytest.mark.peers
def test_equals_transformers():
    transformers = need("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=20, bos_token_id=0, eos_token_id=0
    )
    theirs = transformers.GPT2Model(config).eval()
    ours = GPT(32, 3, 4, vocabulary=97, positions=20).eval()
    ours.load_state_dict(convert_gpt2(theirs.state_dict()))
    tokens = torch.randint(97, (3, 20))
    a, b = ours(tokens), theirs(tokens).last_hidden_state
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    a.square().sum().backward()
    b.square().sum().backward()
    grads = convert_gpt2({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-4)
