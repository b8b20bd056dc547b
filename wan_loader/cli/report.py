"""`wan-loader report`: a saved session, rendered again; several of one distributed load, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wan_loader.cli.options import Force, JsonOut, Verbose
from wan_loader.cli.profile import PageFile, PngFile, SvgFile, TraceFile, render_session

if TYPE_CHECKING:
    from wan_loader.profiler.analysis.run_report import RunReport

__all__ = ["report"]


def report(
    sessions: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN.json...", help="Saved by `wan-loader profile -o`; all processes of a distributed load."
        ),
    ],
    json: JsonOut = False,
    trace: TraceFile = None,
    html: PageFile = None,
    svg: SvgFile = None,
    png: PngFile = None,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Render a saved session again: as text, page, picture, trace or JSON; or what --profile-out of a pipeline wrote.

    Of a distributed load, give the sessions of all processes: the report shows how they differ.

    Examples:

        wan-loader report run.json --html run.html --trace run.trace.json

        wan-loader report run.rank0.json run.rank1.json
    """
    from wan_loader.cli.output import check_outputs
    from wan_loader.cli.render import output_console
    from wan_loader.profiler.analysis.run_report import read_run_report
    from wan_loader.profiler.analysis.session import read_session
    from wan_loader.profiler.render.png import check_png

    named = {"--trace": trace, "--html": html, "--svg": svg, "--png": png}
    drawn = [name for name, path in named.items() if path]
    if len(sessions) > 1:
        if drawn:
            raise typer.BadParameter(f"{drawn[0]} shows one session: name one")
        _compare(sessions, json=json)
        return
    check_outputs(*named.values(), force=force)
    check_png(png)
    if (run := read_run_report(sessions[0])) is not None:
        if trace or html:
            raise typer.BadParameter(f"{drawn[0]} shows what `wan-loader profile` saved: this is of a run")
        _show_run(*run, json=json, svg=svg, png=png)
        return
    render_session(read_session(sessions[0]), output_console(), json=json, trace=trace, html=html, svg=svg, png=png)


def _show_run(report: RunReport, document: dict[str, Any], *, json: bool, svg: Path | None, png: Path | None) -> None:
    from wan_loader.cli.output import print_json, writing
    from wan_loader.cli.render import output_console, print_warnings
    from wan_loader.profiler.render.picture import draw_run
    from wan_loader.profiler.render.png import to_png
    from wan_loader.profiler.render.run_report import print_run_report
    from wan_loader.profiler.render.svg import to_svg

    with writing((svg, lambda: to_svg(draw_run(report))), (png, lambda: to_png(draw_run(report)))):
        if json:
            print_json(document)
        else:
            print_run_report(output_console(), report)
        print_warnings(report.warnings)


def _compare(paths: list[Path], *, json: bool) -> None:
    from wan_loader.cli.output import print_json
    from wan_loader.cli.render import output_console, print_ranks
    from wan_loader.profiler.analysis.ranks import compare_ranks
    from wan_loader.profiler.analysis.session import read_session

    found = compare_ranks([read_session(path) for path in paths])
    if json:
        print_json(found.to_json())
    else:
        print_ranks(output_console(), found)
