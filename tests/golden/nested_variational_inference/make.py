"""Writes official.npz: what the authors' code gives for a chain of five annealed densities, with its samples and gradients.

    python tests/golden/nested_variational_inference/make.py COMBINATORS PROBTORCH

COMBINATORS is a checkout of probtorch/combinators (Apache-2.0), PROBTORCH one of probtorch/probtorch (Apache-2.0) at its
branch combinators-dev; they need typeguard. The kernels are moved away from their start by a formula, so that forward and
reverse differ; the test fills ours likewise.
"""

import collections.abc
import sys
from pathlib import Path

import numpy as np
import torch

NUM_TARGETS, SAMPLES, STRIDE = 5, 6, 29


def fill(parameters: list[torch.Tensor]) -> None:
    """Small waves: number j of parameter i is 0.3 sin(i + 1 + 0.7 j)."""
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            place = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape)
            parameter.copy_(0.3 * torch.sin(i + 1 + 0.7 * place))


def main(combinators: str, probtorch: str) -> None:
    sys.path[:0] = [combinators, probtorch]
    # Their names of 2021: Python and torch have moved them since.
    collections.MutableMapping = collections.abc.MutableMapping
    from experiments.annealing.models import mk_model
    from experiments.annealing.objectives import nvo_avo, nvo_rkl
    from experiments.annealing.utils import get_stats
    from experiments.annealing.vsmc import vsmc

    torch.set_default_dtype(torch.float64)
    values = {}
    for name, objective in (("reverse", nvo_rkl), ("avo", nvo_avo)):
        torch.manual_seed(0)
        targets, forwards, reverses = mk_model(NUM_TARGETS, optimize_path=True)
        kernels = [*forwards, *reverses]
        parameters = [p for kernel in kernels for p in kernel.net.parameters()]
        fill(parameters)
        logits = [target.logit for target in targets[1:-1]]
        out = vsmc(targets, forwards, reverses, objective)(
            None, sample_shape=(SAMPLES, 1), sample_dims=0, batch_dim=1, _debug=True
        )
        out.loss.sum().backward()
        stats = get_stats(out)
        traces = list(stats["proposal_trace"])
        z = [traces[0]["g0"].value, *(trace[f"g{k + 1}"].value for k, trace in enumerate(traces))]
        values |= {
            f"{name}_z": torch.stack(z)[:, :, 0].detach().numpy(),
            f"{name}_log_weight": torch.stack(stats["lw"])[:, :, 0].detach().numpy(),
            f"{name}_loss": torch.stack([loss.sum() for loss in stats["loss"]]).detach().numpy(),
            f"{name}_gradient": torch.cat([p.grad.flatten() for p in parameters]).numpy()[::STRIDE],
            f"{name}_beta_gradient": np.array([0.0 if p.grad is None else p.grad.item() for p in logits]),
        }
    np.savez_compressed(Path(__file__).with_name("official.npz"), **values)


if __name__ == "__main__":
    main(*sys.argv[1:])
