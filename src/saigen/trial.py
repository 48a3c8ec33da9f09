"""What a claim function is given: one seed of one claim at one scale."""

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

SCALES = ("tiny", "laptop", "real", "full")


@dataclass
class Trial:
    """One run of one claim. Everything random is a pure function of ``seed`` and of what it is drawn for."""

    seed: int
    scale: str = "laptop"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    data_path: Path | None = None
    scratch: Path | None = None
    """A folder for checkpoints of long arms; None where a trial is too short to need one."""
    report_progress: Callable[[int, int, str], None] | None = None
    used_data: dict[str, str] = field(default_factory=dict)
    """Name and fingerprint of each data set the claim asked for."""

    def _seed(self, purpose: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{purpose}".encode()).digest()[:7], "big")

    def generator(self, purpose: str) -> torch.Generator:
        """A fresh CPU generator, a pure function of the trial's seed and ``purpose``."""
        return torch.Generator().manual_seed(self._seed(purpose))

    def rng(self, purpose: str) -> np.random.Generator:
        """The same for NumPy."""
        return np.random.default_rng(self._seed(purpose))

    @contextmanager
    def seeded(self, purpose: str) -> Iterator[None]:
        """Within the block the global generators (torch, NumPy, random) are seeded; afterwards they are as before."""
        seed = self._seed(purpose)
        numpy_state, python_state = np.random.get_state(), random.getstate()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            try:
                yield
            finally:
                np.random.set_state(numpy_state)
                random.setstate(python_state)

    def data(self, name: str, **options: Any) -> Any:
        """The data set ``name``: ``"digits"`` (embedded), or ``"images"`` at the user's data path.

        Options are those of the reader (``size``, ``part``, ``limit`` for images).
        Raises ``ValueError`` for an unknown name, or where the user's own data is needed and no path was given.
        """
        from saigen.data import digits, load_images

        if name == "digits":
            result = digits(**options)
            self.used(name, result.fingerprint)
        elif name == "images":
            if self.data_path is None:
                raise ValueError(f"scale {self.scale!r} needs images of yours: give --data PATH")
            result = load_images(self.data_path, **options)
            self.used(f"{result.name}/{options.get('part', 'train')}", result.fingerprint)
        else:
            raise ValueError(f"data is {name!r}, allowed are digits and images")
        return result

    def used(self, name: str, fingerprint: str) -> None:
        """Notes that the claim measured on the data set ``name``; for data a claim makes or reads itself."""
        self.used_data[name] = fingerprint

    def checkpoint(self, arm: str) -> Path | None:
        """The file where ``fit`` keeps the state of a long arm; None at the scales that are too short for it."""
        return None if self.scratch is None else self.scratch / f"{arm}.pt"

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Tells the person waiting how far the trial is."""
        if self.report_progress is not None:
            self.report_progress(done, total, note)
