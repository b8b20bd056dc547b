"""What the text of /proc/PID/maps says of mapped files, and what it does not."""

import ctypes
import mmap
import os

import pytest

from wan_loader.system.mappings import FileMapping, MappingTable, parse_mappings, read_mappings
from wan_loader.system.posix import PAGE, map_file, map_private, unmap

TEXT = rb"""
5624ae857000-5624ae858000 r--p 00002000 fe:00 26723                      /usr/bin/python 3.11
7f0000000000-7f0000002000 rw-s 00000000 00:01 1024                       /memfd:ring (deleted)
7f0000003000-7f0000004000 ---p 00003000 103:02 18446744073709551615      /data/a\012b
7f0000005000-7f0000006000 rw-p 00000000 00:00 0
7f0000007000-7f0000008000 rw-p 00000000 00:00 0                          [heap]
7f0000009000-7f000000a000 rw-p 00000000 00:2d 7                           [not a file]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
"""


def test_every_field_is_read():
    assert parse_mappings(TEXT)[:3] == [
        FileMapping(
            0x5624AE857000, 0x5624AE858000, 0x2000, os.makedev(0xFE, 0), 26723, "/usr/bin/python 3.11", True, True
        ),
        FileMapping(0x7F0000000000, 0x7F0000002000, 0, os.makedev(0, 1), 1024, "/memfd:ring (deleted)", False, True),
        FileMapping(0x7F0000003000, 0x7F0000004000, 0x3000, os.makedev(0x103, 2), 2**64 - 1, "/data/a\nb", True, False),
    ]


def test_memory_without_a_file_is_left_out():
    assert [mapping.inode for mapping in parse_mappings(TEXT)[3:]] == [7]
    assert parse_mappings(b"") == []


def test_another_text_is_refused():
    with pytest.raises(ValueError):
        parse_mappings(b"cpu 1 2 3 4 5 6\n")


LINE = b"%x-%x %s %x fe:00 %d /w"
PARTS = {
    "continues": ((0x1000, 0x3000, b"rw-p", 0, 5), (0x3000, 0x4000, b"r--p", 0x2000, 5), 1),
    "gap in memory": ((0x1000, 0x3000, b"rw-p", 0, 5), (0x4000, 0x5000, b"rw-p", 0x2000, 5), 2),
    "gap in the file": ((0x1000, 0x3000, b"rw-p", 0, 5), (0x3000, 0x4000, b"rw-p", 0x3000, 5), 2),
    "another file": ((0x1000, 0x3000, b"rw-p", 0, 5), (0x3000, 0x4000, b"rw-p", 0x2000, 6), 2),
    "shared": ((0x1000, 0x3000, b"rw-p", 0, 5), (0x3000, 0x4000, b"rw-s", 0x2000, 5), 2),
    "not readable": ((0x1000, 0x3000, b"rw-p", 0, 5), (0x3000, 0x4000, b"---p", 0x2000, 5), 2),
}


@pytest.mark.parametrize(("first", "second", "count"), PARTS.values(), ids=PARTS.keys())
def test_parts_that_continue_are_one(first, second, count):
    found = parse_mappings(LINE % first + b"\n" + LINE % second + b"\n")
    assert len(found) == count
    assert found[0].start == 0x1000
    assert found[-1].end == second[1]


def test_addresses_are_found():
    one, two = (FileMapping(a, a + 10, 0, 1, 1, "/w", True, True) for a in (100, 110))
    table = MappingTable([two, one])
    assert table.find(100, 110) == table.find(109, 110) == one
    assert table.find(110, 120) == two
    for outside in [(99, 101), (109, 111), (119, 121), (120, 121), (0, 1)]:
        assert table.find(*outside) is None
    assert MappingTable([]).find(1, 2) is None


@pytest.mark.parametrize("name", ["plain", "two  blanks ", "a\nb", "tab\t\rreturn", "é\udcff", "it was (deleted)"])
def test_own_mappings_are_found_whatever_the_file_is_called(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(bytes(3 * PAGE))
    fd = os.open(path, os.O_RDONLY)
    try:
        memory = map_private(fd, PAGE, PAGE + 1)
        shared = map_file(fd, 0, PAGE)
    finally:
        os.close(fd)
    address = ctypes.addressof(memory)
    found, other = (read_mappings().find(a, a + 1) for a in (address, shared))
    unmap(shared, PAGE)
    facts = path.stat()
    assert (found.path, found.inode, found.device) == (str(path), facts.st_ino, facts.st_dev)
    assert (found.private, found.readable) == (True, True)
    assert address - found.start + found.offset == PAGE
    assert not other.private


def test_a_mapping_divided_by_rights_is_one(tmp_path):
    path = tmp_path / "w"
    path.write_bytes(bytes(4 * PAGE))
    with path.open("rb") as file:
        memory = map_private(file.fileno(), 0, 4 * PAGE)
    address = ctypes.addressof(memory)
    libc = ctypes.CDLL(None)
    assert libc.mprotect(ctypes.c_void_p(address + PAGE), ctypes.c_size_t(PAGE), mmap.PROT_READ) == 0
    assert read_mappings().find(address, address + 4 * PAGE) is not None
    assert libc.mprotect(ctypes.c_void_p(address + PAGE), ctypes.c_size_t(PAGE), 0) == 0
    table = read_mappings()
    assert table.find(address, address + 4 * PAGE) is None
    assert not table.find(address + PAGE, address + 2 * PAGE).readable
    assert libc.mprotect(ctypes.c_void_p(address + PAGE), ctypes.c_size_t(PAGE), mmap.PROT_READ) == 0
