"""Variables of TensorFlow's EfficientNet checkpoints, in PyTorch's kinds and axes."""

from collections.abc import Mapping

import torch
from numpy.typing import NDArray
from torch import Tensor

_KINDS = {
    "kernel": "weight",
    "depthwise_kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "bias": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_SHADOW = "/ExponentialMovingAverage"


def torch_variables(arrays: Mapping[str, NDArray | Tensor], *, ema: bool = True) -> dict[tuple[str, str], Tensor]:
    """``MODEL/blocks_3/conv2d_1/kernel`` -> array as (``blocks_3/conv2d_1``, ``weight``) -> tensor.

    Kernels turn from (h, w, in, out) to (out, in, h, w), depthwise ones from (h, w, c, 1) to (c, 1, h, w), dense ones from
    (in, out) to (out, in). With ``ema`` the shadow (``…/ExponentialMovingAverage``) is taken where there is one, as in the
    papers' evaluation. Optimizer slots and counters are left out.

    >>> list(torch_variables({"net/head/dense/kernel": torch.zeros(3, 5)}).items())[0][1].shape
    torch.Size([5, 3])
    """
    chosen = {name: value for name, value in arrays.items() if not name.endswith(_SHADOW)}
    if ema:
        chosen |= {name.removesuffix(_SHADOW): value for name, value in arrays.items() if name.endswith(_SHADOW)}
    variables = {}
    for name, value in chosen.items():
        scope, _, variable = name.rpartition("/")
        if variable not in _KINDS:
            continue
        tensor = torch.as_tensor(value)
        if variable == "depthwise_kernel":
            tensor = tensor.permute(2, 3, 0, 1).reshape(-1, 1, *tensor.shape[:2])
        elif variable == "kernel":
            tensor = tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.t()
        variables[scope.partition("/")[2], _KINDS[variable]] = tensor.contiguous()
    return variables
