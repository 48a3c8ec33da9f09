"""Dynamic Convolution: Attention over Convolution Kernels (Chen et al., CVPR 2020, arXiv 1912.03458).

A layer holds K kernels. For each sample x an attention pi(x), one number a kernel, which add up to 1, mixes them, and
the mixed kernel is convolved with x once (equations 2 and 3):

    W(x) = sum over k of pi_k(x) W_k,   b(x) = sum over k of pi_k(x) b_k,   y = W(x) * x + b(x)

The attention is softmax(z / tau) over the output z of two linear layers on the channel means of x (section 3.2). At
the start tau is 30 and the attention nearly uniform, so that all kernels learn; it falls to 1 (section 3.3).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from saigen.nn.mobilenet_v2 import MobileNetV2
from saigen.nn.resnet import ResNet, strip_prefixes

Number = int | float
Sizes = int | Sequence[int]

SMALL = 7
"""Sides of a map up to which a dense kernel is applied to unfolded patches."""


class KernelAttention(nn.Module):
    """pi(x) = softmax(FC2(ReLU(FC1(mean over space of x))) / tau): (b, c, ...) to (b, K) (figure 3).

    The middle has ``channels`` / ``reduction`` units (at least one). ``temperature`` is a buffer, saved with the weights.

    >>> pi = KernelAttention(16, 4)(torch.rand(2, 16, 8, 8))
    >>> pi.shape, torch.allclose(pi.sum(1), torch.ones(2))
    (torch.Size([2, 4]), True)
    """

    def __init__(self, channels: int, num_kernels: int = 4, reduction: Number = 4, temperature: Number = 30.0) -> None:
        super().__init__()
        if num_kernels < 1:
            raise ValueError(f"num_kernels is {num_kernels}, allowed is at least 1")
        if reduction <= 0:
            raise ValueError(f"reduction is {reduction}, allowed is more than 0")
        check_temperature(temperature)
        hidden = max(1, int(channels / reduction))
        self.fc1 = nn.Linear(channels, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, num_kernels)
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def forward(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b k"]:
        z = self.fc2(F.relu(self.fc1(x.flatten(2).mean(2))))
        # in half precision the quotient by 30 would keep few digits
        return (
            F.softmax(z.float() / self.temperature, 1)
            if z.dtype != torch.float64
            else F.softmax(z / self.temperature, 1)
        )


def check_temperature(temperature: Number) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, allowed is more than 0")


class _DynamicConv(nn.Module):
    """A dynamic convolution over ``dims`` axes; the arguments are those of ``nn.Conv2d``, then the attention's."""

    dims = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        num_kernels: int = 4,
        reduction: Number = 4,
        temperature: Number = 30.0,
    ) -> None:
        super().__init__()
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups is {groups}, allowed are divisors of the channels, {in_channels} and {out_channels}"
            )
        self.kernel_size, self.stride = self._sizes("kernel_size", kernel_size), self._sizes("stride", stride)
        self.dilation = self._sizes("dilation", dilation)
        if padding in ("same", "valid"):
            spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            if padding == "same" and (max(self.stride) > 1 or any(span % 2 for span in spans)):
                raise ValueError(f"padding is 'same', allowed with stride 1 and odd kernels; stride is {self.stride}")
            padding = [span // 2 if padding == "same" else 0 for span in spans]
        self.padding = self._sizes("padding", padding, least=0)
        self.in_channels, self.out_channels, self.groups, self.num_kernels = (
            in_channels,
            out_channels,
            groups,
            num_kernels,
        )
        self.attention = KernelAttention(in_channels, num_kernels, reduction, temperature)
        self.weight = nn.Parameter(torch.empty(num_kernels, out_channels, in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(num_kernels, out_channels)) if bias else None
        self.reset_parameters()

    def _sizes(self, name: str, value: Sizes, least: int = 1) -> tuple[int, ...]:
        sizes = (value,) * self.dims if isinstance(value, int) else value
        if isinstance(sizes, str) or len(sizes) != self.dims or min(sizes) < least:
            raise ValueError(f"{name} is {value!r}, allowed is a number of at least {least}, or {self.dims} of them")
        return tuple(sizes)

    def reset_parameters(self) -> None:
        """Each kernel starts on its own as that of ``nn.Conv2d`` does: equal ones could not learn to differ."""
        for kernel in self.weight:
            nn.init.kaiming_uniform_(kernel, a=5**0.5)
        if self.bias is not None:
            bound = self.weight[0, 0].numel() ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def aggregate(self, pi: Float[Tensor, "b k"]) -> tuple[Float[Tensor, "b ..."], Float[Tensor, "b o"] | None]:
        """W(x) (b, C_out, C_in / groups, *kernel) and b(x) (b, C_out) for attentions ``pi`` (equation 2)."""
        pi = pi.to(self.weight.dtype)
        weight = (pi @ self.weight.flatten(1)).unflatten(1, self.weight.shape[1:])
        return weight, None if self.bias is None else pi @ self.bias

    def forward(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b d *space2"]:
        if x.shape[1] != self.in_channels:
            raise ValueError(f"x has {x.shape[1]} channels, allowed is in_channels = {self.in_channels}")
        weight, bias = self.aggregate(self.attention(x))
        dense = self.groups == 1
        if dense and max(self.kernel_size) == 1 and max(self.padding) == 0:
            y = self._pointwise(x, weight)
        elif dense and self.dims == 2 and max(self._output_size(x)) <= SMALL:
            y = self._unfolded(x, weight)
        else:
            y = self._grouped(x, weight)
        return y if bias is None else y + bias.to(y.dtype).reshape(*bias.shape, *(1,) * self.dims)

    def _output_size(self, x: Tensor) -> tuple[int, ...]:
        sizes = zip(x.shape[2:], self.padding, self.dilation, self.kernel_size, self.stride, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes)

    def _pointwise(self, x: Tensor, weight: Tensor) -> Tensor:
        # a 1x1 kernel a sample is a matrix a sample: a batched product is faster than as many groups
        x = x[(..., *(slice(None, None, stride) for stride in self.stride))] if max(self.stride) > 1 else x
        return (weight.flatten(2) @ x.flatten(2)).unflatten(2, x.shape[2:])

    def _unfolded(self, x: Tensor, weight: Tensor) -> Tensor:
        # where maps are smaller than kernels, the patches are cheap and one product reads each kernel once
        patches = F.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)
        return (weight.flatten(2) @ patches).unflatten(2, self._output_size(x))

    def _grouped(self, x: Tensor, weight: Tensor) -> Tensor:
        """All samples in one call: they become groups of one sample, each with the kernel of its own."""
        b = x.shape[0]
        x, conv = x.reshape(1, b * self.in_channels, *x.shape[2:]), (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1]
        y = conv(x, weight.flatten(0, 1), None, self.stride, self.padding, self.dilation, b * self.groups)
        return y.view(b, self.out_channels, *y.shape[2:])

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, groups={self.groups}, num_kernels={self.num_kernels}"
        )


class DynamicConv2d(_DynamicConv):
    """A dynamic convolution in the place of ``nn.Conv2d``: (b, C_in, h, w) to (b, C_out, h', w').

    ``num_kernels`` is K, ``reduction`` that of the attention. The batch is convolved at once, without a loop over
    samples: as groups of one sample, or for 1x1 kernels as a batched matrix product. Batch norm and activation follow
    as they do after a static layer. Lower the temperature while training: ``TemperatureSchedule``.
    Raises ``ValueError`` for sizes, groups, kernels or temperatures out of range.

    >>> layer = DynamicConv2d(16, 32, 3, stride=2, padding=1)
    >>> layer(torch.rand(2, 16, 8, 8)).shape
    torch.Size([2, 32, 4, 4])
    """

    dims = 2

    @classmethod
    @torch.no_grad()
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        num_kernels: int = 4,
        reduction: Number = 4,
        temperature: Number = 30.0,
        noise: Number | None = None,
    ) -> "DynamicConv2d":
        """A dynamic layer of the shape of ``conv``: new kernels, or with ``noise`` its own, each with some noise.

        New kernels are drawn each on its own, normal, as large as those of ``conv``: its network's way of starting.
        The noise has ``noise`` times that size and adds up to zero over the kernels, so that under a uniform attention
        the layer is ``conv``; the bias is copied. Raises ``ValueError`` unless zeros are padded.
        """
        if conv.padding_mode != "zeros":
            raise ValueError(f"conv pads with {conv.padding_mode!r}, allowed is 'zeros'")
        if noise is not None and noise < 0:
            raise ValueError(f"noise is {noise}, allowed is at least 0")
        sizes = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.bias is not None)
        options = {"num_kernels": num_kernels, "reduction": reduction, "temperature": temperature}
        layer = cls(conv.in_channels, conv.out_channels, *sizes, **options)
        layer = layer.to(conv.weight.device, conv.weight.dtype).train(conv.training)
        drawn = conv.weight.square().mean().sqrt() * torch.randn_like(layer.weight)
        if noise is None:
            layer.weight.copy_(drawn)
            return layer
        layer.weight.copy_(conv.weight + noise * (drawn - drawn.mean(0)))
        if conv.bias is not None:
            layer.bias.copy_(conv.bias.expand_as(layer.bias))
        return layer


