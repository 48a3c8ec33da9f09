"""What the functions of confident learning accept: class indices, probabilities, multi-label sets, joints."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

SLACK = 1e-6  # how far a probability may lie outside 0 to 1, and below a threshold and still reach it
SUM_TOLERANCE = 1e-3  # how far from one a row of probabilities may sum: what float16 storage does to it


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises ``ValueError`` where ``value`` is not among ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, allowed are {', '.join(allowed)}")


def probabilities(pred_probs: ArrayLike, *, rows_sum_to_one: bool = True) -> np.ndarray:
    """``pred_probs`` as an array (n, K) of float32 or float64; raises ``ValueError`` naming the row and class."""
    P = np.asarray(pred_probs)
    if P.dtype not in (np.float32, np.float64):
        try:
            P = P.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"pred_probs holds {P.dtype} values, numbers are needed") from error
    if P.ndim != 2 or P.shape[0] == 0 or P.shape[1] < (2 if rows_sum_to_one else 1):
        raise ValueError(f"pred_probs has shape {P.shape}, needed is (examples, classes) with at least 2 classes")
    sums = P @ np.ones(P.shape[1], P.dtype)
    if not np.isfinite(sums).all():
        row, column = np.argwhere(~np.isfinite(P))[0]
        raise ValueError(f"pred_probs row {row} has {P[row, column]} for class {column}, probabilities are needed")
    highest = 0.0 if rows_sum_to_one else P.max()  # where rows sum to one and nothing is negative, nothing passes 1
    if P.min() < -SLACK or highest > 1 + SLACK:
        row, column = np.argwhere((P < -SLACK) | (P > 1 + SLACK))[0]
        raise ValueError(f"pred_probs row {row} has {P[row, column]:.6g} for class {column}, allowed is 0 to 1")
    if rows_sum_to_one and (wrong := np.abs(sums - 1) > SUM_TOLERANCE).any():
        row = int(wrong.argmax())
        raise ValueError(f"pred_probs row {row} sums to {sums[row]:.6g}, probabilities sum to 1")
    return P


def class_indices(labels: ArrayLike, num_classes: int, n: int | None = None) -> np.ndarray:
    """``labels`` as an array (n,) of indices below ``num_classes``; raises ``ValueError`` naming the row."""
    y = np.asarray(labels)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise ValueError(f"labels has shape {y.shape}, needed is one class index per example")
    if n is not None and len(y) != n:
        raise ValueError(f"labels has {len(y)} entries and pred_probs {n} rows, they must be as many")
    if y.dtype.kind not in "iub":
        try:
            real = y.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"labels holds {y.dtype} values, class indices 0 to {num_classes - 1} are needed"
            ) from error
        if (wrong := ~np.isfinite(real) | (real != np.rint(real))).any():
            row = int(wrong.argmax())
            raise ValueError(f"labels row {row} is {y[row]}, class indices 0 to {num_classes - 1} are needed")
        y = real
    y = y.astype(np.intp)
    if y.size and (y.min() < 0 or y.max() >= num_classes):
        row = int(((y < 0) | (y >= num_classes)).argmax())
        raise ValueError(f"labels row {row} is class {y[row]}, allowed are 0 to {num_classes - 1}")
    return y


def labels_and_probabilities(
    labels: ArrayLike, pred_probs: ArrayLike, *, least_classes: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Both, of one length, with at least ``least_classes`` classes among the labels."""
    P = probabilities(pred_probs)
    y = class_indices(labels, P.shape[1], len(P))
    if least_classes > 1 and (y == y[0]).all():
        raise ValueError(f"every label is class {y[0]}, labels of at least 2 classes are needed")
    return y, P


def one_hot(labels: Any, pred_probs: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Multi-label input: a list of class indices per example, or an n x K matrix of 0 and 1."""
    P = probabilities(pred_probs, rows_sum_to_one=False)
    if isinstance(labels, np.ndarray) and labels.ndim == 2:
        if labels.shape != P.shape or not np.isin(labels, (0, 1)).all():
            raise ValueError(
                f"labels has shape {labels.shape}, needed are 0 and 1 in the shape {P.shape} of pred_probs"
            )
        return labels.astype(np.intp), P
    if len(labels) != len(P):
        raise ValueError(f"labels has {len(labels)} entries and pred_probs {len(P)} rows, they must be as many")
    Y = np.zeros(P.shape, np.intp)
    for row, classes in enumerate(labels):
        if np.ndim(classes) != 1:
            raise ValueError(f"labels row {row} is {classes!r}, multi_label needs a list of class indices")
        Y[row, class_indices(classes, P.shape[1]) if len(classes) else []] = 1
    return Y, P


def joint_of_shape(C: ArrayLike, K: int, ndim: int) -> np.ndarray:
    """A confident joint given by the user: (K, K), or with ``ndim`` 3 one of (2, 2) a class."""
    C, needed = np.asarray(C), (K, K) if ndim == 2 else (K, 2, 2)
    if C.shape != needed or not np.isfinite(C).all() or (C < 0).any():
        raise ValueError(f"confident_joint has shape {C.shape}, needed is {needed} with counts of 0 or more")
    return C
