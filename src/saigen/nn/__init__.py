"""Blocks that two or more rooms use, and the base architectures papers start from."""
