"""The dict of tensors that is meant in a nested checkpoint: the whole file, or the part that the caller names.

Training programs save `{"state_dict": {...}, "epoch": 3}` and deeper nests. One flat dict of tensors is loaded; of a
file that holds several, or other things beside them, the caller says which one is meant.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from wan_loader.errors import CheckpointError
from wan_loader.formats.pickle_values import kind_of
from wan_loader.sizes import format_count

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["choose_part", "shown"]

_MAX_NAMED = 8
_MAX_NAME_CHARS = 100
#: Deeper dicts are not offered; files of training programs nest three or four.
_MAX_DEPTH = 16


def choose_part(state: Any, part: str | None, *, path: str, is_tensor: Callable[[Any], bool]) -> dict[str, Any]:
    """Return the flat dict of tensors that is meant.

    The methods of `dict` are called on it, for an object in a pickle may hide them behind attributes of its own.

    Args:
        state: The content of the file; its dicts may be shared or contain themselves.
        part: The keys that lead to the dict, joined by dots; None means that the file itself is one.
        path: The file's name for errors.
        is_tensor: Tells tensors from other values.

    Raises:
        CheckpointError: There is no such dict. The message names the parts that there are.
    """
    if not isinstance(state, dict):
        raise CheckpointError.because(
            f"holds a {kind_of(state)}, not a dict of tensors", "read it with torch.load", path=path
        )
    chosen = state if part is None else _find(state, part)
    if chosen is None:
        raise CheckpointError(f"{path} has no part {shown(part)}; {_offer(state, is_tensor)}", path=path)
    if all(type(name) is str and is_tensor(value) for name, value in dict.items(chosen)):
        return chosen
    raise _not_flat(chosen, part, path, is_tensor)


def shown(name: object) -> str:
    """Return a name from a file as it may stand in a message: escaped, and of bounded length."""
    if isinstance(name, str):
        return repr(name) if len(name) <= _MAX_NAME_CHARS else f"{name[:_MAX_NAME_CHARS]!r}..."
    return repr(name) if isinstance(name, int | float | None) else f"a {type(name).__name__}"


def _find(state: dict[Any, Any], part: str) -> dict[Any, Any] | None:
    """Return the dict at a dotted path; keys may have dots themselves, and the longest key counts first."""
    end = len(part)
    while end > 0:
        inner, rest = dict.get(state, part[:end]), part[end + 1 :]
        if isinstance(inner, dict):
            found = _find(inner, rest) if end < len(part) else inner
            if found is not None:
                return found
        end = part.rfind(".", 0, end)
    return None


def _not_flat(chosen: dict[Any, Any], part: str | None, path: str, is_tensor: Callable[[Any], bool]) -> CheckpointError:
    where = path if part is None else f"{path}: part {shown(part)}"
    if _parts(chosen, is_tensor):
        return CheckpointError(
            f"{where} is nested, not one flat dict of tensors; {_offer(chosen, is_tensor, part)}", path=path
        )
    odd = [(name, value) for name, value in dict.items(chosen) if type(name) is not str or not is_tensor(value)]
    named = [
        f"{shown(name)} (a {kind_of(value)})" if type(name) is str else f"{shown(name)} (its name is no text)"
        for name, value in odd[:_MAX_NAMED]
    ]
    subject, verb = ("entry", "is not a tensor") if len(odd) == 1 else ("entries", "are not tensors")
    return CheckpointError(
        f"{where}: {subject} {_some(named, len(odd))} {verb}: this reads flat dicts of tensors; "
        "read others with torch.load(weights_only=True)",
        path=path,
        remedy="read others with torch.load(weights_only=True)",
    )


def _offer(state: dict[Any, Any], is_tensor: Callable[[Any], bool], part: str | None = None) -> str:
    """Say what to ask for instead; `part` leads to `state`."""
    above = () if part is None else (part,)
    parts = sorted(_parts(state, is_tensor), key=lambda found: -found[1])
    if not parts:
        return "it holds no flat dict of tensors: read it with torch.load(weights_only=True)"
    named = [(".".join((*above, *keys))[:_MAX_NAME_CHARS], count) for keys, count in parts[:_MAX_NAMED]]
    first = named[0][0]
    option = shlex.quote(first) if first.isprintable() else repr(first)
    listed = _some([f"{shown(name)} ({format_count(count, 'tensor')})" for name, count in named], len(parts))
    return f"say which part to load, as part={first!r} or --part {option}: it holds {listed}"


def _some(named: list[str], count: int) -> str:
    """List the first of `count` names, and how many more there are."""
    return ", ".join(named) + (f" and {count - len(named)} more" if count > len(named) else "")


def _parts(state: dict[Any, Any], is_tensor: Callable[[Any], bool]) -> list[tuple[tuple[str, ...], int]]:
    """Return the keys that lead to each flat dict of tensors below `state`, and its number of tensors."""
    found: list[tuple[tuple[str, ...], int]] = []
    seen = {id(state)}  # each dict once: a file may make many paths of few dicts
    level: list[tuple[tuple[str, ...], dict[Any, Any]]] = [((), state)]
    for _ in range(_MAX_DEPTH):
        below = []
        for keys, parent in level:
            for name, value in dict.items(parent):
                if type(name) is not str or not isinstance(value, dict) or not value or id(value) in seen:
                    continue
                seen.add(id(value))
                if all(type(key) is str and is_tensor(item) for key, item in dict.items(value)):
                    found.append(((*keys, name), len(value)))
                else:
                    below.append(((*keys, name), value))
        level = below
    return found
