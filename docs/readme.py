"""Writes the table of papers into the READMEs, from the cards and the published evidence: ``make readme``."""

import re
from pathlib import Path

from saigen import runner
from saigen.cards import catalogue
from saigen.cards.glossary import RUNGS, label

ROOT = Path(__file__).resolve().parent.parent
FILES = {"en": "README.md", "ja": "README.ja.md"}
BEGIN, END = "<!-- papers: written by make readme -->", "<!-- end of papers -->"
HEADS = {"en": ("paper", "slug", "rung", "claims measured"), "ja": ("論文", "スラッグ", "段", "測った主張")}


def table(lang: str) -> str:
    """The papers, how far each stands, and the verdict of each claim that was measured."""
    lines = [f"| {' | '.join(HEADS[lang])} |", "| --- | --- | --- | --- |"]
    for paper in catalogue.list_papers():
        if not paper.package.startswith("saigen."):
            continue
        standing, card = runner.standing(paper), paper.card
        claims = [
            f"`{result.claim}` ({result.scale}): {label(result.verdict, lang)}"
            + ("" if result.fresh else f" ({label('stale', lang)})")
            for result in standing.results
            if result.measurements
        ]
        title = card.title_ja if lang == "ja" else card.title
        rung = f"{standing.rung} {RUNGS[lang][standing.rung]}"
        said = "<br>".join(claims) or label("not run", lang)
        lines.append(f"| [{title}]({card.link}) | `{paper.slug}` | {rung} | {said} |")
    return "\n".join(lines)


def written(lang: str) -> tuple[str, str]:
    """A README as it is, and as it should be."""
    text = (ROOT / FILES[lang]).read_text(encoding="utf-8")
    new, count = re.subn(rf"(?s){BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{table(lang)}\n{END}", text)
    if count != 1:
        raise ValueError(f"{FILES[lang]} has {count} places between {BEGIN} and {END}, expected one")
    return text, new


if __name__ == "__main__":
    for lang, name in FILES.items():
        (ROOT / name).write_text(written(lang)[1], encoding="utf-8")
