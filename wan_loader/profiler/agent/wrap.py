"""Wrappers that leave no trace: same name, same signature, and no frame of their own in a program's tracebacks."""

from __future__ import annotations

import functools

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["drop_frame", "patch", "timed"]


def drop_frame(error: Any) -> None:
    """Take the caller's frame out of the traceback; use before a bare `raise`."""
    if error.__traceback__ is not None:
        error.__traceback__ = error.__traceback__.tb_next


def timed(recorder: Any, original: Any, name: Any, label: Any, nbytes_of: Any = None) -> Any:
    """Wrap `original` as a span. `nbytes_of(before)` gives its bytes from the counters before it."""

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not recorder.on:
            return original(*args, **kwargs)
        text = label(args, kwargs) if callable(label) else label
        before = recorder.io() if nbytes_of else None
        recorder.begin(name, text)
        nbytes = 0
        try:
            result = original(*args, **kwargs)
            nbytes = nbytes_of(before) if nbytes_of else 0
            return result
        except BaseException as error:
            drop_frame(error)
            raise
        finally:
            recorder.end(nbytes)

    return wrapper


def patch(recorder: Any, owner: Any, attribute: Any, make: Any) -> None:
    """Replace `owner.attribute` by `make(original)`; undone when the recording ends. Absent: nothing happens."""
    original = getattr(owner, attribute, None)
    if original is None:
        return
    # looked up without inheritance: to undo is to put back exactly what the owner itself had
    own = vars(owner).get(attribute)
    try:
        setattr(owner, attribute, make(original))
    except (TypeError, AttributeError):
        return
    if own is None:  # it was inherited
        recorder.undo.append(lambda: delattr(owner, attribute))
    else:
        recorder.undo.append(lambda: setattr(owner, attribute, own))
