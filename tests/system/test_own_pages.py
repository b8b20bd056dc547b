"""Which pages of private mappings were written: both ways to look, on real memory."""

import ctypes
import errno
import mmap
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_loader.system import own_pages as module
from wan_loader.system.own_pages import PAGE, read_entries, read_memory, scan_pages, written_pages
from wan_loader.system.posix import map_private

N_PAGES = 40


def is_known(look):
    """Say whether this kernel has a way to look."""
    try:
        return module._is_honest(look)
    except OSError:
        return False


LOOKS = [look for look in (scan_pages, read_entries) if is_known(look)]
pytestmark = pytest.mark.skipif(not LOOKS, reason="the kernel does not tell")


def mapped(directory, n_pages=N_PAGES, fill=b"w"):
    path = directory / "pages"
    path.write_bytes(fill * (n_pages * PAGE))
    with path.open("rb") as file:
        return map_private(file.fileno(), 0, n_pages * PAGE)


@pytest.fixture(params=LOOKS, ids=lambda look: look.__name__)
def look(request, monkeypatch):
    """Each way that this kernel has."""
    monkeypatch.setattr(module, "_honest_look", lambda: request.param)
    return request.param


def pages_of(runs, address):
    return [page for start, end in runs for page in range((start - address) // PAGE, (end - address) // PAGE)]


def test_written_pages_are_told_from_read_ones_and_untouched_ones(look, disk_or_memory):
    memory = mapped(disk_or_memory)
    address = ctypes.addressof(memory)
    whole = [(address, address + len(memory))]
    assert written_pages(whole) == []
    assert memory[3 * PAGE : 6 * PAGE] == b"w" * (3 * PAGE)
    assert written_pages(whole) == []
    memory[7 * PAGE] = b"w"  # the very same value
    memory[9 * PAGE - 1 : 9 * PAGE + 1] = b"xy"
    assert pages_of(written_pages(whole), address) == [7, 8, 9]
    assert written_pages([(address + 8 * PAGE, address + 8 * PAGE + 1)]) == [(address + 8 * PAGE, address + 9 * PAGE)]
    assert written_pages([(address, address + 7 * PAGE), (address + 10 * PAGE, address + 11 * PAGE)]) == []
    assert written_pages([]) == []


def test_ranges_that_overlap_in_any_order(look, tmp_path):
    memory = mapped(tmp_path)
    address = ctypes.addressof(memory)
    memory[7 * PAGE] = memory[20 * PAGE] = b"x"
    ranges = [(2, 3), (0, 8), (1, 2), (19, 21), (4, 6), (8, 9)]
    found = written_pages([(address + first * PAGE + 1, address + last * PAGE - 1) for first, last in ranges])
    assert pages_of(found, address) == [7, 20]


def test_a_written_page_that_is_given_back_is_the_files_again(look, disk_or_memory):
    memory = mapped(disk_or_memory)
    address = ctypes.addressof(memory)
    memory[PAGE] = b"x"
    libc = ctypes.CDLL(None)
    assert libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(4 * PAGE), mmap.MADV_DONTNEED) == 0
    assert written_pages([(address, address + 4 * PAGE)]) == []
    assert memory[PAGE] == b"w"


@settings(max_examples=25, deadline=None)
@given(
    st.sets(st.integers(0, N_PAGES - 1)), st.lists(st.tuples(st.integers(0, N_PAGES), st.integers(0, 3)), max_size=6)
)
def test_both_ways_agree_with_what_was_written(tmp_path_factory, written, asked):
    memory = mapped(tmp_path_factory.mktemp("pages"))
    address = ctypes.addressof(memory)
    for page in written:
        memory[page * PAGE + page] = b"x"
    ranges = [(address + first * PAGE, address + min(first + count, N_PAGES) * PAGE) for first, count in asked]
    ranges = [(start, end) for start, end in ranges if start < end]
    expected = sorted({p for start, end in ranges for p in pages_of([(start, end)], address)} & written)
    for look in LOOKS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_honest_look", lambda look=look: look)
            assert pages_of(written_pages(ranges), address) == expected


def test_more_runs_than_fit_into_one_answer(look, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_MAX_REGIONS", 3)
    monkeypatch.setattr(module, "_MAX_ENTRIES", 7)
    memory = mapped(tmp_path)
    address = ctypes.addressof(memory)
    for page in range(0, N_PAGES, 2):
        memory[page * PAGE] = b"x"
    found = written_pages([(address, address + len(memory))])
    assert pages_of(found, address) == list(range(0, N_PAGES, 2))


def test_pages_of_a_parent_and_of_its_child(look, tmp_path):
    memory = mapped(tmp_path)
    address = ctypes.addressof(memory)
    memory[0] = b"x"
    whole = [(address, address + len(memory))]
    pid = os.fork()
    if pid == 0:
        memory[4 * PAGE] = b"x"
        os._exit(0 if pages_of(written_pages(whole), address) == [0, 4] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert pages_of(written_pages(whole), address) == [0]


ENTRIES = {
    "nothing": (0, False),
    "of the file": (1 << 63 | 1 << 61, False),
    "a copy": (1 << 63, True),
    "a copy of its own": (1 << 63 | 1 << 56, True),
    "a copy, swapped out": (1 << 62 | 0x1234, True),
    "of the file, on its way": (1 << 62 | 1 << 61, False),
    "write-protected, not there": (1 << 57, False),
    "guarded": (1 << 58, True),
}


@pytest.mark.parametrize(("entry", "is_written"), ENTRIES.values(), ids=ENTRIES.keys())
def test_entries_of_pagemap(monkeypatch, entry, is_written):
    monkeypatch.setattr(module.os, "pread", lambda fd, n, at: bytes(8) + entry.to_bytes(8, "little") + bytes(n - 16))
    runs = list(read_entries(0, 16 * PAGE, 19 * PAGE))
    assert runs == ([(17 * PAGE, 18 * PAGE)] if is_written else [])


def test_what_does_not_tell_the_truth_is_not_asked(monkeypatch):
    """As in a sandbox whose file is all zeros, or one in which every page looks written."""
    looks = {
        "zeros": lambda fd, start, end: [],
        "all": lambda fd, start, end: [(start, end)],
    }
    for name in looks:
        module._honest_look.cache_clear()
        monkeypatch.setattr(module, "scan_pages", looks[name])
        monkeypatch.setattr(module, "read_entries", looks[name])
        with pytest.raises(OSError, match="does not say"):
            written_pages([(0, PAGE)])
    module._honest_look.cache_clear()


def test_the_older_way_takes_over(monkeypatch):
    def refused(fd, start, end):
        raise OSError(errno.ENOTTY, "no such ioctl")

    module._honest_look.cache_clear()
    monkeypatch.setattr(module, "scan_pages", refused)
    assert module._honest_look() is read_entries
    module._honest_look.cache_clear()


def test_an_unreadable_pagemap_is_an_error(monkeypatch):
    module._honest_look.cache_clear()
    real = os.open

    def refuse(path, *args):
        if path == "/proc/self/pagemap":
            raise PermissionError(errno.EPERM, "refused")
        return real(path, *args)

    monkeypatch.setattr(module.os, "open", refuse)
    with pytest.raises(OSError):
        written_pages([(0, PAGE)])
    module._honest_look.cache_clear()


def test_no_progress_ends(monkeypatch):
    monkeypatch.setattr(module.fcntl, "ioctl", lambda *args: 0)
    with pytest.raises(OSError, match="progress"):
        list(scan_pages(0, 0, PAGE))


def test_memory_is_read_or_refused(tmp_path):
    memory = mapped(tmp_path, 2)
    address = ctypes.addressof(memory)
    memory[5] = b"x"
    assert read_memory(address, 8) == b"wwwwwxww"
    os.truncate(tmp_path / "pages", PAGE)
    assert read_memory(address + PAGE - 1, 1) == b"w"
    for start in (address + PAGE, address + PAGE - 1, 8):
        with pytest.raises(OSError):
            read_memory(start, 2)
