"""Zip archives that are written field by field, so that each field can be wrong."""

from __future__ import annotations

import random
import struct
import zlib
from dataclasses import dataclass, field, replace

WIDE = 0xFFFFFFFF


@dataclass
class Entry:
    """A record, and what its headers say in place of the truth."""

    name: bytes
    content: bytes
    method: int = 0
    flags: int = 0
    nbytes: int | None = None
    packed: int | None = None
    shift: int = 0
    attributes: int = 0
    disk: int = 0
    extra: bytes = b""
    local_name: bytes | None = None
    local_extra: bytes = b""
    comment: bytes = b""
    zip64: bool = False


@dataclass
class Archive:
    """Records and the end of the directory."""

    entries: list[Entry]
    comment: bytes = b""
    before: bytes = b""
    after: bytes = b""
    zip64: bool = False
    zip64_shift: int = 0
    count: int | None = None
    directory_shift: int = 0
    other_end: int = 0
    names: list[bytes] = field(default_factory=list)

    def write(self) -> bytes:
        body = bytearray(self.before)
        directory = bytearray()
        for entry in self.entries:
            start = len(body)
            body += _local(entry) + _packed(entry)
            directory += _central(entry, start + entry.shift)
        first, count = len(body), len(self.entries) if self.count is None else self.count
        body += directory
        size, place = len(directory), max(first + self.directory_shift, 0)
        if self.zip64:
            at = len(body)
            body += struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, place)
            body += struct.pack("<4sIQI", b"PK\x06\x07", 0, max(at + self.zip64_shift, 0), 1)
            count, size, place = (count, size, place) if self.other_end else (0xFFFF, WIDE, WIDE)
        body += struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, size, place, len(self.comment))
        return bytes(body) + self.comment + self.after


def _packed(entry: Entry) -> bytes:
    if entry.method != 8:
        return entry.content
    pack = zlib.compressobj(wbits=-15)
    return pack.compress(entry.content) + pack.flush()


def _local(entry: Entry) -> bytes:
    name = entry.name if entry.local_name is None else entry.local_name
    sizes = (0, len(_packed(entry)), len(entry.content), len(name), len(entry.local_extra))
    return (
        struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, entry.flags, entry.method, 0, 0, *sizes) + name + entry.local_extra
    )


def _central(entry: Entry, start: int) -> bytes:
    nbytes = len(entry.content) if entry.nbytes is None else entry.nbytes
    packed = len(_packed(entry)) if entry.packed is None else entry.packed
    start, extra = max(start, 0), entry.extra
    if entry.zip64:
        extra += struct.pack("<HHQQQ", 1, 24, nbytes, packed, start)
        nbytes = packed = start = WIDE
    head = struct.pack("<4s6H", b"PK\x01\x02", 20, 20, entry.flags, entry.method, 0, 0)
    sizes = struct.pack("<3I", 0, packed & WIDE, nbytes & WIDE)
    lengths = struct.pack(
        "<5HII", len(entry.name), len(extra), len(entry.comment), entry.disk, 0, entry.attributes, start & WIDE
    )
    return head + sizes + lengths + entry.name + extra + entry.comment


def mutate_archive(archive: Archive, rng: random.Random) -> Archive:
    """One to three changes of the records or of the directory."""
    out = replace(archive, entries=[replace(entry) for entry in archive.entries])
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if out.entries:
            rng.choice(_CHANGES)(out, rng)
    return out


def _pick(archive: Archive, rng: random.Random) -> Entry:
    storages = [entry for entry in archive.entries if b"/data/" in entry.name]
    return rng.choice(storages if storages and rng.random() < 0.6 else archive.entries)


def _swap_contents(archive: Archive, rng: random.Random) -> None:
    one, two = _pick(archive, rng), _pick(archive, rng)
    one.content, two.content = two.content, one.content


def _swap_names(archive: Archive, rng: random.Random) -> None:
    one, two = _pick(archive, rng), _pick(archive, rng)
    one.local_name, two.local_name = one.name, two.name
    one.name, two.name = two.name, one.name


def _double(archive: Archive, rng: random.Random) -> None:
    entry = _pick(archive, rng)
    name = rng.choice((entry.name, entry.name.upper(), entry.name.swapcase(), entry.name + b"\0x", entry.name + b"/"))
    content = bytes(reversed(entry.content))
    archive.entries.insert(rng.randint(0, len(archive.entries)), replace(entry, name=name, content=content))


