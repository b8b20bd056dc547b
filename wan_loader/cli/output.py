"""Output files: checked before work begins, written whole or not at all, never overwritten without --force."""

from __future__ import annotations

import io
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from wan_loader.errors import OutputError
from wan_loader.printable import printable, printable_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = [
    "check_outputs",
    "flush_output",
    "open_streams",
    "print_json",
    "say",
    "show",
    "to_text",
    "write_json",
    "writing",
]


def check_outputs(*paths: Path | None, force: bool) -> None:
    """Raise `OutputError` now rather than after the work, if files cannot be written, or one would replace another."""
    wanted = [path for path in paths if path is not None]
    for path in wanted:
        if path.is_dir():
            raise OutputError.because("is a directory", "give the name of a file", path=path)
        if path.exists() and not force:
            raise OutputError.because("exists", "choose another name, or overwrite it with --force", path=path)
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            reason = f"cannot be written: {path.parent} is no directory that you may write to"
            raise OutputError.because(reason, path=path)
    first: dict[Path, Path] = {}
    for path in wanted:
        if (other := first.get(place := path.resolve())) is not None:
            raise OutputError.because(f"{other}, {path}: two outputs in one file", "give each a name of its own")
        first[place] = path


@contextmanager
def writing(*files: tuple[Path | None, Callable[[], str | bytes]]) -> Iterator[None]:
    """Write files, each whole or not at all, and name them on stderr after the body, which shows the results.

    What cannot be written is one `OutputError` then: the results are not lost with a file.
    """
    from wan_loader.system.files import write_bytes

    # before the body, whose printing may fail: the files are there then
    written, failures = [], []
    for path, render in files:
        if path is None:
            continue
        try:
            write_bytes(path, content if isinstance(content := render(), bytes) else content.encode())
            written.append(str(path))
        except OutputError as error:
            failures.append(str(error))
    yield
    if written:
        say(f"written: {', '.join(map(printable, written))}")
    if failures:
        raise OutputError("; ".join(failures))


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a document whole or not at all; raises `OutputError`."""
    from wan_loader.system.files import write_text

    write_text(path, to_text(document))


def to_text(document: dict[str, Any]) -> str:
    """Render a document as it stands in a file."""
    import json  # what a program that is only run does not need is imported where it is used

    return json.dumps(document, indent=2) + "\n"


def print_json(document: dict[str, Any]) -> None:
    """Print one document on stdout."""
    print(to_text(document), end="")


def say(text: str) -> None:
    """Print a line, or several, on stderr; what a terminal would act upon is shown as an escape."""
    print(printable_lines(text), file=sys.stderr)


def show(text: str) -> None:
    """Print a line, or several, of results on stdout, as `say` does."""
    print(printable_lines(text))


def open_streams() -> None:
    """Make the three standard streams usable, whatever they are.

    One that is closed leads nowhere from now on: else the next file that is opened would get its number, and what is
    printed. What the encoding of a terminal lacks is written as an escape.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number: this one
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_output() -> OSError | None:
    """Write out what was printed. After a failure nothing more is written to stdout.

    A program that was run in this process may have closed or replaced it.

    Returns:
        The reason why stdout cannot be written (a full disk, a reader that left), or None.
    """
    try:
        sys.stdout.flush()
    except (AttributeError, ValueError):
        return None
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes again at its end
        return error
    return None
