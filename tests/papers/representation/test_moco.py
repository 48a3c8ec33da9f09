"""MoCo: the official code's training, the loss, the queue, the momentum update, shuffling BN, the two other mechanisms."""

import math
import socket
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saigen.cards import catalogue
from saigen.nn.resnet import ResNet, resnet18, resnet50
from saigen.papers.representation.moco import (
    EndToEnd,
    InfoNCE,
    KeyQueue,
    LinearClassifier,
    MemoryBank,
    MoCo,
    MoCoViews,
    SplitBatchNorm2d,
    backbone_state_dict,
    claims,
    contrast,
    detectron2_state_dict,
    half_life,
    info_nce,
    learning_rate,
    moco_v1_augment,
    moco_v1_resnet50,
    moco_v2_augment,
    moco_v2_resnet50,
    momentum_update_,
    recipe,
    shuffle_batch,
    uniform_loss,
    unshuffle_batch,
)
from saigen.trial import Trial
from tests.golden.moco import make as official

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "moco" / "official.npz"


@pytest.fixture(scope="module")
def golden():
    return {name: torch.from_numpy(v) for name, v in np.load(GOLDEN).items() if v.dtype.kind != "U"}


def unit(*shape, **options):
    return F.normalize(torch.randn(*shape, **options), dim=1)


class Small(nn.Module):
    """An encoder without batch norm."""

    def __init__(self, num_classes=6):
        super().__init__()
        self.hidden, self.fc = nn.Linear(12, 9), nn.Linear(9, num_classes)

    def forward(self, x):
        return self.fc(self.hidden(x).tanh())


def small(**options):
    return MoCo(Small, **({"dim": 6, "queue_size": 16, "momentum": 0.9, "temperature": 0.2} | options))


# --- the official code, two devices in two processes, against one process that splits its batch norms


def ours_of_theirs(count, batch=official.PROCESSES * official.BATCH):
    """Their batch is the devices' one after the other, ours deals them out in turn: our place -> theirs, ``count`` times."""
    places = torch.arange(batch).view(official.PROCESSES, official.BATCH).T.reshape(-1)
    return torch.cat([places + batch * n for n in range(count)])


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_training_equals_the_official_code(golden, version, monkeypatch):
    options = {"queue_size": 16, "momentum": 0.9, "temperature": 0.2, "mlp": version == "v2"}
    model = MoCo(official.Encoder, 6, bn_splits=2, **options)
    model.queue.keys.copy_(official.fill(model))
    mine, size = ours_of_theirs(1), 8
    back = mine.argsort()
    shuffles = iter(golden[f"{version}_shuffles"])
    # their k-th shuffled image is of device k // 4; ours of device k % 2
    monkeypatch.setattr(torch, "randperm", lambda n, generator=None: back[next(shuffles)[mine]])
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], official.RATE, momentum=0.9, weight_decay=1e-4
    )
    columns = torch.arange(16)
    for step, (x_q, x_k) in enumerate(official.images().flatten(2, 3)[:, :, mine]):
        logits, labels = model(x_q, x_k)
        assert labels.tolist() == [0] * size
        theirs = golden[f"{version}_logits"][:, step].flatten(0, 1)[mine]
        torch.testing.assert_close(
            logits, torch.cat([theirs[:, :1], theirs[:, 1:][:, columns]], 1), rtol=1e-4, atol=1e-4
        )
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        block = slice(size * (step % 2), size * (step % 2) + size)
        columns[block] = mine + block.start
        queue = golden[f"{version}_queue"][step]
        torch.testing.assert_close(model.queue.keys, queue[:, columns], rtol=1e-4, atol=1e-5)
        assert model.queue.ptr == golden[f"{version}_ptr"][step]
    compared = 0
    for name, value in model.state_dict().items():
        if not name.startswith("encoder_"):
            continue
        theirs = golden[f"{version}_{name}"]
        if (
            "running" not in name
        ):  # a device's are overwritten by the first device's before each step; ours are the mean
            torch.testing.assert_close(value, theirs, rtol=1e-4, atol=1e-5)
            compared += 1
    assert compared == 2 * (10 if version == "v1" else 12)
    # so that it was a training: f_q went somewhere and f_k, nine tenths of itself each step, only part of the way
    fresh = MoCo(official.Encoder, 6, **options)
    official.fill(fresh)
    moved = (model.encoder_q.conv1.weight - fresh.encoder_q.conv1.weight).norm()
    followed = (model.encoder_k.conv1.weight - fresh.encoder_q.conv1.weight).norm()
    assert moved > 0.01 and 0 < followed < 0.6 * moved


