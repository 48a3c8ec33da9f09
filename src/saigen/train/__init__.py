"""One training loop, schedules and weight averaging for every room."""

from saigen.train.loop import EMA, History, accuracy, fit, predict
from saigen.train.schedule import constant, cosine, polynomial, steps

__all__ = ["EMA", "History", "accuracy", "constant", "cosine", "fit", "polynomial", "predict", "steps"]
