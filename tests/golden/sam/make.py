"""Writes the golden vectors of ``sam``: official Flax models and the official SAM functions, run as they are.

    python tests/golden/sam/make.py --models PATH --optimizer PATH

``--models`` is a checkout of google-research/vision_transformer, ``--optimizer`` one of google-research/sam. Needs jax,
flax, einops and ml_collections (``pip install jax flax einops ml_collections``), which nothing else here does.
"""

import argparse
import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

HERE = Path(__file__).parent


def flat(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", np.asarray(value)


def models(checkout: Path) -> None:
    """Outputs, and gradients of sum(sin(logits)) by the image and the head, of a tiny ViT and a tiny Mixer."""
    import jax
    import jax.numpy as jnp
    from ml_collections import ConfigDict

    sys.path.insert(0, str(checkout))
    from vit_jax import models_mixer, models_vit

    patches = ConfigDict({"size": (4, 4)})
    transformer = ConfigDict(
        {"num_layers": 2, "mlp_dim": 16, "num_heads": 2, "dropout_rate": 0.0, "attention_dropout_rate": 0.0}
    )
    made = {
        "vit": models_vit.VisionTransformer(num_classes=5, patches=patches, transformer=transformer, hidden_size=8),
        "mixer": models_mixer.MlpMixer(
            patches=patches, num_classes=5, num_blocks=2, hidden_dim=8, tokens_mlp_dim=6, channels_mlp_dim=16
        ),
    }
    rng = np.random.default_rng(0)
    for name, model in made.items():
        x = jnp.asarray(rng.uniform(-1, 1, size=(2, 8, 8, 3)), jnp.float32)
        params = model.init(jax.random.PRNGKey(0), x, train=False)["params"]
        # every array random, so that no norm, bias, token or head is trivially zero or one
        params = jax.tree_util.tree_map(lambda a: jnp.asarray(a + 0.3 * rng.normal(size=a.shape), jnp.float32), params)

        def value(params, x, model=model):
            return jnp.sin(model.apply({"params": params}, x, train=False)).sum()

        by_params, by_x = jax.grad(value, argnums=(0, 1))(params, x)
        np.savez(
            HERE / f"{name}.npz",
            **{f"params:{key}": array for key, array in flat(params)},
            x=x,
            logits=model.apply({"params": params}, x, train=False),
            gradient_x=by_x,
            gradient_head=by_params["head"]["kernel"],
        )


def optimizer(checkout: Path) -> None:
    """Six SAM steps on a two-layer network by the official functions, L2 in both passes, clipped, Nesterov momentum."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    source = ast.parse((checkout / "sam_jax/training_utils/flax_training.py").read_text())
    wanted = {"dual_vector", "clip_by_global_norm", "global_norm"}
    source.body = [node for node in source.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    # the functions were written for an old JAX: hand them its names
    old = SimpleNamespace(
        tree_map=jax.tree_util.tree_map,
        tree_multimap=jax.tree_util.tree_map,
        tree_leaves=jax.tree_util.tree_leaves,
        tree_util=jax.tree_util,
    )
    rho, l2, lr, beta, limit = 0.2, 0.05, 0.3, 0.9, 0.2
    official = {"jnp": jnp, "jax": old, "FLAGS": SimpleNamespace(gradient_clipping=limit)}
    exec(compile(source, "flax_training.py", "exec"), official)

    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(12, 4)), rng.integers(3, size=12)
    w = {"a": rng.normal(size=(5, 4)), "b": rng.normal(size=5), "c": rng.normal(size=(3, 5))}
    w = {key: jnp.asarray(value) for key, value in w.items()}
    saved = {f"start_{key}": value for key, value in w.items()} | {"x": x, "y": y}

    def loss(w):
        logits = jnp.tanh(x @ w["a"].T + w["b"]) @ w["c"].T
        penalty = 0.5 * l2 * sum(jnp.sum(value**2) for value in w.values())
        return -jax.nn.log_softmax(logits)[jnp.arange(len(y)), y].mean() + penalty

    momentum = {key: jnp.zeros_like(value) for key, value in w.items()}
    for step in range(6):
        direction = official["dual_vector"](jax.grad(loss)(w))
        gradient = jax.grad(loss)({key: w[key] + rho * direction[key] for key in w})
        gradient = official["clip_by_global_norm"](gradient)
        momentum = {key: beta * momentum[key] + gradient[key] for key in w}
        w = {key: w[key] - lr * (gradient[key] + beta * momentum[key]) for key in w}
        saved |= {f"step{step}_{key}": value for key, value in w.items()}
    np.savez(HERE / "steps.npz", **saved, rho=rho, l2=l2, lr=lr, beta=beta, limit=limit)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--optimizer", type=Path, required=True)
    arguments = parser.parse_args()
    models(arguments.models)
    optimizer(arguments.optimizer)
