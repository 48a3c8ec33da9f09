"""MixMatch: golden vectors of the official code, the algorithm written a second time, batch norm, ramp and variants."""

import copy
import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import integrate, stats
from torch import nn

import saigen.papers.training.mixmatch.loss as method
from saigen.papers.training.mixmatch import (
    MIX_MODES,
    MixMatch,
    expected_share,
    forward_interleaved,
    guess_labels,
    interleave,
    mix_batches,
    mixmatch_wrn_28_2,
    sharpen,
    statistics_untouched,
    weight_decay_groups,
)

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "mixmatch" / "official.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_net(seed=0, classes=3, norm=True):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        norms = [nn.BatchNorm1d(7)] if norm else []
        return nn.Sequential(nn.Linear(4, 7), *norms, nn.LeakyReLU(0.1), nn.Linear(7, classes))


def batch(seed=0, b=6, k=2, classes=3):
    generator = seeded(seed)
    x, y = torch.randn(b, 4, generator=generator), torch.randint(classes, (b,), generator=generator)
    return x, y, torch.randn(b, k, 4, generator=generator)


def give_draws(monkeypatch, weights, orders):
    """The recorded draws, one call after another, in place of random ones."""
    weights, orders = list(weights), list(orders)

    def take(kept, n):
        taken, kept[:] = kept[:n], kept[n:]
        return taken

    def drawn(n, alpha, *, dominant, generator):
        assert alpha == 0.75 and dominant
        share = torch.tensor(take(weights, n), dtype=torch.double)
        return torch.maximum(share, 1 - share)

    monkeypatch.setattr(method, "mixing_weights", drawn)
    monkeypatch.setattr(torch, "randperm", lambda n, generator=None: torch.tensor(take(orders, n)))
    return weights, orders


# ---- the official code ----


def test_interleaving_equals_the_official_code(golden):
    found = interleave(list(torch.from_numpy(golden["xs"])))
    assert torch.equal(torch.stack(found), torch.from_numpy(golden["interleaved"]))


