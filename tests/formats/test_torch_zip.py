"""Torch zip checkpoints: true facts without torch, shared storages and strides kept, and nothing is ever executed."""

import io
import os
import pickle
import struct
import subprocess
import textwrap
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import versions
from hypothesis import example, given, settings
from hypothesis import strategies as st
from programs import ROOT, run

from wan_loader import CheckpointError, MissingFileError, WanLoaderError, load_file, open_checkpoint

DTYPES = [dtype for name, dtype in versions.DTYPES.items() if not name.startswith("bits")]
SHAPES = [(), (0,), (1,), (7,), (3, 0, 5), (3, 5), (2, 3, 5, 7)]


def some_bits(dtype, shape):
    """A tensor of any dtype, filled with a repeating byte pattern (NaNs and denormals included)."""
    element = torch.empty(0, dtype=dtype).element_size()
    nbytes = torch.Size(shape).numel() * element
    raw = (torch.arange(nbytes, dtype=torch.int64) * 37 + 11).to(torch.uint8)
    if dtype is torch.bool:
        raw %= 2
    return raw.view(dtype).reshape(shape) if nbytes else torch.empty(shape, dtype=dtype)


def raw_bytes(tensor):
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def built_from_facts(checkpoint, name):
    """A tensor made of nothing but the facts and the file's bytes."""
    facts = next(t for t in checkpoint.tensors if t.name == name)
    storage = checkpoint.storages[facts.storage]
    dtype = getattr(torch, facts.dtype)
    with open(checkpoint.files[storage.file].path, "rb") as f:
        f.seek(storage.start)
        content = bytearray(f.read(storage.nbytes))
    memory = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    return torch.empty(0, dtype=dtype).set_(memory.untyped_storage(), facts.offset, facts.shape, facts.stride)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pth"


# Files made by hand: any pickle, any records


class Storage:
    """Becomes a persistent id."""

    def __init__(self, key="0", numel=4, kind=torch.FloatStorage, tag="storage"):
        self.id = (tag, kind, key, "cpu", numel)


class View:
    """Becomes a call of `_rebuild_tensor_v2` with exactly these arguments."""

    def __init__(self, storage, shape, stride, offset=0, metadata=None):
        more = () if metadata is None else (metadata,)
        self.arguments = (storage, offset, shape, stride, False, OrderedDict(), *more)

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


