"""GGUF headers: read as the format says, and refused for anything else, whatever the bytes are."""

import os
import random
import struct
import time

import gguf_files as g
import pytest

from wan_loader import CheckpointError, open_checkpoint
from wan_loader.formats import gguf as read_here
from wan_loader.formats.checkpoint_facts import contiguous_strides
from wan_loader.formats.gguf import GgufFormat

F32 = bytes(range(24))
Q8 = bytes(34 * 4)


def sound(**options):
    tensors = {"a": (0, (2, 3), F32), "b.weight": (8, (2, 64), Q8), "c": (30, (5,), bytes(10))}
    return g.gguf_bytes(tensors, [g.string("general.architecture", "wan")], **options)


def opened(tmp_path, content):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    return open_checkpoint(path)


def refused(tmp_path, content, match):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=match) as caught:
        GgufFormat().read(str(path), None)
    assert str(path) in str(caught.value)
    return caught.value


def test_facts_of_a_sound_file(tmp_path):
    checkpoint = opened(tmp_path, sound())
    assert checkpoint.format == "gguf"
    assert checkpoint.metadata == {"general.architecture": "wan"}
    assert [(t.name, t.dtype, t.shape) for t in checkpoint.tensors] == [
        ("a", "float32", (2, 3)),
        ("b.weight", "uint8", (2, 68)),
        ("c", "bfloat16", (5,)),
    ]
    (name,) = checkpoint.quantised
    one = checkpoint.quantised[name]
    assert (name, one.kind, one.raw, one.problem) == ("b.weight", "Q8_0", checkpoint.tensors[1], None)
    assert one.value == one.raw._replace(dtype="float32", shape=(2, 64), stride=contiguous_strides((2, 64)))
    content = sound()
    first = checkpoint.storages[0]
    assert content[first.start : first.start + first.nbytes] == F32
    assert [s.start % 32 for s in checkpoint.storages] == [0, 0, 0]


