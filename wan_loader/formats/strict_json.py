"""Strict parsing of JSON from untrusted files: whatever is wrong is one `CheckpointError` that names the file.

What Python's parser takes beyond JSON (NaN, lone surrogates, keys that stand twice) is refused. Memory is bounded
before anything is parsed, from the numbers of brackets and commas: three bytes of `[],` become ninety.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from wan_loader.errors import CheckpointError
from wan_loader.formats.nested_parts import shown

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["parse_object"]

#: What an object, a list and a value in one of them take, roughly; and what all may take, whatever the length.
_OBJECT, _LIST, _VALUE = 200, 96, 40
_BASE_COST, _COST_PER_BYTE = 64 << 20, 12
#: So short a text cannot take more than the base, for an object has two bytes: nothing is counted.
_ALWAYS_BYTES = 2 * _BASE_COST // _OBJECT
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_object(
    text: bytes,
    *,
    path: str,
    what: str,
    compact: Callable[[dict[str, Any]], Any] | None = None,
    holds_paths: bool = False,
    takes_nan: bool = False,
) -> dict[str, Any]:
    """Parse a JSON object in which no key stands twice.

    Args:
        text: The file's content.
        path: The file's name for errors.
        what: The name of the text for errors, such as "the header".
        compact: Makes something smaller of each object in it, and of the whole, as soon as it is parsed.
        holds_paths: Take lone surrogates, which stand for bytes of names of files that are no UTF-8.
        takes_nan: Take NaN and infinities, for a reader who refuses them by the name of their field.

    Raises:
        CheckpointError: It is not JSON, not an object, or too costly to parse.
    """

    def unique(pairs: list[tuple[str, Any]]) -> Any:
        out = dict(pairs)
        if len(out) < len(pairs):
            name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise CheckpointError(f"{path}: key {shown(name)} stands twice in {what}: damaged file", path=path)
        return compact(out) if compact else out

    if len(text) > _ALWAYS_BYTES and _cost(text) > _BASE_COST + _COST_PER_BYTE * len(text):
        raise CheckpointError(f"{path}: {what} is mostly brackets and commas: damaged or foreign file", path=path)
    try:
        constant = float if takes_nan else _refuse
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
        # only an escape can make a surrogate, since the text was UTF-8; encoding finds the ones without a partner
        if not holds_paths and b"\\u" in text and _SURROGATE.search(text):
            json.dumps(parsed, ensure_ascii=False).encode()
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # also: not UTF-8, numbers of thousands of digits
        raise CheckpointError(
            f"{path}: {what} is not JSON ({error}): damaged, foreign, or still downloading", path=path
        ) from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: {what} is not a JSON object: damaged or foreign file", path=path)
    return parsed


def _cost(text: bytes) -> int:
    """Return the bytes of memory that the parsed text takes; what stands in strings counts too."""
    return _OBJECT * text.count(b"{") + _LIST * text.count(b"[") + _VALUE * text.count(b",")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")
