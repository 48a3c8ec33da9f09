"""The command line: ``saigen list | show | run | apply | publish | report | digest | bench | cross | new``."""

import contextlib
import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saigen.cards import catalogue
from saigen.cards.catalogue import Paper, nearest
from saigen.cards.glossary import RUNGS, label
from saigen.cards.schema import DOMAINS
from saigen.report.numbers import duration, measured, number, reported

LANGUAGES = ("en", "ja")
INTERRUPTED = 130
# The base of every complaint about arguments; typer has carried click under more than one name.
WrongUse: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")
VERDICT_STYLES = {
    "reproduced": "green",
    "direction only": "cyan",
    "not reproduced": "red",
    "inconclusive": "yellow",
    "not comparable": "dim",
    "not run": "dim",
}


class Commands(typer.core.TyperGroup):
    """Names the nearest command for one that there is not."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            names = self.list_commands(ctx)
            raise ValueError(
                f"there is no command {args[0]!r}{nearest(args[0], names)}: the commands are {', '.join(names)}"
            )
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Commands,
    name="saigen",
    help="A reading list you can run: papers as components, and their claims re-measured on your machine.",
    epilog="Begin with `saigen list`, then `saigen show confident_learning`, then `saigen run confident_learning`.",
    no_args_is_help=True,
    # Markdown, so that a docstring's paragraphs are filled, and square brackets are no markup.
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Lang = Annotated[str, typer.Option("--lang", help="Language of what is printed: en or ja.")]
Papers = Annotated[
    list[str] | None, typer.Argument(metavar="PAPER", help="Slugs of papers, as `saigen list` shows them.")
]
Domain = Annotated[
    str | None, typer.Option(help="Every paper of a domain, `vision` say; `saigen list` shows each paper's.")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document to stdout; everything else goes to stderr.")
]


def main() -> None:
    """The entry point: wrong use is one clear line and exit code 2, never a traceback."""
    if os.environ.get("SAIGEN_DEBUG"):
        app(prog_name="saigen")
    warnings.showwarning = _show_warning
    try:
        # Outside standalone mode an early exit comes back as its code; Ctrl-C as 130.
        code = app(standalone_mode=False, prog_name="saigen")
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _err().print("stopped; what was finished is kept, and the same command goes on from there")
        sys.exit(INTERRUPTED)
    except WrongUse as error:
        if not error.format_message():  # `saigen` alone, which has shown the help
            sys.exit(0)
        where = getattr(error, "ctx", None)
        more = f" (`{where.command_path} --help` shows what it takes)" if where is not None else ""
        _err().print(f"[bold red]error:[/] {escape(_complaint(error) + more)}", soft_wrap=True)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (ValueError, ImportError) as error:
        _err().print(f"[bold red]error:[/] {escape(' '.join(str(error).split()))}", soft_wrap=True)
        sys.exit(2)


def _complaint(error: Any) -> str:
    """The sentence of a complaint about arguments, with what was given where the parser leaves that out."""
    message = error.format_message()
    name = next(iter(getattr(getattr(error, "param", None), "opts", ())), None)
    given = _given_for(name, sys.argv[1:]) if message.startswith("Invalid value") else None
    return message if given is None or repr(given) in message else f"{name} is {given!r}: {message}"


def _given_for(option: str | None, arguments: Sequence[str]) -> str | None:
    """What the command line gives an option, ``--seeds two`` or ``--seeds=two``; of several, the last."""
    found = None
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        if argument == option:
            found = following
        elif option is not None and argument.startswith(f"{option}="):
            found = argument.partition("=")[2]
    return found


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """A warning as a line for a user; where in the code it arose is of no use to them."""
    _err().print(f"[yellow]warning:[/] {escape(' '.join(str(message).split()))}", soft_wrap=True)


def _out() -> Console:
    return Console(soft_wrap=False, width=None if sys.stdout.isatty() else 240, highlight=False)


def _err() -> Console:
    return Console(stderr=True, width=None if sys.stderr.isatty() else 240, highlight=False)


@contextlib.contextmanager
def _stdout_kept(as_json: bool) -> Iterator[None]:
    """With ``--json``, what the work prints goes to stderr: experiments', workers', C libraries' and Ray's words.

    Worker processes inherit the file descriptor and not ``sys.stdout``, so both are turned round.
    """
    if not as_json:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _table(*columns: str) -> Table:
    # Slugs and verdicts are copied and searched for: no column that holds them wraps.
    boxless = {"box": None, "pad_edge": False} if not sys.stdout.isatty() else {}
    table = Table(show_header=True, header_style="bold", **boxless)
    for column in columns:
        table.add_column(column.removesuffix("~"), no_wrap=not column.endswith("~"), overflow="fold")
    return table


def _language(lang: str) -> str:
    if lang not in LANGUAGES:
        raise ValueError(f"--lang is {lang!r}, allowed are en and ja")
    return lang


def _chosen(papers: Sequence[str] | None, everything: bool = False, domain: str | None = None) -> list[Paper]:
    if papers and (everything or domain):
        raise ValueError("give papers, or --all, or --domain, not two of them")
    if papers:
        return [catalogue.paper(slug) for slug in dict.fromkeys(papers)]
    if everything or domain:
        return catalogue.list_papers(domain=domain)
    raise ValueError("which papers? give their slugs (`saigen list` shows them), --domain NAME, or --all")


def _warn_of_problems() -> None:
    for problem in catalogue.problems():
        _err().print(f"[yellow]left out:[/] {escape(problem)}", soft_wrap=True)


# --- list, show -----------------------------------------------------------------------------------------------------


@app.command("list")
def list_command(
    domain: Annotated[str | None, typer.Option(help="Only papers of this domain, `vision` say.")] = None,
    tag: Annotated[
        str | None,
        typer.Option(help="Only papers with this tag, `token pruning` say; `saigen list --json` has them all."),
    ] = None,
    rung: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=5,
            help=f"Only papers that stand at least this far up the ladder: {', '.join(f'{n} {name}' for n, name in enumerate(RUNGS['en']))}.",
        ),
    ] = None,
    as_json: AsJson = False,
    lang: Lang = "en",
) -> None:
    """List the papers that have a room, how far up the ladder of evidence each stands, and its verdict."""
    from saigen.runner import standing

    lang = _language(lang)
    rows = [(paper, standing(paper)) for paper in catalogue.list_papers(domain=domain, tag=tag)]
    rows = [(paper, found) for paper, found in rows if rung is None or found.rung >= rung]
    _warn_of_problems()
    if as_json:
        entries = [
            {
                "paper": p.slug, "domain": p.domain, "title": p.card.title, "title_ja": p.card.title_ja, "arxiv": p.card.arxiv,
                "tags": list(p.card.tags), "rung": s.rung, "verdict": s.headline, "models": list(p.card.models),
            }
            for p, s in rows
        ]  # fmt: skip
        print(json.dumps(entries, ensure_ascii=False, indent=1))
        return
    table = _table(*(label(word, lang) for word in ("paper", "domain", "rung", "verdict")), label("title", lang) + "~")
    for paper, found in rows:
        title = paper.card.title_ja if lang == "ja" else paper.card.title
        table.add_row(
            paper.slug,
            paper.domain,
            f"{found.rung} {RUNGS[lang][found.rung]}",
            _verdict(found.headline, lang),
            escape(title),
        )
    _out().print(table)


@app.command()
def show(
    paper: Annotated[str, typer.Argument(metavar="PAPER", help="The slug of a paper.")],
    as_json: AsJson = False,
    lang: Lang = "en",
) -> None:
    """Show a paper's card, its claims with reported and measured numbers, and how to use its component."""
    from saigen.runner import standing

    lang = _language(lang)
    entry = catalogue.paper(paper)
    found = standing(entry)
    if as_json:
        print(
            json.dumps(
                entry.card.model_dump(mode="json")
                | {
                    "slug": entry.slug,
                    "domain": entry.domain,
                    "rung": found.rung,
                    "verdict": found.headline,
                    "results": [
                        {"claim": r.claim, "scale": r.scale, "verdict": r.verdict, "seeds": r.seeds, "fresh": r.fresh}
                        | {"quantities": _quantities(r)}
                        for r in found.results
                        if r.measurements
                    ],
                },
                ensure_ascii=False,
                indent=1,
            )
        )
        return
    out, card = _out(), entry.card
    prose = card.ja if lang == "ja" else card.en
    out.print(f"[bold]{escape(card.title_ja if lang == 'ja' else card.title)}[/]  ({entry.domain}/{entry.slug})")
    out.print(f"{card.venue} · {', '.join(card.affiliations)} · {card.link}", soft_wrap=True)
    out.print(f"{label('rung', lang)} {found.rung} {RUNGS[lang][found.rung]} · {_verdict(found.headline, lang)}")
    for field in ("purpose", "method", "result", "limits"):
        out.print(f"\n[bold]{label(field, lang)}[/]\n{escape(getattr(prose, field))}", soft_wrap=True)
    for claim in card.claim:
        out.print(
            f"\n[bold]{claim.id}[/] ({claim.where})\n{escape(claim.ja if lang == 'ja' else claim.en)}", soft_wrap=True
        )
        table = _table(*(label(word, lang) for word in ("quantity", "reported", "scale", "published", "verdict")))
        for scale in ("laptop", "real", "full"):
            result = found.result(claim.id, scale)
            for judged in result.quantities if result is not None else ():
                quantity = claim.quantities[judged.name]
                verdict = _verdict(judged.verdict, lang) + ("" if result.fresh else f" ({label('stale', lang)})")
                table.add_row(getattr(quantity, lang), reported(quantity), scale, measured(quantity, judged), verdict)
        if table.row_count == 0:
            for quantity in claim.quantities.values():
                table.add_row(getattr(quantity, lang), reported(quantity), "-", "-", label("not run", lang))
        out.print(table)
    if card.models:
        out.print(f"\nsaigen.create_model: {', '.join(card.models)}", soft_wrap=True)


