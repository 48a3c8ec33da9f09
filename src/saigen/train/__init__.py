"""One training loop, schedules and weight averaging for every room."""

from saigen.train.loop import EMA, History, accuracy, fit, predict
from saigen.train.schedule import constant, cosine, polynomial, steps
from saigen.train.selection import Best, fit_best

__all__ = [
    "EMA",
    "Best",
    "History",
    "accuracy",
    "constant",
    "cosine",
    "fit",
    "fit_best",
    "polynomial",
    "predict",
    "steps",
]
