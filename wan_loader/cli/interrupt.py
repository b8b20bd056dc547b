"""What Ctrl-C ends beside the command itself."""

from __future__ import annotations

import sys

__all__ = ["INTERRUPTED", "stop_builds"]

#: Exit code after Ctrl-C.
INTERRUPTED = 130


def stop_builds() -> None:
    """End cache entries that are being written: the interpreter would wait for them. Imports nothing."""
    module = sys.modules.get("wan_loader.cache.build")
    if module is not None:
        module.stop_builds()
