"""Small instances of the study's tools, and BiT beside timm's."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from saigen.example import Benchmark, Example, beside_timm
from saigen.nn.vision_transformer import VisionTransformer
from saigen.papers.vision.vit_robustness import (
    CORRUPTIONS,
    BiTResNet,
    Normalized,
    attention_mask,
    corrupt,
    fgsm,
    layer_similarity,
    lesion,
    mean_corruption_error,
    pgd,
    resnetv2_50x1_bit,
    restrict_attention,
    shape_bias,
    spatial_attack,
    study_vit,
)

CORRUPT = """
import torch
from saigen.papers.vision.vit_robustness import ALEXNET_ERRORS, CORRUPTIONS, corrupt, mean_corruption_error

images = torch.rand(4, 3, 64, 64)
generator = torch.Generator().manual_seed(0)
foggy = corrupt(images, "fog", severity=3, generator=generator)
errors = {}  # of your model, on every type at every severity
for name in CORRUPTIONS:
    corrupted = [corrupt(images, name, severity, generator=generator) for severity in (1, 5)]
    errors[name] = [0.5, 0.6]
mce = mean_corruption_error(errors)  # 1.0 is AlexNet's
"""

ATTACK = """
from functools import partial
import torch
from saigen.nn.resnet import ResNet
from saigen.papers.vision.vit_robustness import Normalized, pgd, robust_accuracy, spatial_attack, transfer_matrix

net = ResNet("basic", (1, 1), (8, 16), num_classes=10, small_stem=True).eval()
model = Normalized(net)  # images in [0, 1] in, logits out
x, y = torch.rand(8, 3, 32, 32), torch.randint(10, (8,))
adversarial = pgd(model, x, y, eps=1 / 255)  # 8 steps of an eighth of a grey level
accuracy = robust_accuracy(model, x, y, partial(pgd, eps=4 / 255))
turned = spatial_attack(model, x, y, angles=(-30, 0, 30), shifts=(-0.1, 0.0, 0.1))
accuracies = transfer_matrix({"a": model, "b": Normalized(net)}, x, y, pgd)
"""

SURGERY = """
import torch
from saigen.nn.vision_transformer import VisionTransformer
from saigen.papers.vision.vit_robustness import layer_similarity, lesion, restrict_attention

# any transformer with a list of blocks: this one, timm's, Transformers'
model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=10).eval()
x = torch.rand(2, 3, 32, 32)
for block in range(4):
    with lesion(model, blocks=block):  # or attn=block, mlp=block
        logits = model(x)
with restrict_attention(model, max_distance=1):  # patches see their neighbours and the class token
    logits = model(x)
with restrict_attention(model, patch_to_patch=False, layers=[-1]):
    logits = model(x)
similar = layer_similarity(model, x, tokens="cls")  # (4, 4)
"""

TEXTURE = """
import torch
from saigen.papers.vision.vit_robustness import restricted_predictions, shape_bias

predictions = restricted_predictions(torch.rand(100, 10), classes=[0, 1, 2, 3])  # as ImageNet-A and -R count
shapes = torch.randint(4, (100,))
textures = (shapes + 1) % 4  # images whose two cues disagree
bias = shape_bias(predictions, shapes, textures)["shape_bias"]
"""

MODEL = """
import torch
import saigen
from saigen.papers.vision.vit_robustness import study_vit

model = saigen.create_model("resnetv2_50x1_bit", num_classes=10)  # weights="path/of/BiT-M-R50x1.npz"
logits = model(torch.rand(1, 3, 64, 64))
vit = study_vit("B/32", num_classes=10)
"""


def tiny_vit() -> VisionTransformer:
    """Four by four patches, two blocks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(
            img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5, init="trunc_normal"
        )
    return model.eval()


def images(generator: torch.Generator) -> tuple[Tensor]:
    return (torch.rand(2, 3, 16, 16, generator=generator),)