class DynamicConv1d(_DynamicConv):
    """A dynamic convolution in the place of ``nn.Conv1d``: (b, C_in, t) to (b, C_out, t').

    >>> DynamicConv1d(4, 8, 3, padding=1)(torch.rand(2, 4, 10)).shape
    torch.Size([2, 8, 10])
    """

    dims = 1


class DynamicConv3d(_DynamicConv):
    """A dynamic convolution in the place of ``nn.Conv3d``: (b, C_in, t, h, w) to (b, C_out, t', h', w').

    >>> DynamicConv3d(4, 8, 3, padding=1)(torch.rand(2, 4, 3, 5, 5)).shape
    torch.Size([2, 8, 3, 5, 5])
    """

    dims = 3


# --- the temperature (section 3.3, insight 2)


def attentions(module: nn.Module) -> list[KernelAttention]:
    """The attentions in ``module``, in order."""
    return [part for part in module.modules() if isinstance(part, KernelAttention)]


def set_temperature(module: nn.Module, temperature: Number) -> None:
    """Gives all attentions in ``module`` the temperature tau. Raises ``ValueError`` where there is none."""
    check_temperature(temperature)
    found = attentions(module)
    if not found:
        raise ValueError("module has no dynamic convolution, allowed is one with at least one")
    for attention in found:
        attention.temperature.fill_(temperature)


