"""Weights and inputs as a pure function of their name and shape, so that the golden file holds answers only."""

import zlib

import numpy as np
import torch
from torch import Tensor


def filled(name: str, shape: tuple[int, ...], scale: float = 0.2) -> Tensor:
    """Normal numbers from NumPy's legacy generator, whose stream is frozen, seeded by the name."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return torch.from_numpy(values * scale).float()


def gym_inputs() -> dict[str, Tensor]:
    """Two windows of four steps, the first with one padded step."""
    mask = torch.ones(2, 4, dtype=torch.long)
    mask[0, 0] = 0
    return {
        "states": filled("states", (2, 4, 5), 1.0),
        "actions": filled("actions", (2, 4, 3), 0.5),
        "returns_to_go": filled("returns", (2, 4, 1), 1.0),
        "timesteps": torch.tensor([[0, 0, 1, 2], [3, 4, 5, 6]]),
        "attention_mask": mask,
    }


def atari_inputs() -> dict[str, Tensor]:
    """Two windows of three steps of frames."""
    return {
        "states": filled("frames", (2, 3, 4, 84, 84), 0.3).abs(),
        "actions": torch.tensor([[0, 3, 1], [2, 2, 0]]),
        "returns_to_go": filled("returns", (2, 3, 1), 1.0),
        "timesteps": torch.tensor([4, 7]),
    }
