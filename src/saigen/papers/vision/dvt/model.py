"""DVT (Wang et al., 2021, arXiv 2105.15075): a cascade of vision transformers with more and more tokens.

All stages see the same image, cut into 7x7, 10x10 and 14x14 tokens. The first whose prediction is confident enough
answers, so that easy images cost little. A later stage does not start from nothing: it takes over the last features of
the stage before (feature reuse, section 3.2) and the attention logits of all its layers (relationship reuse).
"""

import itertools
import math
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from saigen.nn.attention import Attention
from saigen.nn.classifier import Classifier
from saigen.nn.drop_path import DropPath
from saigen.nn.vision_transformer import convert_vit_state_dict, fresh_head

# --- the two kinds of embedding --------------------------------------------------------------------------------------


class Split(NamedTuple):
    """How an image is cut: the side of a patch, the step to the next, and the zeros around the image, in pixels."""

    kernel: int
    stride: int
    padding: int = 0

    def grid(self, size: int) -> int:
        """How many patches fit along a side of ``size`` pixels."""
        return (size + 2 * self.padding - self.kernel) // self.stride + 1


DEIT_SPLITS = (Split(32, 32), Split(23, 23, 3), Split(16, 16))  # 7x7, 10x10, 14x14 tokens of 224 pixels
T2T_SPLITS = (Split(14, 8, 3), Split(11, 6, 5), Split(7, 4, 2))  # the first of three splits; the others are AGAIN
AGAIN = Split(3, 2, 1)


class PatchEmbed(nn.Module):
    """Patches of any kernel, stride and padding, each projected: (b, c, h, w) -> (b, tokens, dim)."""

    def __init__(self, split: Split, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, split.kernel, split.stride, split.padding)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        return self.proj(x).flatten(2).transpose(1, 2)


