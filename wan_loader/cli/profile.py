"""`wan-loader profile`: where the time goes, for a checkpoint loaded here or for any program."""

from __future__ import annotations

import contextlib
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wan_loader.cli.options import OUTPUT, Device, Dtype, Force, Io, IoChoice, JsonOut, OutFile, Part, Threads, Verbose
from wan_loader.cli.torchrun import own_file, together
from wan_loader.distributed.processes import is_first

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wan_loader.console import PlainConsole
    from wan_loader.events import Span
    from wan_loader.profiler.analysis.session import Session

__all__ = ["PageFile", "PngFile", "SvgFile", "TraceFile", "profile", "render_session"]

TraceFile = Annotated[
    Path | None, typer.Option("--trace", help="Write a trace that opens in Perfetto.", rich_help_panel=OUTPUT)
]
SvgFile = Annotated[
    Path | None, typer.Option("--svg", help="Write a picture of the timeline as SVG.", rich_help_panel=OUTPUT)
]
PngFile = Annotated[Path | None, typer.Option("--png", help="Write the same picture as PNG.", rich_help_panel=OUTPUT)]
PageFile = Annotated[
    Path | None, typer.Option("--html", help="Write a page with timeline, table and advice.", rich_help_panel=OUTPUT)
]


def profile(
    context: typer.Context,
    path: Annotated[
        Path | None, typer.Argument(metavar="PATH", help="A checkpoint, or -- PROGRAM ARGS.", show_default=False)
    ] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    io: Io = IoChoice.AUTO,
    threads: Threads = None,
    part: Part = None,
    json: JsonOut = False,
    output: OutFile = None,
    trace: TraceFile = None,
    html: PageFile = None,
    svg: SvgFile = None,
    png: PngFile = None,
    until: Annotated[str | None, typer.Option(help="PROGRAM: the recording ends when it prints this.")] = None,
    seconds: Annotated[
        float | None, typer.Option("--for", min=0.1, help="PROGRAM: the recording ends after this many seconds.")
    ] = None,
    stop: Annotated[bool, typer.Option("--stop", help="PROGRAM: end it when the recording ends.")] = False,
    ceilings: Annotated[
        bool, typer.Option("--ceilings/--no-ceilings", help="Measure what this machine can do, once.")
    ] = True,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Show where the time of a load, or of a program's start, goes, and what to change.

    A program keeps its output, its signals and its exit code; the report goes to stderr, or with --json the program's
    output does.

    Examples:

        wan-loader profile model/transformer --dtype bf16 --html run.html

        wan-loader profile -o run.json --until "Generating" -- python generate.py --ckpt_dir model

        wan-loader profile -- torchrun --nproc_per_node 2 generate.py

        torchrun --nproc_per_node 2 -m wan_loader profile CKPT -o run.json && wan-loader report run.rank*.json
    """
    from wan_loader.cli.output import check_outputs
    from wan_loader.profiler.render.png import check_png

    words = _program(context)
    _check_options(context, path, of_program=words is not None)
    if words is None:
        output, trace, html, svg, png = (own_file(target) for target in (output, trace, html, svg, png))
    check_outputs(output, trace, html, svg, png, force=force)
    check_png(png)
    if words is not None:
        session, returncode = _profile_program(words, until, seconds, stop=stop, json=json, measure=ceilings)
    else:
        if path is None:
            raise typer.BadParameter("name a checkpoint, or a program after --")
        session, returncode = _profile_load(path, device, dtype, io, threads, part, measure=ceilings), 0
    from wan_loader.cli.render import error_console, output_console

    console = error_console() if words is not None else output_console()
    quiet = words is None and not is_first()
    render_session(session, console, json=json, output=output, trace=trace, html=html, svg=svg, png=png, quiet=quiet)
    if returncode:
        raise typer.Exit(returncode if returncode > 0 else 128 - returncode)


def _program(context: typer.Context) -> list[str] | None:
    """Return the words after a lone --, as they were typed; None if there is none."""
    words = sys.argv[1:]
    if "--" not in words:
        if context.args:
            raise typer.BadParameter(f"unexpected {context.args[0]!r}: write a program after --")
        return None
    program = words[words.index("--") + 1 :]
    if not program:
        raise typer.BadParameter("name a program after --")
    return program


#: Options of one kind of target alone.
_OF_LOADS = ("device", "dtype", "io", "threads", "part")
_OF_PROGRAMS = ("until", "seconds", "stop")


def _check_options(context: typer.Context, path: Path | None, *, of_program: bool) -> None:
    """Refuse what would have no effect.

    Raises:
        BadParameter: An option that was given does not apply to this kind of target.
    """
    wrong, what = (_OF_LOADS, "a checkpoint") if of_program else (_OF_PROGRAMS, "a program after --")
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "")
        if parameter.name in wrong and given is not None and given.name == "COMMANDLINE":
            raise typer.BadParameter(f"it is for {what}", param_hint=parameter.opts[0])
    if not of_program:
        return
    words = sys.argv[: sys.argv.index("--")]
    values = ("-o", *(o for p in context.command.params if not getattr(p, "is_flag", True) for o in p.opts))
    if path is not None and any(w == str(path) and before not in values for before, w in pairwise(words)):
        raise typer.BadParameter(f"name a checkpoint or a program, not both: {path} stands before --")
    if context.params.get("stop") and not (context.params.get("until") or context.params.get("seconds")):
        raise typer.BadParameter("it needs --until or --for", param_hint="--stop")


def render_session(
    session: Session,
    console: PlainConsole,
    *,
    json: bool = False,
    output: Path | None = None,
    trace: Path | None = None,
    html: Path | None = None,
    svg: Path | None = None,
    png: Path | None = None,
    quiet: bool = False,
) -> None:
    """Write the files that were asked for, and the report to the terminal, or JSON to stdout."""
    from wan_loader.cli.output import print_json, to_text, writing
    from wan_loader.cli.render import print_warnings
    from wan_loader.profiler.render.page import to_page
    from wan_loader.profiler.render.picture import draw
    from wan_loader.profiler.render.png import to_png
    from wan_loader.profiler.render.svg import to_svg
    from wan_loader.profiler.render.terminal import print_session
    from wan_loader.profiler.render.trace import to_trace

    files = (
        (output, lambda: to_text(session.to_json())),
        (trace, lambda: to_text(to_trace(session))),
        (html, lambda: to_page(session)),
        (svg, lambda: to_svg(draw(session))),
        (png, lambda: to_png(draw(session))),
    )
    with writing(*files):
        if quiet:
            return
        if json:
            print_json(session.to_json())
        else:
            print_session(console, session)
        print_warnings(session.report.warnings)


def _profile_load(
    path: Path, device: str, dtype: str | None, io: IoChoice, threads: int | None, part: str | None, *, measure: bool
) -> Session:
    import wan_loader
    from wan_loader.cli.progress import reading_progress
    from wan_loader.formats.inventory import checkpoints_in
    from wan_loader.loading.joined_report import joined
    from wan_loader.profiler.analysis.assemble import load_session
    from wan_loader.profiler.probe.surroundings import before_recording, surroundings

    opening = wan_loader.Recorder()
    with wan_loader.span(opening, "header"):
        checkpoints = checkpoints_in(path, part)
    files = [f.path for c in checkpoints for f in c.files]
    fp32 = sum(t.nbytes for c in checkpoints for t in c.tensors if t.dtype == "float32")
    before = before_recording()
    reports, spans = list[wan_loader.LoadReport](), list[wan_loader.Span]()
    # of a whole model one after the other; the weights of each go before the next, and before the machine is measured
    for checkpoint in checkpoints:
        with together(device) as (on, group), reading_progress(checkpoint.nbytes) as observer:
            loaded = wan_loader.load(
                checkpoint,
                device=on,
                dtype=dtype,
                io=io.value,
                threads=threads,
                group=group,
                observer=observer or wan_loader.Recorder(),
            ).after(opening.spans if not reports else [])
        reports.append(loaded.report)
        spans += _behind(spans, loaded.spans)
        del loaded
    measure = measure and is_first()
    report = joined(reports, str(path))
    with _told(measure):
        environment = surroundings(files, report.device, before, measure=measure)
    return load_session(report, spans, environment, fp32_bytes=fp32)


def _behind(spans: list[Span], more: Sequence[Span]) -> list[Span]:
    """Move the spans of a load to where those of the one before have ended: what lies between is no part of either."""
    from dataclasses import replace

    begin_ns = min((s.start_ns for s in more), default=0)
    shift_ns = max((s.end_ns for s in spans), default=begin_ns) - begin_ns
    return [replace(s, start_ns=s.start_ns + shift_ns, end_ns=s.end_ns + shift_ns) for s in more]


def _profile_program(
    words: list[str], until: str | None, seconds: float | None, *, stop: bool, json: bool, measure: bool
) -> tuple[Session, int]:
    from wan_loader.profiler.analysis.assemble import program_session
    from wan_loader.profiler.analysis.merge import merge
    from wan_loader.profiler.analysis.weight_files import device_of, files_of, programs_of
    from wan_loader.profiler.probe.surroundings import before_recording, surroundings
    from wan_loader.profiler.program import run_program

    before = before_recording()
    stdout = sys.stderr.fileno() if json else None
    recording = run_program(words, until=until, seconds=seconds, stop=stop, stdout=stdout)
    processes = merge(recording)
    device = "cuda:0" if device_of(processes) == "cuda" else "cpu"
    found = files_of(processes)
    files = sorted(found, key=lambda path: -found[path].nbytes)
    with _told(measure):
        environment = surroundings(files, device, before, measure=measure, programs=programs_of(found))
    return program_session(recording, processes, environment), recording.returncode


@contextlib.contextmanager
def _told(measure: bool) -> Any:
    """Say on a terminal that the machine is measured in the body, if it is."""
    from wan_loader.cli.render import error_console

    console = error_console()
    if measure and console.is_terminal:
        with console.status("measuring what this machine can do ..."):
            yield
    else:
        yield
