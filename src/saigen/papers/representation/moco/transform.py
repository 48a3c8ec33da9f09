"""The two views of an image: the augmentation of MoCo (section 3.3) and that of MoCo v2 (arXiv 2003.04297)."""

from collections import OrderedDict

import kornia.augmentation as K
import torch
from jaxtyping import Float
from torch import Tensor, nn

from saigen.papers.representation.simsiam import TwoViews

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, by which the official code normalises."""


class MoCoViews(TwoViews):
    """Query and key views (b, 3, size, size) of images (b, 3, h, w) in [0, 1], normalised.

    Version 1: a crop of 0.2-1 of the area, grey with probability 0.2, colour jitter (0.4, 0.4, 0.4, 0.4) always, a flip
    half of the time. Version 2: crop, jitter (0.4, 0.4, 0.4, 0.1) with probability 0.8, grey 0.2, blur of 0.1-2 pixels
    (at 224) half of the time, flip. ``normalize=False`` leaves them in [0, 1]. With a ``generator`` the global random
    state is left alone and the views are a function of it. Raises ``ValueError`` for another version, and sizes below 1.

    >>> x_q, x_k = MoCoViews(32, version=1)(torch.rand(2, 3, 40, 40), generator=torch.Generator().manual_seed(0))
    >>> x_q.shape
    torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self, size: int = 224, *, version: int = 2, min_scale: float = 0.2, normalize: bool = True, blur: bool = True
    ) -> None:
        if version not in (1, 2):
            raise ValueError(f"version is {version}, allowed are 1 and 2")
        super().__init__(size, blur=blur and version == 2, min_scale=min_scale)
        self.version, self.normalize = version, normalize
        if version == 1:
            self.steps = nn.Sequential(
                OrderedDict(
                    crop=self.steps.crop,
                    grey=self.steps.grey,
                    jitter=K.ColorJitter(0.4, 0.4, 0.4, 0.4, p=1.0),
                    flip=self.steps.flip,
                )
            )

    def forward(
        self, x: Float[Tensor, "b 3 h w"], generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "b 3 s s"], Float[Tensor, "b 3 s s"]]:
        x_q, x_k = super().forward(x, generator)
        return (self.normalized(x_q), self.normalized(x_k)) if self.normalize else (x_q, x_k)

    @staticmethod
    def normalized(x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Images in [0, 1] by ImageNet's mean and standard deviation."""
        return (x - x.new_tensor(MEAN).view(3, 1, 1)) / x.new_tensor(STD).view(3, 1, 1)


def moco_v1_augment(size: int = 224) -> MoCoViews:
    """The views of MoCo v1, those of instance discrimination (section 3.3)."""
    return MoCoViews(size, version=1)


def moco_v2_augment(size: int = 224) -> MoCoViews:
    """The views of MoCo v2: with blur, and colours that change less often and less in hue."""
    return MoCoViews(size, version=2)
