"""Files that are whole or not there, and locks on directories."""

import fcntl
import os

import pytest

from wan_loader.errors import OutputError
from wan_loader.system.files import (
    LockedDirectory,
    is_below,
    lock_directory,
    lock_or_refuse,
    plain_path,
    read_capped,
    write_text,
)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_text(path, "one")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"a\.json cannot be written: No space left"):
        write_text(path, "two")
    assert os.listdir(tmp_path) == ["a.json"]
    assert path.read_text() == "one"


def test_what_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_capped(path, 5) == b"12345"
    assert read_capped(path, 4) is None


def test_one_holds_a_directory(tmp_path):
    with lock_directory(tmp_path, alone=True) as held:
        assert held.path == tmp_path
        assert lock_directory(tmp_path, alone=False) is None
        with pytest.raises(OutputError, match="somebody is there"):
            lock_or_refuse(tmp_path, "somebody is there")
    with lock_directory(tmp_path, alone=False), lock_directory(tmp_path, alone=False):
        assert lock_directory(tmp_path, alone=True, patience_s=0.02) is None
    lock_or_refuse(tmp_path, "").close()


def test_what_is_gone_or_a_link_is_not_locked(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    assert lock_directory(tmp_path / "link", alone=True) is None
    assert lock_directory(tmp_path / "gone", alone=True) is None


def test_without_locks_nobody_is_kept_out(tmp_path, monkeypatch):
    def none(fd, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    n_open = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No locks"):
        lock_directory(tmp_path, alone=True)
    with lock_or_refuse(tmp_path, "") as held:
        assert isinstance(held, LockedDirectory)
    assert len(os.listdir("/proc/self/fd")) == n_open


def test_paths_stay_below_a_directory(tmp_path):
    assert is_below("a/b")
    assert not any(map(is_below, ("", "/a", "a//b", "../a", "a/..", "\0", 5, "\ud800\udc00")))
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    assert plain_path(tmp_path, "a/b") == tmp_path / "a/b"
    with pytest.raises(OutputError, match="is a link"):
        plain_path(tmp_path, "link/b")
