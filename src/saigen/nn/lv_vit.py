"""LV-ViT (Jiang et al., 2021, arXiv 2104.10858): ViT with a convolutional stem, halved branches, a head a token."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saigen.nn.classifier import Classifier
from saigen.nn.vision_transformer import Block, convert_vit_state_dict, embed_image, fit_positions, fresh_head


class ConvPatchEmbed(nn.Module):
    """Four convolutions instead of one: 7x7 at stride 2, two of 3x3, then patches of half the size.

    (b, c, h, w) -> (b, h/p · w/p, dim).
    """

    def __init__(self, patch_size: int = 16, in_chans: int = 3, dim: int = 384, hidden_dim: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, hidden_dim, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden_dim)
        self.conv2 = nn.Conv2d(hidden_dim, hidden_dim, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden_dim)
        self.conv3 = nn.Conv2d(hidden_dim, hidden_dim, kernel_size=3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(hidden_dim)
        self.relu = nn.ReLU(inplace=True)
        self.proj = nn.Conv2d(hidden_dim, dim, kernel_size=patch_size // 2, stride=patch_size // 2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = self.relu(norm(conv(x)))
        return self.proj(x).flatten(2).transpose(1, 2)


class LVViT(Classifier):
    """LV-ViT classifier in the official key layout; images of ``img_size`` to logits (b, num_classes).

    The logits are those of the class token plus half of the largest, over the spatial tokens, of ``aux_head``'s.
    The defaults are LV-ViT-S; LV-ViT-M has ``embed_dim=512, depth=20, num_heads=8``.
    Raises ``ValueError`` for sizes that do not divide and for inputs of another shape.

    >>> LVViT(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 1000])
    """

    classifier_name = "head"

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        drop_path_rate: float = 0.0,
        fused_attn: bool = True,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if patch_size < 2 or patch_size % 2:
            raise ValueError(f"patch_size is {patch_size}, allowed are even numbers: the stem halves the image first")
        if height < patch_size or width < patch_size or height % patch_size or width % patch_size:
            raise ValueError(f"img_size is {img_size}, allowed are multiples of patch_size, which is {patch_size}")
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}, allowed is num_classes >= 0")
        self.img_size = (height, width)
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.grid_size = (height // patch_size, width // patch_size)
        self.num_prefix_tokens = 1
        self.num_classes = num_classes
        self.num_features = self.embed_dim = embed_dim
        self.depth = depth
        self.default_cfg = {
            "input_size": (in_chans, height, width),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "interpolation": "bicubic",
            "crop_pct": 1.0 if embed_dim > 384 else 0.9,
        }

        self.patch_embed = ConvPatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid_size[0] * self.grid_size[1], embed_dim))
        self.pos_drop = nn.Dropout(0.0)
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    num_heads,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=False,
                    drop_path=drop_path_rate * i / max(depth - 1, 1),
                    norm_eps=1e-5,
                    branch_scale=0.5,
                    fused_attn=fused_attn,
                )
                for i in range(depth)
            )
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-5)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.aux_head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.register_load_state_dict_pre_hook(fit_positions)

    def embed(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Patch embeddings behind the class token, positions added: what the first block takes."""
        return embed_image(self, x)

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """All tokens after the last block and the norm, the class token first."""
        return self.norm(self.blocks(self.embed(x)))

    def forward_head(self, x: Float[Tensor, "b n d"], pre_logits: bool = False) -> Float[Tensor, "b k"]:
        """Logits from the tokens of ``forward_features``; with ``pre_logits`` the class token instead."""
        if pre_logits or not self.num_classes:
            return x[:, 0]
        return self.head(x[:, 0]) + 0.5 * self.aux_head(x[:, 1:]).amax(dim=1)

    def new_classifier(self, num_classes: int) -> nn.Linear:
        return fresh_head(self.norm, num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Puts fresh heads of ``num_classes`` outputs (0: none) in both old ones' place."""
        super().reset_classifier(num_classes)
        self.aux_head = self.new_classifier(num_classes) if num_classes else nn.Identity()

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our layout, which is the official one, from checkpoints with wrappers (``module.`` …)."""
        return convert_vit_state_dict(state)
