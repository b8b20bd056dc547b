"""The weight files that a program's processes opened, each counted once. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wan_loader.profiler.analysis.session import Process

__all__ = ["OpenedFile", "device_of", "files_of", "programs_of"]


@dataclass(frozen=True, slots=True)
class OpenedFile:
    """A weight file, as it was found by the process that opened it first."""

    nbytes: int
    resident_before: int | None
    """Bytes of it in the page cache then; None where that is not known."""
    reader: str = ""
    """What opened it: a function of a library."""
    site: tuple[str, int] | None = None
    """The program's own file and line that led there; None where that is not known."""


def files_of(processes: Sequence[Process]) -> dict[str, OpenedFile]:
    """Return the weight files of all processes, by path."""
    found: dict[str, OpenedFile] = {}
    for process in processes:  # they come in the order of their starts
        files = process.facts.get("files")
        for path, facts in files.items() if isinstance(files, dict) else ():
            resident = facts["resident_before"]
            known = found.get(path)
            if known is not None and known.resident_before is not None and resident is not None:
                # who opened it later may have found it as others had left it
                resident = min(resident, known.resident_before)
            elif known is not None and resident is None:
                resident = known.resident_before
            first = known or OpenedFile(0, None, str(facts.get("reader", "")), _site(facts))
            found[path] = replace(first, nbytes=facts["nbytes"], resident_before=resident)
    return found


def _site(facts: dict[str, Any]) -> tuple[str, int] | None:
    site = facts.get("site")
    return (site[0], site[1]) if site else None


def programs_of(files: Mapping[str, OpenedFile]) -> list[str]:
    """Return the program's own files in which weight files were opened."""
    return list(dict.fromkeys(file.site[0] for file in files.values() if file.site is not None))


def device_of(processes: Sequence[Process]) -> str:
    """Return "cuda" if a process has copied weights to a GPU, else "cpu"."""
    spans = (s for p in processes for s in p.spans if s.name in ("h2d", "cast"))
    return "cuda" if any("host to cuda" in s.label for s in spans) else "cpu"
