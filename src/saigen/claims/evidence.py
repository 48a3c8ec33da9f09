"""Measurements: what they hold, where they lie, and whether they are still fresh."""

import ast
import datetime
import functools
import hashlib
import importlib.util
import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from saigen.cards.catalogue import Paper
from saigen.cards.schema import Claim
from saigen.files import write_text

FORMAT = 1
EMBEDDED = ("digits",)


class EvidenceError(ValueError):
    """Evidence that cannot be read, or that may not be published; the message says why."""


class Measurement(BaseModel):
    """The numbers one trial gave, and where they came from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    paper: str
    claim: str
    scale: str
    seed: int = Field(ge=0)
    values: dict[str, float | None]
    """Quantities and every arm's raw value; null where a value was not finite."""
    seconds: float
    code: str
    card: str
    setting: dict[str, Any]
    data: dict[str, str]
    environment: dict[str, Any]
    created: datetime.datetime
    carried_from: tuple[str, ...] = ()
    """Hashes of earlier code that gave these numbers; the ``tiny`` values were bit-equal each time the code changed."""

    @property
    def numbers(self) -> dict[str, float]:
        """The values as floats, those that were not finite as NaN."""
        return {name: math.nan if value is None else value for name, value in self.values.items()}

    def line(self) -> str:
        """One line of JSON, keys sorted."""
        return json.dumps(self.model_dump(mode="json"), ensure_ascii=False, sort_keys=True)

    @property
    def set_key(self) -> str:
        """Measurements of one verdict share this: claim, scale, setting, data, code, card, kind of machine."""
        same = (
            self.paper,
            self.claim,
            self.scale,
            self.setting,
            {name: print if is_fixed(name) else "drawn" for name, print in self.data.items()},
            self.code,
            self.card,
            machine_kind(self.environment),
        )
        return digest(json.dumps(same, sort_keys=True, default=str))


def is_fixed(data: str) -> bool:
    """True for data that is the same for every seed: embedded, or the user's own (``FOLDER/part``).

    Data of any other name is drawn by the claim itself, anew for each seed, and has a fingerprint a seed.
    """
    return data in EMBEDDED or "/" in data


def digest(data: str | bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def machine_kind(environment: dict[str, Any]) -> tuple[str, ...]:
    """What has to be equal for two measurements to be of the same kind of machine."""
    return tuple(str(environment.get(name, "")) for name in ("processor", "cores", "device", "torch"))


def claim_digest(claim: Claim) -> str:
    """The hash of the judged block of a card: anchors, fairness and sentences."""
    return digest(json.dumps(claim.model_dump(mode="json"), ensure_ascii=False, sort_keys=True))


# --- code -----------------------------------------------------------------------------------------------------------


def _module_file(root: Path, top: str, name: str) -> Path | None:
    parts = name.split(".")[1:]
    if name.partition(".")[0] != top:
        return None
    folder = root.joinpath(*parts)
    if (folder / "__init__.py").is_file():
        return folder / "__init__.py"
    file = folder.with_suffix(".py") if parts else None
    return file if file is not None and file.is_file() else None


def _imports(path: Path, module: str) -> set[str]:
    names: set[str] = set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(_parsed(path, path.stat().st_mtime_ns)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *([base] if base else [])]
                )
            names.add(base)
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


@functools.lru_cache(maxsize=512)
def _parsed(path: Path, changed: int) -> ast.Module:
    return ast.parse(path.read_bytes())


def code_files(paper: Paper) -> list[Path]:
    """The room's files that a claim can reach, and every module of saigen (or of the plug-in) they import, transitively."""
    roots: dict[str, Path] = {}
    for top in {"saigen", paper.package.partition(".")[0]}:
        spec = importlib.util.find_spec(top)
        if spec is not None and spec.submodule_search_locations:
            roots[top] = Path(next(iter(spec.submodule_search_locations)))
    start = [
        f"{paper.package}.{file.stem}"
        for file in paper.folder.glob("*.py")
        if file.stem not in ("__init__", "examples", "apply")
    ]
    seen: dict[str, Path] = {}
    waiting = [paper.package, *sorted(start)]
    while waiting:
        module = waiting.pop()
        top = module.partition(".")[0]
        # The front door only forwards; counting it would make all evidence stale with every release.
        if module in seen or top not in roots or module == "saigen":
            continue
        file = _module_file(roots[top], top, module)
        if file is None:
            continue
        seen[module] = file
        waiting += _imports(file, module)
        parent = module.rpartition(".")[0]
        if parent:
            waiting.append(parent)
    return [seen[module] for module in sorted(seen)]


