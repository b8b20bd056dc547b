"""A session as one self-contained page: works offline, without scripts, in light and dark, on paper. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.phases import ALL_PHASES, PHASE_TABLE
from wan_loader.printable import markup_text, shorten
from wan_loader.profiler.analysis.story import label as process_label
from wan_loader.profiler.render.charts import CHART_WIDTH, throughput_chart, timeline
from wan_loader.profiler.render.lanes import lanes_of
from wan_loader.profiler.render.shapes import Drawing
from wan_loader.profiler.render.svg import to_inline_svg
from wan_loader.profiler.render.terminal import ceilings_line, gain_of, headline, lines_of, machine_line
from wan_loader.sizes import format_bytes, format_seconds
from wan_loader.spans import attribute, by_label

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wan_loader.profiler.analysis.session import Process, Session

__all__ = ["to_page"]

#: Characters; all of it is shown where a pointer rests on it.
_MOST_OF_A_COMMAND = 160

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5c6675; --line: #dfe4ea; --back: #f7f8fa; --card: #ffffff;
  --life: #eef1f5; --good: #1a7f4b; --bad: #b3261e; --unsure: #8a6100; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa5b4; --line: #2e3745; --back: #12161d;
  --card: #1a202a; --life: #232b37; --good: #5fd39a; --bad: #ff8a80; --unsure: #e8b84a; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 28px 20px 60px; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; }
h1 { font-size: 21px; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 15px; margin: 30px 0 10px; }
p { margin: 0 0 4px; } .soft { color: var(--soft); font-size: 13px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px;
  margin-top: 12px; }
.verdict { border-left: 5px solid var(--unsure); font-size: 16px; }
.verdict b { color: var(--unsure); }
.verdict.slow { border-color: var(--bad); } .verdict.slow b { color: var(--bad); }
.verdict.limit { border-color: var(--good); } .verdict.limit b { color: var(--good); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: right; font-size: 12px; color: var(--soft); font-weight: 600; padding: 4px 10px; }
td { text-align: right; padding: 5px 10px; border-top: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.wide { white-space: normal; min-width: 250px; } td.wide small { overflow-wrap: anywhere; }
tr.pace td { font-weight: 650; } tr.pace small { font-weight: 400; }
.bar { background: var(--line); border-radius: 3px; height: 8px; width: 120px; display: inline-block;
  overflow: hidden; }
.bar i { display: block; height: 8px; }

.dot.line { height: 3px; width: 16px; background: var(--ink); vertical-align: middle; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 7px; }
.legend span { margin-right: 16px; font-size: 13px; color: var(--soft); white-space: nowrap; }
svg { width: 100%; height: auto; display: block; min-width: 640px; }
.p-ink { fill: var(--ink); } .p-soft { fill: var(--soft); } .p-life { fill: var(--life); }
.l-line { stroke: var(--line); } path { stroke-linejoin: round; } .l-storage { stroke: #d9822b; }
ol { margin: 0; padding-left: 20px; } li { margin-bottom: 10px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; margin: 6px 0 0; }
li small { display: block; color: var(--soft); }
"""


