"""Stand-alone attention: the operator against equation 3, the stem against its formula, the networks, the claims."""

import math

import pytest
import torch
import torch.nn.functional as F

from saigen.cards import catalogue
from saigen.measure import macs, parameters
from saigen.papers.vision.stand_alone_attention import (
    AttentionStem,
    LocalSelfAttention2d,
    SASAResNet,
    claims,
    local_attention,
    sasa_resnet26,
    sasa_resnet50,
)
from saigen.trial import Trial


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_the_formula(q, k, v, rows, columns, size):
    """Equation 3, one pixel and one neighbour at a time."""
    b, n, d, h, w = q.shape
    y, p = torch.zeros_like(q), size // 2
    for i in range(h):
        for j in range(w):
            logits, values = [], []
            for a in range(i - p, i + p + 1):
                for c in range(j - p, j + p + 1):
                    inside = 0 <= a < h and 0 <= c < w
                    key = k[..., a, c] if inside and k is not None else torch.zeros(b, n, d, dtype=q.dtype)
                    if rows is not None:
                        key = key + torch.cat([rows[a - i + p], columns[c - j + p]])
                    logits.append((q[..., i, j] * key).sum(-1))
                    values.append(v[..., a, c] if inside else torch.zeros(b, n, d, dtype=q.dtype))
            weights = torch.stack(logits).softmax(0)
            y[..., i, j] = (weights[..., None] * torch.stack(values)).sum(0)
    return y


GEOMETRIES = [(3, 4, 6, 5), (7, 4, 5, 9), (5, 16, 7, 7), (7, 16, 7, 14), (1, 4, 3, 3), (3, 4, 1, 1)]  # k, d, h, w


@pytest.mark.parametrize("backend", ["blocks", "windows"])
@pytest.mark.parametrize(("size", "d", "h", "w"), GEOMETRIES)
def test_equals_the_formula(size, d, h, w, backend):
    q, k, v = draw(3, 2, 2, d, h, w)
    rows, columns = draw(2, size, d // 2, seed=1)
    for key, tables in [(k, (rows, columns)), (k, (None, None)), (None, (rows, columns))]:
        y = local_attention(q, key, v, *tables, kernel_size=size, backend=backend)
        torch.testing.assert_close(y, by_the_formula(q, key, v, *tables, size), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", ["blocks", "windows"])
def test_gradcheck(backend):
    q, k, v = (t.requires_grad_() for t in draw(3, 1, 2, 4, 5, 3).unbind())
    rows, columns = (t.requires_grad_() for t in draw(2, 3, 2, seed=1).unbind())

    def call(*tensors):
        return local_attention(*tensors, kernel_size=3, backend=backend)

    assert torch.autograd.gradcheck(call, (q, k, v, rows, columns), fast_mode=True)


def test_both_backends_give_the_same_network():
    nets = [SASAResNet((1, 1), (16, 16), num_heads=2, num_classes=3, backend=b).eval() for b in ("blocks", "windows")]
    nets[1].load_state_dict(nets[0].state_dict())
    x = draw(2, 3, 40, 40).float()
    torch.testing.assert_close(nets[0](x), nets[1](x), rtol=1e-4, atol=1e-5)


def test_translation_moves_the_interior():
    layer, x = LocalSelfAttention2d(8, 5, 2).double(), draw(1, 8, 12, 12)
    moved = layer(x.roll(1, -1))
    torch.testing.assert_close(moved[..., 2:-2, 3:-2], layer(x).roll(1, -1)[..., 2:-2, 3:-2])


def test_no_queries_make_a_box_filter():
    q, _, v = draw(3, 1, 2, 4, 6, 6)
    rows, columns = draw(2, 3, 2, seed=1)
    y = local_attention(0 * q, q, v, rows, columns, kernel_size=3)
    expected = F.avg_pool2d(v.flatten(1, 2), 3, 1, 1).view_as(v)
    torch.testing.assert_close(y, expected)


def test_a_window_of_one_is_the_value():
    layer, x = LocalSelfAttention2d(8, 1, 2).double(), draw(1, 8, 5, 5)
    value = layer.qkv(x).unflatten(1, (2, 3, 4))[:, :, 2].flatten(1, 2)
    torch.testing.assert_close(layer(x), value)


def test_without_positions_the_order_of_a_window_is_lost():
    q, k, v = draw(3, 1, 1, 4, 3, 3)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    mixed = [t.flatten(3)[..., order].view_as(t) for t in (k, v)]
    for tables, same in [((None, None), True), (tuple(draw(2, 3, 2, seed=1)), False)]:
        first, second = (local_attention(q, a, b, *tables, kernel_size=3)[..., 1, 1] for a, b in [(k, v), mixed])
        assert torch.allclose(first, second) == same


def test_stride_is_average_pooling():
    layer, x = LocalSelfAttention2d(8, 3, 2, 2).double(), draw(1, 8, 6, 6)
    whole = LocalSelfAttention2d(8, 3, 2).double()
    whole.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), F.avg_pool2d(whole(x), 2))
    assert layer(draw(1, 8, 5, 7)).shape == (1, 8, 3, 4)


