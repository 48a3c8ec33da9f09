"""NFNet: against the official code's answers, the papers' identities, and AGC by its definition."""

import copy
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import saigen
from saigen import weights
from saigen.cards import catalogue
from saigen.measure import parameters
from saigen.papers.vision import nfnet as room
from saigen.papers.vision.nfnet import (
    AGC,
    GAMMA,
    NF_REGNET,
    NF_RESNET,
    NFNET,
    NFNet,
    WSConv2d,
    adaptive_clip_grad_,
    claims,
    convert_haiku,
    nfnet_param_groups,
    signal_propagation,
)
from saigen.trial import Trial
from tests.golden.nfnet.filling import CASES, SIDE, STEPS, filled, parameter

GOLDEN = Path(__file__).parents[2] / "golden" / "nfnet" / "golden.npz"
DESIGNS = {
    "NFNet": (replace(NFNET, group_size=8), 16, 128),
    "NF_ResNet": (NF_RESNET, 16, 0),
    "NF_RegNet": (NF_REGNET, 18, 122),
}


def small(design=NF_RESNET, depths=(1, 2), widths=(32, 48), **options):
    design = replace(design, stem="small" if design.stem == "7x7" else design.stem)
    return NFNet(depths, widths, design=design, num_classes=5, **options)


def official(case):
    """Our network with the parameters the official code answered for, built from their names and shapes."""
    answers = np.load(GOLDEN)
    depths, widths = CASES[case]
    design, stem, head = DESIGNS[case]
    widths = [int(0.75 * width) for width in widths] if case == "NF_RegNet" else widths
    net = NFNet(
        depths, widths, design=design, stem_width=stem, head_width=head, num_classes=5, numerics="official"
    ).train()
    arrays = {name: parameter(name, shape) for name, shape in json.loads(str(answers[f"{case}.shapes"])).items()}
    weights.load(net, {name: torch.as_tensor(value) for name, value in arrays.items()})
    x = torch.from_numpy(filled("x", (2, SIDE, SIDE, 3))).permute(0, 3, 1, 2)
    return net, x, answers


