"""Starts a room: files that say what to fill, and contract tests that fail by name until it is."""

import keyword
import re
from pathlib import Path

import jinja2

from saigen.cards import catalogue
from saigen.cards.catalogue import Paper, nearest
from saigen.cards.schema import DOMAINS, SLUG
from saigen.files import replacing

ARXIV = re.compile(
    r"(?:arxiv:|https?://arxiv\.org/(?:abs|pdf)/)?(\d{4}\.\d{4,5})(?:v\d+)?(?:\.pdf)?", flags=re.IGNORECASE
)
FILES = ("__init__.py", "card.toml", "layer.py", "claims.py", "examples.py")


def scaffold(name: str, *, domain: str, slug: str | None = None, into: Path | None = None) -> list[Path]:
    """Writes a room for the paper ``name`` (an arXiv id, or the slug) and its test; returns the files.

    ``into`` is a package folder (with ``__init__.py``); by default saigen's own papers.
    Raises ``ValueError`` for a name or domain that is not allowed, or a paper that has a room already.
    """
    match = ARXIV.fullmatch(name.strip())
    arxiv = match.group(1) if match else None
    for paper in catalogue.list_papers():
        if arxiv is not None and paper.card.arxiv == arxiv:
            raise ValueError(f"arXiv {arxiv} has a room already: {_place(paper)}")
        if paper.slug == (slug or name):
            raise ValueError(f"the slug {paper.slug!r} has a room already, and slugs are unique: {_place(paper)}")
    if arxiv and slug is None:
        raise ValueError(f"{name} is an arXiv id: give the room's slug as well, --slug NAME")
    if not arxiv and slug not in (None, name):
        raise ValueError(f"{name!r} is no arXiv id and --slug is {slug!r}: give one slug")
    slug = slug or name
    if not SLUG.fullmatch(slug) or keyword.iskeyword(slug):
        raise ValueError(f"the slug is {slug!r}, allowed are a letter and then letters, digits and _ in lower case")
    if domain not in DOMAINS:
        raise ValueError(
            f"there is no domain {domain!r}{nearest(domain, DOMAINS)}: the domains are {', '.join(DOMAINS)}"
        )
    own = into is None
    package = Path(__file__).parent / "papers" if into is None else into
    if not (package / "__init__.py").is_file():
        raise ValueError(f"--into is {package}, which is no Python package (it has no __init__.py)")
    room = package / domain / slug
    if room.exists():
        raise ValueError(f"{room} is there already")
    name_of_package = ("saigen.papers" if own else package.resolve().name) + f".{domain}.{slug}"
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("saigen", "room_template"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    words = {
        "slug": slug,
        "domain": domain,
        "arxiv": arxiv,
        "package": name_of_package,
        "class_name": _class_name(slug),
    }
    written = []
    with replacing(room) as folder:
        folder.mkdir()
        for file in FILES:
            (folder / file).write_text(templates.get_template(f"{file}.j2").render(words), encoding="utf-8")
    written += [room / file for file in FILES]
    if not (room.parent / "__init__.py").exists():
        (room.parent / "__init__.py").touch()
    root = _checkout(package) if own else package.resolve().parent
    if root is not None:
        test = root / "tests" / ("papers" if own else "") / (domain if own else "") / f"test_{slug}.py"
        if not test.exists():
            with replacing(test) as temporary:
                temporary.write_text(templates.get_template("test.py.j2").render(words), encoding="utf-8")
            written.append(test)
    catalogue.refresh()
    return written


def _place(paper: Paper) -> str:
    return f"{paper.domain}/{paper.slug}, {paper.card.title!r} (`saigen show {paper.slug}`)"


def _class_name(slug: str) -> str:
    return "".join(part.capitalize() for part in slug.split("_"))


def _checkout(package: Path) -> Path | None:
    # src/saigen/papers in a checkout; an installed package has no tests beside it.
    root = package.parent.parent.parent
    return root if (root / "tests").is_dir() and (root / "pyproject.toml").is_file() else None