def test_heads_are_independent():
    """With grouped projections each head sees its own channels alone."""
    layer, x = LocalSelfAttention2d(8, 3, 2, grouped_projections=True).double(), draw(1, 8, 5, 5)
    changed = x.clone()
    changed[:, 4:] += 1
    first, second = layer(x), layer(changed)
    assert torch.equal(first[:, :4], second[:, :4]) and not torch.allclose(first[:, 4:], second[:, 4:])


def test_absolute_positions_break_translation():
    layer, x = LocalSelfAttention2d(8, 3, 2, position="absolute").double(), draw(1, 8, 8, 8)
    moved, back = layer(x.roll(1, -1))[..., 1:-1, 2:-1], layer(x).roll(1, -1)[..., 1:-1, 2:-1]
    assert not torch.allclose(moved, back, atol=1e-3)


def test_scale_is_a_temperature():
    layer, x = LocalSelfAttention2d(8, 3, 2, scale=0.0).double(), draw(1, 8, 4, 4)
    value = layer.qkv(x).unflatten(1, (2, 3, 4))[:, :, 2].flatten(1, 2)
    torch.testing.assert_close(layer(x), F.avg_pool2d(value, 3, 1, 1))


def stem_by_the_formula(stem, x):
    """Section 3.3, one square, head and pixel at a time."""
    size, heads = stem.block, stem.num_heads
    d = stem.out_channels // heads
    y = torch.zeros(x.shape[0], stem.out_channels, *x.shape[2:], dtype=x.dtype)
    p = torch.zeros(size, size, len(stem.nu), dtype=x.dtype)
    for a in range(size):
        for c in range(size):
            p[a, c] = torch.softmax(stem.nu @ (stem.place_rows[a] + stem.place_columns[c]), 0)
    places = [(a, c) for a in range(size) for c in range(size)]
    for top in range(0, x.shape[2], size):
        for left in range(0, x.shape[3], size):
            for i, j in places:
                query = stem.query(x[:, :, top + i, left + j])
                for head in range(heads):
                    part = slice(head * d, (head + 1) * d)
                    logits, values = [], []
                    for a, c in places:
                        pixel = x[:, :, top + a, left + c]
                        r = torch.cat([stem.rows[a - i + size - 1], stem.columns[c - j + size - 1]])
                        logits.append((query[:, part] * (stem.key(pixel)[:, part] + r)).sum(1))
                        matrix = sum(p[a, c, m] * stem.value[m] for m in range(len(stem.nu)))
                        values.append((pixel @ matrix.T)[:, part])
                    weights = torch.stack(logits).softmax(0)
                    y[:, part, top + i, left + j] = (weights[..., None] * torch.stack(values)).sum(0)
    return y


def test_stem_equals_the_formula():
    stem, x = AttentionStem(3, 8, block=2, num_heads=2, mixtures=3).double(), draw(2, 3, 4, 6)
    torch.testing.assert_close(stem(x), stem_by_the_formula(stem, x), rtol=1e-10, atol=1e-10)


def test_stem_values():
    x = draw(1, 3, 8, 8)
    plain, mixed = (AttentionStem(3, 8, num_heads=2, mixtures=1, values=v).double() for v in ("plain", "mixture"))
    with torch.no_grad():
        mixed.value[0] = plain.value.weight
        for name in ("query", "key"):
            getattr(mixed, name).load_state_dict(getattr(plain, name).state_dict())
        mixed.rows.copy_(plain.rows)
        mixed.columns.copy_(plain.columns)
    torch.testing.assert_close(plain(x), mixed(x))  # one mixture component is one matrix for all places
    convolution = AttentionStem(3, 8, num_heads=2, values="convolution").double()
    assert convolution(x).shape == (1, 8, 8, 8)
    torch.testing.assert_close(mixed.mixture(), torch.ones(16, 1, dtype=torch.float64))


def size_of(**options):
    with torch.device("meta"):
        return parameters(SASAResNet((3, 4, 6, 3), **options))


def test_sizes_of_the_ablations():
    """Tables 4 and 6, in millions as printed there; the counts behind them exactly."""
    full = size_of()
    assert full == 18_015_504
    for stages, printed in [
        ((), 25.6),
        ((4,), 20.8),
        ((3, 4), 18.5),
        ((2, 3, 4), 18.1),
        ((1,), 25.5),
        ((1, 2, 3), 22.7),
    ]:
        assert round(size_of(attention_stages=stages) / 1e6, 1) == printed
    assert full - size_of(content=False) == 1_257_472  # the keys' projections: 18.0 to 16.7
    assert size_of(grouped_projections=True) == 14_714_640  # what the text says, and the table does not
    assert size_of(kernel_size=9) - full == 2 * 2 * 236  # two more offsets in two tables of C / 16 columns