@pytest.mark.parametrize("case", CASES)
def test_equals_official_forward(case):
    net, x, answers = official(case)
    with torch.no_grad():
        logits = net(x)
        plot, maps = [], net.stem(x)
        for block in [nn.Identity(), *(block for stage in net.stages for block in stage)]:
            maps = block(maps)
            plot.append((maps.var((0, 2, 3), correction=0).mean(), maps.mean((0, 2, 3)).square().mean()))
    torch.testing.assert_close(logits, torch.from_numpy(answers[f"{case}.logits"]), rtol=2e-5, atol=2e-5)
    for found, kind in zip(zip(*plot, strict=True), ("avg_var", "avg_sq_mean"), strict=True):
        torch.testing.assert_close(
            torch.stack(found), torch.from_numpy(answers[f"{case}.{kind}"]), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("case", CASES)
def test_equals_official_steps_with_agc(case):
    net, x, answers = official(case)
    optimizer = AGC(nfnet_param_groups(net, 1e-2, 0.02), torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), torch.tensor([1, 3]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(answers[f"{case}.losses"].tolist(), rel=1e-4)
    expected = torch.from_numpy(answers[f"{case}.classifier"]).t()
    torch.testing.assert_close(net.head.fc.weight.detach(), expected, rtol=1e-3, atol=1e-4)
    norms = {name: torch.tensor(value) for name, value in json.loads(str(answers[f"{case}.norms"])).items()}
    names = convert_haiku({name: parameter(name, shape) for name, shape in shapes(answers, case)})
    by_ours = dict(zip(names, norms.values(), strict=True))
    for name, parameter_ in net.named_parameters():
        assert parameter_.norm().item() == pytest.approx(by_ours[name].item(), rel=1e-4), name


def shapes(answers, case):
    return json.loads(str(answers[f"{case}.shapes"])).items()


# --- scaled weight standardisation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("numerics", ["official", "timm"])
def test_filters_have_mean_zero_and_square_sum_of_gain(numerics):
    layer = WSConv2d(16, 8, 3, groups=2, numerics=numerics).double()
    nn.init.normal_(layer.weight, 3.0, 2.0)
    nn.init.uniform_(layer.gain)
    weight = layer.standardised_weight()
    assert weight.mean((1, 2, 3)).abs().max() < 1e-12
    torch.testing.assert_close(weight.square().sum((1, 2, 3)), layer.gain.flatten() ** 2, rtol=1e-4, atol=0)


def test_a_constant_filter_gives_zero_not_nan():
    for numerics in ("official", "timm"):
        layer = WSConv2d(4, 2, 3, numerics=numerics)
        nn.init.constant_(layer.weight, 0.7)
        layer(torch.rand(1, 4, 5, 5)).sum().backward()
        assert layer.standardised_weight().abs().max() < 1e-3 and layer.weight.grad.isfinite().all()


def test_the_gradient_of_the_standardisation():
    for numerics in ("official", "timm"):
        layer = WSConv2d(3, 2, 3, numerics=numerics).double()

        def weight(w, g, layer=layer):
            return torch.func.functional_call(layer, {"weight": w, "gain": g}, (torch.ones(1, 3, 4, 4).double(),))

        w, g = layer.weight.detach().requires_grad_(), layer.gain.detach().requires_grad_()
        assert torch.autograd.gradcheck(weight, (w, g))


def test_scaling_the_input_is_scaling_the_weights():
    layer = WSConv2d(4, 6, 3, 2).double()
    scaled = WSConv2d(4, 6, 3, 2, input_scale=1.7).double()
    scaled.load_state_dict(layer.state_dict())
    x = torch.rand(2, 4, 9, 8).double()
    torch.testing.assert_close(scaled(x), layer(1.7 * x))


@pytest.mark.parametrize("name", sorted(GAMMA))
def test_gamma_keeps_the_variance(name):
    # ±1 %, since the official numbers were drawn at random
    nodes = np.linspace(-12, 12, 20_001)
    values = room.model.Activation(name)(torch.from_numpy(nodes)).numpy()
    mass = np.exp(-(nodes**2) / 2)
    mass = mass / mass.sum()
    variance = (mass * values**2).sum() - (mass * values).sum() ** 2
    assert GAMMA[name] ** 2 * variance == pytest.approx(1.0, abs=0.01)


# --- the network ------------------------------------------------------------------------------------------------------


def test_beta_of_f0():
    with torch.device("meta"):
        stages = room.dm_nfnet_f0().stages
    assert [[round(block.variance, 10) for block in stage] for stage in stages] == [
        [1.0],
        [1.04, 1.04],
        [1.08, 1.04, 1.08, 1.12, 1.16, 1.2],
        [1.24, 1.04, 1.08],
    ]
    # γ / β on the convolutions that read the block's activation
    assert stages[1][0].conv1.input_scale == pytest.approx(GAMMA["gelu"] / math.sqrt(1.04))
    assert stages[1][0].downsample.conv.input_scale == stages[1][0].conv1.input_scale


def test_each_step_of_f_adds_as_many_parameters():
    with torch.device("meta"):
        counts = [parameters(getattr(room, f"dm_nfnet_f{level}")()) for level in range(8)]
    assert {b - a for a, b in itertools.pairwise(counts)} == {61_144_972}


def test_nf_resnet_is_resnet_and_a_gain_a_block():
    from saigen.nn import resnet

    with torch.device("meta"):
        for layers, blocks in ((50, 16), (101, 33), (152, 50)):
            twin = parameters(getattr(resnet, f"resnet{layers}")())
            assert parameters(getattr(room, f"nf_resnet{layers}")()) == twin + blocks


def test_a_new_block_is_the_identity():
    net = small(depths=(2, 2)).eval()
    x = torch.rand(2, 32, 8, 8)
    assert torch.equal(net.stages[0][1](x), x)
    logits = net(torch.ones(1, 3, 8, 8))
    for stage in net.stages:  # the branches of the second blocks have no say
        nn.init.normal_(stage[1].conv2.weight, std=9.0)
    assert torch.equal(net(torch.ones(1, 3, 8, 8)), logits)


def test_variance_follows_the_plan_and_the_model_stays():
    net = small(NF_RESNET, (4, 4), (128, 256)).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    plot = signal_propagation(net, torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    expected = [1.0, 1.04, 1.08, 1.12, 1.16, 1.04, 1.08, 1.12, 1.16]
    assert [signal.expected_variance for signal in plot] == pytest.approx(expected)
    assert all(abs(math.log(signal.variance / signal.expected_variance)) < 0.2 for signal in plot)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    still = signal_propagation(net, torch.randn(2, 3, 16, 16), skip_gain=0.0)
    assert [signal.expected_variance for signal in still] == [1.0] * 9


def test_stochastic_depth_does_not_rescale():
    net = small(depths=(1, 3), stochdepth_rate=0.9)
    rates = [block.drop for stage in net.stages for block in stage]
    assert rates == pytest.approx([0.0, 0.225, 0.45, 0.675])
    block = net.stages[1][2].train()
    nn.init.ones_(block.skipinit_gain)
    x = torch.rand(400, 48, 1, 1)
    branch = block(x) - x
    kept = branch.flatten(1).abs().amax(1) > 0
    assert 0.25 < kept.float().mean() < 0.4
    assert torch.allclose(branch[kept], (block.eval()(x) - x)[kept], atol=1e-6)


def test_classifier_is_replaced():
    net = small()
    net.reset_classifier(7)
    assert net(torch.rand(1, 3, 8, 8)).shape == (1, 7) and net.get_classifier().out_features == 7
    net.reset_classifier(0)
    assert net(torch.rand(1, 3, 8, 8)).shape == (1, net.num_features) == (1, 48)
    features = net.forward_features(torch.rand(2, 3, 9, 9))
    assert net.forward_head(features, pre_logits=True).shape == (2, 48)


def test_metadata_is_the_papers():
    with torch.device("meta"):
        cfg = saigen.create_model("dm_nfnet_f3").default_cfg
    assert cfg["input_size"] == (3, 320, 320) and cfg["test_input_size"] == (3, 416, 416)
    assert cfg["interpolation"] == "bicubic" and cfg["mean"] == (0.485, 0.456, 0.406)


def test_layouts(tmp_path):
    net = small()
    for prefix in ("module.", "backbone.", ""):
        twin = small()
        weights.load(twin, {prefix + name: value for name, value in net.state_dict().items()})
        assert torch.equal(twin.stages[0][0].conv1.weight, net.stages[0][0].conv1.weight)
    with torch.device("meta"):
        state = room.dm_nfnet_f0().state_dict()
    other = {name: value for name, value in state.items() if "skipinit" not in name}  # what timm's nfnet_f0 has
    with pytest.raises(ValueError, match="timm's nfnet_"):
        NFNet.convert_state_dict(other)
    assert NFNet.convert_state_dict(state).keys() == state.keys()


# --- AGC --------------------------------------------------------------------------------------------------------------


def clipped_by_hand(w, g, clipping, eps):
    """One unit at a time, as equation 3 has it."""
    out = g.clone()
    units = [...] if w.squeeze().ndim < 2 else range(len(w))
    for i in units:
        limit = clipping * max(w[i].norm().item(), eps)
        if g[i].norm().item() > limit:
            out[i] = g[i] * limit / max(g[i].norm().item(), 1e-6)
    return out


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 3, 3), (7,), (), (5, 1, 1, 1), (3, 2, 4)])
def test_agc_equals_its_definition(shape):
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    g = torch.randn(shape, generator=generator, dtype=torch.float64) * torch.rand(shape[:1], generator=generator).view(
        -1, *[1] * (len(shape) - 1)
    ).reshape(shape[:1] + (1,) * (len(shape) - 1))
    for clipping in (0.01, 0.3, 1.0, 1e9):
        w.grad = g.clone()
        adaptive_clip_grad_(w, clipping)
        torch.testing.assert_close(w.grad, clipped_by_hand(w.detach(), g, clipping, 1e-3), rtol=1e-12, atol=1e-15)
    assert torch.equal(w.grad, g)  # so large a λ clips nothing