def test_weights_for_detectors_have_the_official_names():
    pairs = [line.split() for line in str(np.load(GOLDEN)["detectron2"]).splitlines()]
    state = {f"module.encoder_q.{name}": torch.tensor(float(n)) for n, (name, _) in enumerate(pairs)}
    state |= {"module.encoder_q.fc.0.weight": torch.zeros(2), "module.encoder_k.conv1.weight": torch.zeros(2)}
    converted = detectron2_state_dict(state)
    assert {name: int(value) for name, value in converted.items()} == {new: n for n, (_, new) in enumerate(pairs)}
    assert len(pairs) == 7


# --- sizes of the paper


def test_sizes_of_the_paper():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        v1, v2 = moco_v1_resnet50(), moco_v2_resnet50()
    assert count(v1.encoder_q) == count(v1.encoder_k) == 23_770_304 and count(v2.encoder_q) == 27_966_656
    assert count(v1.backbone()) == count(v2.backbone()) == 23_508_032
    assert v1.queue.keys.shape == v2.queue.keys.shape == (128, 65536)
    assert (v1.temperature, v2.temperature, v1.momentum, v2.momentum) == (0.07, 0.2, 0.999, 0.999)
    assert [type(layer).__name__ for layer in v2.encoder_q.fc] == ["Linear", "ReLU", "Linear"]


def test_torchvisions_residual_branches_do_not_start_at_zero():
    net = MoCo(partial(resnet18, zero_init=False), dim=8, queue_size=8)
    assert net.encoder_q.layer1[0].bn2.weight.min() == 1
    assert moco_v1_resnet50(queue_size=8).encoder_q.layer1[0].bn3.weight.min() == 1


# --- the loss (equation 1)


def test_loss_equals_the_formula_written_in_numpy():
    q, k, negatives = unit(5, 4), unit(5, 4), unit(7, 4).T
    total = 0.0
    for i in range(5):
        positive = math.exp(float(q[i] @ k[i]) / 0.3)
        total -= math.log(positive / (positive + sum(math.exp(float(q[i] @ n) / 0.3) for n in negatives.T)))
    assert info_nce(q, k, negatives, 0.3).item() == pytest.approx(total / 5, rel=1e-5)
    assert InfoNCE(0.3)(q, k, negatives) == info_nce(q, k, negatives, 0.3)
    logits, labels = contrast(q, k, negatives, 0.3)
    assert logits.shape == (5, 8) and labels.tolist() == [0] * 5


def test_loss_of_equal_vectors_and_of_no_negatives():
    q = unit(1, 8).expand(3, 8)
    assert info_nce(q, q, q[:1].T.expand(8, 100)).item() == pytest.approx(uniform_loss(100), rel=1e-5)
    assert uniform_loss(65536) == pytest.approx(11.0904, abs=5e-5) and uniform_loss(0) == 0
    assert info_nce(q, q, torch.zeros(8, 0)).item() == 0


def test_loss_of_a_fresh_queue():
    """log(1 + K E exp(z / t)) - q.k / t where the positive is no better than a random vector."""
    k, dim, t = 20_000, 128, 0.2
    q, positive = unit(64, dim), unit(64, dim)
    z = torch.from_numpy(np.random.RandomState(0).beta((dim - 1) / 2, (dim - 1) / 2, 100_000) * 2 - 1)
    expected = math.log(1 + k * (z / t).exp().mean()) - (q * positive).sum(1).mean() / t
    assert info_nce(q, positive, unit(k, dim).T, t).item() == pytest.approx(expected.item(), abs=0.02)


def test_gradcheck():
    q, k, n = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (3, 4), (4, 5)))
    assert torch.autograd.gradcheck(partial(info_nce, temperature=0.5), (q, k, n))


# --- the queue


def test_queue_holds_the_last_keys_in_order():
    queue, given = KeyQueue(5, 12), []
    assert torch.allclose(queue.keys.norm(dim=0), torch.ones(12))
    for step in range(7):
        before, keys = queue.keys.clone(), unit(4, 5)
        assert torch.equal(queue(keys), before)
        given.append(keys)
        assert queue.ptr.item() == 4 * (step + 1) % 12
    # the seventh batch lies over the fourth
    assert torch.equal(queue.keys.T, torch.cat([given[6], given[4], given[5]]))