def code_digest(paper: Paper) -> str:
    """SHA-256 of the room's code and of everything of saigen that it imports."""
    total = hashlib.sha256()
    for file in code_files(paper):
        total.update(hashlib.sha256(file.read_bytes().replace(b"\r\n", b"\n")).digest())
    return total.hexdigest()


# --- environment ----------------------------------------------------------------------------------------------------


def environment(device: str, threads: int) -> dict[str, Any]:
    """The machine and the versions a trial runs with."""
    import importlib.metadata as metadata

    versions = {}
    for name in ("torch", "numpy", "scipy", "scikit-learn"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": device,
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
    }


@functools.cache
def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# --- reading and choosing -------------------------------------------------------------------------------------------


def read_evidence(path: Path) -> list[Measurement]:
    """The published measurements of a room, oldest first; an empty list where there are none."""
    if not path.is_file():
        return []
    measurements = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            measurements.append(Measurement.model_validate_json(line))
        except ValidationError as error:
            raise EvidenceError(f"line {number} of {path} is not a measurement: {error.errors()[0]['msg']}") from error
    return measurements


def is_fresh(measurement: Measurement, paper: Paper, code: str | None = None) -> bool:
    """True where neither the code nor the judged block of the card has changed since the measurement."""
    try:
        claim = paper.card.find_claim(measurement.claim)
    except ValueError:
        return False
    return measurement.card == claim_digest(claim) and measurement.code == (code or code_digest(paper))


def seeds_from_zero(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Seeds 0, 1, … without a hole, the latest measurement of each."""
    latest: dict[int, Measurement] = {}
    for measurement in measurements:
        latest[measurement.seed] = measurement
    return [latest[seed] for seed in range(len(latest)) if all(earlier in latest for earlier in range(seed + 1))]


def enough_seeds(claim: Claim, count: int) -> bool:
    """True where ``count`` seeds make a complete set: five, or one where every quantity is exact (or shown only)."""
    from saigen.claims.verdict import SEEDS

    one_run = all(quantity.kind in ("exact", "value") for quantity in claim.quantities.values())
    return count >= (1 if one_run else SEEDS)


def chosen_set(measurements: Sequence[Measurement], claim: Claim, scale: str) -> list[Measurement]:
    """The one set a verdict uses: of those of this claim and scale, the complete one measured last, else the largest."""
    groups: dict[str, list[Measurement]] = {}
    for measurement in measurements:
        if measurement.claim == claim.id and measurement.scale == scale:
            groups.setdefault(measurement.set_key, []).append(measurement)
    sets = [seeds_from_zero(group) for group in groups.values()]
    sets = [found for found in sets if found]
    if not sets:
        return []
    return max(sets, key=lambda found: (enough_seeds(claim, len(found)), found[-1].created))


# --- the store of local runs ----------------------------------------------------------------------------------------


def home() -> Path:
    """Where local runs are kept: ``$SAIGEN_HOME``, or the platform's folder for user data."""
    import platformdirs

    given = os.environ.get("SAIGEN_HOME")
    return Path(given).expanduser() if given else Path(platformdirs.user_data_dir("saigen", appauthor=False))


class Store:
    """Local measurements, one file each, written whole or not at all."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = home() if folder is None else folder

    def check_writable(self) -> None:
        """Raises ``ValueError`` with one sentence where measurements could not be kept."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"cannot keep measurements in {self.folder} ({error.strerror}): set SAIGEN_HOME to a writable folder"
            ) from error

    def path(self, paper: str, claim: str, scale: str, seed: int, key: str) -> Path:
        """Where the measurement of a trial lies; ``key`` stands for code, card, setting, data and machine."""
        return self.folder / "measurements" / paper / claim / f"{scale}-{seed:04d}-{key[:16]}.json"

    def read(self, path: Path) -> Measurement | None:
        """The measurement at ``path``; None where there is none, or where what lies there is not one."""
        try:
            return Measurement.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return None

    def write(self, path: Path, measurement: Measurement) -> None:
        """Keeps a measurement."""
        write_text(path, measurement.line() + "\n")

    def failure_path(self, path: Path) -> Path:
        """Where the log lies of a trial that failed: beside where its measurement would."""
        return path.with_suffix(".failed.txt")

    def write_failure(self, path: Path, log: str) -> None:
        """Keeps the log of a trial that failed."""
        write_text(self.failure_path(path), log)

    def clear_failure(self, path: Path) -> None:
        """Forgets that the trial once failed."""
        self.failure_path(path).unlink(missing_ok=True)

    def measurements(self, paper: str) -> list[Measurement]:
        """All local measurements of a paper, oldest first."""
        found = [self.read(path) for path in sorted((self.folder / "measurements" / paper).glob("*/*.json"))]
        return sorted((m for m in found if m is not None), key=lambda m: (m.created, m.claim, m.seed))