class TemperatureSchedule:
    """tau falls from ``start`` to ``end`` in a straight line over the first ``epochs`` (of ImageNet: ten), and stays.

    >>> layer = DynamicConv2d(4, 4, 1)
    >>> schedule = TemperatureSchedule(layer, start=30, end=1, epochs=10)
    >>> schedule.step(5)
    15.5
    """

    def __init__(self, module: nn.Module, start: Number = 30.0, end: Number = 1.0, epochs: Number = 10) -> None:
        check_temperature(start)
        check_temperature(end)
        if epochs < 0:
            raise ValueError(f"epochs is {epochs}, allowed is at least 0")
        self.module, self.start, self.end, self.epochs = module, start, end, epochs
        self.step(0)

    def step(self, epoch: Number) -> float:
        """Sets and returns tau after ``epoch`` epochs, a fraction where it is called after each batch."""
        done = min(1.0, max(0.0, epoch / self.epochs)) if self.epochs else 1.0
        tau = self.start + (self.end - self.start) * done
        set_temperature(self.module, tau)
        return tau


# --- networks (section 4): every convolution dynamic but the first


def convert_to_dynamic(
    model: nn.Module,
    *,
    num_kernels: int = 4,
    reduction: Number = 4,
    temperature: Number = 30.0,
    skip: Sequence[str] | None = None,
    noise: Number | None = None,
) -> nn.Module:
    """Puts a ``DynamicConv2d`` in the place of every ``nn.Conv2d`` of ``model``, which is changed and returned.

    ``skip`` names the modules to leave as they are, with all below them; ``None`` leaves the first convolution, as the
    paper does. ``noise`` starts from the convolutions' own weights (``DynamicConv2d.from_conv``).
    Raises ``ValueError`` where nothing is left to convert, or ``skip`` names what is not there.

    >>> model = convert_to_dynamic(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)))
    >>> type(model[2]).__name__
    'DynamicConv2d'
    """
    convs = [name for name, part in model.named_modules() if isinstance(part, nn.Conv2d)]
    skip = convs[:1] if skip is None else skip
    names = {name for name, _ in model.named_modules()}
    for name in skip:
        if name not in names:
            raise ValueError(f"skip is {tuple(skip)}, but model has no {name!r}")
    chosen = [name for name in convs if name and not any(name == s or name.startswith(f"{s}.") for s in skip)]
    if not chosen:
        raise ValueError(f"model has {len(convs)} convolutions, allowed is one more than skip names: {tuple(skip)}")
    options = {"num_kernels": num_kernels, "reduction": reduction, "temperature": temperature, "noise": noise}
    for name in chosen:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, DynamicConv2d.from_conv(model.get_submodule(name), **options))
    return model


