"""Channel Equilibrium Networks for Learning Deep Representation (Shao et al., ICML 2020, arXiv 2003.00214).

After batch norm and ReLU some channels are nearly silent: "inhibited". A channel-equilibrium block between the two
mixes the channels so that each takes part. Ideally x_n becomes D_n^(-1/2) x_n with D_n = lambda Sigma +
(1 - lambda) Diag(v_n); Jensen's inequality splits the inverse root into two branches,

    y = sigmoid(w) * BD(x) + (1 - sigmoid(w)) * IR(x),

batch decorrelation, BD(x) = Sigma^(-1/2) x, and instance reweighting, IR(x) = Diag(v_n)^(-1/2) x. Both are linear in
x_n, so one small matrix a sample and group does the work of the two.

Symbols: x (N, C, H, W) what batch norm puts out, d the channels of a group, G = C / d the groups, m = N H W, Sigma
(G, d, d), P the iterate that tends to the inverse root, s2 (N, C) the variances over H W, T the Newton steps.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saigen.nn.resnet import BasicBlock, Bottleneck, ResNet


def inverse_sqrt_newton(
    matrix: Float[Tensor, "*batch d d"], iterations: int = 3, *, rescale: bool = False
) -> Float[Tensor, "*batch d d"]:
    """(Sigma / trace Sigma)^(-1/2) by ``iterations`` Newton steps; with ``rescale`` Sigma^(-1/2) itself.

    P_0 = I and P_(t+1) = (3 P_t - P_t^3 Sigma_N) / 2. Dividing by the trace puts all eigenvalues of Sigma_N in (0, 1],
    where the iteration converges. It is computed in its coupled form, which carries P_t^2 Sigma_N along: the same
    numbers, but rounding errors do not grow with the steps. ``matrix`` is symmetric and positive definite.
    Raises ``ValueError`` for a matrix that is not square, or no iteration.

    >>> inverse_sqrt_newton(torch.eye(4), 20)[0, 0].round(decimals=4)  # the square root of the trace
    tensor(2.)
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, allowed is iterations >= 1")
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"matrix has the shape {tuple(matrix.shape)}, allowed are square matrices (..., d, d)")
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    product = matrix / trace
    identity = 1.5 * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    root = step = identity - 0.5 * product
    for _ in range(iterations - 1):
        product = step @ product @ step  # P_t^2 Sigma_N
        step = identity - 0.5 * product
        root = step @ root
    return root * trace.rsqrt() if rescale else root


