"""`wan-loader report`: a saved session, rendered again; several of one distributed load, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wan_loader.cli.options import Force, JsonOut, Verbose
from wan_loader.cli.profile import PageFile, TraceFile, render_session

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
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Render a saved session again: as text, a page, a trace or JSON.

    Of a distributed load, give the sessions of all processes: the report shows how they differ.

    Examples:

        wan-loader report run.json --html run.html --trace run.trace.json

        wan-loader report run.rank0.json run.rank1.json
    """
    from wan_loader.cli.output import check_outputs
    from wan_loader.cli.render import output_console
    from wan_loader.profiler.analysis.session import read_session

    if len(sessions) > 1:
        if trace or html:
            raise typer.BadParameter("--trace and --html show one session: name one")
        _compare(sessions, json=json)
        return
    check_outputs(trace, html, force=force)
    render_session(read_session(sessions[0]), output_console(), json=json, trace=trace, html=html)


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
