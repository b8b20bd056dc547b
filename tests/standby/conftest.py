"""A stand-by server of the tests' own, whose imports are quick."""

import contextlib

import pytest
from standbys import Standby


@pytest.fixture(scope="module")
def standby():
    """One that all tests of a module share; they leave it as it is."""
    server = Standby()
    server.start("json", "random", "logging", "multiprocessing.process")
    yield server
    server.close()


@pytest.fixture
def own():
    """Make servers of a test's own, with directories at the head of the path of modules."""
    with contextlib.ExitStack() as stack:

        def own(*paths):
            server = Standby(*paths)
            stack.callback(server.close)
            return server

        yield own


@pytest.fixture
def script(tmp_path):
    """Write a program."""

    def script(text, name="program.py"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return script
