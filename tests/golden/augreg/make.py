"""Writes the golden vectors of ``augreg``: the official Flax ViT, plain and behind a ResNet, run as it is.

    python tests/golden/augreg/make.py PATH_OF_CHECKOUT

PATH is a checkout of google-research/vision_transformer. Needs jax, flax, einops and ml_collections, which nothing else
here does. The weights are not stored, but made again by ``fill`` from NumPy's frozen ``RandomState`` stream.
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
CLASSES, WIDTH, LAYERS, HEADS, MLP = 5, 8, 2, 2, 16
CASES = {"vit": (None, 8, 16), "root": ((), 2, 16), "resnet": ((1, 2), 2, 32)}
"""Name -> depths of the ResNet in front, patch size behind it, side of the image."""


def fill(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """An array for every name, in the order of the names."""
    stream = np.random.RandomState(seed)
    made = {}
    for name in sorted(shapes):
        shape = shapes[name]
        values = stream.standard_normal(shape)
        if name.endswith("kernel"):
            values = values * np.prod(shape[:-1]) ** -0.5
        elif name.endswith("scale"):
            values = 1 + 0.2 * values
        else:
            values = 0.3 * values
        made[name] = values.astype(np.float32)
    return made


def images(side: int) -> np.ndarray:
    """Two images, channels last."""
    return np.random.RandomState(3).uniform(-1, 1, (2, side, side, 3)).astype(np.float32)


def flat(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def nested(arrays):
    tree: dict = {}
    for name, value in arrays.items():
        *path, last = name.split("/")
        place = tree
        for step in path:
            place = place.setdefault(step, {})
        place[last] = value
    return tree


def main(checkout: Path) -> None:
    import jax
    import jax.numpy as jnp
    from ml_collections import ConfigDict

    sys.path.insert(0, str(checkout))
    from vit_jax import models_vit

    stored = {}
    for case, (depths, patch, side) in CASES.items():
        transformer = {
            "num_layers": LAYERS,
            "mlp_dim": MLP,
            "num_heads": HEADS,
            "dropout_rate": 0.0,
            "attention_dropout_rate": 0.0,
        }
        model = models_vit.VisionTransformer(
            num_classes=CLASSES,
            patches=ConfigDict({"size": (patch, patch)}),
            transformer=ConfigDict(transformer),
            hidden_size=WIDTH,
            resnet=None if depths is None else ConfigDict({"num_layers": depths, "width_factor": 1.0}),
        )
        x = jnp.asarray(images(side))
        shapes = {k: v.shape for k, v in flat(model.init(jax.random.PRNGKey(0), x, train=False)["params"])}
        arrays = fill(shapes)
        params = jax.tree_util.tree_map(jnp.asarray, nested(arrays))

        def value(params, x, model=model):
            return jnp.sin(model.apply({"params": params}, x, train=False)).sum()

        by_params, by_x = jax.grad(value, argnums=(0, 1))(params, x)
        gradients = dict(flat(by_params))
        stored |= {
            f"{case}.names": np.array(sorted(shapes)),
            f"{case}.shapes": np.array([",".join(map(str, shapes[name])) for name in sorted(shapes)]),
            f"{case}.logits": np.asarray(model.apply({"params": params}, x, train=False)),
            f"{case}.gradient_x": np.asarray(jnp.abs(by_x).sum((1, 2))),
            f"{case}.gradient_norms": np.array([np.linalg.norm(gradients[name]) for name in sorted(shapes)]),
        }
    np.savez_compressed(HERE / "official.npz", **stored)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
