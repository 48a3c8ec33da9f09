"""SegFormer's claims, re-measured: what a change of resolution costs with and without positional encodings; B4's size."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from saigen.data.masks import load_masks
from saigen.data.scenes import CLASSES, render_scenes, scenes_fingerprint
from saigen.measure import macs, parameters
from saigen.measure.segmentation import confusion_matrix, mean_iou
from saigen.papers.dense.segformer import (
    MixTransformer,
    SegFormer,
    param_groups,
    poly_schedule,
    segformer_b4,
    segmentation_loss,
)
from saigen.papers.dense.segformer.model import DECODER, DEPTHS, IMAGENET_MEAN, IMAGENET_STD, WIDTHS
from saigen.train import fit
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    """One scale's experiment."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    reductions: tuple[int, ...]
    decoder: int
    crop: int  # side of the training crops and of the sliding windows
    stride: int
    steps: int
    batch: int
    lr: float
    warmup: int
    head_factor: float = 1.0
    drop_path: float = 0.0
    dropout: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)  # range of the random resizing; the recipe's is (0.5, 2)
    photometric: bool = False
    train_scenes: int = 0  # 0: the user's own data
    test_scenes: int = 0
    scene: int = 160  # side of a scene


MICRO = {
    "widths": (16, 32, 64, 96),
    "depths": (1, 1, 1, 1),
    "heads": (1, 2, 2, 4),
    "reductions": (4, 2, 1, 1),
    "decoder": 64,
}
B0, B4 = (
    {"widths": WIDTHS[b], "depths": DEPTHS[b], "heads": (1, 2, 5, 8), "reductions": (8, 4, 2, 1), "decoder": DECODER[b]}
    for b in ("b0", "b4")
)
RECIPE = {
    "lr": 6e-5,
    "warmup": 1500,
    "head_factor": 10.0,
    "drop_path": 0.1,
    "dropout": 0.1,
    "scale": (0.5, 2.0),
    "photometric": True,
}
SIZES = {
    "tiny": Size(**MICRO, crop=64, stride=48, steps=4, batch=4, lr=3e-3, warmup=1, train_scenes=8, test_scenes=2),
    "laptop": Size(
        **MICRO, crop=64, stride=48, steps=800, batch=16, lr=3e-3, warmup=20, train_scenes=400, test_scenes=48
    ),
    "real": Size(**B0, crop=96, stride=72, steps=500, batch=8, lr=1e-3, warmup=50, scale=(0.75, 1.5)),
    "full": Size(**B0, crop=768, stride=512, steps=160_000, batch=8, **RECIPE),
}
ADE20K = Size(**B4, crop=512, stride=512, steps=160_000, batch=16, **RECIPE)


def resolution_costs_less_without_positional_encoding(trial: Trial) -> dict[str, float]:
    """One seed: Mix-FFN, and plain FFNs with an interpolated positional encoding, trained alike on crops.

    d is the mean IoU by sliding windows of the training size minus that of the whole, larger image. Both arms see the
    same crops in the same order. ``drop_gap`` is d with positional encodings minus d without.
    """
    size = SIZES[trial.scale]
    task = _task(trial, size)
    values = {}
    for number, arm in enumerate(("mix_ffn", "positional_encoding")):
        model = _train(trial, size, task, arm, number, 2)
        for how in ("sliding", "whole"):
            values[f"miou_{how}_{arm}"] = _evaluate(trial, model, task, size if how == "sliding" else None)
        values[f"drop_{arm}"] = values[f"miou_sliding_{arm}"] - values[f"miou_whole_{arm}"]
    return {
        "drop_gap": values["drop_positional_encoding"] - values["drop_mix_ffn"],
        "whole_gain": values["miou_whole_mix_ffn"] - values["miou_whole_positional_encoding"],
        "sliding_gain": values["miou_sliding_mix_ffn"] - values["miou_sliding_positional_encoding"],
        **values,
    }