def test_agc_bounds_every_unit_and_knows_no_scale():
    w = torch.nn.Parameter(torch.randn(8, 4, 3, 3))
    g = torch.randn(8, 4, 3, 3) * torch.logspace(-4, 2, 8).view(-1, 1, 1, 1)
    w.grad = g.clone()
    adaptive_clip_grad_([w], 0.02)
    ratio = w.grad.flatten(1).norm(dim=1) / w.detach().flatten(1).norm(dim=1)
    assert ratio.max() <= 0.02 * (1 + 1e-5) and (w.grad == g).flatten(1).all(1).any()
    scaled = torch.nn.Parameter(100 * w.detach())
    scaled.grad = 100 * g
    adaptive_clip_grad_([scaled], 0.02)
    torch.testing.assert_close(scaled.grad, 100 * w.grad)


def test_agc_leaves_out_what_the_paper_leaves_out():
    net = small()
    groups = nfnet_param_groups(net, weight_decay=0.1, clipping=0.01)
    kinds = {id(p): (group["weight_decay"], group["clipping"]) for group in groups for p in group["params"]}
    found = {name: kinds[id(p)] for name, p in net.named_parameters()}
    assert found["head.fc.weight"] == (0.1, None) and found["head.fc.bias"] == (0.0, 0.01)
    assert found["stages.0.0.skipinit_gain"] == found["stem.conv.gain"] == found["stem.conv.bias"] == (0.0, 0.01)
    assert found["stem.conv.weight"] == found["stages.0.0.conv2.weight"] == (0.1, 0.01)
    with pytest.raises(ValueError, match="classifier_name"):
        nfnet_param_groups(nn.Linear(2, 2))


