"""RandAugment beside timm's and torchvision's: the same pixels and the same argument tables."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from saigen.nn.image_operations import apply_operation
from saigen.papers.augmentation.randaugment import RandAugment, rand_augment_operations
from tests.peers import need, need_module

pytestmark = pytest.mark.peers


def pictures(n=6, size=(48, 64)):
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: size[0], : size[1]]
    for i in range(n):
        smooth = np.stack([127 + 90 * np.sin(x / 9 + i + c) * np.cos(y / 6) for c in range(3)], -1)
        yield (smooth + rng.integers(-30, 30, smooth.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("name", rand_augment_operations("timm"))
def test_operations_equal_timm(name, increasing):
    """Level, argument and pixels, for both signs, through timm's own AugmentOp."""
    need("timm")
    timm = need_module("timm.data.auto_augment")
    moving = name in ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
    theirs = f"{name}Rel" if name.startswith("Translate") else f"{name}Increasing" if increasing and moving else name
    hparams = {"translate_pct": 0.45, "img_mean": (128, 128, 128), "interpolation": Image.NEAREST}
    for level in (3, 5, 9, 10):
        ours = RandAugment(1, level, op_set="timm", schedule="increasing" if increasing else "official")
        operation = timm.AugmentOp(theirs, prob=1.0, magnitude=level, hparams=hparams)
        if name == "Posterize" and increasing and level == 10:
            continue  # 0 bits: black here and in older Pillow, refused by newer
        for seed, picture in enumerate(pictures()):
            random.seed(seed)
            expected = torch.from_numpy(np.array(operation(Image.fromarray(picture)))).permute(2, 0, 1)
            image = torch.from_numpy(picture).permute(2, 0, 1)
            # Their sign is hidden in a global generator: the picture must be that of one of ours.
            candidates = [
                apply_operation(name, image, ours.argument(name, level, sign, image.shape[-2:]), fill=128)
                for sign in (1, -1)
            ]
            assert any(torch.equal(candidate, expected) for candidate in candidates), (name, level, seed)


def test_arguments_equal_torchvision():
    need("torchvision")
    v2 = need_module("torchvision.transforms.v2")
    space = v2.RandAugment._AUGMENTATION_SPACE
    assert set(space) == set(rand_augment_operations("torchvision"))
    for name, (table, signed) in space.items():
        magnitudes = table(31, 96, 160)
        for level in range(31):
            augment = RandAugment(2, level, op_set="torchvision")
            for sign in (1, -1) if signed else (1,):
                ours = augment.argument(name, level, sign, (96, 160))
                if magnitudes is None:
                    assert ours == 0
                    continue
                theirs = sign * float(magnitudes[level])
                if name.startswith("Translate"):
                    theirs = int(theirs)
                elif name == "Solarize":
                    theirs *= 255
                elif name in ("Brightness", "Color", "Contrast", "Sharpness"):
                    theirs += 1
                assert ours == pytest.approx(theirs, abs=1e-4), (name, level)


def test_signs_and_gating_follow_timm_statistics():
    """Half of timm's draws are not applied: as many of its pictures stay as of ours."""
    need("timm")
    timm = need_module("timm.data.auto_augment")
    picture = next(pictures(1, (16, 16)))
    transform = timm.rand_augment_transform(
        "rand-m9-n2", {"translate_pct": 0.45, "img_mean": (128, 128, 128), "interpolation": Image.NEAREST}
    )
    random.seed(0)
    np.random.seed(0)
    theirs = np.mean([np.array_equal(np.array(transform(Image.fromarray(picture))), picture) for _ in range(1500)])
    image = torch.from_numpy(picture).permute(2, 0, 1).expand(1500, 3, 16, 16)
    changed = RandAugment(2, 9, op_set="timm")(image, generator=torch.Generator().manual_seed(0))
    assert (changed == image).flatten(1).all(-1).double().mean().item() == pytest.approx(theirs, abs=0.05)
