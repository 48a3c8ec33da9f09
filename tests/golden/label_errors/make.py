"""Makes ``votes.json`` beside it: the distinct answers in the official crowd files, and how often each was given.

Run as ``python tests/golden/label_errors/make.py PATH``, PATH a checkout of cleanlab/label-errors. A line of a set is
[given, guessed, both, neither, neutral, off-topic, times]; of AudioSet, which has several labels an example, the line is
the number of examples and of those whose labels people confirmed are not the given ones.
"""

import json
import sys
from collections import Counter
from pathlib import Path

from saigen.papers.data_quality.label_errors import multi_label_error, read_votes

SETS = ("mnist", "cifar10", "cifar100", "caltech256", "imagenet", "quickdraw", "20news", "imdb", "amazon")


def main() -> None:
    """Reads the official files and writes the counts."""
    folder = Path(sys.argv[1]) / "mturk"
    found = {}
    for name in SETS:
        times = Counter(map(tuple, read_votes(folder / f"{name}_mturk.json").counts.tolist()))
        found[name] = sorted([*votes, count] for votes, count in times.items())
    audio = json.loads((folder / "audioset_mturk.json").read_text())
    wrong = sum(multi_label_error(entry["given_original_labels"], entry["mturk"]) for entry in audio)
    found["audioset"] = [[len(audio), wrong]]
    lines = ",\n".join(f'"{name}": {json.dumps(rows, separators=(",", ":"))}' for name, rows in found.items())
    Path(__file__).with_name("votes.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
