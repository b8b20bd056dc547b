"""A session as text for a terminal: machine card, phases with their timelines, verdict, advice."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from wan_loader.console import marked
from wan_loader.printable import shorten
from wan_loader.profiler.analysis.raised_ceilings import IN_THIS_RUN
from wan_loader.profiler.analysis.story import label as process_label
from wan_loader.profiler.render.bars import timeline_bar
from wan_loader.sizes import format_bytes, format_count, format_seconds
from wan_loader.spans import attribute, by_label
from wan_loader.tables import Column, Columns

if TYPE_CHECKING:
    from rich.console import Console

    from wan_loader.profiler.analysis.session import Advice, Session

__all__ = ["gain_of", "headline", "lines_of", "machine_line", "print_session", "shown_processes"]

#: A timeline that is narrower says little.
_LEAST_BAR = 16
_STYLE = {"slow": "bold red", "limit": "bold green", "unknown": "bold yellow"}


def headline(session: Session) -> str:
    """Say in one line what was measured."""
    report = session.report
    text = f"{format_seconds(report.seconds)}"
    if report.nbytes_file:
        text += f", {format_bytes(report.nbytes_file)} of weights = {report.gbps:.2f} GB/s, to {report.device}"
    return text + (f" as {report.dtype}" if report.dtype else "")


def machine_line(session: Session) -> str:
    """Describe the machine in one line; what is not known is left out."""
    card, storage = session.report.machine, session.storage
    parts = [str(card["cpu"])] if "cpu" in card else []
    if "cores" in card:
        parts.append(format_count(card["cores"], "core"))
    if isinstance(card.get("memory_limit_bytes"), int):
        parts.append(f"{format_bytes(card['memory_limit_bytes'])} of memory")
    parts += [str(card[k]) for k in ("gpu",) if k in card]
    parts += [f"{k} {card[k]}" for k in ("kernel", "python", "torch") if k in card]
    if "filesystem" in storage:
        kind = " (network)" if storage.get("network") else ""
        parts.append(f"files on {storage['filesystem']}{kind}")
    return ", ".join(parts)


def print_session(console: Console, session: Session) -> None:
    """Print the whole report."""
    target = shorten(session.report.target, 2 * console.width)
    console.print(marked("[bold]{}[/]\n{}", target, headline(session)))
    console.print(marked("{}", machine_line(session)), style="dim")
    if session.report.io.reason:
        console.print(marked("transport: {} ({})", session.report.io.mode, session.report.io.reason))
    console.print()
    console.print(_phase_table(session))
    console.print("busy times overlap; paced adds up to the whole: each moment counts once", style="dim")
    if imports := by_label(session.spans, "import")[:10]:
        shown = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds, _ in imports if seconds > 0.005)
        if shown:
            console.print(marked("imports: {}", shown))
    if len(session.processes) > 1:
        console.print()
        console.print(_process_table(session))
        if (left := len(session.processes) - len(shown_processes(session))) > 0:
            console.print(
                f"{format_count(left, 'process', 'processes')} that did next to nothing: not shown", style="dim"
            )
    if session.ceilings:
        console.print(marked("this machine: {}", ceilings_line(session)), style="dim")
    verdict = session.verdict
    console.print(marked(f"\n[{_STYLE[verdict.kind]}]verdict: {{}}[/]  {{}}", verdict.phase, verdict.why))
    for number, advice in enumerate(session.advice, 1):
        console.print(marked("[bold]{}. {}[/] ({})\n   {}", number, advice.text, gain_of(advice), advice.evidence))
        for line in lines_of(advice):
            # code is whole however wide it is; a command is folded as a shell reads it
            console.print(marked("   [cyan]{}[/]", line), no_wrap=not line.startswith("$ "))
    if len(session.advice) > 1:
        whole, saved = format_seconds(session.report.seconds), format_seconds(session.together_s)
        console.print(
            f"together they save about {saved} of {whole}: what several of them save counts once", style="dim"
        )
    for note in session.notes:
        console.print(marked("note: {}", note), style="dim")


def gain_of(advice: Advice) -> str:
    """Say what advice saves, and how much of that beside the advice before it."""
    text = f"saves about {format_seconds(advice.gain_s)}"
    if advice.beside_s is not None and advice.beside_s < 0.95 * advice.gain_s:
        text += f", {format_seconds(advice.beside_s)} beside those above"
    return text


def lines_of(advice: Advice) -> list[str]:
    """Return what to type and to write, line by line."""
    lines = [f"$ {line}" for line in advice.once]
    lines += [f"$ {advice.command}"] if advice.command else []
    for edit in advice.edits:
        lines += [f"{edit.path}:{edit.line}"]
        lines += [f"- {line}" for line in edit.text.splitlines()] + [f"+ {x}" for x in edit.replacement.splitlines()]
    if advice.code:
        lines += ["or in the program:"] if lines else ["in the program:"]
        lines += [f"  {line}" for line in advice.code.splitlines()]
    return lines


def ceilings_line(session: Session) -> str:
    """List all that was measured in one line, with what its samples differ by, and what this run has shown."""
    parts = []
    for name, value in session.ceilings.items():
        words, details = name.replace("_", " "), session.ceiling_details.get(name, {})
        text = f"{words[:-5]} {value:.3g} GB/s" if name.endswith("_gbps") else f"{words[:-2]} {value:.3g} s"
        least, most = details.get("least", value), details.get("most", value)
        if details.get("origin") == IN_THIS_RUN:
            text += f" ({IN_THIS_RUN})"
        elif most > 1.1 * least:
            text += f" ({least:.3g} .. {most:.3g})"
        parts.append(text)
    return ", ".join(parts)


def _phase_table(session: Session) -> Columns:
    """Make the table of phases, each with its timeline."""
    spans, start_ns, end_ns = session.spans, session.start_ns, session.end_ns
    whole_s = (end_ns - start_ns) / 1e9
    paced = attribute(spans, start_ns, end_ns)
    table = Columns(
        "phase",
        *(Column(title, right=True) for title in ("busy", "bytes", "GB/s", "paced", "share")),
        Column("timeline", least=_LEAST_BAR, most=60),
    )
    rows = [(p.name, p.busy_s, p.nbytes, p.gbps) for p in session.report.phases]
    if "other" not in {row[0] for row in rows}:
        rows.append(("other", paced.get("other", 0.0), 0, 0.0))
    for name, busy_s, nbytes, gbps in rows:
        seconds = paced.get(name, 0.0)
        bar = partial(timeline_bar, [s for s in spans if s.name == name], start_ns, end_ns)
        table.add_row(
            name,
            format_seconds(busy_s),
            format_bytes(nbytes) if nbytes else "",
            f"{gbps:.2f}" if nbytes else "",
            format_seconds(seconds) if seconds else "",
            f"{seconds / whole_s:.0%}" if whole_s else "",
            bar,
            style="bold" if name == session.verdict.phase else None,
        )
    return table


def _process_table(session: Session) -> Columns:
    """Put processes below each other on one clock, each with when it was at work; of many, some are left out."""
    table = Columns(
        Column("process", least=24, most=60),
        Column("from", right=True, drop=1),
        Column("to", right=True, drop=1),
        Column("paced", right=True),
        Column("mostly"),
        Column("read", right=True, drop=2),
        Column("ended", drop=3),
        Column("timeline", least=_LEAST_BAR, most=60),
    )
    for number in shown_processes(session):
        working = [s for s in session.processes[number].spans if s.name not in ("wait", "shard")]
        bar = partial(timeline_bar, working, session.start_ns, session.end_ns)
        table.add_row(*_process_cells(session, number), bar, style="bold" if number == session.subject else None)
    return table


def _process_cells(session: Session, number: int) -> list[str]:
    process = session.processes[number]
    paced = attribute(process.spans, process.start_ns, process.end_ns)
    nbytes = sum(s.nbytes for s in process.spans if s.name == "read")
    return [
        process_label(session.processes, number),
        f"{process.start_ns / 1e9:.2f}",
        f"{process.end_ns / 1e9:.2f}",
        f"{session.paced_s(number):.2f}",
        max(paced, key=lambda name: paced[name], default=""),
        format_bytes(nbytes) if nbytes else "",
        process.ended.removeprefix("killed by ").removeprefix("still "),
    ]


def shown_processes(session: Session, most: int = 16) -> list[int]:
    """Return the places of the processes worth showing, in the order of their starts."""
    least = 0.02 * session.report.seconds
    found = [
        i
        for i, p in enumerate(session.processes)
        if i == session.subject or session.paced_s(i) >= least or (p.seconds >= least and p.role != "helper")
    ]
    if len(found) > most:
        found = sorted(found, key=lambda i: (i != session.subject, -session.paced_s(i)))[:most]
    return sorted(found)
