"""The page: an index and a page a paper, static files that need no server and no network."""

import datetime
import inspect
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from saigen import runner
from saigen.cards import catalogue
from saigen.cards.catalogue import Paper
from saigen.cards.glossary import LABELS, RUNGS
from saigen.cards.schema import Claim
from saigen.claims import evidence
from saigen.files import replacing
from saigen.report import figures
from saigen.report.numbers import duration, measured, number, reported
from saigen.runner import ClaimResult, Standing

SCALES = ("laptop", "real", "full")
INDEX_ROWS = 4


@dataclass(frozen=True)
class Code:
    """The copyable example of one public component."""

    name: str
    text: str


def environment(lang: str | None = None) -> jinja2.Environment:
    """The templates, with the words and number formats they use; in both languages, or in ``lang`` alone."""
    say = both if lang is None else partial(only, lang)
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("saigen.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.globals |= {
        "both": say,
        "word": lambda name: say(LABELS["en"].get(name, name), LABELS["ja"].get(name, name)),
        "word_ja": lambda name: LABELS["ja"].get(name, name),
        "RUNGS": RUNGS,
        "SCALES": SCALES,
        "duration": duration,
    }
    templates.filters |= {"number": number, "reported": reported, "slugify": lambda text: text.replace(" ", "-")}
    return templates


def both(en: str, ja: str, tag: str = "span") -> Markup:
    """A text in both languages; the page shows the one the reader chose."""
    return Markup('<{0} class="t" lang="en">{1}</{0}><{0} class="t" lang="ja">{2}</{0}>').format(Markup(tag), en, ja)


def only(lang: str, en: str, ja: str, tag: str = "span") -> Markup:
    """A text in one language."""
    return Markup("<{0}>{1}</{0}>").format(Markup(tag), ja if lang == "ja" else en)


def write_report(out: Path, papers: Sequence[Paper] | None = None, *, lang: str | None = None) -> Path:
    """Writes the page into the folder ``out`` and returns the path of its index; what stood there is replaced as a whole.

    The page holds both languages and opens in ``lang``; None opens it in the language of the reader's browser.
    Raises ``ValueError`` where ``out`` is a file, or a folder that is not a report of ours.
    """
    papers = catalogue.list_papers() if papers is None else list(papers)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "index.html").is_file())):
        raise ValueError(f"--out is {out}, which is not empty and not an earlier report: give a new folder")
    templates = environment()
    stands = {paper.slug: runner.standing(paper) for paper in papers}
    written = datetime.datetime.now(datetime.UTC).date().isoformat()
    with replacing(out) as folder:
        (folder / "papers").mkdir(parents=True)
        source = Path(inspect.getfile(write_report)).parent / "assets"
        shutil.copytree(source, folder / "assets")
        rows = [_row(paper, stands[paper.slug]) for paper in papers]
        context = {
            "rows": rows,
            "domains": sorted({paper.domain for paper in papers}),
            "verdicts": [v for v in figures.COLOURS if any(row["standing"].headline == v for row in rows)],
            "written": written,
            "lang": lang,
            "root": "",
        }
        _render(templates, "index.html.j2", folder / "index.html", context)
        for paper in papers:
            page = _paper(paper, stands[paper.slug], own_runs=True)
            page |= {"written": written, "lang": lang, "root": "../"}
            _render(templates, "paper.html.j2", folder / "papers" / f"{paper.slug}.html", page)
    return out / "index.html"


def article(paper: Paper, lang: str, standing: Standing | None = None) -> str:
    """A paper's page in one language as an ``<article>`` to stand in another site; published evidence only.

    It is dressed by ``assets/article.css``.
    """
    page = _paper(paper, standing or runner.standing(paper), own_runs=False)
    return environment(lang).get_template("paper_article.html.j2").render(page)


def _render(templates: jinja2.Environment, name: str, path: Path, context: dict[str, Any]) -> None:
    path.write_text(templates.get_template(name).render(context), encoding="utf-8")


