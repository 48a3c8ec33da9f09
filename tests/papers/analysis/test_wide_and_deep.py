"""Wide and deep networks: the estimator by brute force and beside the official code, the networks, lesions, probes, errors."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import saigen.papers.analysis.wide_and_deep as room
from saigen.papers.analysis.wide_and_deep import (
    ActivationRecorder,
    MinibatchCKA,
    accuracy_by_depth,
    block_structure,
    centred_gram,
    cifar_resnet_v1,
    cka,
    cka_matrix,
    compare_classes,
    compare_examples,
    deletable_blocks,
    delete_blocks,
    first_pc,
    gram,
    linear_probe,
    principal_components,
    regularized,
    remove_pc,
    scaled_resnet50,
    u_center,
    unbiased_hsic,
    unit_norm,
)

OFFICIAL = np.load(Path(__file__).resolve().parents[2] / "golden" / "wide_and_deep" / "official.npz")


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tensor(name):
    return torch.from_numpy(OFFICIAL[name])


# The estimator


def four_sums(k, l):
    """HSIC_1 as a U-statistic over all quadruples of different examples (Song et al., 2012)."""
    total, count = 0.0, 0
    for i, j, q, r in itertools.permutations(range(len(k)), 4):
        total += k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q])
        count += 1
    return total / count


def traces(k, l):
    """The traces as they stand."""
    n, one = len(k), np.ones(len(k))
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))
    middle = one @ k @ one * (one @ l @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ l) + middle - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_hsic_is_the_sum_over_quadruples(kernel):
    x, y = draw(7, 3), draw(7, 2, 2, seed=1)
    k, l = gram(x, kernel).numpy(), gram(y, kernel).numpy()
    found = unbiased_hsic(x, y, kernel).item()
    assert found == pytest.approx(four_sums(k, l), rel=1e-9)
    assert found == pytest.approx(traces(k, l), rel=1e-9)
    assert unbiased_hsic(x.float(), y.float(), kernel).item() == pytest.approx(found, rel=1e-4)


def test_centring_makes_rows_sum_to_zero_and_forgets_shifts():
    x = draw(9, 4)
    centred = u_center(x @ x.T)
    assert centred.sum(0).abs().max() < 1e-12 and (centred.diagonal() == 0).all()
    assert torch.allclose(u_center((x + 5) @ (x + 5).T), centred, atol=1e-10)
    assert torch.allclose(u_center(gram(x)), centred, atol=1e-12)
    # far from the origin single precision would lose everything, were the rows not centred first
    assert torch.allclose(u_center(gram((x + 3000).float())), centred, atol=0.02)


@pytest.mark.parametrize("shape", [(64, 2048), (65, 2100), (3, 50_000)])
def test_large_products_in_blocks_are_the_whole(shape):
    x = draw(*shape) + 1
    rows = x - x.mean(0)
    assert torch.allclose(gram(x), rows @ rows.T, rtol=1e-12, atol=1e-9)


def test_no_bias_and_the_biased_estimate_has_one():
    draws = [(draw(12, 30, seed=2 * s), draw(12, 30, seed=2 * s + 1)) for s in range(400)]
    hsic = torch.stack([unbiased_hsic(x, y) for x, y in draws])
    assert abs(hsic.mean().item()) < 3 * hsic.std().item() / 20
    assert (hsic < 0).any()
    biased = torch.stack([cka(x, y, debiased=False) for x, y in draws]).mean().item()
    assert biased > 0.6


def test_what_cka_does_not_see_and_what_it_does():
    x, y = draw(20, 4), draw(20, 5, seed=1)
    rotation = torch.linalg.qr(draw(4, 4, seed=2))[0]
    value = cka(x, y)
    for debiased in (True, False):
        assert cka(x, x, debiased=debiased).item() == pytest.approx(1)
        same = cka(3 * x @ rotation - 2, y, debiased=debiased)
        assert torch.allclose(same, cka(x, y, debiased=debiased), atol=1e-10)
    stretched = x * torch.tensor([10.0, 1.0, 1.0, 1.0])
    assert (cka(stretched, y) - value).abs() > 0.01 and cka(stretched, x) < 0.95
    u = draw(20, 1, seed=3)
    assert cka(u @ draw(1, 6, seed=4), u @ draw(1, 3, seed=5)).item() == pytest.approx(1)
    centring = np.eye(20) - 1 / 20
    k, l = (centring @ (v @ v.T).numpy() @ centring for v in (x, y))
    by_hand = np.trace(k @ l) / np.sqrt(np.trace(k @ k) * np.trace(l @ l))
    assert cka(x, y, debiased=False).item() == pytest.approx(by_hand, rel=1e-10)


def test_rbf_is_the_formula():
    x = draw(6, 3)
    square = np.array([[((a - b) ** 2).sum() for b in x.numpy()] for a in x.numpy()])
    median = np.sort(square[~np.eye(6, dtype=bool)])[14]  # the lower of the middle two of 30
    assert np.allclose(gram(x, "rbf", 0.5).numpy(), np.exp(-square / (2 * 0.25 * median)))


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("debiased", [True, False])
def test_gradients(kernel, debiased):
    x, y = draw(6, 3).requires_grad_(), draw(6, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: cka(a, b, kernel, debiased=debiased), (x, y))


def test_minibatches_equal_the_official_code():
    first = [[tensor(f"first/{i}/{j}") for j in range(2)] for i in range(3)]
    second = [[tensor(f"second/{i}/{j}") for j in range(3)] for i in range(3)]
    within, across, joint = MinibatchCKA(2), MinibatchCKA(2, 3), MinibatchCKA(5)
    for a, b in zip(first, second, strict=True):
        within.update(a)
        across.update(a, b)
        joint.update(a + b)
    assert torch.allclose(within.compute(), tensor("within"), rtol=1e-10)
    assert torch.allclose(across.compute(), tensor("across"), rtol=1e-10)
    assert torch.allclose(joint.compute()[:2, 2:], across.compute(), rtol=1e-10)
    assert OFFICIAL["across"][1, 2] != pytest.approx(1, abs=0.01) and across.compute()[0, 2].item() == pytest.approx(1)


def test_one_batch_is_the_whole_and_batches_are_averaged():
    x, y = draw(24, 5), draw(24, 3, seed=1) + draw(24, 5)[:, :3]
    whole = MinibatchCKA(2)
    whole.update([x, y])
    assert whole.compute()[0, 1].item() == pytest.approx(cka(x, y).item(), rel=1e-12)
    sums = MinibatchCKA(2)
    parts = list(zip(x.split(8), y.split(8), strict=True))
    for part in parts:
        sums.update(part)
    xy, xx, yy = (sum(unbiased_hsic(a, b) for a, b in pairs) for pairs in
                  (parts, [(a, a) for a, _ in parts], [(b, b) for _, b in parts]))  # fmt: skip
    assert sums.compute()[0, 1].item() == pytest.approx((xy / (xx * yy).sqrt()).item(), rel=1e-12)
    resumed = MinibatchCKA(2)
    resumed.load_state_dict(sums.state_dict())
    assert torch.equal(resumed.compute(), sums.compute())
    sums.reset()
    assert sums.hsic.abs().sum() == 0 and resumed.hsic.abs().sum() > 0


# Principal components


def test_first_component_is_that_of_the_singular_values():
    for shape in ((9, 4), (6, 3, 5)):
        x = draw(*shape)
        rows = x.flatten(1).numpy() - x.flatten(1).numpy().mean(0)
        u, s, vt = np.linalg.svd(rows, full_matrices=False)
        found = first_pc(x)
        assert found.share == pytest.approx(s[0] ** 2 / (s**2).sum(), rel=1e-9)
        sign = np.sign(vt[0][np.abs(vt[0]).argmax()])
        assert np.allclose(found.direction.numpy(), sign * vt[0], atol=1e-8)
        assert np.allclose(found.scores.numpy(), sign * u[:, 0] * s[0], atol=1e-8)
        for k in (1, 2):
            without = rows - (u[:, :k] * s[:k]) @ vt[:k]
            assert np.allclose(remove_pc(x, k).numpy(), without, atol=1e-8)
        kept, expected = centred_gram(x, remove=1), centred_gram(remove_pc(x))
        assert torch.allclose(kept, expected, atol=1e-8) and not torch.allclose(kept, centred_gram(x), atol=1e-3)


def test_profile_of_layers():
    torch.manual_seed(0)
    model, x = cifar_resnet_v1(14, 0.25).eval(), torch.rand(20, 3, 8, 8)
    profile = principal_components(model, x, layers="blocks")
    with torch.no_grad(), ActivationRecorder(model, "blocks") as recorder:
        model(x)
    acts = recorder.take()
    parts = [first_pc(act) for act in acts.values()]
    assert profile.layers == tuple(acts) == tuple(f"layer{s}.{b}" for s in (1, 2, 3) for b in (0, 1))
    assert torch.allclose(profile.shares, torch.tensor([p.share for p in parts], dtype=torch.float64), atol=1e-4)
    a, b = parts[0].scores, parts[3].scores
    assert profile.cosines[0, 3].item() == pytest.approx((a @ b / a.norm() / b.norm()).abs().item(), abs=1e-3)


# The block


def brute_block(matrix, threshold):
    best = (0, 0)
    for i in range(len(matrix)):
        for j in range(i + 1, len(matrix) + 1):
            part = matrix[i:j, i:j]
            part = part[~torch.eye(j - i, dtype=torch.bool)]
            if (part >= threshold).all() and j - i > best[1] - best[0]:
                best = (i, j)
    return best


@pytest.mark.parametrize("seed", range(12))
def test_block_is_the_longest_run_of_like_layers(seed):
    scores = draw(14, 2, seed=seed).cumsum(0)
    matrix = torch.exp(-0.1 * torch.cdist(scores, scores))
    for threshold in (0.5, 0.8, 0.95):
        found = block_structure(matrix, threshold)
        assert (found.start, found.stop) == brute_block(matrix, threshold)
        assert found.fraction == (found.stop - found.start) / 14
    matrix[5, 5] = 0.0
    assert block_structure(matrix, 1e-6)[:2] == (0, 14)
    matrix[5] = matrix[:, 5] = float("nan")
    assert block_structure(matrix, 1e-6)[:2] == (6, 14)


# The networks


def test_network_equals_the_official_code():
    model = cifar_resnet_v1(14, 0.125).double().eval()
    theirs = {name.removeprefix("variables/"): tensor(name) for name in OFFICIAL.files if name.startswith("variables/")}
    model.load_state_dict(model.convert_state_dict(theirs), strict=False)
    missing = set(model.state_dict()) - set(model.convert_state_dict(theirs))
    assert all(name.endswith("num_batches_tracked") for name in missing)
    images = tensor("images").double().permute(0, 3, 1, 2) / 255
    with ActivationRecorder(model, ["input", *ActivationRecorder(model).modules]) as recorder:
        logits = model(images)
    assert torch.allclose(logits, tensor("logits"), rtol=1e-9)
    logits.square().sum().backward()
    # gradients in their names and axes, NaN where none was recorded, turned as their variables are
    recorded = {
        n: tensor(f"gradients/{n}") if f"gradients/{n}" in OFFICIAL else v * torch.nan for n, v in theirs.items()
    }
    expected = model.convert_state_dict(recorded)
    compared = {n: p.grad for n, p in model.named_parameters() if not expected[n].isnan().any()}
    assert len(compared) > 50 and any("shortcut" in n for n in compared)
    for name, gradient in compared.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-7, atol=1e-10), name
    # layer by layer: the same kinds, the same means and spreads; the shortcut's convolution runs where it is added
    acts = recorder.take()
    stats = sorted((round(act.mean().item(), 6), round(act.std().item(), 6)) for act in acts.values())
    official = sorted(
        (round(m, 6), round(d, 6)) for m, d in zip(OFFICIAL["means"], OFFICIAL["deviations"], strict=True)
    )
    assert len(stats) == len(official) == 21 * 2 + 9 and np.allclose(stats, official, atol=2e-6)


def test_keras_numbers_go_on_from_model_to_model():
    model = cifar_resnet_v1(8, 0.125)
    theirs = {f"conv2d_{7 + i}/kernel": torch.zeros(3, 3, 1, 1) for i in range(8)}
    with pytest.raises(ValueError, match=r"8 layers conv2d, this network has 9"):
        model.convert_state_dict(theirs)
    assert model.convert_state_dict({"module.fc.bias": torch.ones(1)}) == {"fc.bias": torch.ones(1)}


@pytest.mark.parametrize("depth", room.DEPTHS)
@pytest.mark.parametrize("width", [1, 2, 10])
def test_parameters_by_hand(depth, width):
    with torch.device("meta"):
        model = cifar_resnet_v1(depth, width)
    n, c = (depth - 2) // 6, 16 * width
    conv = lambda i, o, k: i * o * k * k + o  # noqa: E731
    count = conv(3, c, 3) + 2 * c + 10 * 4 * c + 10
    for stage in range(3):
        o = c << stage
        count += n * 2 * (conv(o, o, 3) + 2 * o)
        if stage:
            count += conv(o // 2, o, 3) - conv(o, o, 3) + conv(o // 2, o, 1)
    assert sum(p.numel() for p in model.parameters()) == count
    assert len(ActivationRecorder(model).modules) == 21 * n + 8


def test_first_weights_and_norms_are_keras():
    torch.manual_seed(0)
    model = cifar_resnet_v1(14, 2)
    weight = model.layer3[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    assert weight.abs().max().item() <= 2 * (2 / (9 * 128)) ** 0.5 / 0.8796 + 1e-6
    assert all(
        norm.eps == 1e-3 and norm.momentum == 0.01 for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)
    )
    assert all((conv.bias == 0).all() for conv in model.modules() if isinstance(conv, nn.Conv2d))
    kernels, rest = regularized(model, 1e-4)
    assert kernels["weight_decay"] == 2e-4 and rest["weight_decay"] == 0
    assert all(p.ndim > 1 for p in kernels["params"]) and all(p.ndim == 1 for p in rest["params"])
    assert len(kernels["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_plain_network_has_no_shortcut():
    with torch.device("meta"):
        both = [cifar_resnet_v1(14, residual=residual) for residual in (True, False)]
    counts = [sum(p.numel() for p in model.parameters()) for model in both]
    assert counts[0] - counts[1] == (16 * 32 + 32) + (32 * 64 + 64)
    assert deletable_blocks(both[0]) == ("layer1.0", "layer1.1", "layer2.1", "layer3.1")


def test_imagenet_networks():
    with torch.device("meta"):
        plain, deep, wide, all_wide = (scaled_resnet50(*arguments) for arguments in ((), (2, 1), (1, 2), (1, 2)))
        all_wide = scaled_resnet50(2, 2, scale_all=True)
        x = torch.zeros(1, 3, 64, 64)
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    assert count(plain) == 25_557_032
    # six more bottlenecks of the third stage, each 1024 -> 256 -> 256 -> 1024
    assert count(deep) - count(plain) == 6 * (2 * 1024 * 256 + 9 * 256**2 + 2 * (256 + 256 + 1024))
    assert [len(getattr(deep, f"layer{s}")) for s in (1, 2, 3, 4)] == [3, 4, 12, 3]
    assert wide.layer3[0].conv1.weight.shape[:2] == (512, 512) and wide.layer4[0].conv1.weight.shape[:2] == (512, 2048)
    assert [len(getattr(all_wide, f"layer{s}")) for s in (1, 2, 3, 4)] == [6, 8, 12, 6]
    assert all_wide.conv1.weight.shape[0] == 64 and all_wide.num_features == 4096
    assert plain.maxpool(torch.zeros(1, 1, 7, 8, device="meta")).shape == (1, 1, 4, 4)
    assert plain(x).shape == (1, 1000)
    ramp = torch.arange(8.0).repeat(8, 1)[None, None]
    assert plain.maxpool(ramp)[0, 0, 0].tolist() == [2.0, 4.0, 6.0, 7.0]
    torch.manual_seed(0)
    model = scaled_resnet50(0.5, 0.5)
    weight = model.layer4[0].conv2.weight
    assert weight.std().item() == pytest.approx((1 / (9 * 512)) ** 0.5, rel=0.02)
    assert (model.layer1[0].bn3.weight == 0).all() and model.fc.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert model.bn1.momentum == 0.01 and model.bn1.eps == 1e-5


# Recording, heat maps, lesions


class Shared(nn.Module):
    """A module that runs twice, and one that changes its input in place."""

    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.linear(self.act(self.linear(x))))


def test_recorder_keeps_what_was_and_counts_repeats():
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(5, 4)
    with ActivationRecorder(model, ["input", "linear", "act"]) as recorder, torch.no_grad():
        model(x)
    kept = recorder.take()
    assert list(kept) == ["input", "linear", "act", "linear#2", "act#2"]
    assert torch.equal(kept["input"], x) and torch.equal(kept["linear"], model.linear(x))
    assert (kept["linear"] < 0).any() and torch.equal(kept["act"], kept["linear"].relu())
    model(x)
    with pytest.raises(ValueError, match="nothing was recorded"):
        recorder.take()


def test_heat_map_is_that_of_the_activations():
    torch.manual_seed(0)
    model, other, x = cifar_resnet_v1(8, 0.25), cifar_resnet_v1(14, 0.25), torch.rand(21, 3, 8, 8)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = cka_matrix(
        model, x, other, other_layers="blocks", batch_size=8, passes=2, generator=torch.Generator().manual_seed(3)
    )
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    generator, sums = torch.Generator().manual_seed(3), MinibatchCKA(29, 6)
    model.eval(), other.eval()
    for _ in range(2):
        order = torch.randperm(21, generator=generator)
        for indices in (order[:8], order[8:16]):
            with torch.no_grad(), ActivationRecorder(model) as a, ActivationRecorder(other, "blocks") as b:
                model(x[indices]), other(x[indices])
            first, second = a.take(), b.take()
            sums.update(list(first.values()), list(second.values()))
    assert found.rows == tuple(first) and found.columns == tuple(second)
    assert torch.allclose(found.matrix, sums.compute(), rtol=1e-6)
    within = cka_matrix(model, x, batch_size=8, passes=1)
    assert torch.allclose(within.matrix.diagonal(), torch.ones(29, dtype=torch.float64))
    assert torch.equal(within.matrix, cka_matrix(model, x, batch_size=8, passes=1).matrix)
    for options in ({"normalize": True}, {"remove": 1}, {"batch_statistics": True}):
        changed = cka_matrix(model, x, batch_size=8, passes=1, **options).matrix
        assert not torch.allclose(changed, within.matrix, atol=1e-3), options
    assert model.bn1.running_mean is not None and model.bn1.track_running_stats
    assert torch.allclose(unit_norm(x).norm(dim=1), torch.ones(21))


def test_a_batch_norm_uses_the_batch_where_asked_and_learns_nothing():
    torch.manual_seed(0)
    model, x = cifar_resnet_v1(8, 0.25).eval(), 5 + torch.rand(16, 3, 8, 8)
    mean = model.bn1.running_mean.clone()
    with ActivationRecorder(model, ["bn1"], lambda out: out.mean().item()) as recorder:
        cka_matrix(model, x, layers=["bn1"], batch_size=16, passes=1, batch_statistics=True)
        assert abs(recorder.take()["bn1"]) < 1e-5
        cka_matrix(model, x, layers=["bn1"], batch_size=16, passes=1)
        assert abs(recorder.take()["bn1"]) > 0.01
    assert torch.equal(model.bn1.running_mean, mean)


def test_deleted_blocks_are_the_identity():
    torch.manual_seed(0)
    model, x = cifar_resnet_v1(20, 0.25).eval(), torch.rand(2, 3, 16, 16)
    full = model(x)
    calls = []
    handle = model.layer2[1].conv1.register_forward_hook(lambda *_: calls.append(1))
    with delete_blocks(model, ["layer2.1", "layer3.2"]):
        without = model(x)
    by_hand = model.relu1(model.bn1(model.conv1(x)))
    for name in ("1.0", "1.1", "1.2", "2.0", "2.2", "3.0", "3.1"):
        by_hand = model.get_submodule(f"layer{name}")(by_hand)
    assert torch.equal(without, model.forward_head(by_hand)) and not torch.allclose(without, full)
    assert not calls and torch.equal(model(x), full) and calls
    handle.remove()
    with pytest.raises(RuntimeError), delete_blocks(model, "layer2.1"):
        raise RuntimeError
    assert torch.equal(model(x), full)
    with pytest.raises(ValueError, match=r"layer2\.0"), delete_blocks(model, "layer2.0"):
        pass


# Probes and errors


def test_probe_is_gradient_descent_on_the_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).numpy() * np.sqrt(2 / 3)
    bias, speed_w, speed_b = np.zeros(3), 0.0, 0.0
    one_hot = np.eye(3)[y.numpy()]
    for _ in range(7):
        logits = x.numpy() @ weight.T + bias
        p = np.exp(logits - logits.max(1, keepdims=True))
        p = (p / p.sum(1, keepdims=True) - one_hot) / 6
        speed_w = 0.9 * speed_w + p.T @ x.numpy() + 2 * 0.01 * weight
        speed_b = 0.9 * speed_b + p.sum(0)
        weight, bias = weight - 0.5 * speed_w, bias - 0.5 * speed_b
    test = torch.randn(200, 3)
    found = linear_probe(x, y, test, l2=0.01, lr=0.5, epochs=7, generator=generator)
    assert (found.numpy() == (test.numpy() @ weight.T + bias).argmax(1)).mean() > 0.99


def test_probes_by_depth():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 2, 4, 4, generator=generator), torch.arange(60) % 3
    x[:, 0, 0, :3] += 4 * nn.functional.one_hot(y, 3)
    acts = {"good": x, "noise": torch.randn(60, 5, generator=generator)}
    found = accuracy_by_depth(
        {k: v[:40] for k, v in acts.items()}, y[:40], {k: v[40:] for k, v in acts.items()}, y[40:]
    )
    assert found["good"] > 0.8 > found["noise"]
    pooled = linear_probe(x[:40], y[:40], x[40:], pool=True, epochs=5)
    assert torch.equal(
        pooled, linear_probe(nn.functional.max_pool2d(x[:40], 2), y[:40], nn.functional.max_pool2d(x[40:], 2), epochs=5)
    )


def test_classes_are_compared_by_welch_and_holm():
    from scipy.stats import ttest_ind

    generator = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 3
    chances = torch.where(y == 1, 0.9, 0.6)
    a = torch.rand(6, 300, generator=generator) < chances
    b = torch.rand(8, 300, generator=generator) < 0.6
    found = compare_classes(a, b, y)
    raw = np.array(
        [
            ttest_ind(a[:, y == c].double().mean(1), b[:, y == c].double().mean(1), equal_var=False).pvalue
            for c in range(3)
        ]
    )
    order = np.argsort(raw)
    expected = np.maximum.accumulate(np.minimum(raw[order] * [3, 2, 1], 1))
    assert np.allclose(found.p_value.numpy()[order], expected)
    assert found.p_value[1] < 0.01 < found.p_value[[0, 2]].min() and found.difference[1] > 0.2
    assert found.overall == pytest.approx((a.double().mean() - b.double().mean()).item())
    nothing = compare_classes(a[:2] | True, b[:2] | True, y)
    assert (nothing.p_value == 1).all() and (nothing.difference == 0).all()


def test_examples_are_compared_without_bias():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(4000, generator=generator)
    draws = [torch.rand(m, 4000, generator=generator) < p for m in (3, 5)]
    same = compare_examples(*draws)
    assert same.variance == pytest.approx(same.chance, rel=0.06)
    shift = 0.4 * (torch.rand(4000, generator=generator) < 0.5)
    other = torch.rand(5, 4000, generator=generator) < (p - shift).clamp(min=0)
    found = compare_examples(draws[0], other)
    true = (p - (p - shift).clamp(min=0)).double().var().item()
    assert found.variance - found.chance == pytest.approx(true, rel=0.2)


def test_docstrings_have_running_examples():
    import doctest

    from saigen.papers.analysis.wide_and_deep import analysis, model, similarity

    for module in (analysis, model, similarity):
        result = doctest.testmod(module)
        assert result.attempted > 2 and result.failed == 0
