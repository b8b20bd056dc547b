"""`wan-loader bench`: loaders, settings and storage compared."""

from __future__ import annotations

import enum
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wan_loader.cli.options import OUTPUT, Device, Dtype, Force, IoChoice, JsonOut, Verbose, checked, usage_errors
from wan_loader.distributed.processes import world_size
from wan_loader.errors import OptionError
from wan_loader.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from wan_loader.bench.runner import LoaderSetup, Settings
    from wan_loader.bench.storage import Place

__all__ = ["bench"]

_QUESTION_S = 120.0


class CacheChoice(enum.StrEnum):
    """States of the page cache before each sample."""

    COLD = "cold"
    WARM = "warm"
    AS_IS = "as-is"


Paths = Annotated[
    list[Path],
    typer.Argument(
        metavar="PATH...", help="Checkpoints: files or directories; of a whole model, each part.", show_default=False
    ),
]
Loaders = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME,...",
        help="ours, safetensors, safetensors-cuda, safetensors-prefetch, torch, diffusers, diffusers-parallel, "
        "diffusers-flashpack, transformers, fastsafetensors, instanttensor, runai, flashpack; may be repeated.",
        show_default="all",
    ),
]
Storage = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=DIR",
        help="Copy the checkpoint there, measure, remove the copy; or NAME=simulated:RATE for a slow disk that "
        "this machine lacks (hdd, sata, nvme or 180MB/s; our loader only). May be repeated.",
        show_default="where it is",
    ),
]
Caches = Annotated[
    list[CacheChoice] | None,
    typer.Option(help="State of the page cache before each sample; may be repeated.", show_default="warm"),
]
Ios = Annotated[
    list[IoChoice] | None,
    typer.Option(
        metavar="WAY",
        help="How our loader reads: auto, mapped, direct or buffered; may be repeated.",
        show_default="auto",
    ),
]
ThreadCounts = Annotated[
    list[int] | None,
    typer.Option(min=1, max=64, help="Reads side by side of our loader; may be repeated.", show_default="chosen"),
]
FirstFiles = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Only the first files that hold this much, such as 4GB.", callback=checked(parse_size)
    ),
]
RivalSamples = Annotated[
    int | None, typer.Option(min=1, max=1000, help="Samples of each loader but ours.", show_default="as of ours")
]
TimeLimit = Annotated[
    float,
    typer.Option(min=1, max=604_800, metavar="SECONDS", help="A sample that takes longer is ended, and reported."),
]