def _verdict(verdict: str, lang: str) -> str:
    return f"[{VERDICT_STYLES.get(verdict, '')}]{label(verdict, lang)}[/]"


# --- run ------------------------------------------------------------------------------------------------------------


@app.command(
    epilog="Examples: `saigen run confident_learning` · `saigen run sam dynamic_vit --scale tiny` · "
    "`saigen run simsiam --scale real --data my_images`"
)
def run(
    papers: Papers = None,
    everything: Annotated[bool, typer.Option("--all", help="Every paper.")] = False,
    domain: Domain = None,
    claim: Annotated[
        list[str] | None,
        typer.Option(help="Only this claim, as `saigen show PAPER` names them; may be given more than once."),
    ] = None,
    scale: Annotated[
        str,
        typer.Option(
            help="How big: tiny (seconds, no verdict), laptop (minutes, embedded data), real (hours or a GPU, mostly with "
            "your --data), full (the paper's setting)."
        ),
    ] = "laptop",
    seeds: Annotated[int, typer.Option(help="Seeds 0 to N-1, N at most 20.")] = 5,
    settle: Annotated[
        bool,
        typer.Option(
            "--settle", help="After the first five seeds take one more look, at as many seeds as 80 % power needs."
        ),
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(help="Trials at a time; by default as many as cores at tiny and laptop, one at real and full."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")] = "cpu",
    data: Annotated[
        Path | None,
        typer.Option(
            help="Your own data, for the scales real and full. Images: a folder (`train/CLASS/*.jpg` and `test/CLASS/*.jpg`, "
            "or `CLASS/*.jpg`), or Parquet with the columns image and label. What else a claim takes it says itself."
        ),
    ] = None,
    backend: Annotated[str, typer.Option(help="Who spreads the trials: loky (this machine), ray, dask.")] = "loky",
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 unless every claim that was run is reproduced.")
    ] = False,
    as_json: AsJson = False,
    lang: Lang = "en",
) -> None:
    """Re-measure the claims of papers and judge them beside what the papers report.

    What was measured before and is still fresh is not run again, so after Ctrl-C, a crash or a power cut the same
    command goes on where it was. A claim that does not apply to --data is left out, with the reason.

    Exit code: 0 when it ran, whatever the verdicts; 1 when a claim failed; 2 for wrong use.
    """
    from saigen import runner

    lang = _language(lang)
    if settle and seeds != runner.FIRST_LOOK:
        raise ValueError("--settle decides the number of seeds itself: leave --seeds out")
    chosen = _chosen(papers, everything, domain)
    options = runner.Options(scale, seeds, jobs, device, data, backend)
    runner.check_options(options)
    tasks = runner.plan(chosen, options, claim or ())
    if not tasks:
        raise ValueError(f"none of these papers has an experiment at scale {scale!r}")
    with _stdout_kept(as_json):
        outcomes = _run_with_progress(tasks, options, chosen)
        if settle:
            outcomes = _settle(chosen, options, claim or (), outcomes)
    results = runner.results_of(chosen, outcomes)
    if runner.rank() != 0:
        return
    failures = [outcome for outcome in outcomes if outcome.failed]
    measured_here = [result for result in results if result.unfit is None]
    if as_json:
        print(_document(results, failures))
    elif measured_here:
        _print_results(chosen, measured_here, lang)
    runner.check_some_fit(results, options)
    for result in results:
        if result.unfit is not None:
            why = f"does not apply to this data: {result.unfit}" if data is not None else result.unfit
            _err().print(f"[yellow]left out:[/] {result.paper} {result.claim} {escape(why)}", soft_wrap=True)
    for name in dict.fromkeys(f"{o.task.paper} {o.task.claim}" for o in outcomes if o.ignored_data):
        _err().print(f"[yellow]note:[/] {name} makes its own data: --data was not read", soft_wrap=True)
    store = runner.Store()
    for outcome in failures:
        place = f"{outcome.task.paper} {outcome.task.claim} seed {outcome.task.seed}"
        if outcome.measurement is None:
            last = (outcome.log or "").strip().splitlines()[-1]
            _err().print(
                f"[red]failed:[/] {place}: {escape(last)} (log: {store.failure_path(outcome.task.path)})",
                soft_wrap=True,
            )
        else:
            _err().print(
                f"[red]not finite:[/] {place}: {', '.join(n for n, v in outcome.measurement.values.items() if v is None)}",
                soft_wrap=True,
            )
    if failures or (strict and any(result.verdict != "reproduced" for result in measured_here)):
        raise typer.Exit(1)


def _run_with_progress(tasks: Sequence[Any], options: Any, papers: Sequence[Paper]) -> list[Any]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from saigen import runner

    store = runner.Store()
    store.check_writable()
    if runner.rank() != 0:
        return runner.run_tasks(tasks, options)
    err = _err()
    waiting = [task for task in tasks if store.read(task.path) is None]
    jobs = options.jobs or runner.default_jobs(options.scale)
    seconds = runner.forecast(waiting, jobs, papers)
    have = f", {len(tasks) - len(waiting)} measured before" if len(waiting) < len(tasks) else ""
    guess = (
        ""
        if not waiting
        else f": about {duration(seconds)}"
        if seconds is not None
        else ": never measured before, so no forecast"
    )
    err.print(f"{_work(len(waiting), jobs)}{have}{guess}")
    if not err.is_terminal:
        count = 0

        def told(outcome: Any) -> None:
            nonlocal count
            count += 1
            if _worth_telling(outcome):
                err.print(f"[{count}/{len(tasks)}] {_told(outcome)}", markup=False)

        return runner.run_tasks(tasks, options, told)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        bars = {
            key: progress.add_task(f"{key[0]} {key[1]}", total=sum((t.paper, t.claim) == key for t in tasks))
            for key in dict.fromkeys((task.paper, task.claim) for task in tasks)
        }

        def advance(outcome: Any) -> None:
            progress.advance(bars[outcome.task.paper, outcome.task.claim])
            if _worth_telling(outcome):
                progress.console.print(_told(outcome), markup=False)

        return runner.run_tasks(tasks, options, advance)


def _work(trials: int, jobs: int) -> str:
    width = min(jobs, trials)
    where = "" if trials == 0 else f" on {width} process{'es' if width > 1 else ''}"
    return f"{trials} trial{'' if trials == 1 else 's'} to run{where}"


def _worth_telling(outcome: Any) -> bool:
    """Not what was measured before; and what the data do not suit is said once a claim, at the end."""
    return not outcome.reused and outcome.unfit is None


def _told(outcome: Any) -> str:
    task = outcome.task
    end = "failed" if outcome.measurement is None else f"{outcome.measurement.seconds:.1f} s"
    return f"{task.paper} {task.claim} {task.scale} seed {task.seed}: {end}"


def _settle(papers: Sequence[Paper], options: Any, claims: Sequence[str], outcomes: list[Any]) -> list[Any]:
    """One more look, at 0 to N-1, with N announced from the spread of the first five."""
    import dataclasses

    from saigen import runner
    from saigen.claims.evidence import enough_seeds
    from saigen.claims.verdict import seeds_needed

    everything = list(outcomes)
    for result in runner.results_of(papers, outcomes):
        paper = catalogue.paper(result.paper)
        claim = paper.card.find_claim(result.claim)
        if enough_seeds(claim, 1) or result.seeds < runner.FIRST_LOOK or options.scale == "tiny":
            continue
        n = seeds_needed(claim, [m.numbers for m in result.measurements[: runner.FIRST_LOOK]], options.scale)
        if n == runner.FIRST_LOOK:
            continue
        _err().print(f"{paper.slug} {claim.id}: one more look, at {n} seeds")
        more = [
            t
            for t in runner.plan([paper], dataclasses.replace(options, seeds=n), [claim.id])
            if t.seed >= runner.FIRST_LOOK
        ]
        everything += _run_with_progress(more, options, [paper])
    return everything


def _document(results: Sequence[Any], failures: Sequence[Any]) -> str:
    """Sorted by paper, claim and seed; no forecasts, so that the same runs give the same document."""
    entries = []
    results = sorted(results, key=lambda r: (r.paper, r.claim))
    for result in results:
        if result.unfit is not None:
            continue
        entries.append(
            {
                "paper": result.paper,
                "claim": result.claim,
                "scale": result.scale,
                "verdict": result.verdict,
                "quantities": _quantities(result),
                "measurements": [m.model_dump(mode="json") for m in result.measurements],
            }
        )
    failed = [
        {"paper": o.task.paper, "claim": o.task.claim, "scale": o.task.scale, "seed": o.task.seed, "log": o.log}
        for o in sorted(failures, key=lambda o: (o.task.paper, o.task.claim, o.task.seed))
    ]
    unfit = [
        {"paper": r.paper, "claim": r.claim, "scale": r.scale, "reason": r.unfit}
        for r in results
        if r.unfit is not None
    ]
    document = {"results": entries, "does_not_apply": unfit, "failed": failed}
    return json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False)


