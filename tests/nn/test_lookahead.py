"""Lookahead by hand, against pytorch_optimizer, and what any optimizer must do."""

import copy
import io

import pytest
import torch
from torch import nn

from saigen.nn.lookahead import Lookahead

INNER = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.05, weight_decay=0.1),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def descend(net, optimizer, numbers):
    for number in numbers:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("inner", INNER)
def test_slow_weights_by_hand(inner):
    k, alpha = 3, 0.7
    net, plain = network(), network()
    optimizer, fast = Lookahead(INNER[inner](net.parameters()), k, alpha), INNER[inner](plain.parameters())
    slow = weights(plain)
    for number in range(10):
        descend(net, optimizer, [number])
        descend(plain, fast, [number])
        if (number + 1) % k == 0:
            slow = slow + alpha * (weights(plain) - slow)
            nn.utils.vector_to_parameters(slow.clone(), plain.parameters())
        torch.testing.assert_close(weights(net), weights(plain), rtol=0, atol=1e-14)


@pytest.mark.peers
@pytest.mark.parametrize("inner", INNER)
def test_equals_pytorch_optimizer(inner):
    peer = pytest.importorskip("pytorch_optimizer").Lookahead
    ours, theirs = network(), network()
    descend(ours, Lookahead(INNER[inner](ours.parameters()), 5, 0.8), range(23))
    descend(theirs, peer(INNER[inner](theirs.parameters()), k=5, alpha=0.8), range(23))
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-14)


def test_alpha_one_is_the_inner_optimizer_and_k_one_shortens_each_step():
    net, plain = network(), network()
    descend(net, Lookahead(INNER["sgd"](net.parameters()), 4, 1.0), range(9))
    descend(plain, INNER["sgd"](plain.parameters()), range(9))
    torch.testing.assert_close(weights(net), weights(plain), rtol=0, atol=1e-14)
    half, whole = network(), network()
    descend(half, Lookahead(torch.optim.SGD(half.parameters(), 0.2), 1, 0.5), range(9))
    descend(whole, torch.optim.SGD(whole.parameters(), 0.1), range(9))
    torch.testing.assert_close(weights(half), weights(whole), rtol=0, atol=1e-14)


@pytest.mark.parametrize("stop", (4, 5, 6))
@pytest.mark.parametrize("inner", INNER)
def test_resumes_exactly(inner, stop):
    whole, half, rest = network(), network(), network()
    descend(whole, Lookahead(INNER[inner](whole.parameters()), 5, 0.5), range(12))
    optimizer = Lookahead(INNER[inner](half.parameters()), 5, 0.5)
    descend(half, optimizer, range(stop))
    buffer = io.BytesIO()
    torch.save({"net": half.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    rest.load_state_dict(saved["net"])
    optimizer = Lookahead(INNER[inner](rest.parameters()), 5, 0.5)
    optimizer.load_state_dict(saved["optimizer"])
    descend(rest, optimizer, range(stop, 12))
    assert torch.equal(weights(whole), weights(rest))
    assert optimizer.param_groups is optimizer.optimizer.param_groups


def test_schedulers_new_groups_closures_and_copies():
    net = network()
    optimizer = Lookahead(INNER["sgd"](net[0].parameters()), 2, 0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    descend(net, optimizer, range(1))
    scheduler.step()
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.05
    optimizer.add_param_group({"params": net[2].parameters(), "lr": 0.3})
    assert [group["lr"] for group in optimizer.optimizer.param_groups] == [0.05, 0.3]
    before = weights(net[2])
    descend(net, optimizer, range(1, 3))
    assert not torch.equal(before, weights(net[2]))
    both = copy.deepcopy((net, optimizer))
    descend(net, optimizer, range(3, 8))
    descend(*both, range(3, 8))
    assert torch.equal(weights(net), weights(both[0]))
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0


def test_wrong_arguments():
    inner = INNER["sgd"](network().parameters())
    for arguments, word in (((None,), "optimizer"), ((inner, 0), "k"), ((inner, 1.5), "k"), ((inner, 5, 0.0), "alpha")):
        with pytest.raises(ValueError, match=f"^{word} is"):
            Lookahead(*arguments)
    with pytest.raises(ValueError, match="allowed is one that Lookahead"):
        Lookahead(inner).load_state_dict(inner.state_dict())
