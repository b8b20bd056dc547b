"""The processes of a session as lanes of a timeline, for the page and for pictures. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.profiler.analysis.story import label
from wan_loader.profiler.render.charts import Lane
from wan_loader.profiler.render.terminal import shown_processes

if TYPE_CHECKING:
    from wan_loader.profiler.analysis.session import Session

__all__ = ["lanes_of"]


def lanes_of(session: Session) -> list[Lane]:
    """Return the processes worth drawing, in the order of their starts; of a load, the one that it is of."""
    shown = shown_processes(session) if session.turns else [session.subject]
    return [
        Lane(
            label(session.processes, number),
            session.processes[number],
            [turn for turn in session.turns if turn.process == number],
        )
        for number in shown
    ]