def _quantities(result: Any) -> dict[str, Any]:
    return {
        q.name: {
            "verdict": q.verdict,
            "values": [_finite(v) for v in q.values],
            "mean": _finite(q.interval.mean) if q.interval else None,
            "interval": [_finite(q.interval.low), _finite(q.interval.high)] if q.interval else None,
            "bar": q.bar,
        }
        for q in result.quantities
    }


def _finite(value: float) -> float | None:
    import math

    return value if math.isfinite(value) else None


def _print_results(papers: Sequence[Paper], results: Sequence[Any], lang: str) -> None:
    from saigen import runner

    out = _out()
    words = ("paper", "claim", "quantity", "reported", "published", "yours", "verdict")
    table = _table(*(label(word, lang) for word in words))
    short_of: list[Paper] = []
    for result in results:
        paper = catalogue.paper(result.paper)
        claim = paper.card.find_claim(result.claim)
        before = next((r for r in runner.published(paper, (result.scale,)) if r.claim == result.claim), None)
        # A tiny run is not judged: "not run" would be an odd thing to read of what has just run.
        shown = (lambda verdict: "-") if result.scale == "tiny" else (lambda verdict: _verdict(verdict, lang))
        for index, (name, quantity) in enumerate(claim.quantities.items()):
            judged = next((q for q in result.quantities if q.name == name), None)
            then = next((q for q in before.quantities if q.name == name), None) if before else None
            table.add_row(
                paper.slug if index == 0 else "",
                claim.id if index == 0 else "",
                getattr(quantity, lang),
                reported(quantity),
                measured(quantity, then) if then else "-",
                measured(quantity, judged) if judged and judged.interval else _raw(judged),
                shown(judged.verdict if judged else "not run"),
            )
        table.add_row(
            "",
            "",
            "",
            "",
            "",
            f"{label('seeds', lang)} {result.seeds}, {result.scale}",
            f"[bold]{shown(result.verdict)}[/]",
            end_section=True,
        )
        if result.verdict in ("not reproduced", "inconclusive", "direction only") and paper not in short_of:
            short_of.append(paper)
    out.print(table)
    for paper in short_of:
        if paper.card.trap:
            out.print(f"\n[bold]{paper.slug}: {label('traps', lang)}[/]")
            for trap in paper.card.trap:
                out.print(f"  - {escape(getattr(trap, lang))}", soft_wrap=True)


