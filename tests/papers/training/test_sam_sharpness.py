"""The sharpness measures against closed forms and dense Hessians."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saigen.nn.attention import Attention
from saigen.nn.mlp_mixer import MLPMixer
from saigen.nn.vision_transformer import VisionTransformer
from saigen.papers.training.sam import (
    active_neuron_ratio,
    attention_maps,
    block_top_eigenvalues,
    filter_normalised_direction,
    hessian_top_eigenvalue,
    loss_surface,
    noisy_loss,
    ntk_condition_number,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(n: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 4, generator=generator(1), dtype=torch.double), torch.randint(3, (n,), generator=generator(2))


def dense_hessian(net: nn.Module, x: torch.Tensor, y: torch.Tensor, names: list[str]) -> torch.Tensor:
    shapes = {name: p.shape for name, p in net.named_parameters() if name in names}

    def value(flat):
        parts = flat.split([shape.numel() for shape in shapes.values()])
        moved = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(net, moved, x), y)

    at = torch.cat([p.detach().flatten() for name, p in net.named_parameters() if name in names])
    return torch.func.hessian(value)(at)


def test_top_eigenvalue_of_a_quadratic():
    root = torch.randn(7, 7, generator=generator(), dtype=torch.double)
    a, w = root @ root.T, torch.zeros(7, dtype=torch.double, requires_grad=True)
    found = hessian_top_eigenvalue(lambda: w @ a @ w / 2, [w], iterations=500, tolerance=1e-10, generator=generator())
    values, vectors = torch.linalg.eigh(a)
    assert found.converged and found.value == pytest.approx(values[-1].item(), rel=1e-6)
    assert abs(found.vector[0] @ vectors[:, -1]).item() == pytest.approx(1, abs=1e-3)


def test_sign_of_a_dominant_negative_curvature():
    w = torch.zeros(2, requires_grad=True)
    curvature = torch.tensor([1.0, -3.0])
    assert hessian_top_eigenvalue(lambda: (curvature * w**2).sum() / 2, [w]).value == pytest.approx(-3, rel=1e-2)


def test_top_eigenvalue_of_logistic_regression_in_closed_form():
    x, y = (
        torch.randn(40, 6, generator=generator(), dtype=torch.double),
        torch.randint(2, (40,), generator=generator()).double(),
    )
    w = torch.randn(6, generator=generator(3), dtype=torch.double, requires_grad=True)
    found = hessian_top_eigenvalue(
        lambda: F.binary_cross_entropy_with_logits(x @ w, y), [w], iterations=500, tolerance=1e-9, generator=generator()
    )
    p = torch.sigmoid(x @ w.detach())
    closed = torch.linalg.eigvalsh(x.T @ (x * (p * (1 - p))[:, None]) / 40)[-1].item()
    assert found.value == pytest.approx(closed, rel=1e-5)


def test_top_eigenvalue_of_an_mlp_is_that_of_its_dense_hessian():
    net, (x, y) = mlp(), batch()
    names = [name for name, _ in net.named_parameters()]
    values = torch.linalg.eigvalsh(dense_hessian(net, x, y, names))
    largest = values[values.abs().argmax()].item()

    def loss():
        return F.cross_entropy(net(x), y)

    found = hessian_top_eigenvalue(loss, net.parameters(), iterations=400, tolerance=1e-7, generator=generator())
    assert found.value == pytest.approx(largest, rel=1e-3)
    halves = [lambda part=part: F.cross_entropy(net(x[part]), y[part]) for part in (slice(0, 12), slice(12, 24))]
    assert hessian_top_eigenvalue(
        halves, net.parameters(), iterations=400, tolerance=1e-7, generator=generator()
    ).value == pytest.approx(found.value, rel=1e-6)
    assert all(p.grad is None for p in net.parameters())


def test_block_eigenvalues_are_those_of_the_diagonal_blocks():
    net, (x, y) = mlp(), batch()
    found = block_top_eigenvalues(
        lambda: F.cross_entropy(net(x), y),
        {"0": net[0], "2": net[2]},
        iterations=400,
        tolerance=1e-7,
        generator=generator(),
    )
    for layer in ("0", "2"):
        values = torch.linalg.eigvalsh(dense_hessian(net, x, y, [f"{layer}.weight", f"{layer}.bias"]))
        assert found[layer] == pytest.approx(values[values.abs().argmax()].item(), rel=1e-3)


def test_fused_attention_gets_its_second_derivative():
    torch.manual_seed(0)
    attention, x = Attention(8, num_heads=2, fused=True), torch.randn(2, 4, 8)
    value = hessian_top_eigenvalue(
        lambda: attention(x).square().mean(), attention.parameters(), generator=generator()
    ).value
    assert value > 0


def test_unused_and_frozen_parameters_have_no_curvature():
    w, unused = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    found = hessian_top_eigenvalue(lambda: (w**2).sum(), [w, unused, torch.ones(1)])
    assert found.value == pytest.approx(2) and torch.equal(found.vector[1], torch.zeros(3))
    assert hessian_top_eigenvalue(lambda: w.sum(), [w]).value == 0


def test_filter_normalised_directions():
    conv = nn.Conv2d(3, 4, 3)
    direction = filter_normalised_direction(conv.parameters(), generator())
    torch.testing.assert_close(direction[0].flatten(1).norm(dim=1), conv.weight.detach().flatten(1).norm(dim=1))
    assert torch.equal(direction[1], torch.zeros(4))


def test_surface_is_the_loss_on_the_grid_and_leaves_the_weights():
    net, (x, y) = mlp(), batch()
    before = [p.detach().clone() for p in net.parameters()]
    directions = [filter_normalised_direction(net.parameters(), generator(s)) for s in (0, 1)]
    at, surface = loss_surface(
        lambda: F.cross_entropy(net(x), y), net.parameters(), steps=5, radius=0.5, directions=tuple(directions)
    )
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert surface[2, 2].item() == pytest.approx(F.cross_entropy(net(x), y).item(), rel=1e-6)
    moved = [w + at[4] * d1 + at[1] * d2 for w, d1, d2 in zip(before, *directions, strict=True)]
    names = [name for name, _ in net.named_parameters()]
    by_hand = F.cross_entropy(torch.func.functional_call(net, dict(zip(names, moved, strict=True)), x), y)
    assert surface[4, 1].item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_noisy_loss_of_a_quadratic():
    w = torch.zeros(200, requires_grad=True)
    found = noisy_loss(lambda: w.square().sum(), [w], sigma=0.1, samples=50, generator=generator())
    assert found == pytest.approx(200 * 0.01, rel=0.05)
    assert torch.equal(w, torch.zeros(200))
    assert noisy_loss(lambda: w.square().sum(), [w], sigma=0.0) == 0


def test_ntk_of_a_linear_model_in_closed_form():
    net, x = nn.Linear(3, 1).double(), torch.randn(3, 3, generator=generator(), dtype=torch.double)
    values = torch.linalg.eigvalsh(x @ x.T + 1)
    assert ntk_condition_number(net, x) == pytest.approx((values[-1] / values[0]).item(), rel=1e-8)
    assert ntk_condition_number(net, x[[0, 0]]) == float("inf")
    assert net.training


def test_active_neurons():
    net = nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 1))
    net[0].weight.data = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert active_neuron_ratio(net, torch.ones(5, 2)) == {"1": 0.5}
    mixer = MLPMixer(img_size=8, patch_size=4, embed_dim=8, depth=2, in_chans=1)
    found = active_neuron_ratio(mixer, torch.rand(3, 1, 8, 8), batch_size=2)
    assert sorted(found) == [f"blocks.{i}.mlp_{kind}.act" for i in range(2) for kind in ("channels", "tokens")]
    assert all(0 < ratio < 1 for ratio in found.values())


def test_attention_maps_are_the_models_own():
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, fused_attn=False)
    x, seen = torch.rand(2, 3, 8, 8), []
    vit.blocks[1].attn.attn_drop.register_forward_hook(lambda module, args, out: seen.append(out))
    maps = attention_maps(vit, x)
    torch.testing.assert_close(maps, seen[0])
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 5))
    assert not torch.equal(maps, attention_maps(vit, x, layer=0)) and vit.training


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda w: hessian_top_eigenvalue(lambda: w.sum(), []), "params has 0"),
        (lambda w: hessian_top_eigenvalue([], [w]), "loss 0 terms"),
        (lambda w: hessian_top_eigenvalue(lambda: w.sum(), [w], iterations=0), "iterations is 0"),
        (lambda w: hessian_top_eigenvalue(lambda: w, [w]), "loss gives a tensor of shape (2,)"),
        (lambda w: loss_surface(lambda: w.sum(), [w], steps=1), "steps is 1"),
        (lambda w: loss_surface(lambda: w.sum(), [w], radius=0.0), "radius is 0.0"),
        (lambda w: noisy_loss(lambda: w.sum(), [w], sigma=-1.0), "sigma is -1.0"),
        (lambda w: active_neuron_ratio(mlp(), torch.rand(2, 4), ["7"]), "activations is ['7']"),
        (lambda w: active_neuron_ratio(mlp(), torch.rand(2, 4)), "activations is []"),
        (lambda w: attention_maps(mlp(), torch.rand(2, 3, 4, 4)), "layer is -1"),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(ValueError, match="allowed") as raised:
        call(torch.ones(2, requires_grad=True))
    assert text in str(raised.value)
