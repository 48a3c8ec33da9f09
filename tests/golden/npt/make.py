"""Writes the golden vectors of ``npt``: the official network, loss and optimizer, run as they are.

    python tests/golden/npt/make.py CHECKOUT

``CHECKOUT`` is a checkout of OATML/Non-Parametric-Transformers. Schedulers, metrics and logs that the files import and that
nothing here uses get empty stand-ins. Weights are no part of the file: both sides fill them by ``wave``.
"""

import sys
import types
import warnings
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
CASES = {
    "mixed": {"dims": [3, 2, 5, 2], "categorical": [0, 2], "depth": 4, "patches": False},
    "numbers": {"dims": [2, 2, 2], "categorical": [], "depth": 2, "patches": False},
    "patches": {"dims": [2] * 48 + [11], "categorical": [48], "depth": 2, "patches": 4},
}


def stand_ins() -> None:
    for name in ("torchmetrics", "torchmetrics.functional", "torch.utils.tensorboard"):
        module = types.ModuleType(name)
        module.auroc = module.SummaryWriter = None
        sys.modules[name] = module


class Config(dict):
    __getattr__ = dict.__getitem__


def config(case: dict) -> Config:
    return Config(
        mp_distributed=False, model_stacking_depth=case["depth"], model_dim_hidden=8, model_num_heads=4,
        model_image_n_patches=case["patches"], model_image_patch_type="linear", model_image_n_channels=3,
        model_image_share_embed=True, model_image_n_classes=10, model_bert_augmentation=True,
        model_feature_type_embedding=not case["patches"], model_feature_index_embedding=True,
        model_hidden_dropout_prob=0.0, model_att_score_dropout_prob=0.0, model_embedding_layer_norm=False,
        model_layer_norm_eps=1e-12, model_att_block_layer_norm=True, model_pre_layer_norm=True, model_mix_heads=True,
        model_sep_res_embed=True, model_rff_depth=1, model_att_score_norm="softmax", model_ablate_rff=False,
        model_hybrid_debug=False, viz_att_maps=False, exp_gradient_clipping=0, exp_device="cpu", data_set="",
        exp_tradeoff=1, model_augmentation_bert_mask_prob={"train": 0.15}, data_dtype="float64",
        exp_print_every_nth_forward=False, metrics_auroc=False,
    )  # fmt: skip


def wave(number: int, shape: tuple[int, ...]) -> torch.Tensor:
    size = int(np.prod(shape))
    values = 0.3 * torch.sin(number + 1 + 0.7 * torch.arange(size, dtype=torch.float64))
    return values.reshape(shape)


def table(dims: list[int], categorical: list[int], rows: int) -> list[torch.Tensor]:
    """Encoded columns with the mask token in every third entry; all of it a formula."""
    columns = []
    for j, width in enumerate(dims):
        column = torch.zeros(rows, width, dtype=torch.float64)
        if j in categorical:
            column[torch.arange(rows), (torch.arange(rows) + j) % (width - 1)] = 1
        else:
            column[:, 0] = torch.sin(1.3 * torch.arange(rows) + j)
        columns.append(column)
    return columns


def masked(columns: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    rows = len(columns[0])
    mask = (torch.arange(rows)[:, None] + torch.arange(len(columns))) % 3 == 0
    inputs = []
    for j, column in enumerate(columns):
        column = column.clone()
        column[mask[:, j]] = 0
        column[mask[:, j], -1] = 1
        inputs.append(column)
    return inputs, mask


def main(checkout: Path) -> None:
    warnings.simplefilter("ignore")
    stand_ins()
    sys.path.insert(0, str(checkout))
    from npt.loss import Loss
    from npt.model.npt import NPTModel
    from npt.utils.optim_utils import Lamb

    found = {}
    for name, case in CASES.items():
        c = config(case)
        numbers = [j for j in range(len(case["dims"])) if j not in case["categorical"]]
        metadata = {
            "input_feature_dims": case["dims"], "cat_features": case["categorical"], "num_features": numbers,
            "cat_target_cols": case["categorical"][:1], "num_target_cols": [],
        }  # fmt: skip
        model = NPTModel(c, metadata).double()
        state = {key: wave(i, tuple(value.shape)) for i, (key, value) in enumerate(model.state_dict().items())}
        model.load_state_dict(state)
        columns = table(case["dims"], case["categorical"], 7)
        inputs, mask = masked(columns)
        outputs = model(inputs)
        found[f"{name}_keys"] = np.array(list(state))
        found[f"{name}_shapes"] = np.array([",".join(map(str, value.shape)) for value in state.values()])
        found[f"{name}_outputs"] = torch.cat(outputs, 1).detach().numpy()
        if name != "mixed":
            continue
        # the loss of entries masked in features (columns 1 to 3) and in the target (column 0), and gradients
        features, labels = mask.clone(), mask.clone()
        features[:, 0] = False
        labels[:, 1:] = False
        annealer = types.SimpleNamespace(curr_tradeoff=0.3)
        loss = Loss(c, metadata | {"auroc_setting": False}, False, device="cpu", tradeoff_annealer=annealer)
        data = {
            "cat_features": case["categorical"], "target_cols": [0], "sigmas": [1.0] * 4,
            "train_mask_matrix": labels,
        }  # fmt: skip
        loss.compute(
            output=outputs, ground_truth_data=columns, label_mask_matrix=labels, augmentation_mask_matrix=features,
            data_dict=data, dataset_mode="train", eval_model=False,
        )  # fmt: skip
        total = loss.finalize_batch_losses()["total_loss"]
        total.backward()
        found["loss"] = total.detach().numpy()
        found["gradient_norms"] = np.array([float(p.grad.norm()) for p in model.parameters()])
        found["gradient_keys"] = np.array([key for key, _ in model.named_parameters()])
    p = torch.nn.Parameter(wave(0, (3, 4)))
    optimizer = Lamb([p], lr=0.05, weight_decay=0.01)
    steps = []
    for step in range(8):
        p.grad = wave(step + 3, (3, 4)) * 10.0 ** (step % 3)
        optimizer.step()
        steps.append(p.detach().clone().numpy())
    found["lamb"] = np.stack(steps)
    np.savez_compressed(HERE / "official.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
