"""The Non-Parametric Transformer (Kossen, Band, Lyle, Gomez, Rainforth, Gal, NeurIPS 2021).

The paper's letters: the input is a whole table of n rows (datapoints) and d columns (attributes, the target among them);
column j is encoded in H_j dimensions, of which the last says that the entry is masked; e is the embedding of one entry.
Attention between datapoints (ABD) works on H in R^(n x h), h = d e; attention between attributes (ABA) on n tables d x e.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-12
"""Of the layer norms, as in the official code."""


class SelfAttentionBlock(nn.Module):
    """Multi-head self-attention with a row-wise feed-forward network, MHSA(H) of Equations 3 to 5; (b, m, h) to (b, m, h).

    Res(H) = H W_res + Mix(heads),   MHSA(H) = Res(H) + rFF(LN(Res(H)))

    Queries are taken of LN(H). The official code takes keys and values of H itself (``kv_norm=False``) and divides scores
    by the root of the whole width h (``scale="width"``) and not of a head's; both are its defaults and so ours.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        dropout: float = 0.1,
        kv_norm: bool = False,
        scale: Literal["width", "head"] = "width",
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads is {heads}, allowed is a divisor of the width, which is {dim}")
        if scale not in ("width", "head"):
            raise ValueError(f"scale is {scale!r}, allowed is 'width' or 'head'")
        self.heads, self.kv_norm = heads, kv_norm
        self.scale = (dim if scale == "width" else dim // heads) ** -0.5
        self.norm_attention = nn.LayerNorm(dim, eps=EPS)
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.mix, self.residual = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.norm_feed_forward = nn.LayerNorm(dim, eps=EPS)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim), nn.Dropout(dropout)
        )

    def forward(self, H: Float[Tensor, "b m h"], allowed: Bool[Tensor, "m m"] | None = None) -> Float[Tensor, "b m h"]:
        """``allowed`` says which row may attend to which column's; None: every one to every one."""
        normed = self.norm_attention(H)
        source = normed if self.kv_norm else H
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(normed), self.key(source), self.value(source))
        )
        p = self.dropout.p if self.training else 0.0
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=p, scale=self.scale)
        residual = self.residual(H) + self.dropout(self.mix(heads.transpose(1, 2).flatten(2)))
        return residual + self.feed_forward(self.norm_feed_forward(residual))


class ColumnEmbedding(nn.Module):
    """A linear layer for each column into e dimensions, and one back to its H_j - 1 (the mask is not predicted)."""

    def __init__(self, input_dims: Sequence[int], dim: int) -> None:
        super().__init__()
        self.entries = len(input_dims)
        self.embed = nn.ModuleList(nn.Linear(width, dim) for width in input_dims)
        self.unembed = nn.ModuleList(nn.Linear(dim, width - 1) for width in input_dims)

    def encode(self, columns: Sequence[Tensor]) -> Tensor:
        return torch.stack([layer(column) for layer, column in zip(self.embed, columns, strict=True)], dim=-2)

    def decode(self, H: Tensor) -> list[Tensor]:
        return [layer(entry) for layer, entry in zip(self.unembed, H.unbind(-2), strict=True)]