def to_page(session: Session) -> str:
    """Return the document of `--html`."""
    process = session.processes[session.subject]
    colours = "".join(
        f".p-{kind.name} {{ fill: {colour}; background: {colour}; }} .l-{kind.name} {{ stroke: {colour}; }}"
        for kind in PHASE_TABLE
        if (colour := kind.colour)
    )
    body = [
        f"<h1>{markup_text(session.report.target)}</h1><p>{markup_text(headline(session))}</p>",
        f'<p class="soft">{markup_text(machine_line(session))}</p>',
        _verdict(session),
        _advice(session),
        "<h2>Timeline</h2>",
        _timeline(session),
        *_throughput(process, process_label(session.processes, session.subject) if session.processes[1:] else ""),
        "<h2>Phases</h2>",
        _phases(session),
        *_imports(session),
        *_processes(session),
        _footnotes(session),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{markup_text(session.report.target[:120])}: where the time went</title>"
        f"<style>{_STYLE}{colours}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def _verdict(session: Session) -> str:
    verdict = session.verdict
    return f'<section class="verdict {verdict.kind}"><b>{verdict.phase}</b>: {markup_text(verdict.why)}</section>'


def _advice(session: Session) -> str:
    if not session.advice:
        return ""
    items = "".join(
        f"<li>{markup_text(a.text)} <b>({gain_of(a)})</b><small>{markup_text(a.evidence)}</small>"
        f"{_typed(lines_of(a))}</li>"
        for a in session.advice
    )
    saved = format_seconds(session.together_s)
    hint = f'<p class="soft">Together they save about {saved}: what several of them save counts once.</p>'
    return f"<h2>What to change</h2><section><ol>{items}</ol>{hint if session.advice[1:] else ''}</section>"


def _typed(lines: Sequence[str]) -> str:
    return "<pre>" + "\n".join(markup_text(line) for line in lines) + "</pre>" if lines else ""


def _legend(names: Sequence[tuple[str, str]]) -> str:
    return '<p class="legend">' + "".join(f"<span>{dot}{markup_text(n)}</span>" for n, dot in names) + "</p>"


def _dot(name: str) -> str:
    return f'<i class="dot p-{name}"></i>'


def _timeline(session: Session) -> str:
    lanes = lanes_of(session)
    present = {s.name for lane in lanes for s in lane.process.spans}
    names = [(name, _dot(name)) for name in ALL_PHASES if name in present]
    legend = _legend([*names, *([("set the pace", '<i class="dot line"></i>')] if lanes[1:] else [])])
    shapes, height = timeline(lanes, session.start_ns, session.end_ns)
    drawing = to_inline_svg(Drawing(CHART_WIDTH, round(height), shapes), "timeline")
    return f'<section>{legend}<div class="scroll">{drawing}</div></section>'


def _throughput(process: Process, whose: str) -> list[str]:
    shapes, height = throughput_chart(process)
    if not shapes:
        return []
    drawing = to_inline_svg(Drawing(CHART_WIDTH, round(height), shapes), "throughput")
    names = [("read", _dot("read"))]
    if any(s.name == "h2d" for s in process.spans):
        names.append(("copied to the device", _dot("h2d")))
    if process.samples:
        names.append(("fetched from storage (kernel)", '<i class="dot" style="background:#d9822b"></i>'))
    title = f"Throughput of {markup_text(whose)}" if whose else "Throughput"
    return [f'<h2>{title}</h2><section>{_legend(names)}<div class="scroll">{drawing}</div></section>']


def _phases(session: Session) -> str:
    paced = attribute(session.spans, session.start_ns, session.end_ns)
    whole_s = (session.end_ns - session.start_ns) / 1e9
    rows = [(p.name, p.busy_s, p.nbytes, p.gbps) for p in session.report.phases]
    if "other" not in {row[0] for row in rows}:
        rows.append(("other", paced.get("other", 0.0), 0, 0.0))
    cells = []
    for name, busy_s, nbytes, gbps in rows:
        share = paced.get(name, 0.0) / whole_s if whole_s else 0.0
        mark = ' class="pace"' if name == session.verdict.phase else ""
        cells.append(
            f"<tr{mark}><td>{_dot(name)}{name}</td><td>{format_seconds(busy_s)}</td>"
            f"<td>{format_bytes(nbytes) if nbytes else ''}</td><td>{f'{gbps:.2f}' if nbytes else ''}</td>"
            f"<td>{format_seconds(paced.get(name, 0.0))}</td><td>{share:.0%}</td>"
            f'<td><span class="bar"><i class="p-{name}" style="width:{min(1.0, share):.1%}"></i></span></td></tr>'
        )
    head = "<th>phase</th><th>busy</th><th>bytes</th><th>GB/s</th><th>paced</th><th>share</th><th></th>"
    hint = "Busy times overlap, so they do not add up. Paced does: each moment counts for the phase that set the pace."
    return (
        f'<section class="scroll"><table class="phases"><tr>{head}</tr>{"".join(cells)}</table>'
        f'<p class="soft">{hint}</p></section>'
    )


def _imports(session: Session) -> list[str]:
    rows = [row for row in by_label(session.spans, "import")[:10] if row[1] > 0.005]
    if len(rows) < 2:
        return []
    cells = "".join(f"<tr><td>{markup_text(k)}</td><td>{format_seconds(s)}</td></tr>" for k, s, _ in rows)
    return [f"<h2>Imports, by package</h2><section><table>{cells}</table></section>"]


def _processes(session: Session) -> list[str]:
    if len(session.processes) < 2:
        return []
    names = [p.name for p in session.report.phases if p.busy_s > 0.01]
    rows = []
    for number, process in enumerate(session.processes):
        paced = attribute(process.spans, process.start_ns, process.end_ns)
        cells = "".join(f"<td>{paced.get(name, 0.0):.2f}</td>" for name in names)
        mark = ' class="pace"' if number == session.subject else ""
        title = f"{markup_text(process_label(session.processes, number))}"
        command = markup_text(shorten(process.title, _MOST_OF_A_COMMAND))
        title += f'<br><small class="soft" title="{markup_text(process.title)}">{command}</small>'
        rows.append(
            f'<tr{mark}><td class="wide">{title}</td>'
            f"<td>{process.start_ns / 1e9:.2f}</td><td>{process.end_ns / 1e9:.2f}</td>"
            f"<td>{session.paced_s(number):.2f}</td>{cells}<td>{markup_text(process.ended)}</td></tr>"
        )
    head = "<th>process</th><th>from</th><th>to</th><th>paced</th>" + "".join(f"<th>{n}</th>" for n in names)
    table = f"<table><tr>{head}<th>ended</th></tr>{''.join(rows)}</table>"
    hint = (
        "Seconds, all on one clock. Paced adds up to the whole: each moment counts for the process that set the pace."
    )
    hint += f" {', '.join(names)}: what each process did in its own time, whoever set the pace." if names else ""
    return [f'<h2>Processes</h2><section class="scroll">{table}<p class="soft">{hint}</p></section>']


def _footnotes(session: Session) -> str:
    lines = [f"transport: {session.report.io.mode} ({session.report.io.reason})"] if session.report.io.reason else []
    lines += [f"this machine: {ceilings_line(session)}"] if session.ceilings else []
    lines += [f"note: {note}" for note in session.notes] + [f"warning: {w}" for w in session.report.warnings]
    return "<h2>Notes</h2>" + "".join(f'<p class="soft">{markup_text(line)}</p>' for line in lines) if lines else ""
