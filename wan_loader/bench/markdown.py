"""A bench as Markdown that a person can paste. Pure."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from wan_loader.bench.table import HEADERS, case_rows, case_title, footnotes, machine_line
from wan_loader.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["to_markdown"]


def to_markdown(document: Mapping[str, Any]) -> str:
    """Write one table a case, the machine, the command, what was called, and the warnings."""
    lines = ["# Loading measured", "", f"{_plain(machine_line(document['machine']))}. {document['created']}.", ""]
    lines += ["```console", f"$ {printable(shlex.join(document['argv']))}", "```", ""]
    for case in document["cases"]:
        lines += [f"## {_plain(case_title(case, document))}", ""]
        if case["failure"]:
            lines += [f"Nothing was measured: {_plain(case['failure'])}", ""]
            continue
        lines += ["| " + " | ".join(HEADERS) + " |", "|---" + "|---:" * (len(HEADERS) - 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in _marked(case_rows(case))]
        lines += ["", *(f"- {_plain(note)}" for note in footnotes(case)), ""]
    lines += ["## What was called", ""]
    lines += [
        f"- **{_plain(loader['label'])}** {_versions(loader)}: `{loader['how']}`" for loader in document["loaders"]
    ]
    lines += ["", _CONDITIONS, ""]
    if document["warnings"]:
        lines += ["## Warnings", "", *(f"- {_plain(w)}" for w in document["warnings"]), ""]
    return "\n".join(lines)


_CONDITIONS = (
    "Each sample is a fresh process; imports and the device's context come before the clock, which ends when the "
    "device is idle, on the CPU when every page of the tensors was touched. The loaders take turns. 'from disk' is "
    "what the kernel fetched from storage; 'checked' tensors were compared with safetensors or torch, bit for bit, in "
    "the first sample. Host peak is the process's resident memory: interpreter, libraries and mapped pages, too. "
    "GPU peak is of torch's allocator; '?' is not known."
)


def _marked(rows: Sequence[tuple[str, ...]]) -> Iterator[list[str]]:
    """Yield rows with the fastest loader in bold, whoever it is: rows come in order, those without a time last."""
    for i, row in enumerate(rows):
        name, *cells = map(_plain, row)
        has_time = bool(row[HEADERS.index("samples")])
        yield [f"**{name}**" if i == 0 and has_time else name, *cells]


def _versions(loader: Mapping[str, Any]) -> str:
    """Write the version of a loader, and of the packages that it needs beside its own."""
    if loader["version"] is None:
        return "(not installed)"
    _, *others = loader["packages"].items()
    return ", ".join([loader["version"], *(f"{name} {version}" for name, version in others)])


def _plain(text: str) -> str:
    """Return text of a checkpoint or a loader without anything that Markdown takes for its own."""
    return printable(text).replace("|", "\\|").replace("<", "&lt;")
