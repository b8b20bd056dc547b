"""The first failure of several is the one that is raised, once, and kept by nobody afterwards."""

import contextlib
import gc
import weakref

import pytest

from wan_loader.engine.first_failure import FirstFailure


class Weights:
    pass


def test_the_first_one_is_raised_once():
    failure = FirstFailure()
    failure.raise_it()
    assert not failure
    failure.note(ValueError("first"))
    failure.note(ValueError("second"))
    assert failure
    with pytest.raises(ValueError, match="first"):
        failure.raise_it()
    failure.raise_it()


@pytest.mark.parametrize("end", ["raised", "forgotten"])
def test_what_was_running_is_let_go_of(end):
    def run(held):
        weights = Weights()
        held.append(weakref.ref(weights))
        raise MemoryError

    failure, held = FirstFailure(), []
    try:
        run(held)
    except MemoryError as error:
        failure.note(error)
    assert held[0]() is not None
    gc.disable()
    try:
        if end == "forgotten":
            failure.forget()
        else:
            with contextlib.suppress(MemoryError):
                failure.raise_it()
        assert held[0]() is None, "without the collector of cycles"
    finally:
        gc.enable()
