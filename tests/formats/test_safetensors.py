"""The safetensors header: true facts for good files, one clear error that names file and tensor for bad ones."""

import json
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
import versions
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file as reference_load
from safetensors.torch import save_file

from wan_loader import CheckpointError, MissingFileError, WanLoaderError, load_file, open_checkpoint
from wan_loader.formats.safetensors import MAX_HEADER_BYTES

DTYPES = list(versions.IN_SAFETENSORS.values())
SHAPES = [(), (0,), (1,), (7,), (3, 0, 5), (3, 5), (2, 3, 5, 7), (1, 1, 1)]


def some_bits(dtype, shape):
    """A tensor of any dtype, filled with a repeating byte pattern (NaNs and denormals included)."""
    element = torch.empty(0, dtype=dtype).element_size()
    nbytes = torch.Size(shape).numel() * element
    raw = (torch.arange(nbytes, dtype=torch.int64) * 37 + 11).to(torch.uint8)
    if dtype is torch.bool:
        raw %= 2
    return raw.view(dtype).reshape(shape) if nbytes else torch.empty(shape, dtype=dtype)


def raw_bytes(tensor):
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def write(path, header, data=b"", *, length=None):
    """A .safetensors of any header: bytes as they are, everything else as JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


# Good files


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_facts_of_every_dtype(path, dtype):
    shapes = [s for s in SHAPES if s] if str(dtype) == "torch.float4_e2m1fn_x2" else SHAPES
    tensors = {f"block.{i}.weight": some_bits(dtype, shape) for i, shape in enumerate(shapes)}
    save_file(tensors, path)
    checkpoint = open_checkpoint(path)
    content = path.read_bytes()
    assert checkpoint.format == "safetensors"
    assert checkpoint.warnings == ()
    assert set(checkpoint.names) == set(tensors)
    for facts in checkpoint.tensors:
        expected = tensors[facts.name]
        storage = checkpoint.storages[facts.storage]
        assert facts.dtype == str(dtype).removeprefix("torch.")
        assert facts.shape == tuple(expected.shape)
        assert facts.stride == torch.empty(expected.shape).stride()
        assert facts.offset == 0
        assert facts.nbytes == storage.nbytes == expected.nbytes
        assert content[storage.start : storage.start + storage.nbytes] == raw_bytes(expected)


def test_totals_metadata_and_file_order(path):
    save_file(
        {"small": torch.ones(3, dtype=torch.int8), "large": torch.ones(5), "scalar": torch.tensor(1.0)},
        path,
        metadata={"format": "pt", "note": "äöü"},
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.path == str(path)
    assert checkpoint.metadata == {"format": "pt", "note": "äöü"}
    assert checkpoint.nbytes == 3 + 20 + 4
    assert checkpoint.nbytes_file == path.stat().st_size
    assert [f.path for f in checkpoint.files] == [str(path)]
    starts = [checkpoint.storages[t.storage].start for t in checkpoint.tensors]
    assert starts == sorted(starts)


@pytest.mark.parametrize("header", [{}, {"__metadata__": {"a": "b"}}], ids=["nothing", "metadata only"])
def test_no_tensors(path, header):
    checkpoint = open_checkpoint(write(path, header))
    assert (checkpoint.names, checkpoint.nbytes) == ((), 0)
    assert load_file(path) == {}


ODD_HEADERS = {
    "metadata is null": b'{"__metadata__":null,"two":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "unknown field": b'{"two":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"extra":[{"x":null}]}}',
    "metadata like an entry": b'{"__metadata__":{"dtype":"a","shape":"b","data_offsets":"c"},'
    b'"two":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "an entry with escapes": b'{"tw\\u006f":{"dtyp\\u0065":"F32","shape":[2],"data_offsets":[0,8]}}',
    "a pair of surrogates": b'{"\\ud83d\\ude00":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
}


@pytest.mark.parametrize("case", ODD_HEADERS)
def test_odd_headers_are_read_as_the_reference_reads_them(path, case):
    write(path, ODD_HEADERS[case], struct.pack("<2f", 1.5, -2.5))
    expected, loaded = reference_load(path), load_file(path)
    assert loaded.keys() == expected.keys()
    assert [t.tolist() for t in loaded.values()] == [[1.5, -2.5]]


def test_tensors_named_as_the_fields_of_an_entry(path):
    save_file({name: torch.full((2,), float(i)) for i, name in enumerate(["dtype", "shape", "data_offsets"])}, path)
    assert {name: t.tolist() for name, t in load_file(path).items()} == {
        "dtype": [0, 0],
        "shape": [1, 1],
        "data_offsets": [2, 2],
    }


def test_order_in_the_header_does_not_matter(path):
    header = {"second": entry(offsets=(8, 16)), "first": entry(), "none": entry(shape=(0,), offsets=(8, 8))}
    checkpoint = open_checkpoint(write(path, header, bytes(range(16))))
    assert checkpoint.names == ("first", "none", "second")
    loaded = load_file(path)
    assert all(
        torch.equal(loaded[name].view(torch.int32), t.view(torch.int32)) for name, t in reference_load(path).items()
    )


@pytest.mark.parametrize("misalign", range(4))
def test_data_section_at_any_alignment(path, misalign):
    header = json.dumps({"a": entry()}).encode()
    header += b" " * (-(8 + len(header)) % 4 + misalign)
    write(path, header, struct.pack("<2f", 1.5, -2.5))
    storage = open_checkpoint(path).storages[0]
    assert storage.start == 8 + len(header)
    assert load_file(path)["a"].tolist() == [1.5, -2.5]


def test_names_of_any_kind(path):
    names = ["", "a b", "a.b/c", "日本", "\x00", 'quo"te', "[bold]"]
    save_file({name: torch.tensor([float(i)]) for i, name in enumerate(names)}, path)
    loaded = load_file(path)
    assert [loaded[name].item() for name in names] == list(range(len(names)))


# Bad files: the message names the file, and the tensor where there is one

BAD_TENSORS = {
    "overlap": ({"one": entry(), "two": entry(offsets=(4, 12))}, 12, "two"),
    "same range": ({"one": entry(), "two": entry()}, 8, "two"),
    "gap": ({"one": entry(), "two": entry(offsets=(12, 20))}, 20, "two"),
    "gap at the start": ({"two": entry(offsets=(4, 12))}, 12, "two"),
    "out of range": ({"two": entry(offsets=(0, 8))}, 7, "two"),
    "far out of range": ({"two": entry("U8", (2**62,), (0, 2**62))}, 16, "two"),
    "reversed offsets": ({"two": entry(offsets=(8, 0))}, 8, "two"),
    "negative offset": ({"two": entry(offsets=(-8, 0))}, 8, "two"),
    "shape too large for the range": ({"two": entry(shape=(3,))}, 8, "two"),
    "shape too small for the range": ({"two": entry(shape=(1,))}, 8, "two"),
    "dtype of another size": ({"two": entry("F64")}, 8, "two"),
    "negative dimension": ({"two": entry(shape=(-2,))}, 8, "two"),
    "two negative dimensions": ({"two": entry(shape=(-1, -2))}, 8, "two"),
    "fractional dimension": ({"two": entry(shape=(2.0,))}, 8, "two"),
    "boolean dimension": ({"two": entry(shape=(2, True))}, 8, "two"),
    "huge dimension": ({"two": entry(shape=(2**64 + 2,))}, 8, "two"),
    "dimensions that overflow": ({"two": entry(shape=(2**62, 2**62))}, 8, "two"),
    "shape is no list": ({"two": {**entry(), "shape": 2}}, 8, "two"),
    "offsets of three": ({"two": entry(offsets=(0, 8, 8))}, 8, "two"),
    "offsets of one": ({"two": entry(offsets=(8,))}, 8, "two"),
    "offsets are strings": ({"two": entry(offsets=("0", "8"))}, 8, "two"),
    "unknown dtype": ({"two": entry("F7")}, 8, "two"),
    "dtype is no string": ({"two": entry(["F32"])}, 8, "two"),
    "dtype is null": ({"two": entry(None)}, 8, "two"),
    "no dtype": ({"two": {"shape": [2], "data_offsets": [0, 8]}}, 8, "two"),
    "no offsets": ({"two": {"dtype": "F32", "shape": [2]}}, 8, "two"),
    "unknown field in place of one": ({"two": {"dtype": "F32", "shape": [2], "offsets": [0, 8]}}, 8, "two"),
    "entry is a list": ({"two": [1, 2]}, 8, "two"),
    "entry is null": ({"two": None}, 8, "two"),
    "odd packed fp4": ({"two": entry("F4", (3,), (0, 2))}, 2, "two"),
    "scalar packed fp4": ({"two": entry("F4", (), (0, 1))}, 1, "two"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensor_is_named(path, case):
    header, nbytes, name = BAD_TENSORS[case]
    write(path, header, bytes(nbytes))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert repr(name) in str(caught.value)
    assert isinstance(caught.value, ValueError)


BAD_HEADERS = {
    "empty file": b"",
    "length cut": b"\x01\x02\x03",
    "header cut": struct.pack("<Q", 100) + b'{"a":',
    "header missing": struct.pack("<Q", 100),
    "length 0": struct.pack("<Q", 0),
    "length 2^63": struct.pack("<Q", 2**63) + b"{}",
    "length 2^64 - 1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "length over the cap": struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}",
    "not JSON": struct.pack("<Q", 7) + b"weights",
    "not UTF-8": struct.pack("<Q", 4) + b'{"\xff"',
    "a list": struct.pack("<Q", 2) + b"[]",
    "a number": struct.pack("<Q", 2) + b"42",
    "two documents": struct.pack("<Q", 4) + b"{}{}",
    "metadata of numbers": struct.pack("<Q", 24) + b'{"__metadata__":{"a":1}}',
    "metadata is a list": struct.pack("<Q", 19) + b'{"__metadata__":[]}',
    "bytes after the last tensor": struct.pack("<Q", 2) + b"{}" + b"\x00",
    "NaN": struct.pack("<Q", 71) + b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":NaN,"y":[1,2]}}',
    "lone surrogate": struct.pack("<Q", 57) + b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
    "deeply nested": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "number of 5000 digits": struct.pack("<Q", 5006) + b'{"a":' + b"9" * 5000 + b"}",
    "a web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "a git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header_is_refused(path, case):
    path.write_bytes(BAD_HEADERS[case])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_truncated_data_says_truncated(path):
    save_file({"one": torch.ones(100), "two": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "'two'" in str(caught.value)


def test_truncated_header_says_truncated(path):
    save_file({"one": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "header",
    [
        b'{"two":%b,"two":%b}' % ((json.dumps(entry()).encode(),) * 2),
        b'{"one":%b,"two":%b,"two":%b}'
        % tuple(json.dumps(entry(offsets=o)).encode() for o in ((0, 8), (8, 16), (16, 24))),
    ],
    ids=["same", "different"],
)
def test_duplicate_names(path, header):
    write(path, header, bytes(24 if b"one" in header else 8))
    with pytest.raises(CheckpointError, match="'two'") as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_duplicate_field_of_a_tensor(path):
    write(path, b'{"two":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', bytes(8))
    with pytest.raises(CheckpointError, match="dtype"):
        open_checkpoint(path)


def test_duplicate_metadata(path):
    write(path, b'{"__metadata__":{"a":"b"},"__metadata__":{"a":"c"}}')
    with pytest.raises(CheckpointError, match="__metadata__"):
        open_checkpoint(path)


def test_missing_file(path):
    with pytest.raises(MissingFileError) as caught:
        open_checkpoint(path)
    assert caught.value.path == str(path)
    with pytest.raises(FileNotFoundError):
        open_checkpoint(path)


def test_not_a_regular_file():
    with pytest.raises(CheckpointError, match="/dev/null"):
        open_checkpoint("/dev/null")


def test_zero_dimension_beside_dimensions_that_overflow(path):
    write(path, {"two": entry("U8", (2**62, 2**62, 0), (0, 0))})
    with pytest.raises(CheckpointError) as caught:
        load_file(path)
    assert caught.value.tensor == "two"


# Bad headers cost no more than good ones of the same size


def test_duplicate_among_many_names_is_found_quickly(path):
    pairs = [f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(15_000)]
    write(path, ("{" + ",".join([*pairs, pairs[-1]]) + "}").encode())
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="'14999'"):
        open_checkpoint(path)
    assert time.perf_counter() - start < 1


def test_absurd_rank_is_refused_quickly(path):
    write(path, {"two": entry("U8", [2**62] * 40_000, (0, 8))}, bytes(8))
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.value.tensor == "two"
    assert time.perf_counter() - start < 1
    assert len(str(caught.value)) < 2000, "an error message for a person, not the header again"


@pytest.mark.parametrize("repeated", [b"[],", b"{},", b"[", b'{"a":', b'"",'])
def test_a_header_of_brackets_takes_little_memory(path, repeated):
    """Measured from outside Python's allocator: 4 MiB of `[],` were 100 MiB."""
    header = b'{"a":[' + repeated * ((2 << 20) // len(repeated)) + b"0]}"
    write(path, header)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        assert caught.value.path == str(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < (64 << 20) + 12 * len(header)


# Random damage


def small_file():
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": entry("F32", (2, 2), (0, 16)),
        "b": entry("BF16", (), (16, 18)),
        "c": entry("U8", (6,), (18, 24)),
        "empty": entry("I64", (0, 3), (24, 24)),
    }
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(range(24))


GOOD = small_file()


def test_a_file_cut_anywhere_is_refused(path):
    for nbytes in range(len(GOOD)):
        path.write_bytes(GOOD[:nbytes])
        with pytest.raises(CheckpointError, match="truncated"):
            open_checkpoint(path)


DAMAGE = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, len(GOOD) - 1), st.integers(0, 255)),
        st.tuples(st.just("flip"), st.integers(0, len(GOOD) - 1), st.integers(0, 7)),
        st.tuples(st.just("cut"), st.integers(0, len(GOOD)), st.just(0)),
        st.tuples(st.just("insert"), st.integers(0, len(GOOD)), st.integers(0, 255)),
        st.tuples(st.just("repeat"), st.integers(0, len(GOOD)), st.integers(1, 64)),
    ),
    min_size=1,
    max_size=4,
)


def damaged(content, steps):
    out = bytearray(content)
    for kind, position, value in steps:
        position = min(position, max(0, len(out) - 1))
        if kind == "cut":
            del out[position:]
        elif kind == "insert":
            out.insert(position, value)
        elif kind == "repeat":
            out[position:position] = out[position : position + value]
        elif out:
            out[position] = value if kind == "set" else out[position] ^ (1 << value)
    return bytes(out)


@settings(max_examples=400, deadline=2000, database=None, derandomize=True)
@given(steps=DAMAGE)
@example(steps=[("set", 7, 0x80)])
def test_damage_is_an_error_of_ours_or_loads_as_the_reference_does(tmp_path_factory, steps):
    path = Path(tmp_path_factory.getbasetemp()) / "fuzz.safetensors"
    path.write_bytes(damaged(GOOD, steps))
    try:
        loaded = load_file(path)
    except WanLoaderError:
        return
    expected = reference_load(path)
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert raw_bytes(loaded[name]) == raw_bytes(tensor)