def _rename(archive: Archive, rng: random.Random) -> None:
    entry = _pick(archive, rng)
    folder, _, base = entry.name.partition(b"/")
    entry.name = rng.choice(
        (
            entry.name.upper(),
            entry.name.swapcase(),
            folder + b"/" + base.title(),
            b"other/" + base,
            b"./" + base,
            base,
            entry.name + b"/",
            entry.name.replace(b"/", b"\\"),
            entry.name + b"\0",
            entry.name + b"\xff",
        )
    )


def _drop(archive: Archive, rng: random.Random) -> None:
    archive.entries.remove(_pick(archive, rng))


def _shuffle(archive: Archive, rng: random.Random) -> None:
    rng.shuffle(archive.entries)


def _resize(archive: Archive, rng: random.Random) -> None:
    entry = _pick(archive, rng)
    length = len(entry.content)
    value = rng.choice((0, 1, length - 1, length + 1, length // 2, 2**31, WIDE, WIDE - 1))
    which = rng.choice(("nbytes", "packed", "both", "both"))
    if which != "packed":
        entry.nbytes = max(value, 0)
    if which != "nbytes":
        entry.packed = max(value, 0)


def _recontent(archive: Archive, rng: random.Random) -> None:
    entry = _pick(archive, rng)
    entry.content = rng.choice(
        (b"", entry.content[:-1], entry.content + b"\0", entry.content * 2, b"big", b"little", b"3")
    )


def _flag(archive: Archive, rng: random.Random) -> None:
    _pick(archive, rng).flags ^= 1 << rng.randrange(16)


def _attribute(archive: Archive, rng: random.Random) -> None:
    _pick(archive, rng).attributes = rng.choice((0x10, 0o120777 << 16, 1 << rng.randrange(32)))


def _method(archive: Archive, rng: random.Random) -> None:
    _pick(archive, rng).method = rng.choice((8, 8, 8, 1, 12, 93))


def _move(archive: Archive, rng: random.Random) -> None:
    _pick(archive, rng).shift = rng.choice((1, -1, 30, -30, 64, -64, rng.randint(-2000, 2000), 2**31))


def _disk(archive: Archive, rng: random.Random) -> None:
    _pick(archive, rng).disk = rng.choice((1, 2, 0xFFFF))


def _extra(archive: Archive, rng: random.Random) -> None:
    entry = _pick(archive, rng)
    fields = (
        b"",
        struct.pack("<HHQ", 1, 8, rng.choice((0, 64, 500))),
        struct.pack("<HHQQQ", 1, 24, len(entry.content), len(entry.content), rng.randint(0, 2000)),
        struct.pack("<HHH", 0x4246, 2, 0),
        struct.pack("<HH", 1, 0),
        struct.pack("<HH", 1, 200),
        b"\1",
    )
    entry.extra = rng.choice(fields) + rng.choice(fields)
    entry.zip64 = rng.random() < 0.5


def _local_extra(archive: Archive, rng: random.Random) -> None:
    _pick(archive, rng).local_extra = bytes(rng.choice((1, 4, 8, 16, 60)))


def _wide(archive: Archive, rng: random.Random) -> None:
    _pick(archive, rng).zip64 = True


def _all_wide(archive: Archive, rng: random.Random) -> None:
    archive.zip64 = True
    archive.other_end = rng.randrange(2)
    archive.zip64_shift = rng.choice((0, 0, 0, 1, -1, 56, 2**40))


def _count(archive: Archive, rng: random.Random) -> None:
    archive.count = max(len(archive.entries) + rng.choice((-1, 1, -len(archive.entries), 1000)), 0)


def _directory(archive: Archive, rng: random.Random) -> None:
    archive.directory_shift = rng.choice((-1, 1, -46, 46, 1000))


def _comment(archive: Archive, rng: random.Random) -> None:
    whole = archive.write()
    archive.comment = rng.choice(
        (b"hello", whole[-22:], whole[-22:] + b"x", whole[-24:], b"PK\5\6", b"PK\5\6" + bytes(18))
    )


def _around(archive: Archive, rng: random.Random) -> None:
    whole = archive.write()
    content = rng.choice((b"\0" * 64, whole, whole[:-22], b"PK\3\4" + bytes(60), bytes(65600), bytes(70000)))
    if rng.random() < 0.5:
        archive.before = content
    else:
        archive.after = content


_CHANGES = [
    _swap_contents,
    _swap_names,
    _double,
    _rename,
    _drop,
    _shuffle,
    _resize,
    _recontent,
    _flag,
    _attribute,
    _method,
    _move,
    _disk,
    _extra,
    _local_extra,
    _wide,
    _all_wide,
    _count,
    _directory,
    _comment,
    _around,
]