# --- publishing -----------------------------------------------------------------------------------------------------


def _is_tiny_run(m: Measurement, claim: Claim, code: str) -> bool:
    """Whether ``m`` is the run of ``claim`` by which code is compared with other code, made with ``code``."""
    return (m.claim, m.scale, m.seed, m.code) == (claim.id, "tiny", 0, code)


def merge(paper: Paper, local: Sequence[Measurement]) -> list[Measurement]:
    """The new lines that publishing ``local`` appends to the room's evidence; refuses what may not be published.

    Only fresh measurements count. Every published set is complete from seed 0 and comes with its ``tiny`` values (seed
    0), by which later code can be shown to give the same numbers.
    Raises ``EvidenceError`` where there is nothing fresh, or where seeds are missing.
    """
    code = code_digest(paper)
    fresh = [m for m in local if m.paper == paper.slug and is_fresh(m, paper, code)]
    published = {(m.set_key, m.seed): m for m in read_evidence(paper.evidence_path)}
    new: list[Measurement] = []
    for claim in paper.card.claim:
        tiny = [m for m in fresh if _is_tiny_run(m, claim, code)]
        for scale in ("laptop", "real", "full"):
            chosen = chosen_set(fresh, claim, scale)
            if not chosen:
                continue
            if not enough_seeds(claim, len(chosen)):
                raise EvidenceError(
                    f"{paper.slug} {claim.id} at scale {scale} has {len(chosen)} seeds of 5: `saigen run {paper.slug}` measures the others"
                )
            if not tiny:
                raise EvidenceError(
                    f"{paper.slug} {claim.id} has no tiny run: `saigen run {paper.slug} --scale tiny --seeds 1` makes it"
                )
            new += [m for m in [tiny[-1], *chosen] if (m.set_key, m.seed) not in published and m not in new]
    if not fresh:
        raise EvidenceError(f"{paper.slug} has no fresh local measurements: `saigen run {paper.slug}` makes them")
    return new


def carry_over(paper: Paper, published: Sequence[Measurement], tiny: Sequence[Measurement]) -> list[Measurement]:
    """Published measurements of earlier code, restated for today's, where ``tiny``, rerun, is bit-equal.

    Clock values are never carried. The environment of the two tiny runs must be the same.
    """
    code = code_digest(paper)
    carried = []
    for claim in paper.card.claim:
        now = next((m for m in reversed(tiny) if _is_tiny_run(m, claim, code)), None)
        if now is None or claim.clock:
            continue
        for scale in ("laptop", "real", "full"):
            judged = [m for m in published if m.card == claim_digest(claim)]
            if any(m.code == code and (m.claim, m.scale) == (claim.id, scale) for m in judged):
                continue
            # Evidence that was carried over stands there once a code: the latest that can be compared from here counts.
            for old in reversed(dict.fromkeys(m.code for m in judged if (m.claim, m.scale) == (claim.id, scale))):
                chosen = chosen_set([m for m in judged if m.code == old], claim, scale)
                then = [m for m in published if _is_tiny_run(m, claim, old) and m.environment == now.environment]
                if chosen and then and then[-1].values == now.values and then[-1].setting == now.setting:
                    break
            else:
                continue
            carried += [m.model_copy(update={"code": code, "carried_from": (*m.carried_from, old)}) for m in chosen]
            if not any(m.claim == claim.id and m.scale == "tiny" for m in carried):
                carried.append(now)
    return carried


def witnesses(paper: Paper, published: Sequence[Measurement], tiny: Sequence[Measurement]) -> list[Measurement]:
    """``tiny`` runs of the code that ``published`` evidence is of, from an environment that has none there yet.

    With one, evidence from another machine can be carried over from here: bits are compared within an environment only,
    and code that is bit-equal to the code of the evidence in one environment is the code of the evidence.
    """
    code = code_digest(paper)
    found = []
    for claim in paper.card.claim:
        of_claim = [m for m in published if m.claim == claim.id and m.code == code]
        there = [m.environment for m in of_claim if m.scale == "tiny"]
        if not there or all(m.scale == "tiny" for m in of_claim):
            continue
        for m in tiny:
            if not (_is_tiny_run(m, claim, code) and is_fresh(m, paper, code)):
                continue
            if m.environment not in there:
                there.append(m.environment)
                found.append(m)
    return found


def append(path: Path, measurements: Sequence[Measurement]) -> None:
    """Adds lines to a room's evidence; what stands there is kept byte for byte."""
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    if before and not before.endswith("\n"):
        before += "\n"
    try:
        write_text(path, before + "".join(measurement.line() + "\n" for measurement in measurements))
    except ValueError as error:
        raise EvidenceError(f"cannot publish: {error}") from error
