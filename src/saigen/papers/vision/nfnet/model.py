"""NFNet: ResNets without any normalisation layer (arXiv 2102.06171), and the NF-ResNets and NF-RegNets before them
(arXiv 2101.08692).

A residual block adds to the variance of its input instead of normalising it, and the sum is known beforehand:

    x_l+1 = h(x_l) + α f(x_l / β_l),     β_l² = Var(x_l),     Var(x_l+1) = Var(x_l) + α²       (section 2)

if f keeps the variance of what it is given. It does, since every convolution standardises its weights,

    Ŵ_ij = gain_i (W_ij - μ_i) / (√N σ_i),     N the fan-in                                    (equation 1)

and every activation is multiplied by γ, which gives g(a), a ~ N(0, 1), the variance 1. A skip gain of zero at the end
of f starts each block as the identity. γ and 1/β stand here on the weights of the convolution that reads the
activation: convolution is linear, and weights are smaller than feature maps.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from saigen.nn.classifier import Classifier
from saigen.nn.conv import same_padding
from saigen.nn.resnet import strip_prefixes
from saigen.papers.vision.nfnet.checkpoint import convert_haiku

GAMMA = {
    "identity": 1.0,
    "celu": 1.270926833152771,
    "elu": 1.2716004848480225,
    "gelu": 1.7015043497085571,
    "leaky_relu": 1.70590341091156,
    "log_sigmoid": 1.9193484783172607,
    "relu": 1.7139588594436646,
    "relu6": 1.7131484746932983,
    "selu": 1.0008515119552612,
    "sigmoid": 4.803835391998291,
    "silu": 1.7881293296813965,
    "soft_sign": 2.338853120803833,
    "softplus": 1.9203323125839233,
    "tanh": 1.5939117670059204,
}
"""γ of each activation, as the official code has them: 1 / the standard deviation of g(a), a ~ N(0, 1)."""

NUMERICS = ("timm", "official")


class Activation(nn.Module):
    """An activation by its name in ``GAMMA``, without its γ; ``tanh_gelu`` takes the tanh approximation of GELU."""

    def __init__(self, name: str, tanh_gelu: bool = False) -> None:
        super().__init__()
        if name not in GAMMA:
            raise ValueError(f"activation is {name!r}, allowed are {', '.join(GAMMA)}")
        self.name, self.tanh_gelu = name, tanh_gelu

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        if self.name == "gelu":
            return F.gelu(x, approximate="tanh" if self.tanh_gelu else "none")
        if self.name == "identity":
            return x
        return getattr(F, {"log_sigmoid": "logsigmoid", "soft_sign": "softsign"}.get(self.name, self.name))(x)


class MaxPoolSame(nn.Module):
    """Maxima of 3x3 windows at stride 2, padded as TensorFlow pads."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c i j"]:
        top, bottom = same_padding(x.shape[2], 3, 2)
        left, right = same_padding(x.shape[3], 3, 2)
        return F.max_pool2d(F.pad(x, (left, right, top, bottom), value=-math.inf), 3, 2)


class WSConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose weights are standardised in every forward pass: scaled weight standardisation (equation 1).

    Maps (b, in_channels, h, w) to (b, out_channels, ceil(h / stride), ceil(w / stride)). There is always a ``gain``,
    (out_channels, 1, 1, 1), and a bias. Each filter has mean 0 and, at gain 1, square sum 1, so that independent inputs
    of variance 1 give outputs of variance 1. ``input_scale`` multiplies the input, by way of the weights.

    ``numerics`` says what keeps σ = 0 from dividing: ``"official"`` max(N σ², 1e-4), ``"timm"`` N (σ² + 1e-5).
    ``padding`` is ``"same"``, as TensorFlow pads, or ``"symmetric"``; with stride 1 they are one.
    Raises ``ValueError`` for an even kernel, channels that do not divide into ``groups``, and other ``padding``s.

    >>> WSConv2d(3, 8, 3, stride=2)(torch.zeros(1, 3, 7, 10)).shape
    torch.Size([1, 8, 4, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        groups: int = 1,
        input_scale: float = 1.0,
        padding: str = "same",
        numerics: str = "official",
    ) -> None:
        if padding not in ("same", "symmetric"):
            raise ValueError(f"padding is {padding!r}, allowed are 'same' and 'symmetric'")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}, allowed are odd numbers from 1")
        if numerics not in NUMERICS:
            raise ValueError(f"numerics is {numerics!r}, allowed are 'timm' and 'official'")
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups is {groups} with {in_channels} and {out_channels} channels, allowed are divisors of both"
            )
        super().__init__(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups)
        self.gain = nn.Parameter(torch.ones(out_channels, 1, 1, 1))
        self.input_scale = input_scale
        self.same = padding == "same" and stride > 1 and kernel_size > 1
        self.numerics = numerics

    def standardised_weight(self) -> Float[Tensor, "o i k k"]:
        """Ŵ: what the layer convolves with."""
        w, fan_in = self.weight, self.weight[0].numel()
        if self.numerics == "timm":
            # batch norm with the filters in the place of channels, in one pass each way
            scale = (self.gain * (self.input_scale / math.sqrt(fan_in))).flatten()
            rows = w.reshape(1, self.out_channels, fan_in)
            return F.batch_norm(rows, None, None, scale, training=True, momentum=0.0, eps=1e-5).view_as(w)
        centred = w - w.mean((1, 2, 3), keepdim=True)
        power = centred.square().sum((1, 2, 3), keepdim=True)  # N σ²
        return centred * (self.gain * self.input_scale * power.clamp(min=1e-4).rsqrt())

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        padding = self.padding
        if self.same:
            top, bottom = same_padding(x.shape[2], self.kernel_size[0], self.stride[0])
            left, right = same_padding(x.shape[3], self.kernel_size[1], self.stride[1])
            x, padding = F.pad(x, (left, right, top, bottom)), 0
        return F.conv2d(x, self.standardised_weight(), self.bias, self.stride, padding, groups=self.groups)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, input_scale={self.input_scale:.4g}"


@dataclass(frozen=True)
class Design:
    """What the three families, and timm's readings of two of them, differ in."""

    stem: str  # "deep": four 3x3; "7x7": and max pooling; "3x3"; "small": 3x3 of stride 1, for images of 32 pixels
    activation: str
    bottleneck: float  # inner width of a block, of its output's; of its input's with `of_input`
    of_input: bool = False
    group_size: int = 0  # channels of a group in the 3x3 convolutions; 0: one group
    spatial: int = 1  # 3x3 convolutions in a block
    se_ratio: float = 0.0
    se_last: bool = True  # squeeze-and-excite after the last convolution, or before it
    shortcut: str = "pool"  # where resolution falls: 2x2 averages and a 1x1 convolution, or one of stride 2
    zero_classifier: bool = False
    # as timm reads the NF-ResNets and NF-RegNets: γ on every convolution, even the stem's, and not after the last
    # activation; no skip gain, but a gain of zero in the last convolution of a block; channels in multiples of 8
    timm: bool = False


NFNET = Design("deep", "gelu", 0.5, group_size=128, spatial=2, se_ratio=0.5)
NF_RESNET = Design("7x7", "relu", 0.25, shortcut="stride")
NF_REGNET = Design("3x3", "silu", 2.25, True, 8, se_ratio=0.5, se_last=False, zero_classifier=True)
TIMM_RESNET = replace(NF_RESNET, shortcut="pool", timm=True)
TIMM_REGNET = replace(NF_REGNET, zero_classifier=False, timm=True)


