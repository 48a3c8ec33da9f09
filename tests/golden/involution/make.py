"""Makes the golden vectors of involution with the official code (github.com/d-li14/involution, MIT).

    python tests/golden/involution/make.py PATH_OF_A_CHECKOUT

The official files run as they are, on their naive operator; small stand-ins take the place of what they import from
mmcv and mmcls. The state of the small RedNet is a fixed function of each tensor's name and shape (``golden_state``),
so that only outputs and gradients have to be kept; all is computed in float64 and kept in float32.
"""

import hashlib
import importlib.util
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).parent


def golden_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Values for ``state``: a function of the tensors' official names and shapes alone."""
    filled = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            filled[name] = tensor.clone()
            continue
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
        values = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
        if name.endswith("running_var"):
            values = values.abs() + 0.5
        elif tensor.ndim == 4:
            values = values * (2 / tensor[0].numel()) ** 0.5
        elif name.endswith("weight") and tensor.ndim == 1:
            values = 1 + 0.2 * values
        else:
            values = 0.1 * values
        filled[name] = values
    return filled


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


class ConvModule(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, conv_cfg=None, **options):
        super().__init__()
        norm, act = options.get("norm_cfg"), options.get("act_cfg", {"type": "ReLU"})
        # mmcv leaves the bias out where a norm follows
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=not norm)
        if norm:
            self.bn = nn.BatchNorm2d(out_channels)
        self.activate = nn.ReLU() if act else nn.Identity()

    def forward(self, x):
        x = self.conv(x)
        return self.activate(self.bn(x) if hasattr(self, "bn") else x)


def load(name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def official_classes(checkout: Path):
    """The official operator and backbone, with stand-ins for mmcv's and mmcls's helpers."""
    cnn = types.ModuleType("mmcv.cnn")
    cnn.ConvModule = ConvModule
    cnn.build_conv_layer = lambda config, *args, **options: nn.Conv2d(*args, **options)
    cnn.build_norm_layer = lambda config, n, postfix="": (f"bn{postfix}", nn.BatchNorm2d(n))
    cnn.constant_init = cnn.kaiming_init = lambda *args: None
    wrapper = types.ModuleType("mmcv.utils.parrots_wrapper")
    wrapper._BatchNorm = nn.BatchNorm2d
    builder = types.ModuleType("official.models.builder")
    builder.BACKBONES = types.SimpleNamespace(register_module=lambda: lambda cls: cls)
    base = types.ModuleType("official.models.backbones.base_backbone")
    base.BaseBackbone = nn.Module
    for name in (
        "mmcv",
        "mmcv.utils",
        "official",
        "official.models",
        "official.models.backbones",
        "official.models.utils",
    ):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []
    for module in (cnn, wrapper, builder, base):
        sys.modules[module.__name__] = module
    models = checkout / "cls" / "mmcls" / "models"
    # the naive operator stands for the CUDA one
    operator = load("official.models.utils.involution_cuda", models / "utils" / "involution_naive.py")
    backbone = load("official.models.backbones.rednet", models / "backbones" / "rednet.py")
    return operator.involution, backbone.RedNet


def main(checkout: Path) -> None:
    involution, rednet = official_classes(checkout)
    golden = {}
    for name, channels, kernel_size, stride, side in [("s1", 32, 7, 1, 6), ("s2", 32, 5, 2, 6)]:
        layer = involution(channels, kernel_size, stride).double()
        layer.load_state_dict(golden_state(layer.state_dict()))
        x = draw(1, 1, channels, side, side).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        golden[f"layer_{name}.y"], golden[f"layer_{name}.grad_x"] = y.detach(), x.grad
        golden[f"layer_{name}.grad_weight"] = layer.conv2.conv.weight.grad.flatten(1)
    # RedNet-26 at a sixteenth of its width, the official constructor's own options
    net = rednet(26, stem_channels=32, base_channels=16)
    net = net.double()
    net.load_state_dict(golden_state(net.state_dict()))
    x = draw(2, 2, 3, 64, 64)
    for mode in ("train", "eval"):
        net.train(mode == "train")
        golden[f"rednet.{mode}"] = net(x).detach()[:, ::8]
    keys = [f"{key} {tuple(value.shape)}" for key, value in net.state_dict().items()]
    with torch.device("meta"):
        keys += [f"50 {key} {tuple(value.shape)}" for key, value in rednet(50).state_dict().items()]
    golden["keys.sha256"] = torch.tensor(
        list(hashlib.sha256("\n".join(sorted(keys)).encode()).digest()), dtype=torch.uint8
    )
    golden = {key: value.float() if value.is_floating_point() else value for key, value in golden.items()}
    save_file({key: value.contiguous() for key, value in golden.items()}, HERE / "golden.safetensors")
    print(HERE / "golden.safetensors", (HERE / "golden.safetensors").stat().st_size, "bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
