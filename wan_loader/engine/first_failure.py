"""The first failure of some threads, kept until another thread raises it."""

from __future__ import annotations

__all__ = ["FirstFailure"]


class FirstFailure:
    """True while it holds a failure. What comes after the first one is dropped."""

    def __init__(self) -> None:
        self._failure: BaseException | None = None

    def __bool__(self) -> bool:
        return self._failure is not None

    def note(self, failure: BaseException) -> None:
        """Keep a failure, unless there was one before. In any thread."""
        if self._failure is None:
            self._failure = failure

    def forget(self) -> None:
        """Let go of the failure: it holds what was running, weights included."""
        self._failure = None

    def raise_it(self) -> None:
        """Raise the failure, once, if there is one."""
        failure, self._failure = self._failure, None
        try:
            if failure is not None:
                raise failure
        finally:
            del failure  # it holds this frame, too, and must not hold itself
