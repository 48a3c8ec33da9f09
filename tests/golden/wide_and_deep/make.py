"""Golden vectors of the official code (google-research/google-research): python make.py CHECKOUT.

CHECKOUT holds the folder do_wide_and_deep_networks_learn_the_same_things. Its efficient_CKA.py and resnet_cifar.py are
TensorFlow; they are run on a stand-in for the few functions and Keras layers that they call, each written here with NumPy or
PyTorch in float64: what is recorded is how the official code puts them together. Keras layers compute at once, on the images
that ``Input`` gives, with random weights that are recorded beside the results. The vectors here were made from the text of the
two files without their comments and without ``train_step``, which nothing calls.
"""

import importlib
import sys
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

rng = np.random.RandomState(0)
variables: dict[str, torch.Tensor] = {}
layers: list[tuple[str, torch.Tensor]] = []
# grey levels and short fractions, so that the file stays small
IMAGES = torch.from_numpy(np.round(255 * rng.rand(2, 32, 32, 3)) / 255)


class Variable(np.ndarray):
    def assign_add(self, value):
        self += value


class Metric:
    def add_weight(self, name, shape, initializer, dtype):
        return np.zeros(shape, dtype).view(Variable)


def set_diag(matrix, diagonal):
    matrix = np.array(matrix)
    np.fill_diagonal(matrix, diagonal)
    return matrix


def assert_equal(a, b, message):
    assert a == b, message


def record(kind, output):
    layers.append((kind, output))
    return output


def variable(kind, part, *shape, positive=False):
    number = sum(name.startswith(kind) and name.endswith(f"/{part}:0") for name in variables)
    drawn = 0.5 + rng.rand(*shape) if positive else 0.4 * rng.randn(*shape)
    value = torch.from_numpy(np.round(256 * drawn) / 256).requires_grad_()
    variables[f"{kind}_{number}/{part}:0" if number else f"{kind}/{part}:0"] = value
    return value


class Conv2D:
    def __init__(self, filters, kernel_size, strides, padding, **_):
        assert padding == "same"
        self.filters, self.size, self.stride = filters, kernel_size, strides

    def __call__(self, x):
        kernel = variable("conv2d", "kernel", self.size, self.size, x.shape[3], self.filters)
        bias = variable("conv2d", "bias", self.filters)
        pads = []
        for side in (x.shape[2], x.shape[1]):
            total = max((-(-side // self.stride) - 1) * self.stride + self.size - side, 0)
            pads += [total // 2, total - total // 2]
        x = F.pad(x.permute(0, 3, 1, 2), pads)
        return record("conv2d", F.conv2d(x, kernel.permute(3, 2, 0, 1), bias, self.stride).permute(0, 2, 3, 1))


class BatchNormalization:
    def __call__(self, x):
        gamma, beta = (
            variable("batch_normalization", "gamma", x.shape[3]),
            variable("batch_normalization", "beta", x.shape[3]),
        )
        mean = variable("batch_normalization", "moving_mean", x.shape[3])
        var = variable("batch_normalization", "moving_variance", x.shape[3], positive=True)
        return record("batch_normalization", gamma * (x - mean) / (var + 1e-3).sqrt() + beta)


class Activation:
    def __init__(self, name):
        assert name == "relu"

    def __call__(self, x):
        return record("activation", x.clamp(min=0))


class AveragePooling2D:
    def __init__(self, pool_size):
        self.size = pool_size

    def __call__(self, x):
        return record("average_pooling2d", F.avg_pool2d(x.permute(0, 3, 1, 2), self.size).permute(0, 2, 3, 1))


class Flatten:
    def __call__(self, x):
        return record("flatten", x.flatten(1))


class Dense:
    def __init__(self, units, **_):
        self.units = units

    def __call__(self, x):
        kernel, bias = variable("dense", "kernel", x.shape[1], self.units), variable("dense", "bias", self.units)
        return record("dense", x @ kernel + bias)


class Model:
    def __init__(self, inputs, outputs):
        self.outputs = outputs


def stand_in():
    tf, compat, root, absl = (
        types.ModuleType(name) for name in ("tensorflow.compat.v2", "compat", "tensorflow", "absl")
    )
    space = types.SimpleNamespace
    tf.enable_v2_behavior = lambda: None
    tf.float32, tf.sqrt, tf.einsum, tf.convert_to_tensor = np.float32, np.sqrt, np.einsum, np.array
    tf.shape, tf.zeros, tf.assert_equal, tf.reduce_sum = np.shape, np.zeros, assert_equal, np.sum
    tf.reshape, tf.stack = np.reshape, np.stack
    tf.cast = lambda value, dtype: np.asarray(value).astype(dtype)
    tf.matmul = lambda a, b, transpose_b=False: a @ (b.T if transpose_b else b)
    tf.linalg = space(set_diag=set_diag, diag_part=np.diag)
    tf.keras = space(
        metrics=space(Metric=Metric),
        initializers=space(zeros=None),
        regularizers=space(l2=lambda weight: weight),
        layers=space(
            Conv2D=Conv2D,
            BatchNormalization=BatchNormalization,
            Activation=Activation,
            AveragePooling2D=AveragePooling2D,
            Flatten=Flatten,
            Dense=Dense,
            add=lambda both: record("add", both[0] + both[1]),
        ),
        Input=lambda shape: record("input", IMAGES),
        Model=Model,
    )
    absl.logging = None
    compat.v2, root.compat = tf, compat
    sys.modules |= {"tensorflow": root, "tensorflow.compat": compat, "tensorflow.compat.v2": tf, "absl": absl}


def main(checkout):
    stand_in()
    sys.path.insert(0, checkout)
    folder = "do_wide_and_deep_networks_learn_the_same_things"
    cka = importlib.import_module(f"{folder}.efficient_CKA").MinibatchCKA
    resnet = importlib.import_module(f"{folder}.resnet_cifar").ResNet_CIFAR

    # three batches, the last one smaller, of two and of three layers
    first = [[rng.randn(n, 3, 2), rng.rand(n, 7)] for n in (9, 9, 6)]
    second = [
        [rng.randn(n, 5), 3 + rng.rand(n, 2, 2), x.reshape(n, -1)[:, ::-1].copy()]
        for n, (x, _) in zip((9, 9, 6), first, strict=True)
    ]
    within, across = cka(2, dtype=np.float64), cka(2, 3, across_models=True, dtype=np.float64)
    for a, b in zip(first, second, strict=True):
        within.update_state(a)
        across.update_state_across_models(a, b)
    arrays = {"within": within.result(), "across": across.result()}
    for name, batches in (("first", first), ("second", second)):
        for i, batch in enumerate(batches):
            arrays |= {f"{name}/{i}/{j}": x for j, x in enumerate(batch)}

    logits = resnet(14, 0.125, 1e-4, 10).outputs
    logits.square().sum().backward()
    arrays |= {"images": np.round(255 * IMAGES.numpy()).astype(np.uint8), "logits": logits.detach().numpy()}
    arrays |= {"kinds": np.array([kind for kind, _ in layers])}
    arrays |= {"means": np.array([x.mean().item() for _, x in layers])}
    arrays |= {"deviations": np.array([x.std().item() for _, x in layers])}
    for name, value in variables.items():
        arrays[f"variables/{name}"] = value.detach().numpy()
        if value.grad is not None and value.grad.numel() < 200:
            arrays[f"gradients/{name}"] = value.grad.numpy()
    np.savez_compressed(Path(__file__).with_name("official.npz"), **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