def _raw(judged: Any) -> str:
    return ", ".join(number(value) for value in judged.values) if judged and judged.values else "-"


# --- apply ----------------------------------------------------------------------------------------------------------


@app.command(
    "apply",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    options_metavar="PAPER INPUT... --out PATH [OPTIONS]",
)
def apply_command(
    ctx: typer.Context,
    paper: Annotated[str | None, typer.Argument(metavar="PAPER", help="The slug of a paper.")] = None,
) -> None:
    """Use a paper's method on your own files; `saigen apply PAPER --help` shows what it takes."""
    able = [entry.slug for entry in catalogue.list_papers() if entry.has("apply.py")]
    if paper in (None, "--help", "-h"):
        typer.echo(
            "Usage: saigen apply PAPER INPUT... --out PATH [OPTIONS]\n\nUse a paper's method on your own files.\n"
        )
        typer.echo(
            f"Papers that map files to files: {', '.join(able)}\n`saigen apply PAPER --help` shows what each takes."
        )
        return
    entry = catalogue.paper(paper)
    if not entry.has("apply.py"):
        raise ValueError(f"{paper} does not map files to files: `saigen apply` takes {', '.join(able)}")
    function = entry.module("apply").apply
    room = typer.Typer(
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def finish(said: str | None, **_: Any) -> None:
        if said:
            typer.echo(said)

    # What the function raises is for who calls it from Python; here it is a line and an exit code.
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    said_of_it = "\n\n".join(text for text in paragraphs if not text.startswith("Raises "))
    room.command(name=f"apply {paper}", help=said_of_it)(function)
    command = typer.main.get_command(room)
    finish(command.main(args=ctx.args, prog_name=f"saigen apply {paper}", standalone_mode=False))


# --- publish --------------------------------------------------------------------------------------------------------


@app.command()
def publish(
    papers: Papers = None,
    everything: Annotated[bool, typer.Option("--all", help="Every paper with fresh local measurements.")] = False,
) -> None:
    """Merge fresh local measurements into the published evidence of papers (for maintainers of a room).

    Refuses code that is not committed, tiny runs and sets with missing seeds. Where only code changed and `tiny`, rerun,
    gives the same bits, earlier evidence is carried over. Bits are compared within one environment: before you change the
    code of evidence from another machine, run its `tiny` here and publish it.
    """
    from saigen.claims import evidence
    from saigen.claims.evidence import EvidenceError, Store

    store = Store()
    for entry in _chosen(papers, everything):
        _refuse_uncommitted(entry)
        local = store.measurements(entry.slug)
        before = evidence.read_evidence(entry.evidence_path)
        tiny = [m for m in local if m.scale == "tiny"]
        # What was measured with today's code comes first; only what was not is carried over.
        try:
            new, refused = evidence.merge(entry, local), None
        except EvidenceError as error:
            new, refused = [], error
        carried = evidence.carry_over(entry, [*before, *new], tiny)
        known = {(m.set_key, m.seed) for m in new}
        carried = [m for m in carried if (m.set_key, m.seed) not in known]
        witnesses = evidence.witnesses(entry, [*before, *new, *carried], tiny)
        if refused is not None and not carried and not witnesses and not everything:
            raise refused
        new += [*carried, *witnesses]
        if new:
            evidence.append(entry.evidence_path, new)
        measured = len(new) - len(carried) - len(witnesses)
        seen = f", {len(witnesses)} tiny runs of the published code added from here" if witnesses else ""
        typer.echo(f"{entry.slug}: {measured} measurements published, {len(carried)} carried over{seen}")


def _refuse_uncommitted(paper: Paper) -> None:
    import subprocess

    from saigen.claims.evidence import EvidenceError, code_files

    files = [*code_files(paper), paper.folder / "card.toml"]
    try:
        done = subprocess.run(
            ["git", "status", "--porcelain", "--", *map(str, files)],
            cwd=paper.folder,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise EvidenceError(f"{paper.slug} cannot be published from here: its folder is not a git checkout") from error
    if done.stdout.strip():
        changed = re.sub(r"^..\s", "", done.stdout.strip().splitlines()[0])
        raise EvidenceError(f"{paper.slug} cannot be published: {changed} has changes that are not committed")


# --- report ---------------------------------------------------------------------------------------------------------


@app.command()
def report(
    papers: Papers = None,
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("saigen-report"),
    show_it: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    lang: Annotated[
        str | None,
        typer.Option(
            "--lang", help="The language the page opens in, en or ja; by default that of the reader's browser."
        ),
    ] = None,
) -> None:
    """Write the page: an index and a page a paper, with reported beside measured numbers, in both languages."""
    from saigen.report.page import write_report

    chosen = [catalogue.paper(slug) for slug in papers] if papers else None
    index = write_report(out, chosen, lang=None if lang is None else _language(lang))
    _warn_of_problems()
    typer.echo(f"the page is at {index.resolve()}")
    if show_it:
        typer.launch(index.resolve().as_uri())


@app.command(epilog="Example: `saigen digest monthly-2021-05 --lang ja --format zenn`")
def digest(
    name: Annotated[
        str,
        typer.Argument(
            metavar="LIST",
            help="The id of a list: 2019-part-1, ml-news-2020-w45, monthly-2021-05, ai-paper-reading-2021-07, washizaki-articles.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("saigen-digest"),
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="zenn, markdown or slides; may be given more than once.")
    ] = None,
    lang: Lang = "en",
) -> None:
    """Write a list's round-up from cards and evidence: as Zenn Markdown, plain Markdown, or slides."""
    from saigen.report.digest import write_digest

    for path in write_digest(name, out, lang=_language(lang), formats=formats or ()):
        typer.echo(f"wrote {path}")


# --- bench, cross, new -----------------------------------------------------------------------------------------------------


@app.command()
def bench(
    papers: Papers = None,
    domain: Domain = None,
    rounds: Annotated[int, typer.Option(min=2, help="Pairs of measurements a benchmark.")] = 7,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table to this Markdown file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time each component against its best public peer, alternating in one process on this machine.

    `peer / ours` above 1 means ours is faster; with its 95 % interval over the rounds. Peers come with `pip install 'saigen[peers]'`.
    """
    from saigen import bench as benching
    from saigen.files import write_text
    from saigen.testing.peers import tolerate_missing_torchvision_operators

    chosen = _chosen(papers, everything=not papers and not domain, domain=domain)
    tolerate_missing_torchvision_operators()
    rows = []
    with _stdout_kept(as_json):
        for paper, benchmark in benching.benchmarks(chosen):
            row = benching.measure(paper, benchmark, rounds=rounds)
            rows.append(row)
            _err().print(f"{row.paper} {row.name}: {row}", markup=False, soft_wrap=True)
    if not rows:
        raise ValueError("none of these papers has a benchmark")
    if as_json:
        print(json.dumps([vars(row) for row in rows], indent=1))
    else:
        table = _table("paper", "benchmark", "ours", "peer", "peer / ours")
        for row in rows:
            times = ("-", "-") if row.missing else (f"{row.ours * 1e3:.2f} ms", f"{row.peer * 1e3:.2f} ms")
            table.add_row(row.paper, row.name, *times, str(row))
        _out().print(table)
        _out().print(benching.machine(), soft_wrap=True)
    if markdown is not None:
        write_text(
            markdown,
            benching.markdown(
                rows, " ".join(["saigen bench", *(papers or ()), *(["--domain", domain] if domain else ())])
            ),
        )


@app.command(
    epilog="Example: `saigen cross --models vit,efficientnet --methods SAM,RandAugment`; first `saigen cross --list`."
)
def cross(
    models: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Models, or papers that bring some, with commas; by default all."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Methods, or papers that bring some, with commas; by default all."),
    ] = None,
    scale: Annotated[
        str, typer.Option(help="tiny, laptop (embedded digits) or real (your images: give --data).")
    ] = "laptop",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0 to N-1.")] = 5,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; by default one a core.")] = None,
    data: Annotated[Path | None, typer.Option(help="Your images, for --scale real.")] = None,
    out: Annotated[Path, typer.Option(help="The folder for the table and the heat map.")] = Path("saigen-cross"),
    names: Annotated[
        bool, typer.Option("--list", help="Only name the models and methods that can be crossed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Which papers combine: each model trained with each method, beside the same model trained plainly.

    Gives the points of test accuracy that a method gains, with the 95 % interval over seeds, as a table and a heat map. Both
    arms choose their learning rate on held-out images. What is measured is kept: the same command goes on after Ctrl-C.
    """
    from saigen import cross as crossing
    from saigen.bench import machine
    from saigen.files import write_text
    from saigen.runner import check_data

    if scale not in crossing.SCALES:
        raise ValueError(
            f"scale is {scale!r}{nearest(scale, crossing.SCALES)}: allowed are {', '.join(crossing.SCALES)}"
        )
    if (scale == "real") != (data is not None):
        raise ValueError("--scale real and --data PATH go together: the other scales measure on embedded digits")
    if data is not None:
        check_data(data, scale)
    chosen = [
        crossing.choose(kind, [name.strip() for name in given.split(",") if name.strip()] if given else [])
        for kind, given in (("model", models), ("method", methods))
    ]
    if names:
        table = _table("kind", "name", "paper")
        for kind, entries in zip(("model", "method"), chosen, strict=True):
            for entry in entries:
                table.add_row(kind, entry.name, entry.paper.slug)
        _out().print(table)
        return
    from saigen.report.figures import heat_map, svg
    from saigen.runner import Store, default_jobs

    Store().check_writable()
    tasks = crossing.tasks(*chosen, seeds, scale, data)
    cells = {task: crossing.read(task) for task in tasks}
    waiting = [task for task, cell in cells.items() if cell is None]
    _err().print(f"{len(tasks)} arms, {len(tasks) - len(waiting)} of them measured before")
    with _stdout_kept(as_json):
        for task, cell in _advancing(crossing.run(waiting, jobs or default_jobs("laptop")), len(waiting)):
            cells[task] = cell
    found = crossing.pairs(cells.values())
    methods_of, lines = crossing.rows(found)
    labels = [row[0].model for row in lines]
    gains = [[pair.gain.mean if pair.gain else None for pair in row] for row in lines]
    figure = heat_map(labels, methods_of, gains, [[str(pair) for pair in row] for row in lines])
    given = " ".join(
        f"--{name} {value}" for name, value in (("models", models), ("methods", methods), ("scale", scale)) if value
    )
    how = f"Measured by `saigen cross {given} --seeds {seeds}` on {machine(threads=1)}."
    write_text(out / "cross.md", crossing.markdown(found, seeds, scale, how, "cross.svg"))
    write_text(out / "cross.svg", svg(figure, "Points of test accuracy gained by each method with each model"))
    if as_json:
        print(crossing.document(found, cells.values()))
    else:
        table = _table("model", "plain", *methods_of)
        for row in lines:
            table.add_row(row[0].model, f"{100 * row[0].plain:.1f}", *map(str, row))
        _out().print(table)
        _out().print(
            "points of test accuracy gained over plain training, with 95 % intervals over seeds", soft_wrap=True
        )
    _err().print(f"wrote {out / 'cross.md'} and {out / 'cross.svg'}", soft_wrap=True)


def _advancing(results: Any, total: int) -> Any:
    """The same results, with a bar that advances where somebody watches, and lines where nobody does."""
    from rich.progress import track

    err = _err()
    if err.is_terminal:
        yield from track(results, "crossing", total=total, console=err, transient=True)
        return
    for count, result in enumerate(results, 1):
        if count % 20 == 0 or count == total:
            err.print(f"[{count}/{total}]", markup=False)
        yield result


@app.command(epilog="Example: `saigen new 1512.03385 --slug my_paper --domain vision`")
def new(
    name: Annotated[
        str,
        typer.Argument(metavar="ARXIV_ID|SLUG", help="An arXiv id such as 1512.03385, or the slug of the new room."),
    ],
    domain: Annotated[str, typer.Option(help=f"The domain of the room: {', '.join(DOMAINS)}.")],
    slug: Annotated[
        str | None,
        typer.Option(help="Where an arXiv id is given: the slug, which names the room's folder (`dynamic_vit`)."),
    ] = None,
    into: Annotated[
        Path | None, typer.Option(help="The package folder that gets the room; saigen's own papers folder by default.")
    ] = None,
) -> None:
    """Start a room for a paper: a card, a method, a claim, examples and a test that fail by name until they are filled."""
    from saigen.scaffold import scaffold

    for path in scaffold(name, domain=domain, slug=slug, into=into):
        typer.echo(f"wrote {path}")
    typer.echo(
        "fill what says FILL; then `saigen show`, `saigen run --scale tiny` and the room's test tell what is missing"
    )
