"""Golden vectors of the official MixMatch code (google-research/mixmatch): python make.py CHECKOUT.

The official files are TensorFlow 1. They are run as they are, on a stand-in for the few functions of TensorFlow that they
call, each written here with NumPy (convolutions with PyTorch): what is recorded is how the official code puts them
together. Random draws are recorded beside the results.
"""

import contextlib
import importlib
import sys
import types
from pathlib import Path

import numpy as np
import torch

CLASSES, BATCH, SHAPE = 3, 5, (2, 2, 1)
draws: dict[str, list[np.ndarray]] = {"weights": [], "orders": []}
scalars: dict[str, float] = {}
variables: dict[str, np.ndarray] = {}
rng = np.random.RandomState(0)


class Array(np.ndarray):
    def get_shape(self):
        return self.shape


def array(x):
    return np.asarray(x, dtype=np.float64).view(Array)


def record(kind, value):
    draws[kind].append(np.asarray(value))
    return value


class Beta:
    def __init__(self, a, b):
        self.a, self.b = a, b

    def sample(self, shape):
        return array(record("weights", rng.beta(self.a, self.b, shape)))


class Optimizer:
    def __init__(self, lr):
        pass

    def minimize(self, loss, **kwargs):
        scalars["total"] = float(loss)


class Average:
    def __init__(self, decay):
        pass

    def apply(self, variables):
        return None


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return array(e / e.sum(-1, keepdims=True))


def cross_entropy(labels, logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return -(labels * (shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))).sum(-1)


def variable(kind, name, shape, positive=False):
    """The variables in the order in which the code makes them, numbered as TensorFlow numbers their layers."""
    layer = variable.layer[kind]
    scope = f"{kind}_{layer}" if layer else kind
    values = rng.standard_normal(shape) * 0.3
    variables[f"classify/{scope}/{name}"] = np.abs(values) + 0.5 if positive else values
    return variables[f"classify/{scope}/{name}"]


