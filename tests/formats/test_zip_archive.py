"""Archives that Python's zipfile and torch read differently: the bytes that torch takes, or a refusal."""

import io
import struct
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))
from versions import needs_torch
from zips import WIDE, Archive, Entry

from wan_loader import CheckpointError, load_file, open_checkpoint

ONE, TWO = struct.pack("<2f", 1, 1), struct.pack("<2f", 7, 7)
REFUSED = "refused"


def data_pkl():
    stream = io.BytesIO()
    torch.save({"w": torch.ones(2)}, stream)
    with zipfile.ZipFile(stream) as archive:
        return archive.read("archive/data.pkl")


PICKLE = data_pkl()


def records(first=ONE, *more, **fields):
    """The records of a checkpoint whose storage is `first`, with more records after it."""
    return [
        Entry(b"x/data.pkl", PICKLE),
        Entry(b"x/byteorder", b"little"),
        Entry(b"x/data/0", first, **fields),
        *more,
        Entry(b"x/version", b"3\n"),
    ]


def two_directories():
    """Bodies of two archives, and two directories: the first ends first, the second last."""
    old, new = Archive(records(TWO)).write(), Archive(records(ONE), before=Archive(records(TWO)).write()).write()
    return old, new


def wide_field(*numbers):
    return struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers)


def place_of_second():
    """Where the header of a second storage begins."""
    content = Archive(records(ONE, Entry(b"x/data/1", TWO))).write()
    return content.index(b"x/data/1") - 30


CASES = {
    "plain": (Archive(records()).write(), [1, 1]),
    "checksums are none": (Archive(records(TWO)).write(), [7, 7]),
    "two archives one after the other": (two_directories()[1], [1, 1]),
    "a comment that is an end of another directory": (
        Archive(records(ONE), before=two_directories()[0], comment=two_directories()[0][-22:]).write(),
        [7, 7],
    ),
    "a comment with half an end": (
        Archive(records(ONE), before=two_directories()[0], comment=two_directories()[0][-22:-4]).write(),
        [1, 1],
    ),
    "bytes after the end": (Archive(records(), after=bytes(3000)).write(), [1, 1]),
    "too many bytes after the end": (Archive(records(), after=bytes(70_000)).write(), REFUSED),
    "bytes before the archive": (bytes(64) + Archive(records()).write(), REFUSED),
    "an archive before, of the same places": (Archive(records(TWO)).write() + Archive(records()).write(), [7, 7]),
    "names that differ by case": (Archive(records(ONE, Entry(b"x/DATA/0", TWO))).write(), REFUSED),
    "the same name twice": (Archive(records(ONE, Entry(b"x/data/0", TWO))).write(), REFUSED),
    "another case than asked for": (
        Archive([Entry(e.name.replace(b"data/", b"Data/"), e.content) for e in records()]).write(),
        [1, 1],
    ),
    "a name with a zero": (Archive(records(ONE, Entry(b"x/data/0\0z", TWO))).write(), REFUSED),
    "a name that is no text": (Archive(records(ONE, Entry(b"x/\xff", TWO))).write(), REFUSED),
    "two folders": (Archive([Entry(b"y/version", b"3\n"), *records()]).write(), REFUSED),
    "no folder": (Archive([Entry(e.name[2:], e.content) for e in records()]).write(), REFUSED),
    "a folder in a folder": (Archive([Entry(b"q/" + e.name, e.content) for e in records()]).write(), REFUSED),
    "a folder of no name": (Archive([Entry(e.name[1:], e.content) for e in records()]).write(), [1, 1]),
    "swapped names in the directory": (
        Archive(
            [
                *records()[:2],
                Entry(b"x/data/1", ONE, local_name=b"x/data/0"),
                Entry(b"x/data/0", TWO, local_name=b"x/data/1"),
                records()[-1],
            ]
        ).write(),
        [7, 7],
    ),
    "extra bytes in the local header": (Archive(records(ONE, local_extra=bytes(40))).write(), [1, 1]),
    "a zip64 directory": (Archive(records(), zip64=True).write(), [1, 1]),
    "a zip64 directory beside the plain one": (Archive(records(), zip64=True, other_end=1).write(), [1, 1]),
    "a zip64 directory elsewhere": (Archive(records(), zip64=True, zip64_shift=2**40).write(), REFUSED),
    "zip64 records": (Archive([Entry(e.name, e.content, zip64=True) for e in records()]).write(), [1, 1]),
    "a zip64 field that nobody asked for": (Archive(records(ONE, extra=wide_field(place_of_second()))).write(), [1, 1]),
    "a zip64 field that is cut": (
        Archive(records(ONE, packed=WIDE, nbytes=WIDE, extra=wide_field(8))).write(),
        REFUSED,
    ),
    "an extra field that is cut": (Archive(records(ONE, nbytes=WIDE, extra=b"\1\0\x40\0")).write(), REFUSED),
    "several volumes": (Archive(records(ONE, disk=2)).write(), REFUSED),
    "fewer entries than there are": (Archive(records(), count=2).write(), REFUSED),
    "more entries than there are": (Archive(records(), count=6).write(), REFUSED),
    "compressed": (Archive(records(ONE * 1, method=8)).write(), REFUSED),
    "encrypted": (Archive(records(ONE, flags=1)).write(), REFUSED),
    "masked": (Archive(records(ONE, flags=1 << 13)).write(), REFUSED),
    "a data descriptor": (Archive(records(ONE, flags=8)).write(), [1, 1]),
    "what looks like a directory": (Archive(records(ONE, attributes=0x10)).write(), REFUSED),
    "a symbolic link": (Archive(records(ONE, attributes=0o120777 << 16)).write(), [1, 1]),
    "a size of one more": (Archive(records(ONE, nbytes=9, packed=9)).write(), REFUSED),
    "two sizes": (Archive(records(ONE, nbytes=9)).write(), REFUSED),
    "a header elsewhere": (Archive(records(ONE, shift=7)).write(), REFUSED),
    "big-endian": (
        Archive([*records()[:1], Entry(b"x/byteorder", b"big"), *records()[2:]]).write(),
        [4.600602988224807e-41] * 2,
    ),
    "no byte order that is one": (
        Archive([*records()[:1], Entry(b"x/byteorder", b"Little"), *records()[2:]]).write(),
        REFUSED,
    ),
    "no version": (Archive(records()[:-1]).write(), REFUSED),
    "too new a version": (Archive([*records()[:-1], Entry(b"x/version", b"11")]).write(), REFUSED),
    "the version of a package": (Archive([*records()[:-1], Entry(b"x/.data/version", b"3")]).write(), [1, 1]),
}


