"""SAM: the optimizer against formulas of its own, the models, the sharpness measures."""

import copy
import functools
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saigen.papers.training.sam import SAM, keep_buffers


def make_net(seed: int = 0, dropout: float = 0.0, batch_norm: bool = False) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        norm = [nn.BatchNorm1d(7)] if batch_norm else []
        return nn.Sequential(nn.Linear(5, 7), *norm, nn.Tanh(), nn.Dropout(dropout), nn.Linear(7, 3))


def make_batch(seed: int = 1, n: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=generator), torch.randint(3, (n,), generator=generator)


def closure_of(net, optimizer, batch, after_backward=lambda: None):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(batch[0]), batch[1])
        loss.backward()
        after_backward()
        return loss

    return closure


def train(net, optimizer, steps=4, first=0):
    return [optimizer.step(closure_of(net, optimizer, make_batch(s))).item() for s in range(first, first + steps)]


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


class Quadratic(nn.Module):
    """L(w) = wᵀ A w / 2 with a fixed positive definite A."""

    def __init__(self, n: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        root = torch.randn(n, n, generator=generator, dtype=torch.double)
        self.a = root @ root.T / n
        self.w = nn.Parameter(torch.randn(n, generator=generator, dtype=torch.double))

    def forward(self):
        return self.w @ self.a @ self.w / 2


# ---- the step itself ----


def test_gradient_of_a_quadratic_in_closed_form():
    net = Quadratic()
    a, w, rho, lr = net.a, net.w.detach().clone(), 0.3, 0.1
    optimizer = SAM(net.parameters(), torch.optim.SGD, rho=rho, lr=lr, perturb_eps=0.0)

    def closure():
        optimizer.zero_grad()
        loss = net()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    expected = a @ (w + rho * a @ w / (a @ w).norm())
    torch.testing.assert_close(net.w.grad, expected, atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(net.w.detach(), w - lr * expected, atol=1e-14, rtol=1e-14)
    assert loss.item() == pytest.approx((w @ a @ w / 2).item(), rel=1e-14)  # the loss at w, not at w + eps


def test_adaptive_perturbation_in_closed_form():
    net = Quadratic()
    w, rho = net.w.detach().clone(), 0.7
    optimizer = SAM(net.parameters(), torch.optim.SGD, rho=rho, adaptive=True, perturb_eps=0.0, lr=0.1)
    net().backward()
    g = net.w.grad.clone()
    optimizer.first_step()
    torch.testing.assert_close(net.w.detach() - w, rho * w**2 * g / (w.abs() * g).norm(), atol=1e-14, rtol=1e-12)


def test_length_of_the_perturbation_is_rho_whatever_the_scale_of_the_loss():
    found = []
    for scale in (1.0, 1024.0):
        net = make_net().double()
        optimizer = SAM(net.parameters(), torch.optim.SGD, rho=0.25, perturb_eps=0.0, lr=0.1)
        x, y = make_batch()
        (scale * F.cross_entropy(net(x.double()), y)).backward()
        before = weights(net)
        optimizer.first_step()
        found.append(weights(net) - before)
        assert found[-1].norm().item() == pytest.approx(0.25, rel=1e-10)
    torch.testing.assert_close(found[0], found[1], atol=1e-14, rtol=0)


def test_linear_loss_gives_the_plain_gradient_and_first_order_growth():
    net = nn.Linear(4, 1, bias=False).double()
    direction = torch.randn(4, 1, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    optimizer = SAM(net.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = (net.weight @ direction).sum()
        loss.backward()
        losses.append(loss.item())
        return loss

    optimizer.step(closure)
    assert torch.equal(net.weight.grad, direction.T)
    assert losses[1] - losses[0] == pytest.approx(0.5 * direction.norm().item(), rel=1e-10)


@pytest.mark.parametrize(
    "base", [torch.optim.SGD, torch.optim.AdamW, functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True)]
)
def test_rho_zero_is_the_base_optimizer_bit_for_bit(base):
    plain_net, net = make_net(), make_net()
    plain, optimizer = base(plain_net.parameters(), lr=0.1), SAM(net.parameters(), base, rho=0.0, lr=0.1)
    assert train(plain_net, plain) == train(net, optimizer)
    assert torch.equal(weights(plain_net), weights(net))


def test_rho_zero_costs_one_pass():
    net, calls = make_net(), []
    optimizer = SAM(net.parameters(), torch.optim.SGD, rho=0.0, lr=0.1)
    optimizer.step(closure_of(net, optimizer, make_batch(), lambda: calls.append(1)))
    assert len(calls) == 1
    optimizer.param_groups[0]["rho"] = 0.1
    optimizer.step(closure_of(net, optimizer, make_batch(), lambda: calls.append(1)))
    assert len(calls) == 3


def test_weights_are_put_back_bit_for_bit():
    net = make_net()
    optimizer = SAM(net.parameters(), torch.optim.SGD, rho=0.3, lr=0.0)
    before = weights(net)
    train(net, optimizer)
    assert torch.equal(weights(net), before)


def test_weights_are_put_back_when_the_closure_raises():
    net = make_net(batch_norm=True)
    optimizer = SAM(net.parameters(), torch.optim.SGD, rho=0.3, lr=0.1, model=net)
    before = weights(net)

    def fail():
        if optimizer.in_second_pass:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure_of(net, optimizer, make_batch(), fail))
    assert torch.equal(weights(net), before)
    assert not optimizer.perturbed and not optimizer.in_second_pass
    train(net, optimizer)


def test_zero_gradient_is_no_division_by_zero():
    net = make_net()
    optimizer = SAM(net.parameters(), torch.optim.SGD, rho=0.3, lr=0.1)
    before = weights(net)

    def closure():
        optimizer.zero_grad()
        loss = sum((p * 0.0).sum() for p in net.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(weights(net), before)


def test_frozen_and_unused_parameters_stay():
    net = make_net()
    unused = nn.Parameter(torch.ones(3))
    net[0].weight.requires_grad_(False)
    before = net[0].weight.detach().clone()
    optimizer = SAM([*net.parameters(), unused], torch.optim.AdamW, rho=0.3, lr=0.1, weight_decay=0.0)
    train(net, optimizer)
    assert torch.equal(net[0].weight, before) and torch.equal(unused, torch.ones(3))
    assert unused.grad is None


def test_groups_have_their_own_rho_under_one_norm():
    net = make_net().double()
    groups = [{"params": net[0].parameters(), "rho": 0.4}, {"params": net[3].parameters()}]
    optimizer = SAM(groups, torch.optim.SGD, rho=0.1, lr=0.1)
    x, y = make_batch()
    F.cross_entropy(net(x.double()), y).backward()
    norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
    expected = [
        p.detach() + rho * p.grad / norm for rho, layer in ((0.4, net[0]), (0.1, net[3])) for p in layer.parameters()
    ]
    optimizer.first_step()
    for p, q in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), q, atol=1e-12, rtol=0)


def test_maximize_perturbs_downhill():
    plain, flipped = make_net(), make_net()
    x, y = make_batch()
    descent = SAM(plain.parameters(), torch.optim.SGD, rho=0.2, lr=0.1)
    ascent = SAM(flipped.parameters(), torch.optim.SGD, rho=0.2, lr=0.1, maximize=True)
    for net, optimizer, sign in ((plain, descent, 1), (flipped, ascent, -1)):

        def closure(net=net, optimizer=optimizer, sign=sign):
            optimizer.zero_grad()
            loss = sign * F.cross_entropy(net(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert torch.equal(weights(plain), weights(flipped))


# ---- the official training step, written a second time in NumPy ----


def test_equals_the_official_step_written_in_numpy():
    """Logistic regression by the official semantics: L2 in both passes, clipping of g_SAM, Nesterov momentum."""
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(32, 5)), rng.integers(2, size=32).astype(float), rng.normal(size=5)
    rho, l2, clip, lr, beta = 0.2, 0.05, 0.08, 0.3, 0.9

    def gradient(w):
        return x.T @ (1 / (1 + np.exp(-x @ w)) - y) / len(y) + l2 * w

    parameter = nn.Parameter(torch.from_numpy(w.copy()))
    optimizer = SAM(
        [parameter],
        torch.optim.SGD,
        rho=rho,
        l2=l2,
        max_grad_norm=clip,
        perturb_eps=0.0,
        lr=lr,
        momentum=beta,
        nesterov=True,
    )

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(torch.from_numpy(x) @ parameter, torch.from_numpy(y))
        loss.backward()
        return loss

    momentum = np.zeros(5)
    for _ in range(6):
        g = gradient(w)
        g = gradient(w + rho * g / np.linalg.norm(g))
        g = g * min(1.0, clip / np.linalg.norm(g))
        momentum = beta * momentum + g
        w = w - lr * (g + beta * momentum)
        optimizer.step(closure)
        # clip_grad_norm_ adds 1e-6 to the norm it divides by
        np.testing.assert_allclose(parameter.detach().numpy(), w, rtol=1e-4)


def test_clipping_in_the_closure_does_not_bend_the_perturbation():
    nets = [make_net(), make_net()]
    steps = []
    for net, limit in zip(nets, (1e9, 1e-3), strict=True):
        optimizer = SAM(net.parameters(), torch.optim.SGD, rho=0.2, lr=0.1)
        seen = []

        def clip(net=net, limit=limit, seen=seen):
            seen.append((weights(net), nn.utils.clip_grad_norm_(net.parameters(), limit)))

        optimizer.step(closure_of(net, optimizer, make_batch(), clip))
        steps.append(seen[1][0])
    torch.testing.assert_close(steps[0], steps[1], atol=1e-6, rtol=0)


# ---- the two passes see the same data, and batch norm sees it once ----


def test_both_passes_drop_the_same_units_and_use_up_one_pass_of_random_numbers():
    net = make_net(dropout=0.5)
    optimizer = SAM(net.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    masks = []
    net[2].register_forward_hook(lambda module, args, out: masks.append(out == 0))
    torch.manual_seed(5)
    train(net, optimizer, steps=2)
    after = torch.rand(3)
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])
    plain = make_net(dropout=0.5)
    torch.manual_seed(5)
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), steps=2)
    assert torch.equal(after, torch.rand(3))


