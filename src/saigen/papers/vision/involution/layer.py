"""Involution: Inverting the Inherence of Convolution for Visual Recognition (Li et al., CVPR 2021, arXiv 2103.06255).

A convolution uses one kernel at all places and another for every pair of channels. An involution turns both round: a
kernel for every place, shared by the channels of a group, and generated from the feature vector of that very pixel
(section 3). RedNet is ResNet with 7x7 involutions where its bottlenecks have 3x3 convolutions (section 4.1).

Symbols: X (b, C, H, W) the input, K the kernel's side, G the groups, H the involution kernels (b, G, K*K, H', W'),
phi the function that generates them, r its reduction.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from saigen.nn.resnet import ResNet, strip_prefixes

# --- the operator: Y[c, i, j] = sum over u, v of H[g(c), u, v, i, j] * X[c, s*i + d*u - p, s*j + d*v - p]  (equation 4)


def involution2d(
    x: Float[Tensor, "b c h w"],
    kernel: Float[Tensor, "b g k h2 w2"],
    *,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    backend: str = "offsets",
) -> Float[Tensor, "b c h2 w2"]:
    """Applies to every place of ``x`` (b, C, H, W) the kernel of that place: equation 4 of the paper.

    ``kernel`` is (b, G, K*K, H', W'), taps row by row; the channels of a group are neighbours. ``padding=None`` is
    d (K - 1) / 2, so that H' = ceil(H / stride). The result has the type of ``x``; half precision is summed in float32.

    ``"offsets"`` adds up one shifted map for each tap and keeps only ``x`` and ``kernel`` for the backward pass;
    ``"unfold"`` is the usual form, which copies every patch: K*K times the memory. Both give the same numbers.
    Raises ``ValueError`` where the shapes do not fit together.

    >>> x, kernel = torch.rand(2, 8, 6, 6), torch.zeros(2, 1, 9, 6, 6)
    >>> kernel[:, :, 4] = 1  # the centre tap alone: the identity
    >>> torch.equal(involution2d(x, kernel), x)
    True
    """
    size = round(kernel.shape[2] ** 0.5)
    if size * size != kernel.shape[2] or size % 2 == 0:
        raise ValueError(f"kernel has {kernel.shape[2]} taps, allowed is the square of an odd number")
    if stride < 1 or dilation < 1:
        raise ValueError(f"stride is {stride} and dilation is {dilation}, allowed are whole numbers of at least 1")
    padding = dilation * (size - 1) // 2 if padding is None else padding
    if padding < 0:
        raise ValueError(f"padding is {padding}, allowed is padding >= 0")
    expected = tuple((n + 2 * padding - dilation * (size - 1) - 1) // stride + 1 for n in x.shape[-2:])
    if tuple(kernel.shape[-2:]) != expected or min(expected) < 1:
        raise ValueError(
            f"kernel is for a map of {tuple(kernel.shape[-2:])}, allowed is {expected} with x {tuple(x.shape)}"
        )
    if kernel.shape[0] != x.shape[0] or x.shape[1] % kernel.shape[1]:
        raise ValueError(
            f"kernel is for {kernel.shape[0]} samples in {kernel.shape[1]} groups, allowed is the batch of x "
            f"({x.shape[0]}) and a divisor of its {x.shape[1]} channels"
        )
    kernel = kernel.to(x.dtype)
    if backend == "offsets":
        return torch.ops.saigen.involution2d(x, kernel, stride, padding, dilation)
    if backend != "unfold":
        raise ValueError(f"backend is {backend!r}, allowed is 'offsets' or 'unfold'")
    b, c, g = *x.shape[:2], kernel.shape[1]
    patches = F.unfold(x, size, dilation, padding, stride).view(b, g, c // g, size * size, *expected)
    return (kernel.unsqueeze(2) * patches).sum(3).view(b, c, *expected)


class _Shifts:
    """Where each tap finds its input: contiguous runs of flattened maps, so that 49 fused multiply-adds do it all.

    The padded input is dealt out into ``stride`` x ``stride`` phases (one, itself, at stride 1), each ``rows`` x
    ``columns``. In a phase the input of tap (u, v) is the same run of ``run`` numbers, shifted: a row of the output is
    thought ``columns`` wide, its end is cut off afterwards. Nothing is as large as the unfolded patches.
    """

    def __init__(self, x: Tensor, kernel: Tensor, stride: int, padding: int, dilation: int) -> None:
        (self.b, self.c, self.h, self.w), (_, self.g, taps, self.h2, self.w2) = x.shape, kernel.shape
        self.size, self.stride, self.dilation, self.padding = round(taps**0.5), stride, dilation, padding
        reach = (self.size - 1) * dilation // stride
        self.rows, self.columns = self.h2 + reach, self.w2 + reach
        self.run = (self.h2 - 1) * self.columns + self.w2
        self.type = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype

    def taps(self) -> Iterator[tuple[int, int, int, slice]]:
        for u in range(self.size):
            for v in range(self.size):
                (row, a), (column, c) = divmod(u * self.dilation, self.stride), divmod(v * self.dilation, self.stride)
                start = row * self.columns + column
                yield u * self.size + v, a, c, slice(start, start + self.run)

    def phases(self, x: Tensor) -> Tensor:
        """(b, C, H, W) to (stride, stride, b, G, C/G, rows * columns)."""
        s, p = self.stride, self.padding
        # a negative pad cuts off what no tap reaches
        x = F.pad(x.to(self.type), (p, s * self.columns - self.w - p, p, s * self.rows - self.h - p))
        if s > 1:
            x = x.view(self.b, self.c, self.rows, s, self.columns, s).permute(3, 5, 0, 1, 2, 4)
        return x.reshape(s, s, self.b, self.g, self.c // self.g, self.rows * self.columns)

    def unphases(self, phases: Tensor) -> Tensor:
        """The inverse of ``phases``, for gradients: what fell on the padding is dropped."""
        s, p = self.stride, self.padding
        x = phases.view(s, s, self.b, self.c, self.rows, self.columns).permute(2, 3, 4, 0, 5, 1)
        x = x.reshape(self.b, self.c, s * self.rows, s * self.columns)
        return F.pad(x, (-p, self.w + p - s * self.columns, -p, self.h + p - s * self.rows))

    def widen(self, y: Tensor) -> Tensor:
        """(..., H', W') to (..., run): rows of W' become rows of ``columns``, filled with zeros."""
        return F.pad(y.to(self.type), (0, self.columns - self.w2)).flatten(-2)[..., : self.run]

    def wide_zeros(self, like: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
        """A map (*shape, H', W') of zeros to be summed into, and the same numbers seen as runs."""
        full = torch.zeros(*shape, self.h2 * self.columns, dtype=self.type, device=like.device)
        return full.view(*shape, self.h2, self.columns)[..., : self.w2], full[..., : self.run]


def sum_of_shifts(x: Tensor, kernel: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    """What the operator ``saigen::involution2d`` computes; itself differentiable by its parts, but not leanly."""
    at = _Shifts(x, kernel, stride, padding, dilation)
    phases, kernel = at.phases(x), at.widen(kernel).unsqueeze(2)
    y, sums = at.wide_zeros(x, at.b, at.g, at.c // at.g)
    for tap, a, c, shift in at.taps():
        sums.addcmul_(kernel[:, :, :, tap], phases[a, c, ..., shift])
    return y.reshape(at.b, at.c, at.h2, at.w2).to(x.dtype, copy=True, memory_format=torch.contiguous_format)


@torch.library.custom_op("saigen::involution2d_backward", mutates_args=())
def _involution2d_backward(
    grad: Tensor, x: Tensor, kernel: Tensor, stride: int, padding: int, dilation: int
) -> tuple[Tensor, Tensor]:
    at = _Shifts(x, kernel, stride, padding, dilation)
    phases, wide = at.phases(x), at.widen(kernel).unsqueeze(2)
    grad = at.widen(grad.view(at.b, at.g, at.c // at.g, at.h2, at.w2))
    grad_phases, product = torch.zeros_like(phases), torch.empty_like(grad)
    grad_kernel, runs = at.wide_zeros(x, at.b, at.g, at.size**2)
    for tap, a, c, shift in at.taps():
        grad_phases[a, c, ..., shift].addcmul_(wide[:, :, :, tap], grad)
        torch.sum(torch.mul(grad, phases[a, c, ..., shift], out=product), 2, out=runs[:, :, tap])
    grad_x = at.unphases(grad_phases).to(x.dtype, memory_format=torch.contiguous_format)
    return grad_x, grad_kernel.to(kernel.dtype, copy=True, memory_format=torch.contiguous_format)


# one operator to the compiler, the exporter and the counters of multiply-adds, whatever the number of taps
_involution2d = torch.library.custom_op("saigen::involution2d", sum_of_shifts, mutates_args=())


@_involution2d.register_fake
def _(x: Tensor, kernel: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    return x.new_empty(*x.shape[:2], *kernel.shape[-2:])


@_involution2d_backward.register_fake
def _(grad: Tensor, x: Tensor, kernel: Tensor, stride: int, padding: int, dilation: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), kernel.new_empty(kernel.shape)


def _keep(ctx, inputs, output) -> None:
    x, kernel, *ctx.geometry = inputs
    ctx.save_for_backward(x, kernel)


def _backward(ctx, grad: Tensor):
    x, kernel = ctx.saved_tensors
    grads = torch.ops.saigen.involution2d_backward(grad.contiguous(), x, kernel, *ctx.geometry)
    return *grads, None, None, None


_involution2d.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.saigen.involution2d)
def _flops(x_shape, kernel_shape, *geometry, out_shape=None, **_) -> int:
    """Two for each of the K*K * C * H' * W' multiply-adds; PyTorch's counter asks for it by the operator's name."""
    b, c = x_shape[:2]
    return 2 * b * c * kernel_shape[2] * kernel_shape[3] * kernel_shape[4]


@register_flop_formula(torch.ops.saigen.involution2d_backward)
def _backward_flops(grad_shape, x_shape, kernel_shape, *geometry, out_shape=None, **_) -> int:
    return 2 * _flops(x_shape, kernel_shape)


# --- the layer


class Involution2d(nn.Module):
    """An involution with its kernel generator phi: (b, C, H, W) to (b, C, ceil(H / stride), ceil(W / stride)).

    phi (equation 6) is linear - batch norm - ReLU - linear at every pixel of X, averaged over ``stride`` x ``stride``
    windows first; ``reduction`` is r, G = C / ``group_channels``. It stands in for
    ``nn.Conv2d(channels, channels, kernel_size, stride, padding="same", dilation)`` without bias.
    Raises ``ValueError`` for an even ``kernel_size`` or channels that ``group_channels`` or ``reduction`` do not divide.

    >>> layer = Involution2d(32, kernel_size=7, stride=2)
    >>> layer(torch.rand(1, 32, 15, 15)).shape
    torch.Size([1, 32, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        stride: int = 1,
        *,
        dilation: int = 1,
        group_channels: int = 16,
        reduction: int = 4,
        backend: str = "offsets",
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}, allowed are odd numbers of at least 1")
        if stride < 1 or dilation < 1:
            raise ValueError(f"stride is {stride} and dilation is {dilation}, allowed are whole numbers of at least 1")
        if group_channels < 1 or channels < 1 or channels % group_channels:
            raise ValueError(f"group_channels is {group_channels}, allowed are divisors of channels = {channels}")
        if reduction < 1 or channels % reduction:
            raise ValueError(f"reduction is {reduction}, allowed are divisors of channels = {channels}")
        if backend not in ("offsets", "unfold"):
            raise ValueError(f"backend is {backend!r}, allowed is 'offsets' or 'unfold'")
        self.channels, self.kernel_size, self.stride, self.dilation = channels, kernel_size, stride, dilation
        self.groups, self.reduction, self.backend = channels // group_channels, reduction, backend
        hidden, taps = channels // reduction, kernel_size**2 * self.groups
        # the official key layout: conv1.conv, conv1.bn, conv2.conv
        self.conv1 = conv_bn_relu(channels, hidden, 1)
        self.conv2 = nn.Sequential(OrderedDict(conv=nn.Conv2d(hidden, taps, 1)))
        # ceil_mode: an odd map gives ceil(H / stride) kernels, as many as the operator has places
        self.avgpool = nn.AvgPool2d(stride, stride, ceil_mode=True) if stride > 1 else nn.Identity()

    def kernel(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b g k h2 w2"]:
        """phi(X): the involution kernels, (b, G, K*K, H', W')."""
        if x.shape[1] != self.channels:
            raise ValueError(f"x has {x.shape[1]} channels, allowed is channels = {self.channels}")
        return self.conv2(self.conv1(self.avgpool(x))).unflatten(1, (self.groups, self.kernel_size**2))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return involution2d(x, self.kernel(x), stride=self.stride, dilation=self.dilation, backend=self.backend)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}, "
            f"groups={self.groups}, reduction={self.reduction}"
        )


def conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels), activate=nn.ReLU(inplace=True)))


def convert_3x3_to_involution(
    model: nn.Module, kernel_size: int = 7, *, group_channels: int = 16, reduction: int = 4
) -> nn.Module:
    """Puts a new ``Involution2d`` in the place of every 3x3 convolution of ``model`` that it can stand in for.

    Those are the ungrouped ones with as many channels out as in (divisible by ``group_channels`` and ``reduction``),
    square stride and "same" padding; the others stay. ``model`` is changed and returned, to be trained anew.
    Raises ``ValueError`` where there is none.
    """
    swapped = 0
    for parent in list(model.modules()):
        for name, conv in list(parent.named_children()):
            if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (3, 3) or conv.groups != 1:
                continue
            square = conv.stride[0] == conv.stride[1] and conv.dilation[0] == conv.dilation[1]
            same = conv.padding == "same" or conv.padding == conv.dilation
            divisible = conv.in_channels % group_channels == 0 == conv.in_channels % reduction
            if conv.in_channels != conv.out_channels or not (square and same and divisible):
                continue
            layer = Involution2d(
                conv.in_channels,
                kernel_size,
                conv.stride[0],
                dilation=conv.dilation[0],
                group_channels=group_channels,
                reduction=reduction,
            )
            setattr(parent, name, layer.to(conv.weight.device, conv.weight.dtype).train(conv.training))
            swapped += 1
    if not swapped:
        raise ValueError("model has no 3x3 convolution that an involution can stand in for")
    return model


# --- RedNet (section 4.1, table 1)


class RedNet(ResNet):
    """ResNet with an involution in every bottleneck, and one of 3x3 in its stem: logits (b, num_classes).

    ``widths`` are the inner channels of the stages, as in ``saigen.nn.resnet.ResNet``; the involutions of a layer
    narrower than ``group_channels`` have one group. ``small_stem`` (ours) keeps the resolution, for 32-pixel images.

    >>> net = RedNet((1, 1), (16, 32), kernel_size=5, num_classes=10, small_stem=True)
    >>> net(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512),
        *,
        kernel_size: int = 7,
        group_channels: int = 16,
        reduction: int = 4,
        num_classes: int = 1000,
        in_chans: int = 3,
        stem_width: int | None = None,
        small_stem: bool = False,
        zero_init: bool = True,
        backend: str = "offsets",
    ) -> None:
        # plain numbers may be set before the constructor of the module runs; it builds stem and blocks with them
        self.group_channels, self.reduction, self.backend = group_channels, reduction, backend
        super().__init__(
            "bottleneck",
            depths,
            widths,
            num_classes=num_classes,
            in_chans=in_chans,
            stem_width=stem_width,
            small_stem=small_stem,
            zero_init=zero_init,
            spatial=lambda channels, stride: self._involution(channels, stride, kernel_size),
        )

    def _involution(self, channels: int, stride: int, kernel_size: int) -> Involution2d:
        return Involution2d(
            channels,
            kernel_size,
            stride,
            group_channels=min(self.group_channels, channels),
            reduction=self.reduction,
            backend=self.backend,
        )

    def _build_stem(self, width: int, small: bool) -> None:
        half = width // 2
        self.stem = nn.Sequential(
            conv_bn_relu(self.in_chans, half, 3, 1 if small else 2),
            self._involution(half, 1, 3),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            conv_bn_relu(half, width, 3),
        )
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)

    def forward_stem(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        return self.maxpool(self.stem(x))

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The official checkpoints' keys to ours: ``backbone.`` and ``head.`` are taken from their front."""
        return strip_prefixes(state, ("module.", "backbone.", "head."))


def _rednet(depths: Sequence[int], num_classes: int, in_chans: int, kernel_size: int, small_stem: bool) -> RedNet:
    return RedNet(depths, kernel_size=kernel_size, num_classes=num_classes, in_chans=in_chans, small_stem=small_stem)


def rednet26(*, num_classes: int = 1000, in_chans: int = 3, kernel_size: int = 7, small_stem: bool = False) -> RedNet:
    """RedNet-26: 9,233,166 parameters at 1000 classes."""
    return _rednet((1, 2, 4, 1), num_classes, in_chans, kernel_size, small_stem)


def rednet38(*, num_classes: int = 1000, in_chans: int = 3, kernel_size: int = 7, small_stem: bool = False) -> RedNet:
    """RedNet-38: 12,386,986 parameters at 1000 classes."""
    return _rednet((2, 3, 5, 2), num_classes, in_chans, kernel_size, small_stem)


def rednet50(*, num_classes: int = 1000, in_chans: int = 3, kernel_size: int = 7, small_stem: bool = False) -> RedNet:
    """RedNet-50: 15,540,806 parameters at 1000 classes."""
    return _rednet((3, 4, 6, 3), num_classes, in_chans, kernel_size, small_stem)


def rednet101(*, num_classes: int = 1000, in_chans: int = 3, kernel_size: int = 7, small_stem: bool = False) -> RedNet:
    """RedNet-101: 25,652,950 parameters at 1000 classes."""
    return _rednet((3, 4, 23, 3), num_classes, in_chans, kernel_size, small_stem)


def rednet152(*, num_classes: int = 1000, in_chans: int = 3, kernel_size: int = 7, small_stem: bool = False) -> RedNet:
    """RedNet-152: 33,984,582 parameters at 1000 classes."""
    return _rednet((3, 8, 36, 3), num_classes, in_chans, kernel_size, small_stem)