def test_queue_wraps_where_the_batch_does_not_divide_it():
    queue, keys = KeyQueue(3, 7), unit(12, 3)
    for part in keys.split((5, 4, 3)):
        queue.enqueue(part)
    assert queue.ptr.item() == 5
    assert torch.equal(queue.keys.T, keys[[7, 8, 9, 10, 11, 5, 6]])


def test_queue_in_eval_mode_stands_still():
    queue = KeyQueue(3, 6).eval()
    before = queue.keys.clone()
    assert torch.equal(queue(unit(4, 3)), before) and torch.equal(queue.keys, before) and queue.ptr == 0


# --- the momentum update (equation 2)


@pytest.mark.parametrize("m", [0.0, 0.5, 0.999, 1.0])
def test_momentum_update(m):
    q, k = Small().double(), Small().double()
    start = [p.clone() for p in k.parameters()]
    for _ in range(30):
        momentum_update_(k, q, m)
    for now, first, target in zip(k.parameters(), start, q.parameters(), strict=True):
        torch.testing.assert_close(now, m**30 * first + (1 - m**30) * target, rtol=1e-12, atol=1e-12)
        assert now.grad is None
    if m in (0.0, 1.0):
        assert all(torch.equal(a, b) for a, b in zip(k.parameters(), q.parameters() if m == 0 else start, strict=True))


def test_momentum_update_leaves_statistics_alone():
    q, k = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    q(torch.randn(4, 3, 2, 2))
    momentum_update_(k, q, 0.0)
    assert k.running_mean.abs().sum() == 0 and q.running_mean.abs().sum() > 0


def test_half_life():
    assert half_life(0.999) == pytest.approx(692.8, abs=0.05)
    assert 0.9 ** half_life(0.9) == pytest.approx(0.5)


# --- the method (algorithm 1)


def test_keys_and_queue_get_no_gradient():
    model = small()
    logits, labels = model(torch.randn(4, 12), torch.randn(4, 12, requires_grad=True))
    F.cross_entropy(logits, labels).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder_q.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.encoder_k.parameters())
    assert not model.queue.keys.requires_grad


def test_f_k_moves_before_the_keys_are_encoded_and_the_keys_come_in_afterwards():
    model, x_q, x_k = small(momentum=0.25), torch.randn(4, 12), torch.randn(4, 12)
    with torch.no_grad():
        for p in model.encoder_q.parameters():
            p.add_(torch.randn_like(p))
    moved = Small()
    moved.load_state_dict(
        {
            n: 0.25 * k + 0.75 * q
            for (n, k), q in zip(
                model.encoder_k.state_dict().items(), model.encoder_q.state_dict().values(), strict=True
            )
        }
    )
    k, before = F.normalize(moved(x_k), dim=1), model.queue.keys.clone()
    q = F.normalize(model.encoder_q(x_q), dim=1)
    logits, _ = model(x_q, x_k)
    torch.testing.assert_close(logits, torch.cat([(q * k).sum(1)[:, None], q @ before], 1) / 0.2)
    torch.testing.assert_close(model.queue.keys[:, :4].T, k)


def test_backward_after_the_queue_moved_uses_the_old_one():
    model = small()
    first, labels = model(torch.randn(4, 12), torch.randn(4, 12))
    for _ in range(5):
        model(torch.randn(4, 12), torch.randn(4, 12))
    F.cross_entropy(first, labels).backward()  # autograd would complain


def test_eval_mode_moves_nothing():
    model = small().eval()
    with torch.no_grad():
        model.encoder_q.fc.weight.add_(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randn(4, 12), torch.randn(4, 12))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_official_key_layout():
    model = MoCo(partial(ResNet, "basic", (1,), (8,)), dim=6, queue_size=8, mlp=True)
    official_names = {"queue.keys": "queue", "queue.ptr": "queue_ptr"}
    state = {f"module.{official_names.get(name, name)}": value for name, value in model.state_dict().items()}
    assert {"module.queue", "module.queue_ptr", "module.encoder_q.fc.0.weight", "module.encoder_k.fc.2.bias"} <= set(
        state
    )
    converted = MoCo.convert_state_dict(state)
    assert converted.keys() == model.state_dict().keys()
    assert MoCo.convert_state_dict(model.state_dict()).keys() == model.state_dict().keys()
    backbone = ResNet("basic", (1,), (8,), num_classes=0)
    backbone.load_state_dict(backbone_state_dict(state))
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(backbone.eval()(x), model.eval().backbone()(x)) and backbone(x).shape == (2, 8)


