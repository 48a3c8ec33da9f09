"""Answers of the official code: ``python -m tests.golden.nfnet.make CHECKOUT``, with jax and dm-haiku installed.

CHECKOUT is google-deepmind/deepmind-research. Writes ``golden.npz``: names and shapes of the parameters, logits, signal
metrics, and the classifier's and first kernel's values after steps of the official optimizer with AGC.
"""

import json
import sys
import types
from pathlib import Path

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from filling import CASES, SIDE, STEPS, filled, parameter


def main(checkout: str) -> None:
    # the optimizer's module imports a data pipeline that is not needed here
    for name in ("dill", "tree", "tensorflow", "tensorflow_datasets", "nfnets.utils"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.path.insert(0, checkout)
    from nfnets import base, nf_regnet, nf_resnet, nfnet, optim

    jax.config.update("jax_default_matmul_precision", "highest")
    sizes = {"train_imsize": 64, "test_imsize": 64, "drop_rate": 0.0}
    answers = {}
    for case, (depths, widths) in CASES.items():
        tiny = {"depth": list(depths), "width": list(widths), **sizes}
        if case == "NFNet":
            base.nfnet_params["tiny"] = tiny | {"group_width": [8] * 4}
            make = lambda: nfnet.NFNet(5, "tiny", stochdepth_rate=0.0)  # noqa: E731
        elif case == "NF_ResNet":
            nf_resnet.NF_ResNet.variant_dict["tiny"] = tiny
            make = lambda: nf_resnet.NF_ResNet(5, "tiny", width=1, stochdepth_rate=0.0, drop_rate=0.0)  # noqa: E731
        else:
            nf_regnet.NF_RegNet.variant_dict["tiny"] = tiny
            make = lambda: nf_regnet.NF_RegNet(5, "tiny", activation="silu", stochdepth_rate=0.0)  # noqa: E731
        net = hk.transform(lambda x, make=make: make()(x, is_training=True, return_metrics=True))
        x = jnp.asarray(filled("x", (2, SIDE, SIDE, 3)))
        shapes = jax.eval_shape(net.init, jax.random.PRNGKey(0), x)
        params = {
            module: {name: jnp.asarray(parameter(f"{module}/{name}", leaf.shape)) for name, leaf in leaves.items()}
            for module, leaves in shapes.items()
        }
        outputs = jax.jit(net.apply)(params, jax.random.PRNGKey(0), x)
        answers[f"{case}.shapes"] = json.dumps(
            {f"{module}/{name}": leaf.shape for module, leaves in shapes.items() for name, leaf in leaves.items()}
        )
        answers[f"{case}.logits"] = np.asarray(outputs["logits"])
        for kind in ("avg_var", "avg_sq_mean"):
            answers[f"{case}.{kind}"] = np.array([outputs[f"{kind}_{i}"] for i in range(sum(depths) + 1)])
        answers |= steps(case, optim, net, params, x)
    np.savez_compressed(Path(__file__).parent / "golden.npz", **answers)


def steps(case, optim, net, params, x):
    """A few steps of the official update rule, group by group as the official experiment makes its groups."""
    y = jnp.array([1, 3])

    def loss(params):
        logits = net.apply(params, jax.random.PRNGKey(0), x)["logits"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    states, rule, losses = {}, object.__new__(optim.SGD_AGC), []
    gradient = jax.jit(jax.value_and_grad(loss))
    for _ in range(STEPS):
        value, grads = gradient(params)
        losses.append(value)
        updated = {}
        for module, leaves in params.items():
            updated[module] = {}
            for name, param in leaves.items():
                scale = name == "b" or "gain" in name or "bias" in name
                last = "linear" in module and "squeeze_excite" not in module and not scale
                options = {
                    "lr": 0.1,
                    "momentum": 0.9,
                    "nesterov": True,
                    "dampening": 0,
                    "weight_decay": None if scale else 1e-2,
                    "clipping": None if last else 0.02,
                    "eps": 1e-3,
                }
                state = states.setdefault((module, name), {"step": 0, "momentum": jnp.zeros_like(param)})
                updated[module][name], _ = rule.update_param(param, grads[module][name], state, options)
        params = updated
    norms = {f"{m}/{n}": float(jnp.sqrt((p**2).sum())) for m, leaves in params.items() for n, p in leaves.items()}
    linear = next(module for module in params if module.endswith("/~/linear") and "squeeze" not in module)
    return {
        f"{case}.losses": np.array(losses),
        f"{case}.norms": json.dumps(norms),
        f"{case}.classifier": np.asarray(params[linear]["w"]),
    }


if __name__ == "__main__":
    main(sys.argv[1])