class Call:
    """Becomes a call of any function with any arguments."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.id if isinstance(value, Storage) else None


def pickled(state):
    out = io.BytesIO()
    Pickler(out, protocol=2).dump(state)
    return out.getvalue()


def write(path, state, records=None, *, compress=zipfile.ZIP_STORED, prefix="model/", extra=()):
    """A zip checkpoint: `state` pickled (or the bytes of data.pkl), `records` under their keys."""
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr(prefix + "data.pkl", state if isinstance(state, bytes) else pickled(state))
        for key, content in (records if records is not None else {"0": bytes(16)}).items():
            archive.writestr(f"{prefix}data/{key}", content)
        archive.writestr(prefix + "version", b"3\n")
        for name, content in extra:
            archive.writestr(name, content)
    return path


# Good files


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_facts_of_every_dtype(path, dtype):
    tensors = {f"block.{i}.weight": some_bits(dtype, shape) for i, shape in enumerate(SHAPES)}
    torch.save(tensors, path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == "torch-zip"
    assert checkpoint.warnings == ()
    assert set(checkpoint.names) == set(tensors)
    for facts in checkpoint.tensors:
        expected = tensors[facts.name]
        assert facts.dtype == str(dtype).removeprefix("torch.")
        assert facts.shape == tuple(expected.shape)
        assert facts.nbytes == expected.nbytes
        assert raw_bytes(built_from_facts(checkpoint, facts.name)) == raw_bytes(expected)


def test_totals_and_file_order(path):
    torch.save({f"w{i}": torch.full((i + 1,), float(i)) for i in range(12)}, path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.path == str(path)
    assert checkpoint.nbytes == sum(4 * (i + 1) for i in range(12))
    assert checkpoint.nbytes_file == path.stat().st_size
    starts = [checkpoint.storages[t.storage].start for t in checkpoint.tensors]
    assert starts == sorted(starts)


def test_shared_storages_stay_shared_and_count_once(path):
    base = torch.arange(24, dtype=torch.float32)
    torch.save({"whole": base, "tied": base, "row": base.view(4, 6)[2], "own": torch.zeros(3)}, path)
    checkpoint = open_checkpoint(path)
    facts = {t.name: t for t in checkpoint.tensors}
    assert facts["whole"].storage == facts["tied"].storage == facts["row"].storage != facts["own"].storage
    assert (facts["row"].offset, facts["row"].shape, facts["row"].stride) == (12, (6,), (1,))
    assert len(checkpoint.storages) == 2
    assert checkpoint.nbytes == 24 * 4 + 3 * 4


def test_one_storage_under_two_dtypes(path):
    content = struct.pack("<4f", 1, 2, 3, 4)
    storage = Storage(kind=torch.storage.UntypedStorage, numel=16)
    rest = (False, OrderedDict())
    floats = Call(torch._utils._rebuild_tensor_v3, storage, 0, (4,), (1,), *rest, torch.float32)
    shorts = Call(torch._utils._rebuild_tensor_v3, storage, 2, (3, 2), (2, 1), *rest, torch.uint16)
    write(path, {"floats": floats, "shorts": shorts}, {"0": content})
    checkpoint = open_checkpoint(path)
    facts = {t.name: t for t in checkpoint.tensors}
    assert (facts["floats"].dtype, facts["shorts"].dtype) == ("float32", "uint16")
    assert facts["floats"].storage == facts["shorts"].storage
    assert checkpoint.nbytes == 16
    assert raw_bytes(built_from_facts(checkpoint, "shorts")) == content[4:]
    assert load_file(path)["floats"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.t(),
        lambda t: t[1:, ::2],
        lambda t: t[2],
        lambda t: t[2, 3],
        lambda t: t[:, 1:1],
        lambda t: t[:1].expand(5, 6),
        lambda t: t.as_strided((3, 3), (2, 1), 1),
    ],
    ids=["transposed", "sliced", "row", "element", "nothing", "expanded", "overlapping"],
)
def test_strides_and_offsets_are_kept(path, view):
    expected = view(torch.arange(24, dtype=torch.float32).view(4, 6))
    torch.save({"w": expected}, path)
    checkpoint = open_checkpoint(path)
    (facts,) = checkpoint.tensors
    assert (facts.shape, facts.stride, facts.offset) == (
        tuple(expected.shape),
        expected.stride(),
        expected.storage_offset(),
    )
    assert torch.equal(built_from_facts(checkpoint, "w"), expected)


def test_state_dict_of_a_module_with_parameters_and_metadata(path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    torch.save(module.state_dict(), path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == "torch-zip"
    assert set(checkpoint.names) == set(module.state_dict())
    for name, expected in module.state_dict().items():
        assert torch.equal(built_from_facts(checkpoint, name), expected)


def test_parameters_are_tensors(path):
    parameter = torch.nn.Parameter(torch.arange(6.0))
    torch.save({"p": parameter, "q": torch.nn.Parameter(torch.zeros(2), requires_grad=False)}, path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == "torch-zip"
    assert torch.equal(built_from_facts(checkpoint, "p"), parameter.detach())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(path, protocol):
    torch.save({"w": torch.arange(5)}, path, pickle_protocol=protocol)
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == "torch-zip"
    assert torch.equal(built_from_facts(checkpoint, "w"), torch.arange(5))


@pytest.mark.parametrize("state", [{}, OrderedDict()], ids=["dict", "OrderedDict"])
def test_no_tensors(path, state):
    torch.save(state, path)
    assert open_checkpoint(path).names == ()
    assert load_file(path) == {}


def test_renamed_file_and_any_prefix(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "one.pt")
    (tmp_path / "one.pt").rename(tmp_path / "two.bin")
    assert open_checkpoint(tmp_path / "two.bin").names == ("w",)


def test_files_made_by_hand_are_read_as_torch_reads_them(path):
    content = struct.pack("<4f", 1, 2, 3, 4)
    write(path, {"w": View(Storage(), (2, 2), (1, 2))}, {"0": content})
    expected = torch.load(path, weights_only=True)["w"]
    assert torch.equal(built_from_facts(open_checkpoint(path), "w"), expected)


def test_a_conjugate_view_is_left_to_torch_and_said_so(path):
    expected = torch.tensor([1 + 2j, 3 - 4j]).conj()
    torch.save({"w": expected}, path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == "torch-pickle"
    assert "torch.load" in checkpoint.warnings[0]
    assert torch.equal(load_file(path)["w"].resolve_conj(), expected.resolve_conj())


# Pickles that want to run something

LEGACY = {"_use_new_zipfile_serialization": False}


def evil_calls(marker):
    command = f"touch {marker}"
    return {
        "os.system": Call(os.system, command),
        "subprocess": Call(subprocess.getoutput, command),
        "eval": Call(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Call(exec, f"open({str(marker)!r}, 'w')"),
        "getattr": Call(getattr, os, "system"),
        "open": Call(open, str(marker), "w"),
        "torch.load": Call(torch.load, str(marker)),
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["os.system", "subprocess", "eval", "exec", "open", "torch.load"])
def test_a_pickle_that_calls_something_is_refused_and_runs_nothing(tmp_path, path, name, legacy):
    marker = tmp_path / "executed"
    torch.save({"w": torch.ones(2), "x": evil_calls(marker)[name]}, path, **(LEGACY if legacy else {}))
    for read in (open_checkpoint, load_file):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert not marker.exists()


def test_the_evil_pickle_would_have_run(tmp_path, path):
    """Proof that the tests above could fail."""
    marker = tmp_path / "executed"
    torch.save({"x": Call(os.system, f"touch {marker}")}, path)
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("place", ["name", "storage", "shape", "persistent id", "build", "after the end"])
def test_a_call_hidden_anywhere_runs_nothing(tmp_path, path, place):
    marker = tmp_path / "executed"
    call = Call(os.system, f"touch {marker}")
    view = View(Storage(), (4,), (1,))
    state = {
        "name": {call: view},
        "storage": {"w": View(call, (4,), (1,))},
        "shape": {"w": View(Storage(), (call,), (1,))},
        "persistent id": {"w": View(Storage(key=call), (4,), (1,))},
        "build": {"w": view, "x": call},
        "after the end": pickled({"w": view})[:-1] + pickled(call)[2:],
    }[place]
    write(path, state)
    with pytest.raises(CheckpointError) as caught:
        load_file(path)
    assert str(path) in str(caught.value)
    assert not marker.exists()


def test_an_evil_pickle_under_a_safetensors_name_runs_nothing(tmp_path):
    marker = tmp_path / "executed"
    path = tmp_path / "model.safetensors"
    torch.save({"x": Call(os.system, f"touch {marker}")}, path)
    with pytest.raises(CheckpointError) as caught:
        load_file(path)
    assert caught.value.path == str(path)
    assert not marker.exists()


# Views and storages that are not what the file holds

BAD_VIEWS = {
    "too long": ((5,), (1,), 0),
    "offset too far": ((4,), (1,), 1),
    "stride too far": ((2, 2), (3, 1), 0),
    "negative offset": ((1,), (1,), -1),
    "negative size": ((-1,), (1,), 0),
    "negative stride": ((2,), (-1,), 1),
    "huge size": ((2**62,), (1,), 0),
    "size past 64 bits": ((2**64,), (0,), 0),
    "product past 64 bits": ((2**62, 2**62), (0, 0), 0),
    "huge stride": ((2,), (2**62,), 0),
    "huge offset": ((1,), (1,), 2**62),
    "more strides": ((2, 2), (1,), 0),
    "more sizes": ((2,), (1, 1), 0),
    "fractional size": ((2.0,), (1,), 0),
    "boolean size": ((True,), (1,), 0),
    "fractional offset": ((2,), (1,), 0.0),
    "empty, offset past the end": ((0,), (1,), 100),
    "empty, product past 64 bits": ((2**62, 2**62, 0), (1, 1, 1), 0),
}


@pytest.mark.parametrize("case", BAD_VIEWS)
def test_a_view_that_leaves_its_storage_is_named(path, case):
    shape, stride, offset = BAD_VIEWS[case]
    write(path, {"good": View(Storage(), (4,), (1,)), "bad": View(Storage(), shape, stride, offset)})
    if case == "empty, offset past the end":  # harmless: refusing it and loading it are both fine
        _loads_or_refuses(path)
        return
    with pytest.raises(CheckpointError) as caught:
        load_file(path)
    assert str(path) in str(caught.value)
    assert "'bad'" in str(caught.value)


def _loads_or_refuses(path):
    try:
        return load_file(path)
    except WanLoaderError:
        return None


@pytest.mark.parametrize("case", ["missing", "shorter", "longer", "first of two sizes"])
def test_a_storage_that_its_record_contradicts(path, case):
    state = {"w": View(Storage(key="7"), (4,), (1,))}
    if case == "first of two sizes":
        state = {"v": View(Storage(key="7", numel=2), (2,), (1,)), **state}
    records = {"missing": {}, "shorter": {"7": bytes(12)}, "longer": {"7": bytes(20)}}.get(case, {"7": bytes(16)})
    write(path, state, records)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "'7'" in str(caught.value) or "'w'" in str(caught.value) or "'v'" in str(caught.value)


BAD_IDS = {
    "not a storage": Storage(tag="module"),
    "key is a number": Storage(key=0),
    "key is a path": Storage(key="../data.pkl"),
    "negative count": Storage(numel=-1),
    "fractional count": Storage(numel=4.0),
    "huge count": Storage(numel=2**70),
    "kind is text": Storage(kind="FloatStorage"),
    "kind is a dict": Storage(kind={}),
}


@pytest.mark.parametrize("case", BAD_IDS)
def test_a_bad_persistent_id_is_refused(path, case):
    write(path, {"w": View(BAD_IDS[case], (1,), (1,))})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


BAD_STATES = {
    "a number": ({"w": View(Storage(), (4,), (1,)), "step": 3}, "'step'"),
    "nested dict": ({"state_dict": {"w": View(Storage(), (4,), (1,))}}, "'state_dict'"),
    "list of tensors": ({"all": [View(Storage(), (4,), (1,))]}, "'all'"),
    "none": ({"w": None}, "'w'"),
    "a bare storage": ({"w": Storage()}, "'w'"),
    "name is a number": ({7: View(Storage(), (4,), (1,))}, "7"),
    "a list": ([View(Storage(), (4,), (1,))], "list"),
    "a tensor": (View(Storage(), (4,), (1,)), ""),
    "text": ("weights", "str"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_entries_that_are_no_tensors_are_named(path, case):
    state, words = BAD_STATES[case]
    write(path, state)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


# Damaged archives


@pytest.mark.parametrize(
    "data_pkl",
    [
        b"",
        b"garbage",
        b"\x80\x02",
        b"\x80\x02}q\x00.",
        b"\x80\xff.",
        b"\x80\x02.",
        b"(" * 100_000,
        bytes(range(256)),
        b"\x80\x02I" + b"9" * 5000 + b"\n.",
    ],
    ids=["empty", "text", "cut", "an empty dict", "protocol 255", "stop", "marks", "every opcode", "5000 digits"],
)
def test_data_pkl_that_is_garbage(path, data_pkl):
    write(path, data_pkl)
    if data_pkl == b"\x80\x02}q\x00.":  # the control: the same archive with the smallest good pickle
        assert open_checkpoint(path).names == ()
        return
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_compressed_records(path):
    write(path, {"w": View(Storage(), (4,), (1,))}, compress=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed") as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kept", [0.05, 0.3, 0.6, 0.9, 0.99])
def test_truncated_zip(path, kept):
    torch.save({"w": torch.ones(1000)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("nbytes", range(5))
def test_a_few_bytes(path, nbytes):
    torch.save({"w": torch.ones(1)}, path)
    path.write_bytes(path.read_bytes()[:nbytes])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_a_zip_that_is_no_checkpoint(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.value.path == str(path)


def test_two_pickles_in_one_archive(path):
    write(path, {}, extra=[("other/data.pkl", pickled({}))])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.value.path == str(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["model/data/0", "model/data.pkl"])
def test_a_record_that_stands_twice(path, name):
    write(path, {"w": View(Storage(), (4,), (1,))}, extra=[(name, bytes(16))])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.value.path == str(path)


def central_entry(content, name):
    """Where the central directory describes a record."""
    position = content.index(b"PK\x01\x02")
    while content[position + 46 : position + 46 + len(name)] != name:
        position = content.index(b"PK\x01\x02", position + 1)
    return position


@pytest.mark.parametrize("offset", [1, 40, 2**31, 2**32 - 2], ids=["off by one", "inside", "far", "farther"])
def test_a_record_that_is_not_where_the_directory_says(path, offset):
    write(path, {"w": View(Storage(), (4,), (1,))})
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, central_entry(content, b"model/data/0") + 42, offset)
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.value.path == str(path)


def test_two_records_in_the_same_place(path):
    write(path, {"a": View(Storage("0"), (4,), (1,)), "b": View(Storage("1"), (4,), (1,))}, {"0": b"0" * 16, "1": b""})
    content = bytearray(path.read_bytes())
    first, second = (central_entry(content, f"model/data/{key}".encode()) for key in "01")
    content[second + 16 : second + 28] = content[first + 16 : first + 28]  # checksum and sizes
    content[second + 42 : second + 46] = content[first + 42 : first + 46]  # place
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.value.path == str(path)


def zip64_with_offset(offset):
    """An archive whose one record claims to begin at any 64-bit offset."""
    name = b"model/data.pkl"
    local = struct.pack("<4s5H3I2H", b"PK\x03\x04", 45, 0, 0, 0, 0, 0, 0, 0, len(name), 0) + name
    extra = struct.pack("<HHQ", 1, 8, offset)
    central = struct.pack(
        "<4s6H3I5H2I", b"PK\x01\x02", 45, 45, 0, 0, 0, 0, 0, 0, 0, len(name), len(extra), 0, 0, 0, 0, 0xFFFFFFFF
    )
    central += name + extra
    return local + central + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, len(central), len(local), 0)


@pytest.mark.parametrize("offset", [2**40, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_record_at_a_64_bit_offset(path, offset):
    path.write_bytes(zip64_with_offset(offset))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.value.path == str(path)


def test_a_record_name_that_is_not_utf8(path):
    torch.save({"w": torch.ones(2)}, path)
    content = bytearray(path.read_bytes())
    content[central_entry(content, b"model/data/0") + 46] = 0xFF
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.value.path == str(path)


def test_missing_file(path):
    with pytest.raises(MissingFileError) as caught:
        open_checkpoint(path)
    assert caught.value.path == str(path)


# A small pickle may not take much memory or time


GREEDY = """
import pickle, resource, struct, sys, time
sys.path[:0] = {paths!r}
from test_torch_zip import Storage, View, pickled, write
from wan_loader import CheckpointError, open_checkpoint