# --- shuffling BN


def test_split_batch_norm_is_batch_norm_on_each_device():
    torch.manual_seed(1)
    split, devices = SplitBatchNorm2d(5, 3), [nn.BatchNorm2d(5) for _ in range(3)]
    with torch.no_grad():
        for module in (split, *devices):
            module.weight.copy_(torch.linspace(0.5, 2, 5))
            module.bias.copy_(torch.linspace(-1, 1, 5))
    for _ in range(3):
        x = 2 * torch.randn(12, 5, 4, 3) + 1
        for d, device in enumerate(devices):
            torch.testing.assert_close(split_forward(split, x)[d::3], device(x[d::3]))
        split(x)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(split, name), sum(getattr(d, name) for d in devices) / 3)
    assert split.num_batches_tracked == 3
    x = torch.randn(5, 5, 4, 3)
    plain = nn.BatchNorm2d(5)
    plain.load_state_dict(split.state_dict())
    assert torch.equal(split.eval()(x), plain.eval()(x))


def split_forward(split, x):
    """What a layer puts out, its statistics left as they are."""
    import copy

    return copy.deepcopy(split)(x)


@pytest.mark.parametrize("options", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}])
def test_split_batch_norm_takes_the_options_of_batch_norm(options):
    split, plain = SplitBatchNorm2d(4, 1, **options), nn.BatchNorm2d(4, **options)
    for _ in range(3):
        x = torch.randn(6, 4, 3, 3) + 1
        torch.testing.assert_close(split(x), plain(x))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(split.state_dict()[name], value)


def test_conversion_keeps_parameters_and_names():
    net = resnet18(num_classes=4)
    names, weight = list(net.state_dict()), net.bn1.weight
    assert SplitBatchNorm2d.convert(net, 4) is net and list(net.state_dict()) == names
    assert isinstance(net.layer2[0].downsample[1], SplitBatchNorm2d) and net.bn1.weight is weight
    assert isinstance(SplitBatchNorm2d.convert(nn.BatchNorm2d(3), 2), SplitBatchNorm2d)


def test_shuffle_and_back():
    x = torch.randn(9, 2)
    shuffled, inverse = shuffle_batch(x, torch.Generator().manual_seed(3))
    again, _ = shuffle_batch(x, torch.Generator().manual_seed(3))
    assert torch.equal(shuffled, again) and not torch.equal(shuffled, x)
    assert torch.equal(unshuffle_batch(shuffled, inverse), x)
    assert torch.equal(shuffled.sort(0).values, x.sort(0).values)


def test_keys_are_shuffled_only_where_it_matters(monkeypatch):
    drawn = []
    monkeypatch.setattr(torch, "randperm", lambda n, generator=None: drawn.append(n) or torch.arange(n).flip(0))
    x = torch.rand(2, 8, 3, 16, 16)
    encoder = partial(ResNet, "basic", (1,), (8,))
    for options in ({}, {"bn_splits": 4, "shuffle": False}):
        MoCo(encoder, 6, 16, **options)(*x)
    assert drawn == []
    model = MoCo(encoder, 6, 16, bn_splits=4)
    model(*x)
    assert drawn == [8]
    model.eval()(*x)
    assert drawn == [8]


def test_without_shuffling_query_and_key_share_their_statistics():
    """The same views: equal networks give equal vectors where devices are the same, not where they are mixed."""
    x = torch.rand(8, 3, 16, 16)
    encoder = partial(ResNet, "basic", (1,), (8,), zero_init=False)
    for shuffle in (False, True):
        torch.manual_seed(0)
        model = MoCo(encoder, 6, 16, bn_splits=4, shuffle=shuffle, temperature=1.0)
        positive = model(x, x)[0][:, 0]
        assert torch.allclose(positive, torch.ones(8), atol=1e-5) is (not shuffle)


# --- the other mechanisms


