"""Data sets: embedded ones that need nothing, and readers of what a user brings."""

from saigen.data.augmentation import crop_and_flip, shift_and_flip, standardised
from saigen.data.images import Images, decode, digits, fingerprint, load_images, split

__all__ = [
    "Images",
    "crop_and_flip",
    "decode",
    "digits",
    "fingerprint",
    "load_images",
    "shift_and_flip",
    "split",
    "standardised",
]
