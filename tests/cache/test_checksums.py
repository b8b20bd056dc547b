"""Checksums find every flipped bit of an entry, whatever is missing, and whatever is too much."""

import os
import shutil

import pytest

from wan_loader.cache.build import content_digest
from wan_loader.cache.checksums import BlockCheck, check_entry, check_header, check_sources
from wan_loader.cache.manifest import BLOCK_BYTES, MANIFEST_NAME, EntryFile, Manifest, digest
from wan_loader.cache.outline import SourceIdentity
from wan_loader.errors import CacheError, CheckpointError

HEADER = 4096


@pytest.fixture
def entry(tmp_path):
    """Two and a half blocks after a header, beside a small and an empty file."""
    directory = tmp_path / "entry"
    (directory / "text").mkdir(parents=True)
    data = os.urandom(4096) * (5 * BLOCK_BYTES // 2 // 4096) + b"odd"
    (directory / "model.safetensors").write_bytes(data)
    (directory / "text" / "config.json").write_bytes(b"{}")
    (directory / "empty.txt").touch()
    (directory / MANIFEST_NAME).touch()
    model = EntryFile("model.safetensors", len(data), HEADER, ())
    model = EntryFile(model.path, model.nbytes, HEADER, tuple(digest(data[a:b]) for a, b in model.ranges()))
    files = (model, EntryFile("text/config.json", 2, 0, (digest(b"{}"),)), EntryFile("empty.txt", 0, 0, ()))
    manifest = Manifest(key="k", label="m", dtype=None, created=0, sources=(), files=files)
    assert len(model.blocks) == 4
    return directory, manifest


def test_a_sound_one(entry):
    told = []
    assert check_entry(*entry, told.append) == []
    assert sum(told) == entry[1].nbytes


PLACES = [0, 7, HEADER - 1, HEADER, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES - 1, 2 * BLOCK_BYTES, 30_000_001, -1]


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize("place", PLACES)
def test_a_flipped_bit(entry, place, bit):
    directory, manifest = entry
    file = directory / "model.safetensors"
    with open(file, "r+b") as f:
        f.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 1 << bit]))
    (problem,) = check_entry(directory, manifest)
    assert str(file) in problem
    assert "do not match their checksum" in problem
    if 0 <= place < HEADER:
        with pytest.raises(CacheError) as error:
            check_header(directory, manifest.files[0])
        assert error.value.path == str(directory / manifest.files[0].path)
        assert "header does not match" in error.value.reason
    else:
        check_header(directory, manifest.files[0])


def test_a_small_file(entry):
    (entry[0] / "text" / "config.json").write_bytes(b"[]")
    (problem,) = check_entry(*entry)
    assert "text/config.json" in problem


@pytest.mark.parametrize("name", ["model.safetensors", "text/config.json", "empty.txt"])
def test_missing(entry, name):
    (entry[0] / name).unlink()
    assert check_entry(*entry) == [f"{entry[0] / name} is missing"]


@pytest.mark.parametrize(("name", "nbytes"), [("model.safetensors", 5000), ("model.safetensors", 0), ("empty.txt", 1)])
def test_of_another_size(entry, name, nbytes):
    os.truncate(entry[0] / name, nbytes)
    problems = check_entry(*entry)
    assert f"{entry[0] / name} has {nbytes} bytes, not {dict(sizes(entry))[name]}" in problems


def sizes(entry):
    return [(file.path, file.nbytes) for file in entry[1].files]


def test_too_much(entry, tmp_path):
    (entry[0] / "text" / "more").touch()
    (entry[0] / "link").symlink_to(entry[0] / "empty.txt")
    (entry[0] / "directory").symlink_to(tmp_path)
    (entry[0] / "broken").symlink_to("/nowhere")
    problems = check_entry(*entry)
    assert len(problems) == 4
    assert all("does not belong" in p for p in problems)


def test_a_link_in_place_of_a_file(entry, tmp_path):
    for name in ("text/config.json", "model.safetensors"):
        shutil.move(entry[0] / name, tmp_path / "away")
        (entry[0] / name).symlink_to(tmp_path / "away")
        assert any(name in p for p in check_entry(*entry))
        (entry[0] / name).unlink()
        shutil.move(tmp_path / "away", entry[0] / name)
    assert check_entry(*entry) == []


def test_blocks_while_they_are_read(entry):
    directory, manifest = entry
    file = manifest.files[0]
    check = BlockCheck(directory / file.path, file)
    data = (directory / file.path).read_bytes()
    for start, end in file.ranges():
        check(0, start, end, memoryview(data)[start:end])
    damaged = bytearray(data[HEADER:BLOCK_BYTES])
    damaged[100] ^= 1
    with pytest.raises(CacheError) as error:
        check(0, HEADER, BLOCK_BYTES, memoryview(damaged))
    assert error.value.path == str(directory / file.path)
    assert f"bytes {HEADER} to {BLOCK_BYTES} do not match" in error.value.reason
    with pytest.raises(CacheError) as error:
        check(0, HEADER, HEADER + 5, memoryview(data)[HEADER : HEADER + 5])
    assert f"no checksum for bytes {HEADER} to {HEADER + 5}" in error.value.reason
    assert error.value.remedy == "load all tensors"


def test_a_header_that_cannot_be_read(entry):
    (entry[0] / "model.safetensors").unlink()
    with pytest.raises(CacheError) as error:
        check_header(entry[0], entry[1].files[0])
    assert error.value.path == str(entry[0] / "model.safetensors")
    assert "cannot be read" in error.value.reason


def test_contents_of_sources(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode() * 1000)
    manifest = Manifest(
        key="k",
        label="m",
        dtype=None,
        created=0,
        sources=tuple(SourceIdentity(str(p), 1000, 0, 0, 0) for p in paths),
        files=(),
        contents=tuple(content_digest(str(p)) for p in paths),
    )
    assert check_sources(manifest) == []
    paths[0].write_bytes(b"other")
    paths[1].unlink()
    (problem,) = check_sources(manifest)
    assert problem.startswith(str(paths[0]))
    with pytest.raises(CheckpointError) as error:
        content_digest(str(paths[1]))
    assert error.value.path == str(paths[1])
    assert "cannot be read" in error.value.reason