def test_end_to_end_is_a_batch_wide_softmax():
    for shared in (False, True):
        model = EndToEnd(Small, 6, 0.2, shared=shared)
        x_q, x_k = torch.randn(2, 5, 12)
        logits, labels = model(x_q, x_k)
        q = F.normalize(model.encoder_q(x_q), dim=1)
        k = F.normalize((model.encoder_q if shared else model.encoder_k)(x_k), dim=1)
        torch.testing.assert_close(logits, q @ k.T / 0.2)
        assert labels.tolist() == [0, 1, 2, 3, 4]
        F.cross_entropy(logits, labels).backward()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters())
        assert hasattr(model, "encoder_k") is not shared


def test_memory_bank(monkeypatch):
    model = MemoryBank(Small, size=10, dim=6, negatives=4, momentum=0.5, temperature=0.2)
    x, index, before = torch.randn(3, 12), torch.tensor([7, 2, 5]), model.bank.clone()
    monkeypatch.setattr(torch, "randint", lambda high, shape: torch.tensor([2, 9, 9, 0]))
    logits, labels = model(x, index)
    q = F.normalize(model.encoder_q(x), dim=1)
    assert labels.tolist() == [0, 0, 0] and logits.shape == (3, 5)
    for row, number in enumerate(index.tolist()):
        expected = [q[row] @ before[number], *(q[row] @ before[n] for n in (2, 9, 9, 0))]
        expected = torch.stack(expected) / 0.2
        expected[1] = -math.inf if number == 2 else expected[1]
        torch.testing.assert_close(logits[row], expected)
        torch.testing.assert_close(model.bank[number], F.normalize((before[number] + q[row]) / 2, dim=0))
    rest = [n for n in range(10) if n not in (7, 2, 5)]
    assert torch.equal(model.bank[rest], before[rest])
    F.cross_entropy(logits, labels).backward()
    assert model.encoder_q.fc.weight.grad.isfinite().all()


def test_memory_bank_in_eval_mode_looks_at_all_and_moves_nothing():
    model = MemoryBank(Small, size=10, dim=6, negatives=4).eval()
    before, state = model.bank.clone(), torch.get_rng_state()
    logits, _ = model(torch.randn(3, 12, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3]))
    assert logits.shape == (3, 11) and (logits == -math.inf).sum() == 3
    assert torch.equal(model.bank, before) and torch.equal(torch.get_rng_state(), state)


def test_mechanisms_start_alike():
    starts = []
    for make in (MoCo, EndToEnd, partial(MemoryBank, size=9)):
        torch.manual_seed(5)
        starts.append(make(Small, dim=6).encoder_q.fc.weight)
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[0], starts[2])


# --- several processes


def _worker(rank, port, results):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        for name, model, inputs in two_process_cases():
            wrapped = nn.parallel.DistributedDataParallel(model)
            logits, labels = wrapped(*(x[rank::2] for x in inputs))
            F.cross_entropy(logits, labels).backward()
            gradient = model.encoder_q.fc.weight.grad.tolist()
            buffers = {key: value.tolist() for key, value in model.named_buffers()}
            results[name, rank] = gradient, buffers, logits.tolist()
        torch.manual_seed(rank)
        x = torch.arange(4.0) + 4 * rank
        shuffled, inverse = shuffle_batch(x[:, None])
        results["shuffle", rank] = shuffled.flatten().tolist(), unshuffle_batch(shuffled, inverse).flatten().tolist()
    finally:
        dist.destroy_process_group()


def two_process_cases():
    torch.manual_seed(0)
    x_q, x_k = torch.randn(2, 8, 12)
    yield "moco", small(), (x_q, x_k)
    torch.manual_seed(1)  # two processes have shuffled in between
    yield "end_to_end", EndToEnd(Small, 6, 0.2), (x_q, x_k)
    torch.manual_seed(2)
    bank = MemoryBank(Small, 20, 6, negatives=5)
    # the negatives that two processes draw differ: here the bank is one vector in all places
    bank.bank.copy_(bank.bank[:1].expand(20, -1).clone())
    yield "bank", bank, (x_q, torch.arange(8))


