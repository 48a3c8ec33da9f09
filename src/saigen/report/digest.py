"""Digests: a list's round-up written from cards and evidence, in the form that list has.

The lists are data (``digests.toml``): order, sections and form of each; a paper's sentences come from its card, its
numbers from the published measurements. Entries without a room are title, link and one line.
"""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from pydantic import BaseModel, ConfigDict, Field

from saigen import runner
from saigen.cards import catalogue
from saigen.cards.catalogue import Paper, nearest
from saigen.cards.glossary import label
from saigen.cards.schema import Card
from saigen.files import replacing
from saigen.report import figures, zenn
from saigen.report.numbers import measured, reported
from saigen.runner import Standing

LISTS = Path(__file__).with_name("digests.toml")
FORMATS = ("zenn", "markdown", "slides")
FIGURE_ROWS = 6
FORMS = ("sections", "news", "monthly", "slides", "index")


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Entry(_Data):
    """One entry: of a paper (its card speaks once there is a room), or a title, a link and a line."""

    paper: str | None = None
    title: str
    title_en: str | None = None
    link: str | None = None
    ja: str = ""
    en: str = ""


class Section(_Data):
    ja: str
    en: str
    intro_ja: str = ""
    intro_en: str = ""
    entry: tuple[Entry, ...]


class DigestList(_Data):
    """A list in its own order, sections and form."""

    id: str
    form: str = Field(pattern="^(sections|news|monthly|slides|index)$")
    title_ja: str
    title_en: str
    date: str
    author: str
    emoji: str
    topics: tuple[str, ...]
    highlights: tuple[str, ...] = ()
    closing_ja: str = ""
    closing_en: str = ""
    note_ja: str = ""
    note_en: str = ""
    section: tuple[Section, ...]


def lists() -> dict[str, DigestList]:
    """The lists by id, in their order."""
    data = tomllib.loads(LISTS.read_text(encoding="utf-8"))
    return {found.id: found for found in (DigestList.model_validate(entry) for entry in data["digest"])}


def find_list(name: str) -> DigestList:
    """The list of that id; ``ValueError`` with the nearest right name otherwise."""
    known = lists()
    if name not in known:
        raise ValueError(f"there is no list {name!r}{nearest(name, known)}: the lists are {', '.join(known)}")
    return known[name]


@dataclass(frozen=True)
class Result:
    """One measured quantity beside the reported one, as a sentence's parts."""

    claim: str
    quantity: str
    reported: str
    measured: str
    verdict: str
    scale: str


@dataclass(frozen=True)
class Item:
    """An entry ready to be written in one language."""

    title: str
    original_title: str
    link: str
    sentences: tuple[str, ...]
    card: Card | None
    prose: dict[str, str]
    results: tuple[Result, ...]
    verdict: str
    figure: str | None
    slug: str | None

    @property
    def headline(self) -> str:
        """One line that says what it is about."""
        return self.sentences[0] if self.sentences else self.title


def sentences(text: str) -> list[str]:
    """A paragraph's sentences, of Japanese or English."""
    parts = re.split(r"(?<=。)|(?<=[.!?])\s+(?=[A-Z0-9(\"])", " ".join(text.split()))
    return [part.strip() for part in parts if part.strip()]


@dataclass(frozen=True)
class _Room:
    """A paper of a list that has a room, with its evidence judged once for every form and language."""

    paper: Paper
    standing: Standing
    drawn: list[figures.Row]


def _rooms(found: DigestList) -> dict[str, _Room]:
    named = {entry.paper for section in found.section for entry in section.entry}
    rooms = {}
    for paper in catalogue.list_papers():
        if paper.slug in named:
            standing = runner.standing(paper)
            rooms[paper.slug] = _Room(paper, standing, figures.rows(paper.card, standing.results)[:FIGURE_ROWS])
    return rooms


