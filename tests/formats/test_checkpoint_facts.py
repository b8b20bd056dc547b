"""A file's identity: whatever was done to it since its header was read shows."""

import os

import pytest

from wan_loader import CheckpointError
from wan_loader.formats.checkpoint_facts import stat_file


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"a" * 5000)
    os.utime(path, ns=(10**18, 10**18))
    return path


def overwrite(path):
    """In place, of the same size, with its old mtime put back."""
    with open(path, "r+b") as f:
        f.write(b"b")
    os.utime(path, ns=(10**18, 10**18))


def overwrite_by_the_way_it_came(path):
    times = os.stat(path)
    os.truncate(path, 0)
    path.write_bytes(b"b" * 5000)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def append(path):
    with open(path, "ab") as f:
        f.write(b"b")


def replace(path):
    other = path.with_suffix(".other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(10**18, 10**18))
    os.replace(other, path)


def replace_and_put_back(path):
    kept = path.with_suffix(".kept")
    os.rename(path, kept)
    path.write_bytes(b"b" * 5000)
    os.replace(kept, path)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (overwrite, "modified"),
        (overwrite_by_the_way_it_came, "modified"),
        (append, "modified"),
        (replace, "replaced"),
        (replace_and_put_back, "modified"),
    ],
)
def test_every_change_shows(path, change, what):
    facts = stat_file(str(path))
    facts.check_unchanged()
    change(path)
    with pytest.raises(CheckpointError, match=f"{path} was {what} while"):
        facts.check_unchanged()


def test_a_change_right_after_another_shows(path):
    for _ in range(10):
        overwrite(path)
        facts = stat_file(str(path))
        overwrite(path)
        assert stat_file(str(path)) != facts


def test_what_is_changed_in_the_tick_of_the_last_change_is_in_the_facts(path, monkeypatch):
    """On kernels whose file times stand still within a tick, the later change could not be told from the earlier."""
    now = [os.stat(path).st_ctime_ns]

    def sleep(seconds):
        append(path)
        now[0] += 4_000_000

    monkeypatch.setattr("wan_loader.formats.checkpoint_facts.time.sleep", sleep)
    monkeypatch.setattr("wan_loader.formats.checkpoint_facts.time.clock_gettime_ns", lambda _: now[0])
    assert stat_file(str(path)).nbytes == 5001


def test_a_clock_that_is_ahead_or_behind_is_not_waited_for(path, monkeypatch):
    def sleep(seconds):
        raise AssertionError("waited")

    monkeypatch.setattr("wan_loader.formats.checkpoint_facts.time.sleep", sleep)
    ctime_ns = os.stat(path).st_ctime_ns
    for away_ns in (10**9, -(10**9)):
        monkeypatch.setattr(
            "wan_loader.formats.checkpoint_facts.time.clock_gettime_ns", lambda _, at=ctime_ns + away_ns: at
        )
        assert stat_file(str(path)).ctime_ns == ctime_ns


def test_a_descriptor_of_another_file(path):
    facts = stat_file(str(path))
    with open(path, "rb") as opened:
        facts.check_opened(opened.fileno())
        replace(path)
        with open(path, "rb") as other, pytest.raises(CheckpointError, match="replaced"):
            facts.check_opened(other.fileno())
        facts_now = stat_file(str(path))
        with pytest.raises(CheckpointError, match="replaced"):
            facts_now.check_opened(opened.fileno())
