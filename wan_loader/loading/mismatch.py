"""Errors about names, short enough to be read: counts, a few examples, and what the names themselves suggest.

The suggestions follow from structure alone (a prefix, the same shapes under other names); nothing here knows the
names of a model. A family of models that has joined may say which key map fits (entry points of the group
`wan_loader.key_maps`, functions `hint(missing, unexpected) -> str | None`).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from wan_loader.entry_points import first_answer
from wan_loader.errors import KeyMismatchError
from wan_loader.printable import shown_name

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from wan_loader.errors import Shape
    from wan_loader.loading.module_tensors import ModuleTensor

__all__ = ["mismatch", "stays_on_meta"]

#: Examples of each kind: with all titles and hints, a message has at most 25 lines.
_EXAMPLES = 5
#: Names whose prefixes are counted: a sample, evenly spread.
_SAMPLE = 200
_KINDS = {"parameter": "parameter", "buffer": "buffer", "attribute": "plain attribute"}
#: An end that more names have, such as "weight", says nothing.
_MAX_ALIKE = 100


def mismatch(
    path: str,
    *,
    missing: Mapping[str, Shape],
    unexpected: Mapping[str, Shape],
    misshaped: Mapping[str, tuple[Shape, Shape]],
    renamed: Mapping[str, str],
) -> KeyMismatchError:
    """Make the error for a checkpoint that does not fit a module.

    Args:
        path: The checkpoint.
        missing: Names with their shapes in the module.
        unexpected: Names with their shapes in the file.
        misshaped: Shapes in the file and in the module.
        renamed: Names in the file that the caller's key map changed, and what it made of them.
    """
    lines = [f"{path} does not fit the module:"]
    as_what = {name: f"{shown_name(name)} (as {shown_name(renamed[name])})" for name in unexpected if name in renamed}
    shapes = {
        name: f"{shown_name(name)}: {list(found)} in the file, {list(wanted)} in the module"
        for name, (found, wanted) in misshaped.items()
    }
    for title, names, texts in (
        ("missing", missing, {}),
        ("unexpected", unexpected, as_what),
        ("of another shape", misshaped, shapes),
    ):
        if names:
            lines += _listed(title, list(names), texts)
    lines += _hints(missing, unexpected, renamed)
    return KeyMismatchError(
        "\n  ".join(lines), missing=tuple(missing), unexpected=tuple(unexpected), misshaped=dict(misshaped), path=path
    )


def stays_on_meta(path: str, left: Sequence[ModuleTensor]) -> KeyMismatchError:
    """Make the error for a module of which tensors would stay on the meta device: it could not run."""
    what = {held.name: f"{shown_name(held.name)} ({_KINDS[held.kind]})" for held in left}
    names = list(what)
    lines = [
        f"{path} would leave tensors of the module on the meta device, where it cannot run:",
        *_listed("in no checkpoint, or not in this one", names, what),
        'build the module with `with wan_loader.empty_weights(): ...` instead of torch.device("meta"): then what it',
        f"computes is real; or name what you fill yourself afterwards: allow_meta=[{names[0]!r}]",
    ]
    return KeyMismatchError("\n  ".join(lines), on_meta=names, path=path)


def _listed(title: str, names: Sequence[str], texts: Mapping[str, str]) -> Iterator[str]:
    more = ", such as (all are in the error's fields)" if len(names) > _EXAMPLES else ""
    yield f"{len(names)} {title}{more}:"
    yield from (f"  {texts.get(name) or shown_name(name)}" for name in names[:_EXAMPLES])


def _hints(missing: Mapping[str, Shape], unexpected: Mapping[str, Shape], renamed: Mapping[str, str]) -> Iterator[str]:
    known = first_answer("wan_loader.key_maps", tuple(missing), tuple(unexpected)) if missing and not renamed else None
    if known is not None:
        yield "these are another library's names for the same model:"
        yield f"pass {known}"
    elif not renamed and (found := _prefixes(missing, unexpected)) is not None:
        yield from _prefix_hint(*found, unexpected)
    elif missing and Counter(missing.values()) == Counter(unexpected.values()):
        yield "the missing have the shapes of the unexpected: these are another library's names for the same model;"
        yield "pass key_map=, a function or mapping from the file's names to the module's"
    else:
        yield "check that it is the right checkpoint; if it has another library's names for the same model, pass"
        yield "key_map=, a function or mapping from the file's names; strict=False leaves out what does not match"


def _prefix_hint(theirs: str, ours: str, unexpected: Collection[str]) -> Iterator[str]:
    others = any(not name.startswith(theirs) for name in unexpected)
    if theirs:
        yield (
            f"names in the file have the prefix {theirs!r}" + (f", those of the module {ours!r}" if ours else "") + ":"
        )
    else:
        yield f"names of the module have the prefix {ours!r}, which those in the file lack:"
    start = f"{ours!r} + " if ours else ""
    if others:
        yield f"pass key_map=lambda name: {start}name[{len(theirs)}:] if name.startswith({theirs!r}) else None"
    else:
        yield f"pass key_map=lambda name: {start}name" + (f".removeprefix({theirs!r})" if theirs else "")


def _prefixes(missing: Mapping[str, Shape], unexpected: Mapping[str, Shape]) -> tuple[str, str] | None:
    """Return the prefixes in the file and in the module which, exchanged, make most names match; None without such."""
    ends: dict[str, list[str]] = {}
    for name in missing:
        for start in _starts(name):
            ends.setdefault(name[len(start) :], []).append(start)
    votes: Counter[tuple[str, str]] = Counter()
    for name in list(unexpected)[:: max(1, len(unexpected) // _SAMPLE)]:
        theirs = next((start for start in _starts(name) if name[len(start) :] in ends), None)  # the longest common end
        if theirs is not None and len(alike := ends[name[len(theirs) :]]) <= _MAX_ALIKE:
            votes.update((theirs, ours) for ours in alike)
    for (theirs, ours), _ in votes.most_common(1):
        fitting = sum(
            name.startswith(theirs) and missing.get(ours + name[len(theirs) :]) == shape
            for name, shape in unexpected.items()
        )
        if fitting > 1 and fitting > min(len(missing), len(unexpected)) / 2:
            return theirs, ours
    return None


def _starts(name: str) -> Iterator[str]:
    """Yield "" and what precedes each part of a dotted name, the shortest first."""
    yield ""
    at = name.find(".") + 1
    while at:
        yield name[:at]
        at = name.find(".", at) + 1
