"""`wan-loader cache`: the converted cache, looked at and looked after."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wan_loader.cli.building import report_build
from wan_loader.cli.options import CacheDir, JsonOut, Part, PathArgument, Verbose, check_dtype, checked
from wan_loader.entry_points import first_answer
from wan_loader.errors import OptionError
from wan_loader.sizes import parse_age, parse_size

if TYPE_CHECKING:
    from wan_loader.cache.entry import ListedEntry
    from wan_loader.cache.outline import Outline
    from wan_loader.cache.store import Store

__all__ = ["app"]

app = typer.Typer(
    name="cache",
    help="Converted copies of checkpoints: load once slowly, then never again.",
    no_args_is_help=True,
)

MaxSize = Annotated[
    str | None,
    typer.Option(
        help="What the cache may take, such as 60GB.",
        show_default="half of the free disk",
        callback=checked(parse_size),
    ),
]


@app.command()
def build(
    path: PathArgument,
    dtype: Annotated[
        str, typer.Option(help="Convert floating tensors to bf16, fp16 or fp32.", callback=check_dtype)
    ] = "bfloat16",
    part: Part = None,
    cache_dir: CacheDir = None,
    max_size: MaxSize = None,
    contents: Annotated[
        bool, typer.Option("--contents", help="Keep a checksum of the source's content too, for `verify --sources`.")
    ] = False,
    json: JsonOut = False,
    verbose: Verbose = False,
) -> None:
    """Write the entry of a checkpoint now, from its files. Of a whole model's directory: of all that it holds.

    The entry holds ordinary safetensors files; that of a whole model is a checkpoint for diffusers.

    Examples:

        wan-loader cache build model.safetensors --dtype bf16

        wan-loader cache build model --cache-dir /mnt/nvme/cache
    """
    from wan_loader.cache.cached_load import read_segments
    from wan_loader.cache.store import Store
    from wan_loader.cache.use import build_entry

    size = _size(max_size)
    outline = _outline(path, part, dtype)
    begun = build_entry(Store(cache_dir), outline, read_segments, max_size=size, digest_contents=contents)
    report_build(begun, json=json)


def _outline(path: Path, part: str | None, dtype: str) -> Outline:
    """Describe what the entry will hold: all of a model whose family has joined, or one checkpoint."""
    from wan_loader.cache.outline import outline_checkpoint
    from wan_loader.dtypes import parse_dtype
    from wan_loader.formats import open_checkpoint
    from wan_loader.formats.hub_cache import locate
    from wan_loader.plan.dtype_policy import DtypePolicy

    # a family may know the directory as a whole model; a part of a file is one checkpoint
    if part is None and os.path.isdir(directory := locate(os.fspath(path))):
        whole: Outline | None = first_answer("wan_loader.outlines", directory, parse_dtype(dtype))
        if whole is not None:
            return whole
    checkpoint = open_checkpoint(path, part=part)
    policy = DtypePolicy(dtype)
    policy.check(checkpoint, checkpoint.tensors)
    return outline_checkpoint(checkpoint, policy)


@app.command(name="list")
def list_entries(cache_dir: CacheDir = None, json: JsonOut = False, verbose: Verbose = False) -> None:
    """Show entries with their sizes and ages, last used first.

    Example:

        wan-loader cache list
    """
    from wan_loader.cli.output import print_json

    store = _store(cache_dir)
    listed = store.listed() if store is not None else []
    if json:
        print_json({"schema_version": 1, "command": "cache list", "entries": [_as_json(x) for x in listed]})
    else:
        _print_entries(store, listed)


def _store(cache_dir: Path | None) -> Store | None:
    """Open the cache, if there is one: looking at it does not make it."""
    from wan_loader.cache.store import Store, default_directory

    directory = cache_dir or default_directory()
    return Store(directory, create=False) if os.path.lexists(directory) else None


def _as_json(listed: ListedEntry) -> dict[str, Any]:
    manifest = listed.manifest
    return {
        "key": listed.key,
        "path": str(listed.path),
        "nbytes": listed.nbytes,
        "used": listed.used,
        "state": listed.state,
        "source": manifest.label if manifest else None,
        "dtype": manifest.dtype if manifest else None,
        "created": manifest.created if manifest else None,
    }


def _print_entries(store: Store | None, listed: list[ListedEntry]) -> None:
    from wan_loader.cli.render import output_console
    from wan_loader.printable import printable
    from wan_loader.sizes import format_age, format_bytes
    from wan_loader.tables import Column, Columns

    console = output_console()
    if store is None or not listed:
        console.print("the cache is empty")
        return
    numbers = (Column("size", right=True), Column("dtype", drop=2), Column("used", drop=1))
    table = Columns("entry", *numbers, "state", Column("source", least=30))
    for x in listed:
        dtype, source = (x.manifest.dtype or "", x.manifest.label) if x.manifest else ("", "")
        used = f"{format_age(time.time() - x.used)} ago"
        table.add_row(x.key[:12], format_bytes(x.nbytes), dtype, used, x.state, source)
    console.print(table)
    console.print(f"{format_bytes(sum(x.nbytes for x in listed))} in {printable(str(store.root))}")


@app.command()
def verify(
    entry: Annotated[
        str | None, typer.Argument(metavar="[ENTRY]", help="Beginning of an entry's name.", show_default="all entries")
    ] = None,
    sources: Annotated[
        bool, typer.Option("--sources", help="Also read sources again whose content's checksum was kept.")
    ] = False,
    cache_dir: CacheDir = None,
    json: JsonOut = False,
    verbose: Verbose = False,
) -> None:
    """Read entries again and compare every checksum; damaged ones are set aside. Exit code 1 if there are any.

    Example:

        wan-loader cache verify
    """
    from wan_loader.cli.output import print_json
    from wan_loader.cli.render import output_console
    from wan_loader.console import marked

    store = _store(cache_dir)
    wanted = _wanted(store, entry)
    damaged: dict[str, list[str]] = {}
    for listed in wanted:
        if store is not None and (wrong := _check(store, listed.key, sources=sources)):
            damaged[listed.key] = wrong
            # not removed: readers keep what they have open
            store.set_aside(listed.key)
    if json:
        print_json({"schema_version": 1, "command": "cache verify", "verified": len(wanted), "damaged": damaged})
    else:
        for key, wrong in damaged.items():
            output_console().print(marked("[red]damaged[/] {}: {}", key[:12], "; ".join(wrong)))
        sound, of = len(wanted) - len(damaged), _count(wanted)
        aside = f", {len(damaged)} damaged: set aside, built again by the next load" if damaged else ""
        output_console().print(f"{sound} of {of} {'is' if len(wanted) == 1 else 'are'} sound{aside}")
    if damaged:
        raise typer.Exit(1)


def _wanted(store: Store | None, entry: str | None) -> list[ListedEntry]:
    complete = [x for x in store.listed() if x.state != "damaged" and not x.stays] if store is not None else []
    if entry is None:
        return complete
    found = [x for x in complete if x.key.startswith(entry)]
    if not found:
        raise OptionError.because(f"no entry begins with {entry!r}", "see `wan-loader cache list`")
    return found


def _check(store: Store, key: str, *, sources: bool) -> list[str]:
    """Return what is wrong with an entry, which stays meanwhile; nothing if it was removed."""
    from wan_loader.cache.checksums import check_entry, check_sources
    from wan_loader.cli.progress import counting_progress
    from wan_loader.errors import CacheError

    try:
        entry = store.find(key, use=False)
    except CacheError as error:
        return [str(error)]
    if entry is None:
        return []
    with entry, counting_progress(f"verifying {key[:12]}", entry.manifest.nbytes) as advance:
        wrong = check_entry(entry.path, entry.manifest, advance)
        return wrong + (check_sources(entry.manifest) if sources else [])


@app.command()
def prune(
    max_size: Annotated[
        str | None, typer.Option(help="Keep at most this much, such as 60GB.", callback=checked(parse_size))
    ] = None,
    max_age: Annotated[
        str | None,
        typer.Option(help="Keep only what was used within this time, such as 30d.", callback=checked(parse_age)),
    ] = None,
    cache_dir: CacheDir = None,
    json: JsonOut = False,
    verbose: Verbose = False,
) -> None:
    """Remove damaged entries and those least recently used; what is being read or of a newer format stays.

    Examples:

        wan-loader cache prune --max-size 60GB

        wan-loader cache prune --max-age 30d
    """
    from wan_loader.cache.entry import NEWER
    from wan_loader.cli.render import print_warnings
    from wan_loader.sizes import format_bytes

    size, age = _size(max_size), parse_age(max_age) if max_age is not None else None
    store = _store(cache_dir)
    removed = store.prune(max_size=size, max_age_s=age) if store is not None else []
    _say_removed("cache prune", removed, json=json)
    newer = [x for x in store.listed() if x.state == NEWER] if store is not None else []
    if newer:
        stay = f"of a newer format, and kept: {_count(newer)}, {format_bytes(sum(x.nbytes for x in newer))}"
        print_warnings([f"{stay}; for a newer wan-loader, or `wan-loader cache clear`"])


@app.command()
def clear(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    cache_dir: CacheDir = None,
    json: JsonOut = False,
    verbose: Verbose = False,
) -> None:
    """Remove every entry that is not being read.

    Example:

        wan-loader cache clear --yes
    """
    from wan_loader.sizes import format_bytes

    store = _store(cache_dir)
    listed = store.listed() if store is not None else []
    if listed and not yes:
        if not sys.stdin.isatty():
            raise OptionError.because("clear removes every entry", "say --yes")
        total = format_bytes(sum(x.nbytes for x in listed))
        typer.confirm(f"remove {_count(listed)}, {total}?", abort=True, err=True)
    removed = [x for x in listed if store is not None and store.remove(x)]
    _say_removed("cache clear", removed, json=json)


def _say_removed(command: str, removed: list[ListedEntry], *, json: bool) -> None:
    from wan_loader.cli.output import print_json
    from wan_loader.cli.render import output_console
    from wan_loader.sizes import format_bytes

    nbytes = sum(x.nbytes for x in removed)
    if json:
        document = {"removed": [x.key for x in removed], "nbytes": nbytes}
        print_json({"schema_version": 1, "command": command, **document})
    else:
        output_console().print(f"{_count(removed)} removed, {format_bytes(nbytes)}")


def _count(listed: list[ListedEntry]) -> str:
    from wan_loader.sizes import format_count

    return format_count(len(listed), "entry", "entries")


def _size(text: str | None) -> int | None:
    return None if text is None else parse_size(text)