def test_two_processes_are_one_with_a_batch_twice_as_large():
    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with context.Manager() as manager:
        results = manager.dict()
        mp.start_processes(_worker, args=(port, results), nprocs=2, start_method="spawn")
        found = dict(results)
    for name, model, inputs in two_process_cases():
        logits, labels = model(*inputs)
        F.cross_entropy(logits, labels).backward()
        for rank in range(2):
            gradient, buffers, theirs = found[name, rank]
            torch.testing.assert_close(torch.tensor(gradient), model.encoder_q.fc.weight.grad, rtol=1e-4, atol=1e-6)
            for key, value in model.named_buffers():
                rows = value
                if key == "queue.keys":  # rank 0's keys, then rank 1's
                    rows = torch.cat([value[:, :8].T[0::2], value[:, :8].T[1::2], value[:, 8:].T]).T
                torch.testing.assert_close(torch.tensor(buffers[key]).to(value.dtype), rows, rtol=1e-4, atol=1e-6)
            if name == "moco":
                torch.testing.assert_close(torch.tensor(theirs), logits[rank::2], rtol=1e-4, atol=1e-5)
    (first, back), (second, back_too) = found["shuffle", 0], found["shuffle", 1]
    assert sorted(first + second) == list(range(8)) and set(first) != {0.0, 1.0, 2.0, 3.0}
    assert back == [0, 1, 2, 3] and back_too == [4, 5, 6, 7]


# --- recipes, the classifier, the views


def test_learning_rates_of_the_official_scripts():
    for epoch in range(200):
        step = 0.03 * (0.1 if epoch >= 120 else 1.0) * (0.1 if epoch >= 160 else 1.0)
        assert learning_rate("v1", epoch) == pytest.approx(step, rel=1e-12)
        assert learning_rate("v2", epoch) == pytest.approx(0.03 * 0.5 * (1 + math.cos(math.pi * epoch / 200)))
    assert [learning_rate("linear", epoch) for epoch in (0, 59, 60, 80, 99)] == pytest.approx([30, 30, 3, 0.3, 0.3])
    assert recipe("v1").rate(0, batch_size=128) == 0.015


def test_optimizer_of_a_recipe():
    model = small()
    group = recipe("v1").optimizer(model, 1024).param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.12, 0.9, 1e-4)
    assert [id(p) for p in group["params"]] == [id(p) for p in model.encoder_q.parameters()]
    assert recipe("linear").optimizer(LinearClassifier(nn.Flatten(), 4, 2)).param_groups[0]["weight_decay"] == 0


def test_linear_classifier_leaves_the_backbone_alone():
    net = LinearClassifier(ResNet("basic", (1,), (8,), num_classes=0), 8, 5)
    assert 0.005 < net.fc.weight.std() < 0.015 and net.fc.bias.abs().sum() == 0
    before = {name: value.clone() for name, value in net.backbone.state_dict().items()}
    optimizer = recipe("linear").optimizer(net)
    net.train()
    F.cross_entropy(net(torch.rand(6, 3, 16, 16)), torch.arange(6) % 5).backward()
    optimizer.step()
    assert net.fc.weight.grad.abs().sum() > 0 and net.training and not net.backbone.training
    assert all(torch.equal(value, before[name]) for name, value in net.backbone.state_dict().items())