def _row(paper: Paper, standing: Standing) -> dict[str, Any]:
    by_scale = sorted(standing.results, key=lambda result: SCALES.index(result.scale))
    rows = figures.rows(paper.card, by_scale)[:INDEX_ROWS]
    plot = _plot(rows, f"{paper.slug}: nothing, reported, measured", width=4.4, small=True)
    return {"paper": paper, "card": paper.card, "standing": standing, "plot": plot}


def _plot(rows: Sequence[figures.Row], title: str, **look: Any) -> Markup | None:
    return Markup(figures.svg(figures.anchors(rows, **look), title)) if rows else None


def _paper(paper: Paper, standing: Standing, *, own_runs: bool) -> dict[str, Any]:
    return {
        "paper": paper,
        "card": paper.card,
        "standing": standing,
        "claims": [_claim(paper, claim, standing, own_runs) for claim in paper.card.claim],
        "codes": _codes(paper),
        "sources": _sources(standing),
        "tests": paper.card.parity,
    }


def _claim(paper: Paper, claim: Claim, standing: Standing, own_runs: bool) -> dict[str, Any]:
    results = [
        ("published", r) for scale in SCALES if (r := standing.result(claim.id, scale)) is not None and r.measurements
    ]
    results += [("yours", r) for r in _local(paper, claim)] if own_runs else []
    results.sort(key=lambda pair: SCALES.index(pair[1].scale))
    shown = []
    for origin, result in results:
        rows = [(q.name, claim.quantities[q.name], q) for q in result.quantities]
        drawn = figures.rows(paper.card, [result], name_scale=False)
        shown.append(
            {
                "result": result,
                "origin": origin,
                "rows": [
                    {
                        "name": name,
                        "quantity": quantity,
                        "judged": judged,
                        "measured": measured(quantity, judged),
                        "seeds": [number(value) for value in judged.values],
                    }
                    for name, quantity, judged in rows
                ],
                "arms": _arms(claim, result),
                "plot": _plot(drawn, f"{claim.id} at scale {result.scale}: nothing, reported, measured"),
                "seconds": sum(m.seconds for m in result.measurements) / len(result.measurements),
                "fairness": claim.fairness(result.scale),
            }
        )
    return {
        "claim": claim,
        "shown": shown,
        "missing": [s for s in claim.scales if s != "tiny" and s not in {r.scale for _, r in results}],
    }


def _local(paper: Paper, claim: Claim) -> list[ClaimResult]:
    """The reader's own fresh runs of a claim; they stand beside the published ones, never in their place."""
    code = evidence.code_digest(paper)
    published = {(m.claim, m.scale, m.seed, m.created) for m in evidence.read_evidence(paper.evidence_path)}
    own = [
        m
        for m in evidence.Store().measurements(paper.slug)
        if evidence.is_fresh(m, paper, code) and (m.claim, m.scale, m.seed, m.created) not in published
    ]
    results = [runner.judge(paper, claim, scale, own) for scale in SCALES]
    return [result for result in results if result.measurements]


def _arms(claim: Claim, result: ClaimResult) -> list[tuple[str, list[str]]]:
    """Every arm's raw value, a row an arm, a column a seed."""
    names = [name for name in result.measurements[0].values if name not in claim.quantities]
    return [(name, [number(m.numbers.get(name, float("nan"))) for m in result.measurements]) for name in names]


def _codes(paper: Paper) -> list[Code]:
    """The copyable examples; a room whose extra is missing shows none rather than failing the page."""
    try:
        return [Code(example.name, example.code.strip()) for example in paper.module("examples").examples()]
    except ImportError:
        return []


def _sources(standing: Standing) -> list[dict[str, Any]]:
    """Where the evidence came from, a row a set."""
    return [
        {
            "claim": result.claim,
            "scale": result.scale,
            "seeds": result.seeds,
            "machine": result.measurements[0].environment,
            "created": max(m.created for m in result.measurements).date().isoformat(),
            "code": result.measurements[0].code[:12],
            "carried": bool(result.measurements[0].carried_from),
            "data": result.measurements[0].data,
            "setting": result.measurements[0].setting,
            "fresh": result.fresh,
        }
        for result in standing.results
        if result.measurements
    ]