@pytest.mark.parametrize("case", CASES)
def test_an_archive_is_read_as_torch_reads_it_or_refused(tmp_path, case):
    content, expected = CASES[case]
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    if expected == REFUSED:
        with pytest.raises(CheckpointError) as caught:
            load_file(path)
        assert caught.value.path == str(path)
        return
    assert load_file(path)["w"].tolist() == expected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.load(path, weights_only=True)["w"].tolist() == expected


def test_other_records_may_be_anything(tmp_path):
    path = tmp_path / "model.pth"
    notes = Entry(b"x/notes.txt", b"hello " * 100, method=8)
    path.write_bytes(Archive(records(ONE, notes)).write())
    assert load_file(path)["w"].tolist() == [1, 1]


def test_what_a_compressed_or_encrypted_record_needs_is_said(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(Archive(records(ONE, method=8)).write())
    with pytest.raises(CheckpointError, match=r"'data/0' is compressed.*torch\.save"):
        open_checkpoint(path)
    path.write_bytes(Archive(records(ONE, flags=1)).write())
    with pytest.raises(CheckpointError, match=r"encrypted.*password"):
        open_checkpoint(path)


def test_a_file_that_torch_saved_twice_into(tmp_path):
    path = tmp_path / "model.pth"
    with path.open("wb") as f:
        torch.save({"w": torch.ones(2)}, f)
        torch.save({"w": torch.full((2,), 7.0)}, f)
    try:
        expected = torch.load(path, weights_only=True)["w"].tolist()
    except RuntimeError:
        expected = None
    if expected is None:
        with pytest.raises(CheckpointError):
            load_file(path)
    else:
        assert load_file(path)["w"].tolist() == expected


@needs_torch(2, 6, "files always have checksums")
def test_checkpoints_without_checksums_are_sound(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(4.0)}, tmp_path / "model.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert load_file(tmp_path / "model.pth")["w"].tolist() == [0, 1, 2, 3]


def test_archives_of_programs_are_named(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Identity()).save(str(tmp_path / "script.pt"))
        with torch.package.PackageExporter(str(tmp_path / "package.pt")) as exporter:
            exporter.save_pickle("weights", "weights.pkl", {"w": torch.ones(2)})
    (tmp_path / "export.pt").write_bytes(
        Archive([Entry(b"e/archive_format", b"pt2"), Entry(b"e/version", b"3")]).write()
    )
    (tmp_path / "plain.pt").write_bytes(Archive([Entry(b"e/notes.txt", b"hello")]).write())
    for name, words in {
        "script": r"TorchScript.*torch\.jit\.load",
        "package": r"torch\.package.*PackageImporter",
        "export": r"torch\.export.*torch\.export\.load",
        "plain": r"not a torch checkpoint.*unpack it",
    }.items():
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(tmp_path / f"{name}.pt")