def _add_temperatures(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Trained weights without a temperature are for tau = 1; linear layers may be kept as 1x1 convolutions."""
    state = strip_prefixes(state, ("module.", "backbone."))
    for key in [key for key in state if key.endswith(("attention.fc1.weight", "attention.fc2.weight"))]:
        state[key] = state[key].flatten(1)
        state.setdefault(f"{key.rpartition('.fc')[0]}.temperature", torch.tensor(1.0))
    return state


class DyResNet(ResNet):
    """A ResNet of basic blocks whose convolutions are dynamic, but the stem and, with ``static_shortcuts``, those of the
    shortcuts; dropout of ``drop_rate`` before the classifier. Images (b, in_chans, h, w) to logits (b, num_classes).

    >>> DyResNet((1, 1), (8, 16), num_classes=5, small_stem=True)(torch.rand(2, 3, 16, 16)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512),
        *,
        num_kernels: int = 4,
        reduction: Number = 4,
        temperature: Number = 30.0,
        static_shortcuts: bool = False,
        drop_rate: Number = 0.1,
        num_classes: int = 1000,
        in_chans: int = 3,
        small_stem: bool = False,
    ) -> None:
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate is {drop_rate}, allowed is 0 <= drop_rate < 1")
        super().__init__(
            "basic", depths, widths, num_classes=num_classes, in_chans=in_chans, small_stem=small_stem, zero_init=False
        )
        self.drop_rate = drop_rate
        shortcuts = [name for name, _ in self.named_modules() if name.endswith("downsample")]
        skip = ["conv1", *(shortcuts if static_shortcuts else [])]
        convert_to_dynamic(self, num_kernels=num_kernels, reduction=reduction, temperature=temperature, skip=skip)

    def forward_head(self, x: Float[Tensor, "b d h w"], pre_logits: bool = False) -> Float[Tensor, "b n"]:
        """Average pooling, dropout and, unless ``pre_logits``, the classifier."""
        x = F.dropout(self.global_pool(x).flatten(1), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Torchvision's keys are ours, K kernels to a weight; where no temperature is kept it is 1."""
        return _add_temperatures(state)


class DyMobileNetV2(MobileNetV2):
    """A MobileNetV2 whose inverted residuals have dynamic convolutions only; with ``dynamic_head`` the 1x1 before the
    pooling is dynamic too. Images (b, in_chans, h, w) to logits (b, num_classes).

    ``positions`` are the convolutions of a block that are dynamic, of "expand", "depthwise" and "project" (table 6).

    >>> DyMobileNetV2(0.35, num_classes=5)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        width: Number = 1.0,
        *,
        num_kernels: int = 4,
        reduction: Number = 4,
        temperature: Number = 30.0,
        dynamic_head: bool = False,
        positions: Sequence[str] = ("expand", "depthwise", "project"),
        stages: tuple[tuple[int, int, int, int], ...] | None = None,
        drop_rate: Number = 0.2,
        num_classes: int = 1000,
        in_chans: int = 3,
        stem_stride: int = 2,
        stem_channels: int = 32,
        head_channels: int = 1280,
    ) -> None:
        if not positions or set(positions) - {"expand", "depthwise", "project"}:
            raise ValueError(f"positions is {tuple(positions)}, allowed are 'expand', 'depthwise' and 'project'")
        given = {} if stages is None else {"stages": stages}
        super().__init__(
            width,
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            stem_stride=stem_stride,
            stem_channels=stem_channels,
            head_channels=head_channels,
            **given,
        )
        skip = ["conv_stem"] if dynamic_head else ["conv_stem", "conv_head"]
        for name, block in self.named_modules():
            if hasattr(block, "expands"):
                roles = {
                    "conv_dw": "depthwise",
                    "conv_pwl": "project",
                    "conv_pw": "expand" if block.expands else "project",
                }
                skip += [
                    f"{name}.{conv}" for conv, role in roles.items() if hasattr(block, conv) and role not in positions
                ]
        convert_to_dynamic(self, num_kernels=num_kernels, reduction=reduction, temperature=temperature, skip=skip)

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """timm's keys are ours, K kernels to a weight; where no temperature is kept it is 1."""
        return _add_temperatures(state)


def dy_resnet10(
    *, num_classes: int = 1000, in_chans: int = 3, num_kernels: int = 4, drop_rate: Number = 0.1
) -> DyResNet:
    """DY-ResNet-10, one block a stage."""
    return DyResNet(
        (1, 1, 1, 1), num_classes=num_classes, in_chans=in_chans, num_kernels=num_kernels, drop_rate=drop_rate
    )


def dy_resnet18(
    *, num_classes: int = 1000, in_chans: int = 3, num_kernels: int = 4, drop_rate: Number = 0.1
) -> DyResNet:
    """DY-ResNet-18."""
    return DyResNet(
        (2, 2, 2, 2), num_classes=num_classes, in_chans=in_chans, num_kernels=num_kernels, drop_rate=drop_rate
    )


def _mobilenet(width: float, num_classes: int, in_chans: int, num_kernels: int, dynamic_head: bool) -> DyMobileNetV2:
    options = {"num_kernels": num_kernels, "dynamic_head": dynamic_head, "drop_rate": 0.2 if width == 1 else 0.0}
    return DyMobileNetV2(width, num_classes=num_classes, in_chans=in_chans, **options)


def dy_mobilenetv2_100(
    *, num_classes: int = 1000, in_chans: int = 3, num_kernels: int = 4, dynamic_head: bool = False
) -> DyMobileNetV2:
    """DY-MobileNetV2 x1.0: 11.1 M parameters."""
    return _mobilenet(1.0, num_classes, in_chans, num_kernels, dynamic_head)


def dy_mobilenetv2_075(
    *, num_classes: int = 1000, in_chans: int = 3, num_kernels: int = 4, dynamic_head: bool = False
) -> DyMobileNetV2:
    """DY-MobileNetV2 x0.75: 7.0 M parameters."""
    return _mobilenet(0.75, num_classes, in_chans, num_kernels, dynamic_head)


def dy_mobilenetv2_050(
    *, num_classes: int = 1000, in_chans: int = 3, num_kernels: int = 4, dynamic_head: bool = False
) -> DyMobileNetV2:
    """DY-MobileNetV2 x0.5: 3.9 M parameters."""
    return _mobilenet(0.5, num_classes, in_chans, num_kernels, dynamic_head)


def dy_mobilenetv2_035(
    *, num_classes: int = 1000, in_chans: int = 3, num_kernels: int = 4, dynamic_head: bool = False
) -> DyMobileNetV2:
    """DY-MobileNetV2 x0.35: 2.7 M parameters."""
    return _mobilenet(0.35, num_classes, in_chans, num_kernels, dynamic_head)
