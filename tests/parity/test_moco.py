"""MoCo against lightly: head, momentum update, loss with its memory bank, split batch norm, from the same weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saigen.nn.resnet import ResNet
from saigen.papers.representation.moco import KeyQueue, MoCo, SplitBatchNorm2d, info_nce, momentum_update_
from tests.peers import need, need_module


@pytest.mark.peers
def test_same_head_as_lightly():
    need("lightly")
    theirs = need_module("lightly.models.modules.heads").MoCoProjectionHead(16, 16, 8)
    ours = MoCo(lambda num_classes: ResNet("basic", (1,), (16,), num_classes=num_classes), 8, 8, mlp=True).encoder_q.fc
    ours.load_state_dict({key.removeprefix("layers."): value for key, value in theirs.state_dict().items()})
    x = torch.randn(5, 16)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.peers
def test_same_momentum_update_as_lightly():
    need("lightly")
    update = need_module("lightly.models.utils").update_momentum
    q, k = nn.Linear(30, 20), nn.Linear(30, 20)
    twin = copy.deepcopy(k)
    for _ in range(10):
        momentum_update_(k, q, 0.99)
        update(q, twin, 0.99)
    for mine, other in zip(k.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
        assert not torch.equal(mine, dict(q.named_parameters())["weight" if mine.ndim == 2 else "bias"])


@pytest.mark.peers
def test_same_loss_gradients_and_queue_as_lightly():
    """Over three times round the queue."""
    need("lightly")
    theirs = need_module("lightly.loss").NTXentLoss(temperature=0.2, memory_bank_size=(12, 8))
    queue = KeyQueue(8, 12)
    queue.keys.copy_(theirs.memory_bank.bank.T)
    for _ in range(9):
        q = torch.randn(4, 8, requires_grad=True)
        twin, k = q.detach().clone().requires_grad_(), torch.randn(4, 8)
        unit = F.normalize(k, dim=1)
        ours = info_nce(F.normalize(q, dim=1), unit, queue(unit), 0.2)
        other = theirs(twin, k)
        torch.testing.assert_close(ours, other)
        ours.backward()
        other.backward()
        torch.testing.assert_close(q.grad, twin.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(queue.keys.T, theirs.memory_bank.bank)


@pytest.mark.peers
def test_same_split_batch_norm_as_lightly():
    need("lightly")
    theirs = need_module("lightly.models.batchnorm").SplitBatchNorm(6, 3)
    ours, grads = SplitBatchNorm2d(6, 3), []
    with torch.no_grad():
        for module in (ours, theirs):
            module.weight.copy_(torch.linspace(0.5, 2, 6))
    for _ in range(3):
        x = torch.randn(9, 6, 4, 4) + 1
        grads = []
        for module in (ours, theirs):
            inputs = x.clone().requires_grad_()
            y = module(inputs)
            y.pow(3).mean().backward()
            grads.append((y, inputs.grad))
        for mine, other in zip(*grads, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    x = torch.randn(4, 6, 4, 4)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
