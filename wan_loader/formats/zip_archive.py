"""The records of a zip archive by the rules of miniz, which is what torch reads its checkpoints with.

Python's zipfile reads some archives differently: which end of the directory counts, whether names differ by case,
where an archive begins after other bytes, what a zip64 field means. What torch refuses is refused here; where its
answer hangs on an accident (two records whose names differ by case alone), or is no answer (what it takes for a
directory stays uninitialised memory), the archive is refused too. Checksums are not checked, as torch checks none.

Only the directory is read, and of each record that is asked for its 30 bytes of header.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from wan_loader.errors import CheckpointError
from wan_loader.formats.nested_parts import shown

__all__ = ["MAX_DIRECTORY_BYTES", "Record", "ZipArchive", "read_archive"]

#: A record takes 60 to 100 bytes, and there is one for each tensor.
MAX_DIRECTORY_BYTES = 64 << 20

_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_END_BYTES, _END64_BYTES, _LOCATOR64_BYTES, _ENTRY_BYTES, _HEADER_BYTES = 22, 56, 20, 46, 30
#: How miniz looks for the end of the directory: in blocks from the end of the file backwards, which overlap by three
#: bytes, until 65557 bytes are seen; it never looks into a block that would begin before the file.
_BLOCK_BYTES, _STEP_BYTES, _MAX_STEPS = 4096, 4093, 16
#: Signature, flags, method, sizes packed and unpacked, lengths of name, extra and comment, disk, attributes, header.
_ENTRY = struct.Struct("<4s4xHH8xIIHHHHxxII")
_UNKNOWN = 0xFFFFFFFF
_MASKED, _ENCRYPTED, _IS_DIRECTORY = 1 << 13, 1 | 1 << 5 | 1 << 6, 0x10


class Record(NamedTuple):
    """A record as the directory has it. `header` is where its header begins; `refusal` is why it cannot be read."""

    header: int
    nbytes: int
    refusal: str


class ZipArchive:
    """The records of one open file, found by their names below the archive's one folder, regardless of case."""

    __slots__ = ("_fd", "_folder", "_nbytes", "_records", "path")

    def __init__(self, path: str, fd: int, nbytes: int, folder: bytes, records: dict[bytes, Record]) -> None:
        self.path = path
        self._fd = fd
        self._nbytes = nbytes
        self._folder = folder.lower()
        self._records = records

    def __contains__(self, name: str) -> bool:
        return self._folder + name.encode().lower() in self._records

    def find(self, name: str) -> Record | None:
        """Return a record that can be read, or None if there is none of that name.

        Raises:
            CheckpointError: It is there, and cannot be read.
        """
        record = self._records.get(self._folder + name.encode().lower())
        if record is not None and record.refusal:
            raise CheckpointError(f"{self.path}: record {shown(name)} {record.refusal}", path=self.path)
        return record

    def start_of(self, name: str, record: Record) -> int:
        """Return where a record's bytes begin in the file.

        Raises:
            CheckpointError: The record is not there, or not all of it.
        """
        header = os.pread(self._fd, _HEADER_BYTES, record.header)
        if len(header) < _HEADER_BYTES or header[:4] != b"PK\x03\x04":
            raise CheckpointError(
                f"{self.path}: record {shown(name)} is not where the directory says: damaged file", path=self.path
            )
        # the header's own lengths, which may differ from the directory's: torch pads its extra field to align the data
        start = record.header + _HEADER_BYTES + header[26] + (header[27] << 8) + header[28] + (header[29] << 8)
        if start + record.nbytes > self._nbytes:
            raise CheckpointError(
                f"{self.path}: record {shown(name)} reaches beyond the end of the file: damaged file", path=self.path
            )
        return start

    def read(self, name: str, limit: int) -> bytes | None:
        """Return a record's bytes, or None if there is no such record.

        Raises:
            CheckpointError: It has more than `limit` bytes, or cannot be read.
        """
        record = self.find(name)
        if record is None:
            return None
        if record.nbytes > limit:
            raise CheckpointError(
                f"{self.path}: record {shown(name)} is larger than {limit} bytes: not a weights file", path=self.path
            )
        content = os.pread(self._fd, record.nbytes, self.start_of(name, record)) if record.nbytes else b""
        if len(content) < record.nbytes:
            raise CheckpointError.because("is changing while it is read", "wait until it is complete", path=self.path)
        return content


