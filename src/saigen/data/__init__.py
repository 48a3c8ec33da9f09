"""Data sets: embedded ones that need nothing, and readers of what a user brings."""

from saigen.data.images import Images, decode, digits, fingerprint, load_images, split

__all__ = ["Images", "decode", "digits", "fingerprint", "load_images", "split"]