def test_all_mixing_modes_equal_the_official_code(golden, monkeypatch):
    modes = str(golden["modes"]).split()
    assert sorted(modes) == sorted(MIX_MODES)
    xs, ps = (list(torch.from_numpy(golden[name])) for name in ("xs", "ps"))
    left = give_draws(monkeypatch, golden["mixed_weights"].tolist(), golden["mixed_orders"].tolist())
    for number, mode in enumerate(modes):
        mixed, labels = mix_batches(xs, ps, 0.75, mode=mode)
        torch.testing.assert_close(
            torch.stack(mixed), torch.from_numpy(golden["mixed_x"][number]), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(
            torch.stack(labels), torch.from_numpy(golden["mixed_p"][number]), rtol=1e-5, atol=1e-6
        )
    assert left == ([], [])


def test_loss_of_a_step_equals_the_official_code(golden, monkeypatch):
    """The official class's own model(): guesses, mixing, interleaving, both losses and a ramp that is a third up."""
    weight = torch.from_numpy(golden["step_weight"])
    give_draws(monkeypatch, golden["step_weights"].tolist(), golden["step_order"].tolist())
    mixmatch = MixMatch(3, rampup_steps=3)
    mixmatch.step += 1
    x, y, views = (torch.from_numpy(golden[f"step_{name}"]) for name in ("x", "labels", "y"))
    guessed = []

    def linear(images):
        return images.flatten(1) @ weight

    monkeypatch.setattr(method, "guess_labels", lambda *args: guessed.append(guess_labels(*args)) or guessed[0])
    losses = mixmatch(linear, x, y, views)
    torch.testing.assert_close(guessed[0], torch.from_numpy(golden["step_guess"]), rtol=1e-5, atol=1e-6)
    assert losses.labelled.item() == pytest.approx(float(golden["step_xe"]), rel=1e-5)
    assert losses.unlabelled.item() == pytest.approx(float(golden["step_l2u"]), rel=1e-5)
    assert losses.total.item() == pytest.approx(float(golden["step_total"]), rel=1e-5)
    assert losses.weight.item() == pytest.approx(25.0)


# ---- the algorithm written a second time ----


@pytest.mark.parametrize("k", [1, 2, 3])
def test_equals_algorithm_1_written_in_numpy(k):
    net, (x, y, views) = make_net(norm=False).double(), batch(b=7, k=k)
    x, views = x.double(), views.double()
    mixmatch = MixMatch(3, temperature=0.4, alpha=0.5, lambda_u=10.0, rampup_steps=0)
    losses = mixmatch(net, x, y, views, generator=seeded(3))

    def predict(images):
        logits = net(torch.as_tensor(images)).detach().numpy()
        e = np.exp(logits - logits.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    generator = seeded(3)
    n = 7 * (k + 1)
    own = method.mixing_weights(n, 0.5, dominant=True, generator=generator).numpy()
    order = torch.randperm(n, generator=generator).numpy()
    q = np.mean([predict(views[:, i].numpy()) for i in range(k)], 0)
    q = q ** (1 / 0.4) / (q ** (1 / 0.4)).sum(1, keepdims=True)
    images = np.concatenate([x.numpy(), *(views[:, i].numpy() for i in range(k))])
    labels = np.concatenate([np.eye(3)[y.numpy()], *[q] * k])
    loss_x, loss_u = [], []
    for i in range(n):
        image = own[i] * images[i] + (1 - own[i]) * images[order[i]]
        label = own[i] * labels[i] + (1 - own[i]) * labels[order[i]]
        p = predict(image[None])[0]
        if i < 7:
            loss_x.append(-(label * np.log(p)).sum())
        else:
            loss_u.append(((label - p) ** 2).mean())
    assert losses.labelled.item() == pytest.approx(np.mean(loss_x), rel=1e-10)
    assert losses.unlabelled.item() == pytest.approx(np.mean(loss_u), rel=1e-10)
    assert losses.total.item() == pytest.approx(np.mean(loss_x) + 10 * np.mean(loss_u), rel=1e-10)


def test_sharpening():
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.double)
    torch.testing.assert_close(sharpen(p, 0.5), torch.tensor([0.36, 0.09, 0.01], dtype=torch.double) / 0.46)
    torch.testing.assert_close(sharpen(p, 1), p)
    assert sharpen(p, 1e-4).tolist() == [1.0, 0.0, 0.0]
    torch.testing.assert_close(sharpen(torch.full((2, 4), 0.25), 0.1), torch.full((2, 4), 0.25))
    assert sharpen(torch.tensor([1.0, 0.0]), 0.5).tolist() == [1.0, 0.0]


def test_guesses_average_probabilities_and_not_logits():
    net, (_, _, views) = make_net(norm=False), batch()
    mean = torch.stack([net(view).softmax(-1) for view in views.unbind(1)]).mean(0)
    guessed = guess_labels(net, views.unbind(1), 0.5)
    torch.testing.assert_close(guessed, mean.square() / mean.square().sum(-1, keepdim=True))
    assert not guessed.requires_grad
    of_logits = torch.stack([net(view) for view in views.unbind(1)]).mean(0).softmax(-1)
    assert (sharpen(of_logits) - guessed).abs().max() > 1e-4


def test_no_gradient_flows_into_the_guesses():
    """The gradient is that of the loss with the guesses as constants."""
    net, (x, y, views) = make_net(norm=False).double(), batch()
    x, views = x.double(), views.double()
    mixmatch = MixMatch(3, rampup_steps=0)
    mixmatch(net, x, y, views, generator=seeded(1)).total.backward()
    q = guess_labels(net, views.unbind(1), 0.5)
    xs, ps = mix_batches([x, *views.unbind(1)], [F.one_hot(y, 3).double(), q, q], 0.75, generator=seeded(1))
    weights = list(net.parameters())
    outputs = [net(images).log_softmax(-1) for images in xs]
    expected = (
        -(ps[0] * outputs[0]).sum(-1).mean()
        + 75 * torch.stack([(p - o.exp()).square().mean() for p, o in zip(ps[1:], outputs[1:], strict=True)]).mean()
    )
    for parameter, gradient in zip(weights, torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


# ---- batch norm ----


def test_running_statistics_see_the_first_interleaved_batch_alone():
    net, (x, y, views) = make_net(), batch()
    twin = copy.deepcopy(net)
    MixMatch(3)(net, x, y, views, generator=seeded(2))
    q = guess_labels(copy.deepcopy(net), views.unbind(1), 0.5)
    xs, _ = mix_batches([x, *views.unbind(1)], [F.one_hot(y, 3).float(), q, q], 0.75, generator=seeded(2))
    twin(interleave(xs)[0])
    for ours, once in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, once)
    assert net[1].num_batches_tracked == 1 and net[1].track_running_stats


def test_each_forward_normalises_by_its_own_batch():
    net, (x, _, views) = make_net(), batch()
    batches = [x, *views.unbind(1)]
    expected = interleave([copy.deepcopy(net)(part) for part in interleave(batches)])
    for ours, theirs in zip(forward_interleaved(net, batches), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_statistics_untouched_is_undone_after_an_error_and_leaves_eval_mode_alone():
    net = make_net()
    x = batch()[0]
    with pytest.raises(RuntimeError), statistics_untouched(net):
        net(x)
        raise RuntimeError
    assert net[1].track_running_stats and net[1].num_batches_tracked == 0
    net(x)
    net.eval()
    with statistics_untouched(net):
        inside = net(x)
    assert torch.equal(inside, net(x))
    plain = nn.BatchNorm1d(4, track_running_stats=False)
    with statistics_untouched(plain):
        pass
    assert not plain.track_running_stats


# ---- interleaving, mixing, ramp ----


@pytest.mark.parametrize(("n", "k"), [(64, 3), (5, 3), (2, 3), (8, 2), (7, 5), (4, 1)])
def test_interleaving_is_an_involution_and_keeps_every_row(n, k):
    batches = [torch.arange(n) + n * i for i in range(k)]
    once = interleave(batches)
    assert [len(part) for part in once] == [n] * k
    assert torch.cat(once).sort().values.tolist() == list(range(n * k))
    for a, b in zip(interleave(once), batches, strict=True):
        assert torch.equal(a, b)
    sources = (once[0] // n).bincount(minlength=k).tolist()
    assert max(sources) - min(sources) <= 1 and sources == sorted(sources)
    if (n, k) == (64, 3):
        assert sources == [21, 21, 22]


def test_alpha_zero_mixes_nothing():
    x, y, views = batch()
    q = torch.rand(6, 3).softmax(-1)
    xs, ps = mix_batches([x, *views.unbind(1)], [F.one_hot(y, 3).float(), q, q], 0.0)
    assert torch.equal(torch.stack(xs), torch.stack([x, *views.unbind(1)]))
    assert torch.equal(torch.stack(ps[1:]), torch.stack([q, q]))


def test_without_unlabelled_loss_and_mixing_within_the_labelled_it_is_mixup():
    net, (x, y, views) = make_net(norm=False), batch()
    losses = MixMatch(3, lambda_u=0.0, mix_mode="xx.", rampup_steps=0)(net, x, y, views, generator=seeded(4))
    generator = seeded(4)
    own = method.mixing_weights(6, 0.75, dominant=True, generator=generator).float()
    order = torch.randperm(6, generator=generator)
    logits = net(own[:, None] * x + (1 - own[:, None]) * x[order])
    each = own * F.cross_entropy(logits, y, reduction="none")
    each = each + (1 - own) * F.cross_entropy(logits, y[order], reduction="none")
    torch.testing.assert_close(losses.total, each.mean())


def test_unlabelled_loss_is_bounded_and_divided_by_the_classes():
    certain = torch.full((4, 5), -50.0)
    certain[:, 0] = 50.0

    def always_first(images):
        return certain[: len(images)] * images[:, :1].sign()

    x, views = -torch.ones(4, 1), torch.ones(4, 2, 1)
    losses = MixMatch(5, rampup_steps=0, mix_mode=".")(always_first, x, torch.zeros(4, dtype=torch.long), views)
    assert losses.unlabelled.item() == pytest.approx(0.0, abs=1e-6)
    # Targets of one class, predictions of another: two of five entries are wrong by 1.
    other = torch.roll(certain, 1, 1)
    losses = MixMatch(5, rampup_steps=0, mix_mode=".")(
        lambda images: other[: len(images)], x, torch.zeros(4, dtype=torch.long), views, teacher=always_first
    )
    assert losses.unlabelled.item() == pytest.approx(2 / 5, abs=1e-6)


def test_ramp_counts_training_steps_and_resumes():
    net, mixmatch = make_net(), MixMatch(3, lambda_u=8.0, rampup_steps=4)
    weights = [mixmatch(net, *batch(step)).weight.item() for step in range(6)]
    np.testing.assert_allclose(weights, [0, 2, 4, 6, 8, 8])
    file = io.BytesIO()
    torch.save(mixmatch.state_dict(), file)
    file.seek(0)
    other = MixMatch(3, lambda_u=8.0, rampup_steps=12)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.eval()(net, *batch()).weight.item() == other(net, *batch()).weight.item() == pytest.approx(4.0)
    assert MixMatch(3, rampup_steps=0)(net, *batch()).weight.item() == 75.0


def test_a_teacher_guesses_in_the_models_place():
    net, teacher, (x, y, views) = make_net(norm=False), make_net(5, norm=False), batch()
    losses = MixMatch(3, rampup_steps=0, mix_mode=".")(net, x, y, views, teacher=teacher)
    q = guess_labels(teacher, views.unbind(1), 0.5)
    expected = torch.stack([(net(view).softmax(-1) - q).square().mean() for view in views.unbind(1)]).mean()
    torch.testing.assert_close(losses.unlabelled, expected)
    losses.total.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_soft_labels_and_images_of_any_shape():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x, views = torch.rand(4, 3, 2, 2), torch.rand(4, 2, 3, 2, 2)
    y = torch.tensor([0, 2, 1, 1])
    hard = MixMatch(3)(net, x, y, views, generator=seeded())
    soft = MixMatch(3)(net, x, F.one_hot(y, 3).float(), views, generator=seeded())
    assert torch.equal(hard.total, soft.total)


# ---- decay, closed forms, arguments ----


def test_decay_touches_kernels_alone_and_by_the_papers_factor():
    net = mixmatch_wrn_28_2(filters=2, repeat=1)
    groups = weight_decay_groups(net, 0.02)
    kernels = {name for name, p in net.named_parameters() if any(p is q for q in groups[0]["params"])}
    assert kernels == {name for name, p in net.named_parameters() if name.endswith("weight") and p.ndim > 1}
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    before = [p.detach().clone() for p in groups[0]["params"]]
    optimizer = torch.optim.AdamW(groups, lr=0.002)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, q in zip(groups[0]["params"], before, strict=True):
        torch.testing.assert_close(p.detach(), q * (1 - 4e-5), rtol=1e-7, atol=0)


@pytest.mark.parametrize("alpha", [0.25, 0.75, 1.0, 3.0])
def test_expected_share_is_the_integral(alpha):
    density = stats.beta(alpha, alpha).pdf
    expected = 2 * integrate.quad(lambda share: share * density(share), 0.5, 1, limit=200)[0]
    assert expected_share(alpha) == pytest.approx(expected, rel=1e-5)


def test_wrong_arguments_are_named():
    net, (x, y, views) = make_net(), batch()
    for call, name in (
        (lambda: MixMatch(1), "num_classes is 1"),
        (lambda: MixMatch(3, temperature=0.0), "temperature is 0.0"),
        (lambda: MixMatch(3, alpha=-1.0), "alpha is -1.0"),
        (lambda: MixMatch(3, lambda_u=-1.0), "lambda_u is -1.0"),
        (lambda: MixMatch(3, rampup_steps=-1), "rampup_steps is -1"),
        (lambda: MixMatch(3, mix_mode="xy"), "mix_mode is 'xy'"),
        (lambda: mix_batches([x], [y], 0.5, mode="xy"), "mode is 'xy'"),
        (lambda: sharpen(torch.rand(3), -1.0), "temperature is -1.0"),
        (lambda: guess_labels(net, []), "views is empty"),
        (lambda: interleave([x, x[:2]]), r"batches have \[6, 2\] rows"),
        (lambda: MixMatch(3)(net, x, y, views[:0]), "views has shape"),
        (lambda: MixMatch(3)(net, x, y, views[:, :0]), "views has shape"),
        (lambda: MixMatch(3)(net, x, y, views[:4]), "as many unlabelled as labelled"),
        (lambda: MixMatch(3)(net, x, y + 5, views), "y holds"),
        (lambda: MixMatch(4)(net, x, y, views), "num_classes is 4, and the model gives 3"),
        (lambda: weight_decay_groups(net, -0.1), "weight_decay is -0.1"),
        (lambda: expected_share(0.0), "alpha is 0.0"),
    ):
        with pytest.raises(ValueError, match=name):
            call()