def test_the_writer_of_these_tests_writes_what_the_gguf_package_reads(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    shape = [g.integers("comfy.gguf.orig_shape.b.weight", [2, 1, 64])]
    path.write_bytes(g.gguf_bytes({"a": (0, (2, 3), F32), "b.weight": (8, (2, 64), Q8)}, shape))
    read = {t.name: t for t in gguf.GGUFReader(path).tensors}
    ours = open_checkpoint(path)
    for facts in ours.tensors:
        theirs = read[facts.name]
        assert tuple(theirs.data.shape) == facts.shape
        assert theirs.data_offset == ours.storages[facts.storage].start
        assert theirs.n_bytes == ours.storages[facts.storage].nbytes


def test_what_the_gguf_package_writes_is_read(tmp_path):
    gguf, np = pytest.importorskip("gguf"), pytest.importorskip("numpy")
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_array("comfy.gguf.orig_shape.patch", [4, 1, 1, 8])
    writer.add_array("tokens", ["a", "bc", ""])
    writer.add_float32("x", 0.5)
    writer.add_bool("y", True)
    writer.add_tensor("patch", np.ones((4, 8), np.float16))
    weight = np.linspace(-1, 1, 512, dtype=np.float32).reshape(4, 128)
    writer.add_tensor(
        "w", gguf.quantize(weight, gguf.GGMLQuantizationType.Q4_0), raw_dtype=gguf.GGMLQuantizationType.Q4_0
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(path)
    assert {t.name: (t.dtype, t.shape) for t in checkpoint.tensors} == {
        "patch": ("float16", (4, 1, 1, 8)),
        "w": ("uint8", (4, 72)),
    }
    assert checkpoint.quantised["w"].value.shape == (4, 128)
    assert checkpoint.metadata["general.architecture"] == "wan"


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_alignment(tmp_path, alignment):
    tensors = {"a": (0, (3,), bytes(12)), "b": (0, (1,), bytes(4))}
    content = g.gguf_bytes(tensors, [g.number("general.alignment", alignment)], alignment=alignment)
    starts = [s.start for s in opened(tmp_path, content).storages]
    assert [start % alignment for start in starts] == [0, 0]
    assert starts[1] - starts[0] == max(alignment, 16 // alignment * alignment)


def test_original_shapes(tmp_path):
    metadata = [g.integers("comfy.gguf.orig_shape.q", [2, 4, 1, 2, 4]), g.integers("comfy.gguf.orig_shape.f", [3, 2])]
    checkpoint = opened(tmp_path, g.gguf_bytes({"q": (8, (2, 32), bytes(68)), "f": (0, (6,), F32)}, metadata))
    assert checkpoint.tensors[0].shape == (2, 34), "the file's own bytes"
    assert checkpoint.quantised["q"].value.shape == (2, 4, 1, 2, 4)
    assert checkpoint.tensors[1].shape == (3, 2)


@pytest.mark.parametrize("shape", [[2, 16], [-2, -32], [64, 0], []])
def test_an_original_shape_of_other_elements(tmp_path, shape):
    content = g.gguf_bytes({"q": (8, (2, 32), bytes(68))}, [g.integers("comfy.gguf.orig_shape.q", shape)])
    assert refused(tmp_path, content, "which is no shape of its 64 elements").tensor == "q"


def test_an_original_shape_that_is_none(tmp_path):
    content = g.gguf_bytes({"q": (8, (2, 32), bytes(68))}, [g.string("comfy.gguf.orig_shape.q", "2x32")])
    refused(tmp_path, content, "which is no shape")


def test_a_kind_whose_numbers_are_not_made_is_still_opened(tmp_path):
    one = opened(tmp_path, g.gguf_bytes({"w": (23, (256,), bytes(136))})).quantised["w"]
    assert (one.kind, one.raw.shape) == ("IQ4_XS", (136,))
    assert "IQ4_XS" in one.problem


@pytest.mark.parametrize("number", [4, 31, 99, 2**32 - 1])
def test_a_type_that_is_not_known(tmp_path, number):
    error = refused(
        tmp_path, g.gguf_bytes({"w.x": (number, (256,), bytes(136))}), f"number {number}, which is not known"
    )
    assert error.tensor == "w.x"


@pytest.mark.parametrize(
    ("version", "said"), [(1, "version 1"), (4, "version 4"), (0, "version 0"), (3 << 24, "big-endian")]
)
def test_other_versions(tmp_path, version, said):
    refused(tmp_path, g.header(version=version), said)


def test_a_file_of_settings_alone_is_no_checkpoint(tmp_path):
    """Rather than nothing at all."""
    refused(tmp_path, g.gguf_bytes({}, [g.string("general.architecture", "wan")]), "is GGUF without a tensor")


def test_truncated_anywhere(tmp_path):
    content = sound()
    for length in range(4, len(content)):
        error = refused(tmp_path, content[:length], "truncated")
        assert error.remedy == "download it again"


def test_what_lies_behind_the_last_tensor_is_padding(tmp_path):
    assert len(opened(tmp_path, g.padded(sound())).tensors) == 3


INFO = g.tensor_info("w", (8,), 0, 0)
ATTACKS = {
    "tensors": (g.header(n_tensors=2**63), "9223372036854775808 tensors"),
    "keys": (g.header(n_keys=10**7), "10000000 entries of metadata"),
    "a key's length": (g.header(n_keys=1) + struct.pack("<Q", 2**64 - 1), "a key of 18446744073709551615 bytes"),
    "a string's length": (
        g.header(metadata=[g.text("k") + struct.pack("<IQ", g.STRING, 2**40)]),
        "a string of 1099511627776 bytes",
    ),
    "an array's length": (
        g.header(metadata=[g.text("k") + struct.pack("<IIQ", g.ARRAY, 0, 2**62)]),
        "longer than 100000000 bytes",
    ),
    "an array of nothing": (
        g.header(metadata=[g.text("k") + struct.pack("<IIQ", g.ARRAY, g.STRING, 2**62)]),
        "truncated",
    ),
    "nested arrays": (
        g.header(metadata=[g.text("k") + struct.pack("<I", g.ARRAY) + struct.pack("<IQ", g.ARRAY, 1) * 2000]),
        "arrays within arrays",
    ),
    "a type of metadata": (g.header(metadata=[g.text("k") + struct.pack("<I", 77)]), "metadata of unknown type 77"),
    "a type in an array": (
        g.header(metadata=[g.text("k") + struct.pack("<IIQ", g.ARRAY, 77, 3)]),
        "metadata of unknown type 77",
    ),
    "a key twice": (g.header(metadata=[g.number("k", 1), g.number("k", 2)]), "'k' stands there twice"),
    "a key that is no text": (g.header(metadata=[g.number(b"\xff\xfe", 1)]), "a key is no UTF-8"),
    "a name that is no text": (g.header([g.tensor_info(b"\xff", (1,), 0, 0)]), "name is no UTF-8"),
    "a name's length": (g.header(n_tensors=1) + struct.pack("<Q", 2**31), "name of 2147483648 bytes"),
    "a name twice": (g.padded(g.header([INFO, INFO])) + bytes(64), "'w': stands there twice"),
    "dimensions": (g.header([g.tensor_info("w", (1,) * 9, 0, 0)]), "9 dimensions"),
    "many dimensions": (g.header(n_tensors=1) + g.text("w") + struct.pack("<I", 2**32 - 1), "4294967295 dimensions"),
    "a size": (g.header([g.tensor_info("w", (2**62, 2**62), 0, 0)]), "larger than any tensor"),
    "a size of more than there is": (g.padded(g.header([g.tensor_info("w", (2**40,), 0, 0)])), "truncated"),
    "rows of parts of blocks": (g.header([g.tensor_info("w", (33,), 8, 0)]), "not made of Q8_0's blocks"),
    "no rows": (g.header([g.tensor_info("w", (), 12, 0)]), "not made of Q4_K's blocks"),
    "a place inside another": (
        g.padded(g.header([INFO, g.tensor_info("v", (8,), 0, 0)])) + bytes(64),
        "'.' begins at byte 0 of the data and overlaps what is before it: 32 was expected",
    ),
    "a place that is not aligned": (
        g.padded(g.header([INFO, g.tensor_info("v", (8,), 0, 36)])) + bytes(80),
        "'v' begins at byte 36 of the data and is out of place",
    ),
    "a gap": (
        g.padded(g.header([INFO, g.tensor_info("v", (8,), 0, 64)])) + bytes(96),
        "'v' begins at byte 64 of the data and is out of place",
    ),
    "a place beyond everything": (g.padded(g.header([g.tensor_info("w", (8,), 0, 2**64 - 32)])), "is out of place"),
    "an alignment of nothing": (g.header(metadata=[g.number("general.alignment", 0)]), "general.alignment is 0"),
    "an odd alignment": (g.header(metadata=[g.number("general.alignment", 48)]), "general.alignment is 48"),
    "a huge alignment": (g.header(metadata=[g.number("general.alignment", 2**31)]), "general.alignment is 2147483648"),
    "an alignment in words": (g.header(metadata=[g.string("general.alignment", "32")]), "general.alignment is '32'"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused_at_once(tmp_path, attack):
    content, said = ATTACKS[attack]
    started = time.monotonic()
    refused(tmp_path, content, said)
    assert time.monotonic() - started < 1


def test_many_strings_are_capped(tmp_path, monkeypatch):
    monkeypatch.setattr(read_here, "_MAX_STRINGS", 5)
    strings = g.text("k") + struct.pack("<IIQ", g.ARRAY, g.STRING, 6) + g.text("") * 6
    refused(tmp_path, g.header(metadata=[strings]), "more than 5 strings")


def test_a_file_that_is_exchanged_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(sound())
    read = read_here._read_header

    def exchanged(header):
        (tmp_path / "other").write_bytes(sound())
        os.utime(path, ns=(0, 0))
        return read(header)

    monkeypatch.setattr(read_here, "_read_header", exchanged)
    with pytest.raises(CheckpointError, match="was modified while it was being loaded"):
        GgufFormat().read(str(path), None)


def test_damage_is_an_error_of_ours_or_opens(tmp_path):
    """A few bytes of the header changed, five hundred times: never another error, and never a tensor outside."""
    content, rng, path = sound(), random.Random(3), tmp_path / "m.gguf"
    end = content.index(F32)
    n_refused = 0
    for _ in range(500):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 2, 4))):
            damaged[rng.randrange(4, end)] = rng.choice((0, 1, 255, 127, 128, rng.randrange(256)))
        path.write_bytes(damaged)
        try:
            checkpoint = GgufFormat().read(str(path), None)
        except CheckpointError:
            n_refused += 1
        else:
            assert all(s.start >= 0 and s.start + s.nbytes <= len(content) for s in checkpoint.storages)
    assert n_refused > 100
