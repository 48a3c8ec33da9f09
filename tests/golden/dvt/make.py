"""Golden vectors of DVT from the official code, small models with fixed weights, on the CPU.

    python -m tests.golden.dvt.make PATH_OF_CHECKOUT

writes ``official.npz`` beside this file; PATH is a checkout of github.com/blackfeather-wang/Dynamic-Vision-Transformer
(needs timm). Weights and images are not stored: ``fill`` and ``images`` make them again from NumPy's frozen
``RandomState`` stream.
"""

import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
CLASSES, BATCH = 5, 2
SIZES = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}  # their token counts need images of 224 pixels
FROZEN = ("pos_embed", ".w")


def fill(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Sets every parameter from a fixed stream, in the order of their names; fixed positions stay as they are."""
    stream = np.random.RandomState(seed)
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, tensor in sorted(model.state_dict().items()):
        if name in fixed and name.endswith("pos_embed"):
            continue
        values = stream.standard_normal(tuple(tensor.shape))
        if tensor.ndim > 1 and not name.endswith(".w"):
            values = values * (0.5 if "pos_embed" in name or "cls_token" in name else tensor[0].numel() ** -0.5)
        elif tensor.ndim == 1:
            values = 0.1 * values + float(name.endswith("weight"))
        tensor.copy_(torch.from_numpy(values))
    return model


def images() -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(7).standard_normal((BATCH, 3, 224, 224))).float()


def targets() -> torch.Tensor:
    return torch.tensor([1, 4])


def _official(checkout: Path) -> tuple:
    from saigen.testing.peers import import_peer

    import_peer("timm")
    import timm.layers
    import timm.models

    torch.Tensor.cuda = lambda self, *_, **__: self  # zeros for the class token are sent to a GPU unasked
    sys.modules["timm.models.layers"] = timm.layers
    for name, content in {
        "timm.models.helpers": {"load_pretrained": None},
        "timm.models.registry": {"register_model": lambda function: function},
        "timm.models.resnet": {"resnet26d": None, "resnet50d": None},
    }.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        sys.modules[name] = module
    # only the cascade's own ViT is wanted of the checkout's copy of timm
    theirs = types.ModuleType("timm.models.vision_transformer")
    theirs.__package__ = "timm.models"
    exec(compile((checkout / "timm/models/vision_transformer.py").read_text(), "theirs", "exec"), theirs.__dict__)
    sys.modules["timm.models.vision_transformer"] = theirs
    package = types.ModuleType("models")
    package.__path__ = [str(checkout / "models")]
    sys.modules["models"] = package
    from models import t2t_vit

    return t2t_vit.T2T_ViT, theirs.VisionTransformer


def main(checkout: Path) -> None:
    t2t, deit = _official(checkout)
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    builders = {
        "t2t": [
            partial(t2t, tokens_type=kind)
            for kind in ("performer_less_less_token", "performer_less_token", "performer")
        ],
        "conv": [partial(deit, patch_size=patch, qkv_bias=True, norm_layer=norm) for patch in (32, 23, 16)],
    }
    stored = {}
    for embed, builds in builders.items():
        for feature, relation in ((True, True), (True, False), (False, True), (False, False)):
            name = f"{embed}.{int(feature)}{int(relation)}"
            stages = torch.nn.Module()
            for k, (stage, build) in enumerate(
                zip(("less_less_token", "less_token", "normal_token"), builds, strict=True)
            ):
                reuse = {"feature_reuse": feature and k > 0, "relation_reuse": relation and k > 0}
                stages.add_module(stage, build(num_classes=CLASSES, **SIZES, **reuse))
            model = fill(stages, seed=1).eval()
            x, logits, features, relations = images(), [], None, None
            for stage in (model.less_less_token, model.less_token, model.normal_token):
                y, features, relations = stage(
                    x,
                    features_to_be_reused_list=features if feature else None,
                    relations_to_be_reused_list=relations if relation else None,
                )
                logits.append(y)
            stored[f"{name}.logits"] = torch.stack(logits).detach().numpy()
            if feature and relation:
                stored[f"{name}.keys"] = np.array([f"{k} {list(v.shape)}" for k, v in model.state_dict().items()])
                sum(torch.nn.functional.cross_entropy(y, targets()) for y in logits).backward()
                gradients = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
                stored[f"{name}.gradients"] = np.array(
                    [[gradients[k].norm(), gradients[k].sum()] for k in sorted(gradients)]
                )
    # the published way of finding thresholds, on made-up confidences
    source = (checkout / "inference.py").read_text()
    start, end = source.index("def dynamic_find_threshold"), source.index("if __name__")
    inference: dict = {"torch": torch, "math": __import__("math")}
    exec(compile(source[start:end], "inference", "exec"), inference)
    stream = np.random.RandomState(11)
    probabilities = torch.from_numpy(stream.dirichlet(np.full(4, 0.5), (3, 200))).float()
    truth = torch.from_numpy(stream.randint(0, 4, 200))
    rows = []
    for p in (1, 10, 20, 35, 59):
        q = (p / 20) ** torch.arange(1.0, 4.0)
        thresholds = inference["dynamic_find_threshold"](probabilities, truth, q / q.sum())
        accuracy, cost = inference["dynamic_evaluate"](probabilities, truth, [1.0, 3.0, 7.0], thresholds)
        rows.append([p / 20, float(thresholds[0]), float(thresholds[1]), accuracy / 100, cost])
    stored |= {
        "budget.probabilities": probabilities.numpy(),
        "budget.truth": truth.numpy(),
        "budget.rows": np.array(rows),
    }
    np.savez_compressed(HERE / "official.npz", **stored)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