def test_costs_of_a_place():
    """Section 3.2: 3 C^2 of projections, 2 C k^2 of attention and C k of positions."""
    for channels, k in [(128, 19), (64, 7)]:
        with torch.device("meta"):
            layer = LocalSelfAttention2d(channels, k, backend="windows")
        assert macs(layer, (channels, 20, 20)) == 400 * (3 * channels**2 + 2 * channels * k**2 + channels * k)


def test_networks_have_their_stems():
    with torch.device("meta"):
        assert isinstance(sasa_resnet26(conv_stem=False).conv1, AttentionStem)
        layers = [m for m in sasa_resnet50().modules() if isinstance(m, LocalSelfAttention2d)]
    assert len(layers) == 16 and sum(layer.stride == 2 for layer in layers) == 3
    net = SASAResNet((1, 1), (8, 8), conv_stem=False, kernel_size=3, num_heads=2, num_classes=3)
    maps = net.forward_stages(torch.rand(1, 3, 32, 32))
    assert [m.shape[-1] for m in maps] == [8, 4] and net.reset_classifier(7) is None and net.fc.out_features == 7


@pytest.mark.parametrize("claim", [claim.id for claim in catalogue.paper("stand_alone_attention").card.claim])
def test_claims_run_at_tiny(claim):
    first, again = (getattr(claims, claim)(Trial(seed=1000, scale="tiny")) for _ in range(2))
    quantities = catalogue.paper("stand_alone_attention").card.find_claim(claim).quantities
    assert set(quantities) <= set(first) and all(math.isfinite(value) for value in first.values())
    assert first == again


def test_relations_are_what_they_say():
    x, y = claims.relations(200, 16, torch.Generator().manual_seed(0))
    assert x.shape == (200, 1, 16, 16) and y.bincount(minlength=8).min() > 5
    plus, cross = torch.zeros(3, 3), torch.eye(3).maximum(torch.eye(3).flip(0))
    plus[1], plus[:, 1] = 1, 1
    found = []
    for mark in (plus, cross):
        score = F.conv2d(x, (mark - mark.mean())[None, None]).flatten(1).argmax(1)
        found.append(torch.stack([score // 14, score % 14], 1))
    step = (found[1] - found[0]).double()
    direction = (torch.atan2(step[:, 0], step[:, 1]) / (math.pi / 4)).round().long() % 8
    assert (direction == y).double().mean() > 0.9


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: LocalSelfAttention2d(16, 2), "kernel_size is 2"),
        (lambda: LocalSelfAttention2d(16, num_heads=5), "num_heads is 5"),
        (lambda: LocalSelfAttention2d(24, num_heads=8), "an even share of channels = 24"),
        (lambda: LocalSelfAttention2d(16, stride=0), "stride is 0"),
        (lambda: LocalSelfAttention2d(16, position="rel"), "position is 'rel'"),
        (lambda: LocalSelfAttention2d(16, position="none", content=False), "content is False"),
        (lambda: LocalSelfAttention2d(16, backend="cuda"), "backend is 'cuda'"),
        (lambda: LocalSelfAttention2d(16)(torch.rand(1, 8, 4, 4)), "x has 8 channels"),
        (lambda: local_attention(*torch.rand(3, 1, 1, 2, 4, 4), None, None, kernel_size=4), "kernel_size is 4"),
        (
            lambda: local_attention(*torch.rand(3, 1, 1, 2, 4, 4), torch.rand(3, 1), None, kernel_size=3),
            "rows is given",
        ),
        (
            lambda: local_attention(*torch.rand(3, 1, 1, 2, 4, 4), *torch.rand(2, 5, 1), kernel_size=3),
            "(kernel_size, d / 2) = (3, 1)",
        ),
        (
            lambda: local_attention(
                torch.rand(1, 1, 2, 4, 4),
                torch.rand(1, 1, 2, 4, 5),
                torch.rand(1, 1, 2, 4, 4),
                None,
                None,
                kernel_size=3,
            ),
            "q, k and v have different shapes",
        ),
        (
            lambda: local_attention(*torch.rand(3, 1, 1, 2, 4, 4), None, None, kernel_size=3, backend="x"),
            "backend is 'x'",
        ),
        (lambda: AttentionStem(3, 6, num_heads=3, block=0), "block"),
        (lambda: AttentionStem(3, 9, num_heads=3), "num_heads is 3"),
        (lambda: AttentionStem(values="x"), "values is 'x'"),
        (lambda: AttentionStem()(torch.rand(1, 3, 9, 8)), "x is 9 x 8 pixels"),
        (lambda: AttentionStem()(torch.rand(1, 1, 8, 8)), "x has 1 channels"),
        (lambda: SASAResNet((1,), (8,), attention_stages=(2,)), "attention_stages is [2]"),
        (lambda: sasa_resnet26(conv_stem=False, small_stem=True), "small_stem is True"),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(ValueError) as error:
        call()
    assert text in str(error.value)
