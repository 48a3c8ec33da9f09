"""Golden vectors of DynamicViT from the official code, small models with fixed weights, on the CPU.

    python -m tests.golden.dynamic_vit.make PATH_OF_CHECKOUT

writes ``official.npz`` beside this file; PATH is a checkout of github.com/raoyongming/DynamicViT (needs timm).
The weights, images and Gumbel noise are not stored: ``fill``, ``images`` and ``fixed_gumbel`` make them again from
NumPy's frozen ``RandomState`` stream.
"""

import ast
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
CLASSES, BATCH, KEEP = 5, 3, 0.7
PRUNE_AT = (1, 2, 3)
DEIT = {"img_size": 28, "patch_size": 2, "embed_dim": 16, "depth": 4, "num_heads": 2}  # 14x14: written into their code
LVVIT = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2}


def fill(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Sets every parameter and buffer from a fixed stream, in the order of their names."""
    stream = np.random.RandomState(seed)
    for name, tensor in sorted(model.state_dict().items()):
        if not tensor.is_floating_point():
            continue
        values = stream.standard_normal(tuple(tensor.shape))
        if tensor.ndim > 1:
            values = values * (0.5 if "embed" in name or "token" in name else tensor[0].numel() ** -0.5)
        else:
            values = 0.1 * values
        if name.endswith("running_var"):
            values = 1 + np.abs(values)
        elif tensor.ndim == 1 and name.endswith("weight"):
            values = 1 + values
        tensor.copy_(torch.from_numpy(values))
    return model


def images(size: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(7).standard_normal((BATCH, 3, size, size))).float()


def targets() -> torch.Tensor:
    """Soft targets, as mixup makes them."""
    return torch.from_numpy(np.random.RandomState(8).dirichlet(np.ones(CLASSES), BATCH)).float()


@contextmanager
def fixed_gumbel():
    """Replaces ``F.gumbel_softmax`` by the same function with noise from a fixed stream."""
    stream, original = np.random.RandomState(9), F.gumbel_softmax

    def gumbel_softmax(logits, tau=1, hard=False, eps=1e-10, dim=-1):
        noise = torch.from_numpy(stream.gumbel(size=tuple(logits.shape))).to(logits)
        soft = ((logits + noise) / tau).softmax(dim)
        if not hard:
            return soft
        one_hot = torch.zeros_like(soft).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0)
        return one_hot - soft.detach() + soft

    F.gumbel_softmax = gumbel_softmax
    try:
        yield
    finally:
        F.gumbel_softmax = original


def _official(checkout: Path) -> tuple:
    from saigen.testing.peers import import_peer

    import_peer("timm")
    import timm.layers

    # their utils.py asks for packages long gone; the models use one function of it
    utils = types.ModuleType("utils")
    tree = ast.parse((checkout / "utils.py").read_text())
    wanted = [node for node in tree.body if getattr(node, "name", "") == "batch_index_select"]
    exec(compile(ast.Module(wanted, []), "utils.py", "exec"), {"torch": torch}, utils.__dict__)
    sys.modules["utils"] = utils
    sys.modules.setdefault("timm.models.layers", timm.layers)
    sys.path.insert(0, str(checkout))
    import losses
    from models import dylvvit, dyvit

    return dyvit, dylvvit, losses


def main(checkout: Path) -> None:
    dyvit, dylvvit, losses = _official(checkout)
    ratios = [KEEP ** (stage + 1) for stage in range(3)]
    pruning = {"pruning_loc": PRUNE_AT, "token_ratio": ratios, "distill": True}
    lv = {"mlp_ratio": 3.0, "p_emb": "4_2", "skip_lam": 2.0, "return_dense": True, "mix_token": True}
    cases = {
        "deit": (dyvit.VisionTransformerDiffPruning, dyvit.VisionTransformerTeacher, DEIT),
        "lvvit": (dylvvit.LVViTDiffPruning, dylvvit.LVViT_Teacher, LVVIT | lv),
    }
    stored = {}
    for name, (student, teacher, options) in cases.items():
        model = fill(student(num_classes=CLASSES, **options, **pruning), seed=1)
        teacher = fill(teacher(num_classes=CLASSES, **options), seed=2).eval()
        x = images(options["img_size"])
        stored[f"{name}.keys"] = np.array([f"{k} {list(v.shape)}" for k, v in model.state_dict().items()])
        with torch.no_grad():
            stored[f"{name}.inference"] = model.eval()(x).numpy()
            dense = teacher(x)
            stored[f"{name}.teacher"] = dense[0].numpy()
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        with fixed_gumbel():
            output = model(x)
        stored[f"{name}.logits"] = output[0].detach().numpy()
        stored[f"{name}.tokens"] = output[1][:, :8].detach().numpy()
        stored[f"{name}.decisions"] = np.stack([d.detach().numpy() for d in output[3]]).astype(np.uint8)
        criterion = losses.DistillDiffPruningLoss_dynamic(
            teacher,
            lambda logits, target: -(target * logits.log_softmax(-1)).sum(-1).mean(),
            ratio_weight=2.0,
            distill_weight=0.5,
            pruning_loc=PRUNE_AT,
            keep_ratio=ratios,
            clf_weight=1.0,
            mse_token=name == "deit",
        )
        loss, _ = criterion(x, output, targets())
        loss.backward()
        stored[f"{name}.loss"] = loss.detach().numpy()
        gradients = {k: p.grad for k, p in model.named_parameters()}
        stored[f"{name}.gradients"] = np.array([[gradients[k].norm(), gradients[k].sum()] for k in sorted(gradients)])
    np.savez_compressed(HERE / "official.npz", **stored)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
