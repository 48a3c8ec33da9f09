"""Golden vectors of the official code (automl/Auto-PyTorch, branch regularization_cocktails): python make.py CHECKOUT.

The files of the network and of the trainers are run as they are; what they import of ConfigSpace and of the rest of
Auto-PyTorch, none of which computes anything here, are empty classes. Random draws are recorded beside the results.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = "autoPyTorch.pipeline.components."
REAL = {
    ROOT + "setup.network_backbone.utils",
    ROOT + "setup.network_backbone.ResNetBackbone",
    ROOT + "setup.network_backbone.ShapedResNetBackbone",
    ROOT + "training.trainer.mixup_utils",
    ROOT + "training.trainer.cutout_utils",
    ROOT + "training.trainer.MixUpTrainer",
    ROOT + "training.trainer.RowCutMixTrainer",
    ROOT + "training.trainer.RowCutOutTrainer",
    ROOT + "training.trainer.AdversarialTrainer",
    "autoPyTorch.utils.implementations",
}
CLASSES, BATCH, COLUMNS, WIDTH = 3, 6, 5, 7
SHAPES, GROUPS = ("funnel", "long_funnel", "diamond", "hexagon", "brick", "triangle", "stairs"), 5
NETWORKS = {
    "plain": {},
    "batch_norm": {"use_batch_norm": True},
    "skip": {"use_skip_connection": True},
    "skip_batch_norm": {"use_skip_connection": True, "use_batch_norm": True},
    **{
        f"{branch}_{shake}": {
            "use_skip_connection": True,
            "multi_branch_choice": branch,
            "shake_shake_update_func": shake,
        }
        for branch in ("shake-shake", "shake-drop")
        for shake in ("even-even", "shake-even", "shake-shake", "M3")
    },
}


class Stand(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the real files in the checkout, and empty modules for everything else they ask for."""

    def __init__(self, checkout):
        self.checkout = Path(checkout)

    def find_spec(self, name, path=None, target=None):
        if name in REAL:
            file = self.checkout / (name.replace(".", "/") + ".py")
            return importlib.util.spec_from_file_location(name, file)
        if name.partition(".")[0] in ("autoPyTorch", "ConfigSpace"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        def anything(name):
            if name.startswith("__"):
                raise AttributeError(name)
            made = type(name, (), {"__init__": lambda self, *args, **kwargs: None})
            setattr(module, name, made)
            return made

        module.__getattr__ = anything


def main(checkout):
    sys.meta_path.insert(0, Stand(checkout))
    from autoPyTorch.pipeline.components.setup.network_backbone.ShapedResNetBackbone import ShapedResNetBackbone
    from autoPyTorch.pipeline.components.setup.network_backbone.utils import get_shaped_neuron_counts
    from autoPyTorch.pipeline.components.training.trainer.AdversarialTrainer import AdversarialTrainer
    from autoPyTorch.pipeline.components.training.trainer.MixUpTrainer import MixUpTrainer
    from autoPyTorch.pipeline.components.training.trainer.RowCutMixTrainer import RowCutMixTrainer
    from autoPyTorch.pipeline.components.training.trainer.RowCutOutTrainer import RowCutOutTrainer
    from autoPyTorch.utils.implementations import LossWeightStrategyWeighted

    found = {}
    # as it is; and with rates so large that whole steps round nothing away
    for name, unit in (("truncated", 1), ("meant", 2**40)):
        rates = [
            get_shaped_neuron_counts(shape, 0, 0, 0.4 * unit, groups + 1)[:groups] + [0] * (GROUPS - groups)
            for shape in SHAPES
            for groups in range(1, GROUPS + 1)
        ]
        found[f"shapes/{name}"] = np.array(rates).reshape(len(SHAPES), GROUPS, GROUPS) / unit
    x = torch.cos(torch.arange(BATCH * COLUMNS, dtype=torch.float64) * 0.7).view(BATCH, COLUMNS)
    y = torch.arange(BATCH) % CLASSES
    found |= {"x": x.numpy(), "y": y.numpy()}
    for name, options in NETWORKS.items():
        backbone = ShapedResNetBackbone()
        backbone.config = {"output_dim": WIDTH, "resnet_shape": "brick", "max_units": WIDTH, "num_groups": 2,
                           "blocks_per_group": 2, "activation": "relu", "use_dropout": False, "use_batch_norm": False,
                           "use_skip_connection": False, "multi_branch_choice": "none",
                           "shake_shake_update_func": "even-even", "max_shake_drop_probability": 0.8, **options}  # fmt: skip
        backbone.build_backbone((COLUMNS,))
        model = nn.Sequential(nn.Identity(), backbone.backbone, nn.Sequential(nn.Linear(WIDTH, CLASSES))).double()
        rng = np.random.RandomState(len(name))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.from_numpy(rng.normal(size=p.shape) * (0.5 if p.ndim > 1 else 0.2)))
        if name in ("plain", "skip_batch_norm", "shake-shake_even-even"):
            found[f"network/{name}/keys"] = np.array(list(model.state_dict()))
        steps = []
        for seed in range(2):
            torch.manual_seed(seed)
            logits = model.train()(x)
            model.zero_grad()
            nn.functional.cross_entropy(logits, y).backward()
            steps.append(np.concatenate([logits.detach().numpy().ravel(), model[1][0].weight.grad.numpy().ravel()]))
        found[f"network/{name}/train"] = np.stack(steps)
        found[f"network/{name}/eval"] = model.eval()(x).detach().numpy()
    weights = torch.from_numpy(LossWeightStrategyWeighted()(np.array([0, 0, 0, 1, 1, 2, 0, 0])))
    found["class_weights"] = weights.numpy()
    linear = nn.Linear(COLUMNS, CLASSES).double()
    with torch.no_grad():
        linear.weight.copy_(torch.sin(torch.arange(COLUMNS * CLASSES, dtype=torch.float64)).view(CLASSES, COLUMNS))
        linear.bias.zero_()
    criterion = nn.CrossEntropyLoss(weight=weights)
    for name, trainer in (
        ("mixup", MixUpTrainer(alpha=0.6, random_state=np.random.RandomState(1))),
        ("cutout", RowCutOutTrainer(patch_ratio=0.5, cutout_prob=1.0, random_state=np.random.RandomState(1))),
        ("cutmix", RowCutMixTrainer(alpha=1.0, random_state=np.random.RandomState(1))),
    ):
        torch.manual_seed(3)
        mixed, arguments = trainer.data_preparation(x.clone(), y)
        loss = trainer.criterion_preparation(**arguments)(criterion, linear(mixed))
        torch.manual_seed(3)
        found |= {f"{name}/order": torch.randperm(BATCH).numpy(), f"{name}/weight": np.array(arguments["lam"]),
                  f"{name}/x": mixed.numpy(), f"{name}/loss": loss.detach().numpy()}  # fmt: skip
    adversary = AdversarialTrainer.__new__(AdversarialTrainer)
    adversary.epsilon, adversary.device, adversary.model = 0.05, torch.device("cpu"), linear.float()
    adversary.criterion = nn.CrossEntropyLoss(weight=weights.float())
    found["adversarial/x"] = adversary.fgsm_attack(x.float(), y).numpy()
    np.savez_compressed(Path(__file__).parent / "official.npz", **found)
    print(len(found), "arrays")


if __name__ == "__main__":
    main(sys.argv[1])
