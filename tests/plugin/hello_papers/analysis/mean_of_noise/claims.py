"""The claim: averaging shrinks the spread of noise."""

import os
import time
from dataclasses import dataclass

from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    draws: int


SIZES = {"tiny": Size(10), "laptop": Size(400), "real": Size(400)}


def averaging_shrinks_noise(trial: Trial) -> dict[str, float]:
    """One seed: the spread of single draws over the spread of means of 16."""
    time.sleep(float(os.environ.get("HELLO_SECONDS", "0")))
    if os.environ.get("HELLO_FAIL") == str(trial.seed):
        raise RuntimeError("told to fail")
    if "HELLO_SAYS" in os.environ:
        print(os.environ["HELLO_SAYS"], flush=True)
        os.write(1, os.environ["HELLO_SAYS"].encode())
    draws = trial.rng("draws").normal(size=(SIZES[trial.scale].draws, 16))
    single, mean = draws[:, 0].std(), draws.mean(1).std()
    shrink = float("nan") if os.environ.get("HELLO_NAN") == str(trial.seed) else single / mean
    return {"shrinks": shrink, "single": single, "mean": mean}
