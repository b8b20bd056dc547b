"""What a recording is compared with: ceilings, storage and limits of this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_loader.profiler.analysis.assemble import Environment
from wan_loader.profiler.probe.busy import ProcessorTimes, others_note, processor_times
from wan_loader.profiler.probe.ceilings import Ceilings, find_ceilings, known_ceilings
from wan_loader.profiler.probe.system_facts import limits, storage_facts
from wan_loader.system.files import read_capped

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Before", "before_recording", "surroundings"]

_MOST_SOURCE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Before:
    """The machine as it was before a recording."""

    limits: Mapping[str, Any]
    times: ProcessorTimes | None


def before_recording() -> Before:
    """Look at the machine before something is recorded."""
    return Before(limits(), processor_times())


def surroundings(
    paths: Sequence[str],
    device: str,
    before: Before,
    *,
    measure: bool,
    known: bool = False,
    programs: Sequence[str] = (),
) -> Environment:
    """Collect what to compare with, after the recording, so that nothing is warmed for it.

    Args:
        paths: The weight files; some may be gone by now.
        device: The device that they were loaded to.
        before: The machine before the recording.
        measure: Measure what is not known yet.
        known: Take what was measured before, where nothing is measured now.
        programs: Files of the program, whose text advice is about.
    """
    files = [path for path in paths if Path(path).is_file()]
    others = others_note(before.times, processor_times(), "during the run", os.cpu_count() or 1)
    stalled = limits().get("memory_stall_s", 0.0) - before.limits.get("memory_stall_s", 0.0)
    if measure:
        found = find_ceilings(files, device=device)
    else:
        found = known_ceilings(files, device=device) if known else Ceilings({})
        if not found.values:
            found = replace(found, notes=("the machine was not measured",))
    return Environment(
        ceilings=found.values,
        samples=found.samples,
        measured=found.measured,
        storage=storage_facts(files[0]) if files else {},
        limits={**before.limits, "memory_stalled_s": stalled},
        notes=(*filter(None, [others]), *found.notes),
        sources={path: text for path in programs if (text := _text(path)) is not None},
    )


def _text(path: str) -> str | None:
    """Read a file of a program; None where it is gone, or is no text."""
    try:
        content = read_capped(path, _MOST_SOURCE_BYTES)
        return None if content is None else content.decode()
    except (OSError, ValueError):
        return None
