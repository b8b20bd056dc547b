"""The manifest is untrusted: it comes back as it was written, or is one `CacheError`."""

import json

import hypothesis
import pytest
from hypothesis import strategies as st

from wan_loader.cache.manifest import (
    BLOCK_BYTES,
    MAX_MANIFEST_BYTES,
    EntryFile,
    Manifest,
    digest,
    is_plain,
    parse_manifest,
)
from wan_loader.cache.outline import SourceIdentity
from wan_loader.errors import CacheError


def manifest(**changes):
    values = {
        "key": "0" * 32,
        "label": "/models/ü \udcff'\"\n",
        "dtype": "bfloat16",
        "created": 1700000000.25,
        "sources": (SourceIdentity("/models/m.safetensors", 10, 2**62, 4, 5),),
        "files": (
            EntryFile("model.safetensors", BLOCK_BYTES + 1, 4096, ("a" * 32, "b" * 32, "c" * 32), 2**62, 2**62 + 1),
            EntryFile("sub/config.json", 3, 0, ("d" * 32,)),
            EntryFile("empty.txt", 0, 0, ()),
        ),
        "contents": ("e" * 32,),
    }
    return Manifest(**{**values, **changes})


def forged(**changes):
    """With changed fields, and a checksum that fits; None removes a field."""
    body = json.loads(manifest().to_bytes())
    body.update(changes)
    body = {k: v for k, v in body.items() if v is not ... and k != "digest"}
    return json.dumps({**body, "digest": digest(json.dumps(body, sort_keys=True).encode())}, indent=1).encode()


def refused(text, match=None):
    with pytest.raises(CacheError, match=match) as caught:
        parse_manifest(text, "/cache/manifest.json")
    assert caught.value.path == "/cache/manifest.json"
    assert str(caught.value).startswith("/cache/manifest.json")


@pytest.mark.parametrize("changes", [{}, {"contents": ()}, {"dtype": None}, {"files": (), "sources": ()}])
def test_comes_back(changes):
    assert parse_manifest(manifest(**changes).to_bytes(), "m") == manifest(**changes)


def test_a_forged_one_is_only_refused_for_what_is_wrong_in_it():
    assert parse_manifest(forged(), "m") == manifest()


def test_every_flipped_bit_is_found():
    text = manifest().to_bytes()
    for i in range(len(text)):
        for bit in range(8):
            refused(text[:i] + bytes([text[i] ^ 1 << bit]) + text[i + 1 :])


def test_every_truncation_and_addition_is_found():
    text = manifest().to_bytes()
    for i in range(len(text)):
        refused(text[:i])
    for more in (b" ", b"\n", b"\0", b"{}", text):
        refused(text + more)
        refused(more + text)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"\0" * 100,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"format_version": 1}',
        b'{"format_version": 1, "format_version": 1}',
        b"9" * 10_000,
        b'{"format_version": ' + b"9" * 10_000 + b"}",
    ],
)
def test_garbage(text):
    refused(text)


@pytest.mark.parametrize("depth", range(900, 1010, 3))
def test_deep_nesting(depth):
    refused(b'{"format_version": 1, "a": ' + b"[" * depth + b"]" * depth + b"}")


def test_a_large_one():
    refused(b" " * (MAX_MANIFEST_BYTES + 1), "larger than")


@pytest.mark.parametrize("version", [0, 2, 10**30, "1", None, ..., 1.5, [1]])
def test_another_version(version):
    refused(forged(format_version=version), "format version")


FILE = json.loads(manifest().to_bytes())["files"][1]
SOURCE = json.loads(manifest().to_bytes())["sources"][0]
WRONG = [
    {"key": 5},
    {"key": ...},
    {"label": None},
    {"dtype": 3},
    {"created": "now"},
    {"created": None},
    {"created": ...},
    {"more": 1},
    {"sources": None},
    {"sources": "abc"},
    {"sources": [5]},
    {"sources": [{**SOURCE, "more": 1}]},
    {"sources": [{**SOURCE, "nbytes": -1}]},
    {"sources": [{**SOURCE, "nbytes": 2**63}]},
    {"sources": [{**SOURCE, "nbytes": 1.0}]},
    {"sources": [{**SOURCE, "nbytes": True}]},
    {"sources": [{**SOURCE, "path": 7}]},
    {"contents": 5},
    {"contents": [5]},
    {"files": {}},
    {"files": 7},
    {"files": ["x"]},
    {"files": [{}]},
    {"files": [{**FILE, "blocks": 5}]},
    {"files": [{**FILE, "blocks": [5]}]},
    {"files": [{**FILE, "blocks": ["d" * 32] * 2}]},
    {"files": [{**FILE, "blocks": []}]},
    {"files": [{**FILE, "nbytes": 10**18}]},
    {"files": [{**FILE, "nbytes": 10**400}]},
    {"files": [{**FILE, "header_nbytes": 4}]},
    {"files": [{**FILE, "header_nbytes": -4096}]},
    {"files": [{**FILE, "mtime_ns": -1, "ctime_ns": 1}]},
    {"files": [{**FILE, "mtime_ns": "1", "ctime_ns": 1}]},
    {"files": [{**FILE, "mtime_ns": 1, "ctime_ns": None}]},
]


@pytest.mark.parametrize("changes", WRONG, ids=repr)
def test_a_wrong_field_under_a_right_checksum(changes):
    if changes == {"files": {}}:
        changes = {"files": {"0": 1}}
    refused(forged(**changes))


@pytest.mark.parametrize(
    "path", ["", ".", "..", "/etc/passwd", "a/../b", "../x", "a//b", "a/", "a\nb", "a\0b", "a/b/c/d/e", "\udcff"]
)
def test_paths_that_leave_the_entry(path):
    assert not is_plain(path)
    refused(forged(files=[{**FILE, "path": path}]), "not inside")


@hypothesis.given(
    header=st.one_of(st.just(0), st.integers(1, 3 * BLOCK_BYTES), st.integers(1, 5).map(lambda n: n * 4096)),
    data=st.one_of(st.integers(0, 5 * BLOCK_BYTES), st.integers(0, 4).map(lambda n: n * BLOCK_BYTES)),
)
def test_blocks_cover_a_file_once(header, data):
    file = EntryFile("x", header + data, header, ())
    ranges = list(file.ranges())
    assert len(ranges) == file.n_blocks
    position = 0
    for start, end in ranges:
        assert start == position < end
        assert end % BLOCK_BYTES == 0 or end in (header, header + data)
        position = end
    assert position == header + data