def test_batch_norm_statistics_are_those_of_the_first_pass():
    net, reference = make_net(batch_norm=True), make_net(batch_norm=True)
    optimizer = SAM(net.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, model=net)
    x, y = make_batch()
    reference(x)
    optimizer.step(closure_of(net, optimizer, (x, y)))
    for ours, once in zip(net.buffers(), reference.buffers(), strict=True):
        assert torch.equal(ours, once)
    careless = make_net(batch_norm=True)
    optimizer = SAM(careless.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    optimizer.step(closure_of(careless, optimizer, (x, y)))
    assert careless[1].num_batches_tracked == 2


def test_keep_buffers_restores_replaced_buffers_and_after_errors():
    net = make_net(batch_norm=True)
    mean = net[1].running_mean
    with pytest.raises(RuntimeError), keep_buffers(net):
        net(make_batch()[0])
        net[1].running_mean = torch.full((7,), float("nan"))
        raise RuntimeError
    assert net[1].running_mean is mean and torch.equal(mean, torch.zeros(7))


# ---- resuming ----


@pytest.mark.parametrize("base", [functools.partial(torch.optim.SGD, momentum=0.9), torch.optim.AdamW])
@pytest.mark.parametrize("adaptive", [False, True])
def test_resumed_training_equals_unbroken_training(base, adaptive):
    def make():
        net = make_net()
        return net, SAM(net.parameters(), base, rho=0.3, adaptive=adaptive, lr=0.1)

    unbroken, optimizer = make()
    train(unbroken, optimizer, 6)
    net, optimizer = make()
    train(net, optimizer, 3)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed, optimizer = make()
    resumed.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    train(resumed, optimizer, 3, first=3)
    assert torch.equal(weights(unbroken), weights(resumed))


def test_resumes_between_the_two_steps():
    def run(broken):
        net = make_net()
        optimizer = SAM(net.parameters(), torch.optim.AdamW, rho=0.3, lr=0.1)
        for s in range(4):
            closure_of(net, optimizer, make_batch(s))()
            optimizer.first_step()
            assert optimizer.perturbed
            if broken:
                state = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
                net = make_net(seed=9)
                optimizer = SAM(net.parameters(), torch.optim.AdamW, rho=0.3, lr=0.1)
                net.load_state_dict(state[0])
                optimizer.load_state_dict(state[1])
                assert optimizer.perturbed
            closure_of(net, optimizer, make_batch(s))()
            optimizer.second_step()
            assert not optimizer.perturbed
        return weights(net)

    assert torch.equal(run(False), run(True))
    whole = make_net()
    train(whole, SAM(whole.parameters(), torch.optim.AdamW, rho=0.3, lr=0.1))
    assert torch.equal(run(False), weights(whole))


def test_step_without_a_closure_finishes_a_first_step():
    nets = [make_net(), make_net()]
    optimizers = [SAM(net.parameters(), torch.optim.SGD, rho=0.3, lr=0.1) for net in nets]
    train(nets[0], optimizers[0], 1)
    closure = closure_of(nets[1], optimizers[1], make_batch(0))
    closure()
    optimizers[1].first_step(zero_grad=True)
    assert all(p.grad is None for p in nets[1].parameters())
    closure()
    optimizers[1].step()
    assert torch.equal(weights(nets[0]), weights(nets[1]))


def test_deepcopy_and_the_shared_groups():
    net = make_net()
    optimizer = SAM(net.parameters(), torch.optim.AdamW, rho=0.3, lr=0.1)
    train(net, optimizer, 2)
    twin, twin_optimizer = copy.deepcopy((net, optimizer))
    assert twin_optimizer.param_groups is twin_optimizer.base_optimizer.param_groups
    train(net, optimizer, 2, first=2)
    train(twin, twin_optimizer, 2, first=2)
    assert torch.equal(weights(net), weights(twin))


def test_schedulers_and_new_groups_reach_the_base_optimizer():
    net = make_net()
    optimizer = SAM(net[0].parameters(), torch.optim.SGD, rho=0.3, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    train(net, optimizer, 1)
    scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    optimizer.add_param_group({"params": net[3].parameters(), "lr": 0.2, "rho": 0.1})
    assert [group["rho"] for group in optimizer.base_optimizer.param_groups] == [0.3, 0.1]
    before = net[3].weight.detach().clone()
    train(net, optimizer, 1)
    assert not torch.equal(net[3].weight, before)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


def test_named_parameters_are_taken():
    net = make_net()
    optimizer = SAM(net.named_parameters(), torch.optim.AdamW, rho=0.3, lr=0.1)
    train(net, optimizer)
    assert optimizer.param_groups[0]["param_names"][0] == "0.weight"


# ---- mixed precision ----


def test_gradient_scaler_gives_the_unscaled_steps_and_skips_overflow():
    nets = [make_net(), make_net()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    plain = SAM(nets[0].parameters(), torch.optim.AdamW, rho=0.3, l2=0.01, max_grad_norm=0.5, lr=0.1)
    scaled = SAM(nets[1].parameters(), torch.optim.AdamW, rho=0.3, l2=0.01, max_grad_norm=0.5, lr=0.1, scaler=scaler)

    def closure(x, y):
        scaled.zero_grad()
        loss = F.cross_entropy(nets[1](x), y)
        scaler.scale(loss).backward()
        return loss

    for s in range(4):
        batch = make_batch(s)
        plain.step(closure_of(nets[0], plain, batch))
        scaled.step(lambda batch=batch: closure(*batch))
        scaler.update()
    torch.testing.assert_close(weights(nets[0]), weights(nets[1]), atol=1e-6, rtol=1e-5)
    before = weights(nets[1])
    x, y = make_batch()
    x[0, 0] = float("inf")
    scaled.step(lambda: closure(x, y))
    scaler.update()
    assert torch.equal(weights(nets[1]), before) and scaler.get_scale() == 2.0**11


def test_half_precision_gradients_have_a_finite_norm():
    net = nn.Linear(64, 64).to(torch.float16)
    optimizer = SAM(net.parameters(), torch.optim.SGD, rho=1.0, lr=0.0)
    net.weight.grad, net.bias.grad = torch.full_like(net.weight, 500.0), torch.full_like(net.bias, 500.0)
    before = net.weight.detach().clone()
    optimizer.first_step()
    torch.testing.assert_close(
        net.weight.detach() - before, torch.full_like(before, 1 / (64 * 65) ** 0.5), atol=1e-3, rtol=0
    )


# ---- two processes ----


def _worker(rank, port, results):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        for sync in (False, True):
            net = make_net().double()
            wrapped = DistributedDataParallel(net)
            optimizer = SAM(net.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, model=wrapped, sync_perturbation=sync)
            x, y = make_batch()
            share = slice(rank * 8, rank * 8 + 8)
            for _ in range(3):
                optimizer.step(closure_of(wrapped, optimizer, (x[share].double(), y[share])))
            results[rank, sync] = weights(net).tolist()
    finally:
        dist.destroy_process_group()


def _by_hand(sync):
    """The same three steps in one process: ε from each half by itself (or from both), g_SAM averaged."""
    net = make_net().double()
    x, y = make_batch()
    halves = [(x[:8].double(), y[:8]), (x[8:].double(), y[8:])]

    def gradient(w, half):
        parameters, start = {}, 0
        for name, p in net.named_parameters():
            parameters[name] = w[start : start + p.numel()].view_as(p)
            start += p.numel()
        return torch.autograd.grad(F.cross_entropy(torch.func.functional_call(net, parameters, half[0]), half[1]), w)[0]

    w = weights(net)
    for _ in range(3):
        point = w.clone().requires_grad_()
        own = [gradient(point, half) for half in halves]
        if sync:
            own = [sum(own) / 2] * 2
        total = [gradient((w + 0.5 * g / g.norm()).requires_grad_(), half) for g, half in zip(own, halves, strict=True)]
        w = w - 0.1 * sum(total) / 2
    return w


def test_two_processes_perturb_by_their_own_shares():
    import socket

    import torch.multiprocessing as mp

    # A fork of a process whose threads have worked waits for them for ever, now and then.
    context = mp.get_context("spawn")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with context.Manager() as manager:
        results = manager.dict()
        mp.start_processes(_worker, args=(port, results), nprocs=2, start_method="spawn")
        found = {key: torch.tensor(value, dtype=torch.double) for key, value in results.items()}
    for sync in (False, True):
        assert torch.equal(found[0, sync], found[1, sync])
        torch.testing.assert_close(found[0, sync], _by_hand(sync), atol=1e-10, rtol=0)
    assert (_by_hand(True) - _by_hand(False)).abs().max() > 1e-4


# ---- wrong arguments ----


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda net: SAM(net.parameters(), torch.optim.SGD, rho=-0.1, lr=0.1), "rho is -0.1"),
        (lambda net: SAM(net.parameters(), torch.optim.SGD, rho=float("nan"), lr=0.1), "rho is nan"),
        (lambda net: SAM(net.parameters(), torch.optim.SGD, l2=-1.0, lr=0.1), "l2 is -1.0"),
        (lambda net: SAM(net.parameters(), torch.optim.SGD, perturb_eps=-1.0, lr=0.1), "perturb_eps is -1.0"),
        (lambda net: SAM(net.parameters(), torch.optim.SGD, max_grad_norm=0.0, lr=0.1), "max_grad_norm is 0.0"),
        (lambda net: SAM([{"params": net.parameters(), "rho": -2}], torch.optim.SGD, lr=0.1), "rho is -2"),
        (lambda net: SAM(net.parameters(), torch.optim.SGD(net.parameters(), lr=0.1)), "base_optimizer is SGD"),
        (lambda net: SAM(net.parameters(), lambda params: None), "base_optimizer made"),
        (
            lambda net: SAM([nn.Parameter(torch.ones(2, dtype=torch.cfloat))], torch.optim.SGD, lr=0.1),
            "torch.complex64",
        ),
        (lambda net: SAM(net.parameters(), torch.optim.SGD, lr=0.1).step(), "closure is None"),
        (
            lambda net: SAM(net.parameters(), torch.optim.SGD, lr=0.1).load_state_dict(
                {"state": {}, "param_groups": []}
            ),
            "state_dict has",
        ),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(ValueError, match="allowed") as raised:
        call(make_net())
    assert text in str(raised.value)


def test_sparse_gradients_are_refused_before_anything_moves():
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = SAM(table.parameters(), torch.optim.SGD, lr=0.1)
    before = table.weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = table(torch.tensor([1, 2])).sum()
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="sparse"):
        optimizer.step(closure)
    assert torch.equal(table.weight, before)


def test_first_step_twice_is_refused():
    net = make_net()
    optimizer = SAM(net.parameters(), torch.optim.SGD, rho=0.3, lr=0.1)
    closure_of(net, optimizer, make_batch())()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="second_step comes before"):
        optimizer.first_step()