@pytest.mark.parametrize("version", [1, 2])
def test_views(version):
    x = torch.rand(3, 3, 40, 36, generator=torch.Generator().manual_seed(0))
    views, state = MoCoViews(32, version=version, normalize=False), torch.get_rng_state()
    a, b = views(x, torch.Generator().manual_seed(1))
    again = views(x, torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert a.shape == b.shape == (3, 3, 32, 32) and not torch.equal(a, b) and torch.equal(a, again[0])
    assert a.min() >= 0 and a.max() <= 1
    normalized, _ = MoCoViews(32, version=version)(x, torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(normalized, (a - mean) / std)


def test_what_the_two_versions_do():
    v1, v2 = moco_v1_augment(), moco_v2_augment()
    assert [type(s).__name__ for s in v1.steps] == [
        "RandomResizedCrop",
        "RandomGrayscale",
        "ColorJitter",
        "RandomHorizontalFlip",
    ]
    assert sorted(type(s).__name__ for s in v2.steps) == [
        "ColorJitter",
        "RandomGaussianBlur",
        "RandomGrayscale",
        "RandomHorizontalFlip",
        "RandomResizedCrop",
    ]
    for views, jitter, hue in ((v1, 1.0, 0.4), (v2, 0.8, 0.1)):
        assert views.steps.jitter.p == jitter and views.steps.jitter.hue == hue and views.steps.grey.p == 0.2
    # grey comes first in version 1: a grey image stays grey, for hue and saturation have nothing to change
    grey = torch.rand(4, 1, 24, 24).expand(-1, 3, -1, -1)
    a, _ = MoCoViews(24, version=1, normalize=False)(grey, torch.Generator().manual_seed(0))
    torch.testing.assert_close(a, a.mean(1, keepdim=True).expand_as(a), rtol=0, atol=1e-4)


# --- claims


@pytest.mark.parametrize("claim", [claim.id for claim in catalogue.paper("moco").card.claim])
def test_claims_run_at_tiny(claim):
    first, again = (getattr(claims, claim)(Trial(seed=1000, scale="tiny")) for _ in range(2))
    quantities = catalogue.paper("moco").card.find_claim(claim).quantities
    assert set(quantities) <= set(first) and all(math.isfinite(value) for value in first.values())
    assert first == again


def test_digit_views_stay_digits():
    x = Trial(seed=1000, scale="tiny").data("digits").x[:200]
    a = claims.digit_view(x, torch.Generator().manual_seed(0))
    b = claims.digit_view(x, torch.Generator().manual_seed(1))
    assert a.shape == x.shape and not torch.equal(a, b)
    same = F.cosine_similarity(a.flatten(1), x.flatten(1)).mean()
    other = F.cosine_similarity(a.flatten(1), x.roll(1, 0).flatten(1)).mean()
    assert 0.6 < same < 0.99 and same > other + 0.05


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: contrast(unit(2, 3), unit(2, 3), unit(4, 3).T, 0.0), "temperature is 0.0"),
        (lambda: contrast(unit(2, 3), unit(3, 3), unit(4, 3).T), "q, k, negatives have shapes (2, 3), (3, 3)"),
        (lambda: InfoNCE(-1.0), "temperature is -1.0"),
        (lambda: uniform_loss(-1), "queue_size is -1"),
        (lambda: KeyQueue(0, 4), "dim and size are 0 and 4"),
        (lambda: KeyQueue(3, 4)(unit(5, 3)), "k has 5 keys, allowed are at most size = 4"),
        (lambda: momentum_update_(Small(), Small(), 1.5), "m is 1.5"),
        (lambda: momentum_update_(Small(), nn.Linear(2, 2), 0.5), "source has 2 parameters"),
        (lambda: half_life(1.0), "momentum is 1.0"),
        (lambda: SplitBatchNorm2d(3, 0), "splits is 0"),
        (lambda: SplitBatchNorm2d(3, 2)(torch.rand(5, 3, 2, 2)), "the batch is 5, allowed is a multiple of splits = 2"),
        (lambda: small(dim=0), "dim is 0"),
        (lambda: small(bn_splits=0), "bn_splits is 0"),
        (lambda: small(momentum=-0.1), "momentum is -0.1"),
        (lambda: small(temperature=0.0), "temperature is 0.0"),
        (lambda: MoCo(lambda num_classes: nn.Conv2d(3, num_classes, 1), mlp=True), "encoder gives a Conv2d"),
        (lambda: MemoryBank(Small, 0), "size and negatives are 0 and 65536"),
        (lambda: MemoryBank(Small, 4, momentum=2.0), "momentum is 2.0"),
        (lambda: MemoryBank(Small, 4)(torch.rand(2, 12), torch.tensor([1, 4])), "index goes from 1 to 4"),
        (lambda: recipe("v3"), "name is 'v3', allowed are v1, v2, linear"),
        (lambda: learning_rate("v1", 200), "epoch is 200, allowed is 0 to 199"),
        (lambda: recipe("v1").rate(0, 0), "batch_size is 0"),
        (lambda: LinearClassifier(nn.Flatten(), 0), "num_features and num_classes are 0 and 1000"),
        (lambda: backbone_state_dict({"conv1.weight": torch.zeros(1)}), "state has the keys conv1.weight"),
        (lambda: MoCoViews(version=3), "version is 3"),
        (lambda: MoCoViews(0), "size is 0"),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(ValueError) as error:
        call()
    assert text in str(error.value)


def test_meta_device():
    with torch.device("meta"):
        MoCo(partial(resnet50, zero_init=False), dim=8, queue_size=8, mlp=True, bn_splits=4)