class PatchEmbedding(nn.Module):
    """Linear patching of images (CIFAR-10 in 64, MNIST in 49 patches): one projection, shared or each patch's own.

    The columns are an image's intensities and then the label. As in the official code a patch is a run of neighbours in
    the flattened image, not a square of it.
    """

    def __init__(self, input_dims: Sequence[int], dim: int, patches: int, *, shared: bool = True) -> None:
        super().__init__()
        intensities, self.patches = len(input_dims) - 1, patches
        if patches < 1 or intensities % patches or set(input_dims[:-1]) != {2}:
            raise ValueError(
                f"patches is {patches}, allowed is a divisor of the number of intensities, which is {intensities}, each encoded in 2"
            )
        self.entries, self.size = patches + 1, intensities // patches
        count = 1 if shared else patches
        self.embed = nn.ParameterList(nn.Parameter(torch.empty(2 * self.size, dim)) for _ in range(count))
        for weight in self.embed:
            nn.init.xavier_uniform_(weight)
        self.embed_label = nn.Linear(input_dims[-1], dim)
        self.unembed = nn.ModuleList(nn.Linear(dim, self.size) for _ in range(count))
        self.unembed_label = nn.Linear(dim, input_dims[-1] - 1)

    def encode(self, columns: Sequence[Tensor]) -> Tensor:
        pixels = torch.stack(list(columns[:-1]), dim=-2).flatten(-2).unflatten(-1, (self.patches, 2 * self.size))
        weight = torch.stack(list(self.embed)).expand(self.patches, -1, -1)
        embedded = torch.einsum("...pk,pke->...pe", pixels, weight)
        return torch.cat([embedded, self.embed_label(columns[-1]).unsqueeze(-2)], dim=-2)

    def decode(self, H: Tensor) -> list[Tensor]:
        patches = H[..., :-1, :].unbind(-2)
        layers = self.unembed if len(self.unembed) > 1 else [self.unembed[0]] * self.patches
        pixels = torch.cat([layer(patch) for layer, patch in zip(layers, patches, strict=True)], dim=-1)
        return [*pixels.split(1, dim=-1), self.unembed_label(H[..., -1, :])]