def conv2d(x, filters, size, strides=1, padding="valid", **kwargs):
    kernel = variable("conv2d", "kernel", (size, size, x.shape[3], filters))
    bias = variable("conv2d", "bias", (filters,))
    variable.layer["conv2d"] += 1
    assert padding == "same"
    inputs = torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)
    pads = []
    for side in (inputs.shape[3], inputs.shape[2]):
        total = max((-(-side // strides) - 1) * strides + size - side, 0)
        pads += [total // 2, total - total // 2]
    inputs = torch.nn.functional.pad(inputs, pads)
    weight = torch.from_numpy(kernel).permute(3, 2, 0, 1)
    return array(
        torch.nn.functional.conv2d(inputs, weight, torch.from_numpy(bias), strides).permute(0, 2, 3, 1).numpy()
    )


def batch_normalization(x, training, momentum):
    gamma, beta = (variable("batch_normalization", name, (x.shape[3],)) for name in ("gamma", "beta"))
    mean = variable("batch_normalization", "moving_mean", (x.shape[3],))
    var = variable("batch_normalization", "moving_variance", (x.shape[3],), positive=True)
    variable.layer["batch_normalization"] += 1
    if training:
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return array((x - mean) / np.sqrt(var + 1e-3) * gamma + beta)


def dense(x, units, **kwargs):
    kernel, bias = variable("dense", "kernel", (x.shape[1], units)), variable("dense", "bias", (units,))
    return array(x @ kernel + bias)


def tensorflow():
    tf = types.ModuleType("tensorflow")
    tf.concat = lambda xs, axis: array(np.concatenate(xs, axis))
    tf.split = lambda x, n: [array(part) for part in np.split(x, n)]
    tf.shape, tf.range, tf.maximum = (lambda x: x.shape), np.arange, np.maximum
    tf.gather = lambda x, index: array(x[index])
    tf.random_shuffle = lambda x: record("orders", rng.permutation(x))
    tf.distributions = types.SimpleNamespace(Beta=Beta)
    tf.reshape, tf.transpose = (
        (lambda x, shape: array(np.reshape(x, shape))),
        (lambda x, axes: array(np.transpose(x, axes))),
    )
    tf.reduce_mean = lambda x, axis=None: array(np.mean(x, tuple(axis) if isinstance(axis, list) else axis))
    tf.reduce_sum = lambda x, axis, keep_dims=False: array(np.sum(x, axis, keepdims=keep_dims))
    tf.pow, tf.square, tf.stop_gradient = np.power, np.square, lambda x: x
    tf.one_hot = lambda y, n: array(np.eye(n)[np.asarray(y, dtype=int)])
    tf.cast, tf.clip_by_value, tf.rsqrt = (lambda x, kind: float(x)), np.clip, lambda x: x**-0.5
    tf.placeholder = lambda kind, shape, name: fed[name]
    tf.float32, tf.int32, tf.AUTO_REUSE = "float32", "int32", None
    tf.get_collection, tf.group, tf.assign = (lambda *args: []), (lambda *args: None), (lambda *args: None)
    tf.GraphKeys = types.SimpleNamespace(UPDATE_OPS=None)
    tf.control_dependencies = lambda ops: contextlib.nullcontext()
    tf.variable_scope = lambda *args, **kwargs: contextlib.nullcontext()
    tf.summary = types.SimpleNamespace(scalar=lambda name, value: scalars.__setitem__(name, float(value)))
    tf.train = types.SimpleNamespace(AdamOptimizer=Optimizer, ExponentialMovingAverage=Average)
    tf.nn = types.SimpleNamespace(
        softmax=softmax,
        softmax_cross_entropy_with_logits_v2=cross_entropy,
        leaky_relu=lambda x, alpha: array(np.where(x > 0, x, alpha * x)),
    )
    tf.layers = types.SimpleNamespace(conv2d=conv2d, batch_normalization=batch_normalization, dense=dense)
    tf.random_normal_initializer = tf.glorot_normal_initializer = lambda **kwargs: None
    return tf


def official(checkout: Path):
    """The official modules, with stand-ins for everything that reads data or flags."""

    def module(name, **members):
        found = types.ModuleType(name)
        vars(found).update(members)
        sys.modules[name] = found

    sys.modules["tensorflow"] = tensorflow()
    flags = types.SimpleNamespace(FLAGS=None, DEFINE_enum=lambda *args: None)
    module("absl", app=None, flags=flags)
    module("easydict", EasyDict=lambda **kwargs: types.SimpleNamespace(**kwargs))
    module("libml", __path__=[str(checkout / "libml")])
    module("libml.data", DataSet=None)
    module("libml.data_pair", DATASETS=None)
    module("libml.train", ClassifySemi=object)
    module("libml.utils", model_vars=lambda scope=None: [], getter_ema=print)
    for name in ("data", "data_pair", "train", "utils"):
        setattr(sys.modules["libml"], name, sys.modules[f"libml.{name}"])
    sys.path.insert(0, str(checkout))
    return (
        importlib.import_module("libml.layers"),
        importlib.import_module("libml.models"),
        importlib.import_module("mixmatch"),
    )


def rows(n):
    p = rng.uniform(size=(n, CLASSES))
    return array(p / p.sum(1, keepdims=True))


fed: dict[str, np.ndarray] = {}


def main(checkout: Path) -> None:
    layers, models, mixmatch = official(checkout)
    golden: dict[str, np.ndarray] = {}

    xs, ps = [array(rng.standard_normal((BATCH, *SHAPE))) for _ in range(3)], [rows(BATCH) for _ in range(3)]
    golden["xs"], golden["ps"] = np.stack(xs), np.stack(ps)
    golden["interleaved"] = np.stack(layers.interleave(xs, BATCH))
    mixed = [layers.MixMode(mode)(xs, ps, [0.75, 0.75]) for mode in layers.MixMode.MODES]
    golden["modes"] = np.array(" ".join(layers.MixMode.MODES))
    golden["mixed_x"], golden["mixed_p"] = (
        np.stack([np.stack(part) for part in parts]) for parts in zip(*mixed, strict=True)
    )
    golden |= {f"mixed_{kind}": np.concatenate([v.reshape(-1) for v in kept]) for kind, kept in draws.items()}

    # One training step of the official class: a linear classifier, a third of the way up the ramp.
    model = mixmatch.MixMatch.__new__(mixmatch.MixMatch)
    weight = rng.standard_normal((int(np.prod(SHAPE)), CLASSES))
    model.classifier = lambda x, **kwargs: array(x.reshape(len(x), -1) @ weight)
    model.nclass, model.step = CLASSES, (1024 << 10) / 3
    model.dataset = types.SimpleNamespace(height=SHAPE[0], width=SHAPE[1], colors=SHAPE[2])
    fed["x"] = array(rng.standard_normal((BATCH, *SHAPE)))
    fed["y"] = array(rng.standard_normal((BATCH, 2, *SHAPE)))
    fed["labels"] = rng.randint(CLASSES, size=BATCH)
    for kept in draws.values():
        kept.clear()
    views = [array(fed["y"][:, k]) for k in range(2)]
    golden["step_guess"] = model.guess_label(views, model.classifier, T=0.5).p_target
    model.model(batch=BATCH, lr=0.002, wd=0.02, ema=0.999, beta=0.75, w_match=75.0)
    golden |= {f"step_{name}": value for name, value in fed.items()} | {"step_weight": weight}
    golden |= {"step_weights": draws["weights"][0].reshape(-1), "step_order": draws["orders"][0]}
    golden |= {f"step_{name.split('/')[-1]}": np.array(value) for name, value in scalars.items()}

    # The network; its variables are drawn in the order in which it makes them, and the test draws them again.
    net = models.MultiModel.__new__(models.MultiModel)
    net.nclass, net.dataset = CLASSES, types.SimpleNamespace(mean=0, std=1)
    images = np.random.RandomState(1).uniform(-1, 1, (3, 8, 8, 3))
    for training in (False, True):
        rng.seed(2)
        variables.clear()
        variable.layer = {"conv2d": 0, "batch_normalization": 0, "dense": 0}
        logits = net.classifier(array(images), "resnet", scales=3, filters=4, repeat=2, training=training)
        golden[f"network_training{int(training)}"] = np.asarray(logits)
    lines = [f"{name} {' '.join(map(str, value.shape))}" for name, value in variables.items()]
    golden["network_variables"] = np.array("\n".join(lines))
    small = {name: value.astype(np.float32) if value.dtype == np.float64 else value for name, value in golden.items()}
    np.savez_compressed(Path(__file__).with_name("official.npz"), **small)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
