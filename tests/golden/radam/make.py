"""Writes the golden vectors of ``radam``: the official optimizers, run as they are.

    python tests/golden/radam/make.py CHECKOUT

``CHECKOUT`` is a checkout of LiyuanLucasLiu/RAdam. Its files for fairseq are read with empty stand-ins for fairseq and
tensorboardX, of which the optimizers themselves use nothing.
"""

import importlib.util
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
STEPS = 12


def load(path: Path):
    spec = importlib.util.spec_from_file_location(f"official_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def stand_ins() -> None:
    optim = types.ModuleType("fairseq.optim")
    optim.FairseqOptimizer = object
    optim.register_optimizer = lambda name: lambda cls: cls
    board = types.ModuleType("tensorboardX")
    board.SummaryWriter = None
    sys.modules |= {"fairseq": types.ModuleType("fairseq"), "fairseq.optim": optim, "tensorboardX": board}


def main(checkout: Path) -> None:
    # the oldest of its files call PyTorch's in-place operations with the scalar first
    warnings.simplefilter("ignore")
    stand_ins()
    official = load(checkout / "radam" / "radam.py")
    delayed = load(checkout / "nmt" / "my_module" / "adam2.py")
    rng = np.random.default_rng(0)
    start = rng.normal(size=(3, 4)).astype(np.float32)
    gradients = (rng.normal(size=(STEPS, 3, 4)) * np.logspace(-2, 1, 4)).astype(np.float32)
    common = {"lr": 0.03, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1}
    arms = {
        "skip": lambda p: official.RAdam(p, **common),
        "momentum": lambda p: official.RAdam(p, **common, degenerated_to_sgd=True),
        "adamw": lambda p: official.AdamW(p, **common),
        "delayed": lambda p: delayed.Adam2(p, **common, adam_freeze=4),
    }
    found = {"start": start, "gradients": gradients}
    for name, make in arms.items():
        p = torch.nn.Parameter(torch.from_numpy(start.copy()))
        optimizer = make([p])
        if name == "delayed":
            optimizer.name = "adam_1k"  # the official switch for the frozen steps
        path = []
        for g in gradients:
            p.grad = torch.from_numpy(g.copy())
            optimizer.step()
            path.append(p.detach().numpy().copy())
        found[name] = np.stack(path)
    np.savez_compressed(HERE / "steps.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
