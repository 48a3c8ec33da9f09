"""Makes the golden vectors of the corruptions with the benchmark's own code (github.com/hendrycks/robustness, Apache-2.0).

    python tests/golden/vit_robustness/make.py PATH_OF_A_CHECKOUT

Needs OpenCV, scikit-image, SciPy, Wand with ImageMagick 6, Pillow. The official functions run as they are; small
stand-ins take the place of what today's NumPy, SciPy and scikit-image have dropped, and of the photographs of frost. The
images are a function of a seed (``picture``); before every call NumPy's global generator is seeded with ``SEED``, so
that a ``RandomState(SEED)`` draws the same. Kept are a few pixels of every output, in 256ths of a level, and its mean.
"""

import ast
import sys
import types
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SEED = 20
PIXELS = 12
NAMES = (
    *(
        "gaussian_noise",
        "shot_noise",
        "impulse_noise",
        "defocus_blur",
        "glass_blur",
        "motion_blur",
        "zoom_blur",
        "snow",
    ),
    *("frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression", "speckle_noise"),
    *("gaussian_blur", "saturate"),
)


def picture(seed: int, side: int) -> np.ndarray:
    """A smooth colourful picture with a few sharp edges and some grain, (side, side, 3) uint8."""
    rng = np.random.RandomState(seed)
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in rng.uniform(-3, 3, (9, 3))]
    image = 0.45 + 0.12 * np.stack([sum(waves[k : k + 3]) for k in (0, 3, 6)], 2)
    for _ in range(6):
        (t, s), colour = rng.uniform(0, 0.8, 2), rng.uniform(0, 1, 3)
        image[(y > t) & (y < t + 0.2) & (x > s) & (x < s + 0.2)] = colour
    image = image + 0.03 * rng.normal(size=image.shape)
    return np.round(255 * image.clip(0.02, 0.98)).astype(np.uint8)


def places(side: int) -> np.ndarray:
    """Rows and columns of the pixels kept, (2, PIXELS)."""
    return np.random.RandomState(1).randint(0, side, (2, PIXELS))


def frost_pictures(side: int) -> list[np.ndarray]:
    """What stands in for the photographs, RGB: five are drawn from, though there are six."""
    return [picture(100 + k, side) for k in range(6)]


def load_official(path: Path, side: int) -> dict:
    """The functions of an official file, run without what it does beside defining them."""
    import cv2
    import scipy.ndimage
    import skimage
    import skimage.color
    import skimage.filters
    import skimage.util

    def gaussian(image, sigma, multichannel=False, **options):
        return skimage.filters.gaussian(image, sigma, channel_axis=-1 if multichannel else None, **options)

    def random_noise(image, mode, amount):
        return skimage.util.random_noise(image, mode, rng=np.random.default_rng(np.random.mtrand._rand), amount=amount)

    def imread(name):
        return frost_pictures(side)[int(name.rpartition("frost")[2][0]) - 1][..., ::-1]

    np.float_, np.fromstring = np.float64, lambda data, dtype: np.frombuffer(data, dtype)
    tree = ast.parse(path.read_text())
    keep = []
    for node in tree.body:
        if (
            isinstance(node, ast.FunctionDef | ast.ClassDef)
            and node.name
            not in (
                "DistortImageFolder",
                "save_distorted",
            )
        ) or "wandlibrary.MagickMotionBlurImage.argtypes" in ast.unparse(node):
            keep.append(node)
    import ctypes
    from io import BytesIO

    import wand.image
    from PIL import Image
    from wand.api import library

    official = {
        "np": np,
        "sk": types.SimpleNamespace(util=types.SimpleNamespace(random_noise=random_noise), color=skimage.color),
        "gaussian": gaussian,
        "BytesIO": BytesIO,
        "WandImage": wand.image.Image,
        "wandlibrary": library,
        "ctypes": ctypes,
        "PILImage": Image,
        "cv2": cv2,
        "scizoom": scipy.ndimage.zoom,
        "map_coordinates": scipy.ndimage.map_coordinates,
        "resource_filename": lambda _, name: name,
        "__name__": "official",
    }
    exec(compile(ast.Module(keep, []), str(path), "exec"), official)
    # pictures of the right size stand in for the photographs, which CIFAR-10-C shrinks
    official["cv2"] = types.SimpleNamespace(**{name: getattr(cv2, name) for name in dir(cv2)})
    official["cv2"].imread = imread
    frozen = cv2.resize
    official["cv2"].resize = lambda image, size, **options: image if size == (0, 0) else frozen(image, size, **options)
    return official


def main(checkout: Path) -> None:
    from PIL import Image

    kept = {}
    files = {
        "imagenet": ("ImageNet-C/imagenet_c/imagenet_c/corruptions.py", 224),
        "cifar": ("ImageNet-C/create_c/make_cifar_c.py", 32),
    }
    for benchmark, (file, side) in files.items():
        official = load_official(checkout / file, 2 * side)
        rows, columns = places(side)
        pixels = np.zeros((len(NAMES), 5, PIXELS, 3), np.uint16)
        means = np.zeros((len(NAMES), 5), np.float32)
        for i, name in enumerate(NAMES):
            for severity in range(1, 6):
                np.random.seed(SEED)
                output = np.asarray(official[name](Image.fromarray(picture(0, side)), severity), dtype=np.float64)
                pixels[i, severity - 1] = np.round(256 * output[rows, columns])
                means[i, severity - 1] = output.mean()
        kept |= {f"{benchmark}_pixels": pixels, f"{benchmark}_means": means}
    np.savez_compressed(HERE / "corruptions.npz", **kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