def b4_is_small_and_accurate(trial: Trial) -> dict[str, float]:
    """B4's parameters and multiply-adds, counted; the mean IoU of ADE20K at the full scale, of scenes below it."""
    with torch.device("meta"):
        b4 = segformer_b4()
    full = trial.scale == "full"
    size = ADE20K if full else replace(SIZES[trial.scale], steps=SIZES[trial.scale].steps // 4)
    task = _task(trial, size)
    model = _train(trial, size, task, "mix_ffn", 0, 1, pretrained="mit_b4.safetensors" if full else None)
    return {
        "parameters": parameters(b4) / 1e6,
        "macs": macs(b4, (3, 512, 512)) / 1e9,
        "miou": _evaluate(trial, model, task, None),
    }


@dataclass(frozen=True)
class Task:
    """What an arm learns and is tested on: training crops by index, test images one by one or in batches."""

    classes: int
    train: int
    crops: Callable[[torch.Generator, Tensor], tuple[Tensor, Tensor]]
    test: Callable[[], Iterator[tuple[Tensor, Tensor]]]


def _task(trial: Trial, size: Size) -> Task:
    return _scenes(trial, size) if size.train_scenes else _folder(trial, size)


def _scenes(trial: Trial, size: Size) -> Task:
    images, labels = render_scenes(trial.rng("train scenes"), size.train_scenes, size.scene)
    trial.used("scenes", scenes_fingerprint(images, labels))
    x, y = torch.from_numpy(images) - 0.5, torch.from_numpy(labels).long()
    test_images, test_labels = render_scenes(trial.rng("test scenes"), size.test_scenes, size.scene)
    test_x, test_y = torch.from_numpy(test_images) - 0.5, torch.from_numpy(test_labels).long()

    def crops(generator: torch.Generator, indices: Tensor) -> tuple[Tensor, Tensor]:
        corner = torch.randint(0, size.scene - size.crop + 1, (2, len(indices), 1), generator=generator)
        rows, columns = corner + torch.arange(size.crop)
        place = (indices[:, None, None], rows[:, :, None], columns[:, None, :])
        return x.permute(0, 2, 3, 1)[place].permute(0, 3, 1, 2), y[place]

    return Task(len(CLASSES), len(x), crops, lambda: zip(test_x.split(16), test_y.split(16), strict=True))


def _folder(trial: Trial, size: Size) -> Task:
    if trial.data_path is None:
        raise ValueError(
            f"scale {trial.scale!r} needs data of yours: give --data PATH, with {{train,test}}/{{images,labels}}"
        )
    train = load_masks(trial.data_path, part="train")
    classes = len(train.classes)
    test = load_masks(trial.data_path, part="test", num_classes=classes)
    for part, masks in (("train", train), ("test", test)):
        trial.used(f"{masks.name}/{part}", masks.fingerprint)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def crops(generator: torch.Generator, indices: Tensor) -> tuple[Tensor, Tensor]:
        x, y = train.crops(indices, size.crop, generator, scale=size.scale, photometric=size.photometric)
        return (x - mean) / std, y

    def images() -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(len(test)):
            x, y = test[i]
            yield (x[None].float() / 255 - mean) / std, y[None].long()

    return Task(classes, len(train), crops, images)


def _train(
    trial: Trial, size: Size, task: Task, arm: str, number: int, arms: int, pretrained: str | None = None
) -> SegFormer:
    with trial.seeded("weights"):
        encoder = MixTransformer(
            size.widths,
            size.depths,
            size.heads,
            size.reductions,
            drop_path_rate=size.drop_path,
            mix_ffn=arm == "mix_ffn",
            pos_embed_size=size.crop if arm == "positional_encoding" else None,
        )
        model = SegFormer(encoder, task.classes, size.decoder, dropout=size.dropout, early_fusion=True)
    if pretrained is not None:
        encoder.load_state_dict(_imagenet(trial, trial.data_path / pretrained))
    fit(
        model,
        lambda model, x, y: segmentation_loss(model(x), y),
        (torch.arange(task.train),),
        optimizer=torch.optim.AdamW(param_groups(model, lr=size.lr, head_factor=size.head_factor)),
        steps=size.steps,
        batch_size=size.batch,
        seed=trial.seed,
        schedule=poly_schedule(warmup=size.warmup),
        transform=task.crops,
        clip=1.0 if size.lr > 1e-4 else None,  # from scratch, at high rates, the first steps can be wild
        checkpoint=trial.checkpoint(arm),
        device=trial.device,
        on_step=lambda step, total, loss: trial.progress(number * total + step + 1, arms * total, f"{arm} {loss:.3f}"),
    )
    return model.eval()


def _imagenet(trial: Trial, path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(
            f"scale {trial.scale!r} starts from ImageNet weights: put {path.name} (nvidia/mit-b4) into {path.parent}"
        )
    state = MixTransformer.convert_state_dict(load_file(path))
    return {key: value for key, value in state.items() if not key.startswith("head.")}


def _evaluate(trial: Trial, model: SegFormer, task: Task, sliding: Size | None) -> float:
    """The mean IoU over all test images, looked at whole or by windows of the training size."""
    windows = {} if sliding is None else {"crop": sliding.crop, "stride": sliding.stride}
    total = torch.zeros(task.classes, task.classes, dtype=torch.long)
    for x, y in task.test():
        predicted = model.predict(x.to(trial.device), tuple(y.shape[1:]), **windows).cpu()
        total += confusion_matrix(predicted, y, task.classes)
    return mean_iou(total)
