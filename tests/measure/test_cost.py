"""Costs against hand formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saigen.measure import buffers, cost, latency, macs, parameters, peak_memory, speed_ratio


def test_parameters_counts_a_shared_one_once_and_buffers_no_counters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.out = nn.Linear(4, 10, bias=False)
            self.out.weight = self.embed.weight
            self.norm = nn.BatchNorm1d(4)
            self.norm.weight.requires_grad_(False)

    assert parameters(Tied()) == 10 * 4 + 2 * 4
    assert parameters(Tied(), trainable_only=True) == 10 * 4 + 4
    assert buffers(Tied()) == 2 * 4


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (3, 11, 11), 6 * 6 * 8 * 3 * 9),
        (nn.Conv2d(8, 16, 5, groups=4, padding="same"), (8, 7, 9), 7 * 9 * 16 * 2 * 25),
        (nn.Conv2d(8, 8, 3, groups=8), (8, 7, 9), 5 * 7 * 8 * 9),
        (nn.Conv1d(4, 6, 3), (4, 10), 8 * 6 * 4 * 3),
        (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (4, 5, 5), 25 * 4 * 3 * 4),
        (nn.Linear(5, 7), (5,), 35),
        (nn.Linear(5, 7), (3, 4, 5), 3 * 4 * 35),
        (nn.Linear(5, 7, bias=False), (3, 5), 3 * 35),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_macs_of_layers(layer, shape, expected, inference):
    with torch.inference_mode(inference):
        assert macs(layer, shape) == expected


class Attention(nn.Module):
    def __init__(self, dim=12, heads=3):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


def test_macs_of_attention_counts_both_products_once():
    n, c = 5, 12
    expected = n * c * 3 * c + 2 * n * n * c + n * c * c
    assert macs(Attention(), (n, c)) == expected
    with torch.inference_mode():
        assert macs(Attention(), (n, c)) == expected
    layer = nn.TransformerEncoderLayer(c, 3, 4 * c, batch_first=True)
    assert macs(layer, (n, c)) == expected + 2 * n * c * 4 * c


@pytest.mark.parametrize("grad", [False, True])
def test_fused_attention_on_the_cpu_is_counted_like_the_decomposed_one(grad):
    q, k, v = torch.rand(2, 3, 5, 8, requires_grad=grad), torch.rand(2, 3, 7, 8), torch.rand(2, 3, 7, 8)
    with cost._MacCounter() as counter:
        F.scaled_dot_product_attention(q, k, v)
    assert counter.total == 2 * 3 * 5 * 7 * (8 + 8)


def test_macs_of_matrix_products_written_out():
    class Products(nn.Module):
        def forward(self, x):
            y = torch.einsum("bij,bkj->bik", x, x)
            return torch.baddbmm(y, y, y) + y @ torch.ones(y.shape[-1], device=x.device)[:, None]

    assert macs(Products(), (4, 6)) == 4 * 4 * 6 + 4 * 4 * 4 + 4 * 4


def test_macs_leaves_the_model_alone_and_takes_a_builder():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))[:2].train()
    weight = model[0].weight.clone()
    assert macs(model, (3, 5, 5)) == 25 * 12
    assert model.training and model[0].weight.device.type == "cpu" and torch.equal(model[0].weight, weight)
    assert macs(lambda: nn.Conv2d(3, 4, 1), (3, 5, 5)) == 25 * 12
    assert macs(nn.Embedding(9, 4), inputs=[torch.zeros(2, 3, dtype=torch.int64)]) == 0
    assert macs(nn.Linear(3, 4), inputs=[torch.zeros(5, 3)]) == 60
    with pytest.raises(ValueError, match="exactly one"):
        macs(model)


def test_latency_is_seconds_of_one_call():
    import time

    assert 0.01 < latency(lambda: time.sleep(0.01), min_run_time=0.05) < 1.0


def test_speed_ratio_reads_the_clock(monkeypatch):
    # a clock that stands in for the machine: the baseline takes 3 s, ours 2 s, with a wobble that is not one-sided
    class Clock:
        wobble = 0

        def __init__(self, fn, threads, seconds):
            self.seconds = fn()

        def __call__(self):
            Clock.wobble += 1
            return self.seconds * (1.01 if Clock.wobble % 3 else 0.99)

    monkeypatch.setattr(cost, "_Clock", Clock)
    assert speed_ratio(lambda: 3.0, lambda: 2.0) == pytest.approx(1.5, rel=0.03)

    class Drifting(Clock):
        def __call__(self):
            Clock.wobble += 1
            return self.seconds * (1.1 if Clock.wobble % 4 in (0, 1) else 1.0)

    Clock.wobble = 0
    monkeypatch.setattr(cost, "_Clock", Drifting)
    with pytest.raises(RuntimeError, match="not quiet"):
        speed_ratio(lambda: 3.0, lambda: 2.0)
    with pytest.raises(ValueError, match="pairs is 1"):
        speed_ratio(lambda: 3.0, lambda: 2.0, pairs=1)


def test_peak_memory_counts_what_lives_at_once():
    size = 4 * 1000

    def chain():
        x = torch.zeros(1000)
        for _ in range(5):
            x = x + 1
        return x

    def kept():
        return [torch.zeros(1000) + 0 for _ in range(5)]

    assert peak_memory(chain) == 2 * size
    assert peak_memory(kept) == 6 * size
    there_before = torch.zeros(1000)
    assert peak_memory(lambda: there_before.view(10, 100).t()) == 0
    assert peak_memory(lambda: there_before.add_(1)) == 0


def test_peak_memory_sees_what_autograd_keeps():
    x = torch.zeros(1000)
    w = torch.ones(1000, requires_grad=True)

    def forward():
        y = x
        for _ in range(4):
            y = (y * w).exp()
        return y

    with torch.no_grad():
        without = peak_memory(forward)
    assert without == 3 * 4000  # the old value, the product and the new value
    assert peak_memory(forward) >= 5 * 4000
    assert peak_memory(lambda: forward().sum().backward()) >= 6 * 4000


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with cost.threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
