"""MLP-Mixer (Tolstikhin et al., 2021, arXiv 2105.01601), in timm's key layout."""

import re
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saigen.nn.attention import MLP
from saigen.nn.classifier import Classifier
from saigen.nn.drop_path import DropPath
from saigen.nn.vision_transformer import PatchEmbed


class TokenMLP(MLP):
    """The MLP of ``saigen.nn.attention`` on the second-last axis: (b, n, c) -> (b, n, c), each channel by itself.

    Multiplying from the left computes what transpose, MLP, transpose would, without moving the tokens.

    >>> TokenMLP(16, 8)(torch.rand(2, 16, 3)).shape
    torch.Size([2, 16, 3])
    """

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        x = self.drop1(self.act(_linear_from_the_left(self.fc1, x)))
        return self.drop2(_linear_from_the_left(self.fc2, x))


def _linear_from_the_left(linear: nn.Linear, x: Tensor) -> Tensor:
    return torch.baddbmm(linear.bias[:, None], linear.weight.expand(x.shape[0], -1, -1), x)


class MixerBlock(nn.Module):
    """Mixes tokens, then channels, each with a residual MLP behind a layer norm (the paper's equation 1)."""

    def __init__(
        self,
        dim: int,
        tokens: int,
        *,
        tokens_dim: int,
        channels_dim: int,
        drop: float = 0.0,
        drop_path: float = 0.0,
        gelu: Literal["none", "tanh"] = "none",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp_tokens = TokenMLP(tokens, tokens_dim, gelu=gelu, drop=drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp_channels = MLP(dim, channels_dim, gelu=gelu, drop=drop)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        x = x + self.drop_path(self.mlp_tokens(self.norm1(x)))
        return x + self.drop_path(self.mlp_channels(self.norm2(x)))


class MLPMixer(Classifier):
    """MLP-Mixer classifier: patches, ``depth`` mixer blocks, norm, mean over the tokens, linear head.

    Takes images (b, in_chans, img_size, img_size) and gives logits (b, num_classes), or features (b, embed_dim) where
    ``num_classes`` is 0. The token MLPs tie the model to one image size.

    - ``tokens_dim`` and ``channels_dim`` are the widths of the two MLPs, by default embed_dim / 2 and 4 embed_dim, as
      in every size of the paper.
    - ``drop_rate`` is dropout within the MLPs; ``drop_path_rate`` grows linearly over the blocks from 0 to this rate.
    - ``gelu``: "none" is exact (timm, PyTorch), "tanh" the approximation that JAX's Mixer was trained with.

    Weights start as in the paper's code: truncated LeCun normal, biases and the head zero.
    Raises ``ValueError`` for sizes that do not divide and for inputs of another shape.

    >>> MLPMixer(img_size=32, patch_size=4, embed_dim=64, depth=2)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 1000])
    """

    classifier_name = "head"

    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        tokens_dim: int | None = None,
        channels_dim: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        gelu: Literal["none", "tanh"] = "none",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if patch_size < 1 or img_size < patch_size or img_size % patch_size:
            raise ValueError(f"img_size is {img_size}, allowed are multiples of patch_size, which is {patch_size}")
        if depth < 1:
            raise ValueError(f"depth is {depth}, allowed is depth >= 1")
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}, allowed is num_classes >= 0")
        self.img_size = img_size
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.embed_dim = embed_dim
        self.default_cfg = {
            "input_size": (in_chans, img_size, img_size),
            "mean": (0.5,) * in_chans,
            "std": (0.5,) * in_chans,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
        }
        self.stem = PatchEmbed(patch_size, in_chans, embed_dim)
        self.blocks = nn.Sequential(
            *(
                MixerBlock(
                    embed_dim,
                    (img_size // patch_size) ** 2,
                    tokens_dim=embed_dim // 2 if tokens_dim is None else tokens_dim,
                    channels_dim=4 * embed_dim if channels_dim is None else channels_dim,
                    drop=drop_rate,
                    drop_path=drop_path_rate * i / max(depth - 1, 1),
                    gelu=gelu,
                    norm_eps=norm_eps,
                )
                for i in range(depth)
            )
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Draws fresh weights from the global generator."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                if name == "head":
                    nn.init.zeros_(module.weight)
                else:
                    lecun_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """All tokens after the last block and ``norm``."""
        if x.ndim != 4 or tuple(x.shape[1:]) != (self.in_chans, self.img_size, self.img_size):
            raise ValueError(
                f"x has shape {tuple(x.shape)}, allowed is (batch, {self.in_chans}, {self.img_size}, {self.img_size})"
            )
        # laid out token by token once, so that no block has to do it again
        return self.norm(self.blocks(self.stem(x).contiguous()))

    def forward_head(self, x: Float[Tensor, "b n d"], pre_logits: bool = False) -> Float[Tensor, "b k"]:
        """Logits from the tokens of ``forward_features``; with ``pre_logits`` their mean instead."""
        x = x.mean(dim=1)
        return x if pre_logits else self.head(x)

    def new_classifier(self, num_classes: int) -> nn.Linear:
        """Zero, as before fine-tuning."""
        layer = super().new_classifier(num_classes)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our layout from timm's or from the official Flax arrays (``stem/kernel`` …); other keys stay."""
        return convert_mixer_state_dict(state)


def lecun_normal_(weight: Tensor) -> Tensor:
    """Fills with a normal cut at two standard deviations and rescaled to the variance 1 / fan-in: Flax's default.

    >>> round(lecun_normal_(torch.empty(1000, 100)).std().item(), 2)
    0.1
    """
    fan_in = weight[0].numel()
    std = fan_in**-0.5 / 0.87962566103423978  # the standard deviation that cutting at ±2 leaves
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def flax_array(value: Tensor, name: str) -> Tensor:
    """A Flax array as PyTorch lays it out: dense kernels (in, out) and convolutions (h, w, in, out) turned round.

    ``name`` is the array's last name; all but kernels stay as they are.
    """
    if name != "kernel":
        return value
    if value.ndim == 4:
        return value.permute(3, 2, 0, 1).contiguous()
    return value.T.contiguous() if value.ndim == 2 else value


_FROM_FLAX = (
    (r"^stem/", "stem.proj."),
    (r"^MixerBlock_(\d+)/LayerNorm_0/", r"blocks.\1.norm1."),
    (r"^MixerBlock_(\d+)/LayerNorm_1/", r"blocks.\1.norm2."),
    (r"^MixerBlock_(\d+)/token_mixing/Dense_0/", r"blocks.\1.mlp_tokens.fc1."),
    (r"^MixerBlock_(\d+)/token_mixing/Dense_1/", r"blocks.\1.mlp_tokens.fc2."),
    (r"^MixerBlock_(\d+)/channel_mixing/Dense_0/", r"blocks.\1.mlp_channels.fc1."),
    (r"^MixerBlock_(\d+)/channel_mixing/Dense_1/", r"blocks.\1.mlp_channels.fc2."),
    (r"^pre_head_layer_norm/", "norm."),
    (r"^head/", "head."),
)
_LAST_NAME = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def convert_mixer_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's Mixer key layout from timm's or Flax's names, wrappers (``module.`` …) taken off; unknown keys stay.

    >>> list(convert_mixer_state_dict({"MixerBlock_3/token_mixing/Dense_0/kernel": torch.zeros(196, 384)}))
    ['blocks.3.mlp_tokens.fc1.weight']
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        key = re.sub(r"^(module\.|model\.|backbone\.)+", "", key)
        path, _, last = re.sub(r"^(opt/target/|params/)", "", key).rpartition("/")
        for pattern, ours in _FROM_FLAX:
            prefix, matched = re.subn(pattern, ours, path + "/")
            if matched and prefix[-1] == "." and last in _LAST_NAME:
                key, value = prefix + _LAST_NAME[last], flax_array(value, last)
                break
        converted[key] = value
    return converted