def test_agc_comes_before_weight_decay_and_momentum():
    w = torch.nn.Parameter(torch.full((1, 4), 2.0, dtype=torch.float64))  # norm 4
    optimizer = AGC([w], torch.optim.SGD, clipping=0.1, lr=1.0, momentum=0.9, weight_decay=0.5)
    value, momentum = w.detach().clone(), 0.0
    for _ in range(3):
        w.grad = torch.full_like(w, 50.0)
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * value.norm() / 2 + 0.5 * value
        value = value - momentum
        torch.testing.assert_close(w.detach(), value)


def test_agc_around_optimizers_that_look_twice():
    from saigen.papers.training.sam import SAM

    def train(make):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        optimizer = make(net.parameters())
        seen = []

        def closure():
            optimizer.zero_grad()
            loss = 1e3 * net(torch.ones(3, 4)).square().sum()
            loss.backward()
            seen.append(loss.item())
            return loss

        for _ in range(2):
            optimizer.step(closure)
        return seen

    assert len(train(AGC)) == 2
    twice = train(lambda params: AGC(params, lambda p: SAM(p, torch.optim.SGD, lr=0.1)))
    assert len(twice) == 4 and twice[2] < twice[0]


def test_agc_with_a_scheduler_and_its_own_groups():
    w, v = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = AGC([{"params": [w]}, {"params": [v], "clipping": None}], torch.optim.Adam, lr=0.1)
    assert [group["clipping"] for group in optimizer.base_optimizer.param_groups] == [0.01, None]
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    w.grad, v.grad = torch.full_like(w, 5.0), torch.full_like(v, 5.0)
    optimizer.step()
    schedule.step()
    assert w.grad.norm() < 0.1 and v.grad.norm() == 10 and optimizer.base_optimizer.param_groups[0]["lr"] == 0.05
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "clipping": 0.5})
    assert optimizer.base_optimizer.param_groups[2]["clipping"] == 0.5
    twin = copy.deepcopy(optimizer)
    assert twin.base_optimizer.param_groups is twin.param_groups is not optimizer.param_groups


# --- claims and wrong arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("claim", [claim.id for claim in catalogue.paper("nfnet").card.claim])
def test_claims_run_at_tiny(claim):
    first, again = (getattr(claims, claim)(Trial(seed=1000, scale="tiny")) for _ in range(2))
    quantities = catalogue.paper("nfnet").card.find_claim(claim).quantities
    assert set(quantities) <= set(first) and all(math.isfinite(value) for value in first.values())
    assert first == again


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: WSConv2d(4, 4, 2), "kernel_size is 2"),
        (lambda: WSConv2d(4, 6, 3, groups=4), "groups is 4"),
        (lambda: WSConv2d(4, 4, 3, padding="valid"), "padding is 'valid'"),
        (lambda: WSConv2d(4, 4, 3, numerics="jax"), "numerics is 'jax'"),
        (lambda: NFNet((1,), (8, 8)), "depths is (1,)"),
        (lambda: NFNet((1,), (64,), design=NFNET), "holds a group of 128"),
        (lambda: small(alpha=0.0), "alpha is 0.0"),
        (lambda: small(drop_rate=1.0), "drop_rate is 1.0"),
        (lambda: small(stochdepth_rate=-0.1), "stochdepth_rate is -0.1"),
        (lambda: small(in_chans=0), "in_chans is 0"),
        (lambda: small()(torch.rand(1, 1, 8, 8)), "x has 1 channels"),
        (lambda: small().reset_classifier(-1), "num_classes is -1"),
        (lambda: room.nf_resnet50(like="torchvision"), "like is 'torchvision'"),
        (lambda: room.dm_nfnet_f0(activation="mish"), "activation is 'mish'"),
        (lambda: room.dm_nfnet_f0(numerics="jax"), "numerics is 'jax'"),
        (lambda: AGC(small().parameters(), clipping=0.0, lr=0.1), "clipping is 0.0"),
        (lambda: AGC(small().parameters(), clipping_eps=-1.0, lr=0.1), "eps is -1.0"),
        (lambda: AGC(small().parameters(), "sgd"), "base_optimizer is 'sgd'"),
        (lambda: AGC(small().parameters(), lambda params: 3), "base_optimizer made 3"),
        (lambda: adaptive_clip_grad_([], -1.0), "clipping is -1.0"),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(ValueError) as error:
        call()
    assert text in str(error.value)
