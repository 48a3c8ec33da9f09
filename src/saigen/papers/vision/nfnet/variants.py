"""The papers' networks by name, as timm writes them: NFNet-F0 to F7, the NF-ResNets and the NF-RegNets."""

from collections.abc import Callable
from dataclasses import replace

from saigen.papers.vision.nfnet.model import NF_REGNET, NF_RESNET, NFNET, TIMM_REGNET, TIMM_RESNET, NFNet, multiple_of_8

# training and test resolution, the classifier's dropout, the share of the picture timm's evaluation looks at
_F = (
    (192, 256, 0.2, 0.9),
    (224, 320, 0.3, 0.91),
    (256, 352, 0.4, 0.92),
    (320, 416, 0.4, 0.94),
    (384, 512, 0.5, 0.951),
    (416, 544, 0.5, 0.954),
    (448, 576, 0.5, 0.956),
    (480, 608, 0.5, 0.956),
)
_RESNET = {
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    288: (24, 24, 24, 24),
    600: (50, 50, 50, 50),
}
# widths, depths, training and test resolution, dropout
_REGNET = (
    ((48, 104, 208, 440), (1, 3, 6, 6), 192, 224, 0.2),
    ((48, 104, 208, 440), (2, 4, 7, 7), 224, 256, 0.2),
    ((56, 112, 232, 488), (2, 4, 8, 8), 240, 272, 0.3),
    ((56, 128, 248, 528), (2, 5, 9, 9), 288, 320, 0.3),
    ((64, 144, 288, 616), (2, 6, 11, 11), 320, 384, 0.4),
    ((80, 168, 336, 704), (3, 7, 14, 14), 384, 456, 0.4),
    ((88, 184, 376, 792), (3, 8, 16, 16), 448, 528, 0.5),
    ((96, 208, 416, 880), (4, 10, 19, 19), 512, 600, 0.5),
    ((104, 232, 456, 968), (4, 11, 22, 22), 600, 672, 0.5),
)


def _resolutions(model: NFNet, train: int, test: int, crop_pct: float, crop_mode: str) -> NFNet:
    model.default_cfg = model.default_cfg | {
        "input_size": (3, train, train),
        "test_input_size": (3, test, test),
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
    }
    return model


def _like(like: str) -> bool:
    if like not in ("paper", "timm"):
        raise ValueError(f"like is {like!r}, allowed are 'paper' and 'timm'")
    return like == "timm"


def _named(build: Callable[..., NFNet], name: str, doc: str) -> Callable[..., NFNet]:
    build.__name__ = build.__qualname__ = name
    build.__doc__ = doc
    return build


def _nfnet(level: int, parameters: int) -> Callable[..., NFNet]:
    train, test, dropout, crop = _F[level]

    def build(
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = dropout,
        stochdepth_rate: float = 0.25,
        activation: str = "gelu",
        numerics: str = "timm",
        plus: bool = False,
    ) -> NFNet:
        widths = (384, 768, 2048, 2048) if plus else (256, 512, 1536, 1536)
        model = NFNet(
            tuple(depth * (level + 1) for depth in (1, 2, 6, 3)),
            widths,
            design=replace(NFNET, activation=activation),
            head_width=2 * widths[-1],
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            stochdepth_rate=stochdepth_rate,
            numerics=numerics,
        )
        return _resolutions(model, train, test, crop, "squash")

    return _named(
        build,
        f"dm_nfnet_f{level}",
        f"NFNet-F{level}: {parameters:,} parameters, trained at {train} and tested at {test} pixels; ``plus`` is the wider "
        f'F{level}+. ``numerics="official"`` takes the official code\'s GELU and epsilon.',
    )


def _nf_resnet(layers: int, said: str) -> Callable[..., NFNet]:
    def build(
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        stochdepth_rate: float = 0.1,
        activation: str = "relu",
        se_ratio: float = 0.0,
        like: str = "paper",
    ) -> NFNet:
        timm = _like(like)
        return NFNet(
            _RESNET[layers],
            (256, 512, 1024, 2048),
            design=replace(TIMM_RESNET if timm else NF_RESNET, activation=activation, se_ratio=se_ratio),
            stem_width=64,
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            stochdepth_rate=stochdepth_rate,
            numerics="timm" if timm else "official",
        )

    name = f"nf_resnet{layers}"
    return _named(
        build, name, f'NF-ResNet-{layers}{said}. ``like="timm"`` is timm\'s ``{name}``, whose shortcuts differ.'
    )


def _nf_regnet(level: int, parameters: int | None) -> Callable[..., NFNet]:
    published, depths, train, test, dropout = _REGNET[level]
    scaled = [0.75 * width for width in published]

    def build(
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = dropout,
        stochdepth_rate: float = 0.1,
        activation: str = "silu",
        like: str = "paper",
    ) -> NFNet:
        timm = _like(like)
        if timm:  # multiples of 8
            widths = [multiple_of_8(width) for width in scaled]
            head = multiple_of_8(0.75 * (1280 * published[-1] // 440))
        else:
            widths = [int(width) for width in scaled]
            head = 1280 * widths[-1] // 440
        model = NFNet(
            depths,
            widths,
            design=replace(TIMM_REGNET if timm else NF_REGNET, activation=activation),
            stem_width=widths[0],
            head_width=head,
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            stochdepth_rate=stochdepth_rate,
            numerics="timm" if timm else "official",
        )
        return _resolutions(model, train, test, 0.9, "center")

    name = f"nf_regnet_b{level}"
    size = f"{parameters:,} parameters, " if parameters else ""
    timms = f"is timm's ``{name}``" if parameters else "builds it as timm builds B0 to B5"
    return _named(
        build,
        name,
        f'NF-RegNet-B{level}: {size}trained at {train} and tested at {test} pixels. ``like="timm"`` {timms}.',
    )


dm_nfnet_f0 = _nfnet(0, 71_489_284)
dm_nfnet_f1 = _nfnet(1, 132_634_256)
dm_nfnet_f2 = _nfnet(2, 193_779_228)
dm_nfnet_f3 = _nfnet(3, 254_924_200)
dm_nfnet_f4 = _nfnet(4, 316_069_172)
dm_nfnet_f5 = _nfnet(5, 377_214_144)
dm_nfnet_f6 = _nfnet(6, 438_359_116)
dm_nfnet_f7 = _nfnet(7, 499_504_088)

nf_resnet26 = _nf_resnet(26, ", which is timm's, not the paper's")
nf_resnet50 = _nf_resnet(50, ": 25,557,048 parameters")
nf_resnet101 = _nf_resnet(101, ": 44,549,193 parameters")
nf_resnet152 = _nf_resnet(152, ": 60,192,858 parameters")
nf_resnet200 = _nf_resnet(200, ": 64,673,898 parameters")
nf_resnet288 = _nf_resnet(288, ": 146,460,552 parameters")
nf_resnet600 = _nf_resnet(600, ": 300,646,896 parameters")

nf_regnet_b0 = _nf_regnet(0, 8_595_372)
nf_regnet_b1 = _nf_regnet(1, 10_019_208)
nf_regnet_b2 = _nf_regnet(2, 13_785_904)
nf_regnet_b3 = _nf_regnet(3, 18_136_667)
nf_regnet_b4 = _nf_regnet(4, 29_315_830)
nf_regnet_b5 = _nf_regnet(5, 48_707_138)
nf_regnet_b6 = _nf_regnet(6, None)
nf_regnet_b7 = _nf_regnet(7, None)
nf_regnet_b8 = _nf_regnet(8, None)
