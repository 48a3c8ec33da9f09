"""Makes the golden vectors of octave convolution.

    python tests/golden/octave_convolution/make.py CHECKOUT_OF_OCTCONV CHECKOUT_OF_OCTCONV_PYTORCH

The first is the official code (github.com/facebookresearch/OctConv, MIT). Its MXNet symbol networks run as they are:
below, each operator that they call is computed at once by PyTorch, under the name that MXNet would give to its weights.
The second (github.com/d-li14/octconv.pytorch, Apache-2.0) runs as it is. The states are fixed functions of each tensor's
name and shape (``golden_state`` of involution), computed in float64; only outputs and gradients are kept.
"""

import hashlib
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2]))

from tests.golden.involution.make import draw, golden_state, load  # noqa: E402

# a name: alpha, squeeze-and-excitation, groups and width of the inner channels of the official networks kept here
OFFICIAL = {"a0125": (0.125, False, 1, 1.0), "a05se": (0.5, True, 1, 1.0), "next": (0.25, False, 32, 2.0)}


def official_value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight of the official network: what ``golden_state`` gives for its name, with MXNet's words turned into ours."""
    theirs = {"moving_var": "running_var", "gamma": "weight", "beta": "bias"}
    for word, ours in theirs.items():
        name = name.replace(word, ours)
    return golden_state({name: torch.empty(shape)})[name].double()


class Symbol:
    """A tensor that behaves as a symbol of one output: it has length 1 and iterates over itself."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    def __len__(self) -> int:
        return 1

    def __iter__(self):
        yield self


def stand_in(image: torch.Tensor, state: dict[str, torch.Tensor]) -> types.ModuleType:
    """MXNet's symbols, evaluated; what they use of weights is written to ``state``."""

    def weight(name: str, *shape: int) -> torch.Tensor:
        return state.setdefault(name, official_value(name, shape))

    def convolution(data, num_filter, kernel, stride=(1, 1), pad=(0, 0), num_group=1, no_bias=True, name=None):
        w = weight(f"{name}_weight", num_filter, data.value.shape[1] // num_group, *kernel)
        return Symbol(F.conv2d(data.value, w, None, stride, pad, 1, num_group))

    def pooling(data, pool_type, kernel, stride=(1, 1), pad=(0, 0), global_pool=False, name=None):
        if global_pool:
            return Symbol(data.value.mean((2, 3), keepdim=True))
        function = F.avg_pool2d if pool_type == "avg" else F.max_pool2d
        return Symbol(function(data.value, kernel, stride, pad))

    def batch_norm(data, fix_gamma, momentum, eps, name):
        x, c = data.value, data.value.shape[1]
        gamma, beta = weight(f"{name}_gamma", c), weight(f"{name}_beta", c)
        mean, var = weight(f"{name}_moving_mean", c), weight(f"{name}_moving_var", c)
        return Symbol(F.batch_norm(x, mean, var, gamma, beta, False, 0.0, eps))

    def fully_connected(data, num_hidden, no_bias=False, name=None):
        x = data.value.flatten(1)
        w = weight(f"{name}_weight", num_hidden, x.shape[1])
        return Symbol(F.linear(x, w, None if no_bias else weight(f"{name}_bias", num_hidden)))

    def activation(data, act_type, name=None):
        return Symbol(getattr(torch, act_type)(data.value))

    def upsampling(data, scale, sample_type, num_args):
        return Symbol(F.interpolate(data.value, scale_factor=scale, mode=sample_type))

    sym = types.ModuleType("mxnet.symbol")
    sym.Convolution, sym.Pooling, sym.BatchNorm, sym.Activation = convolution, pooling, batch_norm, activation
    sym.FullyConnected, sym.UpSampling = fully_connected, upsampling
    sym.ElementWiseSum = lambda *data, name=None: Symbol(sum(d.value for d in data))
    sym.Concat = lambda *data, dim=1, name=None: Symbol(torch.cat([d.value for d in data], dim))
    sym.broadcast_mul = lambda a, b, name=None: Symbol(a.value * b.value)
    sym.expand_dims = lambda data, axis, name=None: Symbol(data.value.unsqueeze(axis))
    sym.Flatten = lambda data, name=None: Symbol(data.value.flatten(1))
    sym.Cast = lambda data, dtype: data
    sym.Variable = lambda name: Symbol(image)
    mx = types.ModuleType("mxnet")
    mx.sym = mx.symbol = sym
    return mx


def official(checkout: Path, image: torch.Tensor, alpha: float, se: bool, groups: int, scaler: float):
    """The official network with one block a stage over ``image`` in eval mode: logits, and the state it used."""
    state: dict[str, torch.Tensor] = {}
    mx = stand_in(image, state)
    sys.modules |= {"mxnet": mx, "mxnet.symbol": mx.symbol}
    for name in ("symbol_basic", "symbol_octconv", "symbol_seblock", "symbol_resblock", "symbol_resnetv2"):
        module = load(name, checkout / "utils" / "symbol" / f"{name}.py")
    module.resenet_spec[14] = dict.fromkeys((2, 3, 4, 5), 1)
    return module.get_linear(50, 14, groups, scaler, alpha, use_se=se).value, state


def main(theirs: Path, ported: Path) -> None:
    golden = {}
    for name, options in OFFICIAL.items():
        logits, state = official(theirs, draw(1, 2, 3, 64, 64), *options)
        golden[f"official_{name}"] = logits
        keys = "\n".join(" ".join([key, *map(str, value.shape)]) for key, value in state.items())
        golden[f"official_{name}.keys"] = torch.tensor(list(keys.encode()), dtype=torch.uint8)
    sys.path.insert(0, str(ported))
    resnet, mobile = load("oct_resnet", ported / "oct_resnet.py"), load("oct_mobilenet", ported / "oct_mobilenet.py")
    nets = {
        "resnet": resnet.OctResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=50),
        "mobilenet": mobile.OctMobileNet(num_classes=50),
    }
    for name, net in nets.items():
        net = net.double()
        net.load_state_dict(golden_state(net.state_dict()))
        for mode in ("eval", "train"):
            net.train(mode == "train")
            golden[f"{name}_{mode}"] = net(draw(2, 4, 3, 64, 64))
        golden[f"{name}_train"].square().mean().backward()
        stem = net.conv1 if name == "resnet" else net.features[0][0]
        golden[f"{name}_grad"] = stem.weight.grad[:4]
    with torch.device("meta"):
        keys = [f"{k} {tuple(v.shape)}" for k, v in resnet.oct_resnet50().state_dict().items()]
    digest = hashlib.sha256("\n".join(sorted(keys)).encode()).digest()
    golden["resnet50.keys"] = torch.tensor(list(digest), dtype=torch.uint8)
    golden = {key: value.detach().float() if value.is_floating_point() else value for key, value in golden.items()}
    save_file({key: value.contiguous() for key, value in golden.items()}, HERE / "golden.safetensors")
    print(HERE / "golden.safetensors", (HERE / "golden.safetensors").stat().st_size, "bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