def labelled(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.rand(2, 3, 16, 16, generator=generator), torch.tensor([0, 3])


def without_a_block(x: Tensor) -> Tensor:
    with torch.no_grad(), lesion(tiny_vit(), blocks=1) as model:
        return model(x)


def short_sighted(x: Tensor) -> Tensor:
    with torch.no_grad(), restrict_attention(tiny_vit(), 1) as model:
        return model(x)


def opened(context: Callable, *args: object, **options: object) -> None:
    with context(*args, **options):
        pass


def examples() -> Iterator[Example]:
    for name, severity in (("gaussian_noise", 3), ("elastic_transform", 4)):
        yield Example(
            name="corrupt" if severity == 3 else f"corrupt, {name}",
            kind="function",
            make=lambda name=name, severity=severity: (
                lambda x, generator: corrupt(x, name, severity, generator=generator)
            ),
            inputs=lambda g: (*images(g), torch.Generator().manual_seed(3)),
            code=CORRUPT,
            wrong=(
                (lambda: corrupt(torch.rand(1, 3, 8, 8), "rain", 1), "gaussian_noise"),
                (lambda: corrupt(torch.rand(1, 3, 8, 8), "fog", 6), "severity"),
                (lambda: corrupt(torch.rand(1, 3, 8, 8), "fog", 1, benchmark="mnist"), "benchmark"),
                (lambda: corrupt(2 * torch.ones(1, 3, 8, 8), "fog", 1), "[0, 1]"),
                (lambda: corrupt(torch.rand(1, 4, 8, 8), "fog", 1), "1 or 3"),
                (lambda: mean_corruption_error(dict.fromkeys(CORRUPTIONS[1:], 0.5)), CORRUPTIONS[0]),
            ),
        )
    yield Example(
        name="pgd",
        kind="function",
        make=lambda: partial(pgd, tiny_vit(), eps=0.01),
        inputs=labelled,
        code=ATTACK,
        wrong=(
            (lambda: pgd(tiny_vit(), *labelled(torch.Generator()), eps=-1.0), "eps"),
            (lambda: pgd(tiny_vit(), *labelled(torch.Generator()), steps=0), "steps"),
            (lambda: fgsm(tiny_vit(), torch.full((1, 3, 16, 16), 2.0), torch.tensor([0])), "[0, 1]"),
            (lambda: Normalized(nn.Identity()), "mean"),
            (lambda: Normalized(nn.Identity(), (0.5,), (0.0,)), "std"),
        ),
    )
    yield Example(
        name="spatial_attack",
        kind="function",
        make=lambda: partial(spatial_attack, tiny_vit(), angles=(-10, 0), shifts=(0.0, 0.1)),
        inputs=labelled,
        code=ATTACK,
    )
    yield Example(
        name="lesion",
        kind="function",
        make=lambda: without_a_block,
        inputs=images,
        code=SURGERY,
        wrong=(
            (lambda: opened(lesion, tiny_vit(), blocks=2), "-2 to 1"),
            (lambda: opened(lesion, tiny_vit(), attn="nowhere"), "nowhere"),
            (lambda: opened(lesion, nn.Linear(2, 2), blocks=0), "blocks"),
        ),
    )
    yield Example(
        name="restrict_attention",
        kind="function",
        make=lambda: short_sighted,
        inputs=images,
        code=SURGERY,
        wrong=(
            (lambda: opened(restrict_attention, tiny_vit(), -1), "max_distance"),
            (lambda: opened(restrict_attention, nn.Linear(2, 2), 1), "grid"),
            (lambda: attention_mask((2, 2), 1, metric="manhattan"), "metric"),
        ),
    )
    yield Example(
        name="layer_similarity",
        kind="function",
        make=lambda: partial(layer_similarity, tiny_vit()),
        inputs=images,
        code=SURGERY,
        wrong=(
            (lambda: layer_similarity(tiny_vit(), *images(torch.Generator()), tokens="first"), "tokens"),
            (lambda: layer_similarity(tiny_vit(), *images(torch.Generator()), kind="rsa"), "kind"),
        ),
    )
    yield Example(
        name="shape_bias",
        kind="function",
        make=lambda: (
            lambda predictions, shapes: torch.tensor(list(shape_bias(predictions, shapes, shapes + 1).values()))
        ),
        inputs=lambda g: (torch.randint(4, (20,), generator=g), torch.randint(4, (20,), generator=g)),
        code=TEXTURE,
        wrong=((lambda: shape_bias(*[torch.tensor([1])] * 3), "same shape and texture"),),
    )
    yield Example(
        name="resnetv2_50x1_bit",
        kind="module",
        make=lambda: BiTResNet((1, 1), widths=(16, 32), groups=4, num_classes=5, small_stem=True),
        inputs=images,
        code=MODEL,
        wrong=(
            (lambda: BiTResNet((1, 1), widths=(16, 32), groups=3), "groups"),
            (lambda: BiTResNet((1, 1), widths=(16,)), "depths"),
            (lambda: resnetv2_50x1_bit(num_classes=-1), "num_classes"),
            (lambda: study_vit("S/16"), "B/16"),
        ),
    )


def benchmarks() -> Iterator[Benchmark]:
    yield from beside_timm("resnetv2_50x1_bit", resnetv2_50x1_bit, "resnetv2_50x1_bit", forward=2, training=2)