def _item(entry: Entry, rooms: dict[str, _Room], lang: str, figure_folder: str) -> Item:
    title = entry.title_en if lang == "en" and entry.title_en else entry.title
    room = rooms.get(entry.paper or "")
    if room is None:
        line = getattr(entry, lang)
        return Item(title, entry.title, entry.link or "", (line,) if line else (), None, {}, (), "", None, None)
    card = room.paper.card
    prose = (card.ja if lang == "ja" else card.en).model_dump()
    text = [*sentences(prose["purpose"])[:1], *sentences(prose["method"])[:2], *sentences(prose["result"])[:2]]
    return Item(
        title=card.title_ja if lang == "ja" else card.title,
        original_title=card.title,
        link=card.link or entry.link or "",
        sentences=tuple(text),
        card=card,
        prose=prose,
        results=tuple(_results(room, lang)),
        verdict=label(room.standing.headline, lang),
        figure=f"{figure_folder}/{room.paper.slug}.png" if room.drawn else None,
        slug=room.paper.slug,
    )


def _results(room: _Room, lang: str) -> Sequence[Result]:
    found = []
    for result in room.standing.results:
        claim = room.paper.card.find_claim(result.claim)
        for judged in result.quantities:
            quantity = claim.quantities[judged.name]
            if judged.interval is not None:
                text = (claim.id, getattr(quantity, lang), reported(quantity), measured(quantity, judged))
                found.append(Result(*text, label(judged.verdict, lang), result.scale))
    return found


def templates() -> jinja2.Environment:
    """The digests' templates; Markdown is written, so nothing is escaped as HTML."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("saigen.report"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def write_digest(name: str, out: Path, *, lang: str = "en", formats: Sequence[str] = ()) -> list[Path]:
    """Writes the round-up of the list ``name`` below ``out`` and returns the files written.

    ``formats`` are of ``zenn`` (an article and its images, as Zenn's repositories lay them out), ``markdown`` and
    ``slides`` (Marp); by default Zenn and Markdown, and slides where that is the list's form.
    Raises ``ValueError`` for unknown names, and where what was written breaks Zenn's rules.
    """
    found = find_list(name)
    if lang not in ("en", "ja"):
        raise ValueError(f"--lang is {lang!r}, allowed are en and ja")
    formats = tuple(formats) or ("zenn", "markdown", *(("slides",) if found.form == "slides" else ()))
    for given in formats:
        if given not in FORMATS:
            raise ValueError(f"--format is {given!r}{nearest(given, FORMATS)}, allowed are {', '.join(FORMATS)}")
    slug = f"saigen-{found.id}"
    rooms = _rooms(found)
    written = []
    for given in formats:
        images = f"/images/{slug}" if given == "zenn" else "images"
        text = _render(found, rooms, given, lang, images)
        path = {
            "zenn": out / "articles" / f"{slug}.md",
            "markdown": out / f"{slug}.md",
            "slides": out / f"{slug}-slides.md",
        }[given]
        folder = out / "images" / slug if given == "zenn" else out / "images"
        _write_figures(rooms, folder)
        if given == "zenn":
            problems = zenn.problems(text, slug=slug, root=out)
            if problems:
                raise ValueError(f"the digest {name} breaks a rule of Zenn: {problems[0]}")
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def _render(found: DigestList, rooms: dict[str, _Room], given: str, lang: str, images: str) -> str:
    context = {
        "digest": found,
        "lang": lang,
        "ja": lang == "ja",
        "title": found.title_ja if lang == "ja" else found.title_en,
        "sections": [
            {
                "title": getattr(s, lang),
                "intro": getattr(s, f"intro_{lang}"),
                "entries": [_item(e, rooms, lang, images) for e in s.entry],
            }
            for s in found.section
        ],
        "highlights": [
            _item(e, rooms, lang, images)
            for slug in found.highlights
            for s in found.section
            for e in s.entry
            if e.paper == slug
        ],
        "closing": getattr(found, f"closing_{lang}"),
        "note": getattr(found, f"note_{lang}"),
        "label": lambda word: label(word, lang),
    }
    body = templates().get_template("digest_slides.md.j2" if given == "slides" else "digest.md.j2").render(context)
    body = re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"
    if given != "zenn":
        return body if given == "slides" else f"# {context['title']}\n\n{body}"
    return zenn.front_matter(context["title"], found.emoji, found.topics) + "\n" + body


def _write_figures(rooms: dict[str, _Room], folder: Path) -> None:
    for slug, room in rooms.items():
        if room.drawn:
            with replacing(folder / f"{slug}.png") as temporary:
                figures.png(figures.anchors(room.drawn), str(temporary))
