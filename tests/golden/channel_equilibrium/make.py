"""Makes the golden vectors of channel equilibrium with the official code (github.com/Tangshitao/CENet, no licence).

    python -m tests.golden.channel_equilibrium.make PATH_OF_A_CHECKOUT

The official files run as they are, in float64, with weights that are a fixed function of each tensor's name and shape;
only outputs, gradients and running statistics are kept, in float32. Buffers that the official constructor expands are
copied first, since nothing can be written into them today, and the average pooling takes maps of any size.
"""

import hashlib
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.golden.involution.make import draw, golden_state

HERE = Path(__file__).parent
LAYERS = {"d16": (32, 16), "d8": (24, 16)}  # channels, group size asked for


def weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fixed weights for ``state``; statistics stay as the constructor made them."""
    filled = golden_state(state)
    return {k: state[k].clone() if ".running_" in f".{k}" else filled[k].to(state[k].dtype) for k in state}


def prepare(module: torch.nn.Module) -> torch.nn.Module:
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.clone())
    module.double().load_state_dict(weights(module.state_dict()))
    return module


def main(checkout: Path) -> None:
    sys.path[:0] = [str(checkout), str(checkout / "imagenet")]
    import importlib.util

    from devkit.ops.CE_module import CE

    spec = importlib.util.spec_from_file_location("resnet_v1_ce", checkout / "imagenet" / "models" / "resnet_v1_ce.py")
    resnet = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(resnet)
    eye = torch.eye
    torch.eye = lambda *args, **options: eye(*args, dtype=torch.float64, **options)  # the official one is in float32
    golden = {}
    for name, (channels, size) in LAYERS.items():
        layer = prepare(CE(channels, num_channels=size)).train()
        x = (1.5 * draw(1, 4, channels, 5, 3) + 0.5).requires_grad_()
        y = layer(x)
        y.square().mean().backward()
        golden |= {
            f"{name}.y": y.detach()[:, ::3],
            f"{name}.grad_x": x.grad[:, ::3],
            f"{name}.grad_w": layer.x_weight.grad,
        }
        golden[f"{name}.grad_fc"] = layer.AR.fc[0].weight.grad
        layer(draw(2, 4, channels, 5, 3))
        for buffer in ("running_mean", "running_wm"):
            golden[f"{name}.{buffer}"] = getattr(layer, buffer)
        golden[f"{name}.running_scale"] = layer.AR.running_scale
        golden[f"{name}.eval"] = layer.eval()(x).detach()[:, ::3]
    net = prepare(resnet.ResNetV1CE(resnet.Bottleneck, [1, 1, 1, 1], num_classes=10))
    net.avgpool = torch.nn.AdaptiveAvgPool2d(1)
    for step, mode in enumerate(("train", "again", "eval")):
        net.train(mode != "eval")
        golden[f"resnet.{mode}"] = net(draw(3 + step, 4, 3, 64, 64)).detach()
    net = resnet.resnetv1ce50()
    keys = [f"{key} {tuple(value.shape)}" for key, value in net.state_dict().items()]
    digest = hashlib.sha256("\n".join(sorted(keys)).encode()).digest()
    golden = {key: value.float().contiguous() for key, value in golden.items()}
    golden["keys.sha256"] = torch.tensor(list(digest), dtype=torch.uint8)
    save_file(golden, HERE / "golden.safetensors")
    print(HERE / "golden.safetensors", (HERE / "golden.safetensors").stat().st_size, "bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
