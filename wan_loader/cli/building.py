"""A cache entry that is being written, followed to its end: the bar, the outcome, and Ctrl-C."""

from __future__ import annotations

import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wan_loader.loading.result import EntryBuild

__all__ = ["follow_build", "report_build", "stopping"]


def report_build(build: EntryBuild | Path | None, *, json: bool) -> None:
    """Wait for a build with a progress bar, and say what came of it; Ctrl-C ends the build."""
    from wan_loader.errors import CacheError

    if build is None:
        raise CacheError.because("another process is writing this entry", "wait for it, then ask again")
    if isinstance(build, Path):
        _say_built("present", build, 0, 0.0, json=json)
        return
    start = time.monotonic()
    with stopping(build):
        follow_build(build)
        if build.path is None:
            raise CacheError.because(build.failure or "the entry was not written")
        _say_built("built", build.path, build.nbytes_written, time.monotonic() - start, json=json)


def _say_built(state: str, path: Path, nbytes: int, seconds: float, *, json: bool) -> None:
    from wan_loader.cli.output import print_json
    from wan_loader.cli.render import output_console
    from wan_loader.console import marked
    from wan_loader.printable import printable
    from wan_loader.sizes import format_bytes, format_seconds

    if json:
        document = {"state": state, "entry": str(path), "nbytes_written": nbytes, "seconds": seconds}
        print_json({"schema_version": 1, "command": "cache build", **document})
    elif state == "built":
        output_console().print(
            marked("written: [bold]{}[/] in {}\n{}", format_bytes(nbytes), format_seconds(seconds), path)
        )
    else:
        output_console().print(f"there is a valid entry already\n{printable(str(path))}")


@contextmanager
def stopping(build: EntryBuild | None) -> Iterator[None]:
    """Let Ctrl-C in the body end a build, which the interpreter would wait for otherwise."""
    try:
        yield
    except KeyboardInterrupt:
        if build is not None:
            build.stop()
        raise


def follow_build(build: EntryBuild) -> None:
    """Show a progress bar until a build has ended, where stderr is a terminal; Ctrl-C ends the build."""
    with stopping(build):
        from wan_loader.cli.progress import progress_bars

        title = "writing the cache"
        with progress_bars(title, build.nbytes) as tell:
            while not build.wait(0.1):
                if tell is not None:
                    tell(title, build.nbytes_written, build.nbytes)
