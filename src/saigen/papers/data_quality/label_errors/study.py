"""The study's public answers (cleanlab/label-errors, ``mturk/*.json``): what five people said of each candidate."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saigen.papers.data_quality.label_errors.estimator import ANSWERS


@dataclass(frozen=True)
class Votes:
    """What people answered: for each candidate its ``ids`` entry, labels given and guessed, and counts (m, 6) of answers."""

    ids: tuple[Any, ...]
    given: tuple[Any, ...]
    guessed: tuple[Any, ...]
    counts: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """The ids as row numbers; ``ValueError`` where they are names (IMDB's are file names)."""
        if not all(isinstance(i, int) for i in self.ids):
            raise ValueError(f"the ids are names such as {self.ids[0]!r}, row numbers are needed")
        return np.array(self.ids, dtype=np.intp)


def read_votes(path: str | Path) -> Votes:
    """Reads one of the study's answer files: images and 20news, IMDB, Amazon.

    Amazon's people named the sentiment; a sentiment that is neither given nor guessed counts as "neither". AudioSet has
    several labels an example: see ``multi_label_error``. Raises ``ValueError`` naming the file and the entry.
    """
    path = Path(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as answers of people: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} holds no list of answers")
    counts = np.zeros((len(entries), len(ANSWERS)), np.int64)
    ids, given, guessed = [], [], []
    for number, entry in enumerate(entries):
        try:
            ids.append(entry["id"])
            given.append(entry["given_original_label"])
            guessed.append(entry["our_guessed_label"])
            for answer, count in entry["mturk"].items():
                counts[number, ANSWERS.index(_named(answer, given[-1], guessed[-1]))] += int(count)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"entry {number} of {path} is not as needed, with id, given_original_label, our_guessed_label and mturk: {error!r}"
            ) from error
    return Votes(tuple(ids), tuple(given), tuple(guessed), counts)


def _named(answer: str, given: Any, guessed: Any) -> str:
    """The answer as one of ``ANSWERS``; a sentiment by what it was to the example."""
    if answer in ("positive", "negative") or (answer == "neutral" and "Neutral" in (given, guessed)):
        return {str(guessed).lower(): "guessed", str(given).lower(): "given"}.get(answer, "neither")
    return answer
