"""What a recording is compared with: ceilings, storage and limits of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_loader.profiler.analysis.assemble import Environment
from wan_loader.profiler.probe.ceilings import Ceilings, find_ceilings, known_ceilings
from wan_loader.profiler.probe.system_facts import limits, storage_facts
from wan_loader.system.files import read_capped

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_MOST_SOURCE_BYTES = 1 << 20
__all__ = ["surroundings"]


def surroundings(
    paths: Sequence[str],
    device: str,
    before: Mapping[str, Any],
    *,
    measure: bool,
    known: bool = False,
    programs: Sequence[str] = (),
) -> Environment:
    """Collect what to compare with, after the recording, so that nothing is warmed for it.

    Args:
        paths: The weight files; some may be gone by now.
        device: The device that they were loaded to.
        before: The limits before the recording.
        measure: Measure what is not known yet.
        known: Take what was measured before, where nothing is measured now.
        programs: Files of the program, whose text advice is about.
    """
    files = [path for path in paths if Path(path).is_file()]
    after = limits()
    stalled = after.get("memory_stall_s", 0.0) - before.get("memory_stall_s", 0.0)
    found = Ceilings(known_ceilings(files, device=device) if known else {})
    if measure:
        found = find_ceilings(files, device=device)
    elif not found.values:
        found = Ceilings({}, ("the machine was not measured",))
    return Environment(
        ceilings=found.values,
        storage=storage_facts(files[0]) if files else {},
        limits={**before, "memory_stalled_s": stalled},
        notes=found.notes,
        sources={path: text for path in programs if (text := _text(path)) is not None},
    )


def _text(path: str) -> str | None:
    """Read a file of a program; None where it is gone, or is no text."""
    try:
        content = read_capped(path, _MOST_SOURCE_BYTES)
        return None if content is None else content.decode()
    except (OSError, ValueError):
        return None
