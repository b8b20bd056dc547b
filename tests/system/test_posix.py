"""What the kernel tells about the page cache, and to whom."""

import os

import pytest

from wan_loader.system import posix as linux
from wan_loader.system.posix import cached_bytes

NBYTES = 3 << 20


@pytest.fixture
def no_cachestat(monkeypatch):
    """As before Linux 6.5, and in containers whose filter refuses what it does not know."""
    monkeypatch.setattr(linux, "_cachestat", lambda fd, start, nbytes: None)


@pytest.fixture
def path(open_dir, evict):
    """A cold file that everybody may read."""
    path = open_dir / "weights"
    path.write_bytes(os.urandom(NBYTES))
    path.chmod(0o644)
    evict(path)
    return path


def ask(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        return cached_bytes(fd, 0, NBYTES)
    finally:
        os.close(fd)


def test_mincore_is_asked_about_files_of_one_s_own(path, no_cachestat):
    assert ask(path) == 0
    path.read_bytes()
    assert ask(path) == NBYTES


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
@pytest.mark.usefixtures("no_cachestat")
def test_mincore_is_asked_about_files_that_one_may_write(path, unprivileged):
    path.chmod(0o666)
    with unprivileged():
        assert ask(path) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
@pytest.mark.parametrize("fixture", ["no_cachestat", None])
def test_of_others_files_nothing_is_told(path, unprivileged, fixture, request):
    if fixture:
        request.getfixturevalue(fixture)
    with unprivileged(), pytest.raises(PermissionError):
        ask(path)


def test_a_sandbox_whose_mincore_says_yes_to_everything_is_not_believed(path, no_cachestat, monkeypatch):
    monkeypatch.setattr(linux, "_mincore", lambda fd, start, nbytes: -(-nbytes // 4096))
    linux._mincore_is_honest.cache_clear()
    try:
        with pytest.raises(PermissionError):
            ask(path)
    finally:
        linux._mincore_is_honest.cache_clear()
