"""What DynamicViT claims, measured: two thirds of the tokens can go, and time with them, for little accuracy."""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saigen.data import split
from saigen.measure import macs, speed_ratio
from saigen.nn.vision_transformer import Block, VisionTransformer
from saigen.papers.vision.dynamic_vit.model import (
    DynamicViT,
    DynamicViTLoss,
    DynamicViTOutput,
    dynamic_vit_deit_small,
    dynamic_vit_loss,
    dynamic_vit_param_groups,
    dynamic_vit_schedule,
    gather_tokens,
)
from saigen.train import EMA, accuracy, cosine, fit
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    """How big the experiment is at one scale."""

    net: dict[str, Any]
    prune_at: tuple[int, ...]
    batch: int
    dense_epochs: int
    dense_lr: float
    tune_epochs: int
    tune_lr: float = 1e-3  # of the predictors
    backbone_scale: float = 0.01  # the backbone's rate is this much of it
    warmup_epochs: int = 1
    freeze_epochs: int = 0
    ratio_weight: float = 2.0
    images: int = 0  # side of the user's images; 0: scenes of digits
    train: int | None = None  # how many images to train with; None: all
    ema: float | None = None
    test_scenes: int = 4  # of each test digit
    clock_net: dict[str, Any] = field(default_factory=lambda: DEIT_S)
    clock_batch: int = 8
    clock_seconds: float = 0.3


# So few channels started with std 0.02 would spend the whole run on a plateau. A net this shallow has read all tokens
# after one block: dropping begins before it, or it would not matter which go. The tuning has 144 steps, not 37,500: the
# ratio loss has to bite sooner.
SCENES = {"img_size": 24, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 4, "num_heads": 2, "init": "jax"}
DEIT_TI_4 = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "num_heads": 3}
DEIT_S = {"img_size": 224, "patch_size": 16, "embed_dim": 384, "num_heads": 6}
SIZES = {
    "tiny": Size(
        SCENES, (0, 1, 2), 16, 1, 8e-3, 1, 3e-3, 0.3, train=64, test_scenes=1, clock_net=SCENES, clock_seconds=0.02
    ),
    "laptop": Size(SCENES, (0, 1, 2), 64, 20, 8e-3, 8, 3e-3, 0.3, ratio_weight=20.0),
    "real": Size(DEIT_TI_4, (3, 6, 9), 128, 30, 1e-3, 10, 1e-3, 0.1, warmup_epochs=2, freeze_epochs=1, images=32),
    # the paper's recipe, from a teacher trained as DeiT was
    "full": Size(DEIT_S, (3, 6, 9), 1024, 300, 1e-3, 30, warmup_epochs=5, freeze_epochs=5, images=224, ema=0.9999),
}
KEEP_RATIO = 0.7


class Task(NamedTuple):
    """Images to train with and to test on, and what makes a batch of the former."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    transform: Callable[..., tuple[Tensor, Tensor]]
    prepare: Callable[[Tensor], Tensor]


def digit_scenes(
    generator: torch.Generator, x: Tensor, y: Tensor, pool: Tensor, clutter: int = 4, contrast: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Each digit of 8x8 pixels somewhere on a 6x6 grid of 4x4 cells, so on 4 of 36 tokens; the rest is to be ignored.

    That is noise, and ``clutter`` quarters of digits of ``pool`` at lower contrast. (b, 1, 8, 8) -> (b, 1, 24, 24).
    """
    b = len(y)
    image = torch.arange(b)[:, None, None]
    cells = 0.1 * torch.rand(b, 36, 4, 4, generator=generator)
    quarters = pool.view(-1, 2, 4, 2, 4).transpose(2, 3).reshape(-1, 4, 4)
    place = torch.rand(b, 36, generator=generator).argsort(dim=1)[:, :clutter]
    cells[image[:, 0], place] = contrast * quarters[torch.randint(len(quarters), (b, clutter), generator=generator)]
    scene = cells.view(b, 6, 6, 4, 4).transpose(2, 3).reshape(b, 24, 24)
    row, column = 4 * torch.randint(5, (2, b, 1), generator=generator) + torch.arange(8)
    scene[image, row[:, :, None], column[:, None, :]] = x[:, 0]
    return scene[:, None], y


