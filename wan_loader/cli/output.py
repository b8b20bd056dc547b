"""Output files: checked before work begins, written whole or not at all, never overwritten without --force."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from wan_loader.errors import OutputError

__all__ = ["check_output", "print_json", "write_json"]


def check_output(path: Path | None, *, force: bool) -> None:
    """Raise `OutputError` now rather than after the work, if `path` cannot be written."""
    if path is None:
        return
    if path.exists() and not force:
        raise OutputError(f"{path} exists: choose another name, or overwrite it with --force")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path} cannot be written: {path.parent} is no directory that you may write to")


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write beside the place, then rename: nobody sees half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(json.dumps(document, indent=2) + "\n")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def print_json(document: dict[str, Any]) -> None:
    """One document on stdout."""
    print(json.dumps(document, indent=2))
