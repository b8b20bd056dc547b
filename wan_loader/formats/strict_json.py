"""JSON from untrusted files: every way to be wrong is one `CheckpointError` that names the file."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from wan_loader.errors import CheckpointError

__all__ = ["parse_object"]


def parse_object(text: bytes, *, path: str, what: str) -> dict[str, Any]:
    """Parse a JSON object in which no key stands twice; `what` says in errors what the text is."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) < len(pairs):
            name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise CheckpointError(f"{path}: key {name!r} stands twice in {what}: damaged file")
        return out

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # also: not UTF-8, numbers of thousands of digits
        raise CheckpointError(f"{path}: {what} is not JSON ({error}): damaged, foreign, or still downloading") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: {what} is not a JSON object: damaged or foreign file")
    return parsed
