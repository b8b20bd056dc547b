"""`wan-loader report`: a saved session, rendered again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wan_loader.cli.options import Force, JsonOut, Verbose
from wan_loader.cli.profile import PageFile, TraceFile, render_session

__all__ = ["report"]


def report(
    session: Annotated[Path, typer.Argument(metavar="RUN.json", help="Saved by `wan-loader profile -o`.")],
    json: JsonOut = False,
    trace: TraceFile = None,
    html: PageFile = None,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Render a saved session again: as text, a page, a trace or JSON.

    Example:

        wan-loader report run.json --html run.html --trace run.trace.json
    """
    from wan_loader.cli.output import check_output
    from wan_loader.cli.render import output_console
    from wan_loader.profiler.session import read_session

    for target in (trace, html):
        check_output(target, force=force)
    render_session(read_session(session), output_console(), json=json, trace=trace, html=html)