def make_task(trial: Trial, size: Size) -> Task:
    """Digit scenes, or the user's images with crops, flips, mixup and cutmix (DeiT's; RandAugment is not in it)."""
    if not size.images:
        digits = trial.data("digits")
        train, test = (digits.subset(part) for part in split(digits.y, (1200, 597), trial.rng("split")))
        train = train.subset(range(size.train or len(train)))
        generator, copies = trial.generator("test scenes"), size.test_scenes
        test_x, test_y = digit_scenes(generator, test.x.repeat(copies, 1, 1, 1), test.y.repeat(copies), test.x)

        def transform(generator: torch.Generator, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return digit_scenes(generator, x, y, train.x)

        return Task(train.x, train.y, test_x, test_y, transform, lambda x: x)

    train, test = (trial.data("images", size=size.images, part=part) for part in ("train", "test"))
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    def prepare(x: Tensor) -> Tensor:
        return ((x.float() / 255 if x.dtype == torch.uint8 else x) - mean) / std

    def augment(generator: torch.Generator, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return mix(generator, crop_and_flip(generator, prepare(x)), y, len(train.classes))

    return Task(train.x, train.y, test.x, test.y, augment, prepare)


def crop_and_flip(generator: torch.Generator, x: Tensor) -> Tensor:
    """Each image moved by up to an eighth of its side, over mirrored borders, and flipped half of the time."""
    b, _, side, _ = x.shape
    pad = side // 8
    x = F.pad(x, (pad,) * 4, mode="reflect")
    rows, columns = torch.randint(2 * pad + 1, (2, b, 1), generator=generator) + torch.arange(side)
    flip = torch.rand(b, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    return x[torch.arange(b)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def mix(generator: torch.Generator, x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mixup (0.8) or cutmix (1.0), each for half of the batches, with labels smoothed by 0.1."""
    soft = F.one_hot(y, classes).float() * 0.9 + 0.1 / classes
    use_cutmix = bool(torch.rand((), generator=generator) < 0.5)
    alpha = torch.full((2,), 1.0 if use_cutmix else 0.8)
    a, b = torch._standard_gamma(alpha, generator=generator).tolist()
    share = a / (a + b)
    if use_cutmix:
        side = x.shape[-1]
        cut = round(side * (1 - share) ** 0.5)
        top, left = torch.randint(side - cut + 1, (2,), generator=generator).tolist()
        x = x.clone()
        x[..., top : top + cut, left : left + cut] = x.flip(0)[..., top : top + cut, left : left + cut]
        share = 1 - cut * cut / side**2
    else:
        x = share * x + (1 - share) * x.flip(0)
    return x, share * soft + (1 - share) * soft.flip(0)


# --- what DynamicViT is held against: the same counts, in training as in use, chosen by a rule ------------------------

Rule = Callable[[Block, Tensor], Tensor]


def at_random(block: Block, x: Tensor) -> Tensor:
    return torch.rand(x.shape[0], x.shape[1] - 1, device=x.device)


def by_class_attention(block: Block, x: Tensor) -> Tensor:
    """How much the class token attends to each token in the block to come, mean over heads."""
    q, k, _ = block.attn.heads(block.norm1(x))
    attention = (q[:, :, :1] * block.attn.scale @ k.transpose(-2, -1)).softmax(dim=-1)
    return attention.mean(dim=1)[:, 0, 1:]


class ThinnedByRule(nn.Module):
    """``backbone`` thinned to ``counts`` tokens before the blocks ``prune_at``: those that ``rule`` scores highest.

    In training mode it gives logits, tokens and which of the grid they are, else logits. No counts: the dense backbone.
    """

    def __init__(
        self, backbone: VisionTransformer, prune_at: tuple[int, ...], counts: tuple[int, ...], rule: Rule
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.counts = dict(zip(prune_at, counts, strict=True))
        self.rule = rule

    def forward(self, images: Tensor) -> Any:
        x = self.backbone.embed(images)
        now = torch.arange(x.shape[1] - 1, device=x.device).expand(x.shape[0], -1)
        for i, block in enumerate(self.backbone.blocks):
            if i in self.counts:
                with torch.no_grad():
                    best = self.rule(block, x).topk(self.counts[i], dim=1).indices
                x, now = gather_tokens(x, F.pad(best + 1, (1, 0))), now.gather(1, best)
            x = block(x)
        x = self.backbone.norm(x)
        logits = self.backbone.head(x[:, 0])
        return (logits, x[:, 1:], now) if self.training else logits


def pruning_tokens_is_cheap(trial: Trial) -> dict[str, float]:
    """One seed: a dense net, then from its weights, each tuned as long: dense, learned, random and by attention."""
    size = SIZES[trial.scale]
    task = make_task(trial, size)
    classes = int(task.y.max()) + 1
    per_epoch = len(task.y) // size.batch
    arms = 5

    def train(name: str, model: nn.Module, loss: Callable, optimizer: torch.optim.Optimizer, **how: Any) -> nn.Module:
        average = EMA(model, size.ema) if size.ema else None
        fit(
            model,
            loss,
            (task.x, task.y),
            optimizer=optimizer,
            batch_size=size.batch,
            seed=trial.seed,
            transform=task.transform,
            clip=1.0,
            ema=average,
            checkpoint=trial.checkpoint(name),
            device=trial.device,
            **how,
        )
        train.done += 1
        trial.progress(train.done, arms, name)
        return average.model.requires_grad_() if average else model

    train.done = 0

    def score(model: nn.Module) -> float:
        with trial.seeded("test"):  # the random rule draws
            return accuracy(lambda x: model(task.prepare(x).to(trial.device)).cpu(), task.test_x, task.test_y)

    with trial.seeded("weights"):
        teacher = VisionTransformer(num_classes=classes, **size.net)
    teacher = train(
        "dense",
        teacher,
        lambda model, x, y: F.cross_entropy(model(x), y),
        torch.optim.AdamW(teacher.parameters(), lr=size.dense_lr, weight_decay=0.05),
        epochs=size.dense_epochs,
        schedule=cosine(warmup=max(1, size.dense_epochs // 10) * per_epoch),
    )
    with trial.seeded("predictors"):
        student = DynamicViT(copy.deepcopy(teacher), prune_at=size.prune_at, keep_ratio=KEEP_RATIO)
        if size.net.get("init") == "jax":
            for module in student.score_predictor.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
    criterion = DynamicViTLoss(teacher, student.keep_ratios, ratio_weight=size.ratio_weight)

    def rule_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The same loss; what a rule leaves needs no ratio term."""
        logits, tokens, now = model(x)
        with torch.no_grad():
            features = teacher.forward_features(x)
        ones = tokens.new_ones(tokens.shape[:2])
        output = DynamicViTOutput(logits, tokens, ones, (ones,))
        return dynamic_vit_loss(output, y, teacher.head(features[:, 0]), gather_tokens(features[:, 1:], now), [1.0])

    def tune(name: str, model: nn.Module, loss: Callable, parts: nn.Module, freeze_epochs: int) -> float:
        groups = dynamic_vit_param_groups(parts, lr=size.tune_lr, backbone_scale=size.backbone_scale)
        optimizer = torch.optim.AdamW(groups)
        schedule = dynamic_vit_schedule(
            optimizer,
            per_epoch,
            epochs=size.tune_epochs,
            warmup_epochs=size.warmup_epochs,
            freeze_epochs=freeze_epochs,
        )

        def follow(step: int, total: int, value: float) -> None:
            schedule.last_epoch = step  # also right where a run was taken up in the middle
            schedule.step()

        return score(train(name, model, loss, optimizer, epochs=size.tune_epochs, on_step=follow))

    def thinned(name: str, rule: Rule, counts: tuple[int, ...] = student.keep_counts) -> float:
        model = ThinnedByRule(copy.deepcopy(teacher), size.prune_at if counts else (), counts, rule)
        return tune(name, model, rule_loss, model.backbone, 0)

    values = {
        "accuracy_teacher": score(teacher),
        "accuracy_dense": thinned("dense tuned", at_random, counts=()),
        "accuracy_dynamic": tune(
            "dynamic", student, lambda model, x, y: criterion(model(x), x, y), student, size.freeze_epochs
        ),
        "accuracy_random": thinned("random", at_random),
        "accuracy_attention": thinned("attention", by_class_attention),
    }
    values["accuracy_drop"] = values["accuracy_dense"] - values["accuracy_dynamic"]
    values["accuracy_drop_random"] = values["accuracy_dense"] - values["accuracy_random"]
    values["accuracy_drop_attention"] = values["accuracy_dense"] - values["accuracy_attention"]
    return values | _cost(trial, size)


def _cost(trial: Trial, size: Size) -> dict[str, float]:
    """What DeiT-S saves: multiply-adds, and wall-clock time of inference on this machine."""
    dense, pruned = (
        macs(lambda ratio=ratio: dynamic_vit_deit_small(keep_ratio=ratio), (3, 224, 224)) for ratio in (1.0, KEEP_RATIO)
    )
    with trial.seeded("clock"):
        backbone = VisionTransformer(**size.clock_net).to(trial.device).eval()
        student = DynamicViT(
            backbone, prune_at=size.prune_at if size.clock_net is SCENES else (3, 6, 9), keep_ratio=KEEP_RATIO
        )
        shape = backbone.default_cfg["input_size"]
        images = torch.rand(size.clock_batch, *shape).to(trial.device)

    def run(model: nn.Module) -> Callable[[], Tensor]:
        @torch.inference_mode()
        def call() -> Tensor:
            return model(images)

        return call

    student.to(trial.device).eval()
    speedup = speed_ratio(run(backbone), run(student), pairs=5, threads=os.cpu_count(), seconds=size.clock_seconds)
    return {"flops_drop": 1 - pruned / dense, "macs_dense": dense, "macs_pruned": pruned, "speedup": speedup}
