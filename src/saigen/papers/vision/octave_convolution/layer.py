"""Drop an Octave: Octave Convolution (Chen et al., ICCV 2019, arXiv 1904.05049), and the networks of the paper.

A feature map is kept in two groups: H, (1 - alpha) of the channels at full resolution, and L, alpha of them one octave
lower, at half the height and width. A convolution has four paths (section 3.2, figure 2):

    Y_H = f(X_H; W_HH) + upsample(f(X_L; W_LH))
    Y_L = f(X_L; W_LL) + f(pool(X_H); W_HL)

Their four kernels tile the weight of the usual convolution, so no parameter is added or taken away. Wherever alpha is
0 a map is one plain tensor; otherwise it is the pair (H, L).
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from saigen.nn.classifier import Classifier
from saigen.nn.resnet import strip_prefixes

Map = Float[Tensor, "..."] | tuple[Float[Tensor, "..."], Float[Tensor, "..."]]
"""(b, C, h, w), or (H, L): (b, C - C_L, h, w) and (b, C_L, ceil(h / 2), ceil(w / 2))."""
Alpha = int | float

relu, relu6 = partial(F.relu, inplace=True), partial(F.relu6, inplace=True)


def work_ratio(alpha: Alpha) -> float:
    """Multiply-adds of an octave convolution, of the usual one's: 1 - 3/4 alpha (2 - alpha) (section 3.3, table 1).

    >>> work_ratio(0.5)
    0.4375
    """
    return 1 - 0.75 * alpha * (2 - alpha)


def memory_ratio(alpha: Alpha) -> float:
    """Numbers in a map of two groups, of the usual one's: 1 - 3/4 alpha (table 1).

    >>> memory_ratio(0.5)
    0.625
    """
    return 1 - 0.75 * alpha


def low_channels(channels: int, alpha: Alpha, name: str = "alpha") -> int:
    """How many of ``channels`` are in the low group: the whole part of alpha * channels, as the official code has it."""
    if not 0 <= alpha < 1:
        raise ValueError(f"{name} is {alpha}, allowed is 0 <= {name} < 1")
    low = int(alpha * channels)
    if alpha and not low:
        raise ValueError(
            f"{name} is {alpha}, which is no channel of {channels}; allowed is 0, or at least 1/{channels}"
        )
    return low


def halve(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
    """The mean over 2x2 windows, cut off at the border: (h, w) to (ceil(h / 2), ceil(w / 2)).

    Pooled, not strided: a strided convolution would shift the low group against the high one (section 3.3).
    """
    return F.avg_pool2d(x, 2, ceil_mode=True)


def add_doubled(high: Float[Tensor, "b c h w"], low: Float[Tensor, "b c h2 w2"]) -> Float[Tensor, "b c h w"]:
    """``high`` (changed in place) + ``low`` repeated 2x2, cut to the size of ``high``."""
    (h, w), training = high.shape[2:], torch.is_grad_enabled() and low.requires_grad
    if training or h % 2 or w % 2:
        return high.add_(F.interpolate(low, scale_factor=2.0, mode="nearest")[:, :, :h, :w])
    # as a broadcast sum the doubled map is never made; only its gradient, a sum over two axes apart, would be slow
    high.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).add_(low[:, :, :, None, :, None])
    return high


class OctaveConv2d(nn.Module):
    """An octave convolution, in the place of ``nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, ...)``.

    ``alpha_in`` and ``alpha_out`` are the low shares of the channels: 0 in for the first layer of a network (it takes a
    tensor), 0 out for the last (it gives a tensor), between them the maps are pairs (H, L). ``stride`` 2 pools each
    group by 2x2 before its convolution, whatever the alphas; no path is strided. The bias stands on the paths from H.
    With ``groups`` each path has min(groups, its channels out); with ``groups`` = ``in_channels`` (depthwise) H and L
    do not mix. Together the paths have the parameters of the usual layer, and start with its distribution.

    Raises ``ValueError`` for a stride other than 1 and 2, for alphas out of range or without a whole channel, for
    ``padding`` that changes the size of a map in two groups, and where ``groups`` do not divide a path.

    >>> layer = OctaveConv2d(64, 128, 3, alpha_in=0.25, alpha_out=0.25, stride=2, padding=1)
    >>> high, low = layer((torch.rand(1, 48, 56, 56), torch.rand(1, 16, 28, 28)))
    >>> high.shape, low.shape
    (torch.Size([1, 96, 28, 28]), torch.Size([1, 32, 14, 14]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        alpha_in: Alpha = 0.5,
        alpha_out: Alpha = 0.5,
        stride: int = 1,
        padding: int | str = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride is {stride}, allowed are 1 and 2")
        if kernel_size < 1 or dilation < 1:
            raise ValueError(f"kernel_size is {kernel_size} and dilation is {dilation}, allowed are both at least 1")
        self.low_in = low_channels(in_channels, alpha_in, "alpha_in")
        self.low_out = low_channels(out_channels, alpha_out, "alpha_out")
        same, odd = divmod(dilation * (kernel_size - 1), 2)
        padding = same if padding == "same" else padding
        if (self.low_in or self.low_out) and (odd or padding != same):
            raise ValueError(f"padding is {padding}, allowed with two groups is what keeps the size of a map: {same}")
        depthwise = 1 < groups == in_channels
        if depthwise and (alpha_in != alpha_out or out_channels % in_channels):
            raise ValueError(
                f"alpha_out is {alpha_out} for {out_channels} channels, allowed with groups = in_channels is "
                f"alpha_in = {alpha_in} and a multiple of {in_channels} channels"
            )
        self.in_channels, self.out_channels, self.groups, self.stride = in_channels, out_channels, groups, stride
        self.alpha_in, self.alpha_out = alpha_in, alpha_out
        self.kernel_size, self.padding, self.dilation = kernel_size, padding, dilation
        high_in, high_out = in_channels - self.low_in, out_channels - self.low_out

        def path(name: str, c_in: int, c_out: int, bias: bool) -> nn.Conv2d | None:
            if not c_in or not c_out:
                return None
            path_groups = c_in if depthwise else min(groups, c_out)
            if groups < 1 or c_in % path_groups or c_out % path_groups:
                raise ValueError(f"groups is {groups}, allowed are divisors of the channels of {name}: {c_in}, {c_out}")
            return nn.Conv2d(c_in, c_out, kernel_size, 1, padding, dilation, path_groups, bias)

        cross = not depthwise
        self.conv_h2h = path("H to H", high_in, high_out, bias)
        self.conv_h2l = path("H to L", high_in, self.low_out * cross, bias)
        self.conv_l2h = path("L to H", self.low_in * cross, high_out, False)
        self.conv_l2l = path("L to L", self.low_in, self.low_out, bias and depthwise)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The start of ``nn.Conv2d`` as a whole: uniform up to 1 / sqrt(fan in), counted over both sources."""
        bound = (self.in_channels // self.groups * self.kernel_size**2) ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Map) -> Map:
        high, low = x if isinstance(x, tuple) else (x, None)
        expected, got = (
            (self.in_channels - self.low_in, self.low_in),
            (high.shape[1], 0 if low is None else low.shape[1]),
        )
        if expected != got:
            raise ValueError(f"x has {got} channels in (H, L), allowed is {expected}")
        high = halve(high) if self.stride == 2 else high
        y = self.conv_h2h(high)
        y_low = None if self.conv_h2l is None else self.conv_h2l(halve(high))
        if self.conv_l2h is not None:
            # convolved while still low; after a stride the low map has the new high one's size
            y = add_doubled(y, self.conv_l2h(low)) if self.stride == 1 else y.add_(self.conv_l2h(low))
        if self.conv_l2l is not None:
            from_low = self.conv_l2l(halve(low) if self.stride == 2 else low)
            y_low = from_low if y_low is None else y_low.add_(from_low)
        return y if y_low is None else (y, y_low)

    @torch.no_grad()
    def pack_weight(self) -> Float[Tensor, "o i k k"]:
        """[[W_HH, W_LH], [W_HL, W_LL]], the weight of the usual convolution (figure 2); ungrouped layers only.

        Raises ``ValueError`` for a layer with groups.
        """
        if self.groups > 1:
            raise ValueError(f"groups is {self.groups}, allowed is 1: with groups the paths do not tile one weight")
        rows = [[self.conv_h2h, self.conv_l2h], [self.conv_h2l, self.conv_l2l]]
        return torch.cat([torch.cat([conv.weight for conv in row if conv], 1) for row in rows if any(row)])

    @classmethod
    @torch.no_grad()
    def from_conv(cls, conv: nn.Conv2d, alpha_in: Alpha, alpha_out: Alpha) -> "OctaveConv2d":
        """An octave convolution whose paths are the tiles of the weight of ``conv``, and which has its bias.

        Raises ``ValueError`` for a ``conv`` with groups, or whose kernel, stride, padding or dilation is not square.
        """
        square = all(len({*value}) == 1 for value in (conv.kernel_size, conv.stride, conv.dilation))
        if conv.groups > 1 or not square or conv.padding_mode != "zeros":
            raise ValueError(f"conv is {conv}, allowed is one without groups, square, and padded with zeros")
        padding = conv.padding if isinstance(conv.padding, str) else conv.padding[0]
        if not isinstance(conv.padding, str) and conv.padding[0] != conv.padding[1]:
            raise ValueError(f"conv pads by {conv.padding}, allowed is the same on all sides")
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size[0],
            alpha_in,
            alpha_out,
            conv.stride[0],
            0 if padding == "valid" else padding,
            conv.dilation[0],
            bias=conv.bias is not None,
        ).to(conv.weight.device, conv.weight.dtype)
        high_in, high_out = conv.in_channels - layer.low_in, conv.out_channels - layer.low_out
        columns = {"h": slice(high_in), "l": slice(high_in, None)}
        rows = {"h": slice(high_out), "l": slice(high_out, None)}
        for source in "hl":
            for target in "hl":
                path = getattr(layer, f"conv_{source}2{target}")
                if path is not None:
                    path.weight.copy_(conv.weight[rows[target], columns[source]])
                if path is not None and path.bias is not None:
                    path.bias.copy_(conv.bias[rows[target]])
        return layer.train(conv.training)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, alpha_in={self.alpha_in}, alpha_out={self.alpha_out}, stride={self.stride}"


# --- what stands between convolutions works on each group by itself


def per_group(function: Callable[[Tensor], Tensor], x: Map) -> Map:
    return (function(x[0]), function(x[1])) if isinstance(x, tuple) else function(x)


class PerGroup(nn.Module):
    """A module without weights, an activation or a pooling say, applied to each group.

    >>> high, low = PerGroup(nn.MaxPool2d(2))((torch.rand(1, 6, 8, 8), torch.rand(1, 2, 4, 4)))
    >>> high.shape, low.shape
    (torch.Size([1, 6, 4, 4]), torch.Size([1, 2, 2, 2]))
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if next(module.parameters(), None) is not None:
            raise ValueError(f"module is {module}, allowed is one without weights: each group needs its own")
        self.module = module

    def forward(self, x: Map) -> Map:
        return per_group(self.module, x)


class OctaveBatchNorm2d(nn.Module):
    """Batch normalisation of each group by itself; together they have the parameters of ``nn.BatchNorm2d(channels)``.

    >>> high, low = OctaveBatchNorm2d(8, 0.25)((torch.rand(2, 6, 4, 4), torch.rand(2, 2, 2, 2)))
    """

    def __init__(self, channels: int, alpha: Alpha = 0.5, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        low = low_channels(channels, alpha)
        self.bn_h = nn.BatchNorm2d(channels - low, eps, momentum)
        self.bn_l = nn.BatchNorm2d(low, eps, momentum) if low else None

    def norm(self, x: Map) -> Map:
        return (self.bn_h(x[0]), self.bn_l(x[1])) if isinstance(x, tuple) else self.bn_h(x)

    def forward(self, x: Map) -> Map:
        return self.norm(x)


def global_average(x: Map) -> Float[Tensor, "b c"]:
    """The means of all channels, H's first.

    >>> global_average((torch.ones(1, 3, 4, 4), torch.zeros(1, 1, 2, 2)))
    tensor([[1., 1., 1., 0.]])
    """
    return torch.cat([part.mean((2, 3)) for part in x], 1) if isinstance(x, tuple) else x.mean((2, 3))


class ConvNorm(OctaveBatchNorm2d):
    """Convolution, batch norm, activation; with ``pre`` batch norm and activation come first ("v2")."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        alpha_in: Alpha,
        alpha_out: Alpha,
        stride: int = 1,
        groups: int = 1,
        *,
        act: Callable[[Tensor], Tensor] | None = relu,
        pre: bool = False,
    ) -> None:
        # the official eps and (MXNet's, turned round) momentum of the "v2" networks
        options = {"eps": 1e-4, "momentum": 0.08} if pre else {}
        super().__init__(in_channels if pre else out_channels, alpha_in if pre else alpha_out, **options)
        self.conv = OctaveConv2d(
            in_channels, out_channels, kernel_size, alpha_in, alpha_out, stride, "same", groups=groups, bias=False
        )
        self.act, self.pre = act, pre

    def forward(self, x: Map) -> Map:
        if self.pre:
            return self.conv(per_group(self.act, self.norm(x)))
        y = self.norm(self.conv(x))
        return y if self.act is None else per_group(self.act, y)


class SqueezeExcite(nn.Module):
    """One squeeze over the means of both groups, and a gate for each of their channels (the official SE block)."""

    def __init__(self, channels: int, alpha: Alpha, reduction: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // reduction)
        self.fc2 = nn.Linear(channels // reduction, channels)
        self.high = channels - low_channels(channels, alpha)

    def forward(self, x: Map) -> Map:
        gate = self.fc2(F.relu(self.fc1(global_average(x)))).sigmoid()[:, :, None, None]
        if not isinstance(x, tuple):
            return x * gate
        return x[0] * gate[:, : self.high], x[1] * gate[:, self.high :]


# --- what the paper's networks have in common


class _OctaveClassifier(Classifier):
    """What the paper's networks have in common: a head over pooled features, and the classifier's keys and data."""

    classifier_name = "fc"
    default_cfg: ClassVar[dict] = {
        "input_size": (3, 224, 224),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "interpolation": "bilinear",
        "crop_pct": 0.875,
    }

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Map:
        """The map before pooling, (b, num_features, h / 32, w / 32), rounded up."""
        if x.shape[1] != self.in_chans:
            raise ValueError(f"x has {x.shape[1]} channels, allowed is in_chans = {self.in_chans}")
        return self._features(x)

    def forward_head(self, x: Map, pre_logits: bool = False) -> Float[Tensor, "b n"]:
        """Average pooling and, unless ``pre_logits``, the classifier."""
        x = global_average(x)
        return x if pre_logits else self.fc(x)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Kaiming-normal convolutions, fan out counted over both groups: the start of the usual network, tiled."""
        for module in self.modules():
            if isinstance(module, OctaveConv2d):
                for path in (module.conv_h2h, module.conv_h2l, module.conv_l2h, module.conv_l2l):
                    if path is not None:
                        fan_out = module.kernel_size**2 * module.out_channels // module.groups
                        nn.init.normal_(path.weight, 0.0, (2 / fan_out) ** 0.5)
        stem = next(module for module in self.modules() if isinstance(module, nn.Conv2d))
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Renames the keys of a checkpoint to ours, which are those of d-li14/octconv.pytorch.

        Read are these, also behind ``module.`` or ``backbone.``, and the names of the official MXNet networks of the
        ablation (``preact=True``; arrays saved by name, with or without ``arg:`` and ``aux:``).
        """
        state = strip_prefixes(state, ("module.", "backbone.", "arg:", "aux:"))
        return convert_mxnet(state) if "conv1_conv_weight" in state else state


MXNET = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_var": "running_var"}


def convert_mxnet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official names, ``L3_B01_conv2_conv-h2l_weight`` say, to ours, ``layer2.0.conv2.conv.conv_h2l.weight``."""
    renamed: dict[str, Tensor] = {}
    gates: dict[str, dict[str, Tensor]] = {}
    fixed = {"conv1_conv": "conv1", "conv1_bn": "bn1", "tail_bn": "tail", "classifier": "fc"}
    for key, value in state.items():
        layer, _, what = key.partition("_moving_") if "_moving_" in key else key.rpartition("_")
        what = MXNET.get(f"moving_{what}" if "_moving_" in key else what, what)
        block = re.fullmatch(r"L(\d)_B(\d+)_(conv\d|se)_(conv|bn|fc1|fc2)-(\w+)", layer)
        if block is None:
            renamed[f"{fixed[layer]}.{what}" if layer in fixed else key] = value
            continue
        stage, number, name, kind, path = block.groups()
        place = f"layer{int(stage) - 1}.{int(number) - 1}."
        if name == "se":  # the paths of its linear layers are one matrix here
            gates.setdefault(f"{place}se.{kind}.{what}", {})[path] = value
            continue
        place += "downsample.0" if name == "conv4" else name
        renamed[f"{place}.conv.conv_{path}.{what}" if kind == "conv" else f"{place}.bn_{path}.{what}"] = value
    for key, paths in gates.items():
        order = [paths[path] for path in ("h2h", "l2h", "h2l") if path in paths]
        renamed[key] = torch.cat(order, 1 if "fc1.weight" in key else 0)
    return renamed


# --- Oct-ResNet, Oct-ResNeXt and Oct-SE-ResNet (section 4.2)


class OctBottleneck(nn.Module):
    """1x1, 3x3, 1x1 octave convolutions and a shortcut, summed group by group; the stride is in the 3x3."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        alpha_in: Alpha,
        alpha: Alpha,
        stride: int,
        groups: int,
        se: bool,
        pre: bool,
    ) -> None:
        super().__init__()
        last = {"act": relu if pre else None, "pre": pre}
        self.conv1 = ConvNorm(in_channels, width, 1, alpha_in, alpha, pre=pre)
        self.conv2 = ConvNorm(width, width, 3, alpha, alpha, stride, groups, pre=pre)
        self.conv3 = ConvNorm(width, out_channels, 1, alpha, alpha, **last)
        self.se = SqueezeExcite(out_channels, alpha) if se else None
        changes = stride > 1 or in_channels != out_channels or alpha_in != alpha
        shortcut = ConvNorm(in_channels, out_channels, 1, alpha_in, alpha, stride, **last) if changes else None
        self.downsample = nn.Sequential(shortcut) if changes else None
        self.pre = pre

    def forward(self, x: Map) -> Map:
        y = self.conv3(self.conv2(self.conv1(x)))
        y = y if self.se is None else self.se(y)
        x = x if self.downsample is None else self.downsample(x)
        y = (y[0].add_(x[0]), y[1].add_(x[1])) if isinstance(y, tuple) else y.add_(x)
        return y if self.pre else per_group(relu, y)


class OctResNet(_OctaveClassifier):
    """An octave ResNet over images (b, in_chans, h, w): logits (b, num_classes), or features where that is 0.

    Stem and max pooling are the usual ones; the stages hold ``alpha`` of their channels low, but the last, whose maps
    are too small, none. ``depths`` are the blocks of each stage, ``widths`` their inner channels (a quarter of what a
    bottleneck puts out). ``preact`` is the form of the paper's ablation ("v2": batch norm and ReLU before each
    convolution), without it the blocks are in the order, and the keys, of d-li14/octconv.pytorch. ``groups`` and
    ``width_per_group`` make it ResNeXt, ``se`` puts squeeze-and-excitation at the end of each branch.
    ``alpha=0`` is not quite the usual ResNet: strides still are average poolings. ``small_stem`` (ours) keeps the
    resolution of 32-pixel images. Raises ``ValueError`` for impossible sizes and alphas.

    >>> net = OctResNet((1, 1), (16, 32), alpha=0.25, num_classes=10, small_stem=True)
    >>> net(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 6, 3),
        widths: Sequence[int] = (64, 128, 256, 512),
        *,
        alpha: Alpha = 0.25,
        num_classes: int = 1000,
        in_chans: int = 3,
        preact: bool = False,
        se: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        small_stem: bool = False,
    ) -> None:
        super().__init__()
        if not depths or len(depths) != len(widths) or min(*depths, *widths) < 1:
            raise ValueError(
                f"depths is {tuple(depths)} and widths is {tuple(widths)}, allowed are as many of the one as of the "
                "other, all at least 1"
            )
        if in_chans < 1:
            raise ValueError(f"in_chans is {in_chans}, allowed is in_chans >= 1")
        self.in_chans, self.alpha = in_chans, alpha
        channels, alpha_in = widths[0], 0.0
        size, stride = (3, 1) if small_stem else (7, 2)
        norm = {"eps": 1e-4, "momentum": 0.08} if preact else {}
        self.conv1 = nn.Conv2d(in_chans, channels, size, stride, size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(channels, **norm)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, 2, 1)
        self.stages = [f"layer{s + 1}" for s in range(len(depths))]
        for s, (name, depth, width) in enumerate(zip(self.stages, depths, widths, strict=True)):
            stage, inner = nn.Sequential(), width * width_per_group // 64 * groups
            stage_alpha = alpha if s + 1 < len(depths) else 0.0
            for b in range(depth):
                stride = 2 if s > 0 and b == 0 else 1
                stage.append(
                    OctBottleneck(channels, inner, 4 * width, alpha_in, stage_alpha, stride, groups, se, preact)
                )
                channels, alpha_in = 4 * width, stage_alpha
            self.add_module(name, stage)
        self.tail = nn.BatchNorm2d(channels, **norm) if preact else None
        self.num_features = channels
        self.reset_classifier(num_classes)
        self.reset_parameters()

    def _features(self, x: Tensor) -> Tensor:
        x = self.maxpool(relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return x if self.tail is None else relu(self.tail(x))


def _resnet(depths: Sequence[int], num_classes: int, in_chans: int, alpha: Alpha, preact: bool) -> OctResNet:
    return OctResNet(depths, alpha=alpha, num_classes=num_classes, in_chans=in_chans, preact=preact)


def oct_resnet26(*, num_classes: int = 1000, in_chans: int = 3, alpha: Alpha = 0.25, preact: bool = False) -> OctResNet:
    """Oct-ResNet-26, two blocks a stage: 15,995,176 parameters at 1000 classes, whatever alpha."""
    return _resnet((2, 2, 2, 2), num_classes, in_chans, alpha, preact)


def oct_resnet50(*, num_classes: int = 1000, in_chans: int = 3, alpha: Alpha = 0.25, preact: bool = False) -> OctResNet:
    """Oct-ResNet-50: 25,557,032 parameters at 1000 classes, whatever alpha."""
    return _resnet((3, 4, 6, 3), num_classes, in_chans, alpha, preact)


def oct_resnet101(
    *, num_classes: int = 1000, in_chans: int = 3, alpha: Alpha = 0.25, preact: bool = False
) -> OctResNet:
    """Oct-ResNet-101: 44,549,160 parameters at 1000 classes, whatever alpha."""
    return _resnet((3, 4, 23, 3), num_classes, in_chans, alpha, preact)


def oct_resnet152(
    *, num_classes: int = 1000, in_chans: int = 3, alpha: Alpha = 0.125, preact: bool = False
) -> OctResNet:
    """Oct-ResNet-152: 60,192,808 parameters at 1000 classes, whatever alpha."""
    return _resnet((3, 8, 36, 3), num_classes, in_chans, alpha, preact)


def oct_resnet200(
    *, num_classes: int = 1000, in_chans: int = 3, alpha: Alpha = 0.125, preact: bool = False
) -> OctResNet:
    """Oct-ResNet-200: 64,673,832 parameters at 1000 classes, whatever alpha."""
    return _resnet((3, 24, 36, 3), num_classes, in_chans, alpha, preact)


# --- MobileNets (section 4.3)


def _stem(in_chans: int, channels: int, act: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_chans, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), act)


def _check_mobile(width: Alpha, in_chans: int) -> None:
    if width < 0.25:
        raise ValueError(f"width is {width}, allowed is width >= 0.25")
    if in_chans < 1:
        raise ValueError(f"in_chans is {in_chans}, allowed is in_chans >= 1")


class OctMobileNetV1(_OctaveClassifier):
    """MobileNetV1 with ``alpha`` of the channels low from the first pointwise convolution to that of the 11th block.

    ``width`` multiplies all channels. Maps images (b, in_chans, h, w) to logits (b, num_classes).
    """

    def __init__(self, width: Alpha = 1.0, *, alpha: Alpha = 0.5, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        _check_mobile(width, in_chans)
        self.in_chans, self.alpha = in_chans, alpha
        channels = [int(width * c) for c in (32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024)]
        alphas = [0.0, *[alpha] * 10, 0.0, 0.0, 0.0]
        self.features = nn.Sequential(_stem(in_chans, channels[0], nn.ReLU(inplace=True)))
        for b, stride in enumerate((1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)):
            (c, out), (alpha_in, alpha_out) = channels[b : b + 2], alphas[b : b + 2]
            depthwise = ConvNorm(c, c, 3, alpha_in, alpha_in, stride, groups=c)
            self.features.append(nn.Sequential(depthwise, ConvNorm(c, out, 1, alpha_in, alpha_out)))
        self.num_features = channels[-1]
        self.reset_classifier(num_classes)
        self.reset_parameters()

    def _features(self, x: Tensor) -> Tensor:
        return self.features(x)


class OctInvertedResidual(nn.Module):
    """Expansion, depthwise 3x3, projection: in two groups between the outer convolutions, in one outside of them."""

    def __init__(self, in_channels: int, inner: int, out_channels: int, stride: int, alpha: Alpha) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, inner, 1, 0.0, alpha, act=relu6)
        self.conv2 = ConvNorm(inner, inner, 3, alpha, alpha, stride, groups=inner, act=relu6)
        self.conv3 = ConvNorm(inner, out_channels, 1, alpha, 0.0, act=None)
        self.has_skip = stride == 1 and in_channels == out_channels

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        y = self.conv3(self.conv2(self.conv1(x)))
        return y.add_(x) if self.has_skip else y


class OctMobileNetV2(_OctaveClassifier):
    """MobileNetV2 whose first 13 blocks hold ``alpha`` of their expanded channels low.

    ``width`` multiplies all channels (the last ones only where it is above 1). As in the official code the first block
    has an expansion too, of factor 1. Maps images (b, in_chans, h, w) to logits (b, num_classes).
    """

    def __init__(self, width: Alpha = 1.0, *, alpha: Alpha = 0.375, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        _check_mobile(width, in_chans)
        self.in_chans, self.alpha = in_chans, alpha
        plan = (32, 16, 24, 24, *[32] * 3, *[64] * 4, *[96] * 3, *[160] * 3, 320)
        channels = [int(width * c) for c in plan]
        self.features = nn.Sequential(_stem(in_chans, channels[0], nn.ReLU6(inplace=True)))
        for b, stride in enumerate((1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)):
            c, out = channels[b : b + 2]
            self.features.append(OctInvertedResidual(c, 6 * c if b else c, out, stride, alpha if b < 13 else 0.0))
        self.num_features = int(1280 * max(1.0, width))
        self.tail = ConvNorm(channels[-1], self.num_features, 1, 0.0, 0.0, act=relu6)
        self.reset_classifier(num_classes)
        self.reset_parameters()

    def _features(self, x: Tensor) -> Tensor:
        return self.tail(self.features(x))


def oct_mobilenet_v1(
    *, num_classes: int = 1000, in_chans: int = 3, width: Alpha = 1.0, alpha: Alpha = 0.5
) -> OctMobileNetV1:
    """Oct-MobileNetV1: 4,231,976 parameters at width 1 and 1000 classes."""
    return OctMobileNetV1(width, alpha=alpha, num_classes=num_classes, in_chans=in_chans)


def oct_mobilenet_v2(
    *, num_classes: int = 1000, in_chans: int = 3, width: Alpha = 1.0, alpha: Alpha = 0.375
) -> OctMobileNetV2:
    """Oct-MobileNetV2: 3,505,960 parameters at width 1 and 1000 classes."""
    return OctMobileNetV2(width, alpha=alpha, num_classes=num_classes, in_chans=in_chans)