class InstanceReweighting(nn.Module):
    """The gates of the IR branch: from the variances s2 (N, C) of a batch to factors u / scale (N, C).

    u = sigmoid(W2 ReLU(LayerNorm(W1 s2))) with W1: C -> C / ``reduction``; scale is the root of the mean variance of the
    batch, and in eval mode its running mean. Until there is one (nothing was trained yet), the scale is 1.
    """

    running_scale: Tensor

    def __init__(self, num_channels: int, reduction: int = 4, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        hidden = num_channels // reduction
        self.momentum, self.eps = momentum, eps
        self.fc = nn.Sequential(
            nn.Linear(num_channels, hidden, bias=False),
            nn.LayerNorm(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, num_channels, bias=False),
            nn.Sigmoid(),
        )
        self.register_buffer("running_scale", torch.zeros(1))

    def forward(self, s2: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        if self.training:
            # the floor only shows where a whole batch is constant; below it neither root nor quotient has a gradient
            scale = s2.mean().clamp_min(self.eps**2).sqrt()
            self.running_scale.lerp_(scale.detach().to(self.running_scale.dtype), self.momentum)
        else:
            scale = torch.where(self.running_scale > 0, self.running_scale, 1.0)
        return self.fc(s2) / scale


class ChannelEquilibrium2d(nn.Module):
    """A channel-equilibrium block, to stand after a batch norm: (N, C, H, W) to the same.

    ``group_size`` is d, halved until it divides the channels (the paper: 64 in the stem, 16 elsewhere), ``iterations``
    is T, ``reduction`` that of the gates. As in the official code x is not centred before it is mixed and P is not
    divided by the root of the trace, so that BD(x) is about trace(Sigma)^(1/2) Sigma^(-1/2) x; ``centre`` and ``rescale``
    give the textbook forms. ``branches`` may leave one out ("bd", "ir"), for ablations.

    In training the statistics are the batch's and gradients flow through them; in eval mode they are running means.
    They are in float32 under autocast. Raises ``ValueError`` for impossible sizes and for maps of a single pixel, which
    have no variance.

    >>> block = ChannelEquilibrium2d(32, group_size=16)
    >>> block(torch.rand(4, 32, 7, 7)).shape, round(float(block.mixing), 2)
    (torch.Size([4, 32, 7, 7]), 0.5)
    """

    running_mean: Tensor
    running_wm: Tensor

    def __init__(
        self,
        num_channels: int,
        group_size: int = 16,
        *,
        iterations: int = 3,
        reduction: int = 4,
        eps: float = 1e-5,
        momentum: float = 0.1,
        centre: bool = False,
        rescale: bool = False,
        branches: str = "both",
    ) -> None:
        super().__init__()
        if num_channels < 1 or group_size < 1:
            raise ValueError(
                f"num_channels is {num_channels} and group_size is {group_size}, allowed are whole numbers of at least 1"
            )
        if iterations < 1:
            raise ValueError(f"iterations is {iterations}, allowed is iterations >= 1")
        if not 1 <= reduction <= num_channels:
            raise ValueError(f"reduction is {reduction}, allowed is 1 <= reduction <= num_channels = {num_channels}")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum is {momentum}, allowed is 0 < momentum <= 1")
        if eps <= 0:
            raise ValueError(f"eps is {eps}, allowed is eps > 0")
        if branches not in ("both", "bd", "ir"):
            raise ValueError(f"branches is {branches!r}, allowed is 'both', 'bd' or 'ir'")
        while num_channels % group_size:
            group_size //= 2
        self.num_channels, self.group_size, self.groups = num_channels, group_size, num_channels // group_size
        self.iterations, self.eps, self.momentum = iterations, eps, momentum
        self.centre, self.rescale, self.branches = centre, rescale, branches
        self.x_weight = nn.Parameter(torch.zeros(1))  # w; the names are those of the official checkpoints
        self.AR = InstanceReweighting(num_channels, reduction, momentum, eps)
        self.register_buffer("running_mean", torch.zeros(self.groups, group_size, 1))
        self.register_buffer("running_wm", torch.eye(group_size).repeat(self.groups, 1, 1))

    @property
    def mixing(self) -> Tensor:
        """sigmoid(w), the share of batch decorrelation; 0 or 1 where one branch was left out."""
        if self.branches != "both":
            return torch.full_like(self.x_weight, float(self.branches == "bd"))
        return torch.sigmoid(self.x_weight)

    def _whitening(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """P (G, d, d) and the mean (G, d, 1): of the batch ``x`` (N, G, d, H W) in training, running in eval mode."""
        if not self.training:
            return self.running_wm, self.running_mean
        m = x.shape[0] * x.shape[3]
        mean = x.mean((0, 3))[..., None]
        centred = (x - mean).flatten(0, 1)
        # one product a sample and group, added up: no transposed copy of the activations
        sigma = torch.bmm(centred, centred.mT).unflatten(0, x.shape[:2]).sum(0) / m
        sigma = sigma + self.eps * torch.eye(self.group_size, dtype=x.dtype, device=x.device)
        root = inverse_sqrt_newton(sigma, self.iterations, rescale=self.rescale)
        self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
        self.running_wm.lerp_(root.detach().to(self.running_wm.dtype), self.momentum)
        return root, mean

    def _matrices(self, x: Tensor) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
        """Of the grouped ``x``: P (G, d, d), the mean (G, d, 1) and the gates u / scale (N, G, d)."""
        root = mean = gates = 0.0
        if self.branches != "ir":
            root, mean = self._whitening(x)
        if self.branches != "bd":
            gates = self.AR(x.var(-1).flatten(1)).unflatten(1, (self.groups, self.group_size))
        return root, mean, gates

    def batch_decorrelation(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """BD(x) alone: Sigma^(-1/2) of the batch (in eval mode the running one) times x."""
        grouped = self._grouped(x)
        root, mean = self._whitening(grouped)
        return (root @ (grouped - mean if self.centre else grouped)).view_as(x)

    def instance_reweighting(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """IR(x) alone: one factor a sample and channel."""
        return self.AR(self._grouped(x).var(-1).flatten(1))[:, :, None, None] * x

    def _grouped(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.num_channels:
            raise ValueError(
                f"x has the shape {tuple(x.shape)}, allowed are num_channels = {self.num_channels} channels"
            )
        if x.shape[2] * x.shape[3] < 2:
            raise ValueError(f"x is a map of {tuple(x.shape[2:])}, allowed are maps of at least 2 pixels")
        # (N, G, d, H W); no copy of a contiguous map
        return x.reshape(x.shape[0], self.groups, self.group_size, -1)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        grouped = self._grouped(x)
        # the counters of multiply-adds run on the meta device, where there is no autocast to switch off
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            exact = grouped.float() if grouped.dtype in (torch.float16, torch.bfloat16) else grouped
            root, mean, gates = self._matrices(exact)
            share = self.mixing
            # (N, G, d, d): both branches in one matrix, so that the activations are read once
            mix = share * root
            if isinstance(gates, Tensor):
                mix = mix + torch.diag_embed((1 - share) * gates)
            mix = mix.expand(x.shape[0], -1, -1, -1).to(x.dtype)
            y = mix @ grouped
            if self.centre and isinstance(root, Tensor):
                y = y - (share * (root @ mean)).to(x.dtype)
        return y.view(x.shape)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, group_size={self.group_size}, iterations={self.iterations}"


# --- networks


class EquilibriumBlock(nn.Module):
    """A residual block with channel equilibrium at its last batch norm, before the sum (figure 2c).

    It takes over the layers of ``block``, their names included. ``placement`` is "after" the norm (the paper's) or
    "before" it, between convolution and norm (the second variant of the official code).
    """

    def __init__(self, block: BasicBlock | Bottleneck, ce: ChannelEquilibrium2d, placement: str = "after") -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self.downsample = block.downsample
        self.ce, self.placement = ce, placement
        self.layers = 3 if isinstance(block, Bottleneck) else 2

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        y = self.act1(self.bn1(self.conv1(x)))
        if self.layers == 3:
            y = self.act2(self.bn2(self.conv2(y)))
        norm, conv = (self.bn3, self.conv3) if self.layers == 3 else (self.bn2, self.conv2)
        y = self.ce(norm(conv(y))) if self.placement == "after" else norm(self.ce(conv(y)))
        y = y + (x if self.downsample is None else self.downsample(x))
        return self.act3(y) if self.layers == 3 else self.act2(y)


class CEResNet(ResNet):
    """ResNet with channel equilibrium in its stem and in the residual blocks of ``stages``: logits (b, num_classes).

    ``group_size`` is d in the blocks; in the stem it is 64. The last stage of four goes without, as the authors' does.
    ``branches`` and ``placement`` are the ablations of ``ChannelEquilibrium2d`` and of the block. Batch norms start at 1
    throughout: a branch that started at 0 would have no variance to be weighed by.

    >>> net = CEResNet("basic", (1, 1), (16, 32), stages=(1,), num_classes=10, small_stem=True)
    >>> net(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        block: str,
        depths: Sequence[int] = (2, 2, 2, 2),
        widths: Sequence[int] = (64, 128, 256, 512),
        *,
        stages: Sequence[int] = (1, 2, 3),
        group_size: int = 16,
        iterations: int = 3,
        reduction: int = 4,
        branches: str = "both",
        placement: str = "after",
        num_classes: int = 1000,
        in_chans: int = 3,
        stem_width: int | None = None,
        small_stem: bool = False,
    ) -> None:
        super().__init__(
            block,
            depths,
            widths,
            num_classes=num_classes,
            in_chans=in_chans,
            stem_width=stem_width,
            small_stem=small_stem,
            zero_init=False,
        )
        if any(not 1 <= s <= len(depths) for s in stages):
            raise ValueError(f"stages is {tuple(stages)}, allowed are stages from 1 to {len(depths)}")
        if placement not in ("after", "before"):
            raise ValueError(f"placement is {placement!r}, allowed is 'after' or 'before' the batch norm")

        def equilibrium(channels: int, size: int) -> ChannelEquilibrium2d:
            return ChannelEquilibrium2d(channels, size, iterations=iterations, reduction=reduction, branches=branches)

        self.ce1 = equilibrium(self.bn1.num_features, 64)
        for s in stages:
            stage = getattr(self, f"layer{s}")
            for i, inner in enumerate(stage):
                stage[i] = EquilibriumBlock(inner, equilibrium(inner.last_norm.num_features, group_size), placement)

    def forward_stem(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        return self.maxpool(self.act1(self.ce1(self.bn1(self.conv1(x)))))


def _ce_resnet(
    block: str, depths: Sequence[int], num_classes: int, in_chans: int, small_stem: bool, placement: str
) -> CEResNet:
    return CEResNet(
        block, depths, num_classes=num_classes, in_chans=in_chans, small_stem=small_stem, placement=placement
    )


def ce_resnet18(
    *, num_classes: int = 1000, in_chans: int = 3, small_stem: bool = False, placement: str = "after"
) -> CEResNet:
    """CE-ResNet-18: 11,778,063 parameters at 1000 classes."""
    return _ce_resnet("basic", (2, 2, 2, 2), num_classes, in_chans, small_stem, placement)


def ce_resnet50(
    *, num_classes: int = 1000, in_chans: int = 3, small_stem: bool = False, placement: str = "after"
) -> CEResNet:
    """CE-ResNet-50: 29,331,926 parameters at 1000 classes."""
    return _ce_resnet("bottleneck", (3, 4, 6, 3), num_classes, in_chans, small_stem, placement)


def ce_resnet101(
    *, num_classes: int = 1000, in_chans: int = 3, small_stem: bool = False, placement: str = "after"
) -> CEResNet:
    """CE-ResNet-101: 57,245,671 parameters at 1000 classes."""
    return _ce_resnet("bottleneck", (3, 4, 23, 3), num_classes, in_chans, small_stem, placement)


# --- what it is about


@torch.no_grad()
def inhibited_channel_ratio(model: nn.Module, batches: Iterable[Tensor], threshold: float = 0.01) -> dict[str, float]:
    """The share of inhibited channels after each ReLU of ``model``: name of the layer to share.

    A channel is inhibited where its mean over all pixels of ``batches`` (tensors (n, c, h, w), the model's inputs) is
    below ``threshold`` times that of the layer's strongest channel. Layers are ``nn.ReLU`` modules over maps; one that is
    called several times counts all its calls together. The model is run in eval mode and left as it was.
    Raises ``ValueError`` for a threshold outside (0, 1), or where no ReLU over maps was met.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> list(inhibited_channel_ratio(net, [torch.rand(2, 3, 8, 8)]))
    ['1']
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold is {threshold}, allowed is 0 < threshold < 1")
    sums: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.ndim == 4:
                total = output.double().mean((2, 3)).sum(0)
                sums[name] = sums[name] + total if name in sums else total

        return hook

    training = {module: module.training for module in model.modules()}
    handles = [m.register_forward_hook(note(name)) for name, m in model.named_modules() if isinstance(m, nn.ReLU)]
    try:
        model.eval()
        for batch in batches:
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    if not sums:
        raise ValueError("model has no nn.ReLU over maps (n, c, h, w), or batches is empty")
    return {name: (total <= threshold * total.max()).double().mean().item() for name, total in sums.items()}
