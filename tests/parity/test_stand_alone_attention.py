"""Local attention beside timm's halo attention, whose blocks are shrunk to one pixel."""

import pytest
import torch

from saigen.papers.vision.stand_alone_attention import LocalSelfAttention2d
from tests.peers import need


@pytest.mark.peers
@pytest.mark.parametrize("backend", ["blocks", "windows"])
def test_equals_halo_attention_with_blocks_of_one(backend):
    timm = need("timm")
    channels, heads, k, side = 16, 2, 5, 6
    d = channels // heads
    theirs = timm.layers.halo_attn.HaloAttn(channels, num_heads=heads, block_size=1, halo_size=k // 2).double()
    ours = LocalSelfAttention2d(channels, k, heads, scale=theirs.scale, backend=backend).double()
    with torch.no_grad():
        q, k_, v = ours.qkv.weight.unflatten(0, (heads, 3, d)).unbind(1)
        theirs.q.weight.copy_(q.flatten(0, 1))
        theirs.kv.weight.copy_(torch.cat([k_, v], 1).flatten(0, 1))
        # they scale the content only: the positions carry the scale here
        position = theirs.pos_embed
        for table, own, first in ((position.height_rel, ours.rows, 0), (position.width_rel, ours.columns, d // 2)):
            table.zero_()
            # the one query of a block stands at the start of their table of offsets
            middle = (len(table) - 1) // 2
            table[middle : middle + k, first : first + d // 2] = own * theirs.scale
    x = torch.randn(2, channels, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first, second = (x.clone().requires_grad_() for _ in range(2))
    torch.testing.assert_close(ours(first), theirs(second))
    ours(first).square().sum().backward()
    theirs(second).square().sum().backward()
    torch.testing.assert_close(first.grad, second.grad)