def multiple_of_8(count: float) -> int:
    """The nearest multiple of 8 that is not below nine tenths of ``count``: timm's channels."""
    near = max(8, int(count + 4) // 8 * 8)
    return near + 8 if near < 0.9 * count else near


class SqueezeExcite(nn.Module):
    """σ(W₂ relu(W₁ mean(x))): a gate (b, c, 1, 1) for x (b, c, h, w). The weights are not standardised."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 1 1"]:
        return self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class NFBlock(nn.Module):
    """x -> h(x) + α · skip gain · f(x / β): (b, in_channels, h, w) to (b, out_channels, h / stride, w / stride).

    ``variance`` is what the input is expected to have, β²; ``drop`` the probability that a sample loses f in training.
    Unlike most stochastic depth, that of the official code does not divide the survivors by their share.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        variance: float,
        *,
        design: Design,
        conv: Callable[..., WSConv2d],
        act: nn.Module,
        alpha: float = 0.2,
        drop: float = 0.0,
        first: bool = False,
    ) -> None:
        super().__init__()
        gamma = GAMMA[design.activation]
        ratio = 1.0 if design.of_input and first else design.bottleneck
        width = (in_channels if design.of_input else out_channels) * ratio
        width = multiple_of_8(width) if design.timm else int(width)
        groups = max(1, width // design.group_size) if design.group_size else 1
        if design.group_size:
            width = groups * design.group_size
        self.variance, self.alpha, self.drop, self.act = variance, alpha, drop, act
        scaled = gamma / math.sqrt(variance)
        self.conv1 = conv(in_channels, width, 1, input_scale=scaled)
        self.conv2 = conv(width, width, 3, stride, groups=groups, input_scale=gamma)
        self.conv2b = conv(width, width, 3, groups=groups, input_scale=gamma) if design.spatial == 2 else None
        self.conv3 = conv(width, out_channels, 1, input_scale=gamma)
        gated = out_channels if design.se_last else width
        hidden = max(1, int(gated * design.se_ratio))
        if design.timm:
            hidden = max(8, int(gated * design.se_ratio + 4) // 8 * 8)
        self.attn = SqueezeExcite(gated, hidden) if design.se_ratio and not design.se_last else None
        self.attn_last = SqueezeExcite(gated, hidden) if design.se_ratio and design.se_last else None
        self.skipinit_gain = None if design.timm else nn.Parameter(torch.zeros(()))
        self.downsample: nn.Sequential | None = None
        if stride > 1 or in_channels != out_channels:
            pool = stride > 1 and design.shortcut == "pool"
            self.downsample = nn.Sequential(
                OrderedDict(
                    # at an odd border it averages what there is
                    pool=nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if pool else nn.Identity(),
                    conv=conv(in_channels, out_channels, 1, 1 if pool else stride, input_scale=scaled),
                )
            )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        out = self.act(x)
        shortcut = x if self.downsample is None else self.downsample(out)
        out = self.conv2(self.act(self.conv1(out)))
        if self.conv2b is not None:
            out = self.conv2b(self.act(out))
        if self.attn is not None:
            out = out * (2 * self.attn(out))  # 2: a sigmoid halves what it gates
        out = self.conv3(self.act(out))
        # all that multiplies f is small, a number a channel or a sample, and meets the feature map in one pass
        scale: Tensor | float = self.alpha
        if self.skipinit_gain is not None:
            scale = scale * self.skipinit_gain
        if self.attn_last is not None:
            scale = scale * (2 * self.attn_last(out))
        if self.training and self.drop > 0.0:
            keep = torch.empty(len(x), 1, 1, 1, dtype=out.dtype, device=out.device).bernoulli_(1.0 - self.drop)
            scale = scale * keep
        if isinstance(scale, Tensor):
            return torch.addcmul(shortcut, out, scale)
        return torch.add(shortcut, out, alpha=scale)


class NFNet(Classifier):
    """A normaliser-free network over images (b, in_chans, h, w) that gives logits (b, num_classes).

    ``depths`` are the blocks of each stage, ``widths`` the channels they put out, ``stem_width`` those of the stem.
    ``head_width`` channels of a 1x1 convolution stand before the classifier; 0 leaves it out. ``drop_rate`` is the
    classifier's dropout, ``stochdepth_rate`` times index / blocks the chance of each block to be dropped.
    ``numerics`` chooses between two readings of what the papers leave open, WS's epsilon and whether GELU is exact:
    ``"timm"`` gives the logits of timm's ``dm_nfnet_*``, ``"official"`` those of the official code.

    Raises ``ValueError`` for an unknown ``activation`` or ``numerics`` and for impossible sizes and rates.

    >>> net = NFNet((1, 1), (16, 32), design=replace(NF_RESNET, stem="small"), num_classes=10)
    >>> net(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    classifier_name = "head.fc"
    default_cfg: ClassVar[dict] = {
        "input_size": (3, 224, 224),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "interpolation": "bicubic",
        "crop_pct": 0.9,
    }

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        design: Design = NFNET,
        stem_width: int | None = None,
        head_width: int = 0,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        stochdepth_rate: float = 0.0,
        alpha: float = 0.2,
        numerics: str = "timm",
    ) -> None:
        super().__init__()
        if not depths or len(depths) != len(widths) or min(*depths, *widths) < 1:
            raise ValueError(
                f"depths is {tuple(depths)} and widths is {tuple(widths)}, allowed are as many of the one as of the "
                "other, all at least 1"
            )
        for name, count in (("in_chans", in_chans), ("stem_width", 1 if stem_width is None else stem_width)):
            if count < 1:
                raise ValueError(f"{name} is {count}, allowed is {name} >= 1")
        for name, rate in (("drop_rate", drop_rate), ("stochdepth_rate", stochdepth_rate)):
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"{name} is {rate}, allowed is 0 <= {name} < 1")
        if not alpha > 0.0:
            raise ValueError(f"alpha is {alpha}, allowed is alpha > 0")
        if numerics not in NUMERICS:
            raise ValueError(f"numerics is {numerics!r}, allowed are 'timm' and 'official'")
        if design.group_size and min(widths) * design.bottleneck < design.group_size and not design.of_input:
            raise ValueError(
                f"widths is {tuple(widths)}, allowed are widths whose inner width, {design.bottleneck:g} of them, "
                f"holds a group of {design.group_size}"
            )
        self.act = Activation(design.activation, tanh_gelu=numerics == "official")
        self.gamma = GAMMA[design.activation]
        self.in_chans, self.design = in_chans, design

        def conv(i: int, o: int, kernel: int, stride: int = 1, groups: int = 1, input_scale: float = 1.0) -> WSConv2d:
            # timm's own nets pad symmetrically; its dm_nfnet_* as TensorFlow
            padding = "symmetric" if design.timm else "same"
            return WSConv2d(
                i, o, kernel, stride, groups=groups, input_scale=input_scale, padding=padding, numerics=numerics
            )

        channels = stem_width or widths[0] // 2
        self._build_stem(conv, channels)
        index, variance = 0, 1.0
        self.stages = nn.Sequential()
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            blocks = nn.Sequential()
            for b in range(depth):
                halves = b == 0 and (stage > 0 or design.stem == "3x3")
                drop = stochdepth_rate * index / sum(depths)
                blocks.append(
                    NFBlock(
                        channels,
                        width,
                        2 if halves else 1,
                        variance,
                        design=design,
                        conv=conv,
                        act=self.act,
                        alpha=alpha,
                        drop=drop,
                        first=index == 0,
                    )
                )
                # the shortcut of a stage's first block is a convolution, which starts again from variance 1
                variance = (1.0 if b == 0 else variance) + alpha**2
                channels, index = width, index + 1
            self.stages.append(blocks)
        self.final_conv = None
        if head_width:
            self.final_conv = conv(channels, head_width, 1, input_scale=self.gamma if design.timm else 1.0)
        self.num_features = head_width or channels
        self.head = nn.Sequential(OrderedDict(drop=nn.Dropout(drop_rate), fc=nn.Identity()))
        self.reset_classifier(num_classes)
        self.reset_parameters()

    def _build_stem(self, conv: Callable[..., WSConv2d], width: int) -> None:
        first = self.gamma if self.design.timm else 1.0
        if self.design.stem == "deep":
            layers = OrderedDict(conv1=conv(self.in_chans, 16, 3, 2, input_scale=first))
            for i, (before, after, stride) in enumerate(((16, 32, 1), (32, 64, 1), (64, width, 2)), start=2):
                layers[f"act{i}"] = self.act
                layers[f"conv{i}"] = conv(before, after, 3, stride, input_scale=self.gamma)
            self.stem = nn.Sequential(layers)
        elif self.design.stem in ("7x7", "3x3", "small"):
            kernel, stride = {"7x7": (7, 2), "3x3": (3, 2), "small": (3, 1)}[self.design.stem]
            self.stem = nn.Sequential(OrderedDict(conv=conv(self.in_chans, width, kernel, stride, input_scale=first)))
            if self.design.stem == "7x7":
                self.stem.add_module("pool", nn.MaxPool2d(3, 2, 1) if self.design.timm else MaxPoolSame())
        else:
            raise ValueError(f"stem is {self.design.stem!r}, allowed are 'deep', '7x7', '3x3' and 'small'")

    def reset_parameters(self) -> None:
        """Weights N(0, 1/N), gains 1, biases 0, skip gains 0; the classifier N(0, 0.01²), in NF-RegNets 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="linear")
                nn.init.zeros_(module.bias)
            if isinstance(module, WSConv2d):
                nn.init.ones_(module.gain)
            if isinstance(module, NFBlock):
                nn.init.zeros_(module.conv3.gain if module.skipinit_gain is None else module.skipinit_gain)
        if self.num_classes:
            self._init_classifier(self.head.fc)

    def _init_classifier(self, layer: nn.Linear) -> nn.Linear:
        if self.design.zero_classifier:
            nn.init.zeros_(layer.weight)
        else:
            nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
        return layer

    def forward_stages(self, x: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """The output of every stage, from fine to coarse: what detectors and segmenters stand on."""
        if x.shape[1] != self.in_chans:
            raise ValueError(f"x has {x.shape[1]} channels, allowed is in_chans = {self.in_chans}")
        x, outputs = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """The last map, activated: (b, num_features, h', w')."""
        x = self.forward_stages(x)[-1]
        if self.final_conv is not None:
            x = self.final_conv(x)
        x = self.act(x)
        return x if self.design.timm else x * self.gamma

    def forward_head(self, x: Float[Tensor, "b d h w"], pre_logits: bool = False) -> Float[Tensor, "b n"]:
        """Average pooling, dropout and, unless ``pre_logits``, the classifier."""
        x = self.head.drop(x.mean((2, 3)))
        return x if pre_logits else self.head.fc(x)

    def new_classifier(self, num_classes: int) -> nn.Linear:
        return self._init_classifier(super().new_classifier(num_classes))

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """timm's ``dm_nfnet_*``, ``nf_resnet*`` and ``nf_regnet_*`` keys are ours; a Haiku tree is renamed.

        A wrapper's ``module.`` or ``backbone.`` in front is taken away. Raises ``ValueError`` for timm's ``nfnet_*``.
        """
        if any("/" in key for key in state):
            return convert_haiku(state)
        state = strip_prefixes(state, ("module.", "backbone."))
        if "stem.conv1.weight" in state and not any(key.endswith("skipinit_gain") for key in state):
            raise ValueError(
                "the checkpoint has no skip gains: it is of timm's nfnet_* (or eca_nfnet_*), another network with the "
                "same names, whose activations, padding and gains differ; allowed are timm's dm_nfnet_*, the paper's own"
            )
        return state


@dataclass(frozen=True)
class Signal:
    """What a block (0: the stem) puts out: the channels' mean variance, as predicted and found, and squared mean."""

    block: int
    expected_variance: float
    variance: float
    squared_mean: float


@torch.no_grad()
def signal_propagation(model: NFNet, x: Float[Tensor, "b c h w"], skip_gain: float = 1.0) -> list[Signal]:
    """The signal propagation plot of arXiv 2101.08692: variance and squared mean, averaged over channels, by block.

    The residual branches count with ``skip_gain``, whatever the model's own gains; the model stays as it is. Meant for
    initialised networks and normally distributed ``x``.

    >>> plot = signal_propagation(NFNet((3, 4), (64, 128), design=NF_RESNET), torch.randn(2, 3, 64, 64))
    >>> [round(signal.expected_variance, 2) for signal in plot[:5]]
    [1.0, 1.04, 1.08, 1.12, 1.04]
    """

    def signal(number: int, expected: float) -> Signal:
        variance = x.var((0, 2, 3), correction=0).mean().item()
        return Signal(number, expected, variance, x.mean((0, 2, 3)).square().mean().item())

    # with a gain g the variance grows by (α g)² a block; β stays what it was built for
    training, x = model.training, model.eval().stem(x)
    signals, variance = [signal(0, 1.0)], 1.0
    for block in (block for stage in model.stages for block in stage):
        parameter = block.conv3.gain if block.skipinit_gain is None else block.skipinit_gain
        kept = parameter.detach().clone()
        parameter.fill_(skip_gain)
        x = block(x)
        parameter.copy_(kept)
        variance = (variance if block.downsample is None else 1.0) + (block.alpha * skip_gain) ** 2
        signals.append(signal(len(signals), variance))
    model.train(training)
    return signals
