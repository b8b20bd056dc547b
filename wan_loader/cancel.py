"""Stopping what is under way: a token that whoever waits cancels, and that whoever works asks.

Stopping is not observing: an observer is only told what happened (`events`), and cannot end anything.
"""

from __future__ import annotations

from wan_loader.errors import LoadCancelledError

__all__ = ["CancelToken"]


class CancelToken:
    """Stop a load, or several, from another thread.

    A load that is given the token asks it before each block, and ends within a second: nothing is handed out, all is
    closed and freed. A token that was cancelled stays so; make another one for the next load.
    """

    def __init__(self) -> None:
        self._error: BaseException | None = None

    @property
    def cancelled(self) -> bool:
        """True once `cancel` was called."""
        return self._error is not None

    def cancel(self, error: BaseException | None = None) -> None:
        """Have everything that uses the token end. In any thread; returns at once.

        Args:
            error: What the stopped load raises; None means `LoadCancelledError`. The first one counts.
        """
        # no lock: of two threads at the same moment either may be the first
        if self._error is None:
            self._error = error or LoadCancelledError("the load was cancelled")

    def check(self) -> None:
        """Raise what `cancel` was given, if it was called; costs next to nothing."""
        if self._error is not None:
            raise self._error
