"""A session's evidence, with what makes advice that of one program. Pure."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wan_loader.profiler.analysis.commands import Program

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wan_loader.profiler.analysis.remedies import Part, Parts
    from wan_loader.profiler.analysis.weight_files import OpenedFile
    from wan_loader.verdict import Evidence

__all__ = ["Case", "cold_share", "in_gb", "scaled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A session's evidence, with what makes its advice that of this program."""

    evidence: Evidence
    parts: Parts
    program: Program = field(default_factory=Program)
    files: Mapping[str, OpenedFile] = field(default_factory=dict)
    """The weight files that were opened."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """The text of the program's own files."""
    target: str = ""
    """The checkpoint, of a load."""
    served: float = 1.0
    """The share of imports that happen where a stand-by server would have done them before."""

    def seconds(self, *phases: str) -> dict[Part, float]:
        """Return the parts of some phases."""
        return {part: s for part, s in self.parts.items() if part.phase in phases}

    def shown(self, path: str) -> str:
        """Return a path as short as it may be typed where the program was started."""
        return path.removeprefix(self.program.directory + os.sep) if self.program.directory else path

    def weights(self) -> list[str]:
        """Return the checkpoints that were opened, as they are typed, the largest first."""
        if self.target:
            return [self.target]
        return [self.shown(path) for path in sorted(self.files, key=lambda path: -self.files[path].nbytes)]


def in_gb(nbytes: float) -> str:
    """Return bytes for a sentence."""
    return f"{nbytes / 1e9:.2f} GB"


def scaled(parts: Mapping[Part, float], factor: float) -> dict[Part, float]:
    """Return the parts with a share of their seconds."""
    return {part: s * max(0.0, factor) for part, s in parts.items()}


def cold_share(e: Evidence) -> float:
    """Return the share of the reading time that the disk had, by the rates of disk and page cache where known."""
    nbytes = max(e.nbytes_file, 1)
    cold = min(e.cold_bytes, nbytes)
    disk, cache = e.ceilings.get("disk_gbps"), e.ceilings.get("page_cache_gbps")
    if not (disk and cache):
        return cold / nbytes
    cold_s, warm_s = cold / disk, (nbytes - cold) / cache
    return cold_s / (cold_s + warm_s) if cold_s else 0.0
