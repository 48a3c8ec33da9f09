"""Writes what is known back: the page, the digests, the figures."""
