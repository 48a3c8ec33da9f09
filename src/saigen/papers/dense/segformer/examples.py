"""Small instances of the room's public components, and the side-by-side benchmarks with Transformers."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from saigen.example import Benchmark, Example
from saigen.papers.dense.segformer import MixTransformer, SegFormer, SegmentationLoss, aligned_size, segmentation_loss
from saigen.papers.dense.segformer.model import DECODER, DEPTHS, WIDTHS, sliding_window_logits

SEGMENT = """
import torch
import saigen
from saigen.papers.dense.segformer import aligned_size, sliding_window_logits

model = saigen.create_model("segformer_b0", num_classes=19).eval()  # weights="nvidia/segformer-b0-finetuned-cityscapes-1024-1024"
photo = torch.rand(1, 3, 120, 160)
labels = model.predict(photo)  # whole: (1, 120, 160)
labels = model.predict(photo, crop=96, stride=72)  # by sliding windows, averaged where they overlap
print(labels.shape, aligned_size(683, 512))
"""

TRAIN = """
import torch
from saigen.papers.dense.segformer import param_groups, poly_schedule, segformer_b0, segmentation_loss

model = segformer_b0(num_classes=4)
optimizer = torch.optim.AdamW(param_groups(model, lr=6e-5))  # the decoder at 10 times that, no decay on norms
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: poly_schedule(warmup=10)(step, 100))
images, labels = torch.rand(2, 3, 64, 64), torch.randint(0, 4, (2, 64, 64))
loss = segmentation_loss(model(images), labels, ignore_label=255)
loss.backward()
optimizer.step(), schedule.step()
"""

CLASSIFY = """
import torch
import saigen

model = saigen.create_model("mit_b0", num_classes=10)
logits = model(torch.rand(2, 3, 64, 64))
c1, c2, c3, c4 = model.features(torch.rand(2, 3, 64, 64))  # maps at strides 4, 8, 16, 32
"""


def small_encoder(num_classes: int = 0) -> MixTransformer:
    """An encoder of four blocks."""
    return MixTransformer((8, 16, 24, 32), (1, 1, 1, 1), (1, 2, 3, 4), (4, 2, 2, 1), num_classes=num_classes)


def images(generator: torch.Generator) -> tuple[torch.Tensor]:
    """Two images of 48x64 pixels."""
    return (torch.rand(2, 3, 48, 64, generator=generator),)


def logits_and_labels(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at stride 4, and labels some of which are to be ignored."""
    labels = torch.randint(0, 5, (2, 16, 20), generator=generator)
    labels[:, :3] = 255
    return torch.randn(2, 5, 4, 5, generator=generator), labels


def examples() -> Iterator[Example]:
    yield Example(
        name="segformer",
        kind="module",
        make=lambda: SegFormer(small_encoder(), num_classes=5, decoder_channels=16),
        inputs=images,
        code=SEGMENT,
        wrong=(
            (lambda: SegFormer(small_encoder(), num_classes=-1), "num_classes"),
            (lambda: SegFormer(small_encoder(), decoder_channels=0), "decoder_channels"),
            (lambda: SegFormer(small_encoder(), dropout=1.0), "dropout"),
            (lambda: SegFormer(small_encoder())(torch.rand(1, 4, 64, 64)), "channels"),
            (lambda: sliding_window_logits(nn.Identity(), torch.rand(1, 3, 8, 8), 4, 6), "stride"),
            (lambda: sliding_window_logits(nn.Identity(), torch.rand(1, 3, 8, 8), 0, 1), "crop"),
            (lambda: aligned_size(0, 100), "height"),
        ),
    )
    yield Example(
        name="segformer_early_fusion",
        kind="module",
        make=lambda: SegFormer(small_encoder(), num_classes=5, decoder_channels=16, early_fusion=True),
        inputs=images,
        code=TRAIN,
    )
    yield Example(
        name="mix_transformer",
        kind="module",
        make=lambda: small_encoder(num_classes=6),
        inputs=images,
        code=CLASSIFY,
        wrong=(
            (lambda: MixTransformer((8, 16, 24), (1, 1, 1, 1)), "embed_dims"),
            (lambda: MixTransformer((8, 16, 24, 32), (1, 1, 1, 1), (3, 2, 2, 4)), "num_heads"),
            (lambda: MixTransformer((8, 16, 40, 64), (1, 1, 1, 1), drop_path_rate=1.5), "drop_path_rate"),
            (lambda: MixTransformer((8, 16, 40, 64), (1, 1, 1, 1), in_chans=0), "in_chans"),
            (lambda: MixTransformer((8, 16, 40, 64), (1, 1, 1, 1), num_classes=-1), "num_classes"),
            (lambda: small_encoder()(torch.rand(1, 3, 8, 64)), "pixels"),
        ),
    )
    yield Example(
        name="positional_encoding_arm",
        kind="module",
        make=lambda: MixTransformer(
            (8, 16, 24, 32), (1, 1, 1, 1), (1, 2, 3, 4), (4, 2, 2, 1), num_classes=6, mix_ffn=False, pos_embed_size=32
        ),
        inputs=images,
        code=CLASSIFY,
    )
    yield Example(
        name="segmentation_loss",
        kind="loss",
        make=SegmentationLoss,
        inputs=logits_and_labels,
        code=TRAIN,
        wrong=((lambda: segmentation_loss(torch.rand(2, 3, 4, 4), torch.zeros(2, 3, 4, 4).long()), "labels"),),
    )


def benchmarks() -> Iterator[Benchmark]:
    for size, batch in (("b0", 8), ("b2", 2)):
        for backward in (False, True):
            what = "forward+backward" if backward else "forward"
            for early in (False, True):
                yield Benchmark(
                    name=f"segformer_{size} {what}, 256x256, batch {batch}" + (", early fusion" if early else ""),
                    ours=_call(lambda size=size, early=early: _ours(size, early), batch, backward),
                    peer=_call(lambda size=size: _peer(size), batch, backward),
                )


def _ours(size: str, early: bool) -> nn.Module:
    from saigen.papers.dense import segformer as room

    model = getattr(room, f"segformer_{size}")(drop_path_rate=0.0, dropout=0.0, early_fusion=early)
    model.load_state_dict(SegFormer.convert_state_dict(_peer(size).state_dict()))
    return model


def _peer(size: str) -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SegformerForSemanticSegmentation(
            SegformerConfig(
                hidden_sizes=WIDTHS[size],
                depths=DEPTHS[size],
                decoder_hidden_size=DECODER[size],
                num_labels=150,
                drop_path_rate=0.0,
                classifier_dropout_prob=0.0,
            )
        )


def _call(make: Callable[[], nn.Module], batch: int, backward: bool) -> Callable[[], Callable[[], object]]:
    def build() -> Callable[[], object]:
        model = make().train(backward)
        x = torch.rand(batch, 3, 256, 256, generator=torch.Generator().manual_seed(0))

        def logits() -> torch.Tensor:
            out = model(x)
            return out if isinstance(out, torch.Tensor) else out.logits

        def forward() -> torch.Tensor:
            with torch.inference_mode():
                return logits()

        def forward_backward() -> torch.Tensor:
            loss = logits().square().mean()
            model.zero_grad(set_to_none=True)
            loss.backward()
            return loss

        return forward_backward if backward else forward

    return build