class NonParametricTransformer(nn.Module):
    """A transformer over a whole table: attention between datapoints and between attributes by turns.

    Args:
        input_dims: H_j of each column: its categories, or 1 for a number, and 1 for the mask.
        categorical: which columns hold categories; where there are columns of both types, each type has an embedding.
        embedding_dim: e of one entry. Attention between datapoints is d e wide: 13 (d e)^2 parameters a layer.
        depth: layers, an even number; the first is between datapoints.
        between_datapoints: False lets a row attend to itself alone in every layer, at the same number of parameters:
            the row-wise network to compare with.
        patches: for tables of images, into how many patches the intensities go; ``shared_patches`` as in the paper.

    ``forward`` takes and gives a list of columns. Raises ``ValueError`` for sizes outside what is said.

    >>> table = [torch.rand(12, 3), torch.rand(12, 2)]                 # two classes, and a number
    >>> [tuple(out.shape) for out in NonParametricTransformer([3, 2], [0], embedding_dim=8, depth=2)(table)]
    [(12, 2), (12, 1)]
    """

    def __init__(
        self,
        input_dims: Sequence[int],
        categorical: Sequence[int] = (),
        *,
        embedding_dim: int = 64,
        depth: int = 8,
        heads: int = 8,
        dropout: float = 0.1,
        kv_norm: bool = False,
        scale: Literal["width", "head"] = "width",
        between_datapoints: bool = True,
        type_embedding: bool = True,
        index_embedding: bool = True,
        patches: int | None = None,
        shared_patches: bool = True,
    ) -> None:
        super().__init__()
        input_dims, categorical = list(input_dims), sorted(set(categorical))
        if not input_dims or min(input_dims) < 2:
            raise ValueError(f"input_dims is {input_dims}, allowed are columns of 2 or more: values, and the mask")
        if categorical and not 0 <= categorical[0] <= categorical[-1] < len(input_dims):
            raise ValueError(f"categorical is {categorical}, allowed are columns 0 to {len(input_dims) - 1}")
        if depth < 2 or depth % 2:
            raise ValueError(f"depth is {depth}, allowed are even numbers from 2")
        if embedding_dim < 1 or embedding_dim % heads:
            raise ValueError(f"embedding_dim is {embedding_dim}, allowed are multiples of heads, which is {heads}")
        self.input_dims, self.between_datapoints = input_dims, between_datapoints
        if patches is None:
            self.embedding = ColumnEmbedding(input_dims, embedding_dim)
        else:
            self.embedding = PatchEmbedding(input_dims, embedding_dim, patches, shared=shared_patches)
        d, types = self.embedding.entries, torch.zeros(self.embedding.entries, dtype=torch.long)
        types[[d - 1 if patches else column for column in categorical]] = 1
        mixed = 0 < len(categorical) < len(input_dims)
        self.type_embedding = nn.Embedding(2, embedding_dim) if type_embedding and mixed else None
        self.index_embedding = nn.Embedding(d, embedding_dim) if index_embedding else None
        self.register_buffer("types", types, persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            SelfAttentionBlock(
                embedding_dim if layer % 2 else d * embedding_dim, heads, dropout=dropout, kv_norm=kv_norm, scale=scale
            )
            for layer in range(depth)
        )

    def forward(
        self, columns: Sequence[Float[Tensor, "*tables n _"]], *, queries: int = 0
    ) -> list[Float[Tensor, "*tables n _"]]:
        """The table (or a batch of tables of equal size) as a list of columns to the prediction of each entry.

        The last ``queries`` rows attend to the rows before them and to themselves, and nothing attends to them: each is
        predicted as if it stood alone beside the others. 0: every row attends to every row, as in the paper.
        """
        if [column.shape[-1] for column in columns] != self.input_dims:
            raise ValueError(
                f"columns are {[column.shape[-1] for column in columns]} wide, allowed are {self.input_dims}"
            )
        H = self.embedding.encode(columns)
        tables, n, (d, e) = H.shape[:-3], H.shape[-3], H.shape[-2:]
        if not 0 <= queries <= n:
            raise ValueError(f"queries is {queries}, allowed are 0 to the {n} rows")
        if self.type_embedding is not None:
            H = H + self.type_embedding(self.types)
        if self.index_embedding is not None:
            H = H + self.index_embedding.weight
        H = self.dropout(H)
        allowed = _isolated(n, queries, H.device) if queries and self.between_datapoints else None
        for layer, block in enumerate(self.blocks):
            if layer % 2:
                H = block(H.reshape(-1, d, e))
            elif self.between_datapoints:
                H = block(H.reshape(-1, n, d * e), allowed)
            else:
                H = block(H.reshape(-1, 1, d * e))
        return self.embedding.decode(self.dropout(H.reshape(*tables, n, d, e)))

    @staticmethod
    def convert_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The official code's keys to ours; ours pass unchanged."""
        found = {}
        for key, tensor in state.items():
            if key.startswith("enc."):
                _, number, _, name = key.split(".", 3)
                for theirs, ours in BLOCK_KEYS.items():
                    if name.startswith(theirs):
                        name = ours + name.removeprefix(theirs)
                        break
                key = f"blocks.{(int(number) - 1) // 2}.{name}"  # between two blocks lies a reshape
            else:
                for theirs, ours in EMBEDDING_KEYS.items():
                    if key.startswith(theirs):
                        key = ours + key.removeprefix(theirs)
                        break
                if key.startswith("embedding.embed.") and tensor.ndim == 3:
                    tensor = tensor.flatten(0, 1)
            found[key] = tensor
        return found


BLOCK_KEYS = {
    "fc_q.": "query.",
    "fc_k.": "key.",
    "fc_v.": "value.",
    "fc_mix_heads.": "mix.",
    "fc_res.": "residual.",
    "ln0.": "norm_attention.",
    "ln1.": "norm_feed_forward.",
    "rff.0.": "feed_forward.0.",
    "rff.3.": "feed_forward.3.",
    "rff.2.": "feed_forward.3.",  # without dropout
}
EMBEDDING_KEYS = {
    "in_embedding.": "embedding.embed.",
    "out_embedding.": "embedding.unembed.",
    "image_patcher.in_feature_embedding.": "embedding.embed.",
    "image_patcher.out_feature_embedding.": "embedding.unembed.",
    "image_patcher.in_target_embedding.": "embedding.embed_label.",
    "image_patcher.out_target_embedding.": "embedding.unembed_label.",
    "feature_type_embedding.": "type_embedding.",
    "feature_index_embedding.": "index_embedding.",
}


def _isolated(n: int, queries: int, device: torch.device) -> Tensor:
    """Which row (first axis) attends to which: every one to those that are no queries, and to itself."""
    index = torch.arange(n, device=device)
    return (index[None, :] < n - queries) | (index[:, None] == index[None, :])
