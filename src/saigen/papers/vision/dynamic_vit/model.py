"""DynamicViT (Rao et al., 2021, arXiv 2106.02034): a vision transformer that drops the tokens an image does not need.

At a few blocks a small predictor scores every spatial token. Training keeps all of them, so that batches stay
rectangular and gradients flow: a sampled decision D switches off the *attention* to the dropped ones. Inference gathers
the best ⌊N·ρˢ⌋ tokens of stage s and goes on with those alone.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from saigen.nn.attention import Attention
from saigen.nn.classifier import Classifier
from saigen.nn.lv_vit import LVViT
from saigen.nn.vision_transformer import (
    Block,
    VisionTransformer,
    convert_vit_state_dict,
    embed_image,
    fit_positions,
    fresh_head,
)

# --- the pieces ------------------------------------------------------------------------------------------------------


class TokenPredictor(nn.Module):
    """Log-probabilities of keeping (index 0) and dropping (index 1) each spatial token: (b, n, dim) -> (b, n, 2).

    Half of the embedded channels stay local, the other half are averaged over the tokens kept so far, ``decision`` D
    (b, n) in {0, 1} (None: all of them), and told to every token. Raises ``ValueError``
    where ``dim`` is no multiple of 4.

    >>> TokenPredictor(64)(torch.rand(2, 9, 64)).exp().sum(-1).allclose(torch.ones(2, 9))
    True
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 4 or dim % 4:
            raise ValueError(f"dim is {dim}, allowed are multiples of 4")
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2),
            nn.GELU(),
            nn.Linear(dim // 2, dim // 4),
            nn.GELU(),
            nn.Linear(dim // 4, 2),
            nn.LogSoftmax(dim=-1),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self, x: Float[Tensor, "b n d"], decision: Float[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n 2"]:
        local, spread = self.in_conv(x).chunk(2, dim=-1)
        if decision is None:
            context = spread.mean(dim=1, keepdim=True)
        else:
            kept = decision.unsqueeze(-1).to(spread.dtype)
            # an image may lose every token in training: then the context is zero, not 0/0
            context = (spread * kept).sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True).clamp(min=1)
        return self.out_conv(torch.cat((local, context.expand_as(local)), dim=-1))


def masked_softmax(
    scores: Float[Tensor, "b h n n"], policy: Float[Tensor, "b n"], eps: float = 1e-6
) -> Float[Tensor, "b h n n"]:
    """Softmax over the tokens that ``policy`` keeps, and the query's own.

    With G_ij = policy_j off the diagonal and 1 on it: A_ij = (G_ij exp(s_ij) + eps/n) / (Σ_j G_ij exp(s_ij) + eps).
    A dropped token still attends to itself and to the kept ones, but no other token sees it. Differentiable in both
    arguments; in float32 at least, whatever the scores are in.

    >>> masked_softmax(torch.zeros(1, 1, 2, 2), torch.tensor([[1.0, 0.0]])).round(decimals=3).tolist()
    [[[[1.0, 0.0], [0.5, 0.5]]]]
    """
    n = scores.shape[-1]
    s = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    keep = policy.to(s.dtype)[:, None, None, :]
    eye = torch.eye(n, dtype=s.dtype, device=s.device)
    a = (s - s.amax(dim=-1, keepdim=True)).exp() * (keep + (1 - keep) * eye)
    return ((a + eps / n) / (a.sum(dim=-1, keepdim=True) + eps)).to(scores.dtype)


def masked_block(block: Block, x: Float[Tensor, "b n d"], policy: Float[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
    """One transformer block with masked instead of plain attention; the same weights."""
    attention: Attention = block.attn
    q, k, v = attention.heads(block.norm1(x))
    a = attention.attn_drop(masked_softmax(q * attention.scale @ k.transpose(-2, -1), policy))
    attended = attention.proj_drop(attention.proj((a @ v).transpose(1, 2).flatten(2)))
    x = x.add(block.drop_path1(attended), alpha=block.branch_scale)
    return x.add(block.drop_path2(block.mlp(block.norm2(x))), alpha=block.branch_scale)


def gather_tokens(x: Float[Tensor, "b n d"], indices: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
    """The tokens at ``indices``, image by image, in that order.

    >>> gather_tokens(torch.arange(3.0).reshape(1, 3, 1), torch.tensor([[2, 0]])).flatten().tolist()
    [2.0, 0.0]
    """
    b, n, d = x.shape
    # whole rows of a flat table: several times faster than Tensor.gather over an expanded index
    rows = indices + n * torch.arange(b, device=x.device).unsqueeze(1)
    return x.reshape(b * n, d).index_select(0, rows.flatten()).view(b, -1, d)


class DynamicViTOutput(NamedTuple):
    """What a forward pass in training mode gives."""

    logits: Tensor
    """(b, classes), of the class token."""
    tokens: Tensor
    """Spatial tokens after the last norm, (b, n, dim); of LV-ViT the logits of each, (b, n, classes)."""
    mask: Tensor
    """The last decision, (b, n), without gradient: which of ``tokens`` were kept to the end."""
    decisions: tuple[Tensor, ...]
    """D of every stage, each (b, n) in {0, 1}, never growing, with straight-through gradients."""


# --- the model -------------------------------------------------------------------------------------------------------


class DynamicViT(Classifier):
    """A vision transformer whose tokens thin out: to ⌊N·ρ⌋, ⌊N·ρ²⌋, ⌊N·ρ³⌋ … before the blocks ``prune_at`` (from 0).

    Takes the parts of ``backbone`` over, weights included (copy it first where it shall serve as the teacher); the key
    layout is the official one, the backbone's plus ``score_predictor.N``. ``keep_ratio`` is ρ in (0, 1]; at 1 the
    predictors are not asked in eval mode and the model is the dense backbone.

    In eval mode images (b, c, h, w) give logits (b, classes) and dropped tokens are gone from memory and time. In
    training mode they give a ``DynamicViTOutput``, which ``DynamicViTLoss`` takes; the decisions are drawn from the
    global generator. Raises ``ValueError`` for wrong blocks and ratios.

    >>> vit = VisionTransformer(img_size=32, patch_size=4, embed_dim=64, depth=6, num_heads=4, num_classes=10)
    >>> DynamicViT(vit, prune_at=(2, 3, 4)).eval()(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    classifier_name = "head"

    def __init__(
        self,
        backbone: VisionTransformer | LVViT,
        *,
        prune_at: Sequence[int] = (3, 6, 9),
        keep_ratio: float = 0.7,
    ) -> None:
        super().__init__()
        prune_at = tuple(prune_at)
        depth = len(backbone.blocks)
        if not prune_at or list(prune_at) != sorted(set(prune_at)) or prune_at[0] < 0 or prune_at[-1] >= depth:
            raise ValueError(f"prune_at is {prune_at}, allowed are growing block numbers from 0 to {depth - 1}")
        if not 0.0 < keep_ratio <= 1.0:
            raise ValueError(f"keep_ratio is {keep_ratio}, allowed is 0 < keep_ratio <= 1")
        if getattr(backbone, "global_pool", "token") != "token" or backbone.cls_token is None:
            raise ValueError("backbone pools by the mean, allowed is a backbone that classifies its class token")
        n = backbone.grid_size[0] * backbone.grid_size[1]
        self.keep_ratios = tuple(keep_ratio**stage for stage in range(1, len(prune_at) + 1))
        self.keep_counts = tuple(int(n * ratio) for ratio in self.keep_ratios)
        if self.keep_counts[-1] < 1:
            raise ValueError(f"keep_ratio is {keep_ratio}, allowed is what leaves a token of {n} after the last stage")
        self.prune_at = prune_at
        self.keep_ratio = keep_ratio
        self.img_size, self.grid_size, self.in_chans = backbone.img_size, backbone.grid_size, backbone.in_chans
        self.num_classes, self.num_features, self.embed_dim = (
            backbone.num_classes,
            backbone.embed_dim,
            backbone.embed_dim,
        )
        self.num_prefix_tokens = 1
        self.default_cfg = dict(backbone.default_cfg)

        self.patch_embed = backbone.patch_embed
        self.cls_token = backbone.cls_token
        self.pos_embed = backbone.pos_embed
        self.pos_drop = backbone.pos_drop
        self.blocks = backbone.blocks
        self.norm = backbone.norm
        self.head = backbone.head
        self.aux_head = getattr(backbone, "aux_head", None)
        self.score_predictor = nn.ModuleList(TokenPredictor(self.embed_dim) for _ in prune_at)
        self.register_load_state_dict_pre_hook(fit_positions)

    def embed(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Patch embeddings behind the class token, positions added."""
        return embed_image(self, x)

    # training: nobody leaves, the dropped are not listened to

    def forward_masked(
        self, x: Float[Tensor, "b c h w"], decisions: Sequence[Float[Tensor, "b n"]] | None = None
    ) -> DynamicViTOutput:
        """The training pass: all tokens, masked attention. ``decisions`` of each stage, if given, are not drawn."""
        x = self.embed(x)
        d = x.new_ones(x.shape[0], x.shape[1] - 1)
        cls = x.new_ones(x.shape[0], 1)
        policy = torch.cat((cls, d), dim=1)
        drawn: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i in self.prune_at:
                stage = len(drawn)
                if decisions is None:
                    log_pi = self.score_predictor[stage](x[:, 1:], d)
                    keep = F.gumbel_softmax(log_pi.float(), hard=True, dim=-1)[..., 0].to(d.dtype)
                else:
                    keep = decisions[stage].to(d.dtype)
                d = keep * d  # what is gone stays gone
                drawn.append(d)
                policy = torch.cat((cls, d), dim=1)
            x = masked_block(block, x, policy)
        x = self.norm(x)
        tokens = x[:, 1:] if self.aux_head is None else self.aux_head(x[:, 1:])
        return DynamicViTOutput(self.head(x[:, 0]), tokens, d.detach(), tuple(drawn))

    # inference: the dropped are gone

    def _thin_out(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.embed(x)
        now = torch.arange(x.shape[1] - 1, device=x.device).expand(x.shape[0], -1)
        kept: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i in self.prune_at:
                stage = len(kept)
                if self.keep_counts[stage] < now.shape[1]:
                    # all tokens that are left were kept so far: D is one everywhere
                    scores = self.score_predictor[stage](x[:, 1:])[..., 0]
                    best = scores.topk(self.keep_counts[stage], dim=1).indices
                    x = gather_tokens(x, F.pad(best + 1, (1, 0)))  # the padded 0 is the class token
                    now = now.gather(1, best)
                kept.append(now)
            x = block(x)
        return self.norm(x), kept

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k d"]:
        """The class token and the tokens kept to the end, after the last norm, the best of the last stage first."""
        return self._thin_out(x)[0]

    @torch.no_grad()
    def kept_tokens(self, x: Float[Tensor, "b c h w"]) -> list[Int[Tensor, "b _"]]:
        """Which of the grid's tokens (row by row, from 0) each stage keeps, the best first: what the model looks at."""
        return self._thin_out(x)[1]

    def forward_head(self, x: Float[Tensor, "b k d"], pre_logits: bool = False) -> Float[Tensor, "b c"]:
        """Logits from the tokens of ``forward_features``; with ``pre_logits`` the class token instead."""
        if pre_logits or not self.num_classes:
            return x[:, 0]
        logits = self.head(x[:, 0])
        return logits if self.aux_head is None else logits + 0.5 * self.aux_head(x[:, 1:]).amax(dim=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"] | DynamicViTOutput:
        return self.forward_masked(x) if self.training else self.forward_head(self.forward_features(x))

    def new_classifier(self, num_classes: int) -> nn.Linear:
        return fresh_head(self.norm, num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Puts a fresh head of ``num_classes`` outputs (0: none) in the old one's place (of LV-ViT both heads)."""
        super().reset_classifier(num_classes)
        if self.aux_head is not None:
            self.aux_head = self.new_classifier(num_classes) if num_classes else nn.Identity()

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our layout, which is the official one, from checkpoints with wrappers or with a backbone of Transformers."""
        return convert_vit_state_dict(state)


# --- the loss ------------------------------------------------------------------------------------------


def dynamic_vit_loss(
    output: DynamicViTOutput,
    target: Int[Tensor, "b"] | Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    teacher_tokens: Float[Tensor, "b n c"],
    keep_ratios: Sequence[float],
    *,
    ratio_weight: float = 2.0,
    kl_weight: float = 0.5,
    token_weight: float = 0.5,
    token_loss: Literal["mse", "kl"] = "mse",
) -> Float[Tensor, ""]:
    """L = L_cls + λ_ratio L_ratio + λ_kl L_kl + λ_distill L_distill.

    L_cls: cross-entropy with class indices or soft targets. L_ratio: mean over stages and images of the squared
    difference between the share of kept tokens and its target. L_kl: KL(teacher ‖ student) of the logits, mean over
    images. L_distill, over the tokens kept to the end: mean squared difference of features ("mse", DeiT) or
    KL(teacher ‖ student) of the token logits ("kl", LV-ViT). Raises ``ValueError`` for an unknown ``token_loss``.
    """
    if token_loss not in ("mse", "kl"):
        raise ValueError(f"token_loss is {token_loss!r}, allowed is 'mse' or 'kl'")
    if len(keep_ratios) != len(output.decisions):
        raise ValueError(f"keep_ratios has {len(keep_ratios)} stages, allowed is the output's {len(output.decisions)}")
    classification = F.cross_entropy(output.logits, target)
    ratio = sum(
        (d.mean(dim=1) - rho).square().mean() for d, rho in zip(output.decisions, keep_ratios, strict=True)
    ) / len(output.decisions)
    kl = _kl(teacher_logits, output.logits).mean()
    if token_loss == "mse":
        per_token = (output.tokens - teacher_tokens).square().mean(dim=-1)
    else:
        per_token = _kl(teacher_tokens, output.tokens)
    distill = (per_token * output.mask).sum() / output.mask.sum().clamp(min=1)
    return classification + ratio_weight * ratio + kl_weight * kl + token_weight * distill


def _kl(teacher: Tensor, student: Tensor) -> Tensor:
    p, q = teacher.log_softmax(dim=-1), student.log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1)


class DynamicViTLoss(nn.Module):
    """``dynamic_vit_loss`` with its teacher: the dense backbone, which sees the same images in eval mode, frozen.

    ``forward(output, images, target)``. An LV-ViT teacher implies ``token_loss="kl"``. DeiT-B's recipe has
    ``ratio_weight=5``.

    >>> import copy
    >>> teacher = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4, num_classes=10)
    >>> student = DynamicViT(copy.deepcopy(teacher), prune_at=(1, 2, 3)).train()
    >>> images, labels = torch.rand(2, 3, 32, 32), torch.tensor([1, 2])
    >>> DynamicViTLoss(teacher, student.keep_ratios)(student(images), images, labels).backward()
    """

    def __init__(
        self,
        teacher: VisionTransformer | LVViT,
        keep_ratios: Sequence[float],
        *,
        ratio_weight: float = 2.0,
        kl_weight: float = 0.5,
        token_weight: float = 0.5,
    ) -> None:
        super().__init__()
        self.teacher = teacher.eval()
        self.keep_ratios = tuple(keep_ratios)
        self.weights: dict[str, Any] = {
            "ratio_weight": ratio_weight,
            "kl_weight": kl_weight,
            "token_weight": token_weight,
            "token_loss": "kl" if isinstance(teacher, LVViT) else "mse",
        }

    def train(self, mode: bool = True) -> "DynamicViTLoss":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, output: DynamicViTOutput, images: Float[Tensor, "b c h w"], target: Tensor) -> Float[Tensor, ""]:
        with torch.no_grad():
            features = self.teacher.forward_features(images)
            logits, tokens = self.teacher.head(features[:, 0]), features[:, 1:]
            if isinstance(self.teacher, LVViT):
                tokens = self.teacher.aux_head(tokens)
        return dynamic_vit_loss(output, target, logits, tokens, self.keep_ratios, **self.weights)


# --- the recipe ------------------------------------------------------------------


def dynamic_vit_param_groups(
    model: nn.Module, *, lr: float = 1e-3, weight_decay: float = 0.05, backbone_scale: float = 0.01
) -> list[dict[str, Any]]:
    """AdamW's groups: predictors at ``lr``, the backbone at ``lr * backbone_scale``, no decay for vectors.

    Class token and positions are in no group: they stay as the backbone was trained. Each group says in
    ``"backbone"`` whether ``dynamic_vit_schedule`` shall hold it still at first.
    """
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in ("cls_token", "pos_embed"):
            groups.setdefault((not name.startswith("score_predictor"), parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": lr * (backbone_scale if backbone else 1.0),
            "weight_decay": weight_decay if decays else 0.0,
            "backbone": backbone,
        }
        for (backbone, decays), parameters in groups.items()
    ]


def dynamic_vit_schedule(
    optimizer: torch.optim.Optimizer,
    steps_per_epoch: int,
    *,
    epochs: int = 30,
    warmup_epochs: int = 5,
    freeze_epochs: int = 5,
    final: float = 1e-3,
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up from 0, then half a cosine down to ``final`` times the rate; the backbone's rate is 0 at first.

    Step it once a batch. The paper's 1e-3 to 1e-6 is ``final=1e-3``. The backbone stands still for ``freeze_epochs``.
    """
    warmup, total = warmup_epochs * steps_per_epoch, epochs * steps_per_epoch

    def factor(step: int, freeze: int) -> float:
        if step < freeze:
            return 0.0
        if step < warmup:
            return step / max(warmup - 1, 1)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(total - warmup, 1))))

    freezes = [freeze_epochs * steps_per_epoch if group.get("backbone") else 0 for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step, f=f: factor(step, f) for f in freezes])


# --- the models of Table 1 -------------------------------------------------------------------------------------------


def _deit(keep_ratio: float, num_classes: int, in_chans: int, img_size: int, drop_path: float, dim: int) -> DynamicViT:
    backbone = VisionTransformer(
        embed_dim=dim,
        num_heads=dim // 64,
        num_classes=num_classes,
        in_chans=in_chans,
        img_size=img_size,
        drop_path_rate=drop_path,
    )
    return DynamicViT(backbone, keep_ratio=keep_ratio)


def dynamic_vit_deit_256(
    *,
    keep_ratio: float = 0.7,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int = 224,
    drop_path_rate: float = 0.0,
) -> DynamicViT:
    """DynamicViT on DeiT with 256 channels: 10.3 M parameters, 1.375 GMACs at ρ = 0.7."""
    return _deit(keep_ratio, num_classes, in_chans, img_size, drop_path_rate, 256)


def dynamic_vit_deit_small(
    *,
    keep_ratio: float = 0.7,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int = 224,
    drop_path_rate: float = 0.0,
) -> DynamicViT:
    """DynamicViT on DeiT-S: 22.8 M parameters, 2.981 GMACs at ρ = 0.7, where DeiT-S takes 4.599."""
    return _deit(keep_ratio, num_classes, in_chans, img_size, drop_path_rate, 384)


def dynamic_vit_deit_base(
    *,
    keep_ratio: float = 0.7,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int = 224,
    drop_path_rate: float = 0.0,
) -> DynamicViT:
    """DynamicViT on DeiT-B: 89.5 M parameters, 11.48 GMACs at ρ = 0.7; trained with ``drop_path_rate=0.2``."""
    return _deit(keep_ratio, num_classes, in_chans, img_size, drop_path_rate, 768)


def dynamic_vit_lvvit_small(
    *,
    keep_ratio: float = 0.7,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int = 224,
    drop_path_rate: float = 0.0,
) -> DynamicViT:
    """DynamicViT on LV-ViT-S, pruned before blocks 4, 8 and 12."""
    backbone = LVViT(num_classes=num_classes, in_chans=in_chans, img_size=img_size, drop_path_rate=drop_path_rate)
    return DynamicViT(backbone, prune_at=(4, 8, 12), keep_ratio=keep_ratio)


def dynamic_vit_lvvit_medium(
    *,
    keep_ratio: float = 0.7,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int = 224,
    drop_path_rate: float = 0.0,
) -> DynamicViT:
    """DynamicViT on LV-ViT-M, pruned before blocks 5, 10 and 15."""
    backbone = LVViT(
        embed_dim=512,
        depth=20,
        num_heads=8,
        num_classes=num_classes,
        in_chans=in_chans,
        img_size=img_size,
        drop_path_rate=drop_path_rate,
    )
    return DynamicViT(backbone, prune_at=(5, 10, 15), keep_ratio=keep_ratio)
