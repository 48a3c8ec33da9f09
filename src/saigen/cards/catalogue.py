"""Finds rooms: those of the package, and those of plug-ins named by the entry point group ``saigen.papers``.

Cards are read by path; neither a room nor a plug-in is imported for that.
"""

import difflib
import fnmatch
import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from saigen.cards.schema import Card, CardError, Claim, read_card

ENTRY_POINTS = "saigen.papers"


@dataclass(frozen=True)
class Paper:
    """One entry of the list: its slug, its domain, its card, and where its room lies."""

    slug: str
    domain: str
    card: Card
    folder: Path
    package: str

    def load(self) -> ModuleType:
        """Imports the room; a missing extra is one ``ImportError`` that says which ``pip install`` helps."""
        return self._import(self.package)

    def module(self, name: str) -> ModuleType:
        """Imports a file of the room: ``claims``, ``examples`` or ``apply``."""
        return self._import(f"{self.package}.{name}")

    def has(self, name: str) -> bool:
        """True where the room has the file ``name``."""
        return (self.folder / name).is_file()

    @property
    def evidence_path(self) -> Path:
        """The published measurements."""
        return self.folder / "evidence.jsonl"

    def find_claim(self, claim_id: str) -> Claim:
        """The claim of that id; ``ValueError`` with the nearest right name otherwise."""
        ids = [claim.id for claim in self.card.claim]
        if claim_id not in ids:
            raise ValueError(
                f"{self.slug} has no claim {claim_id!r}{nearest(claim_id, ids)}: its claims are {', '.join(ids)}"
            )
        return self.card.find_claim(claim_id)

    def _import(self, name: str) -> ModuleType:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing == name.partition(".")[0]:
                raise
            extra = f"saigen[{self.card.extra}]" if self.card.extra else missing
            raise ImportError(f"{self.slug} needs {missing}: pip install '{extra}'") from error


def nearest(given: str, names: Iterable[str]) -> str:
    """``", did you mean X?"`` where a name is near, else an empty text."""
    close = difflib.get_close_matches(given, list(names), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def _package_folder(package: str) -> Path | None:
    """Where ``package`` lies, without importing anything below its top package (nor that, where it is not loaded)."""
    top, _, rest = package.partition(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        return None
    return (
        Path(next(iter(spec.submodule_search_locations))).joinpath(*rest.split("."))
        if rest
        else Path(spec.submodule_search_locations[0])
    )


def _rooms_below(folder: Path, package: str) -> list[tuple[Path, str, str]]:
    return [
        (card.parent, card.parent.parent.name, f"{package}.{card.parent.parent.name}.{card.parent.name}")
        for card in sorted(folder.glob("*/*/card.toml"))
    ]


@functools.cache
def _catalogue() -> tuple[dict[str, Paper], tuple[str, ...]]:
    papers: dict[str, Paper] = {}
    problems: list[str] = []
    found = [(room, "saigen") for room in _rooms_below(_package_folder("saigen") / "papers", "saigen.papers")]
    for point in sorted(importlib.metadata.entry_points(group=ENTRY_POINTS), key=lambda point: point.name):
        origin = point.dist.name if point.dist is not None else point.name
        folder = _package_folder(point.value)
        if folder is None or not folder.is_dir():
            problems.append(f"the plug-in {origin} names the package {point.value!r}, which cannot be found")
            continue
        if (folder / "card.toml").is_file():
            # The entry point names one room; its name is DOMAIN.SLUG or SLUG with the domain as the folder above.
            domain = point.name.partition(".")[0] if "." in point.name else folder.parent.name
            found.append(((folder, domain, point.value), origin))
        else:
            found += [(room, origin) for room in _rooms_below(folder, point.value)]
    for (folder, domain, package), origin in found:
        slug = folder.name
        try:
            card = read_card(folder / "card.toml")
        except CardError as error:
            problems.append(str(error))
            continue
        if slug in papers:
            problems.append(f"{origin} brings a second paper {slug!r}; the one in {papers[slug].folder} is used")
            continue
        papers[slug] = Paper(slug, domain, card, folder, package)
    return papers, tuple(problems)


def list_papers(domain: str | None = None, tag: str | None = None) -> list[Paper]:
    """All papers with a room, sorted by domain and slug, of one ``domain`` or ``tag`` if given.

    >>> [paper.slug for paper in list_papers(domain="rl")]
    ['decision_transformer']
    """
    papers, _ = _catalogue()
    if domain is not None:
        domains = sorted({paper.domain for paper in papers.values()})
        if domain not in domains:
            raise ValueError(
                f"there is no domain {domain!r}{nearest(domain, domains)}: the domains are {', '.join(domains)}"
            )
    if tag is not None:
        tags = sorted({tag for paper in papers.values() for tag in paper.card.tags})
        if tag not in tags:
            raise ValueError(f"there is no tag {tag!r}{nearest(tag, tags)}: the tags are {', '.join(tags)}")
    chosen = [p for p in papers.values() if domain in (None, p.domain) and (tag is None or tag in p.card.tags)]
    return sorted(chosen, key=lambda paper: (paper.domain, paper.slug))


def paper(slug: str) -> Paper:
    """The paper of that slug; ``ValueError`` with the nearest right name where there is none."""
    papers, problems = _catalogue()
    if slug in papers:
        return papers[slug]
    broken = [problem for problem in problems if f"/{slug}/" in problem.replace("\\", "/")]
    if broken:
        raise CardError(broken[0])
    raise ValueError(f"there is no paper {slug!r}{nearest(slug, papers)}: `saigen list` shows all {len(papers)}")


def problems() -> tuple[str, ...]:
    """What is wrong with cards and plug-ins, a sentence each; the other papers work."""
    return _catalogue()[1]


def refresh() -> None:
    """Forgets what was found, so that rooms and plug-ins are looked for again."""
    _catalogue.cache_clear()
    importlib.invalidate_caches()


def list_models(pattern: str = "*") -> list[str]:
    """Names that ``create_model`` builds, those that match ``pattern`` (as of a shell), in natural order."""
    import re

    names = {name for entry in list_papers() for name in entry.card.models}
    natural = lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]  # noqa: E731
    return sorted(fnmatch.filter(names, pattern), key=natural)


def find_model(name: str) -> Paper:
    """The paper whose room builds the model ``name``; ``ValueError`` with the nearest right name otherwise."""
    for entry in list_papers():
        if name in entry.card.models:
            return entry
    raise ValueError(f"there is no model {name!r}{nearest(name, list_models())}: saigen.list_models() names them all")


def clear_import(package: str) -> None:
    """Drops ``package`` and what lies below it from the loaded modules (for tests of plug-ins)."""
    for loaded in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[loaded]