def tower(levels):
    out = b"U\\x01x"  # 'x'
    for level in range(levels):
        out += b"q" + bytes([200]) + b"h" + bytes([200]) + b"\\x86"  # (top, top)
    return out

view = pickled({{"w": View(Storage(), (4,), (1,))}})
state = {{
    "bytearray": b"\\x80\\x05\\x96" + struct.pack("<Q", 2 << 30) + b".",
    "bytes": b"\\x80\\x04\\x8e" + struct.pack("<Q", 2 << 30) + b".",
    "frame": b"\\x80\\x04\\x95" + struct.pack("<Q", 2 << 30) + b".",
    "memo": b"\\x80\\x02}}r" + struct.pack("<I", 2**31),
    "persistent id": b"\\x80\\x02(" + tower(60) + b"NNNNtQ.",
    "shape": view.replace(b"K\\x04\\x85", tower(60) + b"\\x85", 1),
}}[{case!r}]
write({path!r}, state)
import torch  # its own memory is not the question
resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    open_checkpoint({path!r})
except CheckpointError as error:
    message = str(error)
else:
    sys.exit("no error")
assert len(message) < 10_000, len(message)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert grown < 200_000, f"took {{grown}} kB"
assert time.process_time() - start < 1
"""


@pytest.mark.parametrize("case", ["bytearray", "bytes", "frame", "memo", "persistent id", "shape"])
def test_a_small_pickle_takes_little_memory_and_time(path, case):
    paths = [str(Path(__file__).parent), str(ROOT / "tests")]
    code = textwrap.dedent(GREEDY).format(paths=paths, path=str(path), case=case)
    done = run("-c", code, timeout=30)
    assert done.returncode == 0, done.stderr[-2000:]


# Random damage


def small_file(**options):
    out = io.BytesIO()
    base = torch.arange(6, dtype=torch.float32)
    torch.save(
        {"a": base, "row": base.view(2, 3)[1], "b": torch.tensor([True, False]), "e": torch.empty(0)}, out, **options
    )
    return out.getvalue()


GOOD = {"zip": small_file(), "legacy": small_file(**LEGACY)}


@pytest.mark.parametrize("kind", GOOD)
def test_a_file_cut_anywhere_is_refused(path, kind):
    leaked, last = {}, len(GOOD[kind])
    for nbytes in {*range(0, last, 3), *range(max(0, last - 200), last)}:  # a zip's directory is at its end
        path.write_bytes(GOOD[kind][:nbytes])
        try:
            load_file(path)
        except CheckpointError as error:
            if str(path) not in str(error):
                leaked[nbytes] = error
        except Exception as error:
            leaked[nbytes] = error
        else:
            leaked[nbytes] = "loaded"
    assert not leaked


def fuzz(kind):
    last = len(GOOD[kind]) - 1
    step = st.one_of(
        st.tuples(st.just("set"), st.integers(0, last), st.integers(0, 255)),
        st.tuples(st.just("flip"), st.integers(0, last), st.integers(0, 7)),
        st.tuples(st.just("cut"), st.integers(0, last), st.just(0)),
        st.tuples(st.just("insert"), st.integers(0, last), st.integers(0, 255)),
    )
    return st.lists(step, min_size=1, max_size=3)


def damaged(content, steps):
    out = bytearray(content)
    for kind, position, value in steps:
        position = min(position, max(0, len(out) - 1))
        if kind == "cut":
            del out[position:]
        elif kind == "insert":
            out.insert(position, value)
        elif out:
            out[position] = value if kind == "set" else out[position] ^ (1 << value)
    return bytes(out)


def check_damaged(directory, kind, content):
    path = Path(directory) / f"fuzz-{kind}.pth"
    path.write_bytes(content)
    try:
        loaded = load_file(path)
    except WanLoaderError:
        return
    assert all(isinstance(t, torch.Tensor) for t in loaded.values())
    for tensor in loaded.values():
        if tensor.numel() < 1000:
            tensor.tolist()  # every byte can be reached


@settings(max_examples=400, deadline=2000, database=None, derandomize=True)
@given(steps=fuzz("zip"))
@example(steps=[("cut", 0, 0)])
def test_a_damaged_zip_is_an_error_of_ours_or_loads(tmp_path_factory, steps):
    check_damaged(tmp_path_factory.getbasetemp(), "zip", damaged(GOOD["zip"], steps))


@settings(max_examples=300, deadline=2000, database=None, derandomize=True)
@given(steps=fuzz("legacy"))
def test_a_damaged_legacy_pickle_is_an_error_of_ours_or_loads(tmp_path_factory, steps):
    check_damaged(tmp_path_factory.getbasetemp(), "legacy", damaged(GOOD["legacy"], steps))


@settings(max_examples=300, deadline=2000, database=None, derandomize=True)
@given(steps=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_damaged_pickle_in_a_sound_archive_is_an_error_of_ours_or_loads(tmp_path_factory, steps):
    data_pkl = bytearray(pickled({"w": View(Storage(), (2, 2), (2, 1)), "v": View(Storage("1", 2), (2,), (1,))}))
    for position, value in steps:
        data_pkl[position % len(data_pkl)] = value
    path = Path(tmp_path_factory.getbasetemp()) / "inner.pth"
    write(path, bytes(data_pkl), {"0": bytes(16), "1": bytes(8)})
    check_damaged(tmp_path_factory.getbasetemp(), "inner", path.read_bytes())