def bench(
    paths: Paths,
    loader: Loaders = None,
    storage: Storage = None,
    cache: Caches = None,
    repeat: Annotated[int, typer.Option(min=1, max=1000, help="Samples of each loader.")] = 5,
    repeat_rivals: RivalSamples = None,
    dtype: Dtype = None,
    device: Device = "auto",
    io: Ios = None,
    threads: ThreadCounts = None,
    part: FirstFiles = None,
    time_limit: TimeLimit = 300.0,
    export_json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all samples as JSON.", rich_help_panel=OUTPUT)
    ] = None,
    export_markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the tables as Markdown.", rich_help_panel=OUTPUT)
    ] = None,
    export_picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE.svg", help="Write a picture of them; FILE.png too.", rich_help_panel=OUTPUT),
    ] = None,
    json: JsonOut = False,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Compare loaders, settings and storage: fresh processes, taking turns, every tensor compared in the run.

    Loaders that are not installed are listed as such. Progress goes to stderr. Ctrl-C ends it early, and shows and
    exports what was measured until then.

    Examples:

        wan-loader bench model.safetensors

        wan-loader bench model/transformer --loader ours,safetensors --cache warm --cache cold --export-markdown b.md

        wan-loader bench model/transformer --storage nvme=/mnt/a --storage ram=/dev/shm --storage hdd=simulated:180MB/s

        wan-loader bench model.safetensors --loader ours --threads 1 --threads 4 --threads 16 --io buffered
    """
    from wan_loader.cli.output import check_outputs
    from wan_loader.profiler.render.png import check_png

    if world_size() > 1:
        reason = f"{world_size()} processes would disturb each other's measurements"
        raise OptionError.because(reason, "run bench without torchrun")
    check_outputs(export_json, export_markdown, export_picture, force=force)
    if export_picture is not None and export_picture.suffix not in (".svg", ".png"):
        raise typer.BadParameter(f"{export_picture}: pictures are SVG or PNG: name it FILE.svg or FILE.png")
    check_png(export_picture if export_picture is not None and export_picture.suffix == ".png" else None)
    with usage_errors():
        entries, places = _entries(loader, io, threads), _places(storage)
    caches = [c.value for c in dict.fromkeys(cache or [CacheChoice.WARM])]
    device, machine = _machine(device)
    from wan_loader.bench.runner import Settings
    from wan_loader.formats.inventory import checkpoint_paths

    settings = Settings(
        paths=[path for p in paths for path in checkpoint_paths(p)],
        entries=entries,
        places=places,
        caches=caches,
        device=device,
        dtype=dtype,
        repeat=repeat,
        rival_repeat=repeat_rivals,
        time_limit_s=time_limit,
        part=None if part is None else parse_size(part),
    )
    document, interrupted = _measure(settings, machine)
    with _exported(document, export_json, export_markdown, export_picture):
        _show(document, json=json)
    if interrupted:
        raise KeyboardInterrupt
    if not any(r["summary"] for c in document["cases"] for r in c["results"]):
        raise typer.Exit(1)


def _entries(loaders: list[str] | None, ios: list[IoChoice] | None, threads: list[int] | None) -> list[LoaderSetup]:
    """List the loaders, ours once for each combination of its settings."""
    from wan_loader.bench.loaders import find_loaders
    from wan_loader.bench.runner import LoaderSetup

    entries = []
    for loader in find_loaders(loaders or []):
        if loader.name != "ours":
            entries.append(LoaderSetup(loader.name, loader))
            continue
        for io in dict.fromkeys(ios or [IoChoice.AUTO]):
            for count in dict.fromkeys(threads or [None]):  # type: ignore[list-item]
                words = [f"io={io.value}"] if ios else []
                words += [f"threads={count}"] if count else []
                entries.append(LoaderSetup(" ".join([loader.name, *words]), loader, io.value, count))
    return entries


def _places(texts: list[str] | None) -> list[Place]:
    from wan_loader.bench.storage import Place, parse_place

    if not texts:
        return [Place("here")]
    places = [parse_place(text) for text in texts]
    if len({p.name for p in places}) < len(places):
        raise OptionError.because("two --storage places have the same name", "name them differently")
    return places


def _machine(device: str) -> tuple[str, dict[str, Any]]:
    """Ask another process for the device's full name and the machine's card: no device is held by this one."""
    from wan_loader.bench.child import ask
    from wan_loader.errors import DeviceError

    answer = ask({"kind": "device", "device": device}, time_limit_s=_QUESTION_S)
    if answer["status"] != "ok":
        raise DeviceError(str(answer["reason"]).partition("DeviceError: ")[2] or answer["reason"])
    return answer["device"], answer["machine"]


def _measure(settings: Settings, machine: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Measure everything.

    Returns:
        The result, and True if Ctrl-C or SIGTERM ended it early: then it is of what there is.
    """
    from datetime import UTC, datetime

    from wan_loader.bench.document import to_document
    from wan_loader.bench.runner import Case, run_cases
    from wan_loader.cli.interrupt import unhurried
    from wan_loader.cli.render import error_console
    from wan_loader.printable import printable

    console = error_console()
    cases: list[Case] = []
    interrupted = False
    try:
        with _ended_by_sigterm(), unhurried():
            run_cases(settings, lambda line: console.print(printable(line), style="dim"), cases)
    except KeyboardInterrupt:
        if not any(result.samples for case in cases for result in case.results):
            raise
        interrupted = True
    created = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    document = to_document(settings, cases, argv=["wan-loader", *sys.argv[1:]], machine=machine, created=created)
    if interrupted:
        document["warnings"].append("interrupted: this is what was measured until then, run it again for the rest")
    return document, interrupted


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM clean up in the body as Ctrl-C does."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exported(
    document: dict[str, Any], json: Path | None, markdown: Path | None, picture: Path | None
) -> AbstractContextManager[None]:
    from wan_loader.bench.markdown import to_markdown
    from wan_loader.bench.picture import to_png, to_svg
    from wan_loader.cli.output import to_text, writing

    return writing(
        (json, lambda: to_text(document)),
        (markdown, lambda: to_markdown(document)),
        (picture, lambda: to_png(document) if picture is not None and picture.suffix == ".png" else to_svg(document)),
    )


def _show(document: dict[str, Any], *, json: bool) -> None:
    from wan_loader.cli.output import print_json
    from wan_loader.cli.render import print_warnings

    if json:
        print_json(document)
    else:
        _print_tables(document)
    print_warnings(document["warnings"])


def _print_tables(document: dict[str, Any]) -> None:
    from wan_loader.bench.table import case_rows, case_title, columns, footnotes, machine_line
    from wan_loader.cli.render import output_console
    from wan_loader.console import marked
    from wan_loader.printable import printable
    from wan_loader.tables import Columns

    console = output_console()
    console.print(printable(machine_line(document["machine"])), style="dim")
    for case in document["cases"]:
        console.print(marked("\n[bold]{}[/]", case_title(case, document)))
        if case["failure"]:
            console.print(f"nothing was measured: {printable(case['failure'])}")
            continue
        rows = case_rows(case)
        shown = columns(rows)
        table = Columns(*shown.values())
        for row in rows:
            if row[2]:
                table.add_row(*(row[i] for i in shown))
        console.print(table)
        for row in rows:
            if not row[2]:
                console.print(printable(f"{row[0]}: {row[1]}"), style="dim")
        for note in footnotes(case):
            console.print(printable(note), style="dim")
