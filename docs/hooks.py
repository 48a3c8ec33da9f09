"""Writes a page a paper into the site while mkdocs builds it, from the cards, the evidence and the report's templates.

Nothing it writes is kept in the repository. English stands at the root, Japanese below ``ja/``.
"""

from pathlib import Path
from typing import Any

from saigen import runner
from saigen.cards import catalogue
from saigen.cards.catalogue import Paper
from saigen.cards.glossary import RUNGS, label
from saigen.report import page as report

ROOTS = {"en": "", "ja": "ja/"}
TITLES = {"en": "The papers", "ja": "論文"}
INTRO = {
    "en": "Each paper has a room: its card, the method as a component, its claims as experiments, and the published evidence.",
    "ja": "論文それぞれに部屋がある。要点をまとめたカード、部品としての手法、実験としての主張、そして公開済みの測定である。",
}
STYLE = "stylesheets/article.css"


def papers() -> list[Paper]:
    """The rooms of saigen itself; a plug-in that happens to be installed is not ours to document."""
    return [paper for paper in catalogue.list_papers() if paper.package.startswith("saigen.")]


def pages() -> dict[str, str]:
    """Every generated file: its path in the site, and its text."""
    rooms = [(paper, runner.standing(paper)) for paper in papers()]
    written = {STYLE: (Path(report.__file__).parent / "assets" / "article.css").read_text(encoding="utf-8")}
    for lang, root in ROOTS.items():
        words = " | ".join(label(word, lang) for word in ("paper", "domain", "rung", "verdict"))
        lines = [f"# {TITLES[lang]}", "", INTRO[lang], "", f"| {words} |", "| --- | --- | --- | --- |"]
        for paper, standing in rooms:
            rung = f"{standing.rung} {RUNGS[lang][standing.rung]}"
            verdict = label(standing.headline, lang)
            lines.append(f"| [{_title(paper, lang)}]({paper.slug}.md) | {paper.domain} | {rung} | {verdict} |")
            # A fence in a code example would be taken for Markdown's own, even within HTML.
            body = report.article(paper, lang, standing).replace("```", "&#96;&#96;&#96;")
            written[f"{root}papers/{paper.slug}.md"] = f"---\ntitle: {paper.slug}\nhide: [toc]\n---\n\n{body}\n"
        written[f"{root}papers/index.md"] = "\n".join(lines) + "\n"
    return written


def _title(paper: Paper, lang: str) -> str:
    title = paper.card.title_ja if lang == "ja" else paper.card.title
    return title.replace("|", "\\|").replace("[", "\\[").replace("]", "\\]")


def nav(lang: str) -> list[Any]:
    """The section of the papers in the site's table of contents: the list, then the domains and their papers."""
    root, domains = ROOTS[lang], {}
    for paper in papers():
        domains.setdefault(paper.domain, []).append({paper.slug: f"{root}papers/{paper.slug}.md"})
    return [f"{root}papers/index.md", *({domain: entries} for domain, entries in domains.items())]


def _filled(entries: list[Any]) -> list[Any]:
    filled = []
    for entry in entries:
        if isinstance(entry, dict):
            ((name, value),) = entry.items()
            lang = next((lang for lang, root in ROOTS.items() if value == f"{root}papers/index.md"), None)
            entry = {name: nav(lang) if lang else _filled(value) if isinstance(value, list) else value}
        filled.append(entry)
    return filled


# --- what mkdocs calls ----------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    config["nav"] = _filled(config["nav"])
    return config


def on_files(files: Any, *, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_post_page(output: str, *, page: Any, config: Any) -> str:
    # A screen reader and a search engine go by the language that the page itself states.
    return output.replace('<html lang="en"', '<html lang="ja"', 1) if page.url.startswith(ROOTS["ja"]) else output
