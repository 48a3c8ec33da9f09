"""Stand-Alone Self-Attention in Vision Models (Ramachandran et al., NeurIPS 2019, arXiv 1906.05909).

Each 3x3 convolution of a ResNet becomes self-attention of a pixel (i, j) over the k x k pixels (a, b) around it
(section 3, equation 3):

    y_ij = sum over a, b of softmax_ab(q_ij . k_ab + q_ij . r_(a-i, b-j)) v_ab

r is the concatenation of a learned row embedding of a - i and a column embedding of b - j. Around the image lie zeros,
whose keys take their share of the softmax. Symbols: C channels, N heads, d = C / N, k the side of the neighbourhood,
B the side of a block of queries.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from saigen.nn.resnet import ResNet, conv3x3

# --- the operator


def local_attention(
    q: Float[Tensor, "b n d h w"],
    k: Float[Tensor, "b n d h w"] | None,
    v: Float[Tensor, "b n d h w"],
    rows: Float[Tensor, "k d2"] | None,
    columns: Float[Tensor, "k d2"] | None,
    *,
    kernel_size: int,
    backend: str = "blocks",
) -> Float[Tensor, "b n d h w"]:
    """Attention of every pixel over its ``kernel_size`` x ``kernel_size`` neighbours: equation 3, for N heads.

    ``q``, ``k`` and ``v`` are (b, N, d, h, w); ``rows`` and ``columns`` (kernel_size, d / 2) embed the offsets from
    -(kernel_size // 2) on. Without embeddings (None) only content counts; without ``k`` only position does (q . r).

    ``"blocks"`` lets the queries of a block share one neighbourhood, so that attention is a few large matrix products:
    more arithmetic on paper, and several times faster than ``"windows"``, which copies the window of every pixel and is
    what the paper's operation counts mean. Both give the same numbers.
    Raises ``ValueError`` for an even ``kernel_size``, tensors that do not fit, or neither ``k`` nor embeddings.

    >>> q, k, v = torch.rand(3, 1, 2, 4, 5, 5)
    >>> torch.allclose(local_attention(q, k, v, None, None, kernel_size=1), v)
    True
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}, allowed are odd numbers of at least 1")
    if v.shape != q.shape or (k is not None and k.shape != q.shape):
        raise ValueError(f"q, k and v have different shapes, allowed is one shape, as q's {tuple(q.shape)}")
    if (rows is None) != (columns is None) or (rows is None and k is None):
        raise ValueError(
            "rows is given without columns or neither with k, allowed are both of them, or k, or all three"
        )
    if rows is not None and (rows.shape != columns.shape or rows.shape != (kernel_size, q.shape[2] // 2)):
        raise ValueError(
            f"rows and columns are {tuple(rows.shape)} and {tuple(columns.shape)}, allowed is (kernel_size, d / 2) = "
            f"{(kernel_size, q.shape[2] // 2)}"
        )
    if backend == "blocks":
        return _over_blocks(q, k, v, rows, columns, kernel_size)
    if backend != "windows":
        raise ValueError(f"backend is {backend!r}, allowed is 'blocks' or 'windows'")
    return _over_windows(q, k, v, rows, columns, kernel_size)


def _windows(x: Tensor, size: int) -> Tensor:
    """(b, N, d, h, w) to (b, N, d, size * size, h * w): a copy of the window of every pixel."""
    b, heads, d, h, w = x.shape
    return F.unfold(x.flatten(1, 2), size, padding=size // 2).view(b, heads, d, size * size, h * w)


def _over_windows(
    q: Tensor, k: Tensor | None, v: Tensor, rows: Tensor | None, columns: Tensor | None, size: int
) -> Tensor:
    d = q.shape[2]
    flat, logits = q.flatten(3), 0.0
    if k is not None:
        logits = torch.einsum("bndp,bndop->bnop", flat, _windows(k, size))
    if rows is not None:
        of_row = torch.einsum("bndp,ad->bnap", flat[:, :, : d // 2], rows)
        of_column = torch.einsum("bndp,ad->bnap", flat[:, :, d // 2 :], columns)
        logits = logits + (of_row[:, :, :, None] + of_column[:, :, None]).flatten(2, 3)
    return torch.einsum("bnop,bndop->bndp", logits.softmax(2), _windows(v, size)).view_as(q)


def _neighbourhoods(x: Tensor, block: int, size: int) -> Tensor:
    """(b, N, d, h, w) to (b, N, down, across, d, side * side): what each block of pixels can see."""
    h, w, p, side = *x.shape[3:], size // 2, block + size - 1
    x = F.pad(x, (p, p + -w % block, p, p + -h % block)).unfold(3, side, block).unfold(4, side, block)
    return x.permute(0, 1, 3, 4, 2, 5, 6).flatten(5)


def _placed(logits: Tensor) -> Tensor:
    """(..., block, size), by offset, to (..., block, side), by place: row i moves i to the right, the rest is out."""
    block, size = logits.shape[-2:]
    side = block + size - 1
    padded = F.pad(logits, (0, block), value=float("-inf")).flatten(-2)
    return padded[..., : block * side].unflatten(-1, (block, side))


def _over_blocks(
    q: Tensor, k: Tensor | None, v: Tensor, rows: Tensor | None, columns: Tensor | None, size: int
) -> Tensor:
    b, heads, d, h, w = q.shape
    # wide heads make the products worth large blocks, where they fit: 7 divides the maps of a 224-pixel image
    block = 7 if d >= 16 and h % 7 == 0 == w % 7 else min(4, max(h, w))
    side = block + size - 1  # of the neighbourhood that a block shares
    bottom, right = -h % block, -w % block
    down, across = (h + bottom) // block, (w + right) // block

    # queries (b, N, down, across, i, j, d)
    q = F.pad(q, (0, right, 0, bottom)).view(b, heads, d, down, block, across, block).permute(0, 1, 3, 5, 4, 6, 2)
    if rows is None:
        of_row = of_column = _placed(q.new_zeros(block, size))
        of_row = of_row[:, None, :, None]
    else:
        of_row = _placed((q[..., : d // 2] @ rows.mT).transpose(-2, -3)).transpose(-2, -3)[..., None]
        of_column = _placed(q[..., d // 2 :] @ columns.mT)
    # (b, N, down, across, i, j, a, b); a place outside the window of its query has minus infinity
    logits = of_row + of_column[..., None, :]
    if k is not None:
        content = q.flatten(4, 5) @ _neighbourhoods(k, block, size)
        logits = content.unflatten(-1, (side, side)).unflatten(-3, (block, block)) + logits
    weights = logits.flatten(-2).flatten(-3, -2).softmax(-1)
    y = (weights @ _neighbourhoods(v, block, size).mT).view(b, heads, down, across, block, block, d)
    y = y.permute(0, 1, 6, 2, 4, 3, 5).reshape(b, heads, d, down * block, across * block)
    return y[..., :h, :w]


def sinusoids(channels: int, h: int, w: int, like: Tensor) -> Tensor:
    """Absolute positions (channels, h, w): sines and cosines of the row in one half, of the column in the other."""
    half = channels // 2
    number = torch.arange(half, device=like.device)
    frequency = 10000.0 ** (-2 * (number // 2) / half)
    phase = (number % 2) * (torch.pi / 2)
    place = torch.arange(max(h, w), device=like.device)
    wave = torch.sin(frequency[:, None] * place + phase[:, None])
    both = (wave[:, :h, None].expand(-1, -1, w), wave[:, None, :w].expand(-1, h, -1))
    return torch.cat(both).to(like.dtype)


# --- the layers


class LocalSelfAttention2d(nn.Module):
    """Local multi-head self-attention in the place of a convolution: (b, C, h, w) to (b, C, h / stride, w / stride).

    Queries, keys and values are 1x1 projections without bias; nothing follows the heads, whose outputs lie one after the
    other. A ``stride`` s is s x s average pooling afterwards (rounding up). ``position`` is "relative" (the paper's
    choice), "absolute" (sinusoids are added to x) or "none"; ``content=False`` leaves only q . r. The text has one
    projection for each head's own channels (``grouped_projections=True``), the paper's parameter counts mean full ones.
    ``scale`` multiplies the logits (the paper has none).

    Raises ``ValueError`` for channels that ``num_heads`` does not divide, heads of odd width, an even ``kernel_size``.

    >>> LocalSelfAttention2d(32, kernel_size=7, num_heads=4, stride=2)(torch.rand(1, 32, 9, 9)).shape
    torch.Size([1, 32, 5, 5])
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        num_heads: int = 8,
        stride: int = 1,
        *,
        position: str = "relative",
        content: bool = True,
        grouped_projections: bool = False,
        scale: float | None = None,
        backend: str = "blocks",
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}, allowed are odd numbers of at least 1")
        if num_heads < 1 or channels < 1 or channels % num_heads:
            raise ValueError(f"num_heads is {num_heads}, allowed are divisors of channels = {channels}")
        if stride < 1:
            raise ValueError(f"stride is {stride}, allowed is stride >= 1")
        if position not in ("relative", "absolute", "none"):
            raise ValueError(f"position is {position!r}, allowed is 'relative', 'absolute' or 'none'")
        if position == "relative" and channels // num_heads % 2:
            raise ValueError(
                f"num_heads is {num_heads}, allowed are numbers that leave each head an even share of channels = {channels}"
            )
        if not content and position != "relative":
            raise ValueError(f"content is False with position {position!r}, allowed is then only 'relative'")
        if backend not in ("blocks", "windows"):
            raise ValueError(f"backend is {backend!r}, allowed is 'blocks' or 'windows'")
        self.channels, self.kernel_size, self.num_heads, self.stride = channels, kernel_size, num_heads, stride
        self.position, self.content, self.scale, self.backend = position, content, scale, backend
        # head by head q, k, v: so the layout is the same with a group of channels for each head
        projections = 3 if content else 2
        groups = num_heads if grouped_projections else 1
        self.qkv = nn.Conv2d(channels, projections * channels, 1, bias=False, groups=groups)
        d = channels // num_heads
        self.rows = nn.Parameter(torch.empty(kernel_size, d // 2)) if position == "relative" else None
        self.columns = nn.Parameter(torch.empty(kernel_size, d // 2)) if position == "relative" else None
        self.pool = nn.AvgPool2d(stride, stride, ceil_mode=True) if stride > 1 else nn.Identity()
        for table in (self.rows, self.columns):
            if table is not None:
                nn.init.normal_(table, std=d**-0.5)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        if x.shape[1] != self.channels:
            raise ValueError(f"x has {x.shape[1]} channels, allowed is channels = {self.channels}")
        if self.position == "absolute":
            x = x + sinusoids(self.channels, *x.shape[2:], x)
        # (b, N, 3, d, h, w)
        heads = self.qkv(x).unflatten(1, (self.num_heads, -1, self.channels // self.num_heads))
        q, v, k = heads[:, :, 0], heads[:, :, -1], heads[:, :, 1] if self.content else None
        if self.scale is not None:
            q = q * self.scale
        y = local_attention(q, k, v, self.rows, self.columns, kernel_size=self.kernel_size, backend=self.backend)
        return self.pool(y.flatten(1, 2))

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, num_heads={self.num_heads}, stride={self.stride}"


class AttentionStem(nn.Module):
    """Self-attention within each ``block`` x ``block`` square of an image: (b, in_channels, h, w) to (b, out, h, w).

    Pixels say little by themselves, so the values depend on the place (a, b) in the square as well (section 3.3):
    v_ab = (sum over m of p(a, b, m) W_V^m) x_ab with p(a, b, m) = softmax_m((row_a + column_b) . nu_m), shared by the
    heads. ``values`` is "mixture" (that), "plain" (one W_V) or "convolution" (a 3x3 convolution), the paper's
    comparison. Raises ``ValueError`` for images whose sides ``block`` does not divide.

    >>> AttentionStem(3, 16, num_heads=2)(torch.rand(1, 3, 8, 8)).shape
    torch.Size([1, 16, 8, 8])
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 64,
        block: int = 4,
        num_heads: int = 4,
        mixtures: int = 4,
        *,
        values: str = "mixture",
    ) -> None:
        super().__init__()
        if num_heads < 1 or out_channels < 1 or out_channels % (2 * num_heads):
            raise ValueError(
                f"num_heads is {num_heads}, allowed are numbers that leave each head an even share of "
                f"out_channels = {out_channels}"
            )
        if min(in_channels, block, mixtures) < 1:
            raise ValueError(
                f"in_channels, block and mixtures are {in_channels}, {block} and {mixtures}, allowed are numbers >= 1"
            )
        if values not in ("mixture", "plain", "convolution"):
            raise ValueError(f"values is {values!r}, allowed is 'mixture', 'plain' or 'convolution'")
        self.in_channels, self.out_channels, self.block, self.num_heads = in_channels, out_channels, block, num_heads
        self.values = values
        self.query = nn.Linear(in_channels, out_channels, bias=False)
        self.key = nn.Linear(in_channels, out_channels, bias=False)
        half = out_channels // num_heads // 2
        # offsets from -(block - 1) to block - 1
        self.rows = nn.Parameter(torch.empty(2 * block - 1, half))
        self.columns = nn.Parameter(torch.empty(2 * block - 1, half))
        if values == "convolution":
            self.value = conv3x3(in_channels, out_channels)
        elif values == "plain":
            self.value = nn.Linear(in_channels, out_channels, bias=False)
        else:
            self.value = nn.Parameter(torch.empty(mixtures, out_channels, in_channels))
            self.place_rows = nn.Parameter(torch.empty(block, out_channels))
            self.place_columns = nn.Parameter(torch.empty(block, out_channels))
            self.nu = nn.Parameter(torch.empty(mixtures, out_channels))
        for table in (self.rows, self.columns):
            nn.init.normal_(table, std=(2 * half) ** -0.5)
        if values == "mixture":
            nn.init.normal_(self.value, std=in_channels**-0.5)
            for table in (self.place_rows, self.place_columns, self.nu):
                nn.init.normal_(table, std=out_channels**-0.25)  # so that their products are about 1

    def mixture(self) -> Float[Tensor, "p m"]:
        """p(a, b, m), the places of the square row by row."""
        places = (self.place_rows[:, None] + self.place_columns).flatten(0, 1)
        return (places @ self.nu.mT).softmax(-1)

    def _values(self, x: Tensor, squares: Tensor) -> Tensor:
        if self.values == "plain":
            return self.value(squares)
        if self.values == "convolution":
            return self._squares(self.value(x))
        # one matrix a place, (block * block, out, in)
        matrices = torch.einsum("pm,moi->poi", self.mixture(), self.value)
        return torch.einsum("bspi,poi->bspo", squares, matrices)

    def _squares(self, x: Tensor) -> Tensor:
        """(b, c, h, w) to (b, squares, block * block, c)."""
        b, c, h, w = x.shape
        x = x.view(b, c, h // self.block, self.block, w // self.block, self.block)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, self.block**2, c)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
        b, c, h, w = x.shape
        if c != self.in_channels:
            raise ValueError(f"x has {c} channels, allowed is in_channels = {self.in_channels}")
        if h % self.block or w % self.block:
            raise ValueError(f"x is {h} x {w} pixels, allowed are multiples of block = {self.block}")
        squares, size = self._squares(x), self.block

        # (b, squares, places, out) to (b, squares, N, places, d)
        q, k, v = (
            y.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)
            for y in (self.query(squares), self.key(squares), self._values(x, squares))
        )
        place = torch.arange(size, device=x.device)
        offset = place - place[:, None] + size - 1  # (i, a)
        half, by_place = q.shape[-1] // 2, q.unflatten(-2, (size, size))
        of_row = torch.einsum("bsnijd,iad->bsnija", by_place[..., :half], self.rows[offset])
        of_column = torch.einsum("bsnijd,jcd->bsnijc", by_place[..., half:], self.columns[offset])
        relative = (of_row[..., None] + of_column[..., None, :]).flatten(-2).flatten(-3, -2)
        y = (q @ k.mT + relative).softmax(-1) @ v
        # (b, rows of squares, columns of squares, N, i, j, d) to (b, N d, h, w)
        y = y.unflatten(-2, (size, size)).unflatten(1, (h // size, w // size))
        return y.permute(0, 3, 6, 1, 4, 2, 5).reshape(b, self.out_channels, h, w)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, block={self.block}, num_heads={self.num_heads}"


# --- the networks (section 4.1)


class SASAResNet(ResNet):
    """ResNet with local self-attention for the 3x3 convolutions of ``attention_stages``: logits (b, num_classes).

    The stem is ResNet's convolution (``conv_stem=True``) or an ``AttentionStem`` with batch norm, ReLU and max pooling
    over its squares of ``stem_block`` pixels. ``small_stem`` (ours) keeps the resolution in a convolutional stem, for
    32-pixel images. The other arguments are those of ``LocalSelfAttention2d``, of ``AttentionStem`` and of ``ResNet``.

    >>> net = SASAResNet((1, 1), (16, 32), kernel_size=3, num_heads=4, num_classes=10, small_stem=True)
    >>> net(torch.rand(2, 3, 16, 16)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512),
        *,
        conv_stem: bool = True,
        attention_stages: Sequence[int] | None = None,
        kernel_size: int = 7,
        num_heads: int = 8,
        position: str = "relative",
        content: bool = True,
        grouped_projections: bool = False,
        stem_values: str = "mixture",
        stem_block: int = 4,
        num_classes: int = 1000,
        in_chans: int = 3,
        stem_width: int | None = None,
        small_stem: bool = False,
        zero_init: bool = True,
        backend: str = "blocks",
    ) -> None:
        stages = range(1, len(depths) + 1)
        attending = set(stages if attention_stages is None else attention_stages)
        if not attending <= set(stages):
            raise ValueError(f"attention_stages is {sorted(attending)}, allowed are stages from 1 to {len(depths)}")
        if small_stem and not conv_stem:
            raise ValueError("small_stem is True with conv_stem False, allowed is a small stem_block instead")
        # plain numbers may be set before the constructor of the module runs; it builds the stem with them
        self.conv_stem, self.stem_values, self.stem_block = conv_stem, stem_values, stem_block
        # blocks are built in order, one call of ``spatial`` each
        order = iter([s for s, depth in zip(stages, depths, strict=True) for _ in range(depth)])

        def spatial(channels: int, stride: int) -> nn.Module:
            if next(order) not in attending:
                return conv3x3(channels, channels, stride)
            return LocalSelfAttention2d(
                channels,
                kernel_size,
                num_heads,
                stride,
                position=position,
                content=content,
                grouped_projections=grouped_projections,
                backend=backend,
            )

        super().__init__(
            "bottleneck",
            depths,
            widths,
            num_classes=num_classes,
            in_chans=in_chans,
            stem_width=stem_width,
            small_stem=small_stem,
            zero_init=zero_init,
            spatial=spatial,
        )

    def _build_stem(self, width: int, small: bool) -> None:
        super()._build_stem(width, small)
        if not self.conv_stem:
            self.conv1 = AttentionStem(self.in_chans, width, self.stem_block, values=self.stem_values)
            self.maxpool = nn.MaxPool2d(self.stem_block)


def _sasa_resnet(
    depths: Sequence[int],
    num_classes: int,
    in_chans: int,
    conv_stem: bool,
    kernel_size: int,
    small_stem: bool,
    backend: str,
) -> SASAResNet:
    return SASAResNet(
        depths,
        conv_stem=conv_stem,
        kernel_size=kernel_size,
        num_classes=num_classes,
        in_chans=in_chans,
        small_stem=small_stem,
        backend=backend,
    )


def sasa_resnet26(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    conv_stem: bool = True,
    kernel_size: int = 7,
    small_stem: bool = False,
    backend: str = "blocks",
) -> SASAResNet:
    """Attention ResNet-26 (table 1): 10,331,264 parameters with the convolutional stem and 1000 classes."""
    return _sasa_resnet((1, 2, 4, 1), num_classes, in_chans, conv_stem, kernel_size, small_stem, backend)


def sasa_resnet38(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    conv_stem: bool = True,
    kernel_size: int = 7,
    small_stem: bool = False,
    backend: str = "blocks",
) -> SASAResNet:
    """Attention ResNet-38 (table 1): 14,173,384 parameters with the convolutional stem and 1000 classes."""
    return _sasa_resnet((2, 3, 5, 2), num_classes, in_chans, conv_stem, kernel_size, small_stem, backend)


def sasa_resnet50(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    conv_stem: bool = True,
    kernel_size: int = 7,
    small_stem: bool = False,
    backend: str = "blocks",
) -> SASAResNet:
    """Attention ResNet-50 (table 1): 18,015,504 parameters with the convolutional stem and 1000 classes."""
    return _sasa_resnet((3, 4, 6, 3), num_classes, in_chans, conv_stem, kernel_size, small_stem, backend)