def read_archive(path: str, fd: int, nbytes: int) -> ZipArchive:
    """Read the directory of the archive in an open file of `nbytes` bytes.

    Raises:
        CheckpointError: It is damaged, or an archive that torch did not write.
    """
    try:
        directory, count, disk = _read_directory(fd, nbytes)
        folder, records = _parse(directory, count, disk, nbytes)
    except _DamageError as error:
        raise CheckpointError(
            f"{path} is truncated or damaged: {error}; download it again", path=path, remedy="download it again"
        ) from None
    except _ForeignError as error:
        raise CheckpointError(
            f"{path} is a zip archive, but not a torch checkpoint: {error}; unpack it, and load what is in it",
            path=path,
            remedy="unpack it, and load what is in it",
        ) from None
    return ZipArchive(path, fd, nbytes, folder, records)


class _DamageError(Exception):
    """No archive that torch would read. Never leaves this module."""


class _ForeignError(Exception):
    """A sound archive of another kind. Never leaves this module."""


def _read_directory(fd: int, nbytes: int) -> tuple[bytes, int, int]:
    """Return the central directory, the number of its entries and the number of its disk."""
    last = max(nbytes - _BLOCK_BYTES, 0)
    tail_start = last - _STEP_BYTES * min(last // _STEP_BYTES, _MAX_STEPS)
    # the same bytes that miniz gets to see, all at once: another end further in must not count
    tail = os.pread(fd, nbytes - tail_start, tail_start)
    # the last one counts, and one whose 22 bytes do not fit into the file is none
    end = tail.rfind(_END, 0, max(len(tail) - _END_BYTES + len(_END), 0))
    if len(tail) < nbytes - tail_start or end < 0:
        raise _DamageError("the end of the zip directory is missing")
    disk, directory_disk, here, count, size, start = struct.unpack_from("<HHHHII", tail, end + 4)
    # torch writes a zip64 end always; its numbers count, whatever the plain one says
    if end64 := _read_end64(fd, nbytes, tail_start + end):
        disk, directory_disk, here, count, size, start = end64
    # miniz takes disks 0 and 1, and nothing that is spread over several
    if count != here or disk != directory_disk or disk > 1:
        raise _DamageError("the archive is one of several volumes")
    if size > MAX_DIRECTORY_BYTES:
        raise _DamageError(f"its zip directory of {size} bytes is larger than {MAX_DIRECTORY_BYTES}")
    if size < count * _ENTRY_BYTES or start + size > nbytes:
        raise _DamageError("the zip directory is not where the end says")
    return os.pread(fd, size, start), count, disk


def _read_end64(fd: int, nbytes: int, end: int) -> tuple[int, ...] | None:
    """Return what a zip64 end says in place of the plain one, if there is one before it."""
    if end < _LOCATOR64_BYTES + _END64_BYTES:
        return None
    locator = os.pread(fd, _LOCATOR64_BYTES, end - _LOCATOR64_BYTES)
    if locator[:4] != _LOCATOR64:
        return None
    start, disks = struct.unpack_from("<QI", locator, 8)
    if start > nbytes - _END64_BYTES:
        raise _DamageError("the zip64 directory is outside the file")
    end64 = os.pread(fd, _END64_BYTES, start)
    if end64[:4] != _END64:
        return None
    size_of_end, disk, directory_disk, here, count, size, directory = struct.unpack_from("<Q4xIIQQQQ", end64, 4)
    # its length does not count the signature and itself
    if size_of_end < _END64_BYTES - 12 or disks != 1:
        raise _DamageError("the zip64 directory makes no sense")
    return disk, directory_disk, here, count, size, directory


def _parse(directory: bytes, count: int, disk: int, nbytes: int) -> tuple[bytes, dict[bytes, Record]]:
    """Return the folder that all records lie in, with its slash, and the records by their names in lower case."""
    if not count:
        raise _ForeignError("it is empty")
    folder = _first_folder(directory)
    records: dict[bytes, Record] = {}
    position, unpack = 0, _ENTRY.unpack_from
    for _ in range(count):
        if position + _ENTRY_BYTES > len(directory):
            raise _DamageError("the zip directory is cut")
        signature, flags, method, packed, size, n_name, n_extra, n_comment, volume, attributes, header = unpack(
            directory, position
        )
        end_of_name = position + _ENTRY_BYTES + n_name
        name = directory[position + _ENTRY_BYTES : end_of_name]
        position = end_of_name + n_extra + n_comment
        if signature != b"PK\x01\x02" or position > len(directory) or flags & _MASKED or volume not in (disk, 1):
            raise _DamageError("the zip directory makes no sense")
        if not name.startswith(folder) or b"\0" in name or not _is_text(name):
            raise _ForeignError("its records do not lie in one folder, or their names are no text")
        if _UNKNOWN in (packed, size, header):
            packed, size, header = _wide(directory[end_of_name : end_of_name + n_extra], packed, size, header)
        # a stored record is as long as it was; one that was packed to nothing held nothing
        if (packed != size and not method) or (size and not packed) or header + _HEADER_BYTES + packed > nbytes:
            raise _DamageError(f"record {shown(name.decode('utf-8', 'replace'))} does not fit into the file")
        refusal = ""
        if method or flags & _ENCRYPTED or attributes & _IS_DIRECTORY or name.endswith(b"/"):
            refusal = _refusal(method, flags)
        name = name.lower()
        if name in records:
            refusal = "stands twice in the archive, if its case does not count: which one is meant is unknown"
        records[name] = Record(header, size, refusal)
    return folder, records


def _is_text(name: bytes) -> bool:
    if not name.isascii():
        try:
            name.decode()
        except UnicodeDecodeError:
            return False
    return True


def _first_folder(directory: bytes) -> bytes:
    """Return the folder of the first record, which torch looks for all others in."""
    n_name = int.from_bytes(directory[28:30], "little")
    name = directory[_ENTRY_BYTES : _ENTRY_BYTES + n_name]
    end = name.find(b"/")
    if end < 0:
        raise _ForeignError("its records do not lie in one folder")
    return name[: end + 1]


def _wide(extra: bytes, packed: int, size: int, header: int) -> tuple[int, int, int]:
    """Return the numbers that did not fit into 32 bits, from the first zip64 field among the extra ones."""
    position = 0
    while position < len(extra):
        if position + 4 > len(extra):
            raise _DamageError("an extra field is cut")
        kind, nbytes = struct.unpack_from("<HH", extra, position)
        field = extra[position + 4 : position + 4 + nbytes]
        if len(field) < nbytes:
            raise _DamageError("an extra field is cut")
        if kind == 1:
            # only the numbers that did not fit are there, in this order
            wide = iter(int.from_bytes(field[i : i + 8], "little") for i in range(0, nbytes - 7, 8))
            try:
                size = next(wide) if size == _UNKNOWN else size
                packed = next(wide) if packed == _UNKNOWN else packed
                return packed, size, next(wide) if header == _UNKNOWN else header
            except StopIteration:
                raise _DamageError("a zip64 field is cut") from None
        position += 4 + nbytes
    return packed, size, header


def _refusal(method: int, flags: int) -> str:
    if flags & _ENCRYPTED:
        return "is encrypted: unpack the archive with its password, and pack it again without"
    if method:
        return (
            "is compressed, so its bytes cannot be read in place: save it plain, "
            "with torch.save(torch.load(path, weights_only=True), path)"
        )
    return "is a directory: damaged file"
