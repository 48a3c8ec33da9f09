"""The papers' networks by name, as timm writes them: NFNet-F0 to F7, the NF-ResNets and the NF-RegNets."""

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


def _nfnet(
    level: int,
    num_classes: int,
    in_chans: int,
    drop_rate: float | None,
    stochdepth_rate: float,
    activation: str,
    numerics: str,
    plus: bool,
) -> NFNet:
    train, test, dropout, crop = _F[level]
    widths = (384, 768, 2048, 2048) if plus else (256, 512, 1536, 1536)
    model = NFNet(
        tuple(depth * (level + 1) for depth in (1, 2, 6, 3)),
        widths,
        design=replace(NFNET, activation=activation),
        head_width=2 * widths[-1],
        num_classes=num_classes,
        in_chans=in_chans,
        drop_rate=dropout if drop_rate is None else drop_rate,
        stochdepth_rate=stochdepth_rate,
        numerics=numerics,
    )
    return _resolutions(model, train, test, crop, "squash")


def _like(like: str) -> bool:
    if like not in ("paper", "timm"):
        raise ValueError(f"like is {like!r}, allowed are 'paper' and 'timm'")
    return like == "timm"


def _nf_resnet(
    layers: int,
    num_classes: int,
    in_chans: int,
    drop_rate: float,
    stochdepth_rate: float,
    activation: str,
    se_ratio: float,
    like: str,
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


def _nf_regnet(
    level: int,
    num_classes: int,
    in_chans: int,
    drop_rate: float | None,
    stochdepth_rate: float,
    activation: str,
    like: str,
) -> NFNet:
    timm = _like(like)
    widths, depths, train, test, dropout = _REGNET[level]
    scaled = [0.75 * width for width in widths]
    if timm:  # multiples of 8
        widths = [multiple_of_8(width) for width in scaled]
        head = multiple_of_8(0.75 * (1280 * _REGNET[level][0][-1] // 440))
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
        drop_rate=dropout if drop_rate is None else drop_rate,
        stochdepth_rate=stochdepth_rate,
        numerics="timm" if timm else "official",
    )
    return _resolutions(model, train, test, 0.9, "center")


def dm_nfnet_f0(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float | None = None,
    stochdepth_rate: float = 0.25,
    activation: str = "gelu",
    numerics: str = "timm",
    plus: bool = False,
) -> NFNet:
    """NFNet-F0: 71,489,284 parameters, trained at 192 and tested at 256 pixels; ``plus`` is the wider F0+.

    ``drop_rate`` None is the paper's. ``numerics="official"`` takes the official code's GELU and epsilon.
    """
    return _nfnet(0, num_classes, in_chans, drop_rate, stochdepth_rate, activation, numerics, plus)


def dm_nfnet_f1(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float | None = None,
    stochdepth_rate: float = 0.25,
    activation: str = "gelu",
    numerics: str = "timm",
    plus: bool = False,
) -> NFNet:
    """NFNet-F1: 132,634,256 parameters, trained at 224 and tested at 320 pixels; ``plus`` is the wider F1+.

    ``drop_rate`` None is the paper's. ``numerics="official"`` takes the official code's GELU and epsilon.
    """
    return _nfnet(1, num_classes, in_chans, drop_rate, stochdepth_rate, activation, numerics, plus)


def dm_nfnet_f2(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float | None = None,
    stochdepth_rate: float = 0.25,
    activation: str = "gelu",
    numerics: str = "timm",
    plus: bool = False,
) -> NFNet:
    """NFNet-F2: 193,779,228 parameters, trained at 256 and tested at 352 pixels; ``plus`` is the wider F2+.

    ``drop_rate`` None is the paper's. ``numerics="official"`` takes the official code's GELU and epsilon.
    """
    return _nfnet(2, num_classes, in_chans, drop_rate, stochdepth_rate, activation, numerics, plus)


def dm_nfnet_f3(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float | None = None,
    stochdepth_rate: float = 0.25,
    activation: str = "gelu",
    numerics: str = "timm",
    plus: bool = False,
) -> NFNet:
    """NFNet-F3: 254,924,200 parameters, trained at 320 and tested at 416 pixels; ``plus`` is the wider F3+.

    ``drop_rate`` None is the paper's. ``numerics="official"`` takes the official code's GELU and epsilon.
    """
    return _nfnet(3, num_classes, in_chans, drop_rate, stochdepth_rate, activation, numerics, plus)


def dm_nfnet_f4(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float | None = None,
    stochdepth_rate: float = 0.25,
    activation: str = "gelu",
    numerics: str = "timm",
    plus: bool = False,
) -> NFNet:
    """NFNet-F4: 316,069,172 parameters, trained at 384 and tested at 512 pixels; ``plus`` is the wider F4+.

    ``drop_rate`` None is the paper's. ``numerics="official"`` takes the official code's GELU and epsilon.
    """
    return _nfnet(4, num_classes, in_chans, drop_rate, stochdepth_rate, activation, numerics, plus)


def dm_nfnet_f5(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float | None = None,
    stochdepth_rate: float = 0.25,
    activation: str = "gelu",
    numerics: str = "timm",
    plus: bool = False,
) -> NFNet:
    """NFNet-F5: 377,214,144 parameters, trained at 416 and tested at 544 pixels; ``plus`` is the wider F5+.

    ``drop_rate`` None is the paper's. ``numerics="official"`` takes the official code's GELU and epsilon.
    """
    return _nfnet(5, num_classes, in_chans, drop_rate, stochdepth_rate, activation, numerics, plus)


def dm_nfnet_f6(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float | None = None,
    stochdepth_rate: float = 0.25,
    activation: str = "gelu",
    numerics: str = "timm",
    plus: bool = False,
) -> NFNet:
    """NFNet-F6: 438,359,116 parameters, trained at 448 and tested at 576 pixels; ``plus`` is the wider F6+.

    ``drop_rate`` None is the paper's. ``numerics="official"`` takes the official code's GELU and epsilon.
    """
    return _nfnet(6, num_classes, in_chans, drop_rate, stochdepth_rate, activation, numerics, plus)


def dm_nfnet_f7(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float | None = None,
    stochdepth_rate: float = 0.25,
    activation: str = "gelu",
    numerics: str = "timm",
    plus: bool = False,
) -> NFNet:
    """NFNet-F7: 499,504,088 parameters, trained at 480 and tested at 608 pixels; ``plus`` is the wider F7+.

    ``drop_rate`` None is the paper's. ``numerics="official"`` takes the official code's GELU and epsilon.
    """
    return _nfnet(7, num_classes, in_chans, drop_rate, stochdepth_rate, activation, numerics, plus)


def nf_resnet26(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    stochdepth_rate: float = 0.1,
    activation: str = "relu",
    se_ratio: float = 0.0,
    like: str = "paper",
) -> NFNet:
    """NF-ResNet-26, which is timm's, not the paper's. ``like="timm"`` is timm's ``nf_resnet26``, whose shortcuts differ."""
    return _nf_resnet(26, num_classes, in_chans, drop_rate, stochdepth_rate, activation, se_ratio, like)


def nf_resnet50(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    stochdepth_rate: float = 0.1,
    activation: str = "relu",
    se_ratio: float = 0.0,
    like: str = "paper",
) -> NFNet:
    """NF-ResNet-50: 25,557,048 parameters. ``like="timm"`` is timm's ``nf_resnet50``, whose shortcuts differ."""
    return _nf_resnet(50, num_classes, in_chans, drop_rate, stochdepth_rate, activation, se_ratio, like)


def nf_resnet101(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    stochdepth_rate: float = 0.1,
    activation: str = "relu",
    se_ratio: float = 0.0,
    like: str = "paper",
) -> NFNet:
    """NF-ResNet-101: 44,549,193 parameters. ``like="timm"`` is timm's ``nf_resnet101``, whose shortcuts differ."""
    return _nf_resnet(101, num_classes, in_chans, drop_rate, stochdepth_rate, activation, se_ratio, like)


def nf_resnet152(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    stochdepth_rate: float = 0.1,
    activation: str = "relu",
    se_ratio: float = 0.0,
    like: str = "paper",
) -> NFNet:
    """NF-ResNet-152: 60,192,858 parameters. ``like="timm"`` is timm's ``nf_resnet152``, whose shortcuts differ."""
    return _nf_resnet(152, num_classes, in_chans, drop_rate, stochdepth_rate, activation, se_ratio, like)


def nf_resnet200(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    stochdepth_rate: float = 0.1,
    activation: str = "relu",
    se_ratio: float = 0.0,
    like: str = "paper",
) -> NFNet:
    """NF-ResNet-200: 64,673,898 parameters. ``like="timm"`` is timm's ``nf_resnet200``, whose shortcuts differ."""
    return _nf_resnet(200, num_classes, in_chans, drop_rate, stochdepth_rate, activation, se_ratio, like)


def nf_resnet288(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    stochdepth_rate: float = 0.1,
    activation: str = "relu",
    se_ratio: float = 0.0,
    like: str = "paper",
) -> NFNet:
    """NF-ResNet-288: 146,460,552 parameters. ``like="timm"`` is timm's ``nf_resnet288``, whose shortcuts differ."""
    return _nf_resnet(288, num_classes, in_chans, drop_rate, stochdepth_rate, activation, se_ratio, like)


def nf_resnet600(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    stochdepth_rate: float = 0.1,
    activation: str = "relu",
    se_ratio: float = 0.0,
    like: str = "paper",
) -> NFNet:
    """NF-ResNet-600: 300,646,896 parameters. ``like="timm"`` is timm's ``nf_resnet600``, whose shortcuts differ."""
    return _nf_resnet(600, num_classes, in_chans, drop_rate, stochdepth_rate, activation, se_ratio, like)


def nf_regnet_b0(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float | None = None,
    stochdepth_rate: float = 0.1,
    activation: str = "silu",
    like: str = "paper",
) -> NFNet:
    """NF-RegNet-B0: 8,595,372 parameters, trained at 192 and tested at 224 pixels. ``like="timm"`` is timm's ``nf_regnet_b0``."""
    return _nf_regnet(0, num_classes, in_chans, drop_rate, stochdepth_rate, activation, like)


def nf_regnet_b1(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float | None = None,
    stochdepth_rate: float = 0.1,
    activation: str = "silu",
    like: str = "paper",
) -> NFNet:
    """NF-RegNet-B1: 10,019,208 parameters, trained at 224 and tested at 256 pixels. ``like="timm"`` is timm's ``nf_regnet_b1``."""
    return _nf_regnet(1, num_classes, in_chans, drop_rate, stochdepth_rate, activation, like)


def nf_regnet_b2(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float | None = None,
    stochdepth_rate: float = 0.1,
    activation: str = "silu",
    like: str = "paper",
) -> NFNet:
    """NF-RegNet-B2: 13,785,904 parameters, trained at 240 and tested at 272 pixels. ``like="timm"`` is timm's ``nf_regnet_b2``."""
    return _nf_regnet(2, num_classes, in_chans, drop_rate, stochdepth_rate, activation, like)


def nf_regnet_b3(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float | None = None,
    stochdepth_rate: float = 0.1,
    activation: str = "silu",
    like: str = "paper",
) -> NFNet:
    """NF-RegNet-B3: 18,136,667 parameters, trained at 288 and tested at 320 pixels. ``like="timm"`` is timm's ``nf_regnet_b3``."""
    return _nf_regnet(3, num_classes, in_chans, drop_rate, stochdepth_rate, activation, like)


def nf_regnet_b4(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float | None = None,
    stochdepth_rate: float = 0.1,
    activation: str = "silu",
    like: str = "paper",
) -> NFNet:
    """NF-RegNet-B4: 29,315,830 parameters, trained at 320 and tested at 384 pixels. ``like="timm"`` is timm's ``nf_regnet_b4``."""
    return _nf_regnet(4, num_classes, in_chans, drop_rate, stochdepth_rate, activation, like)


def nf_regnet_b5(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float | None = None,
    stochdepth_rate: float = 0.1,
    activation: str = "silu",
    like: str = "paper",
) -> NFNet:
    """NF-RegNet-B5: 48,707,138 parameters, trained at 384 and tested at 456 pixels. ``like="timm"`` is timm's ``nf_regnet_b5``."""
    return _nf_regnet(5, num_classes, in_chans, drop_rate, stochdepth_rate, activation, like)


def nf_regnet_b6(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float | None = None,
    stochdepth_rate: float = 0.1,
    activation: str = "silu",
    like: str = "paper",
) -> NFNet:
    """NF-RegNet-B6: trained at 448 and tested at 528 pixels. ``like="timm"`` builds it as timm builds B0 to B5."""
    return _nf_regnet(6, num_classes, in_chans, drop_rate, stochdepth_rate, activation, like)


def nf_regnet_b7(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float | None = None,
    stochdepth_rate: float = 0.1,
    activation: str = "silu",
    like: str = "paper",
) -> NFNet:
    """NF-RegNet-B7: trained at 512 and tested at 600 pixels. ``like="timm"`` builds it as timm builds B0 to B5."""
    return _nf_regnet(7, num_classes, in_chans, drop_rate, stochdepth_rate, activation, like)


def nf_regnet_b8(
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float | None = None,
    stochdepth_rate: float = 0.1,
    activation: str = "silu",
    like: str = "paper",
) -> NFNet:
    """NF-RegNet-B8: trained at 600 and tested at 672 pixels. ``like="timm"`` builds it as timm builds B0 to B5."""
    return _nf_regnet(8, num_classes, in_chans, drop_rate, stochdepth_rate, activation, like)
