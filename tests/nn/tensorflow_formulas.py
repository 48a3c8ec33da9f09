"""The image operations of the official RandAugment code, once more: pixel by pixel in NumPy, from their description alone.

Images are (h, w, 3) uint8. Slow on purpose, and shares nothing with the package.
"""

import math

import numpy as np


def truncate(value: np.ndarray) -> np.ndarray:
    return np.clip(value, 0, 255).astype(np.uint8)


def blend(degenerate: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    if factor == 0.0:
        return degenerate.astype(np.uint8)
    if factor == 1.0:
        return image
    a, b = degenerate.astype(np.float32), image.astype(np.float32)
    return truncate(a + np.float32(factor) * (b - a))


def luma(image: np.ndarray) -> np.ndarray:
    red, green, blue = (image[..., c].astype(np.float32) * np.float32(1 / 255) for c in range(3))
    grey = red * np.float32(0.2989) + green * np.float32(0.587) + blue * np.float32(0.114)
    return np.floor(grey * np.float32(255.5))[..., None].repeat(3, -1)


def color(image, factor):
    return blend(luma(image), image, factor)


def contrast(image, factor):
    histogram = np.bincount(luma(image)[..., 0].astype(int).ravel(), minlength=256)
    flat = np.clip(histogram.sum() / 256.0, 0, 255).astype(np.uint8)
    return blend(np.full(image.shape, flat), image, factor)


def brightness(image, factor):
    return blend(np.zeros_like(image), image, factor)


def sharpness(image, factor):
    kernel = [[1, 1, 1], [1, 5, 1], [1, 1, 1]]
    smooth = image.copy()
    h, w, _ = image.shape
    for y in range(1, h - 1):
        for x in range(1, w - 1):
            for c in range(3):
                total = sum(kernel[j][i] * int(image[y + j - 1, x + i - 1, c]) for j in range(3) for i in range(3))
                smooth[y, x, c] = total // 13
    return blend(smooth, image, factor)


def autocontrast(image):
    result = image.copy()
    for c in range(3):
        low, high = np.float32(image[..., c].min()), np.float32(image[..., c].max())
        if high > low:
            scale = np.float32(255.0) / (high - low)
            result[..., c] = truncate(image[..., c].astype(np.float32) * scale + -low * scale)
    return result


def equalize(image):
    result = image.copy()
    for c in range(3):
        counts = [int((image[..., c] == level).sum()) for level in range(256)]
        last = [count for count in counts if count][-1]
        step = (sum(counts) - last) // 255
        if step:
            table = [0] + [(sum(counts[: level + 1]) + step // 2) // step for level in range(255)]
            result[..., c] = np.clip(np.array(table), 0, 255)[image[..., c]]
    return result


def invert(image):
    return 255 - image


def posterize(image, bits):
    shift = 8 - bits
    return ((image.astype(int) >> shift) << shift).astype(np.uint8)


def solarize(image, threshold):
    return np.where(image.astype(int) < threshold, image, 255 - image)


def solarize_add(image, addition):
    return np.where(image < 128, np.clip(image.astype(int) + addition, 0, 255), image).astype(np.uint8)


def transform(image, matrix, fill):
    h, w, _ = image.shape
    a, b, c, d, e, f = (np.float32(number) for number in matrix)
    result = np.full_like(image, fill)
    for y in range(h):
        for x in range(w):
            u, v = float(a * np.float32(x) + b * np.float32(y) + c), float(d * np.float32(x) + e * np.float32(y) + f)
            u, v = (int(math.copysign(math.floor(abs(z) + 0.5), z)) for z in (u, v))
            if 0 <= u < w and 0 <= v < h:
                result[y, x] = image[v, u]
    return result


def rotate(image, degrees, fill):
    h, w, _ = image.shape
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x = ((w - 1) - (cos * (w - 1) - sin * (h - 1))) / 2
    y = ((h - 1) - (sin * (w - 1) + cos * (h - 1))) / 2
    return transform(image, (cos, -sin, x, sin, cos, y), fill)


def shear_x(image, shear, fill):
    return transform(image, (1, shear, 0, 0, 1, 0), fill)


def shear_y(image, shear, fill):
    return transform(image, (1, 0, 0, shear, 1, 0), fill)


def translate_x(image, pixels, fill):
    return transform(image, (1, 0, pixels, 0, 1, 0), fill)


def translate_y(image, pixels, fill):
    return transform(image, (1, 0, 0, 0, 1, pixels), fill)


def cutout(image, half, fill, row, column):
    h, w, _ = image.shape
    above, below = max(0, row - half), max(0, h - row - half)
    left, right = max(0, column - half), max(0, w - column - half)
    result = image.copy()
    result[above : h - below, left : w - right] = fill
    return result
