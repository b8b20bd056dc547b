"""Output files: checked before work begins, written whole or not at all, never overwritten without --force."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_loader.atomic import write_text
from wan_loader.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["check_outputs", "flush_output", "print_json", "to_text", "write_json", "writing"]


def check_outputs(*paths: Path | None, force: bool) -> None:
    """Raise `OutputError` now rather than after the work, if files cannot be written, or one would replace another."""
    wanted = [path for path in paths if path is not None]
    for path in wanted:
        if path.exists() and not force:
            raise OutputError(f"{path} exists: choose another name, or overwrite it with --force")
        if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise OutputError(f"{path} cannot be written: {path.parent} is no directory that you may write to")
    if len({path.resolve() for path in wanted}) < len(wanted):
        raise OutputError(f"{', '.join(map(str, wanted))}: two outputs in one file: give each a name of its own")


@contextmanager
def writing(*files: tuple[Path | None, Callable[[], str]]) -> Iterator[None]:
    """Write files, each whole or not at all, and name them on stderr after the body, which shows the results.

    What cannot be written is one `OutputError` then: the results are not lost with a file.
    """
    written, failures = [], []
    for path, render in files:
        if path is None:
            continue
        try:
            write_text(path, render())
            written.append(str(path))
        except OutputError as error:
            failures.append(str(error))
    yield
    if written:
        print(f"written: {', '.join(written)}", file=sys.stderr)
    if failures:
        raise OutputError("; ".join(failures))


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a document whole or not at all; raises `OutputError`."""
    write_text(path, to_text(document))


def to_text(document: dict[str, Any]) -> str:
    """A document as it stands in a file."""
    return json.dumps(document, indent=2) + "\n"


def print_json(document: dict[str, Any]) -> None:
    """One document on stdout."""
    print(json.dumps(document, indent=2))


def flush_output() -> OSError | None:
    """Why stdout cannot be written (a full disk, a reader that left), or None. Then nothing more is written to it."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes again at its end
        return error
    return None