class TokenPerformer(nn.Module):
    """T2T-ViT's cheap layer: linear attention with positive random features, then an MLP: (b, n, dim) -> (b, n, width).

    With phi(x) = exp(w x - |x|²/2) / √m for m = width/2 fixed orthogonal rows w:
    y = phi(q) (phi(k)ᵀ v) / (phi(q) Σ phi(k)), to which the values are added, since in- and output differ in width.

    >>> TokenPerformer(147, 64)(torch.rand(2, 9, 147)).shape
    torch.Size([2, 9, 64])
    """

    def __init__(self, dim: int, width: int = 64, *, drop: float = 0.1) -> None:
        super().__init__()
        if width < 2 or width % 2:
            raise ValueError(f"width is {width}, allowed are even numbers from 2")
        self.m = width // 2
        self.kqv = nn.Linear(dim, 3 * width)
        self.dp = nn.Dropout(drop)
        self.proj = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.Dropout(drop))
        self.w = nn.Parameter(torch.empty(self.m, width), requires_grad=False)
        nn.init.orthogonal_(self.w, gain=self.m**0.5)

    def phi(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n m"]:
        """Positive features whose inner products are, in expectation over w, the exponential kernel of attention."""
        return torch.exp(x @ self.w.T - x.square().sum(dim=-1, keepdim=True) / 2) / self.m**0.5

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n w"]:
        k, q, v = self.kqv(self.norm1(x)).float().chunk(3, dim=-1)
        phi_k, phi_q = self.phi(k), self.phi(q)
        norm = phi_q @ phi_k.sum(dim=1).unsqueeze(-1)
        y = phi_q @ (phi_k.transpose(1, 2) @ v) / (norm + 1e-8)
        y = v + self.dp(self.proj(y))
        return y + self.mlp(self.norm2(y))


class T2TModule(nn.Module):
    """Tokens-to-token: three overlapping splits, a ``TokenPerformer`` after each of the first two, a projection.

    (b, c, h, w) -> (b, tokens, dim), with ``split`` and then twice 3x3 patches of every second place.
    """

    def __init__(self, split: Split, in_chans: int, dim: int, token_dim: int = 64) -> None:
        super().__init__()
        self.splits = (split, AGAIN, AGAIN)
        self.attention1 = TokenPerformer(in_chans * split.kernel**2, token_dim)
        self.attention2 = TokenPerformer(token_dim * 9, token_dim)
        self.project = nn.Linear(token_dim * 9, dim)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        first, second, third = self.splits
        x, size = self.soft_split(x, first)
        x, size = self.soft_split(self.attention1(x).transpose(1, 2).unflatten(2, size), second)
        x, size = self.soft_split(self.attention2(x).transpose(1, 2).unflatten(2, size), third)
        return self.project(x)

    @staticmethod
    def soft_split(x: Tensor, split: Split) -> tuple[Tensor, tuple[int, int]]:
        """The overlapping patches of ``x``, one a row, and their grid."""
        patches = F.unfold(x, split.kernel, padding=split.padding, stride=split.stride).transpose(1, 2)
        return patches, (split.grid(x.shape[2]), split.grid(x.shape[3]))


def sinusoid(n: int, dim: int) -> Float[Tensor, "1 n d"]:
    """Fixed positions: sin and cos, by turns, of position / 10000^(2⌊j/2⌋/dim); row 0 is the class token's."""
    j = torch.arange(dim)
    angle = torch.arange(n, dtype=torch.double)[:, None] / 10000.0 ** (2 * (j // 2) / dim).double()
    return torch.where(j % 2 == 0, angle.sin(), angle.cos()).float().unsqueeze(0)


# --- what a stage takes over from the one before ---------------------------------------------------------------------


def upsample_tokens(x: Float[Tensor, "b n d"], grid: int) -> Float[Tensor, "b m d"]:
    """Tokens on a square grid brought to ``grid`` x ``grid``; the class token, the first, stays as it is.

    Nearest neighbours to twice the side, then averages over what falls into each new cell: the official code's cheap
    stand-in for linear interpolation.

    >>> upsample_tokens(torch.zeros(2, 1 + 7 * 7, 48), 10).shape
    torch.Size([2, 101, 48])
    """
    side = math.isqrt(x.shape[1] - 1)
    if side < 1 or side * side != x.shape[1] - 1:
        raise ValueError(f"x has {x.shape[1]} tokens, allowed are a class token and a square number of others")
    return upsampling_matrix(side, grid).to(x) @ x


def upsampling_matrix(side: int, grid: int) -> Float[Tensor, "m n"]:
    """``upsample_tokens`` from ``side`` x ``side`` as the linear map it is, (1 + grid², 1 + side²).

    One product with it takes less time than pooling tokens as images does: there are few tokens and many channels.
    """
    doubled = F.interpolate(torch.eye(side, dtype=torch.double).unsqueeze(0), size=2 * side, mode="nearest")
    axis = F.adaptive_avg_pool1d(doubled, grid)[0].T  # rows and columns alike
    return torch.block_diag(torch.ones(1, 1, dtype=torch.double), torch.kron(axis, axis))


def _check_tokens(name: str, tokens: int, upsampling: Tensor) -> None:
    if tokens != upsampling.shape[1]:
        raise ValueError(f"{name} has {tokens} tokens, allowed are {upsampling.shape[1]}, those of the coarser grid")


def _mlp(inputs: int, hidden: int, outputs: int, drop: float) -> nn.Sequential:
    """Linear, GELU, linear, as ``saigen.nn``'s MLP but with as many outputs as one likes."""
    layers = {
        "fc1": nn.Linear(inputs, hidden),
        "act": nn.GELU(),
        "drop1": nn.Dropout(drop),
        "fc2": nn.Linear(hidden, outputs),
        "drop2": nn.Dropout(drop),
    }
    return nn.Sequential(OrderedDict(layers))


class FeatureReuse(nn.Sequential):
    """The context E of a block (equation 2): (b, 1 + n, dim) of the stage before -> (b, 1 + m, context_dim).

    A small MLP on the normed features, brought from the grid of that stage to this one's (``grids``, their sides), with
    zeros for the class token.

    >>> FeatureReuse(64, grids=(7, 10))(torch.rand(2, 1 + 7 * 7, 64)).shape
    torch.Size([2, 101, 48])
    """

    def __init__(
        self,
        dim: int,
        grids: tuple[int, int],
        context_dim: int = 48,
        hidden: int = 128,
        *,
        eps: float = 1e-6,
        drop: float = 0.0,
    ) -> None:
        super().__init__(nn.LayerNorm(dim, eps=eps), _mlp(dim, hidden, context_dim, drop))
        self.context_dim = context_dim
        matrix = upsampling_matrix(*grids).to(torch.get_default_dtype())
        matrix[0] = 0  # nothing for the class token
        self.register_buffer("upsampling", matrix, persistent=False)

    def forward(self, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b m e"]:
        _check_tokens("features", features.shape[1], self.upsampling)
        e = super().forward(features)
        return self.upsampling.to(e.dtype) @ e


class RelationReuse(nn.Sequential):
    """What is added to the attention logits of a stage (equation 4): (b, c, 1 + n, 1 + n) -> (b, c, 1 + m, 1 + m).

    ``channels`` c is depth · heads: the logits of all layers and heads of the stage before are mixed by two 1x1
    convolutions, then queries and keys are brought from that stage's grid to this one's (``grids``, their sides).
    """

    def __init__(self, channels: int, grids: tuple[int, int]) -> None:
        super().__init__(nn.Conv2d(channels, 3 * channels, 1), nn.GELU(), nn.Conv2d(3 * channels, channels, 1))
        matrix = upsampling_matrix(*grids).to(torch.get_default_dtype())
        self.register_buffer("upsampling", matrix, persistent=False)

    def forward(self, relations: Float[Tensor, "b c n n"]) -> Float[Tensor, "b c m m"]:
        _check_tokens("relations", relations.shape[-1], self.upsampling)
        r = super().forward(relations)
        u = self.upsampling.to(r.dtype)
        return u @ (r @ u.T)


# --- one stage -------------------------------------------------------------------------------------------------------


class StageBlock(nn.Module):
    """A transformer block that can add reused relations to its logits and reused features to the input of its MLP."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        reuse: FeatureReuse | None,
        *,
        mlp_ratio: float,
        qkv_bias: bool,
        eps: float,
        drop: float,
        attn_drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        inputs = dim if reuse is None else dim + reuse.context_dim
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(inputs, eps=eps)
        self.mlp = _mlp(inputs, int(dim * mlp_ratio), dim, drop)
        self.feature_resuse_mlp = reuse  # spelt as in the official checkpoints

    def forward(
        self, x: Tensor, features: Tensor | None, relation: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens, and where ``keep`` asks for them the attention logits, those reused included."""
        attention, logits = self.attn, None
        q, k, v = attention.heads(self.norm1(x))
        if keep:
            logits = q * attention.scale @ k.transpose(-2, -1)
            logits = logits if relation is None else logits + relation
            y = attention.attn_drop(logits.softmax(dim=-1)) @ v
        else:
            relation = None if relation is None else relation.to(q.dtype)
            p = attention.attn_drop.p if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=relation, dropout_p=p)
        x = x + self.drop_path(attention.proj_drop(attention.proj(y.transpose(1, 2).flatten(2))))
        h = x if self.feature_resuse_mlp is None else torch.cat((x, self.feature_resuse_mlp(features).to(x)), dim=-1)
        return x + self.drop_path(self.mlp(self.norm2(h))), logits


class StageOutput(NamedTuple):
    """What a stage gives."""

    logits: Tensor
    """(b, classes)."""
    tokens: Tensor
    """After the last block, before the norm: (b, 1 + n, dim)."""
    relations: Tensor | None
    """The attention logits of all layers and heads, (b, depth · heads, 1 + n, 1 + n); None where nobody asked."""


class Stage(nn.Module):
    """One vision transformer of the cascade. Without reuse it is T2T-ViT or DeiT with another number of tokens.

    ``previous_grid`` is the side of the grid of the stage before, None where there is none to reuse from. Gives a
    ``StageOutput``.
    """

    def __init__(
        self,
        split: Split,
        *,
        img_size: int,
        in_chans: int,
        num_classes: int,
        embed: Literal["conv", "t2t"],
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        previous_grid: int | None,
        feature_reuse: bool,
        relation_reuse: bool,
        context_dim: int,
        reuse_hidden: int,
        drop_rate: float,
        attn_drop_rate: float,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        grid = split.grid(img_size)
        t2t = embed == "t2t"
        for again in (AGAIN, AGAIN) if t2t else ():
            grid = again.grid(grid)
        if grid < 1 or split.kernel > img_size + 2 * split.padding:
            raise ValueError(f"splits has {tuple(split)}, allowed are kernels that fit an image of {img_size} pixels")
        self.grid = grid
        self.depth = depth
        eps = 1e-5 if t2t else 1e-6
        if t2t:
            self.tokens_to_token = T2TModule(split, in_chans, embed_dim)
            self.pos_embed = nn.Parameter(sinusoid(1 + grid * grid, embed_dim), requires_grad=False)
        else:
            self.patch_embed = PatchEmbed(split, in_chans, embed_dim)
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, embed_dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            StageBlock(
                embed_dim,
                num_heads,
                FeatureReuse(embed_dim, (previous_grid, grid), context_dim, reuse_hidden, eps=eps, drop=drop_rate)
                if feature_reuse and previous_grid
                else None,
                mlp_ratio=mlp_ratio,
                qkv_bias=not t2t,
                eps=eps,
                drop=drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=drop_path_rate * i / max(depth - 1, 1),
            )
            for i in range(depth)
        )
        reuse = relation_reuse and previous_grid
        self.relation_reuse_conv = RelationReuse(depth * num_heads, (previous_grid, grid)) if reuse else None
        self.norm = nn.LayerNorm(embed_dim, eps=eps)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if not t2t:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward_tokens(
        self, x: Tensor, features: Tensor | None, relations: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens after the last block, before the norm, and the attention logits where ``keep`` asks for them."""
        x = self.tokens_to_token(x) if hasattr(self, "tokens_to_token") else self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1).to(x), x), dim=1)
        x = self.pos_drop(x + self.pos_embed)
        reused: Sequence[Tensor | None] = [None] * self.depth
        if self.relation_reuse_conv is not None:
            reused = self.relation_reuse_conv(relations).chunk(self.depth, dim=1)
        kept = []
        for block, relation in zip(self.blocks, reused, strict=True):
            x, logits = block(x, features, relation, keep)
            kept.append(logits)
        return x, torch.cat(kept, dim=1) if keep else None

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        features: Float[Tensor, "b n d"] | None = None,
        relations: Float[Tensor, "b r n n"] | None = None,
        keep: bool = False,
    ) -> StageOutput:
        tokens, kept = self.forward_tokens(x, features, relations, keep)
        return StageOutput(self.head(self.norm(tokens[:, 0])), tokens, kept)


# --- the cascade -----------------------------------------------------------------------------------------------------

STAGE_NAMES = ("less_less_token", "less_token", "normal_token")


class DynamicTransformerCascade(Classifier):
    """The cascade: up to three vision transformers over finer and finer ``splits`` of one image.

    Takes images (b, in_chans, img_size, img_size). In training mode the logits of all exits come back, which
    ``cascade_loss`` takes. In eval mode: one (b, num_classes); of the last exit, or, where ``thresholds`` are set, of
    the first that is confident enough (``predict``, which then really leaves the rest of the work undone).

    - ``embed``: "conv" is DeiT (one convolution, learned positions, biases for q, k and v), "t2t" T2T-ViT.
    - ``feature_reuse``, ``relation_reuse``: switch the two mechanisms off to get independent transformers.
    - ``exits``: build the first so many stages only.
    - ``context_dim``, ``reuse_hidden``: the widths of feature reuse, 48 and 128 in the paper.

    Keys are the official checkpoints'. Raises ``ValueError`` for splits that do not fit or do not get finer, and for
    images of another shape.

    >>> net = DynamicTransformerCascade(img_size=32, splits=((16, 16), (8, 8)), embed_dim=32, depth=2, num_heads=2)
    >>> [logits.shape[1] for logits in net.train()(torch.rand(2, 3, 32, 32))]
    [1000, 1000]
    >>> logits, exits = net.eval().predict(torch.rand(2, 3, 32, 32), thresholds=(0.9,))
    """

    classifier_name = "normal_token.head"

    def __init__(
        self,
        *,
        img_size: int = 224,
        splits: Sequence[Sequence[int]] = DEIT_SPLITS,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed: Literal["conv", "t2t"] = "conv",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        feature_reuse: bool = True,
        relation_reuse: bool = True,
        context_dim: int = 48,
        reuse_hidden: int = 128,
        exits: int | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        thresholds: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if embed not in ("conv", "t2t"):
            raise ValueError(f"embed is {embed!r}, allowed is 'conv' or 't2t'")
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}, allowed is num_classes >= 0")
        if depth < 1:
            raise ValueError(f"depth is {depth}, allowed is depth >= 1")
        cuts = [Split(*split) for split in splits]
        if not 1 <= len(cuts) <= len(STAGE_NAMES):
            raise ValueError(f"splits has {len(cuts)} stages, allowed are 1 to {len(STAGE_NAMES)}")
        exits = len(cuts) if exits is None else exits
        if not 1 <= exits <= len(cuts):
            raise ValueError(f"exits is {exits}, allowed are 1 to {len(cuts)}")
        sides: list[int] = []
        for number, name in enumerate(STAGE_NAMES[:exits]):
            stage = Stage(
                cuts[number],
                img_size=img_size,
                in_chans=in_chans,
                num_classes=num_classes,
                embed=embed,
                embed_dim=embed_dim,
                depth=depth,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                previous_grid=sides[-1] if sides else None,
                feature_reuse=feature_reuse,
                relation_reuse=relation_reuse,
                context_dim=context_dim,
                reuse_hidden=reuse_hidden,
                drop_rate=drop_rate,
                attn_drop_rate=attn_drop_rate,
                drop_path_rate=drop_path_rate,
            )
            self.add_module(name, stage)
            sides.append(stage.grid)
        if sides != sorted(set(sides)):
            raise ValueError(f"splits give {sides} tokens a side, allowed are growing numbers")
        self.img_size, self.in_chans, self.num_classes = img_size, in_chans, num_classes
        self.num_features = self.embed_dim = embed_dim
        self.relation_reuse = relation_reuse
        self.thresholds = None if thresholds is None else self.checked(thresholds)
        if exits < len(STAGE_NAMES):
            self.classifier_name = f"{STAGE_NAMES[exits - 1]}.head"
        self.default_cfg = {
            "input_size": (in_chans, img_size, img_size),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "interpolation": "bicubic",
            "crop_pct": 224 / 256,
        }
        self.register_load_state_dict_pre_hook(_keep_new_heads)

    @property
    def stages(self) -> list[Stage]:
        """The transformers, the coarsest first."""
        return [getattr(self, name) for name in STAGE_NAMES if hasattr(self, name)]

    def checked(self, thresholds: Sequence[float]) -> tuple[float, ...]:
        """``thresholds`` of all exits but the last, as floats; one for the last may stand behind them and is ignored."""
        given = tuple(float(t) for t in thresholds)
        wanted = len(self.stages) - 1
        if len(given) not in (wanted, wanted + 1) or any(math.isnan(t) for t in given):
            raise ValueError(f"thresholds is {given}, allowed is a number for each of the {wanted} exits but the last")
        return given[:wanted]

    def _check_images(self, x: Tensor) -> None:
        if x.ndim != 4 or tuple(x.shape[1:]) != (self.in_chans, self.img_size, self.img_size):
            allowed = f"(batch, {self.in_chans}, {self.img_size}, {self.img_size})"
            raise ValueError(f"x has shape {tuple(x.shape)}, allowed is {allowed}")

    def forward_exits(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b k"], ...]:
        """The logits of every exit, the coarsest first; all stages run."""
        self._check_images(x)
        stages, outputs = self.stages, []
        features = relations = None
        for number, stage in enumerate(stages):
            keep = self.relation_reuse and number + 1 < len(stages)
            logits, features, relations = stage(x, features, relations, keep)
            outputs.append(logits)
        return tuple(outputs)

    @torch.no_grad()
    def predict(
        self, x: Float[Tensor, "b c h w"], thresholds: Sequence[float] | None = None
    ) -> tuple[Float[Tensor, "b k"], Int[Tensor, "b"]]:
        """Logits (b, classes), and the number of the exit (b,), from 0, that gave each.

        An image leaves at the first exit whose largest softmax probability is at least that exit's threshold; only the
        others, and what is reused of them, go on to the next stage. ``thresholds`` default to the model's own.
        """
        self._check_images(x)
        if not self.num_classes:
            raise ValueError(
                "num_classes is 0, allowed is num_classes >= 1: an exit is taken by the confidence of its head"
            )
        thresholds = self.thresholds if thresholds is None else self.checked(thresholds)
        if thresholds is None:
            raise ValueError(
                "thresholds is None and the model has none, allowed is a number for each exit but the last"
            )
        stages = self.stages
        answer = x.new_empty(x.shape[0], self.num_classes)
        exits = torch.full((x.shape[0],), len(stages) - 1, device=x.device)
        left = torch.arange(x.shape[0], device=x.device)
        features = relations = None
        for number, stage in enumerate(stages):
            last = number + 1 == len(stages)
            logits, features, relations = stage(x, features, relations, self.relation_reuse and not last)
            answer[left] = logits.to(answer)
            if last:
                break
            unsure = confidence(logits) < thresholds[number]
            exits[left[~unsure]] = number
            rest = unsure.nonzero().flatten()
            if len(rest) == 0:
                break
            if len(rest) < len(left):
                left, x, features = left[rest], x[rest], features[rest]
                relations = None if relations is None else relations[rest]
        return answer, exits

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """All tokens of the finest stage after the norm, the class token first."""
        self._check_images(x)
        *before, last = self.stages
        features = relations = None
        for stage in before:
            features, relations = stage.forward_tokens(x, features, relations, self.relation_reuse)
        return last.norm(last.forward_tokens(x, features, relations, False)[0])

    def forward_head(self, x: Float[Tensor, "b n d"], pre_logits: bool = False) -> Float[Tensor, "b k"]:
        """Logits of the last exit from ``forward_features``; with ``pre_logits`` the class token instead."""
        return x[:, 0] if pre_logits else self.stages[-1].head(x[:, 0])

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"] | tuple[Float[Tensor, "b k"], ...]:
        if self.training:
            return self.forward_exits(x)
        if self.thresholds is not None and self.num_classes:
            return self.predict(x)[0]
        return self.forward_head(self.forward_features(x))

    def new_classifier(self, num_classes: int) -> nn.Linear:
        return fresh_head(self.stages[-1].norm, num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Puts fresh heads of ``num_classes`` outputs in the place of all exits'; with 0 there are no heads and no exits."""
        super().reset_classifier(num_classes)
        for stage in self.stages[:-1]:
            stage.head = self.new_classifier(num_classes) if num_classes else nn.Identity()

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our layout, which is the official one, with wrappers (``module.`` …) taken off."""
        return convert_vit_state_dict(state)


def _keep_new_heads(model: DynamicTransformerCascade, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """The heads of a checkpoint with another number of classes are left new, of all exits alike."""
    for name in STAGE_NAMES[: len(model.stages)]:
        own, key = getattr(model, name).head, f"{prefix}{name}.head"
        if not model.num_classes:
            continue
        weight, bias = state.get(f"{key}.weight"), state.get(f"{key}.bias")
        if weight is None or bias is None or weight.shape[1:] != own.weight.shape[1:]:
            continue
        if weight.shape[0] == bias.shape[0] != own.weight.shape[0]:
            state[f"{key}.weight"], state[f"{key}.bias"] = own.weight.detach(), own.bias.detach()
            warnings.warn(f"{key} has another number of classes in the checkpoint and stays new", stacklevel=3)


# --- the loss, and when to stop --------------------------------------------------------------------------------------


def cascade_loss(
    logits: Sequence[Float[Tensor, "b k"]], target: Int[Tensor, "b"] | Float[Tensor, "b k"]
) -> Float[Tensor, ""]:
    """The sum over exits of the cross-entropy (equation 1), with class indices or soft targets.

    >>> cascade_loss([torch.zeros(2, 4), torch.zeros(2, 4)], torch.tensor([0, 3])).item() / math.log(4)
    2.0
    """
    return torch.stack([F.cross_entropy(exit_logits, target) for exit_logits in logits]).sum()


def confidence(logits: Float[Tensor, "*b k"]) -> Float[Tensor, "*b"]:
    """The largest softmax probability, by which an exit is taken."""
    return logits.float().softmax(dim=-1).amax(dim=-1)


def first_confident_exit(confidences: Float[Tensor, "e n"], thresholds: Sequence[float]) -> Int[Tensor, "n"]:
    """Which exit each image takes, from 0: the first whose confidence is at least its threshold, else the last."""
    if not len(confidences) - 1 <= len(thresholds) <= len(confidences):
        raise ValueError(f"thresholds has {len(thresholds)} entries, allowed is one for each exit but the last")
    bars = torch.tensor([*thresholds[: len(confidences) - 1], -math.inf], dtype=confidences.dtype)
    return (confidences >= bars.to(confidences.device)[:, None]).to(torch.uint8).argmax(dim=0)


def exit_fractions(p: float, exits: int = 3) -> tuple[float, ...]:
    """The share of images to leave at each exit, q_k = pᵏ / Σ pʲ: the larger p > 0, the more go to the end.

    >>> exit_fractions(1.0, 4)
    (0.25, 0.25, 0.25, 0.25)
    """
    if not p > 0 or exits < 1:
        raise ValueError(f"p is {p} and exits is {exits}, allowed is p > 0 and exits >= 1")
    # the powers around the largest, so that none overflows
    logs = [k * math.log(p) for k in range(1, exits + 1)]
    powers = [math.exp(value - max(logs)) for value in logs]
    return tuple(power / sum(powers) for power in powers)


def calibrate_thresholds(confidences: Float[Tensor, "e n"], fractions: Sequence[float]) -> tuple[float, ...]:
    """Thresholds by which the given share of these images leaves at each exit; the last exit's is -inf.

    ``confidences`` (exits, images) come from images that were neither trained on nor tested with. T_k is the confidence
    of the ⌊n q_k⌋-th most confident of the images still there (+inf where that is none), and all at least as confident
    leave. Raises ``ValueError`` where the shares do not match the exits or sum to more than 1.
    """
    e, n = confidences.shape
    if len(fractions) != e or min(fractions) < 0 or sum(fractions) > 1 + 1e-6:
        raise ValueError(f"fractions is {tuple(fractions)}, allowed are {e} shares >= 0 that sum to at most 1")
    here = torch.ones(n, dtype=torch.bool, device=confidences.device)
    thresholds = []
    for c, fraction in zip(confidences[:-1], fractions, strict=False):
        wanted = min(math.floor(n * fraction), int(here.sum()))
        threshold = float(c[here].topk(wanted).values[-1]) if wanted else math.inf
        here &= c < threshold
        thresholds.append(threshold)
    return (*thresholds, -math.inf)


def budget_thresholds(
    confidences: Float[Tensor, "e n"], costs: Sequence[float], budget: float, *, iterations: int = 40
) -> tuple[float, ...]:
    """The thresholds that spend as much of ``budget`` as they can: the mean cost of these images stays within it.

    ``costs`` are those of leaving at each exit, all stages before it included (multiply-adds, seconds, …), growing.
    The shares are ``exit_fractions`` of the p that bisection finds. Raises ``ValueError`` for a budget below the first
    cost, or costs that do not grow.
    """
    if len(costs) != len(confidences) or any(a >= b for a, b in itertools.pairwise(costs)):
        raise ValueError(f"costs is {tuple(costs)}, allowed are {len(confidences)} growing numbers")
    if not budget >= costs[0]:
        raise ValueError(f"budget is {budget}, allowed is at least {costs[0]}, the cost of the first exit")
    cost = torch.as_tensor(costs, dtype=torch.double)

    def spent(thresholds: Sequence[float]) -> float:
        return float(cost[first_confident_exit(confidences, thresholds).cpu().long()].mean())

    if budget >= costs[-1]:
        return (*[math.inf] * (len(costs) - 1), -math.inf)
    low, high, best = -20.0, 20.0, (*[-math.inf] * len(costs),)
    for _ in range(iterations):
        middle = (low + high) / 2
        thresholds = calibrate_thresholds(confidences, exit_fractions(math.exp(middle), len(costs)))
        if spent(thresholds) <= budget:
            low, best = middle, thresholds
        else:
            high = middle
    return best


def budget_curve(
    logits: Sequence[Float[Tensor, "n k"]],
    target: Int[Tensor, "n"],
    costs: Sequence[float],
    settings: Sequence[Sequence[float]],
) -> tuple[Float[Tensor, "s"], Float[Tensor, "s"]]:
    """Mean cost and accuracy of each of ``settings`` (thresholds), worked out from the logits of all exits.

    What ``predict`` with these thresholds does, without running it again for each.
    """
    stacked = torch.stack(list(logits))
    right = (stacked.argmax(dim=-1) == target).double()
    cost = torch.as_tensor(costs, dtype=torch.double)
    spent, accuracies = [], []
    for thresholds in settings:
        taken = first_confident_exit(confidence(stacked), thresholds)
        spent.append(cost[taken.cpu()].mean())
        accuracies.append(right.gather(0, taken[None]).mean().cpu())
    return torch.stack(spent).float(), torch.stack(accuracies).float()


# --- the models of the paper -----------------------------------------------------------------------------------------

T2T_12 = {"embed": "t2t", "splits": T2T_SPLITS, "embed_dim": 256, "depth": 12, "num_heads": 4, "mlp_ratio": 2.0}
T2T_14 = {"embed": "t2t", "splits": T2T_SPLITS, "embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3.0}


def dvt_t2t_vit_12(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int = 224,
    exits: int = 3,
    feature_reuse: bool = True,
    relation_reuse: bool = True,
    drop_path_rate: float = 0.0,
    thresholds: Sequence[float] | None = None,
) -> DynamicTransformerCascade:
    """DVT on T2T-ViT-12: 22.5 M parameters; 0.468, 1.446 or 3.455 GMACs by exit. Trained with ``drop_path_rate=0.1``."""
    return DynamicTransformerCascade(
        **T2T_12,
        num_classes=num_classes,
        in_chans=in_chans,
        img_size=img_size,
        exits=exits,
        feature_reuse=feature_reuse,
        relation_reuse=relation_reuse,
        drop_path_rate=drop_path_rate,
        thresholds=thresholds,
    )


def dvt_t2t_vit_14(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int = 224,
    exits: int = 3,
    feature_reuse: bool = True,
    relation_reuse: bool = True,
    drop_path_rate: float = 0.0,
    thresholds: Sequence[float] | None = None,
) -> DynamicTransformerCascade:
    """DVT on T2T-ViT-14: 67.9 M parameters; 1.201, 3.818 or 9.264 GMACs by exit. Trained with ``drop_path_rate=0.1``."""
    return DynamicTransformerCascade(
        **T2T_14,
        num_classes=num_classes,
        in_chans=in_chans,
        img_size=img_size,
        exits=exits,
        feature_reuse=feature_reuse,
        relation_reuse=relation_reuse,
        drop_path_rate=drop_path_rate,
        thresholds=thresholds,
    )


def dvt_deit_small(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int = 224,
    exits: int = 3,
    feature_reuse: bool = True,
    relation_reuse: bool = True,
    drop_path_rate: float = 0.0,
    thresholds: Sequence[float] | None = None,
) -> DynamicTransformerCascade:
    """DVT on DeiT-S: 70.4 M parameters; 1.143, 3.643 or 8.801 GMACs by exit. Trained with ``drop_path_rate=0.1``."""
    return DynamicTransformerCascade(
        num_classes=num_classes,
        in_chans=in_chans,
        img_size=img_size,
        exits=exits,
        feature_reuse=feature_reuse,
        relation_reuse=relation_reuse,
        drop_path_rate=drop_path_rate,
        thresholds=thresholds,
    )
