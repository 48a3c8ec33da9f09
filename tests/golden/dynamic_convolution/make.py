"""Makes the golden vectors of dynamic convolution with the best known re-implementation, since no code was released.

    python tests/golden/dynamic_convolution/make.py CHECKOUT_OF_DYNAMIC_CONVOLUTION_PYTORCH

(github.com/kaijieshi7/Dynamic-convolution-Pytorch.) Its layers run as they are; their states are fixed functions of the
tensors' names and shapes (``golden_state`` of involution), in float64; only outputs and gradients are kept.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2]))

from tests.golden.involution.make import draw, golden_state, load  # noqa: E402

# a name: dimensions, channels in and out, kernel, stride, padding, groups, bias, times the temperature was lowered from 34
LAYERS = {
    "dense": (2, 16, 8, 3, 2, 1, 1, True, 0),
    "pointwise": (2, 16, 8, 1, 1, 0, 1, False, 11),
    "depthwise": (2, 16, 16, 3, 1, 1, 16, True, 5),
    "line": (1, 16, 8, 3, 1, 1, 2, True, 8),
}


def inputs(dims: int) -> torch.Tensor:
    return draw(3, 3, 16, *(9, 6)[:dims])


def main(checkout: Path) -> None:
    module = load("dynamic_conv", checkout / "dynamic_conv.py")
    golden = {}
    for name, (dims, c_in, c_out, kernel, stride, padding, groups, bias, steps) in LAYERS.items():
        build = module.Dynamic_conv2d if dims == 2 else module.Dynamic_conv1d
        layer = build(c_in, c_out, kernel, stride=stride, padding=padding, groups=groups, bias=bias).double()
        state = golden_state(layer.state_dict())
        layer.load_state_dict({key: value.double() for key, value in state.items()})
        for _ in range(steps):
            layer.update_temperature()
        x = inputs(dims).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        golden[f"{name}.y"], golden[f"{name}.grad_x"] = y, x.grad[:1]
        golden[f"{name}.grad_fc1"] = layer.attention.fc1.weight.grad
    golden = {key: value.detach().float().contiguous() for key, value in golden.items()}
    save_file(golden, HERE / "golden.safetensors")
    print(HERE / "golden.safetensors", (HERE / "golden.safetensors").stat().st_size, "bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
